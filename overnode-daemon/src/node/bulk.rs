//! Manages the bulk path: starts its workers or takes over those of an earlier daemon, gives them
//! peers and keys, and restarts them when they end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::BULK_PORT;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::data_plane::DataPlane;
use super::local::LocalNode;
use crate::api::{BulkStatus, WorkersStatus};
use crate::bulk::control::{FromWorkers, Keys, Report, SOCKET, ToWorkers, VERSION};
use crate::bulk::ipc::{self, WorkerSockets, WorkersConnection};
use crate::datapath::Clock;
use overnode_api::bulk::{Cipher, Mode};
use overnode_core::control::key;
use overnode_core::handshake::{
    Activity, Event, Handshakes, InheritedSession, PeerConfig, REJECT_AFTER_TIME, SessionKeys,
};
use overnode_types::{InterfaceIndex, NodeId, PeerIndex, PublicKey, Secret};

/// Time limit for a worker process to accept connections, and to report its state.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// A worker process that sends nothing for this long is killed.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long workers take to notice that their devices are gone.
const STRAYS_EXIT_TIME: Duration = Duration::from_millis(500);
/// Minimum and maximum pause before workers that ended are restarted.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// Minimum lifetime of workers after which their end is not treated as a failed start.
const GOOD_LIFETIME: Duration = Duration::from_secs(60);

/// The bulk path of this node.
pub(super) struct BulkPath {
    local: Arc<LocalNode>,
    mode: Mode,
    workers: usize,
    run_dir: PathBuf,
    handshakes: Handshakes,
    link: Option<WorkersConnection>,
    devices: Vec<InterfaceIndex>,
    speeds: [u32; Cipher::ALL.len()],
    started: Instant,
    last_heard: Instant,
    /// When to restart the workers.
    restart_at: Option<Instant>,
    /// Pause before the last restart.
    pause: Duration,
    peers: BTreeMap<PeerIndex, Configured>,
    reports: BTreeMap<PeerIndex, Goodput>,
    drops: BTreeMap<&'static str, u64>,
    /// Why there are no workers.
    pub(super) error: Option<String>,
}

/// A peer as configured in the handshakes and the workers.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Configured {
    public_key: PublicKey,
    endpoint: Option<SocketAddr>,
    rtt_ms: Option<u32>,
}

/// The last report of the workers about a peer, and the data rates up to it.
#[derive(Clone, Copy)]
struct Goodput {
    report: Report,
    at: Instant,
    /// Inner bits per second, sent and received.
    rates: (u64, u64),
}

impl BulkPath {
    pub(super) fn new(local: Arc<LocalNode>, run_dir: &Path, now: Instant) -> Self {
        let identity = &local.identity;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let limit = overnode_ebpf::map::BULK_WORKER_SLOTS as usize;
        Self {
            mode: identity.bulk,
            workers: identity.bulk_workers.map_or(cores / 2, usize::from).clamp(1, limit),
            run_dir: run_dir.to_owned(),
            handshakes: Handshakes::for_bulk(identity.exchange_secret(), StdRng::from_os_rng()),
            link: None,
            devices: Vec::new(),
            speeds: [0; Cipher::ALL.len()],
            started: now,
            last_heard: now,
            restart_at: None,
            pause: Duration::ZERO,
            peers: BTreeMap::new(),
            reports: BTreeMap::new(),
            drops: BTreeMap::new(),
            error: None,
            local,
        }
    }

    /// Returns the next message of the workers, or `None` when they are gone. Waits forever while
    /// there are no workers. Cancel-safe.
    pub(super) async fn next(&self) -> Option<FromWorkers> {
        match &self.link {
            Some(link) => link.next().await.ok().flatten(),
            None => std::future::pending().await,
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let handshakes = self.link.as_ref().and_then(|_| self.handshakes.poll_timeout());
        self.restart_at.into_iter().chain(handshakes).min()
    }

    /// Returns the status of a peer's bulk path.
    pub(super) fn status(&self, peer: PeerIndex, now: Instant) -> Option<BulkStatus> {
        let Goodput { report, rates: (tx, rx), .. } = self.reports.get(&peer)?;
        let last = self.handshakes.peer(peer).and_then(|view| view.last_handshake);
        Some(BulkStatus {
            in_use: report.is_served,
            cipher: report.cipher,
            session_age_seconds: last.map(|last| now.saturating_duration_since(last).as_secs()),
            rx_bytes: report.rx_bytes,
            tx_bytes: report.tx_bytes,
            rx_packets: report.rx_packets,
            tx_packets: report.tx_packets,
            rx_bits_per_second: *rx,
            tx_bits_per_second: *tx,
            silences: report.silences,
        })
    }

    /// Returns the status of the workers.
    pub(super) fn workers_status(&self) -> WorkersStatus {
        let speeds = Cipher::ALL.into_iter().zip(self.speeds).filter(|_| self.link.is_some());
        WorkersStatus {
            mode: self.mode,
            workers: self.devices.len(),
            pid: self.link.as_ref().map(WorkersConnection::pid),
            speeds: speeds.map(|(cipher, speed)| (cipher.name().to_owned(), speed)).collect(),
            drops: self
                .drops
                .iter()
                .map(|(reason, count)| ((*reason).to_owned(), *count))
                .collect(),
            error: self.error.clone(),
        }
    }

    fn send(&self, message: &ToWorkers) {
        let Some(link) = &self.link else { return };
        if let Err(error) = link.tell(message) {
            // A closed connection is noticed elsewhere. Workers that do not read would miss their
            // keys.
            if error.kind() == std::io::ErrorKind::WouldBlock {
                tracing::warn!("the bulk workers do not read their messages: restarting them");
                link.kill();
            }
        }
    }
}

impl BulkPath {
    /// Takes over the workers of an earlier daemon, or starts new ones. Without workers, the eBPF
    /// programs handle all packets. That is logged once.
    pub(super) async fn start(&mut self, data: &mut DataPlane, now: Instant) {
        if self.mode == Mode::Off {
            self.stop().await;
            return data.datapath.bulk_maps().clear();
        }
        if self.adopt_workers(data, now).await {
            return;
        }
        data.datapath.bulk_maps().clear();
        match self.start_workers(data).await {
            Ok(()) => self.error = None,
            Err(error) => {
                let error = format!("no bulk path, the eBPF programs carry all packets: {error:#}");
                if self.error.as_ref() != Some(&error) {
                    tracing::warn!("{error}");
                }
                self.error = Some(error);
                self.restart_later(now);
            }
        }
    }

    async fn adopt_workers(&mut self, data: &mut DataPlane, now: Instant) -> bool {
        let link = match WorkersConnection::connect(&self.run_dir) {
            Ok(Some(link)) => link,
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!("{error:#}");
                return false;
            }
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, collect(&link)).await;
        let Ok(Some((state, sessions))) = answer else {
            tracing::warn!("the bulk workers of an earlier daemon do not answer: killing them");
            link.kill();
            return false;
        };
        let FromWorkers::State { version, program, mode, devices, speeds } = state else {
            return false;
        };
        let is_same =
            version == VERSION && program == env!("CARGO_PKG_VERSION") && mode == self.mode;
        if !is_same || devices.len() != self.workers {
            // The workers still send their queued packets. In the meantime, the eBPF programs carry
            // the flows.
            link.stop().await;
            return false;
        }
        for device in &devices {
            if let Err(error) = data.datapath.adopt_bulk_device(*device).await {
                tracing::warn!("the bulk workers of an earlier daemon cannot be used: {error:#}");
                link.kill();
                return false;
            }
        }
        (self.devices, self.speeds) = (devices, speeds);
        (self.link, self.started, self.last_heard) = (Some(link), now, now);
        self.update_peers(data, now);
        let clock = Clock::now();
        let mut unknown = BTreeSet::new();
        for session in sessions {
            let FromWorkers::Session {
                peer,
                local_index,
                remote_index,
                created_ns,
                is_initiator,
                is_confirmed,
                is_sealing,
            } = session
            else {
                continue;
            };
            if !self.peers.contains_key(&PeerIndex(peer)) {
                unknown.insert(peer);
                continue;
            }
            let session = InheritedSession {
                local_index,
                remote_index,
                initiator: is_initiator,
                confirmed: is_confirmed,
                created: clock.instant(created_ns).unwrap_or(now),
                sealing: is_sealing,
            };
            self.handshakes.adopt(PeerIndex(peer), session, now);
        }
        for peer in unknown {
            self.send(&ToWorkers::RemovePeer { peer });
        }
        self.pump(None);
        tracing::debug!("took over the bulk workers of an earlier daemon");
        true
    }

    async fn start_workers(&mut self, data: &mut DataPlane) -> Result<()> {
        if data.datapath.remove_stray_bulk_devices().await? {
            // The devices belong to workers that no socket leads to any more. Without their
            // devices, the workers exit.
            tokio::time::sleep(STRAYS_EXIT_TIME).await;
        }
        let ports = WorkerSockets::bind(self.workers)?;
        let mut devices = Vec::new();
        for _ in 0..self.workers {
            devices.push(data.datapath.bulk_device().await?);
        }
        let indexes: Vec<_> = devices.iter().map(|device| device.ifindex).collect();
        let maps = data.datapath.bulk_map_fds();
        let mut child =
            ipc::start(&self.run_dir, self.mode, &self.local.public_key, maps, devices, ports)?;
        // Reap the child process whenever it ends.
        std::thread::spawn(move || child.wait());
        let started = Instant::now();
        let link = loop {
            match WorkersConnection::connect(&self.run_dir)? {
                Some(link) => break link,
                None if started.elapsed() > ANSWER_TIMEOUT => {
                    bail!("the bulk worker process does not accept connections")
                }
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        let now = Instant::now();
        (self.link, self.devices) = (Some(link), indexes);
        (self.started, self.last_heard) = (now, now);
        self.peers.clear();
        self.update_peers(data, now);
        self.pump(None);
        Ok(())
    }

    fn restart_later(&mut self, now: Instant) {
        let (first, longest) = BACKOFF;
        let was_good = now.saturating_duration_since(self.started) > GOOD_LIFETIME;
        self.pause = if was_good { first } else { (self.pause * 2).clamp(first, longest) };
        self.restart_at = Some(now + self.pause);
    }

    /// Handles the end of the workers and schedules their restart. Until then, the eBPF programs
    /// hand them nothing.
    fn lose_workers(&mut self, data: &mut DataPlane, now: Instant) {
        self.link = None;
        data.datapath.bulk_maps().clear();
        let devices = std::mem::take(&mut self.devices);
        data.datapath.forget_bulk_devices(&devices);
        let peers: Vec<PeerIndex> = std::mem::take(&mut self.peers).into_keys().collect();
        for peer in peers {
            self.handshakes.remove_peer(peer, now);
        }
        self.pump(None);
        self.reports.clear();
        self.restart_later(now);
        tracing::warn!(
            "the bulk workers are gone: the eBPF programs carry all packets until new ones start"
        );
    }

    /// Handles a message of the workers. `None`: they are gone.
    pub(super) fn handle_message(
        &mut self,
        message: Option<FromWorkers>,
        data: &mut DataPlane,
        now: Instant,
    ) {
        let Some(message) = message else { return self.lose_workers(data, now) };
        self.last_heard = now;
        match message {
            FromWorkers::State { speeds, .. } => self.speeds = speeds,
            FromWorkers::Session { .. } | FromWorkers::Ready => {}
            FromWorkers::Received { from, to, bytes } => {
                self.handshakes.handle_datagram(now, from.into(), &bytes);
                self.pump(to.map(|to| (from, to)));
            }
            FromWorkers::Confirmed { peer, local_index } => {
                self.handshakes.handle_confirmed(PeerIndex(peer), local_index, now);
                self.pump(None);
            }
            FromWorkers::Peers(reports) => {
                for report in reports {
                    self.take_report(report, now);
                }
            }
            FromWorkers::Drops(drops) => {
                let name = |code: u32| Reason::ALL.iter().find(|reason| **reason as u32 == code);
                self.drops = drops
                    .into_iter()
                    .filter_map(|(code, count)| Some((name(code)?.as_str(), count)))
                    .collect();
            }
        }
    }

    fn take_report(&mut self, report: Report, now: Instant) {
        let index = PeerIndex(report.peer);
        let clock = Clock::now();
        let activity = Activity {
            last_data_sent: clock.instant(report.last_data_tx_ns),
            last_sent: clock.instant(report.last_tx_ns),
            last_data_received: clock.instant(report.last_data_rx_ns),
            last_received: clock.instant(report.last_rx_ns),
            endpoint: report.endpoint,
        };
        self.handshakes.handle_activity(index, &activity);
        let rates = self.reports.get(&index).map_or((0, 0), |before| {
            let elapsed = now.saturating_duration_since(before.at).as_secs_f64().max(0.001);
            let rate = |new: u64, old: u64| (new.saturating_sub(old) as f64 * 8.0 / elapsed) as u64;
            (
                rate(report.tx_bytes, before.report.tx_bytes),
                rate(report.rx_bytes, before.report.rx_bytes),
            )
        });
        self.reports.insert(index, Goodput { report, at: now, rates });
    }

    /// Performs what is due. Called once a second and when the handshakes ask for it.
    pub(super) async fn handle_timeout(&mut self, data: &mut DataPlane, now: Instant) {
        if self.restart_at.take_if(|at| *at <= now).is_some() {
            self.start(data, now).await;
        }
        if self.link.is_some() {
            self.handshakes.handle_timeout(now, SystemTime::now());
            self.pump(None);
        }
    }

    /// Passes the peers and their endpoints to the handshakes and the workers. Call this about once
    /// a second.
    pub(super) fn update_peers(&mut self, data: &DataPlane, now: Instant) {
        let Some(link) = &self.link else { return };
        if now > self.last_heard + HEARTBEAT_TIMEOUT {
            tracing::warn!("the bulk workers are silent: restarting them");
            return link.kill();
        }
        let wanted: BTreeMap<NodeId, Configured> = data
            .peers()
            .iter()
            .filter_map(|(index, peer)| {
                let id = index.node()?;
                let endpoint = peer.state.as_ref()?.endpoint;
                let rtt = data.paths.state(id).and_then(|state| state.rtt);
                let configured = Configured {
                    public_key: peer.public_key,
                    endpoint: endpoint.map(|it| SocketAddr::new(it.ip(), BULK_PORT)),
                    rtt_ms: rtt.map(|rtt| rtt.as_millis().min(10_000) as u32 + 1),
                };
                Some((id, configured))
            })
            .collect();
        let gone: Vec<PeerIndex> = self
            .peers
            .iter()
            .filter(|(index, before)| {
                let wanted = index.node().and_then(|id| wanted.get(&id));
                wanted.is_none_or(|peer| peer.public_key != before.public_key)
            })
            .map(|(index, _)| *index)
            .collect();
        for index in gone {
            self.peers.remove(&index);
            self.reports.remove(&index);
            self.handshakes.remove_peer(index, now);
            self.send(&ToWorkers::RemovePeer { peer: index.0 });
        }
        for (id, peer) in wanted {
            let index = id.peer_index();
            if self.peers.get(&index) == Some(&peer) {
                continue;
            }
            self.peers.insert(index, peer);
            let Configured { public_key, endpoint, rtt_ms } = peer;
            self.send(&ToWorkers::Peer { peer: index.0, endpoint, rtt_ms });
            let config = PeerConfig {
                public_key,
                preshared_key: key::bulk_pair_key(
                    self.local.cluster_key(),
                    &self.local.public_key,
                    &public_key,
                ),
                endpoint,
                initiate: self.local.initiative(id),
                persistent_keepalive: None,
            };
            self.handshakes.upsert_peer(index, config, now);
        }
    }

    /// Carries out the decisions of the bulk path's handshakes.
    fn pump(&mut self, answering: Option<(SocketAddr, IpAddr)>) {
        let clock = Clock::now();
        while let Some(event) = self.handshakes.poll_event() {
            match event {
                Event::Install { peer, session } => self.send(&install(peer, &session, clock)),
                Event::Withdraw { local_index, .. } => {
                    self.send(&ToWorkers::Withdraw { local_index })
                }
                Event::SendKeepalive { peer } => self.send(&ToWorkers::Keepalive { peer: peer.0 }),
                // From then on, workers follow the source of each message that they authenticate.
                Event::EndpointChanged { peer, endpoint } => {
                    let rtt_ms = self.peers.get(&peer).and_then(|peer| peer.rtt_ms);
                    self.send(&ToWorkers::Peer { peer: peer.0, endpoint: Some(endpoint), rtt_ms });
                }
                Event::Failed { peer, why } => {
                    tracing::debug!("no bulk session with peer {peer}: {why}")
                }
            }
        }
        while let Some(transmit) = self.handshakes.poll_transmit() {
            // Bulk messages are never relayed.
            let Some(to) = transmit.to.direct() else { continue };
            let from = answering.filter(|(sender, _)| *sender == to).map(|(_, address)| address);
            self.send(&ToWorkers::Send { to, from, bytes: transmit.bytes });
        }
    }

    /// Stops the workers, because the node leaves.
    pub(super) async fn stop(&mut self) {
        let link =
            self.link.take().or_else(|| WorkersConnection::connect(&self.run_dir).ok().flatten());
        if let Some(link) = link {
            link.stop().await;
        }
        let _ = std::fs::remove_file(self.run_dir.join(SOCKET));
    }
}

/// Receives the state and the sessions of a worker process, up to [`FromWorkers::Ready`].
async fn collect(link: &WorkersConnection) -> Option<(FromWorkers, Vec<FromWorkers>)> {
    let state = link.next().await.ok()??;
    let mut sessions = Vec::new();
    loop {
        match link.next().await.ok()?? {
            FromWorkers::Ready => return Some((state, sessions)),
            session @ FromWorkers::Session { .. } => sessions.push(session),
            _ => {}
        }
    }
}

fn install(peer: PeerIndex, session: &SessionKeys, clock: Clock) -> ToWorkers {
    let created_ns = clock.boot_time(session.created);
    let Secret(tx) = &session.tx_key;
    let Secret(rx) = &session.rx_key;
    ToWorkers::Install(Keys {
        peer: peer.0,
        local_index: session.local_index,
        remote_index: session.remote_index,
        tx: *tx,
        rx: *rx,
        created_ns,
        expires_ns: created_ns + REJECT_AFTER_TIME,
        is_initiator: session.initiator,
    })
}
