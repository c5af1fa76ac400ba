//! Ethernet frames as one likes them: for tests that attack, and for wires that are not as they
//! should be.

use std::ffi::CString;
use std::io::{Error, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::flow::MARKER;
use crate::netns::Netns;
use crate::pcap::{TCP, UDP};

/// The Internet checksum (RFC 1071) over the parts in a row, of which only the last may have an odd
/// length; 0 if they contain one that is right.
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

    /// Sends one frame whose checksum the kernel, or whoever takes the frame from it, has yet to
    /// finish: that from byte `start` on, to be put `offset` bytes behind it.
    pub fn send_unfinished(&self, frame: &[u8], start: u16, offset: u16) -> Result<()> {
        let sent = self.send_offloaded(&[(Offload::checksum(start, offset), frame.to_vec())])?;
        ensure!(sent == 1, "the kernel does not take a checksum at {start} + {offset}");
        Ok(())
    }

    /// Sends frames in order with something left to do in each. Those that the kernel does not take
    /// (because that lies outside of the frame, for example) are left out; how many it took.
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

    /// How many were sent; frames that the kernel calls invalid are an error, or left out.
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
                // SAFETY: all-zero is a valid message without address, parts and control data.
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
                // ENOMEM: the interface would have had to segment it, and could not.
                if leaves_out && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) {
                    rest = &mut rest[1..];
                    continue;
                }
                return Err(error).context("frames cannot be sent");
            }
            accepted += sent as usize;
            rest = &mut rest[sent as usize..];
        }
        Ok(accepted)
    }
}

/// What is left to do in a frame: `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h).
/// Offsets count from the first byte of the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where a checksum that is to be finished starts, and how far behind it its place is.
    pub checksum: Option<(u16, u16)>,
    /// Kind of its segments; 0 if it is one packet.
    pub gso_type: u8,
    /// Payload of each segment, bytes.
    pub gso_size: u16,
}

/// [`Offload::gso_type`]: segments of TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// [`Offload::gso_type`]: fragments of a datagram.
pub const GSO_UDP: u8 = 3;
/// [`Offload::gso_type`]: datagrams.
pub const GSO_UDP_L4: u8 = 5;

impl Offload {
    const LEN: usize = 10;
    const NEEDS_CHECKSUM: u8 = 1;

    /// A checksum.
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

    /// Does to the frame what a kernel without help of its device does: finishes the checksum.
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

/// A frame with what is left to do in it.
pub type Frame = (Offload, Vec<u8>);

/// Where a frame's IPv4 header, its source and the transport header begin.
const IP: usize = 14;
/// See [`packet`].
pub const SOURCE: usize = IP + 12;
const TRANSPORT: usize = IP + 20;

/// An IPv4 address's bytes; zeros for an IPv6 address.
pub fn octets(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => [0; 4],
    }
}

/// A frame of `len` bytes from the IP header on, to and from these, with the lab's marker as far as
/// there is room. Its transport header has no checksum, but TCP's or UDP's other fields.
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
        // An acknowledgement.
        transport.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        transport.extend((transport_len as u16).to_be_bytes());
        transport.extend([0, 0]);
    }
    transport.extend(MARKER.iter().cycle().take(transport_len - transport.len()));
    [&macs[0][..], &macs[1], &[8, 0], &ip, &transport].concat()
}

/// Writes the sum of the pseudo header into a frame's transport header, as a stack does that leaves
/// the rest to others.
pub fn leave_checksum(frame: &mut [u8]) {
    let len = (frame.len() - TRANSPORT) as u16;
    let protocol = frame[IP + 9];
    let sum = !checksum(&[&frame[SOURCE..SOURCE + 8], &[0, protocol], &len.to_be_bytes()]);
    let place = TRANSPORT + checksum_place(protocol);
    frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Where a transport header has its checksum: containers may leave it, or one behind it, to others
/// to be finished.
fn checksum_place(protocol: u8) -> usize {
    match protocol {
        TCP => 16,
        UDP => 6,
        _ => 0,
    }
}

/// True if the frame's checksum is to be written into its Ethernet or IP header.
pub fn is_hostile((offload, _): &Frame) -> bool {
    offload
        .checksum
        .is_some_and(|(start, offset)| usize::from(start) + usize::from(offset) < TRANSPORT)
}

/// True if the frame's checksum begins there, wherever it is to be written.
pub fn begins_in_header((offload, _): &Frame) -> bool {
    offload.checksum.is_some_and(|(start, _)| usize::from(start) < TRANSPORT)
}

/// What a thief wants a frame to be: the same, from somebody else.
pub fn wanted(frame: &[u8], victim: IpAddr) -> Vec<u8> {
    let mut wanted = frame.to_vec();
    wanted[SOURCE..SOURCE + 4].copy_from_slice(&octets(victim));
    wanted
}

/// A frame for every pair of where a checksum starts and a place that `places` has: each so that
/// finishing it writes there what the frame that is wanted has there. `gso`: kind and size of
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
            // What makes the sum right lies at the end.
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

/// Everything that arrives at an interface, with what is left to do in it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens to IPv4 at an interface of a namespace.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        // All, for of what goes on into a bridge it would see nothing else.
        let socket = packet_socket(netns, interface, libc::ETH_P_ALL as u16)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 256 << 20)?;
        Ok(Self { socket })
    }

    /// What came so far, and nothing for so many milliseconds since. An error if there was no room
    /// for some of it.
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
                ensure!(
                    error.kind() == ErrorKind::WouldBlock,
                    "frames cannot be received: {error}"
                );
                let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                if poll(&mut waiting, PollTimeout::from(quiet_ms))? == 0 {
                    break;
                }
                continue;
            }
            let (head, frame) = buffer[..received as usize]
                .split_first_chunk()
                .context("a frame without a header")?;
            if frame.get(12..IP) == Some(&[8, 0]) {
                frames.push((Offload::from_bytes(*head), frame.to_vec()));
            }
        }
        let lost = lost_frames(&self.socket)?;
        ensure!(lost == 0, "{lost} frames were lost because nobody read them in time");
        Ok(frames)
    }
}

/// Frames that a packet socket had no room for.
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
        Err(Error::last_os_error()).context("a packet socket's statistics")
    }
}

/// An interface whose every incoming frame is seen, and where frames can be sent.
#[derive(Debug)]
pub(crate) struct Tap {
    socket: OwnedFd,
}

impl Tap {
    pub(crate) fn open(netns: &Netns, interface: &str) -> Result<Self> {
        let socket = packet_socket(netns, interface, libc::ETH_P_ALL as u16)?;
        // Its own frames are not to come back.
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 16 << 20)?;
        Ok(Self { socket })
    }

    /// The next frame's length, if there is one.
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
            error => Err(error).context("frames cannot be received"),
        }
    }

    /// Sends a frame; one that finds the queue full, or is too long for the interface, is lost.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: pointer and length describe the frame.
        let sent =
            unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent >= 0 {
            return Ok(());
        }
        match Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EMSGSIZE)) => Ok(()),
            error => Err(error).context("a frame cannot be sent"),
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
        _ => Err(Error::last_os_error()).context("a packet socket's option"),
    }
}

/// A packet socket, bound to an interface of a namespace; it gets frames of this Ethernet type,
/// none if it is 0.
fn packet_socket(netns: &Netns, interface: &str, protocol: u16) -> Result<OwnedFd> {
    let name = CString::new(interface)?;
    netns.enter(move || {
        // SAFETY: no pointer is passed.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(Error::last_os_error()).context("a packet socket");
        }
        // SAFETY: it was opened just now and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: a C string that lives during the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            bail!("there is no interface {name:?}");
        }
        // SAFETY: all-zero is a valid address; the fields that count are set below.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: pointer and length describe the address above.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
            return Err(Error::last_os_error()).context("a packet socket cannot be bound");
        }
        Ok(socket)
    })
}
