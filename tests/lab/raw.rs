//! Sends and receives arbitrary Ethernet frames, for tests that attack and for imperfect wires.

use std::ffi::CString;
use std::io::{Error, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::flow::MARKER;
use crate::netns::Netns;
use crate::pcap::{TCP, UDP};

/// Computes the Internet checksum (RFC 1071) over the concatenated parts. Only the last part may
/// have an odd length. Returns 0 if the parts contain a correct checksum.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An interface to send frames from.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
}

impl Injector {
    /// Opens an interface of a namespace.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        Ok(Self { socket: packet_socket(netns, interface, 0)? })
    }

    /// Sends one frame, link header included.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_all(&[frame])
    }

    /// Sends one frame with a partial checksum, which the kernel or the receiver must complete. The
    /// checksum covers the frame from byte `start` on and is stored `offset` bytes after that.
    pub fn send_partial_checksum(&self, frame: &[u8], start: u16, offset: u16) -> Result<()> {
        let sent = self.send_offloaded(&[(Offload::checksum(start, offset), frame.to_vec())])?;
        ensure!(sent == 1, "the kernel rejects a partial checksum at {start} + {offset}");
        Ok(())
    }

    /// Sends frames in order, each with an offload left to do. Frames that the kernel rejects are
    /// left out, for example if the offload is outside the frame. Returns the number of frames
    /// sent.
    pub fn send_offloaded(&self, frames: &[Frame]) -> Result<usize> {
        let frames: Vec<_> = frames
            .iter()
            .map(|(offload, frame)| [&offload.to_bytes()[..], frame].concat())
            .collect();
        set_option(&self.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        let sent = self.send_accepted(&frames, true);
        set_option(&self.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 0)?;
        sent
    }

    /// Sends frames in order, as fast as the kernel takes them.
    pub fn send_all(&self, frames: &[impl AsRef<[u8]>]) -> Result<()> {
        self.send_accepted(frames, false).map(drop)
    }

    /// Sends frames and returns how many were sent. Frames that the kernel rejects as invalid are
    /// left out if `leaves_out` is set. Otherwise they are an error.
    fn send_accepted(&self, frames: &[impl AsRef<[u8]>], leaves_out: bool) -> Result<usize> {
        let mut accepted = 0;
        let mut parts: Vec<libc::iovec> = frames
            .iter()
            .map(AsRef::as_ref)
            .map(|frame| libc::iovec {
                iov_base: frame.as_ptr().cast_mut().cast(),
                iov_len: frame.len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: an all-zero message is valid. It has no address, parts or control data.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let mut rest = &mut messages[..];
        while !rest.is_empty() {
            let count = rest.len().min(1024) as libc::c_uint;
            // SAFETY: the messages, their parts and the frames outlive the call; the kernel only
            // reads the frames.
            let sent =
                unsafe { libc::sendmmsg(self.socket.as_raw_fd(), rest.as_mut_ptr(), count, 0) };
            if sent < 0 {
                let error = Error::last_os_error();
                if error.raw_os_error() == Some(libc::ENOBUFS) {
                    std::thread::yield_now();
                    continue;
                }
                // ENOMEM: the interface had to segment the frame and could not.
                if leaves_out && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) {
                    rest = &mut rest[1..];
                    continue;
                }
                return Err(error).context("cannot send frames");
            }
            accepted += sent as usize;
            rest = &mut rest[sent as usize..];
        }
        Ok(accepted)
    }
}

/// What is left to do in a frame: `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h).
/// Offsets are in bytes from the start of the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where a partial checksum starts, and how many bytes after that it is stored.
    pub checksum: Option<(u16, u16)>,
    /// Type of the segments; 0 if the frame is one packet.
    pub gso_type: u8,
    /// Payload of each segment, in bytes.
    pub gso_size: u16,
}

/// [`Offload::gso_type`]: TCP segments over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// [`Offload::gso_type`]: IP fragments of one UDP datagram.
pub const GSO_UDP: u8 = 3;
/// [`Offload::gso_type`]: UDP datagrams.
pub const GSO_UDP_L4: u8 = 5;

impl Offload {
    const LEN: usize = 10;
    const NEEDS_CHECKSUM: u8 = 1;

    /// Returns an offload with only a partial checksum.
    pub fn checksum(start: u16, offset: u16) -> Self {
        Self { checksum: Some((start, offset)), ..Self::default() }
    }

    fn to_bytes(self) -> [u8; Self::LEN] {
        let flags = if self.checksum.is_some() { Self::NEEDS_CHECKSUM } else { 0 };
        let (start, offset) = self.checksum.unwrap_or_default();
        let [[a, b], [c, d], [e, f]] = [self.gso_size, start, offset].map(u16::to_ne_bytes);
        [flags, self.gso_type, 0, 0, a, b, c, d, e, f]
    }

    fn from_bytes([flags, gso_type, _, _, a, b, c, d, e, f]: [u8; Self::LEN]) -> Self {
        let [gso_size, start, offset] = [[a, b], [c, d], [e, f]].map(u16::from_ne_bytes);
        let checksum = (flags & Self::NEEDS_CHECKSUM != 0).then_some((start, offset));
        Self { checksum, gso_type, gso_size }
    }

    /// Completes the checksum in the frame, as a kernel does without help from its device.
    pub fn finish(self, frame: &mut [u8]) {
        let Some((start, offset)) = self.checksum.map(|(a, b)| (usize::from(a), usize::from(b)))
        else {
            return;
        };
        let sum = match checksum(&[frame.get(start..).unwrap_or_default()]) {
            0 => 0xffff,
            sum => sum,
        };
        if let Some(place) = frame.get_mut(start + offset..start + offset + 2) {
            place.copy_from_slice(&sum.to_be_bytes());
        }
    }
}

/// A frame and what is left to do in it.
pub type Frame = (Offload, Vec<u8>);

/// Offset of the IPv4 header in a frame, in bytes.
const IP: usize = 14;
/// Offset of the IPv4 source address in a frame made by [`packet`], in bytes.
pub const SOURCE: usize = IP + 12;
const TRANSPORT: usize = IP + 20;

/// Returns the bytes of an IPv4 address, or zeros for an IPv6 address.
pub fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => [0; 4],
    }
}

/// Returns a frame with these MAC and IP addresses. It has `len` bytes from the IP header on,
/// filled with the lab's marker. The transport header has no checksum. Its other fields are those
/// of TCP or UDP.
pub fn packet(macs: [[u8; 6]; 2], [from, to]: [IpAddr; 2], protocol: u8, len: usize) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((len as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(octets(from));
    ip.extend(octets(to));
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let transport_len = len - 20;
    let mut transport = vec![0x13, 0x88, 0x13, 0x89];
    if protocol == TCP {
        // An acknowledgment.
        transport.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        transport.extend((transport_len as u16).to_be_bytes());
        transport.extend([0, 0]);
    }
    transport.extend(MARKER.iter().cycle().take(transport_len - transport.len()));
    [&macs[0][..], &macs[1], &[8, 0], &ip, &transport].concat()
}

/// Writes the sum of the pseudo header into a frame's transport header, as a stack does that leaves
/// the rest to an offload.
pub fn leave_checksum(frame: &mut [u8]) {
    let len = (frame.len() - TRANSPORT) as u16;
    let protocol = frame[IP + 9];
    let sum = !checksum(&[&frame[SOURCE..SOURCE + 8], &[0, protocol], &len.to_be_bytes()]);
    let place = TRANSPORT + checksum_offset(protocol);
    frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Returns the offset of the checksum in a transport header, in bytes. Containers may leave this
/// checksum, or one behind it, to an offload.
fn checksum_offset(protocol: u8) -> usize {
    match protocol {
        TCP => 16,
        UDP => 6,
        _ => 0,
    }
}

/// Returns whether the frame's checksum would be written into its Ethernet or IP header.
pub fn is_hostile((offload, _): &Frame) -> bool {
    offload
        .checksum
        .is_some_and(|(start, offset)| usize::from(start) + usize::from(offset) < TRANSPORT)
}

/// Returns whether the frame's checksum starts in its Ethernet or IP header, wherever it is stored.
pub fn begins_in_header((offload, _): &Frame) -> bool {
    offload.checksum.is_some_and(|(start, _)| usize::from(start) < TRANSPORT)
}

/// Returns the frame that an attacker aims for: the same frame with the victim's source address.
pub fn wanted(frame: &[u8], victim: IpAddr) -> Vec<u8> {
    let mut wanted = frame.to_vec();
    wanted[SOURCE..SOURCE + 4].copy_from_slice(&octets(victim));
    wanted
}

/// Returns a frame for every pair of a checksum start and a place that `places` accepts. Completing
/// the checksum writes the bytes of the wanted frame to that place. `gso` is the type and size of
/// segments.
pub fn aimed(
    honest: &[u8],
    wanted: &[u8],
    gso: (u8, u16),
    places: impl Fn(usize) -> bool,
) -> Vec<Frame> {
    let mut frames = Vec::new();
    for start in 0..honest.len() {
        for place in (start..honest.len() - 1).filter(|place| places(*place)) {
            let mut frame = honest.to_vec();
            // Filler near the end of the frame makes the sum right.
            let filler = honest.len() - 2 - (honest.len() - start) % 2;
            if start <= filler && place + 2 <= filler {
                frame[filler..filler + 2].fill(0);
                let target = !u16::from_be_bytes([wanted[place], wanted[place + 1]]);
                let rest = u32::from(target) + u32::from(checksum(&[&frame[start..]]));
                let rest = (rest & 0xffff) + (rest >> 16);
                frame[filler..filler + 2].copy_from_slice(&(rest as u16).to_be_bytes());
            }
            let checksum = Some((start as u16, (place - start) as u16));
            frames.push((Offload { checksum, gso_type: gso.0, gso_size: gso.1 }, frame));
        }
    }
    frames
}

/// Receives everything that arrives at an interface, with what is left to do in it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens for IPv4 on an interface of a namespace.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        // All protocols: otherwise the socket does not see frames that go on into a bridge.
        let socket = packet_socket(netns, interface, libc::ETH_P_ALL as u16)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 256 << 20)?;
        Ok(Self { socket })
    }

    /// Returns the frames so far, once nothing has arrived for `quiet_ms` milliseconds. Fails if
    /// frames were lost because the socket had no room for them.
    pub fn frames(&self, quiet_ms: u16) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; Offload::LEN + 65_550];
        loop {
            let (at, length) = (buffer.as_mut_ptr().cast(), buffer.len());
            // SAFETY: pointer and length describe the buffer.
            let received =
                unsafe { libc::recv(self.socket.as_raw_fd(), at, length, libc::MSG_DONTWAIT) };
            if received < 0 {
                let error = Error::last_os_error();
                ensure!(error.kind() == ErrorKind::WouldBlock, "cannot receive frames: {error}");
                let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                if poll(&mut waiting, PollTimeout::from(quiet_ms))? == 0 {
                    break;
                }
                continue;
            }
            let (head, frame) = buffer[..received as usize]
                .split_first_chunk()
                .context("received a frame without a header")?;
            if frame.get(12..IP) == Some(&[8, 0]) {
                frames.push((Offload::from_bytes(*head), frame.to_vec()));
            }
        }
        let lost = lost_frames(&self.socket)?;
        ensure!(lost == 0, "{lost} frames were lost because they were not read in time");
        Ok(frames)
    }
}

/// Returns how many frames a packet socket had no room for.
fn lost_frames(socket: &OwnedFd) -> Result<u32> {
    // struct tpacket_stats
    let mut stats = [0_u32; 2];
    let mut length = size_of_val(&stats) as libc::socklen_t;
    let at = (&raw mut stats).cast();
    // SAFETY: pointer and length describe the array.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            at,
            &raw mut length,
        )
    };
    if got == 0 {
        Ok(stats[1])
    } else {
        Err(Error::last_os_error()).context("cannot read the statistics of a packet socket")
    }
}

/// An interface on which every incoming frame is received and frames can be sent.
#[derive(Debug)]
pub(crate) struct Tap {
    socket: OwnedFd,
}

impl Tap {
    pub(crate) fn open(netns: &Netns, interface: &str) -> Result<Self> {
        let socket = packet_socket(netns, interface, libc::ETH_P_ALL as u16)?;
        // The socket must not receive the frames that it sends.
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 16 << 20)?;
        Ok(Self { socket })
    }

    /// Receives the next frame, if any. Returns its length in bytes.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let (at, length) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: pointer and length describe the buffer.
        let received =
            unsafe { libc::recv(self.socket.as_raw_fd(), at, length, libc::MSG_DONTWAIT) };
        if received >= 0 {
            return Ok(Some(received as usize));
        }
        match Error::last_os_error() {
            error if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(None)
            }
            error => Err(error).context("cannot receive frames"),
        }
    }

    /// Sends a frame. It is lost if the queue is full or the frame is too long for the interface.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: pointer and length describe the frame.
        let sent =
            unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent >= 0 {
            return Ok(());
        }
        match Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EMSGSIZE)) => Ok(()),
            error => Err(error).context("cannot send a frame"),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set_option(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<()> {
    let value_at = (&raw const value).cast();
    // SAFETY: the value outlives the call and its size is given.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value_at, 4) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()).context("cannot set an option of a packet socket"),
    }
}

/// Opens a packet socket on an interface of a namespace. It receives frames of this EtherType, or
/// none if it is 0.
fn packet_socket(netns: &Netns, interface: &str, protocol: u16) -> Result<OwnedFd> {
    let name = CString::new(interface)?;
    netns.enter(move || {
        // SAFETY: no pointer is passed.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(Error::last_os_error()).context("cannot open a packet socket");
        }
        // SAFETY: it was just opened, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: the argument is a C string that outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            bail!("no interface {name:?}");
        }
        // SAFETY: an all-zero address is valid. The fields that matter are set below.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: pointer and length describe the address above.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(Error::last_os_error()).context("cannot bind a packet socket");
        }
        Ok(socket)
    })
}
