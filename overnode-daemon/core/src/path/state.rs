//! The state of a path, for route selection and for display.

use std::time::{Duration, Instant};

/// The state of the direct path to a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathState {
    /// True if packets pass in both directions.
    pub alive: bool,
    /// When [`Self::alive`] last changed, or when the session began.
    pub since: Instant,
    /// Smoothed round-trip time (RFC 6298). `None` before the first answer.
    pub rtt: Option<Duration>,
    /// Shortest round-trip time since the path last died.
    pub rtt_min: Option<Duration>,
    /// Share of the last [`super::HISTORY`] small requests without an answer, 0 to 1. Starts again
    /// when the path comes alive.
    pub loss: f32,
    /// Size of the largest inner packet that the path carries in bytes.
    pub mtu: u32,
    /// False while [`Self::mtu`] is a guess that no probe has confirmed since the path came alive.
    pub mtu_confirmed: bool,
    /// Size in bytes of the largest inner packet that all live paths of that node carry, as
    /// reported by it. `None` before the first report.
    pub carries: Option<u32>,
    /// When the last answer arrived.
    pub last_heard: Option<Instant>,
    /// The last fault and its time.
    pub last_error: Option<(Fault, Instant)>,
}

/// A fault on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The path was alive, and then probes had no answer.
    #[error("probes are not answered")]
    Silent,
    /// Packets of this size in bytes are lost while small ones pass.
    #[error("packets of {0} bytes are lost while small ones pass")]
    TooLarge(u32),
    /// The kernel of this host has refused to send a probe.
    #[error("this host cannot send packets")]
    Unsent,
}
