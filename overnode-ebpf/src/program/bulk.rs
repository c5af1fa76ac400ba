//! To a worker of the bulk path: flows that send many segments at once, as a whole and in order.

use overnode_ebpf::map::{
    BULK_MOVED, BULK_PATIENCE, BULK_PAUSE_NS, BULK_SILENCE_NS, BULK_THRESHOLD, BulkFlow,
    BulkFlowKey,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{BULK_MAC, ETHERNET_LEN};

use super::frame::{Ethernet, Frame, Ipv4, PROTOCOL_TCP, PROTOCOL_UDP, Skb, at, redirect};
use super::{Sent, maps, normaliser};

/// [`try_steer`]: not the bulk path's.
const NOT: i64 = -1;

/// Hands a packet for a peer to a worker, if it belongs to a bulk flow and the worker lives.
/// `None`: it stays with the programs.
#[inline(always)]
pub fn steer(skb: Skb, peer: u32) -> Option<Sent> {
    let verdict = try_steer(skb, peer);
    (verdict != NOT).then_some(Sent { counted: Some(Reason::BulkSent), verdict })
}

/// A frame of its own: what it needs of the stack is not added to the caller's beside the cipher's.
#[inline(never)]
fn try_steer(skb: Skb, index: u32) -> i64 {
    let Some(peer) = maps::bulk_peer(index) else { return NOT };
    let now = maps::now();
    let is_large = skb.gso_size() != 0;
    // SAFETY: values of an array map are valid for the whole program, here and below.
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
    // SAFETY: as above; two CPUs that count for one flow at once miscount it a little.
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

/// Whether a flow that has sent so much can move without overtaking itself.
#[inline(always)]
fn may_move(peer: u32, sent: u64) -> bool {
    // Perhaps some were lost in the normaliser and never come out.
    sent >= BULK_PATIENCE
        || sent >= BULK_THRESHOLD && maps::peer(peer).is_some_and(normaliser::is_empty)
}

/// The flow that a packet belongs to; `None` for a fragment or another protocol.
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

/// Which worker a flow goes to: always the same, as long as their number is.
#[inline(always)]
fn choose(key: &BulkFlowKey, workers: u32) -> u32 {
    const GOLDEN: u32 = 0x9e37_79b1;
    let mixed = (key.source ^ key.destination.rotate_left(11) ^ key.ports).wrapping_mul(GOLDEN);
    (u64::from(mixed) * u64::from(workers) >> 32) as u32
}

/// Writes the header by which the worker knows the peer, and the source that the packet must still
/// have when it is sealed.
#[inline(always)]
fn address(skb: Skb, peer: u32, owner: u32) -> bool {
    let Ok(ethernet) = at::<Ethernet>(skb, 0) else { return false };
    // SAFETY: `at` has checked the bounds. Volatile, so that no loop over bytes comes of it.
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
