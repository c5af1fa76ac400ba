//! The maps, and the few ways in which programs use them. Layouts: [`overnode_ebpf::map`].

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray};
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use overnode_ebpf::map::{
    Address, Config, ENDPOINT_SLOTS, Endpoint, LOCAL_ADDRESS_SLOTS, PEER_SLOTS, Peer, ROUTE_SLOTS, Route,
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
    // SAFETY: entries are preallocated: one that is replaced meanwhile is read torn at worst, for one packet.
    unsafe { ENDPOINTS.get(ifindex) }
}

/// Where an IPv4 address (as it lies in the packet) of the overlay is.
#[inline(always)]
pub fn route_v4(address: u32) -> Option<&'static Route> {
    ROUTES.get(Key::new(128, Address::from_v4(address.to_ne_bytes())))
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
pub fn is_local(address: &Address) -> bool {
    LOCAL_ADDRESSES.get_ptr(address).is_some()
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

/// Replaces `old` by `new`; false if the word held something else.
///
/// # Safety
/// `word` points into a map's value and is aligned.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u32, old: u32, new: u32) -> bool {
    // SAFETY: by the contract above.
    unsafe { atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new).1 }
}
