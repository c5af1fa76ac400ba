//! The bulk path's side of the kernel: the devices of its workers, and the maps by which programs
//! and workers know of each other.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow};
use overnode_ebpf::map::{
    BULK_WORKER_SLOTS, BulkInbox, BulkPeer, BulkWorker, INBOX_CLOSED, PEER_SLOTS,
};

use super::links::Link;
use super::maps::Slots;
use super::programs::FROM_BULK;
use super::{Datapath, quieten};

/// Names of the devices: the kernel puts a number at the end.
const PREFIX: &str = "ovnb";
/// The largest that a TAP device has.
const MTU: u32 = 65521;

// `linux/if_tun.h`, which libc has in part.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;
/// Several UDP packets at once (Linux 6.2).
const TUN_F_USO: libc::c_ulong = 0x20 | 0x40;

/// The maps `BULK_WORKERS`, `BULK_PEERS` and `BULK_INBOXES`, in memory.
pub struct BulkMaps {
    workers: Slots<BulkWorker>,
    peers: Slots<BulkPeer>,
    inboxes: Slots<BulkInbox>,
}

impl BulkMaps {
    /// Maps all three into memory.
    ///
    /// # Errors
    /// These are not the maps.
    pub fn open(
        workers: BorrowedFd<'_>,
        peers: BorrowedFd<'_>,
        inboxes: BorrowedFd<'_>,
    ) -> Result<Self> {
        Ok(Self {
            workers: Slots::map(workers, BULK_WORKER_SLOTS)?,
            peers: Slots::map(peers, PEER_SLOTS)?,
            inboxes: Slots::map(inboxes, BULK_WORKER_SLOTS)?,
        })
    }

    /// Lets the programs hand packets to a worker.
    pub fn set_worker(&self, worker: u32, ifindex: u32, now_ns: u64) {
        if let Some(cell) = self.workers.at(worker) {
            cell.alive_ns().store(now_ns, Ordering::Relaxed);
            cell.ifindex().store(ifindex, Ordering::Release);
        }
    }

    /// A worker lives.
    pub fn alive(&self, worker: u32, now_ns: u64) {
        if let Some(cell) = self.workers.at(worker) {
            cell.alive_ns().store(now_ns, Ordering::Relaxed);
        }
    }

    /// A worker gets nothing more, if this is still its device.
    pub fn clear_worker(&self, worker: u32, ifindex: u32) {
        if let Some(cell) = self.workers.at(worker) {
            let _ =
                cell.ifindex().compare_exchange(ifindex, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Over how many workers the bulk flows of a peer are spread; 0: they stay with the programs.
    pub fn serve(&self, peer: u32, workers: u32) {
        if let Some(cell) = self.peers.at(peer) {
            cell.workers().store(workers, Ordering::Release);
        }
    }

    /// Nobody is served, and there are no workers.
    pub fn clear(&self) {
        for peer in 0..self.peers.len() {
            self.serve(peer, 0);
        }
        for worker in 0..self.workers.len() {
            if let Some(cell) = self.workers.at(worker) {
                cell.ifindex().store(0, Ordering::Release);
            }
        }
        for inbox in 0..self.inboxes.len() {
            if let Some(cell) = self.inboxes.at(inbox) {
                cell.state().store(INBOX_CLOSED, Ordering::Release);
            }
        }
    }
}

/// A worker's device.
#[derive(Debug)]
pub struct BulkDevice {
    /// What the worker reads and writes; the device lives as long as one copy of it.
    pub file: File,
    /// Interface index.
    pub ifindex: u32,
    /// Whether it takes several UDP packets at once.
    pub takes_uso: bool,
}

impl Datapath {
    /// The maps of the bulk path, for the process of the workers.
    pub fn bulk_maps(&self) -> &BulkMaps {
        &self.maps.bulk
    }

    /// Descriptors of `BULK_WORKERS`, `BULK_PEERS`, `BULK_INBOXES` and `BULK_MESSAGES`.
    pub fn bulk_map_fds(&self) -> [BorrowedFd<'_>; 4] {
        self.maps.bulk_fds.each_ref().map(OwnedFd::as_fd)
    }

    /// Makes a device for a worker: packets of containers come out of it, and what is written to it
    /// is delivered.
    ///
    /// # Errors
    /// The kernel has no TUN/TAP devices, or refuses.
    pub async fn bulk_device(&mut self) -> Result<BulkDevice> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .context("/dev/net/tun cannot be opened (CONFIG_TUN)")?;
        let name = create(&file).context("a TAP device cannot be made")?;
        let takes_uso = set_offloads(&file).context("a TAP device has no segmentation offload")?;
        let link =
            self.netlink.link_named(&name).await?.ok_or_else(|| anyhow!("{name} vanished"))?;
        self.netlink.mark(link.index, &self.alias).await?;
        quieten(&name);
        self.netlink.set_mtu(link.index, MTU).await?;
        self.programs.attach(FROM_BULK, &link, &self.pins)?;
        self.netlink.set_up(link.index).await?;
        self.bulk_devices.insert(link.index);
        Ok(BulkDevice { file, ifindex: link.index, takes_uso })
    }

    /// Takes over the device of a worker that an earlier daemon started: its program is replaced in
    /// place.
    ///
    /// # Errors
    /// There is no such device, or the kernel refuses.
    pub async fn adopt_bulk_device(&mut self, ifindex: u32) -> Result<()> {
        let link = self
            .netlink
            .link(ifindex)
            .await?
            .ok_or_else(|| anyhow!("interface {ifindex} is gone"))?;
        self.programs.attach(FROM_BULK, &link, &self.pins)?;
        self.bulk_devices.insert(ifindex);
        Ok(())
    }

    /// Removes devices of workers that nobody has taken over. True if there were any.
    ///
    /// # Errors
    /// Interfaces cannot be listed or removed.
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

    /// Devices of workers that are gone are nobody's any more.
    pub fn forget_bulk_devices(&mut self, devices: &[u32]) {
        self.bulk_devices.retain(|ifindex| !devices.contains(ifindex));
    }
}

/// True for the devices of this node's workers. One without an alias ends with the daemon that was
/// about to mark it.
pub(super) fn is_bulk_device(link: &Link, alias: &str) -> bool {
    link.alias.as_deref() == Some(alias)
        && link.name.strip_prefix(PREFIX).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Makes the TAP device of a descriptor, and tells its name.
fn create(file: &File) -> io::Result<String> {
    // SAFETY: all zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(PREFIX.bytes().chain(*b"%d")) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is a valid `ifreq` as long as the call lasts.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    Ok(name.map(|byte| *byte as u8 as char).collect())
}

/// Whole segments and unfinished checksums, both ways. True if UDP has them, too.
fn set_offloads(file: &File) -> io::Result<bool> {
    let usual = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    for (offloads, takes_uso) in [(usual | TUN_F_USO, true), (usual, false)] {
        // SAFETY: takes a number.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, offloads) } >= 0 {
            return Ok(takes_uso);
        }
    }
    Err(io::Error::last_os_error())
}
