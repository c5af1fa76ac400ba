//! Relays messages between two nodes that cannot reach each other (header: [`TYPE_RELAY`]).
//!
//! The relay has no keys. It sees which nodes communicate and how much. It relays only messages
//! that come from the address of a node of the cluster and go to a node of the cluster, so it
//! cannot be used as a reflector.

use overnode_ebpf::map::FIRST_EXTERNAL_PEER;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN, RELAY_HOPS,
    RELAY_LEN, TAG_LEN, TYPE_RELAY, UDP_LEN,
};

use super::decap::OuterHeaders;
use super::frame::{Frame, Skb, at, change_protocol, drop_complete_checksum, resize};
use super::{Verdict, encap, maps};

#[repr(C)]
struct Header {
    kind: u8,
    hops: u8,
    destination_be: u16,
    source_be: u16,
    previous_be: u16,
}

/// Writes the relay header of a message from this node to `peer`.
#[inline(always)]
pub fn write(skb: Skb, offset: usize, peer: u32) -> Result<(), Reason> {
    let own = (maps::config().ok_or(Reason::Unconfigured)?.node_id as u16).to_be();
    let header = at::<Header>(skb, offset)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        (*header).kind = TYPE_RELAY;
        (*header).hops = RELAY_HOPS;
        (*header).destination_be = (peer as u16).to_be();
        (*header).source_be = own;
        (*header).previous_be = own;
    }
    Ok(())
}

/// Returns true if a relayed message is for this node.
#[inline(always)]
pub fn is_here(frame: impl Frame, decap: &OuterHeaders) -> Result<bool, Reason> {
    let header = at::<Header>(frame, decap.relay())?;
    let config = maps::config().ok_or(Reason::Unconfigured)?;
    // SAFETY: `at` has checked the bounds.
    Ok(u32::from(u16::from_be(unsafe { (*header).destination_be })) == config.node_id)
}

/// Forwards a message to its destination or to the next relay.
#[inline(always)]
pub fn pass_on(skb: Skb, decap: &OuterHeaders) -> Result<Verdict, Reason> {
    skb.linearize_all()?;
    let own = maps::config().ok_or(Reason::Unconfigured)?.node_id;
    let header = at::<Header>(skb, decap.relay())?;
    // SAFETY: `at` has checked the bounds.
    let (hops, destination, previous) = unsafe {
        (
            (*header).hops,
            u32::from(u16::from_be((*header).destination_be)),
            u32::from(u16::from_be((*header).previous_be)),
        )
    };
    if previous >= FIRST_EXTERNAL_PEER || destination >= FIRST_EXTERNAL_PEER {
        return Err(Reason::NoRoute);
    }
    let from = maps::peer(previous).ok_or(Reason::ForeignRelay)?;
    if !decap.is_from(skb, from)? {
        return Err(Reason::ForeignRelay);
    }
    if hops <= 1 {
        return Err(Reason::HopLimit);
    }
    let target = maps::peer(destination).ok_or(Reason::NoRoute)?;
    // SAFETY: array map values stay valid while the program runs.
    let via = unsafe { (*target).via };
    let (next, hop) = if via == 0 {
        (destination, target)
    } else {
        (via, maps::peer(via).ok_or(Reason::NoRoute)?)
    };
    if next == previous {
        return Err(Reason::RelayLoop);
    }
    let header = at::<Header>(skb, decap.relay())?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        (*header).hops = hops - 1;
        (*header).previous_be = (own as u16).to_be();
    }

    let udp_len = (UDP_LEN + RELAY_LEN + DATA_HEADER_LEN + TAG_LEN) as u32 + decap.ciphertext_len();
    let (ip_len, v4) = (if decap.is_v6() { IPV6_LEN } else { IPV4_LEN }, encap::is_v4(hop));
    drop_complete_checksum(skb)?;
    let len = (ETHERNET_LEN + ip_len) as u32 + udp_len;
    if skb.len() != len {
        resize(skb, len)?;
    }
    if decap.is_v6() == v4 {
        change_protocol(skb, if v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 })?;
    }
    encap::write(skb, hop, udp_len, decap.ecn())?;
    encap::finish(skb, hop)?;
    Ok(Verdict::Redirected(Reason::Relayed, encap::send(hop)))
}
