use super::*;
use crate::gossip::budget::{MAX_UNREACHED, RESERVED_BYTES, SHARED_BYTES, weight};
use crate::gossip::limit::{BURST_BYTES, BURST_MESSAGES, MESSAGES_PER_SECOND};
use crate::gossip::routed::{KIND_ALLOCATION, MAX_BODY, MAX_HOPS};

fn pair() -> World {
    let mut world = World::new(3, 1);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 1);
    world
}

#[test]
fn only_the_flooding_neighbor_is_disconnected() {
    let mut world = pair();
    let now = world.now;
    let message = Message::Summary([0; 16]).encode();
    let mut heard = 0;
    while world.node(2).handle_message(id(1), &message, now).is_ok() {
        heard += 1;
        assert!(heard <= BURST_MESSAGES);
    }
    assert!(heard > BURST_MESSAGES * 9 / 10, "{heard}");
    assert_eq!(world.node(2).handle_message(id(1), &message, now), Err(BadMessage::Flood));
    let words = BadMessage::Flood.to_string();
    assert!(words.contains("128 messages and 256 KiB a second"), "{words}");
    assert_eq!(world.node(2).handle_message(id(3), &message, now), Ok(()));
    // Reconnecting does not help.
    world.cut(id(1), id(2));
    world.connect(id(1), id(2));
    assert_eq!(world.node(2).handle_message(id(1), &message, now), Err(BadMessage::Flood));
    let later = now + Duration::from_secs(2 * BURST_MESSAGES / MESSAGES_PER_SECOND);
    assert_eq!(world.node(2).handle_message(id(1), &message, later), Ok(()));
}

#[test]
fn routed_and_malformed_messages_count_too() {
    let mut world = pair();
    let now = world.now;
    let routed = RoutedMessage {
        from: id(1),
        to: id(3),
        hops: MAX_HOPS,
        kind: KIND_ALLOCATION,
        serial: (1, 1),
        receiver: 1,
        signature: Signature::default(),
        body: vec![0; MAX_BODY],
    };
    let mut heard = 0;
    let mut passed = 0;
    while world.node(2).handle_routed(id(1), &routed.encode(), now).is_ok() {
        heard += 1;
        passed += u64::from(world.node(2).poll_action().is_some());
    }
    assert_eq!(
        world.node(2).handle_routed(id(1), &routed.encode(), now),
        Err(BadRoutedMessage::Flood)
    );
    assert!(
        (BURST_BYTES / 17_000..BURST_BYTES / 16_000).contains(&heard),
        "{heard} routed messages"
    );
    assert!(
        heard * 4 / 10 < passed && passed < heard * 6 / 10,
        "{passed} of {heard} were forwarded"
    );
    let outcomes: BTreeSet<String> = (0..=BURST_MESSAGES)
        .map(|_| world.node(2).handle_message(id(3), &[9, 9], now).unwrap_err().to_string())
        .collect();
    assert_eq!(outcomes.len(), 2, "first malformed, then too many: {outcomes:?}");
}

/// 30 bytes that request megabytes, repeatedly.
#[test]
fn requested_records_count_too() {
    let mut world = pair();
    let now = world.now;
    let known: Vec<_> = (10..1000)
        .map(|number| {
            let mut long = blank(number, 1);
            long.claims = (0..500_u32).map(|n| std::net::Ipv4Addr::from_bits(n).into()).collect();
            signed(long, number)
        })
        .collect();
    world.node(2).restore(known.into_iter().map(|it| (it, true)));
    let ask = Message::Request((10..1000).map(id).collect()).encode();
    let mut sent = 0;
    while world.node(2).handle_message(id(1), &ask, now).is_ok() {
        while let Some(action) = world.node(2).poll_action() {
            let Action::Send { message, .. } = action else { panic!("{action:?}") };
            sent += message.encode().len() as u64;
        }
    }
    assert!(sent < 2 * BURST_BYTES, "{sent} bytes were sent");
}

/// Measures how close honest neighbors come to the limits at a cold start, in which every node
/// announces every other one.
#[test]
fn a_cold_start_stays_far_below_the_flood_limit() {
    for mesh in [true, false] {
        let count = 40;
        let mut world = World::new(count, 9);
        if mesh {
            world.mesh();
        } else {
            for number in 0..count {
                for step in 1..=4 {
                    world.connect(id(number + 1), id((number + step) % count + 1));
                }
            }
        }
        let (messages, bytes) = (world.messages, world.bytes);
        world.assert_converges_within(Duration::from_secs(10), 9);
        let links = world.links.len() as u64;
        let (messages, bytes) =
            ((world.messages - messages) / links, (world.bytes - bytes) / links);
        // 1000 nodes have 25 times as many records, each up to 25 times as long.
        assert!(25 * messages < BURST_MESSAGES / 8, "{messages} messages over each link");
        assert!(25 * 25 * bytes < BURST_BYTES / 2, "{bytes} bytes over each link");
    }
}

/// Delivers records from a member to a neighbor.
fn tell(world: &mut World, from: u16, to: u16, records: &[Record]) -> Result<(), BadMessage> {
    let now = world.now;
    for records in records.chunks(8) {
        let message = Message::Delta(records.to_vec()).encode();
        world.node(to).handle_message(id(from), &message, now)?;
    }
    world.collect();
    Ok(())
}

#[test]
fn a_member_puts_the_key_of_another_node_into_its_own_record() {
    let mut world = pair();
    let mut stolen = signed(blank(9, 1), 66);
    stolen.public_key = signer(3).public_key();
    stolen.signature = signer(66).sign_bytes(&sign::signed_part(&stolen));
    assert_eq!(tell(&mut world, 1, 2, &[stolen]), Err(BadMessage::Signature(id(9))));
    assert_eq!(world.node(2).record(id(9)), None);
}

#[test]
fn a_member_shows_up_under_two_ids_with_one_identity() {
    let mut world = pair();
    tell(&mut world, 1, 2, &[signed(blank(8, 1), 66), signed(blank(9, 1), 66)]).unwrap();
    assert!(world.node(2).record(id(8)).is_some());
    assert_eq!(world.node(2).record(id(9)), None);
    // It also cannot use the identity of a node that has left, of this node or of a third one.
    tell(&mut world, 1, 2, &[signed(blank(8, 2).into_tombstone(), 66)]).unwrap();
    let as_others =
        [(9, 66), (10, 2), (11, 3)].map(|(number, seed)| signed(blank(number, 1), seed));
    tell(&mut world, 1, 2, &as_others).unwrap();
    assert!((9..=11).all(|number| world.node(2).record(id(number)).is_none()));
}

/// A record of the maximum length.
fn long(number: u16) -> Record {
    let name = |n: usize| named(&format!("{n:04}.{}", "x".repeat(20)), "10.40.0.1");
    let names = (0..MAX_NAMES).map(name).collect();
    Record { names, links: vec![id(1)], ..blank(number, 1) }
}

fn taken(node: &Gossip) -> usize {
    node.records().map(weight).sum()
}

#[test]
fn a_member_fills_the_memory_of_others_with_invented_nodes() {
    let mut world = pair();
    let made_up: Vec<u16> = (10..310).collect();
    let before = taken(world.node(2));
    let all: Vec<Record> = made_up.iter().map(|number| signed(long(*number), *number)).collect();
    // Nodes that no other node has heard of.
    tell(&mut world, 1, 2, &all).unwrap();
    let now = world.now;
    assert!(world.node(2).is_full(now));
    let unreached = taken(world.node(2)) - before;
    assert!(unreached <= budget::MAX_UNREACHED_BYTES, "{unreached} bytes of unknown nodes");
    // The member claims to be connected with them.
    world.now += Duration::from_secs(300);
    let mut liar = world.node(2).record(id(1)).unwrap().clone();
    liar.links.extend(made_up.iter().copied().map(id));
    liar.version += 1;
    tell(&mut world, 1, 2, &[signed(liar, 1)]).unwrap();
    tell(&mut world, 1, 2, &all).unwrap();
    let taken_now = taken(world.node(2));
    assert!(taken_now > SHARED_BYTES / 2, "{taken_now}");
    assert!(
        taken_now <= SHARED_BYTES + RESERVED_BYTES * world.node(2).records().count(),
        "{taken_now}"
    );
    let others = world.node(2).records().filter(|record| record.id != id(2));
    let beyond_room =
        others.map(|record| weight(record).saturating_sub(RESERVED_BYTES)).sum::<usize>();
    assert_eq!(world.node(2).budget.shared(), beyond_room);
    // New records of honest nodes are still accepted, and so are their tombstones.
    let now = world.now;
    world.node(3).update_own(|own| own.nickname = "honest".into(), now);
    world.run(Duration::from_secs(1));
    assert_eq!(world.node(2).record(id(3)).unwrap().nickname, "honest");
    let last_words = world.node(3).own().clone();
    world.node(3).leave();
    world.collect();
    world.run(Duration::from_secs(1));
    assert!(world.node(2).record(id(3)).unwrap().left);
    tell(&mut world, 1, 2, &[signed(last_words, 3)]).unwrap();
    assert!(world.node(2).record(id(3)).unwrap().left, "a node that has left is not revived");
}

#[test]
fn a_member_crowds_out_others_with_invented_unreachable_nodes() {
    let mut world = World::new(3, 1);
    world.start(record(700, 1));
    world.connect(id(1), id(2));
    world.connect(id(2), id(3));
    world.assert_converges_within(Duration::from_secs(5), 1);
    let all: Vec<Record> = (10..600).map(|number| record(number, 1)).collect();
    tell(&mut world, 1, 2, &all).unwrap();
    assert_eq!(world.node(2).records().count(), 3 + MAX_UNREACHED);
    // A node that is reached through another one counts as reached, and neither does one
    // that connects.
    world.connect(id(3), id(700));
    world.run(COMPARE_INTERVAL * 4);
    assert!(world.node(2).paths().contains_key(&id(700)));
    world.start(record(701, 1));
    world.connect(id(2), id(701));
    world.run(Duration::from_secs(2));
    assert!(world.node(2).paths().contains_key(&id(701)));
    // The same holds after a restart.
    let known: Vec<_> = world.node(2).records().map(|record| record.id).collect();
    let node = world.node(2);
    let known: Vec<_> = known
        .into_iter()
        .map(|it| (node.record(it).unwrap().clone(), node.was_reached(it)))
        .collect();
    let mut again = gossip(record(2, 2), world.now);
    again.restore(known);
    assert!(!again.budget.is_unreached(id(700)));
    assert_eq!(again.records().count(), 5 + MAX_UNREACHED);
}

/// The owner was reset or is away, and comes back with other keys or with the same ones.
#[test]
fn a_member_takes_an_id_with_a_stamp_that_its_owner_cannot_outbid() {
    for (seed, comes_back_as) in [(6, 77), (6, 6)] {
        for stamp in [MAX_STAMP, MAX_STAMP / 2, SKEW_MS] {
            let mut world = World::new(6, seed);
            world.chain(6);
            world.assert_converges_within(Duration::from_secs(5), seed);
            world.kill(id(6));
            world.run(Duration::from_secs(2));
            let usurper = Record { version: MAX_STAMP, ..blank(6, stamp) };
            tell(&mut world, 1, 2, &[signed(usurper.clone(), 66)]).unwrap();
            tell(
                &mut world,
                1,
                2,
                &[signed(Record { left: true, addresses: Vec::new(), ..usurper }, 67)],
            )
            .unwrap();
            world.run(Duration::from_secs(2));
            world.start(signed(record(6, 2), comes_back_as));
            world.connect(id(5), id(6));
            world.run(Duration::from_secs(8));
            for number in 1..=5 {
                let known = world.node(number).record(id(6)).unwrap();
                assert_eq!(
                    known.verifying_key,
                    identity(comes_back_as),
                    "node {number} believes stamp {stamp}"
                );
                assert!(!known.left && world.node(number).paths().contains_key(&id(6)));
            }
        }
    }
}

#[test]
fn a_member_drives_the_incarnation_of_another_node_beyond_its_limit() {
    let mut world = pair();
    let stamp = SKEW_MS - 1;
    for step in 0..5 {
        let lie = signed(Record { version: 9, ..blank(3, stamp.saturating_mul(1 + step)) }, 66);
        tell(&mut world, 2, 3, &[lie]).unwrap();
        world.run(Duration::from_secs(2));
    }
    let own = world.node(3).own().clone();
    assert_eq!(own.incarnation, stamp + 1);
    world.assert_converges_within(Duration::from_secs(5), 1);
}

#[test]
fn a_member_makes_honest_neighbors_flood_each_other_with_flapping_links() {
    let mut world = World::new(3, 1);
    world.mesh();
    world.assert_converges_within(Duration::from_secs(5), 1);
    let mut lie = Record { incarnation: 5, ..blank(700, 1) };
    let (now, mut received, mut sent) = (world.now, 0, 0);
    while received < 3 * BURST_MESSAGES / 4 {
        lie.version += 1;
        lie.links = if lie.version.is_multiple_of(2) { vec![id(1), id(3)] } else { Vec::new() };
        let message = Message::Delta(vec![signed(lie.clone(), 700)]).encode();
        world.node(2).handle_message(id(1), &message, now).unwrap();
        received += 1;
        while let Some(action) = world.node(2).poll_action() {
            sent += u64::from(matches!(action, Action::Send { to, .. } if to == id(3)));
        }
    }
    // Another member does the same.
    let now = world.now;
    world.node(2).handle_connected(id(701), identity(701), now);
    for _ in 0..3 * BURST_MESSAGES / 4 {
        lie.version += 1;
        lie.links = if lie.version.is_multiple_of(2) { vec![id(1), id(3)] } else { Vec::new() };
        let message = Message::Delta(vec![signed(lie.clone(), 700)]).encode();
        world.node(2).handle_message(id(701), &message, now).unwrap();
        while let Some(action) = world.node(2).poll_action() {
            sent += u64::from(matches!(action, Action::Send { to, .. } if to == id(3)));
        }
    }
    assert!(sent <= BURST_MESSAGES / 2 + 1, "{sent} messages to one neighbor");
}

#[test]
fn a_member_keeps_others_busy_with_requests_for_lists() {
    let mut world = pair();
    let known = (10..1000).map(|number| (record(number, 1), true));
    world.node(2).restore(known);
    let ask = Message::Digest { ask: true, stamps: Vec::new() }.encode();
    let (now, mut sent) = (world.now, 0);
    while world.node(2).handle_message(id(1), &ask, now).is_ok() {
        while let Some(action) = world.node(2).poll_action() {
            let Action::Send { message, .. } = action else { panic!("{action:?}") };
            sent += message.encode().len() as u64;
        }
    }
    assert!(sent < BURST_BYTES, "{sent} bytes were sent");
}
