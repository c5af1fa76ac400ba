//! Serves a Docker engine: carries out the decisions of [`Docker`] with the node's addresses and
//! its data plane.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use tokio::sync::oneshot;

use super::{Addresses, Containers, Effect};
use crate::api::{Container, EventKind};
use crate::datapath::{self, Datapath, EndPlacement, NetnsCookie, NetnsRef};
use crate::dns;
use crate::docker::{
    EngineEvent, Event, Incoming, Order, Service, SocketPaths, engine::EngineError,
};
use crate::failpoint;
use crate::node::local::LocalNode;
use crate::node::monitor::container_of;
use crate::store::Store;
use overnode_core::attachment::{self, Attachment};
use overnode_core::docker::{Docker, Refusal, Request, Response, Settings, Step};
use overnode_core::ipam::{IpamError, RequestId};
use overnode_types::NodeId;

/// Maximum number of requests that wait for an address at the same time.
const MAX_WAITING: usize = 4096;
/// Interval at which the network namespace of a container that is starting is looked for. The
/// container's first process must find it prepared.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// How long it is looked for that often after the engine joined an endpoint.
const HURRY: Duration = Duration::from_secs(10);

type Answer = oneshot::Sender<Result<Response, Refusal>>;

/// The node's state for a Docker engine.
pub(in crate::node) struct DockerSide {
    service: Service,
    plan: Docker,
    /// Requests that wait for an address.
    waiting: BTreeMap<RequestId, Waiter>,
    /// Why the plugin's socket cannot be served.
    problem: Option<String>,
    /// Why the engine refuses to create the default network.
    refused: Option<String>,
    /// Containers whose DNS queries are redirected to the node, by address.
    redirected: BTreeMap<IpAddr, Redirected>,
    /// Why queries are not redirected.
    unredirected: Option<String>,
    /// Whether redirections of an earlier daemon have been ended.
    is_adopted: bool,
    /// When to look for new network namespaces again, and until when to do so often.
    next_look: Instant,
    hurry_until: Instant,
}

/// A container whose DNS queries are redirected.
struct Redirected {
    netns: NetnsRef,
    /// Tells its namespace from a later one at the same path.
    inode: u64,
    cookie: NetnsCookie,
}

/// A request for an address.
struct Waiter {
    /// Whether it asks for one particular address.
    fixed: bool,
    /// Name of the container, if the engine sent it.
    name: Option<String>,
    answer: Answer,
}

impl DockerSide {
    /// Starts serving the engine, which need not be running.
    pub(in crate::node) fn start(
        sockets: &SocketPaths,
        store: &Store,
        local: &LocalNode,
        now: Instant,
    ) -> anyhow::Result<(Self, Incoming)> {
        let identity = &local.identity;
        let node_address = |id: u16| NodeId::new(id).map(|id| local.layout.node_address(id));
        let settings = Settings {
            subnet: identity.network.subnet,
            range: identity.network.range,
            nodes: (
                node_address(1).context("there is no node 1")?,
                node_address(4095).context("there is no node 4095")?,
            ),
            node: local.address(),
        };
        let plan = Docker::new(settings, store.docker_networks()?, store.attachments()?, now);
        let (service, incoming) = Service::start(sockets);
        if !store.has_default_network()? {
            service.order(Order::CreateDefault(settings.subnet));
        }
        let side = Self {
            service,
            plan,
            waiting: BTreeMap::new(),
            problem: None,
            refused: None,
            redirected: BTreeMap::new(),
            unredirected: None,
            is_adopted: false,
            next_look: now,
            hurry_until: now,
        };
        Ok((side, incoming))
    }

    /// Returns the current problems that need an operator.
    pub(in crate::node) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problem.iter().chain(&self.refused).chain(&self.unredirected)
    }
}

impl Containers {
    /// Returns when to call [`Self::follow_sandboxes`] next.
    pub(in crate::node) fn poll_timeout(&self) -> Option<Instant> {
        let docker = self.docker.as_ref()?;
        let hurries = docker.next_look < docker.hurry_until;
        (hurries && docker.plan.unsettled().next().is_some()).then_some(docker.next_look)
    }

    /// Returns the containers whose DNS queries are redirected to the node, by address.
    pub(in crate::node) fn dns_clients(&self) -> BTreeMap<IpAddr, dns::Client> {
        let Some(docker) = &self.docker else { return BTreeMap::new() };
        let client = |(address, it): (&IpAddr, &Redirected)| {
            let engine_names = docker.plan.engine_names(*address);
            (*address, dns::Client { netns: it.netns.clone(), engine_names })
        };
        docker.redirected.iter().map(client).collect()
    }

    /// Whether a request of the engine waits for the outcome of an address request.
    pub(in crate::node) fn waits_for(&self, request: RequestId) -> bool {
        self.docker.as_ref().is_some_and(|docker| docker.waiting.contains_key(&request))
    }

    /// Requests the default network from the engine. Returns false if no engine is served.
    pub(in crate::node) fn want_default_network(&self) -> bool {
        let subnet = self.local.identity.network.subnet;
        self.order(Order::CreateDefault(subnet))
    }

    /// Requests the removal of the default network from the engine. Returns false if no engine is
    /// served.
    pub(in crate::node) fn remove_default_network(&self, force: bool) -> bool {
        self.order(Order::RemoveDefault { force })
    }

    fn order(&self, order: Order) -> bool {
        let Some(docker) = &self.docker else { return false };
        docker.service.order(order);
        true
    }

    /// Handles an event from the engine.
    pub(in crate::node) async fn handle_docker(
        &mut self,
        event: Event,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
        now: Instant,
    ) {
        match event {
            Event::Call((request, answer)) => {
                self.call(request, answer, datapath, addresses, now).await;
            }
            Event::EngineEvent(EngineEvent::Report(report)) => {
                let Some(docker) = &mut self.docker else { return };
                for step in docker.plan.report(&report, now) {
                    if let Step::Free(addresses, _) = &step {
                        tracing::info!(
                            "the Docker engine no longer knows {addresses:?}: releasing them"
                        );
                    }
                    let named = self.newly_named(&step);
                    match (self.carry_out(step, datapath, addresses, now).await, named) {
                        (Ok(_), Some(container)) => self.report(EventKind::Named(container)),
                        (Ok(_), None) => {}
                        (Err(why), _) => {
                            tracing::warn!(
                                "a report of the Docker engine was not carried out: {why}"
                            );
                        }
                    }
                }
                self.look(true);
                // Containers may have joined other networks.
                self.changed();
            }
            Event::EngineEvent(EngineEvent::Default(made)) => {
                if let (Ok(()), Err(why)) = (&made, self.store.set_default_network(true)) {
                    tracing::warn!("the creation of the default network was not stored: {why}");
                }
                if let Some(docker) = &mut self.docker {
                    docker.refused = match made {
                        Ok(()) => None,
                        Err(why @ EngineError::Absent { .. }) => {
                            tracing::debug!("{why}");
                            None
                        }
                        Err(EngineError::Refused(why)) => Some(why),
                    };
                }
                self.effects.push_back(Effect::DefaultNetwork);
            }
            Event::EngineEvent(EngineEvent::Removed(removed)) => {
                self.effects.push_back(Effect::NetworkRemoved(match removed {
                    Ok(()) => Ok(()),
                    Err(why @ EngineError::Absent { .. }) => {
                        tracing::info!("the engine still lists the default network: {why}");
                        Ok(())
                    }
                    Err(EngineError::Refused(why)) => Err(why),
                }));
            }
            Event::EngineEvent(EngineEvent::Trouble(problem)) => {
                if let Some(why) = &problem {
                    tracing::warn!("{why}");
                }
                if let Some(docker) = &mut self.docker {
                    docker.problem = problem;
                }
            }
        }
    }

    /// Asks the engine for names that are not known yet.
    fn look(&self, again: bool) {
        if let Some(docker) = &self.docker
            && docker.plan.has_unnamed()
        {
            docker.service.order(Order::Look { again });
        }
    }

    /// Returns the container whose name or target `step` changes, if the container has a name
    /// afterwards.
    fn newly_named(&self, step: &Step) -> Option<Container> {
        let Step::Keep(record, _) = step else { return None };
        let known = self.docker.as_ref()?.plan.records().find(|it| it.address == record.address)?;
        let is_told =
            record.name.is_some() && (&known.name, &known.target) != (&record.name, &record.target);
        is_told.then(|| container_of(record))
    }

    async fn call(
        &mut self,
        request: Request,
        answer: Answer,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
        now: Instant,
    ) {
        let Some(docker) = &mut self.docker else { return };
        tracing::debug!(?request, "request of the Docker engine");
        let done = match docker.plan.decide(request, now) {
            Ok(Step::Find { fixed, name }) => {
                return self.find(fixed, name, answer, addresses, now);
            }
            Ok(step) => self.carry_out(step, datapath, addresses, now).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &done {
            tracing::info!("refused a request of the Docker engine: {refusal}");
        }
        // An engine that was killed no longer awaits the answer. The report of the restarted engine
        // tells what became of the request.
        let _ = answer.send(done);
        self.look(false);
    }

    fn find(
        &mut self,
        fixed: Option<IpAddr>,
        name: Option<String>,
        answer: Answer,
        addresses: &mut Addresses,
        now: Instant,
    ) {
        let Some(docker) = &mut self.docker else { return };
        if docker.waiting.len() >= MAX_WAITING {
            let _ = answer.send(Err(Refusal::new(
                "too many containers are waiting for an address: start some later",
            )));
            return;
        }
        let owner = name.as_deref().map_or("docker".to_owned(), |name| format!("docker: {name}"));
        let request = addresses.request(fixed, &owner, now);
        docker.waiting.insert(request, Waiter { fixed: fixed.is_some(), name, answer });
    }

    /// Handles the outcome of an address request that no `attach` waits for.
    pub(in crate::node) fn found_for_docker(
        &mut self,
        request: RequestId,
        found: Result<IpAddr, IpamError>,
        addresses: &mut Addresses,
    ) {
        let now = Instant::now();
        let waiter = self.docker.as_mut().and_then(|docker| docker.waiting.remove(&request));
        match (waiter, found) {
            (Some(Waiter { fixed, name, answer }), Ok(address)) if !answer.is_closed() => {
                let held = self.hold(address, fixed, name, addresses, now);
                if fixed {
                    self.changed();
                }
                let _ = answer.send(held);
            }
            (_, Ok(address)) => drop(addresses.ipam.release(address, now)),
            (Some(Waiter { answer, .. }), Err(why)) => {
                tracing::info!("refused a request of the Docker engine: {why}");
                drop(answer.send(Err(Refusal::new(why))));
            }
            (None, Err(_)) => {}
        }
    }

    fn hold(
        &mut self,
        address: IpAddr,
        fixed: bool,
        name: Option<String>,
        addresses: &mut Addresses,
        now: Instant,
    ) -> Result<Response, Refusal> {
        let Some(docker) = &mut self.docker else {
            return Err(Refusal::new("this node serves no Docker engine"));
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (record, response) = docker.plan.held(address, fixed, name, since);
        // Write to disk before answering. A crash after this point can leave an unused address
        // reserved, but never gives an address twice.
        if let Err(why) = self.store.add_attachment(&record) {
            addresses.ipam.release(address, now);
            return Err(Refusal::new(why));
        }
        docker.plan.keep(record, now);
        failpoint::reached("docker address");
        Ok(response)
    }

    async fn carry_out(
        &mut self,
        step: Step,
        datapath: &mut Datapath,
        addresses: &mut Addresses,
        now: Instant,
    ) -> Result<Response, Refusal> {
        match step {
            Step::Answer(response) => Ok(response),
            Step::Find { .. } => Err(Refusal::new("an address cannot be allocated at this point")),
            Step::Networks(networks, response) => {
                self.store.set_docker_networks(&networks).map_err(Refusal::new)?;
                if let Some(docker) = &mut self.docker {
                    docker.plan.set_networks(networks);
                }
                Ok(response)
            }
            Step::Keep(record, response) => {
                self.keep(*record, now)?;
                Ok(response)
            }
            Step::Plug(record, response) => {
                let container = container_of(&record);
                self.attach_for_docker(*record, datapath, now).await?;
                self.report(EventKind::Attached(container));
                Ok(response)
            }
            Step::Unplug(record, response) => {
                detach_interface(record.address, datapath).await?;
                self.unguard(record.address, datapath).await;
                self.report(EventKind::Detached(container_of(&record)));
                self.keep(*record, now)?;
                Ok(response)
            }
            Step::Free(freed, response) => {
                for address in freed {
                    detach_interface(address, datapath).await?;
                    self.give_back(address, addresses).map_err(Refusal::new)?;
                    if let Some(docker) = &mut self.docker {
                        docker.plan.forget(address);
                    }
                }
                self.changed();
                Ok(response)
            }
        }
    }

    /// Prepares containers whose network namespaces have appeared, and forgets those that have
    /// left. An engine joins an endpoint before it creates the namespace. An engine in another
    /// mount namespace has namespaces at paths that do not exist here.
    pub(in crate::node) async fn follow_sandboxes(
        &mut self,
        datapath: &mut Datapath,
        serves_names: bool,
        is_tick: bool,
        now: Instant,
    ) {
        self.guard_sandboxes(datapath, now).await;
        if serves_names {
            self.redirect_queries(datapath, is_tick).await;
        }
        if let Some(docker) = &mut self.docker {
            docker.next_look = now + LOOK_INTERVAL;
        }
    }

    /// Redirects the DNS queries of joined containers to the node, and of no others.
    async fn redirect_queries(&mut self, datapath: &mut Datapath, is_tick: bool) {
        let Some(docker) = &mut self.docker else { return };
        let joined: BTreeMap<IpAddr, (NetnsRef, u64)> = docker
            .plan
            .records()
            .filter(|record| record.has_interface() && record.netns_inode != 0)
            .map(|record| {
                let netns = NetnsRef::Path(record.netns.clone().into());
                (record.address, (netns, record.netns_inode))
            })
            .collect();
        let mut changed = false;
        let before = docker.redirected.len();
        docker.redirected.retain(|address, it| {
            joined
                .get(address)
                .is_some_and(|(netns, inode)| (netns, *inode) == (&it.netns, it.inode))
        });
        let has_left = docker.redirected.len() < before;
        // A failure is retried once a second, not with each look.
        if docker.unredirected.is_some() && !is_tick {
            return;
        }
        docker.unredirected = None;
        for (address, (netns, inode)) in joined {
            if docker.redirected.contains_key(&address) {
                continue;
            }
            match datapath.redirect_queries(&netns).await {
                Ok(cookie) => {
                    docker.redirected.insert(address, Redirected { netns, inode, cookie });
                    changed = true;
                }
                // The container has just ended, or its engine's namespaces are not visible here.
                Err(why) if netns.id().is_err() => tracing::debug!("{address}: {why:#}"),
                Err(why) => {
                    docker.unredirected = Some(format!(
                        "containers of the Docker engine do not find names of other hosts: {why:#}"
                    ));
                    break;
                }
            }
        }
        if has_left || !docker.is_adopted {
            let kept = docker.redirected.values().map(|it| it.cookie).collect();
            match datapath.keep_redirected(&kept) {
                Ok(()) => docker.is_adopted = true,
                Err(why) => tracing::warn!("{why:#}"),
            }
        }
        if changed || has_left {
            self.changed();
        }
    }

    /// Installs the rules against other gateways in containers whose network namespaces have
    /// appeared.
    async fn guard_sandboxes(&mut self, datapath: &Datapath, now: Instant) {
        let Some(docker) = &self.docker else { return };
        let unsettled: Vec<Attachment> = docker.plan.unsettled().cloned().collect();
        for mut record in unsettled {
            let sandbox = NetnsRef::Path(record.netns.clone().into());
            let Ok(identity) = sandbox.id() else { continue };
            if let Err(why) = datapath.guard(&sandbox).await {
                tracing::warn!(
                    "without routing rules, packets of {} may leave through the engine's \
                     gateway: {why:#}",
                    record.address
                );
                continue;
            }
            record.netns_inode = identity.inode;
            if let Err(why) = self.keep(record, now) {
                tracing::warn!("{why}");
            }
        }
    }

    /// Removes the rules against other gateways, so that a running container that leaves the
    /// network can use its other routes again.
    async fn unguard(&self, address: IpAddr, datapath: &Datapath) {
        let sandbox =
            self.docker.as_ref().and_then(|docker| docker.plan.sandbox(address)).map(str::to_owned);
        let Some(sandbox) = sandbox else { return };
        if let Err(why) = datapath.unguard(&NetnsRef::Path(sandbox.into())).await {
            tracing::debug!("{why:#}");
        }
    }

    fn keep(&mut self, record: Attachment, now: Instant) -> Result<(), Refusal> {
        self.store.update_attachment(&record).map_err(Refusal::new)?;
        if let Some(docker) = &mut self.docker {
            docker.plan.keep(record, now);
        }
        self.changed();
        Ok(())
    }

    /// Creates the interface, replacing an existing one. The engine may repeat the request if it
    /// missed the answer.
    async fn attach_for_docker(
        &mut self,
        record: Attachment,
        datapath: &mut Datapath,
        now: Instant,
    ) -> Result<(), Refusal> {
        detach_interface(record.address, datapath).await?;
        let plan = datapath::Attachment {
            place: EndPlacement::Waiting,
            address: record.address,
            mac: record.engine_endpoint().map(|it| it.mac),
            host_interface: record.host_interface.clone(),
        };
        let address = record.address;
        self.keep(record, now)?;
        if let Some(docker) = &mut self.docker {
            (docker.next_look, docker.hurry_until) = (now + LOOK_INTERVAL, now + HURRY);
        }
        failpoint::reached("docker endpoint");
        if let Err(why) = datapath.attach(&plan).await {
            return Err(Refusal::new(format_args!(
                "no interface was created for {address}: {why:#}"
            )));
        }
        failpoint::reached("docker plugged");
        Ok(())
    }
}

async fn detach_interface(address: IpAddr, datapath: &mut Datapath) -> Result<(), Refusal> {
    let detached = datapath.detach(&attachment::host_interface(address)).await;
    detached.map_err(|why| {
        Refusal::new(format_args!("the interface of {address} was not removed: {why:#}"))
    })
}
