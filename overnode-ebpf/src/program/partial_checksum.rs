//! Handles packets with a partial checksum, which the kernel was to complete later.
//!
//! Checksums of small packets are completed here, which saves the way through the offload veth. A
//! checksum may also be left to the receiver if that is a container of this host. Before that, this
//! module makes sure that completing it cannot change the sender.

use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes, bpf_skb_store_bytes};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, UDP_LEN, checksum_offset};

use super::checksum::fold;
use super::cipher::{Claimed, PACKET_LEN};
use super::frame::{
    Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Skb, adjust_room, at, has_partial_checksum, resize,
    shift_keeping_offloads,
};

const PROTOCOL_SCTP: u8 = 132;
/// Length in bytes of a TCP header without options.
const TCP_LEN: usize = 20;

/// Results. From [`try_finish`]: `LEFT` (nothing changed), `FINISHED`, or `REFUSED` by the kernel.
/// From [`try_leave`]: `FINISHED` (can be completed), `MISPLACED` (inside the headers), or
/// `REFUSED`.
const LEFT: i64 = 0;
const FINISHED: i64 = 1;
const REFUSED: i64 = -1;
const MISPLACED: i64 = 2;

/// Makes sure that a partial checksum that is left to the receiver of an IPv4 packet cannot be
/// written into headers that were checked. Destroys the first two bytes of the frame.
///
/// # Errors
/// [`Reason::Checksum`] if it would be. Containers choose the location freely (`PACKET_VNET_HDR`).
/// [`Reason::Helper`] if the kernel refuses, or no memory is left.
#[inline(always)]
pub fn leave(skb: Skb) -> Result<(), Reason> {
    if !has_partial_checksum(skb)? {
        return Ok(());
    }
    match try_leave(skb) {
        FINISHED => Ok(()),
        MISPLACED => Err(Reason::Checksum),
        _ => Err(Reason::Helper),
    }
}

/// Not inlined, so that its stack is not part of the caller's frame, which is live while the cipher
/// runs.
///
/// The context has no field for the start of a partial checksum. But the kernel drops the checksum
/// once its start is no longer part of the packet (`skb_postpull_rcsum`). So everything before the
/// transport header is removed for a moment. A checksum that survives is written after its start,
/// and thus after the headers.
#[inline(never)]
fn try_leave(skb: Skb) -> i64 {
    let Ok(ip) = at::<Ipv4>(skb, ETHERNET_LEN) else { return REFUSED };
    // SAFETY: `at` has checked the bounds.
    let (header, protocol) = unsafe { ((*ip).header_len(), (*ip).protocol) };
    let front = ETHERNET_LEN as u32 + header;
    let Ok(scratch) = Claimed::new() else { return REFUSED };
    // The verifier does not know that it is neither 0 nor larger than the memory.
    let front = (black_box(front - 1) & (PACKET_LEN as u32 - 1)) + 1;
    let len = skb.len();
    // The kernel does not let a packet become shorter than an IPv4 header.
    let least = front + (ETHERNET_LEN + IPV4_LEN) as u32;
    if len < least && resize(skb, least).is_err() {
        return REFUSED;
    }
    // SAFETY: this program has claimed the scratch memory, which has room for `front` bytes.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), ETHERNET_LEN as u32, scratch.packet().cast(), front) != 0
        {
            return REFUSED;
        }
        if shift_keeping_offloads(skb, -(front as i32)).is_err() {
            // Among segmented packets, the kernel refuses this only for SCTP. Only the kernel
            // itself creates those.
            return if protocol == PROTOCOL_SCTP && skb.gso_size() != 0 {
                FINISHED
            } else {
                REFUSED
            };
        }
        let Ok(is_left) = has_partial_checksum(skb) else { return REFUSED };
        if !is_left {
            return MISPLACED;
        }
        if shift_keeping_offloads(skb, front as i32).is_err()
            || bpf_skb_store_bytes(skb, ETHERNET_LEN as u32, scratch.packet().cast(), front, 0) != 0
        {
            return REFUSED;
        }
    }
    if len < least && resize(skb, len).is_err() { REFUSED } else { FINISHED }
}

/// Completes the checksum of an IPv4 packet of `len` bytes, if the packet is small. Returns false
/// if that is left to the offload veth.
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

/// Not inlined, so that its stack is not part of the caller's frame, which is live while the cipher
/// runs.
#[inline(never)]
fn try_finish(skb: Skb, len: u32) -> i64 {
    let Ok(ip) = at::<Ipv4>(skb, ETHERNET_LEN) else { return LEFT };
    // SAFETY: `at` has checked the bounds.
    let (version_ihl, is_fragment, protocol, addresses) = unsafe {
        let addresses = u64::from((*ip).source) + u64::from((*ip).destination);
        ((*ip).version_ihl, (*ip).is_fragment(), (*ip).protocol, addresses)
    };
    let (header, place) = match protocol {
        PROTOCOL_TCP => (TCP_LEN, checksum_offset(PROTOCOL_TCP)),
        PROTOCOL_UDP => (UDP_LEN, checksum_offset(PROTOCOL_UDP)),
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
    // The verifier does not know that the length is neither 0 nor larger than the memory.
    let len = (black_box(len - 1) & (PACKET_LEN as u32 - 1)) + 1;
    // SAFETY: this program has claimed the scratch memory, and the offsets are inside it.
    unsafe {
        // Zero the bytes that the last word of the sum has beyond the packet's end.
        packet.add(last_word).cast::<u32>().write_volatile(0);
        if bpf_skb_load_bytes(skb.cast(), ETHERNET_LEN as u32, packet.cast(), len) != 0 {
            return LEFT;
        }
        let pseudo = addresses
            + u64::from(u16::from(protocol).to_be())
            + u64::from((segment as u16).to_be());
        let checksum = packet.add(black_box(IPV4_LEN + place) & 0x3f).cast::<u16>();
        // The context has no field for the location of a partial checksum. Its field starts out
        // with the sum of the pseudo header. Any other value here means that the partial checksum
        // is another one: that of an encapsulated packet.
        if checksum.read_volatile() != fold(pseudo) {
            return LEFT;
        }
        let summed = black_box(segment + 3) & (PACKET_LEN as u32 - 4);
        let sum = bpf_csum_diff(core::ptr::null_mut(), 0, packet.add(IPV4_LEN).cast(), summed, 0);
        if sum < 0 {
            return LEFT;
        }
        checksum.write_volatile(match !fold(sum as u64) {
            // In UDP, zero would mean that there is no checksum.
            0 if protocol == PROTOCOL_UDP => 0xffff,
            finished => finished,
        });
        // The kernel drops a partial checksum once its start is no longer part of the packet
        // (`skb_postpull_rcsum`). So double the packet's length, remove the original bytes, and
        // store the packet again. This also makes room at the front.
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
