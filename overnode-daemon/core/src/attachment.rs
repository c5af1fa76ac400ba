//! What holds an address on this host, and the names of its interfaces.

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
    /// What attached it.
    #[serde(default)]
    pub kind: Kind,
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
    /// The container's image, if an engine reported it.
    #[serde(default)]
    pub image: Option<String>,
    /// The Docker engine's endpoint that uses the address.
    #[serde(default)]
    pub engine: Option<EngineEndpoint>,
    /// The container runtime's identifiers.
    #[serde(default)]
    pub cni: Option<CniEndpoint>,
    /// The host's end of the veth pair.
    pub host_interface: String,
    /// When it was attached, in seconds since 1970.
    pub since: u64,
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
