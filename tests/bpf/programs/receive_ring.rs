//! Tests of receive rings: which messages of the bulk path the programs put into them, and that the
//! worker at the other end gets each message once.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use aya::maps::{Array, Map};
use overnode_daemon::datapath::{Origin, ReceiveRing};
use overnode_ebpf::map::{BULK_MESSAGE_LEN, BULK_MESSAGE_SLOTS, BulkRing};
use overnode_ebpf::reason::Reason;

use crate::packet::{Path, handshake, set_ipv4_checksum};
use crate::world::{Hook, TC_ACT_UNSPEC, Underlay, World, each};

const PORT: u16 = 6783;
/// Offset of the IPv4 header, after the Ethernet header.
const IPV4_AT: usize = 14;

impl World {
    fn fd(&self, map: &str) -> BorrowedFd<'_> {
        match self.ebpf.map(map) {
            Some(Map::Array(data)) => data.fd().as_fd(),
            _ => panic!("{map} is not an array"),
        }
    }

    fn rings(&self, count: u32) -> Vec<ReceiveRing> {
        ReceiveRing::take_over(self.fd("BULK_RINGS"), self.fd("BULK_MESSAGES"), count)
            .expect("the receive rings")
    }

    /// Returns the only worker's receive ring, opened.
    fn ring(&self) -> ReceiveRing {
        let ring = self.rings(1).remove(0);
        ring.open();
        ring
    }
}

fn path(underlay: Underlay) -> Path {
    Path { source_port: PORT, destination_port: PORT, ..Path::inbound(underlay) }
}

/// Returns a worker's data message of `len` bytes, filled with a pattern.
fn message(worker: u8, len: usize, seed: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len as u64).map(|at| (at * 7 + seed * 31) as u8).collect();
    for (to, from) in bytes.iter_mut().zip([4, 1, worker, 0]) {
        *to = from;
    }
    bytes
}

fn take(ring: &mut ReceiveRing) -> Option<(Vec<u8>, Origin)> {
    let mut buffer = [0xee; BULK_MESSAGE_LEN];
    ring.take(&mut buffer).map(|(bytes, origin)| (bytes.to_vec(), origin))
}

#[test]
fn messages_of_any_size_arrive_unchanged() {
    each(|hook, underlay, world| {
        let mut ring = world.ring();
        for len in (4..=BULK_MESSAGE_LEN).filter(|len| len % 17 == 0 || *len < 80 || *len > 1900) {
            let path = Path {
                source_port: 1024 + len as u16,
                class: 0xa8 | (len % 4) as u8,
                ..path(underlay)
            };
            let sent = message(0, len, len as u64);
            let output = world.receive(hook, &path.frame(&sent));
            assert_eq!(output.verdict, hook.dropped(), "{len} bytes were not put into the ring");
            let (got, origin) = take(&mut ring).expect("a message");
            assert_eq!(got, sent);
            let expected = Origin {
                remote: (underlay.remote(), 1024 + len as u16).into(),
                local: Some(underlay.local()),
                ecn: (len % 4) as u8,
            };
            assert_eq!(origin, expected);
            assert_eq!(take(&mut ring), None);
        }
        assert_eq!(
            world.counts().iter().map(|(reason, _)| *reason).collect::<Vec<_>>(),
            [Reason::BulkQueued]
        );
    });
}

/// These frames pass unchanged: another port, a handshake, an empty datagram, a fragment, IP
/// options, another host's address, wrong lengths.
#[test]
fn unusual_frames_go_to_the_socket() {
    each(|hook, underlay, world| {
        let mut ring = world.ring();
        let plain = message(0, 200, 1);
        let path = path(underlay);
        let elsewhere: IpAddr = match underlay {
            Underlay::V4 => "192.0.2.77".parse().expect("an address"),
            Underlay::V6 => "2001:db8::77".parse().expect("an address"),
        };
        let mut frames = vec![
            Path { destination_port: 6785, ..path }.frame(&plain),
            Path { destination: elsewhere, ..path }.frame(&plain),
            path.frame(&handshake(1)),
            path.frame(&handshake(2)),
            path.frame(&handshake(3)),
        ];
        let whole = path.frame(&plain);
        let udp_at = whole.len() - 208;
        for udp_len in [0_u16, 7, 8, 11, 209, 0xffff] {
            let mut frame = whole.clone();
            frame[udp_at + 4..udp_at + 6].copy_from_slice(&udp_len.to_be_bytes());
            frames.push(frame);
        }
        match underlay {
            Underlay::V4 => {
                for (fragment, options) in [([0x20, 0], 0), ([0, 1], 0), ([0, 0], 4)] {
                    let mut frame = whole.clone();
                    frame[IPV4_AT + 6..][..2].copy_from_slice(&fragment);
                    if options > 0 {
                        frame[IPV4_AT] = 0x46;
                        let len = (frame.len() - IPV4_AT + options) as u16;
                        frame[IPV4_AT + 2..][..2].copy_from_slice(&len.to_be_bytes());
                        let end = IPV4_AT + 20;
                        frame.splice(end..end, [1, 1, 1, 1]);
                    }
                    set_ipv4_checksum(&mut frame[IPV4_AT..]);
                    frames.push(frame);
                }
            }
            Underlay::V6 => {
                // Replies to a link-local address need the interface, which a receive ring does not
                // record.
                frames.push(
                    Path { source: "fe80::2".parse().expect("an address"), ..path }.frame(&plain),
                );
            }
        }
        for (number, frame) in frames.iter().enumerate() {
            let output = world.receive(hook, frame);
            assert_eq!((output.verdict, &output.frame), (hook.passed(), frame), "frame {number}");
            assert_eq!(take(&mut ring), None, "frame {number}");
        }
        assert!(!ring.is_closed() && world.counts().is_empty(), "{:?}", world.counts());
        world.receive(hook, &whole);
        assert_eq!(take(&mut ring).map(|(bytes, _)| bytes), Some(plain));
    });
}

#[test]
fn messages_that_do_not_fit_close_the_receive_ring() {
    let world = World::new(Underlay::V4);
    let mut ring = world.ring();
    let path = path(Underlay::V4);
    let small = path.frame(&message(0, 100, 1));
    let large = path.frame(&message(0, BULK_MESSAGE_LEN + 1, 2));
    let joined = path.frame(&message(0, 1000, 3));
    for (frame, gso_size) in [(&large, 0), (&joined, 500)] {
        assert_eq!(world.run("from_underlay", &small).verdict, Hook::Tc.dropped());
        assert_eq!(world.run_gso("from_underlay", frame, gso_size).verdict, TC_ACT_UNSPEC);
        assert!(ring.is_closed());
        assert_eq!(
            world.run("from_underlay", &small).verdict,
            TC_ACT_UNSPEC,
            "it overtook the previous message"
        );
        assert!(take(&mut ring).is_some() && take(&mut ring).is_none());
        ring.open();
    }
}

/// Fills the ring, empties it and fills it again, past the wrap-around of its positions. Messages
/// that arrive while it is full are dropped, because through the socket they would overtake those
/// in the ring.
#[test]
fn a_full_receive_ring_keeps_its_messages() {
    let mut world = World::new(Underlay::V4);
    let start = BulkRing { head: u32::MAX - 3000, ..BulkRing::default() };
    Array::try_from(world.ebpf.map_mut("BULK_RINGS").expect("BULK_RINGS"))
        .and_then(|mut map| map.set(0, start, 0))
        .expect("BULK_RINGS");
    let mut ring = world.ring();
    let path = path(Underlay::V4);
    let bytes = |number: u64| message(0, 50 + number as usize % 7, number);
    let put = |number: u64| {
        let full = world.count(Reason::RingFull);
        assert_eq!(
            world.run("from_underlay", &path.frame(&bytes(number))).verdict,
            Hook::Tc.dropped()
        );
        world.count(Reason::RingFull) == full
    };
    let mut number = 0;
    for round in 0..3 {
        let first = number;
        while put(number) {
            number += 1;
        }
        assert_eq!(number - first, u64::from(BULK_MESSAGE_SLOTS), "round {round}");
        assert!(!put(number) && !ring.is_closed());
        // The ring accepts as many messages as were taken out, and no more.
        for expected in first..first + 2 {
            assert_eq!(take(&mut ring).map(|(got, _)| got), Some(bytes(expected)), "round {round}");
        }
        assert!(put(number) && put(number + 1) && !put(number + 2));
        number += 2;
        for expected in first + 2..number {
            assert_eq!(take(&mut ring).map(|(got, _)| got), Some(bytes(expected)), "round {round}");
        }
        assert_eq!(take(&mut ring), None);
    }
    assert_eq!(world.count(Reason::BulkQueued), number);
}

#[test]
fn the_sending_worker_chooses_the_receive_ring() {
    for count in [1, 2, 3, 5, 16] {
        let world = World::new(Underlay::V4);
        let mut rings = world.rings(count);
        rings.iter().for_each(ReceiveRing::open);
        let path = path(Underlay::V4);
        for worker in 0..=255 {
            let frame = path.frame(&message(worker, 60, worker.into()));
            let of = &mut rings[usize::from(worker) % count as usize];
            assert_eq!(world.run("from_underlay", &frame).verdict, Hook::Tc.dropped());
            assert!(take(of).is_some_and(|(bytes, _)| bytes[2] == worker));
        }
        assert!(rings.iter_mut().all(|ring| take(ring).is_none()));
    }
}

/// The message that wakes a worker goes to its socket, because only the socket wakes it. The
/// messages after it go to the ring.
#[test]
fn a_sleeping_worker_is_woken_by_one_message() {
    let world = World::new(Underlay::V4);
    let mut ring = world.ring();
    let frame = path(Underlay::V4).frame(&message(0, 100, 1));
    assert!(ring.sleep());
    assert_eq!(world.run("from_underlay", &frame).verdict, TC_ACT_UNSPEC);
    assert_eq!(world.run("from_underlay", &frame).verdict, Hook::Tc.dropped());
    assert!(!ring.sleep(), "it would sleep while a message waits");
    ring.wake();
    assert!(take(&mut ring).is_some() && take(&mut ring).is_none());
    // The worker is woken by something else.
    assert!(ring.sleep());
    ring.wake();
    assert_eq!(world.run("from_underlay", &frame).verdict, Hook::Tc.dropped());
    // A closed ring stays closed.
    world.run_gso("from_underlay", &frame, 50);
    assert!(take(&mut ring).is_some());
    assert!(ring.sleep());
    ring.wake();
    assert!(ring.is_closed());
}

/// Several CPUs put messages into the ring while the worker takes them out and sleeps whenever the
/// ring is empty. Each message arrives once, through the ring or the socket and in the order of its
/// CPU, or is counted as dropped. No message waits for a sleeping worker.
#[test]
fn several_cpus_feed_a_sleeping_worker_without_loss_or_duplicates() {
    const CPUS: u64 = 4;
    const EACH: u64 = 20_000;
    let world = World::new(Underlay::V4);
    let mut ring = world.ring();
    // Number of messages that reached the socket.
    let (socket, woken) = (Mutex::new(0_u64), Condvar::new());
    let (passed, running) = (AtomicU64::new(0), AtomicUsize::new(CPUS as usize));
    let mut next = [0; CPUS as usize];
    let mut slept = 0;
    std::thread::scope(|scope| {
        for cpu in 0..CPUS {
            let (world, socket, woken, passed, running) =
                (&world, &socket, &woken, &passed, &running);
            scope.spawn(move || {
                for number in 0..EACH {
                    let text =
                        [&[4, 0, 0, 0][..], &cpu.to_ne_bytes(), &number.to_ne_bytes()].concat();
                    let output = world.run("from_underlay", &path(Underlay::V4).frame(&text));
                    if output.verdict == TC_ACT_UNSPEC {
                        passed.fetch_add(1, Ordering::Relaxed);
                        *socket.lock().expect("a lock") += 1;
                        woken.notify_one();
                    }
                }
                running.fetch_sub(1, Ordering::Release);
                woken.notify_one();
            });
        }
        let mut seen = 0;
        loop {
            let ended = running.load(Ordering::Acquire) == 0;
            let mut any = false;
            while let Some((bytes, _)) = take(&mut ring) {
                let word =
                    |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
                let (cpu, number) = (word(4) as usize, word(12));
                assert!(
                    number >= next[cpu],
                    "message {number} of CPU {cpu} arrived twice or out of order"
                );
                next[cpu] = number + 1;
                seen += 1;
                any = true;
            }
            if ended && !any {
                break;
            }
            if !any && !ended && ring.sleep() {
                slept += 1;
                let before = socket.lock().expect("a lock");
                // A lost wakeup shows here: the ring has a message, but the worker is not woken.
                let (after, timeout) = woken
                    .wait_timeout_while(before, Duration::from_secs(5), |count| {
                        *count == 0 && running.load(Ordering::Acquire) > 0
                    })
                    .expect("a lock");
                assert!(!timeout.timed_out(), "the worker was not woken");
                drop(after);
                *socket.lock().expect("a lock") = 0;
                ring.wake();
            }
        }
        assert_eq!(seen, world.count(Reason::BulkQueued));
    });
    eprintln!(
        "slept {slept} times, {} messages through the socket",
        passed.load(Ordering::Relaxed)
    );
    assert!(slept > 10, "it slept only {slept} times");
    let taken = world.count(Reason::BulkQueued) + world.count(Reason::RingFull);
    assert_eq!(taken + passed.load(Ordering::Relaxed), CPUS * EACH);
}
