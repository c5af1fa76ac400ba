//! Requests of the command and of programs: which part of the node answers what.
//!
//! Most requests are answered at once. Those that wait for an address, for the other nodes or for a
//! Docker engine are answered when their [`Outcome`] arrives.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use overnode_ebpf::wire::DATA_PORT;
use tokio::sync::oneshot;

use super::Daemon;
use super::control_plane::{add_targets, remove_targets};
use super::event_loop::Node;
use super::launch::PROTOCOLS;
use super::monitor::SHOWN;
use crate::api::{self, ApiError, Reply, Request};
use overnode_core::ipam::{IpamError, RequestId};

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

impl Waiting {
    /// Whether the node is about to leave the cluster.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.is_some() || self.removing.is_some()
    }
}

impl Daemon {
    /// Answers a request, now or later. It is carried out even if the requester has disconnected.
    pub(super) async fn begin(&mut self, request: Request, answer: Answer) {
        let reply = match request {
            Request::Attach(attach) => self.begin_attach(attach, answer).await,
            Request::Reset(reset) if self.node.is_some() => self.begin_reset(reset, answer).await,
            Request::Launch(launch) => self.begin_launch(launch, answer).await,
            other => Some((self.handle(other).await, answer)),
        };
        if let Some((reply, answer)) = reply {
            let _ = answer.send(reply);
        }
        self.settle().await;
    }

    /// Answers a request that needs no waiting.
    async fn handle(&mut self, request: Request) -> Result<Reply, ApiError> {
        match request {
            Request::Version(()) => Ok(Reply::Version(self.version())),
            Request::Reset(reset) => self.reset(reset, None).await.map(Reply::Reset),
            Request::Get(()) => self.settings().map(Reply::Get),
            Request::Set(set) => {
                let changes: Vec<(String, String)> = set.changes.into_iter().collect();
                self.change_settings(&changes).await.map(Reply::Set)
            }
            request => {
                let now = Instant::now();
                let node = self.node()?;
                let reply = node.handle_request(request, now).await;
                // Carry out what the request has caused before it is answered.
                node.pump(now).await;
                reply
            }
        }
    }

    /// Answers the requests that have completed.
    pub(super) async fn settle(&mut self) {
        while let Some(outcome) = self.node.as_mut().and_then(|node| node.outcomes.pop_front()) {
            match outcome {
                Outcome::Address(request, found) => self.address_found(request, found).await,
                Outcome::Leave(may) => {
                    let Some((reset, answer)) = self.waiting.leaving.take() else { continue };
                    let reply = match may {
                        Ok(()) => self.reset(reset, None).await.map(Reply::Reset),
                        Err(error) => {
                            // Its default network was removed earlier.
                            self.node.as_ref().map(|node| node.containers.want_default_network());
                            Err(ApiError::refused(error))
                        }
                    };
                    let _ = answer.send(reply);
                }
                Outcome::DefaultNetwork => {
                    for (launched, answer) in std::mem::take(&mut self.waiting.launching) {
                        let _ = answer.send(Ok(Reply::Launch(launched)));
                    }
                }
                Outcome::NetworkRemoved(removed) => {
                    let Some((reset, answer)) = self.waiting.removing.take() else { continue };
                    if let Some((reply, answer)) = self.continue_reset(reset, answer, removed).await
                    {
                        let _ = answer.send(reply);
                    }
                }
            }
        }
    }

    async fn address_found(&mut self, request: RequestId, found: Result<IpAddr, IpamError>) {
        let Some(node) = &mut self.node else { return };
        let now = Instant::now();
        let reply = match (self.waiting.attaching.remove(&request), found) {
            // The container may be gone, and no requester would learn the address.
            (Some((_, answer)), Ok(address)) if answer.is_closed() => {
                node.addresses.ipam.release(address, now);
                None
            }
            (None, Ok(address)) => {
                node.addresses.ipam.release(address, now);
                None
            }
            (Some((attach, answer)), Ok(address)) => {
                let Node { containers, data, addresses, .. } = node;
                let attached =
                    containers.attach_at(attach, address, &mut data.datapath, addresses).await;
                Some((attached.map(Reply::Attach), answer))
            }
            (Some((_, answer)), Err(error)) => Some((Err(ApiError::refused(error)), answer)),
            (None, Err(_)) => None,
        };
        node.pump(now).await;
        if let Some((reply, answer)) = reply {
            let _ = answer.send(reply);
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
        match node.request_address(&attach).await {
            Ok(Requested::Exposed(exposed)) => Some((Ok(Reply::Attach(exposed)), answer)),
            Ok(Requested::Address(request)) => {
                self.waiting.attaching.insert(request, (attach, answer));
                None
            }
            Err(error) => Some((Err(error), answer)),
        }
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
        if self.node.as_ref()?.containers.remove_default_network(reset.force) {
            self.waiting.removing = Some((reset, answer));
            return None;
        }
        self.continue_reset(reset, answer, Ok(())).await
    }

    /// Continues a reset after the engine was asked to remove the default network.
    async fn continue_reset(
        &mut self,
        reset: api::Reset,
        answer: Answer,
        removed: Result<(), String>,
    ) -> Option<(Result<Reply, ApiError>, Answer)> {
        if reset.force {
            return Some((self.reset(reset, removed.err()).await.map(Reply::Reset), answer));
        }
        // Containers may have been attached while the engine was asked.
        if let Err(error) = removed.map_err(ApiError::refused).and_then(|()| self.check_reset()) {
            self.node.as_ref().map(|node| node.containers.want_default_network());
            return Some((Err(error), answer));
        }
        let node = self.node.as_mut()?;
        let now = Instant::now();
        node.addresses.ipam.leave(now);
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
        if self.node.as_ref().is_some_and(|node| node.containers.want_default_network()) {
            self.waiting.launching.push((launched, answer));
            return None;
        }
        Some((Ok(Reply::Launch(launched)), answer))
    }

    fn node(&mut self) -> Result<&mut Node, ApiError> {
        self.node.as_mut().ok_or_else(|| {
            ApiError::refused(
                "no node was launched on this host: run \
                 `overnode launch --id ID --token-file FILE HOST...` first",
            )
        })
    }

    fn version(&self) -> api::Version {
        api::Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocols: Some(PROTOCOLS),
            kernel: nix::sys::utsname::uname()
                .ok()
                .map(|name| name.release().to_string_lossy().into_owned()),
            pid: std::process::id(),
            id: self.node.as_ref().map(|node| node.local.id()),
            state_dir: Some(self.options.state_dir.clone()),
        }
    }
}

/// The first half of an attachment.
enum Requested {
    /// The host is exposed as requested.
    Exposed(api::Attached),
    /// An address was requested for the container.
    Address(RequestId),
}

impl Node {
    async fn handle_request(&mut self, request: Request, now: Instant) -> Result<Reply, ApiError> {
        let Self { containers, data, addresses, names, .. } = self;
        match request {
            Request::Connect(connect) => {
                let targets = add_targets(&self.store, connect.hosts, connect.replace)?;
                self.control.replace_targets(&targets, now);
                Ok(Reply::Connect(api::Targets { targets }))
            }
            Request::Forget(forget) => {
                let targets = remove_targets(&self.store, forget.hosts)?;
                self.control.replace_targets(&targets, now);
                Ok(Reply::Forget(api::Targets { targets }))
            }
            Request::Detach(detach) => {
                containers.detach(detach, &mut data.datapath, addresses).await.map(Reply::Detach)
            }
            Request::Status(()) => {
                self.read_maps(now);
                self.view().status(now).map(Reply::Status)
            }
            Request::Inspect(()) => {
                self.read_maps(now);
                self.view().inspect(now).map(Reply::Inspect)
            }
            Request::Monitor(()) => {
                if !self.monitor.is_counting() {
                    self.watch_drops();
                }
                Ok(Reply::Monitor(api::Watching {
                    id: self.local.id(),
                    nickname: self.local.identity.nickname.clone(),
                    drops_per_second: SHOWN,
                }))
            }
            Request::Prime(()) => Ok(Reply::Prime(addresses.prime(now))),
            Request::Reclaim(reclaim) => {
                self.problems.forget_unreclaimed(reclaim.id);
                addresses.reclaim(reclaim.id, now)?;
                self.pump(now).await;
                Ok(Reply::Reclaim(self.addresses.reclaim_progress(reclaim.id)))
            }
            Request::DnsAdd(add) => {
                let added = names.add(&add, &addresses.ipam)?;
                self.announce_names(now);
                Ok(Reply::DnsAdd(added))
            }
            Request::DnsRemove(remove) => {
                let left = names.remove(&remove)?;
                self.announce_names(now);
                Ok(Reply::DnsRemove(left))
            }
            Request::DnsLookup(lookup) => names.lookup(&lookup).map(Reply::DnsLookup),
            Request::AddExternalPeer(peer) => {
                self.add_external_peer(peer, now).await.map(Reply::AddExternalPeer)
            }
            Request::RemoveExternalPeer(peer) => {
                self.remove_external_peer(&peer, now).map(Reply::RemoveExternalPeer)
            }
            Request::ExternalPeers(()) => Ok(Reply::ExternalPeers(self.view().external_peers(now))),
            Request::Attach(_)
            | Request::Launch(_)
            | Request::Reset(_)
            | Request::Get(())
            | Request::Set(_)
            | Request::Version(()) => {
                Err(ApiError::failed("this request is not for a part of the node"))
            }
        }
    }

    /// Requests an address for a container, unless the host is exposed as requested.
    async fn request_address(&mut self, attach: &api::Attach) -> Result<Requested, ApiError> {
        let now = Instant::now();
        let Self { containers, data, addresses, .. } = self;
        if let Some(exposed) = containers.exposed(attach, &data.datapath)? {
            return Ok(Requested::Exposed(exposed));
        }
        containers.remove_stale(attach, &mut data.datapath, addresses).await?;
        containers.check_attach(attach)?;
        let fixed = addresses.wanted_address(attach)?;
        let request = addresses.request(fixed, &attach.target.to_string(), now);
        self.pump(now).await;
        Ok(Requested::Address(request))
    }

    async fn add_external_peer(
        &mut self,
        request: api::AddExternalPeer,
        now: Instant,
    ) -> Result<api::ExternalPeerAdded, ApiError> {
        let key = request.public_key;
        let is_node = self.control.gossip.records().any(|it| it.public_key == key);
        if key == self.local.public_key || is_node {
            return Err(ApiError::refused(format_args!(
                "{key} is the key of a node of this cluster: give the key of a WireGuard peer that \
                 is not a node"
            )));
        }
        let replaced = self.data.external_with(&key).is_some();
        let peer = self.data.plan_external(request, &self.addresses.ipam)?;
        let index = peer.index;
        self.store.set_external_peer(&peer).map_err(ApiError::failed)?;
        if let Err(error) = self.data.configure_external(peer, now).await {
            let _ = self.store.remove_external_peer(index);
            self.data.remove_external(index, now);
            return Err(ApiError::failed(format_args!("the peer was not added: {error:#}")));
        }
        Ok(api::ExternalPeerAdded {
            public_key: self.local.public_key,
            port: DATA_PORT,
            subnet: self.local.identity.network.subnet,
            replaced,
        })
    }

    fn remove_external_peer(
        &mut self,
        request: &api::RemoveExternalPeer,
        now: Instant,
    ) -> Result<api::ExternalPeerRemoved, ApiError> {
        let Some(peer) = self.data.external_with(&request.public_key).cloned() else {
            return Err(ApiError::missing(format_args!(
                "no WireGuard peer has the key {}: `overnode peer list` shows them",
                request.public_key
            )));
        };
        self.store.remove_external_peer(peer.index).map_err(ApiError::failed)?;
        self.data.remove_external(peer.index, now);
        Ok(api::ExternalPeerRemoved { allowed_ips: peer.allowed })
    }
}
