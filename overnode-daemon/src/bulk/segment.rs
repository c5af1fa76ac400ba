//! Segments one super-packet from a TAP device into packets that fit the path. The result equals
//! that of the kernel's `tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment` and
//! `ipv6_gso_segment`.

use overnode_ebpf::wire::{ETHERNET_LEN, IPV4_LEN, IPV6_LEN, checksum_offset};

use super::packet::{
    BadPacket, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Headers, NEEDS_CSUM, TCP, UDP,
    VnetHeader, flag, ipv4_checksum, ipv4_sum, read_u16, read_u32, write_u16, write_u32,
};
use crate::checksum::{fold, sum};

/// Maximum number of segments of one super-packet. A packet of 64 kB has fewer even with segments
/// of 36 bytes, the payload at the kernel's smallest MSS (48) with TCP timestamps.
pub const MAX_SEGMENTS: usize = 2048;

/// Plan for segmenting one packet from a TAP device.
#[derive(Clone, Copy, Debug)]
pub struct Segmentation<'a> {
    packet: &'a [u8],
    plan: Plan,
}

#[derive(Clone, Copy, Debug)]
enum Plan {
    /// The packet stays as it is. Its checksum may be partial.
    Whole {
        partial: bool,
    },
    /// The partial checksum is completed here, because no receiver would complete it. It is summed
    /// from `start` on and stored at `field`, both in bytes from the start of the packet.
    CompleteChecksum {
        start: usize,
        field: usize,
    },
    Segments(Segments),
}

#[derive(Clone, Copy, Debug)]
struct Segments {
    headers: Headers,
    /// Payload of each segment but the last, in bytes.
    size: usize,
    count: usize,
    /// Sum from [`ipv4_sum`]; 0 for IPv6.
    ipv4: u32,
    /// Sum of the pseudo-header without the length.
    pseudo: u32,
}

impl<'a> Segmentation<'a> {
    /// Plans the segmentation of a packet that followed a vnet header and an Ethernet header.
    ///
    /// A partial checksum outside the packet's own TCP or UDP header (in a tunnel that the
    /// container runs, for example) is completed.
    ///
    /// # Errors
    /// Returns [`BadPacket`] if the packet must be dropped.
    pub fn new(packet: &'a [u8], vnet: &VnetHeader) -> Result<Self, BadPacket> {
        let plan = match (vnet.flags & NEEDS_CSUM != 0, vnet.gso_type) {
            (false, GSO_NONE) if packet.is_empty() => return Err(BadPacket::NotIp),
            (false, GSO_NONE) => Plan::Whole { partial: false },
            (false, _) => return Err(BadPacket::NotPartial),
            (true, GSO_NONE) => match Headers::read(packet) {
                Ok(headers) if has_checksum_of(&headers, vnet) => Plan::Whole { partial: true },
                _ => complete_checksum(packet, vnet)?,
            },
            (true, _) => Plan::Segments(Segments::new(packet, vnet)?),
        };
        Ok(Self { packet, plan })
    }

    /// Returns the number of resulting packets, 1 to [`MAX_SEGMENTS`].
    #[allow(clippy::len_without_is_empty, reason = "there is always at least one")]
    pub fn len(&self) -> usize {
        match &self.plan {
            Plan::Segments(segments) => segments.count,
            Plan::Whole { .. } | Plan::CompleteChecksum { .. } => 1,
        }
    }

    /// Returns true if the transport checksum of each resulting packet is partial.
    pub fn is_partial(&self) -> bool {
        match self.plan {
            Plan::Whole { partial } => partial,
            Plan::CompleteChecksum { .. } => false,
            Plan::Segments(_) => true,
        }
    }

    /// Returns the length of each packet but the last, in bytes. The last one is no longer.
    pub fn stride(&self) -> usize {
        self.length(0)
    }

    /// Returns the length of one packet, in bytes.
    ///
    /// # Panics
    /// Panics if `index` is out of range.
    pub fn length(&self, index: usize) -> usize {
        assert!(index < self.len(), "no such segment");
        match &self.plan {
            Plan::Segments(segments) => {
                let rest = self.packet.len() - segments.headers.payload - index * segments.size;
                segments.headers.payload + rest.min(segments.size)
            }
            Plan::Whole { .. } | Plan::CompleteChecksum { .. } => self.packet.len(),
        }
    }

    /// Writes one packet to the beginning of `out` and returns its length in bytes.
    ///
    /// # Panics
    /// Panics if `index` is out of range, or if `out` is too short.
    pub fn write(&self, index: usize, out: &mut [u8]) -> usize {
        let length = self.length(index);
        let out = &mut out[..length];
        match &self.plan {
            Plan::Whole { .. } => out.copy_from_slice(self.packet),
            Plan::CompleteChecksum { start, field } => {
                out.copy_from_slice(self.packet);
                // Like the kernel, store 0xffff instead of 0, which in UDP means "no checksum".
                let checksum = match !fold(sum(&out[*start..])) {
                    0 => 0xffff,
                    other => other,
                };
                write_u16(out, *field, checksum);
            }
            Plan::Segments(segments) => segments.write(self.packet, index, out),
        }
        length
    }
}

impl Segments {
    fn new(packet: &[u8], vnet: &VnetHeader) -> Result<Self, BadPacket> {
        let headers = Headers::read(packet)?;
        let known = match vnet.gso_type & !GSO_ECN {
            GSO_TCPV4 => headers.version == 4 && headers.protocol == TCP,
            GSO_TCPV6 => headers.version == 6 && headers.protocol == TCP,
            GSO_UDP_L4 => headers.protocol == UDP && vnet.gso_type & GSO_ECN == 0,
            _ => false,
        };
        if !known {
            return Err(BadPacket::GsoType(vnet.gso_type));
        }
        if !has_checksum_of(&headers, vnet) {
            return Err(BadPacket::Checksum { start: vnet.csum_start, offset: vnet.csum_offset });
        }
        let size = usize::from(vnet.gso_size);
        if size == 0 {
            return Err(BadPacket::GsoSize);
        }
        let count = (packet.len() - headers.payload).div_ceil(size).max(1);
        if count > MAX_SEGMENTS {
            return Err(BadPacket::Segments(count));
        }
        let ipv4 = if headers.version == 4 { ipv4_sum(&packet[..headers.transport]) } else { 0 };
        let field = read_u16(packet, headers.transport + headers.checksum_offset());
        let transport_length = (packet.len() - headers.transport) as u16;
        let pseudo = u32::from(field) + u32::from(!transport_length);
        Ok(Self { headers, size, count, ipv4, pseudo })
    }

    fn write(&self, packet: &[u8], index: usize, out: &mut [u8]) {
        let Headers { version, protocol, transport, payload } = self.headers;
        let offset = index * self.size;
        let length = out.len();
        out[..payload].copy_from_slice(&packet[..payload]);
        let body = length - payload;
        out[payload..].copy_from_slice(&packet[payload + offset..][..body]);
        if version == 4 {
            let id = read_u16(packet, 4).wrapping_add(index as u16);
            write_u16(out, 2, length as u16);
            write_u16(out, 4, id);
            write_u16(out, 10, ipv4_checksum(self.ipv4, length as u16, id));
            debug_assert!(transport >= IPV4_LEN);
        } else {
            write_u16(out, 4, (length - IPV6_LEN) as u16);
        }
        let header = &mut out[transport..];
        let transport_length = header.len() as u16;
        if protocol == TCP {
            self.write_tcp(header, index, offset as u32);
        } else {
            write_u16(header, 4, transport_length);
        }
        let partial = fold(self.pseudo + u32::from(transport_length));
        write_u16(header, self.headers.checksum_offset(), partial);
    }

    fn write_tcp(&self, header: &mut [u8], index: usize, offset: u32) {
        write_u32(header, 4, read_u32(header, 4).wrapping_add(offset));
        let mut flags = header[13];
        if index > 0 {
            flags &= !flag::CWR;
        }
        if index + 1 < self.count {
            flags &= !(flag::FIN | flag::PSH);
        }
        if flags & flag::URG != 0 && index > 0 {
            let urgent = u32::from(read_u16(header, 18)).saturating_sub(offset);
            if urgent == 0 {
                flags &= !flag::URG;
            }
            write_u16(header, 18, urgent as u16);
        }
        header[13] = flags;
    }
}

fn has_checksum_of(headers: &Headers, vnet: &VnetHeader) -> bool {
    usize::from(vnet.csum_start) == ETHERNET_LEN + headers.transport
        && usize::from(vnet.csum_offset) == headers.checksum_offset()
}

/// Plans the completion of a partial checksum. It must not overwrite anything up to the packet's
/// own transport checksum field, because the packet was checked by those bytes.
fn complete_checksum(packet: &[u8], vnet: &VnetHeader) -> Result<Plan, BadPacket> {
    let bad = BadPacket::Checksum { start: vnet.csum_start, offset: vnet.csum_offset };
    let head = packet.first_chunk::<IPV4_LEN>().ok_or(BadPacket::NotIp)?;
    let (header, protocol) = match head[0] {
        first @ 0x45..=0x4f => (usize::from(first & 0x0f) * 4, head[9]),
        0x60..=0x6f => (IPV6_LEN, head[6]),
        _ => return Err(BadPacket::NotIp),
    };
    let start = usize::from(vnet.csum_start).checked_sub(ETHERNET_LEN).ok_or(bad)?;
    let field = start + usize::from(vnet.csum_offset);
    let is_checked_header = start < header || field < header + checksum_offset(protocol);
    // The sum of at most 65,536 words does not overflow.
    if is_checked_header || field + 2 > packet.len() || packet.len() > super::packet::MAX_PACKET {
        return Err(bad);
    }
    Ok(Plan::CompleteChecksum { start, field })
}
