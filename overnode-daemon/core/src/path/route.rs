//! Route selection: a pure function of the known paths.
//!
//! Every node forwards by its own table. If all nodes know the same paths, each hop is one closer
//! to the destination, however ties are broken, so there is no loop. While they do not, until
//! gossip has spread a change, packets may loop. The hop limit in the relay header ends that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::mtu::FLOOR;
use super::state::PathState;
use overnode_types::NodeId;

/// Maximum number of links on a route, and the initial hop limit in the relay header. A longer
/// route is not used.
pub const MAX_HOPS: u8 = 8;
/// Length of a relay header in bytes.
pub const RELAY_HEADER: u32 = 8;
/// Size in bytes of inner packet and relay header that is assumed to fit beyond the hops that this
/// node knows about. It leaves 1280 bytes for containers, the minimum MTU of IPv6. A relay reports
/// what its own paths carry, but not what later hops do.
pub const BEYOND_FIRST_HOP: u32 = 1280 + RELAY_HEADER;
/// The current relay is kept unless another one is closer by more than this and by more than a
/// quarter. Round-trip times vary, and each change may reorder packets.
pub const RTT_MARGIN: Duration = Duration::from_millis(5);

/// The route to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// On the direct path.
    Direct,
    /// Through other nodes.
    Via {
        /// The first of them.
        relay: NodeId,
        /// Number of links on the route, 2 to [`MAX_HOPS`].
        hops: u8,
    },
    /// There is no route.
    Unreachable,
}

/// The known paths.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// The direct paths of this node ([`super::Paths::states`]).
    pub direct: BTreeMap<NodeId, PathState>,
    /// By node: the nodes that it reports a live direct path to. A link counts only if both ends
    /// report it. The entry of this node itself is ignored.
    pub links: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// The current routes.
    pub present: BTreeMap<NodeId, Route>,
}

/// Returns the route to every node in the graph.
///
/// The route is direct if that path is alive. Otherwise the route with the fewest links wins, then
/// the one through the current relay, then the relay with the shortest round-trip time, then the
/// relay with the lowest ID.
pub fn choose(own: NodeId, graph: &Graph) -> BTreeMap<NodeId, Route> {
    let is_alive = |id: &NodeId| graph.direct.get(id).is_some_and(|state| state.alive);
    let nodes = graph.direct.keys().chain(graph.links.keys()).copied().filter(|id| *id != own);
    let (near, mut far): (BTreeSet<_>, BTreeSet<_>) = nodes.partition(|id| is_alive(id));
    let mut routes: BTreeMap<_, _> = near.iter().map(|id| (*id, Route::Direct)).collect();
    // For every node of the last ring: the neighbors of this node that are first on a shortest
    // route to it.
    let mut ring: BTreeMap<NodeId, BTreeSet<NodeId>> =
        near.into_iter().map(|id| (id, BTreeSet::from([id]))).collect();
    for hops in 2..=MAX_HOPS {
        let mut next = BTreeMap::new();
        for id in &far {
            let Some(links) = graph.links.get(id) else { continue };
            let reports_link =
                |other: &NodeId| graph.links.get(other).is_some_and(|links| links.contains(id));
            let relays: BTreeSet<_> = if ring.len() < links.len() {
                let nearer =
                    ring.iter().filter(|(other, _)| links.contains(other) && reports_link(other));
                nearer.flat_map(|(_, relays)| relays).copied().collect()
            } else {
                let nearer = links.iter().filter_map(|other| ring.get_key_value(other));
                nearer
                    .filter(|(other, _)| reports_link(other))
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

/// Returns the size in bytes of the largest inner packet that a route carries. `None` if the node
/// is unreachable or not in the graph.
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
