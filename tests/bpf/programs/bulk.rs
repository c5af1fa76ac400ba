//! Tests of the bulk path: which packets go to workers, and what workers may deliver.

use aya::maps::Array;
use overnode_ebpf::map::{
    BULK_PATIENCE, BULK_SILENCE_NS, BULK_THRESHOLD, BulkPeer, BulkWorker, Peer, ROUTE_HOST,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{bulk_header, from_bulk_header};

use crate::packet::{ethernet, from_container, ipv4, ipv4_with, set_ipv4_checksum};
use crate::world::{
    CONTAINER, CONTAINER_MAC, GATEWAY_MAC, IFINDEX, MTU, NEIGHBOUR, OTHER_PEER, OTHER_REMOTE,
    Output, PEER, REMOTE, TC_ACT_REDIRECT, UNATTACHED, Underlay, World, boot_ns,
};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SEGMENT: u32 = 1360;

impl World {
    /// Adds a worker that serves the peer and stays alive for longer than any test.
    fn serve(&mut self) {
        self.serve_until(boot_ns() + 3600 * 1_000_000_000);
    }

    /// Adds a worker that serves the peer and sent its last heartbeat at `alive_ns`, in nanoseconds
    /// since boot.
    fn serve_until(&mut self, alive_ns: u64) {
        self.set_worker(0, BulkWorker { ifindex: IFINDEX, unused: 0, alive_ns });
        let peer = self.bulk_peer();
        self.set_bulk_peer(BulkPeer { workers: 1, ..peer });
    }

    fn set_worker(&mut self, number: u32, worker: BulkWorker) {
        let map = self.ebpf.map_mut("BULK_WORKERS").expect("BULK_WORKERS");
        Array::try_from(map).and_then(|mut map| map.set(number, worker, 0)).expect("BULK_WORKERS");
    }

    fn bulk_peer(&mut self) -> BulkPeer {
        let map = self.ebpf.map_mut("BULK_PEERS").expect("BULK_PEERS");
        Array::try_from(map).and_then(|map| map.get(&PEER, 0)).expect("BULK_PEERS")
    }

    fn set_bulk_peer(&mut self, peer: BulkPeer) {
        let map = self.ebpf.map_mut("BULK_PEERS").expect("BULK_PEERS");
        Array::try_from(map).and_then(|mut map| map.set(PEER, peer, 0)).expect("BULK_PEERS");
    }

    /// Sends a packet of segments from the container to the peer's container.
    fn send_large(&self, protocol: u8, port: u16) -> Output {
        self.run_gso("from_container", &from_container(&large(protocol, port)), SEGMENT)
    }

    /// Sends until the flow moves to a worker, as if `seal` received each packet at once. Returns
    /// the number of bytes that were sent.
    fn move_flow(&mut self, protocol: u8, port: u16) -> u64 {
        let mut sent = 0;
        for _ in 0..1000 {
            let peer = self.peer(PEER);
            self.set_peer(PEER, Peer { offload_out: peer.offload_in, ..peer });
            let output = self.send_large(protocol, port);
            sent += output.frame.len() as u64;
            if is_steered(&output) {
                return sent;
            }
        }
        panic!("the flow did not move to a worker");
    }
}

/// Returns the header of a packet that a worker opened.
fn opened_by_worker(peer: u32) -> [u8; 14] {
    bulk_header(peer, [0; 4])
}

/// Returns a packet of segments about as large as a test run accepts.
fn large(protocol: u8, port: u16) -> Vec<u8> {
    let mut transport = vec![0; 3000];
    transport[..4].copy_from_slice(&[port.to_be_bytes(), 80_u16.to_be_bytes()].concat());
    // A TCP header of 20 bytes.
    transport[12] = 5 << 4;
    ipv4_with(CONTAINER, REMOTE, protocol, &transport)
}

fn small(port: u16) -> Vec<u8> {
    let mut segment = [0; 20];
    segment[..4].copy_from_slice(&[port.to_be_bytes(), 80_u16.to_be_bytes()].concat());
    segment[12] = 5 << 4;
    ipv4_with(CONTAINER, REMOTE, TCP, &segment)
}

fn is_steered(output: &Output) -> bool {
    let header = output.frame.first_chunk().expect("an Ethernet header");
    output.verdict == TC_ACT_REDIRECT
        && from_bulk_header(header) == Some((PEER, CONTAINER.octets()))
}

#[test]
fn a_flow_above_the_threshold_moves_to_a_worker_as_a_whole() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    let sent = world.move_flow(TCP, 1000);
    assert!((BULK_THRESHOLD..BULK_THRESHOLD + 4000).contains(&sent), "{sent} bytes");
    let packet = small(1000);
    let output = world.run("from_container", &from_container(&packet));
    assert!(is_steered(&output), "a small packet of the flow did not move");
    assert_eq!(output.frame, [&bulk_header(PEER, CONTAINER.octets())[..], &packet].concat());
    assert!(is_steered(&world.send_large(TCP, 1000)));
    // Other flows stay, whether their packets are large or small.
    assert!(!is_steered(&world.send_large(TCP, 1001)));
    assert!(!is_steered(&world.run("from_container", &from_container(&small(1001)))));
    assert_eq!(world.count(Reason::BulkSent), 3);
}

#[test]
fn segmented_udp_moves_but_other_protocols_and_fragments_do_not() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    world.move_flow(TCP, 7);
    world.move_flow(UDP, 8);
    assert!(!(0..2000).any(|_| is_steered(&world.send_large(253, 9))), "another protocol");
    for fragment in [0x2000_u16, 0x0001] {
        let mut packet = small(7);
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        set_ipv4_checksum(&mut packet);
        assert!(!is_steered(&world.run("from_container", &from_container(&packet))), "a fragment");
    }
}

#[test]
fn a_flow_waits_for_its_packets_in_the_offload_veth_but_not_forever() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    // In a test run, packets that enter the offload veth never leave it. If the test itself pauses,
    // more packets are needed, because counting restarts then.
    let packets = (1_u64..20_000).find(|_| is_steered(&world.send_large(TCP, 1000)));
    let each = 14 + large(TCP, 0).len() as u64;
    assert!(packets >= Some(BULK_PATIENCE.div_ceil(each)), "{packets:?}");
    assert!(world.peer(PEER).offload_in > 0);
}

#[test]
fn packets_are_counted_at_both_ends_of_the_offload_veth() {
    let mut world = World::new(Underlay::V4);
    world.send_large(TCP, 5);
    assert_eq!((world.peer(PEER).offload_in, world.peer(PEER).offload_out), (1, 0));
    world.run("seal", &ethernet(GATEWAY_MAC, CONTAINER_MAC, 0x0800, &ipv4(CONTAINER, REMOTE, 500)));
    assert_eq!((world.peer(PEER).offload_in, world.peer(PEER).offload_out), (1, 1));
    world.keepalive(PEER);
    assert_eq!(world.peer(PEER).offload_out, 1, "frames of the daemon must not be counted");
}

#[test]
fn silent_and_missing_workers_get_no_packets() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    world.move_flow(TCP, 1000);
    assert!(is_steered(&world.send_large(TCP, 1000)));
    world.serve_until(boot_ns() - BULK_SILENCE_NS - 1_000_000);
    assert!(!is_steered(&world.send_large(TCP, 1000)), "steered to a silent worker");
    world.serve();
    assert!(!is_steered(&world.send_large(TCP, 1000)), "moved back below the threshold");
    world.move_flow(TCP, 1000);
    world.set_worker(0, BulkWorker { ifindex: 0, unused: 0, alive_ns: boot_ns() });
    assert!(!is_steered(&world.send_large(TCP, 1000)), "steered to a missing worker");
    world.serve();
    world.move_flow(TCP, 1000);
    let peer = world.bulk_peer();
    world.set_bulk_peer(BulkPeer { workers: 0, ..peer });
    assert!(
        !is_steered(&world.send_large(TCP, 1000)),
        "steered for a peer that the worker does not serve"
    );
    assert!(!is_steered(&world.run("from_container", &from_container(&small(1000)))));
}

#[test]
fn oversized_packets_are_answered_on_the_bulk_path_too() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    world.move_flow(TCP, 1000);
    world.change_peer(PEER, |peer: &mut Peer| peer.mtu = MTU - 100);
    let before = world.count(Reason::TooBig);
    let output = world.run_gso("from_container", &from_container(&large(TCP, 1000)), SEGMENT);
    assert!(!is_steered(&output));
    assert_eq!(world.count(Reason::TooBig), before + 1);
}

#[test]
fn spoofed_packets_do_not_reach_workers() {
    let mut world = World::new(Underlay::V4);
    world.serve();
    world.move_flow(TCP, 1000);
    let mut packet = large(TCP, 1000);
    packet[12..16].copy_from_slice(&NEIGHBOUR.octets());
    set_ipv4_checksum(&mut packet);
    world.expect_drop("from_container", &from_container(&packet), Reason::Spoofed);
}

#[test]
fn workers_deliver_packets_that_a_peer_may_send() {
    let world = World::new(Underlay::V4);
    let packet = ipv4(REMOTE, CONTAINER, 1400);
    let output = world.run("from_bulk", &[&opened_by_worker(PEER)[..], &packet].concat());
    assert_eq!(output.verdict, TC_ACT_REDIRECT);
    assert_eq!(output.frame, ethernet(CONTAINER_MAC, GATEWAY_MAC, 0x0800, &packet));
    // A coalesced packet.
    let packet = ipv4(REMOTE, CONTAINER, 3000);
    let output =
        world.run_gso("from_bulk", &[&opened_by_worker(PEER)[..], &packet].concat(), SEGMENT);
    assert_eq!(output.frame, ethernet(CONTAINER_MAC, GATEWAY_MAC, 0x0800, &packet));
    assert_eq!(world.counts(), [(Reason::BulkReceived, 2)]);
}

#[test]
fn peers_may_only_send_from_their_addresses_to_local_containers() {
    let mut world = World::new(Underlay::V4);
    let frame = |peer, packet: Vec<u8>| [&opened_by_worker(peer)[..], &packet].concat();
    // Sources of another peer, of this host, and without an owner. Then valid sources in the name
    // of the wrong peer.
    for source in
        [OTHER_REMOTE, NEIGHBOUR, UNATTACHED, [192, 0, 2, 7].into(), [10, 46, 0, 1].into()]
    {
        world.expect_drop(
            "from_bulk",
            &frame(PEER, ipv4(source, CONTAINER, 200)),
            Reason::ForeignSource,
        );
    }
    world.expect_drop(
        "from_bulk",
        &frame(OTHER_PEER, ipv4(REMOTE, CONTAINER, 200)),
        Reason::ForeignSource,
    );
    world.expect_drop("from_bulk", &frame(0, ipv4(REMOTE, CONTAINER, 200)), Reason::ForeignSource);
    for destination in [OTHER_REMOTE, REMOTE, UNATTACHED, [192, 0, 2, 7].into()] {
        world.expect_drop(
            "from_bulk",
            &frame(PEER, ipv4(REMOTE, destination, 200)),
            Reason::NotHere,
        );
    }
    // The host is reachable only at addresses where it is exposed.
    world.set_route(UNATTACHED, 32, ROUTE_HOST, IFINDEX);
    let output = world.run("from_bulk", &frame(PEER, ipv4(REMOTE, UNATTACHED, 200)));
    assert_eq!(output.verdict, TC_ACT_REDIRECT);
}

#[test]
fn frames_that_no_worker_wrote_are_refused() {
    let world = World::new(Underlay::V4);
    let packet = ipv4(REMOTE, CONTAINER, 200);
    let good = [&opened_by_worker(PEER)[..], &packet].concat();
    let mut other = good.clone();
    other[5] = 1;
    world.expect_drop("from_bulk", &other, Reason::Unsupported);
    let mut other = good.clone();
    other[12..14].copy_from_slice(&0x86dd_u16.to_be_bytes());
    world.expect_drop("from_bulk", &other, Reason::Unsupported);
    for (at, value) in [(0, 0x65), (0, 0x44), (2, 0xff)] {
        let mut other = good.clone();
        other[14 + at] = value;
        world.expect_drop("from_bulk", &other, Reason::Malformed);
    }
    world.expect_drop("from_bulk", &good[..14 + 20], Reason::Malformed);
}
