//! Floods a host with datagrams or connections from an attacker, at a given rate.

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage};

use crate::host::Host;
use crate::netns::Netns;
use crate::raw::{Injector, checksum};

/// Interval at which a flood sends its next portion.
const PORTION: Duration = Duration::from_millis(5);

/// A flood that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    started: Instant,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Flood {
    /// Sends these frames in turn from the host's underlay interface, `per_second` of them per
    /// second.
    ///
    /// # Errors
    /// Fails if the interface cannot be opened.
    pub fn of_frames(from: &Host, frames: Vec<Vec<u8>>, per_second: u32) -> Result<Self> {
        let injector = Injector::open(from.netns(), from.interface())?;
        let mut next = 0;
        Ok(Self::start(per_second, move |portion| {
            let turn: Vec<&Vec<u8>> = frames.iter().cycle().skip(next).take(portion).collect();
            next = (next + portion) % frames.len();
            injector.send_all(&turn)
        }))
    }

    /// Opens `per_second` connections per second from this source address of a namespace, sends
    /// `word` on each of them, and keeps the latest `open` connections.
    pub fn of_connections(
        netns: &Netns,
        source: Ipv4Addr,
        to: SocketAddr,
        (per_second, open): (u32, usize),
        word: &'static [u8],
    ) -> Self {
        let inside = netns.entrance();
        // Each connection, and whether `word` was sent on it.
        let mut calls: VecDeque<(TcpStream, bool)> = VecDeque::new();
        let mut is_inside = false;
        Self::start(per_second, move |portion| {
            if !is_inside {
                inside.enter()?;
                is_inside = true;
            }
            for _ in 0..portion {
                calls.push_back((call(source, to)?, false));
                if calls.len() > open {
                    calls.pop_front();
                }
            }
            // Connections that are not established yet cannot carry data.
            for (stream, is_told) in calls.iter_mut().filter(|(_, is_told)| !is_told) {
                *is_told = stream.write(word).is_ok();
            }
            Ok(())
        })
    }

    fn start(per_second: u32, mut send: impl FnMut(usize) -> Result<()> + Send + 'static) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let portion = (f64::from(per_second) * PORTION.as_secs_f64()) as usize;
        let started = Instant::now();
        let thread = std::thread::spawn({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || {
                let mut due = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    send(portion)?;
                    sent.fetch_add(portion as u64, Ordering::Relaxed);
                    // Portions that the machine was too slow to send are not made up for.
                    due = (due + PORTION).max(Instant::now());
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                Ok(())
            }
        });
        Self { stop, sent, started, thread: Some(thread) }
    }

    /// Ends the flood. Returns the average number sent per second.
    ///
    /// # Errors
    /// Fails if sending failed.
    pub fn stop(mut self) -> Result<u64> {
        self.end()?;
        let seconds = self.started.elapsed().as_secs_f64();
        Ok((self.sent.load(Ordering::Relaxed) as f64 / seconds) as u64)
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .map_or(Ok(()), |thread| thread.join().map_err(|_| anyhow!("the flood panicked"))?)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        // A caller that needs the error calls `stop`.
        drop(self.end());
    }
}

/// Starts to connect, without waiting for the connection.
fn call(source: Ipv4Addr, to: SocketAddr) -> Result<TcpStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let call: OwnedFd = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    let reset = libc::linger { l_onoff: 1, l_linger: 0 };
    socket::setsockopt(&call, socket::sockopt::Linger, &reset)?;
    socket::setsockopt(&call, socket::sockopt::ReuseAddr, &true)?;
    let source = SocketAddr::from((source, 0));
    socket::bind(call.as_raw_fd(), &SockaddrStorage::from(source))
        .context("cannot bind to the attacker's address")?;
    // The connection is in progress or was refused. The flood continues in both cases.
    let _ = socket::connect(call.as_raw_fd(), &SockaddrStorage::from(to));
    Ok(call.into())
}

/// Returns the hardware address of a host's underlay interface.
///
/// # Errors
/// Fails if `ip` does not report it.
pub fn mac_of(host: &Host) -> Result<[u8; 6]> {
    let links: serde_json::Value =
        serde_json::from_str(&host.netns().ip(&["-j", "link", "show", host.interface()])?)?;
    let text = links[0]["address"].as_str().context("`ip` printed no hardware address")?;
    let bytes =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().map_err(|_| anyhow!("{text} is not a hardware address"))
}

/// Returns an Ethernet frame with a UDP datagram between two hosts of the lab's underlay.
pub fn datagram(
    macs: [[u8; 6]; 2],
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: &[u8],
) -> Vec<u8> {
    let [source, destination] = macs;
    let length = (28 + payload.len()) as u16;
    let [a, b] = length.to_be_bytes();
    let mut ip = vec![0x45, 0, a, b, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(from.ip().octets());
    ip.extend(to.ip().octets());
    let sum = checksum(&[&ip]).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    // A UDP checksum of zero means that there is no checksum.
    let udp = [from.port(), to.port(), length - 20, 0].map(u16::to_be_bytes).concat();
    [&destination[..], &source, &[0x08, 0x00], &ip, &udp, payload].concat()
}
