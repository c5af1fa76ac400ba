//! Control connections: who may join, and the encrypted channel that gossip travels on.
//!
//! [`key`] turns the token into keys. [`session`] is the Noise handshake and the two halves of the
//! channel, over any byte stream; [`frame`] is its framing, [`packet`] tells apart what travels in
//! it, and [`hello`] is what nodes tell each other first, with the reasons to refuse. [`renewal`]
//! makes new keys for a connection that is up. [`dial`] decides whom to call and when, and which of
//! two connections stays; it has no I/O and reads no clock.
//!
//! Not here: sockets, name resolution and tasks (the node's runtime), and what the messages mean
//! ([`crate::gossip`]).

pub mod dial;
pub mod frame;
pub mod hello;
pub mod key;
pub mod packet;
pub mod renewal;
pub mod session;

/// The TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;
