//! Tests of datagrams for the daemon: what strangers send is dropped before it reaches the kernel's
//! UDP stack.

use std::time::Instant;

use aya::programs::{TestRun, TestRunOptions};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::Relay;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::packet::{Path, handshake, set_ipv4_checksum};
use crate::world::{self, Hook, NODE_ID, OTHER_PEER, Underlay, World};

const PORTS: [u16; 2] = [6784, 6783];

fn path(underlay: Underlay, destination_port: u16) -> Path {
    Path { destination_port, source_port: 40000, ..Path::inbound(underlay) }
}

/// Returns a message in a relay header, for this node.
fn relayed(message: &[u8]) -> Vec<u8> {
    let header = Relay { hops: 1, destination: NODE_ID, source: 3, previous: OTHER_PEER as u16 };
    [&header.to_bytes()[..], message].concat()
}

#[test]
fn handshakes_with_a_valid_mac_reach_the_daemon() {
    world::each(|hook, underlay, world| {
        for kind in 1..=3 {
            for frame in [
                path(underlay, 6784).frame(&handshake(kind)),
                path(underlay, 6783).frame(&handshake(kind)),
                Path::inbound(underlay).frame(&relayed(&handshake(kind))),
            ] {
                let output = world.receive(hook, &frame);
                assert_eq!((output.verdict, output.frame), (hook.passed(), frame), "type {kind}");
            }
        }
        assert_eq!(world.counts(), []);
    });
}

/// Only the daemon checks the second MAC.
#[test]
fn any_flipped_bit_of_the_body_or_first_mac_is_detected() {
    world::each(|hook, underlay, world| {
        let mut dropped = 0;
        for kind in 1..=2 {
            let message = handshake(kind);
            for bit in 32..(message.len() - 16) * 8 {
                let mut forged = message.clone();
                forged[bit / 8] ^= 1 << (bit % 8);
                let output = world.receive(hook, &path(underlay, PORTS[bit % 2]).frame(&forged));
                assert_eq!(output.verdict, hook.dropped(), "type {kind}, bit {bit}");
                dropped += 1;
            }
            for bit in (message.len() - 16) * 8..message.len() * 8 {
                let mut other = message.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                let output = world.receive(hook, &path(underlay, PORTS[bit % 2]).frame(&other));
                assert_eq!(output.verdict, hook.passed(), "type {kind}, bit {bit}");
            }
            let mut forged = relayed(&message);
            forged[60] ^= 1;
            assert_eq!(
                world.receive(hook, &Path::inbound(underlay).frame(&forged)).verdict,
                hook.dropped()
            );
            dropped += 1;
        }
        assert_eq!(world.counts(), [(Reason::Stranger, dropped)]);
    });
}

#[test]
fn garbage_of_every_type_and_length_is_dropped() {
    world::each(|hook, underlay, world| {
        let mut rng = StdRng::seed_from_u64(1);
        let mut dropped = 0;
        for length in 0..300 {
            for kind in [0, 1, 2, 3, 5, 0x81, 0xff] {
                let mut message = vec![0; length];
                rng.fill(&mut message[..]);
                if let Some(first) = message.first_mut() {
                    *first = kind;
                }
                let frame = path(underlay, PORTS[length % 2]).frame(&message);
                // A message with a valid type is dropped as well, because its next three bytes are
                // zero only once in 2^24.
                assert_eq!(
                    world.receive(hook, &frame).verdict,
                    hook.dropped(),
                    "type {kind}, {length} bytes"
                );
                dropped += 1;
            }
        }
        assert_eq!(world.counts(), [(Reason::Malformed, dropped)]);
    });
}

/// Tries each type at all lengths that it does not have: those of the other types, truncated and
/// extended.
#[test]
fn messages_of_the_wrong_length_for_their_type_are_dropped() {
    world::each(|hook, underlay, world| {
        for kind in 1..=3 {
            let message = handshake(kind);
            for length in (4..200).filter(|length| *length != message.len()) {
                let mut other = message.clone();
                other.resize(length, 0);
                let frame = path(underlay, 6784).frame(&other);
                assert_eq!(
                    world.receive(hook, &frame).verdict,
                    hook.dropped(),
                    "type {kind}, {length} bytes"
                );
            }
        }
        assert!(
            world.counts().iter().all(|(reason, _)| *reason == Reason::Malformed),
            "{:?}",
            world.counts()
        );
    });
}

#[test]
fn ip_options_and_fragments_do_not_bypass_the_check() {
    for hook in world::HOOKS {
        let world = World::new(Underlay::V4);
        let plain = path(Underlay::V4, 6784).frame(&handshake(1));
        let mut options = plain.clone();
        options.splice(34..34, [1; 4]);
        options[14] += 1;
        options[17] += 4;
        set_ipv4_checksum(&mut options[14..]);
        let mut fragment = plain;
        fragment[20] |= 0x20;
        set_ipv4_checksum(&mut fragment[14..]);
        for frame in [options, fragment] {
            assert_eq!(world.receive(hook, &frame).verdict, hook.dropped());
        }
        assert_eq!(world.counts(), [(Reason::Fragment, 2)]);
    }
}

/// Nothing authenticates the sender of a cookie reply, so their number is limited to what nodes
/// need.
#[test]
fn cookie_replies_are_rate_limited() {
    world::each(|hook, underlay, world| {
        let frame = path(underlay, 6784).frame(&handshake(3));
        let begun = Instant::now();
        let passed =
            (0..4000).filter(|_| world.receive(hook, &frame).verdict == hook.passed()).count();
        // The allowance refills in whole units of 1.05 ms. The first and the last may be partial.
        let most = 1024 + begun.elapsed().as_millis() as usize + 2;
        assert!((1024..=most.min(3999)).contains(&passed), "{passed} in {:?}", begun.elapsed());
        assert_eq!(world.counts(), [(Reason::CookieFlood, 4000 - passed as u64)]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(world.receive(hook, &frame).verdict, hook.passed());
    });
}

/// Prints the cost of checking an initiation, and limits it.
#[test]
fn a_stranger_is_refused_in_a_few_microseconds() {
    const RUNS: u32 = 20_000;
    let world = World::new(Underlay::V4);
    let mut frame = path(Underlay::V4, 6784).frame(&handshake(1));
    frame[100] ^= 1;
    let options =
        TestRunOptions { data_in: Some(&frame), repeat: RUNS, ..TestRunOptions::default() };
    let result = world.xdp().test_run(options).expect("the test run");
    eprintln!("{:?} for each initiation with a wrong MAC", result.duration);
    assert_eq!(result.return_value, Hook::Xdp.dropped());
    assert!(result.duration < std::time::Duration::from_micros(50), "{:?}", result.duration);
}
