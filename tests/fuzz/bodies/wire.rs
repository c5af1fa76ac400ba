//! Fuzzes stateless decoders: routed messages, path probes, the relay header, and messages of the
//! bulk path.

use overnode_api::bulk::Cipher;
use overnode_core::gossip::routed::{KIND_ALLOCATION, MAX_BODY, MAX_HOPS};
use overnode_core::gossip::{RoutedMessage, Signature};
use overnode_core::path::probe::{ENCAP_LEN, HEADER, Kind, Probe, SMALLEST};
use overnode_daemon::bulk::control::Keys;
use overnode_daemon::bulk::message::{HEADER_LEN, Header, Hello};
use overnode_daemon::bulk::session::Session;
use overnode_ebpf::wire::Relay;
use overnode_types::{BootTime, NodeId, SessionIndex};

use super::input::Input;

/// Runs one input. The first byte selects the type of the rest.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        0 => routed(input.0),
        1 => {
            let received = u32::from(input.short());
            probe(input.0, received);
        }
        2 => relay(input.0),
        3 => bulk(input.0),
        _ => {}
    }
}

fn routed(bytes: &[u8]) {
    let Ok(routed) = RoutedMessage::decode(bytes) else { return };
    assert_eq!(routed.encode(), bytes);
    assert!(routed.from != routed.to && routed.body.len() <= MAX_BODY);
    assert!((1..=MAX_HOPS).contains(&routed.hops));
}

fn probe(bytes: &[u8], received: u32) {
    let Ok(probe) = Probe::decode(bytes, received) else { return };
    assert_eq!(probe.size, received);
    let encoded = probe.encode();
    assert_eq!(encoded[..HEADER], bytes[..HEADER]);
    assert_eq!(encoded.len(), (received - ENCAP_LEN) as usize);
    assert_eq!(Probe::decode(&encoded, received), Ok(probe));
}

fn relay(bytes: &[u8]) {
    let Some((relay, message)) = Relay::split(bytes) else { return };
    assert_eq!([&relay.to_bytes(), message].concat(), bytes);
}

fn bulk(bytes: &[u8]) {
    if let Some(header) = Header::from_message(bytes) {
        assert_eq!(header.to_bytes(), bytes[..HEADER_LEN]);
        let _ = session()
            .open(&header, &mut bytes.to_vec(), BootTime::NEVER)
            .expect_err("a message opened without its keys");
    }
    if let Some(hello) = Hello::from_plaintext(bytes) {
        assert_eq!(Hello::from_plaintext(&hello.to_bytes()), Some(hello));
    }
}

fn session() -> Session {
    Session::new(&Keys {
        peer: 1,
        local_index: SessionIndex::new(1),
        remote_index: SessionIndex::new(2),
        tx: [1; 32],
        rx: [2; 32],
        created_ns: BootTime::NEVER,
        expires_ns: BootTime::from_nanos(1),
        is_initiator: true,
    })
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let id = |number| NodeId::new(number).expect("in range");
    let routed = RoutedMessage {
        from: id(1),
        to: id(4095),
        hops: MAX_HOPS,
        kind: KIND_ALLOCATION,
        serial: (1, 2),
        receiver: 3,
        signature: Signature([5; 64]),
        body: vec![1, 2, 3],
    };
    let request =
        Probe { kind: Kind::Request, size: 60, sequence: 1, stamp: 2, seen: 1440, carries: 1440 };
    let answer = Probe { kind: Kind::Answer, size: SMALLEST, ..request };
    let received = |probe: &Probe| (probe.size as u16).to_le_bytes();
    let probe = |probe: &Probe| [&[1], &received(probe)[..], &probe.encode()].concat();
    let header = Header {
        cipher: Cipher::Aes,
        worker: 1,
        is_partial: true,
        receiver: SessionIndex::new(1),
        counter: 2,
    };
    let hello = Hello { wants_answer: true, speeds: [1880, 3980] };
    let relay = Relay { hops: 3, destination: 1, source: 2, previous: 3 };
    vec![
        ("parcel", [&[0], routed.encode().as_slice()].concat()),
        ("request", probe(&request)),
        ("answer", probe(&answer)),
        ("relay", [&[2], &relay.to_bytes()[..], &[1, 2, 3]].concat()),
        ("bulk-message", [&[3], &header.to_bytes()[..], &[0; 40]].concat()),
        ("bulk-hello", [&[3], &hello.to_bytes()[..]].concat()),
    ]
}
