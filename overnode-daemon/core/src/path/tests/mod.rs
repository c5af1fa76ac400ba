//! Tests of nodes that probe each other in virtual time, over links that lose, delay and drop large
//! packets.

mod hostile;
mod liveness;
mod mtu;
mod route;
mod scale;
mod together;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::probe::{ENCAP_LEN, HEADER};
use super::*;

const A: NodeId = node(1);
const B: NodeId = node(2);

const fn node(id: u16) -> NodeId {
    match NodeId::new(id) {
        Ok(id) => id,
        Err(_) => panic!("a test uses an invalid ID"),
    }
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// One direction of a link.
#[derive(Clone, Copy)]
struct Link {
    loss: f64,
    delay: Duration,
    jitter: Duration,
    carries: u32,
}

const GOOD: Link = Link { loss: 0.0, delay: ms(10), jitter: ms(1), carries: u32::MAX };
const DEAD: Link = Link { loss: 1.0, ..GOOD };

#[derive(Clone)]
struct Packet {
    from: NodeId,
    to: NodeId,
    bytes: Vec<u8>,
}

struct World {
    start: Instant,
    now: Instant,
    rng: StdRng,
    nodes: BTreeMap<NodeId, Paths>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    wire: BTreeMap<(Instant, u64), Packet>,
    sent: u64,
    sent_bytes: u64,
    /// Changes: when, at which node, the path to which node, and its new state.
    changes: Vec<(Duration, NodeId, NodeId, PathState)>,
    /// The probes that A has sent.
    tap: Vec<(Duration, Vec<u8>)>,
}

impl World {
    /// Creates nodes that all have sessions with each other.
    fn new(seed: u64, nodes: u16, largest: u32) -> Self {
        let start = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let ids: Vec<_> = (1..=nodes).map(node).collect();
        let mut world = Self {
            start,
            now: start,
            nodes: ids
                .iter()
                .map(|id| (*id, Paths::new(StdRng::seed_from_u64(rng.random()))))
                .collect(),
            rng,
            links: BTreeMap::new(),
            wire: BTreeMap::new(),
            sent: 0,
            sent_bytes: 0,
            changes: Vec::new(),
            tap: Vec::new(),
        };
        for (id, paths) in &mut world.nodes {
            for other in ids.iter().filter(|other| *other != id) {
                paths.set_peer(*other, largest, start);
            }
        }
        world
    }

    fn pair(seed: u64) -> Self {
        Self::new(seed, 2, 1440)
    }

    fn set(&mut self, from: NodeId, to: NodeId, link: Link) {
        self.links.insert((from, to), link);
    }

    fn set_both(&mut self, link: Link) {
        self.set(A, B, link);
        self.set(B, A, link);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.collect();
            let arrival = self.wire.first_key_value().map(|((at, _), _)| *at);
            let timers = self.nodes.values().filter_map(Paths::poll_timeout);
            let Some(next) = timers.chain(arrival).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            while let Some(entry) = self.wire.first_entry()
                && entry.key().0 <= self.now
            {
                let Packet { from, to, bytes } = entry.remove();
                let size = bytes.len() as u32 + ENCAP_LEN;
                let Some(paths) = self.nodes.get_mut(&to) else { continue };
                paths.handle_probe(from, &bytes[..HEADER], size, self.now);
            }
            for paths in self.nodes.values_mut() {
                if paths.poll_timeout().is_some_and(|at| at <= self.now) {
                    paths.handle_timeout(self.now);
                    assert!(
                        paths.poll_timeout().is_none_or(|at| at > self.now),
                        "a timer did not advance"
                    );
                }
            }
        }
        self.now = end;
    }

    fn collect(&mut self) {
        for (from, paths) in &mut self.nodes {
            while let Some(action) = paths.poll_action() {
                match action {
                    Action::Changed { id } => {
                        if let Some(state) = paths.state(id) {
                            self.changes.push((self.now - self.start, *from, id, state));
                        }
                    }
                    Action::Send { to, bytes } => {
                        let size = bytes.len() as u32 + ENCAP_LEN;
                        if *from == A {
                            self.tap.push((self.now - self.start, bytes.clone()));
                        }
                        self.sent += 1;
                        self.sent_bytes += u64::from(size);
                        let link = self.links.get(&(*from, to)).copied().unwrap_or(GOOD);
                        if self.rng.random_bool(link.loss) || size > link.carries {
                            continue;
                        }
                        let at = self.now + link.delay + link.jitter.mul_f64(self.rng.random());
                        self.wire.insert((at, self.sent), Packet { from: *from, to, bytes });
                    }
                }
            }
        }
    }

    fn state(&self, at: NodeId, of: NodeId) -> PathState {
        self.nodes[&at].state(of).unwrap()
    }

    fn is_alive(&self) -> (bool, bool) {
        (self.state(A, B).alive, self.state(B, A).alive)
    }

    /// Runs until both ends see the path as wanted. Returns how long that took.
    fn until(&mut self, alive: bool, at_most: Duration) -> Duration {
        let start = self.now;
        while self.is_alive() != (alive, alive) {
            assert!(
                self.now - start < at_most,
                "not {alive} within {at_most:?}: {:?}",
                self.is_alive()
            );
            self.run(ms(10));
        }
        self.now - start
    }
}
