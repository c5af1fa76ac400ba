//! Redirects bulk flows, which send many segments at once, to bulk workers: complete and in order.

use overnode_ebpf::map::{
    BULK_MOVED, BULK_PATIENCE, BULK_PAUSE_NS, BULK_SILENCE_NS, BULK_THRESHOLD, BulkFlow,
    BulkFlowKey,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{BULK_MAC, ETHERNET_LEN};

use super::frame::{Ethernet, Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Skb, at, redirect};
use super::{Verdict, maps, offload_veth};

/// Result of [`try_steer`]: the packet does not belong on the bulk path.
const NOT: i64 = -1;

/// Hands a packet for a peer to a worker if it belongs to a bulk flow and the worker is alive.
/// Returns `None` if the programs must handle the packet.
#[inline(always)]
pub fn steer(skb: Skb, peer: u32) -> Option<Verdict> {
    let verdict = try_steer(skb, peer);
    (verdict != NOT).then_some(Verdict::Redirected(Reason::BulkSent, verdict))
}

/// Not inlined, so that its stack is not part of the caller's frame, which is live while the cipher
/// runs.
#[inline(never)]
fn try_steer(skb: Skb, index: u32) -> i64 {
    let Some(peer) = maps::bulk_peer(index) else { return NOT };
    let now = maps::now();
    let is_large = skb.gso_size() != 0;
    // SAFETY: array map values stay valid while the program runs, here and below.
    if !is_large && now >= unsafe { (*peer).busy_until_ns } {
        return NOT;
    }
    let Some(key) = key(skb) else { return NOT };
    let Some(flow) = maps::bulk_flow(&key) else {
        if is_large {
            maps::add_bulk_flow(&key, &BulkFlow { last_ns: now, bytes: skb.len().into() });
        }
        return NOT;
    };
    // SAFETY: as above. Two CPUs that count for the same flow at once miscount it slightly.
    unsafe {
        let paused = now > (*flow).last_ns + BULK_PAUSE_NS;
        (*flow).last_ns = now;
        let sent = if paused { 0 } else { (*flow).bytes };
        if sent != BULK_MOVED {
            let sent = sent + if is_large { u64::from(skb.len()) } else { 0 };
            if !is_large || !may_move(index, sent) {
                (*flow).bytes = sent;
                return NOT;
            }
        }
        let workers = (&raw const (*peer).workers).read_volatile();
        let Some(worker) = maps::bulk_worker(choose(&key, workers)) else { return NOT };
        let ifindex = (&raw const (*worker).ifindex).read_volatile();
        let is_alive = ifindex != 0 && now <= (*worker).alive_ns + BULK_SILENCE_NS;
        if !is_alive || !address(skb, index, key.source) {
            (*flow).bytes = 0;
            return NOT;
        }
        (*flow).bytes = BULK_MOVED;
        (*peer).busy_until_ns = now + BULK_PAUSE_NS;
        redirect(ifindex)
    }
}

/// Returns true if a flow that has sent `sent` bytes in large packets can move without overtaking
/// itself.
#[inline(always)]
fn may_move(peer: u32, sent: u64) -> bool {
    // Above this limit, move anyway: packets lost in the offload veth never leave it.
    sent >= BULK_PATIENCE
        || sent >= BULK_THRESHOLD && maps::peer(peer).is_some_and(offload_veth::is_empty)
}

/// Returns the flow of a packet, or `None` for a fragment or another protocol.
#[inline(always)]
fn key(skb: Skb) -> Option<BulkFlowKey> {
    let ip = at::<Ipv4>(skb, ETHERNET_LEN).ok()?;
    // SAFETY: `at` has checked the bounds.
    let (header, protocol, is_fragment, source, destination) = unsafe {
        ((*ip).header_len(), (*ip).protocol, (*ip).is_fragment(), (*ip).source, (*ip).destination)
    };
    if is_fragment || !(protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP) {
        return None;
    }
    skb.linearize(ETHERNET_LEN as u32 + header + 4).ok()?;
    let offset = core::hint::black_box(u64::from(header)) & 0x3c;
    let ports = at::<u32>(skb, ETHERNET_LEN + offset as usize).ok()?;
    // SAFETY: `at` has checked the bounds.
    Some(BulkFlowKey { source, destination, ports: unsafe { *ports }, protocol: protocol.into() })
}

/// Returns the worker of a flow. It stays the same while the number of workers does.
#[inline(always)]
fn choose(key: &BulkFlowKey, workers: u32) -> u32 {
    const GOLDEN: u32 = 0x9e37_79b1;
    let mixed = (key.source ^ key.destination.rotate_left(11) ^ key.ports).wrapping_mul(GOLDEN);
    (u64::from(mixed) * u64::from(workers) >> 32) as u32
}

/// Writes the header that tells the worker the peer and the source address that the packet must
/// have when it is sealed.
#[inline(always)]
fn address(skb: Skb, peer: u32, owner: u32) -> bool {
    let Ok(ethernet) = at::<Ethernet>(skb, 0) else { return false };
    // SAFETY: `at` has checked the bounds. Volatile, so that the compiler does not emit a loop over
    // bytes.
    unsafe {
        let destination = (&raw mut (*ethernet).destination).cast::<u16>();
        let source = (&raw mut (*ethernet).source).cast::<u16>();
        for word in 0..3 {
            let mac = u16::from_ne_bytes([BULK_MAC[2 * word], BULK_MAC[2 * word + 1]]);
            destination.add(word).write_volatile(mac);
        }
        let [a, b, c, d] = owner.to_ne_bytes();
        source.write_volatile((peer as u16).to_le());
        source.add(1).write_volatile(u16::from_ne_bytes([a, b]));
        source.add(2).write_volatile(u16::from_ne_bytes([c, d]));
    }
    true
}
