//! Manages peers and their sessions in `PEERS` and `SESSIONS`.
//!
//! A slot is filled while its state is `FREE`. It is published first by its state, then by the
//! peer's `tx_slot`. It is withdrawn in the reverse order, and wiped once no program can still be
//! reading its keys.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use overnode_ebpf::map::{
    Peer, SESSION_FREE, SESSION_LIVE, SESSION_SLOT_BITS, SESSION_UNCONFIRMED, Session,
};
use overnode_ebpf::replay::Window;
use overnode_ebpf::wire::keepalive_frame;

use super::Datapath;
use super::address::from_map;
use super::clock::Clock;
use super::maps::{Cell, Slots};
use overnode_core::handshake::{REJECT_AFTER_TIME, SessionKeys};
use overnode_types::{BootTime, InterfaceIndex, PeerIndex, PublicKey, Secret, SessionIndex};

/// Time that a withdrawn slot keeps its keys. Programs finish in far less. It is half of the second
/// after which the handshakes reuse a slot.
const QUARANTINE: Duration = Duration::from_millis(500);

/// A peer as stored in the maps.
#[derive(Clone, Debug)]
pub struct PeerState {
    /// Index in `PEERS`.
    pub index: PeerIndex,
    /// Curve25519 public key.
    pub public_key: PublicKey,
    /// Destination of messages to the peer: the configured endpoint, or the source of the last
    /// authenticated message.
    pub endpoint: Option<SocketAddr>,
    /// Interface that these messages leave by. `None` if there is no route.
    pub ifindex: Option<InterfaceIndex>,
    /// Largest inner packet, in bytes.
    pub mtu: u32,
    /// Relay for messages to the peer. `None` if they take the direct path.
    pub via: Option<PeerIndex>,
    /// Sessions of the peer, ordered by slot.
    pub sessions: Vec<SessionState>,
    /// Inner bytes sent.
    pub tx_bytes: u64,
    /// Messages sent.
    pub tx_packets: u64,
    /// Inner bytes received.
    pub rx_bytes: u64,
    /// Messages received and authenticated.
    pub rx_packets: u64,
    /// Last message sent.
    pub last_sent: Option<Instant>,
    /// Last message sent that was not a keepalive.
    pub last_data_sent: Option<Instant>,
    /// Last authenticated message received.
    pub last_received: Option<Instant>,
    /// Last authenticated message received that was not a keepalive.
    pub last_data_received: Option<Instant>,
}

/// A session as stored in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionState {
    /// Receiver index of messages from the peer.
    pub local_index: SessionIndex,
    /// Receiver index of messages to the peer.
    pub remote_index: SessionIndex,
    /// When the handshake completed.
    pub created: Instant,
    /// When the session expires.
    pub expires: Instant,
    /// True if this node initiated the handshake.
    pub initiator: bool,
    /// True if the peer has proven that it has the keys.
    pub confirmed: bool,
    /// True if messages to the peer are sealed with this session.
    pub sealing: bool,
    /// Messages sealed with this session.
    pub sent: u64,
}

impl Datapath {
    /// Returns every configured peer with its counters and its live sessions.
    ///
    /// # Errors
    /// None in practice, since the maps are in memory.
    pub fn peers(&self) -> Result<Vec<PeerState>> {
        let clock = Clock::now();
        let mut peers: Vec<PeerState> = (0..self.maps.peers.len())
            .filter_map(|index| {
                let cell = self.maps.peers.at(index)?;
                (cell.present().load(Ordering::Acquire) != 0)
                    .then(|| peer_state(index, &cell.read(), clock))
            })
            .collect();
        for slot in 1..self.maps.sessions.len() {
            let Some(cell) = self.maps.sessions.at(slot) else { continue };
            let state = cell.state().load(Ordering::Acquire);
            if state == SESSION_FREE {
                continue;
            }
            let session = cell.read();
            let Ok(position) = peers.binary_search_by_key(&session.peer, |peer| peer.index.0)
            else {
                continue;
            };
            let Some(peer) = peers.get_mut(position) else { continue };
            let sealing = self
                .maps
                .peers
                .at(session.peer)
                .is_some_and(|cell| cell.tx_slot().load(Ordering::Relaxed) == slot);
            peer.sessions.push(SessionState {
                local_index: SessionIndex::new(session.local_index),
                remote_index: SessionIndex::new(session.remote_index),
                created: clock
                    .instant(BootTime::from_nanos(session.created_ns))
                    .unwrap_or_else(Instant::now),
                expires: clock
                    .instant(BootTime::from_nanos(session.expires_ns))
                    .unwrap_or_else(Instant::now),
                initiator: session.initiator != 0,
                confirmed: session.state == SESSION_LIVE,
                sealing,
                sent: session.tx_counter,
            });
        }
        Ok(peers)
    }

    /// Configures a peer. Looks up the route to `endpoint` and receives messages on the interface
    /// that leads there. Without an endpoint the current one is kept. If the peer has a new key,
    /// its sessions are withdrawn first.
    ///
    /// A missing route to the endpoint is not an error: [`Datapath::refresh`] tries again.
    ///
    /// # Errors
    /// Fails if the index is out of range, or if netlink or a map refuses. An interface that cannot
    /// be used is reported in [`Datapath::underlay`] instead.
    pub async fn set_peer(
        &mut self,
        peer: PeerIndex,
        public_key: &PublicKey,
        endpoint: Option<SocketAddr>,
    ) -> Result<()> {
        let present = self.peer_cell(peer)?.read();
        if present.present == 0 || present.public_key != public_key.0 {
            self.withdraw_all(peer);
            let mtu = self.container_mtu();
            let cell = self.peer_cell(peer)?;
            cell.present().store(0, Ordering::Release);
            cell.write(&Peer { public_key: public_key.0, mtu, ..Peer::default() });
            cell.present().store(1, Ordering::Release);
        }
        match endpoint {
            Some(endpoint) => self.set_endpoint(peer, endpoint).await,
            None => Ok(()),
        }
    }

    /// Removes a peer with its routes, sessions and counters.
    ///
    /// # Errors
    /// Fails if the index is out of range, or if the routes cannot be changed.
    pub fn remove_peer(&mut self, peer: PeerIndex) -> Result<()> {
        self.set_routes(peer, &[])?;
        self.withdraw_all(peer);
        self.largest.remove(&peer);
        let cell = self.peer_cell(peer)?;
        cell.present().store(0, Ordering::Release);
        cell.wipe();
        Ok(())
    }

    /// Writes a session into its slot and puts it into use.
    ///
    /// # Errors
    /// Fails if the peer is not configured, or if the slot is in use or was withdrawn less than
    /// half a second ago.
    pub fn install_session(&mut self, peer: PeerIndex, keys: &SessionKeys) -> Result<()> {
        let slot = slot_of(keys.local_index)?;
        let (to, session) = (self.peer_cell(peer)?, self.session_cell(slot)?);
        ensure!(to.present().load(Ordering::Acquire) != 0, "peer {peer} is not configured");
        ensure!(
            session.state().load(Ordering::Acquire) == SESSION_FREE && session.is_wiped(),
            "session slot {slot} is in use, or was withdrawn a moment ago"
        );
        let created = Clock::now().boot_time(keys.created);
        let mut value = Session {
            state: SESSION_FREE,
            peer: peer.0,
            local_index: keys.local_index.get(),
            remote_index: keys.remote_index.get(),
            tx_key: words(&keys.tx_key),
            rx_key: words(&keys.rx_key),
            created_ns: created.as_nanos(),
            expires_ns: (created + REJECT_AFTER_TIME).as_nanos(),
            initiator: keys.initiator.into(),
            tx_counter: 0,
            window: Window::new(),
        };
        session.write(&value);
        value.tx_key = [0; 8];
        value.rx_key = [0; 8];
        std::hint::black_box(&value);
        let state = if keys.initiator { SESSION_LIVE } else { SESSION_UNCONFIRMED };
        session.state().store(state, Ordering::Release);
        if keys.initiator {
            to.tx_slot().store(slot, Ordering::Release);
        }
        Ok(())
    }

    /// Withdraws a session. Its keys are wiped half a second later, when no program uses them any
    /// more. Withdrawing one that is already gone succeeds.
    ///
    /// # Errors
    /// Fails if the index names slot 0 or a slot out of range.
    pub fn withdraw_session(&mut self, peer: PeerIndex, local_index: SessionIndex) -> Result<()> {
        let slot = slot_of(local_index)?;
        let session = self.session_cell(slot)?;
        if session.state().load(Ordering::Acquire) == SESSION_FREE
            || session.local_index().load(Ordering::Relaxed) != local_index.get()
            || session.peer().load(Ordering::Relaxed) != peer.0
        {
            return Ok(());
        }
        self.withdraw(slot);
        Ok(())
    }

    /// Sends an empty message to a peer under its sealing session. Without a session the programs
    /// drop it and count the drop.
    ///
    /// # Errors
    /// Fails if the offload veth is gone.
    pub async fn keepalive(&mut self, peer: PeerIndex) -> Result<()> {
        self.offload_veth.send(&keepalive_frame(peer.0))
    }

    fn withdraw_all(&self, peer: PeerIndex) {
        for slot in 1..self.maps.sessions.len() {
            if let Some(session) = self.maps.sessions.at(slot)
                && session.state().load(Ordering::Acquire) != SESSION_FREE
                && session.peer().load(Ordering::Relaxed) == peer.0
            {
                self.withdraw(slot);
            }
        }
    }

    fn withdraw(&self, slot: u32) {
        let Some(session) = self.maps.sessions.at(slot) else { return };
        if let Some(peer) = self.maps.peers.at(session.peer().load(Ordering::Relaxed)) {
            let _ = peer.tx_slot().compare_exchange(slot, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
        session.state().store(SESSION_FREE, Ordering::Release);
        wipe_later(Arc::clone(&self.maps.sessions), vec![slot]);
    }

    /// Cleans up after a daemon that was killed: withdraws sessions of peers that are not
    /// configured, and wipes free slots that are not empty.
    pub(super) fn clean_sessions(&self) {
        let mut left = Vec::new();
        for slot in 1..self.maps.sessions.len() {
            let Some(session) = self.maps.sessions.at(slot) else { continue };
            if session.state().load(Ordering::Acquire) == SESSION_FREE {
                if !session.is_wiped() {
                    left.push(slot);
                }
                continue;
            }
            let peer = self.maps.peers.at(session.peer().load(Ordering::Relaxed));
            if peer.is_none_or(|peer| peer.present().load(Ordering::Acquire) == 0) {
                self.withdraw(slot);
            }
        }
        if !left.is_empty() {
            wipe_later(Arc::clone(&self.maps.sessions), left);
        }
    }

    pub(super) fn peer_cell(&self, peer: PeerIndex) -> Result<Cell<'_, Peer>> {
        ensure!(peer.0 != 0, "0 is not a peer index");
        self.maps.peers.at(peer.0).with_context(|| format!("peer index {peer} is out of range"))
    }

    fn session_cell(&self, slot: u32) -> Result<Cell<'_, Session>> {
        self.maps.sessions.at(slot).with_context(|| format!("session slot {slot} is out of range"))
    }
}

/// Wipes slots after the quarantine, unless they were reused in the meantime.
fn wipe_later(sessions: Arc<Slots<Session>>, slots: Vec<u32>) {
    let indexes: Vec<(u32, u32)> = slots
        .into_iter()
        .filter_map(|slot| Some((slot, sessions.at(slot)?.local_index().load(Ordering::Relaxed))))
        .collect();
    tokio::spawn(async move {
        tokio::time::sleep(QUARANTINE).await;
        for (slot, local_index) in indexes {
            if let Some(session) = sessions.at(slot)
                && session.state().load(Ordering::Acquire) == SESSION_FREE
                && session.local_index().load(Ordering::Relaxed) == local_index
            {
                session.wipe();
            }
        }
    });
}

fn slot_of(local_index: SessionIndex) -> Result<u32> {
    match local_index.get() & ((1 << SESSION_SLOT_BITS) - 1) {
        0 => bail!("receiver index {local_index} names slot 0, which means \"none\""),
        slot => Ok(slot),
    }
}

fn words(key: &Secret) -> [u32; 8] {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(key.0.chunks_exact(4)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    words
}

fn peer_state(index: u32, peer: &Peer, clock: Clock) -> PeerState {
    let remote = from_map(peer.remote);
    let port = u16::from_be(peer.remote_port_be);
    let instant = |nanos| clock.instant(BootTime::from_nanos(nanos));
    PeerState {
        index: PeerIndex(index),
        public_key: PublicKey(peer.public_key),
        endpoint: (port != 0 && !remote.is_unspecified()).then(|| SocketAddr::new(remote, port)),
        ifindex: InterfaceIndex::from_kernel(peer.ifindex),
        mtu: peer.mtu,
        via: (peer.via != 0).then_some(PeerIndex(peer.via)),
        sessions: Vec::new(),
        tx_bytes: peer.tx_bytes,
        tx_packets: peer.tx_packets,
        rx_bytes: peer.rx_bytes,
        rx_packets: peer.rx_packets,
        last_sent: instant(peer.last_tx_ns),
        last_data_sent: instant(peer.last_data_tx_ns),
        last_received: instant(peer.last_rx_ns),
        last_data_received: instant(peer.last_data_rx_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_little_endian_words() {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&[1, 2, 3, 4]);
        key[31] = 0x80;
        let words = words(&Secret(key));
        assert_eq!((words[0], words[7]), (0x0403_0201, 0x8000_0000));
    }

    #[test]
    fn slot_0_is_refused() {
        assert_eq!(slot_of(SessionIndex::new(0xabcd_e001)).unwrap(), 1);
        assert_eq!(slot_of(SessionIndex::new(0xffff_ffff)).unwrap(), 4095);
        assert!(slot_of(SessionIndex::new(0xabcd_e000)).is_err());
    }
}
