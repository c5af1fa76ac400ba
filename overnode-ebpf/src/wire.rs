//! WireGuard's messages as they lie on the wire (whitepaper section 5.4), and the fixed sizes of
//! the headers around them.

/// UDP port of container traffic and of key handshakes.
pub const DATA_PORT: u16 = 6784;
/// UDP port of the bulk path: messages of its workers and its own handshakes.
pub const BULK_PORT: u16 = 6783;
/// TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;

/// First byte of a handshake initiation; 148 bytes in all.
pub const TYPE_INITIATION: u8 = 1;
/// First byte of a handshake response; 92 bytes in all.
pub const TYPE_RESPONSE: u8 = 2;
/// First byte of a cookie reply; 64 bytes in all.
pub const TYPE_COOKIE_REPLY: u8 = 3;
/// Bytes of a handshake initiation.
pub const INITIATION_LEN: usize = 148;
/// Bytes of a handshake response.
pub const RESPONSE_LEN: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE_REPLY_LEN: usize = 64;
/// Bytes of each of the two MACs at the end of initiations and responses.
pub const MAC_LEN: usize = 16;

/// First byte of a transport data message.
pub const TYPE_DATA: u8 = 4;

/// Type, three zero bytes, receiver index (u32, little-endian), counter (u64, little-endian).
pub const DATA_HEADER_LEN: usize = 16;
/// Poly1305's tag, at the end of each data message.
pub const TAG_LEN: usize = 16;
/// Plaintext is padded with zeros to a multiple of this, or to the MTU if that is smaller.
pub const PADDING: usize = 16;

/// Destination, source, EtherType.
pub const ETHERNET_LEN: usize = 14;
/// IPv4 without options.
pub const IPV4_LEN: usize = 20;
/// IPv6 without extension headers.
pub const IPV6_LEN: usize = 40;
/// Source port, destination port, length, checksum.
pub const UDP_LEN: usize = 8;
/// ARP for IPv4 over Ethernet, without the Ethernet header.
pub const ARP_LEN: usize = 28;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// First byte of a message that is relayed: [`RELAY_LEN`] bytes of relay header, then the message
/// itself, of any type. No type of WireGuard, whose implementations drop it.
///
/// | offset | bytes | what |
/// | --- | --- | --- |
/// | 0 | 1 | this type |
/// | 1 | 1 | hops that the message may still take |
/// | 2 | 2 | ID of the node that it is for |
/// | 4 | 2 | ID of the node that sent it first |
/// | 6 | 2 | ID of the node that passed it on last |
///
/// IDs are big-endian.
pub const TYPE_RELAY: u8 = 0x80;
/// Length of the relay header.
pub const RELAY_LEN: usize = 8;
/// Hops that a relayed message may take from its sender on: what still travels in a loop then is
/// dropped.
pub const RELAY_HOPS: u8 = 8;

/// A relay header, see [`TYPE_RELAY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relay {
    /// Hops that the message may still take.
    pub hops: u8,
    /// The node that it is for.
    pub destination: u16,
    /// The node that sent it first.
    pub source: u16,
    /// The node that passed it on last.
    pub previous: u16,
}

impl Relay {
    /// As it lies on the wire.
    pub const fn to_bytes(self) -> [u8; RELAY_LEN] {
        let [a, b] = self.destination.to_be_bytes();
        let [c, d] = self.source.to_be_bytes();
        let [e, f] = self.previous.to_be_bytes();
        [TYPE_RELAY, self.hops, a, b, c, d, e, f]
    }

    /// The header at the front of a datagram, and the message behind it; `None` if there is none.
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

/// Ethernet header of a packet that the daemon gives to `seal`, to be sent into the first end of
/// the normaliser: to which peer it goes is in the source address, that it is the daemon's in the
/// destination. `seal` believes that of a packet without a mark only, and containers' packets have
/// one there.
///
/// `is_direct`: not through a relay, whatever the peer's entry says, and however large. The packet
/// itself is IPv4; zeros in its place make a keepalive ([`KEEPALIVE_FRAME_LEN`]).
pub const fn daemon_header(peer: u32, is_direct: bool) -> [u8; ETHERNET_LEN] {
    let [a, b, c, d] = peer.to_le_bytes();
    let [e, f] = ETHERTYPE_IPV4.to_be_bytes();
    let [g, h, i, j, k, l] = DAEMON_MAC;
    [g, h, i, j, k, l, a, b, c, d, is_direct as u8, 0, e, f]
}

/// Ethernet header of a packet between the programs and a worker of the bulk path: which peer it
/// goes to or comes from. On the way to a worker, `source` is the IPv4 address that the packet must
/// still come from when it is sealed; on the way back it is zero.
pub const fn bulk_header(peer: u32, source: [u8; 4]) -> [u8; ETHERNET_LEN] {
    let [a, b] = (peer as u16).to_le_bytes();
    let [c, d, e, f] = source;
    let [g, h] = ETHERTYPE_IPV4.to_be_bytes();
    let [i, j, k, l, m, n] = BULK_MAC;
    [i, j, k, l, m, n, a, b, c, d, e, f, g, h]
}

/// Peer and source that a [`bulk_header`] names; `None` if it is none.
pub fn from_bulk_header(header: &[u8; ETHERNET_LEN]) -> Option<(u32, [u8; 4])> {
    let [a, b, c, d, e, f, g, h, source @ .., _, _] = *header;
    ([a, b, c, d, e, f] == BULK_MAC).then(|| (u16::from_le_bytes([g, h]).into(), source))
}

/// Destination address of [`bulk_header`].
pub const BULK_MAC: [u8; 6] = [0, 0, 0, 0, 0, 2];

/// Destination address of [`daemon_header`].
pub const DAEMON_MAC: [u8; 6] = [0, 0, 0, 0, 0, 1];

/// Length of [`keepalive_frame`].
pub const KEEPALIVE_FRAME_LEN: usize = ETHERNET_LEN + IPV4_LEN;

/// The frame that makes `seal` send a keepalive to a peer.
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

/// IP protocol numbers.
pub const PROTOCOL_ICMP: u8 = 1;
/// TCP (RFC 9293).
pub const PROTOCOL_TCP: u8 = 6;
/// UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;

/// Where the transport header of an IP protocol has its checksum, in bytes from its start; 0 for
/// other protocols, whose headers nobody here reads. Nobody here finishes one in front of it: those
/// of a tunnel's inside lie behind, and what is before is what packets are judged by.
#[inline(always)]
pub const fn checksum_place(protocol: u8) -> usize {
    match protocol {
        PROTOCOL_TCP => 16,
        PROTOCOL_UDP => 6,
        _ => 0,
    }
}

/// UDP port of probes, which nodes send each other inside the tunnel, from node address to node
/// address.
pub const PROBE_PORT: u16 = 6784;
/// Bytes behind a probe's inner UDP header that reach the daemon. What follows only makes the probe
/// larger.
pub const PROBE_LEN: usize = 28;

/// Bytes that sealing adds before the inner packet over IPv4.
pub const OVERHEAD_IPV4: usize = IPV4_LEN + UDP_LEN + DATA_HEADER_LEN;
/// Bytes that sealing adds before the inner packet over IPv6.
pub const OVERHEAD_IPV6: usize = IPV6_LEN + UDP_LEN + DATA_HEADER_LEN;

/// A session may not send a message with this counter or a later one (whitepaper section 6.1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// ECN codepoint (RFC 3168): the sender does not take part.
pub const ECN_NOT_ECT: u8 = 0;
/// ECN codepoint: the sender takes part, second mark.
pub const ECN_ECT1: u8 = 1;
/// ECN codepoint: the sender takes part.
pub const ECN_ECT0: u8 = 2;
/// ECN codepoint: congestion experienced.
pub const ECN_CE: u8 = 3;
/// The bits of the IPv4 type of service, or of the IPv6 traffic class, that hold the codepoint.
pub const ECN_MASK: u8 = 3;

/// What a packet carries after its way through the tunnel (RFC 6040, figure 4), given what the
/// outer and the inner header arrived with. `None`: it must be dropped, for its sender would not
/// understand the congestion mark.
#[inline(always)]
pub const fn ecn_decapsulated(outer: u8, inner: u8) -> Option<u8> {
    match (outer & ECN_MASK, inner & ECN_MASK) {
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

    /// RFC 6040, figure 4, row by row: inner Not-ECT, ECT(0), ECT(1), CE; outer in the same order.
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
            for (outer, expected) in ORDER.into_iter().zip(row) {
                assert_eq!(
                    ecn_decapsulated(outer, inner),
                    expected,
                    "outer {outer}, inner {inner}"
                );
            }
        }
    }

    #[test]
    fn frames_of_the_daemon_name_the_peer() {
        let frame = keepalive_frame(0x0102_0304);
        assert_eq!(frame[..14], [0, 0, 0, 0, 0, 1, 4, 3, 2, 1, 0, 0, 8, 0]);
        assert_eq!(frame[14..], [0; 20]);
        assert_eq!(daemon_header(0xfff, true)[6..12], [0xff, 0x0f, 0, 0, 1, 0]);
    }

    #[test]
    fn frames_for_workers_name_the_peer_and_the_source() {
        let header = bulk_header(0x1234, [10, 40, 0, 7]);
        assert_eq!(header, [0, 0, 0, 0, 0, 2, 0x34, 0x12, 10, 40, 0, 7, 8, 0]);
        assert_eq!(from_bulk_header(&header), Some((0x1234, [10, 40, 0, 7])));
        assert_eq!(from_bulk_header(&daemon_header(1, true)), None);
    }

    #[test]
    fn relay_headers_come_back() {
        let relay = Relay { hops: 8, destination: 0x0102, source: 0x0304, previous: 0x0506 };
        let bytes = relay.to_bytes();
        assert_eq!(bytes, [0x80, 8, 1, 2, 3, 4, 5, 6]);
        assert_eq!(Relay::split(&[&bytes[..], b"text"].concat()), Some((relay, &b"text"[..])));
        assert_eq!(Relay::split(&bytes[..7]), None);
        assert_eq!(Relay::split(&[4; 32]), None);
    }
}
