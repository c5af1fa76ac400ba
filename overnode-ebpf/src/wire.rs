//! Layout of WireGuard's messages (whitepaper section 5.4), and fixed sizes of the headers around
//! them.

/// UDP port of container traffic and of handshakes.
pub const DATA_PORT: u16 = 6784;
/// UDP port of the bulk path: data messages of its workers and its own handshakes.
pub const BULK_PORT: u16 = 6783;
/// TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;

/// First byte of a handshake initiation.
pub const TYPE_INITIATION: u8 = 1;
/// First byte of a handshake response.
pub const TYPE_RESPONSE: u8 = 2;
/// First byte of a cookie reply.
pub const TYPE_COOKIE_REPLY: u8 = 3;
/// Length of a handshake initiation, in bytes.
pub const INITIATION_LEN: usize = 148;
/// Length of a handshake response, in bytes.
pub const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply, in bytes.
pub const COOKIE_REPLY_LEN: usize = 64;
/// Length of each of the two MACs at the end of initiations and responses, in bytes.
pub const MAC_LEN: usize = 16;

/// First byte of a transport data message.
pub const TYPE_DATA: u8 = 4;

/// Length of a data message's header: type, three zero bytes, receiver index (u32, little-endian),
/// counter (u64, little-endian).
pub const DATA_HEADER_LEN: usize = 16;
/// Length of the Poly1305 tag at the end of each data message.
pub const TAG_LEN: usize = 16;
/// Plaintext is padded with zeros to a multiple of this many bytes, or to the MTU if that is
/// smaller.
pub const PADDING: usize = 16;

/// Length of an Ethernet header: destination, source, EtherType.
pub const ETHERNET_LEN: usize = 14;
/// Length of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Length of an IPv6 header without extension headers.
pub const IPV6_LEN: usize = 40;
/// Length of a UDP header: source port, destination port, length, checksum.
pub const UDP_LEN: usize = 8;
/// Length of an ARP packet for IPv4 over Ethernet, without the Ethernet header.
pub const ARP_LEN: usize = 28;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// First byte of a relayed message: a relay header of [`RELAY_LEN`] bytes, followed by a message of
/// any type. WireGuard does not use this type, and its implementations drop such messages.
///
/// | offset | bytes | content |
/// | --- | --- | --- |
/// | 0 | 1 | this type |
/// | 1 | 1 | hops left |
/// | 2 | 2 | ID of the destination node |
/// | 4 | 2 | ID of the source node |
/// | 6 | 2 | ID of the previous hop |
///
/// IDs are big-endian.
pub const TYPE_RELAY: u8 = 0x80;
/// Length of the relay header.
pub const RELAY_LEN: usize = 8;
/// Hops that a relayed message may take, counted from its source. Messages in a loop are dropped
/// after that many.
pub const RELAY_HOPS: u8 = 8;

/// A relay header. See [`TYPE_RELAY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relay {
    /// Hops left.
    pub hops: u8,
    /// ID of the destination node.
    pub destination: u16,
    /// ID of the source node.
    pub source: u16,
    /// ID of the previous hop: the node that sent or relayed the message last.
    pub previous: u16,
}

impl Relay {
    /// Returns the wire format.
    pub const fn to_bytes(self) -> [u8; RELAY_LEN] {
        let [a, b] = self.destination.to_be_bytes();
        let [c, d] = self.source.to_be_bytes();
        let [e, f] = self.previous.to_be_bytes();
        [TYPE_RELAY, self.hops, a, b, c, d, e, f]
    }

    /// Splits a datagram into its relay header and the message after it. Returns `None` if it has
    /// no relay header.
    pub fn split(datagram: &[u8]) -> Option<(Self, &[u8])> {
        let ([kind, hops, a, b, c, d, e, f], message) = datagram.split_first_chunk()?;
        let relay = Self {
            hops: *hops,
            destination: u16::from_be_bytes([*a, *b]),
            source: u16::from_be_bytes([*c, *d]),
            previous: u16::from_be_bytes([*e, *f]),
        };
        (*kind == TYPE_RELAY).then_some((relay, message))
    }
}

/// Returns the Ethernet header of a packet from the daemon to `seal`, sent into the first end of
/// the offload veth. The source address names the peer. The destination address marks the packet as
/// the daemon's. `seal` accepts it only in packets without a mark; packets of containers have one
/// there.
///
/// `is_direct` sends the packet on the direct path, even if the peer's entry names a relay, and
/// whatever its size. The packet itself is IPv4. Zeros in its place make a keepalive
/// ([`KEEPALIVE_FRAME_LEN`]).
pub const fn daemon_header(peer: u32, is_direct: bool) -> [u8; ETHERNET_LEN] {
    let [a, b, c, d] = peer.to_le_bytes();
    let [e, f] = ETHERTYPE_IPV4.to_be_bytes();
    let [g, h, i, j, k, l] = DAEMON_MAC;
    [g, h, i, j, k, l, a, b, c, d, is_direct as u8, 0, e, f]
}

/// Returns the Ethernet header of a packet between the programs and a bulk worker. It names the
/// peer that the packet goes to or comes from. On the way to a worker, `source` is the IPv4 source
/// address that the packet must have when it is sealed. On the way back, it is zero.
pub const fn bulk_header(peer: u32, source: [u8; 4]) -> [u8; ETHERNET_LEN] {
    let [a, b] = (peer as u16).to_le_bytes();
    let [c, d, e, f] = source;
    let [g, h] = ETHERTYPE_IPV4.to_be_bytes();
    let [i, j, k, l, m, n] = BULK_MAC;
    [i, j, k, l, m, n, a, b, c, d, e, f, g, h]
}

/// Returns the peer and source in a [`bulk_header`], or `None` if this is a different header.
pub fn from_bulk_header(header: &[u8; ETHERNET_LEN]) -> Option<(u32, [u8; 4])> {
    let [a, b, c, d, e, f, g, h, source @ .., _, _] = *header;
    ([a, b, c, d, e, f] == BULK_MAC).then(|| (u16::from_le_bytes([g, h]).into(), source))
}

/// Destination MAC address of a [`bulk_header`].
pub const BULK_MAC: [u8; 6] = [0, 0, 0, 0, 0, 2];

/// Destination MAC address of a [`daemon_header`].
pub const DAEMON_MAC: [u8; 6] = [0, 0, 0, 0, 0, 1];

/// Length of a [`keepalive_frame`], in bytes.
pub const KEEPALIVE_FRAME_LEN: usize = ETHERNET_LEN + IPV4_LEN;

/// Returns the frame that makes `seal` send a keepalive to a peer.
pub const fn keepalive_frame(peer: u32) -> [u8; KEEPALIVE_FRAME_LEN] {
    let header = daemon_header(peer, false);
    let mut frame = [0; KEEPALIVE_FRAME_LEN];
    let mut at = 0;
    while at < ETHERNET_LEN {
        frame[at] = header[at];
        at += 1;
    }
    frame
}

/// IP protocol number of ICMP (RFC 792).
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of TCP (RFC 9293).
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;

/// Returns the offset of the checksum in a transport header, in bytes; 0 for protocols whose
/// headers nothing here reads.
///
/// Nothing here completes a checksum at a smaller offset. The checksums of an encapsulated packet
/// are at larger ones, and the checks of a packet rely on the bytes before this offset.
#[inline(always)]
pub const fn checksum_offset(protocol: u8) -> usize {
    match protocol {
        PROTOCOL_TCP => 16,
        PROTOCOL_UDP => 6,
        _ => 0,
    }
}

/// UDP port of probes, which nodes exchange inside the tunnel between their node addresses.
pub const PROBE_PORT: u16 = 6784;
/// Port of DNS servers, UDP and TCP (RFC 1035).
pub const DNS_PORT: u16 = 53;
/// Bytes after a probe's inner UDP header that reach the daemon. Any further bytes only pad the
/// probe.
pub const PROBE_LEN: usize = 28;

/// Bytes that sealing adds before the inner packet over IPv4.
pub const OVERHEAD_IPV4: usize = IPV4_LEN + UDP_LEN + DATA_HEADER_LEN;
/// Bytes that sealing adds before the inner packet over IPv6.
pub const OVERHEAD_IPV6: usize = IPV6_LEN + UDP_LEN + DATA_HEADER_LEN;

/// Limit of a session's counter (whitepaper section 6.1): no message may have this counter or a
/// later one.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// ECN codepoint (RFC 3168): not ECN-capable transport.
pub const ECN_NOT_ECT: u8 = 0;
/// ECN codepoint: ECN-capable transport, ECT(1).
pub const ECN_ECT1: u8 = 1;
/// ECN codepoint: ECN-capable transport, ECT(0).
pub const ECN_ECT0: u8 = 2;
/// ECN codepoint: congestion experienced.
pub const ECN_CE: u8 = 3;
/// Bits of the IPv4 type of service or IPv6 traffic class that hold the ECN codepoint.
pub const ECN_MASK: u8 = 3;

/// Returns the ECN codepoint of a decapsulated packet (RFC 6040, figure 4), given those of the
/// outer and the inner header on arrival. `None` means that the packet must be dropped, because its
/// transport does not understand the congestion mark.
#[inline(always)]
pub const fn ecn_decapsulated(decap: u8, inner: u8) -> Option<u8> {
    match (decap & ECN_MASK, inner & ECN_MASK) {
        (ECN_CE, ECN_NOT_ECT) => None,
        (_, ECN_NOT_ECT) => Some(ECN_NOT_ECT),
        (_, ECN_CE) | (ECN_CE, _) => Some(ECN_CE),
        (ECN_ECT1, ECN_ECT0) => Some(ECN_ECT1),
        (_, inner) => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6040, figure 4, row by row. Rows are inner Not-ECT, ECT(0), ECT(1), CE; columns are
    /// outer, in the same order.
    #[test]
    fn ecn_follows_the_table_of_rfc_6040() {
        const ORDER: [u8; 4] = [ECN_NOT_ECT, ECN_ECT0, ECN_ECT1, ECN_CE];
        let table = [
            [Some(ECN_NOT_ECT), Some(ECN_NOT_ECT), Some(ECN_NOT_ECT), None],
            [Some(ECN_ECT0), Some(ECN_ECT0), Some(ECN_ECT1), Some(ECN_CE)],
            [Some(ECN_ECT1), Some(ECN_ECT1), Some(ECN_ECT1), Some(ECN_CE)],
            [Some(ECN_CE), Some(ECN_CE), Some(ECN_CE), Some(ECN_CE)],
        ];
        for (inner, row) in ORDER.into_iter().zip(table) {
            for (decap, expected) in ORDER.into_iter().zip(row) {
                assert_eq!(
                    ecn_decapsulated(decap, inner),
                    expected,
                    "outer {decap}, inner {inner}"
                );
            }
        }
    }

    #[test]
    fn frames_from_the_daemon_carry_the_peer_index() {
        let frame = keepalive_frame(0x0102_0304);
        assert_eq!(frame[..14], [0, 0, 0, 0, 0, 1, 4, 3, 2, 1, 0, 0, 8, 0]);
        assert_eq!(frame[14..], [0; 20]);
        assert_eq!(daemon_header(0xfff, true)[6..12], [0xff, 0x0f, 0, 0, 1, 0]);
    }

    #[test]
    fn frames_for_workers_carry_the_peer_and_the_source() {
        let header = bulk_header(0x1234, [10, 40, 0, 7]);
        assert_eq!(header, [0, 0, 0, 0, 0, 2, 0x34, 0x12, 10, 40, 0, 7, 8, 0]);
        assert_eq!(from_bulk_header(&header), Some((0x1234, [10, 40, 0, 7])));
        assert_eq!(from_bulk_header(&daemon_header(1, true)), None);
    }

    #[test]
    fn relay_headers_round_trip() {
        let relay = Relay { hops: 8, destination: 0x0102, source: 0x0304, previous: 0x0506 };
        let bytes = relay.to_bytes();
        assert_eq!(bytes, [0x80, 8, 1, 2, 3, 4, 5, 6]);
        assert_eq!(Relay::split(&[&bytes[..], b"text"].concat()), Some((relay, &b"text"[..])));
        assert_eq!(Relay::split(&bytes[..7]), None);
        assert_eq!(Relay::split(&[4; 32]), None);
    }
}
