//! Reads the headers of inner packets, encodes the vnet header of a TAP device, and computes header
//! checksums.

use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN, UDP_LEN};

use crate::checksum::{fold, sum};

/// Length of [`VnetHeader`], in bytes.
pub const VNET_HEADER: usize = 10;
/// Longest IPv6 packet without a jumbo option, in bytes. An IPv4 packet is always shorter.
pub const MAX_PACKET: usize = 40 + 65_535;

/// [`VnetHeader::flags`]: the checksum at [`VnetHeader::csum_start`] is partial.
pub const NEEDS_CSUM: u8 = 1;
/// [`VnetHeader::gso_type`]: a single packet.
pub const GSO_NONE: u8 = 0;
/// [`VnetHeader::gso_type`]: segments of TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// [`VnetHeader::gso_type`]: segments of TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// [`VnetHeader::gso_type`]: datagrams of UDP, over IPv4 or IPv6.
pub const GSO_UDP_L4: u8 = 5;
/// [`VnetHeader::gso_type`], combined with a TCP type: the first segment has CWR set.
pub const GSO_ECN: u8 = 0x80;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const TCP_HEADER: usize = 20;
/// Maximum number of extension headers that are followed. No stack sends more in one packet.
const MAX_EXTENSIONS: usize = 8;

/// Flags of TCP, in byte 13 of its header.
pub(super) mod flag {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const URG: u8 = 0x20;
    pub(crate) const CWR: u8 = 0x80;
}

/// `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h), in the byte order of this machine,
/// which is the default of a TAP device. Offsets count from the first byte of the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`NEEDS_CSUM`] and other flags.
    pub flags: u8,
    /// [`GSO_NONE`] or another type, possibly with [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of the Ethernet, IP and transport headers, in bytes. Only a hint in headers from the
    /// kernel.
    pub hdr_len: u16,
    /// Payload of each segment but the last, in bytes.
    pub gso_size: u16,
    /// Offset at which the sum begins, in bytes.
    pub csum_start: u16,
    /// Offset at which the sum is stored, in bytes from `csum_start` on.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Encodes the header.
    pub fn to_bytes(self) -> [u8; VNET_HEADER] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        let numbers = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (field, number) in bytes[2..].chunks_exact_mut(2).zip(numbers) {
            field.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    /// Decodes a header from [`Self::to_bytes`] or from the kernel.
    pub fn from_bytes(bytes: [u8; VNET_HEADER]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_ne_bytes([a, b]),
            gso_size: u16::from_ne_bytes([c, d]),
            csum_start: u16::from_ne_bytes([e, f]),
            csum_offset: u16::from_ne_bytes([g, h]),
        }
    }
}

/// A packet that cannot be segmented, or that has no usable transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// The version is neither 4 nor 6.
    #[error("not an IP packet")]
    NotIp,
    /// A length in a header differs from the actual length, or is less than the header itself.
    #[error("the length of the packet ({0} bytes) contradicts its headers")]
    Length(usize),
    /// The protocol is neither TCP nor UDP.
    #[error("protocol {0} is neither TCP nor UDP")]
    Protocol(u8),
    /// The packet is a fragment, which has no transport header of its own.
    #[error("the packet is a fragment")]
    Fragment,
    /// The [`VnetHeader::gso_type`] is unknown or belongs to another protocol.
    #[error("segmentation type {0:#x} is unknown or belongs to another protocol")]
    GsoType(u8),
    /// The segments would have no payload.
    #[error("the segments would have no payload")]
    GsoSize,
    /// The number of segments exceeds [`super::segment::MAX_SEGMENTS`].
    #[error("{0} segments are too many")]
    Segments(usize),
    /// The checksum field is not that of the transport header, is outside the packet, or would
    /// overwrite a header that was checked.
    #[error("the checksum must not be written at {start} + {offset}")]
    Checksum {
        /// [`VnetHeader::csum_start`].
        start: u16,
        /// [`VnetHeader::csum_offset`].
        offset: u16,
    },
    /// The checksum is complete, but each segment needs a checksum of its own.
    #[error("the checksum of a packet to be segmented is already complete")]
    NotPartial,
}

/// The headers of a complete TCP or UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// IP version, 4 or 6.
    pub version: u8,
    /// Protocol number of TCP or UDP.
    pub protocol: u8,
    /// Offset of the transport header, in bytes.
    pub transport: usize,
    /// Offset of the payload, in bytes.
    pub payload: usize,
}

impl Headers {
    /// Reads the headers and checks that their lengths match the packet.
    ///
    /// # Errors
    /// Returns [`BadPacket`] for anything but a complete TCP or UDP packet.
    pub fn read(packet: &[u8]) -> Result<Self, BadPacket> {
        let length = BadPacket::Length(packet.len());
        let version = packet.first().ok_or(BadPacket::NotIp)? >> 4;
        let (protocol, transport) = match version {
            4 => read_ipv4(packet)?,
            6 => read_ipv6(packet)?,
            _ => return Err(BadPacket::NotIp),
        };
        let rest = packet.get(transport..).ok_or(length)?;
        let header = match protocol {
            TCP if rest.len() >= TCP_HEADER => usize::from(rest[12] >> 4) * 4,
            UDP if rest.len() >= UDP_LEN && usize::from(read_u16(rest, 4)) == rest.len() => UDP_LEN,
            TCP | UDP => return Err(length),
            other => return Err(BadPacket::Protocol(other)),
        };
        let min_header = if protocol == TCP { TCP_HEADER } else { UDP_LEN };
        if header < min_header || header > rest.len() {
            return Err(length);
        }
        Ok(Self { version, protocol, transport, payload: transport + header })
    }

    /// Returns the offset of the checksum in the transport header, in bytes.
    pub fn checksum_offset(&self) -> usize {
        if self.protocol == TCP { 16 } else { 6 }
    }

    /// Returns the vnet header for a single packet with these headers and a partial checksum.
    pub fn vnet(&self) -> VnetHeader {
        let from_ethernet =
            |offset: usize| u16::try_from(ETHERNET_LEN + offset).unwrap_or(u16::MAX);
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_NONE,
            hdr_len: from_ethernet(self.payload),
            gso_size: 0,
            csum_start: from_ethernet(self.transport),
            csum_offset: if self.protocol == TCP { 16 } else { 6 },
        }
    }

    /// Returns the value of the checksum field while the checksum is partial: the sum of the
    /// pseudo-header, never 0.
    ///
    /// A routing header is not followed. The sum covers the destination address in the IP header.
    pub fn pseudo(&self, packet: &[u8]) -> u16 {
        let addresses = if self.version == 4 { &packet[12..20] } else { &packet[8..40] };
        let length = (packet.len() - self.transport) as u32;
        fold(sum(addresses) + u32::from(self.protocol) + (length & 0xffff) + (length >> 16))
    }
}

fn read_ipv4(packet: &[u8]) -> Result<(u8, usize), BadPacket> {
    let length = BadPacket::Length(packet.len());
    if packet.len() < IPV4_LEN || usize::from(read_u16(packet, 2)) != packet.len() {
        return Err(length);
    }
    let header = usize::from(packet[0] & 0x0f) * 4;
    if header < IPV4_LEN || header > packet.len() {
        return Err(length);
    }
    // MF is set or the fragment offset is not 0.
    if read_u16(packet, 6) & 0x3fff != 0 {
        return Err(BadPacket::Fragment);
    }
    Ok((packet[9], header))
}

fn read_ipv6(packet: &[u8]) -> Result<(u8, usize), BadPacket> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let length = BadPacket::Length(packet.len());
    if packet.len() < IPV6_LEN || IPV6_LEN + usize::from(read_u16(packet, 4)) != packet.len() {
        return Err(length);
    }
    let (mut next, mut at) = (packet[6], IPV6_LEN);
    for _ in 0..MAX_EXTENSIONS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {}
            FRAGMENT => return Err(BadPacket::Fragment),
            other => return Ok((other, at)),
        }
        let [header, units] = *packet.get(at..at + 2).ok_or(length)? else { return Err(length) };
        (next, at) = (header, at + 8 + usize::from(units) * 8);
    }
    Err(length)
}

pub(super) fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn write_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

pub(super) fn write_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Returns the sum of an IPv4 header without its length, ID and checksum. See [`ipv4_checksum`].
pub(super) fn ipv4_sum(header: &[u8]) -> u32 {
    sum(&header[..2]) + sum(&header[6..10]) + sum(&header[12..])
}

/// Returns the checksum of an IPv4 header, given [`ipv4_sum`] and the fields that it omits.
pub(super) fn ipv4_checksum(rest: u32, length: u16, id: u16) -> u16 {
    !fold(rest + u32::from(length) + u32::from(id))
}
