//! Tests of the address checks: all packet paths in one direction refuse the same packets for the
//! same reasons.

use std::net::Ipv4Addr;

use overnode_ebpf::map::{FIRST_EXTERNAL_PEER, ROUTE_HOST, ROUTE_LOCAL, ROUTE_PEER};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::{RELAY_HOPS, Relay, bulk_header};

use crate::packet::{Path, from_container, ipv4_with, message, padded};
use crate::world::{
    CONTAINER, HOOKS, IFINDEX, LOCAL_INDEX, NEIGHBOUR, NEIGHBOUR_IFINDEX, NODE, NODE_ID,
    OTHER_PEER, OTHER_PEER_NODE, OTHER_REMOTE, PEER, PEER_NODE, REMOTE, RX_KEY, SLOT, UNATTACHED,
    Underlay, World,
};

/// Returns a world in which a name server's address and the host's address are local, and the other
/// nodes' addresses are routed to those nodes.
fn world() -> World {
    let mut world = World::new(Underlay::V4);
    world.set_route(NODE, 32, ROUTE_LOCAL, NEIGHBOUR_IFINDEX);
    world.set_route(HOST, 32, ROUTE_HOST, IFINDEX);
    world.set_route(PEER_NODE, 32, ROUTE_PEER, PEER);
    world.set_route(OTHER_PEER_NODE, 32, ROUTE_PEER, OTHER_PEER);
    // Node addresses claimed by a lying member, or given to a WireGuard device by an administrator.
    world.set_route([10, 39, 250, 0].into(), 24, ROUTE_PEER, PEER);
    world
}

const HOST: Ipv4Addr = Ipv4Addr::new(10, 40, 0, 9);
const CLAIMED: Ipv4Addr = Ipv4Addr::new(10, 39, 250, 7);

fn query(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let udp = [&4000_u16.to_be_bytes()[..], &53_u16.to_be_bytes(), &48_u16.to_be_bytes(), &[0; 42]]
        .concat();
    ipv4_with(source, destination, 17, &udp)
}

#[test]
fn no_inbound_path_accepts_what_another_refuses() {
    let cases = [
        (REMOTE, CONTAINER, None),
        (REMOTE, HOST, None),
        (REMOTE, UNATTACHED, Some(Reason::NotHere)),
        (REMOTE, OTHER_REMOTE, Some(Reason::NotHere)),
        (OTHER_REMOTE, CONTAINER, Some(Reason::ForeignSource)),
        (NEIGHBOUR, CONTAINER, Some(Reason::ForeignSource)),
        (UNATTACHED, CONTAINER, Some(Reason::ForeignSource)),
        // Queries to this host's name server.
        (REMOTE, NODE, Some(Reason::NodeAddress)),
        (OTHER_PEER_NODE, NODE, Some(Reason::NodeAddress)),
        // The peer's own address, but not a packet that nodes send each other.
        (PEER_NODE, NODE, Some(Reason::NotHere)),
        // Nodes send nothing to containers, so every node address is refused as a source.
        (PEER_NODE, CONTAINER, Some(Reason::NodeAddress)),
        (PEER_NODE, HOST, Some(Reason::NodeAddress)),
        (CLAIMED, CONTAINER, Some(Reason::NodeAddress)),
        (NODE, CONTAINER, Some(Reason::ForeignSource)),
    ];
    for (source, destination, refused) in cases {
        let packet = query(source, destination);
        let worker = [&bulk_header(PEER, [0; 4])[..], &packet].concat();
        let world = world();
        match refused {
            Some(reason) => world.expect_drop("from_bulk", &worker, reason),
            None => _ = world.run("from_bulk", &worker),
        }
        assert_eq!(
            world.count(Reason::BulkReceived),
            u64::from(refused.is_none()),
            "{source} to {destination}"
        );
        for hook in HOOKS {
            for is_relayed in [false, true] {
                let world = self::world();
                let sealed = message(&RX_KEY, LOCAL_INDEX, 0, &padded(&packet));
                let relay = Relay {
                    hops: RELAY_HOPS,
                    destination: NODE_ID,
                    source: PEER as u16,
                    previous: OTHER_PEER as u16,
                };
                let head = if is_relayed { relay.to_bytes().to_vec() } else { Vec::new() };
                let frame = Path::inbound(Underlay::V4).frame(&[head, sealed].concat());
                match refused {
                    Some(reason) => world.expect_refused(hook, &frame, reason),
                    None => assert_eq!(world.receive(hook, &frame).verdict, hook.redirected()),
                }
                assert_eq!(
                    world.count(Reason::Opened),
                    u64::from(refused.is_none()),
                    "{source} to {destination}"
                );
            }
        }
    }
}

/// All its allowed addresses are routed to it, but no node address is valid for it, whatever its
/// number.
#[test]
fn a_wireguard_device_reaches_no_node_on_any_path() {
    let external = FIRST_EXTERNAL_PEER + 5;
    for source in [REMOTE, PEER_NODE, CLAIMED] {
        let mut world = world();
        let present = world.peer(PEER);
        world.set_peer(external, present);
        world.set_route(source, 32, ROUTE_PEER, external);
        world.change_session(SLOT, |session| session.peer = external);
        let packet = query(source, NODE);
        world.expect_drop(
            "from_bulk",
            &[&bulk_header(external, [0; 4])[..], &packet].concat(),
            Reason::NodeAddress,
        );
        for (counter, hook) in (0..).zip(HOOKS) {
            let sealed = message(&RX_KEY, LOCAL_INDEX, counter, &padded(&packet));
            world.expect_refused(
                hook,
                &Path::inbound(Underlay::V4).frame(&sealed),
                Reason::NodeAddress,
            );
        }
    }
}

/// Checks packets that are sealed at once, and packets after the offload veth.
#[test]
fn no_outbound_path_leads_to_a_node() {
    let world = world();
    for destination in [PEER_NODE, OTHER_PEER_NODE, CLAIMED] {
        let frame = from_container(&query(CONTAINER, destination));
        world.expect_drop("from_container", &frame, Reason::NodeAddress);
        world.expect_drop("seal", &frame, Reason::NodeAddress);
        let before = world.count(Reason::NodeAddress);
        world.run_gso("from_container", &frame, 20);
        assert_eq!(world.count(Reason::NodeAddress), before + 1);
    }
    // The name server of the container's own host is reachable.
    let own = from_container(&query(CONTAINER, NODE));
    world.run("from_container", &own);
    assert_eq!(world.count(Reason::Local), 1);
}
