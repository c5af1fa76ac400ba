//! Tests of messages through a third node: sent, relayed and received.

use std::net::Ipv4Addr;

use aya::maps::RingBuf;
use overnode_ebpf::map::{FIRST_EXTERNAL_PEER, Peer, ROUTE_PEER};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{PROBE_LEN, RELAY_HOPS, Relay, daemon_header};

use crate::packet::{
    Path, Sealed, from_container, handshake, ipv4_with, message, open, padded, to_container,
    to_remote,
};
use crate::world::{
    CONTAINER, HOOKS, Hook, LOCAL_INDEX, MTU, NODE, NODE_ID, OTHER_PEER, OTHER_PEER_NODE,
    OTHER_REMOTE, PEER, PEER_NODE, REMOTE, REMOTE_INDEX, RX_KEY, SLOT, TC_ACT_REDIRECT, TX_KEY,
    UNDERLAYS, Underlay, World,
};

/// UDP port of the other peer, which differs from the first peer's.
const OTHER_PORT: u16 = 7777;

/// Returns a world whose other peer has another port, so that the two can be told apart.
fn world(underlay: Underlay) -> World {
    let mut world = World::new(underlay);
    world.change_peer(OTHER_PEER, |peer| peer.remote_port_be = OTHER_PORT.to_be());
    world
}

fn relay(destination: u32, previous: u32) -> Relay {
    Relay {
        hops: RELAY_HOPS,
        destination: destination as u16,
        source: previous as u16,
        previous: previous as u16,
    }
}

fn relayed(relay: Relay, message: &[u8]) -> Vec<u8> {
    [&relay.to_bytes()[..], message].concat()
}

#[test]
fn messages_for_a_relayed_peer_get_a_relay_header() {
    for underlay in UNDERLAYS {
        for program in ["seal", "from_container"] {
            let mut world = world(underlay);
            world.change_peer(PEER, |peer| peer.via = OTHER_PEER);
            let packet = to_remote(333);
            let output = world.run(program, &from_container(&packet));
            assert_eq!(output.verdict, TC_ACT_REDIRECT);
            let datagram = Sealed::parse_to(underlay, &output.frame, OTHER_PORT).message;
            let (header, message) = Relay::split(&datagram).expect("a relay header");
            let own = NODE_ID;
            assert_eq!(
                header,
                Relay { hops: RELAY_HOPS, destination: PEER as u16, source: own, previous: own }
            );
            assert_eq!(open(&TX_KEY, message), (REMOTE_INDEX, 0, padded(&packet)));
            assert_eq!(world.counts(), [(Reason::Sealed, 1)]);
        }
    }
}

#[test]
fn nothing_is_sent_through_a_relay_that_is_gone() {
    let mut world = world(Underlay::V4);
    world.change_peer(PEER, |peer| peer.via = 99);
    world.expect_drop("seal", &from_container(&to_remote(100)), Reason::NoRoute);
}

#[test]
fn relayed_messages_are_opened_and_do_not_change_the_endpoint() {
    for underlay in UNDERLAYS {
        for hook in HOOKS {
            let mut world = world(underlay);
            let before = world.peer(PEER);
            let packet = to_container(500);
            let datagram = relayed(
                relay(NODE_ID.into(), OTHER_PEER),
                &message(&RX_KEY, LOCAL_INDEX, 7, &padded(&packet)),
            );
            let mut path = Path::inbound(underlay);
            path.source_port = OTHER_PORT;
            let output = world.receive(hook, &path.frame(&datagram));
            assert_eq!(output.verdict, hook.redirected(), "{underlay:?}, {hook:?}");
            assert_eq!(output.frame[14..], packet);
            let after = world.peer(PEER);
            let place = |peer: &Peer| (peer.remote, peer.remote_port_be, peer.ifindex);
            assert_eq!(place(&after), place(&before));
            assert_eq!(after.rx_packets, 1);
            // The same message again, this time on the direct path.
            world.expect_refused(
                hook,
                &Path::inbound(underlay).frame(&datagram[8..]),
                Reason::Replayed,
            );
        }
    }
}

#[test]
fn relayed_handshakes_are_passed_to_the_daemon() {
    for underlay in UNDERLAYS {
        let world = world(underlay);
        for kind in 1..=3 {
            let datagram = relayed(relay(NODE_ID.into(), OTHER_PEER), &handshake(kind));
            let frame = Path::inbound(underlay).frame(&datagram);
            for hook in HOOKS {
                let output = world.receive(hook, &frame);
                assert_eq!((output.verdict, output.frame), (hook.passed(), frame.clone()));
            }
        }
        assert_eq!(world.counts(), []);
    }
}

#[test]
fn a_relay_forwards_messages_that_it_cannot_read() {
    for underlay in UNDERLAYS {
        let world = world(underlay);
        let sizes = [(4, 32), (4, 1000), (1, 148), (2, 92), (3, 64)];
        for (sent, (kind, len)) in (1..).zip(sizes) {
            let mut secret: Vec<u8> = (0..len).map(|n| (n * 31 % 256) as u8).collect();
            secret[..4].copy_from_slice(&[kind, 0, 0, 0]);
            let mut path = Path::inbound(underlay);
            path.class = 1;
            let header = relay(OTHER_PEER, PEER);
            let mut frame = path.frame(&relayed(header, &secret));
            // Padding from the link layer is not relayed.
            frame.extend([0xee; 6]);
            let output = world.run("from_underlay", &frame);
            assert_eq!(output.verdict, TC_ACT_REDIRECT, "{underlay:?}, type {kind}");
            let sealed = Sealed::parse_to(underlay, &output.frame, OTHER_PORT);
            assert_eq!(sealed.class, 1);
            let expected = Relay { hops: RELAY_HOPS - 1, previous: NODE_ID, ..header };
            assert_eq!(Relay::split(&sealed.message), Some((expected, &secret[..])));
            assert_eq!(world.counts(), [(Reason::Relayed, sent)]);
        }
    }
}

#[test]
fn a_relay_forwards_between_ipv4_and_ipv6() {
    for (underlay, other) in [(Underlay::V4, Underlay::V6), (Underlay::V6, Underlay::V4)] {
        let mut world = world(underlay);
        let away = World::new(other).peer(OTHER_PEER);
        world.change_peer(OTHER_PEER, |peer| (peer.remote, peer.local) = (away.remote, away.local));
        for len in [32, 33, 1000, 1400] {
            let mut secret = vec![0x5a; len];
            secret[..4].copy_from_slice(&[4, 0, 0, 0]);
            let datagram = relayed(relay(OTHER_PEER, PEER), &secret);
            let output = world.run("from_underlay", &Path::inbound(underlay).frame(&datagram));
            assert_eq!(output.verdict, TC_ACT_REDIRECT, "{underlay:?}, {len} bytes");
            let sealed = Sealed::parse_to(other, &output.frame, OTHER_PORT);
            assert_eq!(sealed.message[8..], secret);
        }
    }
}

#[test]
fn a_chain_of_relays_is_followed() {
    let mut world = world(Underlay::V4);
    // The destination is behind the other peer.
    let far = 9;
    let present = world.peer(PEER);
    world.set_peer(far, Peer { via: OTHER_PEER, ..present });
    let datagram = relayed(relay(far, PEER), &[4; 64]);
    let output = world.run("from_underlay", &Path::inbound(Underlay::V4).frame(&datagram));
    assert_eq!(output.verdict, TC_ACT_REDIRECT);
    Sealed::parse_to(Underlay::V4, &output.frame, OTHER_PORT);
}

#[test]
fn a_relay_serves_only_nodes_and_breaks_loops() {
    for underlay in UNDERLAYS {
        let world = world(underlay);
        let refuse = |path: &Path, header: Relay, reason| {
            world.expect_drop("from_underlay", &path.frame(&relayed(header, &[4; 64])), reason);
        };
        let here = Path::inbound(underlay);
        // Messages from an endpoint other than that of the node named as the previous hop, or from
        // an unknown node.
        refuse(&here, relay(PEER, OTHER_PEER), Reason::ForeignRelay);
        refuse(&here, relay(OTHER_PEER, 77), Reason::ForeignRelay);
        refuse(&here, relay(OTHER_PEER, 0), Reason::ForeignRelay);
        let mut elsewhere = Path::inbound(underlay);
        elsewhere.source_port = 1;
        refuse(&elsewhere, relay(OTHER_PEER, PEER), Reason::ForeignRelay);
        // Destinations that are refused: no node, a peer that is not a node, and the previous hop.
        // Then messages whose hop limit is used up.
        refuse(&here, relay(0, PEER), Reason::NoRoute);
        refuse(&here, relay(78, PEER), Reason::NoRoute);
        refuse(&here, relay(FIRST_EXTERNAL_PEER, PEER), Reason::NoRoute);
        refuse(&here, relay(PEER, PEER), Reason::RelayLoop);
        for hops in [0, 1] {
            refuse(&here, Relay { hops, ..relay(OTHER_PEER, PEER) }, Reason::HopLimit);
        }
    }
}

#[test]
fn a_relay_header_with_a_truncated_message_is_refused() {
    for underlay in UNDERLAYS {
        let world = world(underlay);
        for len in 0..32 {
            let datagram = relayed(relay(OTHER_PEER, PEER), &vec![4; len]);
            let frame = Path::inbound(underlay).frame(&datagram);
            world.expect_drop("from_underlay", &frame, Reason::Malformed);
        }
    }
}

/// Returns a probe's inner packet from the peer's node address.
fn probe(payload: &[u8]) -> Vec<u8> {
    probe_from(PEER_NODE, payload)
}

fn probe_from(source: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let udp = [&6784_u16.to_be_bytes()[..], &6784_u16.to_be_bytes(), &[0; 4], payload].concat();
    ipv4_with(source, NODE, 17, &udp)
}

#[test]
fn probes_of_any_size_take_the_direct_path() {
    for underlay in UNDERLAYS {
        let mut world = world(underlay);
        world.change_peer(PEER, |peer| peer.via = OTHER_PEER);
        for len in [100, 1001, MTU as usize + 500] {
            let packet = to_remote(len);
            let frame = [&daemon_header(PEER, true)[..], &packet].concat();
            let output = world.run("seal", &frame);
            assert_eq!(output.verdict, TC_ACT_REDIRECT);
            let (_, _, text) = open(&TX_KEY, &Sealed::parse(underlay, &output.frame).message);
            assert_eq!(text, packet, "the probe was padded");
        }
        assert_eq!(world.counts(), [(Reason::ProbeSent, 3)]);
        assert_eq!(world.peer(PEER).last_data_tx_ns, 0, "a probe counted as data");
    }
}

#[test]
fn a_container_cannot_impersonate_the_daemon() {
    let world = world(Underlay::V4);
    let frame = [&daemon_header(PEER, true)[..], &to_remote(100)].concat();
    world.expect_drop("from_container", &frame, Reason::Spoofed);
    let mut frame = from_container(&to_remote(100));
    frame[..6].copy_from_slice(&[0, 0, 0, 0, 0, 1]);
    let output = world.run_gso("from_container", &frame, 64);
    assert_eq!(output.frame[..6], [0; 6]);
}

#[test]
fn a_probe_reaches_only_the_daemon() {
    for underlay in UNDERLAYS {
        for hook in HOOKS {
            let mut world = world(underlay);
            let payload: Vec<u8> = (0..200).collect();
            let packet = probe(&payload);
            let frame = Path::inbound(underlay).frame(&message(&RX_KEY, LOCAL_INDEX, 0, &packet));
            world.expect_refused(hook, &frame, Reason::ProbeReceived);
            assert_eq!(world.peer(PEER).last_data_rx_ns, 0, "a probe counted as data");
            let mut ring =
                RingBuf::try_from(world.ebpf.map_mut("PROBES").expect("PROBES")).expect("a ring");
            let entry = ring.next().expect("a probe").to_vec();
            let head = [PEER.to_ne_bytes(), (packet.len() as u32).to_ne_bytes()].concat();
            assert_eq!(entry, [&head[..], &payload[..PROBE_LEN]].concat());
            assert!(ring.next().is_none());
        }
    }
}

#[test]
fn only_complete_probes_on_the_direct_path_reach_the_node() {
    let mut world = world(Underlay::V4);
    let short = probe(&[0; PROBE_LEN - 1]);
    let mut other_port = probe(&[0; PROBE_LEN]);
    other_port[22] = 0;
    let other_protocol = ipv4_with(PEER_NODE, NODE, 1, &[0; 100]);
    for (counter, packet) in (0..).zip([short, other_port, other_protocol]) {
        let text = padded(&packet);
        let frame =
            Path::inbound(Underlay::V4).frame(&message(&RX_KEY, LOCAL_INDEX, counter, &text));
        world.expect_refused(Hook::Tc, &frame, Reason::NotHere);
    }
    let datagram = relayed(
        relay(NODE_ID.into(), OTHER_PEER),
        &message(&RX_KEY, LOCAL_INDEX, 9, &padded(&probe(&[0; 100]))),
    );
    world.expect_refused(Hook::Tc, &Path::inbound(Underlay::V4).frame(&datagram), Reason::NotHere);
    let mut ring =
        RingBuf::try_from(world.ebpf.map_mut("PROBES").expect("PROBES")).expect("a ring");
    assert!(ring.next().is_none());
}

/// A container of the peer, or the peer itself, cannot send probes in the name of other nodes.
#[test]
fn a_probe_must_come_from_the_node_that_sealed_it() {
    for hook in HOOKS {
        let mut world = world(Underlay::V4);
        world.set_route(OTHER_PEER_NODE, 32, ROUTE_PEER, OTHER_PEER);
        world.set_route(PEER_NODE, 32, ROUTE_PEER, PEER);
        let node = u32::from(PEER_NODE);
        let foreign =
            [REMOTE, OTHER_PEER_NODE, NODE, CONTAINER, OTHER_REMOTE, Ipv4Addr::UNSPECIFIED]
                .into_iter()
                .chain([node - 2, node + 4094, node ^ 1 << 31].map(Ipv4Addr::from));
        for (counter, source) in (0..).zip(foreign) {
            let text = padded(&probe_from(source, &[0; PROBE_LEN]));
            let frame =
                Path::inbound(Underlay::V4).frame(&message(&RX_KEY, LOCAL_INDEX, counter, &text));
            world.expect_refused(hook, &frame, Reason::NodeAddress);
        }
        // A WireGuard device that is not a node, whatever address it has.
        for external in [FIRST_EXTERNAL_PEER, FIRST_EXTERNAL_PEER + 2] {
            let present = world.peer(PEER);
            world.set_peer(external, present);
            world.set_route(REMOTE, 32, ROUTE_PEER, external);
            world.change_session(SLOT, |session| session.peer = external);
            for (counter, source) in
                (100..).zip([REMOTE, PEER_NODE, Ipv4Addr::from(node - 2 + external)])
            {
                let text = padded(&probe_from(source, &[0; PROBE_LEN]));
                let counter = counter + 10 * u64::from(external);
                let sealed = message(&RX_KEY, LOCAL_INDEX, counter, &text);
                world.expect_refused(
                    hook,
                    &Path::inbound(Underlay::V4).frame(&sealed),
                    Reason::NodeAddress,
                );
            }
        }
        let mut ring =
            RingBuf::try_from(world.ebpf.map_mut("PROBES").expect("PROBES")).expect("a ring");
        assert!(ring.next().is_none());
    }
}

/// A member that floods the daemon with probes in its own name leaves room for those of other
/// peers.
#[test]
fn no_peer_can_fill_the_probe_ring() {
    for hook in HOOKS {
        let mut world = world(Underlay::V4);
        let text = padded(&probe(&[0; PROBE_LEN]));
        let started = std::time::Instant::now();
        for counter in 0..2000 {
            let sealed = message(&RX_KEY, LOCAL_INDEX, counter, &text);
            assert_eq!(
                world.receive(hook, &Path::inbound(Underlay::V4).frame(&sealed)).verdict,
                hook.dropped()
            );
        }
        let received = world.count(Reason::ProbeReceived);
        // A burst of 128, then one each 4.19 ms.
        let most = 130 + started.elapsed().as_millis() as u64 / 4;
        assert!((128..most).contains(&received), "{received} of {most}");
        assert_eq!(world.count(Reason::ProbeFlood), 2000 - received);
        // The ring has room for about 1200 probes.
        world.change_session(SLOT, |session| session.peer = OTHER_PEER);
        let text = padded(&probe_from(OTHER_PEER_NODE, &[0; PROBE_LEN]));
        let frame = Path::inbound(Underlay::V4).frame(&message(&RX_KEY, LOCAL_INDEX, 2000, &text));
        world.expect_refused(hook, &frame, Reason::ProbeReceived);
        std::thread::sleep(std::time::Duration::from_millis(600));
        world.change_session(SLOT, |session| session.peer = PEER);
        let text = padded(&probe(&[0; PROBE_LEN]));
        let frame = Path::inbound(Underlay::V4).frame(&message(&RX_KEY, LOCAL_INDEX, 2001, &text));
        world.expect_refused(hook, &frame, Reason::ProbeReceived);
    }
}
