//! Which peers have packets in the normaliser. While one has, its others follow them there instead
//! of overtaking them.

use overnode_ebpf::map::{NORMALISER_PATIENCE_NS, Peer};

use super::frame::Skb;
use super::maps;

/// Counts a packet, or the packets that it becomes, on the way into the normaliser, and marks it
/// with the address that it must still come from when it is sealed. The mark goes with the packet
/// through both ends, which are in one namespace, and nothing that the kernel writes into packets
/// gets there.
#[inline(always)]
pub fn enter(skb: Skb, peer: *mut Peer, source: u32) {
    // SAFETY: the kernel hands a valid context to the program; values of an array map are valid for
    // all of it, here and below.
    unsafe {
        (*skb).mark = source;
        (*peer).normalising_ns = maps::now();
        maps::add(&raw mut (*peer).normalising, (*skb).gso_segs.max(1));
    }
}

/// Counts a packet that came out of the normaliser.
#[inline(always)]
pub fn leave(peer: *mut Peer) {
    // SAFETY: as above.
    unsafe { maps::add(&raw mut (*peer).normalised, 1) };
}

/// True if nothing of the peer's is in the normaliser.
#[inline(always)]
pub fn is_empty(peer: *mut Peer) -> bool {
    // SAFETY: as above.
    unsafe {
        let normalising = (&raw const (*peer).normalising).read_volatile();
        if normalising == (&raw const (*peer).normalised).read_volatile() {
            return true;
        }
        // Lost on the way, or counted wrong: a container's kernel may say anything of its segments.
        let is_stale = maps::now() > (*peer).normalising_ns + NORMALISER_PATIENCE_NS;
        if is_stale {
            (*peer).normalised = normalising;
        }
        is_stale
    }
}
