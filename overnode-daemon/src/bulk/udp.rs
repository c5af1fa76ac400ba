//! Manages a worker's UDP sockets and the batches of messages that one system call sends.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, poll};
use overnode_ebpf::reason::Reason;
use quinn_udp::{EcnCodepoint, Transmit, UdpSockRef, UdpSocketState};

use super::peer::Endpoint;

/// Largest UDP payload of one batch, in bytes: 65,535 less the IPv6 and UDP headers (RFC 768).
const BATCH_LEN: usize = 65_487;
/// Time to wait for a full socket before dropping a batch, in milliseconds.
const SEND_TIMEOUT_MS: u16 = 5;

/// A UDP socket of one address family.
pub(crate) struct Socket {
    pub(super) socket: UdpSocket,
    pub(super) state: UdpSocketState,
}

impl Socket {
    /// Sets the socket options that batches need.
    ///
    /// # Errors
    /// Fails if the kernel refuses an option.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self { socket, state })
    }

    /// Sends, and waits briefly if the socket is full.
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.state.try_send(UdpSockRef::from(&self.socket), transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = poll(
                    &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)],
                    SEND_TIMEOUT_MS,
                );
                self.state.try_send(UdpSockRef::from(&self.socket), transmit)
            }
            result => result,
        }
    }
}

/// The sockets of a worker.
pub(crate) struct Sockets {
    /// IPv4 socket, if the host has IPv4.
    pub v4: Option<Socket>,
    /// IPv6 socket, if the host has IPv6.
    pub v6: Option<Socket>,
}

impl Sockets {
    fn of(&self, remote: SocketAddr) -> Option<&Socket> {
        if remote.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() }
    }

    /// Sends one message, or as many messages of `segment_size` bytes as `contents` holds.
    ///
    /// # Errors
    /// Returns the error of `sendmsg`, or `Unsupported` if there is no socket of that family.
    pub(crate) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.of(transmit.destination).ok_or(io::ErrorKind::Unsupported)?.send(transmit)
    }

    /// Returns the maximum number of messages in one batch to this address.
    fn max_messages(&self, remote: SocketAddr) -> usize {
        self.of(remote).map_or(1, |socket| socket.state.max_gso_segments())
    }
}

/// Destination and ECN codepoint of the messages of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchKey {
    /// Remote and local address.
    pub endpoint: Endpoint,
    /// ECN codepoint, 2 bits.
    pub ecn: u8,
}

/// Messages with the same destination and ECN codepoint. All have the length of the first; only the
/// last may be shorter (`UDP_SEGMENT`, `udp(7)`).
pub(crate) struct Batch {
    buffer: Box<[u8]>,
    used: usize,
    /// Destination and length in bytes of the first message.
    first: Option<(BatchKey, usize)>,
}

impl Batch {
    /// Creates an empty batch.
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; BATCH_LEN].into(), used: 0, first: None }
    }

    /// Returns true if a message of `len` bytes may be added. Otherwise the batch must be sent
    /// first.
    pub(crate) fn fits(&self, sockets: &Sockets, key: &BatchKey, len: usize) -> bool {
        let Some((first, stride)) = &self.first else { return true };
        first == key
            && len <= *stride
            && self.used.is_multiple_of(*stride)
            && self.used + len <= BATCH_LEN.min(sockets.max_messages(key.endpoint.remote) * stride)
    }

    /// Adds a message of `len` bytes, which `write` writes. Call [`fits`](Self::fits) before.
    ///
    /// # Errors
    /// Returns the error of `write`, or [`Reason::TooBigDropped`] if there is no room. Nothing is
    /// added then.
    pub(crate) fn add(
        &mut self,
        key: &BatchKey,
        len: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), Reason>,
    ) -> Result<(), Reason> {
        let slot = self.buffer.get_mut(self.used..).and_then(|rest| rest.get_mut(..len));
        write(slot.ok_or(Reason::TooBigDropped)?)?;
        self.first.get_or_insert((*key, len));
        self.used += len;
        Ok(())
    }

    /// Sends the batch. It is empty afterwards, even on failure.
    ///
    /// # Errors
    /// Returns [`Reason::TooBigDropped`] or [`Reason::NoRoute`], and [`Reason::Helper`] for any
    /// other kernel error.
    pub(crate) fn send(&mut self, sockets: &Sockets) -> Result<(), Reason> {
        let used = std::mem::take(&mut self.used);
        let (Some((key, stride)), Some(contents)) = (self.first.take(), self.buffer.get(..used))
        else {
            return Ok(());
        };
        let transmit = Transmit {
            destination: key.endpoint.remote,
            ecn: EcnCodepoint::from_bits(key.ecn),
            contents,
            segment_size: (used > stride).then_some(stride),
            src_ip: key.endpoint.local,
        };
        sockets.send(&transmit).map_err(|error| match error.raw_os_error() {
            Some(libc::EMSGSIZE) => Reason::TooBigDropped,
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

    /// Sends messages of different lengths to two peers. Each arrives unchanged and in order, and
    /// few batches are used.
    #[test]
    fn messages_that_cannot_share_a_batch_are_sent_in_order() {
        let receivers = [socket(), socket()];
        let sockets = Sockets { v4: Some(Socket::new(socket()).unwrap()), v6: None };
        let mut batch = Batch::new();
        // (receiver, ECN, bytes)
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
            let key = BatchKey { endpoint: Endpoint { remote, local: None }, ecn };
            let write = |slot: &mut [u8]| {
                assert_eq!(slot.len(), len);
                slot.fill(number as u8);
                Ok(())
            };
            if !batch.fits(&sockets, &key, len) {
                batch.send(&sockets).unwrap();
                batches += 1;
            }
            batch.add(&key, len, write).unwrap();
            // A message whose `write` fails leaves no trace.
            let failed = batch.add(&key, 50, |_| Err(Reason::Exhausted));
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
            assert!(receiver.recv(&mut [0; 1]).is_err(), "a message was sent twice");
        }
    }

    #[test]
    fn a_batch_is_as_large_as_the_kernel_accepts() {
        let key = |port| BatchKey {
            endpoint: Endpoint { remote: ([127, 0, 0, 1], port).into(), local: None },
            ecn: 0,
        };
        let sockets = Sockets { v4: Some(Socket::new(socket()).unwrap()), v6: None };
        let max_messages = sockets.max_messages(key(1).endpoint.remote);
        let mut batch = Batch::new();
        assert_eq!(batch.add(&key(1), BATCH_LEN + 1, |_| Ok(())), Err(Reason::TooBigDropped));
        assert!(batch.fits(&sockets, &key(1), BATCH_LEN));
        batch.add(&key(1), 30_000, |_| Ok(())).unwrap();
        assert!(batch.fits(&sockets, &key(1), 30_000));
        assert!(!batch.fits(&sockets, &key(2), 30_000) && !batch.fits(&sockets, &key(1), 30_001));
        batch.add(&key(1), 30_000, |_| Ok(())).unwrap();
        let rest = BATCH_LEN - 60_000;
        assert!(batch.fits(&sockets, &key(1), rest) && !batch.fits(&sockets, &key(1), rest + 1));
        assert_eq!(batch.add(&key(1), rest + 1, |_| Ok(())), Err(Reason::TooBigDropped));

        let mut batch = Batch::new();
        for _ in 0..max_messages {
            assert!(batch.fits(&sockets, &key(1), 1));
            batch.add(&key(1), 1, |_| Ok(())).unwrap();
        }
        assert!(!batch.fits(&sockets, &key(1), 1));
    }
}
