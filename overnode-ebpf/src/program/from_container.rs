//! Processes packets from containers: checks the sender and routes the packet.

use aya_ebpf::helpers::generated::bpf_skb_change_type;
use overnode_ebpf::map::{Endpoint, PROGRAM_FROM_CONTAINER, ROUTE_HOST, ROUTE_PEER, Route};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, UDP_LEN};

use super::checks::{self, Leaving};
use super::frame::{
    Ethernet, Frame, Ipv4, Mac, PACKET_HOST, PROTOCOL_TCP, PROTOCOL_UDP, Skb, at,
    has_partial_checksum, redirect, redirect_peer, redirect_to_container,
};
use super::{Verdict, arp, bulk, dropped, icmp_error, maps, offload_veth, partial_checksum, seal};

pub fn run(skb: Skb) -> Result<Verdict, Reason> {
    let endpoint = maps::endpoint(skb.ifindex()).ok_or(Reason::Unconfigured)?;
    let ethernet = at::<Ethernet>(skb, 0)?;
    // SAFETY: `at` has checked the bounds; the MAC address is at an even offset in a map.
    let (spoofed, group, kind) = unsafe {
        (
            (*ethernet).source != *endpoint.mac.as_ptr().cast::<Mac>(),
            (*ethernet).destination[0].to_ne_bytes()[0] & 1 == 1,
            u16::from_be((*ethernet).ether_type_be),
        )
    };
    if spoofed {
        return Err(Reason::Spoofed);
    }
    // SAFETY: the kernel passes a valid context to the program.
    if unsafe { (*skb).vlan_present } != 0 {
        return Err(Reason::Unsupported);
    }
    match kind {
        ETHERTYPE_ARP => arp::answer(skb, endpoint),
        ETHERTYPE_IPV4 if !group => ipv4(skb, endpoint),
        _ => Err(Reason::Unsupported),
    }
}

#[inline(always)]
fn ipv4(skb: Skb, endpoint: &Endpoint) -> Result<Verdict, Reason> {
    let own = maps::v4(&endpoint.address).ok_or(Reason::Spoofed)?;
    let leaving = match checks::leaving(skb, own) {
        Ok(leaving) => leaving,
        // A node's own address is for DNS. While the daemon restarts, queries must be lost: a
        // resolver would take an error for an answer.
        Err(reason @ (Reason::NoRoute | Reason::NotHere)) if !checks::is_to_node(skb)? => {
            let drop = || dropped::<PROGRAM_FROM_CONTAINER>(skb, reason);
            return icmp_error::unreachable(skb, endpoint, reason, drop);
        }
        Err(reason) => return Err(reason),
    };
    if leaving.route.kind == ROUTE_PEER {
        remote(skb, endpoint, &leaving)
    } else {
        hand_over(skb, leaving.route, Reason::Local)
    }
}

/// Hands a packet to a container of this host, or to the host itself, with its offloads. A partial
/// checksum may be left to the receiver, if completing it does not change the addresses.
#[inline(always)]
pub fn hand_over(skb: Skb, route: &Route, counted: Reason) -> Result<Verdict, Reason> {
    let ifindex = route.target;
    let target = maps::endpoint(ifindex).ok_or(Reason::NotHere)?;
    partial_checksum::leave(skb)?;
    skb.set_ethernet(&target.mac, &target.gateway_mac)?;
    if route.kind == ROUTE_HOST {
        return Ok(Verdict::Redirected(counted, redirect_to_container(skb, ifindex)));
    }
    // SAFETY: the context is valid.
    if unsafe { (*skb).pkt_type } != PACKET_HOST {
        // The kernel does not parse the frame again on its way into the other namespace.
        // SAFETY: the context is valid.
        if unsafe { bpf_skb_change_type(skb, PACKET_HOST) } != 0 {
            return Err(Reason::Helper);
        }
    }
    Ok(Verdict::Redirected(counted, redirect_peer(ifindex)))
}

/// Sends a packet to a peer. A packet of a bulk flow goes to a worker. A single packet that is
/// complete, or small enough to complete here, is sealed at once. All others go to `seal` through
/// the offload veth, which segments them and completes checksums.
#[inline(always)]
fn remote(skb: Skb, endpoint: &Endpoint, leaving: &Leaving) -> Result<Verdict, Reason> {
    let index = leaving.route.target;
    let peer = maps::peer(index).ok_or(Reason::NoRoute)?;
    // SAFETY: array map values stay valid while the program runs.
    let mtu = unsafe { (*peer).mtu };
    let config = maps::config().ok_or(Reason::Unconfigured)?;
    let inner_len = largest(skb)?;
    if inner_len > mtu {
        return icmp_error::too_big(skb, endpoint, config, mtu);
    }
    if let Some(sent) = bulk::steer(skb, index) {
        return Ok(sent);
    }
    let is_complete = skb.gso_size() == 0
        && (!has_partial_checksum(skb)?
            || offload_veth::is_empty(peer) && partial_checksum::finish(skb, inner_len)?);
    if is_complete {
        return seal::seal(skb, &seal::Job::data(leaving));
    }
    // Clear the destination MAC address, so that the host's stack discards the frame if `seal` is
    // not attached.
    let ethernet = at::<Ethernet>(skb, 0)?;
    for word in 0..3 {
        // SAFETY: `at` has checked the bounds.
        unsafe { (&raw mut (*ethernet).destination).cast::<u16>().add(word).write_volatile(0) };
    }
    offload_veth::enter(skb, peer, leaving.source);
    Ok(Verdict::HandedOn(redirect(config.offload_veth)))
}

/// Returns the length in bytes, from the IP header on, of the largest packet that this one becomes.
#[inline(always)]
fn largest(skb: Skb) -> Result<u32, Reason> {
    let gso_size = skb.gso_size();
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (header, protocol, total) = unsafe {
        ((*ip).header_len(), (*ip).protocol, u32::from(u16::from_be((*ip).total_len_be)))
    };
    if gso_size == 0 {
        return Ok(total);
    }
    let transport = match protocol {
        PROTOCOL_TCP => {
            skb.linearize(ETHERNET_LEN as u32 + header + 20)?;
            let offset = core::hint::black_box(u64::from(header)) & 0x3c;
            let data_offset = at::<[u8; 13]>(skb, ETHERNET_LEN + offset as usize)?;
            // SAFETY: `at` has checked the bounds.
            u32::from(unsafe { (*data_offset)[12] } >> 4) * 4
        }
        PROTOCOL_UDP => UDP_LEN as u32,
        _ => 0,
    };
    Ok(header + transport + gso_size)
}
