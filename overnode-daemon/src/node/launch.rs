//! Handles `launch`: creates a new identity or continues with the existing one.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use overnode_ebpf::map::BULK_WORKER_SLOTS;

use super::Daemon;
use super::control_plane::{add_targets, targets};
use super::event_loop::Node;
use super::settings;
use crate::api::{self, ApiError, LaunchOutcome, Launched};
use crate::datapath::Datapath;
use crate::failpoint;
use crate::store::Identity;
use overnode_core::control::hello::{MAX_NICKNAME, NEWEST_VERSION, OLDEST_VERSION};
use overnode_core::control::key;
use overnode_core::ipam::Layout;
use overnode_types::name::Domain;
use overnode_types::{Network, Secret};

/// The oldest and the newest control protocol version that this build supports.
pub(super) const PROTOCOLS: (u16, u16) = (OLDEST_VERSION, NEWEST_VERSION);

impl Daemon {
    pub(super) async fn launch(&mut self, request: api::Launch) -> Result<Launched, ApiError> {
        let cluster_key = derive(&request).await?;
        failpoint::reached("cluster key");
        match self.store.identity().map_err(failed)? {
            Some(identity) => self.launch_again(request, &identity, &cluster_key).await,
            None => self.launch_first(request, cluster_key).await,
        }
    }

    async fn launch_first(
        &mut self,
        request: api::Launch,
        cluster_key: Secret,
    ) -> Result<Launched, ApiError> {
        let identity = identity(&request, cluster_key)?;
        let id = identity.id;
        let nickname = identity.nickname.clone();
        let targets: Vec<String> = request.hosts.iter().map(api::Host::to_string).collect();
        self.store.set_identity(&identity, Some(&targets)).map_err(failed)?;
        failpoint::reached("identity");
        match Node::start(&self.options, &self.store, identity, self.started, &self.hub).await {
            Ok(node) => self.node = Some(node),
            Err(error) => {
                let mut message = format!("node {id} was not launched: {error:#}");
                for left in Datapath::tear_down(&self.options.state_dir).await {
                    message
                        .push_str(&format!("; in addition, the cleanup is incomplete: {left:#}"));
                }
                self.leaving = true;
                return Err(ApiError::failed(message));
            }
        }
        failpoint::reached("running");
        let (outcome, targets) = (LaunchOutcome::Started, request.hosts);
        Ok(Launched { outcome, id, nickname, targets, changed: Vec::new() })
    }

    async fn launch_again(
        &mut self,
        request: api::Launch,
        identity: &Identity,
        cluster_key: &Secret,
    ) -> Result<Launched, ApiError> {
        let id = identity.id;
        if id != request.id {
            return Err(ApiError::refused(format_args!(
                "this host is already node {id}, not {}: one host runs one node; run \
                 `overnode reset` first to give it another ID",
                request.id
            )));
        }
        if !same(cluster_key, &identity.cluster_key) {
            return Err(ApiError::refused(format_args!(
                "node {id} of this host was launched with another token: run `overnode reset` \
                 first to join another cluster"
            )));
        }
        let asked = network(&request)?;
        if (request.subnet.is_some() || request.range.is_some()) && asked != identity.network {
            return Err(ApiError::refused(format_args!(
                "node {id} of this host has subnet {} and range {}: run `overnode reset` first \
                 to change them",
                identity.network.subnet, identity.network.range
            )));
        }
        let changed = self.change_settings(&settings::of_launch(&request)).await?.changed;
        let Some(node) = &mut self.node else {
            return Err(ApiError::failed(
                "the node of this host is not running: see the daemon's log",
            ));
        };
        let replace = request.restart && !request.hosts.is_empty();
        let targets = if request.hosts.is_empty() {
            targets(&self.store)?
        } else {
            let now = Instant::now();
            let targets = add_targets(&self.store, request.hosts, replace)?;
            node.control.replace_targets(&targets, now);
            node.pump(now).await;
            targets
        };
        let outcome = if request.restart || !changed.is_empty() {
            LaunchOutcome::Restarted
        } else {
            LaunchOutcome::AlreadyRunning
        };
        let nickname = node.local.identity.nickname.clone();
        Ok(Launched { outcome, id, nickname, targets, changed })
    }
}

async fn derive(request: &api::Launch) -> Result<Secret, ApiError> {
    let token = request.token.clone();
    tokio::task::spawn_blocking(move || key::cluster_key(token.expose()))
        .await
        .map_err(|error| {
            ApiError::failed(format_args!("no key can be derived from the token: {error}"))
        })?
        .map_err(|error| ApiError::usage(error.to_string()))
}

fn identity(request: &api::Launch, cluster_key: Secret) -> Result<Identity, ApiError> {
    let network = network(request)?;
    let nickname = match &request.nickname {
        Some(nickname)
            if nickname.is_empty()
                || nickname.len() > MAX_NICKNAME
                || nickname.chars().any(char::is_control) =>
        {
            return Err(ApiError::usage(format_args!(
                "the nickname must be 1 to {MAX_NICKNAME} bytes of printable text"
            )));
        }
        Some(nickname) => nickname.clone(),
        None => settings::host_name(),
    };
    Ok(Identity {
        id: request.id,
        instance: rand::random(),
        seed: key::new_secret().map_err(ApiError::failed)?,
        cluster_key,
        network,
        nickname,
        interface: request.interface.clone(),
        mtu: request.mtu,
        discovery: request.discovery.unwrap_or(true),
        xdp: request.xdp,
        dns: request.dns.unwrap_or(true),
        dns_domain: domain(request)?.map(|domain| domain.as_str().to_owned()),
        docker: request.docker.unwrap_or(true),
        bulk: request.bulk.unwrap_or_default(),
        bulk_workers: bulk_workers(request)?,
        // Greater than that of any earlier node with this ID, which other nodes may remember.
        incarnation: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
    })
}

fn bulk_workers(request: &api::Launch) -> Result<Option<u8>, ApiError> {
    match request.bulk_workers {
        Some(workers) if workers == 0 || u32::from(workers) > BULK_WORKER_SLOTS => {
            Err(ApiError::usage(format_args!(
                "{workers} is not a valid number of bulk workers: give 1 to {BULK_WORKER_SLOTS}, \
                 or --bulk off for none"
            )))
        }
        workers => Ok(workers),
    }
}

fn domain(request: &api::Launch) -> Result<Option<Domain>, ApiError> {
    let domain = request.dns_domain.as_deref().map(Domain::new).transpose();
    domain.map_err(|error| ApiError::usage(format_args!("the DNS domain cannot be used: {error}")))
}

fn network(request: &api::Launch) -> Result<Network, ApiError> {
    let default = Network::default();
    let network = Network {
        subnet: request.subnet.unwrap_or(default.subnet),
        range: request.range.unwrap_or(default.range),
    };
    Layout::new(network).map_err(ApiError::usage)?;
    if network.subnet.addr().is_ipv6() {
        return Err(ApiError::usage(format_args!(
            "the subnet {} is IPv6, which container networks do not support yet: give an IPv4 \
             --subnet",
            network.subnet
        )));
    }
    Ok(network)
}

/// Compares in constant time, because the caller may be guessing the key.
fn same(a: &Secret, b: &Secret) -> bool {
    #[expect(deprecated, reason = "ring offers no other constant-time comparison of byte strings")]
    ring::constant_time::verify_slices_are_equal(&a.0, &b.0).is_ok()
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::failed(error)
}
