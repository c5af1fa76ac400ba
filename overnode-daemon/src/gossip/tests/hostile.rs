use super::*;
use crate::gossip::limit::{BURST_BYTES, BURST_MESSAGES, MESSAGES_PER_SECOND};
use crate::gossip::parcel::{KIND_ALLOCATION, MAX_BODY, MAX_HOPS};

fn pair() -> World {
    let mut world = World::new(3, 1);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 1);
    world
}

#[test]
fn who_floods_is_cut_off_and_only_who_floods() {
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
    // To come back is of no use.
    world.cut(id(1), id(2));
    world.connect(id(1), id(2));
    assert_eq!(world.node(2).handle_message(id(1), &message, now), Err(BadMessage::Flood));
    let later = now + Duration::from_secs(2 * BURST_MESSAGES / MESSAGES_PER_SECOND);
    assert_eq!(world.node(2).handle_message(id(1), &message, later), Ok(()));
}

#[test]
fn parcels_and_garbage_count_too() {
    let mut world = pair();
    let now = world.now;
    let parcel = Parcel {
        from: id(1),
        to: id(3),
        hops: MAX_HOPS,
        kind: KIND_ALLOCATION,
        serial: (1, 1),
        signature: Signature::default(),
        body: vec![0; MAX_BODY],
    };
    let mut heard = 0;
    let mut passed = 0;
    while world.node(2).handle_parcel(id(1), &parcel.encode(), now).is_ok() {
        heard += 1;
        passed += u64::from(world.node(2).poll_action().is_some());
    }
    assert_eq!(world.node(2).handle_parcel(id(1), &parcel.encode(), now), Err(BadParcel::Flood));
    assert!((BURST_BYTES / 17_000..BURST_BYTES / 16_000).contains(&heard), "{heard} parcels");
    assert!(heard * 4 / 10 < passed && passed < heard * 6 / 10, "{passed} of {heard} were passed on");
    let outcomes: BTreeSet<String> = (0..=BURST_MESSAGES)
        .map(|_| world.node(2).handle_message(id(3), &[9, 9], now).unwrap_err().to_string())
        .collect();
    assert_eq!(outcomes.len(), 2, "first garbage, then too much of it: {outcomes:?}");
}

/// 30 bytes that ask for megabytes, again and again.
#[test]
fn what_is_asked_for_counts() {
    let mut world = pair();
    let now = world.now;
    let known: Vec<_> = (10..1000)
        .map(|number| {
            let mut long = blank(number, 1);
            long.claims = (0..500_u32).map(|n| std::net::Ipv4Addr::from_bits(n).into()).collect();
            signed(long, number as u8)
        })
        .collect();
    world.node(2).restore(known);
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

/// How close honest neighbours come to the limits at a cold start, where every node tells of every other.
#[test]
fn a_cold_start_is_far_from_being_a_flood() {
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
        let (messages, bytes) = ((world.messages - messages) / links, (world.bytes - bytes) / links);
        // For 1000 nodes 25 times as many records, each up to 25 times as long.
        assert!(25 * messages < BURST_MESSAGES / 8, "{messages} messages over each link");
        assert!(25 * 25 * bytes < BURST_BYTES / 2, "{bytes} bytes over each link");
    }
}
