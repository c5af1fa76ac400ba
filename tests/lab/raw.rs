//! Ethernet frames as one likes them: for tests that attack, and for wires that are not as they should be.

use std::ffi::CString;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

use crate::netns::Netns;

/// The Internet checksum (RFC 1071) over the parts in a row, of which only the last may have an odd length; 0 if they contain one that is right.
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

    /// Sends one frame whose checksum the kernel, or whoever takes the frame from it, has yet to finish: that from byte `start` on, to be put
    /// `offset` bytes behind it.
    pub fn send_unfinished(&self, frame: &[u8], start: u16, offset: u16) -> Result<()> {
        // struct virtio_net_hdr, in the machine's byte order.
        const NEEDS_CHECKSUM: u16 = 1;
        let header = [NEEDS_CHECKSUM.to_le(), 0, 0, start, offset].map(u16::to_ne_bytes).concat();
        set_option(&self.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        let sent = self.send(&[&header, frame].concat());
        set_option(&self.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 0)?;
        sent
    }

    /// Sends frames in order, as fast as the kernel takes them.
    pub fn send_all(&self, frames: &[impl AsRef<[u8]>]) -> Result<()> {
        let mut parts: Vec<libc::iovec> = frames
            .iter()
            .map(AsRef::as_ref)
            .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
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
            // SAFETY: the messages, their parts and the frames outlive the call; the kernel only reads the frames.
            let sent = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), rest.as_mut_ptr(), count, 0) };
            if sent < 0 {
                let error = Error::last_os_error();
                if error.raw_os_error() == Some(libc::ENOBUFS) {
                    std::thread::yield_now();
                    continue;
                }
                return Err(error).context("frames cannot be sent");
            }
            rest = &mut rest[sent as usize..];
        }
        Ok(())
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
        let received = unsafe { libc::recv(self.socket.as_raw_fd(), at, length, libc::MSG_DONTWAIT) };
        if received >= 0 {
            return Ok(Some(received as usize));
        }
        match Error::last_os_error() {
            error if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            error => Err(error).context("frames cannot be received"),
        }
    }

    /// Sends a frame; one that finds the queue full, or is too long for the interface, is lost.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: pointer and length describe the frame.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
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

fn set_option(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<()> {
    let value_at = (&raw const value).cast();
    // SAFETY: the value outlives the call and its size is given.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value_at, 4) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()).context("a packet socket's option"),
    }
}

/// A packet socket, bound to an interface of a namespace; it gets frames of this Ethernet type, none if it is 0.
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
