//! How much a neighbour may say, and have us say.
//!
//! Two buckets for each neighbour, of bytes and of messages, which outlive its connection: who is
//! cut off and comes back finds them as empty as they were. What it asks for counts as if it had
//! sent it. A cold start is what they must allow: at 1000 nodes, each linked with all others, a
//! neighbour that tells of everybody sends 1000 records of 2 KiB each time that it compares, and
//! few dozen versions of them before all is quiet.

use std::time::{Duration, Instant};

/// Bytes that may come at once: all records that there can be, twice.
pub const BURST_BYTES: u64 = 64 << 20;
/// Bytes that may come each second, again and again.
pub const BYTES_PER_SECOND: u64 = 256 << 10;
/// Messages that may come at once.
pub const BURST_MESSAGES: u64 = 16 << 10;
/// Messages that may come each second, again and again: more than [`super::COLLECT`] lets an honest
/// node send.
pub const MESSAGES_PER_SECOND: u64 = 128;

/// Signatures that are verified at once, whoever brings the records: all records that there can be,
/// sixteen times.
pub const BURST_SIGNATURES: u64 = 64 << 10;
/// Signatures that are verified each second, again and again: about a quarter of a core's time.
pub const SIGNATURES_PER_SECOND: u64 = 2048;

/// How many signatures may still be verified. One for all neighbours: a member may be as many of
/// them as there are free IDs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signatures {
    bucket: Bucket,
    at: Instant,
}

impl Signatures {
    pub fn new(now: Instant) -> Self {
        let bucket =
            Bucket { taken: 0, burst: BURST_SIGNATURES, each_second: SIGNATURES_PER_SECOND };
        Self { bucket, at: now }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        self.bucket.refill(now.saturating_duration_since(self.at));
        self.at = self.at.max(now);
        let has_room = self.bucket.has_room();
        if has_room {
            self.bucket.take(1);
        }
        has_room
    }
}

/// What one neighbour may still say.
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
    pub fn new(now: Instant) -> Self {
        let bucket = |burst, each_second| Bucket { taken: 0, burst, each_second };
        let bytes = bucket(BURST_BYTES, BYTES_PER_SECOND);
        Self { bytes, messages: bucket(BURST_MESSAGES, MESSAGES_PER_SECOND), at: now }
    }

    /// Takes one message. False if that is too much.
    pub fn hear(&mut self, bytes: usize, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.bytes.refill(passed);
        self.messages.refill(passed);
        let has_room = self.bytes.has_room() && self.messages.has_room();
        self.bytes.take(bytes);
        self.messages.take(1);
        has_room
    }

    /// What this node passes on to a neighbour: half of what it may, so that nobody who floods
    /// makes this node one that does.
    pub fn of_ours(now: Instant) -> Self {
        let half = |bucket: Bucket| Bucket {
            burst: bucket.burst / 2,
            each_second: bucket.each_second / 2,
            ..bucket
        };
        let whole = Self::new(now);
        Self { bytes: half(whole.bytes), messages: half(whole.messages), at: now }
    }

    /// Takes one message, if there is room for it.
    pub fn pass(&mut self, bytes: usize, now: Instant) -> bool {
        let before = *self;
        let has_room = self.hear(bytes, now);
        if !has_room {
            (self.bytes.taken, self.messages.taken) = (before.bytes.taken, before.messages.taken);
            self.at = before.at;
        }
        has_room
    }

    /// Takes what is sent because it asked.
    pub fn answer(&mut self, bytes: usize) {
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

    /// At most as much again as the burst: who was too much for us is heard again some time.
    fn take(&mut self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.taken = self.taken.saturating_add(count.saturating_mul(1000)).min(self.burst * 2000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_heard_and_then_so_much_each_second() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        let heard = (0..2 * BURST_MESSAGES).filter(|_| allowance.hear(1, now)).count();
        assert_eq!(heard as u64, BURST_MESSAGES);
        // What was too much counts as well.
        now += Duration::from_secs(BURST_MESSAGES / MESSAGES_PER_SECOND - 1);
        assert!(!allowance.hear(1, now));
        now += Duration::from_secs(2);
        assert!(allowance.hear(1, now));
        let mut heard = 0;
        for _ in 0..1000 {
            now += Duration::from_millis(1);
            heard += u64::from(allowance.hear(1, now)) + u64::from(allowance.hear(1, now));
        }
        assert!(heard <= 2 * MESSAGES_PER_SECOND, "{heard} in a second");
    }

    #[test]
    fn bytes_count_and_so_do_answers() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        assert!(allowance.hear(BURST_BYTES as usize / 2, now));
        allowance.answer(BURST_BYTES as usize / 2);
        assert!(!allowance.hear(1, now));
        now += Duration::from_secs(1);
        assert!(
            allowance.hear(BYTES_PER_SECOND as usize, now),
            "what has come is judged by what came before"
        );
        assert!(!allowance.hear(1, now));
    }

    #[test]
    fn what_is_passed_on_is_never_a_flood() {
        let mut now = Instant::now();
        let (mut ours, mut theirs) = (Allowance::of_ours(now), Allowance::new(now));
        let mut passed = 0;
        for _ in 0..200_000 {
            now += Duration::from_millis(1);
            if ours.pass(300, now) {
                passed += 1;
                assert!(theirs.hear(300, now));
            }
        }
        let at_most = BURST_MESSAGES / 2 + 200 * MESSAGES_PER_SECOND / 2;
        assert!((at_most - 10..=at_most + 10).contains(&passed), "{passed}");
    }

    #[test]
    fn all_neighbours_together_cost_a_bounded_time() {
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
        assert!((expected - 10..=expected + 10).contains(&verified), "{verified} in 10 s");
    }

    #[test]
    fn nobody_is_kept_out_for_ever() {
        let mut now = Instant::now();
        let mut allowance = Allowance::new(now);
        for _ in 0..1000 {
            allowance.hear(BURST_BYTES as usize, now);
        }
        now += Duration::from_secs(2 * BURST_BYTES / BYTES_PER_SECOND);
        assert!(allowance.hear(1, now));
    }
}
