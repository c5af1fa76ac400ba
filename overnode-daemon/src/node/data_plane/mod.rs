//! What carries packets: peers and their sessions, the paths to them, and the routes of container
//! addresses, as the maps of the eBPF programs hold them.
//!
//! [`DataPlane`] turns records and handshakes into peers, sessions and routes. It asks nothing of
//! the other parts of the node: what it needs of them is an argument, and what they need to know is
//! an [`Effect`].

pub(super) mod arrivals;
mod external;
pub(super) mod paths;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use overnode_ebpf::wire::{DATA_PORT, TYPE_RELAY};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::local::LocalNode;
use crate::api::Path;
use crate::datapath::{Datapath, PeerState};
use crate::net::known::Known;
use crate::net::udp::{Received, UdpSockets};
use crate::store::ExternalPeer;
use overnode_core::control::key;
use overnode_core::gossip::Record;
use overnode_core::handshake::{
    Activity, Event, Handshakes, InheritedSession, Initiate, PeerConfig, Transmit,
};
use overnode_core::ipam::Ipam;
use overnode_core::path::Paths;
use overnode_core::routing::Routing;
use overnode_types::{NodeId, PeerIndex, PublicKey, Secret};

use paths::RelayRoutes;

/// How long a handshake is tried at one address of a peer before the next address is tried.
const TRY_NEXT_AFTER: Duration = Duration::from_secs(7);
/// Maximum number of addresses tried per peer: those of its record and those that it was heard at.
const MAX_CANDIDATES: usize = 32;

/// The peers, their sessions and paths, and the kernel objects that carry them.
pub(super) struct DataPlane {
    local: Arc<LocalNode>,
    pub(super) datapath: Datapath,
    udp: Arc<UdpSockets>,
    pub(super) handshakes: Handshakes,
    peers: BTreeMap<PeerIndex, DataPeer>,
    externals: BTreeMap<PeerIndex, ExternalPeer>,
    pub(super) paths: Paths,
    pub(super) relay_routes: RelayRoutes,
    pub(super) routing: Routing,
    /// Addresses where nodes are expected, for the receivers of traffic.
    known: Known,
    /// Peers that had a session when the maps were read last.
    with_session: BTreeSet<PeerIndex>,
    effects: VecDeque<Effect>,
}

/// A decision of the data plane that another part of the node carries out.
#[derive(Debug)]
pub(super) enum Effect {
    /// Tell the cluster which neighbors have no direct path from here.
    NoDirectPath(BTreeSet<NodeId>),
    /// Monitors show this event of a peer.
    Report(PeerIndex, PeerEvent),
}

/// An event of a peer.
#[derive(Debug)]
pub(super) enum PeerEvent {
    /// The node is new.
    Appeared,
    /// Packets can be sealed for the peer from now on.
    SessionEstablished,
    /// There is no session any more. Contains why the last handshake failed, if one did.
    SessionLost(Option<String>),
    /// The direct path started or stopped working.
    DirectPath {
        works: bool,
        /// The largest inner packet, in bytes.
        mtu: u32,
    },
    /// Packets take another path. `None`: no path is known.
    PathChanged(Option<Path>),
}

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

    /// Makes `address` the candidate, adding it if it is not in the list.
    fn prefer(&mut self, address: SocketAddr) {
        self.candidate =
            self.candidates.iter().position(|it| *it == address).unwrap_or_else(|| {
                self.candidates.insert(0, address);
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
struct Wanted {
    public_key: PublicKey,
    preshared_key: Secret,
    candidates: Vec<SocketAddr>,
    initiate: Initiate,
    persistent_keepalive: Option<Duration>,
    /// `None` for a node, whose routes are decided together with those of all other nodes.
    routes: Option<Vec<IpNet>>,
}

impl DataPlane {
    pub(super) fn new(
        local: Arc<LocalNode>,
        datapath: Datapath,
        udp: Arc<UdpSockets>,
        handshakes: Handshakes,
        routing: Routing,
        known: Known,
    ) -> Self {
        Self {
            local,
            datapath,
            udp,
            handshakes,
            peers: BTreeMap::new(),
            externals: BTreeMap::new(),
            paths: Paths::new(StdRng::from_os_rng()),
            relay_routes: RelayRoutes::default(),
            routing,
            known,
            with_session: BTreeSet::new(),
            effects: VecDeque::new(),
        }
    }

    /// Returns the next decision, if any.
    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Returns when [`Self::handle_timeout`] must be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let timeouts = [
            self.handshakes.poll_timeout(),
            self.paths.poll_timeout(),
            self.routing.poll_timeout(),
        ];
        timeouts.into_iter().flatten().min()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.handshakes.handle_timeout(now, SystemTime::now());
        self.paths.handle_timeout(now);
    }

    fn report(&mut self, peer: PeerIndex, event: PeerEvent) {
        self.effects.push_back(Effect::Report(peer, event));
    }

    /// Returns all peers.
    pub(super) fn peers(&self) -> &BTreeMap<PeerIndex, DataPeer> {
        &self.peers
    }

    pub(super) fn is_peer(&self, id: NodeId) -> bool {
        self.peers.contains_key(&id.peer_index())
    }

    /// Returns whether there are session keys with a node.
    pub(super) fn has_session(&self, id: NodeId, now: Instant) -> bool {
        self.peers.get(&id.peer_index()).is_some_and(|peer| peer.has_session(now))
    }

    /// Reads the peers that an earlier daemon left in the maps. A peer with a session may have
    /// roamed since it announced its address. The session must be known before the peer is
    /// configured, or packets to the peer would be redirected to the announced address.
    pub(super) fn find_pinned(&mut self, now: Instant) -> anyhow::Result<Vec<PeerState>> {
        let pinned = self.datapath.peers()?;
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
        Ok(pinned)
    }

    /// Continues the sessions of an earlier daemon, and removes the peers that are not `wanted` any
    /// more. The caller reads the maps afterwards.
    pub(super) fn adopt_sessions(
        &mut self,
        pinned: Vec<PeerState>,
        wanted: &BTreeSet<PeerIndex>,
        now: Instant,
    ) {
        for state in pinned {
            if !wanted.contains(&state.index) {
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
    }

    /// Learns a node's new record. `remote` is the address of the control connection with the node.
    pub(super) async fn learn(&mut self, record: &Record, remote: Option<IpAddr>, now: Instant) {
        self.relay_routes.mark_stale();
        self.routing.learn(record);
        if !self.is_peer(record.id) && !self.routing.is_reclaimed(record.id) {
            self.report(record.id.peer_index(), PeerEvent::Appeared);
        }
        self.configure_peer(record, remote, now).await;
    }

    /// Removes a node that has left the cluster.
    pub(super) fn unlearn(&mut self, id: NodeId, record: Option<&Record>, now: Instant) {
        if let Some(record) = record {
            self.routing.learn(record);
        }
        self.paths.remove_peer(id);
        self.relay_routes.mark_stale();
        self.remove_data_peer(id.peer_index(), now);
    }

    /// Configures a node in the data plane from its record, unless its address space was reclaimed
    /// and it has not returned since.
    pub(super) async fn configure_peer(
        &mut self,
        record: &Record,
        remote: Option<IpAddr>,
        now: Instant,
    ) {
        let id = record.id;
        if self.routing.is_reclaimed(id) {
            return;
        }
        let wanted = Wanted {
            public_key: record.public_key,
            preshared_key: key::pair_key(
                self.local.cluster_key(),
                &self.local.public_key,
                &record.public_key,
            ),
            candidates: candidates(record, remote),
            initiate: self.local.initiative(id),
            persistent_keepalive: None,
            routes: None,
        };
        // A node that cannot be configured must not keep the others from being configured.
        if let Err(error) = self.configure(id.peer_index(), wanted, now).await {
            tracing::warn!("node {id} cannot be added to the data plane: {error:#}");
        }
    }

    async fn configure(
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

    fn remove_data_peer(&mut self, index: PeerIndex, now: Instant) {
        self.handshakes.remove_peer(index, now);
        self.peers.remove(&index);
        if let Err(error) = self.datapath.remove_peer(index) {
            tracing::warn!("peer {index} was not removed from the data plane: {error:#}");
        }
    }

    /// Handles a handshake message that the gate has admitted.
    pub(super) async fn handle_datagram(&mut self, datagram: &Received, now: Instant) {
        if !self.datapath.may_receive_on(datagram.ifindex) {
            return tracing::trace!(
                ifindex = %datagram.ifindex,
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
            (datagram.from.into(), &datagram.bytes[..])
        };
        self.handshakes.handle_datagram(now, from, message);
        if authenticated(self) != before {
            // Packets of this peer arrive on this interface, so the eBPF programs must be attached
            // to it.
            self.datapath.try_underlay(datagram.ifindex).await;
        }
    }

    /// Sends a message of the handshakes. `answering` holds the source and destination address of
    /// the datagram that is answered. The answer is sent from that destination address, because a
    /// firewall on the path accepts no other source.
    pub(super) async fn send(&self, transmit: &Transmit, answering: Option<(SocketAddr, IpAddr)>) {
        self.send_relayed(transmit).await;
        let Some(to) = transmit.to.direct() else { return };
        let from = answering.filter(|(sender, _)| *sender == to).map(|(_, address)| address);
        if let Err(error) = self.udp.send(to, from, &transmit.bytes).await {
            tracing::debug!("a handshake message to {to} was not sent: {error}");
        }
    }

    /// Applies an event of the handshakes to the kernel's maps.
    pub(super) async fn apply(&mut self, event: Event, now: Instant) {
        if let Err(error) = self.try_apply(event, now).await {
            tracing::warn!("a handshake event cannot be applied to the data plane: {error:#}");
        }
    }

    async fn try_apply(&mut self, event: Event, now: Instant) -> anyhow::Result<()> {
        match event {
            Event::Install { peer, session } => {
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
        self.report_sessions(now);
    }

    /// Reports sessions that were established or lost.
    fn report_sessions(&mut self, now: Instant) {
        let with_session: BTreeSet<PeerIndex> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.has_session(now))
            .map(|(index, _)| *index)
            .collect();
        let before = std::mem::replace(&mut self.with_session, with_session.clone());
        for index in with_session.difference(&before) {
            self.report(*index, PeerEvent::SessionEstablished);
        }
        for index in before.difference(&with_session) {
            let last_error = self.peers.get(index).and_then(|peer| peer.last_error.as_ref());
            let why = last_error.map(|(why, _)| why.clone());
            self.report(*index, PeerEvent::SessionLost(why));
        }
    }

    /// Tries the next address of peers that do not answer.
    pub(super) async fn try_next_addresses(&mut self, now: Instant) {
        let mut moved = Vec::new();
        for (&index, peer) in &mut self.peers {
            let is_chosen = std::mem::take(&mut peer.is_chosen);
            if peer.has_session(now) {
                continue;
            }
            if !is_chosen {
                if peer.candidates.len() < 2 || now < peer.tried_since + TRY_NEXT_AFTER {
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
    pub(super) fn refresh_known(&self, connected: impl Iterator<Item = IpAddr>) {
        let mut addresses: HashSet<IpAddr> = connected.collect();
        for peer in self.peers.values() {
            addresses.extend(peer.candidates.iter().map(SocketAddr::ip));
            let endpoint = peer.state.as_ref().and_then(|state| state.endpoint);
            addresses.extend(endpoint.map(|endpoint| endpoint.ip()));
        }
        self.known.set(addresses);
    }

    /// Handles a new control connection with a node at this address. If there is no session with
    /// the node, tries to establish one at this address now.
    pub(super) fn try_address(&mut self, index: PeerIndex, ip: IpAddr, now: Instant) {
        let address = SocketAddr::new(ip, DATA_PORT);
        match self.peers.get_mut(&index) {
            Some(peer) if !peer.has_session(now) && peer.endpoint() != Some(address) => {
                peer.prefer(address)
            }
            Some(_) | None => self.handshakes.retry(index),
        }
    }

    /// Updates the inputs of the routing other than the records. None of them is urgent.
    pub(super) fn update_routing<'a>(
        &mut self,
        ipam: &Ipam,
        reachable: impl Iterator<Item = &'a NodeId>,
        now: Instant,
    ) {
        // Static addresses in use here are routed here. This includes addresses that this node does
        // not announce because another node keeps them.
        let range = self.local.identity.network.range;
        let in_use: Vec<IpAddr> =
            ipam.allocated().keys().copied().filter(|address| !range.contains(address)).collect();
        self.routing.set_own(&ipam.ranges(), &in_use);
        self.routing.set_reclaimed(ipam.reclaimed().map(|(id, incarnation, _)| (id, incarnation)));
        self.routing.set_reachable(reachable, now);
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
}

/// Returns the addresses where a node may be, best first: the remote address of its control
/// connection, then its announced addresses.
fn candidates(record: &Record, remote: Option<IpAddr>) -> Vec<SocketAddr> {
    let mut candidates: Vec<SocketAddr> = Vec::new();
    for ip in remote.into_iter().chain(record.addresses.iter().map(SocketAddr::ip)) {
        let candidate = SocketAddr::new(ip, DATA_PORT);
        if is_of_a_host(ip) && !candidates.contains(&candidate) {
            candidates.push(candidate);
        }
    }
    candidates
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
