//! Tracks which peers have packets in the offload veth. While a peer has some, its further packets
//! take the same path, so that they do not overtake.

use overnode_ebpf::map::{NORMALISER_PATIENCE_NS, Peer};

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
        (*peer).normalising_ns = maps::now();
        maps::add(&raw mut (*peer).normalising, (*skb).gso_segs.max(1));
    }
}

/// Counts a packet that left the offload veth.
#[inline(always)]
pub fn leave(peer: *mut Peer) {
    // SAFETY: as above.
    unsafe { maps::add(&raw mut (*peer).normalised, 1) };
}

/// Returns true if the offload veth holds no packets of the peer.
#[inline(always)]
pub fn is_empty(peer: *mut Peer) -> bool {
    // SAFETY: as above.
    unsafe {
        let normalising = (&raw const (*peer).normalising).read_volatile();
        if normalising == (&raw const (*peer).normalised).read_volatile() {
            return true;
        }
        // Packets were lost on the way or miscounted: a container's kernel may claim any number of
        // segments.
        let is_stale = maps::now() > (*peer).normalising_ns + NORMALISER_PATIENCE_NS;
        if is_stale {
            (*peer).normalised = normalising;
        }
        is_stale
    }
}
