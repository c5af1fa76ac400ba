//! The protocol's times (whitepaper section 6.1), and ours.

use std::time::Duration;

/// Age at which the initiator of a session makes a new one.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age from which on a session is not used.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Time that a response may take; no two initiations to one peer are closer.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long attempts follow each other at [`REKEY_TIMEOUT`].
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Silence after which received data is answered with an empty message.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Initiations of one peer that are closer than this are not answered (fifty a second, as in
/// Linux).
pub const INITIATION_INTERVAL: Duration = Duration::from_millis(20);
/// Greatest addition to [`REKEY_TIMEOUT`], so that two peers do not stay in step.
pub const JITTER: Duration = Duration::from_millis(333);

/// How long after [`REKEY_AFTER_TIME`] the responder of a session waits for the initiator, which
/// may be gone or idle, before it makes a new one itself. Room for four attempts of the initiator.
pub const RESPONDER_PATIENCE: Duration = Duration::from_secs(20);
/// Greatest time between attempts when nobody has answered for [`REKEY_ATTEMPT_TIME`].
pub const GREATEST_BACKOFF: Duration = Duration::from_secs(30);
/// After the first keepalive under a new session, more follow after these times: until one arrives,
/// the responder may not send under the session, and it answers none.
pub const CONFIRM_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// Initiations sent in one call of `handle_timeout`; each costs some 0.2 ms.
pub const INITIATIONS_AT_ONCE: usize = 16;
