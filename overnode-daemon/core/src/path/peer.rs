//! The direct path to one node.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use super::answer::{Answers, SEEN_WINDOW};
use super::mtu::Search;
use super::probe::{Kind, Probe, SMALLEST};
use super::rtt::{Rtt, SHORTEST_WAIT};
use super::state::{Fault, PathState};

/// Interval between requests on a live path. With [`FAST_INTERVAL`] and [`DEAD_AFTER`], a dead path
/// is detected after 1.4 to 2 s. That leaves a second for gossip to spread the news and for other
/// nodes to reroute.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// Interval between requests on quiet paths of a node with many peers.
pub const STRETCHED_INTERVAL: Duration = Duration::from_secs(2);
/// Interval between requests after an answer is missing, on a path that is recovering, and for
/// [`FAST_START`] on a new one.
pub const FAST_INTERVAL: Duration = Duration::from_millis(100);
/// Interval between requests after an answer is missing on a path that loses more than [`LOSSY`].
/// If half of all round trips fail, a dozen consecutive failures occur every hour, but two dozen do
/// not.
pub const LOSSY_INTERVAL: Duration = Duration::from_millis(50);
/// Loss above which a path counts as lossy by nature, 0 to 1.
pub const LOSSY: f32 = 0.2;
/// How long a new path is probed fast. Two nodes agree on a session in less time than this, or
/// something blocks their packets.
pub const FAST_START: Duration = Duration::from_secs(5);
/// A path is dead when a request and all later ones had no answer for this long.
pub const DEAD_AFTER: Duration = Duration::from_millis(1400);
/// Minimum number of unanswered requests for a dead path, the last of them at least
/// [`SHORTEST_WAIT`] old. A node that was too busy to send requests must not mistake its own
/// silence for the other node's.
pub const DEAD_REQUESTS: u32 = 6;
/// A daemon whose timer fires later than requested by more than this was not listening. The silence
/// then counts from that moment.
pub const TIMER_STALL: Duration = Duration::from_millis(300);
/// Number of consecutive requests that must be answered on a dead path before it is alive again.
pub const ANSWERS_IN_A_ROW: usize = 3;
/// These requests must have been sent within this time.
pub const ROW_WITHIN: Duration = Duration::from_secs(2);
/// A path that dies sooner than this after it came alive has flapped.
pub const FLAP_WINDOW: Duration = Duration::from_secs(60);
/// How long a path must be good before it is alive again, after it has flapped twice in a row.
/// Doubles with each further flap.
pub const MIN_HOLD_DOWN: Duration = Duration::from_secs(1);
/// Maximum of this time.
pub const MAX_HOLD_DOWN: Duration = Duration::from_secs(30);
/// Number of requests that the loss is measured over.
pub const HISTORY: usize = 100;
/// An answer that takes longer than this counts as lost.
pub const LATEST_ANSWER: Duration = Duration::from_secs(3);
/// Time that a large probe has left after the answer to a small one sent after it. Half the
/// round-trip time if that is longer.
pub const SIZE_GRACE: Duration = Duration::from_millis(50);
/// The direct path to one node.
#[derive(Debug)]
pub(super) struct Peer {
    is_alive: bool,
    since: Instant,
    is_busy: bool,
    added: Instant,
    rtt: Rtt,
    requests: VecDeque<Request>,
    sequence: u64,
    last_sent: Option<Instant>,
    next: Instant,
    last_heard: Option<Instant>,
    silence: Option<Silence>,
    good_since: Option<Instant>,
    flaps: u32,
    last_error: Option<(Fault, Instant)>,
    pub(super) search: Search,
    answers: Answers,
    carries: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    sequence: u64,
    stamp: u64,
    sent: Instant,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Answered,
    Lost,
}

/// The time without answers since the last one.
#[derive(Clone, Copy, Debug)]
struct Silence {
    /// When the first request of this period was sent.
    since: Instant,
    requests: u32,
    /// When [`DEAD_REQUESTS`] requests had been sent.
    enough_at: Option<Instant>,
}

impl Silence {
    fn from(now: Instant) -> Self {
        Self { since: now, requests: 0, enough_at: None }
    }
}

/// The result of handling a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Send this answer.
    Answer(Probe),
    /// A request beyond the rate limit.
    Limited,
    /// The answer to a request of this node.
    Heard,
    /// An answer that this node is not waiting for.
    Stray,
}

impl Peer {
    pub(super) fn new(largest: u32, now: Instant) -> Self {
        Self {
            is_alive: false,
            since: now,
            is_busy: false,
            added: now,
            rtt: Rtt::default(),
            requests: VecDeque::with_capacity(HISTORY),
            sequence: 0,
            last_sent: None,
            next: now,
            last_heard: None,
            silence: None,
            good_since: None,
            flaps: 0,
            last_error: None,
            search: Search::new(largest),
            answers: Answers::default(),
            carries: None,
        }
    }

    pub(super) fn state(&self) -> PathState {
        PathState {
            alive: self.is_alive,
            since: self.since,
            rtt: self.rtt.smoothed(),
            rtt_min: self.rtt.least(),
            loss: self.loss(),
            mtu: self.search.mtu(),
            mtu_confirmed: self.search.is_confirmed(),
            carries: self.carries,
            last_heard: self.last_heard,
            last_error: self.last_error,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.is_alive
    }

    /// Sets whether containers exchange packets with that node.
    pub(super) fn set_busy(&mut self, is_busy: bool, now: Instant) {
        let was_busy = std::mem::replace(&mut self.is_busy, is_busy);
        if is_busy && !was_busy {
            self.next = self.next.min(now + INTERVAL);
        }
        self.search.set_busy(is_busy, now);
    }

    /// Returns when there is something to do.
    pub(super) fn poll_timeout(&self) -> Instant {
        [self.extra_request_at(), self.dead_at(), self.search.poll_timeout()]
            .into_iter()
            .flatten()
            .fold(self.next, Instant::min)
    }

    /// Handles everything that is due and adds the probes to send to `probes`.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        is_crowded: bool,
        rng: &mut StdRng,
        probes: &mut Vec<Probe>,
    ) {
        if now > self.poll_timeout() + TIMER_STALL {
            self.silence = self.silence.map(|_| Silence::from(now));
        }
        for request in &mut self.requests {
            if request.fate == Fate::Open && now >= request.sent + LATEST_ANSWER {
                request.fate = Fate::Lost;
            }
        }
        if self.dead_at().is_some_and(|at| now >= at) {
            self.handle_silence(now);
        }
        if let Some(size) = self.search.handle_timeout(now, self.loss()) {
            self.last_error = Some((Fault::TooLarge(size), now));
        }
        let size = self.search.poll_size(now);
        if let Some(size) = size {
            let probe = self.probe(size, now, rng);
            self.search.handle_sent(probe.sequence, probe.stamp, self.rtt.wait(), now);
            probes.push(probe);
        }
        let is_due = now >= self.next || self.extra_request_at().is_some_and(|at| now >= at);
        if is_due || size.is_some() {
            self.send_request(now, rng, probes);
            self.next = now + jittered(self.interval(now, is_crowded), rng);
        }
    }

    /// Handles a received probe.
    pub(super) fn handle_probe(&mut self, probe: Probe, now: Instant) -> Outcome {
        self.carries = Some(u32::from(probe.carries)).filter(|size| *size > 0).or(self.carries);
        match probe.kind {
            Kind::Request => {
                self.answers.handle_request(probe, now).map_or(Outcome::Limited, Outcome::Answer)
            }
            Kind::Answer => self.handle_answer(probe, now),
        }
    }

    /// Handles an inner packet of that size that the kernel refused to send.
    pub(super) fn handle_unsent(&mut self, size: u32, now: Instant) {
        let fault = if self.search.handle_unsent(size, now) {
            Fault::TooLarge(size)
        } else {
            Fault::Unsent
        };
        self.last_error = Some((fault, now));
    }

    fn handle_answer(&mut self, probe: Probe, now: Instant) -> Outcome {
        if self.search.handle_answer(probe.sequence, probe.stamp, now) {
            self.handle_heard(now);
            return Outcome::Heard;
        }
        let found = self.requests.binary_search_by_key(&probe.sequence, |request| request.sequence);
        let Some(request) = found.ok().and_then(|at| self.requests.get_mut(at)) else {
            return Outcome::Stray;
        };
        if request.stamp != probe.stamp
            || request.fate != Fate::Open
            || now >= request.sent + LATEST_ANSWER
        {
            return Outcome::Stray;
        }
        request.fate = Fate::Answered;
        let sent = request.sent;
        let rtt = now.saturating_duration_since(sent);
        self.rtt.sample(rtt);
        self.search.handle_small(sent, (rtt / 2).max(SIZE_GRACE), now);
        self.search.handle_seen(probe.seen, 2 * SEEN_WINDOW, sent, now);
        self.handle_heard(now);
        Outcome::Heard
    }

    fn handle_heard(&mut self, now: Instant) {
        let is_first = self.last_heard.is_none();
        self.last_heard = Some(now);
        self.silence = None;
        let good_since = *self.good_since.get_or_insert(now);
        if self.is_alive {
            return;
        }
        if is_first || (now >= good_since + self.hold() && self.has_answers_in_a_row(now)) {
            self.is_alive = true;
            self.since = now;
            let wait = self.rtt.wait();
            self.requests
                .retain(|request| request.fate == Fate::Answered || now < request.sent + wait);
            self.search.start(now);
        } else if now >= good_since + self.hold() {
            self.next = self.next.min(now + FAST_INTERVAL);
        }
    }

    fn handle_silence(&mut self, now: Instant) {
        self.good_since = None;
        if !self.is_alive {
            return;
        }
        self.flaps = if now < self.since + FLAP_WINDOW { self.flaps + 1 } else { 0 };
        self.is_alive = false;
        self.since = now;
        self.rtt.forget_least();
        self.search.stop();
        self.last_error = Some((Fault::Silent, now));
    }

    fn send_request(&mut self, now: Instant, rng: &mut StdRng, probes: &mut Vec<Probe>) {
        let probe = self.probe(SMALLEST, now, rng);
        if self.requests.len() >= HISTORY {
            self.requests.pop_front();
        }
        let request =
            Request { sequence: probe.sequence, stamp: probe.stamp, sent: now, fate: Fate::Open };
        self.requests.push_back(request);
        let silence = self.silence.get_or_insert(Silence::from(now));
        silence.requests += 1;
        if silence.requests == DEAD_REQUESTS {
            silence.enough_at = Some(now);
        }
        self.last_sent = Some(now);
        probes.push(probe);
    }

    fn probe(&mut self, size: u32, now: Instant, rng: &mut StdRng) -> Probe {
        self.sequence += 1;
        Probe {
            kind: Kind::Request,
            size,
            sequence: self.sequence,
            stamp: rng.random(),
            seen: self.answers.seen(now),
            carries: 0,
        }
    }

    fn interval(&self, now: Instant, is_crowded: bool) -> Duration {
        let is_new = self.last_heard.is_none() && now < self.added + FAST_START;
        let is_missing =
            self.is_alive && self.silence.is_some_and(|it| now >= it.since + self.rtt.wait());
        let is_recovering = !self.is_alive && self.good_since.is_some();
        let is_held = self.good_since.is_some_and(|since| now < since + self.hold());
        match () {
            () if is_missing && self.loss() > LOSSY => LOSSY_INTERVAL,
            () if is_new || is_missing => FAST_INTERVAL,
            () if is_recovering && !is_held => FAST_INTERVAL,
            () if is_recovering || self.is_busy || !is_crowded => INTERVAL,
            () => STRETCHED_INTERVAL,
        }
    }

    /// Returns when to send an extra request because an answer is missing.
    fn extra_request_at(&self) -> Option<Instant> {
        let silence = self.silence.filter(|_| self.is_alive)?;
        Some((silence.since + self.rtt.wait()).max(self.last_sent? + FAST_INTERVAL))
    }

    /// Returns when the path counts as dead if the silence continues.
    fn dead_at(&self) -> Option<Instant> {
        let (silence, _) = self.silence.zip(self.good_since)?;
        Some((silence.since + DEAD_AFTER).max(silence.enough_at? + SHORTEST_WAIT))
    }

    fn hold(&self) -> Duration {
        match self.flaps.checked_sub(2) {
            None => Duration::ZERO,
            Some(more) => MIN_HOLD_DOWN.saturating_mul(1 << more.min(16)).min(MAX_HOLD_DOWN),
        }
    }

    fn has_answers_in_a_row(&self, now: Instant) -> bool {
        let recent =
            self.requests.iter().rev().take_while(|request| now < request.sent + ROW_WITHIN);
        let mut row = 0;
        for request in recent {
            row = if request.fate == Fate::Answered { row + 1 } else { 0 };
            if row >= ANSWERS_IN_A_ROW {
                return true;
            }
        }
        false
    }

    fn loss(&self) -> f32 {
        let settled = self.requests.iter().filter(|request| request.fate != Fate::Open).count();
        let lost = self.requests.iter().filter(|request| request.fate == Fate::Lost).count();
        if settled == 0 { 0.0 } else { lost as f32 / settled as f32 }
    }
}

/// Varies an interval by up to a tenth, so that many paths are not probed in step.
fn jittered(interval: Duration, rng: &mut StdRng) -> Duration {
    interval.mul_f64(rng.random_range(0.9..=1.1))
}
