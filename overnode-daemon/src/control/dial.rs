//! Whom to call, when, and which connection stays. Deterministic; no I/O, no clock.
//!
//! Two kinds of destination: *targets*, names that people gave, kept and tried for ever; and
//! *learned* nodes, whose addresses gossip told. A destination that leads to a node with which
//! there is a connection is left alone. Between two nodes one connection stays, by a rule that
//! gives the same answer on both sides without asking ([`Dialer::handle_established`]).

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
use crate::types::NodeId;

/// The first pause after a failed try.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A node that learns of one with a lower ID gives it so much time to dial first.
pub const HEAD_START: Duration = Duration::from_secs(2);
/// Each pause is so many times the one before. Jittered by half each way, within [`LONGEST_PAUSE`].
pub const PAUSE_GROWTH: f64 = 1.5;
/// The loss of a connection that lived so long is followed by a try at once.
pub const LONG_LIVED: Duration = Duration::from_secs(60);
/// Most connections that one node may keep open with this one at a time.
pub const MAX_PARALLEL: usize = 4;
/// Refused incoming connections are remembered so long: a node that is refused tries again several
/// times in it.
pub const REMEMBER_REFUSED: Duration = Duration::from_secs(120);
/// And no more of them than these, by address.
pub const MAX_REFUSED: usize = 64;

/// Numbers a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

/// Numbers an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// Where to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A target: resolve the name now (port [`super::CONTROL_PORT`]), then try its addresses in
    /// turn.
    Name(String),
    /// The addresses that gossip told of a node: try them in turn.
    Addresses(NodeId, Vec<SocketAddr>),
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect, do the handshake, and report with the attempt's number.
    Dial {
        /// To be reported with the outcome.
        attempt: AttemptId,
        /// Where to.
        place: Place,
    },
    /// Close a connection: another one with the same node stays. Report nothing.
    Close(ConnectionId),
}

/// What became of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is used. If it is not the first with this node (an [`Action::Close`] may follow), what
    /// was sent over the others may be lost: [`crate::gossip::Gossip::resync`].
    Keep {
        /// Whether gossip should hear of a new neighbour.
        is_first: bool,
    },
    /// It is not needed: close it.
    Close,
}

/// The dialler of one node.
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

/// Targets come before learned nodes, so that people's word goes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Target(String),
    Learned(NodeId),
}

impl Dialer {
    /// The dialler of node `own`. Without `discovery` only targets are dialled.
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

    /// Adds a target and tries it at once, also if it was one already.
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

    /// Makes `names` the targets, instead of those there were, and tries all of them at once.
    /// Connections stay; a try that is under way with what is a target no more is not counted.
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

    /// Gossip knows these addresses of a node.
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
                // The connection that the lower ID opens stays, so the higher one waits for it.
                let patience = if id < self.own { HEAD_START } else { Duration::ZERO };
                self.destinations
                    .insert(Key::Learned(id), Destination::new(addresses, patience, now));
            }
        }
        self.start_due(now);
    }

    /// A node has left the cluster, or tells no addresses any more.
    pub fn unlearn(&mut self, id: NodeId) {
        self.destinations.remove(&Key::Learned(id));
    }

    /// The shell has resolved a target's name; for status.
    pub fn handle_resolved(&mut self, attempt: AttemptId, addresses: &[SocketAddr]) {
        if let Some(destination) = self.of_attempt(attempt) {
            destination.addresses = addresses.to_vec();
        }
    }

    /// A connection was made and its handshake has succeeded; `attempt` is none if the other side
    /// dialled.
    ///
    /// If there is one with the same node already: a later incarnation of the node wins; then the
    /// connection that the lower ID opened. Among those that one side opened, that side keeps the
    /// older; the other side keeps all and waits for it to close what it does not want. Both sides
    /// so come to the same end without asking.
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
                    "the address that node {wanted} tells leads to node {} ({})",
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
            rivals.iter().all(|rival| new.stays_beside(&self.connections[rival], self.own));
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
            if !self.connections[rival].stays_beside(&new, self.own) {
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

    /// A try has failed.
    pub fn handle_failed(&mut self, attempt: AttemptId, why: &Refusal, now: Instant) {
        self.handle_failed_with(attempt, why.to_string(), why.is_myself(), now);
    }

    /// A name did not resolve.
    pub fn handle_unresolved(&mut self, attempt: AttemptId, why: &str, now: Instant) {
        self.handle_failed_with(attempt, why.to_owned(), false, now);
    }

    /// An incoming connection was refused, by either side; for status.
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

    /// A connection has ended. Returns its node, and true if it was the last one with it; else what
    /// was sent over it may be lost ([`crate::gossip::Gossip::resync`]).
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

    /// The connection to send to a node by: the newest.
    pub fn connection(&self, peer: NodeId) -> Option<ConnectionId> {
        self.connections
            .iter()
            .rev()
            .find(|(_, connection)| connection.peer == peer)
            .map(|(id, _)| *id)
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire_refused(now);
        self.start_due(now);
    }

    /// When to call [`Self::handle_timeout`] next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let dials =
            self.destinations.iter().filter(|(key, to)| !self.is_needless(key, to)).filter_map(
                |(_, destination)| match destination.state {
                    State::Waiting { until } => Some(until),
                    State::Dialling(_) | State::Myself => None,
                },
            );
        let expiries = self.refused.values().map(|refused| refused.at + REMEMBER_REFUSED);
        dials.chain(expiries).min()
    }

    /// The next thing to do.
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
            && destination.state == State::Dialling(attempt)
        {
            destination.handle_failed(why, is_myself, now, &mut self.rng);
        }
    }

    fn start_due(&mut self, now: Instant) {
        let due: Vec<_> = self
            .destinations
            .iter()
            .filter(|(key, to)| to.is_due(now) && !self.is_needless(key, to))
            .map(|(key, _)| key.clone())
            .collect();
        for key in due {
            let attempt = AttemptId(self.next_attempt);
            self.next_attempt += 1;
            let Some(destination) = self.destinations.get_mut(&key) else { continue };
            destination.state = State::Dialling(attempt);
            let place = match &key {
                Key::Target(name) => Place::Name(name.clone()),
                Key::Learned(id) => Place::Addresses(*id, destination.addresses.clone()),
            };
            self.attempts.insert(attempt, key);
            self.actions.push_back(Action::Dial { attempt, place });
        }
    }

    fn is_needless(&self, key: &Key, destination: &Destination) -> bool {
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
