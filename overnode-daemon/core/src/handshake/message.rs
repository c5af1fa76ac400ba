//! Encodes and decodes handshake messages (whitepaper sections 5.4.2 to 5.4.7). Integers are
//! little-endian.

pub(crate) use overnode_ebpf::wire::{COOKIE_REPLY_LEN, INITIATION_LEN, MAC_LEN, RESPONSE_LEN};
use overnode_ebpf::wire::{TYPE_COOKIE_REPLY, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};

use overnode_types::SessionIndex;

/// Length of the Noise part of an initiation: ephemeral key, sealed static key, sealed timestamp.
pub(crate) const INITIATION_NOISE_LEN: usize = 32 + 48 + 28;
/// Length of the Noise part of a response: ephemeral key, sealed empty payload.
pub(crate) const RESPONSE_NOISE_LEN: usize = 32 + 16;

/// A message of the right length and type, otherwise unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// First message of a handshake.
    Initiation(Initiation<'a>),
    /// Second message of a handshake.
    Response(Response<'a>),
    /// The reply of a peer under load, instead of an answer.
    CookieReply(CookieReply<'a>),
}

/// First message of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Initiation<'a> {
    /// Receiver index for messages to the initiator.
    pub sender: SessionIndex,
    /// Noise's first message.
    pub noise: &'a [u8; INITIATION_NOISE_LEN],
    /// The MACs and the bytes that they cover.
    pub macs: Macs<'a>,
}

/// Second message of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Response<'a> {
    /// Receiver index for messages to the responder.
    pub sender: SessionIndex,
    /// The initiation's `sender`.
    pub receiver: SessionIndex,
    /// Noise's second message.
    pub noise: &'a [u8; RESPONSE_NOISE_LEN],
    /// The MACs and the bytes that they cover.
    pub macs: Macs<'a>,
}

/// The reply of a peer under load, instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CookieReply<'a> {
    /// The `sender` of the message that was not answered.
    pub receiver: SessionIndex,
    /// Nonce of XChaCha20-Poly1305.
    pub nonce: &'a [u8; 24],
    /// The sealed cookie.
    pub cookie: &'a [u8; 32],
}

/// The MACs at the end of an initiation or a response, and the bytes before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Macs<'a> {
    /// Everything before `mac1`.
    pub body: &'a [u8],
    /// Proves that the sender knows the receiver's public key.
    pub mac1: &'a [u8; MAC_LEN],
    /// Proves that the sender has a cookie. Zero if it has none.
    pub mac2: &'a [u8; MAC_LEN],
}

/// Why bytes are not a handshake message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadMessage {
    /// The type is unknown, reserved bytes are not zero, or the length does not match the type.
    #[error("not a handshake message")]
    Malformed,
    /// A data message. The eBPF programs handle those.
    #[error("a data message")]
    Data,
}

/// Parses a datagram.
pub(crate) fn parse(bytes: &[u8]) -> Result<Message<'_>, BadMessage> {
    let (kind, rest) = bytes.split_first_chunk::<4>().ok_or(BadMessage::Malformed)?;
    let [kind, 0, 0, 0] = *kind else { return Err(BadMessage::Malformed) };
    match (kind, bytes.len()) {
        (TYPE_INITIATION, INITIATION_LEN) => {
            let (sender, rest) = index(rest)?;
            let (noise, _) = rest.split_first_chunk().ok_or(BadMessage::Malformed)?;
            Ok(Message::Initiation(Initiation { sender, noise, macs: macs(bytes)? }))
        }
        (TYPE_RESPONSE, RESPONSE_LEN) => {
            let (sender, rest) = index(rest)?;
            let (receiver, rest) = index(rest)?;
            let (noise, _) = rest.split_first_chunk().ok_or(BadMessage::Malformed)?;
            Ok(Message::Response(Response { sender, receiver, noise, macs: macs(bytes)? }))
        }
        (TYPE_COOKIE_REPLY, COOKIE_REPLY_LEN) => {
            let (receiver, rest) = index(rest)?;
            let (nonce, rest) = rest.split_first_chunk().ok_or(BadMessage::Malformed)?;
            let (cookie, _) = rest.split_first_chunk().ok_or(BadMessage::Malformed)?;
            Ok(Message::CookieReply(CookieReply { receiver, nonce, cookie }))
        }
        (TYPE_DATA, 16..) => Err(BadMessage::Data),
        _ => Err(BadMessage::Malformed),
    }
}

/// Returns an initiation whose MACs are still zero.
pub(crate) fn initiation(sender: SessionIndex, noise: &[u8; INITIATION_NOISE_LEN]) -> Vec<u8> {
    assemble(&[&header(TYPE_INITIATION), &sender.to_le_bytes(), noise, &[0; 2 * MAC_LEN]])
}

/// Returns a response whose MACs are still zero.
pub(crate) fn response(
    sender: SessionIndex,
    receiver: SessionIndex,
    noise: &[u8; RESPONSE_NOISE_LEN],
) -> Vec<u8> {
    assemble(&[
        &header(TYPE_RESPONSE),
        &sender.to_le_bytes(),
        &receiver.to_le_bytes(),
        noise,
        &[0; 2 * MAC_LEN],
    ])
}

/// Returns a cookie reply.
pub(crate) fn cookie_reply(receiver: SessionIndex, nonce: &[u8; 24], cookie: &[u8; 32]) -> Vec<u8> {
    assemble(&[&header(TYPE_COOKIE_REPLY), &receiver.to_le_bytes(), nonce, cookie])
}

fn header(kind: u8) -> [u8; 4] {
    [kind, 0, 0, 0]
}

fn assemble(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn index(bytes: &[u8]) -> Result<(SessionIndex, &[u8]), BadMessage> {
    let (index, rest) = bytes.split_first_chunk().ok_or(BadMessage::Malformed)?;
    Ok((SessionIndex::from_le_bytes(*index), rest))
}

fn macs(bytes: &[u8]) -> Result<Macs<'_>, BadMessage> {
    let (rest, mac2) = bytes.split_last_chunk().ok_or(BadMessage::Malformed)?;
    let (body, mac1) = rest.split_last_chunk().ok_or(BadMessage::Malformed)?;
    Ok(Macs { body, mac1, mac2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembled_messages_parse() {
        let noise = std::array::from_fn(|i| i as u8);
        let bytes = initiation(SessionIndex::new(0x0102_0304), &noise);
        assert_eq!(bytes.len(), INITIATION_LEN);
        assert_eq!(bytes[..8], [1, 0, 0, 0, 4, 3, 2, 1]);
        let Ok(Message::Initiation(parsed)) = parse(&bytes) else { panic!("{bytes:?}") };
        assert_eq!(
            (parsed.sender, parsed.noise, parsed.macs.body.len()),
            (SessionIndex::new(0x0102_0304), &noise, 116)
        );

        let noise = std::array::from_fn(|i| i as u8);
        let bytes = response(SessionIndex::new(7), SessionIndex::new(9), &noise);
        assert_eq!(bytes.len(), RESPONSE_LEN);
        let Ok(Message::Response(parsed)) = parse(&bytes) else { panic!("{bytes:?}") };
        assert_eq!(
            (parsed.sender, parsed.receiver, parsed.noise, parsed.macs.body.len()),
            (SessionIndex::new(7), SessionIndex::new(9), &noise, 60)
        );

        let bytes = cookie_reply(SessionIndex::new(5), &[1; 24], &[2; 32]);
        assert_eq!(bytes.len(), COOKIE_REPLY_LEN);
        let expected =
            CookieReply { receiver: SessionIndex::new(5), nonce: &[1; 24], cookie: &[2; 32] };
        assert_eq!(parse(&bytes), Ok(Message::CookieReply(expected)));
    }

    #[test]
    fn other_lengths_types_and_reserved_bytes_are_refused() {
        let good = initiation(SessionIndex::new(1), &[0; INITIATION_NOISE_LEN]);
        for length in (0..INITIATION_LEN).chain([INITIATION_LEN + 1, 1500]) {
            let mut bytes = good.clone();
            bytes.resize(length, 0);
            assert_eq!(parse(&bytes), Err(BadMessage::Malformed), "{length} bytes");
        }
        for reserved in 1..4 {
            let mut bytes = good.clone();
            bytes[reserved] = 1;
            assert_eq!(parse(&bytes), Err(BadMessage::Malformed));
        }
        for kind in [0, 2, 3, 5, 255] {
            let mut bytes = good.clone();
            bytes[0] = kind;
            assert_eq!(parse(&bytes), Err(BadMessage::Malformed), "type {kind}");
        }
        let mut bytes = good;
        bytes[0] = TYPE_DATA;
        assert_eq!(parse(&bytes), Err(BadMessage::Data));
    }
}
