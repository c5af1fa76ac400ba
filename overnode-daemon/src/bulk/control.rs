//! Defines the protocol between the daemon and the workers' process. They use a socket in the run
//! directory, where one packet carries one message.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use overnode_api::bulk::{Cipher, Mode};
use overnode_types::{BootTime, InterfaceIndex, SessionIndex};

/// Name of the socket in the run directory.
pub const SOCKET: &str = "bulk.sock";
/// Version of the protocol. It changes when a daemon and a process would no longer understand each
/// other.
pub const VERSION: u32 = 3;
/// Longest message, in bytes.
pub const MAX_LEN: usize = 16384;
/// Maximum number of peers in one [`FromWorkers::Peers`].
pub const MAX_REPORTS: usize = 64;

/// A message to the workers.
#[derive(Serialize, Deserialize)]
pub enum ToWorkers {
    /// Adds or updates a peer.
    Peer {
        /// Peer index.
        peer: u32,
        /// Destination of messages until a message from the peer arrives.
        endpoint: Option<SocketAddr>,
        /// Round-trip time in milliseconds. `None` keeps the previous value.
        rtt_ms: Option<u32>,
    },
    /// Removes a peer and its sessions.
    RemovePeer {
        /// Peer index.
        peer: u32,
    },
    /// Installs the session of a completed handshake.
    Install(Keys),
    /// Withdraws a session.
    Withdraw {
        /// Local receiver index.
        local_index: SessionIndex,
    },
    /// Sends a hello under the sealing session.
    Keepalive {
        /// Peer index.
        peer: u32,
    },
    /// Sends a handshake message.
    Send {
        /// Destination.
        to: SocketAddr,
        /// Local address to send from.
        from: Option<IpAddr>,
        /// UDP payload.
        bytes: Vec<u8>,
    },
    /// Takes no more packets, handles pending ones for a moment, and exits.
    Stop,
}

/// A session's indexes and secrets.
#[derive(Clone, Serialize, Deserialize, zeroize::ZeroizeOnDrop, zeroize::Zeroize)]
pub struct Keys {
    /// Peer index.
    pub peer: u32,
    /// Receiver index of messages to this node.
    pub local_index: SessionIndex,
    /// Receiver index of messages to the peer.
    pub remote_index: SessionIndex,
    /// Handshake secret for messages that this node sends.
    pub tx: [u8; 32],
    /// Handshake secret for messages that this node receives.
    pub rx: [u8; 32],
    /// When the handshake completed.
    pub created_ns: BootTime,
    /// When the session expires.
    pub expires_ns: BootTime,
    /// True if this node initiated the handshake.
    pub is_initiator: bool,
}

/// A message from the workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromWorkers {
    /// The first message to each daemon. The process's sessions follow, then [`Self::Ready`].
    State {
        /// Protocol version, [`VERSION`].
        version: u32,
        /// Version of the program.
        program: String,
        /// Mode that the process was started with.
        mode: Mode,
        /// Interface index of each worker's device.
        devices: Vec<InterfaceIndex>,
        /// Speed of each cipher, ordered by number, in MiB/s.
        speeds: [u32; Cipher::ALL.len()],
    },
    /// An existing session.
    Session {
        /// Peer index.
        peer: u32,
        /// Local receiver index.
        local_index: SessionIndex,
        /// Receiver index of the peer.
        remote_index: SessionIndex,
        /// When the handshake completed.
        created_ns: BootTime,
        /// True if this node initiated the handshake.
        is_initiator: bool,
        /// True if the peer has proven that it has the keys.
        is_confirmed: bool,
        /// True if it is the sealing session.
        is_sealing: bool,
    },
    /// The initial state is complete.
    Ready,
    /// A handshake message was received.
    Received {
        /// Source address.
        from: SocketAddr,
        /// Local address that it was sent to.
        to: Option<IpAddr>,
        /// UDP payload.
        bytes: Vec<u8>,
    },
    /// A peer has proven that it has the keys of a session.
    Confirmed {
        /// Peer index.
        peer: u32,
        /// Local receiver index.
        local_index: SessionIndex,
    },
    /// Reports about peers, once a second.
    Peers(Vec<Report>),
    /// Dropped messages and packets, by reason, since the process started.
    Drops(Vec<(u32, u64)>),
}

/// State and counters of one peer on the bulk path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Peer index.
    pub peer: u32,
    /// Destination of messages.
    pub endpoint: Option<SocketAddr>,
    /// True if its bulk flows are served.
    pub is_served: bool,
    /// Cipher that seals messages to it.
    pub cipher: Cipher,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Messages sent.
    pub tx_packets: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Messages received and authenticated.
    pub rx_packets: u64,
    /// When the last message was sent, or [`BootTime::NEVER`].
    pub last_tx_ns: BootTime,
    /// When the last authenticated message was received, likewise.
    pub last_rx_ns: BootTime,
    /// When the last packet was sent, likewise.
    pub last_data_tx_ns: BootTime,
    /// When the last packet was received, likewise.
    pub last_data_rx_ns: BootTime,
    /// How often the peer was given up because it did not answer.
    pub silences: u64,
}

/// Encodes and sends a message, then wipes the encoded bytes.
///
/// # Errors
/// Returns the error of `send`, which is `WouldBlock` if the other end does not keep up.
pub fn send<T: Serialize>(socket: &impl AsFd, message: &T) -> io::Result<()> {
    let mut bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = socket::send(socket.as_fd().as_raw_fd(), &bytes, flags);
    bytes.zeroize();
    Ok(sent.map(|_| ())?)
}

/// Receives the next message. Returns `None` if the other end is gone.
///
/// # Errors
/// Returns the error of `recv`, which is `WouldBlock` if no message is pending. Returns
/// `InvalidData` for a message that does not decode.
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
            last_tx_ns: BootTime::from_nanos(u64::MAX),
            last_rx_ns: BootTime::from_nanos(u64::MAX),
            last_data_tx_ns: BootTime::from_nanos(u64::MAX),
            last_data_rx_ns: BootTime::from_nanos(u64::MAX),
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
