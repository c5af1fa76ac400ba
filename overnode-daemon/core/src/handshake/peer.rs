//! Holds the state of one peer: its sessions, the handshake in progress, and its next deadline.

use std::time::{Duration, Instant};

use super::cookie::CookieJar;
use super::noise::{Initiated, TIMESTAMP_LEN};
use super::timers::{
    CONFIRM_AGAIN, GREATEST_BACKOFF, KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME,
    REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, RESPONDER_REKEY_DELAY,
};
use super::{Activity, Initiate, PeerAddress, PeerConfig};
use overnode_types::SessionIndex;

/// Number of sessions kept besides the current and the next one. The whitepaper keeps one. A second
/// one saves packets in two cases: packets sealed before both sides initiated at once, and packets
/// sealed before an initiator that lost our response tried again.
const PREVIOUS: usize = 2;

/// Number of responses without confirmation after which we initiate as well. The responses may get
/// lost, or the initiations may be replays.
const MAX_UNCONFIRMED_RESPONSES: u8 = 2;

/// A session without its keys, which only the data plane holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    pub local_index: SessionIndex,
    pub initiator: bool,
    pub created: Instant,
    /// Age at which this side makes a new session.
    pub rekey_after: Duration,
}

impl Session {
    pub(crate) fn new(
        local_index: SessionIndex,
        initiator: bool,
        created: Instant,
        jitter: Duration,
    ) -> Self {
        let rekey_after = if initiator {
            REKEY_AFTER_TIME
        } else {
            REKEY_AFTER_TIME + RESPONDER_REKEY_DELAY + jitter
        };
        Self { local_index, initiator, created, rekey_after }
    }

    pub(crate) fn expires(&self) -> Instant {
        self.created + REJECT_AFTER_TIME
    }
}

/// An initiation that was sent and not yet answered.
pub(crate) struct Pending {
    pub local_index: SessionIndex,
    pub noise: Initiated,
    /// Whether a response that did not authenticate has been reported.
    pub bad_response_reported: bool,
    /// Whether the initiation carried a cookie.
    pub has_cookie: bool,
}

/// Attempts to reach the peer since the last completed handshake.
#[derive(Default)]
pub(crate) struct Attempts {
    /// When the first attempt of the series was made.
    first: Option<Instant>,
    last: Option<Instant>,
    /// Earliest time of the next attempt.
    not_before: Option<Instant>,
    backoff: Option<Duration>,
    /// Whether the failure has been reported.
    reported: bool,
}

pub(crate) struct Peer {
    pub config: PeerConfig,
    pub jar: CookieJar,
    /// Where to send. Follows the peer when it roams.
    pub endpoint: Option<PeerAddress>,
    /// The session that seals.
    pub current: Option<Session>,
    /// A session that we answered and the peer has not yet confirmed.
    pub next: Option<Session>,
    /// Most recently added first.
    pub previous: Vec<Session>,
    pub pending: Option<Pending>,
    pub attempts: Attempts,
    /// Greatest timestamp accepted. `consumed` is when that was.
    pub greatest: Option<[u8; TIMESTAMP_LEN]>,
    pub consumed: Option<Instant>,
    /// Whether the peer has confirmed a session, so that `greatest` is at least the peer's
    /// timestamp at that time. Before that, initiations may be replays from before our start.
    pub proven: bool,
    /// Initiations answered since the last completed handshake.
    unconfirmed_responses: u8,
    /// When to make a session if there is none.
    pub start_at: Instant,
    /// When the oldest data that is still unanswered was sent.
    unanswered: Option<Instant>,
    /// When data was received that nothing has been sent in answer to.
    unacknowledged_since: Option<Instant>,
    last_sent: Option<Instant>,
    last_received: Option<Instant>,
    /// Times of the remaining keepalives that confirm the current session to the responder.
    confirmations: Vec<Instant>,
    /// This peer's entry in the deadlines of `Handshakes`.
    pub deadline: Option<Instant>,
}

impl Peer {
    pub(crate) fn new(config: PeerConfig, now: Instant) -> Self {
        Self {
            jar: CookieJar::new(&config.public_key),
            endpoint: config.endpoint.map(PeerAddress::Direct),
            current: None,
            next: None,
            previous: Vec::new(),
            pending: None,
            attempts: Attempts::default(),
            greatest: None,
            consumed: None,
            proven: false,
            unconfirmed_responses: 0,
            start_at: now + config.initiate.delay(),
            unanswered: None,
            unacknowledged_since: None,
            last_sent: None,
            last_received: None,
            confirmations: Vec::new(),
            deadline: None,
            config,
        }
    }

    pub(crate) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.current.iter().chain(&self.next).chain(&self.previous)
    }

    /// Installs a session that the peer answered. It seals from now on. Returns the sessions that
    /// end.
    pub(crate) fn install_initiated(&mut self, session: Session, now: Instant) -> Vec<Session> {
        self.confirmations = CONFIRM_AGAIN.iter().rev().map(|after| now + *after).collect();
        self.settled(now);
        self.demote(session)
    }

    /// Installs a session that we answered. It receives now, and seals once it is confirmed.
    /// Returns the sessions that end.
    pub(crate) fn install_answered(&mut self, session: Session, now: Instant) -> Vec<Session> {
        self.heard(now);
        self.last_sent = self.last_sent.max(Some(now));
        self.unconfirmed_responses = self.unconfirmed_responses.saturating_add(1);
        // The replaced session is not withdrawn yet, because the peer may have confirmed it without
        // our knowledge.
        self.previous.splice(0..0, self.next.replace(session));
        self.surplus()
    }

    /// Handles the peer's first use of a session. Returns the sessions that end, or `None` if the
    /// session was not waiting for confirmation.
    pub(crate) fn confirm(
        &mut self,
        local_index: SessionIndex,
        leads: bool,
        now: Instant,
    ) -> Option<Vec<Session>> {
        let mut session = self.take_unconfirmed(local_index)?;
        // Both sides initiated at once, so each may end up sealing in a session that it answered.
        // One of them has to rekey on the initiator's schedule. Otherwise neither would before
        // `RESPONDER_REKEY_DELAY` ends.
        let crossed = self.current.is_some_and(|current| {
            current.initiator && apart(current.created, session.created) < REKEY_TIMEOUT
        });
        if crossed && leads {
            session.rekey_after = REKEY_AFTER_TIME;
        }
        self.confirmations.clear();
        self.proven = true;
        self.settled(now);
        Some(self.demote(session))
    }

    fn take_unconfirmed(&mut self, local_index: SessionIndex) -> Option<Session> {
        if let Some(next) = self.next.take_if(|next| next.local_index == local_index) {
            return Some(next);
        }
        let is_newer = |session: &Session| {
            self.current.is_none_or(|current| session.created > current.created)
        };
        let position = self.previous.iter().position(|session| {
            session.local_index == local_index && !session.initiator && is_newer(session)
        })?;
        Some(self.previous.remove(position))
    }

    /// Removes and returns the sessions that have expired.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Session> {
        let old = |session: &Session| session.expires() <= now;
        let mut ended = self.previous.extract_if(.., |session| old(session)).collect::<Vec<_>>();
        ended.extend(self.next.take_if(|session| old(session)));
        if let Some(session) = self.current.take_if(|session| old(session)) {
            ended.push(session);
            self.confirmations.clear();
            self.start_at = now + self.config.initiate.delay();
        }
        ended
    }

    /// Removes and returns all sessions.
    pub(crate) fn clear(&mut self) -> Vec<Session> {
        let ended = self.sessions().copied().collect();
        (self.current, self.next) = (None, None);
        self.previous.clear();
        self.confirmations.clear();
        ended
    }

    /// Takes over a session from before a restart, whose slot the caller has reserved. Returns the
    /// sessions that end.
    pub(crate) fn adopt(
        &mut self,
        session: Session,
        confirmed: bool,
        sealing: bool,
    ) -> Vec<Session> {
        if !confirmed {
            self.previous.splice(0..0, self.next.replace(session));
            return self.surplus();
        }
        if sealing {
            return self.demote(session);
        }
        self.previous.push(session);
        self.previous.sort_by_key(|session| std::cmp::Reverse(session.created));
        self.surplus()
    }

    fn demote(&mut self, session: Session) -> Vec<Session> {
        if let Some(current) = self.current.replace(session) {
            self.previous.insert(0, current);
        }
        self.surplus()
    }

    fn surplus(&mut self) -> Vec<Session> {
        self.previous.split_off(self.previous.len().min(PREVIOUS))
    }

    /// Notes that an authenticated message arrived.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.last_received = self.last_received.max(Some(now));
        self.unanswered = None;
    }

    fn settled(&mut self, now: Instant) {
        self.heard(now);
        let last = self.attempts.last;
        self.attempts = Attempts {
            last,
            not_before: last.map(|last| last + REKEY_TIMEOUT),
            ..Attempts::default()
        };
    }

    /// Takes the programs' observations.
    pub(crate) fn observe(&mut self, activity: &Activity) {
        self.last_received = self.last_received.max(activity.last_received);
        self.last_sent = self.last_sent.max(activity.last_sent);
        self.unanswered = open_since(self.unanswered, activity.last_data_sent, self.last_received);
        self.unacknowledged_since =
            open_since(self.unacknowledged_since, activity.last_data_received, self.last_sent);
        self.endpoint = activity.endpoint.map(PeerAddress::Direct).or(self.endpoint);
    }

    /// Forgets that attempts failed.
    pub(crate) fn reset_attempts(&mut self) {
        let Attempts { last, .. } = self.attempts;
        self.attempts = Attempts {
            last,
            not_before: last.map(|last| last + REKEY_TIMEOUT),
            ..Attempts::default()
        };
    }

    /// Returns when to send an initiation, if at all.
    pub(crate) fn initiation_due(&self) -> Option<Instant> {
        if matches!(self.config.initiate, Initiate::OnlyAnswer) || self.endpoint.is_none() {
            return None;
        }
        let wanted = self.wanted();
        Some(self.attempts.not_before.map_or(wanted, |not_before| wanted.max(not_before)))
    }

    /// Returns when a new session becomes desirable.
    fn wanted(&self) -> Instant {
        let aged =
            self.current.map_or(self.start_at, |current| current.created + current.rekey_after);
        let aged = match self.next {
            Some(next) if self.unconfirmed_responses <= MAX_UNCONFIRMED_RESPONSES => {
                aged.max(next.created + REKEY_TIMEOUT)
            }
            _ => aged,
        };
        let silent = self.unanswered.map(|since| since + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT);
        silent.map_or(aged, |silent| aged.min(silent))
    }

    /// Notes that an initiation was sent. Returns true if it is time to report that the peer does
    /// not answer.
    pub(crate) fn attempted(&mut self, now: Instant, jitter: Duration) -> bool {
        self.last_sent = self.last_sent.max(Some(now));
        let attempts = &mut self.attempts;
        if attempts
            .last
            .is_some_and(|last| now.saturating_duration_since(last) > 2 * GREATEST_BACKOFF)
        {
            *attempts = Attempts::default();
        }
        let first = *attempts.first.get_or_insert(now);
        attempts.last = Some(now);
        let exhausted = now.saturating_duration_since(first) >= REKEY_ATTEMPT_TIME;
        let pause = if exhausted {
            let longer = attempts.backoff.map_or(REKEY_TIMEOUT, |backoff| backoff.mul_f32(1.5));
            *attempts.backoff.insert(longer.min(GREATEST_BACKOFF))
        } else {
            REKEY_TIMEOUT
        };
        attempts.not_before = Some(now + pause + jitter);
        exhausted && !std::mem::replace(&mut attempts.reported, true)
    }

    /// Makes the next attempt due now.
    pub(crate) fn retry_now(&mut self, now: Instant) {
        self.attempts.not_before = self.attempts.not_before.map(|not_before| not_before.min(now));
    }

    /// Returns when to send a keepalive, if at all.
    pub(crate) fn keepalive_due(&self) -> Option<Instant> {
        self.current?;
        let passive = self.unacknowledged_since.map(|since| since + KEEPALIVE_TIMEOUT);
        let persistent = self.config.persistent_keepalive.map(|interval| {
            self.last_sent.max(self.last_received).unwrap_or(self.start_at) + interval
        });
        [passive, persistent, self.confirmations.last().copied()].into_iter().flatten().min()
    }

    /// Notes that a keepalive is sent.
    pub(crate) fn kept_alive(&mut self, now: Instant) {
        self.unacknowledged_since = None;
        self.last_sent = self.last_sent.max(Some(now));
        self.confirmations.retain(|due| *due > now);
    }

    /// Returns the next deadline of this peer.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let expiry = self.sessions().map(Session::expires).min();
        [expiry, self.initiation_due(), self.keepalive_due()].into_iter().flatten().min()
    }
}

/// Returns since when a message has had no reaction: `known`, or else `message`, unless `reaction`
/// came after it.
fn open_since(
    known: Option<Instant>,
    message: Option<Instant>,
    reaction: Option<Instant>,
) -> Option<Instant> {
    let open = |since: &Instant| reaction.is_none_or(|reaction| reaction < *since);
    known.filter(open).or(message.filter(open))
}

fn apart(a: Instant, b: Instant) -> Duration {
    a.saturating_duration_since(b).max(b.saturating_duration_since(a))
}
