//! Tests that records reach all nodes and that all nodes agree on them.

use rand::seq::IteratorRandom;

use super::*;

#[test]
fn records_travel_along_a_chain_from_end_to_end() {
    let mut world = World::new(8, 1);
    world.chain(8);
    world.assert_converges_within(Duration::from_secs(5), 1);
    assert_eq!(world.node(1).paths()[&id(8)], Path { via: id(2), hops: 7 });
    let claim: IpAddr = "10.32.0.7".parse().unwrap();
    let now = world.now;
    world.node(8).update_own(|own| own.claims.push(claim), now);
    world.run(Duration::from_secs(2));
    assert_eq!(world.node(1).record(id(8)).unwrap().claims, [claim]);
}

#[test]
fn in_a_mesh_no_node_forwards_records() {
    let mut world = World::new(20, 2);
    world.mesh();
    world.assert_converges_within(Duration::from_secs(5), 2);
    world.run(Duration::from_secs(5));
    let (records, now) = (world.records, world.now);
    world.node(7).update_own(|own| own.nickname = "changed".into(), now);
    world.run(Duration::from_millis(900));
    assert_eq!(world.node(20).record(id(7)).unwrap().nickname, "changed");
    assert_eq!(world.records - records, 19);
}

#[test]
fn a_node_that_gains_many_links_does_not_announce_each() {
    let mut now = Instant::now();
    let mut gossip = gossip(record(1, 1), now);
    let mut sent = 0;
    let mut versions = BTreeSet::new();
    for number in 2..1002 {
        gossip.handle_connected(id(number), identity(1), now);
        now += Duration::from_millis(5);
        gossip.handle_timeout(now);
        sent += std::iter::from_fn(|| gossip.poll_action())
            .filter(|action| matches!(action, Action::Send { message: Message::Delta(_), .. }))
            .count();
        versions.insert(gossip.own().version);
    }
    assert!(sent < 6000, "{sent} records sent; announcing each link would take 500,000");
    assert!(versions.len() < 20, "{} versions", versions.len());
    // A single change later is published after [`COLLECT`].
    now += Duration::from_secs(10);
    gossip.handle_timeout(now);
    now += Duration::from_secs(10);
    gossip.update_own(|own| own.nickname = "changed".into(), now);
    assert_eq!(gossip.poll_timeout(), Some(now + COLLECT));
}

#[test]
fn an_idle_mesh_costs_each_node_little() {
    let mut world = World::new(30, 3);
    world.mesh();
    world.run(Duration::from_secs(60));
    let (messages, bytes) = (world.messages, world.bytes);
    world.run(Duration::from_secs(600));
    let per_node_and_minute = (world.bytes - bytes) as f64 / 30.0 / 10.0;
    assert!((world.messages - messages) <= 30 * 28, "{}", world.messages - messages);
    assert!(per_node_and_minute < 60.0, "{per_node_and_minute} bytes");
}

#[test]
fn records_lost_in_flight_are_found_by_comparing() {
    let mut world = World::new(3, 4);
    world.mesh();
    world.assert_converges_within(Duration::from_secs(5), 4);
    let now = world.now;
    world.node(1).update_own(|own| own.nickname = "new".into(), now);
    world.run(COLLECT);
    for link in world.links.values_mut() {
        link.queue.clear();
    }
    world.run(Duration::from_millis(500));
    assert!(world.converged().is_err(), "the records must have been lost");
    world.assert_converges_within(COMPARE_INTERVAL * 2, 4);
}

/// Node 4 expects node 2 to offer the record of node 1 to node 3. The link between nodes 2 and 3
/// dies with the offer in flight.
#[test]
fn news_lost_with_a_link_arrives_by_another_path_at_once() {
    let mut lost = 0;
    for seed in 0..40 {
        let mut world = World::new(4, seed);
        for (one, other) in [(1, 2), (2, 3), (2, 4), (4, 3)] {
            world.connect(id(one), id(other));
        }
        world.assert_converges_within(Duration::from_secs(5), seed);
        let now = world.now;
        world.node(1).update_own(|own| own.nickname = "news".into(), now);
        let knows = |world: &mut World, number| {
            world.node(number).record(id(1)).unwrap().nickname == "news"
        };
        while !knows(&mut world, 4) && !knows(&mut world, 3) {
            world.step(now + Duration::from_secs(5));
        }
        if knows(&mut world, 3) {
            continue;
        }
        // By now node 4 has decided not to forward the record.
        world.run(COLLECT);
        lost += u16::from(!knows(&mut world, 3));
        world.cut(id(2), id(3));
        world.run(Duration::from_millis(1500));
        assert!(knows(&mut world, 3), "seed {seed}");
    }
    assert!(lost > 5, "only {lost} seeds lost the news");
}

#[test]
fn a_node_that_leaves_is_removed_everywhere_and_stays_removed() {
    let mut world = World::new(5, 5);
    world.chain(5);
    world.assert_converges_within(Duration::from_secs(5), 5);
    // Node 5 is disconnected while node 1 leaves, and believes that node 1 is still a member.
    world.cut(id(4), id(5));
    world.run(Duration::from_secs(1));
    world.node(1).leave();
    world.collect();
    world.run(Duration::from_secs(1));
    world.kill(id(1));
    world.run(Duration::from_secs(2));
    for number in 2..=4 {
        assert!(world.removed[&id(number)].contains(&id(1)));
        assert!(world.node(number).record(id(1)).unwrap().left);
        assert!(world.node(number).record(id(1)).unwrap().addresses.is_empty());
    }
    world.connect(id(4), id(5));
    world.assert_converges_within(Duration::from_secs(3), 5);
    assert!(world.removed[&id(5)].contains(&id(1)));
    assert!(!world.node(2).paths().contains_key(&id(1)));
    // Node 1 is launched again as a new node.
    world.start(signed(record(1, 2), 99));
    world.connect(id(1), id(3));
    world.assert_converges_within(Duration::from_secs(3), 5);
    assert!(world.contested.is_empty());
}

#[test]
fn a_relaunch_whose_clock_went_back_still_wins() {
    let mut world = World::new(3, 6);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 6);
    world.node(3).leave();
    world.collect();
    world.run(Duration::from_secs(1));
    world.kill(id(3));
    world.start(signed(record(3, 0), 98));
    world.connect(id(2), id(3));
    world.assert_converges_within(Duration::from_secs(5), 6);
    assert!(!world.node(1).record(id(3)).unwrap().left);
    assert!(world.contested.is_empty(), "a tombstone contests no record");
}

/// Performs random changes of links, records and hosts, and checks that all nodes converge.
fn storm(seed: u64, count: u16, steps: usize) {
    let mut world = World::new(count, seed);
    world.chain(count);
    let mut incarnation = 1;
    for _ in 0..steps {
        let all: Vec<_> = world.nodes.keys().copied().collect();
        let one = *all.iter().choose(&mut world.rng).unwrap();
        let other = *all.iter().choose(&mut world.rng).unwrap();
        match world.rng.random_range(0..12) {
            0..=4 => world.connect(one, other),
            5..=7 => world.cut(one, other),
            8 | 9 => {
                let now = world.now;
                let value: u32 = world.rng.random();
                world
                    .nodes
                    .get_mut(&one)
                    .unwrap()
                    .update_own(|own| own.nickname = format!("host{value}"), now);
            }
            10 => {
                // A restart with the disk: the same key, the next incarnation and the known
                // records.
                incarnation += 1;
                let known: Vec<_> = world.nodes[&one].records().cloned().collect();
                world.kill(one);
                let own = known.iter().find(|record| record.id == one).unwrap().clone();
                world.start(Record { incarnation: own.incarnation + 1, version: 0, ..own });
                world.nodes.get_mut(&one).unwrap().restore(known.into_iter().map(|it| (it, true)));
            }
            _ => {
                // A reset that only nearby nodes hear of, and a new launch.
                incarnation += 1;
                world.nodes.get_mut(&one).unwrap().leave();
                world.collect();
                world.run(Duration::from_millis(250));
                world.kill(one);
                world.start(signed(
                    record(one.get(), 1000 * incarnation),
                    1000 + incarnation as u16,
                ));
            }
        }
        let pause = Duration::from_millis(world.rng.random_range(0..400));
        world.run(pause);
    }
    // All nodes converge, regardless of the current topology.
    world.assert_converges_within(COMPARE_INTERVAL * 8, seed);
    world.chain(count);
    world.assert_converges_within(Duration::from_secs(10), seed);
}

#[test]
fn connected_nodes_agree_after_any_sequence_of_changes() {
    for seed in 0..150 {
        storm(seed, 9, 60);
    }
}

#[test]
fn fifty_nodes_agree_too() {
    for seed in 0..3 {
        storm(seed, 50, 80);
    }
}

#[test]
fn the_same_seed_gives_the_same_world() {
    let run = |seed| {
        let mut world = World::new(9, seed);
        world.chain(9);
        world.run(Duration::from_secs(100));
        (world.messages, world.bytes, world.records)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn names_removed_during_a_partition_never_reappear() {
    for seed in 0..8 {
        let mut world = World::new(5, seed);
        world.mesh();
        let now = world.now;
        world.node(1).update_own(
            |own| own.names = vec![named("db", "10.40.0.2"), named("web", "10.40.0.1")],
            now,
        );
        world.assert_converges_within(Duration::from_secs(5), seed);
        let names =
            |world: &mut World, at: u16| world.node(at).record(id(1)).unwrap().names.clone();
        assert_eq!(names(&mut world, 5).len(), 2);
        // Nodes 1 and 2 are on one side. The others still have node 1's old record and exchange it.
        for (one, other) in [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)] {
            world.cut(id(one), id(other));
        }
        let now = world.now;
        world.node(1).update_own(|own| own.names.retain(|it| it.name == "db"), now);
        world.run(Duration::from_secs(60));
        assert_eq!(names(&mut world, 2), [named("db", "10.40.0.2")]);
        assert_eq!(names(&mut world, 4).len(), 2);
        // The side with the old record reconnects first.
        world.connect(id(2), id(4));
        for _ in 0..60 {
            world.run(Duration::from_millis(500));
            assert_eq!(names(&mut world, 1), [named("db", "10.40.0.2")], "seed {seed}");
            assert_eq!(names(&mut world, 2), [named("db", "10.40.0.2")], "seed {seed}");
        }
        for at in 3..=5 {
            assert_eq!(names(&mut world, at), [named("db", "10.40.0.2")], "seed {seed}, node {at}");
        }
    }
}

#[test]
fn a_node_with_many_constantly_changing_names_is_not_disconnected() {
    let mut world = World::new(2, 3);
    world.connect(id(1), id(2));
    world.run(Duration::from_secs(1));
    let most = |round: u32| -> Vec<Named> {
        let name = |n: usize| format!("container-{n:05}-{:03}", round % 1000);
        (0..MAX_NAMES).map(|n| named(&name(n), "10.40.0.1")).collect()
    };
    for round in 0..3000 {
        let now = world.now;
        world.node(1).update_own(|own| own.names = most(round), now);
        world.run(Duration::from_millis(100));
    }
    world.assert_converges_within(Duration::from_secs(5), 3);
    let seen = world.node(2).record(id(1)).unwrap().names.clone();
    assert_eq!(seen.first(), most(2999).first());
}
