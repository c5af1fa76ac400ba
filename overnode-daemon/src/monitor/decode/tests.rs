use std::net::Ipv6Addr;

use overnode_ebpf::wire::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use proptest::prelude::*;

use super::*;

/// EtherType of an IEEE 802.1Q tag.
const ETHERTYPE_VLAN: u16 = 0x8100;

const SECRET: &[u8] = b"payload-payload-payload";

fn entry(reason: u32, program: u32, captured: u32, vlan: u32, packet: &[u8]) -> Vec<u8> {
    let mut bytes = 7_u64.to_ne_bytes().to_vec();
    for word in [reason, program, 3, 1500, captured, vlan] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(packet);
    bytes.resize(32 + DROPPED_LEN, 0xee);
    bytes
}

fn seen(reason: Reason, program: u32, packet: &[u8]) -> Seen {
    let captured = packet.len().min(DROPPED_LEN);
    record(&entry(reason as u32, program, captured as u32, 0, &packet[..captured])).unwrap()
}

fn frame(ether_type: u16, body: &[u8]) -> Vec<u8> {
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &ether_type.to_be_bytes(), body].concat()
}

fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let total = (20 + payload.len()) as u16;
    let [high, low] = total.to_be_bytes();
    let header = [0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 40, 0, 2, 10, 42, 0, 9];
    [&header[..], payload].concat()
}

fn v6(payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0, 0, payload.len() as u8, 17, 64];
    for last in [1, 2] {
        header.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).octets());
    }
    [&header[..], payload].concat()
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 0, 0, 0], payload].concat()
}

fn data(text: &[u8]) -> Vec<u8> {
    [&[4, 0, 0, 0][..], &0x1234_5678_u32.to_le_bytes(), &77_u64.to_le_bytes(), text].concat()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_packet_from_a_container_is_decoded() {
    let packet = frame(ETHERTYPE_IPV4, &v4(6, &udp(5000, 80, SECRET)));
    let seen = seen(Reason::Spoofed, PROGRAM_FROM_CONTAINER, &packet);
    assert_eq!(
        (seen.time.as_nanos(), seen.reason, seen.ifindex, seen.len),
        (7, Reason::Spoofed, Some(InterfaceIndex::new(3)), 1500)
    );
    let inner = seen.headers.inner.clone().unwrap();
    assert_eq!((inner.source, inner.destination), (address("10.40.0.2"), address("10.42.0.9")));
    assert_eq!(
        (&*inner.protocol, inner.source_port, inner.destination_port),
        ("tcp", Some(5000), Some(80))
    );
    let ethernet = seen.headers.ethernet.clone().unwrap();
    assert_eq!(ethernet.source.to_string(), "02:00:00:00:00:02");
    assert_eq!(ethernet.ether_type, 0x0800);
    assert_eq!(seen.headers.outer, None);
}

#[test]
fn a_packet_that_seal_drops_is_an_inner_packet() {
    let seen = seen(Reason::Offload, PROGRAM_SEAL, &frame(ETHERTYPE_IPV4, &v4(1, SECRET)));
    assert_eq!(seen.headers.inner.unwrap().protocol, "icmp");
    assert_eq!(seen.headers.ethernet, None);
}

#[test]
fn a_message_shows_its_inner_packet_only_if_it_was_opened() {
    let inner = v4(17, &udp(1000, 53, SECRET));
    for relay in [None, Some(Relay { hops: 7, destination: 1, source: 3, previous: 2 })] {
        let header = relay.map_or_else(Vec::new, |relay| relay.to_bytes().to_vec());
        let datagram = udp(6784, 6784, &[header, data(&inner)].concat());
        for (ether_type, body) in
            [(ETHERTYPE_IPV4, v4(17, &datagram)), (ETHERTYPE_IPV6, v6(&datagram))]
        {
            // A frame dropped for this one reason no longer has outer headers.
            for reason in Reason::ALL.iter().filter(|reason| **reason != Reason::Checksum) {
                for program in [PROGRAM_FROM_UNDERLAY, PROGRAM_FROM_UNDERLAY_XDP] {
                    let headers = seen(*reason, program, &frame(ether_type, &body)).headers;
                    let outer = headers.outer.unwrap();
                    assert_eq!(outer.source.is_ipv6(), ether_type == ETHERTYPE_IPV6);
                    assert_eq!(
                        (outer.source_port, outer.destination_port),
                        (Some(6784), Some(6784))
                    );
                    assert_eq!(
                        headers.message,
                        Some(Message { receiver: SessionIndex::new(0x1234_5678), counter: 77 })
                    );
                    let relayed = Relayed { source: 3, destination: 1, previous: 2, hops: 7 };
                    assert_eq!(headers.relay, relay.map(|_| relayed));
                    let is_opened = reason.is_opened();
                    assert_eq!(headers.inner.is_some(), is_opened, "{reason:?}");
                    if let Some(inner) = headers.inner {
                        assert_eq!(inner.destination, address("10.42.0.9"));
                        assert_eq!(inner.destination_port, Some(53), "the longest headers fit");
                    }
                }
            }
        }
    }
}

#[test]
fn vlan_tags_inside_and_beside_the_frame_are_shown() {
    let tagged = frame(
        ETHERTYPE_VLAN,
        &[&[0x60, 7][..], &ETHERTYPE_IPV4.to_be_bytes(), &v4(17, &[])].concat(),
    );
    let headers = seen(Reason::Unsupported, PROGRAM_FROM_CONTAINER, &tagged).headers;
    assert_eq!(headers.vlan, Some(7));
    assert_eq!(headers.inner.unwrap().destination, address("10.42.0.9"));
    let plain = frame(ETHERTYPE_IPV4, &v4(17, &[]));
    let beside = record(&entry(
        Reason::Unsupported as u32,
        0,
        plain.len() as u32,
        VLAN_PRESENT | 0x6009,
        &plain,
    ));
    assert_eq!(beside.unwrap().headers.vlan, Some(9));
}

#[test]
fn arp_and_unknown_protocols_are_decoded() {
    let body = [
        &[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2][..],
        &[10, 40, 0, 2],
        &[0; 6],
        &[192, 0, 2, 1],
    ]
    .concat();
    let headers =
        seen(Reason::NoRoute, PROGRAM_FROM_CONTAINER, &frame(ETHERTYPE_ARP, &body)).headers;
    assert_eq!(
        headers.arp,
        Some(Arp { sender: address("10.40.0.2"), target: address("192.0.2.1") })
    );
    let headers = seen(Reason::Unsupported, PROGRAM_FROM_CONTAINER, &frame(0x88cc, SECRET)).headers;
    assert_eq!(headers.ethernet.unwrap().ether_type, 0x88cc);
    assert_eq!((headers.arp, headers.inner), (None, None));
}

#[test]
fn later_fragments_have_no_ports() {
    let mut packet = v4(17, &udp(1, 2, SECRET));
    packet[7] = 1;
    let seen = seen(Reason::NoRoute, PROGRAM_FROM_CONTAINER, &frame(ETHERTYPE_IPV4, &packet));
    assert_eq!(seen.headers.inner.unwrap().source_port, None);
}

#[test]
fn a_record_that_no_program_of_this_version_writes_is_refused() {
    let good = entry(18, 0, 20, 0, &[0; 128]);
    assert!(record(&good).is_some());
    assert_eq!(record(&entry(60, 0, 20, 0, &[])), None, "an unknown reason");
    assert_eq!(record(&entry(18, 9, 20, 0, &[])), None, "an unknown program");
    assert_eq!(record(&entry(18, 0, 129, 0, &[])), None, "more bytes than the record has");
    for len in 0..32 + 20 {
        assert_eq!(record(&good[..len]), None, "{len}");
    }
}

proptest! {
    /// Arbitrary bytes never cause a panic. `the_payload_does_not_affect_the_result` checks that
    /// the payload never shows: two packets that differ only behind the headers decode to the same
    /// result.
    #[test]
    fn arbitrary_bytes_cause_no_panic(
        reason in 0_u32..40,
        program in 0_u32..5,
        captured in 0_u32..140,
        vlan: u32,
        packet in proptest::collection::vec(any::<u8>(), DROPPED_LEN),
        shape in 0_usize..5,
    ) {
        let mut packet = packet;
        let start: &[u8] = match shape {
            0 => &[],
            1 => &[8, 0, 0x45],
            2 => &[0x86, 0xdd, 0x60],
            3 => &[8, 6, 0, 1, 8, 0, 6, 4],
            _ => &[0x81, 0, 0, 1, 8, 0, 0x4f],
        };
        packet[12..12 + start.len()].copy_from_slice(start);
        let _ = record(&entry(reason, program, captured, vlan, &packet));
    }

    #[test]
    fn the_payload_does_not_affect_the_result(
        one in proptest::collection::vec(any::<u8>(), 60),
        other in proptest::collection::vec(any::<u8>(), 60),
        is_inner: bool,
        opened: bool,
    ) {
        let view = |payload: &[u8]| {
            if is_inner {
                let packet = v4(17, &udp(1, 2, payload));
                seen(Reason::Spoofed, PROGRAM_FROM_CONTAINER, &frame(ETHERTYPE_IPV4, &packet))
            } else {
                let text = if opened { v4(17, &udp(1, 2, payload)) } else { payload.to_vec() };
                let datagram = udp(6784, 6784, &data(&text));
                let reason = if opened { Reason::NotHere } else { Reason::Forged };
                seen(reason, PROGRAM_FROM_UNDERLAY, &frame(ETHERTYPE_IPV6, &v6(&datagram)))
            }
        };
        prop_assert_eq!(view(&one), view(&other));
    }
}
