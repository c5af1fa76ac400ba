//! One worker: a thread between a TAP device and its sockets. Packets of containers are cut, sealed
//! and sent in batches; what peers send is opened, joined and written to the device. On the way of
//! a packet nothing is allocated and no lock is taken.

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

use super::control::{FromWorkers, Mode};
use super::join::Joiner;
use super::message::{Cipher, HEADER_LEN, HELLO_LEN, Header, Hello, TAG_LEN};
use super::packet::{BadPacket, VNET_HEADER, VnetHeader};
use super::peer::Peer;
use super::segment::Cut;
use super::session::Session;
use super::udp::{Batch, Sockets, Way};
use crate::checksum::fold;
use crate::datapath::{BulkMaps, Inbox, Origin, boot_now_ns};
use crate::handshake::gate::{Awaited, Gate, Judgment};
use crate::types::PeerIndex;

/// What one read of the device gives at most: both headers and the largest IP packet.
const FRAME_LEN: usize = VNET_HEADER + ETHERNET_LEN + 65536;
/// Batches that one call receives, or single messages where the network gives no batches.
const RECEIVES: usize = quinn_udp::BATCH_SIZE;
/// Frames, or calls to receive, before the other direction has its turn.
const TURN: usize = 8;
/// Messages out of the inbox, likewise.
const INBOX_TURN: usize = TURN * RECEIVES;
/// How long a worker without work waits; it says that it lives each time.
const WAIT: Duration = Duration::from_millis(45);
/// A worker that was not at work for so long (ns) drops what waits. After less, what is late still
/// fills the gaps that it left.
const STALE_NS: u64 = 3_000_000_000;
/// How long (ns) the inbox stays closed after something came that does not fit into it: there will
/// be more like that.
const CLOSED_NS: u64 = 1_000_000_000;
/// How long (ns) what is known of peers' addresses is used for handshake messages.
const KNOWN_NS: u64 = 1_000_000_000;

/// What changes the set of peers and sessions.
#[derive(Clone, Debug)]
pub enum Command {
    /// A peer came.
    Peer(Arc<Peer>),
    /// A peer went, with its sessions.
    RemovePeer(PeerIndex),
    /// A handshake has ended.
    Session(Arc<Session>),
    /// A session is not to be used any more.
    Withdraw(u32),
    /// End.
    Stop,
}

/// What all workers share.
pub struct Shared {
    /// The maps by which the programs know of workers and peers.
    pub maps: BulkMaps,
    /// Which cipher to seal with.
    pub mode: Mode,
    /// How fast this host is with each, MiB/s.
    pub speeds: [u32; Cipher::ALL.len()],
    /// How many workers there are.
    pub workers: u32,
    /// Packets and messages dropped, by reason.
    pub drops: [AtomicU64; REASON_SLOTS as usize],
    /// What the daemon is to hear.
    pub events: mpsc::SyncSender<FromWorkers>,
    /// Wakes whoever carries it there.
    pub wake: EventFd,
    /// The handshakes under way.
    pub awaited: Awaited,
}

impl Shared {
    /// Counts what was dropped.
    pub fn dropped(&self, reason: Reason) {
        if let Some(count) = self.drops.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells the daemon, if it keeps up.
    pub fn tell(&self, event: FromWorkers) {
        if self.events.try_send(event).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// Between what a worker moves packets.
pub struct Handles {
    /// Its TAP device.
    pub device: File,
    /// Its sockets.
    pub sockets: Sockets,
    /// Its inbox, which nobody else reads.
    pub inbox: Inbox,
}

/// What a message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// A packet for a container.
    Data,
    /// A greeting, or of a handshake.
    Other,
}

/// One worker.
pub struct Worker {
    number: u8,
    device: File,
    sockets: Sockets,
    inbox: Inbox,
    /// Boot time (ns) before which the inbox stays closed.
    closed_until: u64,
    gate: Gate,
    /// Addresses of peers, and until when (ns) they are taken for that.
    known: (HashSet<IpAddr>, u64),
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    shared: Arc<Shared>,
    peers: HashMap<u32, Arc<Peer>>,
    sessions: HashMap<u32, Arc<Session>>,
    /// Who sent data and is to be told that it arrives.
    owed: Vec<Arc<Peer>>,
    frame: Box<[u8]>,
    batch: Batch,
    received: Vec<Box<[u8]>>,
    joiner: Joiner,
    is_ending: bool,
}

impl Worker {
    /// A worker that knows nobody.
    pub fn new(
        number: u8,
        Handles { device, sockets, inbox }: Handles,
        gate: Gate,
        joins_udp: bool,
        commands: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            number,
            device,
            sockets,
            inbox,
            closed_until: 0,
            gate,
            known: (HashSet::new(), 0),
            commands,
            wake,
            shared,
            peers: HashMap::new(),
            sessions: HashMap::new(),
            owed: Vec::new(),
            frame: vec![0; FRAME_LEN].into(),
            batch: Batch::new(),
            received: (0..RECEIVES).map(|_| vec![0; 65536].into()).collect(),
            joiner: Joiner::new(joins_udp),
            is_ending: false,
        }
    }

    /// Works until it is told to stop, or its device is gone.
    ///
    /// # Errors
    /// The device or a socket is broken.
    pub fn run(mut self) -> io::Result<()> {
        let mut last = boot_now_ns();
        loop {
            let now = boot_now_ns();
            if now > last + STALE_NS {
                self.discard()?;
            }
            last = now;
            self.shared.maps.alive(self.number.into(), now);
            if self.obey() || self.is_ending {
                return Ok(());
            }
            let sent = self.send_turn(now)?;
            let received = self.receive_turn(now)?;
            self.pay(now);
            if !sent && !received && self.inbox.sleep() {
                self.wait()?;
                self.inbox.wake();
            }
        }
    }

    /// Waits for anything to do, but not for long.
    fn wait(&self) -> io::Result<()> {
        let owes = !self.owed.is_empty();
        let wait = if owes { Duration::from_nanos(super::peer::FEEDBACK_NS / 2) } else { WAIT };
        let device = self.device.as_fd();
        // A family that is missing has the device's place: a descriptor that is there twice does no
        // harm.
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
            return Err(io::Error::other("the device is gone"));
        }
        Ok(())
    }

    /// Takes what the control thread says. True if it is the end.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Peer(peer) => {
                    self.peers.insert(peer.index.0, peer);
                }
                Command::RemovePeer(index) => {
                    self.peers.remove(&index.0);
                    self.sessions.retain(|_, session| session.peer != index);
                    self.owed.retain(|peer| peer.index != index);
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

    /// Drops what waits in the device.
    fn discard(&mut self) -> io::Result<()> {
        while read(&mut self.device, &mut self.frame)?.is_some() {
            self.shared.dropped(Reason::Expired);
        }
        Ok(())
    }

    fn send_turn(&mut self, now: u64) -> io::Result<bool> {
        let mut frames = 0;
        while frames < TURN
            && let Some(len) = read(&mut self.device, &mut self.frame)?
        {
            if let Err(reason) = self.take_frame(len, now) {
                self.shared.dropped(reason);
            }
            frames += 1;
        }
        if let Err(reason) = self.batch.send(&self.sockets) {
            self.shared.dropped(reason);
        }
        Ok(frames > 0)
    }

    /// Cuts and seals what a container sent. What of it does not fill a batch is sent with the
    /// next, or at the end of the turn.
    fn take_frame(&mut self, len: usize, now: u64) -> Result<(), Reason> {
        let frame = self.frame.get(..len).ok_or(Reason::Malformed)?;
        let (vnet, frame) = frame.split_first_chunk::<VNET_HEADER>().ok_or(Reason::Malformed)?;
        let (ethernet, packet) =
            frame.split_first_chunk::<ETHERNET_LEN>().ok_or(Reason::Malformed)?;
        // The host's own stack may speak into any interface: that is nobody's packet.
        let (index, source) = from_bulk_header(ethernet).ok_or(Reason::Unsupported)?;
        let peer = self.peers.get(&index).ok_or(Reason::NoRoute)?;
        let session = peer.current.load();
        let session = session.as_ref().ok_or(Reason::NoSession)?;
        let endpoint = peer.endpoint.load();
        let endpoint = **endpoint.as_ref().ok_or(Reason::NoRoute)?;
        let cut = Cut::new(packet, &VnetHeader::from_bytes(*vnet)).map_err(|bad| match bad {
            BadPacket::Checksum { .. } => Reason::Checksum,
            _ => Reason::Malformed,
        })?;
        let cipher = peer.cipher(self.shared.mode, self.shared.speeds);
        let way =
            Way { endpoint, ecn: packet.get(1).copied().ok_or(Reason::Malformed)? & ECN_MASK };
        let mut bytes = 0;
        for segment in 0..cut.len() {
            let len = cut.length(segment);
            let message_len = HEADER_LEN + len + TAG_LEN;
            if !self.batch.takes(&self.sockets, &way, message_len)
                && let Err(reason) = self.batch.send(&self.sockets)
            {
                // Those were others, perhaps to another peer.
                self.shared.dropped(reason);
            }
            self.batch.add(&way, message_len, |message| {
                let packet = message.get_mut(HEADER_LEN..).ok_or(Reason::Malformed)?;
                cut.write(segment, packet);
                may_leave(packet, source)?;
                session.seal(self.number, cipher, cut.is_partial(), message, now)
            })?;
            bytes += len as u64;
        }
        if peer.sent(cut.len() as u64, bytes, now) {
            // From now on it matters whether the peer answers.
            let _ = self.shared.wake.write(1);
        }
        Ok(())
    }

    /// True if there was anything.
    fn receive_turn(&mut self, now: u64) -> io::Result<bool> {
        // What is in the sockets came before what is in an open inbox, and after what is in a
        // closed one.
        let any = if self.inbox.is_closed() {
            let taken = self.receive_from_inbox(now);
            let mut received = 0;
            if taken < INBOX_TURN {
                received = self.receive_from_sockets(now)?;
                if received < TURN && now >= self.closed_until {
                    self.inbox.open();
                }
            }
            taken + received > 0
        } else {
            self.receive_from_sockets(now)? + self.receive_from_inbox(now) > 0
        };
        // Not earlier: what the next call brings may continue what is there.
        let (device, shared) = (&mut self.device, &self.shared);
        self.joiner.flush(&mut |frame| write(device, frame, shared));
        Ok(any)
    }

    /// How many messages there were; fewer than a turn has if there are no more.
    fn receive_from_inbox(&mut self, now: u64) -> usize {
        let mut buffers = std::mem::take(&mut self.received);
        let mut taken = 0;
        if let Some(buffer) = buffers.first_mut() {
            while taken < INBOX_TURN
                && let Some((message, origin)) = self.inbox.take(buffer)
            {
                if let Err(reason) = self.take(message, &origin, now) {
                    self.shared.dropped(reason);
                }
                taken += 1;
            }
        }
        self.received = buffers;
        taken
    }

    /// How many calls brought something; fewer than a turn has if there is no more.
    fn receive_from_sockets(&mut self, now: u64) -> io::Result<usize> {
        Ok(self.receive(true, now)?.max(self.receive(false, now)?))
    }

    fn receive(&mut self, is_v4: bool, now: u64) -> io::Result<usize> {
        for turn in 0..TURN {
            let socket = if is_v4 { &self.sockets.v4 } else { &self.sockets.v6 };
            let Some(socket) = socket else { return Ok(0) };
            let mut metas = [RecvMeta::default(); RECEIVES];
            let got = {
                let mut buffers = self.received.iter_mut();
                let mut slices: [IoSliceMut<'_>; RECEIVES] = std::array::from_fn(|_| {
                    IoSliceMut::new(buffers.next().map_or(&mut [][..], |buffer| &mut buffer[..]))
                });
                socket.state.recv(UdpSockRef::from(&socket.socket), &mut slices, &mut metas)
            };
            let got = match got {
                Ok(got) => got,
                Err(error) if is_passing(&error) => return Ok(turn),
                Err(error) => return Err(error),
            };
            let mut received = std::mem::take(&mut self.received);
            for (buffer, meta) in received.iter_mut().zip(&metas).take(got) {
                let fits = meta.len <= meta.stride && meta.len <= BULK_MESSAGE_LEN;
                let Some(bytes) = buffer.get_mut(..meta.len) else { continue };
                let ecn = meta.ecn.map_or(0, |ecn| ecn as u8);
                let origin = Origin { remote: meta.addr, local: meta.dst_ip, ecn };
                for message in bytes.chunks_mut(meta.stride.max(1)) {
                    match self.take(message, &origin, now) {
                        // Only a peer can close the inbox, not anybody who sends something large.
                        Ok(Taken::Data) if !fits => self.closed_until = now + CLOSED_NS,
                        Ok(_) => {}
                        Err(reason) => self.shared.dropped(reason),
                    }
                }
            }
            self.received = received;
            if got < RECEIVES {
                return Ok(turn + 1);
            }
        }
        Ok(TURN)
    }

    /// Opens a message and does what it is for.
    fn take(&mut self, message: &mut [u8], origin: &Origin, now: u64) -> Result<Taken, Reason> {
        if message.first().is_some_and(|kind| (TYPE_INITIATION..=TYPE_COOKIE_REPLY).contains(kind))
        {
            return self.take_handshake(message, origin, now).map(|()| Taken::Other);
        }
        let header = Header::from_message(message).ok_or(Reason::Malformed)?;
        if !self.sessions.contains_key(&header.receiver) {
            // A peer uses a new session as soon as it has it: perhaps it is among what the control
            // thread has said meanwhile.
            self.is_ending |= self.obey();
        }
        let session = self.sessions.get(&header.receiver).ok_or(Reason::UnknownIndex)?;
        let text = session.open(&header, message, now)?;
        let peer = self.peers.get(&session.peer.0).ok_or(Reason::UnknownIndex)?;
        if session.confirm() {
            peer.current.store(Some(session.clone()));
        }
        peer.follow(origin.remote, origin.local);
        if let Some(hello) = Hello::from_plaintext(text) {
            peer.heard(0, now);
            peer.greeted(hello);
            if hello.wants_answer && now >= peer.feedback_due() {
                let peer = peer.clone();
                say_hello(&self.shared, &self.sockets, self.number, &peer, false, now)?;
            }
            return Ok(Taken::Other);
        }
        peer.heard(text.len() as u64, now);
        if !self.owed.iter().any(|owed| owed.index == peer.index) {
            self.owed.push(peer.clone());
        }
        mark_congestion(text, origin.ecn)?;
        let link = bulk_header(peer.index.0, [0; 4]);
        let (device, shared) = (&mut self.device, &self.shared);
        self.joiner.push(link, text, header.is_partial, &mut |frame| write(device, frame, shared));
        Ok(Taken::Data)
    }

    /// Passes a handshake message on to the daemon if it is worth that.
    fn take_handshake(&mut self, message: &[u8], origin: &Origin, now: u64) -> Result<(), Reason> {
        let Self { gate, known, peers, shared, sockets, .. } = self;
        let is_peer = || {
            let (addresses, until) = known;
            if *until <= now {
                let endpoints = peers.values().filter_map(|peer| peer.endpoint.load_full());
                *addresses = endpoints.map(|endpoint| endpoint.remote.ip()).collect();
                *until = now + KNOWN_NS;
            }
            addresses.contains(&origin.remote.ip())
        };
        match gate.judge(Instant::now(), origin.remote, message, is_peer) {
            Judgment::Admit(_) => {
                let (from, to) = (origin.remote, origin.local);
                shared.tell(FromWorkers::Received { from, to, bytes: message.to_vec() });
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

    /// Tells peers that their data arrives.
    fn pay(&mut self, now: u64) {
        let Self { owed, shared, sockets, number, .. } = self;
        owed.retain(|peer| {
            let is_due = now >= peer.feedback_due();
            if is_due && let Err(reason) = say_hello(shared, sockets, *number, peer, false, now) {
                shared.dropped(reason);
            }
            !is_due
        });
    }
}

/// Says hello to a peer under the session that seals.
///
/// # Errors
/// There is no session, no address, or no way.
pub fn say_hello(
    shared: &Shared,
    sockets: &Sockets,
    worker: u8,
    peer: &Peer,
    wants_answer: bool,
    now: u64,
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
    peer.said_hello(now);
    Ok(())
}

/// Checks what is sealed next, when nothing is written into it any more: that it still comes from
/// the address with which `from_container` let it through.
fn may_leave(packet: &[u8], source: [u8; 4]) -> Result<(), Reason> {
    let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    if is_v4 && packet.get(12..16) == Some(&source[..]) { Ok(()) } else { Err(Reason::Spoofed) }
}

/// Combines the ECN codepoints as RFC 6040 says. Only IPv4 packets are marked: there are no others
/// yet.
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

/// The next frame of the device, if one waits.
fn read(device: &mut File, frame: &mut [u8]) -> io::Result<Option<usize>> {
    match device.read(frame) {
        Ok(0) => Err(io::Error::other("the device is gone")),
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(device: &mut File, frame: &[u8], shared: &Shared) {
    // Down, out of memory, or not a frame for the kernel: one packet's matter.
    if device.write(frame).is_err() {
        shared.dropped(Reason::Helper);
    }
}

/// Errors of an earlier message that a socket reports at the next call.
fn is_passing(error: &io::Error) -> bool {
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
