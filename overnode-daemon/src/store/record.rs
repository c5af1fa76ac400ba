//! The records in the store. Secrets are separated from them and stored as raw bytes, never as
//! JSON.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use overnode_api::bulk::Mode;
use overnode_core::control::hello::{Hello, LocalIdentity, NEWEST_VERSION, OLDEST_VERSION};
use overnode_core::control::key;
use overnode_core::gossip::Record;
use overnode_types::{Network, NodeId, PeerIndex, PublicKey, Secret};

/// The identity of this node. `launch` creates it and `reset` removes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node's ID.
    pub id: NodeId,
    /// A random number that distinguishes launches.
    pub instance: u128,
    /// The node's only secret, from which its keys are derived; see [`key`].
    pub seed: Secret,
    /// A key derived from the token. The token itself is not stored.
    pub cluster_key: Secret,
    /// The cluster's addresses.
    pub network: Network,
    /// The node's nickname.
    pub nickname: String,
    /// The underlay interface, if one was configured.
    pub interface: Option<String>,
    /// The container network's MTU in bytes, if one was configured.
    pub mtu: Option<u32>,
    /// Whether the node dials nodes that it learns of through gossip.
    pub discovery: bool,
    /// Whether native XDP opens messages, if the interface supports it.
    pub xdp: bool,
    /// Whether DNS is served to containers.
    pub dns: bool,
    /// The DNS domain, if one was configured.
    pub dns_domain: Option<String>,
    /// Whether the node serves a Docker engine.
    pub docker: bool,
    /// Whether user-space workers seal bulk flows, and with which cipher.
    pub bulk: Mode,
    /// The number of workers, if one was configured.
    pub bulk_workers: Option<u8>,
    /// A counter of the node's starts. A launch initializes it with the time in milliseconds since
    /// 1970, so that it exceeds the incarnations before a reset.
    pub incarnation: u64,
}

/// The stored state of another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Its latest record.
    pub record: Record,
    /// See [`Gossip::was_reached`](overnode_core::gossip::Gossip::was_reached).
    pub was_reached: bool,
    /// See [`Routing::standing`](overnode_core::routing::Routing::standing).
    pub standing: Vec<(IpNet, u64)>,
}

/// An external WireGuard peer, which is not a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalPeer {
    /// Its peer index in the data plane, 4096 and up.
    pub index: PeerIndex,
    /// Its name, if one was given.
    pub name: Option<String>,
    /// Its public key.
    pub public_key: PublicKey,
    /// The pre-shared key, if one was configured.
    pub preshared_key: Option<Secret>,
    /// Its endpoint, if one was configured.
    pub endpoint: Option<SocketAddr>,
    /// The networks that it may send from and that are routed to it.
    pub allowed: Vec<IpNet>,
    /// The persistent keepalive interval in seconds, if one was configured.
    pub keepalive: Option<u16>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct PublicIdentity {
    id: NodeId,
    instance: String,
    network: Network,
    nickname: String,
    interface: Option<String>,
    mtu: Option<u32>,
    discovery: bool,
    xdp: bool,
    #[serde(default = "default_true")]
    dns: bool,
    #[serde(default)]
    dns_domain: Option<String>,
    #[serde(default = "default_true")]
    docker: bool,
    #[serde(default)]
    bulk: Mode,
    #[serde(default)]
    bulk_workers: Option<u8>,
    incarnation: u64,
}

/// The default for nodes that were launched before the option existed.
fn default_true() -> bool {
    true
}

#[derive(Serialize, Deserialize)]
pub(super) struct PublicExternalPeer {
    pub(super) index: PeerIndex,
    name: Option<String>,
    public_key: PublicKey,
    endpoint: Option<SocketAddr>,
    allowed: Vec<IpNet>,
    keepalive: Option<u16>,
}

impl Identity {
    /// Returns the identity that this node presents to other nodes while its daemon runs.
    pub fn local_identity(&self) -> LocalIdentity {
        let static_secret = self.exchange_secret();
        let hello = Hello {
            versions: (OLDEST_VERSION, NEWEST_VERSION),
            id: self.id,
            incarnation: self.incarnation,
            nickname: self.nickname.clone(),
            network: self.network,
            verifying_key: key::verifying_key(&self.seed),
            process: rand::random(),
            public_key: key::public_key(&static_secret),
        };
        LocalIdentity { static_secret, cluster_key: self.cluster_key.clone(), hello }
    }

    /// Returns the X25519 secret for all handshakes: of control connections, of the data plane and
    /// of the bulk path.
    pub fn exchange_secret(&self) -> Secret {
        key::exchange_secret(&self.seed)
    }

    pub(super) fn public(&self) -> PublicIdentity {
        PublicIdentity {
            id: self.id,
            instance: format!("{:032x}", self.instance),
            network: self.network,
            nickname: self.nickname.clone(),
            interface: self.interface.clone(),
            mtu: self.mtu,
            discovery: self.discovery,
            xdp: self.xdp,
            dns: self.dns,
            dns_domain: self.dns_domain.clone(),
            docker: self.docker,
            bulk: self.bulk,
            bulk_workers: self.bulk_workers,
            incarnation: self.incarnation,
        }
    }

    pub(super) fn join(public: PublicIdentity, seed: Secret, cluster_key: Secret) -> Self {
        Self {
            id: public.id,
            instance: u128::from_str_radix(&public.instance, 16).unwrap_or_default(),
            seed,
            cluster_key,
            network: public.network,
            nickname: public.nickname,
            interface: public.interface,
            mtu: public.mtu,
            discovery: public.discovery,
            xdp: public.xdp,
            dns: public.dns,
            dns_domain: public.dns_domain,
            docker: public.docker,
            bulk: public.bulk,
            bulk_workers: public.bulk_workers,
            incarnation: public.incarnation,
        }
    }
}

impl ExternalPeer {
    pub(super) fn public(&self) -> PublicExternalPeer {
        PublicExternalPeer {
            index: self.index,
            name: self.name.clone(),
            public_key: self.public_key,
            endpoint: self.endpoint,
            allowed: self.allowed.clone(),
            keepalive: self.keepalive,
        }
    }

    pub(super) fn join(public: PublicExternalPeer, preshared_key: Option<Secret>) -> Self {
        Self {
            index: public.index,
            name: public.name,
            public_key: public.public_key,
            preshared_key,
            endpoint: public.endpoint,
            allowed: public.allowed,
            keepalive: public.keepalive,
        }
    }
}
