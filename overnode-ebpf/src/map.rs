//! Layouts of the maps: the only interface between the daemon and the programs.
//!
//! | map | kind | key | value |
//! | --- | --- | --- | --- |
//! | `CONFIG` | array (1) | 0 | [`Config`] |
//! | `ENDPOINTS` | hash | ifindex of the host end, u32 | [`Endpoint`] |
//! | `ROUTES` | LPM trie | prefix length (of 128), [`Address`] | [`Route`] |
//! | `PEERS` | array | peer index | [`Peer`] |
//! | `SESSIONS` | array | session slot | [`Session`] |
//! | `LOCAL_ADDRESSES` | hash | [`Address`] | u32, unused |
//! | `COUNTERS` | per-CPU array | [`crate::reason::Reason`] | u64 packets |
//! | `COOKIES` | array (1) | 0 | u32 boot time, in units of 2^20 ns modulo 2^32, to which cookie replies have used up [`COOKIE_ALLOWANCE`] (program `from_underlay`) |
//! | `PROBES` | ring buffer | | [`Probe`] |
//! | `MONITOR` | array | [`crate::reason::Reason`] | u32, how many more drops may be recorded |
//! | `DROPS` | ring buffer | | [`Dropped`] |
//! | `BULK_WORKERS` | array | worker | [`BulkWorker`] |
//! | `BULK_PEERS` | array | peer index | [`BulkPeer`] |
//! | `BULK_FLOWS` | LRU hash | [`BulkFlowKey`] | [`BulkFlow`] |
//! | `BULK_INBOXES` | array | worker | [`BulkInbox`] |
//! | `BULK_MESSAGES` | array | [`BulkInbox::first`] and what follows | [`BulkMessage`] |
//!
//! Who writes what. The daemon writes everything but what is marked "program" below. A session's
//! slot is filled while no program can find it, then published by storing its number in
//! [`Peer::tx_slot`] and its state in [`Session::state`]; it is reused no sooner than a second
//! after it was withdrawn. A nonce therefore never meets two keys, nor a key one nonce twice: only
//! programs draw counters, atomically.
//!
//! All integers are in the byte order of the machine unless a name ends in `_be`.

/// An IPv4 (as v4-mapped, `::ffff:a.b.c.d`) or IPv6 address, in network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// Prefix length that a v4-mapped address adds to that of the IPv4 prefix.
    pub const V4_BITS: u32 = 96;

    /// The v4-mapped form of an IPv4 address.
    #[inline(always)]
    pub const fn from_v4(v4: [u8; 4]) -> Self {
        let [a, b, c, d] = v4;
        Self([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// The IPv4 address that this one maps, if it does.
    #[inline(always)]
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        let [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] = self.0 else { return None };
        Some([a, b, c, d])
    }
}

/// Entries of `PEERS`. A node's peer index is its ID (1 to 4095); WireGuard peers that are no nodes
/// follow.
pub const PEER_SLOTS: u32 = 5120;
/// First peer index of peers that are no nodes.
pub const FIRST_EXTERNAL_PEER: u32 = 4096;
/// Addresses kept for the nodes themselves: of a node's own address and its ID follow those of all
/// others.
pub const NODE_ADDRESSES: u32 = FIRST_EXTERNAL_PEER;
/// Entries of `SESSIONS`. Slot 0 stays empty: it means "none".
pub const SESSION_SLOTS: u32 = 4096;
/// Bits of a local receiver index that number the slot; the others are random.
pub const SESSION_SLOT_BITS: u32 = 12;
/// Entries of `ENDPOINTS`.
pub const ENDPOINT_SLOTS: u32 = 4096;
/// Entries of `ROUTES`.
pub const ROUTE_SLOTS: u32 = 65536;
/// Entries of `LOCAL_ADDRESSES`.
pub const LOCAL_ADDRESS_SLOTS: u32 = 1024;

/// What holds for the whole node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The overlay's subnet; ARP is answered for all of it.
    pub subnet: Address,
    /// Prefix length of the subnet, of 128.
    pub subnet_bits: u32,
    /// Interface index of the end of the normaliser that packets for other hosts are redirected to.
    pub normaliser: u32,
    /// The node's own address: source of ICMP errors that programs send, and where probes go to.
    pub node: Address,
    /// The node's ID, which relayed messages name.
    pub node_id: u32,
    /// Where the first MAC of handshake messages to this node starts from.
    pub mac1: crate::mac1::State,
}

/// A container's place on this host, found by the host end of its veth.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The only address that the container may send from.
    pub address: Address,
    /// Hardware address of the container's end.
    pub mac: [u8; 6],
    /// Hardware address of the host's end: the one that ARP answers name.
    pub gateway_mac: [u8; 6],
}

/// [`Route::kind`]: the address space has an owner on this host, but nothing is attached there.
pub const ROUTE_NONE: u32 = 0;
/// [`Route::kind`]: attached to this host; the target is the ifindex of the host end (key of `ENDPOINTS`).
pub const ROUTE_LOCAL: u32 = 1;
/// [`Route::kind`]: reached through a peer; the target is the peer index.
pub const ROUTE_PEER: u32 = 2;
/// [`Route::kind`]: this host itself; the target is the ifindex of the outer end (key of `ENDPOINTS`) of a veth pair both ends of which
/// are in the host's namespace.
pub const ROUTE_HOST: u32 = 3;

/// Where a prefix of the overlay is. Longest prefix wins; the same table says who may send from
/// where.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// One of `ROUTE_NONE`, `ROUTE_LOCAL`, `ROUTE_PEER`, `ROUTE_HOST`.
    pub kind: u32,
    /// Interface index or peer index.
    pub target: u32,
}

/// A peer: where it is and which session seals what goes there.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Underlay address to send to. Program: follows the source of each authenticated message
    /// (roaming).
    pub remote: Address,
    /// Underlay address to send from. Program: follows likewise.
    pub local: Address,
    /// UDP port to send to, in network byte order. Program: follows likewise.
    pub remote_port_be: u16,
    /// 1 while the daemon has configured this peer, else 0.
    pub present: u16,
    /// Underlay interface to send through. Program: follows likewise.
    pub ifindex: u32,
    /// Slot in `SESSIONS` that seals; 0 for none. Program: a first message under a session that
    /// waits for confirmation makes it the sealing one.
    pub tx_slot: u32,
    /// Largest inner packet (from the IP header on) that the path takes, in bytes.
    pub mtu: u32,
    /// Peer index of the node that relays messages to this one; 0 if they go straight.
    pub via: u32,
    /// Packets handed to the normaliser, modulo 2^32 (program `from_container`).
    pub normalising: u32,
    /// The peer's Curve25519 public key, so that a restarted daemon knows whose sessions these are.
    pub public_key: [u8; 32],
    /// Inner bytes sent (program).
    pub tx_bytes: u64,
    /// Messages sent, keepalives included (program).
    pub tx_packets: u64,
    /// Inner bytes received (program).
    pub rx_bytes: u64,
    /// Messages received and authenticated, keepalives included (program).
    pub rx_packets: u64,
    /// Boot time (ns, `CLOCK_BOOTTIME`) of the last authenticated message received (program).
    pub last_rx_ns: u64,
    /// Boot time of the last message received that was no keepalive (program).
    pub last_data_rx_ns: u64,
    /// Boot time of the last message sent (program).
    pub last_tx_ns: u64,
    /// Boot time of the last message sent that was no keepalive (program).
    pub last_data_tx_ns: u64,
    /// Boot time of the last packet handed to the normaliser (program `from_container`).
    pub normalising_ns: u64,
    /// Packets that came out of the normaliser, modulo 2^32 (program `seal`).
    pub normalised: u32,
    /// Boot time, in units of 2^20 ns modulo 2^32, to which the probes that it sent have used up
    /// its allowance (program `from_underlay`); [`PROBE_ALLOWANCE`].
    pub probed_until: u32,
}

/// How much time of probes a peer may use up in advance, in units of 2^20 ns: 128 probes at once.
/// Nodes send 64 questions in the worst case, and as many answers.
pub const PROBE_ALLOWANCE: u32 = 128 * PROBE_COST;
/// How much each probe uses up: after those, 238 a second.
pub const PROBE_COST: u32 = 4;

/// How much time of cookie replies all peers together may use up in advance, in units of 2^20 ns:
/// 1024 replies at once. A node gets one for each handshake message that it sends to a busy peer.
pub const COOKIE_ALLOWANCE: u32 = 1024 * COOKIE_COST;
/// How much each cookie reply uses up: after those, 953 a second.
pub const COOKIE_COST: u32 = 1;

/// After so long (ns) nothing is in the normaliser any more, whatever the counters say.
pub const NORMALISER_PATIENCE_NS: u64 = 50_000_000;

/// Bytes of the `PROBES` ring, a power of two: room for a probe and an answer of each of several
/// hundred peers.
pub const PROBES_LEN: u32 = 1 << 16;

/// A probe that a peer sent to this node, opened.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Who sent it: the peer whose session opened it.
    pub peer: u32,
    /// Length of the inner packet that it came in, bytes.
    pub inner_len: u32,
    /// What followed the inner UDP header.
    pub payload: [u32; crate::wire::PROBE_LEN / 4],
}

/// Most workers of the bulk path, and so most of its devices.
pub const BULK_WORKER_SLOTS: u32 = 16;
/// Entries of `BULK_FLOWS`; the least recently used makes room.
pub const BULK_FLOW_SLOTS: u32 = 16384;
/// A worker that has not said for so long that it lives gets nothing (ns).
pub const BULK_SILENCE_NS: u64 = 100_000_000;
/// A flow that pauses for so long is an ordinary one again (ns). What it sent before has long
/// arrived: packets of both paths never mix on the way from the bulk path.
pub const BULK_PAUSE_NS: u64 = 50_000_000;
/// Bytes that a flow sends in large packets, without such a pause, before it moves to the bulk
/// path.
pub const BULK_THRESHOLD: u64 = 128 << 10;
/// Bytes after which it no longer waits for a moment in which nothing of its peer is in the
/// normaliser: ordinary packets that are overtaken once look like a loss, which costs less than to
/// stay.
pub const BULK_PATIENCE: u64 = 4 << 20;

/// A worker in user space. The process of the workers writes it, the daemon clears it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkWorker {
    /// Its TAP device; 0 while there is no such worker.
    pub ifindex: u32,
    /// Fills up to the next 8 bytes.
    pub unused: u32,
    /// Boot time (ns) at which it last was at work or waited for it.
    pub alive_ns: u64,
}

/// [`BulkInbox::state`]: messages go to the worker's socket.
pub const INBOX_CLOSED: u32 = 0;
/// [`BulkInbox::state`]: the worker waits for its socket. The next message goes there and wakes it, those that follow go into the inbox.
pub const INBOX_ASLEEP: u32 = 1;
/// [`BulkInbox::state`]: messages go into the inbox.
pub const INBOX_OPEN: u32 = 2;

/// The inbox of a worker: a bounded queue of many producers, the CPUs that receive, and one
/// consumer, the worker. The process of the workers writes it, the daemon closes it.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkInbox {
    /// One of `INBOX_*` (program, too).
    pub state: u32,
    /// How many inboxes there are; the same in each.
    pub inboxes: u32,
    /// Its first place in `BULK_MESSAGES`.
    pub first: u32,
    /// How many places it has there, a power of two.
    pub len: u32,
    /// Messages that were put in, modulo 2^32 (program).
    pub head: u32,
    /// Fills up to a cache line.
    pub unused: [u32; 11],
}

/// Entries of `BULK_MESSAGES`, a power of two: 4 MiB, of which each inbox has an equal share.
pub const BULK_MESSAGE_SLOTS: u32 = 2048;
/// Bytes that a message in an inbox may have: what fits an Ethernet packet does.
pub const BULK_MESSAGE_LEN: usize = 2048 - 64;

/// A place in an inbox. The place for message number `n`, of all that were put in, is `n` modulo
/// [`BulkInbox::len`].
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct BulkMessage {
    /// `n` when the place is free for that message, `n + 1` when it is there.
    pub sequence: u32,
    /// Length of the UDP payload in [`BulkMessage::bytes`]; 0: there is no message after all.
    pub len: u32,
    /// Source of the IP header.
    pub remote: Address,
    /// Destination of the IP header.
    pub local: Address,
    /// Source port.
    pub remote_port_be: u16,
    /// ECN codepoint of the IP header.
    pub ecn: u16,
    /// Fills up to a cache line.
    pub unused: [u32; 5],
    /// The UDP payload.
    pub bytes: [u8; BULK_MESSAGE_LEN],
}

/// What the bulk path does for a peer. The process of the workers writes it, the daemon clears it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkPeer {
    /// Over how many workers its flows are spread; 0 while the peer is served by the programs
    /// alone.
    pub workers: u32,
    /// Fills up to the next 8 bytes.
    pub unused: u32,
    /// Boot time (ns) until which flows of this peer are on the bulk path (program).
    pub busy_until_ns: u64,
}

/// A flow from a container of this host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkFlowKey {
    /// The container's IPv4 address, or all of an IPv6 address folded into it, as it lies in the
    /// packet.
    pub source: u32,
    /// The other end's, likewise.
    pub destination: u32,
    /// Both ports, as they lie in the packet.
    pub ports: u32,
    /// IP protocol.
    pub protocol: u32,
}

/// How much a flow sends.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BulkFlow {
    /// Boot time (ns) of its last packet (program).
    pub last_ns: u64,
    /// Bytes sent in large packets since its last pause (program); [`BULK_MOVED`] once it is on the
    /// bulk path.
    pub bytes: u64,
}

/// [`BulkFlow::bytes`]: the flow is on the bulk path.
pub const BULK_MOVED: u64 = u64::MAX;

/// Bytes of the `DROPS` ring, a power of two: room for all that `MONITOR` allows in a second.
pub const DROPS_LEN: u32 = 1 << 18;
/// Bytes of a dropped packet that are recorded, a power of two: Ethernet, IPv6, UDP, a relay header
/// and a data message's, and then the inner IPv4 header with the ports behind it.
pub const DROPPED_LEN: usize = 128;

/// [`Dropped::program`]
pub const PROGRAM_FROM_CONTAINER: u32 = 0;
/// [`Dropped::program`]
pub const PROGRAM_SEAL: u32 = 1;
/// [`Dropped::program`]
pub const PROGRAM_FROM_UNDERLAY: u32 = 2;
/// [`Dropped::program`]
pub const PROGRAM_FROM_UNDERLAY_XDP: u32 = 3;
/// [`Dropped::program`]
pub const PROGRAM_FROM_BULK: u32 = 4;
/// [`Dropped::vlan`]: the packet has a tag.
pub const VLAN_PRESENT: u32 = 1 << 16;

/// A packet that was dropped while somebody monitors.
///
/// Programs record one only as long as `MONITOR` holds more than 0 for the reason, and take 1 off
/// each time. The daemon fills it up once a second while somebody wants to know, so a flood of
/// dropped packets costs no more than counting them does, and programs stop by themselves soon
/// after a daemon was killed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Boot time (ns, `CLOCK_BOOTTIME`).
    pub time_ns: u64,
    /// [`crate::reason::Reason`]
    pub reason: u32,
    /// One of `PROGRAM_*`.
    pub program: u32,
    /// The interface that it came in by.
    pub ifindex: u32,
    /// Its length from the Ethernet header on, in bytes.
    pub len: u32,
    /// How many of [`Dropped::bytes`] are the packet's; the others are anything.
    pub captured: u32,
    /// `VLAN_PRESENT` and the tag, if one was taken off before the program saw the packet; else 0.
    pub vlan: u32,
    /// The packet's first bytes, from the Ethernet header on, as it was when it was given up.
    pub bytes: [u8; DROPPED_LEN],
}

/// [`Session::state`]: the slot is empty.
pub const SESSION_FREE: u32 = 0;
/// [`Session::state`]: receives; must not send before the peer has proven that it has the keys.
pub const SESSION_UNCONFIRMED: u32 = 1;
/// [`Session::state`]: receives, and sends if the peer's `tx_slot` says so.
pub const SESSION_LIVE: u32 = 2;

/// The keys of one handshake (whitepaper section 5.4.5).
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Session {
    /// One of `SESSION_*`. Program: `UNCONFIRMED` becomes `LIVE` with the first authenticated
    /// message.
    pub state: u32,
    /// Peer index.
    pub peer: u32,
    /// Receiver index that the peer puts into its messages: low [`SESSION_SLOT_BITS`] bits are the
    /// slot.
    pub local_index: u32,
    /// Receiver index that goes into ours.
    pub remote_index: u32,
    /// ChaCha20 key for sealing, as eight little-endian words.
    pub tx_key: [u32; 8],
    /// ChaCha20 key for opening, as eight little-endian words.
    pub rx_key: [u32; 8],
    /// Boot time (ns, `CLOCK_BOOTTIME`) at which the handshake ended.
    pub created_ns: u64,
    /// Boot time after which the session neither seals nor opens.
    pub expires_ns: u64,
    /// 1 if this node was the handshake's initiator, else 0.
    pub initiator: u64,
    /// Next counter to send (program, atomically).
    pub tx_counter: u64,
    /// Counters received (program).
    pub window: crate::replay::Window,
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, valid for every bit pattern, without padding (asserted below).
    unsafe impl aya::Pod for super::Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Config {}
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
    unsafe impl aya::Pod for super::BulkInbox {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkMessage {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkFlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::BulkFlow {}
}

const _: () = {
    // A frame for a worker has room for so much.
    assert!(PEER_SLOTS <= 1 << 16);
    assert!(size_of::<Config>() == 76);
    assert!(size_of::<Endpoint>() == 28);
    assert!(size_of::<Route>() == 8);
    assert!(size_of::<Peer>() == 16 + 16 + 2 + 2 + 4 + 4 + 4 + 4 + 4 + 32 + 10 * 8);
    assert!(size_of::<Probe>() == 8 + crate::wire::PROBE_LEN);
    assert!(size_of::<Dropped>() == 8 + 6 * 4 + DROPPED_LEN);
    assert!(size_of::<BulkWorker>() == 16);
    assert!(size_of::<BulkInbox>() == 64);
    assert!(size_of::<BulkMessage>() == 2048);
    assert!(size_of::<BulkPeer>() == 16);
    assert!(size_of::<BulkFlowKey>() == 16);
    assert!(size_of::<BulkFlow>() == 16);
    assert!(size_of::<Session>() == 4 * 4 + 32 + 32 + 4 * 8 + size_of::<crate::replay::Window>());
};
