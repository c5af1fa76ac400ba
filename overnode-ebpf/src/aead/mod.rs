//! ChaCha20-Poly1305 (RFC 8439), in steps that fit a `bpf_loop`.
//!
//! The kernel and the host share this source. [`Cipher`] works on blocks of 64 bytes, one per
//! iteration of a `bpf_loop`. Block 0 yields the Poly1305 key. Every later block is enciphered and
//! authenticated in one pass. All state is in [`Cipher`]. Programs keep it in a map, because a
//! program has only 512 bytes of stack. The host's [`seal_in_place`] and [`open_in_place`] use the
//! same blocks.
//!
//! No branch and no index depends on a secret.

pub mod chacha20;
pub mod poly1305;

use core::hint::black_box;
use core::ptr;

use chacha20::ChaCha20;
use poly1305::{Absorbing, Poly1305};

use crate::unaligned;

/// Bytes that one step enciphers: one ChaCha20 block.
pub const BLOCK_LEN: usize = 64;
/// Bytes of a Poly1305 block. [`Cipher`] reads and writes the payload in whole groups of this size.
pub const GROUP_LEN: usize = 16;

/// Whether a message is sealed or opened. A type parameter rather than a value, so that no program
/// contains code for both.
pub trait Direction {
    /// True if the payload is plaintext before and ciphertext afterwards.
    const SEAL: bool;
}

/// Turns plaintext into ciphertext.
pub enum Seal {}
/// Turns ciphertext into plaintext.
pub enum Open {}

impl Direction for Seal {
    const SEAL: bool = true;
}

impl Direction for Open {
    const SEAL: bool = false;
}

/// The tag does not match the key, nonce, additional data and payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forged;

/// The memory ends before the given length: a group would reach beyond its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short;

/// A message being sealed or opened. All bytes zero is a valid value. Call [`Self::start`] first.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct Cipher {
    chacha: ChaCha20,
    aad_len: u64,
    poly: Poly1305,
}

impl Cipher {
    /// Starts a message. The words are little-endian, as in RFC 8439, section 2.3.
    #[inline(always)]
    pub fn start(&mut self, key: &[u32; 8], nonce: [u32; 3]) {
        self.chacha.start(key, nonce);
        self.aad_len = 0;
        self.poly.clear();
    }

    /// Processes one block. Block 0 yields the Poly1305 key of the message and must come before all
    /// else. It does not call `text`, and repeating it changes nothing. Every later block enciphers
    /// and authenticates up to 64 bytes in place. The bytes that follow the payload in its last
    /// group of 16 are overwritten.
    ///
    /// # Errors
    /// [`Short`] if a group would reach beyond the end of the memory. The message is lost then.
    ///
    /// # Safety
    /// `text` must return the start of the block, the end of the memory, and the number of payload
    /// bytes left (1 or more; more than 64 counts as 64). The memory must be valid for reads and
    /// writes up to its end.
    #[inline(always)]
    pub unsafe fn block<D: Direction>(
        &mut self,
        counter: u32,
        text: impl FnOnce() -> (*mut u8, *const u8, u32),
    ) -> Result<(), Short> {
        let stream = self.chacha.block(counter);
        if counter == 0 {
            self.poly.set_key(&stream);
            return Ok(());
        }
        let (text, end, left) = text();
        let mut mac = self.poly.resume();
        if left as usize >= BLOCK_LEN {
            if text.wrapping_add(BLOCK_LEN).cast_const() > end {
                return Err(Short);
            }
            // Unrolled, because a loop over `stream` would put it on the stack.
            // SAFETY: before `end`, as just checked.
            unsafe {
                encipher::<D, 0>(&mut mac, text, &stream, ALL);
                encipher::<D, 1>(&mut mac, text, &stream, ALL);
                encipher::<D, 2>(&mut mac, text, &stream, ALL);
                encipher::<D, 3>(&mut mac, text, &stream, ALL);
            }
        } else {
            // SAFETY: upheld by the caller.
            unsafe {
                encipher_rest::<D, 0>(&mut mac, text, end, &stream, left)?;
                encipher_rest::<D, 1>(&mut mac, text, end, &stream, left)?;
                encipher_rest::<D, 2>(&mut mac, text, end, &stream, left)?;
                encipher_rest::<D, 3>(&mut mac, text, end, &stream, left)?;
            }
        }
        let h = mac.into_accumulator();
        self.poly.suspend(h);
        Ok(())
    }

    /// Authenticates up to 64 bytes of additional data. Every call but the last must pass 64 bytes.
    /// Calls come after block 0 and before the payload.
    ///
    /// # Errors
    /// [`Short`] if a group would reach beyond `end`. The message is lost then.
    ///
    /// # Safety
    /// `aad` to `end` must be valid for reads and belong to one allocation (or packet).
    #[inline(always)]
    pub unsafe fn absorb(
        &mut self,
        aad: *const u8,
        end: *const u8,
        left: u32,
    ) -> Result<(), Short> {
        let mut mac = self.poly.resume();
        for group in 0..BLOCK_LEN / GROUP_LEN {
            let Some(rest) = left.checked_sub((group * GROUP_LEN) as u32).filter(|rest| *rest > 0)
            else {
                break;
            };
            let at = aad.wrapping_add(group * GROUP_LEN);
            if at.wrapping_add(GROUP_LEN) > end {
                return Err(Short);
            }
            let mut words = [0; 4];
            for (word, keep) in masks(rest).into_iter().enumerate() {
                // SAFETY: before `end`, as just checked.
                words[word] =
                    u64::from(keep & unsafe { unaligned::load(at.wrapping_add(4 * word)) });
            }
            mac.absorb(words);
        }
        let h = mac.into_accumulator();
        self.poly.suspend(h);
        self.aad_len += if left as usize > BLOCK_LEN { BLOCK_LEN as u64 } else { u64::from(left) };
        Ok(())
    }

    /// Returns the tag, as two little-endian words.
    #[inline(always)]
    pub fn finish(&mut self, text_len: u64) -> [u64; 2] {
        const LOW: u64 = 0xffff_ffff;
        let mut mac = self.poly.resume();
        mac.absorb([self.aad_len & LOW, self.aad_len >> 32, text_len & LOW, text_len >> 32]);
        let h = mac.into_accumulator();
        self.poly.suspend(h);
        self.poly.tag()
    }
}

/// Enciphers one group of a block. Bytes masked out by `keep` are not part of the payload.
///
/// # Safety
/// The block must be valid for reads and writes up to the end of the group.
#[inline(always)]
unsafe fn encipher<D: Direction, const GROUP: usize>(
    mac: &mut Absorbing<'_>,
    text: *mut u8,
    stream: &[u32; 16],
    keep: [u32; 4],
) {
    let word = |word: usize| {
        let at = text.wrapping_add(GROUP * GROUP_LEN + 4 * word);
        // SAFETY: upheld by the caller.
        let before = unsafe { unaligned::load(at) };
        let after = before ^ stream[4 * GROUP + word];
        // SAFETY: upheld by the caller.
        unsafe { unaligned::store(at, after) };
        u64::from(keep[word] & if D::SEAL { after } else { before })
    };
    mac.absorb([word(0), word(1), word(2), word(3)]);
}

/// Enciphers one group of a block that has only `left` bytes of payload. Does nothing if the
/// payload ends before the group.
///
/// # Safety
/// As for [`Cipher::block`].
#[inline(always)]
unsafe fn encipher_rest<D: Direction, const GROUP: usize>(
    mac: &mut Absorbing<'_>,
    text: *mut u8,
    end: *const u8,
    stream: &[u32; 16],
    left: u32,
) -> Result<(), Short> {
    let start = (GROUP * GROUP_LEN) as u32;
    if left <= start {
        return Ok(());
    }
    if text.wrapping_add((GROUP + 1) * GROUP_LEN).cast_const() > end {
        return Err(Short);
    }
    // SAFETY: before `end`, as just checked.
    unsafe { encipher::<D, GROUP>(mac, text, stream, masks(left - start)) };
    Ok(())
}

/// Keeps every byte of a group.
const ALL: [u32; 4] = [u32::MAX; 4];

/// Returns masks that keep the first `rest` bytes (1 or more) of a group. Branch-free, because the
/// verifier of Linux 6.1 would follow every combination of branches.
#[inline(always)]
fn masks(rest: u32) -> [u32; 4] {
    let mask = |word: i64| {
        let excess = 32 * (word + 1) - 8 * i64::from(rest);
        // The compiler would turn `max` into a branch.
        let bits = excess & !black_box(excess >> 63);
        // At most 120 and even, hence two shifts of at most 60 each.
        ((u64::from(u32::MAX) >> (bits >> 1)) >> (bits >> 1)) as u32
    };
    [mask(0), mask(1), mask(2), mask(3)]
}

/// Compares two tags in constant time.
#[inline(always)]
pub fn same_tag(one: [u64; 2], other: [u64; 2]) -> bool {
    black_box((one[0] ^ other[0]) | (one[1] ^ other[1])) == 0
}

/// Converts a key to the words that [`Cipher::start`] and the `SESSIONS` map take.
pub fn key_words(key: &[u8; 32]) -> [u32; 8] {
    core::array::from_fn(|word| {
        u32::from_le_bytes([key[4 * word], key[4 * word + 1], key[4 * word + 2], key[4 * word + 3]])
    })
}

/// Returns the nonce of a WireGuard data message (whitepaper section 5.4.6): four zero bytes, then
/// the counter.
#[inline(always)]
pub const fn nonce_words(counter: u64) -> [u32; 3] {
    [0, counter as u32, (counter >> 32) as u32]
}

/// Seals `text` in place and returns its tag. For the host; programs use `program::cipher`.
pub fn seal_in_place(
    key: &[u8; 32],
    nonce: &[u8; 12],
    aad: &[u8],
    text: &mut [u8],
) -> [u8; GROUP_LEN] {
    tag_bytes(run::<Seal>(key, nonce, aad, text))
}

/// Opens `text` in place if `tag` matches, and fills it with zeros otherwise. For the host;
/// programs use `program::cipher`.
///
/// # Errors
/// [`Forged`] if the tag does not match.
pub fn open_in_place(
    key: &[u8; 32],
    nonce: &[u8; 12],
    aad: &[u8],
    text: &mut [u8],
    tag: &[u8; GROUP_LEN],
) -> Result<(), Forged> {
    let claimed = u128::from_le_bytes(*tag);
    if same_tag(run::<Open>(key, nonce, aad, text), [claimed as u64, (claimed >> 64) as u64]) {
        Ok(())
    } else {
        text.fill(0);
        Err(Forged)
    }
}

fn run<D: Direction>(key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], text: &mut [u8]) -> [u64; 2] {
    let nonce = core::array::from_fn(|word| {
        u32::from_le_bytes([
            nonce[4 * word],
            nonce[4 * word + 1],
            nonce[4 * word + 2],
            nonce[4 * word + 3],
        ])
    });
    let mut cipher = Cipher::default();
    cipher.start(&key_words(key), nonce);
    // SAFETY: block 0 does not call its closure.
    let derived = unsafe { cipher.block::<D>(0, || (ptr::null_mut(), ptr::null(), 0)) };
    debug_assert_eq!(derived, Ok(()));
    for chunk in aad.chunks(BLOCK_LEN) {
        let mut block = [0; BLOCK_LEN];
        block[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: `block` has room for every group.
        let absorbed =
            unsafe { cipher.absorb(block.as_ptr(), block.as_ptr_range().end, chunk.len() as u32) };
        debug_assert_eq!(absorbed, Ok(()));
    }
    let text_len = text.len() as u64;
    for (chunk, counter) in text.chunks_mut(BLOCK_LEN).zip(1..) {
        let mut block = [0; BLOCK_LEN];
        block[..chunk.len()].copy_from_slice(chunk);
        let (start, end) = (block.as_mut_ptr(), block.as_ptr_range().end);
        // SAFETY: `block` has room for every group.
        let done = unsafe { cipher.block::<D>(counter, || (start, end, chunk.len() as u32)) };
        debug_assert_eq!(done, Ok(()));
        chunk.copy_from_slice(&block[..chunk.len()]);
    }
    cipher.finish(text_len)
}

fn tag_bytes(tag: [u64; 2]) -> [u8; GROUP_LEN] {
    (u128::from(tag[0]) | u128::from(tag[1]) << 64).to_le_bytes()
}
