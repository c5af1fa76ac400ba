//! The control plane: gossip, the control connections that carry it, and the dialing of nodes.
//!
//! [`ControlPlane`] takes the events of the mesh and returns [`Effect`]s for the rest of the node.
//! It owns no socket: an established connection is an [`Outbox`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::local::LocalNode;
use crate::api::{ApiError, EventKind, Host, PeerRef};
use crate::net::mesh::{DialFailure, LiveNodes, MeshEvent, Opened, Outbox, StreamId};
use crate::store::{Known, Store};
use overnode_core::control::CONTROL_PORT;
use overnode_core::control::dial::{self, AttemptId, DialTarget, Dialer, Verdict};
use overnode_core::control::hello::Refusal;
use overnode_core::control::packet::Packet;
use overnode_core::gossip::{self, Gossip, Record, RoutedMessage, budget};
use overnode_core::routing::Routing;
use overnode_types::NodeId;

/// Maximum number of new records passed to the other parts of the node in one turn.
const LEARN_AT_ONCE: usize = 64;
/// Size of records written to disk in one transaction, in bytes as they take in memory.
const SAVE_AT_ONCE: usize = 4 << 20;
/// How long a node must have been reachable through other nodes before it counts as reachable.
const REACHABLE_AFTER: Duration = Duration::from_millis(900);

/// Gossip, the control connections, and the dialer.
pub(super) struct ControlPlane {
    local: Arc<LocalNode>,
    pub(super) gossip: Gossip,
    pub(super) dialer: Dialer,
    streams: BTreeMap<StreamId, Stream>,
    /// Shared with the mesh, which refuses peers that claim the ID of another node.
    live_nodes: LiveNodes,
    /// Whether each node is reachable, and since when.
    reachable: BTreeMap<NodeId, (bool, Instant)>,
    /// Nodes that ended their last connection themselves, and when.
    closed_by_peer: BTreeMap<NodeId, Instant>,
    /// Nodes whose records are newer than those on disk.
    unsaved: BTreeSet<NodeId>,
    /// Nodes whose records are new and not yet passed to the other parts of the node.
    unprocessed_records: BTreeSet<NodeId>,
    incarnation: u64,
    /// Whether reachability may have changed, for example because a connection opened or closed.
    paths_changed: bool,
    effects: VecDeque<Effect>,
}

/// A decision of the control plane that another part of the node carries out.
#[derive(Debug)]
pub(super) enum Effect {
    /// Dial a node.
    Dial(AttemptId, DialTarget),
    /// A control connection with a node at this address was established.
    Connected(NodeId, IpAddr),
    /// A control connection has ended.
    Disconnected,
    /// A node's record is new or has changed.
    Learned(Box<Record>),
    /// A node has left the cluster. Contains its last record, if it is still known.
    Left(NodeId, Option<Box<Record>>),
    /// A routed message for this node has arrived.
    Deliver(RoutedMessage),
    /// Two hosts use this ID. Contains a description.
    IdClash(NodeId, String),
    /// Gossip had to raise this node's incarnation.
    IncarnationRaised(u64),
    /// Monitors show this event.
    Report(EventKind),
}

/// An established control connection. The dialer holds the status that operators see.
struct Stream {
    connection: dial::ConnectionId,
    peer: NodeId,
    remote: SocketAddr,
    local: SocketAddr,
    rtt: Option<Duration>,
    /// When the last answered ping was sent. Everything that the other end had sent before then has
    /// arrived.
    in_step: Option<Instant>,
    outbox: Outbox,
}

impl ControlPlane {
    pub(super) fn new(
        local: Arc<LocalNode>,
        gossip: Gossip,
        dialer: Dialer,
        live_nodes: LiveNodes,
    ) -> Self {
        Self {
            incarnation: local.identity.incarnation,
            local,
            gossip,
            dialer,
            streams: BTreeMap::new(),
            live_nodes,
            reachable: BTreeMap::new(),
            closed_by_peer: BTreeMap::new(),
            unsaved: BTreeSet::new(),
            unprocessed_records: BTreeSet::new(),
            paths_changed: true,
            effects: VecDeque::new(),
        }
    }

    /// Returns the next decision, if any.
    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Returns when [`Self::handle_timeout`] must be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        // Due at once: the remaining records are learned after the inputs that arrived meanwhile.
        let unprocessed = (!self.unprocessed_records.is_empty()).then_some(self.local.started);
        [self.gossip.poll_timeout(), self.dialer.poll_timeout(), unprocessed]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.gossip.handle_timeout(now);
        self.dialer.handle_timeout(now);
    }

    /// Returns whether reachability may have changed since the last call.
    pub(super) fn take_paths_changed(&mut self) -> bool {
        std::mem::take(&mut self.paths_changed)
    }

    pub(super) fn handle_mesh(&mut self, event: MeshEvent, now: Instant) {
        match event {
            MeshEvent::Opened(opened) => self.opened(*opened, now),
            MeshEvent::Received(id, bytes) => self.received(id, &bytes, now),
            MeshEvent::RoutedMessage(id, bytes) => self.routed_received(id, &bytes, now),
            MeshEvent::RoundTrip(id, rtt) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.rtt = Some(rtt);
                    stream.in_step = now.checked_sub(rtt);
                }
            }
            MeshEvent::Closed(id, why) if why.is_misconduct() => self.cut_off(id, &why, now),
            MeshEvent::Closed(id, why) => {
                if let Some(stream) = self.streams.get(&id)
                    && why.is_closed_by_peer()
                {
                    self.closed_by_peer.insert(stream.peer, now);
                }
                self.close(id, &why.to_string(), now);
            }
            MeshEvent::Resolved(attempt, addresses) => {
                self.dialer.handle_resolved(attempt, &addresses)
            }
            MeshEvent::DialFailed(attempt, failure) => self.dial_failed(attempt, &failure, now),
            MeshEvent::Refused { remote, refusal } => {
                tracing::debug!("refused a connection from {remote}: {refusal}");
                self.dialer.handle_refused(remote, &refusal, now);
            }
        }
    }

    /// Returns the stream that is used for messages to a node.
    fn stream_to(&self, peer: NodeId) -> Option<&Stream> {
        let connection = self.dialer.connection(peer)?;
        self.streams.values().find(|stream| stream.connection == connection)
    }

    fn opened(&mut self, opened: Opened, now: Instant) {
        let peer = opened.hello.id;
        let identity = opened.hello.verifying_key;
        let (connection, verdict) =
            self.dialer.handle_established(opened.attempt, &opened.hello, opened.remote, now);
        // Dropping the outbox closes the stream.
        let Verdict::Keep { is_first } = verdict else { return };
        let Opened { hello, remote, version, .. } = &opened;
        tracing::info!(
            "connected with node {peer} ({}) at {remote}, protocol {version}",
            hello.nickname
        );
        let (remote, name) = (*remote, hello.nickname.clone());
        let stream = Stream {
            connection,
            peer,
            remote: opened.remote,
            local: opened.local,
            rtt: None,
            in_step: None,
            outbox: opened.outbox,
        };
        self.streams.insert(opened.id, stream);
        self.report(EventKind::Connected {
            peer: PeerRef { id: Some(peer), name: Some(name), ..PeerRef::default() },
            remote,
        });
        self.paths_changed = true;
        // Update this before the next connection arrives. Gossip will report the same shortly.
        self.live_nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(peer, (opened.hello.public_key, opened.hello.nickname));
        if is_first {
            self.gossip.handle_connected(peer, identity, now);
        } else {
            self.gossip.resync(peer);
        }
        self.announce_addresses(now);
        self.effects.push_back(Effect::Connected(peer, opened.remote.ip()));
    }

    fn report(&mut self, event: EventKind) {
        self.effects.push_back(Effect::Report(event));
    }

    /// Returns the names of a node.
    pub(super) fn peer_ref(&self, id: NodeId) -> PeerRef {
        let name = self.gossip.record(id).map(|record| record.nickname.clone());
        PeerRef { id: Some(id), public_key: None, name }
    }

    fn received(&mut self, id: StreamId, bytes: &[u8], now: Instant) {
        let Some(peer) = self.streams.get(&id).map(|stream| stream.peer) else { return };
        if let Err(error) = self.gossip.handle_message(peer, bytes, now) {
            self.cut_off(id, &Refusal::Misconduct(error.to_string()), now);
        }
    }

    fn routed_received(&mut self, id: StreamId, bytes: &[u8], now: Instant) {
        let Some(peer) = self.streams.get(&id).map(|stream| stream.peer) else { return };
        match self.gossip.handle_routed(peer, bytes, now) {
            Ok(None) => {}
            Ok(Some(why)) => {
                tracing::debug!("a routed message from node {peer} was not forwarded: {why}")
            }
            Err(error) => {
                self.cut_off(id, &Refusal::Misconduct(error.to_string()), now);
            }
        }
    }

    /// Closes a connection whose other end did something that no honest node does. Also records the
    /// refusal, because an incoming connection would otherwise leave no trace in the status.
    fn cut_off(&mut self, id: StreamId, why: &Refusal, now: Instant) {
        let Some(stream) = self.streams.get(&id) else { return };
        tracing::warn!(
            "closing the connection with node {} at {}: {why}",
            stream.peer,
            stream.remote
        );
        let remote = stream.remote;
        self.close(id, &why.to_string(), now);
        self.dialer.handle_refused(remote, why, now);
    }

    fn close(&mut self, id: StreamId, why: &str, now: Instant) {
        let Some(stream) = self.streams.remove(&id) else { return };
        self.effects.push_back(Effect::Disconnected);
        self.paths_changed = true;
        tracing::info!(
            "the connection with node {} at {} ended: {why}",
            stream.peer,
            stream.remote
        );
        let Stream { peer, remote, .. } = stream;
        self.report(EventKind::Disconnected {
            peer: self.peer_ref(peer),
            remote,
            why: why.to_owned(),
        });
        match self.dialer.handle_lost(stream.connection, why, now) {
            Some((peer, true)) => {
                self.gossip.handle_disconnected(peer, now);
                self.refresh_live_nodes();
            }
            Some((peer, false)) => self.gossip.resync(peer),
            None => {}
        }
    }

    fn dial_failed(&mut self, attempt: AttemptId, failure: &DialFailure, now: Instant) {
        tracing::debug!("dialing failed: {failure}");
        match failure {
            DialFailure::Refused(refusal) => self.dialer.handle_failed(attempt, refusal, now),
            DialFailure::Unresolved(_) | DialFailure::Unreachable(..) => {
                self.dialer.handle_unresolved(attempt, &failure.to_string(), now);
            }
        }
    }

    /// Announces the addresses that this node's connections use. New ones come first, because their
    /// number is limited.
    fn announce_addresses(&mut self, now: Instant) {
        let mut addresses: Vec<SocketAddr> =
            self.streams.values().map(|it| SocketAddr::new(it.local.ip(), CONTROL_PORT)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        self.gossip.update_own(
            |own| {
                for address in addresses {
                    if !own.addresses.contains(&address) {
                        own.addresses.insert(0, address);
                    }
                }
            },
            now,
        );
    }

    /// Turns the actions of gossip into messages and effects.
    pub(super) fn pump_gossip(&mut self, now: Instant) {
        while let Some(action) = self.gossip.poll_action() {
            match action {
                gossip::Action::Send { to, message } => {
                    self.send(to, &Packet::Gossip(message.encode()), now);
                }
                gossip::Action::SendRouted { to, routed } => {
                    self.send(to, &Packet::RoutedMessage(routed.encode()), now);
                }
                gossip::Action::Deliver(routed) => {
                    // The message may depend on its sender's record.
                    if self.unprocessed_records.remove(&routed.from) {
                        self.learn(routed.from, now);
                    }
                    self.effects.push_back(Effect::Deliver(routed));
                }
                gossip::Action::Changed(id) => _ = self.unprocessed_records.insert(id),
                gossip::Action::Removed(id) => {
                    self.unprocessed_records.remove(&id);
                    self.unlearn(id);
                }
                gossip::Action::Contested(record) => {
                    let id = self.local.id();
                    self.report_clash(&record, self.local.identity.nickname.clone(), now);
                    let problem = if record.public_key == self.local.public_key {
                        Refusal::Copy(id).to_string()
                    } else {
                        format!(
                            "another host ({}, key {}) was launched with this node's ID {id}: \
                             run `overnode reset` on one of the two, then launch it with an ID \
                             of its own",
                            record.nickname, record.public_key
                        )
                    };
                    self.effects.push_back(Effect::IdClash(id, problem));
                }
                gossip::Action::Clash { record, holder } => self.report_clash(&record, holder, now),
            }
        }
        // One message may bring thousands of records. Learn some now, and the rest after other
        // work.
        for _ in 0..LEARN_AT_ONCE {
            let Some(id) = self.unprocessed_records.pop_first() else { break };
            self.learn(id, now);
        }
        self.check_incarnation();
    }

    /// Notices that gossip had to raise the node's incarnation. The next start must use a later
    /// one.
    fn check_incarnation(&mut self) {
        let incarnation = self.gossip.own().incarnation;
        if incarnation > self.incarnation {
            self.incarnation = incarnation;
            self.effects.push_back(Effect::IncarnationRaised(incarnation));
        }
    }

    /// Reports two hosts with one ID that gossip has noticed, in the way in which a refused
    /// connection of the second host would be shown.
    fn report_clash(&mut self, record: &gossip::Record, holder: String, now: Instant) {
        let newcomer = record.nickname.clone();
        let refusal = if record.public_key == self.local.public_key {
            Refusal::Copy(record.id)
        } else {
            Refusal::IdClash { id: record.id, holder, newcomer }
        };
        if let Some(address) = record.addresses.first() {
            self.dialer.handle_refused(*address, &refusal, now);
        }
        if record.id != self.local.id() {
            self.effects.push_back(Effect::IdClash(record.id, refusal.to_string()));
        }
    }

    /// Stores the records of other nodes, `first` before all others, so that they are known
    /// immediately after a restart. Each transaction waits for the disk, so changes are collected,
    /// and a large number is split over several calls.
    pub(super) fn save_peers(&mut self, store: &Store, routing: &Routing, first: Option<NodeId>) {
        let (mut known, mut bytes) = (Vec::new(), 0);
        let rest = self.unsaved.iter().copied().filter(|id| Some(*id) != first);
        for id in first.into_iter().chain(rest) {
            let Some(record) = self.gossip.record(id).cloned() else { continue };
            bytes += budget::weight(&record);
            let standing = routing.standing(id).collect();
            known.push(Known { record, was_reached: self.gossip.was_reached(id), standing });
            if bytes >= SAVE_AT_ONCE {
                break;
            }
        }
        if known.is_empty() {
            return;
        }
        match store.set_peers(&known) {
            Ok(()) => known.iter().for_each(|known| _ = self.unsaved.remove(&known.record.id)),
            Err(error) => tracing::warn!("the records of other nodes were not stored: {error}"),
        }
    }

    fn send(&mut self, to: NodeId, packet: &Packet, now: Instant) {
        let Some(connection) = self.dialer.connection(to) else { return };
        let Some((&id, stream)) =
            self.streams.iter().find(|(_, stream)| stream.connection == connection)
        else {
            return;
        };
        if !stream.outbox.send(packet) {
            self.close(id, "the other side does not read its messages", now);
        }
    }

    fn learn(&mut self, id: NodeId, now: Instant) {
        let Some(record) = self.gossip.record(id).cloned() else { return };
        self.unsaved.insert(id);
        self.paths_changed = true;
        self.dialer.learn(id, record.addresses.clone(), now);
        self.effects.push_back(Effect::Learned(Box::new(record)));
    }

    fn unlearn(&mut self, id: NodeId) {
        tracing::info!("node {id} has left the cluster");
        self.report(EventKind::NodeLeft { peer: self.peer_ref(id) });
        self.dialer.unlearn(id);
        self.unsaved.insert(id);
        self.paths_changed = true;
        let record = self.gossip.record(id).cloned().map(Box::new);
        self.effects.push_back(Effect::Left(id, record));
    }

    /// Whether the record of a node on disk is older than the one in memory.
    pub(super) fn is_unsaved(&self, id: NodeId) -> bool {
        self.unsaved.contains(&id)
    }

    /// Finds out which nodes became reachable or unreachable. `is_peer` tells whether the data
    /// plane knows a node.
    pub(super) fn note_reachability(&mut self, is_peer: impl Fn(NodeId) -> bool, now: Instant) {
        self.refresh_live_nodes();
        self.paths_changed = true;
        let ids: Vec<_> = self.gossip.records().map(|record| record.id).collect();
        for id in ids {
            let reachable = id == self.local.id() || self.gossip.paths().contains_key(&id);
            match self.reachable.get(&id) {
                Some((known, _)) if *known == reachable => {}
                before => {
                    // The arrival of a node and its departure for good are reported elsewhere.
                    if before.is_some() && is_peer(id) {
                        let peer = self.peer_ref(id);
                        self.report(if reachable {
                            EventKind::NodeReachable { peer }
                        } else {
                            EventKind::NodeUnreachable { peer }
                        });
                    }
                    self.reachable.insert(id, (reachable, now));
                }
            }
        }
    }

    /// Returns whether gossip reaches a node, and since when that is so.
    pub(super) fn reach(&self, id: NodeId) -> Option<(bool, Instant)> {
        self.reachable.get(&id).copied()
    }

    /// Returns the nodes that are reliably reachable. Information about distant nodes may be
    /// outdated for a moment after a partition, until the records are compared.
    pub(super) fn steadily_reachable(&self, now: Instant) -> BTreeSet<NodeId> {
        let is_steady = |id: &NodeId| {
            self.reach(*id)
                .is_some_and(|(reachable, since)| reachable && now >= since + REACHABLE_AFTER)
        };
        let paths = self.gossip.paths().iter();
        paths.filter(|(id, path)| path.hops == 1 || is_steady(id)).map(|(id, _)| *id).collect()
    }

    /// Returns the addresses at the other ends of all control connections.
    pub(super) fn remote_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.streams.values().map(|stream| stream.remote.ip())
    }

    /// Returns the address at the other end of the connection with a node.
    pub(super) fn remote_of(&self, id: NodeId) -> Option<IpAddr> {
        self.stream_to(id).map(|stream| stream.remote.ip())
    }

    /// Returns the nodes that have ended their connections themselves since `then`. Their daemons
    /// restart, while packets still reach their containers.
    pub(super) fn closed_by_peer_since(&self, then: Instant) -> impl Iterator<Item = NodeId> {
        self.closed_by_peer.iter().filter(move |(_, at)| **at >= then).map(|(id, _)| *id)
    }

    /// Returns the round-trip time of the connection with a node.
    pub(super) fn rtt(&self, id: NodeId) -> Option<Duration> {
        self.stream_to(id)?.rtt
    }

    /// Returns the nodes at the other ends of all control connections.
    pub(super) fn neighbors(&self) -> BTreeSet<NodeId> {
        self.streams.values().map(|stream| stream.peer).collect()
    }

    /// Returns the time up to which everything that a neighbor has sent has arrived here, or `None`
    /// if no ping to it was answered yet.
    pub(super) fn in_step(&self) -> BTreeMap<NodeId, Option<Instant>> {
        let in_use = self
            .streams
            .values()
            .filter(|it| self.dialer.connection(it.peer) == Some(it.connection));
        in_use.map(|it| (it.peer, it.in_step)).collect()
    }

    /// Publishes the nodes that this node has a connection with but no direct path to.
    pub(super) fn set_no_direct_path(&mut self, nodes: BTreeSet<NodeId>, now: Instant) {
        if !self.gossip.own().no_direct_path.iter().eq(&nodes) {
            self.gossip.update_own(|own| own.no_direct_path = nodes.into_iter().collect(), now);
        }
    }

    pub(super) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Updates the IDs in use by live nodes, which incoming connections are checked against.
    fn refresh_live_nodes(&self) {
        let living = self.gossip.living();
        let living = living.map(|record| (record.id, (record.public_key, record.nickname.clone())));
        *self.live_nodes.lock().unwrap_or_else(PoisonError::into_inner) = living.collect();
    }

    /// Turns the actions of the dialer into effects.
    pub(super) fn pump_dialer(&mut self) {
        while let Some(action) = self.dialer.poll_action() {
            match action {
                dial::Action::Dial { attempt, place } => {
                    self.effects.push_back(Effect::Dial(attempt, place))
                }
                dial::Action::Close(connection) => {
                    let of = |stream: &Stream| stream.connection == connection;
                    let closed = self.streams.extract_if(.., |_, stream| of(stream));
                    for (_, Stream { peer, remote, .. }) in closed.collect::<Vec<_>>() {
                        self.report(EventKind::Disconnected {
                            peer: self.peer_ref(peer),
                            remote,
                            why: "it is no longer needed".to_owned(),
                        });
                    }
                }
            }
        }
    }

    /// Dials these targets instead of the present ones. All are dialed at once, including present
    /// ones, because that is what `connect` asks for.
    pub(super) fn replace_targets(&mut self, targets: &[Host], now: Instant) {
        let names: Vec<String> = targets.iter().map(Host::to_string).collect();
        self.dialer.replace_targets(&names, now);
    }
}

/// Returns the targets of this node.
pub(super) fn targets(store: &Store) -> Result<Vec<Host>, ApiError> {
    let names = store.targets().map_err(ApiError::failed)?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

/// Adds targets or replaces the present ones. Returns all targets.
pub(super) fn add_targets(
    store: &Store,
    hosts: Vec<Host>,
    replace: bool,
) -> Result<Vec<Host>, ApiError> {
    need_hosts(&hosts)?;
    let mut targets = if replace { Vec::new() } else { targets(store)? };
    for host in hosts {
        if !targets.contains(&host) {
            targets.push(host);
        }
    }
    save_targets(store, targets)
}

/// Removes targets, none if one of them is unknown. Returns the remaining targets.
pub(super) fn remove_targets(store: &Store, hosts: Vec<Host>) -> Result<Vec<Host>, ApiError> {
    need_hosts(&hosts)?;
    let mut targets = targets(store)?;
    for host in hosts {
        let Some(position) = targets.iter().position(|target| *target == host) else {
            return Err(ApiError::missing(format_args!(
                "{host} is not a target of this node: nothing was changed; \
                 `overnode status --targets` lists the targets"
            )));
        };
        targets.remove(position);
    }
    save_targets(store, targets)
}

fn save_targets(store: &Store, targets: Vec<Host>) -> Result<Vec<Host>, ApiError> {
    let names: Vec<String> = targets.iter().map(Host::to_string).collect();
    store.set_targets(&names).map_err(ApiError::failed)?;
    Ok(targets)
}

fn need_hosts(hosts: &[Host]) -> Result<(), ApiError> {
    if hosts.is_empty() {
        return Err(ApiError::usage("no host was given: give at least one"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
