//! What the daemon and the workers' process say to each other, over a socket in the run directory:
//! one message, one packet.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use super::message::Cipher;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "bulk.sock";
/// Changes when a daemon and a process that differ in it would not understand each other.
pub const VERSION: u32 = 3;
/// Longest message, bytes.
pub const MAX_LEN: usize = 16384;
/// Peers in one [`FromWorkers::Peers`].
pub const MAX_REPORTS: usize = 64;

/// What seals flows that move a lot (`--bulk`; what stands here is its help).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Mode {
    /// The eBPF programs, as all else
    Off,
    /// Workers, with the cipher that both ends do faster
    #[default]
    Auto,
    /// Workers, with ChaCha20-Poly1305
    ChaCha,
    /// Workers, with AES-256-GCM
    Aes,
}

/// To the workers.
#[derive(Serialize, Deserialize)]
pub enum ToWorkers {
    /// Where a peer is, and how long a message to it and back takes.
    Peer {
        /// Peer index.
        peer: u32,
        /// Where messages go until one of its own shows otherwise.
        endpoint: Option<SocketAddr>,
        /// Round trip, ms; what was told before holds until another is known.
        rtt_ms: Option<u32>,
    },
    /// Forget a peer and its sessions.
    RemovePeer {
        /// Peer index.
        peer: u32,
    },
    /// A handshake has ended.
    Install(Keys),
    /// A session is not to be used any more.
    Withdraw {
        /// Our receiver index.
        local_index: u32,
    },
    /// Say hello under the session that seals.
    Keepalive {
        /// Peer index.
        peer: u32,
    },
    /// Send a handshake message.
    Send {
        /// Where to.
        to: SocketAddr,
        /// From which of this host's addresses.
        from: Option<IpAddr>,
        /// The UDP payload.
        bytes: Vec<u8>,
    },
    /// Take nothing more, carry on with what waits for a moment, and end.
    Stop,
}

/// A session's indices and secrets.
#[derive(Clone, Serialize, Deserialize, zeroize::ZeroizeOnDrop, zeroize::Zeroize)]
pub struct Keys {
    /// Peer index.
    pub peer: u32,
    /// Receiver index in messages to us.
    pub local_index: u32,
    /// Receiver index in messages to the peer.
    pub remote_index: u32,
    /// The handshake's secret for what we send.
    pub tx: [u8; 32],
    /// The handshake's secret for what we receive.
    pub rx: [u8; 32],
    /// Boot time (ns) at which the handshake ended.
    pub created_ns: u64,
    /// Boot time (ns) after which it is not used.
    pub expires_ns: u64,
    /// Whether we were the handshake's initiator.
    pub is_initiator: bool,
}

/// From the workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromWorkers {
    /// The first message to each daemon. What it has of peers and sessions follows, then
    /// [`Self::Ready`].
    State {
        /// [`VERSION`].
        version: u32,
        /// Version of the program.
        program: String,
        /// What it was started with.
        mode: Mode,
        /// Interface index of each worker's device.
        devices: Vec<u32>,
        /// Speed of each cipher, in the order of their numbers, MiB/s.
        speeds: [u32; Cipher::ALL.len()],
    },
    /// A session that it has.
    Session {
        /// Peer index.
        peer: u32,
        /// Our receiver index.
        local_index: u32,
        /// The peer's.
        remote_index: u32,
        /// Boot time (ns) at which the handshake ended.
        created_ns: u64,
        /// Whether we were the handshake's initiator.
        is_initiator: bool,
        /// Whether the peer has proven that it has the keys.
        is_confirmed: bool,
        /// Whether it is the one that seals.
        is_sealing: bool,
    },
    /// That was all.
    Ready,
    /// A handshake message came.
    Received {
        /// From where.
        from: SocketAddr,
        /// The local address it was sent to.
        to: Option<IpAddr>,
        /// The UDP payload.
        bytes: Vec<u8>,
    },
    /// A peer has proven that it has the keys of a session.
    Confirmed {
        /// Peer index.
        peer: u32,
        /// Our receiver index.
        local_index: u32,
    },
    /// What became of peers, once a second.
    Peers(Vec<Report>),
    /// Messages and packets dropped, by reason, since the process started.
    Drops(Vec<(u32, u64)>),
}

/// What a peer's bulk path does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Peer index.
    pub peer: u32,
    /// Where messages go.
    pub endpoint: Option<SocketAddr>,
    /// Whether its bulk flows are served.
    pub is_served: bool,
    /// What seals messages to it.
    pub cipher: Cipher,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Messages sent.
    pub tx_packets: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Messages received and authenticated.
    pub rx_packets: u64,
    /// Boot time (ns) of the last message sent; 0 for never.
    pub last_tx_ns: u64,
    /// Of the last authenticated message received.
    pub last_rx_ns: u64,
    /// Of the last packet sent.
    pub last_data_tx_ns: u64,
    /// Of the last packet received.
    pub last_data_rx_ns: u64,
    /// How often it was given up because it did not answer.
    pub silences: u64,
}

/// Encodes and sends a message; the encoding is wiped.
///
/// # Errors
/// What `send` reports; `WouldBlock` if the other end does not keep up.
pub fn send<T: Serialize>(socket: &impl AsFd, message: &T) -> io::Result<()> {
    let mut bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = socket::send(socket.as_fd().as_raw_fd(), &bytes, flags);
    bytes.zeroize();
    Ok(sent.map(|_| ())?)
}

/// The next message; `None` when the other end is gone.
///
/// # Errors
/// What `recv` reports; `WouldBlock` if there is none; `InvalidData` for one that does not decode.
pub fn receive<T: for<'de> Deserialize<'de>>(socket: &impl AsFd) -> io::Result<Option<T>> {
    let mut buffer = [0; MAX_LEN];
    let received =
        match socket::recv(socket.as_fd().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(None),
            received => received?,
        };
    let message = postcard::from_bytes(&buffer[..received])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
    buffer[..received].zeroize();
    message.map(Some)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn report() -> Report {
        Report {
            peer: u32::MAX,
            endpoint: Some("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap()),
            is_served: true,
            cipher: Cipher::Aes,
            tx_bytes: u64::MAX,
            tx_packets: u64::MAX,
            rx_bytes: u64::MAX,
            rx_packets: u64::MAX,
            last_tx_ns: u64::MAX,
            last_rx_ns: u64::MAX,
            last_data_tx_ns: u64::MAX,
            last_data_rx_ns: u64::MAX,
            silences: u64::MAX,
        }
    }

    #[test]
    fn the_longest_messages_fit() {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let reports = FromWorkers::Peers(vec![report(); MAX_REPORTS]);
        send(&a, &reports).unwrap();
        assert_eq!(receive::<FromWorkers>(&b).unwrap(), Some(reports));
        assert_eq!(receive::<FromWorkers>(&b).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        socket::send(a.as_raw_fd(), &[200, 1, 2], MsgFlags::empty()).unwrap();
        assert_eq!(receive::<FromWorkers>(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(receive::<FromWorkers>(&b).unwrap(), None);
    }
}
