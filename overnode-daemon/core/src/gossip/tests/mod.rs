//! Tests of nodes that gossip in virtual time. Links delay and lose messages under a seed.

mod clashes;
mod convergence;
mod hostile;
mod message;
mod routed;

use std::collections::BTreeMap;
use std::net::IpAddr;

use rand::{Rng, SeedableRng};

use overnode_types::name::Named;
use overnode_types::{PublicKey, Secret, VerifyingKey};

use super::*;
use crate::control::packet::Packet;

fn id(id: u16) -> NodeId {
    NodeId::new(id).unwrap()
}

/// Returns the signer of a test identity. Each identity is derived from a number.
fn signer(seed: u16) -> Signer {
    let [high, low] = seed.to_be_bytes();
    let mut secret = [low; 32];
    secret[0] ^= high;
    Signer::new(&Secret(secret))
}

fn identity(seed: u16) -> VerifyingKey {
    signer(seed).verifying_key()
}

/// Returns the signer of the node that owns the record.
fn signer_of(record: &Record) -> Signer {
    static SEEDS: OnceLock<BTreeMap<PublicKey, u16>> = OnceLock::new();
    let seeds = SEEDS
        .get_or_init(|| (0..=NodeId::MAX).map(|seed| (signer(seed).public_key(), seed)).collect());
    signer(seeds[&record.public_key])
}

pub(super) fn record(number: u16, incarnation: u64) -> Record {
    signed(blank(number, incarnation), number)
}

/// Returns the record as the host with these keys would publish it.
pub(super) fn signed(mut record: Record, seed: u16) -> Record {
    signer(seed).sign(&mut record);
    record
}

fn gossip(own: Record, now: Instant) -> Gossip {
    let signer = signer_of(&own);
    Gossip::new(own, signer, StdRng::seed_from_u64(1), now)
}

fn blank(number: u16, incarnation: u64) -> Record {
    let nickname = format!("host{number}");
    Record {
        addresses: vec![format!("192.0.2.{}:6783", number % 250).parse().unwrap()],
        ..Record::blank(id(number), incarnation, nickname, signer(number).public_key())
    }
}

fn named(name: &str, address: &str) -> Named {
    Named { name: name.into(), address: address.parse().unwrap() }
}

/// A number of nodes with one clock and one seed. Links deliver in order with random delays. Like
/// TCP connections, they lose the messages in flight when they are cut.
struct World {
    now: Instant,
    rng: StdRng,
    nodes: BTreeMap<NodeId, Gossip>,
    keys: BTreeMap<NodeId, PublicKey>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    removed: BTreeMap<NodeId, BTreeSet<NodeId>>,
    contested: BTreeSet<NodeId>,
    /// The reporting node and the node that the report is about.
    clashes: BTreeSet<(NodeId, NodeId)>,
    delivered: Vec<RoutedMessage>,
    undelivered: Vec<Undelivered>,
    messages: u64,
    records: u64,
    bytes: u64,
}

/// The messages in flight in one direction.
#[derive(Default)]
struct Link {
    queue: VecDeque<(Instant, Packet)>,
}

impl World {
    fn new(count: u16, seed: u64) -> Self {
        let mut world = Self {
            now: Instant::now(),
            rng: StdRng::seed_from_u64(seed),
            nodes: BTreeMap::new(),
            keys: BTreeMap::new(),
            links: BTreeMap::new(),
            removed: BTreeMap::new(),
            contested: BTreeSet::new(),
            clashes: BTreeSet::new(),
            delivered: Vec::new(),
            undelivered: Vec::new(),
            messages: 0,
            records: 0,
            bytes: 0,
        };
        for number in 1..=count {
            world.start(record(number, 1));
        }
        world
    }

    fn start(&mut self, own: Record) {
        let rng = StdRng::seed_from_u64(self.rng.random());
        self.keys.insert(own.id, own.public_key);
        let signer = signer_of(&own);
        self.nodes.insert(own.id, Gossip::new(own, signer, rng, self.now));
    }

    fn node(&mut self, number: u16) -> &mut Gossip {
        self.nodes.get_mut(&id(number)).unwrap()
    }

    fn is_linked(&self, one: NodeId, other: NodeId) -> bool {
        self.links.contains_key(&(one, other))
    }

    fn connect(&mut self, one: NodeId, other: NodeId) {
        if one == other || self.is_linked(one, other) {
            return;
        }
        for (from, to) in [(one, other), (other, one)] {
            self.links.insert((from, to), Link::default());
            let (now, identity) = (self.now, self.nodes[&to].own().verifying_key);
            self.nodes.get_mut(&from).unwrap().handle_connected(to, identity, now);
        }
        self.collect();
    }

    fn cut(&mut self, one: NodeId, other: NodeId) {
        for (from, to) in [(one, other), (other, one)] {
            if self.links.remove(&(from, to)).is_some()
                && let Some(node) = self.nodes.get_mut(&from)
            {
                node.handle_disconnected(to, self.now);
            }
        }
        self.collect();
    }

    /// The node dies without notice and loses its disk.
    fn kill(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        for other in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.cut(node, other);
        }
    }

    fn collect(&mut self) {
        let mut outgoing = Vec::new();
        for (from, node) in &mut self.nodes {
            while let Some(action) = node.poll_action() {
                match action {
                    Action::Send { to, message } => {
                        let bytes = message.encode();
                        self.messages += 1;
                        self.bytes += bytes.len() as u64;
                        if let Message::Delta(records) = &message {
                            self.records += records.len() as u64;
                        }
                        assert!(bytes.len() <= crate::control::frame::MAX_MESSAGE);
                        outgoing.push((*from, to, Packet::Gossip(bytes)));
                    }
                    Action::SendRouted { to, routed } => {
                        outgoing.push((*from, to, Packet::RoutedMessage(routed.encode())));
                    }
                    Action::Deliver(routed) => {
                        assert_eq!(routed.to, *from);
                        self.delivered.push(routed);
                    }
                    Action::Changed(changed) => assert!(node.record(changed).is_some()),
                    Action::Removed(removed) => {
                        self.removed.entry(*from).or_default().insert(removed);
                    }
                    Action::Contested(rival) => {
                        assert_eq!(rival.id, *from);
                        self.contested.insert(*from);
                    }
                    Action::Clash { record, .. } => {
                        self.clashes.insert((*from, record.id));
                    }
                }
            }
        }
        for (from, to, packet) in outgoing {
            if let Some(link) = self.links.get_mut(&(from, to)) {
                let earliest = link.queue.back().map_or(self.now, |(at, _)| *at);
                let delay = Duration::from_micros(self.rng.random_range(100..200_000));
                link.queue.push_back((earliest.max(self.now + delay), packet));
            }
        }
    }

    /// Runs to the next event, or to `end`.
    fn step(&mut self, end: Instant) {
        let arrivals = self.links.values().filter_map(|link| link.queue.front()).map(|(at, _)| *at);
        let timeouts = self.nodes.values().filter_map(Gossip::poll_timeout);
        let next = arrivals.chain(timeouts).min().unwrap_or(end).min(end);
        self.now = self.now.max(next);
        for ((from, to), link) in &mut self.links {
            while link.queue.front().is_some_and(|(at, _)| *at <= self.now) {
                let (_, packet) = link.queue.pop_front().unwrap();
                let node = self.nodes.get_mut(to).unwrap();
                match packet {
                    Packet::Gossip(bytes) => node.handle_message(*from, &bytes, self.now).unwrap(),
                    Packet::RoutedMessage(bytes) => {
                        self.undelivered
                            .extend(node.handle_routed(*from, &bytes, self.now).unwrap());
                    }
                    Packet::Ping(_) | Packet::Pong(_) => unreachable!("{packet:?}"),
                }
            }
        }
        for node in self.nodes.values_mut() {
            if node.poll_timeout().is_some_and(|at| at <= self.now) {
                node.handle_timeout(self.now);
            }
        }
        self.collect();
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step(end);
        }
    }

    /// Returns the nodes connected with `start` by the current links.
    fn component(&self, start: NodeId) -> BTreeSet<NodeId> {
        let (mut seen, mut queue) = (BTreeSet::from([start]), vec![start]);
        while let Some(node) = queue.pop() {
            for other in self.nodes.keys() {
                if self.is_linked(node, *other) && seen.insert(*other) {
                    queue.push(*other);
                }
            }
        }
        seen
    }

    /// Checks that every node has the newest record of every node in its component and knows which
    /// nodes are in it.
    fn converged(&self) -> Result<(), String> {
        for (own, gossip) in &self.nodes {
            let component = self.component(*own);
            for other in &component {
                let truth = self.nodes[other].own();
                if gossip.record(*other) != Some(truth) {
                    return Err(format!(
                        "{own} has {:?} of {other} instead of {truth:?}",
                        gossip.record(*other)
                    ));
                }
                if truth.public_key != self.keys[other] {
                    return Err(format!("{other} lost its key"));
                }
            }
            let mut reached = gossip.reachable();
            reached.insert(*own);
            if reached != component {
                return Err(format!("{own} reaches {reached:?} instead of {component:?}"));
            }
        }
        Ok(())
    }

    fn assert_converges_within(&mut self, limit: Duration, seed: u64) {
        let end = self.now + limit;
        let mut last = Err("not tried".into());
        while self.now < end {
            self.run(Duration::from_millis(100));
            last = self.converged();
            if last.is_ok() {
                return;
            }
        }
        panic!("seed {seed}: not converged after {limit:?}: {}", last.unwrap_err());
    }

    fn chain(&mut self, count: u16) {
        for number in 1..count {
            self.connect(id(number), id(number + 1));
        }
    }

    fn mesh(&mut self) {
        let all: Vec<_> = self.nodes.keys().copied().collect();
        for one in &all {
            for other in all.iter().filter(|other| *other > one) {
                self.connect(*one, *other);
            }
        }
    }
}
