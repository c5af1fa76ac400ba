//! Tests of `from_container`: what containers may send, and to which destinations.

use std::net::Ipv4Addr;

use lab::raw::checksum;
use overnode_ebpf::reason::Reason;

use crate::packet::{ethernet, from_container, ipv4, ipv4_with, set_ipv4_checksum, to_remote};
use crate::world::{
    CONTAINER, CONTAINER_MAC, GATEWAY_MAC, Hook, IFINDEX, MTU, NEIGHBOUR, NEIGHBOUR_GATEWAY_MAC,
    NEIGHBOUR_IFINDEX, NEIGHBOUR_MAC, NODE, OTHER_PEER_NODE, PEER, REMOTE, TC_ACT_REDIRECT,
    TC_ACT_SHOT, UNATTACHED, Underlay, World,
};

#[test]
fn packets_to_neighbors_are_delivered_unchanged() {
    let world = World::new(Underlay::V4);
    let packet = ipv4(CONTAINER, NEIGHBOUR, 100);
    let output = world.run("from_container", &from_container(&packet));
    assert_eq!(output.verdict, TC_ACT_REDIRECT);
    assert_eq!(output.frame, ethernet(NEIGHBOUR_MAC, NEIGHBOUR_GATEWAY_MAC, 0x0800, &packet));
    assert_eq!(world.counts(), [(Reason::Local, 1)]);
    // No underlay is between containers of one host, so no MTU applies.
    let packet = ipv4(CONTAINER, NEIGHBOUR, 3000);
    let output = world.run_gso("from_container", &from_container(&packet), 2000);
    assert_eq!(output.frame, ethernet(NEIGHBOUR_MAC, NEIGHBOUR_GATEWAY_MAC, 0x0800, &packet));
}

#[test]
fn packets_to_segment_enter_the_offload_veth_with_no_destination_mac() {
    let world = World::new(Underlay::V4);
    for size in [100, MTU as usize, 3000] {
        let frame = from_container(&to_remote(size));
        let output = world.run_gso("from_container", &frame, 64);
        assert_eq!(output.verdict, TC_ACT_REDIRECT);
        // If `seal` is not attached, the host's stack must not take the frame for its own.
        assert_eq!(output.frame, [&[0; 6], &frame[6..]].concat());
    }
    assert_eq!(world.counts(), [], "counted before it was sealed");
}

#[test]
fn a_container_without_an_entry_sends_nothing() {
    let mut world = World::new(Underlay::V4);
    world.remove_endpoint(IFINDEX);
    world.expect_drop("from_container", &from_container(&to_remote(100)), Reason::Unconfigured);
    world.expect_drop("from_container", &arp(CONTAINER, NEIGHBOUR), Reason::Unconfigured);
}

#[test]
fn spoofed_packets_are_dropped() {
    let world = World::new(Underlay::V4);
    for source in [NEIGHBOUR, REMOTE, UNATTACHED, NODE, Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST]
    {
        for destination in [NEIGHBOUR, REMOTE] {
            world.expect_drop(
                "from_container",
                &from_container(&ipv4(source, destination, 64)),
                Reason::Spoofed,
            );
        }
    }
    for byte in 0..6 {
        let mut mac = CONTAINER_MAC;
        mac[byte] ^= 0x10;
        let frame = ethernet(GATEWAY_MAC, mac, 0x0800, &to_remote(64));
        world.expect_drop("from_container", &frame, Reason::Spoofed);
    }
}

#[test]
fn destinations_without_an_owner_are_refused() {
    let mut world = World::new(Underlay::V4);
    let to = |destination: [u8; 4]| from_container(&ipv4(CONTAINER, destination.into(), 64));
    let answered = |world: &World, destination: [u8; 4], reason| {
        let packet = ipv4(CONTAINER, destination.into(), 64);
        expect_unreachable(world, &packet, reason);
    };
    answered(&world, [10, 46, 0, 1], Reason::NoRoute);
    answered(&world, [192, 0, 2, 1], Reason::NoRoute);
    answered(&world, [127, 0, 0, 1], Reason::NoRoute);
    answered(&world, UNATTACHED.octets(), Reason::NotHere);
    // While a daemon restarts, its name server is away, and resolvers must repeat their queries.
    world.expect_drop("from_container", &to(OTHER_PEER_NODE.octets()), Reason::NoRoute);
    world.change_peer(PEER, |peer| peer.present = 0);
    world.expect_drop("from_container", &to(REMOTE.octets()), Reason::NoRoute);
    world.remove_endpoint(NEIGHBOUR_IFINDEX);
    world.expect_drop("from_container", &to(NEIGHBOUR.octets()), Reason::NotHere);
    world.set_route(Ipv4Addr::new(10, 46, 0, 0), 16, 77, 1);
    answered(&world, [10, 46, 0, 1], Reason::NoRoute);
}

#[test]
fn answers_to_packets_that_nobody_gets_are_limited() {
    let world = World::new(Underlay::V4);
    let to = Ipv4Addr::new(10, 46, 0, 1);
    // No answer to ICMP errors and to later fragments.
    let mut fragment = ipv4(CONTAINER, to, 64);
    fragment[7] = 1;
    set_ipv4_checksum(&mut fragment);
    world.expect_drop("from_container", &from_container(&fragment), Reason::NoRoute);
    for kind in [3, 4, 5, 11, 12] {
        let mut error = vec![0; 64];
        error[0] = kind;
        let packet = from_container(&ipv4_with(CONTAINER, to, 1, &error));
        world.expect_drop("from_container", &packet, Reason::NoRoute);
    }
    let frame = from_container(&ipv4(CONTAINER, to, 64));
    let before = world.count(Reason::NoRoute);
    let answers =
        (0..200).filter(|_| world.run("from_container", &frame).verdict == TC_ACT_REDIRECT).count();
    assert!((32..100).contains(&answers), "{answers} answers at once");
    assert_eq!(world.count(Reason::NoRoute), before + 200, "each packet is counted once");
}

/// Checks that `packet` is counted as dropped, and answered with an ICMP "host unreachable".
#[track_caller]
fn expect_unreachable(world: &World, packet: &[u8], reason: Reason) {
    let before = world.count(reason);
    let output = world.run("from_container", &from_container(packet));
    assert_eq!((output.verdict, world.count(reason)), (TC_ACT_REDIRECT, before + 1));
    expect_error(&output.frame, packet, [3, 1], 0);
}

#[test]
fn other_protocols_and_multicast_are_refused() {
    let world = World::new(Underlay::V4);
    let packet = to_remote(64);
    for kind in [0x86dd, 0x8100, 0x88a8, 0x88b5, 0x0000] {
        world.expect_drop(
            "from_container",
            &ethernet(GATEWAY_MAC, CONTAINER_MAC, kind, &packet),
            Reason::Unsupported,
        );
    }
    for destination in [[224, 0, 0, 1], [239, 1, 2, 3], [255, 255, 255, 255], [240, 0, 0, 1]] {
        let frame = from_container(&ipv4(CONTAINER, destination.into(), 64));
        world.expect_drop("from_container", &frame, Reason::Unsupported);
    }
    for group in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        world.expect_drop(
            "from_container",
            &ethernet(group, CONTAINER_MAC, 0x0800, &packet),
            Reason::Unsupported,
        );
    }
}

#[test]
fn malformed_packets_are_refused() {
    let world = World::new(Underlay::V4);
    let packet = to_remote(64);
    let changed = |at: usize, value: u8| {
        let mut packet = packet.clone();
        packet[at] = value;
        from_container(&packet)
    };
    world.expect_drop("from_container", &changed(0, 0x65), Reason::Malformed);
    world.expect_drop("from_container", &changed(0, 0x05), Reason::Malformed);
    world.expect_drop("from_container", &changed(0, 0x44), Reason::Malformed);
    world.expect_drop("from_container", &changed(3, 19), Reason::Malformed);
    world.expect_drop("from_container", &changed(3, 65), Reason::Malformed);
    for len in 20..64 {
        world.expect_drop("from_container", &from_container(&packet[..len]), Reason::Malformed);
    }
    // All zeros but the peer, which is how the daemon asks `seal` for a keepalive.
    let mut keepalive = [0; 20];
    keepalive[16] = PEER as u8;
    world.expect_drop("from_container", &from_container(&keepalive), Reason::Malformed);
}

/// Returns an ARP request with this sender address.
fn arp(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let body = [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &CONTAINER_MAC,
        &sender.octets(),
        &[0; 6],
        &target.octets(),
    ]
    .concat();
    ethernet([0xff; 6], CONTAINER_MAC, 0x0806, &body)
}

#[test]
fn arp_is_answered_for_the_whole_subnet() {
    let world = World::new(Underlay::V4);
    let targets = [
        NEIGHBOUR,
        REMOTE,
        UNATTACHED,
        NODE,
        Ipv4Addr::new(10, 32, 0, 0),
        Ipv4Addr::new(10, 47, 255, 255),
        Ipv4Addr::new(10, 40, 0, 1),
    ];
    let mut answered = 0;
    for target in targets {
        for sender in [CONTAINER, Ipv4Addr::UNSPECIFIED] {
            for padding in [0, 18] {
                let mut request = arp(sender, target);
                request.resize(request.len() + padding, 0);
                let output = world.run("from_container", &request);
                let body = [
                    &[0, 1, 8, 0, 6, 4, 0, 2][..],
                    &GATEWAY_MAC,
                    &target.octets(),
                    &CONTAINER_MAC,
                    &sender.octets(),
                    &vec![0; padding],
                ]
                .concat();
                assert_eq!(output.verdict, TC_ACT_REDIRECT);
                assert_eq!(output.frame, ethernet(CONTAINER_MAC, GATEWAY_MAC, 0x0806, &body));
                answered += 1;
            }
        }
    }
    assert_eq!(world.counts(), [(Reason::Arp, answered)]);
}

#[test]
fn other_arp_packets_are_not_answered() {
    let world = World::new(Underlay::V4);
    let with = |at: usize, value: u8| {
        let mut frame = arp(CONTAINER, NEIGHBOUR);
        frame[at] = value;
        frame
    };
    let cases = [
        // Duplicate address detection and announcements.
        (arp(Ipv4Addr::UNSPECIFIED, CONTAINER), Reason::Unsupported),
        (arp(CONTAINER, CONTAINER), Reason::Unsupported),
        // Targets outside the subnet, on both sides of it.
        (arp(CONTAINER, Ipv4Addr::new(10, 31, 255, 255)), Reason::NoRoute),
        (arp(CONTAINER, Ipv4Addr::new(10, 48, 0, 0)), Reason::NoRoute),
        (arp(CONTAINER, Ipv4Addr::new(192, 0, 2, 1)), Reason::NoRoute),
        // A foreign sender: its address, its hardware address in the body, and in the header.
        (arp(NEIGHBOUR, REMOTE), Reason::Spoofed),
        (with(22, 0x12), Reason::Spoofed),
        (with(6, 0x12), Reason::Spoofed),
        // A reply and RARP.
        (with(21, 2), Reason::Unsupported),
        (with(21, 3), Reason::Unsupported),
        // Another hardware type, protocol or length.
        (with(15, 6), Reason::Malformed),
        (with(16, 0x86), Reason::Malformed),
        (with(18, 8), Reason::Malformed),
        (with(19, 16), Reason::Malformed),
    ];
    for (frame, reason) in cases {
        world.expect_drop("from_container", &frame, reason);
    }
    let whole = arp(CONTAINER, NEIGHBOUR);
    for len in 14..whole.len() {
        world.expect_drop("from_container", &whole[..len], Reason::Malformed);
    }
}

/// Checks that `packet` is answered with an ICMP "fragmentation needed".
#[track_caller]
fn expect_fragmentation_needed(world: &World, packet: &[u8], gso_size: u32, mtu: u16) {
    let before = world.count(Reason::TooBig);
    let output = world.run_gso("from_container", &from_container(packet), gso_size);
    assert_eq!(output.verdict, TC_ACT_REDIRECT);
    assert_eq!(world.counts(), [(Reason::TooBig, before + 1)]);
    expect_error(&output.frame, packet, [3, 4], mtu);
}

/// Checks that `frame` is an ICMP error about `packet` with this type and code.
#[track_caller]
fn expect_error(frame: &[u8], packet: &[u8], code: [u8; 2], mtu: u16) {
    assert_eq!(frame[..14], ethernet(CONTAINER_MAC, GATEWAY_MAC, 0x0800, &[]));
    let ip = &frame[14..];
    assert_eq!(ip.len(), 20 + 8 + 68);
    assert_eq!(ip[..10], [0x45, 0, 0, 96, 0, 0, 0, 0, 64, 1]);
    assert_eq!(ip[12..16], NODE.octets());
    assert_eq!(ip[16..20], CONTAINER.octets());
    assert_eq!(checksum(&[&ip[..20]]), 0, "header checksum");
    let icmp = &ip[20..];
    assert_eq!(icmp[..2], code, "type and code");
    assert_eq!(icmp[4..6], [0, 0], "unused");
    assert_eq!(icmp[6..8], mtu.to_be_bytes(), "next-hop MTU");
    assert_eq!(checksum(&[icmp]), 0, "ICMP checksum");
    let quoted = packet.len().min(68);
    assert_eq!(icmp[8..8 + quoted], packet[..quoted], "the quoted packet");
    assert!(icmp[8 + quoted..].iter().all(|byte| *byte == 0), "nothing else is told");
}

fn tcp(len: usize, header: u8) -> Vec<u8> {
    let mut segment = vec![0x5a; len];
    segment[12] = (header / 4) << 4;
    ipv4_with(CONTAINER, REMOTE, 6, &segment)
}

#[test]
fn oversized_packets_are_answered_with_icmp() {
    let mut world = World::new(Underlay::V4);
    for size in [MTU as usize + 1, 1500, 3000] {
        expect_fragmentation_needed(&world, &to_remote(size), 0, MTU as u16);
    }
    world.change_peer(PEER, |peer| peer.mtu = 600);
    for size in [601, 1000, 1420] {
        expect_fragmentation_needed(&world, &to_remote(size), 0, 600);
    }
    expect_fragmentation_needed(&world, &ipv4_with(CONTAINER, REMOTE, 17, &[1; 800]), 0, 600);
    expect_fragmentation_needed(&world, &tcp(800, 20), 0, 600);
    // Echo requests and replies.
    for kind in [8, 0] {
        let mut ping = vec![0; 900];
        ping[0] = kind;
        expect_fragmentation_needed(&world, &ipv4_with(CONTAINER, REMOTE, 1, &ping), 0, 600);
    }
    // The quote contains eight bytes after the IP header, even if that has options.
    let mut options = to_remote(900);
    options[0] = 0x4f;
    set_ipv4_checksum(&mut options);
    expect_fragmentation_needed(&world, &options, 0, 600);
}

#[test]
fn the_mtu_applies_to_each_segment() {
    let world = World::new(Underlay::V4);
    let passes = |packet: &[u8], gso_size| {
        let frame = from_container(packet);
        let output = world.run_gso("from_container", &frame, gso_size);
        assert_eq!(
            (output.verdict, output.frame),
            (TC_ACT_REDIRECT, [&[0; 6], &frame[6..]].concat()),
            "{gso_size}"
        );
    };
    for header in [20_u8, 32, 60] {
        let fits = MTU - 20 - u32::from(header);
        passes(&tcp(3000, header), fits);
        expect_fragmentation_needed(&world, &tcp(3000, header), fits + 1, MTU as u16);
    }
    let udp = ipv4_with(CONTAINER, REMOTE, 17, &[1; 3000]);
    passes(&udp, MTU - 28);
    expect_fragmentation_needed(&world, &udp, MTU - 27, MTU as u16);
}

#[test]
fn oversized_fragments_and_icmp_errors_are_never_answered() {
    let world = World::new(Underlay::V4);
    let mut fragment = to_remote(1500);
    fragment[7] = 1;
    set_ipv4_checksum(&mut fragment);
    world.expect_drop("from_container", &from_container(&fragment), Reason::TooBigDropped);
    for kind in [3, 4, 5, 11, 12] {
        let mut error = vec![0; 1500];
        error[0] = kind;
        let packet = ipv4_with(CONTAINER, REMOTE, 1, &error);
        world.expect_drop("from_container", &from_container(&packet), Reason::TooBigDropped);
    }
}

/// The host end of a veth is an interface of the host, to which any of its processes can send.
#[test]
fn only_packets_that_programs_delivered_enter_a_container() {
    let world = World::new(Underlay::V4);
    let frame = from_container(&ipv4(REMOTE, CONTAINER, 100));
    for mark in [[0; 4], [1, 0, 0, 0], CONTAINER.octets()] {
        let before = world.count(Reason::FromHost);
        let output = world.run_marked("to_container", &frame, 0, mark);
        assert_eq!((output.verdict, world.count(Reason::FromHost)), (TC_ACT_SHOT, before + 1));
    }
    let delivered = u32::from_be_bytes(*b"ovnd").to_ne_bytes();
    assert_eq!(world.run_marked("to_container", &frame, 0, delivered).verdict, Hook::Tc.passed());
}
