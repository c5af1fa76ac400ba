//! The document that `GET /v1/status` returns.
//!
//! Durations and ages (`…_seconds`, `…_seconds_ago`) are whole seconds of a monotonic clock. Points
//! in time (`…_unix_seconds`) are seconds since 1970. Unknown values are absent.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::attachment::{CniEndpoint, Kind};
use super::bulk::{Cipher, Mode};
use super::health::Health;
use super::target::{Host, Target};
use overnode_types::{Network, NodeId, PublicKey};

/// The status of a node: everything it knows about itself and the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What is wrong, and what to do about it.
    #[serde(default)]
    pub health: Health,
    /// This node.
    pub node: NodeStatus,
    /// The targets, in the order in which they were added.
    pub targets: Vec<TargetStatus>,
    /// All known nodes: this node first, then by ID.
    pub peers: Vec<PeerStatus>,
    /// Control connections, including attempts.
    pub connections: Vec<ConnectionStatus>,
    /// Attached endpoints, by address.
    pub endpoints: Vec<EndpointStatus>,
    /// The owners of the address space.
    pub ipam: IpamStatus,
    /// DNS names and the service that containers query.
    #[serde(default)]
    pub dns: DnsStatus,
    /// External WireGuard peers, by address.
    #[serde(default)]
    pub external_peers: Vec<ExternalPeerStatus>,
    /// Packet counters, by code. Counters that are zero may be omitted.
    pub counters: Vec<CounterStatus>,
}

/// The status of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its ID.
    pub id: NodeId,
    /// Its nickname.
    pub nickname: String,
    /// What the node is doing.
    pub state: NodeState,
    /// Problems, one sentence each, with what to do. Problems with addresses are in [`IpamStatus`].
    #[serde(default)]
    pub problems: Vec<String>,
    /// Reasons why some of this host's interfaces cannot take packets from other nodes, one
    /// sentence each.
    #[serde(default)]
    pub underlay_problems: Vec<String>,
    /// The daemon's version.
    pub version: String,
    /// Time since the daemon started, in seconds.
    pub uptime_seconds: u64,
    /// The node's own address in the container network.
    pub address: Option<IpAddr>,
    /// This host's addresses on the underlay.
    #[serde(default)]
    pub underlay: Vec<IpAddr>,
    /// The underlay interface.
    pub interface: Option<String>,
    /// The MTU of containers, in bytes.
    pub mtu: Option<u32>,
    /// The address ranges of the cluster.
    pub network: Network,
    /// The node's public key, for Noise and WireGuard.
    pub public_key: PublicKey,
    /// Whether the node connects to nodes that it learns of from other nodes.
    pub discovery: Option<bool>,
    /// Settings that differ from the defaults, each as `key=value`, without the nickname.
    #[serde(default)]
    pub settings: Vec<String>,
    /// How the eBPF programs are attached: `tcx` or `clsact`, with `+xdp` if XDP opens messages.
    pub attachment: Option<String>,
    /// The workers of the bulk path.
    #[serde(default)]
    pub bulk: WorkersStatus,
}

/// The state of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// The node is still being set up.
    Starting,
    /// The node works.
    Running,
    /// The node works, but one of the lists of problems has an entry that needs an operator.
    Impaired,
    /// A reset is under way.
    Leaving,
}

/// The status of one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// The host, as it was given.
    pub host: Host,
    /// The state of its connection.
    pub state: TargetState,
    /// The node that the target turned out to be.
    pub peer: Option<NodeId>,
    /// Seconds until the next attempt.
    pub next_try_in_seconds: Option<u64>,
    /// Why the last attempt failed.
    pub last_error: Option<LastError>,
}

/// The state of a target's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// An attempt is in progress.
    Connecting,
    /// The connection is established.
    Established,
    /// It will be tried again.
    Retrying,
    /// The target is not tried again until something changes.
    Failed,
    /// The target is this node.
    Myself,
}

/// The most recent error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// The message, one line.
    pub message: String,
    /// Age of the error, in seconds.
    pub seconds_ago: Option<u64>,
}

/// The status of one node of the cluster, which may be this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its ID.
    pub id: NodeId,
    /// Its nickname; empty until its record is known.
    pub nickname: String,
    /// Whether it is this node.
    pub myself: bool,
    /// Whether the node is reachable, directly or through others, both over control connections and
    /// for container packets.
    pub reachable: Option<bool>,
    /// How long `reachable` has had this value, in seconds.
    pub since_seconds: Option<u64>,
    /// Whether its address space was reclaimed, because it is gone for good.
    #[serde(default)]
    pub reclaimed: bool,
    /// The path of control messages to the node; absent for this node and for an unreachable one.
    pub path: Option<Path>,
    /// Its own address in the container network.
    pub address: Option<IpAddr>,
    /// The addresses of its control port.
    #[serde(default)]
    pub underlay: Vec<SocketAddr>,
    /// Its public key.
    pub public_key: Option<PublicKey>,
    /// Its software version.
    pub version: Option<String>,
    /// Its control connections, as the node itself announces them.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
    /// The data session with the node; absent for this node itself.
    pub data: Option<DataStatus>,
}

/// The path to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// The direct path over the underlay.
    Direct,
    /// Relayed by another node.
    Via(NodeId),
}

/// A control connection of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Which end dialed; unknown for the connections of other nodes.
    pub direction: Option<Direction>,
    /// The other end's address.
    pub remote: Option<SocketAddr>,
    /// The node at the other end.
    pub peer: NodeId,
    /// Its nickname.
    pub nickname: Option<String>,
    /// The state. A connection is established only if both ends announce it.
    pub state: ConnectionState,
}

/// The data session with a peer and its traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataStatus {
    /// Whether packets can be sent.
    pub session: SessionState,
    /// Age of the current keys, in seconds.
    pub session_age_seconds: Option<u64>,
    /// The peer's current endpoint.
    pub endpoint: Option<SocketAddr>,
    /// The largest container packet that fits, in bytes.
    pub mtu: Option<u32>,
    /// The route that packets take; absent for an external peer and while it is unknown.
    #[serde(default)]
    pub route: Option<RouteStatus>,
    /// Plaintext received, in bytes.
    pub rx_bytes: u64,
    /// Plaintext sent, in bytes.
    pub tx_bytes: u64,
    /// Number of messages received.
    pub rx_packets: Option<u64>,
    /// Number of messages sent.
    pub tx_packets: Option<u64>,
    /// Time since the last message was received, in seconds.
    pub received_seconds_ago: Option<u64>,
    /// Why the last handshake failed.
    pub last_error: Option<LastError>,
    /// The share of the workers in this peer's bulk flows; absent without workers. The totals above
    /// include it.
    #[serde(default)]
    pub bulk: Option<BulkStatus>,
}

/// What the workers of the bulk path do for a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkStatus {
    /// Whether bulk flows go through workers. Otherwise the eBPF programs carry them like all other
    /// flows.
    pub in_use: bool,
    /// The cipher that seals bulk flows.
    pub cipher: Cipher,
    /// Age of the current keys, in seconds.
    #[serde(default)]
    pub session_age_seconds: Option<u64>,
    /// Plaintext received through workers, in bytes.
    pub rx_bytes: u64,
    /// Plaintext sent through workers, in bytes.
    pub tx_bytes: u64,
    /// Number of messages received by workers.
    pub rx_packets: u64,
    /// Number of messages sent by workers.
    pub tx_packets: u64,
    /// Plaintext received through workers in the last second, in bits.
    pub rx_bits_per_second: u64,
    /// Plaintext sent through workers in the last second, in bits.
    pub tx_bits_per_second: u64,
    /// How often the peer's workers fell silent while packets were sent to them.
    pub silences: u64,
}

/// The workers of the bulk path on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkersStatus {
    /// The mode that was chosen at launch.
    pub mode: Mode,
    /// The number of running workers.
    pub workers: usize,
    /// The process ID of the workers.
    pub pid: Option<i32>,
    /// Measured speed of one worker with each cipher, in MiB per second.
    pub speeds: BTreeMap<String, u32>,
    /// Packets and messages that the workers dropped, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Why there are no workers.
    pub error: Option<String>,
}

/// The route of packets to a node, and what probes of the direct path measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// Direct or through a relay; absent if there is no route.
    pub path: Option<Path>,
    /// How long packets have taken this route, in seconds.
    pub since_seconds: u64,
    /// Whether the direct path works, in both directions.
    pub direct_works: bool,
    /// Smoothed round-trip time of probes, in microseconds.
    pub rtt_microseconds: Option<u64>,
    /// Recent loss of probes, per mille.
    pub loss_per_mille: Option<u16>,
    /// The most recent error on the direct path.
    pub last_error: Option<LastError>,
}

/// The state of the session with a peer, which decides whether packets can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// There are no keys: packets are dropped.
    None,
    /// A handshake is in progress and there are no keys yet: packets are dropped.
    Handshake,
    /// There are keys: packets are sent.
    Established,
    /// The keys have expired: packets are dropped.
    Expired,
}

/// A control connection, or an attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Which end dialed.
    pub direction: Direction,
    /// The remote end: an address with port, or the name of a target that was never resolved.
    pub remote: String,
    /// The state of the connection.
    pub state: ConnectionState,
    /// How long the connection has been in this state, in seconds.
    pub since_seconds: Option<u64>,
    /// The Noise protocol of the connection, such as `Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s`.
    pub encryption: Option<String>,
    /// The node at the other end.
    pub peer: Option<NodeId>,
    /// Its nickname.
    pub nickname: Option<String>,
    /// Round-trip time, in microseconds.
    pub rtt_microseconds: Option<u64>,
    /// The largest container packet that fits the path to the node, in bytes; absent without a
    /// connection.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// The route of container packets to the node; absent without a connection.
    #[serde(default)]
    pub route: Option<RouteStatus>,
    /// Seconds until the next attempt; absent if the connection is established or is never tried
    /// again.
    pub next_try_in_seconds: Option<u64>,
    /// Why the connection is not established, or why the previous attempt failed.
    pub last_error: Option<LastError>,
    /// What the workers do for bulk flows to the node; absent without workers.
    #[serde(default)]
    pub bulk: Option<BulkStatus>,
}

/// Which end dialed a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// This node dialed.
    Outbound,
    /// The remote node dialed.
    Inbound,
}

/// The state of a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectionState {
    /// Dialing, or in the handshake.
    Connecting,
    /// Only one end announces the connection so far.
    Pending,
    /// The connection is in use.
    Established,
    /// The connection will be dialed again.
    Retrying,
    /// The connection will not be dialed again, or it was refused.
    Failed,
}

/// The status of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// The program that attached it.
    #[serde(default)]
    pub kind: Kind,
    /// Its name. For a container of an engine, the container's name.
    pub name: Option<String>,
    /// The target that was attached. For an engine's endpoint, the container's ID, or the
    /// endpoint's ID while the container is unknown.
    pub target: Target,
    /// The container's image, if an engine reported it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The container runtime's name for the attachment; `target` is its container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniEndpoint>,
    /// Its address, with the subnet's prefix length.
    pub address: IpNet,
    /// Whether the address was requested rather than allocated.
    #[serde(rename = "static")]
    pub fixed: bool,
    /// The interface's name on the host.
    pub interface: String,
    /// When it was attached, in seconds since 1970.
    pub attached_unix_seconds: Option<u64>,
    /// Whether it works.
    pub state: EndpointState,
}

/// The state of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// The endpoint works.
    Attached,
    /// The address is held by an engine for a container that is not attached at the moment.
    Reserved,
    /// The interface is gone. The address is still reserved.
    Gone,
}

/// The allocation of the address space.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IpamStatus {
    /// Whether this node can allocate an address for a container.
    pub ready: bool,
    /// Why it cannot.
    pub waiting_for: Option<String>,
    /// By ID: every node that allocates addresses, and every initial owner of a quarter that has
    /// not been heard of.
    pub owners: Vec<RangeOwner>,
    /// All loans, by lender and borrower.
    #[serde(default)]
    pub loans: Vec<LoanStatus>,
    /// Problems with addresses, one sentence each, with what to do.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Recent events and failures, one sentence each.
    #[serde(default)]
    pub notices: Vec<String>,
    /// Nodes whose address space this node is reclaiming.
    #[serde(default)]
    pub reclaims: Vec<ReclaimStatus>,
}

/// A node whose address space is being reclaimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimStatus {
    /// The node that is gone for good.
    pub id: NodeId,
    /// Nodes that have not agreed yet.
    pub missing: Vec<NodeId>,
}

/// The addresses that one node has lent to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoanStatus {
    /// The lending node.
    pub lender: NodeId,
    /// The borrowing node, which allocates these addresses.
    pub borrower: NodeId,
    /// The number of addresses.
    pub addresses: u64,
    /// The addresses as networks, ascending.
    pub networks: Vec<IpNet>,
    /// Whether the lender is reachable; true if it is this node.
    pub lender_reachable: bool,
    /// Whether the borrower is reachable; true if it is this node.
    pub borrower_reachable: bool,
}

/// A node that owns address space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RangeOwner {
    /// The node.
    pub id: NodeId,
    /// Its nickname; empty until its record is known.
    pub nickname: String,
    /// The number of addresses that it can allocate, including borrowed ones and excluding lent
    /// ones.
    pub addresses: u64,
    /// Those addresses as a percentage of the range, 0 to 100.
    pub percent: f64,
    /// The number of them in use.
    pub active: Option<u64>,
    /// Whether the node is reachable; true for this node.
    pub reachable: Option<bool>,
    /// The networks that are routed to the node. They include lent addresses, for which the
    /// borrower has a longer prefix.
    #[serde(default)]
    pub ranges: Vec<IpNet>,
}

/// DNS names and the service that containers query.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// Whether this node serves DNS.
    pub serving: bool,
    /// The server's address, to be used as the name server of this host's containers.
    pub address: Option<IpAddr>,
    /// The domain of the names.
    pub domain: Option<String>,
    /// Further domains under which the names are served.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The upstream resolvers: the host's own, which get all other queries.
    #[serde(default)]
    pub upstream: Vec<IpAddr>,
    /// Number of queries from containers since the daemon started.
    pub queries: u64,
    /// Number of these queries that were forwarded upstream.
    pub forwarded: u64,
    /// Number of these queries for which the upstream resolvers had no answer.
    pub failed: u64,
    /// Number of queries that were refused because they were malformed or too many at a time.
    pub refused: u64,
    /// The known names, by name, then by address.
    #[serde(default)]
    pub entries: Vec<DnsEntry>,
}

/// A DNS name and one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsEntry {
    /// The name, without the domain.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// The node that announces it.
    pub node: NodeId,
    /// Its nickname; empty until its record is known.
    pub nickname: String,
    /// Whether that node is reachable. The name is served only while it is.
    pub reachable: bool,
}

/// The status of an external WireGuard peer, which is not a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalPeerStatus {
    /// Its public key.
    pub public_key: PublicKey,
    /// Its name.
    pub name: Option<String>,
    /// Whether a pre-shared key is set.
    pub preshared_key: bool,
    /// The networks that it may send from and that are routed to it.
    pub allowed_ips: Vec<IpNet>,
    /// The persistent keepalive interval in seconds, if set.
    pub persistent_keepalive_seconds: Option<u16>,
    /// The session with it and its traffic.
    pub data: Option<DataStatus>,
}

/// A counter of packets that had the same outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterStatus {
    /// The code's name.
    pub reason: String,
    /// What it means, in one sentence.
    pub description: String,
    /// Whether these packets were dropped.
    pub dropped: bool,
    /// The number of packets.
    pub count: u64,
}
