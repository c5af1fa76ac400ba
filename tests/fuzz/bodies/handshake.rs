//! Fuzzes WireGuard's handshake between two nodes. An attacker on and off the path alters, repeats,
//! drops and forges datagrams. The attacker knows every public key, so the first MAC can be valid,
//! but knows no secret.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use overnode_core::handshake::gate::{Gate, Judgment};
use overnode_core::handshake::{Event, Handshakes, Initiate, PeerConfig, SessionKeys};
use overnode_types::{PeerIndex, PublicKey, Secret};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::input::{Input, MAX_STEPS};

/// Length in bytes of the two MACs at the end of an initiation and of a response.
const MACS: usize = 32;
/// Upper limit for the slots in use: the sessions (three, and those that are kept for five more
/// seconds) and pending handshakes.
const MANY_SLOTS: usize = 400;

/// Runs both nodes and the network between them, step by step.
pub(crate) fn run(data: &[u8]) {
    let mut world = World::new();
    let mut input = Input(data);
    world.pass(Duration::ZERO);
    for _ in 0..MAX_STEPS {
        let Some(step) = input.step() else { break };
        world.step(step, &mut input);
    }
}

struct World {
    nodes: [Handshakes; 2],
    gates: [Gate; 2],
    sessions: [Vec<SessionKeys>; 2],
    now: Instant,
    wall: SystemTime,
    /// Datagrams in flight, each with its receiver.
    flying: VecDeque<(usize, Vec<u8>)>,
    /// All datagrams that were ever sent, each with its receiver.
    seen: Vec<(usize, Vec<u8>)>,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut nodes =
            [0, 1].map(|node| Handshakes::new(secret(node), StdRng::seed_from_u64(node as u64)));
        let public = [0, 1].map(|node: usize| nodes[node].public_key());
        for (node, handshakes) in nodes.iter_mut().enumerate() {
            let config = PeerConfig {
                public_key: public[1 - node],
                preshared_key: Secret([9; 32]),
                endpoint: Some(address(1 - node)),
                initiate: if node == 0 {
                    Initiate::AtOnce
                } else {
                    Initiate::After(Duration::from_secs(5))
                },
                persistent_keepalive: None,
            };
            handshakes.upsert_peer(PeerIndex(1), config, now);
        }
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let gates = nodes.each_ref().map(|node| node.gate(StdRng::seed_from_u64(7)));
        let (flying, seen) = (VecDeque::new(), Vec::new());
        Self { nodes, gates, sessions: Default::default(), now, wall, flying, seen }
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        let to = usize::from(step >> 4) & 1;
        let from =
            if step & 0x20 == 0 { address(1 - to) } else { address(usize::from(step >> 6) + 2) };
        match step & 15 {
            0 => self.deliver(to, from, input.bytes()),
            1 => {
                let mut bytes = input.bytes().to_vec();
                self.seal(to, &mut bytes);
                self.deliver(to, from, &bytes);
            }
            2 => {
                if let Some((to, bytes)) = self.flying.pop_front() {
                    self.deliver(to, from, &bytes);
                }
            }
            3 | 4 => {
                if let Some((to, mut bytes)) = self.flying.pop_front() {
                    alter(&mut bytes, input);
                    if step & 1 == 0 {
                        self.seal(to, &mut bytes);
                    }
                    self.deliver(to, from, &bytes);
                }
            }
            5 => {
                self.flying.pop_front();
            }
            6 | 7 => {
                let which = usize::from(input.byte());
                if let Some((to, mut bytes)) =
                    self.seen.get(which % self.seen.len().max(1)).cloned()
                {
                    if step & 1 == 1 {
                        alter(&mut bytes, input);
                        self.seal(to, &mut bytes);
                    }
                    self.deliver(to, from, &bytes);
                }
            }
            8 => self.pass(Duration::from_millis(u64::from(input.short()))),
            9 => {
                let which = usize::from(input.byte());
                let sessions = &self.sessions[to];
                if let Some(session) = sessions.get(which % sessions.len().max(1)) {
                    self.nodes[to].handle_confirmed(PeerIndex(1), session.local_index, self.now);
                    self.drain(to);
                }
            }
            _ => {}
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += time;
        for node in 0..2 {
            self.nodes[node].handle_timeout(self.now, self.wall);
            let next = self.nodes[node].poll_timeout();
            assert!(next.is_none_or(|next| next > self.now), "the timeout does not advance");
            self.drain(node);
        }
    }

    fn deliver(&mut self, to: usize, from: SocketAddr, bytes: &[u8]) {
        let before = self.counted(to);
        let is_peer = || from == address(1 - to);
        let replied = match self.gates[to].judge(self.now, from.into(), bytes, is_peer) {
            Judgment::Admit(_) => {
                self.nodes[to].handle_datagram(self.now, from.into(), bytes);
                0
            }
            Judgment::Reply(reply) => {
                let length = reply.len();
                self.flying.push_back((1 - to, reply.clone()));
                self.seen.push((1 - to, reply));
                length
            }
            Judgment::Drop(_) => 0,
        };
        assert_eq!(self.counted(to), before + 1, "each datagram must be counted once");
        let sent = self.drain(to) + replied;
        assert!(sent <= bytes.len(), "{sent} bytes in reply to {} bytes", bytes.len());
    }

    fn counted(&self, node: usize) -> u64 {
        let gate = *self.gates[node].counters().lock().expect("the lock is not poisoned");
        self.nodes[node].counters().plus(gate).named().map(|(_, value)| value).sum()
    }

    /// Takes a node's output. Returns the number of bytes that it sends.
    fn drain(&mut self, node: usize) -> usize {
        let mut sent = 0;
        while let Some(transmit) = self.nodes[node].poll_transmit() {
            sent += transmit.bytes.len();
            self.flying.push_back((1 - node, transmit.bytes.clone()));
            self.seen.push((1 - node, transmit.bytes));
        }
        while let Some(event) = self.nodes[node].poll_event() {
            if let Event::Install { session, .. } = event {
                if session.initiator {
                    // The indices may be altered in transit, because only the first MAC covers them
                    // (whitepaper section 5.4.4).
                    let is_its_half = |other: &SessionKeys| {
                        other.tx_key == session.rx_key && other.rx_key == session.tx_key
                    };
                    assert!(
                        self.sessions[1 - node].iter().any(is_its_half),
                        "no other node has the matching session"
                    );
                }
                self.sessions[node].push(session);
            }
        }
        assert!(self.nodes[node].slots_used() <= MANY_SLOTS);
        sent
    }

    /// Makes the first MAC valid, which requires only the public key of `to`.
    fn seal(&self, to: usize, bytes: &mut [u8]) {
        let Some(end) = bytes.len().checked_sub(MACS) else { return };
        let PublicKey(public) = self.nodes[to].public_key();
        let key = Blake2s256::new().chain_update(b"mac1----").chain_update(public).finalize();
        let (body, macs) = bytes.split_at_mut(end);
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("32 bytes are a key");
        macs[..16].copy_from_slice(&mac.chain(body).finalize_fixed());
    }
}

fn alter(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let (at, change) = (usize::from(input.byte()), input.byte());
    match (bytes.get_mut(at), change) {
        (Some(_), 0) => bytes.truncate(at),
        (Some(byte), _) => *byte ^= change,
        (None, _) => bytes.push(change),
    }
}

fn secret(node: usize) -> Secret {
    Secret([node as u8 + 1; 32])
}

fn address(number: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number as u8], 6784))
}

pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let raw = |step: u8, kind: u8, length: usize| {
        let mut bytes = vec![0; length];
        bytes[0] = kind;
        [vec![step], Input::framed(&bytes)].concat()
    };
    vec![
        ("initiation", raw(1, 1, 148)),
        ("response", raw(0x11, 2, 92)),
        ("cookie-reply", raw(0, 3, 64)),
        ("data", raw(0, 4, 32)),
        ("handshake", vec![2, 2, 0x19, 0]),
        ("altered", vec![3, 40, 1, 8, 0x88, 0x13, 4, 4, 255, 8, 0x88, 0x13, 4, 60, 2]),
        ("altered-response", vec![2, 4, 4, 1, 6, 1, 7, 1, 8, 2]),
        ("repeated", vec![2, 2, 6, 0, 6, 1, 0x26, 0, 8, 100, 0, 6, 0]),
        ("renewed", vec![2, 2, 0x19, 0, 8, 255, 255, 8, 255, 255, 2, 2, 0x19, 1, 8, 255, 255]),
        ("unanswered", [8, 255, 255].repeat(4)),
        ("both-at-once", vec![5, 8, 0x88, 0x13, 8, 0x88, 0x13, 2, 2, 2, 2, 9, 0, 0x19, 0]),
    ]
}
