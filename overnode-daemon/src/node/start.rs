//! The steps from a stored identity to a running node.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::Context as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::mpsc;

use super::addresses::Addresses;
use super::bulk::BulkPath;
use super::containers::Containers;
use super::containers::docker::DockerSide;
use super::control_plane::ControlPlane;
use super::data_plane::DataPlane;
use super::data_plane::arrivals::Arrivals;
use super::event_loop::{Node, RECONCILE, unix_milliseconds};
use super::inputs::Inputs;
use super::local::LocalNode;
use super::monitor::Monitor;
use super::names::Names;
use super::problems::Problems;
use crate::datapath::{Datapath, OpenOptions};
use crate::failpoint;
use crate::monitor::Hub;
use crate::net::known::Known;
use crate::net::mesh::{LiveNodes, Mesh, MeshEvent};
use crate::net::udp::UdpSockets;
use crate::options::Options;
use crate::store::{self, Identity, Store};
use overnode_core::control::CONTROL_PORT;
use overnode_core::control::dial::Dialer;
use overnode_core::control::renewal::RENEW_AFTER;
use overnode_core::gossip::{Gossip, Record, Signer};
use overnode_core::handshake::Handshakes;
use overnode_core::ipam::{Ipam, Layout};
use overnode_core::routing::Routing;
use overnode_types::NodeId;

/// The sockets that the node is reached at.
struct Ports {
    udp: Arc<UdpSockets>,
    mesh: Mesh,
    mesh_events: mpsc::Receiver<MeshEvent>,
    live_nodes: LiveNodes,
    known: Known,
}

impl Node {
    /// Starts the node that the store describes, or continues from the state that an earlier daemon
    /// left in the kernel.
    pub(super) async fn start(
        options: &Options,
        store: &Arc<Store>,
        identity: Identity,
        started: Instant,
        hub: &Hub,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        let handshakes = Handshakes::new(identity.exchange_secret(), StdRng::from_os_rng());
        let local = begin_incarnation(store, identity, &handshakes, started)?;
        let addresses = Addresses::restore(local.clone(), store.clone(), now)?;
        failpoint::reached("incarnation");
        // Open the ports first. If that fails, nothing in the kernel has been changed.
        let ports = open_ports(&local)?;
        failpoint::reached("ports");
        let mut datapath = open_datapath(options, &local).await?;
        failpoint::reached("datapath");
        let (interfaces, probes) = (datapath.watch()?, datapath.probes()?);
        // An earlier daemon may have been killed while a monitor was attached.
        datapath.set_record_allowance(0)?;
        let drops = datapath.drops()?;
        let gate = handshakes.gate(StdRng::from_os_rng());
        let arrivals = Arrivals::start(&ports.udp, gate, local.id(), ports.known.clone())
            .context("handshake messages cannot be received")?;
        let (gossip, routing) = restore_records(store, &local, &addresses.ipam, now)?;
        let dialer = restore_targets(store, &local, now)?;
        let (docker, incoming) = serve_docker(options, store, &local, now)?.unzip();
        let mut node = Self {
            control: ControlPlane::new(local.clone(), gossip, dialer, ports.live_nodes),
            data: DataPlane::new(
                local.clone(),
                datapath,
                ports.udp,
                handshakes,
                routing,
                ports.known,
            ),
            bulk: BulkPath::new(local.clone(), &options.run_dir, now),
            addresses,
            names: Names::new(local.clone(), store.clone()),
            containers: Containers::new(local.clone(), store.clone(), docker),
            problems: Problems::default(),
            monitor: Monitor::new(hub.clone()),
            inputs: Inputs {
                mesh: ports.mesh,
                mesh_events: ports.mesh_events,
                arrivals,
                probes,
                interfaces,
                docker: incoming,
                drops,
                next_tick: now,
                next_reconcile: now + RECONCILE,
            },
            outcomes: VecDeque::new(),
            local,
            store: store.clone(),
        };
        node.continue_peers(now).await?;
        failpoint::reached("peers");
        node.bulk.start(&mut node.data, now).await;
        failpoint::reached("bulk");
        node.reconcile(now).await?;
        failpoint::reached("endpoints");
        if !node.names.is_serving() || node.containers.docker.is_none() {
            node.data.datapath.keep_redirected(&BTreeSet::new())?;
        }
        node.load_names(now);
        node.pump(now).await;
        Ok(node)
    }

    /// Takes over peers and sessions that an earlier daemon left in the maps, then configures all
    /// peers in the store.
    async fn continue_peers(&mut self, now: Instant) -> anyhow::Result<()> {
        let pinned = self.data.find_pinned(now)?;
        let mut wanted = BTreeSet::new();
        let others = self.control.gossip.records().filter(|it| it.id != self.local.id());
        let others: Vec<Record> = others.cloned().collect();
        others.iter().for_each(|record| self.addresses.learn(record, now));
        for record in others.iter().filter(|record| !record.left) {
            self.control.dialer.learn(record.id, record.addresses.clone(), now);
            wanted.insert(record.id.peer_index());
            self.data.configure_peer(record, None, now).await;
        }
        for external in self.store.external_peers()? {
            let index = external.index;
            wanted.insert(index);
            if let Err(error) = self.data.configure_external(external, now).await {
                tracing::warn!(
                    "the WireGuard peer {index} cannot be added to the data plane: {error:#}"
                );
            }
        }
        self.data.datapath.set_own_routes(&self.addresses.own_routes())?;
        self.data.adopt_sessions(pinned, &wanted, now);
        self.read_maps(now);
        Ok(())
    }

    /// Loads the names that are known at the start.
    fn load_names(&mut self, now: Instant) {
        for record in self.control.gossip.records() {
            self.names.learn(record);
        }
        // Packets still reach the nodes that an earlier daemon has left sessions with.
        let others = self.control.gossip.records().filter(|record| !record.left);
        let others: Vec<NodeId> = others.map(|record| record.id).collect();
        if others.len() > 1 || !self.control.dialer.target_status().is_empty() {
            let reached = others.into_iter().filter(|id| self.data.has_session(*id, now));
            self.names.continue_nodes(reached.collect(), now);
        }
        self.announce_names(now);
        // The own record may not be published yet, but its names are known here.
        self.names.learn(self.control.gossip.own());
        self.update_names(now);
    }
}

/// Begins a new incarnation of the node.
fn begin_incarnation(
    store: &Store,
    mut identity: Identity,
    handshakes: &Handshakes,
    started: Instant,
) -> anyhow::Result<Arc<LocalNode>> {
    identity.incarnation = store.next_incarnation()?.context("the node's identity is gone")?;
    let layout = Layout::new(identity.network)?;
    Ok(Arc::new(LocalNode { public_key: handshakes.public_key(), layout, identity, started }))
}

/// Opens the ports of handshakes and control connections.
fn open_ports(local: &LocalNode) -> anyhow::Result<Ports> {
    let udp = Arc::new(UdpSockets::bind(overnode_ebpf::wire::DATA_PORT).context(
        "UDP port 6784 cannot be opened: stop what uses it (`ss -lnup` shows it), then launch \
         again",
    )?);
    let live_nodes: LiveNodes = Arc::new(Mutex::default());
    let known = Known::default();
    let (events, mesh_events) = mpsc::channel(1024);
    let mesh = Mesh::listen(
        CONTROL_PORT,
        local.identity.local_identity(),
        live_nodes.clone(),
        known.clone(),
        RENEW_AFTER,
        events,
    )
    .context(
        "TCP port 6783 cannot be opened: stop what uses it (`ss -lntp` shows it), then launch \
         again",
    )?;
    Ok(Ports { udp, mesh, mesh_events, live_nodes, known })
}

async fn open_datapath(options: &Options, local: &LocalNode) -> anyhow::Result<Datapath> {
    let identity = &local.identity;
    Datapath::open(OpenOptions {
        state_dir: &options.state_dir,
        network: identity.network,
        node_id: identity.id,
        node_address: local.address(),
        public_key: local.public_key,
        interface: identity.interface.clone(),
        mtu: identity.mtu,
        debug: options.debug,
        xdp: identity.xdp,
    })
    .await
}

/// Restores the records of all nodes from the store, and the routes that they were granted.
fn restore_records(
    store: &Store,
    local: &LocalNode,
    ipam: &Ipam,
    now: Instant,
) -> anyhow::Result<(Gossip, Routing)> {
    let identity = &local.identity;
    let nickname = identity.nickname.clone();
    let own = Record {
        ranges: ipam.ranges(),
        claims: ipam.claims(),
        ..Record::blank(local.id(), identity.incarnation, nickname, local.public_key)
    };
    let signer = Signer::new(&identity.seed);
    let mut gossip = Gossip::new(own, signer, StdRng::from_os_rng(), now);
    gossip.set_clock(unix_milliseconds(), now);
    let mut routing = Routing::new(local.layout, local.id());
    let stored = store.peers()?;
    gossip.restore(stored.iter().map(|known| (known.record.clone(), known.was_reached)));
    for store::Known { record, standing, .. } in stored {
        if gossip.record(record.id) == Some(&record) {
            routing.restore(&record, standing, now);
        }
    }
    Ok((gossip, routing))
}

fn restore_targets(store: &Store, local: &LocalNode, now: Instant) -> anyhow::Result<Dialer> {
    let mut dialer = Dialer::new(local.id(), local.identity.discovery, StdRng::from_os_rng());
    for host in store.targets()? {
        dialer.add_target(host.as_str(), now);
    }
    Ok(dialer)
}

type Docker = (DockerSide, crate::docker::Incoming);

fn serve_docker(
    options: &Options,
    store: &Store,
    local: &LocalNode,
    now: Instant,
) -> anyhow::Result<Option<Docker>> {
    let sockets = options.docker().filter(|_| local.identity.docker);
    sockets
        .map(|sockets| DockerSide::start(&sockets, store, local, now))
        .transpose()
        .context("the list of Docker networks cannot be read")
}
