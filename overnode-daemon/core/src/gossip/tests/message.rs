//! Tests of the wire format and of malformed messages.

use proptest::prelude::{any, prop, prop_assert, proptest};

use super::*;

#[test]
fn the_own_record_is_brought_within_bounds() {
    let mut own = record(1, 1);
    own.nickname = format!("\u{1b}[31m{}", "é".repeat(100));
    own.claims = (0..5000_u32).map(|n| std::net::Ipv4Addr::from_bits(n).into()).collect();
    own.links = vec![id(1), id(1)];
    own.names = (0..5000).rev().map(|n| named(&format!("n{n:04}"), "10.0.0.1")).collect();
    own.names.extend([named("No", "10.0.0.1"), named("n0000", "10.0.0.1")]);
    let gossip = gossip(own, Instant::now());
    assert_eq!(gossip.own().check(), Ok(()));
    assert_eq!(gossip.own().nickname, format!("[31m{}", "é".repeat(30)));
    assert_eq!(gossip.own().claims.len(), MAX_CLAIMS);
    assert_eq!(gossip.own().names.len(), MAX_NAMES);
    assert_eq!(gossip.own().names[1], named("n0001", "10.0.0.1"));
}

#[test]
fn out_of_bounds_messages_are_refused_as_a_whole() {
    let refused = |message: Message| Message::decode(&message.encode()).unwrap_err();
    let delta = |change: fn(&mut Record)| {
        let mut bad = record(2, 1);
        change(&mut bad);
        refused(Message::Delta(vec![record(1, 1), bad]))
    };
    let bounds = [
        delta(|r| r.nickname = "x".repeat(65)),
        delta(|r| r.nickname = "a\u{7}".into()),
        delta(|r| r.nickname = "a\u{202e}b".into()),
        delta(|r| r.addresses = vec!["192.0.2.1:1".parse().unwrap(); MAX_ADDRESSES + 1]),
        delta(|r| r.ranges = vec!["10.0.0.0/8".parse().unwrap(); MAX_RANGES + 1]),
        delta(|r| r.claims = vec!["10.0.0.1".parse().unwrap(); MAX_CLAIMS + 1]),
        delta(|r| {
            r.names = (0..=MAX_NAMES).map(|n| named(&format!("n{n:05}"), "10.0.0.1")).collect()
        }),
        delta(|r| {
            r.names = (0..500)
                .map(|n| named(&format!("n{n:05}{}", ["a"; 61].join(".")), "10.0.0.1"))
                .collect();
        }),
        delta(|r| r.names = vec![named("web", "10.0.0.1"); 2]),
        delta(|r| r.names = vec![named("web", "10.0.0.2"), named("web", "10.0.0.1")]),
        delta(|r| r.names = vec![named("b", "10.0.0.1"), named("a", "10.0.0.1")]),
        delta(|r| r.names = vec![named("Web", "10.0.0.1")]),
        delta(|r| r.names = vec![named("", "10.0.0.1")]),
        delta(|r| r.names = vec![named("a..b", "10.0.0.1")]),
        delta(|r| r.names = vec![named("a\u{1b}", "10.0.0.1")]),
        delta(|r| r.incarnation = MAX_STAMP + 1),
        delta(|r| r.version = u64::MAX),
        delta(|r| r.links = vec![id(3), id(3)]),
        delta(|r| r.links = vec![id(4), id(3)]),
        delta(|r| r.links = vec![id(2)]),
        delta(|r| r.left = true),
        refused(Message::Delta(vec![record(2, 1), record(2, 2)])),
        refused(Message::Delta((1..).map(|number| blank(number, 1)).take(MAX_DELTA + 1).collect())),
        refused(Message::Request(vec![id(2), id(1)])),
        refused(Message::Digest {
            ask: true,
            stamps: vec![(id(2), Stamp::default()), (id(2), Stamp::default())],
        }),
    ];
    assert!(bounds.iter().all(|error| matches!(error, BadMessage::Bounds(_))), "{bounds:?}");
    assert_eq!(Message::decode(&[]), Err(BadMessage::Empty));
    assert_eq!(
        Message::decode(&[GOSSIP_FORMAT - 1, 0]),
        Err(BadMessage::Format(GOSSIP_FORMAT - 1))
    );
    let mut longer = Message::Request(vec![id(1)]).encode();
    longer.push(0);
    assert_eq!(Message::decode(&longer), Err(BadMessage::Unreadable));
    // IDs 0 and 4096.
    assert_eq!(Message::decode(&[GOSSIP_FORMAT, 2, 1, 0]), Err(BadMessage::Unreadable));
    assert_eq!(Message::decode(&[GOSSIP_FORMAT, 2, 1, 0x80, 0x20]), Err(BadMessage::Unreadable));
}

#[test]
fn a_refused_message_changes_nothing() {
    let mut world = World::new(2, 9);
    world.chain(2);
    world.assert_converges_within(Duration::from_secs(5), 9);
    let before: Vec<_> = world.node(1).records().cloned().collect();
    let mut bad = record(9, 1);
    bad.version = u64::MAX;
    let now = world.now;
    let outcome =
        world.node(1).handle_message(id(2), &Message::Delta(vec![record(8, 1), bad]).encode(), now);
    assert!(outcome.is_err());
    let good = Message::Delta(vec![record(8, 1)]).encode();
    assert_eq!(world.node(1).handle_message(id(7), &good, now), Ok(()), "not from a neighbor");
    assert_eq!(world.node(1).records().cloned().collect::<Vec<_>>(), before);
}

fn full() -> Record {
    let full = Record {
        id: id(300),
        incarnation: 1_700_000_000_000,
        version: 3,
        left: false,
        nickname: "höst".into(),
        public_key: PublicKey([0; 32]),
        addresses: vec!["192.0.2.1:6783".parse().unwrap(), "[2001:db8::2]:6783".parse().unwrap()],
        links: vec![id(1), id(4095)],
        no_direct_path: vec![id(4095)],
        ranges: vec!["10.40.0.0/15".parse().unwrap(), "fd00::/64".parse().unwrap()],
        claims: vec!["10.32.0.1".parse().unwrap()],
        names: vec![named("db", "2001:db8::7"), named("web", "10.40.0.7")],
        verifying_key: VerifyingKey::default(),
        signature: Signature::default(),
    };
    signed(full, 0xaa)
}

// From Python's cryptography module: Ed25519 with 32 bytes of 0xaa as the seed, and X25519 with the
// first half of their SHA-512 hash.
const VERIFYING_KEY: &str = "e734ea6c2b6257de72355e472aa05a4c487e6b463c029ed306df2f01b5636b58";
const PUBLIC_KEY: &str = "552291f02c9317519633021302d0f7ba39b1cf32310e23ee7aa6a4312ae4a027";
const SIGNATURE: &str = "b5eb5db45557d36be300d8117f7e0042a041f5eb18bd93fd6526e9ac786c9ba7\
                         ef51434474f4a44711393bcf6c66f5e664158f6d1e5ce51eb8cb9d683227270d";

/// Nodes of other versions read these bytes, so any change of them needs a new [`GOSSIP_FORMAT`].
#[test]
fn the_wire_format_is_stable() {
    let hex = |message: &Message| data_encoding::HEXLOWER.encode(&message.encode());
    let stamp = Stamp { incarnation: 300, version: 2, hash: [1, 2, 3, 4] };
    let golden = [
        (Message::Summary([7; 16]), "0400".to_owned() + &"07".repeat(16)),
        (
            Message::Digest { ask: true, stamps: vec![(id(1), stamp)] },
            "0401010101ac020201020304".into(),
        ),
        (Message::Request(vec![id(1), id(300)]), "04020201ac02".into()),
        (
            Message::Delta(vec![full()]),
            [
                "040301",       // format, delta, one record
                "ac02",         // ID
                "80d095ffbc31", // incarnation
                "03",           // version
                "00",           // left
                "0568c3b67374", // nickname
                PUBLIC_KEY,
                "0200c0000201ff34",                       // addresses: IPv4, port
                "0120010db8000000000000000000000002ff34", // IPv6, port
                "0201ff1f",                               // links
                "01ff1f",                                 // nodes without a direct path
                "02000a2800000f",                         // ranges: IPv4
                "01fd00000000000000000000000000000040",   // IPv6
                "01000a200001",                           // claims
                "020264620120010db8000000000000000000000007", // names: IPv6
                "03776562000a280007",                     // IPv4
                VERIFYING_KEY,
                SIGNATURE,
            ]
            .concat(),
        ),
    ];
    for (message, bytes) in golden {
        assert_eq!(hex(&message), bytes);
        assert_eq!(Message::decode(&message.encode()), Ok(message));
    }
    // SHA-256 of the record's bytes above, by Python's hashlib.
    assert_eq!(full().stamp().hash, [133, 91, 30, 104]);
}

proptest! {
    #[test]
    fn no_input_panics_and_decoded_records_are_within_bounds(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        kind in 0_u8..4,
    ) {
        for bytes in [bytes.clone(), [&[GOSSIP_FORMAT, kind], bytes.as_slice()].concat()] {
            if let Ok(Message::Delta(records)) = Message::decode(&bytes) {
                prop_assert!(records.iter().all(|record| record.check().is_ok()));
            }
        }
    }

    #[test]
    fn altered_messages_never_cause_a_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut gossip = gossip(record(1, 1), Instant::now());
        let now = Instant::now();
        gossip.handle_connected(id(2), identity(2), now);
        for message in [
            Message::Delta(vec![record(1, 5), full()]),
            Message::Digest {
                ask: true,
                stamps: vec![(id(1), Stamp::default()), (id(9), full().stamp())],
            },
            Message::Request((1..50).map(id).collect()),
        ] {
            let mut bytes = message.encode();
            for (index, value) in &flips {
                let at = index.index(bytes.len());
                bytes[at] ^= value;
            }
            let _ = gossip.handle_message(id(2), &bytes, now);
            gossip.handle_timeout(now + Duration::from_secs(40));
        }
        prop_assert!(gossip.own().check().is_ok());
        while let Some(action) = gossip.poll_action() {
            if let Action::Send { message, .. } = action {
                prop_assert!(Message::decode(&message.encode()).is_ok());
            }
        }
    }
}
