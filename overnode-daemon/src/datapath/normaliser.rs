//! The normaliser: a veth pair whose first end has every transmit offload off, so that the kernel
//! segments and checksums what is redirected to it; `seal` sits at the ingress of the second end.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, anyhow, ensure};
use overnode_ebpf::wire::ETHERTYPE_IPV4;

use super::links::{End, Link, Netlink};
use super::{mac_of, offload, quieten};

/// Packets for other hosts are redirected to it.
pub(super) const FIRST: &str = "ovn0";
/// They come out of it.
pub(super) const SECOND: &str = "ovn1";
/// Greater than any container's, and room for the outer headers: the helper that makes room checks
/// it.
const MTU: u32 = 65535;

#[derive(Debug)]
pub(super) struct Normaliser {
    pub(super) first: Link,
    pub(super) second: Link,
    /// Packet socket for the frames that the daemon gives to `seal`.
    socket: OwnedFd,
}

impl Normaliser {
    /// Makes the pair, or takes over the one that is there.
    pub(super) async fn ensure(netlink: &Netlink, alias: &str, node: &str) -> Result<Self> {
        let found = [netlink.link_named(FIRST).await?, netlink.link_named(SECOND).await?];
        for link in found.iter().flatten() {
            // Killed between making the pair and marking it, a daemon leaves one that only its
            // address shows as ours.
            let is_ours = match &link.alias {
                Some(found) => found == alias,
                None => link.mac.is_some_and(|mac| mac.starts_with(&mac_of(node, [0; 2])[..4])),
            };
            ensure!(
                is_ours,
                "an interface {} that this node did not make is there already ({}): one network namespace holds one node",
                link.name,
                link.alias.as_deref().unwrap_or("without alias")
            );
        }
        if let [Some(_), None] | [None, Some(_)] = &found {
            for link in found.iter().flatten() {
                netlink.delete(link.index).await?;
            }
        }
        if !matches!(found, [Some(_), Some(_)]) {
            let end = |name, last| End {
                name,
                mac: mac_of(node, [0xff, last]),
                mtu: MTU,
                namespace: None,
            };
            netlink.create_veth(&end(FIRST, 0), &end(SECOND, 1)).await?;
        }
        let mut ends = Vec::new();
        for name in [FIRST, SECOND] {
            let link = netlink.link_named(name).await?.ok_or_else(|| anyhow!("{name} vanished"))?;
            netlink.mark(link.index, alias).await?;
            quieten(name);
            if link.mtu != MTU {
                netlink.set_mtu(link.index, MTU).await?;
            }
            ends.push(link);
        }
        offload::finish_every_packet(FIRST)?;
        let (Some(second), Some(first)) = (ends.pop(), ends.pop()) else {
            unreachable!("two were pushed")
        };
        Ok(Self { socket: packet_socket()?, first, second })
    }

    /// Sets both ends up, when `seal` is attached.
    pub(super) async fn set_up(&self, netlink: &Netlink) -> Result<()> {
        for link in [&self.first, &self.second] {
            netlink.set_up(link.index).await?;
        }
        ensure!(
            offload::finishes_every_packet(FIRST)?,
            "offloads of {FIRST} came back on: something else on this host changes it"
        );
        Ok(())
    }

    /// Sends a frame that begins with a [`overnode_ebpf::wire::daemon_header`].
    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: all zeros are a valid `sockaddr_ll`.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = ETHERTYPE_IPV4.to_be();
        to.sll_ifindex = self.first.index.try_into()?;
        // SAFETY: both pointers are to locals of the sizes given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("nothing can be sent through {FIRST}"));
        }
        Ok(())
    }
}

fn packet_socket() -> Result<OwnedFd> {
    // Protocol 0: it receives nothing. SAFETY: a plain system call; the descriptor is owned from
    // here on.
    match unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) } {
        -1 => {
            Err(io::Error::last_os_error()).context("a packet socket cannot be opened: run as root")
        }
        // SAFETY: just opened, owned by nobody else.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}
