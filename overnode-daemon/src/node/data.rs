//! Manages the peers of the data plane: turns gossip into peers and routes, and the results of
//! handshakes into sessions.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use overnode_ebpf::wire::{DATA_PORT, TYPE_RELAY};

use super::paths::stood_for;
use super::running::Node;
use crate::api::EventKind;
use crate::datapath::PeerState;
use crate::net::udp::Received;
use overnode_core::control::key;
use overnode_core::gossip::Record;
use overnode_core::handshake::{Activity, Event, InheritedSession, Initiate, PeerConfig};
use overnode_core::routing::Conflict;
use overnode_types::{NodeId, PeerIndex, PublicKey, Secret};

/// How much longer the node with the higher ID waits before it initiates than the node with the
/// lower ID.
const SECOND: Duration = Duration::from_millis(1500);
/// How long a handshake is tried at one address of a node before the next address is tried.
const PATIENCE: Duration = Duration::from_secs(7);
/// Maximum number of addresses tried per peer: those of its record and those that it was heard at.
const MAX_CANDIDATES: usize = 32;

/// A peer as configured in the data plane.
pub(super) struct DataPeer {
    pub(super) public_key: PublicKey,
    /// Addresses where the peer may be, best first. At most one for a peer that is not a node.
    candidates: Vec<SocketAddr>,
    /// Index of the candidate in use.
    candidate: usize,
    /// Whether the candidate was chosen but has not been tried yet.
    is_chosen: bool,
    tried_since: Instant,
    pub(super) routes: Vec<IpNet>,
    /// State from the last read of the maps.
    pub(super) state: Option<PeerState>,
    pub(super) last_error: Option<(String, Instant)>,
}

impl DataPeer {
    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.candidates.get(self.candidate).copied()
    }

    /// Makes `place` the candidate, adding it if it is not in the list.
    fn prefer(&mut self, place: SocketAddr) {
        self.candidate = self.candidates.iter().position(|it| *it == place).unwrap_or_else(|| {
            self.candidates.insert(0, place);
            self.candidates.truncate(MAX_CANDIDATES);
            0
        });
        self.is_chosen = true;
    }

    /// Whether there is a sealing session that has not expired.
    pub(super) fn has_session(&self, now: Instant) -> bool {
        self.state.as_ref().is_some_and(|state| {
            state.sessions.iter().any(|session| session.sealing && session.expires > now)
        })
    }
}

/// The wanted configuration of a peer in the data plane.
pub(super) struct Wanted {
    pub(super) public_key: PublicKey,
    pub(super) preshared_key: Secret,
    pub(super) candidates: Vec<SocketAddr>,
    pub(super) initiate: Initiate,
    pub(super) persistent_keepalive: Option<Duration>,
    /// `None` for a node, whose routes are decided together with those of all other nodes.
    pub(super) routes: Option<Vec<IpNet>>,
}

impl Node {
    /// Takes over peers and sessions that an earlier daemon left in the maps, then configures all
    /// peers in the store.
    pub(super) async fn adopt(&mut self, now: Instant) -> anyhow::Result<()> {
        let pinned = self.datapath.peers()?;
        // A peer with a session may have roamed since it announced its address. The session must be
        // known before the peer is configured, or packets to the peer would be redirected to the
        // announced address.
        for state in &pinned {
            let peer = DataPeer {
                public_key: state.public_key,
                candidates: state.endpoint.into_iter().collect(),
                candidate: 0,
                is_chosen: false,
                tried_since: now,
                routes: Vec::new(),
                state: Some(state.clone()),
                last_error: None,
            };
            self.peers.insert(state.index, peer);
        }
        let mut known = BTreeSet::new();
        let records = self.gossip.records().filter(|record| record.id != self.identity.id);
        let records: Vec<Record> = records.cloned().collect();
        records.iter().for_each(|record| self.tell_ipam(record, now));
        for record in records.iter().filter(|record| !record.left) {
            self.dialer.learn(record.id, record.addresses.clone(), now);
            known.insert(record.id.peer_index());
            // A node that cannot be configured must not prevent the configuration of the others.
            if let Err(error) = self.configure_peer(record, now).await {
                tracing::warn!("node {} cannot be added to the data plane: {error:#}", record.id);
            }
        }
        for external in self.store.external_peers()? {
            let index = external.index;
            known.insert(index);
            if let Err(error) = self.configure_external(external, now).await {
                tracing::warn!(
                    "the WireGuard peer {index} cannot be added to the data plane: {error:#}"
                );
            }
        }
        self.datapath.set_own_routes(&self.own_routes())?;
        for state in pinned {
            if !known.contains(&state.index) {
                self.remove_data_peer(state.index, now);
                continue;
            }
            if self.peers.get(&state.index).is_none_or(|peer| peer.public_key != state.public_key) {
                // Its sessions were removed when it was configured.
                continue;
            }
            for session in state.sessions {
                self.handshakes.adopt(
                    state.index,
                    InheritedSession {
                        local_index: session.local_index,
                        remote_index: session.remote_index,
                        initiator: session.initiator,
                        confirmed: session.confirmed,
                        created: session.created,
                        sealing: session.sealing,
                    },
                    now,
                );
            }
        }
        self.read_maps(now);
        Ok(())
    }

    /// Configures a node in the data plane from its record, unless its address space was reclaimed
    /// and it has not returned since.
    pub(super) async fn configure_peer(
        &mut self,
        record: &Record,
        now: Instant,
    ) -> anyhow::Result<()> {
        if self.routing.is_reclaimed(record.id) {
            return Ok(());
        }
        let wanted = Wanted {
            public_key: record.public_key,
            preshared_key: key::pair_key(
                &self.identity.cluster_key,
                &self.public_key,
                &record.public_key,
            ),
            candidates: self.candidates(record),
            initiate: self.initiative(record.id),
            persistent_keepalive: None,
            routes: None,
        };
        self.configure(record.id.peer_index(), wanted, now).await
    }

    /// Decides which of two nodes initiates the handshakes between them.
    pub(super) fn initiative(&self, other: NodeId) -> Initiate {
        if self.identity.id < other { Initiate::AtOnce } else { Initiate::After(SECOND) }
    }

    pub(super) async fn configure(
        &mut self,
        index: PeerIndex,
        wanted: Wanted,
        now: Instant,
    ) -> anyhow::Result<()> {
        let before = self.peers.remove(&index);
        if before.as_ref().is_some_and(|before| before.public_key != wanted.public_key) {
            // A node that was reset and launched again has another key. Nothing of the old one may
            // remain.
            self.handshakes.remove_peer(index, now);
            self.pump_handshakes(now, None).await;
            self.datapath.remove_peer(index)?;
        }
        let before = before.filter(|before| before.public_key == wanted.public_key);
        let kept = before.as_ref().and_then(DataPeer::endpoint);
        let candidate = kept
            .and_then(|kept| wanted.candidates.iter().position(|it| *it == kept))
            .unwrap_or_default();
        let mut peer = DataPeer {
            public_key: wanted.public_key,
            candidates: wanted.candidates,
            candidate,
            is_chosen: false,
            tried_since: before.as_ref().map_or(now, |before| before.tried_since),
            routes: wanted
                .routes
                .clone()
                .or_else(|| before.as_ref().map(|before| before.routes.clone()))
                .unwrap_or_default(),
            state: before.as_ref().and_then(|before| before.state.clone()),
            last_error: before.as_ref().and_then(|before| before.last_error.clone()),
        };
        // The endpoint of a peer with a session is the source of its packets, regardless of any
        // announcement.
        let endpoint = peer.endpoint().filter(|_| !peer.has_session(now));
        if endpoint.is_some() && endpoint != kept {
            peer.tried_since = now;
        }
        let config = PeerConfig {
            public_key: peer.public_key,
            preshared_key: wanted.preshared_key,
            endpoint,
            initiate: wanted.initiate,
            persistent_keepalive: wanted.persistent_keepalive,
        };
        // A failed step is retried later and does not prevent the others.
        let path = self.datapath.set_peer(index, &peer.public_key, endpoint).await;
        let routes =
            wanted.routes.map_or(Ok(()), |routes| self.datapath.set_routes(index, &routes));
        self.handshakes.upsert_peer(index, config, now);
        self.peers.insert(index, peer);
        path.and(routes)
    }

    pub(super) fn remove_data_peer(&mut self, index: PeerIndex, now: Instant) {
        self.handshakes.remove_peer(index, now);
        self.peers.remove(&index);
        if let Err(error) = self.datapath.remove_peer(index) {
            tracing::warn!("peer {index} was not removed from the data plane: {error:#}");
        }
    }

    pub(super) async fn handle_datagram(&mut self, datagram: Received, now: Instant) {
        if !self.datapath.may_receive_on(datagram.ifindex) {
            return tracing::trace!(
                ifindex = datagram.ifindex,
                "ignored a datagram from an interface that is not used"
            );
        }
        let authenticated = |node: &Self| {
            let counters = node.handshakes.counters();
            counters.initiations_answered + counters.responses_accepted
        };
        let before = authenticated(self);
        let (from, message) = if datagram.bytes.first() == Some(&TYPE_RELAY) {
            let Some(unwrapped) = self.unwrap_relayed(&datagram.bytes) else { return };
            unwrapped
        } else {
            (datagram.from, &datagram.bytes[..])
        };
        self.handshakes.handle_datagram(now, from, message);
        if authenticated(self) != before {
            // Packets of this peer arrive on this interface, so the eBPF programs must be attached
            // to it.
            self.datapath.try_underlay(datagram.ifindex).await;
        }
        self.pump_handshakes(now, Some((datagram.from, datagram.to))).await;
    }

    /// Carries out the decisions of the handshakes. `asked` holds the source and destination
    /// address of the datagram that is answered. The answer is sent from that destination address,
    /// because a firewall on the path accepts no other source.
    pub(super) async fn pump_handshakes(
        &mut self,
        now: Instant,
        asked: Option<(SocketAddr, IpAddr)>,
    ) {
        loop {
            while let Some(event) = self.handshakes.poll_event() {
                if let Err(error) = self.handle_handshake(event, now).await {
                    tracing::warn!(
                        "a handshake event cannot be applied to the data plane: {error:#}"
                    );
                }
            }
            let Some(transmit) = self.handshakes.poll_transmit() else { return };
            if self.send_relayed(&transmit).await {
                continue;
            }
            let from = asked.filter(|(asker, _)| *asker == transmit.to).map(|(_, address)| address);
            if let Err(error) = self.udp.send(transmit.to, from, &transmit.bytes).await {
                tracing::debug!("a handshake message to {} was not sent: {error}", transmit.to);
            }
        }
    }

    async fn handle_handshake(&mut self, event: Event, now: Instant) -> anyhow::Result<()> {
        match event {
            Event::Install { peer, session } => {
                // After a restart, a daemon ends the sessions of a peer that it does not know or
                // whose key differs. So the peer's record must be on disk first.
                if let Some(id) = peer.node().filter(|id| self.unsaved.contains(id)) {
                    self.save_peers(Some(id));
                }
                self.datapath.install_session(peer, &session)?;
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.last_error = None;
                }
                tracing::debug!("installed a session with peer {peer}");
            }
            Event::Withdraw { peer, local_index } => {
                self.datapath.withdraw_session(peer, local_index)?
            }
            Event::SendKeepalive { peer } => self.datapath.keepalive(peer).await?,
            // A relayed message does not reveal its sender's address.
            Event::EndpointChanged { endpoint, .. } if stood_for(endpoint).is_some() => {}
            Event::EndpointChanged { peer, endpoint } => {
                let Some(known) = self.peers.get_mut(&peer) else { return Ok(()) };
                known.prefer(endpoint);
                known.is_chosen = false;
                let public_key = known.public_key;
                self.datapath.set_peer(peer, &public_key, Some(endpoint)).await?;
            }
            Event::Failed { peer, why } => {
                tracing::debug!("no session with peer {peer}: {why}");
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.last_error = Some((why.to_string(), now));
                }
            }
        }
        Ok(())
    }

    /// Passes the observations of the eBPF programs to the handshakes.
    pub(super) fn read_maps(&mut self, now: Instant) {
        let states = match self.datapath.peers() {
            Ok(states) => states,
            Err(error) => return tracing::warn!("the eBPF maps cannot be read: {error:#}"),
        };
        for state in states {
            let index = state.index;
            for session in &state.sessions {
                if !session.initiator && session.confirmed {
                    self.handshakes.handle_confirmed(index, session.local_index, now);
                }
            }
            let activity = Activity {
                last_data_sent: state.last_data_sent,
                last_sent: state.last_sent,
                last_data_received: state.last_data_received,
                last_received: state.last_received,
                endpoint: state.endpoint,
            };
            self.handshakes.handle_activity(index, &activity);
            if let Some(peer) = self.peers.get_mut(&index) {
                peer.state = Some(state);
            }
        }
        self.follow_sessions(now);
        self.watch_sessions(now);
        self.note_reachability(now);
        self.paths_changed = true;
    }

    /// Tries the next address of peers that do not answer.
    pub(super) async fn try_elsewhere(&mut self, now: Instant) {
        let mut moved = Vec::new();
        for (&index, peer) in &mut self.peers {
            let is_chosen = std::mem::take(&mut peer.is_chosen);
            if peer.has_session(now) {
                continue;
            }
            if !is_chosen {
                if peer.candidates.len() < 2 || now < peer.tried_since + PATIENCE {
                    continue;
                }
                peer.candidate = (peer.candidate + 1) % peer.candidates.len();
            }
            peer.tried_since = now;
            moved.extend(peer.endpoint().map(|endpoint| (index, peer.public_key, endpoint)));
        }
        for (index, public_key, endpoint) in moved {
            self.handshakes.set_endpoint(index, endpoint);
            // The handshakes follow the endpoint in the maps, and the messages of the coming
            // session are sent there.
            if let Err(error) = self.datapath.set_peer(index, &public_key, Some(endpoint)).await {
                tracing::warn!("peer {index} cannot be tried at {endpoint}: {error:#}");
            }
        }
    }

    /// Publishes the addresses where nodes are expected, for the receivers of traffic.
    pub(super) fn refresh_known(&self) {
        let mut addresses: HashSet<IpAddr> =
            self.streams.values().map(|stream| stream.remote.ip()).collect();
        for peer in self.peers.values() {
            addresses.extend(peer.candidates.iter().map(SocketAddr::ip));
            let endpoint = peer.state.as_ref().and_then(|state| state.endpoint);
            addresses.extend(endpoint.map(|endpoint| endpoint.ip()));
        }
        self.known.set(addresses);
    }

    /// Handles a new control connection with a node at this address. If there is no session with
    /// the node, tries to establish one at this address now.
    pub(super) fn heard_at(&mut self, index: PeerIndex, ip: IpAddr, now: Instant) {
        let place = SocketAddr::new(ip, DATA_PORT);
        match self.peers.get_mut(&index) {
            Some(peer) if !peer.has_session(now) && peer.endpoint() != Some(place) => {
                peer.prefer(place)
            }
            Some(_) | None => self.handshakes.retry(index),
        }
    }

    fn note_reachability(&mut self, now: Instant) {
        self.refresh_live_nodes();
        let ids: Vec<_> = self.gossip.records().map(|record| record.id).collect();
        for id in ids {
            let reachable = id == self.identity.id || self.gossip.paths().contains_key(&id);
            match self.reachable.get(&id) {
                Some((known, _)) if *known == reachable => {}
                before => {
                    // The arrival of a node and its departure for good are reported elsewhere.
                    if before.is_some() && self.peers.contains_key(&id.peer_index()) {
                        self.tell(|node| {
                            let peer = node.peer_ref(id.peer_index());
                            if reachable {
                                EventKind::NodeReachable { peer }
                            } else {
                                EventKind::NodeUnreachable { peer }
                            }
                        });
                    }
                    self.reachable.insert(id, (reachable, now));
                }
            }
        }
    }

    /// Returns the addresses where a node may be, best first: the remote address of its control
    /// connection, then its announced addresses.
    fn candidates(&self, record: &Record) -> Vec<SocketAddr> {
        let connected = self.stream_to(record.id).map(|stream| stream.remote.ip());
        let mut candidates: Vec<SocketAddr> = Vec::new();
        for ip in connected.into_iter().chain(record.addresses.iter().map(SocketAddr::ip)) {
            let candidate = SocketAddr::new(ip, DATA_PORT);
            if is_of_a_host(ip) && !candidates.contains(&candidate) {
                candidates.push(candidate);
            }
        }
        candidates
    }

    /// Updates the inputs of the routing other than the records. None of them is urgent.
    pub(super) fn tell_routing_of_paths(&mut self, now: Instant) {
        // Static addresses in use here are routed here. This includes addresses that this node does
        // not announce because another node keeps them.
        let range = self.identity.network.range;
        let in_use: Vec<IpAddr> = self
            .ipam
            .allocated()
            .keys()
            .copied()
            .filter(|address| !range.contains(address))
            .collect();
        self.routing.set_own(&self.ipam.ranges(), &in_use);
        self.routing
            .set_reclaimed(self.ipam.reclaimed().map(|(id, incarnation, _)| (id, incarnation)));
        self.routing.set_reachable(self.gossip.paths().keys(), now);
    }

    /// Applies the routes that nodes announce to the data plane, as far as the addresses belong to
    /// them. Removes nodes whose address space was reclaimed.
    pub(super) fn follow_routes(&mut self, now: Instant) {
        if !self.routing.update(now) {
            return;
        }
        let nodes = self.peers.keys().filter_map(|index| index.node());
        for id in nodes.filter(|id| self.routing.is_reclaimed(*id)).collect::<Vec<_>>() {
            tracing::info!(
                "the address space of node {id} was reclaimed: removing the node from the data \
                 plane"
            );
            self.remove_data_peer(id.peer_index(), now);
        }
        let mut changed = Vec::new();
        for (index, peer) in &mut self.peers {
            let Some(routes) = index.node().map(|id| self.routing.routes(id)) else { continue };
            if peer.routes != routes {
                peer.routes = routes.to_vec();
                changed.push((*index, routes));
            }
        }
        if let Err(error) = self.datapath.set_routes_of(changed) {
            tracing::warn!("the routes to other nodes cannot be installed: {error:#}");
        }
    }

    /// Describes a conflict of addresses that two nodes announce.
    pub(super) fn conflict(&self, conflict: &Conflict) -> String {
        let name = |id: NodeId| match self.gossip.record(id) {
            Some(record) => format!("node {id} ({})", record.nickname),
            None => format!("node {id}"),
        };
        let (holder, claimant) = (name(conflict.holder), name(conflict.claimant));
        let prefixes: Vec<_> = conflict.prefixes.iter().map(ToString::to_string).collect();
        let more = match conflict.count.saturating_sub(prefixes.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!(
            "{claimant} announces {}{more}, which belongs to {holder} (packets still go there): \
             on the host that should not have it, run `overnode reset` or detach the containers \
             that use it",
            prefixes.join(", ")
        )
    }

    pub(super) fn own_routes(&self) -> Vec<IpNet> {
        let mut routes = self.ipam.ranges();
        routes.push(self.ipam.layout().node_address(self.identity.id).into());
        routes
    }
}

/// Whether `ip` can be the address of another host.
fn is_of_a_host(ip: IpAddr) -> bool {
    let is_broadcast = ip == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_broadcast)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_not_tried_at_addresses_that_no_host_can_have() {
        for ip in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "ff02::1"] {
            assert!(!is_of_a_host(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["192.0.2.1", "10.0.0.255", "2001:db8::1", "fe80::1"] {
            assert!(is_of_a_host(ip.parse().unwrap()), "{ip}");
        }
    }
}
