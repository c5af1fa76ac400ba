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

/// Bytes that sealing adds before the inner packet over IPv4.
pub const OVERHEAD_IPV4: usize = IPV4_LEN + UDP_LEN + DATA_HEADER_LEN;
/// Bytes that sealing adds before the inner packet over IPv6.
pub const OVERHEAD_IPV6: usize = IPV6_LEN + UDP_LEN + DATA_HEADER_LEN;

/// A session may not send a message with this counter or a later one (whitepaper section 6.1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
