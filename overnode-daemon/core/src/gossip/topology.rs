//! Reachability: the graph of the links that both ends report.
//!
//! The results depend on the graph alone. Neighbors are visited in the order of their IDs, so two
//! nodes with the same records compute the same trees.

use std::collections::{BTreeMap, BTreeSet};

use super::message::Record;
use overnode_types::NodeId;

/// The path to a node over control connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The first neighbor on the shortest path. The node itself if it is a neighbor.
    pub via: NodeId,
    /// Number of connections on the path, 1 for a neighbor.
    pub hops: u16,
}

/// Returns the shortest paths from `own` to every node that it reaches. Ties go to the lower ID.
/// The links of `own` are `neighbors`, since its record may be older.
pub(super) fn paths(
    own: NodeId,
    neighbors: &BTreeSet<NodeId>,
    records: &BTreeMap<NodeId, Record>,
) -> BTreeMap<NodeId, Path> {
    let mut paths: BTreeMap<NodeId, Path> = BTreeMap::new();
    walk(own, Own { id: own, neighbors }, records, |parent, node| {
        let path = match paths.get(&parent) {
            None => Path { via: node, hops: 1 },
            Some(Path { via, hops }) => Path { via: *via, hops: hops + 1 },
        };
        paths.insert(node, path);
    });
    paths
}

/// Returns the neighbors to which `own` forwards a broadcast of `source`: its children in the tree
/// of shortest paths from `source`. Along these trees, every node receives a broadcast once.
pub(super) fn branches(
    source: NodeId,
    own: NodeId,
    neighbors: &BTreeSet<NodeId>,
    records: &BTreeMap<NodeId, Record>,
) -> Vec<NodeId> {
    let mut children = Vec::new();
    walk(source, Own { id: own, neighbors }, records, |parent, node| {
        if parent == own {
            children.push(node);
        }
    });
    children
}

/// This node's current links, which replace those in its record.
#[derive(Clone, Copy)]
struct Own<'a> {
    id: NodeId,
    neighbors: &'a BTreeSet<NodeId>,
}

/// Searches breadth-first from `start`. Calls `reached` with the parent and the node for each node
/// that is reached.
fn walk(
    start: NodeId,
    own: Own<'_>,
    records: &BTreeMap<NodeId, Record>,
    mut reached: impl FnMut(NodeId, NodeId),
) {
    let mut live: Vec<Option<&Record>> = vec![None; usize::from(NodeId::MAX) + 1];
    let mut count = 0;
    for (id, record) in records.iter().filter(|(_, record)| !record.left) {
        live[index(*id)] = Some(record);
        count += 1;
    }
    let reports_link = |one: NodeId, other: NodeId| {
        if one == own.id {
            return own.neighbors.contains(&other);
        }
        live[index(one)].is_some_and(|record| record.links.binary_search(&other).is_ok())
    };
    let mut seen = vec![false; live.len()];
    seen[index(start)] = true;
    let (mut queue, mut next) = (vec![start], 0);
    while let Some(&node) = queue.get(next)
        && queue.len() < count
    {
        next += 1;
        let mut visit = |other: NodeId| {
            if !seen[index(other)] && live[index(other)].is_some() && reports_link(other, node) {
                seen[index(other)] = true;
                queue.push(other);
                reached(node, other);
            }
        };
        if node == own.id {
            own.neighbors.iter().copied().for_each(&mut visit);
        } else if let Some(record) = live[index(node)] {
            record.links.iter().copied().for_each(&mut visit);
        }
    }
}

fn index(id: NodeId) -> usize {
    usize::from(id.get())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use overnode_types::PublicKey;

    fn id(id: usize) -> NodeId {
        NodeId::new(id as u16).unwrap()
    }

    /// Records of the nodes 1 to `count`. `reports_link(a, b)` is true if a reports a link with b.
    fn records(
        count: usize,
        reports_link: impl Fn(usize, usize) -> bool,
    ) -> BTreeMap<NodeId, Record> {
        let record = |node: usize| Record {
            version: 1,
            links: (1..=count)
                .filter(|other| *other != node && reports_link(node, *other))
                .map(id)
                .collect(),
            ..Record::blank(id(node), 1, String::new(), PublicKey([0; 32]))
        };
        (1..=count).map(|node| (id(node), record(node))).collect()
    }

    fn links(of: usize, records: &BTreeMap<NodeId, Record>) -> BTreeSet<NodeId> {
        records[&id(of)].links.iter().copied().collect()
    }

    /// Hops between all pairs, by the Floyd-Warshall algorithm.
    fn distances(count: usize, records: &BTreeMap<NodeId, Record>) -> Vec<Vec<usize>> {
        let mut far = vec![vec![usize::MAX / 2; count + 1]; count + 1];
        for (one, row) in far.iter_mut().enumerate().skip(1) {
            for (other, hops) in row.iter_mut().enumerate().skip(1) {
                let both = links(one, records).contains(&id(other))
                    && links(other, records).contains(&id(one));
                *hops = if one == other {
                    0
                } else if both {
                    1
                } else {
                    *hops
                };
            }
        }
        for middle in 1..=count {
            for one in 1..=count {
                for other in 1..=count {
                    far[one][other] = far[one][other].min(far[one][middle] + far[middle][other]);
                }
            }
        }
        far
    }

    #[test]
    fn paths_are_the_shortest_and_ties_go_to_the_lower_neighbor() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let count = rng.random_range(1..14);
            let density = rng.random_range(0.05..0.6);
            let table: Vec<Vec<bool>> = (0..=count)
                .map(|_| (0..=count).map(|_| rng.random_bool(density)).collect())
                .collect();
            // Half of the seeds have links that only one end reports.
            let reports_link = |a: usize, b: usize| table[a][b] || (seed % 2 == 0 && table[b][a]);
            let records = records(count, reports_link);
            let far = distances(count, &records);
            for own in 1..=count {
                let paths = paths(id(own), &links(own, &records), &records);
                for other in (1..=count).filter(|other| *other != own) {
                    let expected = (far[own][other] < usize::MAX / 2).then(|| {
                        let via = (1..=count).find(|via| {
                            far[own][*via] == 1 && far[*via][other] + 1 == far[own][other]
                        });
                        Path { via: id(via.unwrap()), hops: far[own][other] as u16 }
                    });
                    assert_eq!(
                        paths.get(&id(other)).copied(),
                        expected,
                        "seed {seed}: {own} to {other}"
                    );
                }
                assert!(!paths.contains_key(&id(own)));
            }
        }
    }

    #[test]
    fn a_broadcast_reaches_every_node_once() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let count = rng.random_range(1..20);
            let table: Vec<Vec<bool>> =
                (0..=count).map(|_| (0..=count).map(|_| rng.random_bool(0.2)).collect()).collect();
            let records = records(count, |a, b| table[a][b] || table[b][a]);
            let source = rng.random_range(1..=count);
            let (mut received, mut queue) = (vec![0; count + 1], vec![source]);
            while let Some(node) = queue.pop() {
                for next in branches(id(source), id(node), &links(node, &records), &records) {
                    received[usize::from(next.get())] += 1;
                    queue.push(usize::from(next.get()));
                }
            }
            let reached = paths(id(source), &links(source, &records), &records);
            for (node, times) in received.into_iter().enumerate().skip(1) {
                assert_eq!(
                    times,
                    usize::from(reached.contains_key(&id(node))),
                    "seed {seed}: node {node}"
                );
            }
        }
    }

    #[test]
    fn a_nodes_own_links_override_its_record() {
        let records = records(3, |a, b| a.abs_diff(b) == 1);
        let reached = |neighbors: &[usize]| {
            let neighbors = neighbors.iter().copied().map(id).collect();
            paths(id(1), &neighbors, &records).into_keys().collect::<Vec<_>>()
        };
        assert_eq!(reached(&[2]), [id(2), id(3)]);
        assert_eq!(reached(&[]), []);
        assert_eq!(reached(&[3]), [], "node 3 does not report the link");
    }

    #[test]
    fn no_node_is_reached_through_a_node_that_has_left() {
        let mut records = records(3, |a, b| a.abs_diff(b) == 1);
        records.get_mut(&id(2)).unwrap().left = true;
        assert_eq!(paths(id(1), &BTreeSet::from([id(2)]), &records), BTreeMap::new());
    }

    /// Prints the times without judging them, since machines differ. Only a bound that a change of
    /// the algorithm would break is asserted.
    #[test]
    #[expect(clippy::print_stderr, reason = "prints timings for developers")]
    fn a_thousand_nodes_cost_little() {
        for (name, reach) in [("each with 8 links", 4), ("a full mesh", 1000)] {
            let records = records(1000, |a, b| {
                let apart = a.abs_diff(b);
                apart.min(1000 - apart) <= reach
            });
            let neighbors = links(1, &records);
            let (mut least, mut reached) = (std::time::Duration::MAX, 0);
            for _ in 0..20 {
                let began = Instant::now();
                reached = paths(id(1), &neighbors, &records).len();
                least = least.min(began.elapsed());
            }
            assert_eq!(reached, 999);
            eprintln!("1000 nodes, {name}: {least:?}");
            assert!(least.as_millis() < 200, "{name}: {least:?}");
        }
    }
}
