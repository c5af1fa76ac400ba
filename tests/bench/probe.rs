//! Probes that send from one namespace to another and measure what arrives: pings with nanosecond
//! timestamps and floods of datagrams.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType,
    SockaddrIn, SockaddrStorage, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;

use lab::Netns;
use lab::raw::checksum;

/// Time that [`ping`] waits for the last replies.
const REFUSAL_READ_LIMIT: Duration = Duration::from_secs(2);
/// Time before the rate of a flood is measured.
const WARM_UP: Duration = Duration::from_millis(200);
/// Time that the receiver of a flood sleeps when its socket is empty. If each datagram woke it, the
/// sender would pay for the wakeups, and between virtual processors they take as long as everything
/// else together.
const PAUSE: Duration = Duration::from_micros(100);
/// Payload of a ping in bytes, as `ping` has it: the IP packet has 84 bytes.
const PING_PAYLOAD: usize = 56;
const ICMP_HEADER: usize = 8;

/// Results of a series of pings.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pings {
    /// Number of requests sent.
    pub sent: u64,
    /// Round-trip times of the answered requests, sorted.
    pub times: Vec<Duration>,
}

impl Pings {
    /// Returns the number of unanswered requests.
    pub(crate) fn lost(&self) -> u64 {
        self.sent - self.times.len() as u64
    }

    /// Returns the mean, or zero if nothing was answered.
    pub(crate) fn average(&self) -> Duration {
        let count = u32::try_from(self.times.len()).unwrap_or(u32::MAX).max(1);
        self.times.iter().sum::<Duration>() / count
    }

    /// Returns the time that `percent` of the replies did not exceed, or zero if nothing was
    /// answered.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.times.len() * percent).div_ceil(100).saturating_sub(1);
        self.times.get(rank).copied().unwrap_or_default()
    }
}

/// Sends ICMP echo requests at a fixed interval, whether or not they are answered. Measures as
/// `ping` does, from the clock before the send call to the kernel's timestamp of the reply. Ends
/// once all requests are answered, and at the latest 2 seconds after the last one.
///
/// # Errors
/// When a raw socket cannot be opened, or when the kernel refuses to send.
pub(crate) fn ping(from: &Netns, to: Ipv4Addr, count: u64, interval: Duration) -> Result<Pings> {
    from.enter(move || {
        let mut pinger = Pinger::open(to)?;
        let mut due = Instant::now();
        for _ in 0..count {
            pinger.collect_until(due, false)?;
            pinger.send()?;
            due = Instant::now().max(due) + interval;
        }
        pinger.collect_until(Instant::now() + REFUSAL_READ_LIMIT, true)?;
        Ok(pinger.finish())
    })
}

struct Pinger {
    socket: OwnedFd,
    to: Ipv4Addr,
    ident: [u8; 2],
    /// When each request was sent, and the round-trip time of its reply.
    sent: Vec<(Duration, Option<Duration>)>,
    answered: usize,
}

impl Pinger {
    fn open(to: Ipv4Addr) -> Result<Self> {
        let socket = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::Icmp,
        )
        .context("cannot open a raw socket")?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &(1 << 22))?;
        let ident =
            (SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos() as u16).to_be_bytes();
        Ok(Self { socket, to, ident, sent: Vec::new(), answered: 0 })
    }

    fn send(&mut self) -> Result<()> {
        let number = self.sent.len() as u64;
        let mut message = [0; ICMP_HEADER + PING_PAYLOAD];
        message[0] = 8;
        message[4..6].copy_from_slice(&self.ident);
        message[6..8].copy_from_slice(&(number as u16).to_be_bytes());
        message[8..16].copy_from_slice(&number.to_be_bytes());
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        self.sent.push((now(), None));
        let to = SockaddrIn::from(SocketAddrV4::new(self.to, 0));
        let parts = [IoSlice::new(&message)];
        let none: [ControlMessage<'_>; 0] = [];
        match sendmsg(self.socket.as_raw_fd(), &parts, &none, MsgFlags::empty(), Some(&to)) {
            // A request dropped by a full queue or a missing route counts as a lost ping.
            Ok(_)
            | Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => {
                Ok(())
            }
            Err(error) => Err(anyhow!(error).context(format!("cannot send a ping to {}", self.to))),
        }
    }

    fn collect_until(&mut self, deadline: Instant, all_is_enough: bool) -> Result<()> {
        loop {
            self.collect()?;
            if all_is_enough && self.answered == self.sent.len() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Ok(());
            }
            // Busy-wait, as `ping` does at intervals shorter than a tick. The time that this
            // machine takes to wake a sleeping CPU says nothing about networks.
            std::thread::yield_now();
        }
    }

    fn collect(&mut self) -> Result<()> {
        loop {
            let mut bytes = [0; 256];
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let mut space = nix::cmsg_space!(TimeSpec);
            let message = match recvmsg::<SockaddrStorage>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                MsgFlags::empty(),
            ) {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => bail!("cannot receive a ping reply: {error}"),
            };
            let length = message.bytes;
            let stamp = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
                _ => None,
            });
            let arrived = stamp.unwrap_or_else(now);
            let Some(number) = self.number_of(&bytes[..length]) else { continue };
            let Some((sent, time)) = self.sent.get_mut(number) else { continue };
            if time.is_none() {
                *time = Some(arrived.saturating_sub(*sent));
                self.answered += 1;
            }
        }
    }

    /// Returns the sequence number in a reply to one of our requests. The packet starts with its IP
    /// header.
    fn number_of(&self, packet: &[u8]) -> Option<usize> {
        let header = usize::from(packet.first()? & 0xf) * 4;
        let message = packet.get(header..header + ICMP_HEADER + PING_PAYLOAD)?;
        if message[0] != 0 || message[4..6] != self.ident || checksum(&[message]) != 0 {
            return None;
        }
        Some(u64::from_be_bytes(message[8..16].try_into().ok()?) as usize)
    }

    fn finish(self) -> Pings {
        let mut times: Vec<_> = self.sent.iter().filter_map(|(_, time)| *time).collect();
        times.sort_unstable();
        Pings { sent: self.sent.len() as u64, times }
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Sends datagrams as fast as one thread can, one per system call, and returns how many one
/// receiving thread gets per second. The receiver polls every [`PAUSE`].
///
/// # Errors
/// When a socket cannot be opened, or when nothing arrives at all.
pub(crate) fn flood(
    from: &Netns,
    to: &Netns,
    address: Ipv4Addr,
    payload: usize,
    time: Duration,
) -> Result<f64> {
    let (sender, receiver) = udp_pair(from, to, address)?;
    rate(&sender, &receiver, payload, 2048, |_| 1, time)
}

/// Sends UDP with segmentation offload (`UDP_SEGMENT`, Linux 4.18) as fast as one thread can, and
/// returns how many bits per second one thread receives. The receiver takes segments as the kernel
/// coalesces them.
///
/// # Errors
/// When a socket cannot be opened, or when nothing arrives at all.
pub(crate) fn gso(from: &Netns, to: &Netns, address: Ipv4Addr, time: Duration) -> Result<f64> {
    const SEGMENT: u16 = 1372;
    const SEGMENTS: usize = 44;
    let (sender, receiver) = udp_pair(from, to, address)?;
    setsockopt(&sender, sockopt::UdpGsoSegment, &i32::from(SEGMENT))?;
    setsockopt(&receiver, sockopt::UdpGroSegment, &true)?;
    rate(&sender, &receiver, usize::from(SEGMENT) * SEGMENTS, 1 << 16, |len| len as u64 * 8, time)
}

/// Returns a sending socket that is connected to a receiving one.
fn udp_pair(from: &Netns, to: &Netns, address: Ipv4Addr) -> Result<(UdpSocket, UdpSocket)> {
    let receiver = to.enter(|| {
        let socket = UdpSocket::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::RcvBufForce, &(1 << 23))?;
        Ok(socket)
    })?;
    let target = SocketAddr::from((address, receiver.local_addr()?.port()));
    let sender = from.enter(|| {
        let socket = UdpSocket::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0))?;
        socket.connect(target).context("cannot connect to the target of the flood")?;
        Ok(socket)
    })?;
    Ok((sender, receiver))
}

/// Returns how much arrives per second when one thread sends `payload` bytes per call and another
/// one receives up to `most` bytes per call. `worth` converts the bytes of one receive call into
/// the unit that is counted.
fn rate(
    sender: &UdpSocket,
    receiver: &UdpSocket,
    payload: usize,
    most: usize,
    worth: fn(usize) -> u64,
    time: Duration,
) -> Result<f64> {
    let (stop, received) = (AtomicBool::new(false), AtomicU64::new(0));
    let (count, seconds) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![0; most];
            while !stop.load(Ordering::Relaxed) {
                match receiver.recv(&mut bytes) {
                    Ok(len) => {
                        received.fetch_add(worth(len), Ordering::Relaxed);
                    }
                    Err(_) => thread::sleep(PAUSE),
                }
            }
        });
        scope.spawn(|| {
            let bytes = vec![0x5a; payload];
            while !stop.load(Ordering::Relaxed) {
                // A full queue rejects some datagrams. Only what arrives counts.
                let _ = sender.send(&bytes);
            }
        });
        thread::sleep(WARM_UP);
        let (before, start) = (received.load(Ordering::Relaxed), Instant::now());
        thread::sleep(time);
        let (after, seconds) = (received.load(Ordering::Relaxed), start.elapsed().as_secs_f64());
        stop.store(true, Ordering::Relaxed);
        (after - before, seconds)
    });
    ensure!(count > 0, "no datagram arrived at {}", sender.peer_addr()?);
    Ok(count as f64 / seconds)
}
