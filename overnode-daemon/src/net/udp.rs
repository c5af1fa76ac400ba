//! Sends and receives on the UDP sockets of the data port, IPv4 and IPv6. Handshakes arrive here.
//! The eBPF programs take data messages earlier.
//!
//! Each datagram is received with its destination address and interface, and an answer can be sent
//! from that address. A host may have several addresses, and a peer behind a NAT or a firewall
//! accepts no answer from another one.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockFlag,
    SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use overnode_types::InterfaceIndex;

/// Size of a receive buffer, in bytes. Longer datagrams are truncated: no handshake message exceeds
/// 156 bytes, including a relay header.
const RECEIVE_LEN: usize = 256;
/// Maximum number of datagrams per system call.
const BATCH: usize = 64;
/// Size of the socket's receive buffer, in bytes. It holds about 5000 short messages, so that
/// genuine ones survive a flood while the receiving thread waits for a CPU.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Pause after a socket error.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// One socket for each address family that the host supports.
pub struct UdpSockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
    port: u16,
}

/// A received datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received<B = Vec<u8>> {
    /// Source address and port.
    pub from: SocketAddr,
    /// Local address that it was sent to.
    pub to: IpAddr,
    /// Index of the interface that it arrived on.
    pub ifindex: InterfaceIndex,
    /// The payload.
    pub bytes: B,
}

impl Received<&[u8]> {
    /// Returns the datagram with a copy of the payload.
    pub fn to_owned(&self) -> Received {
        let Self { from, to, ifindex, bytes } = *self;
        Received { from, to, ifindex, bytes: bytes.to_vec() }
    }
}

impl UdpSockets {
    /// Binds `port` on all addresses, with separate sockets for IPv4 and IPv6. A family that the
    /// kernel or the namespace lacks is left out. Port 0 selects a free port, the same for both
    /// families. Call this within a tokio runtime.
    ///
    /// # Errors
    /// If the port is taken, or if the host has neither IPv4 nor IPv6.
    pub fn bind(port: u16) -> io::Result<Self> {
        let v4 = if_supported(bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
        let port = match &v4 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        let v6 = if_supported(bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))?;
        let port = match &v6 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        if v4.is_none() && v6.is_none() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the host has neither IPv4 nor IPv6",
            ));
        }
        Ok(Self { v4, v6, port })
    }

    /// Returns the port that both sockets are bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Receives on a separate thread until the returned value is dropped. Each datagram is passed
    /// to `take`, which must be quick. If `take` returns an answer, it is sent to the datagram's
    /// source, from the address that the datagram was sent to.
    ///
    /// # Errors
    /// If the system cannot create the thread or the descriptors.
    pub fn receive(
        &self,
        mut take: impl FnMut(Instant, &Received<&[u8]>) -> Option<Vec<u8>> + Send + 'static,
    ) -> io::Result<Reception> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let sockets = [&self.v4, &self.v6].into_iter().flatten();
        let sockets = sockets
            .map(|socket| socket.as_fd().try_clone_to_owned())
            .collect::<io::Result<Vec<_>>>()?;
        let thread = std::thread::Builder::new().name("handshakes".to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || receive_until(&stop, &sockets, &mut take)
        })?;
        Ok(Reception { stop, thread: Some(thread) })
    }

    /// Sends a datagram. The source is `from` if it is still an address of this host and of the
    /// same family. Otherwise the kernel chooses the source.
    ///
    /// # Errors
    /// The error of `sendmsg`, or [`io::ErrorKind::Unsupported`] if there is no socket of that
    /// family.
    pub async fn send(&self, to: SocketAddr, from: Option<IpAddr>, bytes: &[u8]) -> io::Result<()> {
        let (socket, from) = match (to, from) {
            (SocketAddr::V4(_), Some(IpAddr::V4(_))) | (SocketAddr::V6(_), Some(IpAddr::V6(_))) => {
                (self.socket(to)?, from)
            }
            _ => (self.socket(to)?, None),
        };
        match socket.async_io(Interest::WRITABLE, || send(socket, to, from, bytes)).await {
            // The address was removed from its interface or belongs to no interface.
            Err(error) if from.is_some() && is_address_gone(&error) => {
                socket.async_io(Interest::WRITABLE, || send(socket, to, None, bytes)).await
            }
            result => result,
        }
    }

    fn socket(&self, to: SocketAddr) -> io::Result<&UdpSocket> {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let family = if to.is_ipv4() { "IPv4" } else { "IPv6" };
        socket.as_ref().ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, format!("the host has no {family}"))
        })
    }
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket::socket(family, SockType::Datagram, flags, SockProtocol::Udp)?;
    if address.is_ipv4() {
        socket::setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        socket::setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        socket::setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    // Exceed the system's limit, which root may do. Without that right, use as much as the limit
    // allows.
    if socket::setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        socket::setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
    }
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    UdpSocket::from_std(socket.into())
}

/// Returns `None` if the address family is absent.
fn if_supported(socket: io::Result<UdpSocket>) -> io::Result<Option<UdpSocket>> {
    const FAMILY_MISSING: [Errno; 3] =
        [Errno::EAFNOSUPPORT, Errno::EPROTONOSUPPORT, Errno::EADDRNOTAVAIL];
    match socket {
        Ok(socket) => Ok(Some(socket)),
        Err(error)
            if FAMILY_MISSING.iter().any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The receiving thread. Dropping this stops it.
#[derive(Debug)]
pub struct Reception {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Reception {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn receive_until(
    stop: &EventFd,
    sockets: &[OwnedFd],
    take: &mut impl FnMut(Instant, &Received<&[u8]>) -> Option<Vec<u8>>,
) {
    let mut buffers = vec![[0; RECEIVE_LEN]; BATCH];
    loop {
        let mut fds: Vec<_> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return tracing::error!("waiting for handshake messages failed: {error}"),
        }
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or_default();
        if fds.last().is_some_and(is_ready) {
            return;
        }
        for (socket, _) in sockets.iter().zip(&fds).filter(|(_, fd)| is_ready(fd)) {
            match receive_batch(socket, &mut buffers, take) {
                Ok(()) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => {
                    tracing::warn!("receiving handshake messages failed: {error}");
                    std::thread::sleep(ERROR_PAUSE);
                }
            }
        }
    }
}

fn receive_batch(
    socket: &OwnedFd,
    buffers: &mut [[u8; RECEIVE_LEN]],
    take: &mut impl FnMut(Instant, &Received<&[u8]>) -> Option<Vec<u8>>,
) -> Result<(), Errno> {
    let control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(buffers.len(), Some(control));
    let mut parts: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let flags = MsgFlags::MSG_DONTWAIT;
    let messages =
        socket::recvmmsg(socket.as_raw_fd(), &mut headers, parts.iter_mut(), flags, None)?;
    let now = Instant::now();
    for message in messages {
        let from = message.address.as_ref().and_then(socket_address);
        let to = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                let address = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                let ifindex = u32::try_from(info.ipi_ifindex).ok()?;
                Some((IpAddr::V4(address), InterfaceIndex::from_kernel(ifindex)?))
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                Some((IpAddr::V6(address), InterfaceIndex::from_kernel(info.ipi6_ifindex)?))
            }
            _ => None,
        });
        let (Some(from), Some((to, ifindex))) = (from, to) else { continue };
        let bytes = message.iovs().next().unwrap_or_default();
        if let Some(answer) = take(now, &Received { from, to, ifindex, bytes }) {
            // An answer that finds the socket's send buffer full is lost, as on any network.
            let _ = send(socket, from, Some(to), &answer);
        }
    }
    Ok(())
}

fn send(
    socket: &impl AsRawFd,
    to: SocketAddr,
    from: Option<IpAddr>,
    bytes: &[u8],
) -> io::Result<()> {
    let v4 = |address: Ipv4Addr| libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let v6 = |address: Ipv6Addr| libc::in6_pktinfo {
        ipi6_addr: libc::in6_addr { s6_addr: address.octets() },
        ipi6_ifindex: 0,
    };
    let parts = [IoSlice::new(bytes)];
    let (descriptor, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    let to = SockaddrStorage::from(to);
    let sent = match from {
        Some(IpAddr::V4(address)) => {
            let control = [ControlMessage::Ipv4PacketInfo(&v4(address))];
            socket::sendmsg(descriptor, &parts, &control, flags, Some(&to))
        }
        Some(IpAddr::V6(address)) => {
            let control = [ControlMessage::Ipv6PacketInfo(&v6(address))];
            socket::sendmsg(descriptor, &parts, &control, flags, Some(&to))
        }
        None => socket::sendmsg(descriptor, &parts, &[], flags, Some(&to)),
    };
    sent.map(|_| ()).map_err(io::Error::from)
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4: &SockaddrIn| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6: &SockaddrIn6| SocketAddr::V6((*v6).into())))
}

fn is_address_gone(error: &io::Error) -> bool {
    const ADDRESS_GONE: [Errno; 3] = [Errno::EADDRNOTAVAIL, Errno::EINVAL, Errno::ENETUNREACH];
    ADDRESS_GONE.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn localhost() -> [IpAddr; 2] {
        [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
    }

    /// Collects all datagrams that arrive on these sockets.
    struct Collector {
        datagrams: std::sync::mpsc::Receiver<Received>,
        _reception: Reception,
    }

    impl Collector {
        fn on(sockets: &UdpSockets) -> Self {
            let (sender, datagrams) = std::sync::mpsc::channel();
            let take = move |_, datagram: &Received<&[u8]>| {
                sender.send(datagram.to_owned()).expect("the test should still receive");
                (datagram.bytes == b"answer me").then(|| b"answer".to_vec())
            };
            Self { datagrams, _reception: sockets.receive(take).expect("a thread") }
        }

        fn next(&self) -> Received {
            self.datagrams.recv_timeout(Duration::from_secs(10)).expect("a datagram")
        }
    }

    #[tokio::test]
    async fn datagrams_carry_their_destination_address() {
        let (a, b) =
            (UdpSockets::bind(0).expect("a free port"), UdpSockets::bind(0).expect("a free port"));
        let collector = Collector::on(&b);
        for address in localhost() {
            a.send((address, b.port()).into(), None, b"there").await.expect("sent");
            let received = collector.next();
            assert_eq!(received.from, (address, a.port()).into());
            assert_eq!(
                (received.to, received.ifindex, &received.bytes[..]),
                (address, InterfaceIndex::new(1), &b"there"[..])
            );
        }
    }

    #[tokio::test]
    async fn answers_come_from_the_address_that_was_asked() {
        let (a, b) =
            (UdpSockets::bind(0).expect("a free port"), UdpSockets::bind(0).expect("a free port"));
        let (at_a, at_b) = (Collector::on(&a), Collector::on(&b));
        let second = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
        a.send((second, b.port()).into(), None, b"answer me").await.expect("sent");
        let received = at_b.next();
        assert_eq!(received.to, second);
        let answer = at_a.next();
        assert_eq!((answer.from, &answer.bytes[..]), ((second, b.port()).into(), &b"answer"[..]));
        b.send(received.from, Some(received.to), b"back").await.expect("sent");
        assert_eq!(at_a.next().from, (second, b.port()).into());

        b.send(received.from, None, b"back").await.expect("sent");
        let chosen = at_a.next().from;
        assert_eq!(chosen, (IpAddr::V4(Ipv4Addr::LOCALHOST), b.port()).into());

        b.send(received.from, Some(Ipv6Addr::LOCALHOST.into()), b"back")
            .await
            .expect("a source of the other family should be ignored");
        assert_eq!(at_a.next().from, chosen);
        let gone = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 77));
        b.send(received.from, Some(gone), b"back")
            .await
            .expect("a missing source address should be ignored");
        assert_eq!(at_a.next().from, chosen);
    }

    #[tokio::test]
    async fn many_datagrams_at_once_arrive_whole_and_in_order() {
        let (a, b) =
            (UdpSockets::bind(0).expect("a free port"), UdpSockets::bind(0).expect("a free port"));
        let to = (IpAddr::V4(Ipv4Addr::LOCALHOST), b.port()).into();
        for number in 0..200_u8 {
            a.send(to, None, &[number; 156]).await.expect("sent");
        }
        let collector = Collector::on(&b);
        for number in 0..200_u8 {
            assert_eq!(collector.next().bytes, [number; 156]);
        }
    }

    #[tokio::test]
    async fn a_port_is_free_again_once_its_receiver_is_dropped() {
        let first = UdpSockets::bind(0).expect("a free port");
        let port = first.port();
        drop((Collector::on(&first), first));
        UdpSockets::bind(port).expect("the port should be free again");
    }

    #[tokio::test]
    async fn a_port_is_not_shared() {
        let first = UdpSockets::bind(0).expect("a free port");
        let second = UdpSockets::bind(first.port()).err().map(|error| error.kind());
        assert_eq!(second, Some(io::ErrorKind::AddrInUse));
    }
}
