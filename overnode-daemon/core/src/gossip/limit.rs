//! Limits on what a neighbor may send, and on what it may make this node send.
//!
//! Each neighbor has two token buckets, for bytes and for messages. They outlive the connection, so
//! a neighbor that is disconnected and reconnects finds them as they were. Replies to its requests
//! count as if it had sent them. The limits must allow for a cold start: at 1000 nodes in a full
//! mesh, a neighbor that tells of all nodes sends 1000 records of 2 KiB at each comparison, in a
//! few dozen versions until everything is quiet.

use std::time::{Duration, Instant};

/// Burst of bytes: twice the size of all possible records.
pub(crate) const BURST_BYTES: u64 = 64 << 20;
/// Sustained rate in bytes per second.
pub(crate) const BYTES_PER_SECOND: u64 = 256 << 10;
/// Burst of messages.
pub(crate) const BURST_MESSAGES: u64 = 16 << 10;
/// Sustained rate in messages per second. [`super::COLLECT`] limits honest nodes to less.
pub(crate) const MESSAGES_PER_SECOND: u64 = 128;

/// Burst of signature verifications, for all neighbors together: sixteen times the number of
/// possible records.
pub(crate) const BURST_SIGNATURES: u64 = 64 << 10;
/// Sustained rate of signature verifications per second, about a quarter of one core.
pub(crate) const SIGNATURES_PER_SECOND: u64 = 2048;

/// The signatures that may still be verified. All neighbors share one bucket, because a member can
/// be as many neighbors as there are free IDs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signatures {
    bucket: Bucket,
    at: Instant,
}

impl Signatures {
    pub(crate) fn new(now: Instant) -> Self {
        let bucket =
            Bucket { taken: 0, burst: BURST_SIGNATURES, each_second: SIGNATURES_PER_SECOND };
        Self { bucket, at: now }
    }

    /// Takes one signature from the bucket. Returns false if it is empty.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.bucket.refill(now.saturating_duration_since(self.at));
        self.at = self.at.max(now);
        let has_room = self.bucket.has_room();
        if has_room {
            self.bucket.take(1);
        }
        has_room
    }
}

/// What one neighbor may still send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    bytes: Bucket,
    messages: Bucket,
    at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Taken and not refilled yet, in thousandths.
    taken: u64,
    burst: u64,
    each_second: u64,
}

impl Allowance {
    pub(crate) fn new(now: Instant) -> Self {
        let bucket = |burst, each_second| Bucket { taken: 0, burst, each_second };
        let bytes = bucket(BURST_BYTES, BYTES_PER_SECOND);
        Self { bytes, messages: bucket(BURST_MESSAGES, MESSAGES_PER_SECOND), at: now }
    }

    /// Charges one message. Returns false if the neighbor was over its limit before.
    pub(crate) fn charge(&mut self, bytes: usize, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.bytes.refill(passed);
        self.messages.refill(passed);
        let has_room = self.bytes.has_room() && self.messages.has_room();
        self.bytes.take(bytes);
        self.messages.take(1);
        has_room
    }

    /// Returns the allowance for what this node forwards to a neighbor: half of the neighbor's
    /// limit, so that a flooding node cannot turn this node into one.
    pub(crate) fn for_forwarding(now: Instant) -> Self {
        let half = |bucket: Bucket| Bucket {
            burst: bucket.burst / 2,
            each_second: bucket.each_second / 2,
            ..bucket
        };
        let whole = Self::new(now);
        Self { bytes: half(whole.bytes), messages: half(whole.messages), at: now }
    }

    /// Charges one message if there is room for it. Returns false otherwise.
    pub(crate) fn try_charge(&mut self, bytes: usize, now: Instant) -> bool {
        let before = *self;
        let has_room = self.charge(bytes, now);
        if !has_room {
            (self.bytes.taken, self.messages.taken) = (before.bytes.taken, before.messages.taken);
            self.at = before.at;
        }
        has_room
    }

    /// Charges a reply to the neighbor that asked for it.
    pub(crate) fn charge_reply(&mut self, bytes: usize) {
        self.bytes.take(bytes);
    }
}

impl Bucket {
    fn refill(&mut self, passed: Duration) {
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        self.taken = self.taken.saturating_sub(millis.saturating_mul(self.each_second));
    }

    fn has_room(&self) -> bool {
        self.taken < self.burst * 1000
    }

    /// The debt is at most twice the burst, so a neighbor over its limit is accepted again after a
    /// bounded time.
    fn take(&mut self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.taken = self.taken.saturating_add(count.saturating_mul(1000)).min(self.burst * 2000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_accepted_and_then_a_fixed_rate() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        let heard = (0..2 * BURST_MESSAGES).filter(|_| allowance.charge(1, now)).count();
        assert_eq!(heard as u64, BURST_MESSAGES);
        // Rejected messages count as well.
        now += Duration::from_secs(BURST_MESSAGES / MESSAGES_PER_SECOND - 1);
        assert!(!allowance.charge(1, now));
        now += Duration::from_secs(2);
        assert!(allowance.charge(1, now));
        let mut heard = 0;
        for _ in 0..1000 {
            now += Duration::from_millis(1);
            heard += u64::from(allowance.charge(1, now)) + u64::from(allowance.charge(1, now));
        }
        assert!(heard <= 2 * MESSAGES_PER_SECOND, "{heard} messages in a second");
    }

    #[test]
    fn bytes_and_answers_count_too() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        assert!(allowance.charge(BURST_BYTES as usize / 2, now));
        allowance.charge_reply(BURST_BYTES as usize / 2);
        assert!(!allowance.charge(1, now));
        now += Duration::from_secs(1);
        assert!(
            allowance.charge(BYTES_PER_SECOND as usize, now),
            "a message is judged by those before it"
        );
        assert!(!allowance.charge(1, now));
    }

    #[test]
    fn forwarding_never_exceeds_a_neighbors_flood_limit() {
        let mut now = Instant::now();
        let (mut ours, mut theirs) = (Allowance::for_forwarding(now), Allowance::new(now));
        let mut passed = 0;
        for _ in 0..200_000 {
            now += Duration::from_millis(1);
            if ours.try_charge(300, now) {
                passed += 1;
                assert!(theirs.charge(300, now));
            }
        }
        let at_most = BURST_MESSAGES / 2 + 200 * MESSAGES_PER_SECOND / 2;
        assert!((at_most - 10..=at_most + 10).contains(&passed), "{passed}");
    }

    #[test]
    fn all_neighbors_together_cost_bounded_time() {
        let mut now = Instant::now();
        let mut signatures = Signatures::new(now);
        let verified = (0..2 * BURST_SIGNATURES).filter(|_| signatures.take(now)).count();
        assert_eq!(verified as u64, BURST_SIGNATURES);
        let mut verified = 0;
        for _ in 0..10_000 {
            now += Duration::from_millis(1);
            verified += (0..10).filter(|_| signatures.take(now)).count() as u64;
        }
        let expected = 10 * SIGNATURES_PER_SECOND;
        assert!(
            (expected - 10..=expected + 10).contains(&verified),
            "{verified} signatures in 10 s"
        );
    }

    #[test]
    fn a_flooding_neighbor_is_accepted_again_later() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        for _ in 0..1000 {
            allowance.charge(BURST_BYTES as usize, now);
        }
        now += Duration::from_secs(2 * BURST_BYTES / BYTES_PER_SECOND);
        assert!(allowance.charge(1, now));
    }
}
