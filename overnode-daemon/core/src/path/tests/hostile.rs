use proptest::prelude::*;

use super::super::probe::Kind;
use super::*;

fn alone() -> (Paths, Instant) {
    let now = Instant::now();
    let mut paths = Paths::new(StdRng::seed_from_u64(1));
    paths.set_peer(B, 1440, now);
    paths.handle_timeout(now);
    (paths, now)
}

fn sent(paths: &mut Paths) -> Vec<Probe> {
    let actions = std::iter::from_fn(|| paths.poll_action());
    let decoded = actions.filter_map(|action| match action {
        Action::Send { bytes, .. } => {
            Some(Probe::decode(&bytes, bytes.len() as u32 + ENCAP_LEN).unwrap())
        }
        Action::Changed { .. } => None,
    });
    decoded.collect()
}

fn give(paths: &mut Paths, from: NodeId, probe: Probe, now: Instant) {
    paths.handle_probe(from, &probe.encode(), probe.size, now);
}

fn answer(request: Probe) -> Probe {
    Probe { kind: Kind::Answer, size: SMALLEST, seen: 0, ..request }
}

#[test]
fn only_the_answer_to_an_open_request_counts_and_only_once() {
    let (mut paths, now) = alone();
    let request = sent(&mut paths)[0];
    let good = answer(request);
    let bad = [
        Probe { sequence: good.sequence + 1, ..good },
        Probe { sequence: u64::MAX, ..good },
        Probe { stamp: good.stamp ^ 1, ..good },
        Probe { stamp: 0, sequence: 0, ..good },
    ];
    for probe in bad {
        give(&mut paths, B, probe, now + ms(10));
    }
    assert_eq!((paths.counters().stray, paths.state(B).unwrap().last_heard), (4, None));
    give(&mut paths, B, good, now + ms(10));
    assert_eq!(paths.state(B).unwrap().last_heard, Some(now + ms(10)));
    for _ in 0..3 {
        give(&mut paths, B, good, now + ms(20));
    }
    assert_eq!(paths.counters().stray, 7);
    assert_eq!(
        paths.state(B).unwrap().last_heard,
        Some(now + ms(10)),
        "a replay does not count as a sign of life"
    );
}

#[test]
fn an_answer_that_comes_too_late_does_not_count() {
    let (mut paths, now) = alone();
    let request = sent(&mut paths)[0];
    give(&mut paths, B, answer(request), now + LATEST_ANSWER);
    assert_eq!((paths.counters().stray, paths.state(B).unwrap().alive), (1, false));
}

#[test]
fn the_answer_of_one_node_is_not_accepted_from_another() {
    let (mut paths, now) = alone();
    let request = sent(&mut paths)[0];
    give(&mut paths, node(4), answer(request), now);
    assert_eq!(paths.counters().unknown_peers, 1);
    paths.set_peer(node(3), 1440, now);
    give(&mut paths, node(3), answer(request), now);
    assert_eq!(paths.counters().stray, 1);
    assert!(!paths.state(node(3)).unwrap().alive && !paths.state(B).unwrap().alive);
}

#[test]
fn a_flood_of_requests_is_answered_at_a_bounded_rate_with_small_packets() {
    let (mut paths, now) = alone();
    sent(&mut paths);
    let request =
        Probe { kind: Kind::Request, size: 1440, sequence: 7, stamp: 9, seen: 0, carries: 0 };
    for n in 0..10_000 {
        give(&mut paths, B, Probe { sequence: n, ..request }, now + ms(n / 10));
    }
    let answers = sent(&mut paths);
    let bound = ANSWER_BURST as usize + 1000 / ANSWER_INTERVAL.as_millis() as usize + 1;
    assert!(answers.len() <= bound, "{} answers", answers.len());
    assert!(answers.iter().all(|answer| answer.kind == Kind::Answer && answer.size == SMALLEST));
    assert_eq!(paths.counters().limited, 10_000 - answers.len() as u64);
    assert!(!paths.state(B).unwrap().alive, "requests do not make the path alive");
    give(&mut paths, B, request, now + secs(3));
    assert_eq!(sent(&mut paths).len(), 1, "it is answered again later");
}

#[test]
fn the_largest_received_size_is_reported_and_later_forgotten() {
    let (mut paths, now) = alone();
    sent(&mut paths);
    let request =
        Probe { kind: Kind::Request, size: 1440, sequence: 1, stamp: 1, seen: 0, carries: 0 };
    let mut seen_at = |size, at| {
        give(&mut paths, B, Probe { size, ..request }, at);
        sent(&mut paths)[0].seen
    };
    assert_eq!(seen_at(1440, now), 1440);
    assert_eq!(seen_at(100, now + ms(1900)), 1440);
    assert_eq!(seen_at(100, now + ms(3900)), 1440);
    assert_eq!(seen_at(200, now + ms(4000)), 200);
    assert_eq!(seen_at(100, now + secs(60)), 100);
}

#[test]
fn a_removed_node_is_a_stranger_and_gets_nothing_more() {
    let (mut paths, now) = alone();
    paths.remove_peer(B);
    assert_eq!((paths.poll_action(), paths.poll_timeout(), paths.state(B)), (None, None, None));
    give(
        &mut paths,
        B,
        Probe { kind: Kind::Request, size: 60, sequence: 1, stamp: 1, seen: 0, carries: 0 },
        now,
    );
    assert_eq!((paths.poll_action(), paths.counters().unknown_peers), (None, 1));
}

proptest! {
    #[test]
    fn arbitrary_bytes_from_a_peer_do_no_harm(
        frames in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..80), any::<u32>(), 0u64..500),
            0..60,
        ),
    ) {
        let (mut paths, mut now) = alone();
        for (bytes, received, pause) in frames {
            now += ms(pause);
            paths.handle_probe(B, &bytes, received, now);
            paths.handle_timeout(now);
        }
        prop_assert!(!paths.state(B).unwrap().alive);
        prop_assert_eq!(paths.state(B).unwrap().mtu, 1440);
    }

    /// A peer that answers with every field forged, in any order, twice or never.
    #[test]
    fn a_lying_peer_spoils_only_its_own_path(
        lies in prop::collection::vec((0usize..8, any::<u32>(), any::<bool>(), 1u64..800), 1..120),
    ) {
        let (mut paths, mut now) = alone();
        let mut requests = sent(&mut paths);
        for (which, seen, forge, pause) in lies {
            now += ms(pause);
            paths.handle_timeout(now);
            requests.extend(sent(&mut paths));
            if let Some(request) = requests.iter().rev().nth(which) {
                let stamp = request.stamp ^ u64::from(forge);
                give(&mut paths, B, Probe { seen, stamp, ..answer(*request) }, now);
            }
            let state = paths.state(B).unwrap();
            prop_assert!((SMALLEST..=1440).contains(&state.mtu));
            prop_assert!((0.0..=1.0).contains(&state.loss));
            prop_assert!(paths.poll_timeout().is_some_and(|at| at < now + secs(3)));
        }
        prop_assert!(sent(&mut paths).len() <= 8);
    }
}
