//! What is in a container's network namespace, as seen by a thread that has entered it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// An interface, with one of its addresses if it has any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// An address; one with several is listed for each.
    pub address: Option<IpAddr>,
    /// Whether it was turned on.
    pub is_up: bool,
}

/// The interfaces there. None if there is no such namespace.
///
/// # Errors
/// It cannot be entered, or looked into.
pub fn interfaces(netns: &str) -> Result<Option<Vec<Interface>>, String> {
    // A pipe by that name would be waited for, for ever.
    let Ok(file) = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(netns)
    else {
        return Ok(None);
    };
    // What is left at the path of a namespace that is gone is an ordinary file.
    if !fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC) {
        return Ok(None);
    }
    let look = move || {
        setns(&file, CloneFlags::CLONE_NEWNET)
            .map_err(|error| format!("it cannot be entered: {error}"))?;
        let found =
            getifaddrs().map_err(|error| format!("its interfaces cannot be listed: {error}"))?;
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
        Err(_) => Err("the thread in it panicked".into()),
    }
}
