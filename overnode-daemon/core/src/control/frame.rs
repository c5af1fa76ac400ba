//! Frames the messages of control connections.
//!
//! On the wire, a frame is a length (u16, big-endian) and that many bytes. The bytes are one Noise
//! message or, if shorter than an authentication tag, a [plaintext verdict](TOKEN_REFUSED). The
//! plaintext of a transport message is one byte, `MORE` or `LAST`, and a part of a message of the
//! layer above. A message without any bytes is a heartbeat. Between messages there may be a frame
//! of keys: the byte `KEYS`, then a payload for [`renewal`](super::renewal).

/// Longest Noise message, in bytes (Noise specification section 3).
pub const MAX_FRAME: usize = 65535;
/// Longest frame during the handshake, in bytes. Handshake messages are far shorter.
pub const MAX_HANDSHAKE_FRAME: usize = 2048;
/// Longest message of the layer above, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Length of a Poly1305 tag, in bytes.
pub const TAG: usize = 16;
/// Longest part of a message that fits into one frame, in bytes.
pub const MAX_FRAGMENT: usize = MAX_FRAME - TAG - 1;
/// The only frame that is not encrypted. The responder could not decrypt the third handshake
/// message, which only a different token explains.
pub const TOKEN_REFUSED: &[u8] = b"\x01";

const KEYS: u8 = 2;
const MORE: u8 = 1;
const LAST: u8 = 0;

/// Bytes that no overnode node sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// A frame is longer than the phase allows. Holds its length in bytes.
    #[error("a frame of {0} bytes, more than this phase allows")]
    TooLong(usize),
    /// A message is longer than [`MAX_MESSAGE`] bytes.
    #[error("a message of more than {MAX_MESSAGE} bytes")]
    MessageTooLong,
    /// A transport message is empty or starts with an unknown byte.
    #[error("a message fragment without a valid marker")]
    Mark,
    /// A frame of keys arrived in the middle of a message.
    #[error("new keys in the middle of a message")]
    Keys,
    /// A part has no content and is not the last. It serves only to keep the receiver busy.
    #[error("an empty message fragment")]
    EmptyPart,
}

/// Minimum space for one read, in bytes. The buffer of an idle connection shrinks to this size.
const READ_AHEAD: usize = 4096;

/// Splits received bytes into frames.
#[derive(Debug, Default)]
pub struct FrameSplitter {
    buffer: Vec<u8>,
    start: usize,
}

impl FrameSplitter {
    /// Returns the buffer that received bytes are appended to.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        if self.buffer.is_empty() {
            self.buffer.shrink_to(READ_AHEAD);
        }
        self.buffer.reserve(READ_AHEAD);
        &mut self.buffer
    }

    /// Returns the next complete frame, if it has arrived.
    ///
    /// # Errors
    /// [`BadFrame::TooLong`] as soon as the length has arrived and exceeds `limit`.
    pub fn next(&mut self, limit: usize) -> Result<Option<&[u8]>, BadFrame> {
        let rest = &self.buffer[self.start..];
        let Some((length, body)) = rest.split_first_chunk() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*length));
        if length > limit {
            return Err(BadFrame::TooLong(length));
        }
        let Some(frame) = body.get(..length) else { return Ok(None) };
        self.start += 2 + length;
        Ok(Some(frame))
    }

    /// Whether the buffer holds part of an incomplete frame.
    pub fn is_mid_frame(&self) -> bool {
        self.start < self.buffer.len()
    }
}

/// Reassembles messages from their parts.
#[derive(Debug, Default)]
pub struct Reassembler {
    message: Vec<u8>,
}

impl Reassembler {
    /// Whether more parts of a message must follow.
    pub fn is_mid_message(&self) -> bool {
        !self.message.is_empty()
    }

    /// Takes the plaintext of one transport message. Returns the message that it completes, if any.
    ///
    /// # Errors
    /// [`BadFrame`] if it is not a valid part, or if the message would exceed [`MAX_MESSAGE`].
    pub fn push(&mut self, plaintext: &[u8]) -> Result<Option<Vec<u8>>, BadFrame> {
        let Some((&mark, part)) = plaintext.split_first() else { return Err(BadFrame::Mark) };
        if self.message.len() + part.len() > MAX_MESSAGE {
            return Err(BadFrame::MessageTooLong);
        }
        match mark {
            MORE if part.is_empty() => Err(BadFrame::EmptyPart),
            MORE => {
                self.message.extend_from_slice(part);
                Ok(None)
            }
            LAST => {
                self.message.extend_from_slice(part);
                Ok(Some(std::mem::take(&mut self.message)))
            }
            _ => Err(BadFrame::Mark),
        }
    }
}

/// Returns the payload of a frame of keys, or `None` if `plaintext` is another frame's.
pub fn keys(plaintext: &[u8]) -> Option<&[u8]> {
    plaintext.split_first().filter(|(mark, _)| **mark == KEYS).map(|(_, bytes)| bytes)
}

/// Returns the plaintext of a frame of keys.
pub fn with_keys(bytes: &[u8]) -> Vec<u8> {
    [&[KEYS], bytes].concat()
}

/// Returns the plaintexts of the transport messages that carry `message`. An empty message yields
/// one.
pub fn parts(message: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let count = message.len().div_ceil(MAX_FRAGMENT).max(1);
    (0..count).map(move |index| {
        let start = index * MAX_FRAGMENT;
        let end = message.len().min(start + MAX_FRAGMENT);
        let mut plaintext = Vec::with_capacity(1 + end - start);
        plaintext.push(if index + 1 == count { LAST } else { MORE });
        plaintext.extend_from_slice(&message[start..end]);
        plaintext
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_of_every_critical_length_round_trip() {
        for length in
            [0, 1, MAX_FRAGMENT - 1, MAX_FRAGMENT, MAX_FRAGMENT + 1, 2 * MAX_FRAGMENT, MAX_MESSAGE]
        {
            let message: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let mut reassembler = Reassembler::default();
            let mut whole = Vec::new();
            for part in parts(&message) {
                assert!(part.len() <= MAX_FRAGMENT + 1);
                whole.extend(reassembler.push(&part).unwrap());
            }
            assert_eq!(whole, [message]);
        }
    }

    /// Nodes of other versions read these bytes.
    #[test]
    fn the_wire_format_is_stable() {
        let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
        assert_eq!(parts(b"").map(|part| hex(&part)).collect::<Vec<_>>(), ["00"]);
        assert_eq!(parts(b"abc").map(|part| hex(&part)).collect::<Vec<_>>(), ["00616263"]);
        let long: Vec<_> = parts(&[7; MAX_FRAGMENT + 2]).collect();
        assert_eq!((long[0].len(), &long[0][..3]), (65_519, &[1, 7, 7][..]));
        assert_eq!(hex(&long[1]), "000707");
        let mut splitter = FrameSplitter::default();
        splitter.buffer().extend_from_slice(&[0, 3, 1, 2, 3, 0, 1, 1]);
        assert_eq!(splitter.next(MAX_FRAME).unwrap(), Some(&[1, 2, 3][..]));
        assert_eq!(splitter.next(MAX_FRAME).unwrap(), Some(TOKEN_REFUSED));
    }

    #[test]
    fn bounds_are_enforced() {
        let mut reassembler = Reassembler::default();
        let part = [&[MORE], [0; MAX_FRAGMENT].as_slice()].concat();
        for _ in 0..MAX_MESSAGE / MAX_FRAGMENT {
            assert_eq!(reassembler.push(&part), Ok(None));
        }
        assert_eq!(reassembler.push(&part), Err(BadFrame::MessageTooLong));
        assert_eq!(Reassembler::default().push(&[]), Err(BadFrame::Mark));
        assert_eq!(Reassembler::default().push(&[9, 1]), Err(BadFrame::Mark));
        assert_eq!(Reassembler::default().push(&[MORE]), Err(BadFrame::EmptyPart));
        let mut splitter = FrameSplitter::default();
        splitter.buffer().extend([0x08, 0x01]);
        assert_eq!(splitter.next(MAX_HANDSHAKE_FRAME), Err(BadFrame::TooLong(0x801)));
    }

    proptest! {
        #[test]
        fn frames_are_split_the_same_however_the_bytes_arrive(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            steps in prop::collection::vec(1_usize..50, 1..40),
        ) {
            let stream: Vec<u8> = frames
                .iter()
                .flat_map(|frame| [&(frame.len() as u16).to_be_bytes(), frame.as_slice()].concat())
                .collect();
            let (mut splitter, mut cut, mut sent) = (FrameSplitter::default(), Vec::new(), 0);
            for step in steps.iter().cycle() {
                let end = stream.len().min(sent + step);
                splitter.buffer().extend_from_slice(&stream[sent..end]);
                while let Some(frame) = splitter.next(MAX_FRAME).unwrap() {
                    cut.push(frame.to_vec());
                }
                sent = end;
                if sent == stream.len() {
                    break;
                }
            }
            prop_assert_eq!(cut, frames);
            prop_assert!(!splitter.is_mid_frame());
        }

        #[test]
        fn no_input_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            limit in 0_usize..300,
        ) {
            let mut splitter = FrameSplitter::default();
            let mut reassembler = Reassembler::default();
            splitter.buffer().extend_from_slice(&bytes);
            while let Ok(Some(frame)) = splitter.next(limit) {
                let _ = reassembler.push(frame);
            }
        }
    }
}
