//! Computes Internet checksums (RFC 1071).

use core::ffi::c_void;
use core::hint::black_box;

use aya_ebpf::helpers::generated::bpf_loop;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::ETHERNET_LEN;

use super::frame::{Frame, Ipv4, Ipv6, PROTOCOL_UDP, Skb, at};
use super::{CONTINUE, STOP};

/// Folds a sum to 16 bits, until no carry is left (RFC 1071). Does not complement it.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Returns the checksum of an IPv4 header without options.
#[inline(always)]
pub fn ipv4_checksum(header: &Ipv4) -> u16 {
    let words = core::ptr::from_ref(header).cast::<u32>();
    let mut sum = 0;
    let mut word = 0;
    while word < 5 {
        // SAFETY: the header has five words.
        sum += u64::from(unsafe { *words.add(word) });
        word += 1;
    }
    !fold(sum)
}

/// Returns true if the sum of the IPv4 header, options included, is right. Not inlined, so that its
/// stack is not part of the caller's frame, which is live while the cipher runs.
#[inline(never)]
pub fn is_ipv4_header_intact(skb: Skb) -> bool {
    const MAX_WORDS: u32 = 15;
    let Ok(ip) = at::<Ipv4>(skb, ETHERNET_LEN) else { return false };
    // SAFETY: `at` has checked the bounds.
    let words = unsafe { (*ip).header_len() } / 4;
    if skb.linearize(ETHERNET_LEN as u32 + words * 4).is_err() {
        return false;
    }
    let (mut sum, mut word) = (0, 0);
    while word < MAX_WORDS && word < words {
        let Ok(part) = at::<u32>(skb, ETHERNET_LEN + word as usize * 4) else { return false };
        // SAFETY: `at` has checked the bounds.
        sum += u64::from(unsafe { part.read_volatile() });
        word += 1;
    }
    !fold(sum) == 0
}

/// Maximum bytes per loop iteration, a power of two. Larger blocks make the compiler use hundreds
/// of bytes of stack.
const BLOCK_LEN: u32 = 64;
/// Maximum iterations for a rest shorter than a block: one for each smaller power of two.
const REST_TURNS: u32 = BLOCK_LEN.ilog2();

struct Sum {
    skb: Skb,
    offset: u32,
    rest: u32,
    sum: u64,
}

/// Returns the checksum of a UDP datagram after an IPv6 header. `len` is its length in bytes,
/// header included. The checksum field must be 0.
///
/// IPv6 requires a checksum, and Linux drops datagrams without one at sockets (RFC 8200 section
/// 8.1).
#[inline(always)]
pub fn udp_v6(skb: Skb, len: u32) -> Result<u16, Reason> {
    let ip = at::<Ipv6>(skb, ETHERNET_LEN)?;
    let mut sum = u64::from((len as u16).to_be()) + u64::from(u16::from(PROTOCOL_UDP).to_be());
    let mut word = 0;
    while word < 4 {
        // SAFETY: `at` has checked the bounds.
        sum += unsafe { u64::from((*ip).source[word]) + u64::from((*ip).destination[word]) };
        word += 1;
    }
    let mut state = Sum { skb, offset: (ETHERNET_LEN + size_of::<Ipv6>()) as u32, rest: len, sum };
    // SAFETY: the callback matches the helper's contract, and the state outlives the call.
    let turns = unsafe {
        bpf_loop(
            len / BLOCK_LEN + REST_TURNS,
            add_block as *mut c_void,
            core::ptr::from_mut(&mut state).cast(),
            0,
        )
    };
    if turns < 0 || state.rest != 0 {
        return Err(Reason::Helper);
    }
    match !fold(state.sum) {
        // Zero would mean that there is no checksum.
        0 => Ok(0xffff),
        checksum => Ok(checksum),
    }
}

/// Adds the largest power of two of the remaining bytes, up to [`BLOCK_LEN`].
#[inline(never)]
extern "C" fn add_block(_: u32, state: *mut Sum) -> i64 {
    // SAFETY: `udp_v6` passes its state.
    let state = unsafe { &mut *state };
    let added = match state.rest {
        BLOCK_LEN.. => state.add::<{ BLOCK_LEN as usize / 4 }>(),
        32.. => state.add::<8>(),
        16.. => state.add::<4>(),
        8.. => state.add::<2>(),
        4.. => state.add::<1>(),
        2.. => state.add_half(),
        1 => state.add_last(),
        0 => return STOP,
    };
    if added.is_err() { STOP } else { CONTINUE }
}

impl Sum {
    #[inline(always)]
    fn add<const WORDS: usize>(&mut self) -> Result<(), Reason> {
        let words = at::<[u32; WORDS]>(self.skb, masked(self.offset))?;
        let mut sum = 0;
        let mut word = 0;
        while word < WORDS {
            // SAFETY: `at` has checked the bounds.
            sum += u64::from(unsafe { (*words)[word] });
            word += 1;
        }
        self.advance(sum, (WORDS * 4) as u32);
        Ok(())
    }

    #[inline(always)]
    fn add_half(&mut self) -> Result<(), Reason> {
        let half = at::<u16>(self.skb, masked(self.offset))?;
        // SAFETY: `at` has checked the bounds.
        self.advance(u64::from(unsafe { *half }), 2);
        Ok(())
    }

    /// Adds the last byte. Loads the byte before it, too: there is one, because the header has an
    /// even length.
    #[inline(always)]
    fn add_last(&mut self) -> Result<(), Reason> {
        let half = at::<[u8; 2]>(self.skb, masked(self.offset - 1))?;
        // SAFETY: `at` has checked the bounds.
        self.advance(u64::from(u16::from_ne_bytes([unsafe { (*half)[1] }, 0])), 1);
        Ok(())
    }

    #[inline(always)]
    fn advance(&mut self, sum: u64, len: u32) {
        self.sum += sum;
        self.offset += len;
        self.rest -= len;
    }
}

/// Masks an offset. The verifier sees its maximum, and the compiler does not.
#[inline(always)]
fn masked(offset: u32) -> usize {
    (black_box(u64::from(offset)) & 0x3fff) as usize
}
