//! Chooses the path of packets to each node. Probes show whether the direct path works, gossip
//! shows which relays exist, and the result is applied to the data plane.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use overnode_ebpf::wire::{RELAY_HOPS, Relay};

use super::{DataPlane, Effect, PeerEvent};
use crate::api::Path;
use crate::datapath::Probe;
use overnode_core::gossip::Gossip;
use overnode_core::handshake::{PeerAddress, Transmit};
use overnode_core::path::route::{self, Graph, Route};
use overnode_core::path::{Action, PathState};
use overnode_types::{NodeId, PeerIndex};

/// A new path gets this time to prove itself before a relay replaces it. Sessions, connections and
/// probes of a node that has just joined take a moment each.
const GRACE: Duration = Duration::from_secs(3);
/// A peer that this node's containers sent packets to within this time is probed at the full rate.
const BUSY: Duration = Duration::from_secs(10);
/// Minimum time in use after which a relay stays the route when no route is known any more. The
/// daemon of a node may be down while its eBPF programs still forward packets. A relay chosen more
/// recently was chosen only because the destination had just stopped answering.
const SETTLED_AFTER: Duration = Duration::from_secs(5);

/// Which path packets to each node take.
#[derive(Debug, Default)]
pub(in crate::node) struct RelayRoutes {
    /// The routes in use.
    routes: BTreeMap<NodeId, Route>,
    /// When each route was chosen.
    since: BTreeMap<NodeId, Instant>,
    /// For each node without a known route, the last relay that served for [`SETTLED_AFTER`].
    kept: BTreeMap<NodeId, NodeId>,
    /// When each node first became a peer.
    first_seen: BTreeMap<NodeId, Instant>,
    /// For each node, the node that forwarded its last handshake message.
    last_relay: BTreeMap<NodeId, NodeId>,
    /// Whether an event may have changed the routes.
    is_stale: bool,
}

impl RelayRoutes {
    /// Returns the route to a node and when it was chosen.
    pub(in crate::node) fn route(&self, id: NodeId) -> Option<(Route, Instant)> {
        Some((*self.routes.get(&id)?, *self.since.get(&id)?))
    }

    /// Returns the relay that packets take under a newly chosen route. `None` means the direct
    /// path.
    fn relay(&mut self, id: NodeId, chosen: Route, now: Instant) -> Option<NodeId> {
        match chosen {
            Route::Direct => {
                self.kept.remove(&id);
                None
            }
            Route::Via { relay, .. } => {
                self.kept.retain(|of, kept| *of != id || *kept == relay);
                Some(relay)
            }
            Route::Unreachable => {
                if let Some((Route::Via { relay, .. }, since)) = self.route(id)
                    && now >= since + SETTLED_AFTER
                {
                    self.kept.insert(id, relay);
                }
                self.kept.get(&id).copied()
            }
        }
    }

    /// Requests a new choice of routes.
    pub(in crate::node) fn mark_stale(&mut self) {
        self.is_stale = true;
    }
}

impl DataPlane {
    /// Makes exactly the nodes with a session targets of probes.
    pub(super) fn follow_sessions(&mut self, now: Instant) {
        let mut with_session = BTreeSet::new();
        for (index, peer) in &self.peers {
            let Some(id) = index.node() else { continue };
            self.relay_routes.first_seen.entry(id).or_insert(now);
            if !peer.has_session(now) {
                continue;
            }
            with_session.insert(id);
            self.paths.set_peer(id, self.datapath.largest(*index), now);
            let sent = peer.state.as_ref().and_then(|state| state.last_data_sent);
            self.paths.set_busy(id, sent.is_some_and(|at| now < at + BUSY), now);
        }
        let lost: Vec<NodeId> =
            self.paths.states().map(|(id, _)| id).filter(|id| !with_session.contains(id)).collect();
        for id in lost {
            self.paths.remove_peer(id);
            self.relay_routes.mark_stale();
        }
        let peers = &self.peers;
        self.relay_routes.first_seen.retain(|id, _| peers.contains_key(&id.peer_index()));
        self.relay_routes.last_relay.retain(|id, _| peers.contains_key(&id.peer_index()));
        // The direct path to a node may have changed, with another MTU.
        self.relay_routes.mark_stale();
    }

    /// Returns the nodes that answer probes on the direct path.
    pub(in crate::node) fn reached_directly(&self) -> impl Iterator<Item = NodeId> {
        self.paths.states().filter(|(_, state)| state.alive).map(|(id, _)| id)
    }

    /// Handles a probe, or the answer to one, that came through the tunnel.
    /// Returns whether there may be a new session.
    pub(in crate::node) fn handle_probe(&mut self, probe: &Probe, now: Instant) -> bool {
        let Some(from) = probe.peer.node() else { return false };
        let is_new = self.paths.state(from).is_none();
        if is_new {
            // A probe may be the first message in a session, which confirms it.
            self.read_maps(now);
        }
        self.paths.handle_probe(from, &probe.payload, probe.inner_len, now);
        is_new
    }

    /// Sends pending probes, and chooses new routes if anything has changed.
    pub(in crate::node) fn pump_paths(
        &mut self,
        gossip: &Gossip,
        neighbors: &BTreeSet<NodeId>,
        now: Instant,
    ) {
        while let Some(action) = self.paths.poll_action() {
            match action {
                Action::Send { to, bytes } => {
                    let address = self.local.layout.node_address(to);
                    if let Err(error) = self.datapath.send_probe(to.peer_index(), address, &bytes) {
                        tracing::debug!("a probe to node {to} was not sent: {error:#}");
                        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                        self.paths.handle_unsent(
                            to,
                            size.saturating_add(overnode_core::path::probe::ENCAP_LEN),
                            now,
                        );
                    }
                }
                Action::Changed { id } => {
                    if let Some(state) = self.paths.state(id) {
                        let what = if state.alive { "works" } else { "does not work" };
                        tracing::info!(
                            "the direct path to node {id} {what} (MTU {} bytes)",
                            state.mtu
                        );
                        let event = PeerEvent::DirectPath { works: state.alive, mtu: state.mtu };
                        self.report(id.peer_index(), event);
                    }
                    self.relay_routes.mark_stale();
                }
            }
        }
        if std::mem::take(&mut self.relay_routes.is_stale) {
            self.choose_routes(gossip, neighbors, now);
        }
    }

    fn choose_routes(&mut self, gossip: &Gossip, neighbors: &BTreeSet<NodeId>, now: Instant) {
        let graph = self.graph(gossip);
        let routes = route::choose(self.local.id(), &graph);
        for (&id, &chosen) in &routes {
            let index = id.peer_index();
            if !self.peers.contains_key(&index) || self.is_young(id, graph.direct.get(&id), now) {
                continue;
            }
            let via = self.relay_routes.relay(id, chosen, now).map(NodeId::peer_index);
            if let Err(error) = self.datapath.set_via(index, via) {
                tracing::warn!("the path to node {id} cannot be changed: {error:#}");
                continue;
            }
            if let Some(mtu) = route::mtu(id, chosen, &graph.direct)
                && let Err(error) = self.datapath.set_mtu(index, mtu)
            {
                tracing::warn!("the MTU of the path to node {id} cannot be set: {error:#}");
            }
            if self.relay_routes.routes.insert(id, chosen) != Some(chosen) {
                self.relay_routes.since.insert(id, now);
                self.report(index, PeerEvent::PathChanged(path_of(chosen)));
                match chosen {
                    Route::Direct => tracing::info!("packets for node {id} take the direct path"),
                    Route::Via { relay, hops } => {
                        tracing::info!(
                            "packets for node {id} go through node {relay} ({hops} hops)"
                        );
                        // A session that could not be established on the direct path may be
                        // possible now.
                        self.handshakes.retry(index);
                    }
                    Route::Unreachable => tracing::info!("no path to node {id} is known"),
                }
            }
        }
        self.relay_routes.routes.retain(|id, _| routes.contains_key(id));
        self.relay_routes.since.retain(|id, _| routes.contains_key(id));
        self.relay_routes.kept.retain(|id, _| routes.contains_key(id));
        let no_direct_path = neighbors.iter().copied().filter(|id| {
            let state = self.paths.state(*id);
            !state.is_some_and(|state| state.alive) && !self.is_young(*id, state.as_ref(), now)
        });
        let no_direct_path = no_direct_path.collect();
        self.effects.push_back(Effect::NoDirectPath(no_direct_path));
    }

    fn graph(&self, gossip: &Gossip) -> Graph {
        let links = gossip.records().filter(|record| !record.left).map(|record| {
            let is_dark = |id: &NodeId| record.no_direct_path.binary_search(id).is_ok();
            (record.id, record.links.iter().copied().filter(|id| !is_dark(id)).collect())
        });
        Graph {
            direct: self.paths.states().collect(),
            links: links.collect(),
            present: self.relay_routes.routes.clone(),
        }
    }

    /// Whether a path was never alive but has not had enough time to become so.
    fn is_young(&self, id: NodeId, state: Option<&PathState>, now: Instant) -> bool {
        let since = match state {
            Some(state) if state.alive || state.rtt.is_some() => return false,
            Some(state) => Some(&state.since),
            None => self.relay_routes.first_seen.get(&id),
        };
        since.is_none_or(|since| now < *since + GRACE)
    }

    /// Removes the relay header from a handshake message. Returns the sender and the message.
    pub(super) fn unwrap_relayed<'a>(
        &mut self,
        datagram: &'a [u8],
    ) -> Option<(PeerAddress, &'a [u8])> {
        let (relay, message) = Relay::split(datagram)?;
        let source = NodeId::new(relay.source).ok()?;
        let previous = NodeId::new(relay.previous).ok()?;
        if relay.destination != self.local.id().get()
            || !self.peers.contains_key(&source.peer_index())
        {
            return None;
        }
        self.relay_routes.last_relay.insert(source, previous);
        Some((PeerAddress::Relayed(source), message))
    }

    /// Sends a handshake message through a relay if its peer is behind one, or if it answers a
    /// relayed message.
    pub(in crate::node) async fn send_relayed(&self, transmit: &Transmit) {
        let relayed = transmit.to.relayed();
        let node = relayed.or_else(|| transmit.peer.and_then(PeerIndex::node));
        let relay = node.and_then(|id| match self.relay_routes.routes.get(&id) {
            Some(Route::Via { relay, .. }) => Some(*relay),
            _ => relayed.and_then(|_| self.relay_routes.last_relay.get(&id).copied()),
        });
        if let (Some(node), Some(relay)) = (node, relay) {
            let address =
                self.peers.get(&relay.peer_index()).and_then(|peer| peer.state.as_ref()?.endpoint);
            let own = self.local.id().get();
            let header =
                Relay { hops: RELAY_HOPS, destination: node.get(), source: own, previous: own };
            let datagram = [&header.to_bytes()[..], &transmit.bytes].concat();
            if let Some(address) = address
                && let Err(error) = self.udp.send(address, None, &datagram).await
            {
                tracing::debug!(
                    "a handshake message to node {node} through node {relay} was not sent: {error}"
                );
            }
        }
    }
}

/// Returns the path that packets take, if there is one.
pub(in crate::node) fn path_of(route: Route) -> Option<Path> {
    match route {
        Route::Direct => Some(Path::Direct),
        Route::Via { relay, .. } => Some(Path::Via(relay)),
        Route::Unreachable => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_established_relay_is_kept_while_no_path_is_known() {
        let (to, one, other) =
            (NodeId::new(3).unwrap(), NodeId::new(2).unwrap(), NodeId::new(4).unwrap());
        let start = Instant::now();
        let mut relay_routes = RelayRoutes::default();
        let choose = |relay_routes: &mut RelayRoutes, route: Route, seconds: u64| {
            let now = start + Duration::from_secs(seconds);
            let relay = relay_routes.relay(to, route, now);
            if relay_routes.routes.insert(to, route) != Some(route) {
                relay_routes.since.insert(to, now);
            }
            relay
        };
        let via = |relay| Route::Via { relay, hops: 2 };
        // The destination died, so the direct path is as good as any.
        assert_eq!(choose(&mut relay_routes, Route::Direct, 0), None);
        assert_eq!(choose(&mut relay_routes, via(one), 10), Some(one));
        assert_eq!(choose(&mut relay_routes, Route::Unreachable, 11), None);
        assert_eq!(choose(&mut relay_routes, via(one), 20), Some(one));
        for second in 26..30 {
            assert_eq!(choose(&mut relay_routes, Route::Unreachable, second), Some(one));
        }
        // The relay has just come back and does not announce its connections yet.
        assert_eq!(choose(&mut relay_routes, via(one), 30), Some(one));
        assert_eq!(choose(&mut relay_routes, Route::Unreachable, 31), Some(one));
        // The relay is kept until another one is chosen.
        assert_eq!(choose(&mut relay_routes, via(other), 32), Some(other));
        assert_eq!(choose(&mut relay_routes, Route::Unreachable, 33), None);
        assert_eq!(choose(&mut relay_routes, Route::Direct, 40), None);
        assert_eq!(choose(&mut relay_routes, Route::Unreachable, 50), None);
    }
}
