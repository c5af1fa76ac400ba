//! Manages control connections: who may join, and the encrypted channel that carries gossip.
//!
//! [`key`] derives keys from the token. [`frame`] frames the channel's messages and [`packet`]
//! distinguishes their kinds. [`hello`] holds the greeting that nodes exchange first, and the
//! reasons to refuse a peer. [`renewal`] renews the keys of an established connection. [`dial`]
//! decides which nodes to dial and when, and which of two connections to keep.
//!
//! The daemon runs the handshake over a socket (`net/session.rs`). [`crate::gossip`] interprets the
//! messages.

pub mod dial;
pub mod frame;
pub mod hello;
pub mod key;
pub mod packet;
pub mod renewal;

use std::time::Duration;

/// The TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;
/// A side that receives nothing for this long, three heartbeats, closes the connection.
pub const READ_LIMIT: Duration = Duration::from_secs(15);
