//! The UDP and TCP sockets and the thread that serves them. The thread ends with the [`Server`].

use std::io;
use std::net::{self, IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use overnode_ebpf::map::RESOLVER_PORT;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::PORT;
use super::service::{Entrance, Quota, Service, Step, Transport};

/// Longest query, in bytes. A longer UDP query is truncated, and a longer TCP query ends its
/// connection.
const MAX_QUERY: usize = 4096;
/// Maximum number of TCP connections.
const MAX_CONNECTIONS: usize = 256;
/// Maximum number of TCP connections of one container.
const MAX_CONNECTIONS_OF_ONE: usize = 16;
/// How long a connection may be idle, and how long writing an answer may take.
const IO_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of queries per connection.
const MAX_QUERIES_OF_CONNECTION: usize = 1000;
/// Pause after a socket error.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// The sockets. They belong to the network namespace in which [`Sockets::open`] was called.
pub struct Sockets {
    /// For queries that containers send to the node.
    node: Pair,
    /// For queries to an engine's resolver that programs redirect.
    engine: Pair,
}

struct Pair {
    udp: net::UdpSocket,
    tcp: net::TcpListener,
}

impl Sockets {
    /// Opens the UDP and TCP ports 53 and [`RESOLVER_PORT`].
    ///
    /// # Errors
    /// Returns the system's error.
    pub fn open(address: IpAddr) -> io::Result<Self> {
        Ok(Self { node: Pair::open(address, PORT)?, engine: Pair::open(address, RESOLVER_PORT)? })
    }
}

impl Pair {
    fn open(address: IpAddr, port: u16) -> io::Result<Self> {
        let address = SocketAddr::new(address, port);
        let (udp, tcp) = (net::UdpSocket::bind(address)?, net::TcpListener::bind(address)?);
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { udp, tcp })
    }
}

/// A running server. Dropping it closes the sockets.
#[derive(Debug)]
pub struct Server {
    _running: oneshot::Sender<()>,
}

impl Server {
    /// Answers queries from addresses in `subnet`.
    ///
    /// # Errors
    /// Returns an error if the thread cannot be started.
    pub fn start(service: Arc<Service>, sockets: Sockets, subnet: IpNet) -> io::Result<Self> {
        let (running, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("dns".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    ended = serve(service, sockets, subnet) => {
                        if let Err(error) = ended {
                            tracing::warn!("DNS is not served: {error}");
                        }
                    }
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { _running: running })
    }

    /// Returns false if the server has ended by itself.
    pub fn is_running(&self) -> bool {
        !self._running.is_closed()
    }
}

async fn serve(service: Arc<Service>, sockets: Sockets, subnet: IpNet) -> io::Result<()> {
    tokio::try_join!(
        serve_pair(service.clone(), sockets.node, subnet, Entrance::Node),
        serve_pair(service, sockets.engine, subnet, Entrance::Engine),
    )?;
    Ok(())
}

async fn serve_pair(
    service: Arc<Service>,
    pair: Pair,
    subnet: IpNet,
    entrance: Entrance,
) -> io::Result<()> {
    let udp = UdpSocket::from_std(pair.udp)?;
    let tcp = TcpListener::from_std(pair.tcp)?;
    tokio::join!(
        serve_udp(service.clone(), Arc::new(udp), subnet, entrance),
        serve_tcp(service, tcp, subnet, entrance)
    );
    Ok(())
}

async fn serve_udp(
    service: Arc<Service>,
    socket: Arc<UdpSocket>,
    subnet: IpNet,
    entrance: Entrance,
) {
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        let (len, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("a DNS query could not be received: {error}");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        if !subnet.contains(&from.ip()) || from.port() == 0 {
            continue;
        }
        let query = buffer.get(..len).unwrap_or_default();
        match service.begin(query, from.ip(), Transport::Udp, entrance) {
            Step::Ignore => {}
            // If the socket's buffer is full, the answer is lost, as on any network.
            Step::Send(bytes) => _ = socket.try_send_to(&bytes, from),
            Step::Ask(pending) => {
                let (service, socket) = (service.clone(), socket.clone());
                tasks.spawn(async move {
                    let bytes = service.finish(pending).await;
                    let _ = socket.try_send_to(&bytes, from);
                });
            }
        }
    }
}

async fn serve_tcp(
    service: Arc<Service>,
    listener: TcpListener,
    subnet: IpNet,
    entrance: Entrance,
) {
    let quota = Quota::new(MAX_CONNECTIONS, MAX_CONNECTIONS_OF_ONE);
    let mut connections = JoinSet::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!("a DNS connection could not be accepted: {error}");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let Some(permit) = quota.acquire(from.ip()).filter(|_| subnet.contains(&from.ip())) else {
            continue;
        };
        let service = service.clone();
        connections.spawn(async move {
            // The client sees the end of the connection, whatever the reason.
            let _ = serve_connection(&service, stream, from.ip(), entrance).await;
            drop(permit);
        });
    }
}

/// Answers the queries of a connection one after the other.
async fn serve_connection(
    service: &Service,
    mut stream: TcpStream,
    from: IpAddr,
    entrance: Entrance,
) -> io::Result<()> {
    let mut buffer = vec![0; MAX_QUERY];
    for _ in 0..MAX_QUERIES_OF_CONNECTION {
        let len = usize::from(timeout(IO_TIMEOUT, stream.read_u16()).await??);
        let Some(query) = buffer.get_mut(..len) else { break };
        timeout(IO_TIMEOUT, stream.read_exact(query)).await??;
        let answer = match service.begin(query, from, Transport::Tcp, entrance) {
            Step::Ignore => break,
            Step::Send(bytes) => bytes,
            Step::Ask(pending) => service.finish(pending).await,
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(IO_TIMEOUT, stream.write_all(&framed)).await??;
    }
    Ok(())
}
