//! Defines the messages of an established connection, one level above frames.
//!
//! On the wire, a message is one byte for the kind, then the body of that kind. The contents of
//! gossip messages and routed messages are decoded by [`crate::gossip`].

/// A message of a control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// A message for [`crate::gossip::Gossip::handle_message`].
    Gossip(Vec<u8>),
    /// A request for a [`Packet::Pong`] with the same number.
    Ping(u64),
    /// The answer to a [`Packet::Ping`].
    Pong(u64),
    /// A routed message for [`crate::gossip::Gossip::handle_routed`].
    RoutedMessage(Vec<u8>),
}

const GOSSIP: u8 = 0;
const PING: u8 = 1;
const PONG: u8 = 2;
const ROUTED: u8 = 3;

/// A message that no overnode node sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// The message has no bytes.
    #[error("an empty message")]
    Empty,
    /// The kind is unknown.
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    /// The number in a ping or pong is not 8 bytes long. Holds its length in bytes.
    #[error("a ping of {0} bytes")]
    Ping(usize),
}

impl Packet {
    /// Returns the bytes that are sent.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Gossip(body) => (GOSSIP, body.as_slice()),
            Self::Ping(number) => (PING, &number.to_le_bytes()[..]),
            Self::Pong(number) => (PONG, &number.to_le_bytes()[..]),
            Self::RoutedMessage(body) => (ROUTED, body.as_slice()),
        };
        [&[kind], body].concat()
    }

    /// Decodes a message that [`Self::encode`] encoded.
    ///
    /// # Errors
    /// [`BadPacket`] if the bytes are not such a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadPacket> {
        let (&kind, body) = bytes.split_first().ok_or(BadPacket::Empty)?;
        let number =
            || body.try_into().map(u64::from_le_bytes).map_err(|_| BadPacket::Ping(body.len()));
        match kind {
            GOSSIP => Ok(Self::Gossip(body.to_vec())),
            PING => number().map(Self::Ping),
            PONG => number().map(Self::Pong),
            ROUTED => Ok(Self::RoutedMessage(body.to_vec())),
            _ => Err(BadPacket::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Nodes of other versions read these bytes.
    #[test]
    fn the_wire_format_is_stable() {
        for (packet, golden) in [
            (Packet::Gossip(vec![0xaa, 0xbb]), "00aabb"),
            (Packet::Ping(0x0102), "010201000000000000"),
            (Packet::Pong(u64::MAX), "02ffffffffffffffff"),
            (Packet::RoutedMessage(vec![0xcc]), "03cc"),
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
        fn decoded_messages_encode_to_the_same_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(packet.encode(), bytes);
            }
        }
    }
}
