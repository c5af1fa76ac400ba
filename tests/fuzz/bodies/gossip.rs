//! Fuzzes gossip: messages from neighbors that are members, and so can sign for themselves but not
//! for other nodes.

use std::time::{Duration, Instant};

use overnode_core::control::frame::MAX_MESSAGE;
use overnode_core::gossip::routed::{KIND_ALLOCATION, KIND_CLASH, MAX_BODY};
use overnode_core::gossip::{
    Action, Gossip, MAX_STAMP, Message, Record, RoutedMessage, SKEW_MS, Signature, Signer, Stamp,
    budget,
};
use overnode_types::name::Named;
use overnode_types::{NodeId, Secret, VerifyingKey};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::input::{Input, MAX_STEPS};

const OWN: u16 = 1;
/// The node's neighbors at the start. Nodes 2 to 5 may become neighbors.
const NEIGHBOURS: [u16; 2] = [2, 3];

/// Runs a node among hostile neighbors, step by step.
pub(crate) fn run(data: &[u8]) {
    let mut world = World::new();
    let mut input = Input(data);
    for _ in 0..MAX_STEPS {
        let Some(step) = input.step() else { break };
        world.step(step, &mut input);
        world.check();
    }
}

struct World {
    gossip: Gossip,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut gossip = Gossip::new(blank(OWN), signer(OWN), StdRng::seed_from_u64(1), now);
        for peer in NEIGHBOURS {
            gossip.handle_connected(id(peer), identity(peer), now);
        }
        Self { gossip, now }
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        let peer = id(2 + u16::from(step >> 4) % 4);
        match step & 15 {
            0 => self.message(peer, input.bytes()),
            // All records are signed, either by the nodes that they name or by one other node.
            1 => {
                let by = input.byte();
                let bytes = input.bytes();
                if let Ok(Message::Delta(mut records)) = Message::decode(bytes) {
                    for record in &mut records {
                        let number = if by == 0 { record.id.get() } else { by.into() };
                        signer(number).sign(record);
                    }
                    self.message(peer, &Message::Delta(records).encode());
                }
            }
            2 => self.routed(peer, input.bytes()),
            3 => {
                let bytes = input.bytes();
                if let Ok(routed) = RoutedMessage::decode(bytes) {
                    self.routed(peer, &signed(routed).encode());
                }
            }
            4 => {
                self.now += Duration::from_millis(u64::from(input.short()));
                self.gossip.handle_timeout(self.now);
                let next = self.gossip.poll_timeout();
                assert!(next.is_some_and(|next| next > self.now), "the timeout does not advance");
            }
            5 => self.gossip.handle_disconnected(peer, self.now),
            6 => {
                let by = input.byte();
                let identity = identity(if by == 0 { peer.get() } else { by.into() });
                self.gossip.handle_connected(peer, identity, self.now);
            }
            7 => self.gossip.resync(peer),
            8 => {
                let nickname = String::from_utf8_lossy(input.bytes()).into_owned();
                self.gossip.update_own(|own| own.nickname = nickname, self.now);
            }
            9 => {
                let _ = self.gossip.send_routed(peer, KIND_ALLOCATION, input.bytes().to_vec());
            }
            10 => {
                for source in 1..=8 {
                    self.gossip.branches(id(source));
                }
            }
            _ => {}
        }
    }

    fn message(&mut self, peer: NodeId, bytes: &[u8]) {
        if let Ok(message) = Message::decode(bytes) {
            let encoded = message.encode();
            assert!(encoded.len() <= bytes.len(), "the encoding is not the shortest");
            assert_eq!(Message::decode(&encoded).as_ref(), Ok(&message));
            if let Message::Delta(records) = message {
                for record in records {
                    record.stamp();
                }
            }
        }
        if let Err(error) = self.gossip.handle_message(peer, bytes, self.now) {
            assert!(!error.to_string().chars().any(char::is_control));
        }
    }

    fn routed(&mut self, peer: NodeId, bytes: &[u8]) {
        if let Ok(routed) = RoutedMessage::decode(bytes) {
            assert_eq!(routed.encode(), bytes);
        }
        let _ = self.gossip.handle_routed(peer, bytes, self.now);
    }

    /// Carries out the node's actions and checks the invariants.
    fn check(&mut self) {
        while let Some(action) = self.gossip.poll_action() {
            match action {
                Action::Send { to, message } => {
                    assert_ne!(to, id(OWN));
                    let encoded = message.encode();
                    assert!(encoded.len() < MAX_MESSAGE);
                    assert_eq!(
                        Message::decode(&encoded),
                        Ok(message),
                        "other nodes would disconnect this node"
                    );
                }
                Action::SendRouted { to, routed } => {
                    assert_ne!(to, id(OWN));
                    assert_eq!(
                        RoutedMessage::decode(&routed.encode()),
                        Ok(routed),
                        "other nodes would disconnect this node"
                    );
                }
                Action::Deliver(routed) => {
                    assert_eq!(routed.to, id(OWN));
                    assert!(routed.body.len() <= MAX_BODY);
                    assert_eq!(
                        signed(routed.clone()).signature,
                        routed.signature,
                        "a forged message was delivered"
                    );
                }
                Action::Changed(node) | Action::Removed(node) => {
                    assert!(self.gossip.record(node).is_some());
                    assert_ne!(node, id(OWN), "another node changed the own record");
                }
                Action::Contested(record) => assert_eq!(record.id, id(OWN)),
                Action::Clash { record, .. } => assert_ne!(record.id, id(OWN)),
            }
        }
        let own = self.gossip.record(id(OWN)).expect("the own record always exists");
        assert_eq!(own.verifying_key, identity(OWN));
        assert!(!own.left, "another node marked this node as left");
        assert!(own.incarnation <= MAX_STAMP && own.version <= MAX_STAMP);
        let others = self.gossip.records().filter(|record| record.id != id(OWN));
        let (count, bytes) =
            others.fold((0, 0), |(count, bytes), it| (count + 1, bytes + budget::weight(it)));
        assert!(
            count <= usize::from(NodeId::MAX)
                && bytes <= budget::SHARED_BYTES + count * budget::RESERVED_BYTES
        );
        for (to, path) in self.gossip.paths() {
            assert_ne!(*to, id(OWN));
            assert!(path.hops > 0);
            assert_eq!(
                self.gossip.paths().get(&path.via).map(|first| first.hops),
                Some(1),
                "the next hop is not a neighbor"
            );
        }
    }
}

fn id(number: u16) -> NodeId {
    NodeId::new(number).expect("in range")
}

fn secret(number: u16) -> Secret {
    Secret([number as u8; 32])
}

fn signer(number: u16) -> Signer {
    Signer::new(&secret(number))
}

fn identity(number: u16) -> VerifyingKey {
    signer(number).verifying_key()
}

fn blank(number: u16) -> Record {
    let nickname = format!("host{number}");
    let blank = Record::blank(id(number), 1, nickname, signer(number).public_key());
    Record { version: 1, ..blank }
}

fn named(name: &str, address: &str) -> Named {
    Named { name: name.into(), address: address.parse().expect("an address") }
}

/// Signs a routed message as its sender does. See [`overnode_core::gossip::routed`].
fn signed(mut routed: RoutedMessage) -> RoutedMessage {
    let bytes = routed.encode();
    let text = [b"overnode parcel v2", &bytes[2..31], routed.body.as_slice()].concat();
    let pair = overnode_core::control::key::signing_key(&secret(routed.from.get()));
    routed.signature.0.copy_from_slice(pair.sign(&text).as_ref());
    routed
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let message =
        |step: u8, message: &Message| [vec![step], Input::framed(&message.encode())].concat();
    let signed_message = |peer: u8, by: u8, message: &Message| {
        [vec![peer << 4 | 1, by], Input::framed(&message.encode())].concat()
    };
    let wait = |milliseconds: u16| [&[4], &milliseconds.to_le_bytes()[..]].concat();
    let linked = |number: u16, links: &[u16]| Record {
        links: links.iter().map(|link| id(*link)).collect(),
        addresses: vec!["192.0.2.1:6783".parse().expect("an address")],
        ..blank(number)
    };
    let full = Record {
        no_direct_path: vec![id(3)],
        ranges: vec!["10.40.0.0/15".parse().expect("a range")],
        claims: vec![
            "10.32.0.7".parse().expect("an address"),
            "fd00::7".parse().expect("an address"),
        ],
        names: vec![named("db", "2001:db8::7"), named("web", "10.40.0.7")],
        ..linked(2, &[1, 3])
    };
    let routed = |from: u16, to: u16, kind: u8, body: Vec<u8>| {
        let signature = Signature::default();
        let (serial, receiver) = ((1, 1), 1);
        let routed = RoutedMessage {
            from: id(from),
            to: id(to),
            hops: 3,
            kind,
            serial,
            receiver,
            signature,
            body,
        };
        Input::framed(&routed.encode())
    };
    let stamp = Stamp { incarnation: 1, version: 2, hash: [1, 2, 3, 4] };
    let rival = Record { incarnation: 9, ..blank(OWN) };
    let delta = |records: &[Record]| Message::Delta(records.to_vec());
    vec![
        ("summary", message(0, &Message::Summary([7; 16]))),
        (
            "digest",
            message(
                0,
                &Message::Digest { ask: true, stamps: vec![(id(1), stamp), (id(7), stamp)] },
            ),
        ),
        ("request", message(0, &Message::Request(vec![id(1), id(2)]))),
        (
            "delta",
            [signed_message(0, 0, &delta(&[full.clone(), linked(3, &[1, 2])])), wait(60)].concat(),
        ),
        ("unsigned", message(0, &delta(std::slice::from_ref(&full)))),
        (
            "chain",
            [
                signed_message(0, 0, &delta(&[linked(2, &[1, 4])])),
                signed_message(0, 0, &delta(&[linked(4, &[2, 5]), linked(5, &[4])])),
                vec![0x29, 1, 0, 9, 10],
                wait(60),
                [vec![3], routed(5, 1, KIND_ALLOCATION, vec![1])].concat(),
                [vec![0x13], routed(3, 5, KIND_ALLOCATION, vec![1])].concat(),
            ]
            .concat(),
        ),
        (
            "my-record-by-another",
            [signed_message(0, 9, &delta(std::slice::from_ref(&rival))), wait(60), wait(1100)]
                .concat(),
        ),
        ("challenge", [vec![3], routed(2, 1, KIND_CLASH, delta(&[rival]).encode())].concat()),
        (
            "another-node-7",
            [
                signed_message(0, 0, &delta(&[linked(2, &[1, 7]), linked(7, &[2])])),
                signed_message(1, 9, &delta(&[Record { incarnation: 5, ..linked(7, &[2]) }])),
                wait(5100),
                vec![0x05, 0x06, 0, 7],
            ]
            .concat(),
        ),
        (
            "beyond-the-clock",
            signed_message(0, 9, &delta(&[Record { incarnation: 2 * SKEW_MS, ..blank(7) }])),
        ),
        ("two-ids", signed_message(0, 9, &delta(&[blank(7), blank(8)]))),
        (
            "tombstone",
            signed_message(0, 0, &delta(&[Record { left: true, version: 9, ..blank(2) }])),
        ),
        ("nickname", [vec![8], Input::framed(b"a\x1b[2Jb"), wait(60)].concat()),
    ]
}
