//! From a worker of the bulk path: deliver what it opened, and joined perhaps.

use aya_ebpf::helpers::generated::bpf_skb_change_type;
use overnode_ebpf::map::{ROUTE_HOST, ROUTE_LOCAL, ROUTE_PEER};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{BULK_MAC, ETHERNET_LEN, ETHERTYPE_IPV4, IPV4_LEN};

use super::Sent;
use super::frame::{Ethernet, Frame, Ipv4, PACKET_HOST, Skb, at, redirect, redirect_peer};
use super::maps::{self, Routes};

/// Last word of the destination address of frames that workers write.
const FROM_WORKER: u16 = u16::from_ne_bytes([BULK_MAC[4], BULK_MAC[5]]);

/// The peer is who the worker says, which has authenticated it; whether it may send from that address is seen here.
pub fn run(skb: Skb) -> Result<Sent, Reason> {
    skb.linearize((ETHERNET_LEN + IPV4_LEN) as u32)?;
    let ethernet = at::<Ethernet>(skb, 0)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (mark, from, kind, sane, source, destination) = unsafe {
        (
            (*ethernet).destination[2],
            (*ethernet).source,
            u16::from_be((*ethernet).kind_be),
            (*ip).is_sane(skb.len() - ETHERNET_LEN as u32),
            (*ip).source,
            (*ip).destination,
        )
    };
    if mark != FROM_WORKER || kind != ETHERTYPE_IPV4 {
        return Err(Reason::Unsupported);
    }
    if !sane {
        return Err(Reason::Malformed);
    }
    let peer = u32::from(u16::from_le(from[0])) | u32::from(u16::from_le(from[1])) << 16;
    let mut routes = Routes::new();
    match routes.v4(source) {
        Some(route) if route.kind == ROUTE_PEER && route.target == peer => {}
        _ => return Err(Reason::ForeignSource),
    }
    let (ifindex, is_host) = match routes.v4(destination) {
        Some(route) if route.kind == ROUTE_LOCAL || route.kind == ROUTE_HOST => {
            (route.target, route.kind == ROUTE_HOST)
        }
        _ => return Err(Reason::NotHere),
    };
    let endpoint = maps::endpoint(ifindex).ok_or(Reason::NotHere)?;
    skb.set_ethernet(&endpoint.mac, &endpoint.gateway_mac)?;
    let counted = Some(Reason::BulkReceived);
    if is_host {
        return Ok(Sent { counted, verdict: redirect(ifindex) });
    }
    // The frame is not parsed again on its way into the other namespace, and was none of this host's so far.
    // SAFETY: the context is valid.
    if unsafe { bpf_skb_change_type(skb, PACKET_HOST) } != 0 {
        return Err(Reason::Helper);
    }
    // What can be joined is joined already: nothing is gained by the veth's GRO.
    Ok(Sent { counted, verdict: redirect_peer(ifindex) })
}
