//! WireGuard's messages as they lie on the wire (whitepaper section 5.4), and the fixed sizes of the headers around them.

/// UDP port of container traffic and of key handshakes.
pub const DATA_PORT: u16 = 6784;
/// TCP port of control connections.
pub const CONTROL_PORT: u16 = 6783;

/// First byte of a handshake initiation; 148 bytes in all.
pub const TYPE_INITIATION: u8 = 1;
/// First byte of a handshake response; 92 bytes in all.
pub const TYPE_RESPONSE: u8 = 2;
/// First byte of a cookie reply; 64 bytes in all.
pub const TYPE_COOKIE_REPLY: u8 = 3;
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
/// EtherType (IEEE 802 local experimental 1) of the frame by which the daemon asks `seal` for a keepalive:
/// its payload is the peer index, u32 little-endian. See [`crate::map`].
pub const ETHERTYPE_KEEPALIVE: u16 = 0x88b5;

/// Length of [`keepalive_frame`].
pub const KEEPALIVE_FRAME_LEN: usize = ETHERNET_LEN + 4;

/// The frame that makes `seal` send a keepalive to a peer, to be sent into the first end of the normaliser.
pub const fn keepalive_frame(peer: u32) -> [u8; KEEPALIVE_FRAME_LEN] {
    let [e, f] = ETHERTYPE_KEEPALIVE.to_be_bytes();
    let [a, b, c, d] = peer.to_le_bytes();
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, e, f, a, b, c, d]
}

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

/// What a packet carries after its way through the tunnel (RFC 6040, figure 4), given what the outer and the inner header arrived with.
/// `None`: it must be dropped, for its sender would not understand the congestion mark.
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
                assert_eq!(ecn_decapsulated(outer, inner), expected, "outer {outer}, inner {inner}");
            }
        }
    }

    #[test]
    fn the_keepalive_frame_names_the_peer() {
        let frame = keepalive_frame(0x0102_0304);
        assert_eq!(frame[12..], [0x88, 0xb5, 4, 3, 2, 1]);
    }
}
