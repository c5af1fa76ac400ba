//! Questions to other nodes and their retry timers.

use std::time::Instant;

use super::Timing;
use super::message::Round;

/// A question to one node. A question that is asked again has a new round, which distinguishes its
/// answer from late answers to the earlier question.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) round: Round,
    pub(super) retry: Retry,
}

/// The retry timer of an unanswered message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Retry {
    pub(super) at: Instant,
    pub(super) tries: u32,
}

impl Retry {
    /// Creates a timer that is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self { at: now, tries: 0 }
    }

    /// Returns true if the timer is due, and then rearms it with a longer delay.
    pub(super) fn take(&mut self, now: Instant, timing: &Timing) -> bool {
        if self.at > now {
            return false;
        }
        self.at = now + (timing.retry * 2_u32.pow(self.tries.min(8))).min(timing.retry_cap);
        self.tries += 1;
        true
    }
}
