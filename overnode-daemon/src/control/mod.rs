//! Manages control connections: who may join, and the encrypted channel that carries gossip.
//!
//! [`key`] derives keys from the token. [`session`] runs the Noise handshake and the two halves of
//! the channel, over any byte stream. [`frame`] frames the channel's messages and [`packet`]
//! distinguishes their kinds. [`hello`] holds the greeting that nodes exchange first, and the
//! reasons to refuse a peer. [`renewal`] renews the keys of an established connection. [`dial`]
//! decides which nodes to dial and when, and which of two connections to keep. It does no I/O and
//! reads no clock.
//!
//! Sockets, name resolution and tasks are in the node's runtime. [`crate::gossip`] interprets the
//! messages.

pub mod dial;
pub mod frame;
pub mod hello;
pub mod key;
pub mod packet;
pub mod renewal;
pub mod session;

/// The TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;
