//! The Internet checksum (RFC 1071). A checksum is the complement of the folded sum.

/// Returns the sum of the 16-bit big-endian words. An odd last byte is the high byte of a word. At
/// most 65,536 words, so that the sum does not overflow.
pub(crate) fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(2);
    let odd = words.remainder().first().map_or(0, |&byte| u32::from(byte) << 8);
    words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum::<u32>() + odd
}

/// Folds the carries into the low 16 bits.
pub(crate) fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1071, section 3.
    #[test]
    fn the_example_of_rfc_1071_has_its_published_sum() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(sum(&bytes), 0x2_ddf0);
        assert_eq!(fold(0x2_ddf0), 0xddf2);
        assert_eq!(fold(sum(&bytes[..7])), 0xdcfb);
    }

    #[test]
    fn a_header_sums_to_zero_with_its_checksum() {
        let mut header: [u8; 20] = std::array::from_fn(|n| 13 * n as u8);
        header[10..12].fill(0);
        let checksum = !fold(sum(&header));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(!fold(sum(&header)), 0);
    }

    #[test]
    fn carries_are_folded_into_the_low_bits() {
        assert_eq!(fold(sum(&[0xff; 131_072])), 0xffff);
        assert_eq!((fold(0x1_ffff), fold(0xffff_ffff), fold(0)), (1, 0xffff, 0));
    }
}
