//! Encodes the messages between workers on UDP port 6783: data messages, which this module covers,
//! and the daemon's handshake messages of types 1 to 3.
//!
//! | offset | bytes | contents |
//! | --- | --- | --- |
//! | 0 | 1 | type 4 |
//! | 1 | 1 | cipher: 0 ChaCha20-Poly1305, 1 AES-256-GCM |
//! | 2 | 1 | sending worker, 0 to 15 |
//! | 3 | 1 | bit 0: the transport checksum of the inner packet is partial |
//! | 4 | 4 | receiver index, little-endian |
//! | 8 | 8 | counter, little-endian |
//! | 16 | | ciphertext, then the tag of 16 bytes |
//!
//! The header is authenticated as associated data. The plaintext is an inner IP packet or a
//! [`Hello`], whose first byte occurs in no IP packet.

use overnode_api::bulk::Cipher;
use overnode_ebpf::map::BULK_WORKER_SLOTS;
use overnode_ebpf::wire::TYPE_DATA;
use overnode_types::SessionIndex;

/// Length of the header, in bytes.
pub const HEADER_LEN: usize = 16;
/// Length of the tag, in bytes.
pub const TAG_LEN: usize = 16;

const PARTIAL: u8 = 1;

/// The header of a data message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cipher that sealed the message.
    pub cipher: Cipher,
    /// Sending worker, 0 to 15.
    pub worker: u8,
    /// True if the transport checksum of the inner packet is partial.
    pub is_partial: bool,
    /// Receiver index of the session.
    pub receiver: SessionIndex,
    /// Counter that the nonce is made of. A worker never uses it twice in one session with one
    /// cipher.
    pub counter: u64,
}

impl Header {
    /// Encodes the header.
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

    /// Decodes the header of a data message. The plaintext may be empty. Returns `None` for
    /// malformed or other messages.
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
            receiver: SessionIndex::from_le_bytes([*a, *b, *c, *d]),
            counter: u64::from_le_bytes(*counter),
        })
    }
}

/// A greeting between workers: shows that the sender is alive, and how fast it opens messages.
///
/// Encoding: kind 1, flags (bit 0: an answer is wanted), two zero bytes, then the speed of each
/// cipher ordered by number, as little-endian u32 in MiB/s. Later versions may append more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// True if the receiver should answer with a hello.
    pub wants_answer: bool,
    /// Speed of the sender with each cipher, in MiB/s; 0 if it does not accept the cipher.
    pub speeds: [u32; Cipher::ALL.len()],
}

/// Length of a [`Hello`], in bytes.
pub const HELLO_LEN: usize = 12;
const HELLO: u8 = 1;

impl Hello {
    /// Encodes the hello as plaintext.
    pub fn to_bytes(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[0] = HELLO;
        bytes[1] = self.wants_answer.into();
        bytes[4..8].copy_from_slice(&self.speeds[0].to_le_bytes());
        bytes[8..].copy_from_slice(&self.speeds[1].to_le_bytes());
        bytes
    }

    /// Decodes a plaintext. Returns `None` if it is not a hello.
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
    fn headers_round_trip() {
        for cipher in Cipher::ALL {
            for is_partial in [false, true] {
                let header = Header {
                    cipher,
                    worker: 15,
                    is_partial,
                    receiver: SessionIndex::new(0x0102_0304),
                    counter: 5,
                };
                let mut message = header.to_bytes().to_vec();
                assert_eq!(Header::from_message(&message), None, "no tag");
                message.resize(HEADER_LEN + TAG_LEN, 0);
                assert_eq!(Header::from_message(&message), Some(header));
            }
        }
    }

    #[test]
    fn the_wire_format_is_stable() {
        let header = Header {
            cipher: Cipher::Aes,
            worker: 2,
            is_partial: true,
            receiver: SessionIndex::new(1),
            counter: 2,
        };
        assert_eq!(header.to_bytes(), [4, 1, 2, 1, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let hello = Hello { wants_answer: true, speeds: [1, 2] };
        assert_eq!(hello.to_bytes(), [1, 1, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn invalid_headers_are_refused() {
        let good = Header {
            cipher: Cipher::Aes,
            worker: 0,
            is_partial: false,
            receiver: SessionIndex::new(1),
            counter: 2,
        };
        for (at, value) in [(0, 3), (1, 2), (2, 16), (3, 2)] {
            let mut message = good.to_bytes().to_vec();
            message.resize(64, 0);
            message[at] = value;
            assert_eq!(Header::from_message(&message), None, "byte {at} is {value}");
        }
        assert_eq!(Header::from_message(&[]), None);
    }

    #[test]
    fn hellos_round_trip_and_packets_are_not_hellos() {
        let hello = Hello { wants_answer: false, speeds: [1880, u32::MAX] };
        assert_eq!(Hello::from_plaintext(&hello.to_bytes()), Some(hello));
        assert_eq!(Hello::from_plaintext(&[&hello.to_bytes()[..], &[7; 9]].concat()), Some(hello));
        assert_eq!(Hello::from_plaintext(&hello.to_bytes()[..11]), None);
        assert_eq!(Hello::from_plaintext(&[0x45; 40]), None);
    }
}
