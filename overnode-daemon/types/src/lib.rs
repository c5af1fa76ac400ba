//! Basic types that all parts of overnode share. No I/O.

mod boot;
mod index;
mod mac;
pub mod name;
pub mod text;

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use data_encoding::BASE64;
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

pub use boot::BootTime;
pub use index::{InterfaceIndex, SessionIndex};
pub use mac::{BadMacAddr, MacAddr};

/// A node's ID, 1 to 4095. It is also the node's peer index in the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct NodeId(u16);

impl NodeId {
    /// The highest ID.
    pub const MAX: u16 = 4095;

    /// The lowest ID.
    pub const FIRST: Self = Self(1);

    /// Creates an ID after checking its range.
    ///
    /// # Errors
    /// Returns [`BadNodeId`] for 0 and for numbers above [`Self::MAX`].
    pub const fn new(id: u16) -> Result<Self, BadNodeId> {
        if id == 0 || id > Self::MAX { Err(BadNodeId) } else { Ok(Self(id)) }
    }

    /// Returns the number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Returns true for IDs 1 to 4, each of which initially owns a quarter of the address range.
    pub const fn has_initial_quarter(self) -> bool {
        self.0 <= 4
    }

    /// Returns the node's index in the data plane's `PEERS` map.
    pub const fn peer_index(self) -> PeerIndex {
        PeerIndex(self.0 as u32)
    }
}

/// The number is not between 1 and 4095.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an ID is a whole number from 1 to 4095")]
pub struct BadNodeId;

impl TryFrom<u16> for NodeId {
    type Error = BadNodeId;

    fn try_from(id: u16) -> Result<Self, BadNodeId> {
        Self::new(id)
    }
}

impl From<NodeId> for u16 {
    fn from(id: NodeId) -> Self {
        id.0
    }
}

impl FromStr for NodeId {
    type Err = BadNodeId;

    fn from_str(text: &str) -> Result<Self, BadNodeId> {
        Self::new(text.parse().map_err(|_| BadNodeId)?)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An index into the data plane's `PEERS` map: a node's ID, or 4096 and up for external WireGuard
/// peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerIndex(pub u32);

impl PeerIndex {
    /// Returns the node with this index, or `None` for an external peer.
    pub const fn node(self) -> Option<NodeId> {
        if self.0 == 0 || self.0 > NodeId::MAX as u32 { None } else { Some(NodeId(self.0 as u16)) }
    }
}

impl fmt::Display for PeerIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A Curve25519 public key. Displayed and parsed as in WireGuard: base64, 44 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// An Ed25519 public key that verifies a node's records. Displayed and parsed like [`PublicKey`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(from = "PublicKey", into = "PublicKey")]
pub struct VerifyingKey(pub [u8; 32]);

/// A 32-byte secret. It is wiped from memory when dropped and never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 32 bytes in base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key is 32 bytes in base64 (44 characters)")]
pub struct BadKey;

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode_key(text).map(Self)
    }
}

impl FromStr for Secret {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode_key(text).map(Self)
    }
}

impl From<PublicKey> for VerifyingKey {
    fn from(bytes: PublicKey) -> Self {
        Self(bytes.0)
    }
}

impl From<VerifyingKey> for PublicKey {
    fn from(bytes: VerifyingKey) -> Self {
        Self(bytes.0)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

fn decode_key(text: &str) -> Result<[u8; 32], BadKey> {
    BASE64.decode(text.as_bytes()).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(BadKey)
}

/// The cluster's addresses. All nodes of a cluster must agree on them; a node with other addresses
/// is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// All addresses of the container network. Default 10.32.0.0/12.
    pub subnet: IpNet,
    /// The part of the subnet that nodes allocate from. Default 10.40.0.0/13.
    pub range: IpNet,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            subnet: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 12)),
            range: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 40, 0, 0), 13)),
        }
    }
}
