//! Holds the keys of the bulk path. Each handshake yields one key per direction, worker and cipher.
//!
//! The handshake's two secrets seal nothing themselves. HKDF-SHA256 (RFC 5869) derives one key from
//! each for every pair of cipher and sending worker. So no key is used with two ciphers, and no two
//! workers draw counters for one key. The keys exist only in the memory of the workers' process.
//! After a restart the process makes new handshakes, so no counter is drawn twice.

use std::cell::UnsafeCell;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use overnode_ebpf::map::BULK_WORKER_SLOTS;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::Window;
use overnode_ebpf::wire::REJECT_AFTER_MESSAGES;
use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::control::Keys;
use super::message::{HEADER_LEN, Header, TAG_LEN};
use overnode_api::bulk::Cipher;
use overnode_core::control::key;
use overnode_types::{BootTime, PeerIndex, Secret, SessionIndex};

const WORKERS: usize = BULK_WORKER_SLOTS as usize;
/// Maximum number of messages sealed with one key. This is a backstop, since sessions are renewed
/// every two minutes, long before they reach it. It is not derived from a limit of AES-256-GCM: RFC
/// 9001, appendix B.1, puts the confidentiality limit at 2^28 packets of up to 2^11 bytes, or 2^23
/// packets of up to 2^16 bytes (attacker advantage 2^-57).
const MAX_MESSAGES: u64 = 1 << 36;
const _: () = assert!(MAX_MESSAGES < REJECT_AFTER_MESSAGES);

/// A session with a peer.
pub struct Session {
    /// The peer.
    pub peer: PeerIndex,
    /// Receiver index of messages to this node.
    pub local_index: SessionIndex,
    /// Receiver index of messages to the peer.
    pub remote_index: SessionIndex,
    /// When the handshake completed.
    pub created: BootTime,
    /// When the session expires. After that it neither seals nor opens.
    pub expires: BootTime,
    /// True if this node initiated the handshake.
    pub is_initiator: bool,
    is_confirmed: AtomicBool,
    tx: Secret,
    rx: Secret,
    sending: [Sending; WORKERS],
    receiving: [OnceLock<Box<Receiving>>; WORKERS],
}

/// Sealing state of one worker.
#[derive(Default)]
struct Sending {
    keys: [OnceLock<Box<LessSafeKey>>; Cipher::ALL.len()],
    counters: [AtomicU64; Cipher::ALL.len()],
}

/// Opening state for one worker of the peer.
struct Receiving {
    keys: [OnceLock<Box<LessSafeKey>>; Cipher::ALL.len()],
    windows: [SharedWindow; Cipher::ALL.len()],
}

/// A replay window that several threads use concurrently.
struct SharedWindow(UnsafeCell<Window>);

// SAFETY: the window is only accessed through `Window::check` and `Window::accept`, which are
// designed for concurrent use by several CPUs.
unsafe impl Sync for SharedWindow {}
// SAFETY: the window is plain data.
unsafe impl Send for SharedWindow {}

impl SharedWindow {
    fn check(&self, counter: u64) -> Result<(), Reason> {
        // SAFETY: see the `Sync` implementation.
        unsafe { Window::check(self.0.get(), counter) }
    }

    fn accept(&self, counter: u64) -> Result<(), Reason> {
        // SAFETY: see the `Sync` implementation.
        unsafe { Window::accept(self.0.get(), counter) }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.peer)
            .field("index", &self.local_index)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Creates a session that has sealed nothing yet.
    pub fn new(keys: &Keys) -> Self {
        Self {
            peer: PeerIndex(keys.peer),
            local_index: keys.local_index,
            remote_index: keys.remote_index,
            created: keys.created_ns,
            expires: keys.expires_ns,
            is_initiator: keys.is_initiator,
            is_confirmed: keys.is_initiator.into(),
            tx: Secret(keys.tx),
            rx: Secret(keys.rx),
            sending: std::array::from_fn(|_| Sending::default()),
            receiving: std::array::from_fn(|_| OnceLock::new()),
        }
    }

    /// Returns true if the peer has proven that it has the keys. Nothing may be sealed before.
    pub fn is_confirmed(&self) -> bool {
        self.is_confirmed.load(Ordering::Acquire)
    }

    /// Records that the peer has proven that it has the keys. Returns true the first time.
    pub fn confirm(&self) -> bool {
        !self.is_confirmed.swap(true, Ordering::AcqRel)
    }

    /// Seals `message` in place. It consists of room for the header, the plaintext, and room for
    /// the tag.
    ///
    /// # Errors
    /// Returns [`Reason::NoSession`] if the peer has not yet proven that it has the keys,
    /// [`Reason::Expired`] if the session has expired, [`Reason::Exhausted`] if the key has sealed
    /// too many messages, and [`Reason::Malformed`] if the worker's number is out of range or there
    /// is no room.
    pub fn seal(
        &self,
        worker: u8,
        cipher: Cipher,
        is_partial: bool,
        message: &mut [u8],
        now: BootTime,
    ) -> Result<(), Reason> {
        if !self.is_confirmed() {
            return Err(Reason::NoSession);
        }
        if now >= self.expires {
            return Err(Reason::Expired);
        }
        let sending = self.sending.get(usize::from(worker)).ok_or(Reason::Malformed)?;
        let key = sending.keys[cipher as usize].get_or_init(|| derive(&self.tx, cipher, worker));
        let counter = next_counter(&sending.counters[cipher as usize])?;
        let header =
            Header { cipher, worker, is_partial, receiver: self.remote_index, counter }.to_bytes();
        let (header_bytes, rest) =
            message.split_first_chunk_mut::<HEADER_LEN>().ok_or(Reason::Malformed)?;
        let (plaintext, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(Reason::Malformed)?;
        *header_bytes = header;
        let computed_tag = key
            .seal_in_place_separate_tag(nonce(counter), Aad::from(header), plaintext)
            .map_err(|_| Reason::Malformed)?;
        tag.copy_from_slice(computed_tag.as_ref());
        Ok(())
    }

    /// Opens a message in place and returns its plaintext.
    ///
    /// # Errors
    /// Returns [`Reason::Expired`] if the session has expired, [`Reason::Replayed`] or
    /// [`Reason::TooOld`] from the replay window of that worker and cipher, [`Reason::Forged`] if
    /// authentication fails, and [`Reason::Malformed`] if the worker's number is out of range or
    /// the message is too short.
    pub fn open<'a>(
        &self,
        header: &Header,
        message: &'a mut [u8],
        now: BootTime,
    ) -> Result<&'a mut [u8], Reason> {
        if now >= self.expires {
            return Err(Reason::Expired);
        }
        let receiving = self.receiving.get(usize::from(header.worker)).ok_or(Reason::Malformed)?;
        let receiving = receiving.get_or_init(Receiving::new);
        let cipher = header.cipher as usize;
        let window = &receiving.windows[cipher];
        window.check(header.counter)?;
        let key =
            receiving.keys[cipher].get_or_init(|| derive(&self.rx, header.cipher, header.worker));
        let (aad, sealed) =
            message.split_first_chunk_mut::<HEADER_LEN>().ok_or(Reason::Malformed)?;
        let opened = key
            .open_in_place(nonce(header.counter), Aad::from(&*aad), sealed)
            .map_err(|_| Reason::Forged)?;
        window.accept(header.counter)?;
        Ok(opened)
    }
}

impl Receiving {
    fn new() -> Box<Self> {
        Box::new(Self {
            keys: std::array::from_fn(|_| OnceLock::new()),
            windows: std::array::from_fn(|_| SharedWindow(UnsafeCell::new(Window::new()))),
        })
    }
}

/// Returns the next counter. No two calls return the same value.
fn next_counter(counter: &AtomicU64) -> Result<u64, Reason> {
    // Checked before the increment, so that an exhausted counter stops there and can never wrap
    // around.
    if counter.load(Ordering::Relaxed) >= MAX_MESSAGES {
        return Err(Reason::Exhausted);
    }
    let drawn = counter.fetch_add(1, Ordering::Relaxed);
    if drawn >= MAX_MESSAGES { Err(Reason::Exhausted) } else { Ok(drawn) }
}

fn derive(secret: &Secret, cipher: Cipher, worker: u8) -> Box<LessSafeKey> {
    let algorithm = match cipher {
        Cipher::ChaCha => &CHACHA20_POLY1305,
        Cipher::Aes => &AES_256_GCM,
    };
    let key = key::bulk_key(secret, cipher as u8, worker);
    Box::new(LessSafeKey::new(
        UnboundKey::new(algorithm, &key.0).expect("both ciphers take keys of 32 bytes"),
    ))
}

/// Returns the nonce: 32 zero bits and the little-endian counter, as in WireGuard.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: BootTime = BootTime::from_nanos(1);
    const END: BootTime = BootTime::from_nanos(1000);

    fn pair() -> (Session, Session) {
        let make = |tx: u8, rx: u8, is_initiator| {
            Session::new(&Keys {
                peer: 1,
                local_index: SessionIndex::new(rx.into()),
                remote_index: SessionIndex::new(tx.into()),
                tx: [tx; 32],
                rx: [rx; 32],
                created_ns: START,
                expires_ns: END,
                is_initiator,
            })
        };
        (make(1, 2, true), make(2, 1, false))
    }

    fn sealed(session: &Session, worker: u8, cipher: Cipher, text: &[u8]) -> Vec<u8> {
        let mut message = [&[0; HEADER_LEN], text, &[0; TAG_LEN]].concat();
        session.seal(worker, cipher, false, &mut message, START).unwrap();
        message
    }

    fn open(session: &Session, message: &[u8]) -> Result<Vec<u8>, Reason> {
        let mut message = message.to_vec();
        let header = Header::from_message(&message).ok_or(Reason::Malformed)?;
        session.open(&header, &mut message, START).map(|text| text.to_vec())
    }

    #[test]
    fn each_worker_and_cipher_has_its_own_key_and_window() {
        let (a, b) = pair();
        let mut seen = std::collections::BTreeSet::new();
        for worker in 0..16 {
            for cipher in Cipher::ALL {
                let message = sealed(&a, worker, cipher, b"the same text every time");
                assert!(
                    seen.insert(message[HEADER_LEN..].to_vec()),
                    "two keys gave the same ciphertext"
                );
                assert_eq!(open(&b, &message).unwrap(), b"the same text every time");
                assert_eq!(open(&b, &message), Err(Reason::Replayed));
            }
        }
    }

    #[test]
    fn nothing_is_sealed_before_the_peer_has_proved_its_identity() {
        let (_, b) = pair();
        let mut message = [0; 64];
        assert_eq!(b.seal(0, Cipher::Aes, false, &mut message, START), Err(Reason::NoSession));
        assert!(b.confirm() && !b.confirm());
        assert_eq!(b.seal(0, Cipher::Aes, false, &mut message, START), Ok(()));
        assert_eq!(b.seal(16, Cipher::Aes, false, &mut message, START), Err(Reason::Malformed));
    }

    #[test]
    fn a_session_expires_or_exhausts_its_counters() {
        let (a, b) = pair();
        let message = sealed(&a, 0, Cipher::ChaCha, b"text");
        let header = Header::from_message(&message).unwrap();
        assert_eq!(b.open(&header, &mut message.clone(), END), Err(Reason::Expired));
        let mut more = [0; 64];
        assert_eq!(a.seal(0, Cipher::ChaCha, false, &mut more, END), Err(Reason::Expired));
        a.sending[0].counters[0].store(MAX_MESSAGES - 1, Ordering::Relaxed);
        assert_eq!(a.seal(0, Cipher::ChaCha, false, &mut more, START), Ok(()));
        for _ in 0..3 {
            assert_eq!(a.seal(0, Cipher::ChaCha, false, &mut more, START), Err(Reason::Exhausted));
        }
        assert_eq!(a.sending[0].counters[0].load(Ordering::Relaxed), MAX_MESSAGES);
    }

    #[test]
    fn every_bit_is_authenticated() {
        let (a, b) = pair();
        for cipher in Cipher::ALL {
            let message = sealed(&a, 3, cipher, b"a packet");
            for bit in 0..message.len() * 8 {
                let mut changed = message.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                // The receiver index selects the session, and this test has only one.
                let is_index = (32..64).contains(&bit);
                assert!(open(&b, &changed).is_err(), "bit {bit} {is_index}");
            }
            for len in 0..message.len() {
                assert!(open(&b, &message[..len]).is_err(), "{len} bytes");
            }
            assert_eq!(open(&b, &message).unwrap(), b"a packet");
        }
    }

    #[test]
    fn a_message_is_not_accepted_in_the_other_direction() {
        let (a, b) = pair();
        b.confirm();
        let message = sealed(&b, 0, Cipher::Aes, b"text");
        assert_eq!(open(&b, &message), Err(Reason::Forged));
        assert_eq!(open(&a, &message).unwrap(), b"text");
    }
}
