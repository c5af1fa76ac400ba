//! Packets whose checksum the kernel has left for later. Small ones are finished here, which spares
//! them the way through the normaliser. Before one is left to its receiver, a container of this
//! host, it is made sure that this will not change who sent it.

use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes, bpf_skb_store_bytes};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, UDP_LEN, checksum_place};

use super::checksum::fold;
use super::cipher::{Claimed, PACKET_LEN};
use super::frame::{
    Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Skb, adjust_room, at, is_unfinished, resize, shift,
};

const PROTOCOL_SCTP: u8 = 132;
/// Length of a TCP header without options.
const TCP_LEN: usize = 20;

/// [`try_finish`]: nothing has changed; finished; the kernel refused. [`try_leave`]: can be finished;
/// in the headers; the kernel refused.
const LEFT: i64 = 0;
const FINISHED: i64 = 1;
const REFUSED: i64 = -1;
const MISPLACED: i64 = 2;

/// Makes sure that a checksum which an IPv4 packet leaves to its receiver, if it does, will not be
/// written into the headers that were checked. Destroys the first two bytes of the frame.
///
/// # Errors
/// [`Reason::Checksum`]: it would. Containers choose the place freely (`PACKET_VNET_HDR`).
/// [`Reason::Helper`] if the kernel refuses, or no memory is left.
#[inline(always)]
pub fn leave(skb: Skb) -> Result<(), Reason> {
    if !is_unfinished(skb)? {
        return Ok(());
    }
    match try_leave(skb) {
        FINISHED => Ok(()),
        MISPLACED => Err(Reason::Checksum),
        _ => Err(Reason::Helper),
    }
}

/// A frame of its own: what it needs of the stack is not added to the caller's beside the cipher's.
///
/// No field of the context tells where a checksum begins. But once that place is no longer part of
/// the packet, the kernel forgets it (`skb_postpull_rcsum`): so what is in front of the transport
/// header is taken away for a moment. The place lies behind the beginning.
#[inline(never)]
fn try_leave(skb: Skb) -> i64 {
    let Ok(ip) = at::<Ipv4>(skb, ETHERNET_LEN) else { return REFUSED };
    // SAFETY: `at` has checked the bounds.
    let (header, protocol) = unsafe { ((*ip).header_len(), (*ip).protocol) };
    let front = ETHERNET_LEN as u32 + header;
    let Ok(scratch) = Claimed::new() else { return REFUSED };
    // The verifier does not see that it is neither 0 nor larger than the memory.
    let front = (black_box(front - 1) & (PACKET_LEN as u32 - 1)) + 1;
    let len = skb.len();
    // No packet is left with less than an IPv4 header.
    let least = front + (ETHERNET_LEN + IPV4_LEN) as u32;
    if len < least && resize(skb, least).is_err() {
        return REFUSED;
    }
    // SAFETY: the scratch memory is ours, and has room for so much.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), ETHERNET_LEN as u32, scratch.packet().cast(), front) != 0
        {
            return REFUSED;
        }
        if shift(skb, -(front as i32)).is_err() {
            // Of all segments, the kernel refuses this to those of SCTP, which nobody makes but
            // itself.
            return if protocol == PROTOCOL_SCTP && skb.gso_size() != 0 {
                FINISHED
            } else {
                REFUSED
            };
        }
        let Ok(is_left) = is_unfinished(skb) else { return REFUSED };
        if !is_left {
            return MISPLACED;
        }
        if shift(skb, front as i32).is_err()
            || bpf_skb_store_bytes(skb, ETHERNET_LEN as u32, scratch.packet().cast(), front, 0) != 0
        {
            return REFUSED;
        }
    }
    if len < least && resize(skb, len).is_err() { REFUSED } else { FINISHED }
}

/// Finishes the checksum of an IPv4 packet of `len` bytes, if it is small. False if that is left to
/// the normaliser.
///
/// # Errors
/// [`Reason::Helper`] if the kernel refuses. The packet is garbage then.
#[inline(always)]
pub fn finish(skb: Skb, len: u32) -> Result<bool, Reason> {
    match try_finish(skb, len) {
        LEFT => Ok(false),
        FINISHED => Ok(true),
        _ => Err(Reason::Helper),
    }
}

/// A frame of its own: what it needs of the stack is not added to the caller's beside the cipher's.
#[inline(never)]
fn try_finish(skb: Skb, len: u32) -> i64 {
    let Ok(ip) = at::<Ipv4>(skb, ETHERNET_LEN) else { return LEFT };
    // SAFETY: `at` has checked the bounds.
    let (version_ihl, is_fragment, protocol, addresses) = unsafe {
        let addresses = u64::from((*ip).source) + u64::from((*ip).destination);
        ((*ip).version_ihl, (*ip).is_fragment(), (*ip).protocol, addresses)
    };
    let (header, place) = match protocol {
        PROTOCOL_TCP => (TCP_LEN, checksum_place(PROTOCOL_TCP)),
        PROTOCOL_UDP => (UDP_LEN, checksum_place(PROTOCOL_UDP)),
        _ => return LEFT,
    };
    let is_plain = version_ihl == 0x45 && !is_fragment;
    let frame = ETHERNET_LEN as u32 + len;
    if !is_plain
        || len < (IPV4_LEN + header) as u32
        || len >= PACKET_LEN as u32
        || skb.len() != frame
    {
        return LEFT;
    }
    let Ok(scratch) = Claimed::new() else { return LEFT };
    let packet = scratch.packet();
    let segment = len - IPV4_LEN as u32;
    let last_word = black_box(len as usize) & (PACKET_LEN - 4);
    // The verifier does not see that the length is neither 0 nor larger than the memory.
    let len = (black_box(len - 1) & (PACKET_LEN as u32 - 1)) + 1;
    // SAFETY: the scratch memory is ours, and the offsets lie within it.
    unsafe {
        // What the last word of the sum has beyond the packet's end.
        packet.add(last_word).cast::<u32>().write_volatile(0);
        if bpf_skb_load_bytes(skb.cast(), ETHERNET_LEN as u32, packet.cast(), len) != 0 {
            return LEFT;
        }
        let pseudo = addresses
            + u64::from(u16::from(protocol).to_be())
            + u64::from((segment as u16).to_be());
        let checksum = packet.add(black_box(IPV4_LEN + place) & 0x3f).cast::<u16>();
        // Where it is to go, no field of the context says. A checksum that waits begins as the sum
        // of the pseudo header; another value here means that another one waits: that of a packet
        // in the packet.
        if checksum.read_volatile() != fold(pseudo) {
            return LEFT;
        }
        let summed = black_box(segment + 3) & (PACKET_LEN as u32 - 4);
        let sum = bpf_csum_diff(core::ptr::null_mut(), 0, packet.add(IPV4_LEN).cast(), summed, 0);
        if sum < 0 {
            return LEFT;
        }
        checksum.write_volatile(match !fold(sum as u64) {
            // In UDP, zero would say that there is no checksum.
            0 if protocol == PROTOCOL_UDP => 0xffff,
            finished => finished,
        });
        // For the kernel, the checksum is no longer to be finished once the place where that would
        // begin is no longer part of the packet (`skb_postpull_rcsum`): so the packet is put behind
        // itself, and what it was removed. That leaves room in front, too.
        if resize(skb, 2 * frame).is_err() {
            return LEFT;
        }
        if adjust_room(skb, -(frame as i32)).is_err()
            || bpf_skb_store_bytes(skb, ETHERNET_LEN as u32, packet.cast(), len, 0) != 0
        {
            return REFUSED;
        }
    }
    FINISHED
}
