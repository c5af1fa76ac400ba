//! Makes tailroom in packets that programs cannot extend: those that a tunnel inside the container
//! encapsulated with a partial checksum. On those, `skb->encapsulation` makes bpf_skb_change_tail
//! fail.

use core::ffi::c_void;
use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_loop, bpf_skb_load_bytes, bpf_skb_store_bytes};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, PADDING, TAG_LEN};

use super::cipher::{Claimed, PACKET_LEN};
use super::frame::{Frame, Skb, adjust_room};
use super::{CONTINUE, STOP};

/// Maximum bytes that sealing appends, a power of two.
const MAX_APPENDED: u32 = (PADDING + TAG_LEN) as u32;

/// State of the move, on the stack.
struct Move {
    skb: Skb,
    memory: *mut u8,
    /// Destination offset of the next chunk.
    offset: u32,
    /// Distance of the move, in bytes.
    by: u32,
    rest: u32,
}

/// Extends a packet to `len` bytes with zeros. Inserts room at the front, where the kernel allows
/// it, and moves the packet there.
///
/// # Errors
/// [`Reason::Helper`] if the kernel refuses that, too, if no scratch memory is left, or if `len`
/// adds nothing or more than sealing needs.
#[inline(always)]
pub fn extend(skb: Skb, len: u32) -> Result<(), Reason> {
    if try_extend(skb, len) == 0 { skb.linearize_all() } else { Err(Reason::Helper) }
}

/// Not inlined, so that its stack is not part of the caller's frame, which is live while the cipher
/// runs.
#[inline(never)]
fn try_extend(skb: Skb, len: u32) -> i64 {
    let before = skb.len();
    let by = len.wrapping_sub(before);
    let Some(rest) = before.checked_sub(ETHERNET_LEN as u32) else { return REFUSED };
    let Ok(scratch) = Claimed::new() else { return REFUSED };
    if by == 0 || by > MAX_APPENDED || adjust_room(skb, by as i32).is_err() {
        return REFUSED;
    }
    let mut work = Move { skb, memory: scratch.packet(), offset: ETHERNET_LEN as u32, by, rest };
    // SAFETY: the callback matches the helper's contract, and its state outlives the call; this
    // program has claimed the memory.
    unsafe {
        let turns = rest / PACKET_LEN as u32 + 1;
        bpf_loop(turns, move_chunk as *mut c_void, (&raw mut work).cast(), 0);
        if work.rest != 0 {
            return REFUSED;
        }
        for word in 0..MAX_APPENDED as usize / 8 {
            work.memory.cast::<u64>().add(word).write_volatile(0);
        }
        let by = (black_box(by - 1) & (MAX_APPENDED - 1)) + 1;
        bpf_skb_store_bytes(skb, before, work.memory.cast(), by, 0)
    }
}

const REFUSED: i64 = -1;

#[inline(never)]
extern "C" fn move_chunk(_: u32, work: *mut Move) -> i64 {
    // SAFETY: `try_extend` passes its state.
    let work = unsafe { &mut *work };
    let some = work.rest.min(PACKET_LEN as u32);
    if some == 0 {
        return STOP;
    }
    // The verifier does not know that it is neither 0 nor larger than the memory.
    let some = (black_box(some - 1) & (PACKET_LEN as u32 - 1)) + 1;
    // SAFETY: the context is valid, and the memory has room.
    unsafe {
        if bpf_skb_load_bytes(work.skb.cast(), work.offset + work.by, work.memory.cast(), some) != 0
            || bpf_skb_store_bytes(work.skb, work.offset, work.memory.cast(), some, 0) != 0
        {
            return STOP;
        }
    }
    work.offset += some;
    work.rest -= some;
    CONTINUE
}
