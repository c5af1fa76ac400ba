//! Layouts of the maps: the only interface between the daemon and the programs.
//!
//! [`for_each_map`](crate::for_each_map) declares them. [`MAPS`] has the table.
//!
//! The daemon writes everything that is not marked "program" below. It fills the slot of a session
//! while no program can find it. Then it publishes the slot by storing its number in
//! [`Peer::tx_slot`] and its state in [`Session::state`]. It reuses the slot one second after
//! withdrawing it at the earliest. Therefore no program combines the counter of one session with
//! the key of another. No key sees a nonce twice, because only programs draw counters, and they do
//! so atomically.
//!
//! All integers are in native byte order unless a name ends in `_be`.

use crate::reason::REASON_SLOTS;

/// Declares every map once: name, kind, key and value type, entries, whether it can be mapped into
/// memory, version of the layout, and writers. `$callback!` gets the whole list. The statics of the
/// programs, [`MAPS`] and the table in its documentation follow from it.
///
/// A map whose layout or meaning changes gets the next version. Its pin then has another name, so
/// that a daemon finds a map of another version by name and never misreads it.
#[macro_export]
macro_rules! for_each_map {
    ($callback:ident) => {
        $callback! {
            /// Configuration of the node.
            CONFIG: Array, u32 => Config, 1, Unmapped, 1, "daemon";
            /// Attachments, by ifindex of the host end.
            ENDPOINTS: HashMap, u32 => Endpoint, ENDPOINT_SLOTS, Unmapped, 1, "daemon";
            /// Owners of prefixes.
            ROUTES: LpmTrie, Address => Route, ROUTE_SLOTS, Unmapped, 1, "daemon";
            /// Peers, by peer index.
            PEERS: Array, u32 => Peer, PEER_SLOTS, Mapped, 1, "daemon, programs";
            /// Session keys, by slot.
            SESSIONS: Array, u32 => Session, SESSION_SLOTS, Mapped, 1, "daemon, programs";
            /// Addresses of this host on its underlay. The value is unused.
            LOCAL_ADDRESSES: HashMap, Address => u32, LOCAL_ADDRESS_SLOTS, Unmapped, 1, "daemon";
            /// Network namespaces whose DNS queries go to the node's server, by cookie
            /// (`SO_NETNS_COOKIE`). The value is unused.
            NAMED_NETNS: HashMap, u64 => u32, ENDPOINT_SLOTS, Unmapped, 1, "daemon";
            /// The node's DNS server for these queries.
            RESOLVER: Array, u32 => Resolver, 1, Unmapped, 1, "daemon";
            /// Packets, by [`Reason`](crate::reason::Reason).
            COUNTERS: PerCpuArray, u32 => u64, REASON_SLOTS, Unmapped, 1, "programs";
            /// Allowance for cookie replies, see [`COOKIE_ALLOWANCE`].
            COOKIES: Array, u32 => u32, 1, Unmapped, 1, "programs";
            /// Allowances for ICMP errors, by the low bits of the container's ifindex; see
            /// [`ERROR_ALLOWANCE`].
            ERRORS: Array, u32 => u32, ERROR_SLOTS, Unmapped, 1, "programs";
            /// Probes for the daemon: records of type [`Probe`].
            PROBES: RingBuf, () => (), PROBES_LEN, Unmapped, 1, "programs";
            /// Drops that may still be recorded, by [`Reason`](crate::reason::Reason).
            MONITOR: Array, u32 => u32, REASON_SLOTS, Unmapped, 1, "daemon, programs";
            /// Dropped packets for monitors: records of type [`Dropped`].
            DROPS: RingBuf, () => (), DROPS_LEN, Unmapped, 1, "programs";
            /// Bulk workers, by number.
            BULK_WORKERS: Array, u32 => BulkWorker, BULK_WORKER_SLOTS, Mapped, 1, "workers";
            /// Use of the bulk path, by peer index.
            BULK_PEERS: Array, u32 => BulkPeer, PEER_SLOTS, Mapped, 1, "workers, programs";
            /// Receive rings, by worker.
            BULK_RINGS: Array, u32 => BulkRing, BULK_WORKER_SLOTS, Mapped, 1, "workers, programs";
            /// Slots of the receive rings, from [`BulkRing::first`] on.
            BULK_MESSAGES: Array, u32 => BulkMessage, BULK_MESSAGE_SLOTS, Mapped, 1, "programs";
            /// Flows that have sent large packets.
            BULK_FLOWS: LruHashMap, BulkFlowKey => BulkFlow, BULK_FLOW_SLOTS, Unmapped, 1,
                "programs";
        }
    };
}

/// Kinds of maps that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_ARRAY`.
    Array,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray,
    /// `BPF_MAP_TYPE_HASH`.
    HashMap,
    /// `BPF_MAP_TYPE_LRU_HASH`.
    LruHashMap,
    /// `BPF_MAP_TYPE_LPM_TRIE`. Its keys start with the prefix length, in 4 bytes.
    LpmTrie,
    /// `BPF_MAP_TYPE_RINGBUF`. Its size is in bytes.
    RingBuf,
}

/// The declaration of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapLayout {
    /// Its name in the object.
    pub name: &'static str,
    /// Its kind.
    pub kind: MapKind,
    /// Size of a key, in bytes.
    pub key: usize,
    /// Size of a value, in bytes.
    pub value: usize,
    /// Entries; bytes of a ring buffer.
    pub entries: u32,
    /// Whether it can be mapped into memory (`BPF_F_MMAPABLE`).
    pub is_mapped: bool,
    /// Version of its layout and meaning, 1 and up.
    pub version: u32,
}

impl MapLayout {
    const fn new(
        (name, kind, entries, version): (&'static str, MapKind, u32, u32),
        (key, value): (usize, usize),
        access: Access,
    ) -> Self {
        let key = if matches!(kind, MapKind::LpmTrie) { key + size_of::<u32>() } else { key };
        assert!(version > 0);
        Self {
            name,
            kind,
            key,
            value,
            entries,
            is_mapped: matches!(access, Access::Mapped),
            version,
        }
    }
}

/// Whether user space maps a map into memory.
enum Access {
    Mapped,
    Unmapped,
}

macro_rules! layouts {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident: $kind:ident, $key:ty => $value:ty, $entries:expr, $access:ident, $version:expr,
        $writer:literal;
    )+) => {
        /// All maps.
        ///
        /// | map | kind | key | value | entries | written by | meaning |
        /// | --- | --- | --- | --- | --- | --- | --- |
        $(#[doc = concat!(
            "| `", stringify!($name), "` | ", stringify!($kind), " | ", stringify!($key), " | ",
            stringify!($value), " | ", stringify!($entries), " | ", $writer, " |", $($doc,)+ " |"
        )])+
        pub const MAPS: &[MapLayout] = &[$(MapLayout::new(
            (stringify!($name), MapKind::$kind, $entries, $version),
            (size_of::<$key>(), size_of::<$value>()),
            Access::$access,
        )),+];
    };
}

crate::for_each_map!(layouts);

/// An IPv4 address (v4-mapped, `::ffff:a.b.c.d`) or IPv6 address, in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// Prefix length of the v4-mapped range. Added to the length of an IPv4 prefix.
    pub const V4_BITS: u32 = 96;

    /// Returns the v4-mapped form of an IPv4 address.
    #[inline(always)]
    pub const fn from_v4(v4: [u8; 4]) -> Self {
        let [a, b, c, d] = v4;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// Returns the IPv4 address if this is a v4-mapped one.
    #[inline(always)]
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        let [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] = self.0 else { return None };
        Some([a, b, c, d])
    }
}

/// Entries of `PEERS`. A node's peer index is its ID (1 to 4095). WireGuard peers that are not
/// nodes follow.
pub const PEER_SLOTS: u32 = 5120;
/// First peer index of peers that are not nodes.
pub const FIRST_EXTERNAL_PEER: u32 = 4096;
/// Number of addresses reserved for the nodes themselves. They are consecutive, in the order of
/// node IDs: one node's address and ID determine all the others.
pub const NODE_ADDRESSES: u32 = FIRST_EXTERNAL_PEER;
/// Entries of `SESSIONS`. Slot 0 is never used; 0 means "no session".
pub const SESSION_SLOTS: u32 = 4096;
/// Low bits of a local receiver index that hold the slot. The other bits are random.
pub const SESSION_SLOT_BITS: u32 = 12;
/// Entries of `ENDPOINTS`.
pub const ENDPOINT_SLOTS: u32 = 4096;
/// Entries of `ROUTES`.
pub const ROUTE_SLOTS: u32 = 65536;
/// Entries of `LOCAL_ADDRESSES`.
pub const LOCAL_ADDRESS_SLOTS: u32 = 1024;

/// Configuration of the node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The subnet of the overlay. ARP is answered for all of it.
    pub subnet: Address,
    /// Prefix length of the subnet, 96 to 128 for IPv4.
    pub subnet_bits: u32,
    /// Interface index of the end of the offload veth to which packets for other hosts are
    /// redirected.
    pub offload_veth: u32,
    /// The node's own address: the source of the ICMP errors that programs send and the destination
    /// of probes.
    pub node: Address,
    /// The node's ID, used in relay headers.
    pub node_id: u32,
    /// BLAKE2s state for the first MAC of handshake messages to this node, from
    /// [`crate::mac1::keyed`].
    pub mac1: crate::mac1::State,
}

/// Address of an engine's own resolver in each of its containers (Docker:
/// docs.docker.com/engine/network/#dns-services).
pub const ENGINE_RESOLVER: [u8; 4] = [127, 0, 0, 11];
/// UDP and TCP port of the node's DNS server for queries to [`ENGINE_RESOLVER`]. Queries to port 53
/// are those that the container itself sends to the node.
pub const RESOLVER_PORT: u16 = 1053;
/// Mark (`SO_MARK`) of the daemon's own sockets to [`ENGINE_RESOLVER`], which are not redirected.
pub const RESOLVER_MARK: u32 = 0x0000_6784;

/// The node's DNS server, to which queries to [`ENGINE_RESOLVER`] are redirected.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Boot time up to which queries are redirected, in nanoseconds. The daemon extends it while it
    /// runs.
    pub alive_until_ns: u64,
    /// Its IPv4 address.
    pub address: [u8; 4],
    /// Padding to a multiple of 8 bytes.
    pub unused: u32,
}

/// A container's attachment to this host. The key is the host end of its veth.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The only address that the container may use as a source.
    pub address: Address,
    /// MAC address of the container's end.
    pub mac: [u8; 6],
    /// MAC address of the host's end, given in ARP replies.
    pub gateway_mac: [u8; 6],
}

/// Value of [`Route::kind`]: the prefix belongs to this host, but nothing is attached at the
/// address.
pub const ROUTE_NONE: u32 = 0;
/// Value of [`Route::kind`]: attached to this host. The target is the ifindex of the host end (key
/// of `ENDPOINTS`).
pub const ROUTE_LOCAL: u32 = 1;
/// Value of [`Route::kind`]: reached through a peer. The target is the peer index.
pub const ROUTE_PEER: u32 = 2;
/// Value of [`Route::kind`]: this host itself, through a veth pair with both ends in the host's
/// namespace. The target is the ifindex of its outer end (key of `ENDPOINTS`).
pub const ROUTE_HOST: u32 = 3;

/// The location of an overlay prefix. The longest prefix wins. The same table decides which sources
/// a peer may use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// One of `ROUTE_NONE`, `ROUTE_LOCAL`, `ROUTE_PEER`, `ROUTE_HOST`.
    pub kind: u32,
    /// Interface index or peer index, depending on the kind.
    pub target: u32,
}

/// A peer: its endpoint on the underlay and the session that seals packets to it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Underlay address to send to. Program: follows the source of each authenticated message
    /// (roaming).
    pub remote: Address,
    /// Underlay address to send from. Program: follows in the same way.
    pub local: Address,
    /// UDP port to send to, in network byte order. Program: follows in the same way.
    pub remote_port_be: u16,
    /// 1 while the daemon has configured this peer, else 0.
    pub present: u16,
    /// Underlay interface to send through. Program: follows in the same way.
    pub ifindex: u32,
    /// Slot in `SESSIONS` of the sealing session; 0 if there is none. Program: the first message
    /// under an unconfirmed session makes it the sealing one.
    pub tx_slot: u32,
    /// Largest inner packet that fits the path, in bytes from the IP header on.
    pub mtu: u32,
    /// Peer index of the node that relays messages to this peer; 0 if they take the direct path.
    pub via: u32,
    /// Packets handed to the offload veth, modulo 2^32 (program `from_container`).
    pub offload_in: u32,
    /// The peer's Curve25519 public key. It tells a restarted daemon which peer the sessions belong
    /// to.
    pub public_key: [u8; 32],
    /// Inner bytes of data messages sent (program).
    pub tx_bytes: u64,
    /// Messages sent, including keepalives and probes (program).
    pub tx_packets: u64,
    /// Inner bytes of data messages received (program).
    pub rx_bytes: u64,
    /// Messages received and authenticated, including keepalives and probes (program).
    pub rx_packets: u64,
    /// Boot time of the last authenticated message received, in nanoseconds of `CLOCK_BOOTTIME`
    /// (program).
    pub last_rx_ns: u64,
    /// Boot time of the last message received that was neither a keepalive nor a probe, in
    /// nanoseconds (program).
    pub last_data_rx_ns: u64,
    /// Boot time of the last message sent, in nanoseconds (program).
    pub last_tx_ns: u64,
    /// Boot time of the last message sent that was neither a keepalive nor a probe, in nanoseconds
    /// (program).
    pub last_data_tx_ns: u64,
    /// Boot time of the last packet handed to the offload veth, in nanoseconds (program
    /// `from_container`).
    pub offload_last_ns: u64,
    /// Packets that left the offload veth, modulo 2^32 (program `seal`).
    pub offload_out: u32,
    /// Boot time up to which the peer's probes have used up its allowance, in units of 2^20 ns
    /// modulo 2^32 (program `from_underlay`). See [`PROBE_ALLOWANCE`].
    pub probed_until: u32,
}

/// Burst allowance for the probes of one peer, in units of 2^20 ns: 128 probes at once. In the
/// worst case, a node sends 64 probe requests and as many replies.
pub const PROBE_ALLOWANCE: u32 = 128 * PROBE_COST;
/// Allowance that each probe uses up, in units of 2^20 ns. After the burst, 238 probes per second
/// pass.
pub const PROBE_COST: u32 = 4;

/// Burst allowance for the cookie replies of all peers together, in units of 2^20 ns: 1024 replies
/// at once. A node gets one reply for each handshake message that it sends to a peer under load.
/// The value in `COOKIES` is the boot time up to which the allowance is used up, in the same unit
/// modulo 2^32 (program `from_underlay`).
pub const COOKIE_ALLOWANCE: u32 = 1024 * COOKIE_COST;
/// Allowance that each cookie reply uses up, in units of 2^20 ns. After the burst, 953 replies per
/// second pass.
pub const COOKIE_COST: u32 = 1;

/// Burst allowance for "host unreachable" to one container, in units of 2^20 ns: 32 errors at once.
pub const ERROR_ALLOWANCE: u32 = 32 * ERROR_COST;
/// Allowance that each such error uses up, in units of 2^20 ns. After the burst, 119 errors per
/// second are sent.
pub const ERROR_COST: u32 = 8;
/// Entries of `ERRORS`. Containers whose interfaces differ by a multiple of it share an allowance.
pub const ERROR_SLOTS: u32 = 256;

/// Time after the last packet at which the offload veth counts as empty, whatever the counters say,
/// in nanoseconds.
pub const OFFLOAD_VETH_STALE_NS: u64 = 50_000_000;

/// Size of the `PROBES` ring in bytes, a power of two: room for a probe request and a reply from
/// each of several hundred peers.
pub const PROBES_LEN: u32 = 1 << 16;

/// A decrypted probe from a peer to this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The sender: the peer whose session opened the probe.
    pub peer: u32,
    /// Length of the probe's inner packet, in bytes.
    pub inner_len: u32,
    /// The bytes after the inner UDP header.
    pub payload: [u32; crate::wire::PROBE_LEN / 4],
}

/// Maximum number of bulk workers, and thus of their devices.
pub const BULK_WORKER_SLOTS: u32 = 16;
/// Entries of `BULK_FLOWS`. A new flow evicts the least recently used one.
pub const BULK_FLOW_SLOTS: u32 = 16384;
/// Heartbeat timeout in nanoseconds. Programs steer no flow to a worker whose last heartbeat is
/// older.
pub const BULK_SILENCE_NS: u64 = 100_000_000;
/// Pause in nanoseconds after which a bulk flow becomes an ordinary one again. Everything it sent
/// before has arrived by then, so packets of the two paths never mix when it leaves the bulk path.
pub const BULK_PAUSE_NS: u64 = 50_000_000;
/// Bytes that a flow must send in large packets, without such a pause, before it moves to the bulk
/// path.
pub const BULK_THRESHOLD: u64 = 128 << 10;
/// Bytes after which a flow moves even if the offload veth still holds packets of its peer. If it
/// overtakes its ordinary packets once, that looks like a loss, which costs less than staying.
pub const BULK_PATIENCE: u64 = 4 << 20;

/// A worker in user space. The worker process writes this entry, and the daemon clears it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkWorker {
    /// Interface index of its TAP device; 0 if there is no such worker.
    pub ifindex: u32,
    /// Padding to a multiple of 8 bytes.
    pub unused: u32,
    /// Boot time of the last heartbeat in nanoseconds: the worker was working or waiting for work.
    pub alive_ns: u64,
}

/// Value of [`BulkRing::state`]: messages go to the worker's socket.
pub const RING_CLOSED: u32 = 0;
/// Value of [`BulkRing::state`]: the worker waits on its socket. The next message goes to the
/// socket and wakes the worker. Later messages go to the receive ring.
pub const RING_ASLEEP: u32 = 1;
/// Value of [`BulkRing::state`]: messages go to the receive ring.
pub const RING_OPEN: u32 = 2;

/// The receive ring of a worker: a bounded queue with many producers (the receiving CPUs) and one
/// consumer (the worker). The worker process writes this entry, and the daemon closes the ring.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkRing {
    /// One of `RING_*` (also written by the program).
    pub state: u32,
    /// Number of receive rings. Every ring has the same value.
    pub rings: u32,
    /// Its first slot in `BULK_MESSAGES`.
    pub first: u32,
    /// Number of its slots, a power of two.
    pub len: u32,
    /// Messages enqueued so far, modulo 2^32 (program).
    pub head: u32,
    /// Padding to a cache line.
    pub unused: [u32; 11],
}

/// Entries of `BULK_MESSAGES`, a power of two: 4 MiB, shared equally among the receive rings.
pub const BULK_MESSAGE_SLOTS: u32 = 2048;
/// Maximum length of a message in a receive ring, in bytes. Anything that fits an Ethernet packet
/// fits.
pub const BULK_MESSAGE_LEN: usize = 2048 - 64;

/// A slot of a receive ring. Message number `n` of all that were ever enqueued uses slot `n` modulo
/// [`BulkRing::len`].
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct BulkMessage {
    /// `n` while the slot is free for message `n`; `n + 1` once it holds that message.
    pub sequence: u32,
    /// Length of the UDP payload in [`BulkMessage::bytes`]; 0 if the slot was taken but holds no
    /// message.
    pub len: u32,
    /// Source address of the IP header.
    pub remote: Address,
    /// Destination address of the IP header.
    pub local: Address,
    /// UDP source port, in network byte order.
    pub remote_port_be: u16,
    /// ECN codepoint of the IP header.
    pub ecn: u16,
    /// Padding to a cache line.
    pub unused: [u32; 5],
    /// The UDP payload.
    pub bytes: [u8; BULK_MESSAGE_LEN],
}

/// Use of the bulk path for a peer. The worker process writes this entry, and the daemon clears it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkPeer {
    /// Number of workers that share the peer's flows; 0 while only the programs serve the peer.
    pub workers: u32,
    /// Padding to a multiple of 8 bytes.
    pub unused: u32,
    /// Boot time up to which flows of this peer use the bulk path, in nanoseconds (program).
    pub busy_until_ns: u64,
}

/// The key of a flow from a container of this host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkFlowKey {
    /// The container's IPv4 address, in network byte order.
    pub source: u32,
    /// The other end's IPv4 address, in network byte order.
    pub destination: u32,
    /// Source and destination port, as in the packet.
    pub ports: u32,
    /// IP protocol.
    pub protocol: u32,
}

/// The sending rate of a flow.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkFlow {
    /// Boot time of the flow's last packet, in nanoseconds (program).
    pub last_ns: u64,
    /// Bytes sent in large packets since the last pause, or [`BULK_MOVED`] once the flow is on the
    /// bulk path (program).
    pub bytes: u64,
}

/// Value of [`BulkFlow::bytes`]: the flow is on the bulk path.
pub const BULK_MOVED: u64 = u64::MAX;

/// Size of the `DROPS` ring in bytes, a power of two: room for all that `MONITOR` allows per
/// second.
pub const DROPS_LEN: u32 = 1 << 18;
/// Bytes recorded of a dropped packet, a power of two. Room for Ethernet, IPv6, UDP, relay and data
/// message headers, then the inner IPv4 header and the ports.
pub const DROPPED_LEN: usize = 128;

/// Value of [`Dropped::program`]: `from_container`.
pub const PROGRAM_FROM_CONTAINER: u32 = 0;
/// Value of [`Dropped::program`]: `seal`.
pub const PROGRAM_SEAL: u32 = 1;
/// Value of [`Dropped::program`]: `from_underlay`.
pub const PROGRAM_FROM_UNDERLAY: u32 = 2;
/// Value of [`Dropped::program`]: `from_underlay_xdp`.
pub const PROGRAM_FROM_UNDERLAY_XDP: u32 = 3;
/// Value of [`Dropped::program`]: `from_bulk`.
pub const PROGRAM_FROM_BULK: u32 = 4;
/// Value of [`Dropped::program`]: `to_container`.
pub const PROGRAM_TO_CONTAINER: u32 = 5;
/// Flag in [`Dropped::vlan`]: the packet has a VLAN tag.
pub const VLAN_PRESENT: u32 = 1 << 16;

/// A packet that was dropped while a monitor was running.
///
/// Programs record a drop only while the `MONITOR` entry of its reason is above 0, and decrement
/// that entry each time. The daemon refills it once a second while a monitor is connected. So a
/// flood of dropped packets costs no more than counting them, and programs stop soon after the
/// daemon is killed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Boot time of the drop, in nanoseconds (`CLOCK_BOOTTIME`).
    pub time_ns: u64,
    /// Code of the [`crate::reason::Reason`].
    pub reason: u32,
    /// One of `PROGRAM_*`.
    pub program: u32,
    /// Ifindex of the interface that received the packet.
    pub ifindex: u32,
    /// Length from the Ethernet header on, in bytes.
    pub len: u32,
    /// Number of valid bytes in [`Dropped::bytes`]. The others are arbitrary.
    pub captured: u32,
    /// `VLAN_PRESENT` and the tag, if the tag was removed before the program saw the packet; else
    /// 0.
    pub vlan: u32,
    /// The packet's first bytes, from the Ethernet header on, in the state in which it was dropped.
    pub bytes: [u8; DROPPED_LEN],
}

/// Value of [`Session::state`]: the slot is free.
pub const SESSION_FREE: u32 = 0;
/// Value of [`Session::state`]: receives, but must not send until the peer has proven that it has
/// the keys.
pub const SESSION_UNCONFIRMED: u32 = 1;
/// Value of [`Session::state`]: receives, and sends if the peer's `tx_slot` refers to it.
pub const SESSION_LIVE: u32 = 2;

/// The keys of one handshake (whitepaper section 5.4.5).
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Session {
    /// One of `SESSION_*`. Program: the first authenticated message turns `UNCONFIRMED` into
    /// `LIVE`.
    pub state: u32,
    /// Index of the peer.
    pub peer: u32,
    /// Receiver index in the peer's messages to this node. The low [`SESSION_SLOT_BITS`] bits are
    /// the slot.
    pub local_index: u32,
    /// Receiver index in this node's messages to the peer.
    pub remote_index: u32,
    /// ChaCha20 key for sealing, as eight little-endian words.
    pub tx_key: [u32; 8],
    /// ChaCha20 key for opening, as eight little-endian words.
    pub rx_key: [u32; 8],
    /// Boot time of the end of the handshake, in nanoseconds (`CLOCK_BOOTTIME`).
    pub created_ns: u64,
    /// Boot time from which on the session neither seals nor opens, in nanoseconds.
    pub expires_ns: u64,
    /// 1 if this node initiated the handshake, else 0.
    pub initiator: u64,
    /// Next counter to send (program, atomic).
    pub tx_counter: u64,
    /// Replay window of the received counters (program).
    pub window: crate::replay::Window,
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, valid for every bit pattern, and without padding (asserted below).
    unsafe impl aya::Pod for super::Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Resolver {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Route {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Peer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Session {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Probe {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Dropped {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkWorker {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkPeer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkRing {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkMessage {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkFlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkFlow {}
}

const _: () = {
    // The Ethernet header of a frame to a worker has two bytes for the peer index.
    assert!(PEER_SLOTS <= 1 << 16);
    assert!(size_of::<Config>() == 76);
    assert!(size_of::<Endpoint>() == 28);
    assert!(size_of::<Route>() == 8);
    assert!(size_of::<Peer>() == 16 + 16 + 2 + 2 + 4 + 4 + 4 + 4 + 4 + 32 + 10 * 8);
    assert!(size_of::<Probe>() == 8 + crate::wire::PROBE_LEN);
    assert!(size_of::<Dropped>() == 8 + 6 * 4 + DROPPED_LEN);
    assert!(size_of::<BulkWorker>() == 16);
    assert!(size_of::<BulkRing>() == 64);
    assert!(size_of::<BulkMessage>() == 2048);
    assert!(size_of::<BulkPeer>() == 16);
    assert!(size_of::<BulkFlowKey>() == 16);
    assert!(size_of::<BulkFlow>() == 16);
    assert!(size_of::<Session>() == 4 * 4 + 32 + 32 + 4 * 8 + size_of::<crate::replay::Window>());
};
