//! Tests of `from_underlay`, as a TC and as an XDP program, over IPv4 and over IPv6: what arrives
//! from a peer.

use overnode_ebpf::map::{SESSION_FREE, SESSION_LIVE, SESSION_UNCONFIRMED};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::replay::WINDOW;
use overnode_ebpf::wire::REJECT_AFTER_MESSAGES;

use overnode_daemon::datapath::{from_map, to_map};

use crate::packet::{
    Path, ethernet, handshake, inbound, ipv4, ipv4_with, message, open, padded, set_ipv4_checksum,
    to_container, to_remote,
};
use crate::world::{
    CONTAINER, CONTAINER_MAC, GATEWAY_MAC, HOOKS, Hook, IFINDEX, LOCAL_INDEX, MTU, NEIGHBOUR,
    NEIGHBOUR_GATEWAY_MAC, NEIGHBOUR_IFINDEX, NEIGHBOUR_MAC, OTHER_PEER, OTHER_REMOTE, PEER,
    REMOTE, RX_KEY, SLOT, TX_KEY, UNATTACHED, Underlay, World, boot_ns, each, session,
};

#[track_caller]
fn expect_delivered(world: &World, hook: Hook, frame: &[u8], packet: &[u8]) {
    let before = world.count(Reason::Opened);
    let output = world.receive(hook, frame);
    assert_eq!(output.verdict, hook.redirected(), "{:?}", world.counts());
    assert_eq!(output.frame, ethernet(CONTAINER_MAC, GATEWAY_MAC, 0x0800, packet));
    assert_eq!(world.count(Reason::Opened), before + 1);
}

#[test]
fn messages_sealed_by_ring_are_delivered() {
    each(|hook, underlay, mut world| {
        let mut bytes = 0;
        let sizes =
            (28..=MTU as usize).filter(|size| size % 13 == 0 || *size < 100 || *size > 1340);
        for (counter, size) in sizes.enumerate() {
            let packet = to_container(size);
            expect_delivered(&world, hook, &inbound(underlay, counter as u64, &packet), &packet);
            bytes += size as u64;
            let peer = world.peer(PEER);
            assert_eq!((peer.rx_packets, peer.rx_bytes), (counter as u64 + 1, bytes));
            assert!(peer.last_rx_ns > 0 && peer.last_rx_ns == peer.last_data_rx_ns);
            assert!(peer.last_rx_ns <= boot_ns());
        }
        assert_eq!(world.counts().len(), 1);
    });
}

#[test]
fn sealed_packets_open_at_the_peer() {
    each(|hook, underlay, mut world| {
        // The peer's host has our addresses and our keys with the two directions swapped.
        let mut peer = World::new(underlay);
        peer.set_route(REMOTE, 32, overnode_ebpf::map::ROUTE_LOCAL, IFINDEX);
        peer.set_route(CONTAINER, 32, overnode_ebpf::map::ROUTE_PEER, PEER);
        peer.set_endpoint(IFINDEX, REMOTE, CONTAINER_MAC, GATEWAY_MAC);
        peer.change_session(SLOT, |session| session.rx_key = session.tx_key);
        world.change_session(SLOT, |session| session.remote_index = LOCAL_INDEX);
        world.change_peer(PEER, |peer| (peer.local, peer.remote) = (peer.remote, peer.local));
        for size in [28, 64, 500, 1419, 1420] {
            let packet = to_remote(size);
            let sealed = world.run("seal", &crate::packet::from_container(&packet));
            expect_delivered(&peer, hook, &sealed.frame, &packet);
        }
        let keepalive = world.keepalive(PEER);
        peer.expect_refused(hook, &keepalive.frame, Reason::KeepaliveReceived);
    });
}

#[test]
fn plaintext_need_not_be_padded() {
    each(|hook, underlay, world| {
        for (counter, size) in [28, 29, 63, 64, 65, 1399].into_iter().enumerate() {
            let packet = to_container(size);
            let sealed = message(&RX_KEY, LOCAL_INDEX, counter as u64, &packet);
            expect_delivered(&world, hook, &Path::inbound(underlay).frame(&sealed), &packet);
        }
    });
}

#[test]
fn a_frame_may_be_longer_than_its_packet() {
    each(|hook, underlay, world| {
        let packet = to_container(28);
        let mut frame = inbound(underlay, 0, &packet);
        frame.extend([0xee; 18]);
        expect_delivered(&world, hook, &frame, &packet);
    });
}

#[test]
fn unrelated_packets_pass_unchanged() {
    each(|hook, underlay, world| {
        let path = Path::inbound(underlay);
        let sealed = message(&RX_KEY, LOCAL_INDEX, 0, &padded(&to_container(100)));
        let elsewhere = match underlay {
            Underlay::V4 => "192.0.2.77".parse().expect("an address"),
            Underlay::V6 => "2001:db8::77".parse().expect("an address"),
        };
        let mut others = vec![
            // Handshakes and cookies, on both ports.
            path.frame(&handshake(1)),
            path.frame(&handshake(2)),
            path.frame(&handshake(3)),
            Path { destination_port: 6783, ..path }.frame(&handshake(1)),
            // Other ports and other hosts.
            Path { destination_port: 6783, ..path }.frame(&sealed),
            Path { destination_port: 51820, ..path }.frame(&sealed),
            Path { destination: elsewhere, ..path }.frame(&sealed),
            // Other protocols.
            ethernet([2; 6], [4; 6], 0x0806, &[1; 46]),
            ethernet([2; 6], [4; 6], 0x88cc, &[1; 46]),
            ethernet([2; 6], [4; 6], 0x8100, &path.frame(&sealed)[12..]),
        ];
        let tcp = {
            let mut frame = path.frame(&sealed);
            match underlay {
                Underlay::V4 => {
                    frame[14 + 9] = 6;
                    set_ipv4_checksum(&mut frame[14..]);
                }
                Underlay::V6 => frame[14 + 6] = 6,
            }
            frame
        };
        others.push(tcp);
        if underlay == Underlay::V4 {
            // A fragment with a nonzero offset has no ports.
            let mut fragment = path.frame(&sealed);
            fragment[14 + 6..14 + 8].copy_from_slice(&[0x20, 0x10]);
            set_ipv4_checksum(&mut fragment[14..]);
            others.push(fragment);
            // Bytes that look like a data message, in a packet of another IP version.
            let mut version = path.frame(&sealed);
            version[14] = 0x55;
            others.push(version);
        } else {
            let mut version = path.frame(&sealed);
            version[14] = 0x50;
            others.push(version);
        }
        for frame in &others {
            let output = world.receive(hook, frame);
            assert_eq!(output.verdict, hook.passed(), "{frame:02x?}");
            assert_eq!(&output.frame, frame);
        }
        // A frame that ends within its headers is not ours.
        let whole = path.frame(&sealed);
        let headers = if underlay == Underlay::V4 { 14 + 28 } else { 14 + 48 };
        let shortest = if underlay == Underlay::V4 { 14 + 20 } else { 14 + 40 };
        for len in shortest..headers {
            let output = world.receive(hook, &whole[..len]);
            assert_eq!(
                (output.verdict, &output.frame[..]),
                (hook.passed(), &whole[..len]),
                "{len} bytes"
            );
        }
        assert_eq!(world.counts(), []);
    });
}

#[test]
fn every_flipped_bit_is_detected() {
    each(|hook, underlay, mut world| {
        let frame = inbound(underlay, 0, &to_container(28));
        let start = if underlay == Underlay::V4 { 14 + 28 } else { 14 + 48 };
        for bit in start * 8..frame.len() * 8 {
            let mut flipped = frame.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            match bit / 8 - start {
                0..4 => world.expect_refused(hook, &flipped, Reason::Malformed),
                4..8 => world.expect_refused(hook, &flipped, Reason::UnknownIndex),
                _ => world.expect_refused(hook, &flipped, Reason::Forged),
            }
        }
        assert_eq!(world.peer(PEER).rx_packets, 0);
        assert_eq!(world.session(SLOT).window.next, 0, "a forged message must not move the window");
        expect_delivered(&world, hook, &frame, &to_container(28));
    });
}

#[test]
fn every_truncation_is_detected() {
    each(|hook, underlay, world| {
        let sealed = message(&RX_KEY, LOCAL_INDEX, 0, &padded(&to_container(100)));
        for len in 1..sealed.len() {
            let reason = if len < 32 { Reason::Malformed } else { Reason::Forged };
            world.expect_refused(hook, &Path::inbound(underlay).frame(&sealed[..len]), reason);
        }
        // Only the frame is truncated, so its headers claim more bytes.
        let whole = Path::inbound(underlay).frame(&sealed);
        let start = if underlay == Underlay::V4 { 14 + 28 } else { 14 + 48 };
        for len in start + 1..whole.len() {
            world.expect_refused(hook, &whole[..len], Reason::Malformed);
        }
        // The UDP length claims one byte more than the IP header.
        let mut longer = whole.clone();
        longer[start - 3] += 1;
        longer.push(0);
        world.expect_refused(hook, &longer, Reason::Malformed);
    });
}

#[test]
fn a_message_is_accepted_once_and_only_within_the_window() {
    each(|hook, underlay, world| {
        let packet = to_container(28);
        let send = |counter| inbound(underlay, counter, &packet);
        expect_delivered(&world, hook, &send(0), &packet);
        world.expect_refused(hook, &send(0), Reason::Replayed);
        expect_delivered(&world, hook, &send(10_000), &packet);
        world.expect_refused(hook, &send(10_000), Reason::Replayed);
        expect_delivered(&world, hook, &send(9_999), &packet);
        world.expect_refused(hook, &send(9_999), Reason::Replayed);
        expect_delivered(&world, hook, &send(10_000 - WINDOW), &packet);
        world.expect_refused(hook, &send(9_999 - WINDOW), Reason::TooOld);
        world.expect_refused(hook, &send(0), Reason::TooOld);
        expect_delivered(&world, hook, &send((1 << 40) + 999_999), &packet);
        world.expect_refused(hook, &send(10_001), Reason::TooOld);
        expect_delivered(&world, hook, &send(REJECT_AFTER_MESSAGES - 1), &packet);
        for counter in [REJECT_AFTER_MESSAGES, REJECT_AFTER_MESSAGES + 1, u64::MAX] {
            world.expect_refused(hook, &send(counter), Reason::Exhausted);
        }
    });
}

#[test]
fn only_installed_sessions_open_messages() {
    each(|hook, underlay, mut world| {
        let packet = to_container(28);
        let path = Path::inbound(underlay);
        let with = |index| path.frame(&message(&RX_KEY, index, 0, &padded(&packet)));
        for index in
            [0, SLOT, LOCAL_INDEX ^ 1, LOCAL_INDEX ^ 1 << 12, LOCAL_INDEX ^ 1 << 31, u32::MAX]
        {
            world.expect_refused(hook, &with(index), Reason::UnknownIndex);
        }
        world.change_session(SLOT, |session| session.state = SESSION_FREE);
        world.expect_refused(hook, &with(LOCAL_INDEX), Reason::UnknownIndex);
        world.set_session(SLOT, session());
        world.change_peer(PEER, |peer| peer.present = 0);
        world.expect_refused(hook, &with(LOCAL_INDEX), Reason::UnknownIndex);
        world.change_peer(PEER, |peer| peer.present = 1);
        world.change_session(SLOT, |session| session.expires_ns = boot_ns());
        world.expect_refused(hook, &with(LOCAL_INDEX), Reason::Expired);
        world.set_session(SLOT, session());
        world.expect_refused(
            hook,
            &path.frame(&message(&TX_KEY, LOCAL_INDEX, 0, &padded(&packet))),
            Reason::Forged,
        );
        expect_delivered(&world, hook, &with(LOCAL_INDEX), &packet);
    });
}

#[test]
fn the_first_message_confirms_a_session() {
    each(|hook, underlay, mut world| {
        world.change_session(SLOT, |session| session.state = SESSION_UNCONFIRMED);
        world.change_peer(PEER, |peer| peer.tx_slot = 0);
        let packet = to_container(28);
        let mut forged = inbound(underlay, 0, &packet);
        *forged.last_mut().expect("bytes") ^= 1;
        world.expect_refused(hook, &forged, Reason::Forged);
        assert_eq!((world.session(SLOT).state, world.peer(PEER).tx_slot), (SESSION_UNCONFIRMED, 0));
        let out = crate::packet::from_container(&to_remote(64));
        world.expect_drop("seal", &out, Reason::NoSession);

        let path = Path::inbound(underlay);
        let keepalive = path.frame(&message(&RX_KEY, LOCAL_INDEX, 0, &[]));
        world.expect_refused(hook, &keepalive, Reason::KeepaliveReceived);
        assert_eq!((world.session(SLOT).state, world.peer(PEER).tx_slot), (SESSION_LIVE, SLOT));
        let sealed = world.run("seal", &out).frame;
        assert_eq!(
            open(&TX_KEY, &crate::packet::Sealed::parse(underlay, &sealed).message).2,
            to_remote(64)
        );
        // A message on a live session does not make it the sending session.
        world.change_peer(PEER, |peer| peer.tx_slot = SLOT + 1);
        expect_delivered(&world, hook, &inbound(underlay, 1, &packet), &packet);
        assert_eq!(world.peer(PEER).tx_slot, SLOT + 1);
    });
}

#[test]
fn a_keepalive_is_counted_but_not_delivered() {
    each(|hook, underlay, mut world| {
        let keepalive = Path::inbound(underlay).frame(&message(&RX_KEY, LOCAL_INDEX, 0, &[]));
        world.expect_refused(hook, &keepalive, Reason::KeepaliveReceived);
        world.expect_refused(hook, &keepalive, Reason::Replayed);
        let peer = world.peer(PEER);
        assert_eq!((peer.rx_packets, peer.rx_bytes, peer.last_data_rx_ns), (1, 0, 0));
        assert!(peer.last_rx_ns > 0);
    });
}

#[test]
fn the_endpoint_follows_the_last_authenticated_message() {
    each(|hook, underlay, mut world| {
        let moved = match underlay {
            Underlay::V4 => Path {
                source: "203.0.113.5".parse().expect("an address"),
                source_port: 40_000,
                ..Path::inbound(underlay)
            },
            Underlay::V6 => Path {
                source: "2001:db8:ffff::5".parse().expect("an address"),
                source_port: 40_000,
                ..Path::inbound(underlay)
            },
        };
        world.change_peer(PEER, |peer| {
            peer.local = to_map("198.51.100.99".parse().expect("an address"));
            peer.ifindex = 99;
        });
        let unmoved = world.peer(PEER);
        let packet = to_container(28);
        let sealed = message(&RX_KEY, LOCAL_INDEX, 0, &padded(&packet));
        let mut forged = sealed.clone();
        forged[20] ^= 1;
        world.expect_refused(hook, &moved.frame(&forged), Reason::Forged);
        assert_eq!(world.peer(PEER), unmoved);

        expect_delivered(&world, hook, &moved.frame(&sealed), &packet);
        let peer = world.peer(PEER);
        assert_eq!(from_map(peer.remote), moved.source);
        assert_eq!(from_map(peer.local), moved.destination);
        assert_eq!(u16::from_be(peer.remote_port_be), 40_000);
        assert_eq!(peer.ifindex, IFINDEX);

        // A copy from another address, by a sender without a key.
        world.expect_refused(hook, &Path::inbound(underlay).frame(&sealed), Reason::Replayed);
        assert_eq!(from_map(world.peer(PEER).remote), moved.source);
    });
}

#[test]
fn a_peer_can_roam_between_ipv4_and_ipv6() {
    for hook in HOOKS {
        let mut world = World::new(Underlay::V6);
        world.change_peer(PEER, |peer| {
            peer.remote = to_map(Underlay::V4.remote());
            peer.local = to_map(Underlay::V4.local());
        });
        let packet = to_container(28);
        expect_delivered(&world, hook, &inbound(Underlay::V6, 0, &packet), &packet);
        let sealed = world.run("seal", &crate::packet::from_container(&to_remote(64)));
        let message = crate::packet::Sealed::parse(Underlay::V6, &sealed.frame).message;
        assert_eq!(open(&TX_KEY, &message).2, to_remote(64));
    }
}

#[test]
fn a_peer_sends_only_from_its_own_addresses() {
    each(|hook, underlay, mut world| {
        let sources = [
            OTHER_REMOTE,
            CONTAINER,
            NEIGHBOUR,
            UNATTACHED,
            [192, 0, 2, 1].into(),
            [0, 0, 0, 0].into(),
        ];
        let mut counter = 0;
        for source in sources {
            world.expect_refused(
                hook,
                &inbound(underlay, counter, &ipv4(source, CONTAINER, 64)),
                Reason::ForeignSource,
            );
            counter += 1;
        }
        // The same session, now that of the peer that owns the address.
        world.change_session(SLOT, |session| session.peer = OTHER_PEER);
        let packet = ipv4(OTHER_REMOTE, CONTAINER, 64);
        expect_delivered(&world, hook, &inbound(underlay, counter, &packet), &packet);
        world.expect_refused(
            hook,
            &inbound(underlay, counter + 1, &to_container(64)),
            Reason::ForeignSource,
        );
        assert_eq!(world.peer(OTHER_PEER).rx_packets, 2);
    });
}

#[test]
fn only_packets_to_local_containers_are_delivered() {
    each(|hook, underlay, mut world| {
        let destinations = [
            UNATTACHED,
            OTHER_REMOTE,
            REMOTE,
            [192, 0, 2, 1].into(),
            [10, 47, 255, 255].into(),
            [224, 0, 0, 1].into(),
        ];
        let mut counter = 0;
        for destination in destinations {
            world.expect_refused(
                hook,
                &inbound(underlay, counter, &ipv4(REMOTE, destination, 64)),
                Reason::NotHere,
            );
            counter += 1;
        }
        let packet = ipv4(REMOTE, NEIGHBOUR, 64);
        let output = world.receive(hook, &inbound(underlay, counter, &packet));
        assert_eq!(output.verdict, hook.redirected());
        assert_eq!(output.frame, ethernet(NEIGHBOUR_MAC, NEIGHBOUR_GATEWAY_MAC, 0x0800, &packet));
        world.remove_endpoint(NEIGHBOUR_IFINDEX);
        world.expect_refused(hook, &inbound(underlay, counter + 1, &packet), Reason::NotHere);
    });
}

#[test]
fn authentic_but_malformed_packets_are_refused() {
    each(|hook, underlay, world| {
        let path = Path::inbound(underlay);
        let mut counter = 0;
        let mut refuse = |text: &[u8], reason| {
            world.expect_refused(
                hook,
                &path.frame(&message(&RX_KEY, LOCAL_INDEX, counter, text)),
                reason,
            );
            counter += 1;
        };
        let packet = to_container(64);
        let changed = |at: usize, value: u8| {
            let mut packet = packet.clone();
            packet[at] = value;
            packet
        };
        for len in 1..20 {
            refuse(&packet[..len], Reason::Malformed);
        }
        refuse(&packet[..63], Reason::Malformed);
        refuse(&changed(2, 0xff), Reason::Malformed);
        refuse(&changed(3, 19), Reason::Malformed);
        refuse(&changed(0, 0x44), Reason::Malformed);
        refuse(&changed(0, 0x05), Reason::Malformed);
        refuse(&changed(0, 0xf5), Reason::Malformed);
        refuse(&[0; 64], Reason::Malformed);
        refuse(&changed(0, 0x60), Reason::Unsupported);
        // Options that exceed the packet's length.
        let mut short = to_container(24);
        short[0] = 0x4f;
        refuse(&short, Reason::Malformed);
    });
}

#[test]
fn congestion_marks_follow_rfc_6040() {
    const NOT_ECT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    // RFC 6040, figure 4: inner, outer, result.
    const TABLE: [(u8, u8, Option<u8>); 16] = [
        (NOT_ECT, NOT_ECT, Some(NOT_ECT)),
        (NOT_ECT, ECT0, Some(NOT_ECT)),
        (NOT_ECT, ECT1, Some(NOT_ECT)),
        (NOT_ECT, CE, None),
        (ECT0, NOT_ECT, Some(ECT0)),
        (ECT0, ECT0, Some(ECT0)),
        (ECT0, ECT1, Some(ECT1)),
        (ECT0, CE, Some(CE)),
        (ECT1, NOT_ECT, Some(ECT1)),
        (ECT1, ECT0, Some(ECT1)),
        (ECT1, ECT1, Some(ECT1)),
        (ECT1, CE, Some(CE)),
        (CE, NOT_ECT, Some(CE)),
        (CE, ECT0, Some(CE)),
        (CE, ECT1, Some(CE)),
        (CE, CE, Some(CE)),
    ];
    each(|hook, underlay, world| {
        let mut counter = 0;
        for (inner, outer, result) in TABLE {
            // With and without DSCPs, which are not copied between the headers.
            for (inner_dscp, outer_dscp) in [(0, 0), (0xb8, 0x28)] {
                let mut packet = to_container(64);
                packet[1] = inner | inner_dscp;
                set_ipv4_checksum(&mut packet);
                let path = Path { class: outer | outer_dscp, ..Path::inbound(underlay) };
                let frame = path.frame(&message(&RX_KEY, LOCAL_INDEX, counter, &padded(&packet)));
                counter += 1;
                let Some(result) = result else {
                    world.expect_refused(hook, &frame, Reason::Congestion);
                    continue;
                };
                packet[1] = result | inner_dscp;
                set_ipv4_checksum(&mut packet);
                expect_delivered(&world, hook, &frame, &packet);
            }
        }
    });
}

#[test]
fn data_messages_in_fragments_or_with_options_are_refused() {
    for hook in HOOKS {
        let sealed = message(&RX_KEY, LOCAL_INDEX, 0, &padded(&to_container(100)));
        let world = World::new(Underlay::V4);
        let mut fragment = Path::inbound(Underlay::V4).frame(&sealed);
        fragment[14 + 6] |= 0x20;
        set_ipv4_checksum(&mut fragment[14..]);
        world.expect_refused(hook, &fragment, Reason::Fragment);

        for words in 1..=10_usize {
            let plain = Path::inbound(Underlay::V4).frame(&sealed);
            let mut options = plain[..34].to_vec();
            options.extend(std::iter::repeat_n(1, words * 4));
            options.extend(&plain[34..]);
            options[14] += words as u8;
            let total = (options.len() - 14) as u16;
            options[16..18].copy_from_slice(&total.to_be_bytes());
            set_ipv4_checksum(&mut options[14..]);
            world.expect_refused(hook, &options, Reason::Fragment);
        }

        let world = World::new(Underlay::V6);
        let plain = Path::inbound(Underlay::V6).frame(&sealed);
        let with_header = |offset_and_more: u16| {
            let mut fragment = plain[..54].to_vec();
            fragment.extend([17, 0]);
            fragment.extend(offset_and_more.to_be_bytes());
            fragment.extend([1, 2, 3, 4]);
            fragment.extend(&plain[54..]);
            fragment[20] = 44;
            let len = (fragment.len() - 54) as u16;
            fragment[18..20].copy_from_slice(&len.to_be_bytes());
            fragment
        };
        world.expect_refused(hook, &with_header(1), Reason::Fragment);
        let later = with_header(8 << 3);
        assert_eq!(world.receive(hook, &later).verdict, hook.passed());
    }
}

#[test]
fn segments_coalesced_by_the_interface_are_refused() {
    let world = World::new(Underlay::V4);
    let frame = inbound(Underlay::V4, 0, &to_container(1000));
    assert_eq!(world.run_gso("from_underlay", &frame, 500).verdict, Hook::Tc.dropped());
    assert_eq!(world.counts(), [(Reason::Offload, 1)]);
}

#[test]
fn inner_options_and_fragments_are_delivered_unchanged() {
    each(|hook, underlay, world| {
        let mut packet = ipv4_with(REMOTE, CONTAINER, 17, &[3; 44]);
        packet[0] = 0x46;
        packet[6] = 0x20;
        set_ipv4_checksum(&mut packet);
        expect_delivered(&world, hook, &inbound(underlay, 0, &packet), &packet);
    });
}
