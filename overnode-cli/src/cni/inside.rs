//! What is in a container's network namespace, as seen by a thread that has entered it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// An interface's name, and an address of it if it has any.
pub type Interface = (String, Option<IpAddr>);

/// The interfaces there. None if there is no such namespace.
///
/// # Errors
/// It cannot be entered, or looked into.
pub fn interfaces(netns: &str) -> Result<Option<Vec<Interface>>, String> {
    // A pipe by that name would be waited for, for ever.
    let Ok(file) = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(netns) else {
        return Ok(None);
    };
    // What is left at the path of a namespace that is gone is an ordinary file.
    if !fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC) {
        return Ok(None);
    }
    let look = move || {
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(|error| format!("it cannot be entered: {error}"))?;
        let found = getifaddrs().map_err(|error| format!("its interfaces cannot be listed: {error}"))?;
        Ok(found
            .map(|it| {
                let address = it.address.and_then(|address| address.as_sockaddr_in().map(|v4| v4.ip()));
                (it.interface_name, address.map(|v4: Ipv4Addr| IpAddr::V4(v4)))
            })
            .collect())
    };
    match std::thread::spawn(look).join() {
        Ok(found) => found.map(Some),
        Err(_) => Err("the thread in it panicked".into()),
    }
}
