//! Control connections: listening, dialling, and two tasks for each connection. What is said on them is decided elsewhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv6V6Only, TcpMaxSeg};
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

use crate::control::dial::{AttemptId, Place};
use crate::control::hello::{Hello, Refusal};
use crate::control::packet::Packet;
use crate::control::session::{self, Me, Reader, Role, Terms, Writer};
use crate::types::{NodeId, PublicKey};

/// How long a connection attempt to one address may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a TCP segment of a control connection: an IPv6 packet of the least MTU that there is (1280) less the headers of IPv6
/// and TCP. Nothing searches for the MTU there, and a router that drops larger packets without a word must not part two nodes.
const SEGMENT: u32 = 1220;
/// Most addresses of one destination that are tried in one attempt.
const MAX_TRIES: usize = 8;
/// A ping is sent this often.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Inbound connections that may be shaking hands at one time, for each address family. One more, and the oldest has to go: an honest
/// caller is done within a few round trips.
const PENDING: usize = 128;
/// The same for one source.
const PENDING_OF_SOURCE: usize = 32;
/// Messages that may wait for a slow peer before its connection is closed.
const OUTBOX: usize = 256;

/// Tells streams of one daemon apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(u64);

/// What happened on the mesh.
#[derive(Debug)]
pub enum MeshEvent {
    /// A connection is up: both ends have proven the token.
    Opened(Box<Opened>),
    /// A gossip message arrived.
    Received(StreamId, Vec<u8>),
    /// A parcel arrived, for this node or to be passed on.
    Parcel(StreamId, Vec<u8>),
    /// A round trip was measured.
    RoundTrip(StreamId, Duration),
    /// A connection ended.
    Closed(StreamId, Refusal),
    /// What a name resolved to.
    Resolved(AttemptId, Vec<SocketAddr>),
    /// An attempt did not lead to a connection.
    DialFailed(AttemptId, DialFailure),
    /// Somebody called and was refused.
    Refused { remote: SocketAddr, refusal: Refusal },
}

/// Why dialling did not lead to a connection. The words are for people.
#[derive(Debug, thiserror::Error)]
pub enum DialFailure {
    /// The name has no address, now.
    #[error("the name {0} does not resolve; it is tried again, or take it back with `overnode forget {0}`")]
    Unresolved(String),
    /// TCP did not connect.
    #[error("{0}: {1}; check that a node runs there and that TCP port 6783 is open")]
    Unreachable(SocketAddr, String),
    /// Connected, and then refused by one of the two.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A connection that is up.
#[derive(Debug)]
pub struct Opened {
    pub id: StreamId,
    /// The attempt that led to it; none when the other side called.
    pub attempt: Option<AttemptId>,
    pub remote: SocketAddr,
    pub local: SocketAddr,
    pub hello: Hello,
    /// The control protocol that both speak.
    pub version: u16,
    pub outbox: Outbox,
}

/// Sends on a connection without ever waiting. Dropping it closes the connection.
#[derive(Debug)]
pub struct Outbox(mpsc::Sender<Vec<u8>>);

impl Outbox {
    /// Queues a message. False when the peer is too slow or gone: the connection should be dropped.
    pub fn send(&self, message: &Packet) -> bool {
        self.0.try_send(message.encode()).is_ok()
    }
}

/// Who has which ID, as far as this node knows of living nodes: callers that say otherwise are refused.
pub type Residents = Arc<Mutex<BTreeMap<NodeId, (PublicKey, String)>>>;

/// All control connections of this node. Dropping it ends them.
pub struct Mesh {
    shared: Shared,
    tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Shared {
    me: Arc<Me>,
    residents: Residents,
    port: u16,
    events: mpsc::Sender<MeshEvent>,
    next: Arc<AtomicU64>,
}

impl Shared {
    fn admit(&self, peer: &Hello) -> Result<(), Refusal> {
        let residents = self.residents.lock().unwrap_or_else(PoisonError::into_inner);
        match residents.get(&peer.id) {
            Some((public_key, nickname)) if *public_key != peer.public_key => Err(Refusal::IdClash {
                id: peer.id,
                holder: nickname.clone(),
                newcomer: peer.nickname.clone(),
            }),
            Some(_) | None => Ok(()),
        }
    }
}

impl Mesh {
    /// Listens on `port`, IPv6 and IPv4, and reports to `events`.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn listen(
        port: u16,
        me: Me,
        residents: Residents,
        events: mpsc::Sender<MeshEvent>,
    ) -> io::Result<Self> {
        let shared = Shared { me: Arc::new(me), residents, port, events, next: Arc::default() };
        let mut tasks = JoinSet::new();
        for listener in listeners(port)? {
            tasks.spawn(accept(listener, shared.clone()));
        }
        Ok(Self { shared, tasks })
    }

    /// Makes one attempt. The outcome is an event.
    pub fn dial(&mut self, attempt: AttemptId, place: Place) {
        while self.tasks.try_join_next().is_some() {}
        let shared = self.shared.clone();
        self.tasks.spawn(async move {
            let failure = match call(&shared, attempt, place).await {
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
    // Those that it accepts inherit it.
    setsockopt(&v4, TcpMaxSeg, &SEGMENT)?;
    v4.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let mut listeners = vec![v4.listen(128)?];
    // A host may have IPv6 turned off.
    if let Ok(v6) = v6_socket(port) {
        listeners.push(v6.listen(128)?);
    }
    Ok(listeners)
}

fn v6_socket(port: u16) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v6()?;
    setsockopt(&socket, Ipv6V6Only, &true)?;
    setsockopt(&socket, TcpMaxSeg, &SEGMENT)?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    Ok(socket)
}

async fn accept(listener: TcpListener, shared: Shared) {
    let mut tasks = JoinSet::new();
    let mut pending = Pending::default();
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
        let shared = shared.clone();
        let given_up = pending.admit(plain(remote).ip());
        tasks.spawn(async move {
            let welcomed = tokio::select! {
                welcomed = welcome(&shared, stream, remote) => welcomed,
                _ = given_up => None,
            };
            if let Some((ends, link)) = welcomed {
                run(shared, None, ends, link).await;
            }
        });
    }
}

/// Shakes hands with a caller. Who is refused is pending until that was told.
async fn welcome(shared: &Shared, stream: TcpStream, remote: SocketAddr) -> Option<(Ends, Link)> {
    match greet(shared, stream, Role::Responder).await {
        Ok(link) => Some(link),
        Err(refusal) => {
            let remote = plain(remote);
            let _ = shared.events.send(MeshEvent::Refused { remote, refusal }).await;
            None
        }
    }
}

/// Callers that have proven nothing yet, the oldest first. Dropping a sender gives its caller up.
#[derive(Default)]
struct Pending(VecDeque<(IpAddr, oneshot::Sender<()>)>);

impl Pending {
    /// What it returns ends when the caller is to be given up.
    fn admit(&mut self, ip: IpAddr) -> oneshot::Receiver<()> {
        let source = source_of(ip);
        self.0.retain(|(_, sender)| !sender.is_closed());
        let of_source = self.0.iter().filter(|(other, _)| *other == source).count();
        if of_source >= PENDING_OF_SOURCE {
            let oldest = self.0.iter().position(|(other, _)| *other == source);
            oldest.and_then(|oldest| self.0.remove(oldest));
        } else if self.0.len() >= PENDING {
            self.0.pop_front();
        }
        let (sender, receiver) = oneshot::channel();
        self.0.push_back((source, sender));
        receiver
    }
}

/// What one host can choose freely of its IPv6 address does not count.
fn source_of(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

/// Both ends' addresses.
struct Ends {
    remote: SocketAddr,
    local: SocketAddr,
}

type Link = session::Link<TcpStream>;

/// The addresses in the order in which they are tried: the families in turn, so that one of them that leads nowhere costs little time.
fn in_turn(addresses: BTreeSet<SocketAddr>) -> Vec<SocketAddr> {
    let (v4, v6): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv4);
    let longer = v4.len().max(v6.len());
    let turn = |place: usize| [v6.get(place), v4.get(place)].into_iter().flatten().copied();
    (0..longer).flat_map(turn).take(MAX_TRIES).collect()
}

async fn call(shared: &Shared, attempt: AttemptId, place: Place) -> Result<(Ends, Link), DialFailure> {
    let (addresses, mut last) = match place {
        Place::Name(name) => {
            let addresses = resolve(&name, shared.port).await;
            let _ = shared.events.send(MeshEvent::Resolved(attempt, addresses.clone())).await;
            (addresses, DialFailure::Unresolved(name))
        }
        Place::Addresses(id, addresses) => (addresses, DialFailure::Unresolved(format!("node {id}"))),
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
        match greet(shared, stream, Role::Initiator).await {
            Ok(link) => return Ok(link),
            Err(refusal) => last = refusal.into(),
        }
    }
    Err(last)
}

async fn dial_address(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    setsockopt(&socket, TcpMaxSeg, &SEGMENT)?;
    socket.connect(address).await
}

async fn resolve(name: &str, port: u16) -> Vec<SocketAddr> {
    if let Ok(address) = name.parse::<SocketAddr>() {
        return vec![address];
    }
    if let Ok(address) = name.parse::<IpAddr>() {
        return vec![(address, port).into()];
    }
    let Ok(Ok(found)) = timeout(RESOLVE_TIMEOUT, lookup_host((name, port))).await else { return Vec::new() };
    in_turn(found.collect())
}

async fn greet(shared: &Shared, stream: TcpStream, role: Role) -> Result<(Ends, Link), Refusal> {
    stream.set_nodelay(true)?;
    let ends = Ends { remote: plain(stream.peer_addr()?), local: plain(stream.local_addr()?) };
    let terms = Terms::default();
    let link = session::connect(stream, role, &shared.me, terms, |peer| shared.admit(peer)).await?;
    Ok((ends, link))
}

/// IPv4 addresses as such, however the socket shows them.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

async fn run(shared: Shared, attempt: Option<AttemptId>, ends: Ends, link: Link) {
    let id = StreamId(shared.next.fetch_add(1, Ordering::Relaxed));
    let (outbox, queue) = mpsc::channel(OUTBOX);
    let pongs = outbox.downgrade();
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
    let born = Instant::now();
    let why = tokio::select! {
        why = read(id, link.reader, &shared.events, pongs, born) => why,
        why = write(link.writer, queue, born) => why,
    };
    let _ = shared.events.send(MeshEvent::Closed(id, why)).await;
}

async fn read(
    id: StreamId,
    mut reader: Reader<TcpStream>,
    events: &mpsc::Sender<MeshEvent>,
    pongs: mpsc::WeakSender<Vec<u8>>,
    born: Instant,
) -> Refusal {
    loop {
        let message = match reader.receive().await {
            Ok(message) => message,
            Err(refusal) => return refusal,
        };
        let event = match Packet::decode(&message) {
            Ok(Packet::Gossip(bytes)) => MeshEvent::Received(id, bytes),
            Ok(Packet::Parcel(bytes)) => MeshEvent::Parcel(id, bytes),
            Ok(Packet::Ping(number)) => {
                // A full queue loses the answer; the peer asks again.
                if let Some(outbox) = pongs.upgrade() {
                    let _ = outbox.try_send(Packet::Pong(number).encode());
                }
                continue;
            }
            Ok(Packet::Pong(sent)) => {
                let Some(rtt) = born.elapsed().checked_sub(Duration::from_micros(sent)) else {
                    return Refusal::CutOff("the answer to a ping of the future".to_owned());
                };
                MeshEvent::RoundTrip(id, rtt)
            }
            Err(bad) => return Refusal::CutOff(bad.to_string()),
        };
        if events.send(event).await.is_err() {
            return Refusal::Closed;
        }
    }
}

async fn write(mut writer: Writer<TcpStream>, mut queue: mpsc::Receiver<Vec<u8>>, born: Instant) -> Refusal {
    let mut heartbeat = interval(HEARTBEAT);
    loop {
        let frame = tokio::select! {
            frame = queue.recv() => match frame {
                Some(frame) => frame,
                None => return Refusal::Closed,
            },
            _ = heartbeat.tick() => {
                let micros = u64::try_from(born.elapsed().as_micros()).unwrap_or(u64::MAX);
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
    use super::*;
    use crate::control::key;
    use crate::types::{Network, Secret};

    fn me(id: u16, secret: u8) -> Me {
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
        Me { static_secret, cluster_key: key::cluster_key("a token of some length").unwrap(), hello }
    }

    fn shared(me: Me, events: mpsc::Sender<MeshEvent>) -> Shared {
        Shared { me: Arc::new(me), residents: Residents::default(), port: 0, events, next: Arc::default() }
    }

    #[tokio::test]
    async fn those_who_say_nothing_keep_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (events, mut received) = mpsc::channel(16);
        let accepting = tokio::spawn(accept(listener, shared(me(1, 1), events)));
        let mut idle = Vec::new();
        for last in 1..=8 {
            for _ in 0..2 * PENDING_OF_SOURCE {
                let socket = TcpSocket::new_v4().unwrap();
                socket.bind(([127, 0, 0, last], 0).into()).unwrap();
                idle.push(socket.connect(address).await.unwrap());
            }
        }
        let (events, _kept) = mpsc::channel(16);
        let caller = shared(me(2, 2), events);
        let begun = Instant::now();
        greet(&caller, TcpStream::connect(address).await.unwrap(), Role::Initiator).await.unwrap();
        let event = received.recv().await.unwrap();
        assert!(matches!(&event, MeshEvent::Opened(opened) if opened.hello.id.get() == 2), "{event:?}");
        assert!(begun.elapsed() < session::HANDSHAKE_LIMIT / 2, "{:?}", begun.elapsed());
        accepting.abort();
    }

    #[test]
    fn the_families_of_addresses_take_turns() {
        let in_turn = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 1)).collect();
            in_turn(addresses).iter().map(|it| it.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            in_turn(&["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"]),
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]
        );
        assert_eq!(
            in_turn(&["2001:db8::1", "2001:db8::2", "192.0.2.1"]),
            ["2001:db8::1", "192.0.2.1", "2001:db8::2"]
        );
        assert_eq!(in_turn(&[]), [""; 0]);
        let many: Vec<String> = (1..100).map(|n| format!("192.0.2.{n}")).collect();
        assert_eq!(in_turn(&many.iter().map(String::as_str).collect::<Vec<_>>()).len(), MAX_TRIES);
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_is_not_an_address() {
        assert_eq!(resolve("nowhere.invalid", 6783).await, []);
        assert_eq!(resolve("2001:db8::1", 6783).await, ["[2001:db8::1]:6783".parse().unwrap()]);
        assert_eq!(resolve("192.0.2.1", 6783).await, ["192.0.2.1:6783".parse().unwrap()]);
    }

    #[test]
    fn the_oldest_caller_of_the_busiest_source_goes_first() {
        let mut pending = Pending::default();
        let mut quiet = pending.admit("192.0.2.1".parse().unwrap());
        let mut flood: Vec<_> = (0..=PENDING_OF_SOURCE as u64)
            .map(|n| pending.admit(Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(n)).into()))
            .collect();
        let is_given_up =
            |it: &mut oneshot::Receiver<()>| it.try_recv() == Err(oneshot::error::TryRecvError::Closed);
        assert!(is_given_up(&mut flood[0]) && !is_given_up(&mut flood[1]) && !is_given_up(&mut quiet));
        assert_eq!(pending.0.len(), PENDING_OF_SOURCE + 1);
        // Who has ended makes room by itself.
        drop(flood);
        drop(pending.admit("192.0.2.2".parse().unwrap()));
        assert_eq!(pending.0.len(), 2);
    }
}
