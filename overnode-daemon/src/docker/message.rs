//! The documents of the two protocols, as `libnetwork/drivers/remote/api` and
//! `libnetwork/ipams/remote/api` of moby/moby name them.
//!
//! An engine may know fields that are not here, and may send `null` for an empty map or document:
//! neither is an error.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::text::{quoted, reason};

/// The largest request that is read, in bytes.
pub const BODY_LIMIT: usize = 256 * 1024;
/// The longest ID of the engine that is taken, in bytes. It makes them with 64.
pub const ID_LIMIT: usize = 128;

/// Everything that an engine asks of a plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Once for each engine process: what can this plugin do?
    Activate,
    /// What network driver is it?
    NetworkCapabilities,
    /// What address driver is it?
    IpamCapabilities,
    /// What do its address spaces call themselves?
    AddressSpaces,
    /// Does a network need an address for a gateway? Engine 28 and later.
    GatewayCheck,
    /// A pool of addresses for a network.
    RequestPool(RequestPool),
    /// The network is gone.
    ReleasePool(PoolId),
    /// An address for an endpoint, or for a gateway.
    RequestAddress(RequestAddress),
    /// The endpoint is gone.
    ReleaseAddress(ReleaseAddress),
    /// A network.
    CreateNetwork(CreateNetwork),
    /// The network is gone.
    DeleteNetwork(NetworkId),
    /// An endpoint with an address.
    CreateEndpoint(CreateEndpoint),
    /// The endpoint is gone.
    DeleteEndpoint(EndpointId),
    /// What is known of an endpoint?
    EndpointInfo(EndpointId),
    /// A container has the endpoint.
    Join(Join),
    /// The container has it no longer.
    Leave(EndpointId),
    /// Told for the driver's information: other hosts of a swarm, published ports.
    Notice,
}

/// `/IpamDriver.RequestPool`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RequestPool {
    /// The network's addresses, if the user chose them.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
    /// The part that is given out, if the user chose one.
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
    /// As it was answered.
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
}

/// `/IpamDriver.RequestAddress`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RequestAddress {
    /// As it was answered.
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    /// The address, if the user chose one.
    #[serde(rename = "Address", deserialize_with = "or_default")]
    pub address: String,
    /// What it is for.
    #[serde(rename = "Options", deserialize_with = "or_default")]
    pub options: BTreeMap<String, Value>,
}

/// `/IpamDriver.ReleaseAddress`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ReleaseAddress {
    /// As it was answered.
    #[serde(rename = "PoolID", deserialize_with = "or_default")]
    pub pool: String,
    /// As it was answered, without the prefix.
    #[serde(rename = "Address", deserialize_with = "or_default")]
    pub address: String,
}

/// `/NetworkDriver.CreateNetwork`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CreateNetwork {
    /// Made by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// Its IPv4 pools.
    #[serde(rename = "IPv4Data", deserialize_with = "or_default")]
    pub v4: Vec<Pool>,
    /// Its IPv6 pools.
    #[serde(rename = "IPv6Data", deserialize_with = "or_default")]
    pub v6: Vec<Pool>,
}

/// A pool of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Pool {
    /// Its addresses.
    #[serde(deserialize_with = "or_default")]
    pub pool: String,
}

/// `/NetworkDriver.DeleteNetwork`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NetworkId {
    /// Made by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
}

/// `/NetworkDriver.CreateEndpoint`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CreateEndpoint {
    /// Made by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// Made by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    /// What it already has.
    #[serde(rename = "Interface", deserialize_with = "or_default")]
    pub interface: Interface,
}

/// What an endpoint has; what is empty is not settled yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Interface {
    /// With the prefix.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub address: String,
    /// With the prefix.
    #[serde(
        rename = "AddressIPv6",
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub address_v6: String,
    /// Six bytes in hexadecimal, with colons.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
}

/// `/NetworkDriver.DeleteEndpoint`, `/NetworkDriver.EndpointOperInfo`, `/NetworkDriver.Leave`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EndpointId {
    /// Made by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// Made by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
}

/// `/NetworkDriver.Join`
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Join {
    /// Made by the engine.
    #[serde(rename = "NetworkID", deserialize_with = "or_default")]
    pub network: String,
    /// Made by the engine.
    #[serde(rename = "EndpointID", deserialize_with = "or_default")]
    pub endpoint: String,
    /// The path of the container's network namespace.
    #[serde(rename = "SandboxKey", deserialize_with = "or_default")]
    pub sandbox: String,
}

/// The answers. In JSON only the content is seen, not the variant.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// To [`Request::Activate`].
    #[serde(rename_all = "PascalCase")]
    Manifest {
        /// The protocols.
        implements: [&'static str; 2],
    },
    /// To [`Request::NetworkCapabilities`].
    #[serde(rename_all = "PascalCase")]
    NetworkCapabilities {
        /// Whether the engine shares its networks with others: `local`.
        scope: &'static str,
        /// How far its networks reach.
        connectivity_scope: &'static str,
        /// Whether [`Request::GatewayCheck`] is understood.
        gw_alloc_checker: bool,
    },
    /// To [`Request::IpamCapabilities`].
    IpamCapabilities {
        /// Whether an address can only be given to a known hardware address.
        #[serde(rename = "RequiresMACAddress")]
        mac: bool,
        /// Whether a restarted engine has to ask for everything again.
        #[serde(rename = "RequiresRequestReplay")]
        replay: bool,
    },
    /// To [`Request::AddressSpaces`].
    #[serde(rename_all = "PascalCase")]
    AddressSpaces {
        /// For networks of one engine.
        local_default_address_space: &'static str,
        /// For networks of many.
        global_default_address_space: &'static str,
    },
    /// To [`Request::GatewayCheck`].
    GatewayCheck {
        /// No IPv4 gateway is needed.
        #[serde(rename = "SkipIPv4")]
        skip_v4: bool,
        /// No IPv6 gateway is needed.
        #[serde(rename = "SkipIPv6")]
        skip_v6: bool,
    },
    /// To [`Request::RequestPool`].
    Pool {
        /// The same for each network: there is one pool.
        #[serde(rename = "PoolID")]
        id: &'static str,
        /// Its addresses.
        #[serde(rename = "Pool")]
        pool: String,
    },
    /// To [`Request::RequestAddress`].
    #[serde(rename_all = "PascalCase")]
    Address {
        /// With the prefix.
        address: String,
    },
    /// To [`Request::CreateEndpoint`].
    #[serde(rename_all = "PascalCase")]
    Endpoint {
        /// What the driver settled; never what was settled before.
        interface: Interface,
    },
    /// To [`Request::EndpointInfo`].
    #[serde(rename_all = "PascalCase")]
    Info {
        /// Anything.
        value: Map<String, Value>,
    },
    /// To [`Request::Join`].
    #[serde(rename_all = "PascalCase")]
    Joined {
        /// What the engine has to move into the container. There is no gateway: the engine sees to
        /// a way out of its own.
        interface_name: InterfaceName,
    },
    /// To all others: nothing.
    Done {},
}

/// What to move where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct InterfaceName {
    /// Its name in the host's namespace.
    pub src_name: String,
    /// How its name in the container begins; the engine appends a number.
    pub dst_prefix: &'static str,
}

/// Why a request is not done, in words for people: the engine shows them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It cannot be understood.
    #[error("{0}")]
    Malformed(String),
    /// No such request.
    #[error("the overnode plugin does not know {0}")]
    Unknown(String),
    /// It cannot be done.
    #[error("{0}")]
    Refused(String),
}

impl Refusal {
    /// It cannot be done.
    pub fn new(why: impl fmt::Display) -> Self {
        Self::Refused(why.to_string())
    }
}

impl Request {
    /// Reads a request from its path and its body.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] for another path, [`Refusal::Malformed`] for a body that is not what
    /// belongs to it.
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
        Refusal::Malformed(format!(
            "the body of {path} is not the JSON that is expected: {}",
            reason(&why)
        ))
    })
}

/// True for what an engine may call its networks and endpoints.
pub fn is_id(id: &str) -> bool {
    let fits = !id.is_empty() && id.len() <= ID_LIMIT;
    fits && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn check_id(field: &str, id: &str) -> Result<(), Refusal> {
    if is_id(id) {
        return Ok(());
    }
    Err(Refusal::Malformed(format!("{field} {:?} cannot be an ID of an engine", quoted(id))))
}

fn check_sandbox(path: &str) -> Result<(), Refusal> {
    let fits = path.starts_with('/') && path.len() <= 4096 && !path.chars().any(char::is_control);
    if fits {
        return Ok(());
    }
    Err(Refusal::Malformed(format!(
        "SandboxKey {:?} is no path of a network namespace",
        quoted(path)
    )))
}

/// `null` is what Go makes of an empty map, list or document.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}
