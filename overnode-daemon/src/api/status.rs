//! What `status` tells. Durations and ages are whole seconds of a clock that never jumps
//! (`…_seconds`, `…_seconds_ago`); points in time are seconds since 1970 (`…_unix_seconds`). What
//! is not known is absent.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::health::Health;
use super::target::{Host, Target};
use crate::bulk::control::Mode;
use crate::bulk::message::Cipher;
pub use crate::store::{CniEndpoint, Kind};
use crate::types::{Network, NodeId, PublicKey};

/// The node and everything it knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What is wrong, and what to do.
    #[serde(default)]
    pub health: Health,
    /// This node.
    pub node: NodeStatus,
    /// In the order in which they were added.
    pub targets: Vec<TargetStatus>,
    /// All nodes that are known, this one first, then by ID.
    pub peers: Vec<PeerStatus>,
    /// Control connections and attempts at one.
    pub connections: Vec<ConnectionStatus>,
    /// What is attached, by address.
    pub endpoints: Vec<EndpointStatus>,
    /// Whose the address space is.
    pub ipam: IpamStatus,
    /// Names, and who serves them to containers.
    #[serde(default)]
    pub dns: DnsStatus,
    /// WireGuard peers that are no nodes, by address.
    #[serde(default)]
    pub external_peers: Vec<ExternalPeerStatus>,
    /// What became of packets, by code; those that are zero may be left out.
    pub counters: Vec<CounterStatus>,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its ID.
    pub id: NodeId,
    /// Its name for people.
    pub nickname: String,
    /// What it is doing.
    pub state: NodeState,
    /// What is wrong, one sentence each, with what to do; what is about addresses is in
    /// [`IpamStatus`].
    #[serde(default)]
    pub problems: Vec<String>,
    /// Why this host cannot take packets from others on some of its interfaces, one sentence each.
    #[serde(default)]
    pub underlay_problems: Vec<String>,
    /// The daemon's version.
    pub version: String,
    /// How long the daemon has been running.
    pub uptime_seconds: u64,
    /// The node's own address in the container network.
    pub address: Option<IpAddr>,
    /// The underlay's addresses of this host.
    #[serde(default)]
    pub underlay: Vec<IpAddr>,
    /// The underlay's interface.
    pub interface: Option<String>,
    /// The containers' MTU in bytes.
    pub mtu: Option<u32>,
    /// The cluster's addresses.
    pub network: Network,
    /// The node's key, for Noise and WireGuard.
    pub public_key: PublicKey,
    /// Whether it connects to nodes that others tell of.
    pub discovery: Option<bool>,
    /// How the programs are attached: `tcx`, `clsact`, with `+xdp` where XDP opens.
    pub attachment: Option<String>,
    /// The workers of the bulk path.
    #[serde(default)]
    pub bulk: WorkersStatus,
}

/// What a node is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// Not everything is in place yet.
    Starting,
    /// It does its work.
    Running,
    /// It does its work, but one of the lists of problems has something that needs an operator.
    Impaired,
    /// A reset is under way.
    Leaving,
}

/// One target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// As it was given.
    pub host: Host,
    /// What became of it.
    pub state: TargetState,
    /// Which node it turned out to be.
    pub peer: Option<NodeId>,
    /// When it is tried next.
    pub next_try_in_seconds: Option<u64>,
    /// Why the last try failed.
    pub last_error: Option<LastError>,
}

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// A try is under way.
    Connecting,
    /// There is a connection.
    Established,
    /// It will be tried again.
    Retrying,
    /// It is not tried again until something changes.
    Failed,
    /// It is this node.
    Myself,
}

/// The last thing that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// One line.
    pub message: String,
    /// When.
    pub seconds_ago: Option<u64>,
}

/// One node of the cluster, also this one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its ID.
    pub id: NodeId,
    /// Its name for people; empty when nobody has told yet.
    pub nickname: String,
    /// Whether it is this node.
    pub myself: bool,
    /// Whether it is reachable, directly or through others: over control connections, and for
    /// packets of containers.
    pub reachable: Option<bool>,
    /// How long that has been so.
    pub since_seconds: Option<u64>,
    /// How data gets there.
    pub path: Option<Path>,
    /// Its own address in the container network.
    pub address: Option<IpAddr>,
    /// Where it can be connected to.
    #[serde(default)]
    pub underlay: Vec<SocketAddr>,
    /// Its key.
    pub public_key: Option<PublicKey>,
    /// Its version of the software.
    pub version: Option<String>,
    /// Its control connections, as it tells of them.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
    /// The data session with it; absent for this node itself.
    pub data: Option<DataStatus>,
}

/// How data gets to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// Straight over the underlay.
    Direct,
    /// Through another node.
    Via(NodeId),
}

/// A control connection that a peer has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Who called; not known of other nodes' connections.
    pub direction: Option<Direction>,
    /// The other end's address.
    pub remote: Option<SocketAddr>,
    /// The other end.
    pub peer: NodeId,
    /// Its name for people.
    pub nickname: Option<String>,
    /// Whether both ends tell of it: only then is it established.
    pub state: ConnectionState,
}

/// The data session with a peer and what went over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataStatus {
    /// Whether packets can be sent.
    pub session: SessionState,
    /// How old the keys in use are.
    pub session_age_seconds: Option<u64>,
    /// Where packets go.
    pub endpoint: Option<SocketAddr>,
    /// The largest packet of a container that fits, in bytes.
    pub mtu: Option<u32>,
    /// Which way packets take; absent for a peer that is no node, and before it is known.
    #[serde(default)]
    pub route: Option<RouteStatus>,
    /// Plaintext received, in bytes.
    pub rx_bytes: u64,
    /// Plaintext sent, in bytes.
    pub tx_bytes: u64,
    /// Messages received.
    pub rx_packets: Option<u64>,
    /// Messages sent.
    pub tx_packets: Option<u64>,
    /// When something was received last.
    pub received_seconds_ago: Option<u64>,
    /// Why the last handshake failed.
    pub last_error: Option<LastError>,
    /// What workers do for its flows that move a lot; absent without workers. Their bytes and
    /// messages are counted above, too.
    #[serde(default)]
    pub bulk: Option<BulkStatus>,
}

/// What the workers of the bulk path do for a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkStatus {
    /// Whether flows that move a lot go through workers; else the programs take them, as all
    /// others.
    pub in_use: bool,
    /// What seals them.
    pub cipher: Cipher,
    /// Age of the keys in use, in seconds.
    #[serde(default)]
    pub session_age_seconds: Option<u64>,
    /// Plaintext received through workers, in bytes.
    pub rx_bytes: u64,
    /// Plaintext sent through workers, in bytes.
    pub tx_bytes: u64,
    /// Messages received by workers.
    pub rx_packets: u64,
    /// Messages sent by workers.
    pub tx_packets: u64,
    /// Plaintext received through workers in the last second, in bits.
    pub rx_bits_per_second: u64,
    /// Plaintext sent through workers in the last second, in bits.
    pub tx_bits_per_second: u64,
    /// How often the peer's workers have fallen silent while something was sent to them.
    pub silences: u64,
}

/// The workers of the bulk path on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkersStatus {
    /// What was chosen at launch.
    pub mode: Mode,
    /// How many work.
    pub workers: usize,
    /// Their process.
    pub pid: Option<i32>,
    /// How fast one of them is with each cipher, in MiB a second.
    pub speeds: BTreeMap<String, u32>,
    /// Packets and messages that they dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Why there are none.
    pub error: Option<String>,
}

/// Which way packets to a node take, and what the probes of the straight path say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// Straight or through another node; absent if there is no way.
    pub path: Option<Path>,
    /// For how long it has been this way.
    pub since_seconds: u64,
    /// Whether packets pass straight, in both directions.
    pub straight: bool,
    /// Round-trip time of probes, smoothed, in microseconds.
    pub rtt_microseconds: Option<u64>,
    /// How many of a thousand probes were lost lately.
    pub loss_per_mille: Option<u16>,
    /// What went wrong last on the straight path.
    pub last_error: Option<LastError>,
}

/// Whether packets can be sent to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// There are no keys: packets are dropped.
    None,
    /// A handshake is under way and there are no keys yet: packets are dropped.
    Handshake,
    /// They can.
    Established,
    /// The keys are too old: packets are dropped.
    Expired,
}

/// A control connection, or an attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Who called.
    pub direction: Direction,
    /// The other end: an address with port, or the name of a target that was never resolved.
    pub remote: String,
    /// What became of it.
    pub state: ConnectionState,
    /// How long that has been so.
    pub since_seconds: Option<u64>,
    /// The control connection's encryption, such as `Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s`.
    pub encryption: Option<String>,
    /// Who is at the other end.
    pub peer: Option<NodeId>,
    /// Its name for people.
    pub nickname: Option<String>,
    /// Round trip time, in microseconds.
    pub rtt_microseconds: Option<u64>,
    /// The largest packet of a container that fits on the way to that node, in bytes; absent
    /// without a connection.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Which way packets of containers take to that node; absent without a connection.
    #[serde(default)]
    pub route: Option<RouteStatus>,
    /// When it is tried next; absent when it never is, or is established.
    pub next_try_in_seconds: Option<u64>,
    /// Why it is not established, or why it was not before.
    pub last_error: Option<LastError>,
    /// What workers do for flows to that node that move a lot; absent without workers.
    #[serde(default)]
    pub bulk: Option<BulkStatus>,
}

/// Who called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// This node.
    Outbound,
    /// The other one.
    Inbound,
}

/// What became of a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectionState {
    /// Being dialled, or shaking hands.
    Connecting,
    /// Only one end tells of it yet.
    Pending,
    /// In use.
    Established,
    /// Will be dialled again.
    Retrying,
    /// Will not be dialled again, or was refused.
    Failed,
}

/// Something attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// Who plugged it in.
    #[serde(default)]
    pub kind: Kind,
    /// A name for people; an engine's container's.
    pub name: Option<String>,
    /// As it was attached; an engine's: the container's ID, or the endpoint's as long as that is
    /// not known.
    pub target: Target,
    /// The image that the container runs, where an engine tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What a container runtime calls it; `target` is its container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniEndpoint>,
    /// Its address with the subnet's prefix.
    pub address: IpNet,
    /// Whether the address was asked for, instead of given out.
    #[serde(rename = "static")]
    pub fixed: bool,
    /// The interface's name on the host.
    pub interface: String,
    /// When it was attached.
    pub attached_unix_seconds: Option<u64>,
    /// Whether it works.
    pub state: EndpointState,
}

/// Whether an endpoint works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// It does.
    Attached,
    /// An engine has the address, for a container that is not plugged in at the moment.
    Reserved,
    /// Its interface is gone; the address is still kept.
    Gone,
}

/// Whose the address space is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IpamStatus {
    /// Whether this node can give an address to a container.
    pub ready: bool,
    /// Why it cannot.
    pub waiting_for: Option<String>,
    /// By ID: every node that gives addresses out, and every quarter's owner by birth of whom
    /// nothing was heard.
    pub owners: Vec<RangeOwner>,
    /// Who lent what to whom, by lender and borrower.
    #[serde(default)]
    pub loans: Vec<LoanStatus>,
    /// What is wrong with addresses, one sentence each, with what to do.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What has happened lately or could not be done, one sentence each.
    #[serde(default)]
    pub notices: Vec<String>,
    /// Nodes whose space this node takes back.
    #[serde(default)]
    pub reclaims: Vec<ReclaimStatus>,
}

/// A node whose space is taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimStatus {
    /// The node that is gone for good.
    pub id: NodeId,
    /// Nodes that have not agreed yet.
    pub missing: Vec<NodeId>,
}

/// What one node has lent to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoanStatus {
    /// The node that lends.
    pub lender: NodeId,
    /// The node that gives these addresses out.
    pub borrower: NodeId,
    /// How many they are.
    pub addresses: u64,
    /// The same as networks, ascending.
    pub networks: Vec<IpNet>,
    /// Whether the lender is reachable; true for this node.
    pub lender_reachable: bool,
    /// Whether the borrower is reachable; true for this node.
    pub borrower_reachable: bool,
}

/// A node that owns address space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RangeOwner {
    /// The node.
    pub id: NodeId,
    /// Its name for people; empty when nobody has told yet.
    pub nickname: String,
    /// The addresses it can give out, borrowed ones included, lent ones not.
    pub addresses: u64,
    /// That is this much of the range, 0 to 100.
    pub percent: f64,
    /// How many of them are in use.
    pub active: Option<u64>,
    /// Whether the node is reachable; true for this one.
    pub reachable: Option<bool>,
    /// What leads to it, as networks: also what it has lent, for which there is a longer prefix at
    /// the borrower.
    #[serde(default)]
    pub ranges: Vec<IpNet>,
}

/// Names, and who serves them to containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// Whether this node serves them.
    pub serving: bool,
    /// At which address: the name server to give to containers of this host.
    pub address: Option<IpAddr>,
    /// Under which domain.
    pub domain: Option<String>,
    /// Also under these.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The host's own resolvers, which are asked for everything else.
    #[serde(default)]
    pub upstream: Vec<IpAddr>,
    /// Queries of containers since the daemon started.
    pub queries: u64,
    /// Of those, asked of the host's resolvers.
    pub forwarded: u64,
    /// Of those, without an answer from there.
    pub failed: u64,
    /// Queries that were refused: malformed, or too many at once.
    pub refused: u64,
    /// By name, then by address.
    #[serde(default)]
    pub entries: Vec<DnsEntry>,
}

/// A name and an address that it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsEntry {
    /// Without the domain.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Which node says so.
    pub node: NodeId,
    /// Its name for people; empty when nobody has told yet.
    pub nickname: String,
    /// Whether that node is reached: only then is the name served.
    pub reachable: bool,
}

/// A WireGuard peer that is no node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerStatus {
    /// Its key.
    pub public_key: PublicKey,
    /// A name for people.
    pub name: Option<String>,
    /// Whether a pre-shared key is set.
    pub preshared_key: bool,
    /// What it may send from, and what is sent to it.
    pub allowed_ips: Vec<IpNet>,
    /// The interval, when set.
    pub persistent_keepalive_seconds: Option<u16>,
    /// The session with it and what went over it.
    pub data: Option<DataStatus>,
}

/// What became of some packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterStatus {
    /// The code's name.
    pub reason: String,
    /// What it means, in a sentence.
    pub description: String,
    /// Whether these packets were dropped.
    pub dropped: bool,
    /// How many.
    pub count: u64,
}
