//! The Internet checksum (RFC 1071).

use core::ffi::c_void;
use core::hint::black_box;

use aya_ebpf::helpers::generated::bpf_loop;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::ETHERNET_LEN;

use super::frame::{Ipv4, Ipv6, PROTOCOL_UDP, Skb, at};

/// Sums up 16-bit words until no carry is left (RFC 1071); not yet complemented.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum of an IPv4 header without options.
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

/// Bytes per turn of the loop.
const BLOCK_LEN: u32 = 64;

struct Sum {
    skb: Skb,
    offset: u32,
    rest: u32,
    sum: u64,
}

/// The checksum of a UDP datagram of `len` bytes (header included, its checksum 0) behind an IPv6 header.
///
/// IPv6 has no datagrams without one, and Linux drops those at sockets (RFC 8200 section 8.1).
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
        bpf_loop(len.div_ceil(BLOCK_LEN), add_block as *mut c_void, core::ptr::from_mut(&mut state).cast(), 0)
    };
    if turns < 0 || state.rest != 0 {
        return Err(Reason::Helper);
    }
    match !fold(state.sum) {
        // Zero would say that there is no checksum.
        0 => Ok(0xffff),
        checksum => Ok(checksum),
    }
}

/// Adds up to 64 bytes. Returns 1 to stop.
#[inline(never)]
extern "C" fn add_block(_: u32, state: *mut Sum) -> i64 {
    // SAFETY: `udp_v6` passes its state.
    let state = unsafe { &mut *state };
    if state.rest >= BLOCK_LEN {
        let Ok(words) = at::<[u32; (BLOCK_LEN / 4) as usize]>(state.skb, masked(state.offset)) else {
            return 1;
        };
        let mut word = 0;
        while word < (BLOCK_LEN / 4) as usize {
            // SAFETY: `at` has checked the bounds.
            state.sum += u64::from(unsafe { (*words)[word] });
            word += 1;
        }
        state.offset += BLOCK_LEN;
        state.rest -= BLOCK_LEN;
        return 0;
    }
    let mut done = 0;
    while done + 2 <= BLOCK_LEN && state.rest >= 2 {
        let Ok(half) = at::<u16>(state.skb, masked(state.offset + done)) else { return 1 };
        // SAFETY: `at` has checked the bounds.
        state.sum += u64::from(unsafe { *half });
        state.rest -= 2;
        done += 2;
    }
    if state.rest == 1 {
        // With the byte before it, which there always is: the header has an even length.
        let Ok(last) = at::<[u8; 2]>(state.skb, masked(state.offset + done - 1)) else { return 1 };
        // SAFETY: `at` has checked the bounds.
        state.sum += u64::from(unsafe { (*last)[1] });
        state.rest = 0;
    }
    0
}

/// An offset whose greatest value the verifier sees, and the compiler does not.
#[inline(always)]
fn masked(offset: u32) -> usize {
    (black_box(u64::from(offset)) & 0x3fff) as usize
}
