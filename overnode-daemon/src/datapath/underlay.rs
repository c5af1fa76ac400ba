//! Tracks the underlay: the route to each peer, and the interfaces on which messages arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, bail, ensure};
use overnode_ebpf::map::LOCAL_ADDRESS_SLOTS;
use overnode_ebpf::wire::{OVERHEAD_IPV4, OVERHEAD_IPV6, TAG_LEN, keepalive_frame};
use serde::Serialize;
use tracing::{debug, info, warn};

use super::Datapath;
use super::address::from_map;
use super::bpffs::Pin;
use super::interfaces::Link;
use super::programs::{FROM_UNDERLAY, FROM_UNDERLAY_XDP, Hook};
use overnode_types::{InterfaceIndex, PeerIndex};

/// Smallest assumed underlay MTU, in bytes: what every IPv4 host must accept (RFC 1122, section
/// 3.3.2).
///
/// Containers get the remainder even where it is less than IPv6 requires. Linux ignores path MTUs
/// below 552 bytes (`net.ipv4.route.min_pmtu`), no matter how often they are reported.
const MIN_UNDERLAY_MTU: u32 = 576;
/// Assumed MTU of an unknown interface, in bytes.
const DEFAULT_MTU: u32 = 1500;

/// Status of the underlay, as shown to the operator.
#[derive(Clone, Debug, Serialize)]
pub struct UnderlayStatus {
    /// Interfaces on which messages are received.
    pub interfaces: Vec<UnderlayInterface>,
    /// How TC programs are attached.
    pub hook: Hook,
    /// MTU of containers that are attached from now on, in bytes.
    pub container_mtu: u32,
    /// Addresses of the host that other hosts can reach.
    pub addresses: Vec<IpAddr>,
    /// Problems of the underlay, as text for the operator.
    pub problems: Vec<String>,
}

/// An interface on which messages are received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnderlayInterface {
    /// Interface index.
    pub ifindex: InterfaceIndex,
    /// Interface name.
    pub name: String,
    /// MTU, in bytes.
    pub mtu: u32,
    /// True if messages are opened in native XDP mode there.
    pub xdp: bool,
}

/// Current state of the underlay.
#[derive(Debug, Default)]
pub(super) struct Underlay {
    pub(super) interfaces: BTreeMap<InterfaceIndex, UnderlayInterface>,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Interfaces that lead to peers but cannot be used, with the reason.
    problems: BTreeMap<InterfaceIndex, String>,
    /// Interfaces that were tried since the last lookup of the routes to all peers.
    tried: BTreeSet<InterfaceIndex>,
    /// Index of the interface that `--interface` names, otherwise that of the default route's
    /// interface.
    pub(super) main: Option<InterfaceIndex>,
    /// MTU of [`Self::main`], in bytes.
    pub(super) main_mtu: Option<u32>,
}

impl Datapath {
    /// Returns the status of the underlay.
    pub fn underlay(&self) -> UnderlayStatus {
        UnderlayStatus {
            interfaces: self.underlay.interfaces.values().cloned().collect(),
            hook: self.programs.hook(),
            container_mtu: self.container_mtu(),
            addresses: self.underlay.addresses.iter().copied().filter(is_reachable).collect(),
            problems: self.underlay.problems.values().cloned().collect(),
        }
    }

    /// Returns the MTU of containers that are attached from now on, in bytes: the configured one,
    /// otherwise the space that the narrowest underlay interface leaves with IPv6 outer headers.
    pub fn container_mtu(&self) -> u32 {
        if let Some(mtu) = self.mtu {
            return mtu;
        }
        let interfaces = self.underlay.interfaces.values().map(|interface| interface.mtu);
        let narrowest = interfaces.chain(self.underlay.main_mtu).min().unwrap_or(DEFAULT_MTU);
        largest_inner(narrowest.max(MIN_UNDERLAY_MTU), true)
    }

    /// Receives messages on an interface from now on. Idempotent.
    ///
    /// # Errors
    /// Fails if `--interface` names another interface, if this one is not Ethernet or is gone, or
    /// if the kernel refuses.
    pub async fn ensure_underlay(&mut self, ifindex: InterfaceIndex) -> Result<()> {
        if self.underlay.interfaces.contains_key(&ifindex) {
            return Ok(());
        }
        let link = self
            .netlink
            .link(ifindex)
            .await?
            .with_context(|| format!("there is no interface {ifindex}"))?;
        self.watch_interface(&link)
    }

    pub(super) fn watch_interface(&mut self, link: &Link) -> Result<()> {
        if let Some(only) = &self.interface {
            ensure!(
                *only == link.name,
                "packets arrive or leave through {}, but only {only} may be used: launch with \
                 `--interface {}` or change the routes",
                link.name,
                link.name
            );
        }
        ensure!(
            link.has_ethernet,
            "{} carries no Ethernet frames: overnode needs an Ethernet underlay",
            link.name
        );
        self.programs.attach(FROM_UNDERLAY, link, &self.pins)?;
        let xdp = Pin::Link { ifindex: link.index, program: FROM_UNDERLAY_XDP.into() };
        if self.xdp && !link.is_loopback {
            self.programs.attach_xdp(link, &self.pins)?;
        } else {
            self.pins
                .remove(&xdp)
                .context("the XDP program of an earlier launch cannot be removed")?;
        }
        info!(interface = link.name, "receiving messages on this interface");
        let known = UnderlayInterface {
            ifindex: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            xdp: self.xdp && !link.is_loopback,
        };
        self.underlay.interfaces.insert(link.index, known);
        Ok(())
    }

    /// Returns false for interfaces that `--interface` excludes. Makes no system call, because it
    /// runs for every received datagram, even during a flood.
    pub fn may_receive_on(&self, ifindex: InterfaceIndex) -> bool {
        self.interface.is_none() || self.underlay.main == Some(ifindex)
    }

    /// Receives messages on an interface, like [`Self::ensure_underlay`]. An interface that cannot
    /// be used is reported in [`Self::underlay`] and does not prevent other peers from being
    /// configured.
    pub async fn try_underlay(&mut self, ifindex: InterfaceIndex) {
        self.underlay.tried.insert(ifindex);
        let Err(error) = self.ensure_underlay(ifindex).await else {
            self.underlay.problems.remove(&ifindex);
            return;
        };
        let problem = format!("{error:#}");
        if self.underlay.problems.get(&ifindex) != Some(&problem) {
            warn!("{problem}");
            self.underlay.problems.insert(ifindex, problem);
        }
    }

    /// Adapts to changes of the host's addresses, routes and interfaces. Call it after
    /// [`super::LinkEvent::AddressesChanged`] and [`super::LinkEvent::RoutesChanged`].
    ///
    /// # Errors
    /// Fails if netlink or a map refuses. Changes made up to then stay.
    pub async fn refresh(&mut self) -> Result<()> {
        self.refresh_host().await?;
        self.underlay.tried.clear();
        let mut result = Ok(());
        for peer in self.peers()? {
            if let Some(endpoint) = peer.endpoint {
                // A failure must not stop the lookup for the remaining peers.
                result = result.and(self.find_path(peer.index, endpoint, false).await);
            }
        }
        // The other interfaces no longer lead to any peer.
        let tried = &self.underlay.tried;
        self.underlay.problems.retain(|ifindex, _| tried.contains(ifindex));
        result
    }

    /// Refreshes addresses and interfaces, but not the routes to peers.
    pub(super) async fn refresh_host(&mut self) -> Result<()> {
        // A host with more addresses than the map holds (a load balancer, for example) must still
        // start. The lowest addresses are kept.
        let addresses: BTreeSet<IpAddr> = self
            .netlink
            .addresses()
            .await?
            .into_iter()
            .map(|(address, _)| address)
            // Packets for the host's address in the container network come through the tunnel, not
            // the underlay.
            .filter(|address| !address.is_loopback() && !self.routes.is_host_address(*address))
            .take(LOCAL_ADDRESS_SLOTS as usize)
            .collect();
        self.maps.set_local_addresses(&addresses.iter().copied().collect::<Vec<_>>())?;
        self.underlay.addresses = addresses;
        let links = self.netlink.links().await?;
        let is_there = |ifindex: &InterfaceIndex| links.iter().any(|link| link.index == *ifindex);
        self.underlay.interfaces.retain(|ifindex, _| is_there(ifindex));
        self.underlay.problems.retain(|ifindex, _| is_there(ifindex));
        for link in &links {
            if let Some(known) = self.underlay.interfaces.get_mut(&link.index) {
                known.mtu = link.mtu;
                known.name.clone_from(&link.name);
            }
        }
        let main = match &self.interface {
            Some(name) => links.iter().find(|link| link.name == *name).map(|link| link.index),
            None => self.netlink.default_interface().await,
        };
        self.underlay.main = main;
        self.underlay.main_mtu =
            links.iter().find(|link| Some(link.index) == main).map(|link| link.mtu);
        Ok(())
    }

    pub(super) async fn set_endpoint(
        &mut self,
        peer: PeerIndex,
        endpoint: SocketAddr,
    ) -> Result<()> {
        let present = self.peer_cell(peer)?.read();
        let moved = from_map(present.remote) != endpoint.ip()
            || u16::from_be(present.remote_port_be) != endpoint.port();
        self.find_path(peer, endpoint, moved).await
    }

    /// Looks up the route to a peer and writes it to the map. Unless the peer `moved`, the source
    /// address that the program learned is kept, provided that it is still an address of the host
    /// and the interface is unchanged.
    async fn find_path(
        &mut self,
        peer: PeerIndex,
        endpoint: SocketAddr,
        moved: bool,
    ) -> Result<()> {
        let only = match &self.interface {
            Some(name) => match self.netlink.link_named(name).await? {
                Some(link) => Some(link.index),
                None => bail!("there is no interface {name}: correct `--interface`"),
            },
            None => None,
        };
        let route = self.netlink.route(endpoint.ip(), only).await?;
        let present = self.peer_cell(peer)?.read();
        let Some(route) = route else {
            debug!(%peer, "there is no route to the peer's endpoint");
            let cell = self.peer_cell(peer)?;
            if moved {
                cell.set_path(endpoint.ip(), endpoint.port(), None, None);
            } else {
                cell.set_source(None, None);
            }
            return Ok(());
        };
        self.try_underlay(route.ifindex).await;
        let link_mtu = self
            .underlay
            .interfaces
            .get(&route.ifindex)
            .map_or(DEFAULT_MTU, |interface| interface.mtu);
        let path_mtu = route.mtu.filter(|mtu| *mtu != 0).map_or(link_mtu, |mtu| mtu.min(link_mtu));
        let mtu = largest_inner(path_mtu, endpoint.is_ipv6()).min(self.container_mtu());
        let cell = self.peer_cell(peer)?;
        if moved {
            cell.set_path(endpoint.ip(), endpoint.port(), route.source, Some(route.ifindex));
        } else if present.ifindex != route.ifindex.get()
            || !self.underlay.addresses.contains(&from_map(present.local))
        {
            cell.set_source(route.source, Some(route.ifindex));
            if cell.tx_slot().load(Ordering::Relaxed) != 0 {
                // The peer sends to the last source address it heard from, so it must hear the new
                // one before it sends again.
                self.offload_veth.send(&keepalive_frame(peer.0))?;
            }
        }
        if self.largest.insert(peer, mtu) != Some(mtu) {
            self.set_mtu(peer, mtu)?;
        }
        Ok(())
    }
}

fn is_reachable(address: &IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !is_link_local
}

/// Returns the largest inner packet, counted from its IP header, that fits outer packets of
/// `path_mtu` bytes. Padding never exceeds this size, so the result is not rounded down.
const fn largest_inner(path_mtu: u32, ipv6: bool) -> u32 {
    let overhead = if ipv6 { OVERHEAD_IPV6 } else { OVERHEAD_IPV4 } + TAG_LEN;
    path_mtu.saturating_sub(overhead as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_underlay_mtu_of_1500_leaves_the_mtu_of_wireguard() {
        assert_eq!(largest_inner(1500, true), 1420);
        assert_eq!(largest_inner(1500, false), 1440);
        assert_eq!(largest_inner(9000, false), 8940);
        assert_eq!(largest_inner(20, false), 0);
    }
}
