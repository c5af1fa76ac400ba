//! Runs one worker: a thread between a TAP device and its sockets. It segments and seals packets
//! from containers and sends them in batches. It opens and coalesces messages from peers and writes
//! the packets to the device. The packet path allocates nothing and takes no lock.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use overnode_ebpf::map::BULK_MESSAGE_LEN;
use overnode_ebpf::reason::{REASON_SLOTS, Reason};
use overnode_ebpf::wire::{
    ECN_MASK, ETHERNET_LEN, TYPE_COOKIE_REPLY, TYPE_INITIATION, bulk_header, ecn_decapsulated,
    from_bulk_header,
};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef};

use super::coalesce::Coalescer;
use super::control::FromWorkers;
use super::message::{HEADER_LEN, HELLO_LEN, Header, Hello, TAG_LEN};
use super::packet::{BadPacket, VNET_HEADER, VnetHeader};
use super::peer::Peer;
use super::segment::Segmentation;
use super::session::Session;
use super::udp::{Batch, BatchKey, Sockets};
use crate::checksum::fold;
use crate::datapath::{BulkMaps, Origin, ReceiveRing, boot_now};
use overnode_api::bulk::Cipher;
use overnode_api::bulk::Mode;
use overnode_core::handshake::gate::{Awaited, Gate, Judgment};
use overnode_types::{BootTime, PeerIndex, SessionIndex};

/// Longest frame that one read of the device returns, in bytes: both headers and the largest IP
/// packet.
const FRAME_LEN: usize = VNET_HEADER + ETHERNET_LEN + 65536;
/// Maximum number of batches per receive call, or of messages if the network stack delivers no
/// batches.
const RECEIVE_BATCH: usize = quinn_udp::BATCH_SIZE;
/// Maximum number of frames, or of receive calls, before the other direction has its turn.
const MAX_TURN: usize = 8;
/// Maximum number of messages from the receive ring per turn.
const MAX_RING_MESSAGES: usize = MAX_TURN * RECEIVE_BATCH;
/// Longest wait of a worker without work. It renews its heartbeat after each wait.
const MAX_WAIT: Duration = Duration::from_millis(45);
/// Pause after which a worker drops the frames pending in its device. After a shorter pause, late
/// packets still fill the gaps that their delay left.
const STALE_FRAMES: Duration = Duration::from_secs(3);
/// Time that the receive ring stays closed after a message that does not fit into it. More such
/// messages are likely to follow.
const RING_CLOSED: Duration = Duration::from_secs(1);
/// Time that the cached addresses of peers are used to judge handshake messages.
const PEER_ADDRESSES_TTL: Duration = Duration::from_secs(1);

/// A change to the set of peers and sessions, or the order to exit.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    /// Adds a peer.
    Peer(Arc<Peer>),
    /// Removes a peer and its sessions.
    RemovePeer(PeerIndex),
    /// Adds the session of a completed handshake.
    Session(Arc<Session>),
    /// Withdraws the session with this local index.
    Withdraw(SessionIndex),
    /// Exits.
    Stop,
}

/// State that all workers share.
pub(crate) struct Shared {
    /// Maps shared with the eBPF programs.
    pub maps: BulkMaps,
    /// Cipher to seal with.
    pub mode: Mode,
    /// Speed of this host with each cipher, in MiB/s.
    pub speeds: [u32; Cipher::ALL.len()],
    /// Number of workers.
    pub workers: u32,
    /// Dropped packets and messages, by reason.
    pub drops: [AtomicU64; REASON_SLOTS as usize],
    /// Events for the daemon.
    pub events: mpsc::SyncSender<FromWorkers>,
    /// Wakes the main thread, which forwards the events.
    pub wake: EventFd,
    /// Handshakes in progress.
    pub awaited: Awaited,
}

impl Shared {
    /// Counts a drop.
    pub(crate) fn count_drop(&self, reason: Reason) {
        if let Some(count) = self.drops.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Queues an event for the daemon. The event is lost if the queue is full.
    pub(crate) fn queue_event(&self, event: FromWorkers) {
        if self.events.try_send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// File descriptors that a worker moves packets between.
pub(crate) struct Handles {
    /// TAP device of the worker.
    pub device: File,
    /// UDP sockets of the worker.
    pub sockets: Sockets,
    /// Receive ring of the worker, which has no other consumer.
    pub ring: ReceiveRing,
}

/// Kind of a received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MessageKind {
    /// A packet for a container.
    Data,
    /// A hello or a handshake message.
    Other,
}

/// One worker.
pub(crate) struct Worker {
    number: u8,
    device: File,
    sockets: Sockets,
    ring: ReceiveRing,
    /// Time before which the receive ring stays closed.
    ring_closed_until: BootTime,
    gate: Gate,
    /// Cached addresses of peers, and when the cache expires.
    peer_addresses: (HashSet<IpAddr>, BootTime),
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    shared: Arc<Shared>,
    peers: HashMap<u32, Arc<Peer>>,
    sessions: HashMap<SessionIndex, Arc<Session>>,
    /// Peers that sent data since the last hello and are owed one.
    owed_hellos: Vec<Arc<Peer>>,
    frame: Box<[u8]>,
    batch: Batch,
    received: Vec<Box<[u8]>>,
    coalescer: Coalescer,
    is_stopping: bool,
}

impl Worker {
    /// Creates a worker without peers.
    pub(crate) fn new(
        number: u8,
        Handles { device, sockets, ring }: Handles,
        gate: Gate,
        coalesces_udp: bool,
        commands: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            number,
            device,
            sockets,
            ring,
            ring_closed_until: BootTime::NEVER,
            gate,
            peer_addresses: (HashSet::new(), BootTime::NEVER),
            commands,
            wake,
            shared,
            peers: HashMap::new(),
            sessions: HashMap::new(),
            owed_hellos: Vec::new(),
            frame: vec![0; FRAME_LEN].into(),
            batch: Batch::new(),
            received: (0..RECEIVE_BATCH).map(|_| vec![0; 65536].into()).collect(),
            coalescer: Coalescer::new(coalesces_udp),
            is_stopping: false,
        }
    }

    /// Runs until [`Command::Stop`] arrives or the device is gone.
    ///
    /// # Errors
    /// Fails if the device or a socket is broken.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut last = boot_now();
        loop {
            let now = boot_now();
            if now > last + STALE_FRAMES {
                self.drop_pending_frames()?;
            }
            last = now;
            self.shared.maps.alive(self.number.into(), now);
            if self.handle_command() || self.is_stopping {
                return Ok(());
            }
            let sent = self.send_turn(now)?;
            let received = self.receive_turn(now)?;
            self.send_due_hellos(now);
            if !sent && !received && self.ring.sleep() {
                self.wait()?;
                self.ring.wake();
            }
        }
    }

    /// Waits until there is something to do, but only briefly.
    fn wait(&self) -> io::Result<()> {
        let owes_hellos = !self.owed_hellos.is_empty();
        let wait = if owes_hellos { super::peer::FEEDBACK / 2 } else { MAX_WAIT };
        let device = self.device.as_fd();
        // The device takes the place of a missing address family. Polling a descriptor twice is
        // harmless.
        let v4 = self.sockets.v4.as_ref().map_or(device, |v4| v4.socket.as_fd());
        let v6 = self.sockets.v6.as_ref().map_or(device, |v6| v6.socket.as_fd());
        let mut fds =
            [device, self.wake.as_fd(), v4, v6].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [device, wake, ..] = &fds;
        if wake.revents().is_some_and(|events| !events.is_empty()) {
            let _ = self.wake.read();
        }
        if device
            .revents()
            .is_some_and(|events| events.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL))
        {
            return Err(io::Error::other("the TAP device is gone"));
        }
        Ok(())
    }

    /// Handles pending commands. Returns true if the worker must stop.
    fn handle_command(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Peer(peer) => {
                    self.peers.insert(peer.index.0, peer);
                }
                Command::RemovePeer(index) => {
                    self.peers.remove(&index.0);
                    self.sessions.retain(|_, session| session.peer != index);
                    self.owed_hellos.retain(|peer| peer.index != index);
                }
                Command::Session(session) => {
                    self.sessions.insert(session.local_index, session);
                }
                Command::Withdraw(local_index) => {
                    self.sessions.remove(&local_index);
                }
                Command::Stop => return true,
            }
        }
        false
    }

    /// Drops all frames pending in the device.
    fn drop_pending_frames(&mut self) -> io::Result<()> {
        while read(&mut self.device, &mut self.frame)?.is_some() {
            self.shared.count_drop(Reason::Expired);
        }
        Ok(())
    }

    fn send_turn(&mut self, now: BootTime) -> io::Result<bool> {
        let mut frames = 0;
        while frames < MAX_TURN
            && let Some(len) = read(&mut self.device, &mut self.frame)?
        {
            if let Err(reason) = self.handle_frame(len, now) {
                self.shared.count_drop(reason);
            }
            frames += 1;
        }
        if let Err(reason) = self.batch.send(&self.sockets) {
            self.shared.count_drop(reason);
        }
        Ok(frames > 0)
    }

    /// Segments and seals a frame from a container. Segments that do not fill a batch are sent with
    /// the next frame, or at the end of the turn.
    fn handle_frame(&mut self, len: usize, now: BootTime) -> Result<(), Reason> {
        let frame = self.frame.get(..len).ok_or(Reason::Malformed)?;
        let (vnet, frame) = frame.split_first_chunk::<VNET_HEADER>().ok_or(Reason::Malformed)?;
        let (ethernet, packet) =
            frame.split_first_chunk::<ETHERNET_LEN>().ok_or(Reason::Malformed)?;
        // The host's own stack may send frames into any interface. They are addressed to no peer.
        let (index, source) = from_bulk_header(ethernet).ok_or(Reason::Unsupported)?;
        let peer = self.peers.get(&index).ok_or(Reason::NoRoute)?;
        let session = peer.current.load();
        let session = session.as_ref().ok_or(Reason::NoSession)?;
        let endpoint = peer.endpoint.load();
        let endpoint = **endpoint.as_ref().ok_or(Reason::NoRoute)?;
        let segmentation =
            Segmentation::new(packet, &VnetHeader::from_bytes(*vnet)).map_err(|bad| match bad {
                BadPacket::Checksum { .. } => Reason::Checksum,
                _ => Reason::Malformed,
            })?;
        let cipher = peer.cipher(self.shared.mode, self.shared.speeds);
        let key =
            BatchKey { endpoint, ecn: packet.get(1).copied().ok_or(Reason::Malformed)? & ECN_MASK };
        let mut bytes = 0;
        for segment in 0..segmentation.len() {
            let len = segmentation.length(segment);
            let message_len = HEADER_LEN + len + TAG_LEN;
            if !self.batch.fits(&self.sockets, &key, message_len)
                && let Err(reason) = self.batch.send(&self.sockets)
            {
                // That batch held other messages, perhaps for another peer.
                self.shared.count_drop(reason);
            }
            self.batch.add(&key, message_len, |message| {
                let packet = message.get_mut(HEADER_LEN..).ok_or(Reason::Malformed)?;
                segmentation.write(segment, packet);
                check_source(packet, source)?;
                session.seal(self.number, cipher, segmentation.is_partial(), message, now)
            })?;
            bytes += len as u64;
        }
        if peer.record_sent(segmentation.len() as u64, bytes, now) {
            // Wake the main thread, which now has to check whether the peer answers.
            let _ = self.shared.wake.write(1);
        }
        Ok(())
    }

    /// Receives messages. Returns true if there were any.
    fn receive_turn(&mut self, now: BootTime) -> io::Result<bool> {
        // Messages in the sockets are older than those in an open ring, and newer than those in a
        // closed one.
        let any = if self.ring.is_closed() {
            let taken = self.receive_from_ring(now);
            let mut received = 0;
            if taken < MAX_RING_MESSAGES {
                received = self.receive_from_sockets(now)?;
                if received < MAX_TURN && now >= self.ring_closed_until {
                    self.ring.open();
                }
            }
            taken + received > 0
        } else {
            self.receive_from_sockets(now)? + self.receive_from_ring(now) > 0
        };
        // Not earlier, because the next call may continue the pending super-packets.
        let (device, shared) = (&mut self.device, &self.shared);
        self.coalescer.flush(&mut |frame| write(device, frame, shared));
        Ok(any)
    }

    /// Returns the number of messages. Fewer than a full turn means that the ring is empty.
    fn receive_from_ring(&mut self, now: BootTime) -> usize {
        let mut buffers = std::mem::take(&mut self.received);
        let mut taken = 0;
        if let Some(buffer) = buffers.first_mut() {
            while taken < MAX_RING_MESSAGES
                && let Some((message, origin)) = self.ring.take(buffer)
            {
                if let Err(reason) = self.handle_message(message, &origin, now) {
                    self.shared.count_drop(reason);
                }
                taken += 1;
            }
        }
        self.received = buffers;
        taken
    }

    /// Returns the number of calls that received messages, for the busier address family. Fewer
    /// than a full turn means that the sockets are empty.
    fn receive_from_sockets(&mut self, now: BootTime) -> io::Result<usize> {
        Ok(self.receive(true, now)?.max(self.receive(false, now)?))
    }

    fn receive(&mut self, is_v4: bool, now: BootTime) -> io::Result<usize> {
        for turn in 0..MAX_TURN {
            let socket = if is_v4 { &self.sockets.v4 } else { &self.sockets.v6 };
            let Some(socket) = socket else { return Ok(0) };
            let mut metas = [RecvMeta::default(); RECEIVE_BATCH];
            let count = {
                let mut buffers = self.received.iter_mut();
                let mut slices: [IoSliceMut<'_>; RECEIVE_BATCH] = std::array::from_fn(|_| {
                    IoSliceMut::new(buffers.next().map_or(&mut [][..], |buffer| &mut buffer[..]))
                });
                socket.state.recv(UdpSockRef::from(&socket.socket), &mut slices, &mut metas)
            };
            let count = match count {
                Ok(count) => count,
                Err(error) if is_transient(&error) => return Ok(turn),
                Err(error) => return Err(error),
            };
            let mut received = std::mem::take(&mut self.received);
            for (buffer, meta) in received.iter_mut().zip(&metas).take(count) {
                let fits = meta.len <= meta.stride && meta.len <= BULK_MESSAGE_LEN;
                let Some(bytes) = buffer.get_mut(..meta.len) else { continue };
                let ecn = meta.ecn.map_or(0, |ecn| ecn as u8);
                let origin = Origin { remote: meta.addr, local: meta.dst_ip, ecn };
                for message in bytes.chunks_mut(meta.stride.max(1)) {
                    match self.handle_message(message, &origin, now) {
                        // Only an authenticated message keeps the ring closed, not any large
                        // datagram.
                        Ok(MessageKind::Data) if !fits => {
                            self.ring_closed_until = now + RING_CLOSED
                        }
                        Ok(_) => {}
                        Err(reason) => self.shared.count_drop(reason),
                    }
                }
            }
            self.received = received;
            if count < RECEIVE_BATCH {
                return Ok(turn + 1);
            }
        }
        Ok(MAX_TURN)
    }

    /// Opens a message and handles it.
    fn handle_message(
        &mut self,
        message: &mut [u8],
        origin: &Origin,
        now: BootTime,
    ) -> Result<MessageKind, Reason> {
        if message.first().is_some_and(|kind| (TYPE_INITIATION..=TYPE_COOKIE_REPLY).contains(kind))
        {
            return self.handle_handshake(message, origin, now).map(|()| MessageKind::Other);
        }
        let header = Header::from_message(message).ok_or(Reason::Malformed)?;
        if !self.sessions.contains_key(&header.receiver) {
            // A peer uses a new session at once. The session may be in a command that is still
            // pending.
            self.is_stopping |= self.handle_command();
        }
        let session = self.sessions.get(&header.receiver).ok_or(Reason::UnknownIndex)?;
        let plaintext = session.open(&header, message, now)?;
        let peer = self.peers.get(&session.peer.0).ok_or(Reason::UnknownIndex)?;
        if session.confirm() {
            peer.current.store(Some(session.clone()));
        }
        peer.follow(origin.remote, origin.local);
        if let Some(hello) = Hello::from_plaintext(plaintext) {
            peer.record_received(0, now);
            peer.record_hello_received(hello);
            if hello.wants_answer && now >= peer.feedback_due() {
                let peer = peer.clone();
                send_hello(&self.shared, &self.sockets, self.number, &peer, false, now)?;
            }
            return Ok(MessageKind::Other);
        }
        peer.record_received(plaintext.len() as u64, now);
        if !self.owed_hellos.iter().any(|owed| owed.index == peer.index) {
            self.owed_hellos.push(peer.clone());
        }
        mark_congestion(plaintext, origin.ecn)?;
        let link = bulk_header(peer.index.0, [0; 4]);
        let (device, shared) = (&mut self.device, &self.shared);
        self.coalescer
            .push(link, plaintext, header.is_partial, &mut |frame| write(device, frame, shared));
        Ok(MessageKind::Data)
    }

    /// Forwards a handshake message to the daemon if the gate admits it.
    fn handle_handshake(
        &mut self,
        message: &[u8],
        origin: &Origin,
        now: BootTime,
    ) -> Result<(), Reason> {
        let Self { gate, peer_addresses, peers, shared, sockets, .. } = self;
        let is_peer = || {
            let (addresses, until) = peer_addresses;
            if *until <= now {
                let endpoints = peers.values().filter_map(|peer| peer.endpoint.load_full());
                *addresses = endpoints.map(|endpoint| endpoint.remote.ip()).collect();
                *until = now + PEER_ADDRESSES_TTL;
            }
            addresses.contains(&origin.remote.ip())
        };
        match gate.judge(Instant::now(), origin.remote.into(), message, is_peer) {
            Judgment::Admit(_) => {
                let (from, to) = (origin.remote, origin.local);
                shared.queue_event(FromWorkers::Received { from, to, bytes: message.to_vec() });
                Ok(())
            }
            Judgment::Reply(reply) => {
                let transmit = Transmit {
                    destination: origin.remote,
                    ecn: None,
                    contents: &reply,
                    segment_size: None,
                    src_ip: origin.local,
                };
                sockets.send(&transmit).map_err(|_| Reason::NoRoute)
            }
            Judgment::Drop(reason) => Err(reason),
        }
    }

    /// Sends the hellos that are due to peers whose data arrives.
    fn send_due_hellos(&mut self, now: BootTime) {
        let Self { owed_hellos, shared, sockets, number, .. } = self;
        owed_hellos.retain(|peer| {
            let is_due = now >= peer.feedback_due();
            if is_due && let Err(reason) = send_hello(shared, sockets, *number, peer, false, now) {
                shared.count_drop(reason);
            }
            !is_due
        });
    }
}

/// Sends a hello to a peer under its sealing session.
///
/// # Errors
/// Fails if the peer has no session or endpoint, if the session cannot seal, or if sending fails.
pub(crate) fn send_hello(
    shared: &Shared,
    sockets: &Sockets,
    worker: u8,
    peer: &Peer,
    wants_answer: bool,
    now: BootTime,
) -> Result<(), Reason> {
    let session = peer.current.load();
    let session = session.as_ref().ok_or(Reason::NoSession)?;
    let endpoint = peer.endpoint.load();
    let endpoint = endpoint.as_ref().ok_or(Reason::NoRoute)?;
    let mut message = [0; HEADER_LEN + HELLO_LEN + TAG_LEN];
    let hello = Hello { wants_answer, speeds: shared.speeds };
    message[HEADER_LEN..][..HELLO_LEN].copy_from_slice(&hello.to_bytes());
    let cipher = peer.cipher(shared.mode, shared.speeds);
    session.seal(worker, cipher, false, &mut message, now)?;
    let transmit = Transmit {
        destination: endpoint.remote,
        ecn: None,
        contents: &message,
        segment_size: None,
        src_ip: endpoint.local,
    };
    sockets.send(&transmit).map_err(|_| Reason::NoRoute)?;
    peer.record_hello_sent(now);
    Ok(())
}

/// Checks a packet just before it is sealed, after the last write to it: its source must still be
/// the address for which `from_container` admitted it.
fn check_source(packet: &[u8], source: [u8; 4]) -> Result<(), Reason> {
    let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    if is_v4 && packet.get(12..16) == Some(&source[..]) { Ok(()) } else { Err(Reason::Spoofed) }
}

/// Combines the ECN codepoints according to RFC 6040. Supports IPv4 only, because there are no
/// other packets yet.
fn mark_congestion(packet: &mut [u8], outer: u8) -> Result<(), Reason> {
    let Some(header) = packet.first_chunk_mut::<12>() else { return Err(Reason::Malformed) };
    if header[0] >> 4 != 4 {
        return Err(Reason::Unsupported);
    }
    let inner = header[1];
    let ecn = ecn_decapsulated(outer, inner).ok_or(Reason::Congestion)?;
    let marked = inner & !ECN_MASK | ecn;
    if marked != inner {
        let before = u16::from_be_bytes([header[0], inner]);
        let after = u16::from_be_bytes([header[0], marked]);
        let sum = u16::from_be_bytes([header[10], header[11]]);
        header[1] = marked;
        // RFC 1624, equation 3.
        let new = !fold(u32::from(!sum) + u32::from(!before) + u32::from(after));
        [header[10], header[11]] = new.to_be_bytes();
    }
    Ok(())
}

/// Reads the next frame of the device, or returns `None` if none is pending.
fn read(device: &mut File, frame: &mut [u8]) -> io::Result<Option<usize>> {
    match device.read(frame) {
        Ok(0) => Err(io::Error::other("the TAP device is gone")),
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(device: &mut File, frame: &[u8], shared: &Shared) {
    // The device is down, memory is short, or the kernel rejects the frame. Only this packet is
    // lost.
    if device.write(frame).is_err() {
        shared.count_drop(Reason::Helper);
    }
}

/// Returns true for errors that do not break a socket: nothing is pending, or the error belongs to
/// an earlier message.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::EINTR
                | libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::ENOBUFS
                | libc::ENOMEM
        )
    )
}
