//! Paths and routes of three nodes: the effect of a dying path on packets.

use std::collections::BTreeSet;

use super::super::route::{Graph, Route, choose};
use super::*;

const C: NodeId = node(3);
/// How long gossip takes to spread a change in these tests.
const GOSSIP: Duration = ms(300);

/// What nodes report about their links, and since when.
#[derive(Default)]
struct Gossip(BTreeMap<NodeId, Vec<(Instant, BTreeSet<NodeId>)>>);

impl Gossip {
    fn publish(&mut self, world: &World) {
        for (id, paths) in &world.nodes {
            let alive: BTreeSet<_> =
                paths.states().filter(|(_, state)| state.alive).map(|(id, _)| id).collect();
            let reports = self.0.entry(*id).or_default();
            if reports.last().is_none_or(|(_, last)| *last != alive) {
                reports.push((world.now, alive));
            }
        }
    }

    fn links(&self, now: Instant) -> BTreeMap<NodeId, BTreeSet<NodeId>> {
        let known = |reports: &Vec<(Instant, BTreeSet<NodeId>)>| {
            let received = reports.iter().rev().find(|(at, _)| *at + GOSSIP <= now);
            received.map(|(_, links)| links.clone()).unwrap_or_default()
        };
        self.0.iter().map(|(id, reports)| (*id, known(reports))).collect()
    }
}

fn routes(world: &World, gossip: &Gossip, own: NodeId) -> BTreeMap<NodeId, Route> {
    let direct = world.nodes[&own].states().collect();
    choose(own, &Graph { direct, links: gossip.links(world.now), present: BTreeMap::new() })
}

/// Runs in small steps until the routes from A to C and back are as wanted. Returns how long that
/// took.
fn until(world: &mut World, gossip: &mut Gossip, wanted: Route, at_most: Duration) -> Duration {
    let start = world.now;
    loop {
        gossip.publish(world);
        let there = routes(world, gossip, A)[&C];
        let back = routes(world, gossip, C)[&A];
        if there == wanted && back == wanted {
            return world.now - start;
        }
        assert!(world.now - start <= at_most, "{there:?} and {back:?} after {at_most:?}");
        world.run(ms(10));
    }
}

#[test]
fn a_dead_path_is_replaced_in_two_seconds_and_used_again_when_it_heals() {
    let relayed = Route::Via { relay: B, hops: 2 };
    for (seed, dead) in [(1, [(A, C), (C, A)]), (2, [(A, C), (A, C)]), (3, [(C, A), (C, A)])] {
        let mut world = World::new(seed, 3, 1440);
        let mut gossip = Gossip::default();
        until(&mut world, &mut gossip, Route::Direct, secs(1));
        world.run(secs(30));
        gossip.publish(&world);
        for (from, to) in dead {
            world.set(from, to, DEAD);
        }
        let time = until(&mut world, &mut gossip, relayed, secs(3));
        assert!(time <= secs(2), "{time:?}");
        world.run(secs(30));
        for (from, to) in dead {
            world.set(from, to, GOOD);
        }
        until(&mut world, &mut gossip, Route::Direct, secs(1));
    }
}

#[test]
fn a_dead_relay_is_replaced_in_three_seconds_or_reported() {
    let mut world = World::new(4, 4, 1440);
    let mut gossip = Gossip::default();
    world.set(A, C, DEAD);
    world.run(secs(1));
    gossip.publish(&world);
    world.run(secs(4));
    gossip.publish(&world);
    world.run(secs(1));
    assert!(matches!(routes(&world, &gossip, A)[&C], Route::Via { hops: 2, .. }));
    let kill = |world: &mut World, id: NodeId| {
        for other in (1..=4).map(node) {
            world.set(id, other, DEAD);
            world.set(other, id, DEAD);
        }
    };
    kill(&mut world, B);
    until(&mut world, &mut gossip, Route::Via { relay: node(4), hops: 2 }, secs(3));
    kill(&mut world, node(4));
    until(&mut world, &mut gossip, Route::Unreachable, secs(3));
}
