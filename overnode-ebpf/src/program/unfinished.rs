//! Packets whose checksum the kernel has left for later. Small ones are finished here, which spares
//! them the way through the normaliser. Where the checksum of any would be written is checked
//! before somebody else finishes it.

use core::hint::black_box;

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes, bpf_skb_store_bytes};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, UDP_LEN, checksum_place};

use super::checksum::fold;
use super::cipher::{Claimed, PACKET_LEN};
use super::frame::{
    Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Skb, adjust_room, at, is_finished_from, is_unfinished, resize,
};

/// Length of a TCP header without options.
const TCP_LEN: usize = 20;

/// [`try_finish`]: nothing has changed; finished; the kernel refused.
const LEFT: i64 = 0;
const FINISHED: i64 = 1;
const REFUSED: i64 = -1;

/// True if a checksum of an IPv4 packet is left for later. Destroys the first two bytes of the
/// frame.
///
/// # Errors
/// [`Reason::Checksum`] if finishing it would change what packets are judged by: anything in front
/// of the place that the transport header has for its own. Containers choose that place freely
/// (`PACKET_VNET_HDR`).
#[inline(always)]
pub fn is_left(skb: Skb) -> Result<bool, Reason> {
    if !is_unfinished(skb)? {
        return Ok(false);
    }
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (header, protocol) = unsafe { ((*ip).header_len(), (*ip).protocol) };
    let first = ETHERNET_LEN as u32 + header + checksum_place(protocol) as u32;
    if is_finished_from(skb, first) { Ok(true) } else { Err(Reason::Checksum) }
}

/// Finishes the checksum of an IPv4 packet of `len` bytes, if it is small. False if that is left to the normaliser.
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
    if !is_plain || len < (IPV4_LEN + header) as u32 || len >= PACKET_LEN as u32 || skb.len() != frame {
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
        let pseudo = addresses + u64::from(u16::from(protocol).to_be()) + u64::from((segment as u16).to_be());
        let checksum = packet.add(black_box(IPV4_LEN + place) & 0x3f).cast::<u16>();
        // Where it is to go, no field of the context says. A checksum that waits begins as the sum of the pseudo header; another
        // value here means that another one waits: that of a packet in the packet.
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
        // For the kernel, the checksum is no longer to be finished once the place where that would begin is no longer part of the
        // packet (`skb_postpull_rcsum`): so the packet is put behind itself, and what it was removed. That leaves room in front, too.
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
