//! The maps, and the operations of the programs on them. Layouts: [`overnode_ebpf::map`].

use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use overnode_ebpf::map::{
    Address, BULK_FLOW_SLOTS, BULK_MESSAGE_SLOTS, BULK_WORKER_SLOTS, BulkFlow, BulkFlowKey,
    BulkMessage, BulkPeer, BulkRing, BulkWorker, Config, DROPS_LEN, Dropped, ENDPOINT_SLOTS,
    ERROR_SLOTS, Endpoint, LOCAL_ADDRESS_SLOTS, PEER_SLOTS, PROBES_LEN, Peer, Probe, ROUTE_SLOTS,
    Resolver, Route, SESSION_SLOTS, Session,
};
use overnode_ebpf::reason::{REASON_SLOTS, Reason};

/// Flags of maps by whether user space maps them into memory.
mod flags {
    #![expect(non_upper_case_globals, reason = "named as in the declarations")]
    pub const Mapped: u32 = aya_ebpf::bindings::BPF_F_MMAPABLE;
    pub const Unmapped: u32 = 0;
}

macro_rules! statics {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident: $kind:ident, $key:ty => $value:ty, $entries:expr, $access:ident, $version:expr,
        $writer:literal;
    )+) => {$(
        define!($name, $kind, $key, $value, $entries, flags::$access);
    )+};
}

macro_rules! define {
    ($name:ident, Array, $key:ty, $value:ty, $entries:expr, $flags:expr) => {
        #[map]
        static $name: Array<$value> = Array::with_max_entries($entries, $flags);
    };
    ($name:ident, PerCpuArray, $key:ty, $value:ty, $entries:expr, $flags:expr) => {
        #[map]
        static $name: PerCpuArray<$value> = PerCpuArray::with_max_entries($entries, $flags);
    };
    ($name:ident, RingBuf, $key:ty, $value:ty, $bytes:expr, $flags:expr) => {
        #[map]
        static $name: RingBuf = RingBuf::with_byte_size($bytes, $flags);
    };
    ($name:ident, $kind:ident, $key:ty, $value:ty, $entries:expr, $flags:expr) => {
        #[map]
        static $name: $kind<$key, $value> = $kind::with_max_entries($entries, $flags);
    };
}

overnode_ebpf::for_each_map!(statics);

/// Returns a bulk worker.
#[inline(always)]
pub fn bulk_worker(number: u32) -> Option<*mut BulkWorker> {
    BULK_WORKERS.get_ptr_mut(number)
}

/// Returns the receive ring of a bulk worker.
#[inline(always)]
pub fn bulk_ring(worker: u32) -> Option<*mut BulkRing> {
    BULK_RINGS.get_ptr_mut(worker)
}

/// Returns a slot of the receive rings.
#[inline(always)]
pub fn bulk_message(slot: u32) -> Option<*mut BulkMessage> {
    BULK_MESSAGES.get_ptr_mut(slot)
}

/// Returns the bulk settings of a peer; `None` if no workers serve it.
#[inline(always)]
pub fn bulk_peer(index: u32) -> Option<*mut BulkPeer> {
    let peer = BULK_PEERS.get_ptr_mut(index)?;
    // SAFETY: array map values stay valid while the program runs.
    (unsafe { (&raw const (*peer).workers).read_volatile() } != 0).then_some(peer)
}

/// Returns a flow that has sent large packets.
#[inline(always)]
pub fn bulk_flow(key: &BulkFlowKey) -> Option<*mut BulkFlow> {
    BULK_FLOWS.get_ptr_mut(key)
}

/// Adds a flow.
#[inline(always)]
pub fn add_bulk_flow(key: &BulkFlowKey, flow: &BulkFlow) {
    // If this fails, the flow remains an ordinary one.
    let _ = BULK_FLOWS.insert(key, flow, 0);
}

/// Returns the time up to which cookie replies have used up their allowance.
#[inline(always)]
pub fn cookies_until() -> Option<*mut u32> {
    COOKIES.get_ptr_mut(0)
}

/// Returns the time up to which ICMP errors to the container of an interface have used up their
/// allowance.
#[inline(always)]
pub fn errors_until(ifindex: u32) -> Option<*mut u32> {
    ERRORS.get_ptr_mut(ifindex % ERROR_SLOTS)
}

/// Takes `cost` from an allowance of `most` units, which refills by one unit every 2^20 ns. `until`
/// holds the time up to which it is used up, in the same units. Returns false if too little is
/// left. Two CPUs at once may take the same units.
///
/// # Safety
/// `until` points into a map value and is aligned.
#[inline(always)]
pub unsafe fn take_allowance(until: *mut u32, cost: u32, most: u32) -> bool {
    let now = (now() >> 20) as u32;
    // SAFETY: upheld by the caller.
    unsafe {
        let ahead = until.read_volatile().wrapping_sub(now);
        // A greater value than possible means that the time has passed.
        let ahead = if ahead > most { 0 } else { ahead };
        let is_allowed = ahead + cost <= most;
        if is_allowed {
            until.write_volatile(now.wrapping_add(ahead + cost));
        }
        is_allowed
    }
}

/// Reserves room for a probe. Fails if the daemon does not keep up.
#[inline(always)]
pub fn reserve_probe() -> Option<RingBufEntry<Probe>> {
    PROBES.reserve::<Probe>(0)
}

/// Returns true if a packet dropped for this reason is to be recorded, and decrements the number
/// that the daemon allows. Two CPUs at once may exceed it by one.
#[inline(always)]
pub fn may_record(reason: Reason) -> bool {
    let Some(left) = MONITOR.get_ptr_mut(reason as u32) else { return false };
    // SAFETY: array map values stay valid while the program runs.
    unsafe {
        let before = left.read_volatile();
        if before != 0 {
            left.write_volatile(before - 1);
        }
        before != 0
    }
}

/// Reserves room for the record of a dropped packet. Fails if the ring is full.
#[inline(always)]
pub fn reserve_dropped() -> Option<RingBufEntry<Dropped>> {
    DROPS.reserve::<Dropped>(0)
}

/// Counts a packet.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the value stays valid while the program runs, and no other CPU writes it.
        unsafe { *counter += 1 }
    }
}

/// Returns the node's configuration.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// Returns the endpoint of the container behind a host end.
#[inline(always)]
pub fn endpoint(ifindex: u32) -> Option<&'static Endpoint> {
    // SAFETY: entries are preallocated. At worst, one that is replaced in the meantime is torn for
    // one packet.
    unsafe { ENDPOINTS.get(ifindex) }
}

/// An address in words. The compiler fills it without calling a function that loops over bytes.
pub type Words = [u32; 4];

/// Returns the v4-mapped form of an address in network byte order.
#[inline(always)]
pub const fn v4_mapped(address: u32) -> Words {
    [0, 0, V4_MAPPED, address]
}

/// Returns the IPv4 address in network byte order, or `None` if this is an IPv6 address.
#[inline(always)]
pub fn v4(address: &Address) -> Option<u32> {
    // SAFETY: addresses have four words and are aligned to 4 bytes.
    let [a, b, c, v4] = unsafe { *address.0.as_ptr().cast::<Words>() };
    (a | b == 0 && c == V4_MAPPED).then_some(v4)
}

/// Third word of a v4-mapped address.
pub const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// Looks up routes of overlay addresses.
///
/// A program uses one key for all its lookups, because each further key would take as much stack
/// again.
#[repr(C)]
pub struct Routes {
    // The fields of [`Key`]. That type is packed and would be filled byte by byte.
    bits: u32,
    address: Words,
}

impl Routes {
    #[inline(always)]
    pub fn new() -> Self {
        Self { bits: 128, address: v4_mapped(0) }
    }

    /// Returns the route of an IPv4 address in network byte order.
    #[inline(always)]
    pub fn v4(&mut self, address: u32) -> Option<&'static Route> {
        self.address[3] = address;
        // SAFETY: same layout, and stricter alignment.
        ROUTES.get(unsafe { &*(&raw const *self).cast::<Key<Address>>() })
    }
}

/// Returns a peer that the daemon has configured.
#[inline(always)]
pub fn peer(index: u32) -> Option<*mut Peer> {
    let peer = PEERS.get_ptr_mut(index)?;
    // SAFETY: array map values stay valid while the program runs.
    (unsafe { (*peer).present } == 1).then_some(peer)
}

/// Returns the session in a slot, in any state.
#[inline(always)]
pub fn session(slot: u32) -> Option<*mut Session> {
    SESSIONS.get_ptr_mut(slot)
}

/// Returns true if the address belongs to this host.
#[inline(always)]
pub fn is_local(address: &Words) -> bool {
    // SAFETY: same size and alignment, and all bit patterns are valid addresses.
    LOCAL_ADDRESSES.get_ptr(unsafe { &*address.as_ptr().cast::<Address>() }).is_some()
}

/// Returns true if DNS queries of this network namespace go to the node's server.
#[inline(always)]
pub fn is_named(netns: u64) -> bool {
    NAMED_NETNS.get_ptr(netns).is_some()
}

/// Returns the node's DNS server.
#[inline(always)]
pub fn resolver() -> Option<Resolver> {
    RESOLVER.get(0).copied()
}

/// Returns the boot time in nanoseconds, including suspend.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Adds `by` atomically and returns the previous value.
///
/// # Safety
/// `word` points into a map value and is aligned.
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, by: u64) -> u64 {
    // SAFETY: upheld by the caller.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, by) }
}

/// Adds `by` atomically.
///
/// # Safety
/// `word` points into a map value and is aligned.
#[inline(always)]
pub unsafe fn add(word: *mut u32, by: u32) {
    // SAFETY: upheld by the caller.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(word, by) };
}

/// Replaces `old` with `new` atomically. Returns false if the word had another value.
///
/// # Safety
/// `word` points into a map value and is aligned.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u32, old: u32, new: u32) -> bool {
    // SAFETY: upheld by the caller.
    unsafe {
        atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new)
            .1
    }
}
