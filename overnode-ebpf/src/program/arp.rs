//! Answers ARP requests (RFC 826) in place: every address of the overlay is behind the host end of
//! the veth.

use overnode_ebpf::map::{Address, Config, Endpoint};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{ARP_LEN, ETHERNET_LEN, ETHERTYPE_IPV4};

use super::Verdict;
use super::frame::{Ethernet, Frame, Mac, Skb, at, redirect_to_container};
use super::maps;

const HARDWARE_ETHERNET: u16 = 1;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// An IPv4 address, in units that are aligned at the offsets of an ARP packet.
type Halves = [u16; 2];

#[repr(C)]
struct Arp {
    hardware_be: u16,
    protocol_be: u16,
    /// Address lengths in bytes: 6 for Ethernet, 4 for IPv4.
    address_lens: [u8; 2],
    operation_be: u16,
    sender_mac: Mac,
    sender: Halves,
    target_mac: Mac,
    target: Halves,
}

/// Turns a container's request into the reply and sends it back.
///
/// Requests for the container's own address get no reply, so that its duplicate address detection
/// finds no conflict.
#[inline(always)]
pub fn answer(skb: Skb, endpoint: &Endpoint) -> Result<Verdict, Reason> {
    skb.linearize((ETHERNET_LEN + ARP_LEN) as u32)?;
    let ethernet = at::<Ethernet>(skb, 0)?;
    let arp = at::<Arp>(skb, ETHERNET_LEN)?;
    let config = maps::config().ok_or(Reason::Unconfigured)?;
    let own = endpoint.address.to_v4().ok_or(Reason::Unsupported)?;
    let own = halves(own);
    // SAFETY: `at` has checked the bounds of both headers; the MAC addresses are at even offsets in
    // a map.
    unsafe {
        if (*arp).hardware_be != HARDWARE_ETHERNET.to_be()
            || (*arp).protocol_be != ETHERTYPE_IPV4.to_be()
            || (*arp).address_lens != [6, 4]
        {
            return Err(Reason::Malformed);
        }
        if (*arp).operation_be != REQUEST.to_be() {
            return Err(Reason::Unsupported);
        }
        let container = *endpoint.mac.as_ptr().cast::<Mac>();
        let gateway = *endpoint.gateway_mac.as_ptr().cast::<Mac>();
        let sender = (*arp).sender;
        // In ARP probes (RFC 5227), the sender address is zero.
        if (*arp).sender_mac != container || (sender != own && sender != [0, 0]) {
            return Err(Reason::Spoofed);
        }
        let target = (*arp).target;
        if target == own {
            return Err(Reason::Unsupported);
        }
        if !in_subnet(config, target) {
            return Err(Reason::NoRoute);
        }
        (*ethernet).destination = container;
        (*ethernet).source = gateway;
        (*arp).operation_be = REPLY.to_be();
        (*arp).target_mac = container;
        (*arp).target = sender;
        (*arp).sender_mac = gateway;
        (*arp).sender = target;
    }
    Ok(Verdict::Redirected(Reason::Arp, redirect_to_container(skb, skb.ifindex())))
}

#[inline(always)]
fn halves([a, b, c, d]: [u8; 4]) -> Halves {
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

#[inline(always)]
fn in_subnet(config: &Config, target: Halves) -> bool {
    let (Some(subnet), Some(bits)) =
        (config.subnet.to_v4(), config.subnet_bits.checked_sub(Address::V4_BITS))
    else {
        return false;
    };
    let target = u32::from(u16::from_be(target[0])) << 16 | u32::from(u16::from_be(target[1]));
    let mask = !(u64::from(u32::MAX) >> (bits & 63)) as u32;
    (u32::from_be_bytes(subnet) ^ target) & mask == 0
}
