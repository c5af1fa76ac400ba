//! What travels between workers on UDP port 6783: handshake messages of types 1 to 3, which are the
//! daemon's, and data messages.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | type 4 |
//! | 1 | 1 | cipher: 0 ChaCha20-Poly1305, 1 AES-256-GCM |
//! | 2 | 1 | the worker that sent it, 0 to 15 |
//! | 3 | 1 | bit 0: the transport checksum of the inner packet is not finished |
//! | 4 | 4 | receiver index, little-endian |
//! | 8 | 8 | counter, little-endian |
//! | 16 | | ciphertext, then the tag of 16 bytes |
//!
//! The header is authenticated as associated data. The plaintext is an inner IP packet, or a
//! [`Hello`], whose first byte no IP packet has.

use overnode_ebpf::map::BULK_WORKER_SLOTS;
use overnode_ebpf::wire::TYPE_DATA;
use serde::{Deserialize, Serialize};

/// Length of the header, bytes.
pub const HEADER_LEN: usize = 16;
/// Length of the tag, bytes.
pub const TAG_LEN: usize = 16;

const PARTIAL: u8 = 1;

/// What seals a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Cipher {
    /// ChaCha20-Poly1305 (RFC 8439).
    #[serde(rename = "ChaCha20-Poly1305")]
    ChaCha,
    /// AES-256-GCM (NIST SP 800-38D).
    #[serde(rename = "AES-256-GCM")]
    Aes,
}

impl Cipher {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::ChaCha, Self::Aes];

    /// The name that people know.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ChaCha => "ChaCha20-Poly1305",
            Self::Aes => "AES-256-GCM",
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// The header of a data message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What sealed it.
    pub cipher: Cipher,
    /// Which worker sent it.
    pub worker: u8,
    /// Whether the inner packet's transport checksum is still to be finished.
    pub is_partial: bool,
    /// The receiver's index of the session.
    pub receiver: u32,
    /// The nonce, never used twice by one worker in one session.
    pub counter: u64,
}

impl Header {
    /// As it lies on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = TYPE_DATA;
        bytes[1] = self.cipher as u8;
        bytes[2] = self.worker;
        bytes[3] = if self.is_partial { PARTIAL } else { 0 };
        bytes[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        bytes[8..].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }

    /// The header of a data message that may hold nothing, but is no shorter; `None` for anything
    /// else.
    pub fn from_message(message: &[u8]) -> Option<Self> {
        if message.len() < HEADER_LEN + TAG_LEN {
            return None;
        }
        let [kind, cipher, worker, flags, a, b, c, d, counter @ ..] =
            message.first_chunk::<HEADER_LEN>()?;
        if *kind != TYPE_DATA || u32::from(*worker) >= BULK_WORKER_SLOTS || flags & !PARTIAL != 0 {
            return None;
        }
        Some(Self {
            cipher: Cipher::from_number(*cipher)?,
            worker: *worker,
            is_partial: flags & PARTIAL != 0,
            receiver: u32::from_le_bytes([*a, *b, *c, *d]),
            counter: u64::from_le_bytes(*counter),
        })
    }
}

/// What workers say to each other: that they live, and how fast they open messages.
///
/// Kind 1, flags (bit 0: an answer is wanted), two zero bytes, then the speed of each cipher in the
/// order of their numbers, u32 little-endian, MiB/s. Longer ones are of later versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whether the receiver shall say hello in turn.
    pub wants_answer: bool,
    /// How fast the sender is with each cipher, MiB/s; 0 if it does not take it.
    pub speeds: [u32; Cipher::ALL.len()],
}

/// Length of a [`Hello`].
pub const HELLO_LEN: usize = 12;
const HELLO: u8 = 1;

impl Hello {
    /// As it is sealed.
    pub fn to_bytes(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[0] = HELLO;
        bytes[1] = self.wants_answer.into();
        bytes[4..8].copy_from_slice(&self.speeds[0].to_le_bytes());
        bytes[8..].copy_from_slice(&self.speeds[1].to_le_bytes());
        bytes
    }

    /// What an opened message says, if it is a hello.
    pub fn from_plaintext(plaintext: &[u8]) -> Option<Self> {
        let [HELLO, flags, _, _, a, b, c, d, e, f, g, h] = *plaintext.first_chunk()? else {
            return None;
        };
        Some(Self {
            wants_answer: flags & 1 != 0,
            speeds: [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        for cipher in Cipher::ALL {
            for is_partial in [false, true] {
                let header =
                    Header { cipher, worker: 15, is_partial, receiver: 0x0102_0304, counter: 5 };
                let mut message = header.to_bytes().to_vec();
                assert_eq!(Header::from_message(&message), None, "no tag");
                message.resize(HEADER_LEN + TAG_LEN, 0);
                assert_eq!(Header::from_message(&message), Some(header));
            }
        }
    }

    #[test]
    fn the_wire_format_stays() {
        let header =
            Header { cipher: Cipher::Aes, worker: 2, is_partial: true, receiver: 1, counter: 2 };
        assert_eq!(header.to_bytes(), [4, 1, 2, 1, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let hello = Hello { wants_answer: true, speeds: [1, 2] };
        assert_eq!(hello.to_bytes(), [1, 1, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn what_is_no_message_is_none() {
        let good =
            Header { cipher: Cipher::Aes, worker: 0, is_partial: false, receiver: 1, counter: 2 };
        for (at, value) in [(0, 3), (1, 2), (2, 16), (3, 2)] {
            let mut message = good.to_bytes().to_vec();
            message.resize(64, 0);
            message[at] = value;
            assert_eq!(Header::from_message(&message), None, "byte {at} is {value}");
        }
        assert_eq!(Header::from_message(&[]), None);
    }

    #[test]
    fn hellos_come_back_and_packets_are_none() {
        let hello = Hello { wants_answer: false, speeds: [1880, u32::MAX] };
        assert_eq!(Hello::from_plaintext(&hello.to_bytes()), Some(hello));
        assert_eq!(Hello::from_plaintext(&[&hello.to_bytes()[..], &[7; 9]].concat()), Some(hello));
        assert_eq!(Hello::from_plaintext(&hello.to_bytes()[..11]), None);
        assert_eq!(Hello::from_plaintext(&[0x45; 40]), None);
    }
}
