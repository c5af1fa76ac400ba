//! A launched node: its state, its inputs, and the order in which actions are carried out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use futures_util::FutureExt as _;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::sync::mpsc;

use super::addresses::Outcome;
use super::arrivals::Arrivals;
use super::bulk::Bulk;
use super::connections::Stream;
use super::data::DataPeer;
use super::dns::Dns;
use super::docker::DockerSide;
use super::external::External;
use super::findings::Findings;
use super::monitor::Monitor;
use super::paths::RelayRoutes;
use crate::bulk::control::FromWorkers;
use crate::datapath::{Datapath, LinkEvent, OpenOptions, Probe, Probes};
use crate::docker::{Event, Incoming};
use crate::failpoint;
use crate::monitor::Hub;
use crate::monitor::decode::Seen;
use crate::net::known::Known;
use crate::net::mesh::{LiveNodes, Mesh, MeshEvent, StreamId};
use crate::net::udp::{Received, UdpSockets};
use crate::options::Options;
use crate::store::{self, Identity, Store};
use overnode_core::control::CONTROL_PORT;
use overnode_core::control::dial::Dialer;
use overnode_core::control::renewal::RENEW_AFTER;
use overnode_core::gossip::{Gossip, Record, Signature, Signer};
use overnode_core::handshake::{Handshakes, Transmit};
use overnode_core::ipam::{self, Ipam, RequestId};
use overnode_core::path::Paths;
use overnode_core::routing::Routing;
use overnode_types::{NodeId, PeerIndex, PublicKey, VerifyingKey};

/// How often the maps are read for activity, confirmations and statistics.
const TICK: Duration = Duration::from_secs(1);
/// How often interfaces and addresses without an owner are removed.
const RECONCILE: Duration = Duration::from_secs(60);

/// Time after which a turn takes no further input from the same source. A turn with work from all
/// sources takes some tens of milliseconds.
const SHARE_TIME: Duration = Duration::from_millis(5);
/// Maximum number of inputs from each source in one turn.
const SHARES: [(Source, usize); 10] = [
    (Source::Mesh, 64),
    (Source::Refused, 8),
    // Each may cost 0.3 ms.
    (Source::High, 16),
    (Source::Low, 4),
    (Source::Replies, 16),
    (Source::Links, 1),
    (Source::Probes, 256),
    (Source::Docker, 1),
    (Source::Bulk, 16),
    (Source::Drops, 1),
];

/// The sources of inputs other than timeouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Mesh,
    /// Incoming connections that were refused.
    Refused,
    /// Datagrams from addresses where nodes are expected.
    High,
    /// Datagrams from other addresses.
    Low,
    /// Cookie replies to send through relays.
    Replies,
    Links,
    Probes,
    Docker,
    Bulk,
    Drops,
}

/// An input of the node.
pub(super) enum Input {
    Mesh(MeshEvent),
    /// A handshake message that the gate has admitted.
    Datagram(Received),
    /// A cookie reply to send through a relay.
    Reply(Transmit),
    Probe(Probe),
    Drops(Vec<Seen>),
    WorkersConnection(LinkEvent),
    Docker(Event),
    /// A message of the bulk workers. `None`: the workers are gone.
    Bulk(Option<FromWorkers>),
    Timeout,
}

/// A launched node.
pub(super) struct Node {
    pub(super) identity: Identity,
    pub(super) store: Arc<Store>,
    pub(super) started: Instant,
    pub(super) public_key: PublicKey,
    pub(super) incarnation: u64,
    pub(super) datapath: Datapath,
    pub(super) handshakes: Handshakes,
    pub(super) bulk: Bulk,
    pub(super) gossip: Gossip,
    pub(super) dialer: Dialer,
    pub(super) ipam: Ipam,
    pub(super) paths: Paths,
    pub(super) relay_routes: RelayRoutes,
    pub(super) routing: Routing,
    /// Completed requests whose requester may be waiting.
    pub(super) outcomes: VecDeque<Outcome>,
    /// The request that obtains address space for `overnode prime`, if the node has none.
    pub(super) priming: Option<RequestId>,
    /// Nodes whose address space this daemon has reclaimed.
    pub(super) reclaimed: BTreeSet<NodeId>,
    /// The Docker engine that is served, if any.
    pub(super) docker: Option<DockerSide>,
    /// Targets that this daemon has been connected with.
    pub(super) met_targets: BTreeSet<String>,
    /// The names and the DNS server.
    pub(super) dns: Dns,
    /// Attached monitors and their state.
    pub(super) monitor: Monitor,
    /// Whether reachability may have changed, for example because a control connection opened or
    /// closed.
    pub(super) paths_changed: bool,
    /// Why the node cannot continue.
    pub(super) broken: Option<anyhow::Error>,
    pub(super) udp: Arc<UdpSockets>,
    pub(super) mesh: Mesh,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) live_nodes: LiveNodes,
    pub(super) peers: BTreeMap<PeerIndex, DataPeer>,
    pub(super) externals: BTreeMap<PeerIndex, External>,
    pub(super) reachable: BTreeMap<NodeId, (bool, Instant)>,
    /// Problems that need an operator.
    pub(super) findings: Findings,
    /// Nodes that may get additional routes: an address that they claim is no longer in use here.
    pub(super) rerouted: BTreeSet<NodeId>,
    /// Nodes whose records are newer than those on disk.
    pub(super) unsaved: BTreeSet<NodeId>,
    /// Nodes whose records are new and not yet passed to the other parts of the node.
    pub(super) unprocessed_records: BTreeSet<NodeId>,
    /// Addresses where nodes are expected.
    pub(super) known: Known,
    mesh_events: mpsc::Receiver<MeshEvent>,
    pub(super) arrivals: Arrivals,
    probes: Probes,
    link_events: mpsc::Receiver<LinkEvent>,
    from_docker: Option<Incoming>,
    next_tick: Instant,
    next_reconcile: Instant,
}

impl Node {
    /// Starts the node that the store describes, or continues from the state that an earlier daemon
    /// left in the kernel.
    pub(super) async fn start(
        options: &Options,
        store: &Arc<Store>,
        mut identity: Identity,
        started: Instant,
        hub: &Hub,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        let handshakes = Handshakes::new(identity.exchange_secret(), StdRng::from_os_rng());
        let public_key = handshakes.public_key();
        let incarnation = store.next_incarnation()?.context("the node's identity is gone")?;
        identity.incarnation = incarnation;
        let ipam = allocations(store, &identity, now)?;
        failpoint::reached("incarnation");
        // Open the ports first. If that fails, nothing in the kernel has been changed.
        let udp = Arc::new(UdpSockets::bind(overnode_ebpf::wire::DATA_PORT).context(
            "UDP port 6784 cannot be opened: stop what uses it (`ss -lnup` shows it), then \
             launch again",
        )?);
        let live_nodes: LiveNodes = Arc::new(Mutex::default());
        let (events, mesh_events) = mpsc::channel(1024);
        let known = Known::default();
        let mesh = Mesh::listen(
            CONTROL_PORT,
            identity.local_identity(),
            live_nodes.clone(),
            known.clone(),
            RENEW_AFTER,
            events,
        )
        .context(
            "TCP port 6783 cannot be opened: stop what uses it (`ss -lntp` shows it), then \
             launch again",
        )?;
        failpoint::reached("ports");
        let mut datapath = Datapath::open(OpenOptions {
            state_dir: &options.state_dir,
            network: identity.network,
            node_id: identity.id,
            node_address: ipam.layout().node_address(identity.id),
            public_key,
            interface: identity.interface.clone(),
            mtu: identity.mtu,
            debug: options.debug,
            xdp: identity.xdp,
        })
        .await?;
        failpoint::reached("datapath");
        let link_events = datapath.watch()?;
        let probes = datapath.probes()?;
        // An earlier daemon may have been killed while a monitor was attached.
        datapath.set_record_allowance(0)?;
        let monitor = Monitor::new(hub.clone(), datapath.drops()?);
        let gate = handshakes.gate(StdRng::from_os_rng());
        let arrivals = Arrivals::start(&udp, gate, identity.id, known.clone())
            .context("handshake messages cannot be received")?;
        let own = Record {
            id: identity.id,
            incarnation,
            version: 0,
            left: false,
            nickname: identity.nickname.clone(),
            public_key,
            addresses: Vec::new(),
            links: Vec::new(),
            no_direct_path: Vec::new(),
            ranges: ipam.ranges(),
            claims: ipam.claims(),
            names: Vec::new(),
            verifying_key: VerifyingKey::default(),
            signature: Signature::default(),
        };
        let signer = Signer::new(&identity.seed);
        let mut gossip = Gossip::new(own, signer, StdRng::from_os_rng(), now);
        gossip.set_clock(unix_milliseconds(), now);
        let mut routing = Routing::new(*ipam.layout(), identity.id);
        let stored = store.peers()?;
        gossip.restore(stored.iter().map(|known| (known.record.clone(), known.was_reached)));
        for store::Known { record, standing, .. } in stored {
            if gossip.record(record.id) == Some(&record) {
                routing.restore(&record, standing, now);
            }
        }
        let mut dialer = Dialer::new(identity.id, identity.discovery, StdRng::from_os_rng());
        for host in store.targets()? {
            dialer.add_target(host.as_str(), now);
        }
        let dns = Dns::new(&identity, ipam.layout().node_address(identity.id));
        let served = options.docker().filter(|_| identity.docker);
        let served = served
            .map(|places| DockerSide::start(&places, store, &identity, &ipam, now))
            .transpose()
            .context("the list of Docker networks cannot be read")?;
        let (docker, from_docker) = served.unzip();
        let mut node = Self {
            handshakes,
            bulk: Bulk::new(&identity, &options.run_dir, now),
            identity,
            store: store.clone(),
            started,
            public_key,
            incarnation,
            datapath,
            gossip,
            dialer,
            ipam,
            paths: Paths::new(StdRng::from_os_rng()),
            relay_routes: RelayRoutes::default(),
            routing,
            outcomes: VecDeque::new(),
            priming: None,
            reclaimed: BTreeSet::new(),
            docker,
            met_targets: BTreeSet::new(),
            dns,
            monitor,
            paths_changed: true,
            broken: None,
            udp,
            mesh,
            streams: BTreeMap::new(),
            live_nodes,
            peers: BTreeMap::new(),
            externals: BTreeMap::new(),
            reachable: BTreeMap::new(),
            findings: Findings::default(),
            rerouted: BTreeSet::new(),
            unsaved: BTreeSet::new(),
            unprocessed_records: BTreeSet::new(),
            known,
            mesh_events,
            arrivals,
            probes,
            link_events,
            from_docker,
            next_tick: now,
            next_reconcile: now + RECONCILE,
        };
        node.adopt(now).await?;
        failpoint::reached("peers");
        node.start_bulk(now).await;
        failpoint::reached("bulk");
        node.reconcile(now).await?;
        failpoint::reached("endpoints");
        node.adopt_names(now);
        node.pump(now).await;
        Ok(node)
    }

    pub(super) fn id(&self) -> NodeId {
        self.identity.id
    }

    /// Waits for the next input. Cancel-safe.
    pub(super) async fn next_input(&mut self) -> Input {
        let deadline = self.deadline();
        tokio::select! {
            () = tokio::time::sleep_until(deadline.into()) => Input::Timeout,
            Some(event) = self.mesh_events.recv() => Input::Mesh(event),
            Some(refused) = self.mesh.refused() => Input::Mesh(refused),
            Some(event) = self.link_events.recv() => Input::WorkersConnection(event),
            Some(datagram) = self.arrivals.high.recv() => Input::Datagram(datagram),
            Some(datagram) = self.arrivals.low.recv() => Input::Datagram(datagram),
            Some(reply) = self.arrivals.replies.recv() => Input::Reply(reply),
            Ok(probe) = self.probes.recv() => Input::Probe(probe),
            event = from(&mut self.from_docker) => Input::Docker(event),
            said = self.bulk.next() => Input::Bulk(said),
            Ok(drops) = self.monitor.drops.recv() => Input::Drops(drops),
        }
    }

    fn deadline(&self) -> Instant {
        [
            Some(self.next_tick),
            self.handshakes.poll_timeout(),
            self.gossip.poll_timeout(),
            self.dialer.poll_timeout(),
            self.paths.poll_timeout(),
            self.ipam.poll_timeout(),
            self.bulk.poll_timeout(),
            self.routing.poll_timeout(),
            // Due at once. The remaining records are learned after the inputs that arrived in the
            // meantime.
            (!self.unprocessed_records.is_empty()).then_some(self.started),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(self.next_tick)
    }

    /// Runs one turn: handles an input, then a limited share of the queued inputs of each source,
    /// then carries out all resulting actions. So no source can starve the others, and each turn
    /// ends.
    pub(super) async fn handle_input(&mut self, input: Input) {
        self.take_input(input).await;
        for (source, share) in SHARES {
            let end = Instant::now() + SHARE_TIME;
            for _ in 0..share {
                let Some(input) = self.waiting(source) else { break };
                self.take_input(input).await;
                if self.broken.is_some() {
                    return;
                }
                if Instant::now() > end {
                    break;
                }
            }
        }
        let now = Instant::now();
        if self.deadline() <= now {
            self.handle_timeout(now).await;
        }
        self.pump(now).await;
    }

    /// Returns the next queued input of a source, if any.
    fn waiting(&mut self, source: Source) -> Option<Input> {
        match source {
            Source::Mesh => self.mesh_events.try_recv().ok().map(Input::Mesh),
            Source::Refused => self.mesh.refused().now_or_never().flatten().map(Input::Mesh),
            Source::High => self.arrivals.high.try_recv().ok().map(Input::Datagram),
            Source::Low => self.arrivals.low.try_recv().ok().map(Input::Datagram),
            Source::Replies => self.arrivals.replies.try_recv().ok().map(Input::Reply),
            Source::Links => self.link_events.try_recv().ok().map(Input::WorkersConnection),
            Source::Probes => self.probes.recv().now_or_never()?.ok().map(Input::Probe),
            Source::Docker => from(&mut self.from_docker).now_or_never().map(Input::Docker),
            Source::Bulk => self.bulk.next().now_or_never().map(Input::Bulk),
            Source::Drops => self.monitor.drops.recv().now_or_never()?.ok().map(Input::Drops),
        }
    }

    async fn take_input(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Mesh(event) => self.handle_mesh(event, now),
            Input::Datagram(datagram) => self.handle_datagram(datagram, now).await,
            Input::Reply(reply) => {
                self.send_relayed(&reply).await;
            }
            Input::Drops(drops) => self.handle_drops(drops),
            Input::Probe(probe) => self.handle_probe(&probe, now),
            Input::WorkersConnection(event) => self.handle_link(event, now).await,
            Input::Docker(event) => self.handle_docker(event, now).await,
            Input::Bulk(said) => self.handle_bulk(said, now).await,
            // Every turn checks the time anyway.
            Input::Timeout => {}
        }
    }

    async fn handle_timeout(&mut self, now: Instant) {
        self.handshakes.handle_timeout(now, SystemTime::now());
        self.gossip.handle_timeout(now);
        self.dialer.handle_timeout(now);
        self.paths.handle_timeout(now);
        if self.ipam.poll_timeout().is_some_and(|at| at <= now) {
            self.ipam.handle_timeout(now);
        }
        self.handle_bulk_timeout(now).await;
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.gossip.set_clock(unix_milliseconds(), now);
            self.read_maps(now);
            self.follow_bulk_peers(now);
            self.watch_drops();
            self.settle_sandboxes(now).await;
            self.try_elsewhere(now).await;
            self.save_peers(None);
            self.follow_problems(now);
        }
        if self.next_reconcile <= now {
            self.next_reconcile = now + RECONCILE;
            if let Err(error) = self.reconcile(now).await {
                tracing::warn!("cleaning up failed: {error:#}");
            }
            self.follow_underlay().await;
        }
    }

    /// Carries out the decisions of the cores.
    pub(super) async fn pump(&mut self, now: Instant) {
        self.pump_gossip(now).await;
        let paths_changed = std::mem::take(&mut self.paths_changed);
        if paths_changed {
            self.refresh_known();
            self.tell_ipam_of_paths(now);
        }
        self.pump_ipam(now).await;
        // Send the messages that the allocation produced.
        self.pump_gossip(now).await;
        if paths_changed {
            self.tell_routing_of_paths(now);
        }
        self.follow_routes(now);
        self.pump_dialer();
        self.pump_paths(now);
        if paths_changed {
            self.tell_dns_of_paths(now);
        }
        self.pump_handshakes(now, None).await;
    }

    /// Handles a link event together with all queued ones, so that a thousand containers that end
    /// at the same time cause one cleanup.
    async fn handle_link(&mut self, event: LinkEvent, now: Instant) {
        // An engine may have moved an interface into its container.
        self.settle_sandboxes(now).await;
        let (mut vanished, mut moved) = (false, false);
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                LinkEvent::Vanished(_) => vanished = true,
                LinkEvent::AddressesChanged | LinkEvent::RoutesChanged => moved = true,
            }
            next = self.link_events.try_recv().ok();
        }
        if vanished && let Err(error) = self.reconcile(now).await {
            tracing::warn!("cleaning up after a removed interface failed: {error:#}");
        }
        if moved {
            self.follow_underlay().await;
        }
    }

    async fn follow_underlay(&mut self) {
        if let Err(error) = self.datapath.refresh().await {
            tracing::warn!("following changes of the underlay failed: {error:#}");
        }
    }
}

/// Returns the current time in milliseconds since the Unix epoch, as records use it.
fn unix_milliseconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Returns the engine's next event. Waits forever if no engine is served.
async fn from(docker: &mut Option<Incoming>) -> Event {
    match docker {
        Some(incoming) => incoming.next().await,
        None => std::future::pending().await,
    }
}

/// Restores the address allocation from the store.
fn allocations(store: &Store, identity: &Identity, now: Instant) -> anyhow::Result<Ipam> {
    let attachments = store.attachments()?;
    let allocated =
        attachments.into_iter().map(|attachment| (attachment.address, attachment.target)).collect();
    let config = ipam::Config {
        network: identity.network,
        id: identity.id,
        incarnation: identity.incarnation,
        timing: ipam::Timing::default(),
    };
    let mut ipam = Ipam::new(config, store.addresses()?, allocated, now)?;
    if let Some(last) = store.cursor()? {
        ipam.resume_after(last);
    }
    Ok(ipam)
}
