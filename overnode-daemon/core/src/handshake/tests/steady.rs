//! Tests sessions over a long time and a bad network.

use super::*;

/// Sends ten messages a second in both directions for ten minutes. Asserts that both nodes can send
/// to each other throughout.
fn ten_minutes(world: &mut World) {
    let joined = (0..600).any(|_| {
        world.run(SECOND / 10);
        world.joined(0, 1)
    });
    assert!(joined, "no session within a minute");
    let end = world.now + Duration::from_secs(600);
    while world.now < end {
        world.send_data(0, 1);
        world.send_data(1, 0);
        world.run(SECOND / 10);
        assert!(world.joined(0, 1), "no session at {:?}", world.now - world.start);
    }
    world.run(SECOND * 2);
}

fn nothing_was_lost(world: &World) {
    for node in &world.nodes {
        let lost: u64 =
            node.refused.iter().filter(|(why, _)| **why != "replayed").map(|(_, n)| n).sum();
        assert_eq!((node.unsent, lost), (0, 0), "{:?}", node.refused);
        assert!(node.delivered > 4000);
        let keys: BTreeSet<_> =
            node.installed.iter().flat_map(|(_, _, keys)| [keys.tx_key.0, keys.rx_key.0]).collect();
        assert_eq!(keys.len(), 2 * node.installed.len(), "a key was derived twice");
        let indices: BTreeSet<_> =
            node.installed.iter().map(|(_, _, keys)| keys.local_index).collect();
        assert_eq!(indices.len(), node.installed.len(), "an index was used twice");
    }
}

#[test]
fn the_initiator_renews_every_two_minutes() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::After(SECOND * 2));
    ten_minutes(&mut world);
    nothing_was_lost(&world);
    let made: Vec<_> =
        world.initiations(0).iter().map(|at| (*at - world.start).as_secs()).collect();
    assert_eq!(made, [0, 120, 240, 360, 480, 600]);
    assert_eq!(world.initiations(1), []);
    assert_eq!(world.nodes[0].refused.len() + world.nodes[1].refused.len(), 0);
}

#[test]
fn loss_repetition_and_reordering_cost_no_session() {
    for seed in 0..24 {
        let mut world = World::pair(seed, Initiate::AtOnce, Initiate::After(SECOND * 2));
        world.weather = Weather { loss: 0.2, repeat: 0.1, delay: (Duration::ZERO, SECOND / 4) };
        ten_minutes(&mut world);
        nothing_was_lost(&world);
    }
}

#[test]
fn both_initiate_at_once_and_settle_on_one_initiator() {
    for seed in 0..12 {
        let mut world = World::pair(seed, Initiate::AtOnce, Initiate::AtOnce);
        world.weather.delay = (Duration::from_millis(1), Duration::from_millis(40));
        ten_minutes(&mut world);
        nothing_was_lost(&world);
        let made = world.initiations(0).len() + world.initiations(1).len();
        assert!(made <= 2 + 5, "{made} initiations: the nodes did not settle on one initiator");
    }
}

#[test]
fn sessions_are_renewed_without_traffic() {
    let mut world = World::pair(1, Initiate::AtOnce, Initiate::OnlyAnswer);
    world.run(SECOND);
    for _ in 0..3600 {
        world.run(SECOND);
        assert!(world.joined(0, 1), "no session at {:?}", world.now - world.start);
    }
    assert_eq!(world.initiations(0).len(), 31);
    let sessions: Vec<_> = world.nodes.iter().map(|node| node.core.slots_used()).collect();
    assert!(sessions.iter().all(|used| *used <= 2), "{sessions:?}");
}

#[test]
fn an_idle_pair_on_a_bad_network_stays_connected() {
    for seed in 0..24 {
        let mut world = World::pair(seed, Initiate::AtOnce, Initiate::After(SECOND * 2));
        world.weather = Weather { loss: 0.2, repeat: 0.1, delay: (Duration::ZERO, SECOND / 4) };
        world.run(SECOND * 60);
        for _ in 0..6000 {
            world.run(SECOND / 10);
            assert!(world.joined(0, 1), "seed {seed}: no session at {:?}", world.now - world.start);
        }
    }
}
