//! Tests of nodes that allocate addresses from one range. A [`Cluster`] delivers their messages and
//! keeps their disks.

mod allocation;
mod claims;
mod forged;
mod layout;
mod message;
mod problems;
mod reclaim;
mod statics;
mod transfer;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::*;
use overnode_types::Network;

/// Long enough that all nodes notice a change of what is reachable, and that everything settles.
const LONG: Duration = Duration::from_secs(20);

fn id(id: u16) -> NodeId {
    NodeId::new(id).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(subnet: &str, range: &str) -> Network {
    Network { subnet: subnet.parse().unwrap(), range: range.parse().unwrap() }
}

/// Claims a static address on a node that reaches no other node, so the answer comes at once.
fn claim(ipam: &mut Ipam, address: IpAddr, owner: &str) -> Result<(), IpamError> {
    let request = ipam.claim(address, owner, Instant::now());
    let answer = std::iter::from_fn(|| ipam.poll_action()).find_map(|action| match action {
        Action::Granted { request: of, .. } if of == request => Some(Ok(())),
        Action::Failed { request: of, error } if of == request => Some(Err(error)),
        _ => None,
    });
    answer.expect("no immediate answer")
}

fn node(number: u16) -> Ipam {
    let config = Config {
        network: Network::default(),
        id: id(number),
        incarnation: 1000,
        timing: Timing::default(),
    };
    Ipam::new(config, [], BTreeMap::new(), Instant::now()).unwrap()
}

/// Polls all actions of a node and returns the messages that it sends to `to`.
fn sent_to(ipam: &mut Ipam, to: u16) -> Vec<Message> {
    let layout = *ipam.layout();
    let actions: Vec<_> = std::iter::from_fn(|| ipam.poll_action()).collect();
    let sent = actions.into_iter().filter_map(|action| match action {
        Action::Send { to: node, bytes } if node == id(to) => Some(bytes),
        _ => None,
    });
    sent.map(|bytes| Message::decode(&bytes, &layout).unwrap()).collect()
}

/// Delivers a message from a lying member that is otherwise silent.
fn send_forged(cluster: &mut Cluster, from: u16, to: u16, message: &Message) {
    let now = cluster.now;
    // A message that cannot be decoded does no harm.
    let _ = cluster.node(to).handle_message(id(from), &message.encode(), now);
    cluster.pump();
}

fn reclaimed(of: u16, incarnation: u64, by: u16) -> Message {
    let titles = [Title { serial: 5000, holder: id(by) }; 4];
    Message::Reclaimed { of: id(of), incarnation, by: id(by), titles }
}

/// A few nodes that all reach each other, except those that are cut off. Messages arrive at once.
struct Cluster {
    now: Instant,
    network: Network,
    nodes: BTreeMap<NodeId, Ipam>,
    disks: BTreeMap<NodeId, BTreeMap<Key, Fact>>,
    incarnations: BTreeMap<NodeId, u64>,
    left: BTreeSet<NodeId>,
    cut: BTreeSet<NodeId>,
    queue: VecDeque<(NodeId, NodeId, Vec<u8>)>,
    granted: BTreeMap<NodeId, Vec<IpAddr>>,
    answers: Vec<(NodeId, Action)>,
    messages: usize,
}

impl Cluster {
    fn new(range: &str, ids: impl IntoIterator<Item = u16>) -> Self {
        let mut cluster = Self {
            now: Instant::now(),
            network: net("10.0.0.0/8", range),
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            left: BTreeSet::new(),
            cut: BTreeSet::new(),
            queue: VecDeque::new(),
            granted: BTreeMap::new(),
            answers: Vec::new(),
            messages: 0,
        };
        for number in ids {
            cluster.start(number, 1000 + u64::from(number));
        }
        cluster
    }

    fn start(&mut self, number: u16, incarnation: u64) {
        let id = id(number);
        let config = Config { network: self.network, id, incarnation, timing: Timing::default() };
        let facts: Vec<_> = self.disks.entry(id).or_default().values().cloned().collect();
        let allocated =
            self.granted.entry(id).or_default().iter().map(|address| (*address, String::new()));
        let ipam = Ipam::new(config, facts, allocated.collect(), self.now).unwrap();
        self.nodes.insert(id, ipam);
        self.incarnations.insert(id, incarnation);
        self.left.remove(&id);
        self.pump();
    }

    fn node(&mut self, number: u16) -> &mut Ipam {
        self.nodes.get_mut(&id(number)).unwrap()
    }

    /// Cuts these nodes off from all others, for long enough that all have noticed.
    fn cut_off<const N: usize>(&mut self, nodes: [NodeId; N]) {
        self.cut = nodes.into();
        self.pump();
        self.run(LONG);
    }

    /// Lets all nodes reach each other again, for long enough that everything settles.
    fn heal(&mut self) {
        self.cut.clear();
        self.pump();
        self.run(LONG);
    }

    /// Gives every node the current records and the reachable nodes, and delivers all messages.
    fn pump(&mut self) {
        loop {
            let told: Vec<_> = self
                .incarnations
                .iter()
                .map(|(id, incarnation)| {
                    let node = self.nodes.get(id);
                    let ranges = node.map(Ipam::ranges);
                    let claims = node.map(Ipam::claims).unwrap_or_default();
                    (*id, *incarnation, ranges, claims)
                })
                .collect();
            let reachable = |one: NodeId| {
                let others = self.nodes.keys().copied().filter(move |other| *other != one);
                others
                    .filter(|other| !self.cut.contains(other) && !self.cut.contains(&one))
                    .collect()
            };
            let reachable: BTreeMap<NodeId, BTreeSet<NodeId>> =
                self.nodes.keys().map(|id| (*id, reachable(*id))).collect();
            for (own, node) in &mut self.nodes {
                node.set_targets_met(true, self.now);
                for (id, incarnation, ranges, claims) in &told {
                    if id == own || !(reachable[own].contains(id) || self.left.contains(id)) {
                        continue;
                    }
                    let left = self.left.contains(id);
                    let ranges = ranges.clone().unwrap_or_default();
                    node.learn(
                        *id,
                        Peer { incarnation: *incarnation, left, ranges, claims: claims.clone() },
                        self.now,
                    );
                }
                node.set_reachable(reachable[own].clone(), self.now);
                while let Some(action) = node.poll_action() {
                    match action {
                        Action::Persist(changes) => {
                            let disk = self.disks.get_mut(own).unwrap();
                            for change in changes {
                                match change {
                                    Change::Put(fact) => disk.insert(fact.key(), fact),
                                    Change::Forget(key) => disk.remove(&key),
                                };
                            }
                        }
                        Action::Send { to, bytes } => {
                            assert!(bytes.len() <= MAX_MESSAGE);
                            self.messages += 1;
                            if reachable[own].contains(&to) {
                                self.queue.push_back((*own, to, bytes));
                            }
                        }
                        Action::Renewed(incarnation) => {
                            self.incarnations.insert(*own, incarnation);
                        }
                        Action::Granted { address, .. } => {
                            self.granted.get_mut(own).unwrap().push(address)
                        }
                        answer => self.answers.push((*own, answer)),
                    }
                }
            }
            let Some((from, to, bytes)) = self.queue.pop_front() else { return };
            if let Some(node) = self.nodes.get_mut(&to) {
                node.handle_message(from, &bytes, self.now).unwrap();
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) =
            self.nodes.values().filter_map(Ipam::poll_timeout).min().filter(|at| *at <= end)
        {
            self.now = self.now.max(next);
            for node in self.nodes.values_mut() {
                node.handle_timeout(self.now);
            }
            self.pump();
        }
        self.now = end;
    }

    fn allocate(&mut self, number: u16, count: usize) {
        for _ in 0..count {
            let now = self.now;
            self.node(number).allocate("container", now);
            self.pump();
        }
    }

    fn held(&mut self, number: u16) -> u128 {
        self.node(number).held().map(size).sum()
    }

    fn errors(&self) -> Vec<String> {
        self.answers
            .iter()
            .filter_map(|(_, answer)| match answer {
                Action::Failed { error, .. }
                | Action::CannotLeave(error)
                | Action::ReclaimFailed(error) => Some(error.to_string()),
                _ => None,
            })
            .collect()
    }

    fn problems(&self, number: u16) -> Vec<Problem> {
        self.answers
            .iter()
            .filter_map(|(node, answer)| match answer {
                Action::Report(problem) if *node == id(number) => Some(problem.clone()),
                _ => None,
            })
            .collect()
    }

    /// Removes a node and lets the others notice.
    fn remove(&mut self, number: u16) {
        self.nodes.remove(&id(number));
        self.disks.remove(&id(number));
        self.granted.remove(&id(number));
        self.pump();
    }

    /// Checks that no address was granted twice and that every quarter has at most one lender.
    fn check(&self) {
        let mut seen = BTreeSet::new();
        for address in self.granted.values().flatten() {
            assert!(seen.insert(*address), "{address} was allocated twice");
        }
        for quarter in quarters() {
            let lenders = self.nodes.values().filter(|node| node.lends(quarter).is_some()).count();
            assert!(lenders <= 1, "quarter {quarter} has {lenders} lenders");
        }
    }
}
