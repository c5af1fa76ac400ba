//! The documents of the two protocols, with the names that `libnetwork/drivers/remote/api` and
//! `libnetwork/ipams/remote/api` of moby/moby use.
//!
//! An engine may send fields that are not listed here, and `null` for an empty map or document.
//! Neither is an error.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use overnode_types::text::{quoted, reason};

/// The largest accepted request body, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;
/// The longest accepted ID, in bytes. The engine's own IDs have 64.
pub const ID_LIMIT: usize = 128;

/// All requests of an engine to a plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Asks which protocols the plugin implements. Sent once by each engine process.
    Activate,
    /// Asks for the capabilities of the network driver.
    NetworkCapabilities,
    /// Asks for the capabilities of the IPAM driver.
    IpamCapabilities,
    /// Asks for the names of the address spaces.
    AddressSpaces,
    /// Asks whether a network needs a gateway address. Engine 28 and later.
    GatewayCheck,
    /// Requests an address pool for a network.
    RequestPool(RequestPool),
    /// Releases the pool of a removed network.
    ReleasePool(PoolId),
    /// Requests an address for an endpoint or a gateway.
    RequestAddress(RequestAddress),
    /// Releases the address of a removed endpoint.
    ReleaseAddress(ReleaseAddress),
    /// Creates a network.
    CreateNetwork(CreateNetwork),
    /// Deletes a network.
    DeleteNetwork(NetworkId),
    /// Creates an endpoint with an address.
    CreateEndpoint(CreateEndpoint),
    /// Deletes an endpoint.
    DeleteEndpoint(EndpointId),
    /// Asks for operational data of an endpoint.
    EndpointInfo(EndpointId),
    /// Joins an endpoint to a container.
    Join(Join),
    /// Removes an endpoint from its container.
    Leave(EndpointId),
    /// Informs the driver about other hosts of a swarm or about published ports.
    Notice,
}

/// `/IpamDriver.RequestPool`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RequestPool {
    /// The subnet, if the user gave one.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
    /// The part of it to allocate from, if the user gave one.
    #[serde(deserialize_with = "or_default")]
    pub sub_pool: String,
    /// Whether IPv6 addresses are wanted.
    #[serde(deserialize_with = "or_default")]
    pub v6: bool,
}

/// `/IpamDriver.ReleasePool`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PoolId {
    /// The pool ID from [`Response::Pool`].
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
}

/// `/IpamDriver.RequestAddress`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RequestAddress {
    /// The pool ID from [`Response::Pool`].
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    /// The address, if the user chose one.
    #[serde(rename = "Address", deserialize_with = "or_default")]
    pub address: String,
    /// Options, such as the purpose of the address.
    #[serde(rename = "Options", deserialize_with = "or_default")]
    pub options: BTreeMap<String, Value>,
}

/// `/IpamDriver.ReleaseAddress`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ReleaseAddress {
    /// The pool ID from [`Response::Pool`].
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    /// The address from [`Response::Address`], without the prefix length.
    #[serde(rename = "Address", deserialize_with = "or_default")]
    pub address: String,
}

/// `/NetworkDriver.CreateNetwork`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CreateNetwork {
    /// The network's ID, assigned by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// Its IPv4 pools.
    #[serde(rename = "IPv4Data", deserialize_with = "or_default")]
    pub v4: Vec<Pool>,
    /// Its IPv6 pools.
    #[serde(rename = "IPv6Data", deserialize_with = "or_default")]
    pub v6: Vec<Pool>,
}

/// An address pool of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Pool {
    /// Its subnet.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
}

/// `/NetworkDriver.DeleteNetwork`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NetworkId {
    /// The network's ID, assigned by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
}

/// `/NetworkDriver.CreateEndpoint`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CreateEndpoint {
    /// The network's ID, assigned by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// The endpoint's ID, assigned by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    /// The addresses that are already assigned.
    #[serde(rename = "Interface", deserialize_with = "or_default")]
    pub interface: Interface,
}

/// The addresses of an endpoint. A field that is not assigned yet is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Interface {
    /// The IPv4 address with its prefix length.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub address: String,
    /// The IPv6 address with its prefix length.
    #[serde(
        rename = "AddressIPv6",
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub address_v6: String,
    /// The MAC address: six bytes in hexadecimal, separated by colons.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
}

/// `/NetworkDriver.DeleteEndpoint`, `/NetworkDriver.EndpointOperInfo`, `/NetworkDriver.Leave`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EndpointId {
    /// The network's ID, assigned by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// The endpoint's ID, assigned by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
}

/// `/NetworkDriver.Join`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Join {
    /// The network's ID, assigned by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// The endpoint's ID, assigned by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    /// The path of the container's network namespace.
    #[serde(rename = "SandboxKey", deserialize_with = "or_default")]
    pub sandbox: String,
}

/// The answers. The JSON form is the content of the variant, without its name.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// Answers [`Request::Activate`].
    #[serde(rename_all = "PascalCase")]
    Manifest {
        /// The implemented protocols.
        implements: [&'static str; 2],
    },
    /// Answers [`Request::NetworkCapabilities`].
    #[serde(rename_all = "PascalCase")]
    NetworkCapabilities {
        /// `local`: the engine does not share its networks with other engines.
        scope: &'static str,
        /// The reach of a network's connectivity.
        connectivity_scope: &'static str,
        /// Whether [`Request::GatewayCheck`] is supported.
        gw_alloc_checker: bool,
    },
    /// Answers [`Request::IpamCapabilities`].
    IpamCapabilities {
        /// Whether an address request must include a MAC address.
        #[serde(rename = "RequiresMACAddress")]
        mac: bool,
        /// Whether a restarted engine must repeat all its requests.
        #[serde(rename = "RequiresRequestReplay")]
        replay: bool,
    },
    /// Answers [`Request::AddressSpaces`].
    #[serde(rename_all = "PascalCase")]
    AddressSpaces {
        /// The address space of networks that belong to one engine.
        local_default_address_space: &'static str,
        /// The address space of networks that several engines share.
        global_default_address_space: &'static str,
    },
    /// Answers [`Request::GatewayCheck`].
    GatewayCheck {
        /// The network needs no IPv4 gateway.
        #[serde(rename = "SkipIPv4")]
        skip_v4: bool,
        /// The network needs no IPv6 gateway.
        #[serde(rename = "SkipIPv6")]
        skip_v6: bool,
    },
    /// Answers [`Request::RequestPool`].
    Pool {
        /// The pool's ID. There is one pool, so it is the same for each network.
        #[serde(rename = "PoolID")]
        id: &'static str,
        /// Its subnet.
        #[serde(rename = "Pool")]
        pool: String,
    },
    /// Answers [`Request::RequestAddress`].
    #[serde(rename_all = "PascalCase")]
    Address {
        /// The address with its prefix length.
        address: String,
    },
    /// Answers [`Request::CreateEndpoint`].
    #[serde(rename_all = "PascalCase")]
    Endpoint {
        /// The addresses that the driver assigned. Must not include those that the engine assigned.
        interface: Interface,
    },
    /// Answers [`Request::EndpointInfo`].
    #[serde(rename_all = "PascalCase")]
    Info {
        /// Free-form data.
        value: Map<String, Value>,
    },
    /// Answers [`Request::Join`].
    #[serde(rename_all = "PascalCase")]
    Joined {
        /// The interface that the engine moves into the container. The answer has no gateway: the
        /// engine provides a default route of its own.
        interface_name: InterfaceName,
    },
    /// Answers all other requests; empty.
    Done {},
}

/// Which interface to move, and its new name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct InterfaceName {
    /// The interface's name in the host's namespace.
    pub src_name: String,
    /// The prefix of its name in the container. The engine appends a number.
    pub dst_prefix: &'static str,
}

/// Why a request is refused. The engine shows the text to its user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request is malformed.
    #[error("{0}")]
    Malformed(String),
    /// There is no such request.
    #[error("the overnode plugin does not support {0}")]
    Unknown(String),
    /// The request cannot be carried out.
    #[error("{0}")]
    Refused(String),
}

impl Refusal {
    /// Creates a [`Refusal::Refused`].
    pub fn new(why: impl fmt::Display) -> Self {
        Self::Refused(why.to_string())
    }
}

impl Request {
    /// Parses a request from its path and body.
    ///
    /// # Errors
    /// Returns [`Refusal::Unknown`] for an unknown path and [`Refusal::Malformed`] for a body that
    /// does not match the path.
    pub fn parse(path: &str, body: &[u8]) -> Result<Self, Refusal> {
        Ok(match path {
            "/Plugin.Activate" => Self::Activate,
            "/NetworkDriver.GetCapabilities" => Self::NetworkCapabilities,
            "/NetworkDriver.GwAllocCheck" => Self::GatewayCheck,
            "/NetworkDriver.CreateNetwork" => {
                let request: CreateNetwork = read(path, body)?;
                check_id("NetworkID", &request.network)?;
                Self::CreateNetwork(request)
            }
            "/NetworkDriver.DeleteNetwork" => {
                let request: NetworkId = read(path, body)?;
                check_id("NetworkID", &request.network)?;
                Self::DeleteNetwork(request)
            }
            "/NetworkDriver.CreateEndpoint" => {
                let request: CreateEndpoint = read(path, body)?;
                check_id("NetworkID", &request.network)?;
                check_id("EndpointID", &request.endpoint)?;
                Self::CreateEndpoint(request)
            }
            "/NetworkDriver.DeleteEndpoint" => Self::DeleteEndpoint(endpoint(path, body)?),
            "/NetworkDriver.EndpointOperInfo" => Self::EndpointInfo(endpoint(path, body)?),
            "/NetworkDriver.Join" => {
                let request: Join = read(path, body)?;
                check_id("NetworkID", &request.network)?;
                check_id("EndpointID", &request.endpoint)?;
                check_sandbox(&request.sandbox)?;
                Self::Join(request)
            }
            "/NetworkDriver.Leave" => Self::Leave(endpoint(path, body)?),
            "/NetworkDriver.DiscoverNew"
            | "/NetworkDriver.DiscoverDelete"
            | "/NetworkDriver.ProgramExternalConnectivity"
            | "/NetworkDriver.RevokeExternalConnectivity" => Self::Notice,
            "/IpamDriver.GetCapabilities" => Self::IpamCapabilities,
            "/IpamDriver.GetDefaultAddressSpaces" => Self::AddressSpaces,
            "/IpamDriver.RequestPool" => Self::RequestPool(read(path, body)?),
            "/IpamDriver.ReleasePool" => Self::ReleasePool(read(path, body)?),
            "/IpamDriver.RequestAddress" => Self::RequestAddress(read(path, body)?),
            "/IpamDriver.ReleaseAddress" => Self::ReleaseAddress(read(path, body)?),
            other => return Err(Refusal::Unknown(quoted(other))),
        })
    }
}

fn endpoint(path: &str, body: &[u8]) -> Result<EndpointId, Refusal> {
    let request: EndpointId = read(path, body)?;
    check_id("EndpointID", &request.endpoint)?;
    Ok(request)
}

fn read<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|why| {
        Refusal::Malformed(format!("the body of {path} is not the expected JSON: {}", reason(&why)))
    })
}

/// Returns true if the text is acceptable as an engine's ID of a network or endpoint.
pub fn is_id(id: &str) -> bool {
    let fits = !id.is_empty() && id.len() <= ID_LIMIT;
    fits && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn check_id(field: &str, id: &str) -> Result<(), Refusal> {
    if is_id(id) {
        return Ok(());
    }
    Err(Refusal::Malformed(format!("{field} {:?} is not a valid ID", quoted(id))))
}

fn check_sandbox(path: &str) -> Result<(), Refusal> {
    let fits = path.starts_with('/') && path.len() <= 4096 && !path.chars().any(char::is_control);
    if fits {
        return Ok(());
    }
    Err(Refusal::Malformed(format!(
        "SandboxKey {:?} is not the path of a network namespace",
        quoted(path)
    )))
}

/// Deserializes `null` as the default. Go encodes an empty map, list or document as `null`.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}
