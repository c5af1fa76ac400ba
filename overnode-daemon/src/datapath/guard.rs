//! Guards containers that have another route out, so that packets for the container network enter
//! it or are rejected.
//!
//! A container engine gives its containers a default route of its own. Without the guard, packets
//! for other containers would take that route and leave the host unencrypted as soon as the
//! container's overlay interface is gone. That happens after `reset --force`, or if the interface
//! is deleted.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::Datapath;
use super::interfaces::Netlink;
use super::netns::{NetnsRef, inside};

impl Datapath {
    /// Adds the guard to a container, if it is not there yet.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or if the kernel refuses.
    pub async fn guard(&self, netns: &NetnsRef) -> Result<()> {
        let (namespace, _) = netns.open()?;
        let subnet = self.network.subnet;
        inside(namespace, move || async move { Netlink::open()?.add_guard(subnet).await }).await
    }

    /// Removes the guard of a container, if it has one.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or if the kernel refuses.
    pub async fn unguard(&self, netns: &NetnsRef) -> Result<()> {
        let (namespace, _) = netns.open()?;
        let subnet = self.network.subnet;
        inside(namespace, move || async move { Netlink::open()?.remove_guard(subnet).await })
            .await
            .with_context(|| format!("the routing rules of {netns} cannot be removed"))
    }
}

/// Returns the subnet's IPv4 network and prefix length. Container networks are always IPv4.
pub(super) fn v4(subnet: IpNet) -> Option<(std::net::Ipv4Addr, u8)> {
    match subnet.network() {
        IpAddr::V4(v4) => Some((v4, subnet.prefix_len())),
        IpAddr::V6(_) => None,
    }
}
