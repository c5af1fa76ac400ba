//! Handles requests for addresses that may have to be borrowed first: carries out the decisions of
//! the allocation and answers the requests that wait for them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Daemon;
use super::running::Node;
use crate::api::{self, ApiError, Primed, Reply};
use overnode_core::control::dial::Phase;
use overnode_core::gossip::routed::KIND_ALLOCATION;
use overnode_core::gossip::{self, Record, RoutedMessage};
use overnode_core::ipam::{self, IpamError, RequestId};
use overnode_types::NodeId;

/// How long a node must have been reachable through other nodes before it counts as reachable.
const STEADY: Duration = Duration::from_millis(900);
/// Time after the start from which targets that were never met are considered absent. A target need
/// not exist.
const ABSENT: Duration = Duration::from_secs(10);
const _: () = assert!(ipam::MAX_STATIC <= gossip::MAX_CLAIMS);
/// Owner of the probe request that `overnode prime` makes.
const PRIMING: &str = "prime";

/// The outcome of a request that may take a while.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The allocated address, or why there is none.
    Address(RequestId, Result<IpAddr, IpamError>),
    /// Whether the node may leave the cluster.
    Leave(Result<(), IpamError>),
    /// The engine has created the default network or has failed to.
    DefaultNetwork,
    /// The engine has removed the default network, or why it has not.
    NetworkRemoved(Result<(), String>),
}

/// The channel for an answer.
pub(super) type Answer = oneshot::Sender<Result<Reply, ApiError>>;

/// Requests that wait for an [`Outcome`].
#[derive(Default)]
pub(super) struct Waiting {
    attaching: BTreeMap<RequestId, (api::Attach, Answer)>,
    leaving: Option<(api::Reset, Answer)>,
    launching: Vec<(api::Launched, Answer)>,
    removing: Option<(api::Reset, Answer)>,
}

impl Node {
    /// Passes the record of a node to the allocation.
    pub(super) fn tell_ipam(&mut self, record: &Record, now: Instant) {
        let peer = ipam::Peer {
            incarnation: record.incarnation,
            left: record.left,
            ranges: record.ranges.clone(),
            claims: record.claims.clone(),
        };
        self.ipam.learn(record.id, peer, now);
    }

    /// Tells the allocation which nodes it can send to, and whether the node has met all of its
    /// targets.
    pub(super) fn tell_ipam_of_paths(&mut self, now: Instant) {
        // Information about distant nodes may be outdated for a moment after a partition, until the
        // records are compared.
        let is_steady = |id: &NodeId| {
            self.reachable
                .get(id)
                .is_some_and(|(reachable, since)| *reachable && now >= *since + STEADY)
        };
        let paths = self.gossip.paths().iter();
        let reachable =
            paths.filter(|(id, path)| path.hops == 1 || is_steady(id)).map(|(id, _)| *id).collect();
        self.ipam.set_reachable(reachable, now);
        let targets = self.dialer.target_status();
        for view in &targets {
            if matches!(view.phase, Phase::Established | Phase::Myself) {
                self.met_targets.insert(view.name.clone());
            }
        }
        let met = now >= self.started + ABSENT
            || targets.iter().all(|view| self.met_targets.contains(&view.name));
        self.ipam.set_targets_met(met, now);
    }

    /// Handles a routed message for this node.
    pub(super) fn deliver(&mut self, routed: &RoutedMessage, now: Instant) {
        if routed.kind != KIND_ALLOCATION {
            return tracing::debug!(
                "node {} sent a routed message of unknown kind {}",
                routed.from,
                routed.kind
            );
        }
        if let Err(error) = self.ipam.handle_message(routed.from, &routed.body, now) {
            tracing::debug!("node {} sent a malformed allocation message: {error}", routed.from);
        }
    }

    /// Carries out the decisions of the allocation. If writing to disk fails, no later action is
    /// carried out.
    pub(super) async fn pump_ipam(&mut self, now: Instant) {
        if self.broken.is_some() {
            return;
        }
        while let Some(action) = self.ipam.poll_action() {
            match action {
                ipam::Action::Persist(changes) => {
                    if let Err(error) = self.store.change_addresses(&changes) {
                        let why = anyhow::Error::new(error);
                        self.broken =
                            Some(why.context("the list of addresses cannot be written to disk"));
                        return;
                    }
                }
                ipam::Action::Send { to, bytes } => {
                    if let Err(why) = self.gossip.send_routed(to, KIND_ALLOCATION, bytes) {
                        tracing::debug!("an allocation message to node {to} was not sent: {why}");
                    }
                }
                ipam::Action::Granted { request, address } => self.granted(request, address, now),
                ipam::Action::Failed { request, .. } if self.priming == Some(request) => {
                    self.priming = None
                }
                ipam::Action::Failed { request, error } => {
                    self.outcomes.push_back(Outcome::Address(request, Err(error)));
                }
                // Reported with the other problems while it lasts: see `Node::address_problems`.
                ipam::Action::Report(problem) => tracing::debug!("{problem}"),
                ipam::Action::Reclaimed(id) => {
                    tracing::info!("this node now owns the address space of node {id}");
                    self.reclaimed.insert(id);
                }
                ipam::Action::ReclaimFailed(error) => self.note_unreclaimed(&error),
                ipam::Action::Renewed(incarnation) => {
                    if let Err(error) = self.store.set_incarnation(incarnation) {
                        let why = anyhow::Error::new(error);
                        self.broken =
                            Some(why.context("the node's incarnation cannot be written to disk"));
                        return;
                    }
                    self.gossip.raise_incarnation(incarnation, now);
                }
                ipam::Action::MayLeave => self.outcomes.push_back(Outcome::Leave(Ok(()))),
                ipam::Action::CannotLeave(error) => {
                    self.outcomes.push_back(Outcome::Leave(Err(error)))
                }
            }
        }
        self.announce_addresses_held(now).await;
        if !std::mem::take(&mut self.rerouted).is_empty() {
            self.tell_routing_of_paths(now);
            self.follow_routes(now);
        }
    }

    fn granted(&mut self, request: RequestId, address: IpAddr, now: Instant) {
        if self.priming == Some(request) {
            self.priming = None;
            self.ipam.release(address, now);
        } else {
            self.outcomes.push_back(Outcome::Address(request, Ok(address)));
        }
    }

    /// Announces this node's address space and static addresses if they have changed, to the other
    /// nodes and to the data plane.
    async fn announce_addresses_held(&mut self, now: Instant) {
        let (ranges, claims) = (self.ipam.ranges(), self.ipam.claims());
        let own = self.gossip.own();
        let (has_new_ranges, has_new_claims) = (own.ranges != ranges, own.claims != claims);
        if !has_new_ranges && !has_new_claims {
            return;
        }
        if has_new_ranges && let Err(error) = self.datapath.set_own_routes(&self.own_routes()) {
            tracing::warn!(
                "the routes of this node's own address space cannot be installed: {error:#}"
            );
        }
        self.gossip.update_own(
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
        self.pump_gossip(now).await;
    }

    /// Tells whether an address for a container is available now. If not, starts to obtain address
    /// space.
    pub(super) async fn prime(&mut self) -> Primed {
        match self.ipam.check_ready() {
            Ok(()) => Primed { ready: true, waiting_for: None },
            Err(why) => {
                if self.priming.is_none() {
                    let now = Instant::now();
                    self.priming = Some(self.ipam.allocate(PRIMING, now));
                    self.pump(now).await;
                }
                Primed { ready: false, waiting_for: Some(why.to_string()) }
            }
        }
    }

    /// Starts to reclaim the address space of a node that is gone for good, or reports the
    /// progress.
    pub(super) async fn reclaim(
        &mut self,
        request: api::Reclaim,
    ) -> Result<api::Reclaimed, ApiError> {
        let now = Instant::now();
        let id = request.id;
        self.reclaimed.remove(&id);
        self.forget_unreclaimed(id);
        self.ipam.reclaim(id, now).map_err(ApiError::refused)?;
        self.pump(now).await;
        if self.reclaimed.contains(&id) {
            return Ok(api::Reclaimed { id, done: true, missing: Vec::new() });
        }
        let missing = self.ipam.reclaims().remove(&id).unwrap_or_default();
        Ok(api::Reclaimed { id, done: false, missing })
    }
}

impl Daemon {
    /// Answers a request, now or later.
    pub(super) async fn begin(&mut self, request: api::Request, answer: Answer) {
        // The requester may have disconnected. The request is carried out regardless.
        let reply = match request {
            api::Request::Attach(attach) => self.begin_attach(attach, answer).await,
            api::Request::Reset(reset) if self.node.is_some() => {
                self.begin_reset(reset, answer).await
            }
            api::Request::Launch(launch) => self.begin_launch(launch, answer).await,
            other => Some((self.handle(other).await, answer)),
        };
        if let Some((reply, answer)) = reply {
            let _ = answer.send(reply);
        }
        self.settle().await;
    }

    /// Answers the requests that have completed.
    pub(super) async fn settle(&mut self) {
        while let Some(outcome) = self.node.as_mut().and_then(|node| node.outcomes.pop_front()) {
            match outcome {
                Outcome::Address(request, found) => {
                    let Some(node) = &mut self.node else { return };
                    let Some((attach, answer)) = self.waiting.attaching.remove(&request) else {
                        node.found_for_docker(request, found).await;
                        continue;
                    };
                    let reply = match found {
                        Ok(address) if answer.is_closed() => {
                            // The container may be gone, and no requester would learn the address.
                            node.ipam.release(address, Instant::now());
                            continue;
                        }
                        Ok(address) => node.attach_at(attach, address).await.map(Reply::Attached),
                        Err(error) => Err(ApiError::refused(error)),
                    };
                    let _ = answer.send(reply);
                }
                Outcome::Leave(may) => {
                    let Some((reset, answer)) = self.waiting.leaving.take() else { continue };
                    let reply = match may {
                        Ok(()) => self.reset(reset, None).await.map(Reply::WasReset),
                        Err(error) => {
                            // Its default network was removed earlier.
                            self.node.as_ref().map(Node::want_default_network);
                            Err(ApiError::refused(error))
                        }
                    };
                    let _ = answer.send(reply);
                }
                Outcome::DefaultNetwork => {
                    for (launched, answer) in std::mem::take(&mut self.waiting.launching) {
                        let _ = answer.send(Ok(Reply::Launched(launched)));
                    }
                }
                Outcome::NetworkRemoved(removed) => {
                    let Some((reset, answer)) = self.waiting.removing.take() else { continue };
                    if let Some((reply, answer)) =
                        self.go_on_with_reset(reset, answer, removed).await
                    {
                        let _ = answer.send(reply);
                    }
                }
            }
        }
    }

    async fn begin_attach(
        &mut self,
        attach: api::Attach,
        answer: Answer,
    ) -> Option<(Result<Reply, ApiError>, Answer)> {
        let is_waiting =
            self.waiting.attaching.values().any(|(other, _)| other.target == attach.target);
        let node = match self.node() {
            Ok(node) => node,
            Err(error) => return Some((Err(error), answer)),
        };
        if is_waiting {
            let error = ApiError::refused(format_args!(
                "{} is already being attached and waits for an address: `overnode status --ipam` \
                 shows which node it waits for",
                attach.target
            ));
            return Some((Err(error), answer));
        }
        match node.exposed(&attach) {
            Ok(Some(exposed)) => return Some((Ok(Reply::Attached(exposed)), answer)),
            Ok(None) => {}
            Err(error) => return Some((Err(error), answer)),
        }
        if let Err(error) = node.displace(&attach).await {
            return Some((Err(error), answer));
        }
        if let Err(error) = node.check_attach(&attach) {
            return Some((Err(error), answer));
        }
        let address = match node.wanted_address(&attach) {
            Ok(address) => address,
            Err(error) => return Some((Err(error), answer)),
        };
        let now = Instant::now();
        let owner = attach.target.to_string();
        let request = match address {
            Some(address) => node.ipam.claim(address, &owner, now),
            None => node.ipam.allocate(&owner, now),
        };
        node.pump(now).await;
        self.waiting.attaching.insert(request, (attach, answer));
        None
    }

    async fn begin_reset(
        &mut self,
        reset: api::Reset,
        answer: Answer,
    ) -> Option<(Result<Reply, ApiError>, Answer)> {
        if !reset.force
            && let Err(error) = self.check_reset()
        {
            return Some((Err(error), answer));
        }
        if self.waiting.leaving.is_some() || self.waiting.removing.is_some() {
            return Some((Err(ApiError::refused("the node is already leaving")), answer));
        }
        if self.node.as_ref()?.remove_default_network(reset.force) {
            self.waiting.removing = Some((reset, answer));
            return None;
        }
        self.go_on_with_reset(reset, answer, Ok(())).await
    }

    /// Continues a reset after the engine was asked to remove the default network.
    async fn go_on_with_reset(
        &mut self,
        reset: api::Reset,
        answer: Answer,
        removed: Result<(), String>,
    ) -> Option<(Result<Reply, ApiError>, Answer)> {
        if reset.force {
            return Some((self.reset(reset, removed.err()).await.map(Reply::WasReset), answer));
        }
        // Containers may have been attached while the engine was asked.
        if let Err(error) = removed.map_err(ApiError::refused).and_then(|()| self.check_reset()) {
            self.node.as_ref().map(Node::want_default_network);
            return Some((Err(error), answer));
        }
        let node = self.node.as_mut()?;
        let now = Instant::now();
        node.ipam.leave(now);
        node.pump(now).await;
        self.waiting.leaving = Some((reset, answer));
        None
    }

    /// Launches the node. The answer waits until a running engine has the default network.
    async fn begin_launch(
        &mut self,
        launch: api::Launch,
        answer: Answer,
    ) -> Option<(Result<Reply, ApiError>, Answer)> {
        let launched = match self.launch(launch).await {
            Ok(launched) => launched,
            Err(error) => return Some((Err(error), answer)),
        };
        if self.node.as_ref().is_some_and(Node::want_default_network) {
            self.waiting.launching.push((launched, answer));
            return None;
        }
        Some((Ok(Reply::Launched(launched)), answer))
    }
}
