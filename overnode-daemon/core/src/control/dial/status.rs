//! Reports targets and connections for `status`.

use std::net::SocketAddr;
use std::time::Instant;

use super::{Destination, Dialer, Key, State};
use overnode_types::NodeId;

/// Which side opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// This node dialed.
    Out,
    /// The other node dialed.
    In,
}

/// The state of a destination or connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// An attempt is in progress.
    Connecting,
    /// There is a connection with the node that the destination leads to, whichever side opened it.
    Established,
    /// The last attempt failed. The next one is scheduled.
    Retrying {
        /// When the next attempt is due.
        next: Instant,
    },
    /// The destination leads to this node itself and needs no attempt.
    Myself,
    /// An incoming connection was refused.
    Refused,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetStatus {
    /// Name, as the operator gave it.
    pub name: String,
    /// Addresses that the name last resolved to.
    pub addresses: Vec<SocketAddr>,
    /// State of the target.
    pub phase: Phase,
    /// Node that the target leads to, if known.
    pub peer: Option<NodeId>,
    /// Last error and its time.
    pub last_error: Option<(String, Instant)>,
}

/// An established, attempted or refused connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// The side that dialed.
    pub direction: Direction,
    /// Address of the other end, or the target's name before it has resolved.
    pub address: String,
    /// State of the connection.
    pub phase: Phase,
    /// Node at the other end, if known.
    pub peer: Option<NodeId>,
    /// Nickname of the node, if known.
    pub nickname: Option<String>,
    /// When the connection was established.
    pub since: Option<Instant>,
    /// Last error and its time. For an established connection, the error of an earlier attempt or
    /// connection.
    pub last_error: Option<(String, Instant)>,
}

#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub address: SocketAddr,
    pub why: String,
    pub at: Instant,
}

impl Dialer {
    /// Returns the targets, in the order in which they were added.
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

    /// Returns the established connections by node, then the destinations without a connection,
    /// then the recently refused connections.
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

    /// Returns why there was no connection with a node earlier, or why one ended.
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
        if self.is_unneeded(key, destination) {
            return Phase::Established;
        }
        match destination.state {
            State::Dialing(_) => Phase::Connecting,
            State::Waiting { until } => Phase::Retrying { next: until },
            State::Myself => Phase::Myself,
        }
    }
}
