//! The attachments of this host: the holder of each address, and the names of its interfaces.

use std::net::IpAddr;

use overnode_types::MacAddr;
use serde::{Deserialize, Serialize};

pub use overnode_api::{CniEndpoint, Kind};

/// A Docker engine's identifiers for an endpoint. An address without this is allocated, but has no
/// endpoint yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEndpoint {
    /// The network's ID.
    pub network: String,
    /// The endpoint's ID.
    pub endpoint: String,
    /// MAC address of the container's end.
    pub mac: MacAddr,
    /// Whether the endpoint has joined a container. [`Attachment::netns`] locates the container.
    pub joined: bool,
}

/// The holder of an address: a network namespace, a container of an engine, or the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The program that attached it and will detach it.
    pub owner: Owner,
    /// Its address.
    pub address: IpAddr,
    /// True if the address was requested rather than allocated.
    pub is_static: bool,
    /// The target as the user named it: `netns:NAME`, `pid:N` or a container. For an engine's
    /// endpoint, the container's ID if it is known, or else the endpoint's ID.
    pub target: String,
    /// The path of the network namespace; empty until an engine reports one.
    pub netns: String,
    /// The namespace's inode number, which distinguishes it from a later namespace at the same
    /// path; 0 if unknown.
    pub netns_inode: u64,
    /// Its name, if one was given. For a container of an engine, the container's name.
    pub name: Option<String>,
    /// The host's end of the veth pair.
    pub host_interface: String,
    /// When it was attached, in seconds since 1970.
    pub since: u64,
}

/// The program that attached something, with its own identifiers of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Owner {
    /// `overnode attach`.
    Netns,
    /// `overnode expose`: the host itself is attached.
    Host,
    /// A container runtime, through CNI.
    Cni(CniEndpoint),
    /// A Docker engine.
    Docker {
        /// The container's image, if the engine reported it.
        image: Option<String>,
        /// The endpoint that uses the address, once the engine has created it.
        endpoint: Option<EngineEndpoint>,
        /// Further names of the container: its aliases and its service in a compose file.
        #[serde(default)]
        aliases: Vec<String>,
        /// Whether its health check fails. Its names are not served then.
        #[serde(default)]
        is_unhealthy: bool,
    },
}

impl Owner {
    /// Returns a Docker engine as the owner, of a container without aliases and health check.
    pub fn docker(image: Option<String>, endpoint: Option<EngineEndpoint>) -> Self {
        Self::Docker { image, endpoint, aliases: Vec::new(), is_unhealthy: false }
    }

    /// Returns the kind of owner, as the API names it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Netns => Kind::Netns,
            Self::Host => Kind::Host,
            Self::Cni(_) => Kind::Cni,
            Self::Docker { .. } => Kind::Docker,
        }
    }
}

impl Attachment {
    /// Returns the kind of owner, as the API names it.
    pub fn kind(&self) -> Kind {
        self.owner.kind()
    }

    /// Returns the container's image, if an engine reported it.
    pub fn image(&self) -> Option<&String> {
        match &self.owner {
            Owner::Docker { image, .. } => image.as_ref(),
            Owner::Netns | Owner::Host | Owner::Cni(_) => None,
        }
    }

    /// Returns the Docker engine's endpoint that uses the address.
    pub fn engine_endpoint(&self) -> Option<&EngineEndpoint> {
        match &self.owner {
            Owner::Docker { endpoint, .. } => endpoint.as_ref(),
            Owner::Netns | Owner::Host | Owner::Cni(_) => None,
        }
    }

    /// Returns the names under which it is to be found. A container whose health check fails has
    /// none.
    pub fn served_names(&self) -> impl Iterator<Item = &String> {
        let (aliases, is_unhealthy): (&[String], bool) = match &self.owner {
            Owner::Docker { aliases, is_unhealthy, .. } => (aliases, *is_unhealthy),
            Owner::Netns | Owner::Host | Owner::Cni(_) => (&[], false),
        };
        self.name.iter().chain(aliases).filter(move |_| !is_unhealthy)
    }

    /// Returns the container runtime's identifiers.
    pub fn cni(&self) -> Option<&CniEndpoint> {
        match &self.owner {
            Owner::Cni(endpoint) => Some(endpoint),
            Owner::Netns | Owner::Host | Owner::Docker { .. } => None,
        }
    }

    /// Returns whether it should have an interface. A Docker engine's address has none until its
    /// endpoint has joined a container.
    pub fn has_interface(&self) -> bool {
        match &self.owner {
            Owner::Docker { endpoint, .. } => endpoint.as_ref().is_some_and(|it| it.joined),
            Owner::Netns | Owner::Host | Owner::Cni(_) => true,
        }
    }
}

/// Returns the name of the host-side end for an address. It is stable, and unique within one
/// network.
pub fn host_interface(address: IpAddr) -> String {
    let id = match address {
        IpAddr::V4(v4) => u32::from(v4),
        // IPv6 addresses of one overlay prefix differ in their low bits.
        IpAddr::V6(v6) => v6.to_bits() as u32,
    };
    format!("ov{id:08x}")
}

/// Returns the name of the container-side end for an address while it waits in the host's namespace
/// for a container engine.
pub fn waiting_interface(address: IpAddr) -> String {
    host_interface(address).replacen("ov", "ovc", 1)
}
