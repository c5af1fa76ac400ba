//! Delivers packets that a bulk worker opened and perhaps coalesced.

use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{BULK_MAC, ETHERNET_LEN, ETHERTYPE_IPV4, IPV4_LEN};

use super::frame::{Ethernet, Frame, Ipv4, Mac, Skb, at, mac};
use super::{Verdict, checks, from_container};

/// Destination MAC address of frames from workers.
const FROM_WORKER: Mac = mac(BULK_MAC);

/// Delivers a packet from a worker. The worker names the peer and has authenticated it. This
/// program checks that the peer may use the source address.
pub fn run(skb: Skb) -> Result<Verdict, Reason> {
    skb.linearize((ETHERNET_LEN + IPV4_LEN) as u32)?;
    let ethernet = at::<Ethernet>(skb, 0)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (to, from, kind, sane, source, destination) = unsafe {
        (
            (*ethernet).destination,
            (*ethernet).source,
            u16::from_be((*ethernet).ether_type_be),
            (*ip).is_sane(skb.len() - ETHERNET_LEN as u32),
            (*ip).source,
            (*ip).destination,
        )
    };
    if to != FROM_WORKER || kind != ETHERTYPE_IPV4 {
        return Err(Reason::Unsupported);
    }
    if !sane {
        return Err(Reason::Malformed);
    }
    // Packets between the nodes themselves do not use this path.
    let peer = u32::from(u16::from_le(from[0]));
    let route = checks::arriving(peer, source, destination)?.ok_or(Reason::NotHere)?;
    // Everything that can be coalesced already is, so the veth's GRO would gain nothing.
    from_container::hand_over(skb, route, Reason::BulkReceived)
}
