//! Which way packets to each node go: a pure function of what is known of the paths.
//!
//! Every node forwards by its own table. Where all nodes know the same, each hop is one nearer to
//! the destination whichever way ties are broken, so there is no loop. Where they do not, for as
//! long as gossip takes, packets may circle; the hop limit in the relay header ends that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::mtu::FLOOR;
use super::state::PathState;
use crate::types::NodeId;

/// Most links on a route. A route that is longer than this is none; the relay header starts with
/// it.
pub const MAX_HOPS: u8 = 8;
/// Bytes of a relay header.
pub const RELAY_HEADER: u32 = 8;
/// What is taken to fit beyond those hops that this node knows of, bytes of inner packet and relay
/// header: it leaves containers 1280 bytes, the least that IPv6 works with. A relay tells what its
/// own paths carry; what comes after, nobody tells.
pub const BEYOND_FIRST_HOP: u32 = 1280 + RELAY_HEADER;
/// The present relay stays unless another one is nearer by more than this and by more than a
/// quarter: round-trip times waver, and each change may reorder packets.
pub const RTT_MARGIN: Duration = Duration::from_millis(5);

/// How to reach a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// By the direct path.
    Direct,
    /// Through others.
    Via {
        /// The first of them.
        relay: NodeId,
        /// Links on the way, 2 to [`MAX_HOPS`].
        hops: u8,
    },
    /// Not at all.
    Unreachable,
}

/// What is known of the paths.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// The direct paths of this node ([`super::Paths::states`]).
    pub direct: BTreeMap<NodeId, PathState>,
    /// To which nodes each other node says that its direct path is alive. Counts only if both say
    /// so. What is in here under this node's own ID is not looked at.
    pub links: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// The routes so far.
    pub present: BTreeMap<NodeId, Route>,
}

/// The route to every node that the graph knows.
///
/// Direct where that path is alive; otherwise by the fewest links, then by the relay that there is
/// already, then by the one with the shortest round-trip time, then by the one with the lowest ID.
pub fn choose(own: NodeId, graph: &Graph) -> BTreeMap<NodeId, Route> {
    let is_alive = |id: &NodeId| graph.direct.get(id).is_some_and(|state| state.alive);
    let nodes = graph.direct.keys().chain(graph.links.keys()).copied().filter(|id| *id != own);
    let (near, mut far): (BTreeSet<_>, BTreeSet<_>) = nodes.partition(|id| is_alive(id));
    let mut routes: BTreeMap<_, _> = near.iter().map(|id| (*id, Route::Direct)).collect();
    // For every node of the last ring the neighbours of this node through which a shortest way to
    // it leads.
    let mut ring: BTreeMap<NodeId, BTreeSet<NodeId>> =
        near.into_iter().map(|id| (id, BTreeSet::from([id]))).collect();
    for hops in 2..=MAX_HOPS {
        let mut next = BTreeMap::new();
        for id in &far {
            let Some(links) = graph.links.get(id) else { continue };
            let says_so =
                |other: &NodeId| graph.links.get(other).is_some_and(|links| links.contains(id));
            let relays: BTreeSet<_> = if ring.len() < links.len() {
                let nearer =
                    ring.iter().filter(|(other, _)| links.contains(other) && says_so(other));
                nearer.flat_map(|(_, relays)| relays).copied().collect()
            } else {
                let nearer = links.iter().filter_map(|other| ring.get_key_value(other));
                nearer
                    .filter(|(other, _)| says_so(other))
                    .flat_map(|(_, relays)| relays)
                    .copied()
                    .collect()
            };
            if let Some(relay) = best(*id, &relays, graph) {
                routes.insert(*id, Route::Via { relay, hops });
                next.insert(*id, relays);
            }
        }
        if next.is_empty() {
            break;
        }
        far.retain(|id| !next.contains_key(id));
        ring = next;
    }
    routes.extend(far.into_iter().map(|id| (id, Route::Unreachable)));
    routes
}

/// Size of the largest inner packet that goes by a route, bytes; none if it is unreachable, or
/// unknown to the graph.
pub fn mtu(to: NodeId, route: Route, direct: &BTreeMap<NodeId, PathState>) -> Option<u32> {
    match route {
        Route::Direct => Some(direct.get(&to)?.mtu),
        Route::Via { relay, hops } => {
            let first = direct.get(&relay)?;
            let second = first.carries.map_or(BEYOND_FIRST_HOP, |size| size.max(FLOOR));
            let later = if hops > 2 { BEYOND_FIRST_HOP } else { u32::MAX };
            Some(first.mtu.min(second).min(later).saturating_sub(RELAY_HEADER))
        }
        Route::Unreachable => None,
    }
}

fn best(to: NodeId, relays: &BTreeSet<NodeId>, graph: &Graph) -> Option<NodeId> {
    let rtt =
        |id: NodeId| graph.direct.get(&id).and_then(|state| state.rtt).unwrap_or(Duration::MAX);
    let nearest = relays.iter().copied().min_by_key(|id| (rtt(*id), *id))?;
    match graph.present.get(&to) {
        Some(Route::Via { relay, .. }) if relays.contains(relay) => {
            let (present, rival) = (rtt(*relay), rtt(nearest));
            let is_much_nearer = rival < present / 4 * 3
                && rival.checked_add(RTT_MARGIN).is_some_and(|rival| rival < present);
            Some(if is_much_nearer { nearest } else { *relay })
        }
        _ => Some(nearest),
    }
}
