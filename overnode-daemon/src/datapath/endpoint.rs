//! Attaches containers through veth pairs. The container-side end is created inside the container's
//! network namespace, or in the host's namespace for a container engine to move.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use overnode_ebpf::map::Endpoint;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::address::to_map;
use super::bpffs::Pin;
use super::bulk::is_bulk_device;
use super::interfaces::{End, Link, Netlink};
use super::netns::{self, NetnsId, NetnsRef};
use super::programs::{FROM_CONTAINER, TO_CONTAINER, detach_filter};
use super::{Datapath, is_mac_of, isolate_interface, mac_of, offload};
use crate::failpoint;
use overnode_core::attachment::{host_interface, waiting_interface};
use overnode_types::{InterfaceIndex, MacAddr};

pub use overnode_api::CONTAINER_INTERFACE;

/// Where the container-side end goes, and who configures it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndPlacement {
    /// The end is created inside this network namespace, gets its address there, and is set up.
    Inside {
        /// Network namespace of the container.
        netns: NetnsRef,
        /// Name of the interface in that namespace.
        interface: String,
    },
    /// The end stays in the host's namespace, gets its address there, and is set up. The host
    /// itself then has an address in the container network.
    Host,
    /// The end waits in the host's namespace, down and without an address, under the name
    /// [`waiting_interface`]. A container engine moves, renames and configures it.
    Waiting,
}

/// A request to attach a container or the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Where the container-side end goes.
    pub place: EndPlacement,
    /// Overlay address. Its prefix length is that of the subnet.
    pub address: IpAddr,
    /// MAC address. `None` picks a random one.
    pub mac: Option<MacAddr>,
    /// Name of the host-side end: `ov` and 8 hex digits, see [`host_interface`].
    pub host_interface: String,
}

impl Attachment {
    /// Returns the default attachment: [`CONTAINER_INTERFACE`] inside `netns`, with a random MAC
    /// address.
    pub fn inside(netns: NetnsRef, address: IpAddr) -> Self {
        Self {
            place: EndPlacement::Inside { netns, interface: CONTAINER_INTERFACE.to_owned() },
            address,
            mac: None,
            host_interface: host_interface(address),
        }
    }

    /// Returns an attachment of the host itself.
    pub fn host(address: IpAddr) -> Self {
        Self {
            place: EndPlacement::Host,
            address,
            mac: None,
            host_interface: host_interface(address),
        }
    }
}

/// Result of a successful attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Interface index of the host-side end.
    pub ifindex: InterfaceIndex,
    /// MAC address of the container-side end.
    pub mac: MacAddr,
    /// MAC address of the host-side end, which ARP replies carry.
    pub gateway_mac: MacAddr,
    /// Name of the host-side end.
    pub host_interface: String,
    /// Network namespace of the container. `None` for the host, and while the end waits for a
    /// container engine.
    pub netns: Option<NetnsId>,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
}

/// Returns a random MAC address that is locally administered and unicast.
pub fn random_mac() -> MacAddr {
    let mut octets: [u8; 6] = rand::rng().random();
    octets[0] = octets[0] & 0xfc | 2;
    MacAddr::new(octets)
}

/// Returns true for names that [`host_interface`] returns.
pub(super) fn is_host_interface(name: &str) -> bool {
    name.strip_prefix("ov").is_some_and(|digits| {
        digits.len() == 8 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Deletes the veth pair for an address on a node whose daemon is not running. The daemon releases
/// the address when it runs again. Returns false if there is no such interface.
///
/// # Errors
/// Fails if the kernel refuses.
pub async fn cut(address: IpAddr) -> Result<bool> {
    let netlink = Netlink::open()?;
    match netlink.link_named(&host_interface(address)).await? {
        Some(link) if link.is_veth => netlink.delete(link.index).await.map(|()| true),
        Some(_) | None => Ok(false),
    }
}

impl Datapath {
    /// Attaches a container or the host. On failure nothing is left behind.
    ///
    /// # Errors
    /// Fails if the namespace cannot be opened, is the host's own, or already has an interface of
    /// that name; if the address is outside the subnet or already attached; if the MAC address is a
    /// multicast address or zero; if the host has another route into the subnet; or if the kernel
    /// refuses.
    pub async fn attach(&mut self, attachment: &Attachment) -> Result<Attached> {
        let Attachment { place, address, mac, host_interface } = attachment;
        ensure!(
            is_host_interface(host_interface),
            "{host_interface:?} is not a valid name for the host-side interface of a container"
        );
        ensure!(
            self.network.subnet.contains(address),
            "{address} is outside the container network {}",
            self.network.subnet
        );
        ensure!(
            !self.routes.local().contains_key(&IpNet::from(*address)),
            "{address} is already attached"
        );
        ensure!(
            mac.is_none_or(MacAddr::is_assignable),
            "this MAC address cannot be the address of an interface"
        );
        let inside = match place {
            EndPlacement::Inside { netns, interface } => {
                let (namespace, id) = netns.open()?;
                ensure!(
                    id != NetnsId::current()?,
                    "{netns} is the host's own network namespace: name a container's, or use \
                     `overnode expose`"
                );
                Some(Inside { namespace, id, interface })
            }
            EndPlacement::Host => {
                self.refuse_other_routes().await?;
                None
            }
            EndPlacement::Waiting => None,
        };
        ensure!(
            self.netlink.link_named(host_interface).await?.is_none(),
            "an interface named {host_interface} already exists"
        );
        match self.plug(attachment, inside).await {
            Ok(attached) => Ok(attached),
            Err(error) => {
                if let Err(left) = self.detach(host_interface).await {
                    warn!(
                        %left,
                        host_interface,
                        "the remains of a failed attach cannot be removed yet"
                    );
                }
                Err(match place {
                    EndPlacement::Inside { netns, .. } => {
                        error.context(format!("{netns} cannot be attached"))
                    }
                    EndPlacement::Host | EndPlacement::Waiting => {
                        error.context(format!("{address} cannot be attached"))
                    }
                })
            }
        }
    }

    /// Refuses to attach the host if it has another route into the subnet. Such an attachment would
    /// cut the host off either from some containers or from destinations that it reached before,
    /// which may include other nodes.
    async fn refuse_other_routes(&self) -> Result<()> {
        let subnet = self.network.subnet;
        match self.netlink.route_into(subnet).await? {
            None => Ok(()),
            Some((prefix, interface)) => bail!(
                "the host reaches {prefix} through {interface}, which overlaps the container \
                 network {subnet}: remove that route, or launch all nodes with another --subnet"
            ),
        }
    }

    async fn plug(
        &mut self,
        attachment: &Attachment,
        inside: Option<Inside<'_>>,
    ) -> Result<Attached> {
        let Attachment { address, host_interface, .. } = attachment;
        let mtu = self.container_mtu();
        let gateway_mac = mac_of(&self.node, rand::rng().random());
        let mac = attachment.mac.unwrap_or_else(random_mac);
        let waiting = waiting_interface(*address);
        let is_host = attachment.place == EndPlacement::Host;
        let (name, netns) = match &inside {
            Some(Inside { interface, id, .. }) => (*interface, Some(*id)),
            None if is_host => (CONTAINER_INTERFACE, None),
            None => (waiting.as_str(), None),
        };
        let namespace = inside.as_ref().map(|inside| inside.namespace.as_raw_fd());
        let near = End { name: host_interface, mac: gateway_mac, mtu, namespace: None };
        let far = End { name, mac, mtu, namespace };
        self.netlink.create_veth(&near, &far).await?;
        failpoint::reached("veth");
        let host = self
            .netlink
            .link_named(host_interface)
            .await?
            .context("the new interface has disappeared")?;
        self.endpoints.insert(host_interface.clone(), host.index);
        self.netlink.mark(host.index, &self.alias).await?;
        isolate_interface(host_interface);
        offload::disable_tcp_segmentation(host_interface)?;
        failpoint::reached("veth marked");
        self.programs.attach(FROM_CONTAINER, &host, &self.pins)?;
        failpoint::reached("from_container");
        self.programs.attach(TO_CONTAINER, &host, &self.pins)?;
        failpoint::reached("to_container");
        let entry = Endpoint {
            address: to_map(*address),
            mac: mac.octets(),
            gateway_mac: gateway_mac.octets(),
        };
        self.maps.set_endpoint(host.index, entry)?;
        let (address, prefix) = (*address, self.network.subnet.prefix_len());
        failpoint::reached("endpoint");
        match inside {
            Some(Inside { namespace, interface, .. }) => {
                let interface = interface.to_owned();
                let set_up = async move || {
                    let netlink = Netlink::open()?;
                    let loopback = netlink
                        .link_named("lo")
                        .await?
                        .context("the container has no interface named lo")?;
                    netlink.set_up(loopback.index).await?;
                    configure(&netlink, &interface, address, prefix).await
                };
                netns::inside(namespace, set_up).await?;
            }
            None if is_host => {
                isolate_interface(CONTAINER_INTERFACE);
                configure(&self.netlink, CONTAINER_INTERFACE, address, prefix).await?;
            }
            None => {
                isolate_interface(&waiting);
                // The device keeps this setting when it moves.
                offload::enable_gro(&waiting)?;
            }
        }
        failpoint::reached("container configured");
        self.routes.set_local(IpNet::from(address), host.index, is_host);
        self.sync_routes()?;
        failpoint::reached("route");
        self.netlink.set_up(host.index).await?;
        Ok(Attached {
            ifindex: host.index,
            mac,
            gateway_mac,
            host_interface: host_interface.clone(),
            netns,
            mtu,
        })
    }

    /// Detaches a container and removes its interfaces, routes and programs. Detaching one that is
    /// already gone succeeds.
    ///
    /// # Errors
    /// Fails if the interface belongs to another owner, or if the kernel refuses. Everything that
    /// can be removed is removed.
    pub async fn detach(&mut self, host_interface: &str) -> Result<()> {
        let link = self.netlink.link_named(host_interface).await?;
        if let Some(link) = &link {
            ensure!(
                self.is_ours(link),
                "the interface {host_interface} was not created by this node: it is not removed"
            );
            self.netlink.delete(link.index).await?;
            failpoint::reached("veth deleted");
        }
        let known = self.endpoints.remove(host_interface);
        match known.or(link.map(|link| link.index)) {
            Some(ifindex) => self.forget_endpoint(ifindex),
            None => Ok(()),
        }
    }

    /// Removes the map entries and pins of a host-side end that is gone.
    pub(super) fn forget_endpoint(&mut self, ifindex: InterfaceIndex) -> Result<()> {
        self.routes.remove_local(ifindex);
        let routes = self.sync_routes();
        let endpoint = self.maps.remove_endpoint(ifindex);
        failpoint::reached("endpoint forgotten");
        for program in [FROM_CONTAINER, TO_CONTAINER] {
            self.pins.remove(&Pin::Link { ifindex, program: program.into() })?;
            self.pins.remove(&Pin::Filter { ifindex, program: program.into() })?;
        }
        self.pins.remove(&Pin::Qdisc { ifindex })?;
        routes.and(endpoint)
    }

    /// Returns true for host-side ends, offload veth ends and worker devices that this node
    /// created.
    pub(super) fn is_ours(&self, link: &Link) -> bool {
        is_ours(link, &self.alias, &self.node)
    }
}

/// Returns true for interfaces that this node created. The alias decides. If a daemon was killed
/// before it could set the alias, the name and MAC address decide, which are set from creation on.
pub(super) fn is_ours(link: &Link, alias: &str, node: &str) -> bool {
    if is_bulk_device(link, alias) {
        return true;
    }
    let is_named_so = is_host_interface(&link.name)
        || link.name == super::offload_veth::FIRST
        || link.name == super::offload_veth::SECOND;
    match &link.alias {
        Some(found) => found == alias && is_named_so && link.is_veth,
        None => is_named_so && link.is_veth && link.mac.is_some_and(|mac| is_mac_of(node, mac)),
    }
}

/// An opened namespace, and the name of the interface in it.
struct Inside<'a> {
    namespace: File,
    id: NetnsId,
    interface: &'a str,
}

/// Configures the container-side end. `netlink` must belong to the namespace of that end.
async fn configure(netlink: &Netlink, interface: &str, address: IpAddr, prefix: u8) -> Result<()> {
    let link =
        netlink.link_named(interface).await?.with_context(|| format!("there is no {interface}"))?;
    offload::enable_gro(interface)?;
    netlink.add_address(link.index, address, prefix).await?;
    netlink.set_up(link.index).await
}

/// Detaches all programs and filters of an interface that stays.
pub(super) fn detach_all(link: &Link, pins: &super::bpffs::Pins) -> Vec<anyhow::Error> {
    let mut errors = Vec::new();
    for pin in pins.list().into_iter().filter(|pin| pin.ifindex() == link.index) {
        let removed = match &pin {
            Pin::Filter { program, .. } => detach_filter(program, link, pins),
            Pin::Link { .. } => pins.remove(&pin).map_err(Into::into),
            Pin::Qdisc { .. } => Ok(()),
        };
        errors.extend(removed.err());
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_host_side_interfaces_are_recognized() {
        let name = host_interface("10.40.0.1".parse().unwrap());
        assert_eq!(name, "ov0a280001");
        assert!(is_host_interface(&name));
        assert!(is_host_interface(&host_interface("fd00::1".parse().unwrap())));
        let waiting = waiting_interface("10.40.0.1".parse().unwrap());
        assert_eq!(waiting, "ovc0a280001");
        for other in
            ["ov", "ovn0", &waiting, "ov1234567", "ov123456789", "ov1234567G", "eth0", "ov1234567A"]
        {
            assert!(!is_host_interface(other), "{other}");
        }
    }
}
