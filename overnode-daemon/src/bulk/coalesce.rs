//! Coalesces consecutive packets of a flow into one super-packet for a TAP device. It follows the
//! rules of the kernel's `tcp_gro_receive`, `udp_gro_receive`, `inet_gro_receive` and
//! `ipv6_gro_receive`, and guarantees that segmenting the result gives the same packets.

use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN};

use super::packet::{
    GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Headers, MAX_PACKET, TCP, VNET_HEADER, VnetHeader,
    flag, ipv4_checksum, ipv4_sum, read_u16, read_u32, write_u16,
};
use super::segment::MAX_SEGMENTS;

/// Maximum number of flows with a pending super-packet.
pub const FLOWS: usize = 8;
/// Maximum number of datagrams in one super-packet of UDP, the kernel's `UDP_GRO_CNT_MAX`.
const MAX_DATAGRAMS: usize = 64;
/// Longest super-packet, in bytes.
const MAX_COALESCED: usize = 65_535;
/// Bytes in front of the packet: vnet header and Ethernet header.
const HEADROOM: usize = VNET_HEADER + ETHERNET_LEN;
/// Length of a flow key: Ethernet header, both addresses, both ports, protocol and version.
const KEY_LEN: usize = ETHERNET_LEN + 32 + 4 + 2;

/// Holds super-packets until they cannot grow or [`Coalescer::flush`] is called. Allocates nothing
/// after [`Coalescer::new`].
#[derive(Debug)]
pub struct Coalescer {
    coalesces_udp: bool,
    slots: [Slot; FLOWS],
    /// Buffer for frames that are delivered alone.
    single: Box<[u8]>,
    /// Slots opened so far.
    opened: u64,
}

/// The pending super-packet of one flow.
#[derive(Debug)]
struct Slot {
    /// Segments so far; 0 means that the slot is free.
    segments: usize,
    /// Value of [`Coalescer::opened`] when the slot was opened.
    age: u64,
    key: [u8; KEY_LEN],
    headers: Headers,
    /// Payload of the first segment, in bytes.
    size: usize,
    /// Length of the packet so far, in bytes.
    length: usize,
    /// A whole TAP frame: vnet header, Ethernet header, packet.
    frame: Box<[u8]>,
}

/// Whether a segment continues the pending super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    No,
    Yes,
    /// It does, and nothing may follow it.
    Last,
}

impl Coalescer {
    /// Creates an empty coalescer. Set `coalesces_udp` only if the kernel behind the TAP device
    /// accepts UDP super-packets.
    pub fn new(coalesces_udp: bool) -> Self {
        let headers = Headers { version: 0, protocol: 0, transport: 0, payload: 0 };
        let slot = |_| Slot {
            segments: 0,
            age: 0,
            key: [0; KEY_LEN],
            headers,
            size: 0,
            length: 0,
            frame: vec![0; HEADROOM + MAX_COALESCED].into_boxed_slice(),
        };
        Self {
            coalesces_udp,
            slots: std::array::from_fn(slot),
            single: vec![0; HEADROOM + MAX_PACKET].into_boxed_slice(),
            opened: 0,
        }
    }

    /// Takes a packet and the Ethernet header to put in front of it. Passes whole frames for the
    /// TAP device to `deliver`: vnet header, Ethernet header, packet. Packets of a flow are
    /// delivered in the order of arrival. A packet that is not a complete TCP or UDP packet is
    /// delivered after everything that is pending.
    ///
    /// A packet of more than [`MAX_PACKET`] bytes cannot be an IP packet and is dropped.
    pub fn push(
        &mut self,
        link: [u8; ETHERNET_LEN],
        packet: &[u8],
        partial: bool,
        deliver: &mut impl FnMut(&[u8]),
    ) {
        if packet.len() > MAX_PACKET {
            return;
        }
        let Ok(headers) = Headers::read(packet) else {
            self.flush(deliver);
            return self.deliver_single(link, packet, VnetHeader::default(), deliver);
        };
        let key = key_of(&link, packet, &headers);
        let fits = partial && self.can_coalesce(packet, &headers);
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.segments > 0 && slot.key == key)
        {
            let fit = if fits { slot.fit(packet, &headers) } else { Fit::No };
            if fit != Fit::No {
                slot.append(packet);
            }
            if fit != Fit::Yes {
                slot.close(deliver);
            }
            if fit != Fit::No {
                return;
            }
        }
        if fits && !ends_super_packet(packet, &headers) {
            self.open(&link, packet, headers, key, deliver);
        } else {
            let vnet = if partial { headers.vnet() } else { VnetHeader::default() };
            self.deliver_single(link, packet, vnet, deliver);
        }
    }

    /// Delivers everything that is pending, the oldest first.
    pub fn flush(&mut self, deliver: &mut impl FnMut(&[u8])) {
        while let Some(slot) = self.oldest() {
            slot.close(deliver);
        }
    }

    fn oldest(&mut self) -> Option<&mut Slot> {
        self.slots.iter_mut().filter(|slot| slot.segments > 0).min_by_key(|slot| slot.age)
    }

    fn open(
        &mut self,
        link: &[u8; ETHERNET_LEN],
        packet: &[u8],
        headers: Headers,
        key: [u8; KEY_LEN],
        deliver: &mut impl FnMut(&[u8]),
    ) {
        if self.slots.iter().all(|slot| slot.segments > 0)
            && let Some(slot) = self.oldest()
        {
            slot.close(deliver);
        }
        let age = self.opened;
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.segments == 0) else { return };
        slot.frame[VNET_HEADER..HEADROOM].copy_from_slice(link);
        slot.frame[HEADROOM..HEADROOM + packet.len()].copy_from_slice(packet);
        (slot.segments, slot.age, slot.key, slot.headers) = (1, age, key, headers);
        (slot.size, slot.length) = (packet.len() - headers.payload, packet.len());
        self.opened += 1;
    }

    fn deliver_single(
        &mut self,
        link: [u8; ETHERNET_LEN],
        packet: &[u8],
        vnet: VnetHeader,
        deliver: &mut impl FnMut(&[u8]),
    ) {
        let frame = &mut self.single[..HEADROOM + packet.len()];
        frame[..VNET_HEADER].copy_from_slice(&vnet.to_bytes());
        frame[VNET_HEADER..HEADROOM].copy_from_slice(&link);
        frame[HEADROOM..].copy_from_slice(packet);
        deliver(frame);
    }

    /// Returns true if the packet may be a segment of a super-packet. Its checksums must be
    /// correct, because the super-packet would repair wrong ones.
    fn can_coalesce(&self, packet: &[u8], headers: &Headers) -> bool {
        let plain = match headers.version {
            4 => {
                let checksum = || {
                    ipv4_checksum(
                        ipv4_sum(&packet[..IPV4_LEN]),
                        read_u16(packet, 2),
                        read_u16(packet, 4),
                    )
                };
                // No flag but DF may be set, as in the kernel.
                headers.transport == IPV4_LEN
                    && packet[6] & 0x80 == 0
                    && checksum() == read_u16(packet, 10)
            }
            _ => headers.transport == IPV6_LEN,
        };
        let kind = match headers.protocol {
            TCP => packet[headers.transport + 13] & (flag::SYN | flag::RST | flag::URG) == 0,
            _ => self.coalesces_udp,
        };
        plain
            && kind
            && packet.len() > headers.payload
            && packet.len() <= MAX_COALESCED
            && read_u16(packet, headers.transport + headers.checksum_offset())
                == headers.pseudo(packet)
    }
}

impl Slot {
    /// Checks a packet of the same flow for which [`Coalescer::can_coalesce`] returned true.
    fn fit(&self, packet: &[u8], headers: &Headers) -> Fit {
        let first = &self.frame[HEADROOM..];
        let body = packet.len() - headers.payload;
        let most = if headers.protocol == TCP { MAX_SEGMENTS } else { MAX_DATAGRAMS };
        let fits = *headers == self.headers
            && body <= self.size
            && self.length + body <= MAX_COALESCED
            && self.segments < most
            && if headers.version == 4 {
                self.fits_ipv4(first, packet)
            } else {
                fits_ipv6(first, packet)
            }
            && (headers.protocol != TCP || self.fits_tcp(first, packet));
        match (fits, body < self.size || ends_super_packet(packet, headers)) {
            (false, _) => Fit::No,
            (true, false) => Fit::Yes,
            (true, true) => Fit::Last,
        }
    }

    /// Compares type of service, DF and time to live, and requires IDs that count up.
    fn fits_ipv4(&self, first: &[u8], packet: &[u8]) -> bool {
        packet[1] == first[1]
            && packet[6] == first[6]
            && packet[8] == first[8]
            && read_u16(packet, 4) == read_u16(first, 4).wrapping_add(self.segments as u16)
    }

    /// Compares all TCP fields except checksum, PSH and FIN. The kernel also compares the window,
    /// which shares a word with the flags, but not the urgent pointer.
    fn fits_tcp(&self, first: &[u8], packet: &[u8]) -> bool {
        let Headers { transport, payload, .. } = self.headers;
        let (before, header) = (&first[transport..payload], &packet[transport..payload]);
        let joined = (self.length - payload) as u32;
        let differs = header[13] ^ (before[13] & !flag::CWR);
        read_u32(header, 4) == read_u32(before, 4).wrapping_add(joined)
            && header[8..13] == before[8..13]
            && differs & !(flag::FIN | flag::PSH) == 0
            && header[14..16] == before[14..16]
            && header[18..] == before[18..]
    }

    fn append(&mut self, packet: &[u8]) {
        let body = &packet[self.headers.payload..];
        self.frame[HEADROOM + self.length..][..body.len()].copy_from_slice(body);
        self.length += body.len();
        self.segments += 1;
        if self.headers.protocol == TCP {
            let at = self.headers.transport + 13;
            self.frame[HEADROOM + at] |= packet[at] & (flag::FIN | flag::PSH);
        }
    }

    /// Delivers the pending super-packet and frees the slot.
    fn close(&mut self, deliver: &mut impl FnMut(&[u8])) {
        let frame = &mut self.frame[..HEADROOM + self.length];
        let mut vnet = self.headers.vnet();
        if self.segments > 1 {
            let packet = &mut frame[HEADROOM..];
            vnet.gso_size = self.size as u16;
            vnet.gso_type = write_headers(packet, &self.headers);
        }
        frame[..VNET_HEADER].copy_from_slice(&vnet.to_bytes());
        deliver(frame);
        self.segments = 0;
    }
}

/// Writes the lengths and sums of a super-packet into its headers. Returns its GSO type for the
/// vnet header.
fn write_headers(packet: &mut [u8], headers: &Headers) -> u8 {
    let length = packet.len();
    if headers.version == 4 {
        write_u16(packet, 2, length as u16);
        let checksum =
            ipv4_checksum(ipv4_sum(&packet[..IPV4_LEN]), length as u16, read_u16(packet, 4));
        write_u16(packet, 10, checksum);
    } else {
        write_u16(packet, 4, (length - IPV6_LEN) as u16);
    }
    let pseudo = headers.pseudo(packet);
    write_u16(packet, headers.transport + headers.checksum_offset(), pseudo);
    if headers.protocol != TCP {
        write_u16(packet, headers.transport + 4, (length - headers.transport) as u16);
        return GSO_UDP_L4;
    }
    let ecn = if packet[headers.transport + 13] & flag::CWR != 0 { GSO_ECN } else { 0 };
    ecn | if headers.version == 4 { GSO_TCPV4 } else { GSO_TCPV6 }
}

/// Compares traffic class, flow label and hop limit.
fn fits_ipv6(first: &[u8], packet: &[u8]) -> bool {
    packet[..4] == first[..4] && packet[7] == first[7]
}

/// Returns true if nothing may follow this packet in a super-packet.
fn ends_super_packet(packet: &[u8], headers: &Headers) -> bool {
    headers.protocol == TCP && packet[headers.transport + 13] & (flag::FIN | flag::PSH) != 0
}

fn key_of(link: &[u8; ETHERNET_LEN], packet: &[u8], headers: &Headers) -> [u8; KEY_LEN] {
    let addresses = if headers.version == 4 { &packet[12..20] } else { &packet[8..40] };
    let mut key = [0; KEY_LEN];
    key[..14].copy_from_slice(link);
    key[14..14 + addresses.len()].copy_from_slice(addresses);
    key[46..50].copy_from_slice(&packet[headers.transport..headers.transport + 4]);
    (key[50], key[51]) = (headers.protocol, headers.version);
    key
}
