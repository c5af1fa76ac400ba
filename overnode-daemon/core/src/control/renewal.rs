//! Renews the keys of an established control connection without interrupting it, and limits how
//! long the current keys may be used.
//!
//! ```text
//! initiator of the connection                  responder
//!   KEYS(e, es, ss, psk)                    ->   knows the new keys
//!   knows the new keys, receives with them  <-   KEYS(e, ee, se), then sends with the new keys
//!   KEYS(), then sends with the new keys    ->   receives with the new keys
//! ```
//! A separate Noise handshake (`KKpsk0`, both sides know each other's static key) runs inside the
//! connection. Its prologue contains the hash of the previous handshake. Past keys can be recovered
//! neither from the current keys nor from the nodes' disks. An attacker who steals the current keys
//! loses access to the connection at the next renewal. In each direction, the first frame under the
//! new keys follows the last one under the old keys, so nothing is delayed, lost or reordered.
//!
//! The module is deterministic and reads no clock.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snow::{Builder, HandshakeState, StatelessTransportState};

use super::frame::MAX_HANDSHAKE_FRAME;
use super::hello::Refusal;
use overnode_types::{PublicKey, Secret};

/// Which side opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// This node dialed.
    Initiator,
    /// The other node dialed.
    Responder,
}

/// Age at which a connection gets new keys.
pub const RENEW_AFTER: Duration = Duration::from_secs(1800);
/// Number of frames in one direction that triggers an earlier renewal.
pub const RENEW_AFTER_FRAMES: u64 = 1 << 20;
/// Number of frames in one direction after which the keys are no longer used.
pub const REJECT_AFTER_FRAMES: u64 = 2 * RENEW_AFTER_FRAMES;
/// The Noise protocol of renewals.
const PATTERN: &str = "Noise_KKpsk0_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"overnode control renewal v1";
/// Divisor of the renewal interval: the other side may begin no sooner than `every / SOONEST` after
/// the last renewal. Each renewal costs four Diffie-Hellman computations.
const SOONEST: u32 = 60;

/// The transport keys of both directions.
pub type Keys = Arc<StatelessTransportState>;

/// The renewal state of one connection.
pub struct Renewal {
    role: Role,
    static_secret: Secret,
    psk: Secret,
    remote: PublicKey,
    /// Hash of the handshake that produced the current keys.
    binding: Vec<u8>,
    every: Duration,
    since: Instant,
    state: State,
}

enum State {
    /// No renewal is in progress.
    Settled,
    /// The initiator waits for the answer.
    Offered(Box<HandshakeState>),
    /// The responder sends with the new keys and waits until the initiator does, too.
    Answered(Keys),
}

/// The result of handling a frame of keys.
#[derive(Default)]
pub struct Step {
    /// The keys of the next frame that arrives.
    pub receive_by: Option<Keys>,
    /// A frame to send. All frames after it use the new keys.
    pub send: Option<Handover>,
}

/// The last frame under the old keys.
pub struct Handover {
    /// Content of the frame of keys.
    pub bytes: Vec<u8>,
    /// Keys of the frames that follow.
    pub keys: Keys,
}

impl Renewal {
    /// Creates the renewal state of a connection whose first keys date from `now`. `binding` is the
    /// hash of the handshake that made them.
    pub fn new(
        role: Role,
        (static_secret, psk): (Secret, Secret),
        remote: PublicKey,
        binding: Vec<u8>,
        every: Duration,
        now: Instant,
    ) -> Self {
        Self { role, static_secret, psk, remote, binding, every, since: now, state: State::Settled }
    }

    /// Returns when this side should begin a renewal, or `None` if it is the responder or a renewal
    /// is in progress.
    pub fn due(&self) -> Option<Instant> {
        let may_begin = self.role == Role::Initiator && matches!(self.state, State::Settled);
        may_begin.then(|| self.since + self.every)
    }

    /// Returns when the current keys become too old to use.
    pub fn expires(&self) -> Instant {
        self.since + 2 * self.every
    }

    /// Begins a renewal. Returns the content of a frame of keys, or `None` if this side may not
    /// begin now.
    pub fn begin(&mut self) -> Option<Vec<u8>> {
        self.due()?;
        let mut noise = self.start();
        let message = write(&mut noise).ok()?;
        self.state = State::Offered(Box::new(noise));
        Some(message)
    }

    /// Handles the content of a received frame of keys.
    ///
    /// # Errors
    /// If the other side violated the protocol. The connection must then be closed.
    pub fn handle(&mut self, bytes: &[u8], now: Instant) -> Result<Step, Refusal> {
        match (std::mem::replace(&mut self.state, State::Settled), self.role) {
            (State::Offered(mut noise), Role::Initiator) => {
                read(&mut noise, bytes)?;
                let keys = self.finish(*noise)?;
                self.since = now;
                let send = Some(Handover { bytes: Vec::new(), keys: Arc::clone(&keys) });
                Ok(Step { receive_by: Some(keys), send })
            }
            (State::Settled, Role::Responder) => {
                if now < self.since + self.every / SOONEST {
                    return Err(broken("requests for new keys too often"));
                }
                let mut noise = self.start();
                read(&mut noise, bytes)?;
                let bytes = write(&mut noise)?;
                let keys = self.finish(noise)?;
                self.state = State::Answered(Arc::clone(&keys));
                Ok(Step { receive_by: None, send: Some(Handover { bytes, keys }) })
            }
            (State::Answered(keys), Role::Responder) if bytes.is_empty() => {
                self.since = now;
                Ok(Step { receive_by: Some(keys), send: None })
            }
            (State::Settled | State::Offered(_) | State::Answered(_), _) => {
                Err(broken("keys that were not requested"))
            }
        }
    }

    fn start(&self) -> HandshakeState {
        let prologue = [PROLOGUE, &self.binding].concat();
        let build = || {
            let builder = Builder::new(PATTERN.parse()?)
                .local_private_key(&self.static_secret.0)?
                .remote_public_key(&self.remote.0)?
                .psk(0, &self.psk.0)?
                .prologue(&prologue)?;
            match self.role {
                Role::Initiator => builder.build_initiator(),
                Role::Responder => builder.build_responder(),
            }
        };
        build().expect("the pattern is supported and all of its keys are set")
    }

    fn finish(&mut self, noise: HandshakeState) -> Result<Keys, Refusal> {
        self.binding = noise.get_handshake_hash().to_vec();
        let keys = noise.into_stateless_transport_mode();
        keys.map(Arc::new).map_err(|_| broken("an incomplete handshake"))
    }
}

impl fmt::Debug for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Renewal")
            .field("role", &self.role)
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

fn write(noise: &mut HandshakeState) -> Result<Vec<u8>, Refusal> {
    let mut message = vec![0; MAX_HANDSHAKE_FRAME];
    let length = noise.write_message(&[], &mut message).map_err(|_| broken("an invalid key"))?;
    message.truncate(length);
    Ok(message)
}

fn read(noise: &mut HandshakeState, message: &[u8]) -> Result<(), Refusal> {
    let mut payload = [0; MAX_HANDSHAKE_FRAME];
    match noise.read_message(message, &mut payload) {
        Ok(0) => Ok(()),
        Ok(_) | Err(_) => Err(broken("keys that do not authenticate")),
    }
}

fn broken(what: &str) -> Refusal {
    Refusal::Misconduct(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::key::public_key;

    const EVERY: Duration = Duration::from_secs(60);

    fn pair(psks: [u8; 2], bindings: [u8; 2], now: Instant) -> [Renewal; 2] {
        let secrets = [Secret([1; 32]), Secret([2; 32])];
        [0, 1].map(|at: usize| {
            let role = [Role::Initiator, Role::Responder][at];
            let own = (secrets[at].clone(), Secret([psks[at]; 32]));
            Renewal::new(
                role,
                own,
                public_key(&secrets[1 - at]),
                vec![bindings[at]; 32],
                EVERY,
                now,
            )
        })
    }

    /// Whether one frame in each direction decrypts.
    fn work(by_initiator: &Keys, by_responder: &Keys) -> bool {
        [(by_initiator, by_responder), (by_responder, by_initiator)].into_iter().all(
            |(from, to)| {
                let (mut sealed, mut opened) = ([0; 20], [0; 4]);
                from.write_message(0, b"text", &mut sealed).unwrap();
                to.read_message(0, &sealed, &mut opened).is_ok() && &opened == b"text"
            },
        )
    }

    #[test]
    fn both_sides_get_new_keys_each_time() {
        let mut now = Instant::now();
        let [mut one, mut two] = pair([9; 2], [7; 2], now);
        let mut before: Option<Keys> = None;
        for _ in 0..3 {
            now += EVERY;
            assert_eq!((one.due(), two.due()), (Some(now), None));
            let offer = one.begin().unwrap();
            assert_eq!((one.due(), one.begin()), (None, None), "only one renewal at a time");
            let Step { receive_by: None, send: Some(answer) } = two.handle(&offer, now).unwrap()
            else {
                panic!("the responder must still receive with the old keys");
            };
            let Step { receive_by: Some(keys), send: Some(last) } =
                one.handle(&answer.bytes, now).unwrap()
            else {
                panic!("the initiator must switch to the new keys at once");
            };
            assert!(work(&keys, &answer.keys));
            assert!(before.as_ref().is_none_or(|before| !work(before, &answer.keys)));
            let Step { receive_by: Some(_), send: None } = two.handle(&last.bytes, now).unwrap()
            else {
                panic!("the renewal must be complete");
            };
            assert_eq!((one.expires(), two.expires()), (now + 2 * EVERY, now + 2 * EVERY));
            before = Some(keys);
        }
    }

    #[test]
    fn another_token_or_connection_or_a_flipped_bit_is_refused() {
        let now = Instant::now();
        let then = now + EVERY;
        for (psks, bindings) in [([9, 8], [7, 7]), ([9, 9], [7, 6])] {
            let [mut one, mut two] = pair(psks, bindings, now);
            assert!(two.handle(&one.begin().unwrap(), then).is_err());
        }
        let offer = pair([9; 2], [7; 2], now)[0].begin().unwrap();
        for bit in 0..offer.len() * 8 {
            let [mut one, mut two] = pair([9; 2], [7; 2], now);
            let mut offer = one.begin().unwrap();
            offer[bit / 8] ^= 1 << (bit % 8);
            // X25519 ignores the topmost bit of a point, but the handshake hash covers it.
            assert!(two.handle(&offer, then).is_err(), "bit {bit}");
            assert!(one.handle(&offer, then).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_side_that_renews_too_soon_or_out_of_turn_is_disconnected() {
        let now = Instant::now();
        let [mut one, mut two] = pair([9; 2], [7; 2], now);
        assert!(one.handle(&[], now + EVERY).is_err(), "there is no offer to answer");
        assert!(two.handle(&one.begin().unwrap(), now + EVERY / 61).is_err(), "too soon");
        let [mut one, mut two] = pair([9; 2], [7; 2], now);
        let offer = one.begin().unwrap();
        two.handle(&offer, now + EVERY).unwrap();
        assert!(two.handle(&offer, now + EVERY).is_err(), "an offer in place of the final message");
        let [mut one, _] = pair([9; 2], [7; 2], now);
        one.begin().unwrap();
        assert!(one.handle(&offer, now + EVERY).is_err(), "an offer is not an answer");
    }
}
