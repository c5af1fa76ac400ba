//! Numbers that the kernel and the handshake assign.

use std::fmt;

use serde::{Deserialize, Serialize};

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
