//! Parses an input. Bytes beyond its end read as zero, so no input is too short.

/// Maximum number of steps of one input, so that a body with state does not take long.
pub(crate) const MAX_STEPS: usize = 64;

/// The rest of an input.
pub(crate) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Returns the next byte, or `None` at the end.
    pub(crate) fn step(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.step().unwrap_or(0)
    }

    pub(crate) fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Returns bytes that are preceded by their number (u16, little-endian). Returns fewer at the
    /// end.
    pub(crate) fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.short()).min(self.0.len());
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        bytes
    }

    /// Returns bytes in the form that [`Self::bytes`] reads.
    pub(crate) fn framed(bytes: &[u8]) -> Vec<u8> {
        let length = u16::try_from(bytes.len()).expect("seeds are short");
        [&length.to_le_bytes(), bytes].concat()
    }
}
