//! Timeouts of the protocol (whitepaper section 6.1) and additional ones of this implementation.

use std::time::Duration;

/// Age at which the initiator of a session makes a new one.
pub(crate) const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age from which a session is no longer used.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Timeout of a response. Also the minimum interval between initiations to one peer.
pub(crate) const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long attempts follow each other at intervals of [`REKEY_TIMEOUT`].
pub(crate) const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Received data is answered with a keepalive after this time if nothing else was sent.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum interval between initiations of one peer. Closer ones are not answered (50 per second,
/// as in Linux).
pub(crate) const INITIATION_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum random addition to [`REKEY_TIMEOUT`], so that two peers do not stay in step.
pub(crate) const JITTER: Duration = Duration::from_millis(333);

/// How long after [`REKEY_AFTER_TIME`] the responder of a session waits for the initiator, which
/// may be gone or idle, before it makes a new session itself. Leaves room for four attempts of the
/// initiator.
pub(crate) const RESPONDER_REKEY_DELAY: Duration = Duration::from_secs(20);
/// Maximum interval between attempts once the peer has not answered for [`REKEY_ATTEMPT_TIME`].
pub(crate) const GREATEST_BACKOFF: Duration = Duration::from_secs(30);
/// When further keepalives follow the first one in a new session. Until one arrives, the responder
/// may not send in the session, and keepalives are not acknowledged.
pub(crate) const CONFIRM_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// Maximum number of initiations sent in one call of `handle_timeout`. Each costs about 0.2 ms.
pub(crate) const INITIATIONS_AT_ONCE: usize = 16;
