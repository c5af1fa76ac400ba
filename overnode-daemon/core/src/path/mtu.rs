//! Search for the largest inner packet that a path carries (RFC 8899, "DPLPMTUD", with the shortcut
//! of trying the largest size first).
//!
//! All sizes are those of inner packets, in bytes. A size has failed after enough probes of it were
//! lost while small probes sent afterwards were answered. Until a size has failed, the path is
//! assumed to carry what the local interface does, which is nearly always true. A lower first guess
//! would teach containers a smaller MTU, which they keep for minutes.

use std::time::{Duration, Instant};

/// Size that every path should carry: the minimum MTU of IPv6 (1280) less the headers of the tunnel
/// over IPv6 (80). It is used at once when a larger size fails, until the search has a result (RFC
/// 8899 section 5.1.2, `BASE_PLPMTU`).
pub const BASE: u32 = 1200;
/// Smallest size that the search tries: the size that IPv4 hosts must accept (576) less the headers
/// of the tunnel over IPv4 (60), rounded down to the cipher's blocks.
pub const FLOOR: u32 = 512;
/// The search ends when the result is known to this many bytes.
pub const PRECISION: u32 = 8;
/// Minimum number of probes that must be lost before a size has failed (RFC 8899 section 5.1.2,
/// `MAX_PROBES`). More are needed on lossy paths.
pub const MIN_TRIES: u32 = 3;
/// Maximum number of probes per size, regardless of the loss.
pub const MAX_TRIES: u32 = 12;
/// Accepted probability that mere loss makes a size fail, 0 to 1.
const MAX_CHANCE: f32 = 0.001;
/// Interval at which a size that works is checked. RFC 8899 asks for less often, but this is how
/// long a black hole can last.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// The same interval where containers exchange packets and would notice a black hole.
pub const BUSY_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Interval at which a larger size is tried (RFC 8899 section 5.1.1, `PMTU_RAISE_TIMER`).
pub const RAISE_INTERVAL: Duration = Duration::from_secs(600);
/// Pause after an inconclusive probe, when small probes were lost as well.
const PAUSE: Duration = Duration::from_millis(500);

/// The MTU search on one path. Idle while the path is dead.
#[derive(Debug)]
pub(super) struct Search {
    largest: u32,
    mtu: u32,
    is_busy: bool,
    confirmed_at: Option<Instant>,
    is_confirmed: bool,
    aim: Aim,
    /// Probes of the current size.
    sent_probes: Vec<SentProbe>,
    /// When the first of them was sent.
    first_sent: Option<Instant>,
    wait: Option<Wait>,
    failures: u32,
    /// When to send the next probe, or to stop waiting for an answer. `None` while idle.
    next: Option<Instant>,
    raise_at: Option<Instant>,
}

/// What the next probe tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    /// Whether the current MTU still works.
    Confirm,
    /// Whether the path now carries the largest size.
    Largest,
    /// Whether the path carries [`BASE`] after `high` has failed.
    Base { high: u32 },
    /// What the path carries between `low`, which works, and `high`, which does not.
    Between { low: u32, high: u32 },
}

#[derive(Clone, Copy, Debug)]
struct SentProbe {
    sequence: u64,
    stamp: u64,
}

/// Waits for the answer to the last probe.
#[derive(Clone, Copy, Debug)]
struct Wait {
    since: Instant,
    /// True if a small probe that was sent no earlier was answered.
    has_small_passed: bool,
}

impl Search {
    pub(super) fn new(largest: u32) -> Self {
        Self {
            largest,
            mtu: largest,
            is_busy: false,
            confirmed_at: None,
            is_confirmed: false,
            aim: Aim::Confirm,
            sent_probes: Vec::new(),
            first_sent: None,
            wait: None,
            failures: 0,
            next: None,
            raise_at: None,
        }
    }

    pub(super) fn mtu(&self) -> u32 {
        self.mtu
    }

    pub(super) fn is_confirmed(&self) -> bool {
        self.is_confirmed
    }

    pub(super) fn largest(&self) -> u32 {
        self.largest
    }

    /// Handles a change of the size that the local interface carries.
    pub(super) fn set_largest(&mut self, largest: u32, now: Instant) {
        self.largest = largest;
        self.mtu = self.mtu.min(largest);
        if self.next.is_some() {
            self.start(now);
        }
    }

    /// Starts when the path is alive: checks the known MTU, and then whether the path carries more
    /// now.
    pub(super) fn start(&mut self, now: Instant) {
        self.is_confirmed = false;
        self.confirmed_at = None;
        self.raise_at = (self.mtu < self.largest).then_some(now);
        self.turn_to(Aim::Confirm, now);
    }

    /// Stops when the path is dead.
    pub(super) fn stop(&mut self) {
        self.turn(Aim::Confirm);
        self.next = None;
    }

    /// Checks the MTU at once, because large packets seem to vanish.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.aim == Aim::Confirm && self.wait.is_none() && self.next.is_some() {
            self.next = Some(now);
        }
    }

    /// Sets whether containers exchange packets with that node. The MTU is then checked more often.
    pub(super) fn set_busy(&mut self, is_busy: bool, now: Instant) {
        self.is_busy = is_busy;
        let is_at_rest =
            self.aim == Aim::Confirm && self.wait.is_none() && self.sent_probes.is_empty();
        if is_busy && is_at_rest {
            self.next = self.next.map(|next| next.min(now + BUSY_CHECK_INTERVAL));
        }
    }

    /// Returns when there is something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Stops waiting for an answer if it is time. `loss` is the loss of small probes, 0 to 1.
    /// Returns the MTU that was assumed, if it has turned out to be too large.
    pub(super) fn handle_timeout(&mut self, now: Instant, loss: f32) -> Option<u32> {
        let wait = self.wait.filter(|_| self.next.is_some_and(|next| now >= next))?;
        self.wait = None;
        if !wait.has_small_passed {
            self.next = Some(now + PAUSE);
            return None;
        }
        self.failures += 1;
        self.next = Some(now);
        if self.failures >= tries(loss) { self.fail(now) } else { None }
    }

    /// Handles the answer to a small probe that was sent at `sent`. A probe of this search that was
    /// sent no later has only `grace` left.
    pub(super) fn handle_small(&mut self, sent: Instant, grace: Duration, now: Instant) {
        if let Some(wait) = self.wait.as_mut().filter(|wait| sent >= wait.since) {
            wait.has_small_passed = true;
            self.next = self.next.map(|next| next.min(now + grace));
        }
    }

    /// Returns the size of the probe to send now, if one is due.
    pub(super) fn poll_size(&mut self, now: Instant) -> Option<u32> {
        if self.wait.is_some() || self.next.is_none_or(|next| now < next) {
            return None;
        }
        let may_rise = self.is_confirmed && self.raise_at.is_some_and(|at| now >= at);
        if self.aim == Aim::Confirm && may_rise {
            self.turn(Aim::Largest);
        }
        Some(self.size())
    }

    /// Records that a probe was sent. Its answer is awaited for `timeout`.
    pub(super) fn handle_sent(
        &mut self,
        sequence: u64,
        stamp: u64,
        timeout: Duration,
        now: Instant,
    ) {
        if self.sent_probes.len() >= MAX_TRIES as usize {
            self.sent_probes.remove(0);
        }
        self.first_sent.get_or_insert(now);
        self.sent_probes.push(SentProbe { sequence, stamp });
        self.wait = Some(Wait { since: now, has_small_passed: false });
        self.next = Some(now + timeout);
    }

    /// Handles an answer. Returns true if it is to a probe of this search.
    pub(super) fn handle_answer(&mut self, sequence: u64, stamp: u64, now: Instant) -> bool {
        let is_mine =
            self.sent_probes.iter().any(|probe| probe.sequence == sequence && probe.stamp == stamp);
        if is_mine {
            self.pass(now);
        }
        is_mine
    }

    /// Handles the report that the other side has received packets of up to `seen` bytes in the
    /// `window` before it received the request sent at `asked`. If that covers a probe of this
    /// search, only its answer was lost.
    pub(super) fn handle_seen(
        &mut self,
        seen: u32,
        window: Duration,
        asked: Instant,
        now: Instant,
    ) {
        let Some(first) = self.first_sent else { return };
        let is_new = self.confirmed_at.is_none_or(|at| at + window < first);
        if is_new && asked >= first && seen >= self.size() {
            self.pass(now);
        }
    }

    /// Handles a packet of that size that the kernel refused to send. Returns true if it was a
    /// probe of this search.
    pub(super) fn handle_unsent(&mut self, size: u32, now: Instant) -> bool {
        let is_mine = self.wait.is_some() && size == self.size();
        if is_mine {
            self.fail(now);
        }
        is_mine
    }

    fn size(&self) -> u32 {
        match self.aim {
            Aim::Confirm => self.mtu,
            Aim::Largest => self.largest,
            Aim::Base { .. } => BASE,
            Aim::Between { low, high } => low + ((high - low) / 2).next_multiple_of(PRECISION),
        }
    }

    fn pass(&mut self, now: Instant) {
        let size = self.size();
        self.mtu = size;
        self.is_confirmed = true;
        self.confirmed_at = Some(now);
        match self.aim {
            Aim::Confirm => self.rest(now),
            Aim::Largest => {
                self.raise_at = None;
                self.rest(now);
            }
            Aim::Base { high } | Aim::Between { high, .. } => self.narrow(size, high, now),
        }
    }

    fn fail(&mut self, now: Instant) -> Option<u32> {
        let size = self.size();
        let assumed = (self.aim == Aim::Confirm).then_some(size);
        match self.aim {
            Aim::Largest => self.narrow(self.mtu, size, now),
            Aim::Between { low, .. } => self.narrow(low, size, now),
            Aim::Confirm if size > BASE => {
                self.mtu = BASE;
                self.is_confirmed = false;
                self.turn_to(Aim::Base { high: size }, now);
            }
            Aim::Confirm | Aim::Base { .. } if size > FLOOR => {
                self.mtu = FLOOR;
                self.is_confirmed = false;
                self.narrow(FLOOR, size, now);
            }
            Aim::Confirm | Aim::Base { .. } => {
                self.is_confirmed = false;
                self.raise_at = Some(now + RAISE_INTERVAL);
                self.rest(now);
            }
        }
        assumed
    }

    fn narrow(&mut self, low: u32, high: u32, now: Instant) {
        if high - low > PRECISION {
            self.turn_to(Aim::Between { low, high }, now);
        } else {
            self.raise_at = Some(now + RAISE_INTERVAL);
            if self.is_confirmed { self.rest(now) } else { self.turn_to(Aim::Confirm, now) }
        }
    }

    fn rest(&mut self, now: Instant) {
        let check = now + if self.is_busy { BUSY_CHECK_INTERVAL } else { CHECK_INTERVAL };
        self.turn_to(Aim::Confirm, self.raise_at.map_or(check, |at| at.clamp(now, check)));
    }

    fn turn_to(&mut self, aim: Aim, next: Instant) {
        self.turn(aim);
        self.next = Some(next);
    }

    fn turn(&mut self, aim: Aim) {
        self.aim = aim;
        self.sent_probes.clear();
        self.first_sent = None;
        self.wait = None;
        self.failures = 0;
    }
}

/// Returns the number of lost probes after which chance is an unlikely cause.
fn tries(loss: f32) -> u32 {
    let mut chance = 1.0;
    for tries in 0..MAX_TRIES {
        if chance <= MAX_CHANCE {
            return tries.max(MIN_TRIES);
        }
        chance *= loss;
    }
    MAX_TRIES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lossy_path_is_probed_more_often() {
        let counts = [0.0, 0.01, 0.15, 0.3, 0.51, 0.9, 1.0].map(tries);
        assert_eq!(counts, [3, 3, 4, 6, 11, 12, 12]);
    }
}
