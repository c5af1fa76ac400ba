//! Checks which addresses may send to which: all address checks of a packet, in one function per
//! direction.
//!
//! Every path of a direction calls its function. Outbound paths: sealed at once, through the
//! offload veth, by a bulk worker, and to a container of this host. Inbound paths: TC, XDP,
//! relayed, and from a bulk worker.

use overnode_ebpf::map::{
    Config, FIRST_EXTERNAL_PEER, NODE_ADDRESSES, ROUTE_HOST, ROUTE_LOCAL, ROUTE_NONE, ROUTE_PEER,
    Route,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN};

use super::frame::{Frame, Ipv4, Skb, at};
use super::maps::{self, Routes};

/// An outbound packet that passed the checks.
pub struct Leaving {
    /// Source and destination, in network byte order.
    pub source: u32,
    pub destination: u32,
    /// Route of the destination: to a peer, to a container of this host, or to the host itself.
    pub route: &'static Route,
    /// IPv4 type of service.
    pub tos: u8,
    /// Length in bytes, from the IP header on.
    pub len: u32,
}

/// Checks a packet, including its Ethernet header, from an endpoint with the address `own`.
#[inline(always)]
pub fn leaving(skb: Skb, own: u32) -> Result<Leaving, Reason> {
    skb.linearize((ETHERNET_LEN + IPV4_LEN) as u32)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    let (sane, source, destination, tos, len) = unsafe {
        (
            (*ip).is_sane(skb.len() - ETHERNET_LEN as u32),
            (*ip).source,
            (*ip).destination,
            (*ip).tos,
            u32::from(u16::from_be((*ip).total_len_be)),
        )
    };
    if !sane {
        return Err(Reason::Malformed);
    }
    if source != own {
        return Err(Reason::Spoofed);
    }
    // Multicast, reserved or broadcast.
    if u32::from_be(destination) >= 0xe000_0000 {
        return Err(Reason::Unsupported);
    }
    let route = Routes::new().v4(destination).ok_or(Reason::NoRoute)?;
    match route.kind {
        ROUTE_LOCAL | ROUTE_HOST => {}
        ROUTE_PEER => {
            let nodes = Nodes::new()?;
            if nodes.contain(source) || nodes.contain(destination) {
                return Err(Reason::NodeAddress);
            }
        }
        ROUTE_NONE => return Err(Reason::NotHere),
        _ => return Err(Reason::NoRoute),
    }
    Ok(Leaving { source, destination, route, tos, len })
}

/// Returns true if a packet that [`leaving`] has read is for the address of a node.
#[inline(always)]
pub fn is_to_node(skb: Skb) -> Result<bool, Reason> {
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    Ok(Nodes::new()?.contain(unsafe { (*ip).destination }))
}

/// Returns the local route of an inner packet from a peer, if the peer may send it there. Returns
/// `None` if the packet is from a node to this node itself.
#[inline(always)]
pub fn arriving(
    peer: u32,
    source: u32,
    destination: u32,
) -> Result<Option<&'static Route>, Reason> {
    let nodes = Nodes::new()?;
    if destination == nodes.own {
        return if nodes.is_of(peer, source) { Ok(None) } else { Err(Reason::NodeAddress) };
    }
    let mut routes = Routes::new();
    match routes.v4(source) {
        Some(route) if route.kind == ROUTE_PEER && route.target == peer => {}
        _ => return Err(Reason::ForeignSource),
    }
    if nodes.contain(source) {
        return Err(Reason::NodeAddress);
    }
    match routes.v4(destination) {
        Some(route) if route.kind == ROUTE_LOCAL || route.kind == ROUTE_HOST => Ok(Some(route)),
        _ => Err(Reason::NotHere),
    }
}

/// The addresses of the nodes themselves. They are for probes only, except that this node's own
/// address also serves DNS to the containers of this host.
struct Nodes {
    /// Address of this node, in network byte order.
    own: u32,
    /// First address of the range, in host byte order.
    first: u32,
}

impl Nodes {
    #[inline(always)]
    fn new() -> Result<Self, Reason> {
        let config: &Config = maps::config().ok_or(Reason::Unconfigured)?;
        let own = maps::v4(&config.node).ok_or(Reason::Unconfigured)?;
        Ok(Self { own, first: u32::from_be(own).wrapping_sub(config.node_id) })
    }

    /// Returns the distance of an address from the first one.
    #[inline(always)]
    fn number(&self, address: u32) -> u32 {
        u32::from_be(address).wrapping_sub(self.first)
    }

    #[inline(always)]
    fn contain(&self, address: u32) -> bool {
        self.number(address) < NODE_ADDRESSES
    }

    /// Returns true if this is the node address of the peer.
    #[inline(always)]
    fn is_of(&self, peer: u32, address: u32) -> bool {
        peer < FIRST_EXTERNAL_PEER && self.number(address) == peer
    }
}
