//! Decodes the programs' records of dropped packets into headers. No I/O. The bytes are untrusted.
//!
//! The payload behind the headers never appears in the result.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use overnode_ebpf::map::{
    DROPPED_LEN, PROGRAM_FROM_BULK, PROGRAM_FROM_CONTAINER, PROGRAM_FROM_UNDERLAY,
    PROGRAM_FROM_UNDERLAY_XDP, PROGRAM_SEAL, PROGRAM_TO_CONTAINER, VLAN_PRESENT,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{
    DATA_HEADER_LEN, DATA_PORT, ETHERNET_LEN, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6,
    IPV4_LEN, IPV6_LEN, Relay, TYPE_DATA, UDP_LEN,
};

use overnode_api::{Arp, Ethernet, Flow, Headers, Message, Program, Relayed};
use overnode_types::{BootTime, InterfaceIndex, MacAddr, SessionIndex};

/// EtherType of an IEEE 802.1Q tag inside the packet.
const ETHERTYPE_VLAN: u16 = 0x8100;
const VLAN_TAG_LEN: usize = 4;
const VLAN_ID: u16 = 0x0fff;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// A dropped packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When it was dropped.
    pub time: BootTime,
    /// Why it was dropped.
    pub reason: Reason,
    /// The program that dropped it.
    pub program: Program,
    /// Its ingress interface.
    pub ifindex: Option<InterfaceIndex>,
    /// The frame's length in bytes, Ethernet header included.
    pub len: u32,
    /// Its headers.
    pub headers: Headers,
}

/// Decodes a program's record ([`overnode_ebpf::map::Dropped`]). Returns `None` if no program of
/// this version writes such a record.
pub fn record(bytes: &[u8]) -> Option<Seen> {
    let (time, rest) = bytes.split_first_chunk()?;
    let (words, packet) = rest.split_first_chunk::<24>()?;
    let mut words = words.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_ne_bytes));
    let (reason, program, ifindex) = (words.next()?, words.next()?, words.next()?);
    let (len, captured, vlan) = (words.next()?, words.next()?, words.next()?);
    let reason = *Reason::ALL.iter().find(|known| **known as u32 == reason)?;
    let program = match program {
        PROGRAM_FROM_CONTAINER => Program::FromContainer,
        PROGRAM_SEAL => Program::Seal,
        PROGRAM_FROM_UNDERLAY => Program::FromUnderlay,
        PROGRAM_FROM_UNDERLAY_XDP => Program::FromUnderlayXdp,
        PROGRAM_FROM_BULK => Program::FromBulk,
        PROGRAM_TO_CONTAINER => Program::ToContainer,
        _ => return None,
    };
    let captured = usize::try_from(captured).ok().filter(|captured| *captured <= DROPPED_LEN)?;
    let mut headers = match program {
        Program::FromContainer => of_container(packet.get(..captured)?),
        Program::Seal | Program::FromBulk | Program::ToContainer => {
            Headers { inner: inner_of_frame(packet.get(..captured)?), ..Headers::default() }
        }
        // The checksum is only checked after the outer headers were removed.
        Program::FromUnderlay | Program::FromUnderlayXdp if reason == Reason::Checksum => {
            Headers { inner: inner_of_frame(packet.get(..captured)?), ..Headers::default() }
        }
        Program::FromUnderlay | Program::FromUnderlayXdp => {
            of_underlay(packet.get(..captured)?, reason.is_opened())
        }
    };
    if vlan & VLAN_PRESENT != 0 {
        headers.vlan = Some(vlan as u16 & VLAN_ID);
    }
    Some(Seen {
        time: BootTime::from_nanos(u64::from_ne_bytes(*time)),
        reason,
        program,
        ifindex: InterfaceIndex::from_kernel(ifindex),
        len,
        headers,
    })
}

fn of_container(frame: &[u8]) -> Headers {
    let Some((header, body)) = frame.split_first_chunk::<ETHERNET_LEN>() else {
        return Headers::default();
    };
    let [_, _, _, _, _, _, source @ .., _, _] = header;
    let mut headers = Headers::default();
    let mut ether_type = be16(header, ETHERNET_LEN - 2).unwrap_or(0);
    let mut body = body;
    if ether_type == ETHERTYPE_VLAN
        && let (Some(tag), Some(behind)) = (be16(body, 0), be16(body, 2))
    {
        headers.vlan = Some(tag & VLAN_ID);
        ether_type = behind;
        body = body.get(VLAN_TAG_LEN..).unwrap_or_default();
    }
    headers.ethernet = Some(Ethernet { source: MacAddr::new(*source), ether_type });
    match ether_type {
        ETHERTYPE_IPV4 => headers.inner = ipv4(body).map(|(flow, _)| flow),
        ETHERTYPE_IPV6 => headers.inner = ipv6(body).map(|(flow, _)| flow),
        ETHERTYPE_ARP => headers.arp = arp(body),
        _ => {}
    }
    headers
}

fn inner_of_frame(frame: &[u8]) -> Option<Flow> {
    Some(ipv4(frame.get(ETHERNET_LEN..)?)?.0)
}

fn of_underlay(frame: &[u8], is_opened: bool) -> Headers {
    let mut headers = Headers::default();
    let found = match be16(frame, ETHERNET_LEN - 2) {
        Some(ETHERTYPE_IPV4) => frame.get(ETHERNET_LEN..).and_then(ipv4),
        Some(ETHERTYPE_IPV6) => frame.get(ETHERNET_LEN..).and_then(ipv6),
        Some(_) | None => None,
    };
    let Some((flow, payload)) = found else { return headers };
    let is_ours = flow.protocol == "udp" && flow.destination_port == Some(DATA_PORT);
    headers.outer = Some(flow);
    let Some(mut datagram) = payload.get(UDP_LEN..).filter(|_| is_ours) else { return headers };
    if let Some((relay, behind)) = Relay::split(datagram) {
        let Relay { hops, destination, source, previous } = relay;
        headers.relay = Some(Relayed { source, destination, previous, hops });
        datagram = behind;
    }
    let Some((header, text)) = datagram.split_first_chunk::<DATA_HEADER_LEN>() else {
        return headers;
    };
    let [TYPE_DATA, 0, 0, 0, index @ .., _, _, _, _, _, _, _, _] = header else { return headers };
    let [.., a, b, c, d, e, f, g, h] = header;
    headers.message = Some(Message {
        receiver: SessionIndex::from_le_bytes(*index),
        counter: u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
    });
    if is_opened {
        headers.inner = ipv4(text).map(|(flow, _)| flow);
    }
    headers
}

/// Parses an IPv4 header. Also returns the bytes behind it.
fn ipv4(packet: &[u8]) -> Option<(Flow, &[u8])> {
    let (header, _) = packet.split_first_chunk::<IPV4_LEN>()?;
    let [version_ihl, _, _, _, _, _, flags, low, _, protocol, _, _, a, b, c, d, e, f, g, h] =
        *header;
    let header_len = usize::from(version_ihl & 0xf) * 4;
    if version_ihl >> 4 != 4 || header_len < IPV4_LEN {
        return None;
    }
    let is_first = u16::from_be_bytes([flags, low]) & 0x1fff == 0;
    let payload = packet.get(header_len..).unwrap_or_default();
    let (source, destination) =
        (Ipv4Addr::new(a, b, c, d).into(), Ipv4Addr::new(e, f, g, h).into());
    Some((flow(source, destination, protocol, payload, is_first), payload))
}

/// Parses an IPv6 header. Also returns the bytes behind it.
fn ipv6(packet: &[u8]) -> Option<(Flow, &[u8])> {
    let (header, payload) = packet.split_first_chunk::<IPV6_LEN>()?;
    let address = |at: usize| {
        let octets: [u8; 16] = header.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::V6(Ipv6Addr::from(octets)))
    };
    (header[0] >> 4 == 6).then_some(())?;
    Some((flow(address(8)?, address(24)?, header[6], payload, true), payload))
}

fn flow(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8], is_first: bool) -> Flow {
    // TCP, UDP, DCCP, SCTP and UDP-Lite all begin with the ports.
    let has_ports = is_first && matches!(protocol, TCP | UDP | 33 | 132 | 136);
    let port = |at: usize| be16(payload, at).filter(|_| has_ports);
    Flow {
        source,
        destination,
        protocol: protocol_name(protocol),
        source_port: port(0),
        destination_port: port(2),
    }
}

/// Returns the IANA name of a common protocol, or the number of any other.
fn protocol_name(protocol: u8) -> String {
    let name = match protocol {
        1 => "icmp",
        2 => "igmp",
        TCP => "tcp",
        UDP => "udp",
        33 => "dccp",
        44 => "fragment",
        47 => "gre",
        50 => "esp",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        number => return number.to_string(),
    };
    name.to_owned()
}

/// Parses an ARP message for Ethernet and IPv4.
fn arp(body: &[u8]) -> Option<Arp> {
    let [0, 1, 8, 0, 6, 4, _, _, _, _, _, _, _, _, a, b, c, d, _, _, _, _, _, _, e, f, g, h] =
        *body.first_chunk::<28>()?
    else {
        return None;
    };
    Some(Arp { sender: Ipv4Addr::new(a, b, c, d).into(), target: Ipv4Addr::new(e, f, g, h).into() })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
