//! Redirects the DNS queries of containers whose engine has a resolver of its own, in the eBPF
//! programs for sockets. The programs are attached to the root control group while there are such
//! containers, so hosts without them pay nothing.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use overnode_ebpf::map::Resolver;
use rustix::fs::{Mode, OFlags, fstat, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::bpffs::netns_cookie;
use super::{Datapath, NetnsRef, boot_now};
use crate::failpoint;
use overnode_types::BootTime;

/// How long queries are redirected after the daemon has last confirmed that its server runs. A
/// daemon that restarts is back by then, and the client repeats its query. If the daemon stays
/// away, containers ask their engine again.
const ALIVE: Duration = Duration::from_secs(15);
/// Inode number of the root control group.
const ROOT_INODE: u64 = 1;

/// Identifies a network namespace (`SO_NETNS_COOKIE`), unique since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetnsCookie(u64);

impl Datapath {
    /// Redirects the queries of a container to the node's DNS server, from now on and until
    /// [`Self::keep_redirected`] omits it.
    ///
    /// # Errors
    /// Fails if the namespace does not exist, or if the programs cannot be attached.
    pub async fn redirect_queries(&mut self, netns: &NetnsRef) -> Result<NetnsCookie> {
        let cookie = netns.run(netns_cookie).await?;
        if !self.redirects {
            let root = cgroup_root()?;
            self.programs.attach_resolver(&root, &self.pins)?;
            self.redirects = true;
            failpoint::reached("resolver");
        }
        self.maps.add_named_netns(cookie)?;
        Ok(NetnsCookie(cookie))
    }

    /// Ends the redirection for all other network namespaces.
    ///
    /// # Errors
    /// Fails if the map or the programs cannot be changed.
    pub fn keep_redirected(&mut self, wanted: &BTreeSet<NetnsCookie>) -> Result<()> {
        let wanted: BTreeSet<u64> = wanted.iter().map(|cookie| cookie.0).collect();
        self.maps.keep_named_netns(&wanted)?;
        if wanted.is_empty() {
            self.programs.detach_resolver(&self.pins)?;
            self.redirects = false;
        }
        Ok(())
    }

    /// Confirms that the node's DNS server runs at this address, or ends all redirections at once
    /// if there is none.
    ///
    /// # Errors
    /// Fails if the map cannot be written.
    pub fn confirm_resolver(&mut self, address: Option<Ipv4Addr>) -> Result<()> {
        let Some(address) = address else { return self.maps.set_resolver(Resolver::default()) };
        let until = (boot_now() + ALIVE).saturating_duration_since(BootTime::NEVER);
        self.maps.set_resolver(Resolver {
            alive_until_ns: u64::try_from(until.as_nanos()).unwrap_or(u64::MAX),
            address: address.octets(),
            unused: 0,
        })
    }
}

/// Opens the root of the control groups, version 2. It need not be mounted anywhere: hosts differ
/// in that, and the daemon may run in a mount namespace of its own.
fn cgroup_root() -> Result<OwnedFd> {
    let open = || {
        let file_system = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(file_system.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(file_system.as_fd(), flags, MountAttrFlags::empty())?;
        // Programs are attached to an open directory, not to a path.
        openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let root = open().context("the control groups, version 2, cannot be opened")?;
    // In a namespace of control groups, the root is another one, and containers are outside it.
    let is_root = fstat(&root).is_ok_and(|found| found.st_ino == ROOT_INODE);
    ensure!(is_root, "the daemon runs in a namespace of control groups: start it outside of one");
    Ok(root)
}
