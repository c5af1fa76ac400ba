//! Direct paths to other nodes: liveness, latency and MTU, and the routes to nodes without a direct
//! path. Deterministic, without I/O or a clock.
//!
//! Every node probes every other node that it has a WireGuard session with, inside the tunnel. It
//! counts only answers to its own probes. So a path is alive if packets pass in both directions,
//! and only the other node can prove it. Small [`probe`]s measure liveness, round-trip time and
//! loss, and padded ones search for the MTU ([`mtu`]). From these states and from what other nodes
//! report, [`route::choose`] computes the table of next hops.
//!
//! A hostile node can spoil only the path between itself and this node. It is answered at a bounded
//! rate and with no more bytes than it sent, and it cannot make any state grow.

pub mod mtu;
pub mod probe;
pub mod route;

mod answer;
mod peer;
mod rtt;
mod state;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use rand::rngs::StdRng;

pub use answer::{ANSWER_BURST, ANSWER_INTERVAL, SEEN_WINDOW};
pub use peer::{
    ANSWERS_IN_A_ROW, DEAD_AFTER, DEAD_REQUESTS, FAST_INTERVAL, FAST_START, FLAP_WINDOW, HISTORY,
    INTERVAL, LATEST_ANSWER, LOSSY, LOSSY_INTERVAL, MAX_HOLD_DOWN, MIN_HOLD_DOWN, ROW_WITHIN,
    SIZE_GRACE, STRETCHED_INTERVAL, TIMER_STALL,
};
use peer::{Outcome, Peer};
use probe::{LARGEST, Probe, SMALLEST};
pub use rtt::{LONGEST_WAIT, SHORTEST_WAIT};
pub use state::{Fault, PathState};

use overnode_types::NodeId;

/// With more peers than this, those without traffic are probed only every [`STRETCHED_INTERVAL`].
pub const MANY_PEERS: usize = 64;

/// An effect that the caller carries out, or an event that it must know about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a probe inside the tunnel, on the direct path only.
    Send {
        /// The receiver.
        to: NodeId,
        /// Payload of the inner packet, after [`probe::ENCAP_LEN`] bytes of headers.
        bytes: Vec<u8>,
    },
    /// [`PathState::alive`] or [`PathState::mtu`] of the path to this node has changed.
    Changed {
        /// The node.
        id: NodeId,
    },
}

/// Counters of rejected input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that are not a valid probe.
    pub malformed: u64,
    /// Probes of nodes that are not peers.
    pub unknown_peers: u64,
    /// Answers that this node is not waiting for: late, duplicate, replayed or forged.
    pub stray: u64,
    /// Requests beyond the rate limit.
    pub limited: u64,
}

/// The direct paths of one node.
#[derive(Debug)]
pub struct Paths {
    rng: StdRng,
    peers: BTreeMap<NodeId, Peer>,
    due: BTreeSet<(Instant, NodeId)>,
    actions: VecDeque<Action>,
    counters: Counters,
    /// Largest inner packet in bytes that all live paths carry, for nodes that relay through this
    /// one. 0 if no path is alive.
    carries: u16,
}

impl Paths {
    /// Creates a state without paths. A node that can guess the output of `rng` can answer requests
    /// that it has not received.
    pub fn new(rng: StdRng) -> Self {
        Self {
            rng,
            peers: BTreeMap::new(),
            due: BTreeSet::new(),
            actions: VecDeque::new(),
            counters: Counters::default(),
            carries: 0,
        }
    }

    /// Adds a peer that this node has a session with. `largest` is the size in bytes of the largest
    /// inner packet that the local underlay interface carries without fragmentation. Known peers
    /// keep their state.
    pub fn set_peer(&mut self, id: NodeId, largest: u32, now: Instant) {
        let largest = largest.clamp(SMALLEST, LARGEST);
        self.peers.entry(id).or_insert_with(|| {
            self.due.insert((now, id));
            Peer::new(largest, now)
        });
        self.with(id, |peer, _| {
            if peer.search.largest() != largest {
                peer.search.set_largest(largest, now);
            }
        });
    }

    /// Removes a peer, because there is no session with it any more.
    pub fn remove_peer(&mut self, id: NodeId) {
        if let Some(peer) = self.peers.remove(&id) {
            self.due.remove(&(peer.poll_timeout(), id));
            self.update_carries();
        }
        self.actions.retain(|action| match action {
            Action::Send { to, .. } => *to != id,
            Action::Changed { .. } => true,
        });
    }

    /// Sets whether containers exchange packets with that node, on any route.
    pub fn set_busy(&mut self, id: NodeId, is_busy: bool, now: Instant) {
        self.with(id, |peer, _| peer.set_busy(is_busy, now));
    }

    /// Handles a probe that came from a node through the tunnel. `received` is the size of the
    /// whole inner packet in bytes. For long probes, the first [`probe::HEADER`] bytes of the
    /// payload are enough.
    pub fn handle_probe(&mut self, from: NodeId, bytes: &[u8], received: u32, now: Instant) {
        if !self.peers.contains_key(&from) {
            self.counters.unknown_peers += 1;
            return;
        }
        let Ok(probe) = Probe::decode(bytes, received) else {
            self.counters.malformed += 1;
            return;
        };
        let Some(outcome) = self.with(from, |peer, _| peer.handle_probe(probe, now)) else {
            return;
        };
        match outcome {
            Outcome::Answer(answer) => {
                let answer = Probe { carries: self.carries, ..answer };
                self.actions.push_back(Action::Send { to: from, bytes: answer.encode() });
            }
            Outcome::Limited => self.counters.limited += 1,
            Outcome::Heard => {}
            Outcome::Stray => self.counters.stray += 1,
        }
    }

    /// Handles a probe that the kernel has refused to send. `size` is that of the whole inner
    /// packet in bytes.
    pub fn handle_unsent(&mut self, to: NodeId, size: u32, now: Instant) {
        self.with(to, |peer, _| peer.handle_unsent(size, now));
    }

    /// Checks the MTU at once, because large packets to that node seem to vanish or a router has
    /// reported it.
    pub fn handle_suspicion(&mut self, id: NodeId, now: Instant) {
        self.with(id, |peer, _| peer.search.suspect(now));
    }

    /// Handles everything that is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let is_crowded = self.peers.len() > MANY_PEERS;
        let mut probes = Vec::new();
        let due: Vec<_> = self.due.range(..=(now, LAST)).map(|(_, id)| *id).collect();
        for id in due {
            self.with(id, |peer, rng| peer.handle_timeout(now, is_crowded, rng, &mut probes));
            let carries = self.carries;
            let probes = probes.drain(..).map(|probe| Probe { carries, ..probe });
            self.actions.extend(probes.map(|probe| Action::Send { to: id, bytes: probe.encode() }));
        }
    }

    /// Returns when to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Returns the next action.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the state of the path to a node. `None` without a session.
    pub fn state(&self, id: NodeId) -> Option<PathState> {
        self.peers.get(&id).map(Peer::state)
    }

    /// Returns the states of all paths.
    pub fn states(&self) -> impl Iterator<Item = (NodeId, PathState)> {
        self.peers.iter().map(|(id, peer)| (*id, peer.state()))
    }

    /// Returns the counters of rejected input.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn with<T>(&mut self, id: NodeId, act: impl FnOnce(&mut Peer, &mut StdRng) -> T) -> Option<T> {
        let peer = self.peers.get_mut(&id)?;
        let before = (peer.poll_timeout(), peer.is_alive(), peer.search.mtu());
        let result = act(peer, &mut self.rng);
        let after = (peer.poll_timeout(), peer.is_alive(), peer.search.mtu());
        if before.0 != after.0 {
            self.due.remove(&(before.0, id));
            self.due.insert((after.0, id));
        }
        if (before.1, before.2) != (after.1, after.2) {
            self.actions.push_back(Action::Changed { id });
            self.update_carries();
        }
        Some(result)
    }

    fn update_carries(&mut self) {
        let live = self.peers.values().filter(|peer| peer.is_alive());
        let least = live.map(|peer| peer.search.mtu()).min();
        self.carries = least.map_or(0, |least| u16::try_from(least).unwrap_or(u16::MAX));
    }
}

const LAST: NodeId = match NodeId::new(NodeId::MAX) {
    Ok(id) => id,
    Err(_) => unreachable!(),
};
