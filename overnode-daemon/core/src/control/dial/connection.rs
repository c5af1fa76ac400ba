//! An established connection, and the rule for which of two to keep.

use std::net::SocketAddr;
use std::time::Instant;

use super::Direction;
use overnode_types::{NodeId, PublicKey};

#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub peer: NodeId,
    pub nickname: String,
    pub public_key: PublicKey,
    pub incarnation: u64,
    pub direction: Direction,
    pub address: SocketAddr,
    pub since: Instant,
}

impl Connection {
    /// Whether this connection may stay open, given another one with the same node. The dialer asks
    /// this of a new connection against each old one, then of each old one against the new one.
    /// Where age decides, only the side that opened both connections applies the rule, and it keeps
    /// the older.
    pub(crate) fn may_stay_open(&self, other: &Self, own: NodeId) -> bool {
        if self.public_key != other.public_key {
            // Two hosts have the same ID: the first one stays.
            return self.since < other.since;
        }
        if self.incarnation != other.incarnation {
            return self.incarnation > other.incarnation;
        }
        match (self.direction, other.direction) {
            (Direction::Out, Direction::In) => own < self.peer,
            (Direction::In, Direction::Out) => self.peer < own,
            (Direction::In, Direction::In) => true,
            (Direction::Out, Direction::Out) => self.since < other.since,
        }
    }
}
