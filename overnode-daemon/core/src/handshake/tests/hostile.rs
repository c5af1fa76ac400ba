//! Tests hostile input from the network: it causes no panic, no state, and no unearned answer.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};

use super::*;

/// Checks invariants that must hold at any time.
fn check(core: &Handshakes) {
    let mut indices = BTreeSet::new();
    for (index, peer) in &core.peers {
        let pending = peer.pending.as_ref().map(|pending| pending.local_index);
        for local_index in peer.sessions().map(|session| session.local_index).chain(pending) {
            assert!(indices.insert(local_index), "an index is used twice");
            assert_eq!(core.slots.owner(local_index), Some(*index));
        }
        assert_eq!(core.by_key.get(&peer.config.public_key), Some(index));
        assert_eq!(peer.deadline, peer.next_deadline());
        assert!(peer.deadline.is_none_or(|deadline| core.deadlines.contains(&(deadline, *index))));
        assert!(peer.sessions().count() <= 4);
    }
    assert_eq!(core.slots.used(), indices.len());
    assert_eq!(core.by_key.len(), core.peers.len());
    assert_eq!(
        core.deadlines.len(),
        core.peers.values().filter(|peer| peer.deadline.is_some()).count()
    );
}

/// Node 0 awaits the response to its initiation. Node 1 has not yet received `initiation`.
/// `response` is a valid answer to it.
struct Captured {
    world: World,
    initiation: Datagram,
    response: Datagram,
}

fn captured() -> Captured {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    world.lost = Box::new(|datagram| datagram.kind() == 2);
    world.run(SECOND);
    let of =
        |kind| world.tapped.iter().find(|(_, d)| d.kind() == kind).expect("not sent").1.clone();
    let (initiation, response) = (of(1), of(2));
    let fresh = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer)
        .nodes
        .pop()
        .expect("there are two nodes");
    world.nodes[1] = fresh;
    Captured { world, initiation, response }
}

fn quiet(core: &mut Core) {
    assert_eq!((core.poll_transmit(), core.poll_event()), (None, None));
}

#[test]
fn every_changed_bit_of_an_initiation_is_noticed() {
    let Captured { mut world, initiation, .. } = captured();
    let (now, core) = (world.now, &mut world.nodes[1].core);
    for bit in 0..132 * 8 {
        let mut bytes = initiation.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        core.handle_datagram(now, initiation.from, &bytes);
        quiet(core);
    }
    // Fix up the first MAC, so that Noise has to detect the change.
    for bit in 8 * 8..116 * 8 {
        let mut bytes = initiation.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        cookie::CookieJar::new(&core.public_key()).seal(&mut bytes, SessionIndex::new(0), now);
        core.reset_gate();
        core.handle_datagram(now, initiation.from, &bytes);
        quiet(core);
    }
    assert_eq!(core.slots_used(), 0);
    check(core);
    core.handle_datagram(now, initiation.from, &initiation.bytes);
    assert!(core.poll_transmit().is_some(), "the unmodified message is still accepted");
}

#[test]
fn every_changed_bit_of_a_response_is_noticed() {
    let Captured { mut world, response, .. } = captured();
    let (now, core) = (world.now, &mut world.nodes[0].core);
    let slots = core.slots_used();
    for bit in 0..76 * 8 {
        let mut bytes = response.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        core.handle_datagram(now, response.from, &bytes);
        quiet(core);
    }
    let mut doubts = 0;
    for bit in 8 * 8..60 * 8 {
        let mut bytes = response.bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        cookie::CookieJar::new(&core.public_key()).seal(&mut bytes, SessionIndex::new(0), now);
        core.reset_gate();
        core.handle_datagram(now, response.from, &bytes);
        assert_eq!(core.poll_transmit(), None);
        while let Some(event) = core.poll_event() {
            assert_eq!(event, Event::Failed { peer: peer(1), why: Failure::BadResponse });
            doubts += 1;
        }
    }
    assert_eq!((core.slots_used(), doubts), (slots, 1));
    check(core);
    core.handle_datagram(now, response.from, &response.bytes);
    assert!(
        matches!(core.poll_event(), Some(Event::Install { .. })),
        "the unmodified message is still accepted"
    );
}

#[test]
fn an_initiation_is_accepted_once() {
    let Captured { mut world, initiation, .. } = captured();
    let core = &mut world.nodes[1].core;
    core.handle_datagram(world.now, initiation.from, &initiation.bytes);
    assert!(core.poll_transmit().is_some());
    while core.poll_event().is_some() {}
    for seconds in [0, 1, 100, 10_000] {
        core.handle_datagram(world.now + SECOND * seconds, initiation.from, &initiation.bytes);
        quiet(core);
    }
    assert_eq!((core.counters().replayed, core.slots_used()), (4, 1));
}

#[test]
fn initiations_less_than_twenty_milliseconds_apart_are_not_answered() {
    let mut world = World::new(1, 2);
    world.introduce(1, 0, Initiate::OnlyAnswer);
    let (mut stamper, remote) = (Stamper::default(), world.nodes[1].core.public_key());
    let identity = Identity::new(world.nodes[0].secret(0), super::super::noise::WIREGUARD);
    let (now, wall, from) = (world.now, world.wall, world.nodes[0].address);
    let core = &mut world.nodes[1].core;
    let mut jar = cookie::CookieJar::new(&remote);
    for number in 0..100 {
        let ephemeral = Secret([number + 1; 32]);
        let stamp = stamper.next(wall);
        let (_, noise) = identity
            .initiate(&remote, &Secret([0; 32]), ephemeral, &stamp)
            .expect("the key is valid");
        let mut bytes = message::initiation(SessionIndex::new(number.into()), &noise);
        jar.seal(&mut bytes, SessionIndex::new(0), now);
        core.handle_datagram(now + Duration::from_millis(u64::from(number)), from, &bytes);
    }
    let Counters { initiations_answered, flooded, .. } = core.counters();
    assert_eq!((initiations_answered, flooded), (5, 95));
}

#[test]
fn misaddressed_unknown_and_own_messages_get_no_answer() {
    let mut world = World::new(1, 3);
    world.introduce(0, 1, Initiate::AtOnce);
    world.introduce(2, 1, Initiate::AtOnce);
    world.introduce(1, 2, Initiate::OnlyAnswer);
    world.run(SECOND);
    let initiation = world.tapped[0].1.clone();
    assert_eq!(initiation.from, world.nodes[0].address);
    assert_eq!(world.nodes[1].core.counters().unknown_peer, 1, "node 1 does not know node 0");
    assert_eq!(world.nodes[1].core.counters().initiations_answered, 1);

    let now = world.now;
    for (at, from) in [(2, initiation.from), (0, initiation.to)] {
        let core = &mut world.nodes[at].core;
        core.handle_datagram(now, from, &initiation.bytes);
        quiet(core);
        assert_eq!(core.counters().strangers, 1);
    }
}

/// Node 0 tries to get a session with node 1, while 2000 initiations a second with a valid first
/// MAC arrive there, from the addresses that `source` returns. Returns the counters of both nodes.
fn flood(source: impl Fn(&mut World) -> SocketAddr) -> (Counters, Counters) {
    let mut world = World::new(1, 2);
    world.introduce(0, 1, Initiate::After(SECOND));
    world.introduce(1, 0, Initiate::OnlyAnswer);
    let victim = world.nodes[1].core.public_key();
    let mut jar = cookie::CookieJar::new(&victim);
    let end = world.now + SECOND * 8;
    while world.now < end {
        for _ in 0..20 {
            let noise = std::array::from_fn(|_| world.rng.random());
            let mut bytes = message::initiation(SessionIndex::new(world.rng.random()), &noise);
            jar.seal(&mut bytes, SessionIndex::new(0), world.now);
            let from = source(&mut world);
            world.inject(Datagram { from, to: world.nodes[1].address, bytes });
        }
        world.run(SECOND / 100);
    }
    assert!(world.joined(0, 1));
    check(&world.nodes[1].core);
    (world.nodes[0].core.counters(), world.nodes[1].core.counters())
}

#[test]
fn a_flood_of_forgeries_does_not_keep_a_peer_out() {
    let (peer, victim) = flood(|world| SocketAddr::from((world.rng.random::<[u8; 4]>(), 9)));
    let most = 8 * 200;
    assert!(victim.forged <= most, "{} forgeries cost a Diffie-Hellman operation", victim.forged);
    assert!(victim.cookies_demanded > 16_000 - most - 10, "{}", victim.cookies_demanded);
    assert_eq!(peer.cookies_received, 0, "load from strangers must not affect the peer");
}

#[test]
fn a_flood_from_a_peers_own_address_does_not_keep_it_out() {
    let (peer, victim) = flood(|world| world.nodes[0].address);
    let most = 8 * 500;
    assert!(victim.forged <= most, "{} forgeries cost a Diffie-Hellman operation", victim.forged);
    assert_eq!(peer.cookies_received, 1);
}

/// Node 0 gets a cookie reply to each initiation and never a response.
#[test]
fn a_peer_that_always_demands_cookies_gets_one_immediate_retry() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    let (begun, address) = (world.now, world.nodes[1].address);
    let mut sent = Vec::new();
    while world.now < begun + SECOND * 30 {
        world.nodes[0].core.handle_timeout(world.now, SystemTime::now());
        while let Some(transmit) = world.nodes[0].core.poll_transmit() {
            sent.push((world.now - begun, transmit.bytes[132..] != [0; 16]));
            // A new secret each time, so that no cookie is ever valid.
            let mut gate = world.nodes[1].core.gate(StdRng::seed_from_u64(sent.len() as u64));
            gate.set_threshold(0);
            let judgment =
                gate.judge(world.now, world.nodes[0].address.into(), &transmit.bytes, || true);
            let gate::Judgment::Reply(reply) = judgment else { panic!("{judgment:?}") };
            world.nodes[0].core.handle_datagram(world.now, address, &reply);
        }
        world.now += SECOND / 100;
    }
    assert!(!sent[0].1 && sent[1..].iter().all(|(_, has_cookie)| *has_cookie), "{sent:?}");
    assert!(sent[1].0 - sent[0].0 < SECOND / 10, "{sent:?}");
    assert!(sent[1..].windows(2).all(|pair| pair[1].0 - pair[0].0 >= SECOND * 5), "{sent:?}");
    assert!((5..8).contains(&sent.len()), "{sent:?}");
}

/// One operation on a node.
#[derive(Clone, Debug)]
enum Op {
    Garbage {
        kind: u8,
        length: usize,
        seed: u64,
    },
    Replay {
        which: usize,
        at: usize,
        flip: Option<(usize, u8)>,
        cut: usize,
        honest_mac: bool,
    },
    Pass {
        millis: u64,
    },
    Upsert {
        at: usize,
        of: usize,
        initiate: Initiate,
        key: u8,
        moved: bool,
    },
    Remove {
        at: usize,
        of: usize,
    },
    Confirm {
        at: usize,
        of: usize,
        which: usize,
    },
    Adopt {
        at: usize,
        of: usize,
        index: u32,
        initiator: bool,
        confirmed: bool,
        sealing: bool,
        age: u64,
    },
    Observe {
        at: usize,
        of: usize,
        ages: [u64; 4],
    },
    Load {
        at: usize,
        threshold: u32,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let node = 0..2_usize;
    let initiate = prop_oneof![
        Just(Initiate::AtOnce),
        Just(Initiate::OnlyAnswer),
        (0..5000_u64).prop_map(|millis| Initiate::After(Duration::from_millis(millis))),
    ];
    let flip = proptest::option::of((0..200_usize, 1..=255_u8));
    prop_oneof![
        2 => (0..6_u8, 0..200_usize, any::<u64>())
            .prop_map(|(kind, length, seed)| Op::Garbage { kind, length, seed }),
        4 => (any::<usize>(), node.clone(), flip, 0..3_usize, any::<bool>()).prop_map(
            |(which, at, flip, cut, honest_mac)| Op::Replay { which, at, flip, cut, honest_mac }
        ),
        6 => prop_oneof![0..100_u64, 0..10_000_u64, 0..200_000_u64]
            .prop_map(|millis| Op::Pass { millis }),
        1 => (node.clone(), node.clone(), initiate, 0..3_u8, any::<bool>())
            .prop_map(|(at, of, initiate, key, moved)| Op::Upsert { at, of, initiate, key, moved }),
        1 => (node.clone(), node.clone()).prop_map(|(at, of)| Op::Remove { at, of }),
        1 => (node.clone(), node.clone(), any::<usize>())
            .prop_map(|(at, of, which)| Op::Confirm { at, of, which }),
        1 => (node.clone(), node.clone(), any::<u32>(), any::<[bool; 3]>(), 0..200_u64).prop_map(
            |(at, of, index, [initiator, confirmed, sealing], age)| {
                Op::Adopt { at, of, index, initiator, confirmed, sealing, age }
            }
        ),
        1 => (node.clone(), node.clone(), any::<[u8; 4]>())
            .prop_map(|(at, of, ages)| Op::Observe { at, of, ages: ages.map(u64::from) }),
        1 => (node, 0..3_u32).prop_map(|(at, threshold)| Op::Load { at, threshold }),
    ]
}

fn perform(world: &mut World, op: Op) {
    let now = world.now;
    match op {
        Op::Garbage { kind, length, seed } => {
            let mut bytes = vec![0; length];
            StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
            if let Some(header) = bytes.first_chunk_mut::<4>() {
                *header = [kind, 0, 0, 0];
            }
            for node in &mut world.nodes {
                node.core.handle_datagram(now, node.address, &bytes);
            }
        }
        Op::Replay { which, at, flip, cut, honest_mac } => {
            let Some((_, datagram)) = world.tapped.get(which % world.tapped.len().max(1)) else {
                return;
            };
            let mut bytes = datagram.bytes[..datagram.bytes.len() - cut].to_vec();
            if let Some((position, value)) = flip
                && let Some(byte) = bytes.get_mut(position)
            {
                *byte ^= value;
            }
            let core = &mut world.nodes[at].core;
            if honest_mac {
                cookie::CookieJar::new(&core.public_key()).seal(
                    &mut bytes,
                    SessionIndex::new(0),
                    now,
                );
            }
            core.handle_datagram(now, datagram.from, &bytes);
        }
        Op::Pass { millis } => world.run(Duration::from_millis(millis)),
        Op::Upsert { at, of, initiate, key, moved } => {
            let mut config = world.config(of, initiate);
            match key {
                0 => {}
                1 => config.preshared_key = Secret([1; 32]),
                _ => config.public_key = PublicKey([key; 32]),
            }
            config.endpoint = config.endpoint.filter(|_| !moved);
            world.upsert(at, of, config);
        }
        Op::Remove { at, of } => {
            world.nodes[at].core.remove_peer(peer(of), now);
            world.nodes[at].planes.remove(&peer(of));
        }
        Op::Confirm { at, of, which } => {
            let node = &mut world.nodes[at];
            let Some(plane) = node.planes.get(&peer(of)) else { return };
            let index = plane.sessions.keys().nth(which % plane.sessions.len().max(1)).copied();
            node.core.handle_confirmed(peer(of), index.unwrap_or_default(), now);
        }
        Op::Adopt { at, of, index, initiator, confirmed, sealing, age } => {
            // Adopt only what the map could hold: an unknown index, in a slot that the plane does
            // not use.
            let node = &mut world.nodes[at];
            let Some(created) = now.checked_sub(SECOND * age as u32) else { return };
            let in_use =
                |plane: &Plane| plane.sessions.keys().any(|old| old.get() & 0xfff == index & 0xfff);
            if node.planes.values().any(in_use)
                || node.withdrawn.keys().any(|old| old.get() & 0xfff == index & 0xfff)
            {
                return;
            }
            let keys = SessionKeys {
                local_index: index.into(),
                remote_index: SessionIndex::new(1),
                tx_key: Secret([0; 32]),
                rx_key: Secret([0; 32]),
                initiator,
                created,
            };
            let held = Held { keys, live: confirmed, sent: 0, received: BTreeSet::new() };
            node.planes.entry(peer(of)).or_default().sessions.insert(index.into(), held);
            let adopted = InheritedSession {
                local_index: index.into(),
                remote_index: SessionIndex::new(1),
                initiator,
                confirmed,
                created,
                sealing,
            };
            node.core.adopt(peer(of), adopted, now);
        }
        Op::Observe { at, of, ages: [a, b, c, d] } => {
            let ago = |age: u64| now.checked_sub(SECOND * age as u32);
            let activity = Activity {
                last_data_sent: ago(a),
                last_sent: ago(b),
                last_data_received: ago(c),
                last_received: ago(d),
                endpoint: (a % 2 == 0).then_some(world.nodes[of].address),
            };
            world.nodes[at].core.handle_activity(peer(of), &activity);
        }
        Op::Load { at, threshold } => world.nodes[at].core.gate.set_threshold(threshold),
    }
    (0..world.nodes.len()).for_each(|at| world.drain(at));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn arbitrary_bytes_have_no_effect(datagrams in proptest::collection::vec(
        proptest::collection::vec(any::<u8>(), 0..300), 1..20,
    )) {
        let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
        world.run(SECOND);
        let core = &mut world.nodes[0].core;
        for bytes in datagrams {
            core.handle_datagram(world.now, address(9), &bytes);
            quiet(core);
        }
        check(core);
    }

    #[test]
    fn no_sequence_of_events_breaks_an_invariant(
        seed: u64,
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let mut world = World::pair(seed, Initiate::AtOnce, Initiate::AtOnce);
        world.weather = Weather { loss: 0.1, repeat: 0.1, delay: (Duration::ZERO, SECOND / 10) };
        for op in ops {
            perform(&mut world, op);
            world.nodes.iter().for_each(|node| check(&node.core));
        }
    }
}
