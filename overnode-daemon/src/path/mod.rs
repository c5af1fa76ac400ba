//! The direct paths to other nodes: whether packets pass, how fast, how large, and which way to
//! take where they do not. Deterministic; no I/O, no clock.
//!
//! Every node asks every other one that it has a WireGuard session with, inside the tunnel, and
//! believes only in answers to what it asked: so a path is alive when packets pass in both
//! directions, and nobody but the other node can say so. Small [`probe`]s tell liveness, round-trip
//! time and loss; padded ones search for the MTU ([`mtu`]). From these states and from what other
//! nodes tell of theirs, [`route::choose`] makes the table of next hops.
//!
//! What a hostile node can do is to spoil the path between itself and this node. It is answered at
//! a bounded rate, never with more bytes than it sent, and makes nothing grow.

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
    ANSWERS_IN_A_ROW, DEAD_AFTER, DEAD_REQUESTS, FAST_INTERVAL, FAST_START, FIRST_HOLD, HISTORY,
    INTERVAL, LATEST_ANSWER, LONGEST_HOLD, LOSSY, LOSSY_INTERVAL, ROW_WITHIN, SIZE_GRACE, STALL,
    STEADY, STRETCHED_INTERVAL,
};
use peer::{Outcome, Peer};
use probe::{LARGEST, Probe, SMALLEST};
pub use rtt::{LONGEST_WAIT, SHORTEST_WAIT};
pub use state::{Fault, PathState};

use crate::types::NodeId;

/// With more peers than these, those that carry no traffic are asked every [`STRETCHED_INTERVAL`]
/// only.
pub const MANY_PEERS: usize = 64;

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a probe inside the tunnel, by the direct path only.
    Send {
        /// To this node.
        to: NodeId,
        /// Payload of the inner packet, after [`probe::ENVELOPE`] bytes of headers.
        bytes: Vec<u8>,
    },
    /// [`PathState::alive`] or [`PathState::mtu`] of the path to this node is another than before.
    Changed {
        /// The node.
        id: NodeId,
    },
}

/// What was not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that are no probe.
    pub malformed: u64,
    /// Probes of nodes that are no peers.
    pub strangers: u64,
    /// Answers to nothing that this node waits for: late, duplicate, replayed or made up.
    pub stray: u64,
    /// Requests over the limit.
    pub limited: u64,
}

/// The paths of one node.
#[derive(Debug)]
pub struct Paths {
    rng: StdRng,
    peers: BTreeMap<NodeId, Peer>,
    due: BTreeSet<(Instant, NodeId)>,
    actions: VecDeque<Action>,
    counters: Counters,
    /// What each living path carries, for whoever sends through this node; 0 if none lives.
    carries: u16,
}

impl Paths {
    /// No paths. Who can guess what `rng` makes can answer requests without having received them.
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

    /// There is a session with that node. `largest` is the size of the largest inner packet that
    /// the local underlay interface carries directly, bytes. Known peers keep their state.
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

    /// There is no session with that node any more.
    pub fn remove_peer(&mut self, id: NodeId) {
        if let Some(peer) = self.peers.remove(&id) {
            self.due.remove(&(peer.poll_timeout(), id));
            self.measure();
        }
        self.actions.retain(|action| match action {
            Action::Send { to, .. } => *to != id,
            Action::Changed { .. } => true,
        });
    }

    /// Whether containers exchange packets with that node, by whichever route.
    pub fn set_busy(&mut self, id: NodeId, is_busy: bool, now: Instant) {
        self.with(id, |peer, _| peer.set_busy(is_busy, now));
    }

    /// Takes a probe that came through the tunnel from a node; `received` is the size of the whole
    /// inner packet, bytes. Of long ones the first [`probe::HEADER`] bytes of the payload are
    /// enough.
    pub fn handle_probe(&mut self, from: NodeId, bytes: &[u8], received: u32, now: Instant) {
        if !self.peers.contains_key(&from) {
            self.counters.strangers += 1;
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

    /// The kernel has refused to send a probe of so many bytes (the whole inner packet).
    pub fn handle_unsent(&mut self, to: NodeId, size: u32, now: Instant) {
        self.with(to, |peer, _| peer.handle_unsent(size, now));
    }

    /// Large packets to that node seem to vanish, or a router has said so: checks its MTU at once.
    pub fn handle_suspicion(&mut self, id: NodeId, now: Instant) {
        self.with(id, |peer, _| peer.search.suspect(now));
    }

    /// Does what is due.
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

    /// When to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The path to a node; none without a session.
    pub fn state(&self, id: NodeId) -> Option<PathState> {
        self.peers.get(&id).map(Peer::state)
    }

    /// All paths.
    pub fn states(&self) -> impl Iterator<Item = (NodeId, PathState)> {
        self.peers.iter().map(|(id, peer)| (*id, peer.state()))
    }

    /// What was not taken.
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
            self.measure();
        }
        Some(result)
    }

    fn measure(&mut self) {
        let living = self.peers.values().filter(|peer| peer.is_alive());
        let least = living.map(|peer| peer.search.mtu()).min();
        self.carries = least.map_or(0, |least| u16::try_from(least).unwrap_or(u16::MAX));
    }
}

const LAST: NodeId = match NodeId::new(NodeId::MAX) {
    Ok(id) => id,
    Err(_) => unreachable!(),
};
