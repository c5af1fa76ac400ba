//! Handmade packets. This code shares nothing with the programs: it seals and opens with ring.

use std::net::{IpAddr, Ipv4Addr};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use lab::raw::checksum;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use crate::world::{
    CONTAINER, CONTAINER_MAC, GATEWAY_MAC, LOCAL_INDEX, PUBLIC_KEY, REMOTE, RX_KEY, Underlay,
};

/// Returns an Ethernet frame.
pub(crate) fn ethernet(
    destination: [u8; 6],
    source: [u8; 6],
    kind: u16,
    payload: &[u8],
) -> Vec<u8> {
    [&destination[..], &source, &kind.to_be_bytes(), payload].concat()
}

/// Returns a frame as [`CONTAINER`] sends it.
pub(crate) fn from_container(packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, CONTAINER_MAC, 0x0800, packet)
}

/// Returns an IPv4 packet of `len` bytes, header included. It carries an experimental protocol (RFC
/// 3692) and is filled with a pattern.
pub(crate) fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, len: usize) -> Vec<u8> {
    let payload: Vec<u8> = (20..len).map(|n| (n * 7 % 251) as u8).collect();
    ipv4_with(source, destination, 253, &payload)
}

/// Returns an IPv4 packet.
pub(crate) fn ipv4_with(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let total = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0x12, 0x34, 0x40, 0, 63, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    set_ipv4_checksum(&mut packet);
    packet
}

/// Writes the correct checksum into an IPv4 header.
pub(crate) fn set_ipv4_checksum(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let sum = checksum(&[&packet[..header]]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn key(bytes: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, bytes).expect("a key"))
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Returns a data message that ring sealed.
pub(crate) fn message(with: &[u8; 32], receiver: u32, counter: u64, text: &[u8]) -> Vec<u8> {
    let mut sealed = text.to_vec();
    key(with)
        .seal_in_place_append_tag(nonce(counter), Aad::empty(), &mut sealed)
        .expect("ring cannot seal");
    [&4_u32.to_le_bytes()[..], &receiver.to_le_bytes(), &counter.to_le_bytes(), &sealed].concat()
}

/// Returns a handshake message of type 1 to 3 to this node. Types 1 and 2 have a valid first MAC.
pub(crate) fn handshake(kind: u8) -> Vec<u8> {
    let len = match kind {
        1 => 148,
        2 => 92,
        3 => 64,
        _ => panic!("{kind} is not a handshake message"),
    };
    let mut message: Vec<u8> = (0..len).map(|n| (n * 11 % 251) as u8).collect();
    message[..4].copy_from_slice(&[kind, 0, 0, 0]);
    if kind != 3 {
        let key = Blake2s256::new().chain_update(b"mac1----").chain_update(PUBLIC_KEY.0).finalize();
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("32 bytes are a key");
        let (body, macs) = message.split_at_mut(len - 32);
        macs[..16].copy_from_slice(&mac.chain(body).finalize_fixed());
    }
    message
}

/// Opens a data message and returns its receiver index, counter and plaintext.
pub(crate) fn open(with: &[u8; 32], message: &[u8]) -> (u32, u64, Vec<u8>) {
    assert_eq!(message[..4], [4, 0, 0, 0], "the type of a data message");
    let receiver = u32::from_le_bytes(message[4..8].try_into().expect("four bytes"));
    let counter = u64::from_le_bytes(message[8..16].try_into().expect("eight bytes"));
    let mut sealed = message[16..].to_vec();
    let text = key(with)
        .open_in_place(nonce(counter), Aad::empty(), &mut sealed)
        .expect("ring cannot open the message");
    (receiver, counter, text.to_vec())
}

/// Pads with zeros to a multiple of 16 bytes.
pub(crate) fn padded(packet: &[u8]) -> Vec<u8> {
    let mut text = packet.to_vec();
    text.resize(packet.len().next_multiple_of(16), 0);
    text
}

/// Source and destination of an underlay packet.
#[derive(Clone, Copy)]
pub(crate) struct Path {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    /// IPv4 type of service or IPv6 traffic class.
    pub class: u8,
}

impl Path {
    /// Returns the path from the peer to this node.
    pub(crate) fn inbound(underlay: Underlay) -> Self {
        Self {
            source: underlay.remote(),
            destination: underlay.local(),
            source_port: 6784,
            destination_port: 6784,
            class: 0,
        }
    }

    /// Returns a frame with a UDP datagram.
    pub(crate) fn frame(&self, datagram: &[u8]) -> Vec<u8> {
        let len = (8 + datagram.len()) as u16;
        let udp = [
            &self.source_port.to_be_bytes()[..],
            &self.destination_port.to_be_bytes(),
            &len.to_be_bytes(),
            &[0, 0],
            datagram,
        ]
        .concat();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut packet = ipv4_with(source, destination, 17, &udp);
                packet[1] = self.class;
                set_ipv4_checksum(&mut packet);
                ethernet([2, 9, 9, 9, 9, 1], [2, 9, 9, 9, 9, 2], 0x0800, &packet)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut packet = vec![0x60 | self.class >> 4, self.class << 4, 0, 0];
                packet.extend(len.to_be_bytes());
                packet.extend([17, 64]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet.extend(udp);
                ethernet([2, 9, 9, 9, 9, 1], [2, 9, 9, 9, 9, 2], 0x86dd, &packet)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("mixed families")
            }
        }
    }
}

/// Returns the frame in which the peer sends this packet of one of its containers.
pub(crate) fn inbound(underlay: Underlay, counter: u64, packet: &[u8]) -> Vec<u8> {
    Path::inbound(underlay).frame(&message(&RX_KEY, LOCAL_INDEX, counter, &padded(packet)))
}

/// Returns a packet from the peer's container to ours.
pub(crate) fn to_container(len: usize) -> Vec<u8> {
    ipv4(REMOTE, CONTAINER, len)
}

/// Returns a packet from our container to the peer's.
pub(crate) fn to_remote(len: usize) -> Vec<u8> {
    ipv4(CONTAINER, REMOTE, len)
}

/// The parts of a frame that `seal` made, after checks of all headers.
pub(crate) struct Sealed {
    /// IPv4 type of service or IPv6 traffic class.
    pub class: u8,
    pub message: Vec<u8>,
}

impl Sealed {
    /// Parses a frame for the data port.
    pub(crate) fn parse(underlay: Underlay, frame: &[u8]) -> Self {
        Self::parse_to(underlay, frame, 6784)
    }

    /// Parses a frame for another port.
    pub(crate) fn parse_to(underlay: Underlay, frame: &[u8], port: u16) -> Self {
        let (class, addresses, udp) = match underlay {
            Underlay::V4 => {
                let ip = &frame[14..];
                assert_eq!(frame[12..14], [8, 0], "EtherType");
                assert_eq!(ip[0], 0x45, "version and header length");
                assert_eq!(
                    usize::from(u16::from_be_bytes([ip[2], ip[3]])),
                    ip.len(),
                    "total length"
                );
                assert_eq!(ip[6..8], [0x40, 0], "flags and fragment offset");
                assert_eq!(ip[8], 64, "TTL");
                assert_eq!(ip[9], 17, "protocol");
                assert_eq!(checksum(&[&ip[..20]]), 0, "header checksum");
                (ip[1], ip[12..20].to_vec(), &ip[20..])
            }
            Underlay::V6 => {
                let ip = &frame[14..];
                assert_eq!(frame[12..14], [0x86, 0xdd], "EtherType");
                assert_eq!(ip[0] >> 4, 6, "version");
                assert_eq!([ip[1] & 0xf, ip[2], ip[3]], [0, 0, 0], "flow label");
                assert_eq!(
                    usize::from(u16::from_be_bytes([ip[4], ip[5]])),
                    ip.len() - 40,
                    "payload length"
                );
                assert_eq!(ip[6], 17, "next header");
                assert_eq!(ip[7], 64, "hop limit");
                (ip[0] << 4 | ip[1] >> 4, ip[8..40].to_vec(), &ip[40..])
            }
        };
        let expected = match (underlay.local(), underlay.remote()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => [local.octets(), remote.octets()].concat(),
            (IpAddr::V6(local), IpAddr::V6(remote)) => [local.octets(), remote.octets()].concat(),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                panic!("mixed families")
            }
        };
        assert_eq!(addresses, expected, "outer addresses");
        assert_eq!(udp[..4], [6784_u16.to_be_bytes(), port.to_be_bytes()].concat(), "ports");
        assert_eq!(usize::from(u16::from_be_bytes([udp[4], udp[5]])), udp.len(), "UDP length");
        match underlay {
            Underlay::V4 => assert_eq!(udp[6..8], [0, 0], "no UDP checksum"),
            Underlay::V6 => {
                assert_ne!(udp[6..8], [0, 0], "missing UDP checksum");
                let pseudo = [&(udp.len() as u32).to_be_bytes()[..], &[0, 0, 0, 17]].concat();
                assert_eq!(checksum(&[&addresses, &pseudo, udp]), 0, "UDP checksum");
            }
        }
        Self { class, message: udp[8..].to_vec() }
    }
}
