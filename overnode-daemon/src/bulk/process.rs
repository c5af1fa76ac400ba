//! Runs the workers' process, which holds the devices, the sockets and the keys, and keeps running
//! without a daemon. Its main thread talks to the daemon and decides which peers are served. One
//! thread per worker moves packets.
//!
//! It is a separate process so that flows continue while the daemon is killed, hangs or is
//! upgraded. It exits on its own when no daemon is connected and its last session has expired, or
//! when its devices are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, Backlog, SockFlag, sockopt};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::BULK_PORT;
use quinn_udp::Transmit;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::confine;
use super::control::{FromWorkers, Keys, MAX_REPORTS, ToWorkers, VERSION, receive};
use super::measure;
use super::peer::{Endpoint, Peer};
use super::session::Session;
use super::udp::{Socket, Sockets};
use super::worker::{Command, Handles, Shared, Worker, send_hello};
use crate::datapath::{BulkMaps, ReceiveRing, boot_now};
use overnode_api::bulk::Mode;
use overnode_core::handshake::gate::{Awaited, Gate};
use overnode_types::{BootTime, InterfaceIndex, PeerIndex, PublicKey, SessionIndex};

/// First argument that makes the program run as this process. It takes the place of any option.
pub const ARGUMENT: &str = "bulk-workers";
/// First of the descriptors that the process inherits.
pub const FIRST_FD: RawFd = 3;

/// Name of the process in process lists.
pub const NAME: &str = "overnode-bulk";
/// Interval at which peers are checked while data is sent to any peer.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// Interval at which peers are checked otherwise.
const IDLE_INTERVAL: Duration = Duration::from_millis(200);
/// Interval of the reports about peers to the daemon.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Time that a stopping process keeps handling pending packets.
const DRAIN_TIME: Duration = Duration::from_millis(150);
/// Time after which a process without a daemon and without sessions exits.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of events that wait for the daemon, such as handshake messages. Further ones are
/// dropped.
const MAX_EVENTS: usize = 1024;

/// Settings that the process is started with.
///
/// Descriptors follow from [`FIRST_FD`] on: the listening socket, the maps `BULK_WORKERS`,
/// `BULK_PEERS`, `BULK_RINGS` and `BULK_MESSAGES`, then the device and sockets of each worker,
/// IPv4 first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Cipher to seal with.
    pub mode: Mode,
    /// Public key of this node, which initiators of handshakes must know.
    pub public_key: [u8; 32],
    /// Interface index of each worker's device.
    pub devices: Vec<InterfaceIndex>,
    /// True if there are IPv4 sockets.
    pub has_v4: bool,
    /// True if there are IPv6 sockets.
    pub has_v6: bool,
    /// True if all devices do segmentation offload of UDP (Linux 6.2).
    pub coalesces_udp: bool,
}

/// Runs the process until it exits.
///
/// # Errors
/// Fails if the process was started incorrectly, or if a worker fails.
pub fn run(argument: &str) -> Result<()> {
    let start: Start = serde_json::from_str(argument).context("the settings cannot be parsed")?;
    // SAFETY: the parent passes these descriptors, and nothing else in this process uses them.
    let mut fds = (FIRST_FD..).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let mut take = || fds.next().context("a file descriptor is missing");
    let listener = take()?;
    socket::listen(&listener, Backlog::new(4)?)?;
    let maps = [take()?, take()?, take()?, take()?];
    let [workers, peers, rings, messages] = maps.each_ref().map(OwnedFd::as_fd);
    let maps = BulkMaps::open(workers, peers, rings)?;
    let mut rings =
        ReceiveRing::take_over(rings, messages, start.devices.len() as u32)?.into_iter();
    let mut all = Vec::new();
    let mut sending = Sockets { v4: None, v6: None };
    for worker in 0..start.devices.len() {
        let device = File::from(take()?);
        let mut socket = |is_there: bool, ours: &mut Option<Socket>| -> Result<Option<Socket>> {
            if !is_there {
                return Ok(None);
            }
            let socket = UdpSocket::from(take()?);
            if worker == 0 {
                *ours = Some(Socket::new(socket.try_clone()?)?);
            }
            Ok(Some(Socket::new(socket)?))
        };
        let v4 = socket(start.has_v4, &mut sending.v4)?;
        let v6 = socket(start.has_v6, &mut sending.v6)?;
        let ring = rings.next().context("a receive ring is missing")?;
        all.push(Handles { device, sockets: Sockets { v4, v6 }, ring });
    }
    confine::drop_privileges()?;
    let (events, incoming) = mpsc::sync_channel(MAX_EVENTS);
    let shared = Arc::new(Shared {
        maps,
        mode: start.mode,
        speeds: measure::speeds(),
        workers: start.devices.len() as u32,
        drops: std::array::from_fn(|_| Default::default()),
        events,
        wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        awaited: Awaited::default(),
    });
    let mut threads = Vec::new();
    for (number, handles) in (0_u8..).zip(all) {
        threads.push(Thread::spawn(number, handles, &start, &shared)?);
    }
    confine::install_seccomp()?;
    info!(workers = threads.len(), speeds = ?shared.speeds, "bulk workers started");
    let process = Process {
        start,
        listener,
        daemon: None,
        shared,
        incoming,
        sending,
        threads,
        peers: BTreeMap::new(),
        sessions: BTreeMap::new(),
        confirmed: BTreeSet::new(),
        served: BTreeSet::new(),
        orphaned_since: Instant::now(),
        next_report: Instant::now(),
        is_stopping: false,
    };
    process.run()
}

/// A worker's thread, as seen by the main thread.
struct Thread {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    handle: std::thread::JoinHandle<io::Result<()>>,
}

impl Thread {
    fn spawn(number: u8, handles: Handles, start: &Start, shared: &Arc<Shared>) -> Result<Self> {
        let (commands, received_commands) = mpsc::channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let public_key = PublicKey(start.public_key);
        // The generator is seeded here, before the worker's thread confines itself.
        let gate = Gate::new(&public_key, BULK_PORT, shared.awaited.clone(), StdRng::from_os_rng());
        let worker = Worker::new(
            number,
            handles,
            gate,
            start.coalesces_udp,
            received_commands,
            wake.clone(),
            shared.clone(),
        );
        if let Some(device) = start.devices.get(usize::from(number)) {
            shared.maps.set_worker(number.into(), *device, boot_now());
        }
        let handle =
            std::thread::Builder::new().name(format!("worker {number}")).spawn(move || {
                use_batch_scheduling();
                confine::install_seccomp().map_err(io::Error::other)?;
                worker.run()
            })?;
        Ok(Self { commands, wake, handle })
    }

    fn send_command(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// Sets the scheduling policy of the calling thread to `SCHED_BATCH` (Linux 2.6.16). A busy worker
/// is always runnable. With this policy, a waking worker does not preempt the running thread, which
/// may be a kernel thread or a server of small requests next to a bulk flow. It is an optimization,
/// so errors are ignored.
fn use_batch_scheduling() {
    let priority: libc::c_int = 0;
    // SAFETY: the kernel's `struct sched_param` is one integer, which is read during the call. The
    // call is made by number, because musl's function of that name does nothing.
    unsafe {
        libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_BATCH, &raw const priority)
    };
}

/// State of the main thread.
struct Process {
    start: Start,
    listener: OwnedFd,
    daemon: Option<OwnedFd>,
    shared: Arc<Shared>,
    incoming: mpsc::Receiver<FromWorkers>,
    sending: Sockets,
    threads: Vec<Thread>,
    peers: BTreeMap<u32, Arc<Peer>>,
    /// Sessions by local index.
    sessions: BTreeMap<SessionIndex, Arc<Session>>,
    /// Sessions that the daemon knows to be confirmed by the peer.
    confirmed: BTreeSet<SessionIndex>,
    served: BTreeSet<u32>,
    orphaned_since: Instant,
    next_report: Instant,
    is_stopping: bool,
}

impl Process {
    fn run(mut self) -> Result<()> {
        loop {
            self.wait()?;
            self.accept();
            self.receive_commands();
            let now = boot_now();
            self.update_served_peers(now);
            self.forward_events();
            if self.threads.iter().any(|thread| thread.handle.is_finished()) {
                return self.stop_workers().context("a bulk worker ended");
            }
            if self.is_stopping {
                self.withdraw_from_programs();
                std::thread::sleep(DRAIN_TIME);
                return self.stop_workers();
            }
            let has_sessions = self.sessions.values().any(|session| now < session.expires);
            if self.daemon.is_some() || has_sessions {
                self.orphaned_since = Instant::now();
            } else if self.orphaned_since.elapsed() > ORPHAN_TIMEOUT {
                info!("no daemon and no sessions left: the bulk workers exit");
                self.withdraw_from_programs();
                return self.stop_workers();
            }
        }
    }

    fn wait(&self) -> Result<()> {
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.daemon.as_ref().map(|daemon| PollFd::new(daemon.as_fd(), PollFlags::POLLIN)),
        );
        let now = boot_now();
        let timeout = if self.peers.values().any(|peer| peer.is_busy(now)) {
            BUSY_INTERVAL
        } else {
            IDLE_INTERVAL
        };
        match poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = self.shared.wake.read();
        Ok(())
    }

    /// Accepts a new daemon, which replaces the previous one.
    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let Ok(fd) = socket::accept4(self.listener.as_raw_fd(), flags) else { return };
        // SAFETY: the descriptor was just opened and has no other owner.
        let daemon = unsafe { OwnedFd::from_raw_fd(fd) };
        let is_ours = socket::getsockopt(&daemon, sockopt::PeerCredentials)
            .is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw());
        if !is_ours {
            return warn!("refused a connection from a process of another user");
        }
        self.daemon = Some(daemon);
        // A daemon that lost this process has cleared the maps, and confirmed sessions were only
        // reported to the previous daemon. Both are repeated.
        let now = boot_now();
        for (worker, device) in (0..).zip(&self.start.devices) {
            self.shared.maps.set_worker(worker, *device, now);
        }
        self.served.clear();
        self.confirmed.clear();
        self.send_state();
    }

    fn send_state(&mut self) {
        self.send(&FromWorkers::State {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            mode: self.start.mode,
            devices: self.start.devices.clone(),
            speeds: self.shared.speeds,
        });
        let now = boot_now();
        let sessions: Vec<_> =
            self.sessions.values().filter(|session| now < session.expires).cloned().collect();
        for session in sessions {
            let sealing = self.peers.get(&session.peer.0).and_then(|peer| peer.current.load_full());
            self.send(&FromWorkers::Session {
                peer: session.peer.0,
                local_index: session.local_index,
                remote_index: session.remote_index,
                created_ns: session.created,
                is_initiator: session.is_initiator,
                is_confirmed: session.is_confirmed(),
                is_sealing: sealing
                    .is_some_and(|sealing| sealing.local_index == session.local_index),
            });
        }
        self.send(&FromWorkers::Ready);
    }

    /// Handles all pending messages from the daemon.
    fn receive_commands(&mut self) {
        while let Some(daemon) = &self.daemon {
            match receive::<ToWorkers>(daemon) {
                Ok(Some(message)) => self.handle_command(message),
                Ok(None) => self.daemon = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    warn!(%error, "a message from the daemon cannot be read");
                    self.daemon = None;
                }
            }
        }
    }

    fn handle_command(&mut self, message: ToWorkers) {
        match message {
            ToWorkers::Peer { peer: index, endpoint, rtt_ms } => {
                let peer = match self.peers.get(&index) {
                    Some(peer) => peer.clone(),
                    None => {
                        let peer = Arc::new(Peer::new(PeerIndex(index)));
                        self.peers.insert(index, peer.clone());
                        self.broadcast(|| Command::Peer(peer.clone()));
                        peer
                    }
                };
                if let Some(rtt_ms) = rtt_ms {
                    peer.set_rtt(rtt_ms);
                }
                // The endpoint of a peer with a session follows the source of its messages.
                if peer.current.load().is_none() || peer.endpoint.load().is_none() {
                    peer.endpoint
                        .store(endpoint.map(|remote| Arc::new(Endpoint { remote, local: None })));
                }
            }
            ToWorkers::RemovePeer { peer } => {
                self.peers.remove(&peer);
                self.served.remove(&peer);
                self.sessions.retain(|_, session| session.peer.0 != peer);
                self.shared.maps.serve(peer, 0);
                self.broadcast(|| Command::RemovePeer(PeerIndex(peer)));
            }
            ToWorkers::Install(keys) => self.install(keys),
            ToWorkers::Withdraw { local_index } => {
                self.broadcast(|| Command::Withdraw(local_index));
                self.confirmed.remove(&local_index);
                let Some(session) = self.sessions.remove(&local_index) else { return };
                if let Some(peer) = self.peers.get(&session.peer.0) {
                    let is_current = peer
                        .current
                        .load()
                        .as_ref()
                        .is_some_and(|current| current.local_index == local_index);
                    if is_current {
                        let sessions = self.sessions.values();
                        let others = sessions
                            .filter(|other| other.peer == peer.index && other.is_confirmed());
                        match others.max_by_key(|other| other.created) {
                            Some(newest) => peer.current.store(Some(newest.clone())),
                            None => peer.forget(),
                        }
                    }
                }
            }
            ToWorkers::Keepalive { peer } => {
                if let Some(peer) = self.peers.get(&peer)
                    && let Err(reason) =
                        send_hello(&self.shared, &self.sending, 0, peer, true, boot_now())
                {
                    self.shared.count_drop(reason);
                }
            }
            ToWorkers::Send { to, from, bytes } => {
                self.shared.awaited.note(&bytes);
                let transmit = Transmit {
                    destination: to,
                    ecn: None,
                    contents: &bytes,
                    segment_size: None,
                    src_ip: from,
                };
                if self.sending.send(&transmit).is_err() {
                    self.shared.count_drop(Reason::NoRoute);
                }
            }
            ToWorkers::Stop => self.is_stopping = true,
        }
    }

    fn install(&mut self, keys: Keys) {
        let Some(peer) = self.peers.get(&keys.peer).cloned() else { return };
        let session = Arc::new(Session::new(&keys));
        self.sessions.insert(keys.local_index, session.clone());
        // Workers come first, because an answer may arrive at once.
        self.broadcast(|| Command::Session(session.clone()));
        if session.is_initiator {
            peer.current.store(Some(session));
        }
    }

    fn broadcast(&self, command: impl Fn() -> Command) {
        for thread in &self.threads {
            thread.send_command(command());
        }
    }

    /// Updates in the maps which peers are served, and sends a hello to peers that could be.
    fn update_served_peers(&mut self, now: BootTime) {
        for (index, peer) in &self.peers {
            if peer.update_served(now) {
                if self.served.insert(*index) {
                    self.shared.maps.serve(*index, self.shared.workers);
                }
            } else if self.served.remove(index) {
                self.shared.maps.serve(*index, 0);
            }
            if peer.should_send_hello(now)
                && let Err(reason) = send_hello(&self.shared, &self.sending, 0, peer, true, now)
            {
                self.shared.count_drop(reason);
                // Do not retry at once.
                peer.record_hello_sent(now);
            }
        }
    }

    /// Sends events, confirmed sessions and periodic reports to the daemon.
    fn forward_events(&mut self) {
        while let Ok(event) = self.incoming.try_recv() {
            self.send(&event);
        }
        let confirmed: Vec<_> = self
            .sessions
            .values()
            .filter(|session| {
                !session.is_initiator
                    && session.is_confirmed()
                    && !self.confirmed.contains(&session.local_index)
            })
            .map(|session| (session.peer.0, session.local_index))
            .collect();
        for (peer, local_index) in confirmed {
            if self.send(&FromWorkers::Confirmed { peer, local_index }) {
                self.confirmed.insert(local_index);
            }
        }
        if self.next_report > Instant::now() {
            return;
        }
        self.next_report = Instant::now() + REPORT_INTERVAL;
        let reports: Vec<_> = self
            .peers
            .values()
            .map(|peer| peer.report(self.shared.mode, self.shared.speeds))
            .collect();
        for some in reports.chunks(MAX_REPORTS) {
            self.send(&FromWorkers::Peers(some.to_vec()));
        }
        let drops =
            self.shared.drops.iter().map(|count| count.load(std::sync::atomic::Ordering::Relaxed));
        let drops: Vec<_> = (0..).zip(drops).filter(|(_, count)| *count != 0).collect();
        self.send(&FromWorkers::Drops(drops));
    }

    /// Sends a message to the daemon. Returns true on success.
    fn send(&mut self, message: &FromWorkers) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| super::control::send(daemon, message).is_ok())
    }

    /// Stops the programs from passing packets to these workers.
    fn withdraw_from_programs(&self) {
        for index in self.peers.keys() {
            self.shared.maps.serve(*index, 0);
        }
        for (worker, device) in (0..).zip(&self.start.devices) {
            self.shared.maps.clear_worker(worker, *device);
        }
    }

    fn stop_workers(self) -> Result<()> {
        self.withdraw_from_programs();
        self.broadcast(|| Command::Stop);
        let mut result = Ok(());
        for thread in self.threads {
            match thread.handle.join() {
                Ok(ended) => result = result.and(ended.map_err(anyhow::Error::from)),
                Err(_) => result = result.and(Err(anyhow::anyhow!("a bulk worker panicked"))),
            }
        }
        result
    }
}
