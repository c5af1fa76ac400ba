//! Tracks which peers have packets in the offload veth. While a peer has some, its further packets
//! take the same path, so that they do not overtake.

use overnode_ebpf::map::{OFFLOAD_VETH_STALE_NS, Peer};

use super::frame::Skb;
use super::maps;

/// Counts a packet, or its segments, into the offload veth, and marks it with the source address
/// that it must still have when it is sealed. The mark stays with the packet through both ends,
/// which are in one namespace. It is not part of the packet, so nothing that the kernel writes into
/// packets changes it.
#[inline(always)]
pub fn enter(skb: Skb, peer: *mut Peer, source: u32) {
    // SAFETY: the kernel passes a valid context to the program; array map values stay valid while
    // it runs, here and below.
    unsafe {
        (*skb).mark = source;
        (*peer).offload_last_ns = maps::now();
        maps::add(&raw mut (*peer).offload_in, (*skb).gso_segs.max(1));
    }
}

/// Counts a packet that left the offload veth.
#[inline(always)]
pub fn leave(peer: *mut Peer) {
    // SAFETY: as above.
    unsafe { maps::add(&raw mut (*peer).offload_out, 1) };
}

/// Returns true if the offload veth holds no packets of the peer.
#[inline(always)]
pub fn is_empty(peer: *mut Peer) -> bool {
    // SAFETY: as above.
    unsafe {
        let offload_in = (&raw const (*peer).offload_in).read_volatile();
        if offload_in == (&raw const (*peer).offload_out).read_volatile() {
            return true;
        }
        // Packets were lost on the way or miscounted: a container's kernel may claim any number of
        // segments.
        let is_stale = maps::now() > (*peer).offload_last_ns + OFFLOAD_VETH_STALE_NS;
        if is_stale {
            (*peer).offload_out = offload_in;
        }
        is_stale
    }
}
