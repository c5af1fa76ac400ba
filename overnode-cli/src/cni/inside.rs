//! Lists the interfaces of a container's network namespace, from a thread that has entered it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// An interface, with one of its addresses if it has any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// Name.
    pub name: String,
    /// IPv4 address. An interface with several addresses is listed once for each.
    pub address: Option<IpAddr>,
    /// Whether the interface is up (`IFF_UP`).
    pub is_up: bool,
}

/// Returns the interfaces of a network namespace, or `None` if there is no such namespace.
///
/// # Errors
/// Fails if the namespace cannot be entered or its interfaces cannot be listed.
pub(super) fn interfaces(netns: &str) -> Result<Option<Vec<Interface>>, String> {
    // Opening a pipe of that name would otherwise block forever.
    let Ok(file) = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(netns)
    else {
        return Ok(None);
    };
    // An ordinary file remains at the path of a deleted namespace.
    if !fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC) {
        return Ok(None);
    }
    let look = move || {
        setns(&file, CloneFlags::CLONE_NEWNET)
            .map_err(|error| format!("the network namespace cannot be entered: {error}"))?;
        let found = getifaddrs().map_err(|error| {
            format!("the interfaces of the network namespace cannot be listed: {error}")
        })?;
        Ok(found
            .map(|it| {
                let address =
                    it.address.and_then(|address| address.as_sockaddr_in().map(|v4| v4.ip()));
                Interface {
                    name: it.interface_name,
                    address: address.map(|v4: Ipv4Addr| IpAddr::V4(v4)),
                    is_up: it.flags.contains(InterfaceFlags::IFF_UP),
                }
            })
            .collect())
    };
    match std::thread::spawn(look).join() {
        Ok(found) => found.map(Some),
        Err(_) => Err("the thread in the network namespace panicked".into()),
    }
}
