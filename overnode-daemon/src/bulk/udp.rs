//! The UDP side of a worker: its sockets, and batches of messages that one system call sends.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, poll};
use overnode_ebpf::reason::Reason;
use quinn_udp::{EcnCodepoint, Transmit, UdpSockRef, UdpSocketState};

use super::peer::Endpoint;

/// UDP payload of one batch at most (RFC 768 less the IPv6 and UDP headers).
const BATCH_LEN: usize = 65_487;
/// How long a full socket is waited for before a batch is dropped.
const FULL: u16 = 5;

/// A UDP socket of one address family.
pub struct Socket {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
}

impl Socket {
    /// Sets all that batches need.
    ///
    /// # Errors
    /// An option is refused.
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self { socket, state })
    }

    /// Sends, waiting a moment if the socket is full.
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.state.try_send(UdpSockRef::from(&self.socket), transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)], FULL);
                self.state.try_send(UdpSockRef::from(&self.socket), transmit)
            }
            result => result,
        }
    }
}

/// The sockets of a worker.
pub struct Sockets {
    /// IPv4, if the host has it.
    pub v4: Option<Socket>,
    /// IPv6, if the host has it.
    pub v6: Option<Socket>,
}

impl Sockets {
    fn of(&self, remote: SocketAddr) -> Option<&Socket> {
        if remote.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// Sends one message, or as many of `segment_size` as `contents` holds.
    ///
    /// # Errors
    /// What `sendmsg` reports, or that there is no such socket.
    pub fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.of(transmit.destination).ok_or(io::ErrorKind::Unsupported)?.send(transmit)
    }

    /// Messages that one batch may hold.
    fn most(&self, remote: SocketAddr) -> usize {
        self.of(remote).map_or(1, |socket| socket.state.max_gso_segments())
    }
}

/// Where the messages of a batch go, and what their ECN field says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// From where to where.
    pub endpoint: Endpoint,
    /// The two bits.
    pub ecn: u8,
}

/// Messages that go one way: each as long as the first, but the last may be shorter (`UDP_SEGMENT`,
/// `udp(7)`).
pub struct Batch {
    buffer: Box<[u8]>,
    used: usize,
    /// Of the first: where it goes, and its bytes.
    first: Option<(Way, usize)>,
}

impl Batch {
    /// One without messages.
    pub fn new() -> Self {
        Self { buffer: vec![0; BATCH_LEN].into(), used: 0, first: None }
    }

    /// Whether a message of `len` bytes may follow those that are there. If not, these are to be
    /// sent first.
    pub fn takes(&self, sockets: &Sockets, way: &Way, len: usize) -> bool {
        let Some((first, stride)) = &self.first else { return true };
        first == way
            && len <= *stride
            && self.used.is_multiple_of(*stride)
            && self.used + len <= BATCH_LEN.min(sockets.most(way.endpoint.remote) * stride)
    }

    /// Adds a message of `len` bytes, which `write` makes, and which the batch
    /// [takes](Self::takes).
    ///
    /// # Errors
    /// What `write` says, or [`Reason::TooBig`] if there is no place: then nothing was added.
    pub fn add(
        &mut self,
        way: &Way,
        len: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), Reason>,
    ) -> Result<(), Reason> {
        let place = self.buffer.get_mut(self.used..).and_then(|rest| rest.get_mut(..len));
        write(place.ok_or(Reason::TooBig)?)?;
        self.first.get_or_insert((*way, len));
        self.used += len;
        Ok(())
    }

    /// Sends what is there. Whatever becomes of it, nothing is there then.
    ///
    /// # Errors
    /// [`Reason::TooBig`], [`Reason::NoRoute`], or [`Reason::Helper`] for what else the kernel may
    /// say.
    pub fn send(&mut self, sockets: &Sockets) -> Result<(), Reason> {
        let used = std::mem::take(&mut self.used);
        let (Some((way, stride)), Some(contents)) = (self.first.take(), self.buffer.get(..used))
        else {
            return Ok(());
        };
        let transmit = Transmit {
            destination: way.endpoint.remote,
            ecn: EcnCodepoint::from_bits(way.ecn),
            contents,
            segment_size: (used > stride).then_some(stride),
            src_ip: way.endpoint.local,
        };
        sockets.send(&transmit).map_err(|error| match error.raw_os_error() {
            Some(libc::EMSGSIZE) => Reason::TooBig,
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Reason::NoRoute,
            Some(_) | None => Reason::Helper,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    fn received(socket: &UdpSocket) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = socket.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// Messages of all lengths, to two peers: each arrives as it is, in order, in few batches.
    #[test]
    fn what_cannot_go_together_goes_one_after_the_other() {
        let receivers = [socket(), socket()];
        let sockets = Sockets { v4: Some(Socket::new(socket()).unwrap()), v6: None };
        let mut batch = Batch::new();
        // (to whom, ECN, bytes)
        let messages = [
            (0, 0, 100),
            (0, 0, 100),
            (0, 0, 60),
            (0, 0, 60),
            (0, 0, 61),
            (1, 0, 61),
            (1, 1, 61),
            (1, 1, 1200),
            (1, 1, 1),
            (0, 0, 40_000),
            (0, 0, 40_000),
            (0, 0, 3),
        ];
        let mut batches = 1;
        for (number, (to, ecn, len)) in messages.into_iter().enumerate() {
            let remote = receivers[to].local_addr().unwrap();
            let way = Way { endpoint: Endpoint { remote, local: None }, ecn };
            let write = |place: &mut [u8]| {
                assert_eq!(place.len(), len);
                place.fill(number as u8);
                Ok(())
            };
            if !batch.takes(&sockets, &way, len) {
                batch.send(&sockets).unwrap();
                batches += 1;
            }
            batch.add(&way, len, write).unwrap();
            // One that could not be made leaves no trace.
            let failed = batch.add(&way, 50, |_| Err(Reason::Exhausted));
            assert_eq!(failed, Err(Reason::Exhausted));
        }
        batch.send(&sockets).unwrap();
        batch.send(&sockets).unwrap();
        assert_eq!(batches, 8);
        for (number, (to, _, len)) in messages.into_iter().enumerate() {
            assert_eq!(received(&receivers[to]), vec![number as u8; len], "message {number}");
        }
        for receiver in receivers {
            receiver.set_nonblocking(true).unwrap();
            assert!(receiver.recv(&mut [0; 1]).is_err(), "something was sent twice");
        }
    }

    #[test]
    fn a_batch_is_as_large_as_the_kernel_takes() {
        let way = |port| Way {
            endpoint: Endpoint { remote: ([127, 0, 0, 1], port).into(), local: None },
            ecn: 0,
        };
        let sockets = Sockets { v4: Some(Socket::new(socket()).unwrap()), v6: None };
        let most = sockets.most(way(1).endpoint.remote);
        let mut batch = Batch::new();
        assert_eq!(batch.add(&way(1), BATCH_LEN + 1, |_| Ok(())), Err(Reason::TooBig));
        assert!(batch.takes(&sockets, &way(1), BATCH_LEN));
        batch.add(&way(1), 30_000, |_| Ok(())).unwrap();
        assert!(batch.takes(&sockets, &way(1), 30_000));
        assert!(!batch.takes(&sockets, &way(2), 30_000) && !batch.takes(&sockets, &way(1), 30_001));
        batch.add(&way(1), 30_000, |_| Ok(())).unwrap();
        let rest = BATCH_LEN - 60_000;
        assert!(batch.takes(&sockets, &way(1), rest) && !batch.takes(&sockets, &way(1), rest + 1));
        assert_eq!(batch.add(&way(1), rest + 1, |_| Ok(())), Err(Reason::TooBig));

        let mut batch = Batch::new();
        for _ in 0..most {
            assert!(batch.takes(&sockets, &way(1), 1));
            batch.add(&way(1), 1, |_| Ok(())).unwrap();
        }
        assert!(!batch.takes(&sockets, &way(1), 1));
    }
}
