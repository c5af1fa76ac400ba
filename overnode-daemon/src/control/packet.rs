//! What travels on an established connection, one level above frames: whose message it is.
//!
//! On the wire: one byte, the kind; then what that kind holds. What is inside gossip messages and
//! parcels is read elsewhere.

/// A message of a control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// For [`crate::gossip::Gossip::handle_message`].
    Gossip(Vec<u8>),
    /// To be answered with [`Packet::Pong`] and the same number.
    Ping(u64),
    /// The answer.
    Pong(u64),
    /// For [`crate::gossip::Gossip::handle_parcel`].
    Parcel(Vec<u8>),
}

const GOSSIP: u8 = 0;
const PING: u8 = 1;
const PONG: u8 = 2;
const PARCEL: u8 = 3;

/// A message that no node of overnode sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// No bytes.
    #[error("an empty message")]
    Empty,
    /// An unknown kind.
    #[error("a message of the unknown kind {0}")]
    Kind(u8),
    /// A ping or pong whose number is not 8 bytes.
    #[error("a ping of {0} bytes")]
    Ping(usize),
}

impl Packet {
    /// The bytes that travel.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Gossip(body) => (GOSSIP, body.as_slice()),
            Self::Ping(number) => (PING, &number.to_le_bytes()[..]),
            Self::Pong(number) => (PONG, &number.to_le_bytes()[..]),
            Self::Parcel(body) => (PARCEL, body.as_slice()),
        };
        [&[kind], body].concat()
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// [`BadPacket`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadPacket> {
        let (&kind, body) = bytes.split_first().ok_or(BadPacket::Empty)?;
        let number =
            || body.try_into().map(u64::from_le_bytes).map_err(|_| BadPacket::Ping(body.len()));
        match kind {
            GOSSIP => Ok(Self::Gossip(body.to_vec())),
            PING => number().map(Self::Ping),
            PONG => number().map(Self::Pong),
            PARCEL => Ok(Self::Parcel(body.to_vec())),
            _ => Err(BadPacket::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// These bytes are read by nodes of other versions.
    #[test]
    fn the_wire_format_is_this() {
        for (packet, golden) in [
            (Packet::Gossip(vec![0xaa, 0xbb]), "00aabb"),
            (Packet::Ping(0x0102), "010201000000000000"),
            (Packet::Pong(u64::MAX), "02ffffffffffffffff"),
            (Packet::Parcel(vec![0xcc]), "03cc"),
        ] {
            assert_eq!(data_encoding::HEXLOWER.encode(&packet.encode()), golden);
            assert_eq!(Packet::decode(&packet.encode()), Ok(packet));
        }
        assert_eq!(Packet::decode(&[]), Err(BadPacket::Empty));
        assert_eq!(Packet::decode(&[4, 1]), Err(BadPacket::Kind(4)));
        assert_eq!(Packet::decode(&[1; 9 + 1]), Err(BadPacket::Ping(9)));
        assert_eq!(Packet::decode(&[2]), Err(BadPacket::Ping(0)));
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(packet.encode(), bytes);
            }
        }
    }
}
