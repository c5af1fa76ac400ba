//! Decides which nodes to dial and when, and which connection to keep. Deterministic: no I/O, no
//! clock.
//!
//! There are two kinds of destination. *Targets* are names that the operator gave. They are kept
//! and retried forever. *Learned* nodes have addresses that gossip supplied. A destination that
//! leads to a connected node is not dialed. Two nodes keep one connection between them, by a rule
//! that gives the same result on both sides without any exchange ([`Dialer::handle_established`]).

mod connection;
mod destination;
mod status;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;

use connection::Connection;
use destination::{Destination, State};
use status::Refused;
pub use status::{ConnectionStatus, Direction, Phase, TargetStatus};

use super::hello::{Hello, Refusal};
use overnode_types::NodeId;

/// The pause after the first failed attempt.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A node that learns of another with a lower ID gives that node this much time to dial first.
pub const LOWER_ID_HEAD_START: Duration = Duration::from_secs(2);
/// Factor from one pause to the next. Each pause is jittered by up to half in either direction,
/// within [`LONGEST_PAUSE`].
pub const PAUSE_GROWTH: f64 = 1.5;
/// Minimum lifetime of a connection whose loss triggers an immediate attempt.
pub const LONG_LIVED: Duration = Duration::from_secs(60);
/// Maximum number of connections that one node may keep open with this one at a time.
pub const MAX_PARALLEL: usize = 4;
/// Refused incoming connections are remembered for this long. A refused node retries several times
/// within it.
pub const REMEMBER_REFUSED: Duration = Duration::from_secs(120);
/// Maximum number of refused connections that are remembered, by address.
pub const MAX_REFUSED: usize = 64;

/// ID of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// ID of an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// Where to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialTarget {
    /// A target. Resolve the name now (port [`super::CONTROL_PORT`]), then try its addresses in
    /// turn.
    Name(String),
    /// Addresses of a node, from gossip. Try them in turn.
    Addresses(NodeId, Vec<SocketAddr>),
}

/// An action for the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect, run the handshake, and report the result with the attempt's ID.
    Dial {
        /// ID to report with the outcome.
        attempt: AttemptId,
        /// Where to dial.
        place: DialTarget,
    },
    /// Close a connection, because another one with the same node is kept. Report nothing.
    Close(ConnectionId),
}

/// The decision about a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection is used. If it is not the first with this node, messages sent over the others
    /// may be lost ([`crate::gossip::Gossip::resync`]), and an [`Action::Close`] may follow.
    Keep {
        /// Whether gossip should be told of a new neighbor.
        is_first: bool,
    },
    /// The connection is not needed. Close it.
    Close,
}

/// Dials on behalf of one node.
#[derive(Debug)]
pub struct Dialer {
    own: NodeId,
    discovery: bool,
    rng: StdRng,
    /// In the order in which they were added.
    targets: Vec<String>,
    destinations: BTreeMap<Key, Destination>,
    attempts: BTreeMap<AttemptId, Key>,
    connections: BTreeMap<ConnectionId, Connection>,
    refused: BTreeMap<IpAddr, Refused>,
    next_attempt: u64,
    next_connection: u64,
    actions: VecDeque<Action>,
}

/// Targets sort before learned nodes, so that names given by the operator are dialed first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Target(String),
    Learned(NodeId),
}

impl Dialer {
    /// Creates the dialer of node `own`. Without `discovery`, it dials only targets.
    pub fn new(own: NodeId, discovery: bool, rng: StdRng) -> Self {
        Self {
            own,
            discovery,
            rng,
            targets: Vec::new(),
            destinations: BTreeMap::new(),
            attempts: BTreeMap::new(),
            connections: BTreeMap::new(),
            refused: BTreeMap::new(),
            next_attempt: 1,
            next_connection: 1,
            actions: VecDeque::new(),
        }
    }

    /// Adds a target and dials it at once, even if it was already a target.
    pub fn add_target(&mut self, name: &str, now: Instant) {
        if !self.targets.iter().any(|target| target == name) {
            self.targets.push(name.to_owned());
        }
        let target = self
            .destinations
            .entry(Key::Target(name.to_owned()))
            .or_insert_with(|| Destination::new(Vec::new(), Duration::ZERO, now));
        target.try_at_once(now);
        self.start_due(now);
    }

    /// Replaces the targets with `names` and dials all of them at once. Connections stay open. The
    /// result of an attempt in progress is ignored if its name is no longer a target.
    pub fn replace_targets(&mut self, names: &[String], now: Instant) {
        self.targets.retain(|name| names.contains(name));
        self.destinations.retain(|key, _| match key {
            Key::Target(name) => names.contains(name),
            Key::Learned(_) => true,
        });
        for name in names {
            self.add_target(name, now);
        }
    }

    /// Records the addresses that gossip knows for a node.
    pub fn learn(&mut self, id: NodeId, addresses: Vec<SocketAddr>, now: Instant) {
        if !self.discovery || id == self.own || addresses.is_empty() {
            return;
        }
        match self.destinations.get_mut(&Key::Learned(id)) {
            Some(known) if known.addresses == addresses => return,
            Some(known) => {
                known.addresses = addresses;
                known.try_at_once(now);
            }
            None => {
                // The connection that the lower ID opens is kept, so the higher ID waits for it.
                let head_start = if id < self.own { LOWER_ID_HEAD_START } else { Duration::ZERO };
                self.destinations
                    .insert(Key::Learned(id), Destination::new(addresses, head_start, now));
            }
        }
        self.start_due(now);
    }

    /// Forgets a node that has left the cluster or no longer announces addresses.
    pub fn unlearn(&mut self, id: NodeId) {
        self.destinations.remove(&Key::Learned(id));
    }

    /// Records the addresses that a target's name resolved to, for status.
    pub fn handle_resolved(&mut self, attempt: AttemptId, addresses: &[SocketAddr]) {
        if let Some(destination) = self.of_attempt(attempt) {
            destination.addresses = addresses.to_vec();
        }
    }

    /// Handles a connection whose handshake has succeeded. `attempt` is `None` if the other side
    /// dialed.
    ///
    /// If there already is a connection with the same node, the one with the later incarnation of
    /// the node wins, then the one that the lower ID opened. Among connections opened by the same
    /// side, that side keeps the oldest. The other side keeps all of them and waits for the first
    /// side to close the rest. So both sides keep the same connection without any exchange.
    pub fn handle_established(
        &mut self,
        attempt: Option<AttemptId>,
        peer: &Hello,
        address: SocketAddr,
        now: Instant,
    ) -> (ConnectionId, Verdict) {
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let direction = if attempt.is_some() { Direction::Out } else { Direction::In };
        let key = attempt.and_then(|attempt| self.attempts.remove(&attempt));
        match key {
            Some(Key::Learned(wanted)) if wanted != peer.id => {
                let why = format!(
                    "the address that node {wanted} announces leads to node {} ({})",
                    peer.id, peer.nickname
                );
                if let Some(destination) = self.destinations.get_mut(&Key::Learned(wanted)) {
                    destination.handle_failed(why, false, now, &mut self.rng);
                }
            }
            Some(key) => {
                if let Some(destination) = self.destinations.get_mut(&key) {
                    destination.handle_established(peer.id, now);
                }
            }
            None => {}
        }
        self.refused.remove(&address.ip());
        let new = Connection {
            peer: peer.id,
            nickname: peer.nickname.clone(),
            public_key: peer.public_key,
            incarnation: peer.incarnation,
            direction,
            address,
            since: now,
        };
        let rivals: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, old)| old.peer == peer.id)
            .map(|(id, _)| *id)
            .collect();
        let is_kept =
            rivals.iter().all(|rival| new.may_stay_open(&self.connections[rival], self.own));
        if !is_kept {
            let other = rivals.iter().map(|rival| &self.connections[rival]);
            if let Some(holder) = other.into_iter().find(|old| old.public_key != new.public_key) {
                let (holder, newcomer) = (holder.nickname.clone(), new.nickname);
                let clash = Refusal::IdClash { id: peer.id, holder, newcomer };
                self.handle_refused(address, &clash, now);
            }
            return (id, Verdict::Close);
        }
        for rival in &rivals {
            if !self.connections[rival].may_stay_open(&new, self.own) {
                self.connections.remove(rival);
                self.actions.push_back(Action::Close(*rival));
            }
        }
        let opened_by_peer: Vec<_> =
            rivals.iter().filter(|rival| self.connections.contains_key(rival)).collect();
        if let [oldest, ..] = opened_by_peer[..]
            && opened_by_peer.len() >= MAX_PARALLEL
        {
            self.connections.remove(oldest);
            self.actions.push_back(Action::Close(*oldest));
        }
        self.connections.insert(id, new);
        (id, Verdict::Keep { is_first: rivals.is_empty() })
    }

    /// Handles a failed attempt.
    pub fn handle_failed(&mut self, attempt: AttemptId, why: &Refusal, now: Instant) {
        self.handle_failed_with(attempt, why.to_string(), why.is_myself(), now);
    }

    /// Handles a name that did not resolve.
    pub fn handle_unresolved(&mut self, attempt: AttemptId, why: &str, now: Instant) {
        self.handle_failed_with(attempt, why.to_owned(), false, now);
    }

    /// Records an incoming connection that either side refused, for status.
    pub fn handle_refused(&mut self, address: SocketAddr, why: &Refusal, now: Instant) {
        if why.is_myself() {
            return;
        }
        self.expire_refused(now);
        if self.refused.len() >= MAX_REFUSED && !self.refused.contains_key(&address.ip()) {
            let oldest = self
                .refused
                .iter()
                .min_by_key(|(ip, refused)| (refused.at, **ip))
                .map(|(ip, _)| *ip);
            oldest.and_then(|oldest| self.refused.remove(&oldest));
        }
        self.refused.insert(address.ip(), Refused { address, why: why.to_string(), at: now });
    }

    /// Handles the end of a connection. Returns its node, and whether it was the last connection
    /// with that node. If it was not the last, messages sent over it may be lost
    /// ([`crate::gossip::Gossip::resync`]).
    pub fn handle_lost(
        &mut self,
        connection: ConnectionId,
        why: &str,
        now: Instant,
    ) -> Option<(NodeId, bool)> {
        let lost = self.connections.remove(&connection)?;
        let is_last = !self.is_connected(lost.peer);
        if is_last {
            let was_long = now.duration_since(lost.since) >= LONG_LIVED;
            for (key, destination) in &mut self.destinations {
                let leads_there =
                    *key == Key::Learned(lost.peer) || destination.leads_to == Some(lost.peer);
                if leads_there {
                    destination.handle_lost(why, was_long, now, &mut self.rng);
                }
            }
            self.start_due(now);
        }
        Some((lost.peer, is_last))
    }

    /// Returns the connection to use for messages to a node: the newest.
    pub fn connection(&self, peer: NodeId) -> Option<ConnectionId> {
        self.connections
            .iter()
            .rev()
            .find(|(_, connection)| connection.peer == peer)
            .map(|(id, _)| *id)
    }

    /// Performs actions that are due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire_refused(now);
        self.start_due(now);
    }

    /// Returns when to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let dials =
            self.destinations.iter().filter(|(key, to)| !self.is_unneeded(key, to)).filter_map(
                |(_, destination)| match destination.state {
                    State::Waiting { until } => Some(until),
                    State::Dialing(_) | State::Myself => None,
                },
            );
        let expiries = self.refused.values().map(|refused| refused.at + REMEMBER_REFUSED);
        dials.chain(expiries).min()
    }

    /// Returns the next action.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn handle_failed_with(
        &mut self,
        attempt: AttemptId,
        why: String,
        is_myself: bool,
        now: Instant,
    ) {
        let Some(key) = self.attempts.remove(&attempt) else { return };
        if let Some(destination) = self.destinations.get_mut(&key)
            && destination.state == State::Dialing(attempt)
        {
            destination.handle_failed(why, is_myself, now, &mut self.rng);
        }
    }

    fn start_due(&mut self, now: Instant) {
        let due: Vec<_> = self
            .destinations
            .iter()
            .filter(|(key, to)| to.is_due(now) && !self.is_unneeded(key, to))
            .map(|(key, _)| key.clone())
            .collect();
        for key in due {
            let attempt = AttemptId(self.next_attempt);
            self.next_attempt += 1;
            let Some(destination) = self.destinations.get_mut(&key) else { continue };
            destination.state = State::Dialing(attempt);
            let target = match &key {
                Key::Target(name) => DialTarget::Name(name.clone()),
                Key::Learned(id) => DialTarget::Addresses(*id, destination.addresses.clone()),
            };
            self.attempts.insert(attempt, key);
            self.actions.push_back(Action::Dial { attempt, place: target });
        }
    }

    fn is_unneeded(&self, key: &Key, destination: &Destination) -> bool {
        let leads_to = match key {
            Key::Target(_) => destination.leads_to,
            Key::Learned(id) => Some(*id),
        };
        leads_to.is_some_and(|peer| self.is_connected(peer))
    }

    fn is_connected(&self, peer: NodeId) -> bool {
        self.connections.values().any(|connection| connection.peer == peer)
    }

    fn of_attempt(&mut self, attempt: AttemptId) -> Option<&mut Destination> {
        self.destinations.get_mut(self.attempts.get(&attempt)?)
    }

    fn expire_refused(&mut self, now: Instant) {
        self.refused.retain(|_, refused| now < refused.at + REMEMBER_REFUSED);
    }
}
