//! What people are told about targets and connections.

use std::net::SocketAddr;
use std::time::Instant;

use super::{Destination, Dialer, Key, State};
use crate::types::NodeId;

/// Which side opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// This node dialled.
    Out,
    /// The other node dialled.
    In,
}

/// How far a destination or connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A try is under way.
    Connecting,
    /// There is a connection with the node that it leads to, whichever side opened it.
    Established,
    /// The last try has failed; the next is due then.
    Retrying {
        /// When it is due.
        next: Instant,
    },
    /// It leads to this node itself: no try is needed.
    Myself,
    /// An incoming connection was refused.
    Refused,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetStatus {
    /// As given by people.
    pub name: String,
    /// How the name resolved last.
    pub addresses: Vec<SocketAddr>,
    /// How far it is.
    pub phase: Phase,
    /// The node that it leads to, if known.
    pub peer: Option<NodeId>,
    /// The last error, with its time.
    pub last_error: Option<(String, Instant)>,
}

/// A connection, one that is being tried, or one that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// Who dials or dialled.
    pub direction: Direction,
    /// The other end: an address, or the target's name before it has resolved.
    pub address: String,
    /// How far it is.
    pub phase: Phase,
    /// The node at the other end, if known.
    pub peer: Option<NodeId>,
    /// Its nickname, if known.
    pub nickname: Option<String>,
    /// Since when it is established.
    pub since: Option<Instant>,
    /// The last error, with its time; of an established connection, why there was none before.
    pub last_error: Option<(String, Instant)>,
}

#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub address: SocketAddr,
    pub why: String,
    pub at: Instant,
}

impl Dialer {
    /// The targets, in the order in which they were added.
    pub fn target_status(&self) -> Vec<TargetStatus> {
        let status = |name: &String| {
            let key = Key::Target(name.clone());
            let destination = self.destinations.get(&key)?;
            Some(TargetStatus {
                name: name.clone(),
                addresses: destination.addresses.clone(),
                phase: self.phase(&key),
                peer: destination.leads_to,
                last_error: destination.last_error.clone(),
            })
        };
        self.targets.iter().filter_map(status).collect()
    }

    /// The established connections by node; then the destinations without one; then what was
    /// refused lately.
    pub fn connection_status(&self) -> Vec<ConnectionStatus> {
        let mut established: Vec<_> = self.connections.values().collect();
        established
            .sort_by_key(|connection| (connection.peer, connection.direction, connection.address));
        let established = established.into_iter().map(|connection| ConnectionStatus {
            direction: connection.direction,
            address: connection.address.to_string(),
            phase: Phase::Established,
            peer: Some(connection.peer),
            nickname: Some(connection.nickname.clone()),
            since: Some(connection.since),
            last_error: self.last_error_of(connection.peer),
        });
        let open =
            self.destinations.iter().filter(|(key, _)| self.phase(key) != Phase::Established);
        let open = open.map(|(key, destination)| ConnectionStatus {
            direction: Direction::Out,
            address: match (key, destination.addresses.first()) {
                (Key::Target(name), None) => name.clone(),
                (Key::Learned(id), None) => format!("node {id}"),
                (Key::Target(_) | Key::Learned(_), Some(address)) => address.to_string(),
            },
            phase: self.phase(key),
            peer: match key {
                Key::Target(_) => destination.leads_to,
                Key::Learned(id) => Some(*id),
            },
            nickname: None,
            since: None,
            last_error: destination.last_error.clone(),
        });
        let refused = self.refused.values().map(|refused| ConnectionStatus {
            direction: Direction::In,
            address: refused.address.to_string(),
            phase: Phase::Refused,
            peer: None,
            nickname: None,
            since: None,
            last_error: Some((refused.why.clone(), refused.at)),
        });
        established.chain(open).chain(refused).collect()
    }

    /// Why there was no connection with a node before, or why one ended.
    fn last_error_of(&self, peer: NodeId) -> Option<(String, Instant)> {
        let leads_there = |key: &Key, to: &Destination| match key {
            Key::Target(_) => to.leads_to == Some(peer),
            Key::Learned(id) => *id == peer,
        };
        let errors = self.destinations.iter().filter(|(key, to)| leads_there(key, to));
        errors.filter_map(|(_, to)| to.last_error.clone()).max_by_key(|(_, at)| *at)
    }

    fn phase(&self, key: &Key) -> Phase {
        let Some(destination) = self.destinations.get(key) else { return Phase::Connecting };
        if self.is_needless(key, destination) {
            return Phase::Established;
        }
        match destination.state {
            State::Dialling(_) => Phase::Connecting,
            State::Waiting { until } => Phase::Retrying { next: until },
            State::Myself => Phase::Myself,
        }
    }
}
