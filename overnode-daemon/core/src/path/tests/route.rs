use std::collections::BTreeSet;

use super::super::route::{BEYOND_FIRST_HOP, Graph, MAX_HOPS, RELAY_HEADER, Route, choose, mtu};
use super::*;

type Links = BTreeSet<(NodeId, NodeId)>;

fn state(now: Instant, alive: bool, rtt: Option<u64>) -> PathState {
    PathState {
        alive,
        since: now,
        rtt: rtt.map(ms),
        rtt_min: None,
        loss: 0.0,
        mtu: 1440,
        mtu_confirmed: true,
        carries: None,
        last_heard: None,
        last_error: None,
    }
}

/// Links that both ends report.
fn links(pairs: &[(u16, u16)]) -> Links {
    pairs.iter().flat_map(|(x, y)| [(node(*x), node(*y)), (node(*y), node(*x))]).collect()
}

/// Returns what `own` knows of `links` among `nodes` nodes.
fn view(own: NodeId, nodes: u16, links: &Links) -> Graph {
    let now = Instant::now();
    let mut graph = Graph::default();
    for id in (1..=nodes).map(node) {
        if id != own {
            graph.direct.insert(id, state(now, links.contains(&(own, id)), Some(10)));
        }
        graph.links.insert(id, links.iter().filter(|(x, _)| *x == id).map(|(_, y)| *y).collect());
    }
    graph
}

fn via(relay: u16, hops: u8) -> Route {
    Route::Via { relay: node(relay), hops }
}

#[test]
fn a_chain_is_followed_and_a_link_denied_by_one_end_does_not_count() {
    let mut links = links(&[(1, 2), (2, 3), (3, 4)]);
    let routes = choose(A, &view(A, 5, &links));
    let expected = [(2, Route::Direct), (3, via(2, 2)), (4, via(2, 3)), (5, Route::Unreachable)];
    assert_eq!(routes, expected.map(|(id, route)| (node(id), route)).into());
    links.remove(&(node(4), node(3)));
    assert_eq!(choose(A, &view(A, 5, &links))[&node(4)], Route::Unreachable);
}

#[test]
fn a_direct_path_wins_over_any_relay_as_soon_as_it_is_alive() {
    let mut graph = view(A, 3, &links(&[(1, 2), (2, 3), (1, 3)]));
    graph.present = BTreeMap::from([(node(3), via(2, 2))]);
    assert_eq!(choose(A, &graph)[&node(3)], Route::Direct);
}

#[test]
fn ties_go_to_the_present_route_then_the_nearest_then_the_lowest_id() {
    let mut graph = view(A, 6, &links(&[(1, 3), (1, 4), (1, 5), (3, 6), (4, 6), (5, 6)]));
    let choice = |graph: &Graph| choose(A, graph)[&node(6)];
    assert_eq!(choice(&graph), via(3, 2));
    let set = |graph: &mut Graph, id: u16, rtt| {
        graph.direct.get_mut(&node(id)).unwrap().rtt = rtt;
    };
    set(&mut graph, 5, Some(ms(9)));
    assert_eq!(choice(&graph), via(5, 2));
    graph.present = BTreeMap::from([(node(6), via(4, 2))]);
    assert_eq!(
        choice(&graph),
        via(4, 2),
        "a slightly shorter round-trip time is no reason to change"
    );
    set(&mut graph, 5, Some(ms(4)));
    assert_eq!(choice(&graph), via(5, 2), "a much shorter one is");
    set(&mut graph, 5, Some(ms(9)));
    set(&mut graph, 4, None);
    assert_eq!(choice(&graph), via(5, 2), "a path without a measurement counts as slow");
    set(&mut graph, 4, Some(ms(10)));
    graph.direct.get_mut(&node(4)).unwrap().alive = false;
    assert_eq!(choice(&graph), via(5, 2), "a dead relay is not kept");
    graph.present = BTreeMap::from([(node(6), Route::Unreachable)]);
    assert_eq!(choice(&graph), via(5, 2));
}

#[test]
fn no_route_has_more_than_eight_links() {
    let chain: Vec<_> = (1..12).map(|id| (id, id + 1)).collect();
    let routes = choose(A, &view(A, 12, &links(&chain)));
    assert_eq!(routes[&node(9)], via(2, 8));
    assert_eq!(routes[&node(10)], Route::Unreachable);
    assert_eq!(routes[&node(12)], Route::Unreachable);
}

#[test]
fn the_mtu_of_a_route_is_that_of_its_known_hops_less_the_relay_header() {
    let mut graph = view(A, 3, &links(&[(1, 2), (2, 3)]));
    let of = |id, route, graph: &Graph| mtu(node(id), route, &graph.direct);
    assert_eq!(of(2, Route::Direct, &graph), Some(1440));
    assert_eq!(of(3, via(2, 2), &graph), Some(BEYOND_FIRST_HOP - RELAY_HEADER));
    // The relay reports the second hop, but no later ones.
    for (carries, two, three) in
        [(1440, 1432, 1280), (1220, 1212, 1212), (8940, 1432, 1280), (1, 504, 504)]
    {
        graph.direct.get_mut(&B).unwrap().carries = Some(carries);
        assert_eq!(of(3, via(2, 2), &graph), Some(two));
        assert_eq!(of(3, via(2, 3), &graph), Some(three));
    }
    graph.direct.get_mut(&B).unwrap().carries = Some(1440);
    graph.direct.get_mut(&B).unwrap().mtu = 1200;
    assert_eq!(of(3, via(2, 2), &graph), Some(1192));
    assert_eq!(of(3, Route::Unreachable, &graph), None);
    assert_eq!(of(9, Route::Direct, &graph), None);
}

/// Returns a random graph. Each link is missing in one direction with probability `one_sided`.
fn random(rng: &mut StdRng, nodes: u16, density: f64, one_sided: f64) -> Links {
    let mut links = Links::new();
    for x in 1..=nodes {
        for y in x + 1..=nodes {
            if rng.random_bool(density) {
                links.insert((node(x), node(y)));
                if !rng.random_bool(one_sided) {
                    links.insert((node(y), node(x)));
                }
            }
        }
    }
    links
}

/// Follows a packet: returns the nodes that it visits and whether it arrives at `to`. Stops at the
/// hop limit like the eBPF programs do.
fn follow(
    tables: &BTreeMap<NodeId, BTreeMap<NodeId, Route>>,
    from: NodeId,
    to: NodeId,
) -> (Vec<NodeId>, bool) {
    let mut way = vec![from];
    while way.len() <= usize::from(MAX_HOPS) {
        let at = way[way.len() - 1];
        match tables[&at].get(&to) {
            _ if at == to => break,
            Some(Route::Direct) => way.push(to),
            Some(Route::Via { relay, .. }) => way.push(*relay),
            Some(Route::Unreachable) | None => break,
        }
    }
    let arrived = way.last() == Some(&to);
    (way, arrived)
}

fn distances(from: NodeId, links: &Links) -> BTreeMap<NodeId, u8> {
    let mut found = BTreeMap::from([(from, 0)]);
    for distance in 1..=MAX_HOPS {
        let ring: Vec<_> = links
            .iter()
            .filter(|(x, _)| found.get(x) == Some(&(distance - 1)))
            .map(|(_, y)| *y)
            .collect();
        for id in ring {
            found.entry(id).or_insert(distance);
        }
    }
    found
}

#[test]
fn with_equal_views_every_packet_takes_a_shortest_path() {
    let mut relayed = 0;
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = rng.random_range(2..16);
        let density = rng.random_range(0.1..0.5);
        let mut tables = BTreeMap::new();
        // The routes of an earlier graph, and round-trip times that only one node knows.
        let earlier = random(&mut rng, nodes, density, 0.0);
        let links = random(&mut rng, nodes, density, 0.0);
        for own in (1..=nodes).map(node) {
            let mut graph = view(own, nodes, &links);
            graph.present = choose(own, &view(own, nodes, &earlier));
            for state in graph.direct.values_mut() {
                state.rtt = rng.random_bool(0.8).then(|| ms(rng.random_range(1..100)));
            }
            let routes = choose(own, &graph);
            assert_eq!(routes, choose(own, &graph));
            tables.insert(own, routes);
        }
        for from in (1..=nodes).map(node) {
            let distances = distances(from, &links);
            for to in (1..=nodes).map(node).filter(|to| *to != from) {
                let (way, arrived) = follow(&tables, from, to);
                assert_eq!(
                    arrived,
                    distances.contains_key(&to),
                    "seed {seed}: {from} to {to} by {way:?}"
                );
                if let Some(distance) = distances.get(&to) {
                    assert_eq!(way.len(), usize::from(*distance) + 1, "seed {seed}: {way:?}");
                    relayed += usize::from(*distance > 1);
                }
            }
        }
    }
    assert!(relayed > 10_000, "{relayed}");
}

#[test]
fn with_unequal_views_the_hop_limit_ends_every_loop() {
    let mut loops = 0;
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = rng.random_range(3..16);
        let tables: BTreeMap<_, _> = (1..=nodes)
            .map(|own| {
                let links = random(&mut rng, nodes, 0.25, 0.1);
                (node(own), choose(node(own), &view(node(own), nodes, &links)))
            })
            .collect();
        for from in (1..=nodes).map(node) {
            for to in (1..=nodes).map(node).filter(|to| *to != from) {
                let (way, _) = follow(&tables, from, to);
                assert!(way.len() <= usize::from(MAX_HOPS) + 1);
                let distinct: BTreeSet<_> = way.iter().collect();
                loops += usize::from(distinct.len() < way.len());
            }
        }
    }
    assert!(
        loops > 100,
        "the views differed too little for the test to show anything: {loops} loops"
    );
}

#[test]
fn a_nodes_own_paths_override_what_gossip_says_about_them() {
    // Gossip still reports 1-3 as alive, but node 1 knows that it is not.
    let mut graph = view(A, 3, &links(&[(1, 2), (2, 3), (1, 3)]));
    graph.direct.get_mut(&node(3)).unwrap().alive = false;
    assert_eq!(choose(A, &graph)[&node(3)], via(2, 2));
    // Without 2-3, the only route to node 3 would lead through node 1 itself.
    let mut graph = view(A, 3, &links(&[(1, 2), (1, 3)]));
    graph.direct.get_mut(&node(3)).unwrap().alive = false;
    assert_eq!(choose(A, &graph)[&node(3)], Route::Unreachable);
}

#[test]
fn a_link_reported_by_only_one_end_changes_no_route() {
    for seed in 0..200 {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = rng.random_range(3..16);
        let links = random(&mut rng, nodes, 0.3, 0.4);
        let both: Links =
            links.iter().copied().filter(|(x, y)| links.contains(&(*y, *x))).collect();
        for own in (1..=nodes).map(node) {
            let all = view(own, nodes, &links);
            let graph = Graph { links: view(own, nodes, &both).links, ..all.clone() };
            assert_eq!(choose(own, &all), choose(own, &graph), "seed {seed}, node {own}");
        }
    }
}
