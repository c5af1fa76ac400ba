//! Fuzzes the path state of a node that receives probes.

use std::time::{Duration, Instant};

use overnode_core::path::probe::{ENCAP_LEN, Kind, LARGEST, Probe, SMALLEST};
use overnode_core::path::{Action, Paths};
use overnode_types::NodeId;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::input::{Input, MAX_STEPS};

/// Runs a node with two peers that send any probes. Requests are also answered, sometimes with a
/// wrong stamp.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut now = Instant::now();
    let mut paths = Paths::new(StdRng::seed_from_u64(1));
    let peers = [1, 2].map(|number| NodeId::new(number).expect("in range"));
    for peer in peers {
        paths.set_peer(peer, 1440, now);
    }
    let mut asked: Vec<(NodeId, Probe)> = Vec::new();
    for _ in 0..MAX_STEPS {
        let Some(step) = input.step() else { break };
        let peer = peers[usize::from(step >> 4) & 1];
        match step & 15 {
            0 => {
                let received = u32::from(input.short());
                paths.handle_probe(peer, input.bytes(), received, now);
            }
            1 => {
                let which = usize::from(input.byte());
                if let Some((peer, request)) = asked.get(which % asked.len().max(1)) {
                    let (lie, seen) = (input.byte(), u32::from(input.short()));
                    let stamp = request.stamp ^ u64::from(lie);
                    let answer =
                        Probe { kind: Kind::Answer, size: SMALLEST, stamp, seen, ..*request };
                    paths.handle_probe(*peer, &answer.encode(), SMALLEST, now);
                }
            }
            2 => {
                now += Duration::from_millis(u64::from(input.short()));
                paths.handle_timeout(now);
                assert!(
                    paths.poll_timeout().is_some_and(|next| next > now),
                    "the timeout does not advance"
                );
            }
            3 => paths.set_busy(peer, step & 0x20 == 0, now),
            4 => paths.handle_unsent(peer, u32::from(input.short()), now),
            5 => paths.handle_suspicion(peer, now),
            6 => paths.set_peer(peer, u32::from(input.short()), now),
            _ => {}
        }
        let mut sent = 0;
        while let Some(action) = paths.poll_action() {
            let Action::Send { to, bytes } = action else { continue };
            sent += 1;
            assert!(sent <= 16, "one step sends too many probes");
            let size = bytes.len() as u32 + ENCAP_LEN;
            let probe = Probe::decode(&bytes, size).expect("a valid probe");
            match probe.kind {
                Kind::Request => asked.push((to, probe)),
                Kind::Answer => {
                    assert_eq!(size, SMALLEST, "an answer is longer than its request")
                }
            }
        }
        for peer in peers {
            let state = paths.state(peer).expect("the peer still exists");
            assert!(state.mtu <= LARGEST, "{state:?}");
        }
    }
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let request =
        Probe { kind: Kind::Request, size: 60, sequence: 1, stamp: 2, seen: 1440, carries: 1440 };
    let incoming =
        [&[0], &(request.size as u16).to_le_bytes()[..], &Input::framed(&request.encode())]
            .concat();
    let exchange = [2, 0, 0, 1, 0, 0, 0xa0, 5, 1, 1, 0, 0xa0, 5, 2, 100, 0].repeat(3);
    vec![
        ("asked", incoming.repeat(2)),
        ("answered", exchange.clone()),
        ("silent", [exchange, [2, 255, 255].repeat(8), vec![5, 4, 0, 4, 6, 0, 3]].concat()),
    ]
}
