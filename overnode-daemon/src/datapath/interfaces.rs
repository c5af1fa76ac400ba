//! Manages interfaces, addresses and routes of one network namespace through rtnetlink: the
//! namespace in which [`Netlink::open`] was called. sysfs is not used, because after
//! `nsenter --net` it would show another namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use anyhow::{Context as _, Result, anyhow};
use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
    LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric};
use netlink_packet_route::rule::{RuleAction, RuleAttribute};
use netlink_packet_route::tc::TcHandle;
use overnode_types::{InterfaceIndex, MacAddr};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder, RuleAddRequest};
use tokio::task::JoinHandle;

use super::guard;

/// Priority of the first of two routing rules. The rule for the main table has priority 32766.
const GUARD: u32 = 32764;

/// A netlink socket of one network namespace.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// Attributes of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: InterfaceIndex,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) mac: Option<MacAddr>,
    pub(super) mtu: u32,
    pub(super) is_up: bool,
    pub(super) is_veth: bool,
    pub(super) is_loopback: bool,
    pub(super) has_ethernet: bool,
}

/// Parameters of one end of a veth pair that is to be created.
#[derive(Clone, Debug)]
pub(super) struct End<'a> {
    pub(super) name: &'a str,
    pub(super) mac: MacAddr,
    pub(super) mtu: u32,
    /// Network namespace to create the end in. `None` means the namespace of the socket.
    pub(super) namespace: Option<RawFd>,
}

/// Result of a route lookup for one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) ifindex: InterfaceIndex,
    pub(super) source: Option<IpAddr>,
    /// MTU in bytes: the route's own limit, or the path MTU learned from ICMP.
    pub(super) mtu: Option<u32>,
}

impl Netlink {
    pub(super) fn open() -> Result<Self> {
        let (mut connection, handle, _) =
            rtnetlink::new_connection().context("a netlink socket cannot be opened")?;
        // Extended acknowledgments add a text to errors. Older kernels lack them.
        let _ = connection.socket_mut().socket_mut().set_ext_ack(true);
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Returns all interfaces, ordered by index.
    pub(super) async fn links(&self) -> Result<Vec<Link>> {
        let messages: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .context("interfaces cannot be listed")?;
        let mut links: Vec<Link> = messages.iter().map(Link::from).collect();
        links.sort_by_key(|link| link.index);
        Ok(links)
    }

    pub(super) async fn link(&self, index: InterfaceIndex) -> Result<Option<Link>> {
        let mut found = Box::pin(self.handle.link().get().match_index(index.get()).execute());
        one_link(found.try_next().await)
            .with_context(|| format!("interface {index} cannot be looked up"))
    }

    pub(super) async fn link_named(&self, name: &str) -> Result<Option<Link>> {
        let mut found = Box::pin(self.handle.link().get().match_name(name).execute());
        one_link(found.try_next().await)
            .with_context(|| format!("interface {name} cannot be looked up"))
    }

    pub(super) async fn create_veth(&self, near: &End<'_>, far: &End<'_>) -> Result<()> {
        let mut message = near.message();
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(far.message()))),
        ]));
        self.handle.link().add(message).execute().await.map_err(|error| match errno(&error) {
            Some(libc::EEXIST) => {
                anyhow!("an interface named {} or {} already exists", near.name, far.name)
            }
            Some(libc::EPERM) => anyhow!("only root can create interfaces: run as root"),
            Some(libc::EOPNOTSUPP) => anyhow!("the kernel has no veth interfaces (CONFIG_VETH)"),
            Some(_) | None => {
                anyhow!(error).context(format!("the veth pair {} cannot be created", near.name))
            }
        })
    }

    /// Sets the alias that marks an interface as ours, and keeps the kernel from giving it an IPv6
    /// address when it goes up.
    pub(super) async fn mark(&self, index: InterfaceIndex, alias: &str) -> Result<()> {
        let alias =
            LinkMessageBuilder::<LinkUnspec>::default().index(index.get()).alias(alias).build();
        self.handle
            .link()
            .set(alias)
            .execute()
            .await
            .context("the alias of an interface cannot be set")?;
        let quiet = LinkMessageBuilder::<LinkUnspec>::default()
            .index(index.get())
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
                AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
            ])]))
            .build();
        match self.handle.link().set(quiet).execute().await {
            // A kernel without IPv6 assigns no such addresses.
            Err(error)
                if !matches!(
                    errno(&error),
                    Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)
                ) =>
            {
                Err(error).context("IPv6 addresses of an interface cannot be turned off")
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    pub(super) async fn set_up(&self, index: InterfaceIndex) -> Result<()> {
        let message = LinkMessageBuilder::<LinkUnspec>::default().index(index.get()).up().build();
        self.handle.link().set(message).execute().await.context("an interface cannot be set up")
    }

    pub(super) async fn set_mtu(&self, index: InterfaceIndex, mtu: u32) -> Result<()> {
        let message =
            LinkMessageBuilder::<LinkUnspec>::default().index(index.get()).mtu(mtu).build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .context("the MTU of an interface cannot be set")
    }

    /// Deletes an interface. Deleting one that is already gone succeeds.
    pub(super) async fn delete(&self, index: InterfaceIndex) -> Result<()> {
        match self.handle.link().del(index.get()).execute().await {
            Err(error) if errno(&error) != Some(libc::ENODEV) => {
                Err(error).with_context(|| format!("interface {index} cannot be deleted"))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    pub(super) async fn add_address(
        &self,
        index: InterfaceIndex,
        address: IpAddr,
        prefix: u8,
    ) -> Result<()> {
        let mut request = self.handle.address().add(index.get(), address, prefix);
        if address.is_ipv6() {
            // The address is unique, so duplicate address detection would only delay its use.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request
            .execute()
            .await
            .with_context(|| format!("the address {address}/{prefix} cannot be set"))
    }

    /// Returns the addresses of all interfaces with the interface index, sorted.
    pub(super) async fn addresses(&self) -> Result<Vec<(IpAddr, InterfaceIndex)>> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .context("addresses cannot be listed")?;
        let mut addresses: Vec<(IpAddr, InterfaceIndex)> = messages
            .iter()
            .filter_map(|message| {
                let mut address = None;
                for attribute in &message.attributes {
                    match attribute {
                        // `Local` is the local end of a point-to-point link, where `Address` is the
                        // remote end.
                        AddressAttribute::Local(local) => address = Some(*local),
                        AddressAttribute::Address(own) => address = address.or(Some(*own)),
                        _ => {}
                    }
                }
                Some((address?, InterfaceIndex::new(message.header.index)))
            })
            .collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses)
    }

    /// Looks up the route that the kernel would use for `destination`, through `interface` if it is
    /// given. Returns `None` if there is no route.
    pub(super) async fn route(
        &self,
        destination: IpAddr,
        interface: Option<InterfaceIndex>,
    ) -> Result<Option<Route>> {
        let mut message = match destination {
            IpAddr::V4(v4) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4, 32).build()
            }
            IpAddr::V6(v6) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6, 128).build()
            }
        };
        // A lookup specifies no table, protocol, scope or type.
        message.header.table = 0;
        message.header.protocol = 0.into();
        message.header.scope = 0.into();
        message.header.kind = 0.into();
        if let Some(index) = interface {
            message.attributes.push(RouteAttribute::Oif(index.get()));
        }
        let mut found = Box::pin(self.handle.route().get(message).execute());
        match found.try_next().await {
            Ok(message) => Ok(message.as_ref().and_then(route_of)),
            Err(error) => match errno(&error) {
                Some(
                    libc::ENETUNREACH
                    | libc::EHOSTUNREACH
                    | libc::EINVAL
                    | libc::EACCES
                    | libc::EAGAIN
                    | libc::ENODEV,
                ) => Ok(None),
                Some(_) | None => Err(error)
                    .with_context(|| format!("the route to {destination} cannot be looked up")),
            },
        }
    }

    /// Returns the interface index of the default route. IPv4 is tried first.
    pub(super) async fn default_interface(&self) -> Option<InterfaceIndex> {
        for message in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let mut routes = Box::pin(self.handle.route().get(message).execute());
            while let Some(Ok(route)) = routes.next().await {
                if route.header.destination_prefix_length == 0
                    && route.header.table == libc::RT_TABLE_MAIN
                    && let Some(Route { ifindex, .. }) = route_of(&route)
                {
                    return Some(ifindex);
                }
            }
        }
        None
    }

    /// Returns a route of the main table, other than a default route, whose destination overlaps
    /// `subnet`, and the name of its interface.
    pub(super) async fn route_into(&self, subnet: IpNet) -> Result<Option<(IpNet, String)>> {
        let message = match subnet {
            IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let routes: Vec<RouteMessage> = self
            .handle
            .route()
            .get(message)
            .execute()
            .try_collect()
            .await
            .context("routes cannot be listed")?;
        let overlapping = routes
            .iter()
            .filter(|route| route.header.table == libc::RT_TABLE_MAIN)
            .find_map(|route| {
                let prefix = destination_of(route)?;
                let overlaps = prefix.contains(&subnet) || subnet.contains(&prefix);
                (prefix.prefix_len() > 0 && overlaps)
                    .then(|| (prefix, route_of(route).map(|route| route.ifindex)))
            });
        let Some((prefix, ifindex)) = overlapping else { return Ok(None) };
        let link = match ifindex {
            Some(ifindex) => self.link(ifindex).await?,
            None => None,
        };
        Ok(Some((prefix, link.map_or_else(|| "no interface".to_owned(), |link| link.name))))
    }

    /// Adds routing rules that keep packets for `subnet` off the default route. They take a more
    /// specific route or are rejected.
    pub(super) async fn add_guard(&self, subnet: IpNet) -> Result<()> {
        for rule in self.guard(subnet) {
            match rule.execute().await {
                Err(error) if errno(&error) != Some(libc::EEXIST) => {
                    return Err(error).context("a routing rule cannot be added");
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Removes these rules. Rules that are already gone are no error.
    pub(super) async fn remove_guard(&self, subnet: IpNet) -> Result<()> {
        for mut rule in self.guard(subnet) {
            match self.handle.rule().del(rule.message_mut().clone()).execute().await {
                Err(error) if errno(&error) != Some(libc::ENOENT) => {
                    return Err(error).context("a routing rule cannot be removed");
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn guard(&self, subnet: IpNet) -> Vec<RuleAddRequest<Ipv4Addr>> {
        let Some((network, bits)) = guard::v4(subnet) else { return Vec::new() };
        let rule = |priority| {
            self.handle.rule().add().v4().destination_prefix(network, bits).priority(priority)
        };
        let mut routed = rule(GUARD).action(RuleAction::ToTable);
        // Use every route of the main table except the default route.
        routed.message_mut().attributes.push(RuleAttribute::SuppressPrefixLen(0));
        vec![routed, rule(GUARD + 1).action(RuleAction::Unreachable).table_id(0)]
    }

    /// Returns true if filters are attached to the ingress or egress of an interface.
    pub(super) async fn has_filters(&self, index: InterfaceIndex) -> Result<bool> {
        let index = i32::try_from(index.get())?;
        let ingress: Vec<_> =
            self.handle.traffic_filter(index).get().ingress().execute().try_collect().await?;
        let egress: Vec<_> =
            self.handle.traffic_filter(index).get().egress().execute().try_collect().await?;
        Ok(!ingress.is_empty() || !egress.is_empty())
    }

    /// Removes the clsact qdisc of an interface. Removing one that is already gone succeeds.
    pub(super) async fn remove_clsact(&self, index: InterfaceIndex) -> Result<()> {
        let mut request = self.handle.qdisc().del(i32::try_from(index.get())?);
        request.message_mut().header.parent = TcHandle::CLSACT;
        match request.execute().await {
            Err(error)
                if !matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) =>
            {
                Err(error).context("the clsact qdisc cannot be removed")
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl End<'_> {
    fn message(&self) -> LinkMessage {
        let mut message = LinkMessageBuilder::<LinkUnspec>::default()
            .name(self.name)
            .mtu(self.mtu)
            .address(self.mac.octets().to_vec())
            .build();
        if let Some(fd) = self.namespace {
            message.attributes.push(LinkAttribute::NetNsFd(fd));
        }
        message
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: InterfaceIndex::new(message.header.index),
            name: String::new(),
            alias: None,
            mac: None,
            mtu: 0,
            is_up: flags.contains(LinkFlags::Up),
            is_veth: false,
            is_loopback: flags.contains(LinkFlags::Loopback),
            has_ethernet: matches!(
                message.header.link_layer_type,
                LinkLayerType::Ether | LinkLayerType::Loopback
            ),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Address(mac) => {
                    link.mac = <[u8; 6]>::try_from(mac.as_slice()).ok().map(MacAddr::from);
                }
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::LinkInfo(infos) => {
                    link.is_veth =
                        infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
                }
                _ => {}
            }
        }
        link
    }
}

fn one_link(found: Result<Option<LinkMessage>, rtnetlink::Error>) -> Result<Option<Link>> {
    match found {
        Ok(message) => Ok(message.as_ref().map(Link::from)),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    let (mut ifindex, mut source, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = InterfaceIndex::from_kernel(*index),
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some((*v4).into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => source = Some((*v6).into()),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(value) = metric {
                        mtu = Some(*value);
                    }
                }
            }
            _ => {}
        }
    }
    Some(Route { ifindex: ifindex?, source, mtu })
}

/// Returns the destination prefix of a route.
fn destination_of(message: &RouteMessage) -> Option<IpNet> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })?;
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

/// Returns the error number of the kernel's answer.
fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        rtnetlink::Error::UnexpectedMessage(_)
        | rtnetlink::Error::RequestFailed
        | rtnetlink::Error::NamespaceError(_)
        | rtnetlink::Error::InvalidHardwareAddress(_)
        | rtnetlink::Error::InvalidIp(_)
        | rtnetlink::Error::InvalidAddress(..)
        | rtnetlink::Error::InvalidNla(_) => None,
    }
}
