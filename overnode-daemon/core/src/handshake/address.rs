//! Where handshake messages come from and go to.

use std::fmt;
use std::net::SocketAddr;

use overnode_types::NodeId;

/// Where a handshake message comes from, or where it is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// An address and port of the underlay.
    Direct(SocketAddr),
    /// A node whose messages are relayed. Their header names the node, but not its address.
    Relayed(NodeId),
}

impl PeerAddress {
    /// Returns the address and port. `None` for a node behind a relay.
    pub const fn direct(self) -> Option<SocketAddr> {
        match self {
            Self::Direct(address) => Some(address),
            Self::Relayed(_) => None,
        }
    }

    /// Returns the node behind a relay. `None` for an address.
    pub const fn relayed(self) -> Option<NodeId> {
        match self {
            Self::Direct(_) => None,
            Self::Relayed(node) => Some(node),
        }
    }
}

impl From<SocketAddr> for PeerAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Direct(address)
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(address) => address.fmt(f),
            Self::Relayed(node) => write!(f, "node {node} behind a relay"),
        }
    }
}
