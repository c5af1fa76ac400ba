//! `launch`: a new identity, or the one that this host has.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use ipnet::IpNet;
use rand::TryRngCore;
use rand::rngs::OsRng;
use x25519_dalek::StaticSecret;

use super::Daemon;
use super::running::Node;
use crate::api::{self, ApiError, LaunchOutcome, Launched};
use crate::control::hello::{MAX_NICKNAME, NEWEST_VERSION, OLDEST_VERSION};
use crate::control::key;
use crate::datapath;
use crate::fault;
use crate::store::Identity;
use crate::types::{Network, NodeId, PublicKey, Secret};

/// The oldest and the newest control protocol that this build speaks.
pub(super) const PROTOCOLS: (u16, u16) = (OLDEST_VERSION, NEWEST_VERSION);

/// Node addresses begin here in the default subnet: 10.39.240.0 plus the ID. In another subnet they take the same
/// place relative to the subnet's first address, if it has that many, else its last 4096 before the range.
const NODE_OFFSET: u32 = u32::from_be_bytes([0, 7, 240, 0]);

impl Daemon {
    pub(super) async fn launch(&mut self, request: api::Launch) -> Result<Launched, ApiError> {
        let cluster_key = derive(&request).await?;
        fault::step("cluster key");
        match self.store.identity().map_err(failed)? {
            Some(identity) => self.launch_again(request, &identity, &cluster_key).await,
            None => self.launch_first(request, cluster_key).await,
        }
    }

    async fn launch_first(&mut self, request: api::Launch, cluster_key: Secret) -> Result<Launched, ApiError> {
        let identity = identity(&request, cluster_key)?;
        let id = identity.id;
        let nickname = identity.nickname.clone();
        self.store.create(&identity, &request.hosts).map_err(failed)?;
        fault::step("identity");
        match Node::start(&self.options, &self.store, identity, self.started).await {
            Ok(node) => self.node = Some(node),
            Err(error) => {
                let mut message = format!("node {id} was not launched: {error:#}");
                for left in datapath::tear_down(&self.options.state_dir).await {
                    message.push_str(&format!("; moreover, not all was undone: {left:#}"));
                }
                self.leaving = true;
                return Err(ApiError::failed(message));
            }
        }
        fault::step("running");
        Ok(Launched { outcome: LaunchOutcome::Started, id, nickname, targets: request.hosts })
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
                "this host is node {id} already, not {}: one host runs one node; run `overnode reset` first to give it another ID",
                request.id
            )));
        }
        if !same(cluster_key, &identity.cluster_key) {
            return Err(ApiError::refused(format_args!(
                "node {id} of this host was launched with another token: run `overnode reset` first to join another cluster"
            )));
        }
        let asked = network(&request)?;
        if (request.subnet.is_some() || request.range.is_some()) && asked != identity.network {
            return Err(ApiError::refused(format_args!(
                "node {id} of this host has subnet {} and range {}: run `overnode reset` first to change them",
                identity.network.subnet, identity.network.range
            )));
        }
        let nickname = identity.nickname.clone();
        let Some(node) = &mut self.node else {
            return Err(ApiError::failed("the node of this host is not running: see the daemon's log"));
        };
        let replace = request.restart && !request.hosts.is_empty();
        let targets = if request.hosts.is_empty() {
            node.targets()?
        } else {
            node.connect(api::Connect { hosts: request.hosts, replace }).await?.targets
        };
        let outcome = if request.restart { LaunchOutcome::Restarted } else { LaunchOutcome::AlreadyRunning };
        Ok(Launched { outcome, id, nickname, targets })
    }
}

/// The node's own address: [`NODE_OFFSET`] plus the ID, counted from the subnet's first address.
///
/// # Errors
/// When the subnet is no IPv4 network or too small.
pub(super) fn node_address(network: Network, id: NodeId) -> anyhow::Result<IpAddr> {
    let IpNet::V4(subnet) = network.subnet else {
        anyhow::bail!("the subnet {} is not IPv4: container networks of IPv6 are not supported yet", network.subnet);
    };
    let address = Ipv4Addr::from(u32::from(subnet.network()).saturating_add(NODE_OFFSET + u32::from(id.get())));
    anyhow::ensure!(
        subnet.contains(&address) && !network.range.contains(&IpAddr::V4(address)),
        "the subnet {subnet} has no room for the nodes' own addresses outside the range {}: give a subnet of at least /12, \
         and a range in its upper half",
        network.range
    );
    Ok(address.into())
}

/// The public half of a static key.
pub(super) fn public_key(secret: &Secret) -> PublicKey {
    PublicKey(x25519_dalek::PublicKey::from(&StaticSecret::from(secret.0)).to_bytes())
}

async fn derive(request: &api::Launch) -> Result<Secret, ApiError> {
    let token = request.token.clone();
    tokio::task::spawn_blocking(move || key::cluster_key(token.expose()))
        .await
        .map_err(|error| ApiError::failed(format_args!("the token cannot be turned into a key: {error}")))
}

fn identity(request: &api::Launch, cluster_key: Secret) -> Result<Identity, ApiError> {
    let network = network(request)?;
    node_address(network, request.id).map_err(|error| ApiError::usage(format_args!("{error:#}")))?;
    let nickname = match &request.nickname {
        Some(nickname) if nickname.is_empty() || nickname.len() > MAX_NICKNAME || nickname.chars().any(char::is_control) => {
            return Err(ApiError::usage(format_args!(
                "the nickname must have 1 to {MAX_NICKNAME} bytes of printable text"
            )));
        }
        Some(nickname) => nickname.clone(),
        None => nix::unistd::gethostname()
            .ok()
            .map(|name| name.to_string_lossy().chars().take(MAX_NICKNAME).collect())
            .unwrap_or_default(),
    };
    let mut static_secret = Secret([0; 32]);
    OsRng
        .try_fill_bytes(&mut static_secret.0)
        .map_err(|error| ApiError::failed(format_args!("the system gives no random numbers: {error}")))?;
    Ok(Identity {
        id: request.id,
        static_secret,
        cluster_key,
        network,
        nickname,
        interface: request.interface.clone(),
        mtu: request.mtu,
        discovery: request.discovery.unwrap_or(true),
    })
}

fn network(request: &api::Launch) -> Result<Network, ApiError> {
    let default = Network::default();
    let network = Network {
        subnet: request.subnet.unwrap_or(default.subnet).trunc(),
        range: request.range.unwrap_or(default.range).trunc(),
    };
    if !network.subnet.contains(&network.range) {
        return Err(ApiError::usage(format_args!(
            "the range {} does not lie in the subnet {}: give both --subnet and --range",
            network.range, network.subnet
        )));
    }
    Ok(network)
}

/// In constant time: a key is compared with one that somebody may be guessing at.
fn same(a: &Secret, b: &Secret) -> bool {
    #[expect(deprecated, reason = "ring offers no other constant-time comparison of byte strings")]
    ring::constant_time::verify_slices_are_equal(&a.0, &b.0).is_ok()
}

fn failed(error: impl std::fmt::Display) -> ApiError {
    ApiError::failed(error)
}
