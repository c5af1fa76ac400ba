//! Manages the offload veth, a veth pair that segments and checksums packets before they are
//! sealed. All transmit offloads of its first end are off, so the kernel segments and checksums
//! every packet that is redirected to it. The program `seal` is attached to the ingress of the
//! second end.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, anyhow, ensure};
use overnode_ebpf::wire::ETHERTYPE_IPV4;

use super::interfaces::{End, Link, Netlink};
use super::{is_mac_of, isolate_interface, mac_of, offload};

/// First end. Programs redirect packets for other hosts to it.
pub(super) const FIRST: &str = "ovn0";
/// Second end, where those packets come out.
pub(super) const SECOND: &str = "ovn1";
/// MTU of both ends, in bytes. It exceeds that of any container and leaves room for the outer
/// headers, because the kernel helper that adds them checks the MTU.
const MTU: u32 = 65535;

#[derive(Debug)]
pub(super) struct OffloadVeth {
    pub(super) first: Link,
    pub(super) second: Link,
    /// Packet socket for frames that the daemon passes to `seal`.
    socket: OwnedFd,
}

impl OffloadVeth {
    /// Creates the pair, or takes over an existing one.
    pub(super) async fn ensure(netlink: &Netlink, alias: &str, node: &str) -> Result<Self> {
        let found = [netlink.link_named(FIRST).await?, netlink.link_named(SECOND).await?];
        for link in found.iter().flatten() {
            // A daemon that is killed between creating the pair and setting the alias leaves a pair
            // that only its MAC address identifies as ours.
            let is_ours = match &link.alias {
                Some(found) => found == alias,
                None => link.mac.is_some_and(|mac| is_mac_of(node, mac)),
            };
            ensure!(
                is_ours,
                "an interface {} that this node did not create already exists ({}): one network \
                 namespace holds one node",
                link.name,
                link.alias.as_deref().unwrap_or("no alias")
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
            let link =
                netlink.link_named(name).await?.ok_or_else(|| anyhow!("{name} has disappeared"))?;
            netlink.mark(link.index, alias).await?;
            isolate_interface(name);
            if link.mtu != MTU {
                netlink.set_mtu(link.index, MTU).await?;
            }
            ends.push(link);
        }
        offload::disable_transmit_offloads(FIRST)?;
        let (Some(second), Some(first)) = (ends.pop(), ends.pop()) else {
            unreachable!("both ends were pushed")
        };
        Ok(Self { socket: packet_socket()?, first, second })
    }

    /// Sets both ends up. Call it after `seal` is attached.
    pub(super) async fn set_up(&self, netlink: &Netlink) -> Result<()> {
        for link in [&self.first, &self.second] {
            netlink.set_up(link.index).await?;
        }
        ensure!(
            offload::transmit_offloads_are_off(FIRST)?,
            "offloads of {FIRST} were turned on again: something else on this host changes them"
        );
        Ok(())
    }

    /// Sends a frame that begins with a [`overnode_ebpf::wire::daemon_header`].
    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: an all-zero `sockaddr_ll` is valid.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = ETHERTYPE_IPV4.to_be();
        to.sll_ifindex = self.first.index.get().try_into()?;
        // SAFETY: both pointers are to locals of the given sizes.
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
    // With protocol 0 the socket receives nothing. SAFETY: this is a plain system call, and the
    // descriptor is owned from here on.
    match unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) } {
        -1 => {
            Err(io::Error::last_os_error()).context("a packet socket cannot be opened: run as root")
        }
        // SAFETY: the descriptor was just opened and has no other owner.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}
