//! Who reaches whom: the graph of the links that both ends report.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::message::Record;
use crate::types::NodeId;

/// How a node is reached over control connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The neighbour through which the shortest path leads; the node itself if it is a neighbour.
    pub via: NodeId,
    /// Connections on the path; 1 for a neighbour.
    pub hops: u16,
}

/// The shortest paths from `own` to every node that it reaches. Ties go to the lower ID, so that the result depends on nothing
/// but the graph.
pub fn paths(own: NodeId, records: &BTreeMap<NodeId, Record>) -> BTreeMap<NodeId, Path> {
    let mut paths = BTreeMap::new();
    let mut queue = VecDeque::from([(own, None)]);
    let mut seen = BTreeSet::from([own]);
    while let Some((node, path)) = queue.pop_front() {
        for next in neighbours(node, records) {
            if seen.insert(next) {
                let path = match path {
                    None => Path { via: next, hops: 1 },
                    Some(Path { via, hops }) => Path { via, hops: hops + 1 },
                };
                paths.insert(next, path);
                queue.push_back((next, Some(path)));
            }
        }
    }
    paths
}

/// The nodes that `node` has a link with by its own word and by theirs.
fn neighbours(node: NodeId, records: &BTreeMap<NodeId, Record>) -> impl Iterator<Item = NodeId> {
    let links = records.get(&node).map(|record| record.links.as_slice()).unwrap_or_default();
    links.iter().copied().filter(move |other| {
        records.get(other).is_some_and(|record| !record.left && record.links.binary_search(&node).is_ok())
    })
}
