//! Parses the classic pcap format, as far as tests need it: link, network and transport headers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};

const LINK_ETHERNET: u32 = 1;
const LINK_COOKED: u32 = 113;
const LINK_COOKED_2: u32 = 276;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// A captured packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Capture time in microseconds since 1970.
    pub time_us: u64,
    /// All captured bytes, link header included.
    pub bytes: &'a [u8],
    /// EtherType.
    pub ether_type: u16,
    /// Bytes from the network header on.
    pub network: &'a [u8],
    /// The IP headers, if the packet is IP.
    pub ip: Option<Ip<'a>>,
}

/// Fields of an IP packet's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip<'a> {
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Source and destination port; zero if there are none.
    pub ports: (u16, u16),
    /// Bytes after the TCP or UDP header, or otherwise after the IP header.
    pub payload: &'a [u8],
}

impl Packet<'_> {
    /// Returns whether the packet is TCP to or from this port.
    pub fn is_tcp(&self, port: u16) -> bool {
        self.ip.is_some_and(|ip| ip.protocol == TCP && (ip.ports.0 == port || ip.ports.1 == port))
    }

    /// Returns whether the packet is a relayed message: UDP to port 6784 with a relay header.
    pub fn is_relayed(&self) -> bool {
        let ip = self.ip.filter(|ip| ip.protocol == UDP && ip.ports.1 == 6784);
        ip.is_some_and(|ip| ip.payload.first() == Some(&0x80))
    }

    /// Returns the type of a WireGuard message to UDP port 6784: 1 initiation, 2 response, 3 cookie
    /// reply, 4 data.
    pub fn wireguard_type(&self) -> Option<u8> {
        let ip = self.ip.filter(|ip| ip.protocol == UDP && ip.ports.1 == 6784)?;
        match *ip.payload {
            [kind @ 1..=4, 0, 0, 0, ..] => Some(kind),
            _ => None,
        }
    }
}

/// Parses a whole capture.
///
/// # Errors
/// Fails if it is not a pcap file in this machine's byte order, or if it is truncated.
pub fn packets(file: &[u8]) -> Result<Vec<Packet<'_>>> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(file.get(at..at + 4)?.try_into().ok()?))
    };
    ensure!(word(0) == Some(0xa1b2_c3d4), "not a pcap file in this machine's byte order");
    let link = word(20).context("the capture ends in its header")?;
    let mut found = Vec::new();
    let mut at = 24;
    while at < file.len() {
        let (Some(seconds), Some(micros), Some(length)) = (word(at), word(at + 4), word(at + 8))
        else {
            bail!("the capture ends inside a packet's header");
        };
        let start = at + 16;
        at = start + length as usize;
        let bytes = file.get(start..at).context("the capture ends inside a packet")?;
        let (type_at, header) = match link {
            LINK_ETHERNET => (12, 14),
            LINK_COOKED => (14, 16),
            LINK_COOKED_2 => (0, 20),
            other => bail!("unknown link type {other}"),
        };
        let ether_type = be16(bytes, type_at).unwrap_or(0);
        let network = bytes.get(header..).unwrap_or_default();
        let ip = match ether_type {
            IPV4 => ipv4(network),
            IPV6 => ipv6(network),
            _ => None,
        };
        let time_us = u64::from(seconds) * 1_000_000 + u64::from(micros);
        found.push(Packet { time_us, bytes, ether_type, network, ip });
    }
    Ok(found)
}

fn ipv4(network: &[u8]) -> Option<Ip<'_>> {
    let header = usize::from(network.first()? & 0xf) * 4;
    let address = |at: usize| -> Option<IpAddr> {
        Some(Ipv4Addr::from(<[u8; 4]>::try_from(network.get(at..at + 4)?).ok()?).into())
    };
    let length = usize::from(be16(network, 2)?);
    // Segmentation offload leaves the length of very large packets at zero.
    let end = if length == 0 { network.len() } else { length.min(network.len()) };
    transport(address(12)?, address(16)?, *network.get(9)?, network.get(header..end)?)
}

fn ipv6(network: &[u8]) -> Option<Ip<'_>> {
    let address = |at: usize| -> Option<IpAddr> {
        Some(Ipv6Addr::from(<[u8; 16]>::try_from(network.get(at..at + 16)?).ok()?).into())
    };
    transport(address(8)?, address(24)?, *network.get(6)?, network.get(40..)?)
}

fn transport(from: IpAddr, to: IpAddr, protocol: u8, rest: &[u8]) -> Option<Ip<'_>> {
    let header = match protocol {
        TCP => usize::from(rest.get(12)? >> 4) * 4,
        UDP => 8,
        _ => 0,
    };
    let ports = if header == 0 { (0, 0) } else { (be16(rest, 0)?, be16(rest, 2)?) };
    Some(Ip { from, to, protocol, ports, payload: rest.get(header..)? })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(link: u32, packet: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        for word in [
            0xa1b2_c3d4,
            0x0004_0002,
            0,
            0,
            0x4_0000,
            link,
            7,
            5,
            packet.len() as u32,
            packet.len() as u32,
        ] {
            file.extend(u32::to_ne_bytes(word));
        }
        file.extend(packet);
        file
    }

    fn datagram() -> Vec<u8> {
        let mut ip = vec![0x45, 0, 0, 36, 0, 0, 0x40, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ip.extend([0x1a, 0x80, 0x1a, 0x80, 0, 16, 0, 0]);
        ip.extend([4, 0, 0, 0, 1, 2, 3, 4]);
        ip
    }

    #[test]
    fn a_data_message_is_recognized_on_every_link_type() {
        for (link, header) in [
            (LINK_ETHERNET, [&[0u8; 12][..], &[8, 0]].concat()),
            (LINK_COOKED, [&[0u8; 14][..], &[8, 0]].concat()),
            (LINK_COOKED_2, [&[8, 0][..], &[0; 18]].concat()),
        ] {
            let file = file(link, &[header, datagram()].concat());
            let packets = packets(&file).unwrap();
            assert_eq!(packets.len(), 1);
            assert_eq!(packets[0].time_us, 7_000_005);
            assert_eq!(packets[0].wireguard_type(), Some(4));
            let ip = packets[0].ip.unwrap();
            assert_eq!((ip.ports, ip.payload.len()), ((6784, 6784), 8));
            assert!(!packets[0].is_tcp(6784));
        }
    }

    #[test]
    fn truncated_captures_are_errors() {
        let whole = file(LINK_ETHERNET, &[&[0u8; 12][..], &[8, 0], &datagram()].concat());
        for length in 25..whole.len() {
            assert!(packets(&whole[..length]).is_err(), "{length}");
        }
        assert_eq!(packets(&whole[..24]).unwrap(), []);
    }
}
