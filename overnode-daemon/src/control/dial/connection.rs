//! An established connection, and which of two stays.

use std::net::SocketAddr;
use std::time::Instant;

use super::Direction;
use crate::types::{NodeId, PublicKey};

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
    /// Whether this connection may stay, given another one with the same node. `self` is the newer
    /// exactly if it was not asked about before; where age decides, only the side that opened both
    /// decides, and keeps the older.
    pub fn stays_beside(&self, other: &Self, own: NodeId) -> bool {
        if self.public_key != other.public_key {
            // Two hosts with one ID: whoever was there first.
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
