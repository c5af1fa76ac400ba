//! The records that the store keeps. Secrets are split off: they are kept as raw bytes, never in
//! JSON.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::bulk::control::Mode;
use crate::control::hello::{Hello, NEWEST_VERSION, OLDEST_VERSION};
use crate::control::key;
use crate::control::session::Me;
use crate::gossip::Record;
use crate::types::{Network, NodeId, PeerIndex, PublicKey, Secret};

/// Who this node is: made by `launch`, gone with `reset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node's ID.
    pub id: NodeId,
    /// Random, made at launch: tells two launches apart.
    pub instance: u128,
    /// The node's one secret: see [`key`].
    pub seed: Secret,
    /// Derived from the token, which is not kept.
    pub cluster_key: Secret,
    /// The cluster's addresses.
    pub network: Network,
    /// For people.
    pub nickname: String,
    /// The underlay interface, if one was chosen.
    pub interface: Option<String>,
    /// The underlay's MTU in bytes, if one was given.
    pub mtu: Option<u32>,
    /// Whether nodes that gossip tells of are dialled.
    pub discovery: bool,
    /// Whether messages are opened in native XDP where the interface can.
    pub xdp: bool,
    /// Whether DNS is served to containers.
    pub dns: bool,
    /// The domain that it serves, if one was chosen.
    pub dns_domain: Option<String>,
    /// Whether container networks are served to a Docker engine.
    pub docker: bool,
    /// Whether workers in user space seal bulk flows, and with which cipher.
    pub bulk: Mode,
    /// How many of them, if a number was given.
    pub bulk_workers: Option<u8>,
    /// Counts the node's starts. A launch begins with the time in milliseconds since 1970, so that
    /// it exceeds the incarnations before a reset.
    pub incarnation: u64,
}

/// What is known of another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// What it said last.
    pub record: Record,
    /// See [`Gossip::was_reached`](crate::gossip::Gossip::was_reached).
    pub was_reached: bool,
    /// See [`Routing::standing`](crate::routing::Routing::standing).
    pub standing: Vec<(IpNet, u64)>,
}

/// Who plugged an endpoint in, and therefore plugs it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `overnode attach`.
    #[default]
    Netns,
    /// A Docker engine.
    Docker,
    /// A container runtime, through CNI.
    Cni,
    /// `overnode expose`: it is the host itself.
    Host,
}

/// What a Docker engine calls one of its endpoints. Before the engine has made it, there is only
/// its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEndpoint {
    /// The network's ID.
    pub network: String,
    /// The endpoint's ID.
    pub endpoint: String,
    /// Hardware address of the container's end.
    pub mac: [u8; 6],
    /// Whether it is plugged into a container. Where that is, [`Attachment::netns`] tells.
    pub joined: bool,
}

/// What a container runtime calls an attachment that it asked for through CNI; the container's ID
/// is the attachment's target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniEndpoint {
    /// The network's name.
    pub network: String,
    /// `CNI_IFNAME`, which with the container's ID tells attachments apart.
    pub ifname: String,
    /// The interface inside the container: `ifname`, unless another plugin made that one.
    pub interface: String,
}

/// Something that has an address: a network namespace, a container of an engine, the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Who plugged it in.
    #[serde(default)]
    pub kind: Kind,
    /// Its address.
    pub address: IpAddr,
    /// True if the address was chosen by hand.
    pub is_static: bool,
    /// As people named it: `netns:NAME`, `pid:N`, a container. An engine's: the container's ID as
    /// far as it is known, or else the endpoint's.
    pub target: String,
    /// The path that the namespace was opened by; empty while an engine has not told any.
    pub netns: String,
    /// The namespace's inode number, which tells it from a later one at the same path; 0 if
    /// unknown.
    pub netns_inode: u64,
    /// For people, if one was given; an engine's: the container's name.
    pub name: Option<String>,
    /// The image that the container runs, if an engine has told it.
    #[serde(default)]
    pub image: Option<String>,
    /// What a Docker engine made of it.
    #[serde(default)]
    pub engine: Option<EngineEndpoint>,
    /// What a container runtime calls it.
    #[serde(default)]
    pub cni: Option<CniEndpoint>,
    /// The host's end of its veth pair.
    pub host_interface: String,
    /// When it was attached, in seconds since 1970.
    pub since: u64,
}

/// A WireGuard peer that is no node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalPeer {
    /// Its place in the data plane, from 4096.
    pub index: PeerIndex,
    /// For people, if one was given.
    pub name: Option<String>,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// An additional secret, as `wg` calls it.
    pub preshared_key: Option<Secret>,
    /// Where it is, if that is known.
    pub endpoint: Option<SocketAddr>,
    /// What it may send from, and what is sent to it.
    pub allowed: Vec<IpNet>,
    /// Seconds between keepalives, if it needs them.
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
    #[serde(default = "yes")]
    dns: bool,
    #[serde(default)]
    dns_domain: Option<String>,
    #[serde(default = "yes")]
    docker: bool,
    #[serde(default)]
    bulk: Mode,
    #[serde(default)]
    bulk_workers: Option<u8>,
    incarnation: u64,
}

/// Of nodes that were launched before there was such a choice.
fn yes() -> bool {
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
    /// How this node introduces itself to others, as long as its daemon runs.
    pub fn introduction(&self) -> Me {
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
        Me { static_secret, cluster_key: self.cluster_key.clone(), hello }
    }

    /// The X25519 secret for all handshakes: of control connections, of the data plane and of the
    /// bulk path.
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
