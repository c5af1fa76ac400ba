//! Runs control connections: listens, dials, and runs two tasks per connection. It does not
//! interpret the messages of gossip.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv6V6Only, TcpMaxSeg};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

use super::admission::{Admission, Limits, Slot};
use super::known::Known;
use super::session::{self, ConnectOptions, Reader, Writer};
use overnode_core::control::dial::{AttemptId, DialTarget};
use overnode_core::control::frame::MAX_MESSAGE;
use overnode_core::control::hello::{Hello, LocalIdentity, Refusal};
use overnode_core::control::packet::Packet;
use overnode_core::control::renewal::Role;
use overnode_types::{NodeId, PublicKey};

/// Time limit of a connection attempt to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of name resolution.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum TCP segment size of a control connection, in bytes: an IPv6 packet of the minimum MTU
/// (1280) without the headers of IPv6 and TCP. The path MTU is not probed, and a router that
/// silently drops larger packets must not separate two nodes.
const MAX_SEGMENT: u32 = 1220;
/// Maximum number of addresses of one destination that are tried in one attempt.
const MAX_TRIES: usize = 8;
/// Interval of pings.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Limits of incoming connections from addresses where nodes are expected, until they have proven
/// to have the token. A process that shares a node's address competes with the node: it loses a
/// slot to each later connection, so the node needs it only for the time of its own handshake.
const FROM_NODES: Limits =
    Limits { connections: 512, of_source: 128, interval: Duration::from_millis(1), burst: 256 };
/// Limits of incoming connections from other addresses, likewise. Several nodes may share one
/// address behind a NAT.
const FROM_UNKNOWN: Limits =
    Limits { connections: 256, of_source: 64, interval: Duration::from_millis(100), burst: 64 };
/// Maximum number of connections that the kernel queues until they are accepted: about 0.2 s of
/// them at 5000 per second.
const BACKLOG: u32 = 1024;
/// Minimum interval between handshakes computed for connections of one group: from addresses where
/// nodes are expected, and from others. A handshake costs up to 0.5 ms. Even with all slots taken,
/// a connection waits about a second for its turn.
const TURN_INTERVAL: Duration = Duration::from_millis(2);
/// Maximum number of refused connections queued for the node.
const MAX_REFUSED: usize = 64;
/// Maximum number of message bytes queued for the node from one connection. Beyond that, the
/// connection is not read.
const MAX_QUEUED_BYTES_OF_ONE: usize = 2 * MAX_MESSAGE;
/// Maximum number of message bytes queued for the node from all connections.
const MAX_QUEUED_BYTES: usize = 32 * MAX_MESSAGE;
/// Maximum number of messages queued for a slow peer before its connection is closed.
const OUTBOX_LEN: usize = 256;

/// ID of a connection, unique within one run of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub(crate) u64);

/// An event of the control connections.
#[derive(Debug)]
pub enum MeshEvent {
    /// A connection is established: both ends have proven to have the token.
    Opened(Box<Opened>),
    /// A gossip message arrived.
    Received(StreamId, QueuedMessage),
    /// A routed message arrived, for this node or to be forwarded.
    RoutedMessage(StreamId, QueuedMessage),
    /// A round trip was measured.
    RoundTrip(StreamId, Duration),
    /// A connection ended.
    Closed(StreamId, Refusal),
    /// A name was resolved to these addresses.
    Resolved(AttemptId, Vec<SocketAddr>),
    /// An attempt did not lead to a connection.
    DialFailed(AttemptId, DialFailure),
    /// An incoming connection was refused.
    Refused {
        /// The address that it came from.
        remote: SocketAddr,
        /// The reason.
        refusal: Refusal,
    },
}

/// A message queued for the node. It occupies queue space until it is dropped.
#[derive(Debug)]
pub struct QueuedMessage {
    bytes: Vec<u8>,
    _queue_space: [OwnedSemaphorePermit; 2],
}

#[cfg(test)]
impl QueuedMessage {
    /// Returns a message that occupies no space.
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let permit = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Self { bytes, _queue_space: [permit(), permit()] }
    }
}

impl Deref for QueuedMessage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Why dialing did not lead to a connection. The messages are for operators.
#[derive(Debug, thiserror::Error)]
pub enum DialFailure {
    /// The name currently has no address.
    #[error("the name {0} does not resolve; it is retried until you run `overnode forget {0}`")]
    Unresolved(String),
    /// TCP did not connect.
    #[error("{0}: {1}; check that a node runs there and that TCP port 6783 is open")]
    Unreachable(SocketAddr, String),
    /// TCP connected, then one of the two sides refused the other.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// An established connection.
#[derive(Debug)]
pub struct Opened {
    /// Its number in later events.
    pub id: StreamId,
    /// The attempt that led to it. `None` if the other side dialed.
    pub attempt: Option<AttemptId>,
    /// The address at the other end.
    pub remote: SocketAddr,
    /// The address at this end.
    pub local: SocketAddr,
    /// The greeting of the node at the other end.
    pub hello: Hello,
    /// The control protocol version that both sides support.
    pub version: u16,
    /// Takes messages for the node at the other end.
    pub outbox: Outbox,
}

/// Queues messages on a connection without ever waiting. Dropping it closes the connection.
#[derive(Debug)]
pub struct Outbox(mpsc::Sender<Vec<u8>>);

impl Outbox {
    /// Queues a message. Returns false if the peer is too slow or gone. The caller should then drop
    /// the connection.
    pub fn send(&self, message: &Packet) -> bool {
        self.0.try_send(message.encode()).is_ok()
    }

    /// Returns an outbox and the queue that its messages end in.
    #[cfg(test)]
    pub(crate) fn pair(length: usize) -> (Self, mpsc::Receiver<Vec<u8>>) {
        let (outbox, queue) = mpsc::channel(length);
        (Self(outbox), queue)
    }
}

/// Public key and nickname of each ID, as far as this node knows of live nodes. Peers that claim
/// otherwise are refused.
pub type LiveNodes = Arc<Mutex<BTreeMap<NodeId, (PublicKey, String)>>>;

/// All control connections of this node. Dropping it ends them.
pub struct Mesh {
    shared: Shared,
    tasks: JoinSet<()>,
    refused: mpsc::Receiver<MeshEvent>,
}

#[derive(Clone)]
struct Shared {
    me: Arc<LocalIdentity>,
    live_nodes: LiveNodes,
    known: Known,
    renew_after: Duration,
    port: u16,
    events: mpsc::Sender<MeshEvent>,
    refused: mpsc::Sender<MeshEvent>,
    node_turns: Arc<Semaphore>,
    unknown_turns: Arc<Semaphore>,
    /// Remaining share of [`MAX_QUEUED_BYTES`].
    queue_space: Arc<Semaphore>,
    next: Arc<AtomicU64>,
}

impl Shared {
    fn admit(&self, peer: &Hello) -> Result<(), Refusal> {
        let live_nodes = self.live_nodes.lock().unwrap_or_else(PoisonError::into_inner);
        match live_nodes.get(&peer.id) {
            Some((public_key, nickname)) if *public_key != peer.public_key => {
                Err(Refusal::IdClash {
                    id: peer.id,
                    holder: nickname.clone(),
                    newcomer: peer.nickname.clone(),
                })
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl Mesh {
    /// Listens on `port`, for IPv6 and IPv4, and reports to `events`. Incoming connections from
    /// `known` addresses have separate slots. Connections get new keys when their keys are
    /// `renew_after` old.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn listen(
        port: u16,
        me: LocalIdentity,
        live_nodes: LiveNodes,
        known: Known,
        renew_after: Duration,
        events: mpsc::Sender<MeshEvent>,
    ) -> io::Result<Self> {
        let (refused, refusals) = mpsc::channel(MAX_REFUSED);
        let shared = Shared {
            me: Arc::new(me),
            live_nodes,
            known,
            renew_after,
            port,
            events,
            refused,
            node_turns: Arc::new(Semaphore::new(1)),
            unknown_turns: Arc::new(Semaphore::new(1)),
            queue_space: Arc::new(Semaphore::new(MAX_QUEUED_BYTES)),
            next: Arc::default(),
        };
        let mut tasks = JoinSet::new();
        for listener in listeners(port)? {
            tasks.spawn(accept(listener, shared.clone()));
        }
        Ok(Self { shared, tasks, refused: refusals })
    }

    /// Returns the next incoming connection that was refused. If there are too many, the newest are
    /// not reported. Cancel-safe.
    pub async fn refused(&mut self) -> Option<MeshEvent> {
        self.refused.recv().await
    }

    /// Makes one attempt. Reports the outcome as an event.
    pub fn dial(&mut self, attempt: AttemptId, target: DialTarget) {
        while self.tasks.try_join_next().is_some() {}
        let shared = self.shared.clone();
        self.tasks.spawn(async move {
            let failure = match try_dial(&shared, attempt, target).await {
                Ok((ends, link)) => return run(shared, Some(attempt), ends, link).await,
                Err(failure) => failure,
            };
            let _ = shared.events.send(MeshEvent::DialFailed(attempt, failure)).await;
        });
    }
}

fn listeners(port: u16) -> io::Result<Vec<TcpListener>> {
    let v4 = TcpSocket::new_v4()?;
    v4.set_reuseaddr(true)?;
    // Accepted sockets inherit the option.
    setsockopt(&v4, TcpMaxSeg, &MAX_SEGMENT)?;
    v4.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let mut listeners = vec![v4.listen(BACKLOG)?];
    // IPv6 may be disabled on the host.
    if let Ok(v6) = v6_socket(port) {
        listeners.push(v6.listen(BACKLOG)?);
    }
    Ok(listeners)
}

fn v6_socket(port: u16) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v6()?;
    setsockopt(&socket, Ipv6V6Only, &true)?;
    setsockopt(&socket, TcpMaxSeg, &MAX_SEGMENT)?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    Ok(socket)
}

async fn accept(listener: TcpListener, shared: Shared) {
    let mut tasks = JoinSet::new();
    let [mut nodes, mut unknown] =
        [FROM_NODES, FROM_UNKNOWN].map(|limits| Admission::new(limits, StdRng::from_os_rng()));
    loop {
        while tasks.try_join_next().is_some() {}
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("accepting a control connection failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let ip = canonical(remote).ip();
        let is_known = shared.known.has(ip);
        let admission = if is_known { &mut nodes } else { &mut unknown };
        let Some(slot) = admission.admit(ip, std::time::Instant::now()) else {
            // Leave no state of the connection, not even in the kernel.
            let _ = stream.set_zero_linger();
            continue;
        };
        tasks.spawn(handle_incoming(shared.clone(), stream, remote, slot, is_known));
    }
}

async fn handle_incoming(
    shared: Shared,
    stream: TcpStream,
    remote: SocketAddr,
    mut slot: Slot,
    is_known: bool,
) {
    let accepted = tokio::select! {
        accepted = accept_handshake(&shared, stream, remote, is_known) => accepted,
        () = slot.is_lost() => None,
    };
    drop(slot);
    if let Some((ends, link)) = accepted {
        run(shared, None, ends, link).await;
    }
}

/// Runs the handshake of an incoming connection. A refused connection keeps its slot until it has
/// been sent the refusal.
async fn accept_handshake(
    shared: &Shared,
    stream: TcpStream,
    remote: SocketAddr,
    is_known: bool,
) -> Option<(Ends, Link)> {
    let turn = async {
        let turns = if is_known { &shared.node_turns } else { &shared.unknown_turns };
        if let Ok(turn) = turns.acquire().await {
            tokio::time::sleep(TURN_INTERVAL).await;
            drop(turn);
        }
    };
    match handshake(shared, stream, Role::Responder, turn).await {
        Ok(link) => Some(link),
        Err(refusal) => {
            let remote = canonical(remote);
            // Unauthenticated hosts can cause any number of refusals. Those that do not fit the
            // queue are not reported.
            let _ = shared.refused.try_send(MeshEvent::Refused { remote, refusal });
            None
        }
    }
}

/// The addresses of both ends.
struct Ends {
    remote: SocketAddr,
    local: SocketAddr,
}

type Link = session::Link<TcpStream>;

/// Returns the addresses in the order in which to try them. The families alternate, so that a
/// family without connectivity costs little time.
fn interleaved(addresses: BTreeSet<SocketAddr>) -> Vec<SocketAddr> {
    let (v4, v6): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv4);
    let longer = v4.len().max(v6.len());
    let turn = |at: usize| [v6.get(at), v4.get(at)].into_iter().flatten().copied();
    (0..longer).flat_map(turn).take(MAX_TRIES).collect()
}

async fn try_dial(
    shared: &Shared,
    attempt: AttemptId,
    target: DialTarget,
) -> Result<(Ends, Link), DialFailure> {
    let (addresses, mut last) = match target {
        DialTarget::Name(name) => {
            let addresses = resolve(&name, shared.port).await;
            let _ = shared.events.send(MeshEvent::Resolved(attempt, addresses.clone())).await;
            (addresses, DialFailure::Unresolved(name))
        }
        DialTarget::Addresses(id, addresses) => {
            (addresses, DialFailure::Unresolved(format!("node {id}")))
        }
    };
    for address in addresses {
        let stream = match timeout(CONNECT_TIMEOUT, dial_address(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                last = DialFailure::Unreachable(address, error.to_string());
                continue;
            }
            Err(_) => {
                last = DialFailure::Unreachable(address, "no answer".to_owned());
                continue;
            }
        };
        match handshake(shared, stream, Role::Initiator, std::future::ready(())).await {
            Ok(link) => return Ok(link),
            Err(refusal) => last = refusal.into(),
        }
    }
    Err(last)
}

async fn dial_address(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    setsockopt(&socket, TcpMaxSeg, &MAX_SEGMENT)?;
    socket.connect(address).await
}

async fn resolve(name: &str, port: u16) -> Vec<SocketAddr> {
    if let Ok(address) = name.parse::<SocketAddr>() {
        return vec![address];
    }
    if let Ok(address) = name.parse::<IpAddr>() {
        return vec![(address, port).into()];
    }
    let Ok(Ok(found)) = timeout(RESOLVE_TIMEOUT, lookup_host((name, port))).await else {
        return Vec::new();
    };
    interleaved(found.collect())
}

async fn handshake(
    shared: &Shared,
    stream: TcpStream,
    role: Role,
    turn: impl Future<Output = ()>,
) -> Result<(Ends, Link), Refusal> {
    stream.set_nodelay(true)?;
    let ends =
        Ends { remote: canonical(stream.peer_addr()?), local: canonical(stream.local_addr()?) };
    let options = ConnectOptions { renew_after: shared.renew_after, turn };
    let link =
        session::connect(stream, role, &shared.me, options, |peer| shared.admit(peer)).await?;
    Ok((ends, link))
}

/// Returns IPv4-mapped addresses as IPv4 addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

async fn run(shared: Shared, attempt: Option<AttemptId>, ends: Ends, link: Link) {
    let id = StreamId(shared.next.fetch_add(1, Ordering::Relaxed));
    let (outbox, queue) = mpsc::channel(OUTBOX_LEN);
    let pong_outbox = outbox.downgrade();
    let opened = Opened {
        id,
        attempt,
        remote: ends.remote,
        local: ends.local,
        hello: link.peer,
        version: link.version,
        outbox: Outbox(outbox),
    };
    if shared.events.send(MeshEvent::Opened(Box::new(opened))).await.is_err() {
        return;
    }
    let opened_at = Instant::now();
    let why = tokio::select! {
        why = read(id, link.reader, &shared, pong_outbox, opened_at) => why,
        why = write(link.writer, queue, opened_at) => why,
    };
    let _ = shared.events.send(MeshEvent::Closed(id, why)).await;
}

async fn read(
    id: StreamId,
    mut reader: Reader<TcpStream>,
    shared: &Shared,
    pong_outbox: mpsc::WeakSender<Vec<u8>>,
    opened_at: Instant,
) -> Refusal {
    let own_queue_space = Arc::new(Semaphore::new(MAX_QUEUED_BYTES_OF_ONE));
    let queue_message = async |bytes: Vec<u8>| -> Option<QueuedMessage> {
        let length = u32::try_from(bytes.len()).ok()?;
        let own = Arc::clone(&own_queue_space).acquire_many_owned(length).await.ok()?;
        let of_all = Arc::clone(&shared.queue_space).acquire_many_owned(length).await.ok()?;
        Some(QueuedMessage { bytes, _queue_space: [own, of_all] })
    };
    loop {
        let message = match reader.receive().await {
            Ok(message) => message,
            Err(refusal) => return refusal,
        };
        let event = match Packet::decode(&message) {
            Ok(Packet::Gossip(bytes)) => match queue_message(bytes).await {
                Some(queued) => MeshEvent::Received(id, queued),
                None => return Refusal::Closed,
            },
            Ok(Packet::RoutedMessage(bytes)) => match queue_message(bytes).await {
                Some(queued) => MeshEvent::RoutedMessage(id, queued),
                None => return Refusal::Closed,
            },
            Ok(Packet::Ping(number)) => {
                // If the queue is full, the answer is lost. The peer pings again.
                if let Some(outbox) = pong_outbox.upgrade() {
                    let _ = outbox.try_send(Packet::Pong(number).encode());
                }
                continue;
            }
            Ok(Packet::Pong(sent)) => {
                let Some(rtt) = opened_at.elapsed().checked_sub(Duration::from_micros(sent)) else {
                    return Refusal::Misconduct(
                        "the answer to a ping that was never sent".to_owned(),
                    );
                };
                MeshEvent::RoundTrip(id, rtt)
            }
            Err(bad) => return Refusal::Misconduct(bad.to_string()),
        };
        if shared.events.send(event).await.is_err() {
            return Refusal::Closed;
        }
    }
}

async fn write(
    mut writer: Writer<TcpStream>,
    mut queue: mpsc::Receiver<Vec<u8>>,
    opened_at: Instant,
) -> Refusal {
    let mut heartbeat = interval(PING_INTERVAL);
    loop {
        let frame = tokio::select! {
            frame = queue.recv() => match frame {
                Some(frame) => frame,
                None => return Refusal::Closed,
            },
            _ = heartbeat.tick() => {
                let micros = u64::try_from(opened_at.elapsed().as_micros()).unwrap_or(u64::MAX);
                Packet::Ping(micros).encode()
            }
            due = writer.due() => {
                if let Err(refusal) = writer.renew(due).await {
                    return refusal;
                }
                continue;
            }
        };
        if let Err(refusal) = writer.send(&frame).await {
            return refusal;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use overnode_core::control::key;
    use overnode_core::control::renewal::RENEW_AFTER;
    use overnode_types::{Network, Secret};

    fn me(id: u16, secret: u8) -> LocalIdentity {
        let seed = Secret([secret; 32]);
        let static_secret = key::exchange_secret(&seed);
        let hello = Hello {
            versions: (2, 2),
            id: NodeId::new(id).unwrap(),
            incarnation: 1,
            nickname: format!("node{id}"),
            network: Network::default(),
            verifying_key: key::verifying_key(&seed),
            process: id.into(),
            public_key: key::public_key(&static_secret),
        };
        LocalIdentity {
            static_secret,
            cluster_key: key::cluster_key("a token of some length").unwrap(),
            hello,
        }
    }

    fn shared(
        me: LocalIdentity,
        events: mpsc::Sender<MeshEvent>,
    ) -> (Shared, mpsc::Receiver<MeshEvent>) {
        let (refused, refusals) = mpsc::channel(MAX_REFUSED);
        let shared = Shared {
            me: Arc::new(me),
            live_nodes: LiveNodes::default(),
            known: Known::default(),
            renew_after: RENEW_AFTER,
            port: 0,
            events,
            refused,
            node_turns: Arc::new(Semaphore::new(1)),
            unknown_turns: Arc::new(Semaphore::new(1)),
            queue_space: Arc::new(Semaphore::new(MAX_QUEUED_BYTES)),
            next: Arc::default(),
        };
        (shared, refusals)
    }

    async fn call_from(source: [u8; 4], address: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        socket.connect(address).await
    }

    /// A slow network path is simulated by the delay that `slowly` adds to each read.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn five_flooding_sources_do_not_lock_out_a_slow_node() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (events, mut received) = mpsc::channel(16);
        let (shared, _refusals) = shared(me(1, 1), events);
        let accepting = tokio::spawn(accept(listener, shared));
        let mut attackers = JoinSet::new();
        for last in 2..7_u8 {
            attackers.spawn(async move {
                let mut calls = std::collections::VecDeque::new();
                loop {
                    calls.extend(call_from([127, 0, 1, last], address).await);
                    if calls.len() > 200 {
                        calls.pop_front();
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (near, far) = tokio::io::duplex(1 << 16);
        let stream = call_from([127, 0, 0, 9], address).await.unwrap();
        tokio::spawn(slowly(far, stream, Duration::from_millis(500)));
        let me = me(2, 2);
        let begun = Instant::now();
        let met =
            session::connect(near, Role::Initiator, &me, ConnectOptions::default(), |_| Ok(()))
                .await;
        assert!(met.is_ok(), "{met:?} after {:?}", begun.elapsed());
        let event = received.recv().await.unwrap();
        assert!(
            matches!(&event, MeshEvent::Opened(opened) if opened.hello.id.get() == 2),
            "{event:?}"
        );
        accepting.abort();
    }

    /// Carries bytes between two streams. Delays each chunk by `delay`.
    async fn slowly(one: tokio::io::DuplexStream, other: TcpStream, delay: Duration) {
        let (mut one_read, mut one_write) = tokio::io::split(one);
        let (mut other_read, mut other_write) = other.into_split();
        tokio::join!(
            carry(&mut one_read, &mut other_write, delay),
            carry(&mut other_read, &mut one_write, delay)
        );
    }

    async fn carry(
        from: &mut (impl AsyncReadExt + Unpin),
        to: &mut (impl AsyncWriteExt + Unpin),
        delay: Duration,
    ) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            tokio::time::sleep(delay).await;
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    #[tokio::test]
    async fn refused_remotes_cannot_fill_the_event_queue() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (events, mut received) = mpsc::channel(1);
        let (shared, mut refusals) = shared(me(1, 1), events);
        let accepting = tokio::spawn(accept(listener, shared));
        let mut calls = Vec::new();
        for source in 0..2 * MAX_REFUSED {
            let mut call = call_from([127, 0, 2, source as u8], address).await.unwrap();
            call.write_all(&[0xff; 64]).await.unwrap();
            calls.push(call);
        }
        for mut call in calls {
            // The other end closes it in any case.
            let _ = call.read(&mut [0; 1]).await;
        }
        let mut noted = 0;
        while refusals.try_recv().is_ok() {
            noted += 1;
        }
        assert_eq!(noted, MAX_REFUSED);
        assert!(received.try_recv().is_err(), "refusals must not use the event queue of nodes");
        accepting.abort();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_rekeys_repeatedly_without_losing_messages() {
        const EVERY: Duration = Duration::from_millis(400);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (at_one, mut to_one) = mpsc::channel(64);
        let (at_two, mut to_two) = mpsc::channel(64);
        let (one, _refused) = shared(me(1, 1), at_one);
        let (two, _refused) = shared(me(2, 2), at_two);
        let accepting = tokio::spawn(accept(listener, Shared { renew_after: EVERY, ..one }));
        let two = Shared { renew_after: EVERY, ..two };
        let stream = TcpStream::connect(address).await.unwrap();
        let (ends, link) =
            handshake(&two, stream, Role::Initiator, std::future::ready(())).await.unwrap();
        tokio::spawn(run(two, None, ends, link));
        let end = Instant::now() + EVERY * 10;
        // Keep both ends open until both are done.
        let ((a, _one), (b, _two)) = tokio::join!(talk(&mut to_one, end), talk(&mut to_two, end));
        // Keys expire at twice the interval and would end the connection.
        assert!(a > 100 && b > 100, "{a} and {b} messages arrived");
        accepting.abort();
    }

    /// Sends numbered messages, some of several frames, and checks those that the other end sends.
    async fn talk(events: &mut mpsc::Receiver<MeshEvent>, end: Instant) -> (u32, Box<Opened>) {
        let Some(MeshEvent::Opened(opened)) = events.recv().await else { panic!("no connection") };
        let (mut sent, mut next) = (0_u32, 0_u32);
        let mut pause = interval(Duration::from_millis(5));
        while Instant::now() < end {
            tokio::select! {
                _ = pause.tick() => {
                    let length = if sent.is_multiple_of(16) { 100_000 } else { 100 };
                    let bytes = [&sent.to_le_bytes()[..], &vec![7; length]].concat();
                    assert!(opened.outbox.send(&Packet::Gossip(bytes)), "the connection is gone");
                    sent += 1;
                }
                event = events.recv() => match event.expect("the mesh should still run") {
                    MeshEvent::Received(_, bytes) => {
                        assert_eq!(bytes[..4], next.to_le_bytes());
                        next += 1;
                    }
                    MeshEvent::RoundTrip(..) => {}
                    other => panic!("{other:?} after {next} messages"),
                },
            }
        }
        (next, opened)
    }

    #[tokio::test]
    async fn a_flooding_member_cannot_fill_the_memory_of_a_busy_node() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // No task takes the events.
        let (events, received) = mpsc::channel(1024);
        let (one, _refused) = shared(me(1, 1), events);
        let accepting = tokio::spawn(accept(listener, one));
        let stream = TcpStream::connect(address).await.unwrap();
        let options = ConnectOptions::default();
        let me = me(2, 2);
        let link =
            session::connect(stream, Role::Initiator, &me, options, |_| Ok(())).await.unwrap();
        let mut writer = link.writer;
        let message = Packet::Gossip(vec![7; MAX_MESSAGE - 1]).encode();
        let mut sent = 0;
        while let Ok(Ok(())) = timeout(Duration::from_secs(1), writer.send(&message)).await {
            sent += 1;
            assert!(sent < 100, "the node reads without limit");
        }
        // One `Opened` event and the messages that may wait. The rest is in the kernel's buffers.
        assert_eq!(received.len(), 1 + MAX_QUEUED_BYTES_OF_ONE / MAX_MESSAGE);
        accepting.abort();
    }

    #[test]
    fn address_families_take_turns() {
        let interleaved = |addresses: &[&str]| {
            let addresses =
                addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 1)).collect();
            interleaved(addresses).iter().map(|it| it.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            interleaved(&["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"]),
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]
        );
        assert_eq!(
            interleaved(&["2001:db8::1", "2001:db8::2", "192.0.2.1"]),
            ["2001:db8::1", "192.0.2.1", "2001:db8::2"]
        );
        assert_eq!(interleaved(&[]), [""; 0]);
        let many: Vec<String> = (1..100).map(|n| format!("192.0.2.{n}")).collect();
        assert_eq!(
            interleaved(&many.iter().map(String::as_str).collect::<Vec<_>>()).len(),
            MAX_TRIES
        );
    }

    #[tokio::test]
    async fn unknown_names_give_no_address_and_literals_themselves() {
        assert_eq!(resolve("nowhere.invalid", 6783).await, []);
        assert_eq!(resolve("2001:db8::1", 6783).await, ["[2001:db8::1]:6783".parse().unwrap()]);
        assert_eq!(resolve("192.0.2.1", 6783).await, ["192.0.2.1:6783".parse().unwrap()]);
    }
}
