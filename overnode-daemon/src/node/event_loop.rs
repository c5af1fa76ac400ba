//! A launched node: its parts, and the loop that joins them.
//!
//! The loop takes an input, gives it to the part that it concerns, and then routes the effects of
//! all parts to those that carry them out. Parts do not know each other. What one of them needs of
//! another is an argument, and the calls are here.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::addresses::{self, Addresses};
use super::bulk::BulkPath;
use super::containers::{self, Containers};
use super::control_plane::{self, ControlPlane};
use super::data_plane::{self, DataPlane, PeerEvent};
use super::inputs::{Input, Inputs, SHARE_TIME, SHARES};
use super::local::LocalNode;
use super::monitor::Monitor;
use super::names::{self, Names};
use super::problems::Problems;
use super::requests::Outcome;
use super::view::View;
use crate::api::EventKind;
use crate::datapath::LinkEvent;
use crate::store::Store;
use overnode_core::gossip::Record;
use overnode_core::gossip::routed::KIND_ALLOCATION;
use overnode_core::handshake;
use overnode_core::path::route::Route;
use overnode_types::{NodeId, PeerIndex};

/// How often the maps are read for activity, confirmations and statistics.
const TICK: Duration = Duration::from_secs(1);
/// How often interfaces and addresses without an owner are removed.
pub(super) const RECONCILE: Duration = Duration::from_secs(60);

/// A launched node.
pub(super) struct Node {
    pub(super) local: Arc<LocalNode>,
    pub(super) store: Arc<Store>,
    pub(super) control: ControlPlane,
    pub(super) data: DataPlane,
    pub(super) bulk: BulkPath,
    pub(super) addresses: Addresses,
    pub(super) names: Names,
    pub(super) containers: Containers,
    pub(super) problems: Problems,
    pub(super) monitor: Monitor,
    pub(super) inputs: Inputs,
    /// Results that requests wait for.
    pub(super) outcomes: VecDeque<Outcome>,
}

/// Borrows all parts for reading, while others are in use.
macro_rules! view {
    ($node:expr) => {
        View {
            local: &$node.local,
            store: &$node.store,
            control: &$node.control,
            data: &$node.data,
            arrivals: &$node.inputs.arrivals,
            bulk: &$node.bulk,
            addresses: &$node.addresses,
            names: &$node.names,
            containers: &$node.containers,
            problems: &$node.problems,
        }
    };
}

impl Node {
    /// Returns all parts for reading.
    pub(super) fn view(&self) -> View<'_> {
        view!(self)
    }

    /// Waits for the next input. Cancel-safe.
    pub(super) async fn next_input(&mut self) -> Input {
        let deadline = self.deadline();
        self.inputs.next(deadline, &self.bulk).await
    }

    fn deadline(&self) -> Instant {
        let timeouts = [
            self.control.poll_timeout(),
            self.data.poll_timeout(),
            self.addresses.poll_timeout(),
            self.bulk.poll_timeout(),
            self.containers.poll_timeout(),
        ];
        timeouts.into_iter().flatten().fold(self.inputs.next_tick, Instant::min)
    }

    /// Runs one turn: handles an input, then a limited share of the queued inputs of each source,
    /// then carries out all resulting effects. So no source can starve the others, and each turn
    /// ends.
    pub(super) async fn handle_input(&mut self, input: Input) {
        self.take_input(input).await;
        for (source, share) in SHARES {
            let end = Instant::now() + SHARE_TIME;
            for _ in 0..share {
                let Some(input) = self.inputs.queued(source, &self.bulk) else { break };
                self.take_input(input).await;
                if self.addresses.is_broken() {
                    return;
                }
                if Instant::now() > end {
                    break;
                }
            }
        }
        let now = Instant::now();
        if self.deadline() <= now {
            self.handle_timeout(now).await;
        }
        self.pump(now).await;
    }

    async fn take_input(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Mesh(event) => self.control.handle_mesh(event, now),
            Input::Datagram(datagram) => {
                self.data.handle_datagram(&datagram, now).await;
                self.pump_handshakes(now, Some((datagram.from, datagram.to))).await;
            }
            Input::Reply(reply) => self.data.send_relayed(&reply).await,
            Input::Drops(drops) => self.monitor.handle_drops(drops, view!(self)),
            Input::Probe(probe) => {
                if self.data.handle_probe(&probe, now) {
                    self.note_reachability(now);
                }
            }
            Input::Interfaces(event) => self.handle_interfaces(event, now).await,
            Input::Docker(event) => {
                let Self { containers, data, addresses, .. } = self;
                containers.handle_docker(event, &mut data.datapath, addresses, now).await;
            }
            Input::Bulk(message) => self.bulk.handle_message(message, &mut self.data, now),
            // Every turn checks the time anyway.
            Input::Timeout => {}
        }
    }

    async fn handle_timeout(&mut self, now: Instant) {
        self.control.handle_timeout(now);
        self.data.handle_timeout(now);
        self.addresses.handle_timeout(now);
        self.bulk.handle_timeout(&mut self.data, now).await;
        if self.inputs.next_tick <= now {
            self.inputs.next_tick = now + TICK;
            self.control.gossip.set_clock(unix_milliseconds(), now);
            self.read_maps(now);
            self.bulk.update_peers(&self.data, now);
            self.watch_drops();
            self.follow_sandboxes(true, now).await;
            self.confirm_resolver();
            self.update_names(now);
            self.data.try_next_addresses(now).await;
            self.control.save_peers(&self.store, &self.data.routing, None);
            self.follow_problems(now);
        }
        if self.containers.poll_timeout().is_some_and(|at| at <= now) {
            self.follow_sandboxes(false, now).await;
        }
        if self.inputs.next_reconcile <= now {
            self.inputs.next_reconcile = now + RECONCILE;
            if let Err(error) = self.reconcile(now).await {
                tracing::warn!("cleaning up failed: {error:#}");
            }
            self.follow_underlay().await;
        }
    }

    /// Routes the effects of all parts until none is left.
    pub(super) async fn pump(&mut self, now: Instant) {
        self.pump_containers(now);
        self.pump_gossip(now).await;
        let paths_changed = self.control.take_paths_changed();
        if paths_changed {
            self.data.refresh_known(self.control.remote_addresses());
            let reachable = self.control.steadily_reachable(now);
            self.addresses.set_paths(reachable, &self.control.dialer.target_status(), now);
        }
        self.pump_addresses(now).await;
        // Send the messages that the allocation produced.
        self.pump_gossip(now).await;
        if paths_changed {
            self.update_routing(now);
        }
        self.data.follow_routes(now);
        self.control.pump_dialer();
        self.data.pump_paths(&self.control.gossip, &self.control.neighbors(), now);
        self.apply_data_effects(now);
        if paths_changed {
            self.update_names(now);
        }
        self.pump_handshakes(now, None).await;
        self.apply_control_effects(now).await;
    }

    async fn pump_gossip(&mut self, now: Instant) {
        self.control.pump_gossip(now);
        self.apply_control_effects(now).await;
    }

    async fn apply_control_effects(&mut self, now: Instant) {
        use control_plane::Effect;
        while let Some(effect) = self.control.poll_effect() {
            match effect {
                Effect::Dial(attempt, target) => self.inputs.mesh.dial(attempt, target),
                Effect::Connected(id, ip) => self.data.try_address(id.peer_index(), ip, now),
                Effect::Disconnected => self.data.relay_routes.mark_stale(),
                Effect::Learned(record) => {
                    self.addresses.learn(&record, now);
                    self.names.learn(&record);
                    self.data.learn(&record, self.control.remote_of(record.id), now).await;
                    self.apply_data_effects(now);
                }
                Effect::Left(id, record) => {
                    if let Some(record) = &record {
                        self.addresses.learn(record, now);
                        self.names.learn(record);
                    }
                    self.data.unlearn(id, record.as_deref(), now);
                }
                Effect::Deliver(routed) => self.addresses.deliver(&routed, now),
                Effect::IdClash(id, problem) => self.problems.note_id_clash(id, problem, now),
                Effect::IncarnationRaised(incarnation) => {
                    self.addresses.ipam.set_incarnation(incarnation, now);
                    if let Err(error) = self.store.set_incarnation(incarnation) {
                        tracing::warn!("the incarnation of this node was not stored: {error}");
                    }
                }
                Effect::Report(event) => self.monitor.report(|| event),
            }
        }
    }

    fn apply_data_effects(&mut self, now: Instant) {
        use data_plane::Effect;
        while let Some(effect) = self.data.poll_effect() {
            match effect {
                Effect::NoDirectPath(nodes) => self.control.set_no_direct_path(nodes, now),
                Effect::Report(peer, event) => {
                    self.monitor.report(|| event_of(view!(self), peer, event));
                }
            }
        }
    }

    async fn pump_addresses(&mut self, now: Instant) {
        use addresses::Effect;
        loop {
            self.addresses.pump(now);
            let Some(effect) = self.addresses.poll_effect() else { break };
            match effect {
                Effect::Send(to, bytes) => {
                    let sent = self.control.gossip.send_routed(to, KIND_ALLOCATION, bytes);
                    if let Err(why) = sent {
                        tracing::debug!("an allocation message to node {to} was not sent: {why}");
                    }
                }
                Effect::Found(request, found) if self.containers.waits_for(request) => {
                    self.containers.found_for_docker(request, found, &mut self.addresses);
                }
                Effect::Found(request, found) => {
                    self.outcomes.push_back(Outcome::Address(request, found));
                }
                Effect::Leave(outcome) => self.outcomes.push_back(Outcome::Leave(outcome)),
                Effect::ReclaimFailed(error) => self.problems.note_unreclaimed(&error),
                Effect::Renewed(incarnation) => {
                    self.control.gossip.raise_incarnation(incarnation, now);
                }
            }
        }
        if !self.addresses.is_broken() {
            self.announce_space(now);
            self.pump_containers(now);
        }
    }

    fn pump_containers(&mut self, now: Instant) {
        use containers::Effect;
        while let Some(effect) = self.containers.poll_effect() {
            match effect {
                Effect::Changed => self.announce_names(now),
                Effect::Released(address) => {
                    // While the address was in use here, it was not routed to another node that
                    // claims it.
                    let own = self.local.id();
                    let claims = |it: &Record| it.id != own && it.claims.contains(&address);
                    let is_claimed = self.control.gossip.records().any(claims);
                    if is_claimed {
                        self.update_routing(now);
                    }
                }
                Effect::Report(event) => self.monitor.report(|| event),
                Effect::DefaultNetwork => self.outcomes.push_back(Outcome::DefaultNetwork),
                Effect::NetworkRemoved(removed) => {
                    self.outcomes.push_back(Outcome::NetworkRemoved(removed));
                }
            }
        }
    }

    /// Carries out the decisions of the handshakes. `answering` holds the source and destination
    /// address of the datagram that is answered.
    async fn pump_handshakes(&mut self, now: Instant, answering: Option<(SocketAddr, IpAddr)>) {
        loop {
            while let Some(event) = self.data.handshakes.poll_event() {
                // After a restart, a daemon ends the sessions of a peer that it does not know or
                // whose key differs. So the peer's record must be on disk first.
                if let handshake::Event::Install { peer, .. } = &event
                    && let Some(id) = peer.node().filter(|id| self.control.is_unsaved(*id))
                {
                    self.control.save_peers(&self.store, &self.data.routing, Some(id));
                }
                self.data.apply(event, now).await;
            }
            let Some(transmit) = self.data.handshakes.poll_transmit() else { return };
            self.data.send(&transmit, answering).await;
        }
    }

    /// Announces this node's address space and static addresses if they have changed, to the other
    /// nodes and to the data plane.
    fn announce_space(&mut self, now: Instant) {
        let (ranges, claims) = (self.addresses.ipam.ranges(), self.addresses.ipam.claims());
        let own = self.control.gossip.own();
        let (has_new_ranges, has_new_claims) = (own.ranges != ranges, own.claims != claims);
        if !has_new_ranges && !has_new_claims {
            return;
        }
        let routes = self.addresses.own_routes();
        if has_new_ranges && let Err(error) = self.data.datapath.set_own_routes(&routes) {
            tracing::warn!(
                "the routes of this node's own address space cannot be installed: {error:#}"
            );
        }
        self.control.gossip.update_own(
            |own| {
                own.ranges = ranges;
                own.claims = claims;
            },
            now,
        );
        if has_new_claims {
            // A container's name is announced only while its address leads to this node.
            self.announce_names(now);
        }
    }

    pub(super) fn announce_names(&mut self, now: Instant) {
        self.names.set_clients(self.containers.dns_clients());
        self.names.announce(&mut self.control.gossip, &self.addresses.ipam, now);
    }

    fn update_routing(&mut self, now: Instant) {
        let reachable = self.control.gossip.paths().keys();
        self.data.update_routing(&self.addresses.ipam, reachable, now);
    }

    pub(super) fn update_names(&mut self, now: Instant) {
        let has_route = |id: &NodeId| {
            !matches!(self.data.relay_routes.route(*id), Some((Route::Unreachable, _)))
        };
        let connected = self.control.gossip.paths().keys().copied().filter(has_route);
        // A daemon that restarts answers neither probes nor dials, but packets pass.
        let since = now.checked_sub(names::RESTART).unwrap_or(now);
        let restarting = self.control.closed_by_peer_since(since);
        let reached = restarting.chain(self.data.reached_directly()).collect();
        self.names.set_paths(connected.collect(), reached, &self.control.in_step(), now);
    }

    async fn follow_sandboxes(&mut self, is_tick: bool, now: Instant) {
        let serves_names = self.names.is_serving();
        let Self { containers, data, .. } = self;
        containers.follow_sandboxes(&mut data.datapath, serves_names, is_tick, now).await;
    }

    /// Keeps DNS queries of containers redirected while the server runs.
    fn confirm_resolver(&mut self) {
        if let Err(error) = self.data.datapath.confirm_resolver(self.names.resolver()) {
            tracing::warn!("{error:#}");
        }
    }

    /// Passes what the eBPF programs have observed to the handshakes.
    pub(super) fn read_maps(&mut self, now: Instant) {
        self.data.read_maps(now);
        self.note_reachability(now);
    }

    fn note_reachability(&mut self, now: Instant) {
        self.control.note_reachability(|id| self.data.is_peer(id), now);
    }

    pub(super) fn watch_drops(&mut self) {
        let allowance = self.monitor.watch_drops(&mut self.inputs.drops, view!(self));
        if let Some(allowance) = allowance
            && let Err(error) = self.data.datapath.set_record_allowance(allowance)
        {
            tracing::warn!("dropped packets cannot be shown: {error:#}");
        }
    }

    /// Reports new and resolved problems to monitors.
    fn follow_problems(&mut self, now: Instant) {
        let unreclaimed = self.view().unreclaimed();
        self.problems.retain_unreclaimed(&unreclaimed);
        let present = self.view().all_problems(now);
        let (new, resolved) = self.problems.update(present);
        for problem in new {
            self.monitor.report(|| EventKind::Problem { problem });
        }
        for problem in resolved {
            self.monitor.report(|| EventKind::ProblemResolved { problem });
        }
    }

    /// Handles a change of the host's interfaces together with all queued ones, so that a thousand
    /// containers that end at the same time cause one cleanup.
    async fn handle_interfaces(&mut self, event: LinkEvent, now: Instant) {
        // An engine may have moved an interface into its container.
        self.follow_sandboxes(false, now).await;
        let (mut vanished, mut moved) = (false, false);
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                LinkEvent::Vanished(_) => vanished = true,
                LinkEvent::AddressesChanged | LinkEvent::RoutesChanged => moved = true,
            }
            next = self.inputs.interfaces.try_recv().ok();
        }
        if vanished && let Err(error) = self.reconcile(now).await {
            tracing::warn!("cleaning up after a removed interface failed: {error:#}");
        }
        if moved {
            self.follow_underlay().await;
        }
    }

    /// Removes interfaces without an owner, and releases the addresses of containers that are gone.
    pub(super) async fn reconcile(&mut self, now: Instant) -> anyhow::Result<()> {
        let Self { containers, data, addresses, names, .. } = self;
        containers.reconcile(names.endpoint(), &mut data.datapath, addresses).await?;
        names.ensure_server(&mut data.datapath).await;
        self.pump(now).await;
        Ok(())
    }

    async fn follow_underlay(&mut self) {
        if let Err(error) = self.data.datapath.refresh().await {
            tracing::warn!("following changes of the underlay failed: {error:#}");
        }
    }
}

/// Returns the event of a peer as monitors show it.
fn event_of(view: View<'_>, peer: PeerIndex, event: PeerEvent) -> EventKind {
    let peer = view.peer_ref(peer);
    match event {
        PeerEvent::Appeared => EventKind::NodeAppeared { peer },
        PeerEvent::SessionEstablished => EventKind::SessionEstablished { peer },
        PeerEvent::SessionLost(why) => EventKind::SessionLost { peer, why },
        PeerEvent::DirectPath { works, mtu } => EventKind::DirectPath { peer, works, mtu },
        PeerEvent::PathChanged(path) => EventKind::PathChanged { peer, path },
    }
}

/// Returns the current time in milliseconds since the Unix epoch, as records use it.
pub(super) fn unix_milliseconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
