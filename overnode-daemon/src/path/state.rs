//! What is known of a path, for routes and for people.

use std::time::{Duration, Instant};

/// The direct path to a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathState {
    /// Packets pass in both directions.
    pub alive: bool,
    /// Since when that is so.
    pub since: Instant,
    /// Smoothed round-trip time (RFC 6298); none before the first answer.
    pub rtt: Option<Duration>,
    /// Shortest round trip since the path last died.
    pub rtt_min: Option<Duration>,
    /// How many of the last [`super::HISTORY`] small requests had no answer, 0 to 1. Counted anew
    /// when the path comes alive.
    pub loss: f32,
    /// Size of the largest inner packet that the path carries, bytes.
    pub mtu: u32,
    /// False while [`Self::mtu`] is a guess that no probe has confirmed since the path came alive.
    pub mtu_confirmed: bool,
    /// Size of the largest inner packet that the living paths of that node carry, as it says,
    /// bytes; none before it has said.
    pub carries: Option<u32>,
    /// When the last answer came.
    pub last_heard: Option<Instant>,
    /// What went wrong last, and when.
    pub last_error: Option<(Fault, Instant)>,
}

/// What went wrong on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It was alive, and then probes had no answer.
    #[error("probes have no answer")]
    Silent,
    /// Packets of so many bytes vanish while small ones pass.
    #[error("packets of {0} bytes vanish while small ones pass")]
    TooLarge(u32),
    /// The kernel of this host has refused to send a probe.
    #[error("this host cannot send")]
    Unsent,
}
