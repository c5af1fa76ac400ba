//! In containers that have another way out: packets for the container network go into it or
//! nowhere.
//!
//! A container engine gives its containers a default route of its own. Without more, packets for
//! other containers would take it, and leave the host unsealed, as soon as the container's
//! interface is gone: after `reset --force`, or when somebody deletes it.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use ipnet::IpNet;

use super::Datapath;
use super::links::Netlink;
use super::netns::{NetnsRef, inside};

impl Datapath {
    /// Adds the guard to a container, if it has none yet.
    ///
    /// # Errors
    /// The namespace cannot be entered; the kernel refuses.
    pub async fn guard(&self, netns: &NetnsRef) -> Result<()> {
        let (namespace, _) = netns.open()?;
        let subnet = self.network.subnet;
        inside(namespace, move || async move { Netlink::open()?.add_guard(subnet).await }).await
    }

    /// Removes the guard of a container, if it has one.
    ///
    /// # Errors
    /// The namespace cannot be entered; the kernel refuses.
    pub async fn unguard(&self, netns: &NetnsRef) -> Result<()> {
        let (namespace, _) = netns.open()?;
        let subnet = self.network.subnet;
        inside(namespace, move || async move { Netlink::open()?.remove_guard(subnet).await })
            .await
            .with_context(|| format!("the routing rules of {netns}"))
    }
}

/// The only family that container networks have.
pub(super) fn v4(subnet: IpNet) -> Option<(std::net::Ipv4Addr, u8)> {
    match subnet.network() {
        IpAddr::V4(v4) => Some((v4, subnet.prefix_len())),
        IpAddr::V6(_) => None,
    }
}
