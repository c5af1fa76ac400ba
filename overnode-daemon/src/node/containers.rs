//! The attachments of this host: `attach` and `detach`, and containers that
//! disappear on their own. `docker.rs` has the containers of a Docker engine.
//!
//! [`Containers`] keeps the attachments on disk and acts on the data plane and the allocation,
//! which are arguments.

pub(super) mod docker;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::addresses::Addresses;
use super::local::LocalNode;
use super::monitor::container_of;
use crate::api::{self, ApiError, EventKind, Netns, Target};
use crate::datapath::{self, Datapath, EndPlacement, KnownEndpoint, NetnsRef};
use crate::failpoint;
use crate::store::{Store, StoreError};
use overnode_core::attachment::{self, Attachment, Kind, Owner};
use overnode_core::docker::NAME;

use docker::DockerSide;

/// The attachments of this host, and the Docker engine that is served, if any.
pub(super) struct Containers {
    local: Arc<LocalNode>,
    store: Arc<Store>,
    pub(super) docker: Option<DockerSide>,
    effects: VecDeque<Effect>,
}

/// A consequence for other parts of the node.
#[derive(Debug)]
pub(super) enum Effect {
    /// Attachments have changed, and so may the names that this node announces.
    Changed,
    /// An address is free again.
    Released(IpAddr),
    /// Monitors show this event.
    Report(EventKind),
    /// The engine has created the default network, or has failed to.
    DefaultNetwork,
    /// The engine has removed the default network, or why it has not.
    NetworkRemoved(Result<(), String>),
}

/// Digits of a container's ID that an engine shows.
const SHORT_ID: usize = 12;

/// Returns the network namespace of the container, or `None` for the host.
fn netns_of(request: &api::Attach) -> Result<Option<NetnsRef>, ApiError> {
    if request.target == Target::Host {
        return Ok(None);
    }
    match request.netns.clone().or_else(|| request.target.netns()) {
        Some(Netns::Path(path)) => Ok(Some(NetnsRef::Path(path))),
        Some(Netns::Pid(pid)) => Ok(Some(NetnsRef::Pid(pid))),
        None => Err(ApiError::usage(format_args!(
            "the network namespace of the container {} is unknown: give its process as netns \
             {{\"pid\": N}}",
            request.target
        ))),
    }
}

/// Returns true if the attachment is of this target. An engine reports the first digits of a
/// container's ID, and a user may give all of them.
fn is_of(known: &Attachment, target: &Target) -> bool {
    let target = target.to_string();
    let is_long = known.target.len() >= SHORT_ID;
    known.target == target
        || known.kind() == Kind::Docker && is_long && target.starts_with(&known.target)
}

/// Returns what to run to take a container out of the network that an engine attached. `None` if
/// `overnode detach` does.
fn engine_command(known: &Attachment) -> Option<String> {
    let name = known.name.as_ref().unwrap_or(&known.target);
    match &known.owner {
        Owner::Netns | Owner::Host => None,
        Owner::Docker { endpoint, .. } => {
            let network = endpoint.as_ref().map_or(NAME, |endpoint| {
                endpoint.network.get(..SHORT_ID).unwrap_or(&endpoint.network)
            });
            Some(format!("to take it out, run `docker network disconnect {network} {name}`"))
        }
        Owner::Cni(endpoint) => Some(format!(
            "its runtime takes it out of the network {} when it stops the container, as with \
             `podman stop {name}`",
            endpoint.network
        )),
    }
}

impl Containers {
    pub(super) fn new(
        local: Arc<LocalNode>,
        store: Arc<Store>,
        docker: Option<DockerSide>,
    ) -> Self {
        Self { local, store, docker, effects: VecDeque::new() }
    }

    /// Returns the next consequence, if any.
    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn report(&mut self, event: EventKind) {
        self.effects.push_back(Effect::Report(event));
    }

    fn changed(&mut self) {
        self.effects.push_back(Effect::Changed);
    }

    /// Returns the existing attachment if the host is already exposed as requested. Returns `None`
    /// if the request is not for the host or the host is not exposed.
    pub(super) fn exposed(
        &self,
        request: &api::Attach,
        datapath: &Datapath,
    ) -> Result<Option<api::Attached>, ApiError> {
        if request.target != Target::Host {
            return Ok(None);
        }
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        let exposed = attachments.into_iter().find(|it| it.kind() == Kind::Host);
        let as_asked = |it: &Attachment| {
            request.address.is_none_or(|wanted| wanted.addr() == it.address)
                && (request.name.is_none() || request.name == it.name)
        };
        match exposed {
            None => Ok(None),
            Some(it) if as_asked(&it) => Ok(Some(api::Attached {
                address: self.local.with_prefix(it.address),
                interface: datapath::CONTAINER_INTERFACE.to_owned(),
                host_interface: it.host_interface,
                mtu: datapath.container_mtu(),
                mac: None,
            })),
            Some(it) => Err(ApiError::refused(format_args!(
                "this host is already exposed as {}{}: run `overnode hide` first",
                it.address,
                it.name.map(|name| format!(" named {name}")).unwrap_or_default()
            ))),
        }
    }

    /// Refuses requests that no address could satisfy.
    pub(super) fn check_attach(&self, request: &api::Attach) -> Result<(), ApiError> {
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        let known = attachments.iter().find(|known| is_of(known, &request.target));
        if let Some(known) = known
            && request.cni.is_none()
            && let Some(command) = engine_command(known)
        {
            return Err(ApiError::refused(format_args!(
                "{} is in the container network already, as {}, because its engine attached it: \
                 {command}",
                request.target, known.address
            )));
        }
        if let (Some(known), Some(_)) = (known, &request.cni) {
            return Err(ApiError::refused(format_args!(
                "{} is already attached as {}: a container can join the network only once; \
                 delete that attachment first",
                request.target, known.address
            )));
        }
        if let Some(known) = known {
            return Err(ApiError::refused(format_args!(
                "{} is already attached as {}: detach it first with `overnode detach {}`",
                request.target, known.address, request.target
            )));
        }
        if let Some(name) = &request.name
            && request.cni.is_none()
            && attachments.iter().any(|known| known.name.as_ref() == Some(name))
        {
            return Err(ApiError::refused(format_args!(
                "the name {name} is taken by another endpoint: give another --name"
            )));
        }
        if let Some(netns) = netns_of(request)? {
            netns.id().map_err(|error| ApiError::missing(format_args!("{error:#}")))?;
        }
        Ok(())
    }

    /// Removes the stale attachment of a container, for CNI requests only. A runtime whose host was
    /// switched off requests the attachment again without having deleted the previous one.
    pub(super) async fn remove_stale(
        &mut self,
        request: &api::Attach,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> Result<(), ApiError> {
        if request.cni.is_none() {
            return Ok(());
        }
        let target = request.target.to_string();
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        let Some(known) =
            attachments.into_iter().find(|it| it.kind() == Kind::Cni && it.target == target)
        else {
            return Ok(());
        };
        let inode =
            NetnsRef::Path(known.netns.clone().into()).id().map(|identity| identity.inode).ok();
        if inode == Some(known.netns_inode) && datapath.is_attached(&known.host_interface) {
            return Ok(());
        }
        self.remove(&known, datapath, addresses).await
    }

    /// Attaches a container at an address that was allocated for it.
    pub(super) async fn attach_at(
        &mut self,
        request: api::Attach,
        address: IpAddr,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> Result<api::Attached, ApiError> {
        let attached = self.attach_interface(request, address, datapath, addresses).await;
        // An address on disk stays reserved, as it would after a restart.
        let is_free =
            || self.store.attachments().is_ok_and(|all| all.iter().all(|it| it.address != address));
        if attached.is_err() && is_free() {
            addresses.ipam.release(address, Instant::now());
        }
        attached
    }

    async fn attach_interface(
        &mut self,
        request: api::Attach,
        address: IpAddr,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> Result<api::Attached, ApiError> {
        // Check again, because time has passed since the address was requested.
        self.check_attach(&request)?;
        let netns = netns_of(&request)?;
        let inode = match &netns {
            Some(netns) => {
                netns.id().map_err(|error| ApiError::missing(format_args!("{error:#}")))?.inode
            }
            None => 0,
        };
        let owner = request.target.to_string();
        let fixed = request.address.is_some();
        let cni = request.cni.clone();
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        let is_taken = |name: &String| attachments.iter().any(|it| it.name.as_ref() == Some(name));
        let attachment = Attachment {
            owner: match (&cni, &netns) {
                (Some(cni), _) => Owner::Cni(cni.endpoint.clone()),
                (None, Some(_)) => Owner::Netns,
                (None, None) => Owner::Host,
            },
            address,
            is_static: fixed,
            target: owner,
            netns: netns
                .as_ref()
                .map(|it| it.path().to_string_lossy().into_owned())
                .unwrap_or_default(),
            netns_inode: inode,
            name: request.name.filter(|name| !is_taken(name)),
            host_interface: attachment::host_interface(address),
            since: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        // Write to disk before anything uses the address. A crash after this point can leave an
        // unused address reserved, but never gives an address twice.
        self.store.add_attachment(&attachment).map_err(ApiError::failed)?;
        failpoint::reached("attachment");
        let mut plan = match netns.clone() {
            Some(netns) => datapath::Attachment::inside(netns, address),
            None => datapath::Attachment::host(address),
        };
        let mut inside = datapath::CONTAINER_INTERFACE.to_owned();
        if let (Some(cni), EndPlacement::Inside { interface, .. }) = (&cni, &mut plan.place) {
            interface.clone_from(&cni.endpoint.interface);
            inside.clone_from(interface);
            plan.mac = cni.mac;
        }
        let mut attached_interface = datapath.attach(&plan).await;
        if let (Some(_), Some(netns), Ok(_)) = (&cni, &netns, &attached_interface)
            && let Err(why) = datapath.guard(netns).await
        {
            // Another plugin may give the container another gateway. Packets for containers must
            // not take it, so an attachment without the rules is undone.
            if let Err(left) = datapath.detach(&plan.host_interface).await {
                tracing::warn!("{} cannot be removed yet: {left:#}", plan.host_interface);
            }
            attached_interface = Err(
                why.context("the rules that keep its packets off other gateways cannot be set")
            );
        }
        let attached = match attached_interface {
            Ok(attached) => attached,
            Err(error) => {
                if let Err(left) = self.give_back(address, addresses) {
                    tracing::warn!("{address} stays reserved: {left}");
                }
                return Err(ApiError::failed(match request.target {
                    Target::Host => format!("this host was not exposed: {error:#}"),
                    target => format!("{target} was not attached: {error:#}"),
                }));
            }
        };
        failpoint::reached("attached");
        self.report(EventKind::Attached(container_of(&attachment)));
        self.changed();
        Ok(api::Attached {
            address: self.local.with_prefix(address),
            interface: inside,
            host_interface: attached.host_interface,
            mtu: attached.mtu,
            mac: Some(attached.mac),
        })
    }

    /// Detaches a container.
    pub(super) async fn detach(
        &mut self,
        request: api::Detach,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> Result<api::Detached, ApiError> {
        let wanted = request.target.to_string();
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        if let Some(endpoint) = &request.cni {
            let is_it = |it: &&Attachment| {
                it.target == wanted
                    && it.cni().is_some_and(|cni| {
                        cni.network == endpoint.network && cni.ifname == endpoint.ifname
                    })
            };
            let Some(known) = attachments.iter().find(is_it) else {
                return Err(ApiError::missing(format_args!(
                    "{wanted} is not attached to {}",
                    endpoint.network
                )));
            };
            self.remove(known, datapath, addresses).await?;
            self.changed();
            return Ok(api::Detached { address: self.local.with_prefix(known.address) });
        }
        let known = attachments
            .iter()
            .find(|known| is_of(known, &request.target))
            .or_else(|| attachments.iter().find(|known| known.name.as_ref() == Some(&wanted)));
        let Some(known) = known else {
            if request.target == Target::Host {
                return Err(ApiError::missing(
                    "this host is not exposed: there is nothing to hide",
                ));
            }
            return Err(ApiError::missing(format_args!(
                "{wanted} is not attached: `overnode status --endpoints` lists the endpoints"
            )));
        };
        if let Some(command) = engine_command(known) {
            return Err(ApiError::refused(format_args!(
                "{} was not attached by `overnode attach`, but by its engine: {command}",
                request.target
            )));
        }
        self.remove(known, datapath, addresses).await?;
        self.changed();
        Ok(api::Detached { address: self.local.with_prefix(known.address) })
    }

    async fn remove(
        &mut self,
        known: &Attachment,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> Result<(), ApiError> {
        let target = &known.target;
        datapath.detach(&known.host_interface).await.map_err(|error| {
            ApiError::failed(format_args!("{target} was not detached: {error:#}"))
        })?;
        failpoint::reached("unplugged");
        let netns = NetnsRef::Path(known.netns.clone().into());
        let is_there = || netns.id().is_ok_and(|identity| identity.inode == known.netns_inode);
        if known.kind() == Kind::Cni
            && is_there()
            && let Err(why) = datapath.unguard(&netns).await
        {
            tracing::debug!("{why:#}");
        }
        self.report(EventKind::Detached(container_of(known)));
        self.give_back(known.address, addresses).map_err(|error| {
            ApiError::failed(format_args!(
                "{target} was detached, but its address stays reserved: {error}"
            ))
        })
    }

    /// Removes interfaces without an owner, and releases the addresses of containers that are gone.
    pub(super) async fn reconcile(
        &mut self,
        dns: Option<KnownEndpoint>,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
    ) -> anyhow::Result<()> {
        let attachments = self.store.attachments()?;
        let mut known: Vec<KnownEndpoint> = attachments
            .iter()
            .filter(|it| it.has_interface())
            .map(|it| KnownEndpoint {
                address: it.address,
                host_interface: it.host_interface.clone(),
                netns: (it.kind() != Kind::Host).then(|| NetnsRef::Path(it.netns.clone().into())),
            })
            .collect();
        known.extend(dns);
        for lost in datapath.reconcile(&known).await? {
            let Some(attachment) =
                attachments.iter().find(|it| it.host_interface == lost.host_interface)
            else {
                continue;
            };
            // A runtime's plugin deletes an interface itself while no daemon runs.
            let may_return = lost.netns_exists && attachment.kind() != Kind::Cni;
            if may_return && attach_again(attachment, datapath).await {
                continue;
            }
            if matches!(attachment.kind(), Kind::Docker | Kind::Host) {
                // The engine, or `hide`, tells when the address is no longer needed.
                tracing::debug!("the interface of {} is gone", attachment.address);
                continue;
            }
            self.report(EventKind::Gone(container_of(attachment)));
            tracing::info!(
                "{} is gone; its address {} is free again",
                attachment.target,
                attachment.address
            );
            if let Err(error) = self.give_back(attachment.address, addresses) {
                tracing::warn!("{} stays reserved: {error}", attachment.address);
            }
        }
        self.changed();
        Ok(())
    }

    /// Releases an address. Call this when nothing uses it any more.
    fn give_back(&mut self, address: IpAddr, addresses: &mut Addresses) -> Result<(), StoreError> {
        addresses.give_back(address, Instant::now())?;
        self.effects.push_back(Effect::Released(address));
        Ok(())
    }
}

/// Restores an interface that was lost although its container exists. This happens when the
/// node's host interfaces were deleted by hand or by an interrupted reset. Returns true if the
/// interface is back.
async fn attach_again(attachment: &Attachment, datapath: &mut Datapath) -> bool {
    let plan = if attachment.kind() == Kind::Host {
        datapath::Attachment::host(attachment.address)
    } else {
        let netns = NetnsRef::Path(attachment.netns.clone().into());
        if netns.id().map(|identity| identity.inode).ok() != Some(attachment.netns_inode) {
            return false;
        }
        datapath::Attachment {
            mac: attachment.engine_endpoint().map(|it| it.mac),
            ..datapath::Attachment::inside(netns, attachment.address)
        }
    };
    match datapath.attach(&plan).await {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!("{} cannot be attached again: {error:#}", attachment.target);
            false
        }
    }
}

/// Returns the target as it was given to `attach`, where its text was checked.
pub(super) fn target_of(attachment: &Attachment) -> Target {
    attachment
        .target
        .parse()
        .unwrap_or_else(|_| Target::Path(Path::new(&attachment.target).to_owned()))
}
