//! Filters datagrams before the handshakes: judges each by what can be checked without a
//! Diffie-Hellman computation, before it enters any queue. A refused datagram costs one hash and
//! nothing else.
//!
//! The receiver of datagrams owns a gate. The gate shares only one thing with the
//! [handshakes](super::Handshakes): the receiver indices for which this side awaits an answer. It
//! does no I/O and reads no clock.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use overnode_ebpf::map::SESSION_SLOTS;
use overnode_ebpf::reason::Reason;
use rand::rngs::StdRng;

use super::cookie::{Class, LoadGuard, Verdict};
use super::message::{self, BadMessage, Message};
use super::{Counters, PeerAddress};
use overnode_types::{PublicKey, SessionIndex};

/// Judges datagrams.
pub struct Gate {
    guard: LoadGuard,
    awaited: Awaited,
    rng: StdRng,
    counters: Arc<Mutex<Counters>>,
}

/// The decision about a datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgment {
    /// Pass it to the handshakes.
    Admit(Priority),
    /// Send this cookie reply to its sender instead. The reply is shorter than the message.
    Reply(Vec<u8>),
    /// Drop it. It has been counted.
    Drop(Reason),
}

/// The queue that an admitted datagram waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// From an address where a peer is expected, or an awaited answer.
    High,
    /// From any other address.
    Low,
}

impl Gate {
    /// Creates the gate of the node with this public key for datagrams to the given port. `rng`
    /// draws the secret behind its cookies.
    pub fn new(own: &PublicKey, port: u16, awaited: Awaited, rng: StdRng) -> Self {
        Self { guard: LoadGuard::new(own, port), awaited, rng, counters: Arc::default() }
    }

    /// Judges a datagram from `from`. `is_peer` tells whether a peer is expected at that address.
    /// It is called only for initiations whose first MAC is valid.
    pub fn judge(
        &mut self,
        now: Instant,
        from: PeerAddress,
        bytes: &[u8],
        is_peer: impl FnOnce() -> bool,
    ) -> Judgment {
        let mut priority = Priority::High;
        let verdict = match message::parse(bytes) {
            Ok(Message::Initiation(initiation)) => {
                let class = || {
                    if is_peer() {
                        return Class::Peer;
                    }
                    priority = Priority::Low;
                    Class::Stranger
                };
                self.guard.judge(
                    &initiation.macs,
                    initiation.sender,
                    from,
                    class,
                    now,
                    &mut self.rng,
                )
            }
            Ok(Message::Response(response)) => {
                if !self.awaited.has(response.receiver) {
                    return self.refuse(Reason::UnknownIndex, |counters| &mut counters.unexpected);
                }
                let class = || Class::Answer;
                self.guard.judge(&response.macs, response.sender, from, class, now, &mut self.rng)
            }
            Ok(Message::CookieReply(reply)) => {
                if !self.awaited.has(reply.receiver) {
                    return self.refuse(Reason::UnknownIndex, |counters| &mut counters.unexpected);
                }
                Verdict::Process
            }
            Err(BadMessage::Malformed) => {
                return self.refuse(Reason::Malformed, |counters| &mut counters.malformed);
            }
            Err(BadMessage::Data) => {
                return self.refuse(Reason::Malformed, |counters| &mut counters.data);
            }
        };
        match verdict {
            Verdict::Process => Judgment::Admit(priority),
            Verdict::Demand(reply) => {
                self.count(|counters| &mut counters.cookies_demanded);
                Judgment::Reply(reply)
            }
            Verdict::Stranger => self.refuse(Reason::Forged, |counters| &mut counters.strangers),
            Verdict::Limited => self.refuse(Reason::Forged, |counters| &mut counters.limited),
        }
    }

    /// Counts a datagram that was admitted but found its queue full.
    pub fn overflowed(&mut self) {
        self.count(|counters| &mut counters.limited);
    }

    /// Counts a relay header from an address that is not a node's.
    pub fn refused_relay(&mut self) {
        self.count(|counters| &mut counters.foreign_relay);
    }

    /// Returns the gate's counters, which the gate keeps updating.
    pub fn counters(&self) -> Arc<Mutex<Counters>> {
        Arc::clone(&self.counters)
    }

    #[cfg(test)]
    pub(super) fn set_threshold(&mut self, threshold: u32) {
        self.guard.set_threshold(threshold);
    }

    fn refuse(&mut self, reason: Reason, counter: fn(&mut Counters) -> &mut u64) -> Judgment {
        self.count(counter);
        Judgment::Drop(reason)
    }

    fn count(&mut self, counter: fn(&mut Counters) -> &mut u64) {
        *counter(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner)) += 1;
    }
}

/// The receiver indices for which this side awaits answers. They are the sender indices of the
/// handshake messages that it has sent, the latest one per slot. An off-path attacker has to guess
/// 32 bits.
#[derive(Clone)]
pub struct Awaited(Arc<[AtomicU32]>);

impl Default for Awaited {
    fn default() -> Self {
        Self((0..SESSION_SLOTS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Awaited {
    /// Notes a handshake message that is being sent.
    pub fn note(&self, message: &[u8]) {
        let sender = match message::parse(message) {
            Ok(Message::Initiation(initiation)) => initiation.sender,
            Ok(Message::Response(response)) => response.sender,
            Ok(Message::CookieReply(_)) | Err(_) => return,
        };
        if let Some(slot) = self.slot(sender) {
            slot.store(sender.get(), Ordering::Relaxed);
        }
    }

    /// Whether an answer at this index is awaited. Slot 0 is never allocated, so 0 stands for none.
    fn has(&self, receiver: SessionIndex) -> bool {
        receiver.get() != 0
            && self
                .slot(receiver)
                .is_some_and(|slot| slot.load(Ordering::Relaxed) == receiver.get())
    }

    fn slot(&self, index: SessionIndex) -> Option<&AtomicU32> {
        self.0.get((index.get() % SESSION_SLOTS) as usize)
    }
}

#[cfg(test)]
mod tests {
    use overnode_ebpf::wire::DATA_PORT;
    use rand::{Rng, SeedableRng};

    use super::super::cookie::CookieJar;
    use super::*;

    const OWN: PublicKey = PublicKey([7; 32]);

    fn gate() -> Gate {
        Gate::new(&OWN, DATA_PORT, Awaited::default(), StdRng::seed_from_u64(1))
    }

    fn from() -> PeerAddress {
        PeerAddress::Direct(([192, 0, 2, 1], 6784).into())
    }

    fn response(receiver: SessionIndex, now: Instant) -> Vec<u8> {
        let mut bytes =
            message::response(SessionIndex::new(5), receiver, &[1; message::RESPONSE_NOISE_LEN]);
        CookieJar::new(&OWN).seal(&mut bytes, SessionIndex::new(5), now);
        bytes
    }

    #[test]
    fn garbage_of_every_length_and_type_is_dropped() {
        let (mut gate, now, mut rng) = (gate(), Instant::now(), StdRng::seed_from_u64(2));
        let mut dropped = 0;
        for length in 0..300 {
            for kind in [0, 1, 2, 3, 4, 5, 255] {
                let mut bytes = vec![0; length];
                rng.fill(&mut bytes[..]);
                if let Some(header) = bytes.first_chunk_mut() {
                    *header = [kind, 0, 0, 0];
                }
                let judgment = gate.judge(now, from(), &bytes, || {
                    panic!("must not be called for malformed datagrams")
                });
                assert!(matches!(judgment, Judgment::Drop(_)), "{judgment:?}");
                dropped += 1;
            }
        }
        let counters = *gate.counters().lock().unwrap();
        assert_eq!(
            counters.named().map(|(_, count)| count).sum::<u64>(),
            dropped,
            "each is counted once"
        );
    }

    #[test]
    fn initiations_from_known_endpoints_have_priority() {
        let (mut gate, now) = (gate(), Instant::now());
        let mut bytes =
            message::initiation(SessionIndex::new(5), &[1; message::INITIATION_NOISE_LEN]);
        CookieJar::new(&OWN).seal(&mut bytes, SessionIndex::new(5), now);
        assert_eq!(gate.judge(now, from(), &bytes, || true), Judgment::Admit(Priority::High));
        assert_eq!(gate.judge(now, from(), &bytes, || false), Judgment::Admit(Priority::Low));
    }

    #[test]
    fn only_awaited_answers_are_admitted() {
        let (mut gate, now) = (gate(), Instant::now());
        let index = SessionIndex::new(0x1234_5678);
        let sent = message::initiation(index, &[1; message::INITIATION_NOISE_LEN]);
        let is_peer = || panic!("answers are recognized by their index");
        let cookie = message::cookie_reply(index, &[1; 24], &[1; 32]);
        let unasked = Judgment::Drop(Reason::UnknownIndex);
        assert_eq!(gate.judge(now, from(), &response(index, now), is_peer), unasked.clone());
        assert_eq!(gate.judge(now, from(), &cookie, is_peer), unasked.clone());
        gate.awaited.clone().note(&sent);
        assert_eq!(
            gate.judge(now, from(), &response(index, now), is_peer),
            Judgment::Admit(Priority::High)
        );
        assert_eq!(gate.judge(now, from(), &cookie, is_peer), Judgment::Admit(Priority::High));
        for other in [0, 0x678, 0x1234_5679, 0x1234_4678] {
            assert_eq!(
                gate.judge(now, from(), &response(SessionIndex::new(other), now), is_peer),
                unasked.clone()
            );
        }
        assert_eq!(gate.counters().lock().unwrap().unexpected, 6);
    }

    #[test]
    fn a_gate_can_be_sent_to_another_thread() {
        fn is_send<T: Send>(_: &T) {}
        is_send(&gate());
    }
}
