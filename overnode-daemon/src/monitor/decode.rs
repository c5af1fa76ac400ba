//! Decodes the programs' records of dropped packets into headers. No I/O. The bytes are untrusted.
//!
//! The payload behind the headers never appears in the result. A record holds only the first bytes
//! of a packet, so the lengths in its headers exceed what is there.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{ArpPacketSlice, LaxIpv4Slice, LaxNetSlice, LaxSlicedPacket, LinkSlice};
use overnode_ebpf::map::{
    DROPPED_LEN, PROGRAM_FROM_BULK, PROGRAM_FROM_CONTAINER, PROGRAM_FROM_UNDERLAY,
    PROGRAM_FROM_UNDERLAY_XDP, PROGRAM_SEAL, PROGRAM_TO_CONTAINER, VLAN_PRESENT,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{DATA_HEADER_LEN, DATA_PORT, ETHERNET_LEN, Relay, TYPE_DATA, UDP_LEN};

use overnode_api::{Arp, Ethernet, Flow, Headers, Message, Program, Relayed};
use overnode_types::{BootTime, InterfaceIndex, MacAddr, SessionIndex};

/// The VLAN ID in an IEEE 802.1Q tag.
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
    let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else { return Headers::default() };
    let mut headers =
        Headers { vlan: packet.vlan_ids().first().map(|id| id.value()), ..Headers::default() };
    if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
        let ether_type =
            packet.ether_payload().map_or(ethernet.ether_type(), |payload| payload.ether_type);
        headers.ethernet =
            Some(Ethernet { source: MacAddr::new(ethernet.source()), ether_type: ether_type.0 });
    }
    match &packet.net {
        Some(LaxNetSlice::Arp(packet)) => headers.arp = arp(packet),
        Some(net) => headers.inner = ip(net).map(|(flow, _)| flow),
        None => {}
    }
    headers
}

/// Parses the IPv4 packet behind an Ethernet header of any type.
fn inner_of_frame(frame: &[u8]) -> Option<Flow> {
    inner(frame.get(ETHERNET_LEN..)?)
}

fn inner(packet: &[u8]) -> Option<Flow> {
    let (packet, _) = LaxIpv4Slice::from_slice(packet).ok()?;
    Some(ipv4(&packet).0)
}

fn of_underlay(frame: &[u8], is_opened: bool) -> Headers {
    let mut headers = Headers::default();
    let packet = LaxSlicedPacket::from_ethernet(frame).ok();
    let found = packet.as_ref().and_then(|packet| ip(packet.net.as_ref()?));
    let Some((flow, payload)) = found else { return headers };
    let is_ours = flow.protocol == "udp" && flow.destination_port == Some(DATA_PORT);
    headers.outer = Some(flow);
    let Some(mut datagram) = payload.get(UDP_LEN..).filter(|_| is_ours) else { return headers };
    if let Some((relay, behind)) = Relay::split(datagram) {
        let Relay { hops, destination, source, previous } = relay;
        headers.relay = Some(Relayed { source, destination, previous, hops });
        datagram = behind;
    }
    let Some((header, plaintext)) = datagram.split_first_chunk::<DATA_HEADER_LEN>() else {
        return headers;
    };
    let [TYPE_DATA, 0, 0, 0, index @ .., _, _, _, _, _, _, _, _] = header else { return headers };
    let [.., a, b, c, d, e, f, g, h] = header;
    headers.message = Some(Message {
        receiver: SessionIndex::from_le_bytes(*index),
        counter: u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
    });
    if is_opened {
        headers.inner = inner(plaintext);
    }
    headers
}

/// Returns the flow of an IP packet, and the bytes behind its headers.
fn ip<'a>(net: &LaxNetSlice<'a>) -> Option<(Flow, &'a [u8])> {
    match net {
        LaxNetSlice::Ipv4(packet) => Some(ipv4(packet)),
        LaxNetSlice::Ipv6(packet) => {
            let (header, payload) = (packet.header(), packet.payload().payload);
            let (source, destination) =
                (header.source_addr().into(), header.destination_addr().into());
            Some((flow(source, destination, header.next_header().0, payload, true), payload))
        }
        LaxNetSlice::Arp(_) => None,
    }
}

fn ipv4<'a>(packet: &LaxIpv4Slice<'a>) -> (Flow, &'a [u8]) {
    let (header, payload) = (packet.header(), packet.payload().payload);
    let is_first = header.fragments_offset().value() == 0;
    let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
    (flow(source, destination, header.protocol().0, payload, is_first), payload)
}

/// Returns the addresses and ports of a packet. The ports are read here, because the record may end
/// within the transport header.
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

/// Returns the addresses of an ARP message for Ethernet and IPv4.
fn arp(packet: &ArpPacketSlice<'_>) -> Option<Arp> {
    let packet = packet.to_packet().try_eth_ipv4().ok()?;
    Some(Arp {
        sender: Ipv4Addr::from(packet.sender_ipv4).into(),
        target: Ipv4Addr::from(packet.target_ipv4).into(),
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
