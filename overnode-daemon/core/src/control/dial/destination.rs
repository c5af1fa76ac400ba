//! A destination to dial: its state and the pauses between attempts.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;

use super::{AttemptId, FIRST_PAUSE, LONGEST_PAUSE, PAUSE_GROWTH};
use overnode_types::NodeId;

#[derive(Clone, Debug)]
pub(super) struct Destination {
    /// Addresses from gossip, or those that the name last resolved to.
    pub addresses: Vec<SocketAddr>,
    pub state: State,
    /// The node that answered last.
    pub leads_to: Option<NodeId>,
    pub last_error: Option<(String, Instant)>,
    head_start: Duration,
    pause: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits until this time. While another connection makes an attempt unnecessary, it also waits
    /// for the loss of that connection.
    Waiting {
        until: Instant,
    },
    Dialing(AttemptId),
    /// The destination leads to this node and is not dialed again.
    Myself,
}

impl Destination {
    /// Creates a destination that is first dialed after `head_start`. [`Self::try_at_once`] waits
    /// for `head_start`, too.
    pub(crate) fn new(addresses: Vec<SocketAddr>, head_start: Duration, now: Instant) -> Self {
        Self {
            addresses,
            state: State::Waiting { until: now + head_start },
            leads_to: None,
            last_error: None,
            head_start,
            pause: FIRST_PAUSE,
        }
    }

    pub(crate) fn is_due(&self, now: Instant) -> bool {
        matches!(self.state, State::Waiting { until } if until <= now)
    }

    /// Resets the pause, and also forgets that the destination led to this node, because names can
    /// move.
    pub(crate) fn try_at_once(&mut self, now: Instant) {
        self.pause = FIRST_PAUSE;
        match self.state {
            State::Dialing(_) => {}
            State::Waiting { .. } | State::Myself => {
                self.state = State::Waiting { until: now + self.head_start }
            }
        }
    }

    /// Does not reset the pause: only a long-lived connection does.
    pub(crate) fn handle_established(&mut self, peer: NodeId, now: Instant) {
        self.leads_to = Some(peer);
        if let State::Dialing(_) = self.state {
            self.state = State::Waiting { until: now };
        }
    }

    pub(crate) fn handle_failed(
        &mut self,
        why: String,
        is_myself: bool,
        now: Instant,
        rng: &mut StdRng,
    ) {
        self.leads_to = None;
        if is_myself {
            self.state = State::Myself;
            self.last_error = None;
            return;
        }
        self.last_error = Some((why, now));
        self.wait(now, rng);
    }

    pub(crate) fn handle_lost(
        &mut self,
        why: &str,
        was_long_lived: bool,
        now: Instant,
        rng: &mut StdRng,
    ) {
        self.last_error = Some((why.to_owned(), now));
        match self.state {
            State::Dialing(_) => {}
            State::Waiting { .. } | State::Myself if was_long_lived => self.try_at_once(now),
            State::Waiting { .. } | State::Myself => self.wait(now, rng),
        }
    }

    fn wait(&mut self, now: Instant, rng: &mut StdRng) {
        let jittered = self.pause.mul_f64(rng.random_range(0.5..1.5)).min(LONGEST_PAUSE);
        self.state = State::Waiting { until: now + jittered };
        self.pause = self.pause.mul_f64(PAUSE_GROWTH).min(LONGEST_PAUSE);
    }
}
