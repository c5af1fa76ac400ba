use std::time::Duration;

use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};

use super::{World, id};
use crate::gossip::routed::{KIND_ALLOCATION, MAX_BODY, MAX_HOPS, ROUTED_FORMAT};
use crate::gossip::{Action, BadRoutedMessage, Path, RoutedMessage, Signature, Undelivered};

fn routed() -> RoutedMessage {
    RoutedMessage {
        from: id(5),
        to: id(300),
        hops: MAX_HOPS,
        kind: KIND_ALLOCATION,
        serial: (1_700_000_000_000, 258),
        receiver: 1_700_000_000_001,
        signature: Signature(std::array::from_fn(|index| index as u8)),
        body: b"give".to_vec(),
    }
}

#[test]
fn a_routed_message_travels_along_a_chain_and_its_answer_back() {
    let mut world = World::new(6, 1);
    world.chain(6);
    world.assert_converges_within(Duration::from_secs(5), 1);
    world.node(1).send_routed(id(6), 7, b"question".to_vec()).unwrap();
    world.collect();
    world.run(Duration::from_secs(2));
    let [arrived] = &world.delivered[..] else { panic!("{:?}", world.delivered) };
    assert_eq!((arrived.from, arrived.to, arrived.kind), (id(1), id(6), 7));
    assert_eq!((arrived.hops, arrived.body.as_slice()), (MAX_HOPS - 4, &b"question"[..]));
    world.node(6).send_routed(id(1), 7, vec![9; MAX_BODY]).unwrap();
    world.collect();
    world.run(Duration::from_secs(2));
    assert_eq!(world.delivered[1].body, [9; MAX_BODY]);
}

#[test]
fn a_neighbor_gets_routed_messages_as_soon_as_its_record_is_known() {
    let mut world = World::new(2, 2);
    world.connect(id(1), id(2));
    assert_eq!(world.node(1).send_routed(id(2), 1, Vec::new()), Err(Undelivered::NoPath(id(2))));
    world.run(Duration::from_secs(1));
    world.node(1).send_routed(id(2), 1, Vec::new()).unwrap();
    world.collect();
    world.run(Duration::from_secs(1));
    assert_eq!(world.delivered.len(), 1);
}

/// The messages that the attacker on the path has recorded are signed, and the receiver has
/// forgotten that they have arrived before.
#[test]
fn a_relay_replays_recorded_messages_after_the_receiver_restarts() {
    let mut world = World::new(3, 6);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 6);
    world.node(1).send_routed(id(3), 1, b"take".to_vec()).unwrap();
    let Some(Action::SendRouted { routed, .. }) = world.node(1).poll_action() else { panic!() };
    let known: Vec<_> = world.node(3).records().cloned().collect();
    for incarnation in 2..5 {
        world.kill(id(3));
        world.start(super::record(3, incarnation));
        world.node(3).restore(known.iter().cloned().map(|record| (record, true)));
        world.connect(id(2), id(3));
        let now = world.now;
        let outcome = world.node(3).handle_routed(id(2), &routed.encode(), now);
        assert_eq!(outcome, Ok(Some(Undelivered::OtherStart(id(1)))));
        world.assert_converges_within(Duration::from_secs(5), 6);
        let now = world.now;
        let outcome = world.node(3).handle_routed(id(2), &routed.encode(), now);
        assert_eq!(outcome, Ok(Some(Undelivered::OtherStart(id(1)))));
    }
    assert_eq!(world.delivered, []);
    // A message that is sent now arrives.
    world.node(1).send_routed(id(3), 1, b"take".to_vec()).unwrap();
    world.collect();
    world.run(Duration::from_secs(1));
    assert_eq!(world.delivered.len(), 1);
}

#[test]
fn a_message_that_cannot_be_sent_fails_at_once() {
    let mut world = World::new(3, 3);
    world.connect(id(1), id(2));
    world.assert_converges_within(Duration::from_secs(5), 3);
    let node = world.node(1);
    assert_eq!(node.send_routed(id(3), 1, Vec::new()), Err(Undelivered::NoPath(id(3))));
    assert_eq!(node.send_routed(id(1), 1, Vec::new()), Err(Undelivered::ToMyself));
    let long = vec![0; MAX_BODY + 1];
    assert_eq!(node.send_routed(id(2), 1, long), Err(Undelivered::TooLong(MAX_BODY + 1)));
    assert_eq!(node.poll_action(), None);
}

#[test]
fn a_routed_message_ends_after_its_last_hop_and_never_turns_back() {
    let mut world = World::new(3, 4);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 4);
    let now = world.now;
    let weary = RoutedMessage { from: id(1), to: id(3), hops: 1, ..routed() };
    assert_eq!(
        world.node(2).handle_routed(id(1), &weary.encode(), now),
        Ok(Some(Undelivered::TooFar))
    );
    let astray = RoutedMessage { from: id(1), to: id(3), ..routed() };
    assert_eq!(
        world.node(2).handle_routed(id(3), &astray.encode(), now),
        Ok(Some(Undelivered::NoPath(id(3))))
    );
    let lost = RoutedMessage { from: id(1), to: id(9), ..routed() };
    assert_eq!(
        world.node(2).handle_routed(id(1), &lost.encode(), now),
        Ok(Some(Undelivered::NoPath(id(9))))
    );
    // From a node that is not a neighbor, and one that claims to be from the receiving node itself.
    assert_eq!(world.node(1).handle_routed(id(3), &weary.encode(), now), Ok(None));
    let forged = RoutedMessage { from: id(2), to: id(3), ..routed() };
    assert_eq!(world.node(2).handle_routed(id(1), &forged.encode(), now), Ok(None));
    assert_eq!(world.node(2).poll_action(), None);
    assert_eq!(world.node(1).poll_action(), None);
}

/// Links come and go while every node sends to every other one. Messages to reachable nodes arrive,
/// and none travels in circles.
#[test]
fn routed_messages_take_the_remaining_path() {
    let mut world = World::new(5, 5);
    for (one, other) in [(1, 2), (2, 5), (1, 3), (3, 4), (4, 5)] {
        world.connect(id(one), id(other));
    }
    world.assert_converges_within(Duration::from_secs(5), 5);
    assert_eq!(world.node(1).paths()[&id(5)], Path { via: id(2), hops: 2 });
    world.cut(id(2), id(5));
    world.run(Duration::from_secs(2));
    assert_eq!(world.node(1).paths()[&id(5)], Path { via: id(3), hops: 3 });
    world.node(1).send_routed(id(5), 1, b"around".to_vec()).unwrap();
    world.collect();
    world.run(Duration::from_secs(1));
    assert_eq!(world.delivered[0].hops, MAX_HOPS - 2);
    assert_eq!(world.undelivered, []);
}

#[test]
fn a_routed_message_arrives_once_and_unchanged() {
    let mut world = World::new(3, 6);
    world.chain(3);
    world.assert_converges_within(Duration::from_secs(5), 6);
    let now = world.now;
    let mut sent = Vec::new();
    for body in [b"one", b"two"] {
        world.node(1).send_routed(id(3), 1, body.to_vec()).unwrap();
        let Some(Action::SendRouted { to, routed }) = world.node(1).poll_action() else { panic!() };
        assert_eq!(to, id(2));
        sent.push(routed);
    }
    // The relay, which has the token like all members, modifies the message.
    let forge = |change: fn(&mut RoutedMessage)| {
        let mut forged = sent[0].clone();
        change(&mut forged);
        forged.encode()
    };
    for forged in [
        forge(|it| it.body = b"all".to_vec()),
        forge(|it| it.kind = 2),
        forge(|it| it.from = id(2)),
        forge(|it| it.serial.0 += 1),
        forge(|it| it.serial.1 += 1),
        forge(|it| it.signature = Signature([0; 64])),
        forge(|it| it.from = id(9)),
    ] {
        let outcome = world.node(3).handle_routed(id(2), &forged, now);
        assert!(matches!(outcome, Ok(Some(Undelivered::Unsigned(_)))), "{outcome:?}");
    }
    let mut receive =
        |routed: &RoutedMessage| world.node(3).handle_routed(id(2), &routed.encode(), now).unwrap();
    assert_eq!(receive(&sent[0]), None);
    assert_eq!(receive(&sent[0]), Some(Undelivered::Late(id(1))));
    assert_eq!(receive(&sent[1]), None);
    assert_eq!(receive(&sent[0]), Some(Undelivered::Late(id(1))));
    world.collect();
    assert_eq!(world.delivered.len(), 2);
    // After a restart the sender counts from 1 again, in a later incarnation.
    world.kill(id(1));
    world.start(super::record(1, 2));
    world.connect(id(1), id(2));
    world.assert_converges_within(Duration::from_secs(5), 6);
    world.node(1).send_routed(id(3), 1, b"new".to_vec()).unwrap();
    world.collect();
    world.run(Duration::from_secs(1));
    assert_eq!(world.delivered.len(), 3);
}

/// Nodes of other versions read these bytes, so any change of them needs a new [`ROUTED_FORMAT`].
#[test]
fn the_wire_format_is_stable() {
    let signature: Vec<u8> = (0..64).collect();
    let golden = [
        "02100100", // format, hops, kind
        "05012c",   // from, to
        "0000018bcfe56800",
        "0000000000000102",
        "0000018bcfe56801",
        &data_encoding::HEXLOWER.encode(&signature),
        "67697665",
    ]
    .concat();
    assert_eq!(data_encoding::HEXLOWER.encode(&routed().encode()), golden);
    assert_eq!(RoutedMessage::decode(&routed().encode()), Ok(routed()));
}

#[test]
fn routed_messages_out_of_bounds_are_refused() {
    let refused = |change: fn(&mut RoutedMessage)| {
        let mut bad = routed();
        change(&mut bad);
        RoutedMessage::decode(&bad.encode()).unwrap_err()
    };
    assert_eq!(refused(|it| it.hops = 0), BadRoutedMessage::Hops(0));
    assert_eq!(refused(|it| it.hops = MAX_HOPS + 1), BadRoutedMessage::Hops(MAX_HOPS + 1));
    assert_eq!(refused(|it| it.to = it.from), BadRoutedMessage::Circle);
    assert_eq!(refused(|it| it.body = vec![0; MAX_BODY + 1]), BadRoutedMessage::Body(MAX_BODY + 1));
    let good = routed().encode();
    for (index, value, expected) in [
        (0, ROUTED_FORMAT + 1, BadRoutedMessage::Format(ROUTED_FORMAT + 1)),
        (4, 0, BadRoutedMessage::Id(0)),
        (5, 0x10, BadRoutedMessage::Id(0x102c)),
    ] {
        let mut bad = good.clone();
        bad[index] = value;
        assert_eq!(RoutedMessage::decode(&bad), Err(expected));
    }
    for length in 0..good.len() - routed().body.len() {
        assert_eq!(RoutedMessage::decode(&good[..length]), Err(BadRoutedMessage::Short));
    }
}

proptest! {
    #[test]
    fn decoded_messages_encode_to_the_same_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..60),
        hops in 0_u8..20,
    ) {
        let framed = [&[ROUTED_FORMAT, hops, 1, 0, 5, 1], bytes.as_slice(), &[7; 90]].concat();
        for bytes in [bytes, framed] {
            if let Ok(routed) = RoutedMessage::decode(&bytes) {
                prop_assert_eq!(routed.encode(), bytes);
                prop_assert!(routed.hops <= MAX_HOPS && routed.from != routed.to);
            }
        }
    }
}
