//! The probe format: messages between two nodes inside the tunnel that measure the path between
//! them.
//!
//! Payload of an inner packet, with big-endian integers:
//!
//! | at | bytes | |
//! | --- | --- | --- |
//! | 0 | 1 | kind: 1 request, 2 answer |
//! | 1 | 1 | version: 1 |
//! | 2 | 2 | size of the largest inner packet that all live paths of the sender carry (see below) |
//! | 4 | 4 | size of the whole inner packet |
//! | 8 | 8 | sequence number; an answer repeats that of the request |
//! | 16 | 8 | stamp; an answer repeats that of the request |
//! | 24 | 4 | size of the largest inner packet with a probe received lately |
//! | 28 | | zero padding, ignored |
//!
//! All sizes are in bytes. The size at offset 2 includes relay headers and is 0 without a live
//! path. The size at offset 24 is that of a packet from the other side. The tunnel authenticates
//! the sender and the content, but the sender may still be hostile.

/// Length of a probe without padding in bytes.
pub const HEADER: usize = 28;
/// Length of the headers of the inner packet in front of the probe in bytes: IPv4 (20) and UDP (8).
pub const ENCAP_LEN: u32 = 28;
/// Size of the smallest inner packet with a probe in bytes.
pub const SMALLEST: u32 = ENCAP_LEN + HEADER as u32;
/// Size of the largest inner packet in bytes: the maximum length of an IPv4 packet.
pub const LARGEST: u32 = 65535;

const VERSION: u8 = 1;
const REQUEST: u8 = 1;
const ANSWER: u8 = 2;

/// The kind of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request, which is answered.
    Request,
    /// An answer, which always has the smallest size.
    Answer,
}

/// A request or an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Request or answer.
    pub kind: Kind,
    /// Size of the whole inner packet in bytes.
    pub size: u32,
    /// Number of the request.
    pub sequence: u64,
    /// A random value that only the receiver of the request knows.
    pub stamp: u64,
    /// Size in bytes of the largest inner packet with a probe that recently came from the other
    /// side. 0 if there was none.
    pub seen: u32,
    /// Size in bytes of the largest inner packet that all live direct paths of the sender carry. 0
    /// without a live path. Nodes that relay through the sender need it.
    pub carries: u16,
}

/// Why bytes are not a valid probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadProbe {
    /// There are fewer bytes than [`HEADER`].
    #[error("a probe has at least {HEADER} bytes, not {0}")]
    Short(usize),
    /// This node does not know the version.
    #[error("unknown probe version {0}")]
    Version(u8),
    /// The kind is neither request nor answer.
    #[error("not a probe")]
    Malformed,
    /// The size in the probe is not the received one, or out of range.
    #[error("a probe that claims {claimed} bytes arrived with {received}")]
    Size {
        /// The size in the probe.
        claimed: u32,
        /// The received size.
        received: u32,
    },
}

impl Probe {
    /// Encodes the payload, padded so that the inner packet has [`Self::size`] bytes, but at least
    /// [`SMALLEST`] and at most [`LARGEST`].
    pub fn encode(&self) -> Vec<u8> {
        let size = self.size.clamp(SMALLEST, LARGEST);
        let kind = match self.kind {
            Kind::Request => REQUEST,
            Kind::Answer => ANSWER,
        };
        let mut bytes = Vec::with_capacity((size - ENCAP_LEN) as usize);
        bytes.extend([kind, VERSION]);
        bytes.extend(self.carries.to_be_bytes());
        bytes.extend(size.to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.stamp.to_be_bytes());
        bytes.extend(self.seen.to_be_bytes());
        bytes.resize((size - ENCAP_LEN) as usize, 0);
        bytes
    }

    /// Decodes a payload that came in an inner packet of `received` bytes. The first [`HEADER`]
    /// bytes of the payload are enough, and padding may be missing.
    ///
    /// # Errors
    /// [`BadProbe`] if the bytes are not a valid probe.
    pub fn decode(bytes: &[u8], received: u32) -> Result<Self, BadProbe> {
        let short = BadProbe::Short(bytes.len());
        let (&[kind, version, carries @ ..], rest) = bytes.split_first_chunk::<4>().ok_or(short)?;
        let (size, rest) = rest.split_first_chunk().ok_or(short)?;
        let (sequence, rest) = rest.split_first_chunk().ok_or(short)?;
        let (stamp, rest) = rest.split_first_chunk().ok_or(short)?;
        let (seen, _) = rest.split_first_chunk().ok_or(short)?;
        if version != VERSION {
            return Err(BadProbe::Version(version));
        }
        let kind = match kind {
            REQUEST => Kind::Request,
            ANSWER => Kind::Answer,
            _ => return Err(BadProbe::Malformed),
        };
        let size = u32::from_be_bytes(*size);
        if size != received || !(SMALLEST..=LARGEST).contains(&size) {
            return Err(BadProbe::Size { claimed: size, received });
        }
        Ok(Self {
            kind,
            size,
            sequence: u64::from_be_bytes(*sequence),
            stamp: u64::from_be_bytes(*stamp),
            seen: u32::from_be_bytes(*seen),
            carries: u16::from_be_bytes(carries),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUEST: Probe = Probe {
        kind: Kind::Request,
        size: 60,
        sequence: 0x0102_0304_0506_0708,
        stamp: 0x1112_1314_1516_1718,
        seen: 1440,
        carries: 1212,
    };

    #[test]
    fn golden_vectors() {
        let request = "010104bc 0000003c 0102030405060708 1112131415161718 000005a0 00000000";
        assert_eq!(hex(&REQUEST.encode()), request.replace(' ', ""));
        let answer = Probe { kind: Kind::Answer, size: SMALLEST, seen: 65535, ..REQUEST };
        let expected = "020104bc 00000038 0102030405060708 1112131415161718 0000ffff";
        assert_eq!(hex(&answer.encode()), expected.replace(' ', ""));
    }

    #[test]
    fn every_size_is_exact_to_the_byte() {
        for size in [SMALLEST, SMALLEST + 1, 1200, 1440, 8940, LARGEST] {
            let probe = Probe { size, ..REQUEST };
            let bytes = probe.encode();
            assert_eq!(bytes.len() as u32 + ENCAP_LEN, size);
            assert_eq!(Probe::decode(&bytes, size), Ok(probe));
            assert_eq!(Probe::decode(&bytes[..HEADER], size), Ok(probe), "the header is enough");
        }
        assert_eq!(Probe { size: 0, ..REQUEST }.encode().len(), HEADER);
        assert_eq!(Probe { size: u32::MAX, ..REQUEST }.encode().len() as u32 + ENCAP_LEN, LARGEST);
    }

    #[test]
    fn malformed_probes_are_refused() {
        let good = REQUEST.encode();
        for length in 0..HEADER {
            assert_eq!(Probe::decode(&good[..length], 60), Err(BadProbe::Short(length)));
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Probe::decode(&bytes, 60)
        };
        for kind in [0, 3, 255] {
            assert_eq!(with(0, kind), Err(BadProbe::Malformed));
        }
        assert_eq!(with(1, 2), Err(BadProbe::Version(2)));
        assert_eq!(with(4, 1), Err(BadProbe::Size { claimed: 0x0100_003c, received: 60 }));
        assert_eq!(Probe::decode(&good, 61), Err(BadProbe::Size { claimed: 60, received: 61 }));
        let small = with(7, 10);
        assert_eq!(small, Err(BadProbe::Size { claimed: 10, received: 60 }));
        let mut bytes = good.clone();
        bytes[7] = 10;
        assert_eq!(Probe::decode(&bytes, 10), Err(BadProbe::Size { claimed: 10, received: 10 }));
    }

    proptest! {
        #[test]
        fn decoded_probes_encode_to_the_same_header(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            received: u32,
        ) {
            if let Ok(probe) = Probe::decode(&bytes, received) {
                prop_assert_eq!(&probe.encode()[..HEADER], &bytes[..HEADER]);
            }
        }

        #[test]
        fn every_probe_round_trips(
            sequence: u64,
            stamp: u64,
            seen: u32,
            carries: u16,
            size in SMALLEST..=LARGEST,
            answer: bool,
        ) {
            let kind = if answer { Kind::Answer } else { Kind::Request };
            let probe = Probe { kind, size, sequence, stamp, seen, carries };
            prop_assert_eq!(Probe::decode(&probe.encode(), size), Ok(probe));
        }
    }

    fn hex(bytes: &[u8]) -> String {
        data_encoding::HEXLOWER.encode(bytes)
    }
}
