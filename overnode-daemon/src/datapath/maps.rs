//! Provides typed access to the eBPF maps.
//!
//! `PEERS` and `SESSIONS` are mapped into memory and changed word by word. Rewriting a whole value
//! would roll back what a program counted in the meantime, and a rolled-back message counter would
//! reuse a nonce.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, MapInfo, PerCpuArray, RingBuf};
use aya::{Ebpf, Pod};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use overnode_ebpf::map::{
    Address, BulkMessage, BulkPeer, BulkRing, BulkWorker, Config, ENDPOINT_SLOTS, Endpoint,
    LOCAL_ADDRESS_SLOTS, MAPS, MapLayout, PEER_SLOTS, Peer, ROUTE_SLOTS, Resolver, Route,
    SESSION_SLOTS, Session,
};
use overnode_ebpf::reason::Reason;

use super::address::{from_map, to_map};
use super::bpffs::Pins;
use super::bulk::BulkMaps;
use overnode_types::InterfaceIndex;

/// `BPF_F_MMAPABLE` (Linux 5.5).
const MMAPABLE: u32 = 1 << 10;

/// Describes how a map differs from its declaration, if it does.
fn mismatch(layout: &MapLayout, info: &MapInfo) -> Option<String> {
    let MapLayout { name, key, value, entries, is_mapped, .. } = *layout;
    let found = (info.key_size() as usize, info.value_size() as usize, info.max_entries());
    if found != (key, value, entries) {
        let (other_key, other_value, other_entries) = found;
        return Some(format!(
            "{name} has {other_entries} entries of {other_key}+{other_value} bytes instead of \
             {entries} of {key}+{value}"
        ));
    }
    let found = info.map_flags() & MMAPABLE != 0;
    (found != is_mapped)
        .then(|| format!("{name} {} BPF_F_MMAPABLE", if found { "has" } else { "lacks" }))
}

/// Describes how the existing pinned maps differ from the layouts that this daemon requires. Empty
/// if they match or if none are pinned.
pub(super) fn pinned_mismatches(pins: &Pins) -> Vec<String> {
    // Maps with other names are those of later versions, and of no concern to this one.
    let others = pins.map_names().into_iter().filter_map(|pin| {
        let name = pin.split('.').next()?;
        let layout = MAPS.iter().find(|layout| layout.name == name)?;
        (pins.map(layout) != pins.map_named(&pin)).then(|| format!("{pin} is of another version"))
    });
    let present = MAPS.iter().filter_map(|layout| {
        let path = pins.map(layout);
        if !path.exists() {
            return None;
        }
        match MapInfo::from_pin(&path) {
            Ok(info) => mismatch(layout, &info),
            Err(error) => Some(format!("{} cannot be opened: {error}", layout.name)),
        }
    });
    others.chain(present).collect()
}

/// The maps of a loaded object.
pub(super) struct Maps {
    config: Array<MapData, Config>,
    endpoints: HashMap<MapData, u32, Endpoint>,
    routes: LpmTrie<MapData, Address, Route>,
    local_addresses: HashMap<MapData, Address, u32>,
    named_netns: HashMap<MapData, u64, u32>,
    resolver: Array<MapData, Resolver>,
    counters: PerCpuArray<MapData, u64>,
    /// `None` once a receiver has taken it.
    pub(super) probes: Option<RingBuf<MapData>>,
    monitor: Array<MapData, u32>,
    /// `None` once a receiver has taken it.
    pub(super) drops: Option<RingBuf<MapData>>,
    pub(super) peers: Slots<Peer>,
    pub(super) sessions: Arc<Slots<Session>>,
    pub(super) bulk: BulkMaps,
    /// `BULK_WORKERS`, `BULK_PEERS`, `BULK_RINGS` and `BULK_MESSAGES`, to be passed to the
    /// workers' process.
    pub(super) bulk_fds: [OwnedFd; 4],
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Takes the maps out of a loaded object. The programs must have been loaded before.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self> {
        let mut maps = BTreeMap::new();
        for layout in MAPS {
            let map = ebpf
                .take_map(layout.name)
                .ok_or_else(|| anyhow!("the eBPF object has no map {}", layout.name))?;
            if let Some(mismatch) = mismatch(layout, &data(&map)?.info()?) {
                bail!("the eBPF programs do not match the daemon: {mismatch}");
            }
            maps.insert(layout.name, map);
        }
        let mut take = |name: &str| {
            maps.remove(name).ok_or_else(|| anyhow!("the eBPF object has no map {name}"))
        };
        let mut own = |name: &str| -> Result<OwnedFd> {
            Ok(data(&take(name)?)?.fd().as_fd().try_clone_to_owned()?)
        };
        let bulk_fds =
            [own("BULK_WORKERS")?, own("BULK_PEERS")?, own("BULK_RINGS")?, own("BULK_MESSAGES")?];
        let [workers, peers, rings, _] = bulk_fds.each_ref().map(OwnedFd::as_fd);
        Ok(Self {
            bulk: BulkMaps::open(workers, peers, rings)?,
            bulk_fds,
            config: take("CONFIG")?.try_into()?,
            endpoints: take("ENDPOINTS")?.try_into()?,
            routes: take("ROUTES")?.try_into()?,
            local_addresses: take("LOCAL_ADDRESSES")?.try_into()?,
            named_netns: take("NAMED_NETNS")?.try_into()?,
            resolver: take("RESOLVER")?.try_into()?,
            counters: take("COUNTERS")?.try_into()?,
            probes: Some(take("PROBES")?.try_into()?),
            monitor: take("MONITOR")?.try_into()?,
            drops: Some(take("DROPS")?.try_into()?),
            peers: Slots::map(data(&take("PEERS")?)?.fd().as_fd(), PEER_SLOTS)?,
            sessions: Arc::new(Slots::map(data(&take("SESSIONS")?)?.fd().as_fd(), SESSION_SLOTS)?),
        })
    }

    pub(super) fn config(&self) -> Result<Config> {
        self.config.get(&0, 0).context("CONFIG cannot be read")
    }

    /// Writes the value only if it differs, because programs may read it during the write.
    pub(super) fn set_config(&mut self, config: Config) -> Result<()> {
        if self.config()? != config {
            self.config.set(0, config, 0).context("CONFIG cannot be written")?;
        }
        Ok(())
    }

    pub(super) fn endpoints(&self) -> Result<BTreeMap<InterfaceIndex, Endpoint>> {
        self.endpoints
            .iter()
            .map(|entry| entry.map(|(ifindex, endpoint)| (InterfaceIndex::new(ifindex), endpoint)))
            .collect::<Result<_, MapError>>()
            .context("ENDPOINTS cannot be read")
    }

    pub(super) fn set_endpoint(
        &mut self,
        ifindex: InterfaceIndex,
        endpoint: Endpoint,
    ) -> Result<()> {
        self.endpoints.insert(ifindex.get(), endpoint, 0).with_context(|| {
            format!(
                "the container cannot be added to ENDPOINTS (a host holds up to {ENDPOINT_SLOTS})"
            )
        })
    }

    pub(super) fn remove_endpoint(&mut self, ifindex: InterfaceIndex) -> Result<()> {
        ignore_missing(self.endpoints.remove(&ifindex.get())).context("ENDPOINTS cannot be changed")
    }

    pub(super) fn routes(&self) -> Result<BTreeMap<IpNet, Route>> {
        let mut routes = BTreeMap::new();
        for entry in self.routes.iter() {
            let (key, route) = entry.context("ROUTES cannot be read")?;
            routes.insert(prefix_of(&key)?, route);
        }
        Ok(routes)
    }

    pub(super) fn set_route(&mut self, prefix: IpNet, route: Route) -> Result<()> {
        self.routes.insert(&key_of(prefix), route, 0).with_context(|| {
            format!("the route {prefix} cannot be written (the table holds up to {ROUTE_SLOTS})")
        })
    }

    pub(super) fn remove_route(&mut self, prefix: IpNet) -> Result<()> {
        ignore_missing(self.routes.remove(&key_of(prefix)))
            .with_context(|| format!("the route {prefix} cannot be removed"))
    }

    pub(super) fn add_named_netns(&mut self, cookie: u64) -> Result<()> {
        self.named_netns.insert(cookie, 0, 0).context("NAMED_NETNS cannot be changed")
    }

    /// Removes all other cookies from `NAMED_NETNS`.
    pub(super) fn keep_named_netns(&mut self, wanted: &BTreeSet<u64>) -> Result<()> {
        let present = self
            .named_netns
            .keys()
            .collect::<Result<Vec<_>, _>>()
            .context("NAMED_NETNS cannot be read")?;
        for cookie in present.iter().filter(|cookie| !wanted.contains(cookie)) {
            ignore_missing(self.named_netns.remove(cookie))
                .context("NAMED_NETNS cannot be changed")?;
        }
        Ok(())
    }

    pub(super) fn set_resolver(&mut self, resolver: Resolver) -> Result<()> {
        self.resolver.set(0, resolver, 0).context("RESOLVER cannot be written")
    }

    /// Makes `LOCAL_ADDRESSES` hold exactly the given addresses.
    pub(super) fn set_local_addresses(&mut self, wanted: &[IpAddr]) -> Result<()> {
        let wanted: BTreeSet<Address> = wanted.iter().map(|address| to_map(*address)).collect();
        let present = self
            .local_addresses
            .keys()
            .collect::<Result<BTreeSet<Address>, MapError>>()
            .context("LOCAL_ADDRESSES cannot be read")?;
        for gone in present.difference(&wanted) {
            ignore_missing(self.local_addresses.remove(gone))
                .context("LOCAL_ADDRESSES cannot be changed")?;
        }
        for new in wanted.difference(&present) {
            self.local_addresses.insert(*new, 0, 0).with_context(|| {
                format!(
                    "the address {} cannot be added to LOCAL_ADDRESSES (it holds up to \
                     {LOCAL_ADDRESS_SLOTS})",
                    from_map(*new)
                )
            })?;
        }
        Ok(())
    }

    /// Sets how many more dropped packets the programs may record for each reason.
    pub(super) fn set_record_allowance(&mut self, each: u32) -> Result<()> {
        for reason in Reason::ALL.iter().filter(|reason| reason.is_drop()) {
            self.monitor.set(*reason as u32, each, 0).context("MONITOR cannot be written")?;
        }
        Ok(())
    }

    pub(super) fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let values =
                    self.counters.get(&(*reason as u32), 0).context("COUNTERS cannot be read")?;
                Ok((reason.as_str(), values.iter().sum()))
            })
            .collect()
    }
}

/// An array map, mapped into memory.
pub(super) struct Slots<T> {
    base: NonNull<u8>,
    stride: usize,
    len: u32,
    kind: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway, and every access is a single atomic word.
unsafe impl<T> Send for Slots<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Slots<T> {}

impl<T: Pod> Slots<T> {
    pub(super) fn map(map: BorrowedFd<'_>, len: u32) -> Result<Self> {
        let stride = size_of::<T>().next_multiple_of(8);
        // SAFETY: this is a new mapping at an address that the kernel picks. It is unmapped only
        // when `self` is dropped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                stride * len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        ensure!(
            base != libc::MAP_FAILED,
            "a map cannot be mapped into memory: {}",
            io::Error::last_os_error()
        );
        // SAFETY: the range was just mapped. Session keys must not end up in a core dump.
        unsafe { libc::madvise(base, stride * len as usize, libc::MADV_DONTDUMP) };
        let base = NonNull::new(base.cast()).context("a map was mapped at address 0")?;
        Ok(Self { base, stride, len, kind: PhantomData })
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Returns a handle to the slot, or `None` if the index is out of range.
    pub(super) fn at(&self, index: u32) -> Option<Cell<'_, T>> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the index is within the mapping.
        let pointer = unsafe { self.base.add(self.stride * index as usize) };
        Some(Cell { pointer: pointer.cast(), owner: PhantomData })
    }
}

impl<T> Drop for Slots<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map`, and no `Cell` outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.stride * self.len as usize) };
    }
}

/// One value of an array map, in place.
pub(super) struct Cell<'a, T> {
    pointer: NonNull<T>,
    owner: PhantomData<&'a Slots<T>>,
}

impl<T> Clone for Cell<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Cell<'_, T> {}

impl<T: Pod> Cell<'_, T> {
    /// Returns the value's address, valid while the map is mapped.
    pub(super) fn as_ptr(self) -> *mut T {
        self.pointer.as_ptr()
    }

    /// Returns a copy. Words that programs are changing may come from different moments.
    pub(super) fn read(self) -> T {
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        for word in 0..size_of::<T>() / 4 {
            // SAFETY: the word is within the value, and both pointers are aligned to at least 4.
            unsafe {
                let seen = self.word(word).load(Ordering::Relaxed);
                value.as_mut_ptr().cast::<u32>().add(word).write(seen);
            }
        }
        // SAFETY: all words were written (`size_of` is a multiple of 4, asserted in `map.rs`), and
        // every bit pattern is valid.
        unsafe { value.assume_init() }
    }

    /// Overwrites the value. Only for values that no program can reach.
    pub(super) fn write(self, value: &T) {
        for word in 0..size_of::<T>() / 4 {
            // SAFETY: the word is within the value, and both pointers are aligned to at least 4.
            unsafe {
                let new = std::ptr::from_ref(value).cast::<u32>().add(word).read();
                self.word(word).store(new, Ordering::Relaxed);
            }
        }
        fence(Ordering::Release);
    }

    /// Overwrites the value with zeros. Only for values that no program can reach.
    pub(super) fn wipe(self) {
        for word in 0..size_of::<T>() / 4 {
            // SAFETY: the word is within the value and aligned to at least 4.
            unsafe { self.word(word) }.store(0, Ordering::Relaxed);
        }
        fence(Ordering::Release);
    }

    pub(super) fn is_wiped(self) -> bool {
        // SAFETY: the word is within the value and aligned to at least 4.
        (0..size_of::<T>() / 4).all(|word| unsafe { self.word(word) }.load(Ordering::Relaxed) == 0)
    }

    /// # Safety
    /// `index` is within the value.
    unsafe fn word<'a>(self, index: usize) -> &'a AtomicU32 {
        // SAFETY: the word is aligned (the mapping to pages, the stride to 8) and stays valid while
        // the map is mapped.
        unsafe { AtomicU32::from_ptr(self.pointer.as_ptr().cast::<u32>().add(index)) }
    }
}

macro_rules! fields {
    ($type:ty { $($field:ident: $atomic:ty),+ $(,)? }) => {
        impl<'a> Cell<'a, $type> {
            $(
                pub(super) fn $field(self) -> &'a $atomic {
                    // SAFETY: the field belongs to a live, aligned value. Programs change it with
                    // single stores, too.
                    unsafe { <$atomic>::from_ptr(&raw mut (*self.pointer.as_ptr()).$field) }
                }
            )+
        }
    };
}

fields!(BulkWorker { ifindex: AtomicU32, alive_ns: AtomicU64 });
fields!(BulkRing {
    state: AtomicU32,
    rings: AtomicU32,
    first: AtomicU32,
    len: AtomicU32,
    head: AtomicU32,
});
fields!(BulkMessage { sequence: AtomicU32 });
fields!(BulkPeer { workers: AtomicU32 });
fields!(Session { state: AtomicU32, peer: AtomicU32, local_index: AtomicU32 });
fields!(Peer {
    remote_port_be: AtomicU16,
    present: AtomicU16,
    ifindex: AtomicU32,
    tx_slot: AtomicU32,
    mtu: AtomicU32,
    via: AtomicU32,
});

impl Cell<'_, Peer> {
    /// Sets both underlay addresses. A message that is sealed meanwhile may be sent to a mix of the
    /// old and new endpoint. It is lost, but leaks nothing.
    pub(super) fn set_path(
        self,
        remote: IpAddr,
        port: u16,
        local: Option<IpAddr>,
        ifindex: Option<InterfaceIndex>,
    ) {
        // SAFETY: the field belongs to a live value, and bytes need no alignment.
        unsafe { store_bytes(&raw mut (*self.pointer.as_ptr()).remote, to_map(remote)) };
        self.remote_port_be().store(port.to_be(), Ordering::Relaxed);
        self.set_source(local, ifindex);
    }

    /// Sets the local address and interface only. The remote endpoint follows the messages that the
    /// program receives.
    pub(super) fn set_source(self, local: Option<IpAddr>, ifindex: Option<InterfaceIndex>) {
        let local = local.map_or(Address::default(), to_map);
        // SAFETY: the field belongs to a live value, and bytes need no alignment.
        unsafe { store_bytes(&raw mut (*self.pointer.as_ptr()).local, local) };
        self.ifindex().store(ifindex.map_or(0, InterfaceIndex::get), Ordering::Release);
    }
}

/// # Safety
/// `place` is valid for writes during the call.
unsafe fn store_bytes(place: *mut Address, address: Address) {
    for (offset, byte) in address.0.iter().enumerate() {
        // SAFETY: the offset is within the 16 bytes of the address.
        unsafe { AtomicU8::from_ptr(place.cast::<u8>().add(offset)) }
            .store(*byte, Ordering::Relaxed);
    }
}

fn data(map: &Map) -> Result<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::LpmTrie(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data) => Ok(data),
        other => bail!("the eBPF object has a map of an unknown kind: {other:?}"),
    }
}

fn ignore_missing(result: Result<(), MapError>) -> Result<()> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(error.into()),
        Ok(()) => Ok(()),
    }
}

fn key_of(prefix: IpNet) -> Key<Address> {
    let bits = match prefix {
        IpNet::V4(v4) => u32::from(v4.prefix_len()) + Address::V4_BITS,
        IpNet::V6(v6) => v6.prefix_len().into(),
    };
    Key::new(bits, to_map(prefix.network()))
}

fn prefix_of(key: &Key<Address>) -> Result<IpNet> {
    let bits = key.prefix_len();
    Ok(match (from_map(key.data()), bits.checked_sub(Address::V4_BITS)) {
        (IpAddr::V4(v4), Some(bits)) => Ipv4Net::new(v4, bits as u8)?.into(),
        (IpAddr::V4(v4), None) => Ipv6Net::new(v4.to_ipv6_mapped(), bits as u8)?.into(),
        (IpAddr::V6(v6), _) => Ipv6Net::new(v6, bits as u8)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_round_trip_through_map_keys() {
        for text in ["10.40.0.0/13", "10.40.0.1/32", "0.0.0.0/0", "fd00::/8", "fd00::1/128"] {
            let prefix: IpNet = text.parse().unwrap();
            assert_eq!(prefix_of(&key_of(prefix)).unwrap(), prefix);
        }
        assert_eq!(key_of("10.40.0.0/13".parse().unwrap()).prefix_len(), 109);
    }
}
