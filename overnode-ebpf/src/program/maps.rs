//! The maps, and the few ways in which programs use them. Layouts: [`overnode_ebpf::map`].

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use overnode_ebpf::map::{
    Address, BULK_FLOW_SLOTS, BULK_MESSAGE_SLOTS, BULK_WORKER_SLOTS, BulkFlow, BulkFlowKey,
    BulkInbox, BulkMessage, BulkPeer, BulkWorker, Config, DROPS_LEN, Dropped, ENDPOINT_SLOTS,
    Endpoint, LOCAL_ADDRESS_SLOTS, PEER_SLOTS, PROBES_LEN, Peer, Probe, ROUTE_SLOTS, Route,
    SESSION_SLOTS, Session,
};
use overnode_ebpf::reason::{REASON_SLOTS, Reason};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(ENDPOINT_SLOTS, 0);
#[map]
static ROUTES: LpmTrie<Address, Route> = LpmTrie::with_max_entries(ROUTE_SLOTS, 0);
// The daemon changes single words of these two while programs count in them, hence through mmap.
#[map]
static PEERS: Array<Peer> = Array::with_max_entries(PEER_SLOTS, BPF_F_MMAPABLE);
#[map]
static SESSIONS: Array<Session> = Array::with_max_entries(SESSION_SLOTS, BPF_F_MMAPABLE);
#[map]
static LOCAL_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(LOCAL_ADDRESS_SLOTS, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASON_SLOTS, 0);
#[map]
static COOKIES: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static PROBES: RingBuf = RingBuf::with_byte_size(PROBES_LEN, 0);
#[map]
static MONITOR: Array<u32> = Array::with_max_entries(REASON_SLOTS, 0);
#[map]
static DROPS: RingBuf = RingBuf::with_byte_size(DROPS_LEN, 0);

// The process of the workers writes these through mmap.
#[map]
static BULK_WORKERS: Array<BulkWorker> = Array::with_max_entries(BULK_WORKER_SLOTS, BPF_F_MMAPABLE);
#[map]
static BULK_PEERS: Array<BulkPeer> = Array::with_max_entries(PEER_SLOTS, BPF_F_MMAPABLE);
#[map]
static BULK_INBOXES: Array<BulkInbox> = Array::with_max_entries(BULK_WORKER_SLOTS, BPF_F_MMAPABLE);
#[map]
static BULK_MESSAGES: Array<BulkMessage> =
    Array::with_max_entries(BULK_MESSAGE_SLOTS, BPF_F_MMAPABLE);
#[map]
static BULK_FLOWS: LruHashMap<BulkFlowKey, BulkFlow> =
    LruHashMap::with_max_entries(BULK_FLOW_SLOTS, 0);

/// A worker of the bulk path.
#[inline(always)]
pub fn bulk_worker(number: u32) -> Option<*mut BulkWorker> {
    BULK_WORKERS.get_ptr_mut(number)
}

/// The inbox of a worker of the bulk path.
#[inline(always)]
pub fn bulk_inbox(worker: u32) -> Option<*mut BulkInbox> {
    BULK_INBOXES.get_ptr_mut(worker)
}

/// A place in an inbox.
#[inline(always)]
pub fn bulk_message(slot: u32) -> Option<*mut BulkMessage> {
    BULK_MESSAGES.get_ptr_mut(slot)
}

/// What the bulk path does for a peer; `None` if nothing.
#[inline(always)]
pub fn bulk_peer(index: u32) -> Option<*mut BulkPeer> {
    let peer = BULK_PEERS.get_ptr_mut(index)?;
    // SAFETY: values of an array map are valid for the whole program.
    (unsafe { (&raw const (*peer).workers).read_volatile() } != 0).then_some(peer)
}

/// A flow that has sent large packets.
#[inline(always)]
pub fn bulk_flow(key: &BulkFlowKey) -> Option<*mut BulkFlow> {
    BULK_FLOWS.get_ptr_mut(key)
}

/// Remembers a flow.
#[inline(always)]
pub fn add_bulk_flow(key: &BulkFlowKey, flow: &BulkFlow) {
    // Without room, the flow stays an ordinary one.
    let _ = BULK_FLOWS.insert(key, flow, 0);
}

/// The time to which cookie replies have used up their allowance.
#[inline(always)]
pub fn cookies_until() -> Option<*mut u32> {
    COOKIES.get_ptr_mut(0)
}

/// Takes `cost` from an allowance of `most`, which grows by one in each 2^20 ns. `until` is the
/// time to which it is used up. False if too little is left. Two CPUs at once may take the same.
///
/// # Safety
/// `until` points into a map's value and is aligned.
#[inline(always)]
pub unsafe fn take_allowance(until: *mut u32, cost: u32, most: u32) -> bool {
    let now = (now() >> 20) as u32;
    // SAFETY: by the contract above.
    unsafe {
        let ahead = until.read_volatile().wrapping_sub(now);
        // More than there can be: that time has passed.
        let ahead = if ahead > most { 0 } else { ahead };
        let is_allowed = ahead + cost <= most;
        if is_allowed {
            until.write_volatile(now.wrapping_add(ahead + cost));
        }
        is_allowed
    }
}

/// Room for a probe, if the daemon keeps up.
#[inline(always)]
pub fn reserve_probe() -> Option<RingBufEntry<Probe>> {
    PROBES.reserve::<Probe>(0)
}

/// Whether a packet dropped for this reason is to be recorded; takes it off what the daemon has
/// allowed. Two CPUs at once may record one more than that.
#[inline(always)]
pub fn may_record(reason: Reason) -> bool {
    let Some(left) = MONITOR.get_ptr_mut(reason as u32) else { return false };
    // SAFETY: values of an array map are valid for the whole program.
    unsafe {
        let before = left.read_volatile();
        if before != 0 {
            left.write_volatile(before - 1);
        }
        before != 0
    }
}

/// Room for a record of a dropped packet, if there is any.
#[inline(always)]
pub fn reserve_dropped() -> Option<RingBufEntry<Dropped>> {
    DROPS.reserve::<Dropped>(0)
}

/// Counts a packet.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the value is valid for the whole program, and no other CPU writes it.
        unsafe { *counter += 1 }
    }
}

/// The node's configuration.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// The container behind a host end.
#[inline(always)]
pub fn endpoint(ifindex: u32) -> Option<&'static Endpoint> {
    // SAFETY: entries are preallocated: one that is replaced meanwhile is read torn at worst, for
    // one packet.
    unsafe { ENDPOINTS.get(ifindex) }
}

/// An address in words, which the compiler fills without calling a loop over bytes.
pub type Words = [u32; 4];

/// The v4-mapped form of an address as it lies in a packet.
#[inline(always)]
pub const fn v4_mapped(address: u32) -> Words {
    [0, 0, V4_MAPPED, address]
}

/// The IPv4 address, as it lies in packets, that one in a map is; `None` if it is an IPv6 address.
#[inline(always)]
pub fn v4(address: &Address) -> Option<u32> {
    // SAFETY: addresses have four words, and are aligned to 4.
    let [a, b, c, v4] = unsafe { *address.0.as_ptr().cast::<Words>() };
    (a | b == 0 && c == V4_MAPPED).then_some(v4)
}

/// Third word of an IPv4 address that is mapped into IPv6.
pub const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// Where addresses of the overlay are.
///
/// One key for all that a program looks up: each of its own would take as much of the stack again.
#[repr(C)]
pub struct Routes {
    // What [`Key`] holds; that type is packed, and would be filled byte by byte.
    bits: u32,
    address: Words,
}

impl Routes {
    #[inline(always)]
    pub fn new() -> Self {
        Self { bits: 128, address: v4_mapped(0) }
    }

    /// Where an IPv4 address (as it lies in the packet) is.
    #[inline(always)]
    pub fn v4(&mut self, address: u32) -> Option<&'static Route> {
        self.address[3] = address;
        // SAFETY: the same layout, with greater alignment.
        ROUTES.get(unsafe { &*(&raw const *self).cast::<Key<Address>>() })
    }
}

/// A peer that the daemon has configured.
#[inline(always)]
pub fn peer(index: u32) -> Option<*mut Peer> {
    let peer = PEERS.get_ptr_mut(index)?;
    // SAFETY: values of an array map are valid for the whole program.
    (unsafe { (*peer).present } == 1).then_some(peer)
}

/// A session by its slot, whatever its state.
#[inline(always)]
pub fn session(slot: u32) -> Option<*mut Session> {
    SESSIONS.get_ptr_mut(slot)
}

/// True if the address is one of this host's own.
#[inline(always)]
pub fn is_local(address: &Words) -> bool {
    // SAFETY: the same size and alignment, and an address is valid whatever it holds.
    LOCAL_ADDRESSES.get_ptr(unsafe { &*address.as_ptr().cast::<Address>() }).is_some()
}

/// Nanoseconds since boot, suspend included.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Adds and returns the value before.
///
/// # Safety
/// `word` points into a map's value and is aligned.
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, by: u64) -> u64 {
    // SAFETY: by the contract above.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, by) }
}

/// Adds 1.
///
/// # Safety
/// `word` points into a map's value and is aligned.
#[inline(always)]
pub unsafe fn add(word: *mut u32, by: u32) {
    // SAFETY: by the contract above.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(word, by) };
}

/// Replaces `old` by `new`; false if the word held something else.
///
/// # Safety
/// `word` points into a map's value and is aligned.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u32, old: u32, new: u32) -> bool {
    // SAFETY: by the contract above.
    unsafe {
        atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new)
            .1
    }
}
