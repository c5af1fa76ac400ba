//! Connects the mesh with the dialer and gossip: passes the events of control connections to them,
//! and carries out their actions.

use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::running::Node;
use crate::api::{self, ApiError, EventKind, Host, PeerRef};
use crate::net::mesh::{DialFailure, MeshEvent, Opened, Outbox, StreamId};
use crate::store::Known;
use overnode_core::control::CONTROL_PORT;
use overnode_core::control::dial::{self, AttemptId, Verdict};
use overnode_core::control::hello::Refusal;
use overnode_core::control::packet::Packet;
use overnode_core::gossip::{self, budget};
use overnode_types::NodeId;

/// Maximum number of new records passed to the other parts of the node in one turn.
const LEARN_AT_ONCE: usize = 64;
/// Size of records written to disk in one transaction, in bytes as they take in memory.
const SAVE_AT_ONCE: usize = 4 << 20;

/// An established control connection. The dialer holds the status that operators see.
pub(super) struct Stream {
    pub(super) connection: dial::ConnectionId,
    pub(super) peer: NodeId,
    pub(super) remote: SocketAddr,
    local: SocketAddr,
    pub(super) rtt: Option<Duration>,
    /// When the last answered ping was sent. Everything that the other end had sent before then has
    /// arrived.
    pub(super) in_step: Option<Instant>,
    outbox: Outbox,
}

impl Node {
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
            MeshEvent::Closed(id, why) => self.close(id, &why.to_string(), now),
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
    pub(super) fn stream_to(&self, peer: NodeId) -> Option<&Stream> {
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
        self.tell(|_| EventKind::Connected {
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
        self.heard_at(peer.peer_index(), opened.remote.ip(), now);
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
        self.relay_routes.mark_stale();
        self.paths_changed = true;
        tracing::info!(
            "the connection with node {} at {} ended: {why}",
            stream.peer,
            stream.remote
        );
        let Stream { peer, remote, .. } = stream;
        self.tell(|node| EventKind::Disconnected {
            peer: node.peer_ref(peer.peer_index()),
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

    pub(super) async fn pump_gossip(&mut self, now: Instant) {
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
                        self.learn(routed.from, now).await;
                    }
                    self.deliver(&routed, now);
                }
                gossip::Action::Changed(id) => _ = self.unprocessed_records.insert(id),
                gossip::Action::Removed(id) => {
                    self.unprocessed_records.remove(&id);
                    self.unlearn(id, now);
                }
                gossip::Action::Contested(record) => {
                    let id = self.identity.id;
                    self.report_clash(&record, self.identity.nickname.clone(), now);
                    let problem = if record.public_key == self.public_key {
                        Refusal::Copy(id).to_string()
                    } else {
                        format!(
                            "another host ({}, key {}) was launched with this node's ID {id}: \
                             run `overnode reset` on one of the two, then launch it with an ID \
                             of its own",
                            record.nickname, record.public_key
                        )
                    };
                    self.note_id_clash(id, problem, now);
                }
                gossip::Action::Clash { record, holder } => self.report_clash(&record, holder, now),
            }
        }
        // One message may bring thousands of records. Learn some now, and the rest after other
        // work.
        for _ in 0..LEARN_AT_ONCE {
            let Some(id) = self.unprocessed_records.pop_first() else { break };
            self.learn(id, now).await;
        }
        self.keep_incarnation(now);
    }

    /// Stores the node's incarnation if gossip had to raise it. The next start must use a later
    /// one.
    fn keep_incarnation(&mut self, now: Instant) {
        let incarnation = self.gossip.own().incarnation;
        if incarnation <= self.incarnation {
            return;
        }
        self.incarnation = incarnation;
        self.ipam.set_incarnation(incarnation, now);
        if let Err(error) = self.store.set_incarnation(incarnation) {
            tracing::warn!("the incarnation of this node was not stored: {error}");
        }
    }

    /// Reports two hosts with one ID that gossip has noticed, in the way in which a refused
    /// connection of the second host would be shown.
    fn report_clash(&mut self, record: &gossip::Record, holder: String, now: Instant) {
        let newcomer = record.nickname.clone();
        let refusal = if record.public_key == self.public_key {
            Refusal::Copy(record.id)
        } else {
            Refusal::IdClash { id: record.id, holder, newcomer }
        };
        if let Some(address) = record.addresses.first() {
            self.dialer.handle_refused(*address, &refusal, now);
        }
        if record.id != self.identity.id {
            self.note_id_clash(record.id, refusal.to_string(), now);
        }
    }

    /// Stores the records of other nodes, `first` before all others, so that they are known
    /// immediately after a restart. Each transaction waits for the disk, so changes are collected,
    /// and a large number is split over several calls.
    pub(super) fn save_peers(&mut self, first: Option<NodeId>) {
        let (mut known, mut bytes) = (Vec::new(), 0);
        let rest = self.unsaved.iter().copied().filter(|id| Some(*id) != first);
        for id in first.into_iter().chain(rest) {
            let Some(record) = self.gossip.record(id).cloned() else { continue };
            bytes += budget::weight(&record);
            let standing = self.routing.standing(id).collect();
            known.push(Known { record, was_reached: self.gossip.was_reached(id), standing });
            if bytes >= SAVE_AT_ONCE {
                break;
            }
        }
        if known.is_empty() {
            return;
        }
        match self.store.set_peers(&known) {
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

    async fn learn(&mut self, id: NodeId, now: Instant) {
        let Some(record) = self.gossip.record(id).cloned() else { return };
        self.unsaved.insert(id);
        self.relay_routes.mark_stale();
        self.paths_changed = true;
        self.routing.learn(&record);
        if !self.peers.contains_key(&id.peer_index()) && !self.routing.is_reclaimed(id) {
            self.tell(|node| EventKind::NodeAppeared { peer: node.peer_ref(id.peer_index()) });
        }
        self.tell_ipam(&record, now);
        self.dns.learn(&record);
        self.dialer.learn(id, record.addresses.clone(), now);
        if let Err(error) = self.configure_peer(&record, now).await {
            tracing::warn!("node {id} cannot be added to the data plane: {error:#}");
        }
    }

    fn unlearn(&mut self, id: NodeId, now: Instant) {
        tracing::info!("node {id} has left the cluster");
        self.tell(|node| EventKind::NodeLeft { peer: node.peer_ref(id.peer_index()) });
        if let Some(record) = self.gossip.record(id).cloned() {
            self.tell_ipam(&record, now);
            self.routing.learn(&record);
            self.dns.learn(&record);
        }
        self.dialer.unlearn(id);
        self.paths.remove_peer(id);
        self.relay_routes.mark_stale();
        self.paths_changed = true;
        self.unsaved.insert(id);
        self.remove_data_peer(id.peer_index(), now);
    }

    /// Updates the IDs in use by live nodes, which incoming connections are checked against.
    pub(super) fn refresh_live_nodes(&self) {
        let living = self.gossip.living();
        let living = living.map(|record| (record.id, (record.public_key, record.nickname.clone())));
        *self.live_nodes.lock().unwrap_or_else(PoisonError::into_inner) = living.collect();
    }

    pub(super) fn pump_dialer(&mut self) {
        while let Some(action) = self.dialer.poll_action() {
            match action {
                dial::Action::Dial { attempt, place } => self.mesh.dial(attempt, place),
                dial::Action::Close(connection) => {
                    let of = |stream: &Stream| stream.connection == connection;
                    let closed = self.streams.extract_if(.., |_, stream| of(stream));
                    for (_, Stream { peer, remote, .. }) in closed.collect::<Vec<_>>() {
                        self.tell(|node| EventKind::Disconnected {
                            peer: node.peer_ref(peer.peer_index()),
                            remote,
                            why: "it is no longer needed".to_owned(),
                        });
                    }
                }
            }
        }
    }

    /// Adds targets or replaces the existing ones.
    pub(super) async fn connect(
        &mut self,
        request: api::Connect,
    ) -> Result<api::Targets, ApiError> {
        need_hosts(&request.hosts)?;
        let mut targets = if request.replace { Vec::new() } else { self.targets()? };
        for host in request.hosts {
            if !targets.contains(&host) {
                targets.push(host);
            }
        }
        self.set_targets(targets).await
    }

    /// Removes targets. Removes none if one of them is unknown.
    pub(super) async fn forget(&mut self, request: api::Forget) -> Result<api::Targets, ApiError> {
        need_hosts(&request.hosts)?;
        let mut targets = self.targets()?;
        for host in request.hosts {
            let Some(position) = targets.iter().position(|target| *target == host) else {
                return Err(ApiError::missing(format_args!(
                    "{host} is not a target of this node: nothing was changed; \
                     `overnode status --targets` lists the targets"
                )));
            };
            targets.remove(position);
        }
        self.set_targets(targets).await
    }

    pub(super) fn targets(&self) -> Result<Vec<Host>, ApiError> {
        let names = self.store.targets().map_err(ApiError::failed)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    async fn set_targets(&mut self, targets: Vec<Host>) -> Result<api::Targets, ApiError> {
        let now = Instant::now();
        let names: Vec<String> = targets.iter().map(Host::to_string).collect();
        self.store.set_targets(&names).map_err(ApiError::failed)?;
        // Dial all targets at once, including existing ones, because that is what `connect` asks
        // for.
        self.dialer.replace_targets(&names, now);
        self.pump(now).await;
        Ok(api::Targets { targets })
    }
}

fn need_hosts(hosts: &[Host]) -> Result<(), ApiError> {
    if hosts.is_empty() {
        return Err(ApiError::usage("no host was given: give at least one"));
    }
    Ok(())
}
