//! Ethernet frames as one likes them, for tests that attack.

use std::ffi::CString;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

use crate::netns::Netns;

/// An interface to send frames from.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
}

impl Injector {
    /// Opens an interface of a namespace.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
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
            address.sll_ifindex = index as i32;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: pointer and length describe the address above.
            if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
                return Err(Error::last_os_error()).context("a packet socket cannot be bound");
            }
            Ok(Self { socket })
        })
    }

    /// Sends one frame, link header included.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_all(&[frame])
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
