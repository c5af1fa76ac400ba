//! Manages the kernel side of the bulk path: the workers' devices, and the maps that programs and
//! workers share.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow};
use overnode_ebpf::map::{
    BULK_WORKER_SLOTS, BulkPeer, BulkRing, BulkWorker, PEER_SLOTS, RING_CLOSED,
};

use super::interfaces::Link;
use super::maps::Slots;
use super::programs::FROM_BULK;
use super::{Datapath, isolate_interface};
use overnode_types::{BootTime, InterfaceIndex};

/// Prefix of the device names. The kernel appends a number.
const PREFIX: &str = "ovnb";
/// Largest MTU of a TAP device, in bytes.
const MTU: u32 = 65521;

// From `linux/if_tun.h`. libc defines only part of it.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;
/// Segmentation offload of UDP (Linux 6.2).
const TUN_F_USO: libc::c_ulong = 0x20 | 0x40;

/// The maps `BULK_WORKERS`, `BULK_PEERS` and `BULK_RINGS`, mapped into memory.
pub struct BulkMaps {
    workers: Slots<BulkWorker>,
    peers: Slots<BulkPeer>,
    rings: Slots<BulkRing>,
}

impl BulkMaps {
    /// Maps all three into memory.
    ///
    /// # Errors
    /// Fails if a descriptor is not one of these maps.
    pub fn open(
        workers: BorrowedFd<'_>,
        peers: BorrowedFd<'_>,
        rings: BorrowedFd<'_>,
    ) -> Result<Self> {
        Ok(Self {
            workers: Slots::map(workers, BULK_WORKER_SLOTS)?,
            peers: Slots::map(peers, PEER_SLOTS)?,
            rings: Slots::map(rings, BULK_WORKER_SLOTS)?,
        })
    }

    /// Lets the programs pass packets to a worker.
    pub fn set_worker(&self, worker: u32, ifindex: InterfaceIndex, now: BootTime) {
        if let Some(cell) = self.workers.at(worker) {
            cell.alive_ns().store(now.as_nanos(), Ordering::Relaxed);
            cell.ifindex().store(ifindex.get(), Ordering::Release);
        }
    }

    /// Records a worker's heartbeat.
    pub fn alive(&self, worker: u32, now: BootTime) {
        if let Some(cell) = self.workers.at(worker) {
            cell.alive_ns().store(now.as_nanos(), Ordering::Relaxed);
        }
    }

    /// Stops the programs from passing packets to a worker, if `ifindex` is still its device.
    pub fn clear_worker(&self, worker: u32, ifindex: InterfaceIndex) {
        if let Some(cell) = self.workers.at(worker) {
            let _ = cell.ifindex().compare_exchange(
                ifindex.get(),
                0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
        }
    }

    /// Sets the number of workers that share a peer's bulk flows. With 0 the eBPF programs handle
    /// them.
    pub fn serve(&self, peer: u32, workers: u32) {
        if let Some(cell) = self.peers.at(peer) {
            cell.workers().store(workers, Ordering::Release);
        }
    }

    /// Clears all peers and workers, and closes all receive rings.
    pub fn clear(&self) {
        for peer in 0..self.peers.len() {
            self.serve(peer, 0);
        }
        for worker in 0..self.workers.len() {
            if let Some(cell) = self.workers.at(worker) {
                cell.ifindex().store(0, Ordering::Release);
            }
        }
        for ring in 0..self.rings.len() {
            if let Some(cell) = self.rings.at(ring) {
                cell.state().store(RING_CLOSED, Ordering::Release);
            }
        }
    }
}

/// A worker's device.
#[derive(Debug)]
pub struct BulkDevice {
    /// The descriptor that the worker reads and writes. The device exists while any copy of it is
    /// open.
    pub file: File,
    /// Interface index.
    pub ifindex: InterfaceIndex,
    /// True if the device does segmentation offload of UDP.
    pub takes_uso: bool,
}

impl Datapath {
    /// Returns the maps of the bulk path, for the workers' process.
    pub fn bulk_maps(&self) -> &BulkMaps {
        &self.maps.bulk
    }

    /// Returns the descriptors of `BULK_WORKERS`, `BULK_PEERS`, `BULK_RINGS` and `BULK_MESSAGES`.
    pub fn bulk_map_fds(&self) -> [BorrowedFd<'_>; 4] {
        self.maps.bulk_fds.each_ref().map(OwnedFd::as_fd)
    }

    /// Creates a device for a worker. The worker reads packets from containers from it, and packets
    /// that it writes to the device are delivered to containers.
    ///
    /// # Errors
    /// Fails if the kernel has no TUN/TAP devices, or refuses.
    pub async fn bulk_device(&mut self) -> Result<BulkDevice> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .context("/dev/net/tun cannot be opened (CONFIG_TUN)")?;
        let name = create(&file).context("a TAP device cannot be created")?;
        let takes_uso = set_offloads(&file)
            .context("segmentation offload of a TAP device cannot be turned on")?;
        let link = self
            .netlink
            .link_named(&name)
            .await?
            .ok_or_else(|| anyhow!("{name} has disappeared"))?;
        self.netlink.mark(link.index, &self.alias).await?;
        isolate_interface(&name);
        self.netlink.set_mtu(link.index, MTU).await?;
        self.programs.attach(FROM_BULK, &link, &self.pins)?;
        self.netlink.set_up(link.index).await?;
        self.bulk_devices.insert(link.index);
        Ok(BulkDevice { file, ifindex: link.index, takes_uso })
    }

    /// Takes over the device of a worker that an earlier daemon started. Its program is replaced in
    /// place.
    ///
    /// # Errors
    /// Fails if there is no such device, or if the kernel refuses.
    pub async fn adopt_bulk_device(&mut self, ifindex: InterfaceIndex) -> Result<()> {
        let link = self
            .netlink
            .link(ifindex)
            .await?
            .ok_or_else(|| anyhow!("interface {ifindex} is gone"))?;
        self.programs.attach(FROM_BULK, &link, &self.pins)?;
        self.bulk_devices.insert(ifindex);
        Ok(())
    }

    /// Removes worker devices that this daemon has neither created nor adopted. Returns true if
    /// there were any.
    ///
    /// # Errors
    /// Fails if interfaces cannot be listed or removed.
    pub async fn remove_stray_bulk_devices(&mut self) -> Result<bool> {
        let mut any = false;
        for link in self.netlink.links().await? {
            if is_bulk_device(&link, &self.alias) && !self.bulk_devices.contains(&link.index) {
                self.netlink.delete(link.index).await?;
                any = true;
            }
        }
        Ok(any)
    }

    /// Drops ownership of the given devices, whose workers are gone.
    pub fn forget_bulk_devices(&mut self, devices: &[InterfaceIndex]) {
        self.bulk_devices.retain(|ifindex| !devices.contains(ifindex));
    }
}

/// Returns true for the devices of this node's workers. A device without an alias needs no cleanup:
/// it disappears with the daemon that was about to set the alias.
pub(super) fn is_bulk_device(link: &Link, alias: &str) -> bool {
    link.alias.as_deref() == Some(alias)
        && link.name.strip_prefix(PREFIX).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Creates the TAP device of a descriptor and returns its name.
fn create(file: &File) -> io::Result<String> {
    // SAFETY: an all-zero `ifreq` is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(PREFIX.bytes().chain(*b"%d")) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is a valid `ifreq` throughout the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    Ok(name.map(|byte| *byte as u8 as char).collect())
}

/// Turns on segmentation and partial checksums in both directions. Returns true if that includes
/// UDP segmentation.
fn set_offloads(file: &File) -> io::Result<bool> {
    let usual = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    for (offloads, takes_uso) in [(usual | TUN_F_USO, true), (usual, false)] {
        // SAFETY: the argument is a number.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) } >= 0 {
            return Ok(takes_uso);
        }
    }
    Err(io::Error::last_os_error())
}
