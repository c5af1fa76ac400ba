//! A client of the resolver that an engine runs in each of its containers, at 127.0.0.11. It knows
//! the names in the container's other networks, and forwards the rest to the servers that the user
//! chose for the container.
//!
//! Queries and answers are passed on as they are: the container would have got the same bytes.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};
use overnode_ebpf::map::{ENGINE_RESOLVER, RESOLVER_MARK};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::PORT;
use super::service::Transport;
use crate::datapath::NetnsRef;

/// Timeout of a question. Clients give up after five seconds.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Longest UDP answer, in bytes.
const MAX_UDP_ANSWER: usize = 4096;

/// Asks the engine's resolver in a container.
///
/// # Errors
/// Fails if the network namespace cannot be entered, or if no answer arrives in time.
pub(super) async fn ask(netns: &NetnsRef, query: &[u8], transport: Transport) -> Result<Vec<u8>> {
    let server = SocketAddr::from((ENGINE_RESOLVER, PORT));
    let exchange = async {
        match transport {
            Transport::Udp => {
                let socket = netns.run(move || connect_udp(server)).await?;
                over_udp(socket, query).await
            }
            Transport::Tcp => {
                let stream = netns.run(move || connect_tcp(server)).await?;
                over_tcp(stream, query).await
            }
        }
    };
    timeout(TIMEOUT, exchange).await.context("no answer in time")?
}

/// Opens a socket whose queries are not redirected back to the node.
fn connect_udp(server: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    setsockopt(&socket, sockopt::Mark, &RESOLVER_MARK)?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn connect_tcp(server: SocketAddr) -> Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
    let opened = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&opened, sockopt::Mark, &RESOLVER_MARK)?;
    let SocketAddr::V4(server) = server else { anyhow::bail!("{server} is not an IPv4 address") };
    // Blocks for a moment only: the peer is on the loopback interface.
    let limit = nix::sys::time::TimeVal::new(TIMEOUT.as_secs().try_into()?, 0);
    setsockopt(&opened, sockopt::SendTimeout, &limit)?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&opened), &SockaddrIn::from(server))?;
    let stream = TcpStream::from(opened);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

async fn over_udp(socket: UdpSocket, query: &[u8]) -> Result<Vec<u8>> {
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    socket.send(query).await?;
    let mut answer = vec![0; MAX_UDP_ANSWER];
    loop {
        let len = socket.recv(&mut answer).await?;
        if answers(query, answer.get(..len).unwrap_or_default()) {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn over_tcp(stream: TcpStream, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream = tokio::net::TcpStream::from_std(stream)?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], query].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    anyhow::ensure!(answers(query, &answer), "the answer is to another query");
    Ok(answer)
}

/// Returns true if `answer` is a DNS response with the ID of `query`.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    answer.len() >= super::service::HEADER_LEN && answer[..2] == query[..2] && answer[2] & 0x80 != 0
}
