//! Tests one rule of the protocol, or of this implementation, at a time.

use overnode_types::NodeId;

use super::*;

fn joined_pair(seed: u64, second: Initiate) -> World {
    let mut world = World::pair(seed, Initiate::AtOnce, second);
    world.run(SECOND * 2);
    assert!(world.joined(0, 1));
    world
}

/// Sends data in both directions, 100 times a second.
fn traffic(world: &mut World, duration: Duration) {
    let end = world.now + duration;
    while world.now < end {
        world.send_data(0, 1);
        world.send_data(1, 0);
        world.run(SECOND / 100);
    }
}

fn refused(world: &World) -> u64 {
    world.nodes.iter().map(|node| node.unsent + node.refused.values().sum::<u64>()).sum()
}

fn seconds(world: &World, times: &[Instant]) -> Vec<u64> {
    times.iter().map(|at| (*at - world.start).as_secs()).collect()
}

fn initiation_of(world: &World, from: usize) -> Datagram {
    let from = world.nodes[from].address;
    let sent = world.tapped.iter().rev().find(|(_, d)| d.from == from && d.kind() == 1);
    sent.expect("no initiation was sent").1.clone()
}

#[test]
fn the_second_side_initiates_if_the_first_does_not() {
    let mut world = World::new(1, 2);
    world.introduce(1, 0, Initiate::After(SECOND * 2));
    world.run(SECOND);
    world.introduce(0, 1, Initiate::OnlyAnswer);
    world.run(SECOND / 2);
    assert_eq!(world.initiations(1), []);
    world.run(SECOND);
    assert!(world.joined(0, 1));
    assert_eq!(world.initiations(1), [world.start + SECOND * 2]);
}

#[test]
fn a_peer_without_an_endpoint_is_answered_at_its_source_address() {
    let mut world = World::new(1, 2);
    let config = PeerConfig { endpoint: None, ..world.config(1, Initiate::AtOnce) };
    world.upsert(0, 1, config);
    world.run(SECOND * 10);
    assert_eq!(world.tapped.len(), 0);
    world.introduce(1, 0, Initiate::AtOnce);
    world.run(SECOND);
    assert!(world.joined(0, 1));
    assert_eq!(world.initiations(0), [], "the peer initiated first");
    let view = world.nodes[0].core.peer(peer(1)).expect("the peer is configured");
    assert_eq!(view.endpoint, Some(world.nodes[1].address.into()));
    assert_eq!(view.last_handshake, Some(world.start + SECOND * 10 + SECOND / 100));
}

#[test]
fn a_silent_peer_is_retried_forever_with_growing_pauses() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    world.lost = Box::new(|_| true);
    world.run(SECOND * 1800);
    let made = world.initiations(0);
    let pauses: Vec<_> = made.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let jittered =
        |pause: &Duration, least: Duration| *pause >= least && *pause <= least + timers::JITTER;
    let early = pauses.iter().take_while(|pause| **pause < SECOND * 6).count();
    assert!((17..=19).contains(&early), "90 seconds of attempts: {pauses:?}");
    assert!(pauses[..early].iter().all(|pause| jittered(pause, SECOND * 5)));
    assert!(pauses[early..early + 4].is_sorted());
    assert!(pauses[early + 6..].iter().all(|pause| jittered(pause, SECOND * 30)));
    assert!(pauses[..early].iter().collect::<BTreeSet<_>>().len() > 10, "the jitter must vary");
    assert_eq!(world.nodes[0].failures, [(peer(1), Failure::Unanswered)], "reported once");
    assert_eq!(world.nodes[0].core.slots_used(), 1);

    world.lost = Box::new(|_| false);
    world.run(SECOND * 31);
    assert!(world.joined(0, 1));
}

#[test]
fn a_hint_shortens_the_wait_but_not_below_five_seconds() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    world.lost = Box::new(|_| true);
    world.run(SECOND * 600);
    world.lost = Box::new(|_| false);
    let last = *world.initiations(0).last().expect("no attempt was made");
    world.nodes[0].core.retry(peer(1));
    world.run_until(world.now.max(last + SECOND * 5) + SECOND);
    assert!(world.joined(0, 1));
    assert!(world.initiations(0).windows(2).all(|pair| pair[1] - pair[0] >= timers::REKEY_TIMEOUT));
}

#[test]
fn a_new_endpoint_is_tried_at_once_and_the_same_one_changes_nothing() {
    let mut world = World::new(1, 2);
    let nowhere = SocketAddr::from(([203, 0, 113, 1], 6784));
    let mut config = world.config(1, Initiate::AtOnce);
    config.endpoint = Some(nowhere);
    world.upsert(0, 1, config.clone());
    world.introduce(1, 0, Initiate::OnlyAnswer);
    world.run(SECOND * 300);
    let attempts = world.initiations(0).len();
    world.upsert(0, 1, config.clone());
    world.run(SECOND);
    assert!(world.initiations(0).len() <= attempts + 1);
    config.endpoint = Some(world.nodes[1].address);
    world.upsert(0, 1, config);
    world.run(SECOND * 6);
    assert!(world.joined(0, 1));
}

#[test]
fn received_data_is_acknowledged_after_ten_seconds_of_silence() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    world.run(SECOND * 20);
    world.nodes[1].keepalives.clear();
    world.send_data(0, 1);
    let sent = world.now;
    world.run(SECOND * 9);
    assert_eq!(world.nodes[1].keepalives, []);
    world.run(SECOND * 3);
    let [kept] = world.nodes[1].keepalives[..] else { panic!("{:?}", world.nodes[1].keepalives) };
    assert!(kept - sent >= SECOND * 10 && kept - sent <= SECOND * 11 + SECOND / 10);
    world.run(SECOND * 60);
    assert_eq!(world.nodes[1].keepalives.len(), 1, "one keepalive is enough");
    world.send_data(0, 1);
    world.run(SECOND * 5);
    world.send_data(1, 0);
    world.run(SECOND * 9);
    assert_eq!(world.nodes[1].keepalives.len(), 1, "data counts as an answer");
}

#[test]
fn a_persistent_keepalive_breaks_every_silence() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    let mut config = world.config(0, Initiate::OnlyAnswer);
    config.persistent_keepalive = Some(SECOND * 25);
    world.upsert(1, 0, config);
    world.run(SECOND * 115 - (world.now - world.start));
    let pauses: Vec<_> =
        world.nodes[1].keepalives.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses, [SECOND * 25; 3]);
}

#[test]
fn data_without_an_answer_leads_to_a_new_handshake() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    // The other side forgets everything, so data of the old session has no effect there.
    world.restart(1, 0, Initiate::OnlyAnswer, false);
    let begun = world.now;
    let recovered = (0..300).find(|_| {
        world.send_data(0, 1);
        world.run(SECOND / 10);
        world.joined(0, 1)
    });
    assert!(recovered.is_some());
    assert!(
        world.now - begun >= SECOND * 14 && world.now - begun <= SECOND * 17,
        "{:?}",
        world.now - begun
    );
    assert_eq!(world.initiations(0).len(), 2);
}

#[test]
fn answered_data_leads_to_no_new_handshake() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    traffic(&mut world, SECOND * 60);
    assert_eq!(world.initiations(0).len(), 1);
    // Data in one direction only: the other side's keepalives count as answers.
    for _ in 0..500 {
        world.send_data(0, 1);
        world.run(SECOND / 10);
    }
    assert_eq!(world.initiations(0).len(), 1);
    assert_eq!(refused(&world), 0);
}

#[test]
fn a_restarted_node_recovers_by_itself() {
    for initiate in [Initiate::AtOnce, Initiate::After(SECOND * 2)] {
        let mut world = joined_pair(1, Initiate::After(SECOND * 2));
        world.run(SECOND * 30);
        world.restart(1, 0, initiate, false);
        let restarted = world.now;
        while !world.joined(0, 1) {
            world.run(SECOND / 100);
        }
        assert!(world.now - restarted <= SECOND * 2 + SECOND / 10);
    }
}

#[test]
fn adopted_sessions_continue_without_interruption() {
    for restarts in [&[0][..], &[1], &[0, 1], &[0, 0, 1]] {
        let mut world = joined_pair(1, Initiate::After(SECOND * 2));
        traffic(&mut world, SECOND * 100);
        for at in restarts {
            world.restart(*at, 1 - at, Initiate::AtOnce, true);
            traffic(&mut world, SECOND / 2);
        }
        let rest = SECOND * 500 - (world.now - world.start);
        traffic(&mut world, rest);
        assert_eq!(refused(&world), 0, "{restarts:?}");
        assert_eq!(seconds(&world, &world.initiations(0)), [0, 120, 240, 360, 480], "{restarts:?}");
        assert_eq!(world.initiations(1), []);
    }
}

#[test]
fn sessions_that_cannot_be_adopted_are_withdrawn() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    let (now, core) = (world.now, &mut world.nodes[0].core);
    let good = InheritedSession {
        local_index: SessionIndex::new(0x1000_0005),
        remote_index: SessionIndex::new(9),
        initiator: true,
        confirmed: true,
        created: now,
        sealing: true,
    };
    core.adopt(peer(1), good, now + SECOND);
    assert_eq!(core.poll_event(), None);
    let again = InheritedSession { local_index: SessionIndex::new(0x2000_0005), ..good };
    let none = InheritedSession { local_index: SessionIndex::new(0x2000_0000), ..good };
    let old = InheritedSession { local_index: SessionIndex::new(0x2000_0006), ..good };
    let cases = [
        (peer(1), again, now + SECOND),
        (peer(1), none, now + SECOND),
        (peer(1), old, now + REJECT_AFTER_TIME),
        (
            peer(7),
            InheritedSession { local_index: SessionIndex::new(0x2000_0007), ..good },
            now + SECOND,
        ),
    ];
    for (peer, session, at) in cases {
        core.adopt(peer, session, at);
        let local_index = session.local_index;
        assert_eq!(core.poll_event(), Some(Event::Withdraw { peer, local_index }));
    }
    assert_eq!(core.slots_used(), 1);
}

#[test]
fn without_a_renewal_a_session_ends_after_three_minutes() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    world.lost = Box::new(|datagram| datagram.kind() != 4);
    world.run(SECOND * 178 - SECOND / 2 - (world.now - world.start));
    traffic(&mut world, SECOND * 2);
    assert_eq!(refused(&world), 0);
    assert_eq!(world.plane(0, 1).sessions.len(), 1);
    world.run(SECOND);
    assert_eq!((world.plane(0, 1).sessions.len(), world.plane(1, 0).sessions.len()), (0, 0));
    assert_eq!(world.nodes[1].core.slots_used(), 0);
    world.lost = Box::new(|_| false);
    world.run(SECOND * 6);
    assert!(world.joined(0, 1));
}

#[test]
fn the_responder_renews_when_the_initiator_does_not() {
    let mut world = joined_pair(1, Initiate::After(SECOND * 2));
    let silent = world.nodes[0].address;
    world.lost = Box::new(move |datagram| datagram.kind() == 1 && datagram.from == silent);
    traffic(&mut world, SECOND * 400);
    assert_eq!(refused(&world), 0);
    let made = seconds(&world, &world.initiations(1));
    assert_eq!(made, [140, 260, 380], "after the first renewal it is the initiator");
}

#[test]
fn lost_keepalives_leave_no_session_without_a_sender() {
    let mut world = joined_pair(1, Initiate::After(SECOND * 2));
    // For a while from the first renewal on, none of the initiator's data arrives.
    let (silent, from) = (world.nodes[0].address, world.start + SECOND * 119);
    world.run_until(from);
    world.lost = Box::new(move |datagram| datagram.kind() == 4 && datagram.from == silent);
    world.run(SECOND * 10);
    world.lost = Box::new(|_| false);
    for _ in 0..1200 {
        world.run(SECOND / 10);
        assert!(world.joined(0, 1), "{:?}", world.now - world.start);
    }
}

#[test]
fn a_peer_that_moves_is_followed() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    let moved = SocketAddr::from(([198, 51, 100, 7], 1234));
    world.nodes[0].address = moved;
    world.run(SECOND * 119);
    assert_eq!(world.plane(1, 0).remote, Some(moved));
    assert_eq!(
        world.nodes[1].core.peer(peer(0)).expect("the peer is configured").endpoint,
        Some(moved.into())
    );
    assert!(world.joined(0, 1));
}

#[test]
fn a_replay_after_a_restart_diverts_nothing() {
    let mut world = joined_pair(1, Initiate::After(SECOND * 2));
    traffic(&mut world, SECOND * 300);
    let attacker = SocketAddr::from(([203, 0, 113, 66], 666));
    let recorded: Vec<_> = world
        .tapped
        .iter()
        .filter(|(_, d)| d.kind() == 1)
        .map(|(_, datagram)| datagram.clone())
        .collect();
    assert_eq!(recorded.len(), 3);
    world.restart(1, 0, Initiate::After(SECOND * 2), true);
    let before = refused(&world);
    for datagram in recorded {
        world.inject(Datagram { from: attacker, ..datagram });
        traffic(&mut world, SECOND);
        assert_eq!(world.plane(1, 0).remote, Some(world.nodes[0].address));
        assert_eq!(
            world.nodes[1].core.peer(peer(0)).expect("the peer is configured").endpoint,
            Some(world.nodes[0].address.into())
        );
    }
    assert_eq!(
        world.nodes[1].core.counters().initiations_answered,
        3,
        "nothing shows that they are replayed"
    );
    traffic(&mut world, SECOND * 200);
    assert_eq!(refused(&world), before);
    assert!(world.joined(0, 1));
}

#[test]
fn another_public_key_is_another_peer() {
    let mut world = World::new(1, 3);
    world.introduce(0, 1, Initiate::AtOnce);
    world.introduce(1, 0, Initiate::OnlyAnswer);
    world.introduce(2, 0, Initiate::OnlyAnswer);
    world.run(SECOND);
    assert!(world.joined(0, 1));
    let taken = world.config(1, Initiate::AtOnce);
    world.upsert(0, 2, taken);
    assert_eq!(world.nodes[0].failures, [(peer(2), Failure::DuplicateKey(peer(1)))]);

    let config = world.config(2, Initiate::AtOnce);
    world.upsert(0, 1, config);
    assert_eq!(world.plane(0, 1).sessions.len(), 0, "sessions end when the key changes");
    world.run(SECOND);
    assert_eq!(world.nodes[0].core.slots_used(), 1);
    assert!(world.nodes[2].planes[&peer(0)].sessions.len() == 1);
}

#[test]
fn a_new_preshared_key_applies_from_the_next_handshake_on() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    let change = |world: &mut World, at: usize| {
        let mut config = world.config(1 - at, [Initiate::AtOnce, Initiate::OnlyAnswer][at]);
        config.preshared_key = Secret([0x66; 32]);
        world.upsert(at, 1 - at, config);
    };
    change(&mut world, 0);
    traffic(&mut world, SECOND * 140);
    assert_eq!((refused(&world), world.nodes[0].installed.len()), (0, 1));
    assert_eq!(world.nodes[0].failures[0], (peer(1), Failure::BadResponse));
    change(&mut world, 1);
    traffic(&mut world, SECOND * 60);
    assert_eq!((refused(&world), world.nodes[0].installed.len()), (0, 2));
}

#[test]
fn an_invalid_key_is_reported() {
    let mut world = World::new(1, 2);
    let mut config = world.config(1, Initiate::AtOnce);
    config.public_key = PublicKey([0; 32]);
    world.upsert(0, 1, config);
    world.run(SECOND);
    assert_eq!(world.nodes[0].failures, [(peer(1), Failure::BadKey)]);
    assert_eq!((world.nodes[0].core.slots_used(), world.tapped.len()), (0, 0));
}

#[test]
fn a_removed_peer_leaves_nothing() {
    let mut world = joined_pair(1, Initiate::AtOnce);
    world.run(SECOND * 121);
    let (now, core) = (world.now, &mut world.nodes[0].core);
    core.remove_peer(peer(1), now);
    core.remove_peer(peer(1), now);
    assert_eq!((core.slots_used(), core.poll_timeout(), core.peer(peer(1))), (0, None, None));
    core.retry(peer(1));
    core.handle_activity(peer(1), &Activity::default());
    core.handle_confirmed(peer(1), SessionIndex::new(77), now);
    assert_eq!((core.poll_timeout(), core.poll_event()), (None, None));
    let again = initiation_of(&world, 1);
    world.inject(again);
    world.run(SECOND);
    assert_eq!(world.nodes[0].core.counters().unknown_peer, 1);
}

#[test]
fn the_wall_clock_may_be_set_back_while_we_run() {
    let mut world = joined_pair(1, Initiate::OnlyAnswer);
    for _ in 0..3 {
        world.wall -= Duration::from_secs(86400);
        traffic(&mut world, SECOND * 125);
    }
    assert_eq!(refused(&world), 0);
    assert_eq!(world.nodes[1].core.counters().replayed, 0);
    assert_eq!(world.nodes[0].installed.len(), 4);
}

#[test]
fn running_out_of_slots_is_reported_and_temporary() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    for at in 0..2 {
        let (now, core): (_, &mut Handshakes) = (world.now, &mut world.nodes[at].core);
        let taken: Vec<_> =
            std::iter::from_fn(|| core.slots.allocate(PeerIndex(9), now, &mut core.rng)).collect();
        assert_eq!(taken.len(), 4095);
        world.run(SECOND * 4);
        assert_eq!(world.nodes[at].failures, [(peer(1 - at), Failure::NoSlot)]);
        let core = &mut world.nodes[at].core;
        assert!(core.counters().no_slot > 0);
        taken.into_iter().for_each(|index| core.slots.discard(index));
        if at == 0 {
            world.nodes[1].failures.clear();
            continue;
        }
        world.run(SECOND * 6);
        assert!(world.joined(0, 1));
    }
}

#[test]
fn a_thousand_peers_connect_in_seconds_and_stay_connected() {
    const PEERS: usize = 1000;
    let mut world = World::new(1, PEERS + 1);
    for number in 1..=PEERS {
        world.introduce(0, number, Initiate::AtOnce);
        world.introduce(number, 0, Initiate::OnlyAnswer);
    }
    let clock = Instant::now();
    let joined = |world: &World| (1..=PEERS).filter(|number| world.joined(0, *number)).count();
    world.run(SECOND * 15);
    assert_eq!(joined(&world), PEERS);
    world.run(SECOND * 130);
    assert_eq!(joined(&world), PEERS);
    let core = &world.nodes[0].core;
    assert!(core.counters().cookies_demanded > 0, "so many at once put the node under load");
    assert!(core.slots_used() <= 2 * PEERS);
    assert!(clock.elapsed() < SECOND * 60, "{:?}", clock.elapsed());
}

#[test]
fn a_relayed_initiation_is_answered_through_the_relay_and_moves_no_endpoint() {
    let mut world = World::new(1, 2);
    world.introduce(0, 1, Initiate::AtOnce);
    let config = PeerConfig { endpoint: None, ..world.config(0, Initiate::OnlyAnswer) };
    world.upsert(1, 0, config);
    let (now, wall) = (world.now, world.wall);
    let [first, second] = &mut world.nodes[..] else { panic!("there are two nodes") };
    first.core.handle_timeout(now, wall);
    let initiation = first.core.poll_transmit().expect("an initiation").bytes;
    let from = PeerAddress::Relayed(NodeId::new(3).expect("an ID"));
    second.core.handle_datagram(now, from, &initiation);
    let response = second.core.poll_transmit().expect("a response");
    assert_eq!((response.to, response.peer), (from, Some(peer(0))));
    assert_eq!(second.core.peer(peer(0)).expect("the peer is configured").endpoint, Some(from));
    let events: Vec<_> = std::iter::from_fn(|| second.core.poll_event()).collect();
    assert!(matches!(&events[..], [Event::Install { .. }]), "{events:?}");
}
