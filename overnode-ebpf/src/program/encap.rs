//! Writes the outer headers of a message to a peer. Every message gets new ones, whether it is
//! sealed here or relayed.

use overnode_ebpf::map::{Address, Peer};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_PORT, ETHERNET_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_LEN, IPV6_LEN,
};

use aya_ebpf::helpers::generated::bpf_redirect_neigh;

use super::checksum::{ipv4_checksum, udp_v6};
use super::frame::{Ethernet, Ipv4, Ipv6, PROTOCOL_UDP, Skb, Udp, at};
use super::maps::Words;

const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;

/// Returns true if messages go to the peer over IPv4.
#[inline(always)]
pub fn is_v4(hop: *mut Peer) -> bool {
    // SAFETY: array map values stay valid while the program runs.
    unsafe { (*hop).remote.to_v4().is_some() }
}

/// Writes the EtherType and the IP and UDP headers of a message to a peer. `udp_len` is the UDP
/// length in bytes, header included. Returns the length of the IP header. Over IPv6, the checksum
/// is left to [`finish`].
#[inline(always)]
pub fn write(skb: Skb, hop: *mut Peer, udp_len: u32, ecn: u8) -> Result<usize, Reason> {
    // SAFETY: array map values stay valid while the program runs.
    if let Some(remote) = unsafe { (*hop).remote.to_v4() } {
        write_v4(skb, hop, remote, udp_len, ecn)?;
        Ok(IPV4_LEN)
    } else {
        write_v6(skb, hop, udp_len, ecn)?;
        Ok(IPV6_LEN)
    }
}

/// Writes the UDP checksum over IPv6, which requires one.
#[inline(always)]
pub fn finish(skb: Skb, hop: *mut Peer) -> Result<(), Reason> {
    if is_v4(hop) {
        return Ok(());
    }
    let udp = at::<Udp>(skb, ETHERNET_LEN + IPV6_LEN)?;
    // Read the length from the packet. The verifier would know the caller's value and follow the
    // checksum's loop once for each value. SAFETY: `at` has checked the bounds.
    let udp_len = u32::from(u16::from_be(unsafe { (&raw const (*udp).len_be).read_volatile() }));
    let checksum = udp_v6(skb, udp_len)?;
    let udp = at::<Udp>(skb, ETHERNET_LEN + IPV6_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { (*udp).checksum = checksum };
    Ok(())
}

/// Sends the message to a peer. The kernel looks up the next hop by the packet's own addresses.
#[inline(always)]
pub fn send(hop: *mut Peer) -> i64 {
    // SAFETY: array map values stay valid while the program runs; no parameters are passed.
    unsafe { bpf_redirect_neigh((*hop).ifindex, core::ptr::null_mut(), 0, 0) }
}

#[inline(always)]
fn write_v4(
    skb: Skb,
    hop: *mut Peer,
    remote: [u8; 4],
    udp_len: u32,
    ecn: u8,
) -> Result<(), Reason> {
    // SAFETY: array map values stay valid while the program runs.
    let (local, port_be) =
        unsafe { ((*hop).local.to_v4().ok_or(Reason::NoRoute)?, (*hop).remote_port_be) };
    let mut header = Ipv4 {
        version_ihl: 0x45,
        tos: ecn,
        total_len_be: ((IPV4_LEN as u32 + udp_len) as u16).to_be(),
        id_be: 0,
        fragment_be: DONT_FRAGMENT.to_be(),
        ttl: TTL,
        protocol: PROTOCOL_UDP,
        checksum: 0,
        source: u32::from_ne_bytes(local),
        destination: u32::from_ne_bytes(remote),
    };
    header.checksum = ipv4_checksum(&header);
    let ethernet = at::<Ethernet>(skb, 0)?;
    let ip = at::<Ipv4>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        (*ethernet).ether_type_be = ETHERTYPE_IPV4.to_be();
        *ip = header;
    }
    write_udp(skb, ETHERNET_LEN + IPV4_LEN, port_be, udp_len)
}

#[inline(always)]
fn write_v6(skb: Skb, hop: *mut Peer, udp_len: u32, ecn: u8) -> Result<(), Reason> {
    let ethernet = at::<Ethernet>(skb, 0)?;
    // SAFETY: `at` has checked the bounds.
    unsafe { (*ethernet).ether_type_be = ETHERTYPE_IPV6.to_be() };
    let ip = at::<Ipv6>(skb, ETHERNET_LEN)?;
    // SAFETY: `at` has checked the bounds; array map values stay valid while the program runs.
    let port_be = unsafe {
        (*ip).version_class_label_be = (6 << 28 | u32::from(ecn) << 20).to_be();
        (*ip).payload_len_be = (udp_len as u16).to_be();
        (*ip).next_header = PROTOCOL_UDP;
        (*ip).hop_limit = TTL;
        copy_address(&raw mut (*ip).source, &raw const (*hop).local);
        copy_address(&raw mut (*ip).destination, &raw const (*hop).remote);
        (*hop).remote_port_be
    };
    write_udp(skb, ETHERNET_LEN + IPV6_LEN, port_be, udp_len)
}

#[inline(always)]
fn write_udp(skb: Skb, offset: usize, port_be: u16, udp_len: u32) -> Result<(), Reason> {
    let udp = at::<Udp>(skb, offset)?;
    // SAFETY: `at` has checked the bounds.
    unsafe {
        (*udp).source_be = DATA_PORT.to_be();
        (*udp).destination_be = port_be;
        (*udp).len_be = (udp_len as u16).to_be();
        (*udp).checksum = 0;
    }
    Ok(())
}

/// Copies an address in words. To copy it as a whole, the compiler would call a function that loops
/// over bytes.
///
/// # Safety
/// `from` points into a map value, `to` into the packet.
#[inline(always)]
unsafe fn copy_address(to: *mut Words, from: *const Address) {
    for word in 0..4 {
        // SAFETY: upheld by the caller; addresses in maps are aligned to 4 bytes.
        unsafe { to.cast::<u32>().add(word).write(from.cast::<u32>().add(word).read_volatile()) };
    }
}
