//! The documents of requests and of most answers; [`super::status`] has the status document.
//!
//! An absent field means "not given" in a request and "not known" in an answer. A request with an
//! unknown field is refused, so that a misspelled option does not go unnoticed.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::attachment::CniEndpoint;
use super::bulk::Mode;
use super::target::{Host, Netns, Target};
use overnode_types::{MacAddr, NodeId, PublicKey, Secret};

/// Starts the node, or adds targets to a running node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// This host's ID in the cluster.
    pub id: NodeId,
    /// The cluster's token.
    pub token: Token,
    /// The targets.
    #[serde(default)]
    pub hosts: Vec<Host>,
    /// The node's nickname, within the limits of [`check_name`]. Default: the host name.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub nickname: Option<String>,
    /// The underlay interface. Default: the interface that routes to the peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The container network's MTU in bytes. Default: the largest that fits the underlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Whether to connect to nodes that other nodes announce. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery: Option<bool>,
    /// Whether to open messages in native XDP on the given interface. Default: in TC.
    #[serde(default)]
    pub xdp: bool,
    /// Whether to serve this host's Docker engine and to create its default network. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker: Option<bool>,
    /// Whether user-space workers seal bulk flows, and with which cipher. Default: workers, with
    /// the cipher that is faster on both ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulk: Option<Mode>,
    /// The number of workers, 1 to 16. Default: half of the cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulk_workers: Option<u8>,
    /// All addresses of the container network. Default: 10.32.0.0/12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<IpNet>,
    /// The part of the subnet that nodes allocate from. Default: 10.40.0.0/13.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<IpNet>,
    /// Whether to serve DNS names to containers. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<bool>,
    /// The domain of the names. Default: `overnode.local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_domain: Option<String>,
    /// Whether the daemon was started for this request. If it found a node on disk, that node was
    /// stopped until now, and a non-empty `hosts` replaces its targets instead of adding to them.
    #[serde(default)]
    pub restart: bool,
}

/// The answer to [`Launch`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launched {
    /// The effect of the request.
    pub outcome: LaunchOutcome,
    /// This node.
    pub id: NodeId,
    /// Its nickname.
    pub nickname: String,
    /// All its targets after the request.
    pub targets: Vec<Host>,
    /// The settings of an existing node that the request changed, each as `key=value`.
    #[serde(default)]
    pub changed: Vec<String>,
}

/// Changes settings of the node, all or none. The node restarts with them, which packets of
/// containers do not notice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// The new values by key; `default` stands for the default of any setting.
    pub changes: BTreeMap<String, String>,
}

/// The settings of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// All of them.
    pub settings: Vec<Setting>,
    /// Those that the request changed, each as `key=value`.
    pub changed: Vec<String>,
}

/// A setting that can change after the launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name, as an option of `launch` without hyphens in front.
    pub key: String,
    /// Its value. `auto` is decided by the node.
    pub value: String,
    /// Whether this is the default.
    pub is_default: bool,
}

/// What a [`Launch`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LaunchOutcome {
    /// It started a new node: there was none on this host.
    Started,
    /// It started an existing node that was stopped, or restarted it with changed settings.
    Restarted,
    /// The node was running already.
    AlreadyRunning,
}

/// Adds targets to the node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// The targets, at least one.
    pub hosts: Vec<Host>,
    /// Whether `hosts` replaces the existing targets.
    #[serde(default)]
    pub replace: bool,
}

/// Removes targets. Removes none of them if one is unknown.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forget {
    /// The targets, at least one.
    pub hosts: Vec<Host>,
}

/// The node's targets after a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// All targets.
    pub targets: Vec<Host>,
}

/// Attaches a network namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The target to attach. A later [`Detach`] names it in the same way.
    pub target: Target,
    /// The location of the network namespace. Required only for a container; other targets imply
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<Netns>,
    /// A static address. A full-length prefix (/32 for IPv4) gets the subnet's length; any other
    /// must have it. Default: the next free address of the range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNet>,
    /// The endpoint's name, within the limits of [`check_name`].
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub name: Option<String>,
    /// Present if a container runtime attaches the endpoint through CNI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniAttach>,
}

/// The CNI part of an [`Attach`].
///
/// The target is the runtime's container. A name that is already in use is ignored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniAttach {
    /// The container runtime's name for the attachment.
    pub endpoint: CniEndpoint,
    /// The MAC address. Default: a random one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// The answer to [`Attach`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its address, with the subnet's prefix length.
    pub address: IpNet,
    /// The interface's name inside the network namespace.
    pub interface: String,
    /// The interface's name on the host.
    pub host_interface: String,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// The MAC address inside the network namespace; present only for a new interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// Detaches a network namespace, whether or not it still exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// The target as it was attached (`netns:…`, `pid:…` or the container's ID), or the endpoint's
    /// name.
    pub target: Target,
    /// The container runtime's name for the attachment, if a runtime attached it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniEndpoint>,
}

/// The answer to [`Detach`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The address that the endpoint had, with the subnet's prefix length.
    pub address: IpNet,
}

/// Adds addresses to a DNS name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsAdd {
    /// The name, with or without the domain.
    pub name: String,
    /// The addresses, at least one.
    pub addresses: Vec<IpAddr>,
}

/// Removes addresses that a [`DnsAdd`] on this node added.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsRemove {
    /// The name, with or without the domain.
    pub name: String,
    /// The addresses; empty to remove all that were added.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// Looks up the addresses of a DNS name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsLookup {
    /// The name, with or without the domain.
    pub name: String,
}

/// The addresses of a DNS name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAddresses {
    /// The name, with this node's domain.
    pub name: String,
    /// After an add or remove, the addresses that this node added. After a lookup, the addresses
    /// that all reachable nodes announce.
    pub addresses: Vec<IpAddr>,
}

/// Reclaims the address space of a node that is gone for good.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The node.
    pub id: NodeId,
}

/// The progress of a reclaim. The reclaim continues by itself; repeat the request to see its
/// progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// The node.
    pub id: NodeId,
    /// Whether the space now belongs to this node.
    pub done: bool,
    /// Nodes that have not agreed yet.
    pub missing: Vec<NodeId>,
}

/// Leaves the cluster and removes everything that the node created on this host.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// Whether to reset even while containers are attached.
    #[serde(default)]
    pub force: bool,
}

/// The answer to [`Reset`]. The node no longer exists, and the daemon exits after it has sent this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WasReset {
    /// The ID of the node; absent if none was launched.
    pub id: Option<NodeId>,
    /// Things that could not be removed, one sentence each.
    pub left: Vec<String>,
}

/// Whether this node can allocate an address for a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Primed {
    /// True if it can.
    pub ready: bool,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

/// Adds an external WireGuard peer, which is not a node of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddExternalPeer {
    /// The peer's public key. If a peer with this key exists, it gets the given settings.
    pub public_key: PublicKey,
    /// The pre-shared key, 32 bytes in base64. It is shared with this peer only.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "secret")]
    pub preshared_key: Option<Secret>,
    /// The peer's endpoint. Without one, the peer must initiate the handshake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    /// The networks that the peer may send from and that are routed to it.
    pub allowed_ips: Vec<IpNet>,
    /// The persistent keepalive interval in seconds, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive_seconds: Option<u16>,
    /// The peer's name, within the limits of [`check_name`].
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub name: Option<String>,
}

/// The answer to [`AddExternalPeer`]: what the peer's configuration needs to know about this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerAdded {
    /// This node's public key: `PublicKey` in the peer's configuration.
    pub public_key: PublicKey,
    /// The UDP port that this node listens on.
    pub port: u16,
    /// The container network: `AllowedIPs` in the peer's configuration.
    pub subnet: IpNet,
    /// Whether the peer existed and was changed.
    pub replaced: bool,
}

/// Removes an external WireGuard peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveExternalPeer {
    /// The peer's public key.
    pub public_key: PublicKey,
}

/// The answer to [`RemoveExternalPeer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerRemoved {
    /// The networks that were routed to the peer.
    pub allowed_ips: Vec<IpNet>,
}

/// The versions of the daemon, of its protocol and of the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The oldest and the newest version of the control protocol that the daemon supports.
    pub protocols: Option<(u16, u16)>,
    /// The kernel release.
    pub kernel: Option<String>,
    /// The daemon's process ID.
    pub pid: u32,
    /// The ID of this host's node, if one was launched.
    pub id: Option<NodeId>,
    /// The state directory.
    pub state_dir: Option<PathBuf>,
}

/// The cluster's token: any text that is not blank. It is wiped from memory when dropped and never
/// printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Token(String);

/// Why a text is not a valid token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// The text is empty or all whitespace.
    #[error(
        "the token is empty: use the same token on every node of the cluster; `overnode token` \
         creates one"
    )]
    Empty,
    /// The text is longer than [`Token::MAX`] bytes.
    #[error("the token is longer than {} bytes", Token::MAX)]
    TooLong,
}

impl Token {
    /// The longest token, in bytes.
    pub const MAX: usize = 4096;

    /// Creates a token after checking its length. Wipes a rejected text.
    ///
    /// # Errors
    /// Returns a [`BadToken`] if the text is blank or longer than [`Self::MAX`] bytes.
    pub fn new(mut text: String) -> Result<Self, BadToken> {
        let bad = if text.trim().is_empty() {
            BadToken::Empty
        } else if text.len() > Self::MAX {
            BadToken::TooLong
        } else {
            return Ok(Self(text));
        };
        text.zeroize();
        Err(bad)
    }

    /// Returns the secret text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// The text is not a valid name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a name has 1 to 128 letters, digits, dots, hyphens and underscores, and begins with a letter \
     or digit"
)]
pub struct BadName;

/// Checks that a name can be shown in a table and typed in a command. All names of hosts and
/// containers pass.
///
/// # Errors
/// Returns [`BadName`] if it cannot.
pub fn check_name(name: &str) -> Result<(), BadName> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let fits = name.len() <= 128 && name.bytes().all(known);
    if fits && name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        Ok(())
    } else {
        Err(BadName)
    }
}

fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(deserializer)?;
    if let Some(name) = &name {
        check_name(name).map_err(serde::de::Error::custom)?;
    }
    Ok(name)
}

mod secret {
    use data_encoding::BASE64;
    use serde::{Deserialize, Deserializer, Serializer};
    use zeroize::Zeroize;

    use overnode_types::Secret;

    pub(super) fn serialize<S: Serializer>(
        secret: &Option<Secret>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let Some(secret) = secret else { return serializer.serialize_none() };
        let mut text = BASE64.encode(&secret.0);
        let done = serializer.serialize_str(&text);
        text.zeroize();
        done
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Secret>, D::Error> {
        let Some(mut text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let secret = text.parse().map_err(serde::de::Error::custom);
        text.zeroize();
        secret.map(Some)
    }
}
