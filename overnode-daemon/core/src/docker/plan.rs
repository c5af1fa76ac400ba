//! Decides how to answer an engine, and what to do first. No I/O, no clock.
//!
//! [`Docker`] mirrors what is on disk: the networks, and the engine's addresses, each with the
//! endpoint that uses it. A [`Step`] says what to do. Once it is done and on disk, the node reports
//! that with [`Docker::keep`], [`Docker::forget`] or [`Docker::set_networks`]. A failed step
//! therefore changes nothing here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::NAME;
use super::message::{
    CreateEndpoint, CreateNetwork, Interface, InterfaceName, Join, Refusal, ReleaseAddress,
    Request, RequestAddress, RequestPool, Response,
};
use super::report::{Container, EngineNames, Report};
use crate::attachment::{
    Attachment, EngineEndpoint, Kind, Owner, host_interface, waiting_interface,
};
use overnode_api::check_name;
use overnode_types::MacAddr;
use overnode_types::text::quoted;

/// Time after which a lease that the engine no longer lists is freed. It only counts while the
/// engine answers.
pub const LEASE_EXPIRY: Duration = Duration::from_secs(180);
/// Age up to which an address without an endpoint survives an engine's activation, since its
/// endpoint may still be about to be created.
const PENDING_ADDRESS_GRACE: Duration = Duration::from_secs(10);
/// Maximum number of networks of this driver.
const MAX_NETWORKS: usize = 4096;
/// Number of consecutive pool requests after which the engine is refused. An engine that rejects
/// the pool asks for another, and there is only one.
const MAX_POOLS_IN_A_ROW: u32 = 16;
/// Prefix of interface names in containers, as in `overnode0`.
const INTERFACE_PREFIX: &str = "overnode";
const OPTION_TYPE: &str = "RequestAddressType";
const OPTION_TYPE_GATEWAY: &str = "com.docker.network.gateway";
const OPTION_NAME: &str = "com.docker.network.endpoint.name";

/// The cluster's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// All addresses of the container network.
    pub subnet: IpNet,
    /// The part of the subnet that is allocated from.
    pub range: IpNet,
    /// The first and the last node address.
    pub nodes: (IpAddr, IpAddr),
    /// The address of this node.
    pub node: IpAddr,
}

/// What to do, and the answer to send afterwards.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing to do.
    Answer(Response),
    /// Find an address, or claim the given one. Then call [`Docker::held`] and keep its result as
    /// for [`Self::Keep`].
    Find {
        /// The address that was requested.
        fixed: Option<IpAddr>,
        /// The container's name, if the engine sent it.
        name: Option<String>,
    },
    /// Write the set of networks to disk.
    Networks(BTreeSet<String>, Response),
    /// Write this attachment to disk.
    Keep(Box<Attachment>, Response),
    /// Create the interface for the engine to move, replacing an existing one, and write this
    /// attachment to disk.
    Plug(Box<Attachment>, Response),
    /// Remove the interface, and write this attachment to disk.
    Unplug(Box<Attachment>, Response),
    /// Remove the interfaces, delete the attachments from disk and release the addresses.
    Free(Vec<IpAddr>, Response),
}

/// The known state of an engine's networks and endpoints.
#[derive(Debug)]
pub struct Docker {
    settings: Settings,
    networks: BTreeSet<String>,
    leases: BTreeMap<IpAddr, Lease>,
    pools_in_a_row: u32,
}

#[derive(Debug)]
struct Lease {
    record: Attachment,
    /// When the engine last showed that it knows the address.
    seen: Instant,
    /// The names that belong to its engine's resolver; `None` until a report has the container.
    engine_names: Option<EngineNames>,
}

impl Lease {
    fn new(record: Attachment, seen: Instant) -> Self {
        Self { record, seen, engine_names: None }
    }
}

impl Docker {
    /// Creates the state from what is on disk. Attachments of other kinds are ignored.
    pub fn new(
        settings: Settings,
        networks: BTreeSet<String>,
        attachments: Vec<Attachment>,
        now: Instant,
    ) -> Self {
        let ours = attachments.into_iter().filter(|record| record.kind() == Kind::Docker);
        let leases = ours.map(|record| (record.address, Lease::new(record, now))).collect();
        Self { settings, networks, leases, pools_in_a_row: 0 }
    }

    /// Decides what to do about a request.
    ///
    /// # Errors
    /// Returns a [`Refusal`] that the engine shows to its user.
    pub fn decide(&mut self, request: Request, now: Instant) -> Result<Step, Refusal> {
        let answer = |response| Ok(Step::Answer(response));
        match request {
            Request::Activate => Ok(self.activate(now)),
            Request::NetworkCapabilities => answer(Response::NetworkCapabilities {
                scope: "local",
                connectivity_scope: "global",
                gw_alloc_checker: true,
            }),
            Request::IpamCapabilities => {
                answer(Response::IpamCapabilities { mac: false, replay: false })
            }
            // For a pool in the global space, the engine does not check for overlap with the host's
            // routes.
            Request::AddressSpaces => answer(Response::AddressSpaces {
                local_default_address_space: NAME,
                global_default_address_space: NAME,
            }),
            Request::GatewayCheck => {
                answer(Response::GatewayCheck { skip_v4: true, skip_v6: true })
            }
            Request::RequestPool(request) => self.pool(&request),
            Request::RequestAddress(request) => self.address(&request),
            Request::ReleaseAddress(request) => self.release(&request),
            Request::CreateNetwork(request) => self.create_network(request),
            Request::DeleteNetwork(request) => {
                let mut networks = self.networks.clone();
                Ok(if networks.remove(&request.network) {
                    Step::Networks(networks, Response::Done {})
                } else {
                    Step::Answer(Response::Done {})
                })
            }
            Request::CreateEndpoint(request) => self.create_endpoint(request),
            Request::DeleteEndpoint(id) => Ok(match self.by_endpoint(&id.endpoint) {
                Some(record) => {
                    Step::Unplug(Box::new(after_deletion(record.clone())), Response::Done {})
                }
                None => Step::Answer(Response::Done {}),
            }),
            Request::EndpointInfo(id) => match self.by_endpoint(&id.endpoint) {
                Some(_) => answer(Response::Info { value: serde_json::Map::new() }),
                None => Err(unknown_endpoint(&id.endpoint)),
            },
            Request::Join(request) => self.join(request),
            Request::Leave(id) => Ok(match self.by_endpoint(&id.endpoint) {
                Some(record) => {
                    Step::Unplug(Box::new(after_leave(record.clone())), Response::Done {})
                }
                None => Step::Answer(Response::Done {}),
            }),
            Request::ReleasePool(_) | Request::Notice => answer(Response::Done {}),
        }
    }

    /// Returns the attachment to keep for an address that was found, and the answer.
    pub fn held(
        &self,
        address: IpAddr,
        fixed: bool,
        name: Option<String>,
        since: u64,
    ) -> (Attachment, Response) {
        let record = Attachment {
            owner: Owner::docker(None, None),
            address,
            is_static: fixed,
            target: "docker".to_owned(),
            netns: String::new(),
            netns_inode: 0,
            name,
            host_interface: host_interface(address),
            since,
        };
        (record, self.answer_address(address))
    }

    /// Records that this attachment is on disk.
    pub fn keep(&mut self, record: Attachment, now: Instant) {
        let known = self.leases.remove(&record.address).and_then(|lease| lease.engine_names);
        let engine_names = known.filter(|_| record.has_interface() && record.netns_inode != 0);
        self.leases.insert(record.address, Lease { engine_names, ..Lease::new(record, now) });
    }

    /// Records that the attachment with this address is no longer on disk.
    pub fn forget(&mut self, address: IpAddr) {
        self.leases.remove(&address);
    }

    /// Records that these networks are on disk.
    pub fn set_networks(&mut self, networks: BTreeSet<String>) {
        self.networks = networks;
    }

    /// Processes the engine's list of containers and networks. Returns the steps that keep new
    /// names, images and networks, and free addresses that have disappeared without a request.
    pub fn report(&mut self, report: &Report, now: Instant) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut networks = self.networks.clone();
        networks.extend(report.networks.iter().take(MAX_NETWORKS).cloned());
        if networks != self.networks {
            steps.push(Step::Networks(networks, Response::Done {}));
        }
        let containers: BTreeMap<&str, &Container> = report
            .containers
            .iter()
            .flat_map(|container| container.aliases.keys().map(move |id| (id.as_str(), container)))
            .collect();
        let mut gone = Vec::new();
        for (address, lease) in &mut self.leases {
            let endpoint = lease.record.engine_endpoint().map(|it| it.endpoint.as_str());
            let Some(container) = endpoint.and_then(|endpoint| containers.get(endpoint)) else {
                if now.saturating_duration_since(lease.seen) >= LEASE_EXPIRY {
                    gone.push(*address);
                }
                continue;
            };
            lease.seen = now;
            lease.engine_names = Some(container.engine_names.clone());
            let aliases = endpoint.and_then(|id| container.aliases.get(id)).cloned();
            let updated = Attachment {
                name: container.name.clone().or_else(|| lease.record.name.clone()),
                owner: Owner::Docker {
                    image: container.image.clone(),
                    endpoint: lease.record.engine_endpoint().cloned(),
                    aliases: aliases.unwrap_or_default(),
                    is_unhealthy: container.is_unhealthy,
                },
                target: container.id.clone(),
                ..lease.record.clone()
            };
            if updated != lease.record {
                steps.push(Step::Keep(Box::new(updated), Response::Done {}));
            }
        }
        if !gone.is_empty() {
            steps.push(Step::Free(gone, Response::Done {}));
        }
        steps
    }

    /// Returns true if some container has joined and its name is not known yet.
    pub fn has_unnamed(&self) -> bool {
        self.leases
            .values()
            .any(|lease| lease.record.image().is_none() && lease.record.has_interface())
    }

    /// Returns the attachments of all addresses that the engine has.
    pub fn records(&self) -> impl Iterator<Item = &Attachment> {
        self.leases.values().map(|lease| &lease.record)
    }

    /// Returns the path of the network namespace of the container with this address, if it has
    /// joined.
    pub fn sandbox(&self, address: IpAddr) -> Option<&str> {
        self.leases
            .get(&address)
            .map(|lease| lease.record.netns.as_str())
            .filter(|path| !path.is_empty())
    }

    /// Returns the names that the engine of the container with this address answers for, or `None`
    /// if they are not known yet.
    pub fn engine_names(&self, address: IpAddr) -> Option<EngineNames> {
        self.leases.get(&address)?.engine_names.clone()
    }

    /// Returns the endpoints that were joined to a namespace that did not exist yet: the engine
    /// creates the namespace after the join.
    pub fn unsettled(&self) -> impl Iterator<Item = &Attachment> {
        self.records()
            .filter(|record| record.has_interface())
            .filter(|record| record.netns_inode == 0)
    }

    /// Handles a new engine process. Frees addresses that an earlier process requested without
    /// creating an endpoint for them: no endpoint will follow.
    fn activate(&self, now: Instant) -> Step {
        let answer = Response::Manifest { implements: ["NetworkDriver", "IpamDriver"] };
        let left: Vec<IpAddr> = self
            .leases
            .iter()
            .filter(|(_, lease)| {
                lease.record.engine_endpoint().is_none()
                    && now.saturating_duration_since(lease.seen) >= PENDING_ADDRESS_GRACE
            })
            .map(|(address, _)| *address)
            .collect();
        if left.is_empty() { Step::Answer(answer) } else { Step::Free(left, answer) }
    }

    fn pool(&mut self, request: &RequestPool) -> Result<Step, Refusal> {
        let Settings { subnet, range, .. } = self.settings;
        if request.v6 {
            return Err(Refusal::new("overnode networks are IPv4 only: omit --ipv6"));
        }
        if request.pool.is_empty() {
            self.pools_in_a_row += 1;
            if self.pools_in_a_row > MAX_POOLS_IN_A_ROW {
                self.pools_in_a_row = 0;
                return Err(Refusal::new(format_args!(
                    "the engine rejects {subnet} because the host has a route into it, and \
                     overnode has no other subnet: create the network with --subnet {subnet}"
                )));
            }
        } else if request.pool.parse::<IpNet>().ok() != Some(subnet) {
            return Err(Refusal::new(format_args!(
                "every overnode network has the cluster's subnet {subnet}, not {}: \
                 use --subnet {subnet}, or omit --subnet",
                quoted(&request.pool)
            )));
        } else {
            self.pools_in_a_row = 0;
        }
        let part = (!request.sub_pool.is_empty()).then(|| request.sub_pool.parse::<IpNet>().ok());
        if part.is_some_and(|part| part.is_none_or(|part| !part.contains(&range))) {
            return Err(Refusal::new(format_args!(
                "the nodes themselves allocate addresses from {range}, not from {}: omit \
                 --ip-range",
                quoted(&request.sub_pool)
            )));
        }
        Ok(Step::Answer(Response::Pool { id: NAME, pool: subnet.to_string() }))
    }

    fn address(&mut self, request: &RequestAddress) -> Result<Step, Refusal> {
        self.pools_in_a_row = 0;
        if request.pool != NAME {
            return Err(Refusal::new(format_args!(
                "there is no address pool {:?}: create the network with --ipam-driver {NAME}",
                quoted(&request.pool)
            )));
        }
        let option = |name: &str| request.options.get(name).and_then(serde_json::Value::as_str);
        let wanted: Option<IpAddr> = match request.address.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                Refusal::Malformed(format!("Address {:?} is not an IP address", quoted(text)))
            })?),
        };
        if option(OPTION_TYPE) == Some(OPTION_TYPE_GATEWAY) {
            let (first, last) = self.settings.nodes;
            return match wanted {
                // An engine that restores its networks asks for the gateway it was given before,
                // possibly when the node had another ID.
                Some(gateway) if !(first..=last).contains(&gateway) => Err(Refusal::new(
                    "overnode networks have no gateway of their own, since the engine gives \
                     containers a default route: omit --gateway",
                )),
                gateway => {
                    Ok(Step::Answer(self.answer_address(gateway.unwrap_or(self.settings.node))))
                }
            };
        }
        let name = option(OPTION_NAME).filter(|name| check_name(name).is_ok()).map(str::to_owned);
        Ok(Step::Find { fixed: wanted, name })
    }

    fn answer_address(&self, address: IpAddr) -> Response {
        Response::Address { address: format!("{address}/{}", self.settings.subnet.prefix_len()) }
    }

    fn release(&self, request: &ReleaseAddress) -> Result<Step, Refusal> {
        let address: IpAddr = request.address.parse().map_err(|_| {
            Refusal::Malformed(format!(
                "Address {:?} is not an IP address",
                quoted(&request.address)
            ))
        })?;
        Ok(if self.leases.contains_key(&address) {
            Step::Free(vec![address], Response::Done {})
        } else {
            Step::Answer(Response::Done {})
        })
    }

    fn create_network(&mut self, request: CreateNetwork) -> Result<Step, Refusal> {
        let subnet = self.settings.subnet;
        self.pools_in_a_row = 0;
        if !request.v6.is_empty() {
            return Err(Refusal::new("overnode networks are IPv4 only: omit --ipv6"));
        }
        let fits = |pool: &str| pool.parse::<IpNet>().ok() == Some(subnet);
        if request.v4.len() != 1 || !request.v4.iter().all(|pool| fits(&pool.pool)) {
            return Err(Refusal::new(format_args!(
                "an overnode network has exactly one subnet, the cluster's {subnet}: create it \
                 with --driver {NAME} --ipam-driver {NAME}"
            )));
        }
        if self.networks.contains(&request.network) {
            return Ok(Step::Answer(Response::Done {}));
        }
        if self.networks.len() >= MAX_NETWORKS {
            return Err(Refusal::new(format_args!(
                "there are already {MAX_NETWORKS} overnode networks, the maximum: remove one first"
            )));
        }
        let mut networks = self.networks.clone();
        networks.insert(request.network);
        Ok(Step::Networks(networks, Response::Done {}))
    }

    fn create_endpoint(&self, request: CreateEndpoint) -> Result<Step, Refusal> {
        if !self.networks.contains(&request.network) {
            return Err(Refusal::new(format_args!(
                "this node does not know the network {}: if `docker network ls` shows it, remove \
                 it and create it again",
                quoted(&request.network)
            )));
        }
        if !request.interface.address_v6.is_empty() {
            return Err(Refusal::new("overnode networks are IPv4 only: omit the IPv6 address"));
        }
        let text = &request.interface.address;
        let address = text.parse::<IpNet>().map_err(|_| {
            Refusal::Malformed(format!(
                "Address {:?} is not an IP address with a prefix length",
                quoted(text)
            ))
        })?;
        let not_ours = || {
            Refusal::new(format_args!(
                "this node did not allocate {address} to this engine: create the network with \
                 --ipam-driver {NAME}"
            ))
        };
        if address.prefix_len() != self.settings.subnet.prefix_len() {
            return Err(not_ours());
        }
        let lease = self.leases.get(&address.addr()).ok_or_else(not_ours)?;
        let given = match request.interface.mac_address.as_str() {
            "" => None,
            text => match text.parse::<MacAddr>() {
                Ok(mac) if mac.is_assignable() => Some(mac),
                Ok(_) | Err(_) => {
                    return Err(Refusal::new(format_args!(
                        "{:?} is not a valid MAC address for a container",
                        quoted(text)
                    )));
                }
            },
        };
        match lease.record.engine_endpoint() {
            Some(known) if known.endpoint != request.endpoint => {
                return Err(Refusal::new(format_args!(
                    "{} belongs to another endpoint: {}",
                    address.addr(),
                    lease.record.name.as_deref().unwrap_or(&known.endpoint)
                )));
            }
            // The request is repeated because the answer was lost.
            Some(known) if given.is_none_or(|mac| mac == known.mac) => {
                return Ok(Step::Answer(endpoint_answer(given.is_none(), known.mac)));
            }
            Some(_) | None => {}
        }
        if let Some(other) = self.by_endpoint(&request.endpoint)
            && other.address != address.addr()
        {
            return Err(Refusal::new(format_args!(
                "this endpoint already has the address {}",
                other.address
            )));
        }
        let mac = given.unwrap_or_else(|| mac_of(address.addr()));
        let engine = EngineEndpoint {
            network: request.network,
            endpoint: request.endpoint,
            mac,
            joined: false,
        };
        let target = engine.endpoint.clone();
        let owner = Owner::docker(lease.record.image().cloned(), Some(engine));
        let record = Attachment { owner, target, ..lease.record.clone() };
        Ok(Step::Keep(Box::new(record), endpoint_answer(given.is_none(), mac)))
    }

    fn join(&self, request: Join) -> Result<Step, Refusal> {
        let record = self
            .by_endpoint(&request.endpoint)
            .ok_or_else(|| unknown_endpoint(&request.endpoint))?;
        let rival = self.records().find(|other| {
            other.netns == request.sandbox
                && other.address != record.address
                && other.has_interface()
        });
        if let Some(rival) = rival {
            return Err(Refusal::new(format_args!(
                "this container is already in the container network, as {}: all overnode networks \
                 are one network, so connect it to only one of them",
                rival.address
            )));
        }
        let mut record = record.clone();
        record.netns = request.sandbox;
        record.netns_inode = 0;
        set_joined(&mut record, true);
        let interface_name = InterfaceName {
            src_name: waiting_interface(record.address),
            dst_prefix: INTERFACE_PREFIX,
        };
        Ok(Step::Plug(Box::new(record), Response::Joined { interface_name }))
    }

    fn by_endpoint(&self, id: &str) -> Option<&Attachment> {
        self.records().find(|record| record.engine_endpoint().is_some_and(|it| it.endpoint == id))
    }
}

fn unknown_endpoint(id: &str) -> Refusal {
    Refusal::new(format_args!("there is no endpoint {}: start the container again", quoted(id)))
}

/// Returns the attachment after its endpoint has left its container.
fn after_leave(mut record: Attachment) -> Attachment {
    record.netns = String::new();
    record.netns_inode = 0;
    set_joined(&mut record, false);
    record
}

fn set_joined(record: &mut Attachment, joined: bool) {
    if let Owner::Docker { endpoint: Some(endpoint), is_unhealthy, .. } = &mut record.owner {
        endpoint.joined = joined;
        *is_unhealthy = false;
    }
}

/// Returns the attachment after its endpoint was deleted: only the address remains.
fn after_deletion(record: Attachment) -> Attachment {
    let owner = Owner::docker(record.image().cloned(), None);
    Attachment { owner, ..after_leave(record) }
}

/// Returns the answer to an endpoint's creation. `with_mac` must be false if the engine assigned
/// the MAC address: it treats an answer that repeats its own values as an error.
fn endpoint_answer(with_mac: bool, mac: MacAddr) -> Response {
    let mac_address = if with_mac { mac.to_string() } else { String::new() };
    Response::Endpoint { interface: Interface { mac_address, ..Interface::default() } }
}

/// Derives a locally administered MAC address from an IP address. It is stable, so that a
/// container's neighbors need no ARP update when the container restarts.
fn mac_of(address: IpAddr) -> MacAddr {
    let low = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => (v6.to_bits() as u32).to_be_bytes(),
    };
    MacAddr::new([0x02, 0x6f, low[0], low[1], low[2], low[3]])
}

#[cfg(test)]
mod tests;
