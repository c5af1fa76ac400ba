//! Answers to the probes of another node.

use std::time::{Duration, Instant};

use super::probe::{Kind, Probe, SMALLEST};

/// Window of [`Probe::seen`]. It looks back by one to two windows.
pub const SEEN_WINDOW: Duration = Duration::from_secs(2);
/// Minimum average interval between answers to one node. Honest nodes exceed this rate only for
/// moments.
pub const ANSWER_INTERVAL: Duration = Duration::from_millis(25);
/// Burst of answers to one node. The MTU search on a short path takes two answers per step.
pub const ANSWER_BURST: u32 = 64;

/// The state of the answers to one node.
#[derive(Debug, Default)]
pub(super) struct Answers {
    seen: SizeWindows,
    /// The time until which the answer rate is used up. Each answer adds [`ANSWER_INTERVAL`].
    until: Option<Instant>,
}

impl Answers {
    /// Returns the answer to a request. `None` if the node asks too often.
    pub(super) fn handle_request(&mut self, request: Probe, now: Instant) -> Option<Probe> {
        let until = self.until.map_or(now, |until| until.max(now));
        if until >= now + ANSWER_INTERVAL * ANSWER_BURST {
            return None;
        }
        self.until = Some(until + ANSWER_INTERVAL);
        self.seen.record(request.size, now);
        Some(Probe { kind: Kind::Answer, size: SMALLEST, seen: self.seen.largest(now), ..request })
    }

    /// Returns the value for [`Probe::seen`].
    pub(super) fn seen(&mut self, now: Instant) -> u32 {
        self.seen.largest(now)
    }
}

/// The largest sizes received in the current window and in the one before.
#[derive(Debug, Default)]
struct SizeWindows {
    since: Option<Instant>,
    current: u32,
    previous: u32,
}

impl SizeWindows {
    fn record(&mut self, size: u32, now: Instant) {
        self.advance(now);
        self.current = self.current.max(size);
    }

    fn largest(&mut self, now: Instant) -> u32 {
        self.advance(now);
        self.current.max(self.previous)
    }

    fn advance(&mut self, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now < since + SEEN_WINDOW {
            return;
        }
        let is_next = now < since + 2 * SEEN_WINDOW;
        self.previous = if is_next { self.current } else { 0 };
        self.since = Some(if is_next { since + SEEN_WINDOW } else { now });
        self.current = 0;
    }
}
