//! Checks the first MAC of handshake messages (whitepaper section 5.4.4): keyed BLAKE2s (RFC 7693)
//! with 16 bytes of output.
//!
//! The kernel and the host share this source. Anyone who knows the receiver's public key can
//! compute the MAC. It is no secret, so nothing here needs to take constant time. The receiver
//! hashes the block with the key once, and the programs start from the resulting [`State`].
//!
//! Rounds are unrolled with constant indices: a program's stack has no room for a permutation table
//! or a copy of the message.

use crate::unaligned;
use crate::wire::{INITIATION_LEN, MAC_LEN, RESPONSE_LEN};

/// The state of the hash between two blocks.
pub type State = [u32; 8];

/// The initialization vector, the same as that of SHA-256.
const IV: State = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// The message schedule: the word of the block that each step of each round mixes in (RFC 7693,
/// section 2.7).
const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];

/// Block size, in bytes.
const BLOCK_LEN: usize = 64;

/// Returns the state after the block that holds the key.
pub fn keyed(key: &[u8; 32]) -> State {
    let mut block = [0; BLOCK_LEN];
    let (start, _) = block.split_at_mut(key.len());
    start.copy_from_slice(key);
    let mut state = IV;
    // Fan-out and depth are 1. The other two bytes are the key and output lengths, in bytes.
    state[0] ^= 0x0101_0000 | (key.len() as u32) << 8 | MAC_LEN as u32;
    // SAFETY: the block has 16 words.
    unsafe { compress::<16>(state, block.as_ptr(), BLOCK_LEN as u32, false) }
}

/// Returns true if the first MAC of an initiation is right.
///
/// # Safety
/// [`INITIATION_LEN`] bytes at `message` must be valid for reads.
#[inline(always)]
pub unsafe fn is_initiation(state: State, message: *const u8) -> bool {
    const BODY: usize = INITIATION_LEN - 2 * MAC_LEN;
    const WORDS: usize = (BODY - BLOCK_LEN) / 4;
    // SAFETY: the body is one block and `WORDS` words, and the MAC follows.
    unsafe {
        let state = compress::<16>(state, message, 2 * BLOCK_LEN as u32, false);
        let state =
            compress::<WORDS>(state, message.add(BLOCK_LEN), (BLOCK_LEN + BODY) as u32, true);
        is_mac(state, message.add(BODY))
    }
}

/// Returns true if the first MAC of a response is right.
///
/// # Safety
/// [`RESPONSE_LEN`] bytes at `message` must be valid for reads.
#[inline(always)]
pub unsafe fn is_response(state: State, message: *const u8) -> bool {
    const BODY: usize = RESPONSE_LEN - 2 * MAC_LEN;
    // SAFETY: the body is `BODY / 4` words, and the MAC follows.
    unsafe {
        let state = compress::<{ BODY / 4 }>(state, message, (BLOCK_LEN + BODY) as u32, true);
        is_mac(state, message.add(BODY))
    }
}

/// Returns true if the hash equals the MAC at `mac`.
///
/// # Safety
/// [`MAC_LEN`] bytes at `mac` must be valid for reads.
#[inline(always)]
unsafe fn is_mac([a, b, c, d, ..]: State, mac: *const u8) -> bool {
    // SAFETY: upheld by the caller.
    let word = |number: usize| unsafe { unaligned::load(mac.add(4 * number)) };
    (a ^ word(0)) | (b ^ word(1)) | (c ^ word(2)) | (d ^ word(3)) == 0
}

/// Hashes one block (RFC 7693, section 3.2): the first `WORDS` words at `message`, padded with
/// zeros. `counter` is the number of bytes hashed so far, including this block but not its padding.
///
/// # Safety
/// `WORDS` words at `message` must be valid for reads.
#[inline(always)]
unsafe fn compress<const WORDS: usize>(
    state: State,
    message: *const u8,
    counter: u32,
    is_last: bool,
) -> State {
    let [a, b, c, d, e, f, g, h] = state;
    let mut v = [a, b, c, d, e, f, g, h, IV[0], IV[1], IV[2], IV[3], IV[4], IV[5], IV[6], IV[7]];
    v[12] ^= counter;
    if is_last {
        v[14] = !v[14];
    }
    // SAFETY: upheld by the caller.
    unsafe {
        round::<0, WORDS>(&mut v, message);
        round::<1, WORDS>(&mut v, message);
        round::<2, WORDS>(&mut v, message);
        round::<3, WORDS>(&mut v, message);
        round::<4, WORDS>(&mut v, message);
        round::<5, WORDS>(&mut v, message);
        round::<6, WORDS>(&mut v, message);
        round::<7, WORDS>(&mut v, message);
        round::<8, WORDS>(&mut v, message);
        round::<9, WORDS>(&mut v, message);
    }
    [
        a ^ v[0] ^ v[8],
        b ^ v[1] ^ v[9],
        c ^ v[2] ^ v[10],
        d ^ v[3] ^ v[11],
        e ^ v[4] ^ v[12],
        f ^ v[5] ^ v[13],
        g ^ v[6] ^ v[14],
        h ^ v[7] ^ v[15],
    ]
}

/// One round of the compression function.
///
/// # Safety
/// `WORDS` words at `message` must be valid for reads.
#[inline(always)]
unsafe fn round<const ROUND: usize, const WORDS: usize>(v: &mut [u32; 16], message: *const u8) {
    let word = |place: usize| {
        let number = SIGMA[ROUND][place];
        // SAFETY: the number is below `WORDS`; the caller upholds the rest.
        if number < WORDS { unsafe { unaligned::load(message.add(4 * number)) } } else { 0 }
    };
    mix(v, [0, 4, 8, 12], word(0), word(1));
    mix(v, [1, 5, 9, 13], word(2), word(3));
    mix(v, [2, 6, 10, 14], word(4), word(5));
    mix(v, [3, 7, 11, 15], word(6), word(7));
    mix(v, [0, 5, 10, 15], word(8), word(9));
    mix(v, [1, 6, 11, 12], word(10), word(11));
    mix(v, [2, 7, 8, 13], word(12), word(13));
    mix(v, [3, 4, 9, 14], word(14), word(15));
}

/// The mixing function G (RFC 7693, section 3.1).
#[inline(always)]
fn mix(v: &mut [u32; 16], [a, b, c, d]: [usize; 4], x: u32, y: u32) {
    v[a] = v[a].wrapping_add(v[b]).wrapping_add(x);
    v[d] = (v[d] ^ v[a]).rotate_right(16);
    v[c] = v[c].wrapping_add(v[d]);
    v[b] = (v[b] ^ v[c]).rotate_right(12);
    v[a] = v[a].wrapping_add(v[b]).wrapping_add(y);
    v[d] = (v[d] ^ v[a]).rotate_right(8);
    v[c] = v[c].wrapping_add(v[d]);
    v[b] = (v[b] ^ v[c]).rotate_right(7);
}

#[cfg(test)]
mod tests {
    use blake2::Blake2sMac;
    use blake2::digest::consts::U16;
    use blake2::digest::{FixedOutput, KeyInit, Update};
    use proptest::prelude::*;

    use super::*;

    fn with_mac<const N: usize>(key: &[u8; 32], mut message: [u8; N]) -> [u8; N] {
        let (body, macs) = message.split_at_mut(N - 2 * MAC_LEN);
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).expect("32 bytes are a key");
        macs[..MAC_LEN].copy_from_slice(&mac.chain(body).finalize_fixed());
        message
    }

    proptest! {
        #[test]
        fn the_mac_agrees_with_the_blake2_crate(
            key: [u8; 32],
            initiation: [u8; INITIATION_LEN],
            response: [u8; RESPONSE_LEN],
            bit in 0..8 * INITIATION_LEN,
        ) {
            let state = keyed(&key);
            let mut initiation = with_mac(&key, initiation);
            let mut response = with_mac(&key, response);
            let are_right = |initiation: &[u8; INITIATION_LEN], response: &[u8; RESPONSE_LEN]| {
                // SAFETY: the arrays have the required lengths.
                unsafe {
                    (
                        is_initiation(state, initiation.as_ptr()),
                        is_response(state, response.as_ptr()),
                    )
                }
            };
            prop_assert_eq!(are_right(&initiation, &response), (true, true));
            // Every bit counts, except those of the second MAC.
            initiation[bit / 8 % (INITIATION_LEN - MAC_LEN)] ^= 1 << (bit % 8);
            response[bit / 8 % (RESPONSE_LEN - MAC_LEN)] ^= 1 << (bit % 8);
            prop_assert_eq!(are_right(&initiation, &response), (false, false));
        }
    }
}
