//! Manages names: which names this node announces, which nodes' names are served, and the DNS
//! server for containers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::local::LocalNode;
use crate::api::{self, ApiError, DnsAddresses, DnsEntry, DnsStatus};
use crate::datapath::{self, Datapath, KnownEndpoint, OwnNetns};
use crate::dns::server::Sockets;
use crate::dns::{self, Server, Service, Upstream};
use crate::store::Store;
use overnode_core::attachment::host_interface;
use overnode_core::gossip::{Gossip, MAX_NAMES, NAME_BYTES, Record};
use overnode_core::ipam::Ipam;
use overnode_core::names::{self, Directory, Zone};
use overnode_types::NodeId;
use overnode_types::name::{self, Domain, Named};

/// How long a node must have been reachable before its names are served, so that changes of its
/// names can arrive.
const SERVED_AFTER: Duration = Duration::from_millis(900);
/// The same for a node that was out of reach and that this node has no connection with: the news
/// has to come through other nodes, which first have to connect with it.
const SERVED_AFTER_LOSS: Duration = Duration::from_secs(3);
/// How long the names of a node are served whose daemon, or this node's own one, restarts. Packets
/// reach its containers all that time.
pub(super) const RESTART: Duration = Duration::from_secs(10);
/// Maximum number of addresses in one request.
const MAX_ADDRESSES: usize = 64;

/// The names, and the DNS server if there is one.
pub(super) struct Names {
    local: Arc<LocalNode>,
    store: Arc<Store>,
    domains: Vec<Domain>,
    address: IpAddr,
    wanted: bool,
    service: Arc<Service>,
    /// Nodes that gossip and packets can reach, and since when.
    connected: BTreeMap<NodeId, Instant>,
    /// Nodes whose names are served.
    served: BTreeSet<NodeId>,
    /// Nodes whose names were served before they got out of reach.
    lost: BTreeSet<NodeId>,
    /// Nodes that an earlier daemon knew. They count as reachable until [`RESTART`] has passed.
    continued: Option<(BTreeSet<NodeId>, Instant)>,
    /// Until when names may exist that this node has not learned yet. `None` once it knows all.
    incomplete_until: Option<Instant>,
    server: Option<NamesServer>,
    /// Why there is no server although one is wanted.
    problem: Option<String>,
    /// Why not all names are announced to the other nodes.
    too_many: Option<String>,
}

/// The DNS server and its network namespace, which is attached at the node's address.
struct NamesServer {
    server: Server,
    netns: OwnNetns,
}

impl Names {
    pub(super) fn new(local: Arc<LocalNode>, store: Arc<Store>) -> Self {
        let (identity, address) = (&local.identity, local.address());
        let chosen = identity.dns_domain.as_deref().unwrap_or(names::DEFAULT_DOMAIN);
        let mut domains: Vec<Domain> =
            [chosen, names::ALIAS].iter().filter_map(|text| Domain::new(text).ok()).collect();
        domains.dedup();
        let subnet = identity.network.subnet;
        let directory =
            Directory::new(domains.clone(), subnet, Zone::new(local.id(), StdRng::from_os_rng()));
        let upstream = Upstream::new(Path::new(dns::RESOLV_CONF), address, subnet);
        let service = Arc::new(Service::new(directory, upstream));
        Self {
            domains,
            address,
            wanted: identity.dns,
            store,
            service,
            connected: BTreeMap::new(),
            served: BTreeSet::new(),
            lost: BTreeSet::new(),
            continued: None,
            incomplete_until: None,
            server: None,
            problem: None,
            too_many: None,
            local,
        }
    }

    /// Learns the names that a node announces.
    pub(super) fn learn(&self, record: &Record) {
        self.service.directory().zone_mut().set_names(record.id, &record.names);
    }

    /// Returns whether the server runs.
    pub(super) fn is_serving(&self) -> bool {
        self.server.is_some()
    }

    /// Returns the address of the server for queries of containers, if it runs.
    pub(super) fn resolver(&self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(v4) if self.is_serving() => Some(v4),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }

    /// Sets the containers whose queries are redirected to the node.
    pub(super) fn set_clients(&self, clients: BTreeMap<IpAddr, dns::Client>) {
        self.service.set_clients(clients);
    }

    /// Returns the server's endpoint, so that the data plane does not remove it as unknown.
    pub(super) fn endpoint(&self) -> Option<KnownEndpoint> {
        self.server.as_ref().map(|running| KnownEndpoint {
            address: self.address,
            host_interface: host_interface(self.address),
            netns: Some(running.netns.netns()),
        })
    }

    /// Returns the current problems.
    pub(super) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problem.iter().chain(&self.too_many)
    }

    fn relative(&self, text: &str) -> Result<String, ApiError> {
        name::relative(text, &self.domains).map_err(|error| {
            ApiError::usage(format_args!("{text:?} is not a valid DNS name: {error}"))
        })
    }

    /// Appends the domain to a name.
    fn full(&self, name: &str) -> String {
        let domain = self.domains.first().map_or(names::DEFAULT_DOMAIN, Domain::as_str);
        format!("{name}.{domain}")
    }

    /// Starts the server unless it is running.
    pub(super) async fn ensure_server(&mut self, datapath: &mut Datapath) {
        let interface = host_interface(self.address);
        let is_whole =
            |running: &NamesServer| running.server.is_running() && datapath.is_attached(&interface);
        if !self.wanted || self.server.as_ref().is_some_and(is_whole) {
            return;
        }
        if self.server.take().is_some() {
            tracing::warn!("the DNS server or its interface was lost: creating both again");
            if let Err(error) = datapath.detach(&interface).await {
                tracing::warn!("{interface} cannot be removed: {error:#}");
            }
        }
        match self.start_server(datapath).await {
            Ok(running) => (self.server, self.problem) = (Some(running), None),
            Err(error) => {
                let problem = format!(
                    "names are not served to containers: {error:#}; retrying every minute \
                     (launch with --no-dns to do without)"
                );
                self.problem = Some(problem);
            }
        }
    }

    /// Removes the server before an orderly exit. Otherwise its namespace would disappear only
    /// after the daemon and could get in the way of the next one.
    pub(super) async fn stop_server(&mut self, datapath: &mut Datapath) {
        if self.server.take().is_some()
            && let Err(error) = datapath.detach(&host_interface(self.address)).await
        {
            tracing::debug!(
                "the interface of the DNS server was not removed, it disappears with the daemon: \
                 {error:#}"
            );
        }
    }

    async fn start_server(&self, datapath: &mut Datapath) -> anyhow::Result<NamesServer> {
        let netns = OwnNetns::new().await?;
        let plan = datapath::Attachment::inside(netns.netns(), self.address);
        datapath.attach(&plan).await?;
        match self.serve_in(&netns).await {
            Ok(server) => Ok(NamesServer { server, netns }),
            Err(error) => {
                datapath.detach(&plan.host_interface).await?;
                Err(error)
            }
        }
    }

    async fn serve_in(&self, netns: &OwnNetns) -> anyhow::Result<Server> {
        let address = self.address;
        let open = move || {
            Sockets::open(address).with_context(|| format!("port 53 of {address} cannot be opened"))
        };
        let sockets = netns.run(open).await?;
        Ok(Server::start(self.service.clone(), sockets, self.local.identity.network.subnet)?)
    }

    /// Announces this node's names to the other nodes and to the local server.
    pub(super) fn announce(&mut self, gossip: &mut Gossip, ipam: &Ipam, now: Instant) {
        let names = match self.own_names(ipam) {
            Ok(names) => names,
            Err(error) => {
                return tracing::warn!("the names of this node cannot be read: {}", error.message);
            }
        };
        let (count, size) = (names.len(), bytes(&names));
        self.too_many = (count > MAX_NAMES || size > NAME_BYTES).then(|| {
            format!(
                "this node has more names than it can announce ({count} of {MAX_NAMES}, {size} \
                 of {NAME_BYTES} bytes): the last ones are not served; remove some with \
                 `overnode dns-remove`"
            )
        });
        if gossip.own().names == names {
            return;
        }
        gossip.update_own(|own| own.names = names, now);
        self.learn(gossip.own());
    }

    /// Returns the names of this node's containers and the names that were added.
    fn own_names(&self, ipam: &Ipam) -> Result<Vec<Named>, ApiError> {
        let attachments = self.store.attachments().map_err(ApiError::failed)?;
        let named = |name: &String, address| {
            Some(Named { name: name::relative(name, &self.domains).ok()?, address })
        };
        // If another node keeps the address, the name would lead to a stranger.
        let kept = attachments.iter().filter(|it| ipam.keeper(it.address).is_none());
        let of_containers =
            kept.flat_map(|it| it.served_names().filter_map(|name| named(name, it.address)));
        let mut names: BTreeSet<Named> = of_containers.collect();
        names.extend(self.store.names().map_err(ApiError::failed)?);
        Ok(names.into_iter().collect())
    }

    /// Continues to serve the names of these nodes, which an earlier daemon has learned. Others may
    /// have names that this node does not know yet.
    pub(super) fn continue_nodes(&mut self, nodes: BTreeSet<NodeId>, now: Instant) {
        self.incomplete_until = Some(now + RESTART);
        self.served.clone_from(&nodes);
        self.continued = Some((nodes, now + RESTART));
    }

    /// Serves the names of a node once the node is connected, packets can reach it and its names
    /// have been confirmed since then. A name that was removed during a partition must not
    /// reappear, not even until the news arrives. Names that are served remain so for as long as
    /// packets reach the node.
    ///
    /// `connected` are the nodes that gossip and packets can reach, `reached` those that packets
    /// reach, whatever gossip does. `in_step` tells up to when everything that a neighbor sent has
    /// arrived; see [`ControlPlane::in_step`](super::ControlPlane::in_step).
    pub(super) fn set_paths(
        &mut self,
        connected: BTreeSet<NodeId>,
        mut reached: BTreeSet<NodeId>,
        in_step: &BTreeMap<NodeId, Option<Instant>>,
        now: Instant,
    ) {
        self.continued.take_if(|(_, until)| now >= *until);
        reached.extend(self.continued.iter().flat_map(|(nodes, _)| nodes));
        reached.extend(&connected);
        let since = |id: &NodeId| self.connected.get(id).copied().unwrap_or(now);
        let connected: BTreeMap<NodeId, Instant> =
            connected.into_iter().map(|id| (id, since(&id))).collect();
        // A neighbor's records precede its answer to a ping. The records of other nodes come with
        // the records of their connections.
        let is_confirmed = |id: &NodeId, since: Instant| match in_step.get(id) {
            Some(last) => last.is_some_and(|last| last >= since) && now >= since + SERVED_AFTER,
            None if self.lost.contains(id) => now >= since + SERVED_AFTER_LOSS,
            None => now >= since + SERVED_AFTER,
        };
        let confirmed = connected.iter().filter(|(id, since)| is_confirmed(id, **since));
        let mut served: BTreeSet<NodeId> = confirmed.map(|(id, _)| *id).collect();
        served.extend(self.served.intersection(&reached));
        served.insert(self.local.id());
        // One neighbor has told all that it knows.
        let is_told = in_step.values().any(Option::is_some);
        self.incomplete_until = self.incomplete_until.filter(|until| now < *until && !is_told);
        self.lost.extend(self.served.difference(&served));
        self.lost.retain(|id| !served.contains(id));
        self.connected = connected;
        self.served.clone_from(&served);
        let mut directory = self.service.directory();
        directory.zone_mut().set_served(served);
        directory.zone_mut().set_incomplete(self.incomplete_until.is_some());
    }

    /// Adds addresses to a name. The caller announces the names afterwards.
    pub(super) fn add(
        &mut self,
        request: &api::DnsAdd,
        ipam: &Ipam,
    ) -> Result<DnsAddresses, ApiError> {
        let name = self.relative(&request.name)?;
        check_addresses(&request.addresses)?;
        if request.addresses.is_empty() {
            return Err(ApiError::usage("no address was given: give at least one"));
        }
        let mut added: BTreeSet<Named> =
            self.store.names().map_err(ApiError::failed)?.into_iter().collect();
        added.extend(request.addresses.iter().map(|it| Named { name: name.clone(), address: *it }));
        let all: BTreeSet<Named> =
            self.own_names(ipam)?.into_iter().chain(added.iter().cloned()).collect();
        if all.len() > MAX_NAMES || bytes(&all) > NAME_BYTES {
            return Err(ApiError::refused(format_args!(
                "{name} was not added: a node can have at most {MAX_NAMES} names, {} KiB in \
                 total: remove some with `overnode dns-remove`",
                NAME_BYTES >> 10
            )));
        }
        self.save(&name, added.into_iter().collect())
    }

    /// Removes addresses from a name, all if none is given. The caller announces the names
    /// afterwards.
    pub(super) fn remove(&mut self, request: &api::DnsRemove) -> Result<DnsAddresses, ApiError> {
        let name = self.relative(&request.name)?;
        let mut added = self.store.names().map_err(ApiError::failed)?;
        let is_there =
            |address: &IpAddr| added.iter().any(|it| it.name == name && it.address == *address);
        if let Some(unknown) = request.addresses.iter().find(|address| !is_there(address)) {
            return Err(ApiError::missing(format_args!(
                "{name} has no address {unknown} that was added on this node: nothing was \
                 changed; `overnode status --dns` lists all names and their nodes"
            )));
        }
        let before = added.len();
        added.retain(|it| {
            it.name != name
                || !(request.addresses.is_empty() || request.addresses.contains(&it.address))
        });
        if added.len() == before {
            return Err(ApiError::missing(format_args!(
                "no name {name} was added on this node: nothing was changed; \
                 `overnode status --dns` lists all names and their nodes"
            )));
        }
        self.save(&name, added)
    }

    fn save(&self, name: &str, added: Vec<Named>) -> Result<DnsAddresses, ApiError> {
        self.store.set_names(&added).map_err(ApiError::failed)?;
        let addresses =
            added.into_iter().filter(|it| it.name == name).map(|it| it.address).collect();
        Ok(DnsAddresses { name: self.full(name), addresses })
    }

    pub(super) fn lookup(&mut self, request: &api::DnsLookup) -> Result<DnsAddresses, ApiError> {
        let name = self.relative(&request.name)?;
        let addresses = self.service.directory().zone_mut().addresses(&name);
        let name = self.full(&name);
        if addresses.is_empty() {
            return Err(ApiError::missing(format_args!(
                "{name} has no address: `overnode status --dns` lists all names"
            )));
        }
        Ok(DnsAddresses { name, addresses })
    }

    pub(super) fn status(&self, nickname: impl Fn(NodeId) -> String) -> DnsStatus {
        let counts = self.service.counts();
        let directory = self.service.directory();
        let entries =
            directory.zone().entries().into_iter().map(|(named, node, reachable)| DnsEntry {
                name: named.name.clone(),
                address: named.address,
                node,
                nickname: nickname(node),
                reachable,
            });
        let mut domains = self.domains.iter().map(|domain| domain.as_str().to_owned());
        DnsStatus {
            serving: self.server.is_some(),
            address: self.server.is_some().then_some(self.address),
            domain: domains.next(),
            aliases: domains.collect(),
            upstream: self.service.upstream().servers(),
            queries: counts.queries,
            forwarded: counts.forwarded,
            failed: counts.failed,
            refused: counts.refused,
            entries: entries.collect(),
        }
    }
}

fn bytes<'a>(names: impl IntoIterator<Item = &'a Named>) -> usize {
    names.into_iter().map(Named::size).sum()
}

/// Checks that another host or container can have these addresses.
fn check_addresses(addresses: &[IpAddr]) -> Result<(), ApiError> {
    if addresses.len() > MAX_ADDRESSES {
        return Err(ApiError::usage(format_args!(
            "too many addresses: give at most {MAX_ADDRESSES} at a time"
        )));
    }
    let is_odd = |address: &&IpAddr| {
        let is_broadcast = **address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
        address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast
    };
    match addresses.iter().find(is_odd) {
        Some(odd) => Err(ApiError::usage(format_args!(
            "a name cannot point to {odd}: give the address of a host or a container"
        ))),
        None => Ok(()),
    }
}
