//! Tests of `seal`: packets that leave for a peer.

use overnode_ebpf::map::{ROUTE_PEER, SESSION_FREE, SESSION_UNCONFIRMED};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{REJECT_AFTER_MESSAGES, daemon_header};

use crate::packet::{
    Sealed, ethernet, from_container, ipv4, open, padded, set_ipv4_checksum, to_remote,
};
use crate::world::{
    CONTAINER, MTU, NEIGHBOUR, NODE, OTHER_REMOTE, PEER, PEER_NODE, REMOTE, REMOTE_INDEX, SLOT,
    TC_ACT_REDIRECT, TC_ACT_SHOT, TX_KEY, UNATTACHED, UNDERLAYS, Underlay, World, boot_ns,
};

#[test]
fn sealed_messages_open_with_ring() {
    // `from_container` seals complete packets itself.
    for (underlay, program) in
        UNDERLAYS.into_iter().flat_map(|one| [(one, "seal"), (one, "from_container")])
    {
        let mut world = World::new(underlay);
        let mut bytes = 0;
        let sizes =
            (28..=MTU as usize).filter(|size| size % 13 == 0 || *size < 100 || *size > 1340);
        for (counter, size) in sizes.enumerate() {
            let packet = to_remote(size);
            let output = world.run(program, &from_container(&packet));
            assert_eq!(output.verdict, TC_ACT_REDIRECT, "{program}, {underlay:?}, {size} bytes");
            let sealed = Sealed::parse(underlay, &output.frame);
            assert_eq!(sealed.class, 0);
            let (receiver, used, text) = open(&TX_KEY, &sealed.message);
            assert_eq!(
                (receiver, used),
                (REMOTE_INDEX, counter as u64),
                "{underlay:?}, {size} bytes"
            );
            let mut expected = padded(&packet);
            expected.truncate(MTU as usize);
            assert_eq!(text, expected, "{underlay:?}, {size} bytes");
            bytes += size as u64;
            let peer = world.peer(PEER);
            assert_eq!((peer.tx_packets, peer.tx_bytes), (counter as u64 + 1, bytes));
            assert!(peer.last_tx_ns > 0 && peer.last_tx_ns == peer.last_data_tx_ns);
            assert!(peer.last_tx_ns <= boot_ns());
            assert_eq!(world.counts(), [(Reason::Sealed, counter as u64 + 1)]);
        }
    }
}

#[test]
fn the_padding_of_the_frame_is_not_sealed() {
    let world = World::new(Underlay::V4);
    let packet = to_remote(28);
    let mut frame = from_container(&packet);
    frame.resize(60, 0xee);
    let output = world.run("seal", &frame);
    let (_, _, text) = open(&TX_KEY, &Sealed::parse(Underlay::V4, &output.frame).message);
    assert_eq!(text, padded(&packet));
}

#[test]
fn only_the_ecn_field_is_copied_to_the_outer_header() {
    for underlay in UNDERLAYS {
        let world = World::new(underlay);
        for class in 0..=255 {
            let mut packet = to_remote(64);
            packet[1] = class;
            crate::packet::set_ipv4_checksum(&mut packet);
            let output = world.run("seal", &from_container(&packet));
            let sealed = Sealed::parse(underlay, &output.frame);
            assert_eq!(sealed.class, class & 3, "{underlay:?}: inner {class:#x}");
            assert_eq!(open(&TX_KEY, &sealed.message).2, packet, "the inner header changed");
        }
    }
}

#[test]
fn a_keepalive_is_an_empty_message() {
    for underlay in UNDERLAYS {
        let mut world = World::new(underlay);
        let output = world.keepalive(PEER);
        assert_eq!(output.verdict, TC_ACT_REDIRECT);
        let sealed = Sealed::parse(underlay, &output.frame);
        assert_eq!(sealed.message.len(), 32);
        assert_eq!(open(&TX_KEY, &sealed.message), (REMOTE_INDEX, 0, vec![]));
        assert_eq!(world.counts(), [(Reason::KeepaliveSent, 1)]);
        let peer = world.peer(PEER);
        assert_eq!((peer.tx_packets, peer.tx_bytes, peer.last_data_tx_ns), (1, 0, 0));
        assert!(peer.last_tx_ns > 0);
    }
}

#[test]
fn a_keepalive_needs_a_session() {
    let world = World::new(Underlay::V4);
    for (peer, reason) in [(crate::world::OTHER_PEER, Reason::NoSession), (9, Reason::NoRoute)] {
        world.expect_drop("seal", &overnode_ebpf::wire::keepalive_frame(peer), reason);
    }
    let nothing = [&overnode_ebpf::wire::daemon_header(PEER, true)[..], &[0; 20]].concat();
    world.expect_drop("seal", &nothing, Reason::Malformed);
}

#[test]
fn only_a_live_session_of_the_peer_seals() {
    let mut world = World::new(Underlay::V4);
    let frame = from_container(&to_remote(100));
    world.expect_drop(
        "seal",
        &from_container(&ipv4(CONTAINER, OTHER_REMOTE, 100)),
        Reason::NoSession,
    );
    for state in [SESSION_FREE, SESSION_UNCONFIRMED, 3] {
        world.change_session(SLOT, |session| session.state = state);
        world.expect_drop("seal", &frame, Reason::NoSession);
    }
    world.set_session(SLOT, crate::world::session());
    world.change_session(SLOT, |session| session.peer = PEER + 1);
    world.expect_drop("seal", &frame, Reason::NoSession);
    world.set_session(SLOT, crate::world::session());
    for slot in [0, SLOT + 1, 4096, u32::MAX] {
        world.change_peer(PEER, |peer| peer.tx_slot = slot);
        world.expect_drop("seal", &frame, Reason::NoSession);
    }
    world.change_peer(PEER, |peer| peer.tx_slot = SLOT);
    assert_eq!(world.run("seal", &frame).verdict, TC_ACT_REDIRECT);
    assert_eq!(world.session(SLOT).tx_counter, 1, "a refused packet used a counter");
}

#[test]
fn a_session_expires_by_the_clock() {
    let mut world = World::new(Underlay::V4);
    let frame = from_container(&to_remote(100));
    world.change_session(SLOT, |session| session.expires_ns = boot_ns());
    world.expect_drop("seal", &frame, Reason::Expired);
    world.change_session(SLOT, |session| session.expires_ns = boot_ns() + 1_000_000_000);
    assert_eq!(world.run("seal", &frame).verdict, TC_ACT_REDIRECT);
    std::thread::sleep(std::time::Duration::from_millis(1010));
    world.expect_drop("seal", &frame, Reason::Expired);
}

#[test]
fn a_session_stays_exhausted_after_its_last_message() {
    let mut world = World::new(Underlay::V4);
    let frame = from_container(&to_remote(100));
    world.change_session(SLOT, |session| session.tx_counter = REJECT_AFTER_MESSAGES - 1);
    let output = world.run("seal", &frame);
    let (_, counter, _) = open(&TX_KEY, &Sealed::parse(Underlay::V4, &output.frame).message);
    assert_eq!(counter, REJECT_AFTER_MESSAGES - 1);
    // Try more often than there are counters left before the word would wrap around to 0.
    for _ in 0..8200 {
        assert_eq!(world.run("seal", &frame).verdict, TC_ACT_SHOT);
    }
    assert_eq!(world.count(Reason::Exhausted), 8200);
    assert_eq!(world.session(SLOT).tx_counter, REJECT_AFTER_MESSAGES);
}

#[test]
fn segments_and_foreign_packets_are_not_sealed() {
    let mut world = World::new(Underlay::V4);
    let frame = from_container(&to_remote(1000));
    let before = world.counts();
    assert_eq!(world.run_gso("seal", &frame, 500).verdict, TC_ACT_SHOT);
    assert!(before.is_empty());
    assert_eq!(world.counts(), [(Reason::Offload, 1)]);
    world.expect_drop(
        "seal",
        &ethernet([0; 6], [0; 6], 0x86dd, &to_remote(100)),
        Reason::Unsupported,
    );
    world.expect_drop("seal", &from_container(&ipv4(CONTAINER, CONTAINER, 100)), Reason::NoRoute);
    world.expect_drop(
        "seal",
        &from_container(&ipv4(CONTAINER, [192, 0, 2, 9].into(), 100)),
        Reason::NoRoute,
    );
    world.expect_drop("seal", &from_container(&to_remote(MTU as usize + 1)), Reason::TooBigDropped);
    world.expect_drop("seal", &from_container(&to_remote(100)[..60]), Reason::Malformed);
    world.change_peer(PEER, |peer| peer.present = 0);
    world.expect_drop("seal", &frame, Reason::NoRoute);
}

/// Containers choose where the kernel completes a checksum, also among the options of the header.
#[test]
fn packets_whose_header_changed_in_the_offload_veth_are_not_sealed() {
    let world = World::new(Underlay::V4);
    for words in 5..=15_u8 {
        let mut packet = to_remote(200);
        packet[0] = 0x40 | words;
        // End of the options (RFC 791).
        packet[20..usize::from(words) * 4].fill(0);
        set_ipv4_checksum(&mut packet);
        assert_eq!(world.run("seal", &from_container(&packet)).verdict, TC_ACT_REDIRECT, "{words}");
        let addresses = 12..20;
        for byte in (1..usize::from(words) * 4).filter(|at| !addresses.contains(at)) {
            // Lengths are checked before.
            if [2, 3].contains(&byte) {
                continue;
            }
            let mut packet = packet.clone();
            packet[byte] ^= 0x40;
            world.expect_drop("seal", &from_container(&packet), Reason::Checksum);
        }
    }
}

/// Any process of the host can send to the interface, for example to 224.0.0.1. The destination's
/// MAC address then ends like that of the daemon's frames.
#[test]
fn only_the_daemons_own_destination_makes_a_frame_the_daemons() {
    let world = World::new(Underlay::V4);
    let own = daemon_header(PEER, true);
    for byte in 0..6 {
        let mut header = own;
        header[byte] ^= 1;
        let frame = [&header[..], &ipv4(NODE, PEER_NODE, 100)].concat();
        let output = world.run_marked("seal", &frame, 0, [0; 4]);
        assert_eq!(output.verdict, TC_ACT_SHOT, "byte {byte}");
    }
    assert_eq!(world.counts(), [(Reason::Unsupported, 6)]);
}

/// Two threads share one session, and every counter is used once.
#[test]
fn each_counter_is_used_once_across_cpus() {
    const EACH: usize = 2000;
    let world = World::new(Underlay::V4);
    let frame = from_container(&to_remote(64));
    let draw = || -> Vec<u64> {
        (0..EACH)
            .map(|_| {
                open(
                    &TX_KEY,
                    &Sealed::parse(Underlay::V4, &world.run("seal", &frame).frame).message,
                )
                .1
            })
            .collect()
    };
    let mut counters = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(draw)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("the thread"))
            .collect::<Vec<_>>()
    });
    counters.sort_unstable();
    assert_eq!(counters, (0..2 * EACH as u64).collect::<Vec<_>>());
}

/// A packet whose addresses changed in the offload veth, however that happened, is not sealed.
#[test]
fn packets_whose_addresses_changed_in_the_offload_veth_are_not_sealed() {
    let mut world = World::new(Underlay::V4);
    world.set_route(PEER_NODE, 32, ROUTE_PEER, PEER);
    let refuse = |packet: &[u8], mark, reason| {
        let before = world.count(reason);
        let output = world.run_marked("seal", &from_container(packet), 0, mark);
        assert_eq!((output.verdict, world.count(reason)), (TC_ACT_SHOT, before + 1), "{reason:?}");
    };
    let own = CONTAINER.octets();
    for source in [NEIGHBOUR, REMOTE, UNATTACHED, NODE, PEER_NODE] {
        refuse(&ipv4(source, REMOTE, 100), own, Reason::Spoofed);
    }
    refuse(&to_remote(100), NEIGHBOUR.octets(), Reason::Spoofed);
    refuse(&ipv4(CONTAINER, PEER_NODE, 100), own, Reason::NodeAddress);
    refuse(&ipv4(CONTAINER, NEIGHBOUR, 100), own, Reason::NoRoute);
    // A container's mark on a frame that looks like the daemon's, and a container's frame without a
    // mark.
    let forged = [&daemon_header(PEER, true)[..], &ipv4(NEIGHBOUR, REMOTE, 100)].concat();
    let before = world.counts();
    assert_eq!(world.run_marked("seal", &forged, 0, own).verdict, TC_ACT_SHOT);
    assert_eq!(
        world.run_marked("seal", &from_container(&to_remote(100)), 0, [0; 4]).verdict,
        TC_ACT_SHOT
    );
    assert!(before.iter().all(|(reason, _)| *reason != Reason::ProbeSent));
    assert_eq!((world.count(Reason::ProbeSent), world.count(Reason::Sealed)), (0, 0));
    assert_eq!(world.count(Reason::Unsupported), 1);
    assert_eq!(world.session(SLOT).tx_counter, 0, "a refused packet used a counter");
}
