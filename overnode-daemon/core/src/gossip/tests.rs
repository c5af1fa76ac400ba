use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::{any, prop, prop_assert, proptest};
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

use overnode_types::name::Named;

use super::*;
use crate::control::packet::Packet;
use overnode_types::{PublicKey, Secret, VerifyingKey};

mod clashes;
mod hostile;
mod routed;

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
    Record {
        id: id(number),
        incarnation,
        version: 0,
        left: false,
        nickname: format!("host{number}"),
        public_key: signer(number).public_key(),
        addresses: vec![format!("192.0.2.{}:6783", number % 250).parse().unwrap()],
        links: Vec::new(),
        no_direct_path: Vec::new(),
        ranges: Vec::new(),
        claims: Vec::new(),
        names: Vec::new(),
        verifying_key: VerifyingKey::default(),
        signature: Signature::default(),
    }
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
    let mut told = 0;
    let mut versions = BTreeSet::new();
    for number in 2..1002 {
        gossip.handle_connected(id(number), identity(1), now);
        now += Duration::from_millis(5);
        gossip.handle_timeout(now);
        told += std::iter::from_fn(|| gossip.poll_action())
            .filter(|action| matches!(action, Action::Send { message: Message::Delta(_), .. }))
            .count();
        versions.insert(gossip.own().version);
    }
    assert!(told < 6000, "{told} records sent; announcing each link would take 500,000");
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
    assert_eq!(Message::decode(&[FORMAT - 1, 0]), Err(BadMessage::Format(FORMAT - 1)));
    let mut longer = Message::Request(vec![id(1)]).encode();
    longer.push(0);
    assert_eq!(Message::decode(&longer), Err(BadMessage::Unreadable));
    // IDs 0 and 4096.
    assert_eq!(Message::decode(&[FORMAT, 2, 1, 0]), Err(BadMessage::Unreadable));
    assert_eq!(Message::decode(&[FORMAT, 2, 1, 0x80, 0x20]), Err(BadMessage::Unreadable));
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

fn named(name: &str, address: &str) -> Named {
    Named { name: name.into(), address: address.parse().unwrap() }
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

/// Nodes of other versions read these bytes, so any change of them needs a new [`FORMAT`].
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
        for bytes in [bytes.clone(), [&[FORMAT, kind], bytes.as_slice()].concat()] {
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
            for (place, value) in &flips {
                let place = place.index(bytes.len());
                bytes[place] ^= value;
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
