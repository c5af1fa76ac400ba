//! Reimplements segmenting and coalescing in a slow and obvious way, and checks properties of both.
//! The tests of this package and the fuzz target `bulk` use it.

#![allow(missing_docs, reason = "the fields are those of the headers")]

use std::collections::BTreeMap;

use overnode_daemon::bulk::packet::{GSO_ECN, GSO_NONE, GSO_UDP_L4, Headers, NEEDS_CSUM};
use overnode_daemon::bulk::{Coalescer, Segmentation, VnetHeader};

// Flags of TCP (RFC 9293, and RFC 3168 for the last two).
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;
pub const ECE: u8 = 64;
pub const CWR: u8 = 128;

/// A packet with a partial checksum, given by its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub v6: bool,
    pub tcp: bool,
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub df: bool,
    /// Flow label of IPv6.
    pub label: u16,
    pub host: u8,
    pub port: u16,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    pub urgent: u16,
    /// Length is a multiple of 4 bytes.
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Packet {
    /// Creates a packet with arbitrary defaults in all other fields.
    pub fn new(v6: bool, tcp: bool, payload: usize) -> Self {
        Self {
            v6,
            tcp,
            tos: 2,
            ttl: 64,
            id: 0xfffe,
            df: true,
            label: 77,
            host: 9,
            port: 4000,
            sequence: u32::MAX - 1000,
            acknowledged: 5,
            flags: ACK,
            window: 500,
            urgent: 0,
            options: if tcp { vec![1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8] } else { Vec::new() },
            payload: (0..payload).map(|at| (at % 251) as u8).collect(),
        }
    }

    fn addresses(&self) -> Vec<u8> {
        if self.v6 {
            let mut both = vec![0xfd; 32];
            both[31] = self.host;
            both
        } else {
            vec![10, 40, 0, 2, 10, 42, 0, self.host]
        }
    }

    /// Returns the length of the IP header in bytes.
    pub fn transport_offset(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    /// Returns the length of the IP header and the transport header in bytes.
    pub fn headers(&self) -> usize {
        self.transport_offset() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    /// Encodes the packet.
    pub fn bytes(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.port.to_be_bytes());
        transport.extend(5201_u16.to_be_bytes());
        if self.tcp {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(self.acknowledged.to_be_bytes());
            transport.push(((20 + self.options.len()) / 4 * 16) as u8);
            transport.push(self.flags);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0, 0]);
            transport.extend(self.urgent.to_be_bytes());
            transport.extend(&self.options);
        } else {
            transport.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            transport.extend([0, 0]);
        }
        transport.extend(&self.payload);
        let protocol: u8 = if self.tcp { 6 } else { 17 };
        let pseudo = [self.addresses(), pseudo_end(protocol, transport.len())].concat();
        let at = if self.tcp { 16 } else { 6 };
        transport[at..at + 2].copy_from_slice(&words(&pseudo).to_be_bytes());
        let mut ip = Vec::new();
        if self.v6 {
            ip.extend([0x60 | self.tos >> 4, self.tos << 4]);
            ip.extend(self.label.to_be_bytes());
            ip.extend((transport.len() as u16).to_be_bytes());
            ip.extend([protocol, self.ttl]);
            ip.extend(self.addresses());
        } else {
            ip.extend([0x45, self.tos]);
            ip.extend(((20 + transport.len()) as u16).to_be_bytes());
            ip.extend(self.id.to_be_bytes());
            ip.extend([if self.df { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            ip.extend(self.addresses());
            let checksum = !words(&ip);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        [ip, transport].concat()
    }

    /// Returns the vnet header that the kernel writes in front of a super-packet.
    pub fn vnet(&self, size: u16) -> VnetHeader {
        let kind = match (self.tcp, self.v6) {
            (true, false) => 1,
            (true, true) => 4,
            (false, _) => 5,
        };
        let ecn = if self.tcp && self.flags & CWR != 0 { 0x80 } else { 0 };
        VnetHeader { gso_type: kind | ecn, gso_size: size, ..self.vnet_alone() }
    }

    /// Returns the vnet header that the kernel writes in front of a single packet.
    pub fn vnet_alone(&self) -> VnetHeader {
        VnetHeader {
            flags: 1,
            gso_type: 0,
            hdr_len: 14 + self.headers() as u16,
            gso_size: 0,
            csum_start: 14 + self.transport_offset() as u16,
            csum_offset: if self.tcp { 16 } else { 6 },
        }
    }

    /// Segments the packet.
    pub fn segments(&self, size: usize) -> Vec<Self> {
        let count = self.payload.len().div_ceil(size).max(1);
        let mut rest = self.payload.clone();
        let mut segments = Vec::new();
        for index in 0..count {
            let mut segment = self.clone();
            let later = rest.split_off(size.min(rest.len()));
            segment.payload = std::mem::replace(&mut rest, later);
            segment.id = self.id.wrapping_add(index as u16);
            segment.sequence = self.sequence.wrapping_add((index * size) as u32);
            if index != 0 {
                segment.flags &= !CWR;
                if self.flags & URG != 0 {
                    if index * size < usize::from(self.urgent) {
                        segment.urgent = self.urgent - (index * size) as u16;
                    } else {
                        segment.urgent = 0;
                        segment.flags &= !URG;
                    }
                }
            }
            if index != count - 1 {
                segment.flags &= !(FIN | PSH);
            }
            segments.push(segment);
        }
        segments
    }

    /// Returns true if the packet may be part of a super-packet.
    pub fn may_be_joined(&self) -> bool {
        !self.payload.is_empty() && (!self.tcp || self.flags & (SYN | RST | URG) == 0)
    }

    /// Returns true if it is segment number `index` of a super-packet that began with `first`.
    pub fn continues(&self, first: &Self, index: usize) -> bool {
        let mut expected = first.clone();
        expected.id = first.id.wrapping_add(index as u16);
        expected.sequence = first.sequence.wrapping_add((index * first.payload.len()) as u32);
        expected.flags = (first.flags & !(CWR | PSH | FIN)) | (self.flags & (PSH | FIN));
        expected.payload.clone_from(&self.payload);
        if self.v6 {
            (expected.id, expected.df) = (self.id, self.df);
        } else {
            expected.label = self.label;
        }
        if !self.tcp {
            expected.sequence = self.sequence;
            expected.acknowledged = self.acknowledged;
            (expected.flags, expected.window, expected.urgent) =
                (self.flags, self.window, self.urgent);
        }
        *self == expected && self.payload.len() <= first.payload.len()
    }
}

/// Returns the number of segments of each super-packet of one flow.
pub fn runs(packets: &[Packet]) -> Vec<usize> {
    let mut runs: Vec<usize> = Vec::new();
    let mut first: Option<&Packet> = None;
    for packet in packets {
        let ends = packet.tcp && packet.flags & (PSH | FIN) != 0;
        let most = if packet.tcp { 2048 } else { 64 };
        if let Some(before) = first {
            let count = *runs.last().expect("a run is open");
            let length = before.headers() + before.payload.len() * count + packet.payload.len();
            if packet.may_be_joined()
                && packet.continues(before, count)
                && count < most
                && length <= 65_535
            {
                *runs.last_mut().expect("a run is open") += 1;
                if ends || packet.payload.len() < before.payload.len() {
                    first = None;
                }
                continue;
            }
        }
        runs.push(1);
        first = (packet.may_be_joined() && !ends).then_some(packet);
    }
    runs
}

fn pseudo_end(protocol: u8, length: usize) -> Vec<u8> {
    [&[0, 0, 0, protocol], &(length as u32).to_be_bytes()[..]].concat()
}

/// Returns the folded sum of all 16-bit words.
pub fn words(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for (at, &byte) in bytes.iter().enumerate() {
        sum += if at % 2 == 0 { u64::from(byte) * 256 } else { u64::from(byte) };
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Completes the partial checksum of a packet without IP options, as a network card would.
pub fn finish(packet: &[u8]) -> Vec<u8> {
    let (start, protocol) = start_of(packet);
    let at = start + if protocol == 6 { 16 } else { 6 };
    let mut finished = packet.to_vec();
    let checksum = !words(&packet[start..]);
    finished[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    finished
}

/// Returns true if every checksum is valid for a receiver.
pub fn is_right(packet: &[u8]) -> bool {
    let (start, protocol) = start_of(packet);
    let v4 = packet[0] >> 4 == 4;
    let addresses = if v4 { &packet[12..20] } else { &packet[8..40] };
    let pseudo = [addresses, &pseudo_end(protocol, packet.len() - start)].concat();
    let all = [pseudo, packet[start..].to_vec()].concat();
    words(&all) == 0xffff && (!v4 || words(&packet[..20]) == 0xffff)
}

fn start_of(packet: &[u8]) -> (usize, u8) {
    if packet[0] >> 4 == 4 { (20, packet[9]) } else { (40, packet[6]) }
}

/// Returns all packets of a segmentation.
pub fn write_all(segmentation: &Segmentation<'_>) -> Vec<Vec<u8>> {
    (0..segmentation.len())
        .map(|index| {
            let mut out = vec![0xaa; segmentation.length(index) + 1];
            let length = segmentation.write(index, &mut out);
            assert_eq!(out.pop(), Some(0xaa), "bytes were written past the end");
            assert_eq!(length, out.len());
            out
        })
        .collect()
}

/// Checks what must hold for the segmentation of any packet behind any vnet header.
pub fn check_segment(packet: &[u8], vnet: &VnetHeader) {
    let Ok(segmentation) = Segmentation::new(packet, vnet) else { return };
    let segments = write_all(&segmentation);
    assert!(segments.len() == segmentation.len() && (1..=2048).contains(&segmentation.len()));
    for segment in &segments[..segments.len() - 1] {
        assert_eq!(segment.len(), segmentation.stride());
    }
    assert!(segments.last().is_some_and(|last| last.len() <= segmentation.stride()));
    if vnet.gso_type == GSO_NONE {
        assert!(segments.len() == 1 && segments[0].len() == packet.len());
        assert!(
            vnet.flags & NEEDS_CSUM != 0 && !segmentation.is_partial() || segments[0] == packet
        );
        return;
    }
    let headers = Headers::read(packet).expect("the packet was segmented");
    let mut payload = Vec::new();
    for segment in &segments {
        let own = Headers::read(segment).expect("a segment is a packet");
        assert_eq!(own, headers);
        payload.extend_from_slice(&segment[own.payload..]);
        if segment[0] >> 4 == 4 {
            assert_eq!(words(&segment[..own.transport]), 0xffff);
        }
    }
    assert_eq!(payload, packet[headers.payload..]);
    check_coalesce(
        &segments.into_iter().map(|segment| (1, segment, true)).collect::<Vec<_>>(),
        true,
    );
}

/// An opened packet: the peer, the packet's bytes, and whether its checksum is partial.
pub type Opened = (u8, Vec<u8>, bool);

/// Returns the frames that a joiner delivers.
pub fn coalesce(packets: &[Opened], coalesces_udp: bool) -> Vec<Vec<u8>> {
    let mut joiner = Coalescer::new(coalesces_udp);
    let mut frames = Vec::new();
    for (peer, packet, partial) in packets {
        joiner.push(link(*peer), packet, *partial, &mut |frame: &[u8]| frames.push(frame.to_vec()));
    }
    joiner.flush(&mut |frame| frames.push(frame.to_vec()));
    let delivered = frames.len();
    joiner.flush(&mut |frame| frames.push(frame.to_vec()));
    assert_eq!(frames.len(), delivered, "delivered twice");
    frames
}

/// Returns an Ethernet header.
pub fn link(peer: u8) -> [u8; 14] {
    [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 1, peer, 8, 0]
}

/// Returns the vnet header and the packet of a frame.
pub fn split(frame: &[u8]) -> (VnetHeader, &[u8]) {
    (VnetHeader::from_bytes(frame[..10].try_into().expect("ten bytes")), &frame[24..])
}

/// Checks that coalescing loses and invents nothing, keeps the order of each flow, and can be
/// reversed by segmenting.
pub fn check_coalesce(packets: &[Opened], coalesces_udp: bool) {
    let mut pushed: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (peer, packet, partial) in packets {
        let partial = *partial && Headers::read(packet).is_ok();
        pushed.entry((*peer, flow_of(packet))).or_default().push((packet.clone(), partial));
    }
    let mut delivered: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for frame in coalesce(packets, coalesces_udp) {
        let (vnet, packet) = split(&frame);
        let peer = frame[10 + 11];
        assert_eq!(frame[10..24], link(peer));
        let segmentation = Segmentation::new(packet, &vnet);
        if vnet.gso_type != GSO_NONE {
            let segmentation = segmentation.as_ref().expect("a super-packet can be segmented");
            assert!(segmentation.len() > 1 && packet.len() <= 65_535);
            assert!(coalesces_udp || vnet.gso_type != GSO_UDP_L4);
            assert!(vnet.gso_type & GSO_ECN == 0 || vnet.gso_type & !GSO_ECN != GSO_UDP_L4);
        }
        let parts = match &segmentation {
            Ok(segmentation) => write_all(segmentation),
            Err(_) => vec![packet.to_vec()],
        };
        for part in parts {
            delivered
                .entry((peer, flow_of(&part)))
                .or_default()
                .push((part, vnet.flags & NEEDS_CSUM != 0));
        }
    }
    assert_eq!(delivered, pushed);
}

/// Returns a key that is equal only for packets of the same flow.
fn flow_of(packet: &[u8]) -> Vec<u8> {
    match packet.first().map(|first| first >> 4) {
        Some(4) if packet.len() >= 24 => {
            let ports = usize::from(packet[0] & 15) * 4;
            let ports = packet.get(ports..ports + 4).unwrap_or_default();
            [&packet[..1], &packet[9..10], &packet[12..20], ports].concat()
        }
        Some(6) if packet.len() >= 44 => [&[0x60], &packet[6..7], &packet[8..44]].concat(),
        _ => Vec::new(),
    }
}
