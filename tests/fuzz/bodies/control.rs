//! Fuzzes control connections: frames, messages, hellos, verdicts and rekeys.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use overnode_core::control::frame::{
    self, FrameSplitter, MAX_FRAME, MAX_HANDSHAKE_FRAME, MAX_MESSAGE, Reassembler,
};
use overnode_core::control::hello::{Hello, MAX_NICKNAME, Refusal, Verdict, clean};
use overnode_core::control::key;
use overnode_core::control::packet::Packet;
use overnode_core::control::renewal::Role;
use overnode_core::control::renewal::{Keys, Renewal};
use overnode_types::{Network, NodeId, Secret};

use super::input::{Input, MAX_STEPS};

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => frames(&mut input),
        1 => packet(input.0),
        2 => greeting(&mut input),
        3 => verdict(input.0),
        4 => parts(&mut input),
        5 => renewals(&mut input),
        _ => {}
    }
}

/// Checks that frames are split in the same way however the bytes arrive, and that split frames are
/// not kept in the buffer.
fn frames(input: &mut Input<'_>) {
    let limit = if input.byte() & 1 == 0 { MAX_FRAME } else { MAX_HANDSHAKE_FRAME };
    let step = usize::from(input.byte()) + 1;
    let at_once = cut(input.0.chunks(input.0.len().max(1)), limit);
    assert_eq!(cut(input.0.chunks(step), limit), at_once);
    let (frames, _) = at_once;
    let mut reassembler = Reassembler::default();
    for frame in frames {
        assert!(frame.len() <= limit);
        match reassembler.push(&frame) {
            Ok(Some(message)) => packet(&message),
            Ok(None) => {}
            Err(_) => break,
        }
    }
}

fn cut<'a>(chunks: impl Iterator<Item = &'a [u8]>, limit: usize) -> (Vec<Vec<u8>>, bool) {
    let (mut splitter, mut frames) = (FrameSplitter::default(), Vec::new());
    for chunk in chunks {
        splitter.buffer().extend_from_slice(chunk);
        loop {
            match splitter.next(limit) {
                Ok(Some(frame)) => frames.push(frame.to_vec()),
                Ok(None) => break,
                Err(_) => return (frames, true),
            }
        }
        assert!(
            splitter.buffer().len() < 2 + limit,
            "the buffer keeps more than an incomplete frame"
        );
    }
    (frames, false)
}

fn packet(bytes: &[u8]) {
    if let Ok(packet) = Packet::decode(bytes) {
        assert_eq!(packet.encode(), bytes);
    }
}

fn greeting(input: &mut Input<'_>) {
    let mine = me();
    // The handshake has proven the key that belongs to the identity in the hello, if the hello has
    // one of the two identities.
    let is_named = |hello: &Hello| input.0.windows(32).any(|bytes| bytes == hello.verifying_key.0);
    let proven = if is_named(&mine) { mine.public_key } else { node(2).public_key };
    match Hello::decode(input.0, proven, mine.versions) {
        Ok(hello) => {
            assert_eq!(clean(&hello.nickname), hello.nickname);
            assert!(hello.nickname.len() <= MAX_NICKNAME);
            let encoded = hello.encode();
            let again = Hello::decode(&encoded, hello.public_key, mine.versions);
            assert_eq!(again.expect("a decoded message can be sent"), hello);
            refusal(mine.check(&hello));
        }
        Err(error) => refusal(Err(error)),
    }
}

fn refusal(checked: Result<(), Refusal>) {
    if let Err(refusal) = checked {
        let words = refusal.to_string();
        assert!(words.len() < 1000 && !words.chars().any(char::is_control), "{words:?}");
    }
}

fn verdict(bytes: &[u8]) {
    let Ok(verdict) = Verdict::decode(bytes) else { return };
    if let Verdict::IdClash { holder, newcomer, .. } = &verdict {
        for name in [holder, newcomer] {
            assert!(name.len() <= MAX_NICKNAME && clean(name) == *name, "{name:?}");
        }
    }
    assert_eq!(Verdict::decode(&verdict.encode()).expect("a decoded message can be sent"), verdict);
}

/// Checks that a message survives being sent. It consists of repeated bytes so that it can be long.
fn parts(input: &mut Input<'_>) {
    let length = usize::from(input.short()) * 17 % (MAX_MESSAGE + 1);
    let pattern = if input.0.is_empty() { &[0] } else { input.0 };
    let message: Vec<u8> = pattern.iter().copied().cycle().take(length).collect();
    let mut reassembler = Reassembler::default();
    let joined: Vec<_> = frame::parts(&message)
        .filter_map(|part| reassembler.push(&part).expect("a valid part"))
        .collect();
    assert!(joined == [message], "a message of {length} bytes was not reassembled");
}

/// Simulates both ends of a connection, with key frames that arrive intact, altered, or forged. An
/// end that detects an error ends the connection. Until then, both ends have the same keys.
fn renewals(input: &mut Input<'_>) {
    const EVERY: Duration = Duration::from_secs(60);
    let mut now = Instant::now();
    let secrets = [Secret([1; 32]), Secret([2; 32])];
    let mut ends = [(Role::Initiator, 0, 1), (Role::Responder, 1, 0)].map(|(role, own, other)| {
        let own = (secrets[own].clone(), Secret([9; 32]));
        Renewal::new(role, own, key::public_key(&secrets[other]), vec![7; 32], EVERY, now)
    });
    // The latest keys that each end sends and receives with.
    let mut keys: [(Option<Keys>, Option<Keys>); 2] = Default::default();
    let mut flying: VecDeque<(usize, Vec<u8>)> = VecDeque::new();
    for _ in 0..MAX_STEPS {
        let Some(step) = input.step() else { break };
        let (to, bytes) = match step & 7 {
            0 => {
                now += Duration::from_secs(input.byte().into());
                continue;
            }
            1 => {
                flying.extend(ends[0].begin().map(|offer| (1, offer)));
                assert!(ends[1].begin().is_none(), "the responder must not start a rekey");
                continue;
            }
            2 | 3 => {
                let Some((to, mut bytes)) = flying.pop_front() else { continue };
                if step & 1 == 1 {
                    let at = usize::from(input.byte());
                    match bytes.get_mut(at) {
                        Some(byte) => *byte ^= input.byte(),
                        None => bytes.truncate(at / 2),
                    }
                }
                (to, bytes)
            }
            4 => (usize::from(step >> 3) & 1, input.bytes().to_vec()),
            _ => continue,
        };
        let Ok(step) = ends[to].handle(&bytes, now) else { return };
        if let Some(receive_by) = step.receive_by {
            keys[to].1 = Some(receive_by);
        }
        if let Some(handover) = step.send {
            keys[to].0 = Some(handover.keys);
            flying.push_back((1 - to, handover.bytes));
        }
        if flying.is_empty() && ends[0].due().is_some() {
            for (from, to) in [(0, 1), (1, 0)] {
                let (Some(sender), Some(receiver)) = (&keys[from].0, &keys[to].1) else { continue };
                let (mut sealed, mut opened) = ([0; 20], [0; 4]);
                sender.write_message(0, b"text", &mut sealed).expect("the buffer has room");
                assert!(
                    receiver.read_message(0, &sealed, &mut opened).is_ok(),
                    "the two ends have different keys"
                );
            }
        }
    }
}

fn me() -> Hello {
    node(1)
}

fn node(seed: u8) -> Hello {
    let seed = Secret([seed; 32]);
    Hello {
        versions: (2, 2),
        id: NodeId::new(1).expect("in range"),
        incarnation: 1,
        nickname: "host1".into(),
        network: Network::default(),
        verifying_key: key::verifying_key(&seed),
        process: 1,
        public_key: key::public_key(&key::exchange_secret(&seed)),
    }
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let peer = Hello {
        id: NodeId::new(4095).expect("in range"),
        nickname: "hôte".into(),
        process: 2,
        ..node(2)
    };
    let clash = Verdict::IdClash {
        id: peer.id,
        holder: "host1".into(),
        newcomer: "host2\u{202e}\n".into(),
    };
    let of = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    vec![
        (
            "frames",
            of(0, &[0, 2, 0, 3, 0, 1, 7, 0, 9, 1, 1, 1, 2, 3, 4, 5, 6, 7, 0, 4, 1, 0, 0, 0]),
        ),
        ("too-long-a-frame", of(0, &[1, 200, 0, 2, 1, 3, 8, 1, 0, 0])),
        ("packet-gossip", of(1, &Packet::Gossip(vec![1, 2]).encode())),
        ("packet-ping", of(1, &Packet::Ping(7).encode())),
        ("packet-parcel", of(1, &Packet::RoutedMessage(vec![3]).encode())),
        ("greeting", of(2, &peer.encode())),
        ("greeting-from-myself", of(2, &me().encode())),
        (
            "greeting-of-a-later-version",
            of(2, &Hello { versions: (3, 9), ..peer.clone() }.encode()),
        ),
        ("greeting-with-more", of(2, &[peer.encode(), vec![1, 2, 3]].concat())),
        ("verdict-welcome", of(3, &Verdict::Welcome.encode())),
        ("verdict-clash", of(3, &clash.encode())),
        ("parts", of(4, &[0, 100, 1, 2, 3])),
        ("keys", of(1, &frame::with_keys(&[1, 2]))),
        ("renewals", of(5, &[0, 60, 1, 2, 2, 2, 0, 60, 1, 2, 2, 2])),
        ("a-renewal-that-is-altered", of(5, &[0, 60, 1, 3, 40, 1, 2])),
        ("a-renewal-of-nobody", of(5, &[0, 60, 12, 2, 1, 1, 4, 0])),
    ]
}
