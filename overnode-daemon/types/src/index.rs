//! Numbers that the kernel and the handshake assign.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// The index of a network interface in its network namespace, from 1. The kernel assigns it and
/// gives it to no other interface while this one exists.
///
/// The kernel and the maps write 0 where there is no interface. Here that is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InterfaceIndex(u32);

impl InterfaceIndex {
    /// Creates an index. The number must not be 0; see [`Self::from_kernel`].
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// Returns the index that the kernel or a map reports, or `None` for 0.
    pub const fn from_kernel(index: u32) -> Option<Self> {
        if index == 0 { None } else { Some(Self(index)) }
    }

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl From<InterfaceIndex> for u32 {
    fn from(index: InterfaceIndex) -> Self {
        index.0
    }
}

impl fmt::Display for InterfaceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// WireGuard's receiver index: 32 bits with which a node names its end of a session or of a
/// handshake. Messages to the node carry it, so that the node finds the session.
///
/// Each end draws its own. The low 12 bits of an index that this node drew are the session's slot
/// in the data plane, 1 to 4095. An index that a peer drew has no meaning here, and any value.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    Zeroize,
)]
pub struct SessionIndex(u32);

impl SessionIndex {
    /// Creates an index.
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Decodes an index in a message.
    pub const fn from_le_bytes(bytes: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }

    /// Encodes the index for a message.
    pub const fn to_le_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }
}

impl From<u32> for SessionIndex {
    fn from(index: u32) -> Self {
        Self(index)
    }
}

impl From<SessionIndex> for u32 {
    fn from(index: SessionIndex) -> Self {
        index.0
    }
}

/// Displayed in hexadecimal, such as `0xabcde001`.
impl fmt::Display for SessionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}
