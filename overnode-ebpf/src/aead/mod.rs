//! ChaCha20-Poly1305 (RFC 8439), in steps that fit a `bpf_loop`.
//!
//! One source for the kernel and the host. [`Cipher`] works on blocks of 64 bytes, one per
//! iteration of a `bpf_loop`: block 0 makes the Poly1305 key, each later one is enciphered and
//! authenticated in one pass. All state is in [`Cipher`], which lies in a map there: a program has
//! 512 bytes of stack. The host's [`seal_in_place`] and [`open_in_place`] drive the same blocks.
//!
//! Nothing here branches on, or indexes by, a secret.

pub mod chacha20;
pub mod poly1305;

use core::hint::black_box;
use core::ptr;

use chacha20::ChaCha20;
use poly1305::{Absorbing, Poly1305};

use crate::unaligned;

/// Bytes that one step enciphers: a ChaCha20 block.
pub const BLOCK_LEN: usize = 64;
/// Bytes of a Poly1305 block. [`Cipher`] reads and writes text in whole groups of it.
pub const GROUP_LEN: usize = 16;

/// Which way the text goes. A parameter of types rather than a value, so that no program carries
/// code for both.
pub trait Direction {
    /// True if the text is plaintext before and ciphertext afterwards.
    const SEAL: bool;
}

/// Plaintext becomes ciphertext.
pub enum Seal {}
/// Ciphertext becomes plaintext.
pub enum Open {}

impl Direction for Seal {
    const SEAL: bool = true;
}

impl Direction for Open {
    const SEAL: bool = false;
}

/// The tag does not belong to key, nonce, additional data and text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forged;

/// The text ends before the length that was told: a group reaches beyond the end given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short;

/// One message being sealed or opened. All bytes zero is a valid value; [`Self::start`] comes
/// first.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct Cipher {
    chacha: ChaCha20,
    aad_len: u64,
    poly: Poly1305,
}

impl Cipher {
    /// A new message. The words are those of RFC 8439, section 2.3: little-endian.
    #[inline(always)]
    pub fn start(&mut self, key: &[u32; 8], nonce: [u32; 3]) {
        self.chacha.start(key, nonce);
        self.aad_len = 0;
        self.poly.clear();
    }

    /// One block. The 0th makes the Poly1305 key of this message and comes before everything else;
    /// it does not ask for `text`, and doing it again changes nothing. Each later one enciphers and
    /// authenticates up to 64 bytes in place. What follows the text in its last group of 16 is
    /// overwritten.
    ///
    /// # Errors
    /// [`Short`] if a group would reach beyond the end of the text; the message is lost then.
    ///
    /// # Safety
    /// `text` must return where the block starts, where the memory ends, which must be valid for
    /// reads and writes up to there, and how many bytes of text are left (1 or more; above 64
    /// counts as 64).
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
            // Written out, for a loop over `stream` would put it on the stack.
            // SAFETY: before `end`, as just checked.
            unsafe {
                encipher::<D, 0>(&mut mac, text, &stream, ALL);
                encipher::<D, 1>(&mut mac, text, &stream, ALL);
                encipher::<D, 2>(&mut mac, text, &stream, ALL);
                encipher::<D, 3>(&mut mac, text, &stream, ALL);
            }
        } else {
            // SAFETY: the caller's.
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

    /// Authenticates additional data, up to 64 bytes a call; every call but the last brings 64.
    /// After block 0, before the text.
    ///
    /// # Errors
    /// [`Short`] if a group would reach beyond `end`; the message is lost then.
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

    /// The tag, as two little-endian words.
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

/// A group of a block; the bytes that `keep` leaves out are no text.
///
/// # Safety
/// The block must be valid for reads and writes as far as the group's end.
#[inline(always)]
unsafe fn encipher<D: Direction, const GROUP: usize>(
    mac: &mut Absorbing<'_>,
    text: *mut u8,
    stream: &[u32; 16],
    keep: [u32; 4],
) {
    let word = |word: usize| {
        let at = text.wrapping_add(GROUP * GROUP_LEN + 4 * word);
        // SAFETY: the caller's.
        let before = unsafe { unaligned::load(at) };
        let after = before ^ stream[4 * GROUP + word];
        // SAFETY: the caller's.
        unsafe { unaligned::store(at, after) };
        u64::from(keep[word] & if D::SEAL { after } else { before })
    };
    mac.absorb([word(0), word(1), word(2), word(3)]);
}

/// A group of a block of which only `left` bytes are text: nothing, if that ends before the group.
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

/// Every byte of a group.
const ALL: [u32; 4] = [u32::MAX; 4];

/// Masks that keep the first `rest` bytes (1 or more) of a group. Without branches: the verifier of
/// Linux 6.1 would follow each combination of them.
#[inline(always)]
fn masks(rest: u32) -> [u32; 4] {
    let mask = |word: i64| {
        let excess = 32 * (word + 1) - 8 * i64::from(rest);
        // The compiler would make a branch of a maximum.
        let bits = excess & !black_box(excess >> 63);
        // At most 120, and even: two shifts of at most 60 each.
        ((u64::from(u32::MAX) >> (bits >> 1)) >> (bits >> 1)) as u32
    };
    [mask(0), mask(1), mask(2), mask(3)]
}

/// True if the two tags are the same; takes as long when they are not.
#[inline(always)]
pub fn same_tag(one: [u64; 2], other: [u64; 2]) -> bool {
    black_box((one[0] ^ other[0]) | (one[1] ^ other[1])) == 0
}

/// A key's bytes as the words that [`Cipher::start`] and the `SESSIONS` map take.
pub fn key_words(key: &[u8; 32]) -> [u32; 8] {
    core::array::from_fn(|word| {
        u32::from_le_bytes([key[4 * word], key[4 * word + 1], key[4 * word + 2], key[4 * word + 3]])
    })
}

/// The nonce of a WireGuard data message (whitepaper section 5.4.6): four zero bytes, then the
/// counter.
#[inline(always)]
pub const fn nonce_words(counter: u64) -> [u32; 3] {
    [0, counter as u32, (counter >> 32) as u32]
}

/// Seals `text` and returns its tag. For the host; programs have `program::cipher`.
pub fn seal_in_place(
    key: &[u8; 32],
    nonce: &[u8; 12],
    aad: &[u8],
    text: &mut [u8],
) -> [u8; GROUP_LEN] {
    tag_bytes(run::<Seal>(key, nonce, aad, text))
}

/// Opens `text` if `tag` is its tag, and fills it with zeros otherwise. For the host; programs have
/// `program::cipher`.
///
/// # Errors
/// [`Forged`] if it is not.
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
    // SAFETY: block 0 asks for no text.
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
