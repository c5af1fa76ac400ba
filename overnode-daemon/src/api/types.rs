//! The documents of requests and of most answers; [`super::status`] has the large one.
//!
//! A field that is absent means "not given" in a request and "not known" in an answer. Unknown
//! fields in a request are refused: a misspelt option must not be silently without effect.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::target::{Host, Netns, Target};
use crate::bulk::control::Mode;
use crate::store::CniEndpoint;
use crate::types::{NodeId, PublicKey, Secret};

/// Starts the node, or adds targets to one that runs already.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// This host's ID in the cluster.
    pub id: NodeId,
    /// The cluster's token.
    pub token: Token,
    /// Targets.
    #[serde(default)]
    pub hosts: Vec<Host>,
    /// A name for people, as [`check_name`] allows. Default: the host's name.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub nickname: Option<String>,
    /// The underlay's interface. Default: whichever routes to the peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The container network's MTU in bytes. Default: what fits the underlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Whether to connect to nodes that other nodes tell of. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discovery: Option<bool>,
    /// Open messages in native XDP on the interface given. Default: in TC.
    #[serde(default)]
    pub xdp: bool,
    /// Whether to serve this host's Docker engine, and to make its default network. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker: Option<bool>,
    /// Whether workers in user space seal bulk flows, and with which cipher. Default: whichever
    /// both ends do faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulk: Option<Mode>,
    /// How many of them, 1 to 16. Default: half of the cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bulk_workers: Option<u8>,
    /// All addresses of the container network. Default: 10.32.0.0/12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<IpNet>,
    /// The part of the subnet that nodes give out by themselves. Default: 10.40.0.0/13.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<IpNet>,
    /// Whether names are served to containers. Default: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<bool>,
    /// The domain under which they are. Default: `overnode.local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_domain: Option<String>,
    /// The daemon was started for this request. When it found a node on disk, that node was
    /// therefore stopped until now: `hosts`, when there are any, replace its targets instead of
    /// being added to them.
    #[serde(default)]
    pub restart: bool,
}

/// What became of a [`Launch`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launched {
    /// Which of the three cases it was.
    pub outcome: LaunchOutcome,
    /// This node.
    pub id: NodeId,
    /// Its name for people.
    pub nickname: String,
    /// All its targets now.
    pub targets: Vec<Host>,
}

/// What became of a [`Launch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LaunchOutcome {
    /// There was no node on this host.
    Started,
    /// The node existed and was stopped.
    Restarted,
    /// The node was running.
    AlreadyRunning,
}

/// Adds targets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// At least one.
    pub hosts: Vec<Host>,
    /// Instead of the targets that there are.
    #[serde(default)]
    pub replace: bool,
}

/// Removes targets: all of them, or none when one is unknown.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forget {
    /// At least one.
    pub hosts: Vec<Host>,
}

/// The targets after a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// All of them.
    pub targets: Vec<Host>,
}

/// Plugs a network namespace in.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// What was named; a later [`Detach`] names it in the same way.
    pub target: Target,
    /// Where its network namespace is. Needed for a container only, else it follows from `target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<Netns>,
    /// A static address with the subnet's prefix. Default: the next free one of the range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNet>,
    /// A name for people, as [`check_name`] allows.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub name: Option<String>,
    /// A container runtime asks for it, through CNI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniAttach>,
}

/// What a container runtime wants beside that. The target is its container; an address with a
/// prefix as long as addresses are gets the subnet's; a name that is taken is left out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniAttach {
    /// What it calls the attachment.
    pub endpoint: CniEndpoint,
    /// A hardware address. Default: one by chance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<[u8; 6]>,
}

/// An endpoint that was plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its address with the subnet's prefix.
    pub address: IpNet,
    /// The interface's name inside the network namespace.
    pub interface: String,
    /// The interface's name on the host.
    pub host_interface: String,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// The hardware address inside the network namespace, if it was made just now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Plugs a network namespace out, whether or not it still exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// As it was attached: `netns:…`, `pid:…` or the container's ID; or else the name it was given.
    pub target: Target,
    /// What the container runtime that had it plugged in calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniEndpoint>,
}

/// An endpoint that was plugged out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The address that it had, with the subnet's prefix.
    pub address: IpNet,
}

/// Makes a name stand for addresses, in addition to those that it stands for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsAdd {
    /// With or without the domain.
    pub name: String,
    /// At least one.
    pub addresses: Vec<IpAddr>,
}

/// Undoes a [`DnsAdd`] of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsRemove {
    /// With or without the domain.
    pub name: String,
    /// Which addresses; none for all that were added.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// Asks what a name stands for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsLookup {
    /// With or without the domain.
    pub name: String,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAddresses {
    /// The name with this node's domain.
    pub name: String,
    /// After adding and removing, those that were added on this node; after a lookup, all that
    /// nodes tell of which are reached.
    pub addresses: Vec<IpAddr>,
}

/// Takes back the address space of a node that is gone for good.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The node.
    pub id: NodeId,
}

/// How far taking back the address space of a node is. It goes on by itself; asking again tells
/// more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// The node.
    pub id: NodeId,
    /// True if its space is this node's now.
    pub done: bool,
    /// Nodes that have not agreed yet.
    pub missing: Vec<NodeId>,
}

/// Leaves the cluster and removes everything that the node made on this host.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// Even while containers are attached.
    #[serde(default)]
    pub force: bool,
}

/// The node is no more; the daemon exits after it has sent this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WasReset {
    /// Which node it was; absent when none was launched.
    pub id: Option<NodeId>,
    /// What could not be removed, one sentence each.
    pub left: Vec<String>,
}

/// Whether this node can give an address to a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Primed {
    /// Whether it can.
    pub ready: bool,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

/// A WireGuard peer that is no node of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddExternalPeer {
    /// Its key. A peer with this key that exists already gets the settings given here.
    pub public_key: PublicKey,
    /// Shared with it alone: 32 bytes in base64.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "secret")]
    pub preshared_key: Option<Secret>,
    /// Where it listens. Without one, it must call first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    /// What it may send from, and what is sent to it.
    pub allowed_ips: Vec<IpNet>,
    /// Send something at least this often, in seconds; at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_keepalive_seconds: Option<u16>,
    /// A name for people, as [`check_name`] allows.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "name")]
    pub name: Option<String>,
}

/// What the other side has to know of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerAdded {
    /// This node's key, the peer's `PublicKey`.
    pub public_key: PublicKey,
    /// The UDP port that this node listens on.
    pub port: u16,
    /// What this node sends from, the peer's `AllowedIPs`.
    pub subnet: IpNet,
    /// Whether the peer existed already and was changed.
    pub replaced: bool,
}

/// Removes a WireGuard peer that is no node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveExternalPeer {
    /// Its key.
    pub public_key: PublicKey,
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerRemoved {
    /// What it could be reached at.
    pub allowed_ips: Vec<IpNet>,
}

/// Of the daemon and what it runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The oldest and the newest control protocol that it speaks.
    pub protocols: Option<(u16, u16)>,
    /// The kernel's release.
    pub kernel: Option<String>,
    /// The daemon's process ID.
    pub pid: u32,
    /// This host's node, when it was launched.
    pub id: Option<NodeId>,
    /// The state directory in use.
    pub state_dir: Option<PathBuf>,
}

/// The cluster's token: any text but an empty one. Wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Token(String);

/// A token that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// Nothing, or nothing but spaces.
    #[error(
        "the token is empty: give the same one on every node of the cluster; `overnode token` makes one"
    )]
    Empty,
    /// More than [`Token::MAX`] bytes.
    #[error("the token is longer than {} bytes", Token::MAX)]
    TooLong,
}

impl Token {
    /// The longest token, in bytes.
    pub const MAX: usize = 4096;

    /// Checks its length.
    ///
    /// # Errors
    /// [`BadToken`]
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

    /// The text.
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

/// A name that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a name has 1 to 128 letters, digits, dots, hyphens and underscores, and begins with a letter or a digit"
)]
pub struct BadName;

/// Whether a name can be shown in a table and typed in a command. Every host's and container's name
/// can.
///
/// # Errors
/// [`BadName`]
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

    use crate::types::Secret;

    pub fn serialize<S: Serializer>(
        secret: &Option<Secret>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let Some(secret) = secret else { return serializer.serialize_none() };
        let mut text = BASE64.encode(&secret.0);
        let done = serializer.serialize_str(&text);
        text.zeroize();
        done
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Secret>, D::Error> {
        let Some(mut text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let secret = text.parse().map_err(serde::de::Error::custom);
        text.zeroize();
        secret.map(Some)
    }
}
