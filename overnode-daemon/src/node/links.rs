//! Control connections: what the mesh reports goes to the dialler and to gossip, and what these decide goes back.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::running::Node;
use crate::api::{self, ApiError, Host};
use crate::control::CONTROL_PORT;
use crate::control::dial;
use crate::gossip;
use crate::net::mesh::{ConnectionId, DialFailure, Direction, MeshEvent, Opened, Outbox};
use crate::types::{NodeId, PublicKey};

/// Refused callers that are remembered for `status`.
const REFUSED_KEPT: usize = 32;

/// Who has which ID, as far as this node knows of living nodes: callers that say otherwise are refused. Shared with the tasks
/// that greet callers.
pub(crate) type Residents = Arc<Mutex<BTreeMap<NodeId, (PublicKey, String)>>>;

/// A control connection that is up.
pub(super) struct Connection {
    pub(super) peer: NodeId,
    pub(super) nickname: String,
    pub(super) direction: Direction,
    pub(super) target: Option<String>,
    pub(super) remote: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) since: Instant,
    pub(super) rtt: Option<Duration>,
    outbox: Outbox,
}

/// A caller that was refused.
pub(super) struct Refused {
    pub(super) remote: IpAddr,
    pub(super) why: String,
    pub(super) at: Instant,
}

impl Node {
    pub(super) fn handle_mesh(&mut self, event: MeshEvent, now: Instant) {
        match event {
            MeshEvent::Opened(opened) => self.opened(*opened, now),
            MeshEvent::Received(id, bytes) => self.received(id, &bytes, now),
            MeshEvent::RoundTrip(id, rtt) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.rtt = Some(rtt);
                }
            }
            MeshEvent::Closed(id, why) => self.closed(id, &why, now),
            MeshEvent::DialFailed { target, failure } => self.dial_failed(&target, &failure, now),
            MeshEvent::Refused { remote, refusal } => {
                if refusal.is_myself() {
                    return;
                }
                tracing::info!("a caller at {remote} was refused: {refusal}");
                self.refused.retain(|known| known.remote != remote.ip());
                self.refused.push_front(Refused { remote: remote.ip(), why: refusal.to_string(), at: now });
                self.refused.truncate(REFUSED_KEPT);
            }
        }
    }

    /// The connection with a peer that is in use.
    pub(super) fn connection_with(&self, peer: NodeId) -> Option<&Connection> {
        self.connections.values().find(|connection| connection.peer == peer)
    }

    fn opened(&mut self, opened: Opened, now: Instant) {
        let peer = opened.hello.id;
        let connection = Connection {
            peer,
            nickname: opened.hello.nickname,
            direction: opened.direction,
            target: opened.target,
            remote: opened.remote,
            local: opened.local,
            since: now,
            rtt: None,
            outbox: opened.outbox,
        };
        if let Some(target) = &connection.target {
            self.dialer.handle_connected(target, peer, now);
        }
        self.refused.retain(|known| known.remote != connection.remote.ip());
        let twin = self.connections.iter().find(|(_, known)| known.peer == peer).map(|(&id, known)| (id, known.direction));
        if let Some((twin, direction)) = twin {
            let keep_new = direction == connection.direction
                || dial::keeps(self.identity.id, peer, connection.direction == Direction::Outbound);
            if !keep_new {
                // Dropping the new one's outbox closes it; the other side decides likewise.
                return;
            }
            self.connections.remove(&twin);
        }
        tracing::info!("connected with node {peer} ({}) at {}", connection.nickname, connection.remote);
        self.connections.insert(opened.id, connection);
        if twin.is_none() {
            self.gossip.handle_connected(peer, now);
        }
        self.announce_addresses(now);
    }

    fn received(&mut self, id: ConnectionId, bytes: &[u8], now: Instant) {
        let Some(connection) = self.connections.get(&id) else { return };
        let peer = connection.peer;
        if let Err(error) = self.gossip.handle_message(peer, bytes, now) {
            tracing::warn!("node {peer} sent {error}; its connection is closed");
            self.connections.remove(&id);
            self.lost(peer, now);
        }
    }

    fn closed(&mut self, id: ConnectionId, why: &str, now: Instant) {
        let Some(connection) = self.connections.remove(&id) else { return };
        tracing::info!("the connection with node {} at {} ended: {why}", connection.peer, connection.remote);
        if let Some(target) = &connection.target {
            self.dialer.handle_lost(target, why, now);
        }
        self.lost(connection.peer, now);
    }

    fn lost(&mut self, peer: NodeId, now: Instant) {
        if self.connection_with(peer).is_none() {
            self.gossip.handle_disconnected(peer, now);
            self.dialer.handle_peer_lost(peer, now);
        }
    }

    fn dial_failed(&mut self, target: &str, failure: &DialFailure, now: Instant) {
        let myself = matches!(failure, DialFailure::Refused(refusal) if refusal.is_myself());
        if myself {
            self.dialer.handle_myself(target);
        } else {
            tracing::debug!("dialling {target} failed: {failure}");
            self.dialer.handle_failed(target, &failure.to_string(), now);
        }
    }

    /// Tells the others where this node is: the addresses that its connections use.
    fn announce_addresses(&mut self, now: Instant) {
        let mut addresses: Vec<SocketAddr> =
            self.connections.values().map(|it| SocketAddr::new(it.local.ip(), CONTROL_PORT)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        self.gossip.update_own(
            |own| {
                for address in addresses {
                    if !own.addresses.contains(&address) {
                        own.addresses.push(address);
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
                    let sent = self
                        .connections
                        .iter()
                        .find(|(_, connection)| connection.peer == to)
                        .map(|(&id, connection)| (id, connection.outbox.send(&message.encode())));
                    if let Some((id, false)) = sent {
                        tracing::warn!("node {to} is too slow; its connection is closed");
                        self.connections.remove(&id);
                        self.lost(to, now);
                    }
                }
                gossip::Action::Changed(id) => self.learn(id, now).await,
                gossip::Action::Removed(id) => self.unlearn(id, now),
                gossip::Action::Contested { public_key, nickname } => {
                    let problem = format!(
                        "another host ({nickname}, key {public_key}) was launched with this node's ID {}: reset one of the two",
                        self.identity.id
                    );
                    if !self.problems.contains(&problem) {
                        tracing::warn!("{problem}");
                        self.problems.push(problem);
                    }
                }
            }
        }
    }

    async fn learn(&mut self, id: NodeId, now: Instant) {
        let Some(record) = self.gossip.record(id).cloned() else { return };
        self.residents()
            .insert(id, (record.public_key, record.nickname.clone()));
        if let Err(error) = self.store.put_peer(&record) {
            tracing::warn!("what node {id} says was not stored: {error}");
        }
        self.dialer.learn(id, &record.addresses, now);
        if let Err(error) = self.configure_peer(&record, now).await {
            tracing::warn!("node {id} cannot be given to the data plane: {error:#}");
        }
    }

    fn unlearn(&mut self, id: NodeId, now: Instant) {
        tracing::info!("node {id} has left the cluster");
        self.residents().remove(&id);
        self.dialer.unlearn(id);
        if let Some(record) = self.gossip.record(id)
            && let Err(error) = self.store.put_peer(record)
        {
            tracing::warn!("that node {id} has left was not stored: {error}");
        }
        self.remove_data_peer(id.peer_index(), now);
    }

    fn residents(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, (PublicKey, String)>> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pump_dialer(&mut self) {
        while let Some(dial::Action::Dial { target }) = self.dialer.poll_action() {
            self.mesh.dial(target);
        }
    }

    /// Adds targets, or puts them in the place of those that there are.
    pub(super) async fn connect(&mut self, request: api::Connect) -> Result<api::Targets, ApiError> {
        let mut targets = if request.replace { Vec::new() } else { self.targets()? };
        for host in request.hosts {
            if !targets.contains(&host) {
                targets.push(host);
            }
        }
        self.set_targets(targets).await
    }

    /// Removes targets: all, or none if one is unknown.
    pub(super) async fn forget(&mut self, request: api::Forget) -> Result<api::Targets, ApiError> {
        let mut targets = self.targets()?;
        for host in request.hosts {
            let Some(position) = targets.iter().position(|target| *target == host) else {
                return Err(ApiError::missing(format_args!(
                    "{host} is not a target of this node: nothing was changed; `overnode status --targets` lists the targets"
                )));
            };
            targets.remove(position);
        }
        self.set_targets(targets).await
    }

    pub(super) fn targets(&self) -> Result<Vec<Host>, ApiError> {
        self.store.targets().map_err(|error| ApiError::failed(error.to_string()))
    }

    async fn set_targets(&mut self, targets: Vec<Host>) -> Result<api::Targets, ApiError> {
        let now = Instant::now();
        let before = self.targets()?;
        self.store.set_targets(&targets).map_err(|error| ApiError::failed(error.to_string()))?;
        for host in before.iter().filter(|host| !targets.contains(host)) {
            self.dialer.forget(host.as_str());
        }
        for host in &targets {
            // Also those that there were: `connect` means now.
            self.dialer.add_target(host.as_str(), now);
        }
        self.pump(now).await;
        Ok(api::Targets { targets })
    }
}
