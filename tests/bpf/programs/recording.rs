//! Tests of the records of dropped packets: they are made only when allowed, and show the packet
//! unchanged.

use aya::maps::{Array, RingBuf};
use overnode_daemon::api::{Headers, Program};
use overnode_daemon::monitor::decode::{Seen, record};
use overnode_ebpf::map::DROPPED_LEN;
use overnode_ebpf::reason::Reason;
use overnode_types::InterfaceIndex;

use crate::packet::{Path, from_container, inbound, ipv4, ipv4_with, message, to_container};
use crate::world::{
    CONTAINER, Hook, IFINDEX, LOCAL_INDEX, NEIGHBOUR, OTHER_REMOTE, REMOTE, TX_KEY, UNDERLAYS,
    Underlay, World, boot_ns,
};

fn allow(world: &mut World, reason: Reason, count: u32) {
    Array::<_, u32>::try_from(world.ebpf.map_mut("MONITOR").expect("MONITOR"))
        .and_then(|mut map| map.set(reason as u32, count, 0))
        .expect("MONITOR");
}

fn left(world: &mut World, reason: Reason) -> u32 {
    Array::<_, u32>::try_from(world.ebpf.map_mut("MONITOR").expect("MONITOR"))
        .and_then(|map| map.get(&(reason as u32), 0))
        .expect("MONITOR")
}

/// Returns the ring's records since the last call, as raw bytes.
fn recorded(world: &mut World) -> Vec<Vec<u8>> {
    let mut ring = RingBuf::try_from(world.ebpf.map_mut("DROPS").expect("DROPS")).expect("a ring");
    let mut entries = Vec::new();
    while let Some(entry) = ring.next() {
        entries.push(entry.to_vec());
    }
    entries
}

/// Checks that there is exactly one record, and that it shows this frame, at least up to the end of
/// the outer headers. A program may already have decrypted the bytes after them in place.
#[track_caller]
fn only(world: &mut World, reason: Reason, program: Program, frame: &[u8]) -> Headers {
    let entries = recorded(world);
    assert_eq!(entries.len(), 1, "one record");
    let Seen { time, headers, .. } =
        record(&entries[0]).expect("a record that the daemon can parse");
    let (ifindex, len) = (InterfaceIndex::from_kernel(IFINDEX), frame.len() as u32);
    let expected = Seen { time, reason, program, ifindex, len, headers };
    assert_eq!(record(&entries[0]), Some(expected.clone()));
    let (now, time_ns) = (boot_ns(), time.as_nanos());
    assert!(time_ns <= now && now - time_ns < 60_000_000_000, "{time_ns} is not now, {now}");
    // The frame starts with the destination MAC, which a program may have overwritten.
    let captured = frame.len().min(DROPPED_LEN);
    assert_eq!(entries[0][24..28], (captured as u32).to_ne_bytes());
    let intact = match &expected.headers.outer {
        Some(outer) if outer.source.is_ipv4() => 14 + 20 + 8 + 16,
        Some(_) => 14 + 40 + 8 + 16,
        None => captured,
    };
    assert_eq!(entries[0][32 + 6..32 + intact], frame[6..intact]);
    expected.headers
}

#[test]
fn drops_are_recorded_only_for_enabled_reasons() {
    let mut world = World::new(Underlay::V4);
    let spoofed = from_container(&ipv4(NEIGHBOUR, REMOTE, 100));
    world.expect_drop("from_container", &spoofed, Reason::Spoofed);
    assert!(recorded(&mut world).is_empty());
    allow(&mut world, Reason::NoRoute, 5);
    world.expect_drop("from_container", &spoofed, Reason::Spoofed);
    assert!(recorded(&mut world).is_empty());
    allow(&mut world, Reason::Spoofed, 2);
    for _ in 0..5 {
        world.expect_drop("from_container", &spoofed, Reason::Spoofed);
    }
    assert_eq!(recorded(&mut world).len(), 2, "more records than allowed");
    assert_eq!((left(&mut world, Reason::Spoofed), left(&mut world, Reason::NoRoute)), (0, 5));
}

#[test]
fn drops_of_container_packets_are_recorded() {
    let mut world = World::new(Underlay::V4);
    for reason in [Reason::Spoofed, Reason::NoSession] {
        allow(&mut world, reason, 100);
    }
    // Shorter than the recorded length, as long, and longer.
    for len in [28, 100, 113, 114, 115, 1400] {
        let frame = from_container(&ipv4_with(NEIGHBOUR, REMOTE, 17, &vec![7; len - 20]));
        world.expect_drop("from_container", &frame, Reason::Spoofed);
        let inner =
            only(&mut world, Reason::Spoofed, Program::FromContainer, &frame).inner.expect("IPv4");
        assert_eq!((inner.source, inner.destination), (NEIGHBOUR.into(), REMOTE.into()));
        assert_eq!((&*inner.protocol, inner.source_port), ("udp", Some(0x0707)));
    }
    // Packets are sealed in this program if there is a session. By then the first bytes of the
    // frame are overwritten.
    let frame = from_container(&ipv4(CONTAINER, OTHER_REMOTE, 100));
    world.expect_drop("from_container", &frame, Reason::NoSession);
    let headers = only(&mut world, Reason::NoSession, Program::FromContainer, &frame);
    assert_eq!(headers.inner.expect("IPv4").destination, std::net::IpAddr::from(OTHER_REMOTE));
    world.expect_drop("seal", &frame, Reason::NoSession);
    assert!(only(&mut world, Reason::NoSession, Program::Seal, &frame).inner.is_some());
}

#[test]
fn drops_of_underlay_packets_are_recorded() {
    for underlay in UNDERLAYS {
        for (hook, program) in
            [(Hook::Tc, Program::FromUnderlay), (Hook::Xdp, Program::FromUnderlayXdp)]
        {
            let mut world = World::new(underlay);
            for reason in Reason::ALL {
                allow(&mut world, *reason, 10);
            }
            let forged =
                Path::inbound(underlay).frame(&message(&TX_KEY, LOCAL_INDEX, 77, &[0; 112]));
            world.expect_refused(hook, &forged, Reason::Forged);
            let headers = only(&mut world, Reason::Forged, program, &forged);
            let outer = headers.outer.expect("an outer header");
            assert_eq!((outer.source, outer.destination), (underlay.remote(), underlay.local()));
            let named = headers.message.expect("a message");
            assert_eq!((named.receiver.get(), named.counter), (LOCAL_INDEX, 77));
            assert_eq!(headers.inner, None, "it was not opened");
        }
    }
}

#[test]
fn drops_after_opening_record_the_inner_packet() {
    for underlay in UNDERLAYS {
        for hook in [Hook::Tc, Hook::Xdp] {
            let mut world = World::new(underlay);
            allow(&mut world, Reason::ForeignSource, 1);
            let packet = ipv4_with(OTHER_REMOTE, CONTAINER, 6, &[9; 100]);
            world.expect_refused(hook, &inbound(underlay, 0, &packet), Reason::ForeignSource);
            let entries = recorded(&mut world);
            let headers = record(&entries[0]).expect("a record").headers;
            let inner = headers.inner.expect("an inner packet");
            assert_eq!((inner.source, inner.destination), (OTHER_REMOTE.into(), CONTAINER.into()));
            assert_eq!((&*inner.protocol, inner.destination_port), ("tcp", Some(0x0909)));
        }
    }
}

#[test]
fn delivered_packets_are_not_recorded() {
    let mut world = World::new(Underlay::V4);
    for reason in Reason::ALL.iter().filter(|reason| reason.is_drop()) {
        allow(&mut world, *reason, 100);
    }
    world.receive(Hook::Tc, &inbound(Underlay::V4, 0, &to_container(100)));
    world.run("from_container", &from_container(&ipv4(CONTAINER, REMOTE, 100)));
    world.receive(Hook::Tc, &Path::inbound(Underlay::V4).frame(&message(&TX_KEY, 1, 1, &[])));
    assert_eq!(recorded(&mut world).len(), 1, "only the message with an unknown index is recorded");
}
