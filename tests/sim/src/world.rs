//! All hosts, the network between them, and one clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_core::gossip::{self, Verified};
use overnode_core::ipam::{self, Fact, Key, Layout, Problem, Timing, quarters};
use overnode_types::{Network, NodeId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::host::{Disk, Host, Node, keys, peer};

/// Longer than both ends of a connection need to notice that nothing arrives.
pub(crate) const GRACE: Duration = Duration::from_secs(15);

/// A deliberate error in the nodes. The simulation must find it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// The nodes are as released.
    #[default]
    None,
    /// A crash loses the last write.
    ForgetfulDisk,
    /// Messages are sent before the facts that they depend on are written.
    AnswersFirst,
    /// Loans are not stored.
    LosesLoans,
    /// Nodes vouch for every lender, even after they agreed to reclaim its space.
    VouchesForAll,
}

impl Sabotage {
    /// Returns whether lenders and disks are compared. If not, only duplicate addresses reveal the
    /// error.
    fn is_checked(self) -> bool {
        matches!(self, Self::None | Self::VouchesForAll)
    }
}

/// Settings of one run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Seed of all randomness.
    pub seed: u64,
    /// Number of nodes, at least 4.
    pub nodes: u16,
    /// The error in the nodes.
    pub sabotage: Sabotage,
    /// Whether to print what happens.
    pub verbose: bool,
}

/// Numbers of events in a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Events that were handled.
    pub steps: u64,
    /// Cuts of the network.
    pub partitions: u64,
    /// Processes that ended without a shutdown.
    pub crashes: u64,
    /// Nodes that left or lost their disk.
    pub resets: u64,
    /// Reclaims that an administrator asked for.
    pub reclaims: u64,
    /// Nodes that were reclaimed while they lived, cut off from all others.
    pub reclaimed_alive: u64,
    /// Messages of a liar.
    pub lies: u64,
    /// Observations of another node that an address was announced by the liar before its owner.
    pub lost_races: u64,
    /// Containers that asked for an address.
    pub attaches: u64,
    /// Addresses that were given to containers.
    pub granted: u64,
    /// Requests for an address that failed.
    pub refused: u64,
    /// Addresses that were given out while another node used them.
    pub duplicates: u64,
    /// Problems that nodes reported.
    pub reports: u64,
}

pub(crate) enum Payload {
    Gossip(Vec<u8>),
    RoutedMessage {
        from: NodeId,
        to: NodeId,
        hops: u8,
        body: Vec<u8>,
    },
    /// An encoded routed message of gossip, for the next hop.
    Sealed(Vec<u8>),
}

pub(crate) enum Event {
    Deliver {
        from: NodeId,
        to: NodeId,
        link: u64,
        payload: Payload,
    },
    /// A routed message that was delayed somewhere.
    Late {
        from: NodeId,
        to: NodeId,
        body: Vec<u8>,
    },
    Dial(NodeId, NodeId),
    Close {
        at: NodeId,
        peer: NodeId,
        link: u64,
    },
    Timer(NodeId),
    Restart(NodeId),
    Launch(NodeId),
    Unblock(u64),
    /// An administrator reclaims the space of a node, if it still seems to be gone.
    Reclaim(NodeId),
    Chaos,
}

struct Queued {
    at: Instant,
    order: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

pub(crate) struct World {
    pub settings: Settings,
    pub rng: StdRng,
    pub start: Instant,
    pub now: Instant,
    pub network: Network,
    pub layout: Layout,
    pub timing: Timing,
    pub hosts: BTreeMap<NodeId, Host>,
    /// The lying member.
    pub liar: Option<NodeId>,
    /// Prefixes of other nodes that it announces.
    pub forged: Vec<IpNet>,
    verified: Verified,
    /// Directions in which nothing arrives, with the number of the cut that blocks them.
    pub blocked: BTreeMap<(NodeId, NodeId), u64>,
    /// Nodes that are cut off from all others, with the number of the cut. Administrators take them
    /// for dead.
    pub isolated: BTreeMap<NodeId, u64>,
    /// Nodes that were reclaimed while they were cut off, each with the last reclaimed incarnation.
    pub reclaimed: BTreeMap<NodeId, u64>,
    pub faults: u64,
    /// The number of the latest connection.
    links: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    order: u64,
    /// Users of the addresses in the range.
    pub used: BTreeMap<IpAddr, NodeId>,
    pub counts: Counts,
    pub problems: BTreeMap<NodeId, BTreeSet<Problem>>,
    pub violations: Vec<String>,
    /// Whether routed messages are lost, duplicated and delayed.
    pub is_rough: bool,
    /// Whether little happens except that containers come and go.
    pub is_calm: bool,
    /// Pairs of nodes that connect. All nodes connect with each other if this is `None`.
    pub mesh: Option<BTreeSet<(NodeId, NodeId)>>,
    /// Minimum time between two computations of the paths.
    pub pace: Duration,
    pub traffic: Traffic,
}

/// Messages and bytes that were sent over the network.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub messages: u64,
    pub bytes: u64,
}

impl World {
    pub(crate) fn new(settings: Settings) -> Self {
        let mut rng = StdRng::seed_from_u64(settings.seed);
        let now = Instant::now();
        let prefix = [20, 23, 24, 25, 26][rng.random_range(0..5)];
        let network = Network {
            subnet: "10.0.0.0/8".parse().expect("a network"),
            range: format!("10.1.0.0/{prefix}").parse().expect("a network"),
        };
        let hand_back = Duration::from_secs(rng.random_range(5..60));
        let timing = Timing { hand_back, grace: GRACE, ..Timing::default() };
        let has_liar = settings.nodes > 4 && rng.random_bool(0.25);
        let liar = has_liar
            .then(|| NodeId::new(rng.random_range(5..=settings.nodes)).expect("a valid ID"));
        let layout = Layout::new(network).expect("a valid network");
        let mut world = Self {
            settings,
            rng,
            start: now,
            now,
            network,
            layout,
            timing,
            hosts: BTreeMap::new(),
            liar,
            forged: Vec::new(),
            verified: Verified::default(),
            blocked: BTreeMap::new(),
            isolated: BTreeMap::new(),
            reclaimed: BTreeMap::new(),
            faults: 0,
            links: 0,
            queue: BinaryHeap::new(),
            order: 0,
            used: BTreeMap::new(),
            counts: Counts::default(),
            problems: BTreeMap::new(),
            violations: Vec::new(),
            is_rough: true,
            is_calm: false,
            mesh: None,
            pace: Duration::ZERO,
            traffic: Traffic::default(),
        };
        for number in 1..=settings.nodes {
            let id = NodeId::new(number).expect("a valid ID");
            world.hosts.insert(id, Host::default());
        }
        world
    }

    pub(crate) fn ids(&self) -> Vec<NodeId> {
        self.hosts.keys().copied().collect()
    }

    pub(crate) fn running(&self) -> Vec<NodeId> {
        self.hosts.iter().filter(|(_, host)| host.node.is_some()).map(|(id, _)| *id).collect()
    }

    pub(crate) fn node(&mut self, id: NodeId) -> Option<&mut Node> {
        self.hosts.get_mut(&id)?.node.as_mut()
    }

    pub(crate) fn log(&self, text: impl FnOnce() -> String) {
        if self.settings.verbose {
            eprintln!("{:9.3} {}", (self.now - self.start).as_secs_f64(), text());
        }
    }

    pub(crate) fn violate(&mut self, text: String) {
        self.log(|| format!("VIOLATION {text}"));
        self.violations.push(text);
    }

    pub(crate) fn after(&mut self, delay: Duration, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Queued { at: self.now + delay, order: self.order, event }));
    }

    pub(crate) fn random(&mut self, low: f64, high: f64) -> Duration {
        Duration::from_secs_f64(self.rng.random_range(low..high))
    }

    /// Runs the next event if it is due by `end`. Returns false if none is.
    pub(crate) fn step(&mut self, end: Instant) -> bool {
        if self.queue.peek().is_none_or(|Reverse(next)| next.at > end) {
            self.now = end;
            return false;
        }
        let Some(Reverse(Queued { at, event, .. })) = self.queue.pop() else { return false };
        self.now = self.now.max(at);
        self.counts.steps += 1;
        self.handle(event);
        true
    }

    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.violations.is_empty() && self.step(end) {}
    }

    /// Removes the scheduled chaos.
    pub(crate) fn drop_chaos(&mut self) {
        self.queue.retain(|Reverse(queued)| !matches!(queued.event, Event::Chaos));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, link, payload } => self.deliver(from, to, link, payload),
            Event::Late { from, to, body } => self.give_routed(from, to, &body),
            Event::Dial(a, b) => self.dial(a, b),
            Event::Close { at, peer, link } => self.close(at, peer, link),
            Event::Timer(id) => self.timer(id),
            Event::Restart(id) => self.restart(id),
            Event::Launch(id) => self.launch(id),
            Event::Unblock(fault) => self.unblock(fault),
            Event::Reclaim(of) => self.reclaim_at_some_node(of),
            Event::Chaos => self.chaos(),
        }
    }

    /// Launches a new node on a host that has none.
    pub(crate) fn launch(&mut self, id: NodeId) {
        let milliseconds = 1_700_000_000_000 + (self.now - self.start).as_millis() as u64;
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if host.disk.is_some() {
            return;
        }
        host.is_dead = false;
        host.disk = Some(Disk { incarnation: milliseconds, ..Disk::default() });
        self.log(|| format!("launch {id}"));
        self.restart(id);
    }

    /// Starts the node that is on the host's disk.
    pub(crate) fn restart(&mut self, id: NodeId) {
        let rng = StdRng::seed_from_u64(self.rng.random());
        let (network, timing, now) = (self.network, self.timing, self.now);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if host.node.is_some() || host.is_dead {
            return;
        }
        let Some(disk) = &mut host.disk else { return };
        host.node = Some(Node::start(id, disk, network, timing, rng, self.verified.clone(), now));
        self.log(|| format!("start {id}"));
        self.pump(id);
        for other in self.ids() {
            if other != id && self.connects(id, other) {
                let delay = self.random(0.01, 1.0);
                self.after(delay, Event::Dial(id.min(other), id.max(other)));
            }
        }
    }

    /// Ends the process without a shutdown. The disk remains.
    pub(crate) fn crash(&mut self, id: NodeId) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if host.node.take().is_none() {
            return;
        }
        self.counts.crashes += 1;
        if self.settings.sabotage == Sabotage::ForgetfulDisk
            && let Some(disk) = &mut host.disk
        {
            disk.forget_last_write();
        }
        self.log(|| format!("crash {id}"));
        self.hang_up(id);
    }

    /// Makes the other nodes notice after a while that the node is gone.
    fn hang_up(&mut self, id: NodeId) {
        let links: Vec<_> = self
            .hosts
            .iter()
            .filter_map(|(other, host)| Some((*other, *host.node.as_ref()?.links.get(&id)?)))
            .collect();
        for (other, link) in links {
            let delay = self.random(0.0, 4.0);
            self.after(delay, Event::Close { at: other, peer: id, link });
        }
    }

    /// Removes a host's node and its disk.
    pub(crate) fn wipe(&mut self, id: NodeId) {
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.node = None;
        host.disk = None;
        host.routed.clear();
        self.end_routes(id, None);
        self.used.retain(|_, user| *user != id);
        self.problems.remove(&id);
        self.hang_up(id);
    }

    pub(crate) fn is_blocked(&self, from: NodeId, to: NodeId) -> bool {
        self.blocked.contains_key(&(from, to))
    }

    /// Blocks these directions for a time. Returns the number of the cut.
    pub(crate) fn block(&mut self, directions: Vec<(NodeId, NodeId)>, time: Duration) -> u64 {
        self.faults += 1;
        let fault = self.faults;
        for (from, to) in directions {
            self.blocked.insert((from, to), fault);
            for (at, peer) in [(from, to), (to, from)] {
                let link = self.node(at).and_then(|node| node.links.get(&peer).copied());
                if let Some(link) = link {
                    let delay = self.random(0.1, 6.0);
                    self.after(delay, Event::Close { at, peer, link });
                }
            }
        }
        self.after(time, Event::Unblock(fault));
        fault
    }

    fn unblock(&mut self, fault: u64) {
        self.log(|| format!("cut {fault} is over"));
        self.blocked.retain(|_, number| *number != fault);
        self.isolated.retain(|_, number| *number != fault);
    }

    /// Returns whether two nodes ever connect.
    fn connects(&self, a: NodeId, b: NodeId) -> bool {
        self.mesh.as_ref().is_none_or(|mesh| mesh.contains(&(a.min(b), a.max(b))))
    }

    fn dial(&mut self, a: NodeId, b: NodeId) {
        let linked =
            |world: &mut Self, at, peer| world.node(at).map(|node| node.links.get(&peer).copied());
        let (Some(at_a), Some(at_b)) = (linked(self, a, b), linked(self, b, a)) else { return };
        if at_a.is_some() && at_a == at_b {
            return;
        }
        if self.is_blocked(a, b) || self.is_blocked(b, a) {
            let delay = self.random(0.3, 2.0);
            self.after(delay, Event::Dial(a, b));
            return;
        }
        self.links += 1;
        let (link, now) = (self.links, self.now);
        for (at, peer) in [(a, b), (b, a)] {
            if let Some(node) = self.node(at) {
                if node.links.insert(peer, link).is_some() {
                    node.gossip.handle_disconnected(peer, now);
                }
                node.gossip.handle_connected(peer, keys(peer), now);
                node.met.insert(peer);
                node.paths_are_old = true;
            }
            self.pump(at);
        }
        for (at, peer) in [(a, b), (b, a)] {
            if self.node(peer).is_none() {
                self.after(Duration::from_secs(1), Event::Close { at, peer, link });
            }
        }
    }

    fn close(&mut self, at: NodeId, peer: NodeId, link: u64) {
        let now = self.now;
        let Some(node) = self.node(at) else { return };
        if node.links.get(&peer) != Some(&link) {
            return;
        }
        node.links.remove(&peer);
        node.gossip.handle_disconnected(peer, now);
        node.paths_are_old = true;
        self.pump(at);
        let delay = self.random(0.1, 2.0);
        self.after(delay, Event::Dial(at.min(peer), at.max(peer)));
        // The other end may not have noticed.
        let other = self.node(peer).and_then(|node| node.links.get(&at).copied());
        if other == Some(link) {
            let delay = self.random(0.0, 4.0);
            self.after(delay, Event::Close { at: peer, peer: at, link });
        }
    }

    fn deliver(&mut self, from: NodeId, to: NodeId, link: u64, payload: Payload) {
        let now = self.now;
        let Some(node) = self.node(to) else { return };
        if node.links.get(&from) != Some(&link) {
            return;
        }
        match payload {
            Payload::Gossip(bytes) => {
                if let Err(error) = node.gossip.handle_message(from, &bytes, now) {
                    self.violate(format!("{to} cannot decode a message of {from}: {error}"));
                }
                self.pump(to);
            }
            Payload::Sealed(bytes) => {
                if let Err(error) = node.gossip.handle_routed(from, &bytes, now) {
                    self.violate(format!(
                        "{to} cannot decode the routed message that {from} forwards: {error}"
                    ));
                }
                self.pump(to);
            }
            Payload::RoutedMessage { from, to: end, body, .. } if end == to => {
                self.give_routed(from, to, &body)
            }
            Payload::RoutedMessage { from, to: end, hops, body } => {
                if hops > 0 {
                    self.forward(
                        to,
                        Payload::RoutedMessage { from, to: end, hops: hops - 1, body },
                    );
                }
            }
        }
    }

    fn give_routed(&mut self, from: NodeId, to: NodeId, body: &[u8]) {
        let now = self.now;
        if self.is_liar(to)
            && let Ok(question) = ipam::Message::decode(body, &self.layout)
            && let Some(answer) = self.false_answer(&question)
        {
            return self.send_routed(to, from, answer.encode());
        }
        if self.settings.sabotage == Sabotage::VouchesForAll
            && self.node(to).is_some()
            && let Ok(ipam::Message::Hold { quarter, serial, round, .. }) =
                ipam::Message::decode(body, &self.layout)
        {
            let vouch = ipam::Message::Vouch { quarter, serial, round, heard: true };
            return self.send_routed(to, from, vouch.encode());
        }
        let Some(node) = self.node(to) else { return };
        if let Err(error) = node.ipam.handle_message(from, body, now)
            && !self.is_liar(from)
        {
            self.violate(format!("{to} cannot decode the body that {from} sent: {error}"));
        }
        self.pump(to);
    }

    /// Passes a routed message to the next node on its path, as gossip knows it.
    fn forward(&mut self, at: NodeId, payload: Payload) {
        let Payload::RoutedMessage { to, .. } = &payload else { return };
        let to = *to;
        let Some(node) = self.node(at) else { return };
        let Some(path) = node.paths.get(&to).copied() else { return };
        self.transmit(at, path.via, payload);
    }

    /// Delivers as TCP does: in order, or not at all.
    fn transmit(&mut self, from: NodeId, to: NodeId, payload: Payload) {
        let Some(link) = self.node(from).and_then(|node| node.links.get(&to).copied()) else {
            return;
        };
        if self.is_blocked(from, to) {
            return;
        }
        self.traffic.messages += 1;
        self.traffic.bytes += match &payload {
            Payload::Gossip(bytes) => bytes.len() as u64,
            Payload::RoutedMessage { body, .. } => body.len() as u64 + 8,
            Payload::Sealed(bytes) => bytes.len() as u64,
        };
        let delay = match &payload {
            // Gossip relies on the order within a connection.
            Payload::Gossip(_) | Payload::Sealed(_) => Duration::from_millis(30),
            Payload::RoutedMessage { .. } => self.random(0.001, 0.2),
        };
        self.after(delay, Event::Deliver { from, to, link, payload });
    }

    pub(crate) fn send_routed(&mut self, from: NodeId, to: NodeId, body: Vec<u8>) {
        if body.len() > ipam::MAX_MESSAGE {
            self.violate(format!("{from} sends {} bytes at once", body.len()));
        }
        if self.is_rough {
            let dice = self.rng.random_range(0..100);
            if dice < 8 {
                return;
            }
            if dice < 20 {
                let most = if dice < 12 { 200.0 } else { 5.0 };
                let delay = self.random(0.1, most);
                self.after(delay, Event::Late { from, to, body: body.clone() });
                if dice < 16 {
                    return;
                }
            }
        }
        self.forward(from, Payload::RoutedMessage { from, to, hops: 16, body });
    }

    fn timer(&mut self, id: NodeId) {
        let now = self.now;
        let Some(node) = self.node(id) else { return };
        if node.timer.is_none_or(|at| at > now) {
            return;
        }
        node.timer = None;
        if node.gossip.poll_timeout().is_some_and(|at| at <= now) {
            node.gossip.handle_timeout(now);
            // Gossip may have published changed links.
            node.paths_are_old = true;
        }
        if node.ipam.poll_timeout().is_some_and(|at| at <= now) {
            node.ipam.handle_timeout(now);
            if node.ipam.poll_timeout().is_some_and(|at| at <= now) {
                self.violate(format!("the allocation of {id} does not handle its timeout"));
            }
        }
        self.pump(id);
    }

    /// Returns true if the node dies now, before its next action.
    fn dies(&mut self, id: NodeId) -> bool {
        let Some(node) = self.node(id) else { return true };
        match &mut node.crash_after {
            Some(0) => {
                self.crash(id);
                let delay = self.random(0.1, 20.0);
                self.after(delay, Event::Restart(id));
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    /// Carries out what the cores of a node decided.
    pub(crate) fn pump(&mut self, id: NodeId) {
        let mut delayed = Vec::new();
        loop {
            if let Some(action) = self.node(id).and_then(|node| node.gossip.poll_action()) {
                if self.dies(id) {
                    return;
                }
                self.carry_out_gossip(id, action);
                continue;
            }
            self.refresh_paths(id);
            let now = self.now;
            if let Some(node) = self.node(id) {
                node.ipam.set_incarnation(node.gossip.own().incarnation, now);
            }
            if let Some(action) = self.node(id).and_then(|node| node.ipam.poll_action()) {
                if self.dies(id) {
                    return;
                }
                match action {
                    ipam::Action::Persist(changes)
                        if self.settings.sabotage == Sabotage::AnswersFirst =>
                    {
                        delayed.push(changes);
                    }
                    action => self.carry_out(id, action),
                }
                continue;
            }
            if self.node(id).is_none() || !self.announce(id) {
                break;
            }
        }
        for changes in delayed {
            if self.dies(id) {
                return;
            }
            self.persist(id, &changes);
        }
        if self.settings.sabotage.is_checked() {
            self.check_lenders(id);
        }
        let pace = self.pace;
        let Some(node) = self.node(id) else { return };
        if let Some(at) = node.poll_timeout(pace)
            && node.timer.is_none_or(|timer| at < timer)
        {
            node.timer = Some(at);
            let delay = at.saturating_duration_since(self.now);
            self.after(delay, Event::Timer(id));
        }
    }

    fn carry_out_gossip(&mut self, id: NodeId, action: gossip::Action) {
        let now = self.now;
        match action {
            gossip::Action::Send { to, message } => {
                self.transmit(id, to, Payload::Gossip(message.encode()))
            }
            gossip::Action::Changed(other) | gossip::Action::Removed(other) => {
                let Some(host) = self.hosts.get_mut(&id) else { return };
                let (Some(node), Some(disk)) = (&mut host.node, &mut host.disk) else { return };
                let Some(record) = node.gossip.record(other).cloned() else { return };
                disk.peers.insert(other, record.clone());
                node.routing.learn(&record);
                disk.standing.insert(other, node.routing.standing(other).collect());
                node.ipam.learn(other, peer(&record), now);
                node.paths_are_old = true;
            }
            gossip::Action::SendRouted { to, routed } => {
                self.transmit(id, to, Payload::Sealed(routed.encode()));
            }
            // Messages of the allocation take another, less reliable path in this simulation.
            gossip::Action::Deliver(_) => {}
            gossip::Action::Contested(_) | gossip::Action::Clash { .. } => {}
        }
    }

    fn refresh_paths(&mut self, id: NodeId) {
        let now = self.now;
        let pace = self.pace;
        let is_early = |node: &Node| node.paths_at.is_some_and(|last| now < last + pace);
        if self.node(id).is_none_or(|node| !node.paths_are_old || is_early(node)) {
            return;
        }
        let targets: Vec<_> = self
            .hosts
            .iter()
            .filter(|(other, host)| **other != id && !host.is_dead && self.connects(id, **other))
            .map(|(id, _)| *id)
            .collect();
        let Some(node) = self.node(id) else { return };
        if std::mem::take(&mut node.paths_are_old) {
            node.paths_at = Some(now);
            node.paths = node.gossip.paths().clone();
            let reachable = node.paths.keys().copied().collect();
            node.routing.set_reachable(node.paths.keys(), now);
            node.reached.retain(|id, _| node.paths.contains_key(id));
            for id in node.paths.keys() {
                node.reached.entry(*id).or_insert(now);
            }
            node.ipam.set_reachable(reachable, now);
            node.ipam.set_targets_met(targets.iter().all(|target| node.met.contains(target)), now);
        }
    }

    /// Announces this node's prefixes. Returns true if they changed.
    fn announce(&mut self, id: NodeId) -> bool {
        let now = self.now;
        let (is_liar, forged) = (self.is_liar(id), self.forged.clone());
        let Some(node) = self.node(id) else { return false };
        if node.leaving && node.gossip.own().left {
            return false;
        }
        let (mut ranges, claims) = (node.ipam.ranges(), node.ipam.claims());
        if is_liar {
            ranges.extend(forged);
        }
        if node.gossip.own().ranges == ranges && node.gossip.own().claims == claims {
            return false;
        }
        node.gossip.update_own(
            |own| {
                own.ranges = ranges;
                own.claims = claims;
            },
            now,
        );
        true
    }

    fn persist(&mut self, id: NodeId, changes: &[ipam::Change]) {
        let loses_loans = self.settings.sabotage == Sabotage::LosesLoans;
        if let Some(disk) = self.hosts.get_mut(&id).and_then(|host| host.disk.as_mut()) {
            disk.write(changes, loses_loans);
        }
        for change in changes {
            if let ipam::Change::Forget(Key::Held(block))
            | ipam::Change::Put(Fact::Held { block, lost: true }) = change
            {
                self.end_routes(id, Some(*block));
            }
        }
        self.add_tombstones(id, changes);
        if self.settings.sabotage.is_checked() {
            self.check_disks(id, changes);
        }
    }

    /// Handles the reclaim of nodes that live, and that are cut off or were a moment ago. `by`
    /// takes back the space of all of them at once. Nodes for which the case is one that the design
    /// cannot prevent (docs/internals/addresses.md) are made dead for good instead.
    fn add_tombstones(&mut self, by: NodeId, changes: &[ipam::Change]) {
        let mut alive = Vec::new();
        for change in changes {
            if let ipam::Change::Put(Fact::Tombstone { id: of, incarnation, by: claimant }) = change
                && *claimant == by
                && self.hosts[of].disk.as_ref().is_some_and(|disk| disk.epoch() <= *incarnation)
            {
                self.reclaimed.insert(*of, *incarnation);
                alive.push(*of);
            }
        }
        for &of in &alive {
            let may_lend = self
                .node(of)
                .is_some_and(|node| quarters().any(|quarter| node.ipam.may_lend(quarter)));
            if may_lend && !self.reaches_reclaimed_alive(of) && self.settings.sabotage.is_checked()
            {
                self.violate(format!(
                    "the space of {of} is reclaimed while another node vouches for it"
                ));
            }
        }
        let (kept, excluded): (Vec<_>, Vec<_>) =
            alive.into_iter().partition(|of| self.has_nothing_to_lose(*of));
        self.counts.reclaimed_alive += kept.len() as u64;
        for of in excluded {
            self.log(|| format!("{of} is now gone for good"));
            self.wipe(of);
            if let Some(host) = self.hosts.get_mut(&of) {
                host.is_dead = true;
            }
        }
    }

    /// Returns whether a node was reclaimed and does not know it yet.
    pub(crate) fn is_reclaimed_alive(&self, id: NodeId) -> bool {
        let epoch = self.hosts[&id].disk.as_ref().map(Disk::epoch);
        self.reclaimed.get(&id).is_some_and(|up_to| epoch.is_some_and(|epoch| epoch <= *up_to))
    }

    /// Returns whether a node reaches another node like that, which may vouch for it.
    fn reaches_reclaimed_alive(&self, id: NodeId) -> bool {
        let node = self.hosts[&id].node.as_ref();
        node.is_some_and(|node| node.paths.keys().any(|other| self.is_reclaimed_alive(*other)))
    }

    /// Returns whether there is another node like that. The two may vouch for each other.
    pub(crate) fn is_another_reclaimed_alive(&self, id: NodeId) -> bool {
        self.ids().into_iter().any(|other| other != id && self.is_reclaimed_alive(other))
    }

    /// Checks that no two nodes may lend from the same quarter at the same time.
    fn check_lenders(&mut self, id: NodeId) {
        let may_lend = |host: &Host, quarter| {
            host.node.as_ref().is_some_and(|node| node.ipam.may_lend(quarter))
        };
        let mut violations = Vec::new();
        for quarter in quarters().filter(|quarter| may_lend(&self.hosts[&id], *quarter)) {
            let others =
                self.hosts.iter().filter(|(other, host)| **other != id && may_lend(host, quarter));
            violations.extend(
                others.map(|(other, _)| format!("{id} may lend quarter {quarter}, as {other} may")),
            );
        }
        for violation in violations {
            self.violate(violation);
        }
    }

    /// Checks that no two disks have the same block, or the same quarter to lend.
    ///
    /// A reclaimed node that does not know about it yet may have a title on its disk that another
    /// node has by now. It had the title before, or took it since on consent that was given before.
    /// It may not lend with that title, which [`Self::check_lenders`] checks.
    fn check_disks(&mut self, id: NodeId, changes: &[ipam::Change]) {
        let mut violations = Vec::new();
        for change in changes {
            let ipam::Change::Put(fact) = change else { continue };
            let is_honest = |other: &NodeId| !self.is_liar(*other) && !self.is_liar(id);
            for (other, host) in
                self.hosts.iter().filter(|(other, _)| **other != id && is_honest(other))
            {
                let Some(disk) = &host.disk else { continue };
                let is_void = matches!(fact, Fact::Ledger { .. })
                    && (self.is_reclaimed_alive(*other) || self.is_reclaimed_alive(id));
                if !is_void && disk.contradicts(fact) {
                    violations.push(format!("{id} writes {fact:?}, which {other} has on disk"));
                }
            }
        }
        for violation in violations {
            self.violate(violation);
        }
    }

    fn carry_out(&mut self, id: NodeId, action: ipam::Action) {
        match action {
            ipam::Action::Persist(changes) => {
                self.log(|| format!("{id} writes {changes:?}"));
                self.persist(id, &changes);
            }
            ipam::Action::Send { to, bytes } => {
                self.log(|| {
                    format!("{id} -> {to} {:?}", ipam::Message::decode(&bytes, &self.layout))
                });
                self.send_routed(id, to, bytes);
            }
            ipam::Action::Granted { request, address } => {
                let owner = self.node(id).and_then(|node| node.waiting.remove(&request));
                match owner {
                    Some(owner) => self.attach(id, address, owner),
                    None => self.violate(format!("{id} answers an unknown request")),
                }
            }
            ipam::Action::Failed { request, error } => {
                self.log(|| format!("{id}: {error}"));
                self.counts.refused += 1;
                if let Some(node) = self.node(id) {
                    node.waiting.remove(&request);
                }
            }
            ipam::Action::Report(problem) => {
                self.log(|| format!("{id} reports {problem}"));
                self.counts.reports += 1;
                self.problems.entry(id).or_default().insert(problem);
            }
            ipam::Action::Reclaimed(of) => self.log(|| format!("{id} has reclaimed {of}")),
            ipam::Action::ReclaimFailed(error) => self.log(|| format!("{id}: {error}")),
            ipam::Action::Renewed(incarnation) => {
                let now = self.now;
                let Some(host) = self.hosts.get_mut(&id) else { return };
                if let (Some(disk), Some(node)) = (&mut host.disk, &mut host.node) {
                    disk.incarnation = disk.incarnation.max(incarnation);
                    node.gossip.raise_incarnation(incarnation, now);
                }
            }
            ipam::Action::MayLeave => self.leave(id),
            ipam::Action::CannotLeave(error) => {
                self.log(|| format!("{id}: {error}"));
                if let Some(node) = self.node(id) {
                    node.leaving = false;
                }
            }
        }
    }

    /// Attaches a container. From here on, its address is in use.
    fn attach(&mut self, id: NodeId, address: IpAddr, owner: String) {
        self.log(|| format!("{id} gives {address} to {owner}"));
        self.counts.granted += 1;
        let is_own = self.layout.own_part(id).is_some_and(|own| own.contains(&address));
        let Some(disk) = self.hosts.get_mut(&id).and_then(|host| host.disk.as_mut()) else {
            return;
        };
        let is_kept = is_own || disk.holds(address) || self.settings.sabotage != Sabotage::None;
        disk.attachments.insert(address, owner);
        // Nodes on both sides of a partition may have the same static address
        // (`World::check_statics`).
        if self.liar == Some(id) || !self.network.range.contains(&address) {
            return;
        }
        if !is_kept {
            self.violate(format!("{id} gives {address}, which is not on its disk"));
        }
        if !self.layout.is_usable(address) {
            self.violate(format!("{id} gives {address}, which is not usable"));
        }
        if let Some(other) = self.used.insert(address, id) {
            self.counts.duplicates += 1;
            self.violate(format!("{id} gives {address}, which {other} gave"));
        }
    }

    /// Removes a node that has handed over everything it must.
    fn leave(&mut self, id: NodeId) {
        self.counts.resets += 1;
        self.log(|| format!("{id} leaves"));
        let Some(node) = self.node(id) else { return };
        node.gossip.leave();
        while let Some(action) = self.node(id).and_then(|node| node.gossip.poll_action()) {
            self.carry_out_gossip(id, action);
        }
        self.wipe(id);
        let delay = self.random(0.1, 20.0);
        self.after(delay, Event::Launch(id));
    }
}
