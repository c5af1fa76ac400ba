//! TCP and UDP streams with known content.
//!
//! Every byte is known, so received data can be verified and captures can be searched for
//! plaintext. A stream consists of 16-byte blocks: [`MARKER`], then the block's number. A packet
//! with 23 or more bytes of payload therefore holds the whole marker.

use std::io::{ErrorKind, Read, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::container::Container;

/// Part of every payload that the lab sends. It must never appear on an underlay.
pub const MARKER: [u8; 8] = *b"OVNsecrt";

const BLOCK: usize = 16;
const CHUNK: usize = 64 * 1024;
const LONGEST_WRITE: usize = 300_000;
/// A stream without progress for this long has failed.
const STALL: Duration = Duration::from_secs(20);

/// When a stream ends.
#[derive(Clone, Copy, Debug)]
pub enum Amount {
    /// After this many bytes.
    Bytes(u64),
    /// After this time.
    Time(Duration),
    /// When [`TcpFlow::stop`] is called.
    UntilStopped,
}

/// How a stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// 64 KiB at a time, as fast as the socket takes them.
    Steady,
    /// Evenly, at most this many bytes per second.
    Rate(u64),
    /// Bursts and pauses, writes of 1 to 300,000 bytes, and urgent bytes in between, all drawn from
    /// this seed.
    Moody(u64),
}

/// A running TCP stream from one container to another.
#[derive(Debug)]
pub struct TcpFlow {
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<Received>>,
    progress: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// Result of a TCP stream. Every byte was verified.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Number of bytes, all of them as sent.
    pub bytes: u64,
    /// Time from the first byte to the last.
    pub took: Duration,
    /// Longest time during which nothing arrived.
    pub longest_pause: Duration,
}

impl Received {
    /// Returns the throughput in 10⁹ bits per second, payload only.
    pub fn gigabits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.took.as_secs_f64().max(1e-9) / 1e9
    }
}

impl TcpFlow {
    /// Connects from `from` to `to` and starts to send. `to` listens on a free port of its overlay
    /// address.
    ///
    /// # Errors
    /// Fails if the connection is not established within ten seconds.
    pub fn start(from: &Container, to: &Container, amount: Amount) -> Result<Self> {
        Self::start_as(from, to, amount, Manner::Steady)
    }

    /// Like [`Self::start`], with a chosen [`Manner`].
    pub fn start_as(
        from: &Container,
        to: &Container,
        amount: Amount,
        manner: Manner,
    ) -> Result<Self> {
        let address = to.address();
        let listener = to.netns().enter(move || Ok(TcpListener::bind((address, 0))?))?;
        let target = listener.local_addr()?;
        let stream = from
            .netns()
            .enter(move || Ok(TcpStream::connect_timeout(&target, Duration::from_secs(10))?))
            .with_context(|| {
                format!("no TCP connection from {} to {} ({target})", from.name, to.name)
            })?;
        let (accepted, _) = listener.accept()?;
        stream.set_write_timeout(Some(STALL))?;
        accepted.set_read_timeout(Some(STALL))?;
        // Keep urgent bytes at their place in the stream.
        setsockopt(&accepted, sockopt::OobInline, &true)?;
        let (progress, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let receiver = std::thread::spawn({
            let progress = Arc::clone(&progress);
            move || receive(accepted, &progress)
        });
        let sender = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || send(stream, amount, manner, &stop)
        });
        Ok(Self { sender, receiver, progress, stop })
    }

    /// Returns the number of verified bytes so far.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Waits until this many more bytes have arrived.
    pub fn wait_for(&self, more: u64, limit: Duration) -> Result<()> {
        let wanted = self.progress() + more;
        crate::eventually(limit, || {
            let now = self.progress();
            ensure!(now >= wanted, "the TCP stream is at {now} of {wanted} bytes");
            Ok(())
        })
    }

    /// Stops the sender and waits for the remaining bytes.
    pub fn stop(self) -> Result<Received> {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// Waits for the end of the stream.
    ///
    /// # Errors
    /// Fails if the stream broke or made no progress for 20 seconds, or if a byte was wrong or
    /// missing.
    pub fn finish(self) -> Result<Received> {
        let sent = self.sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        let received = self.receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        let sent = sent?;
        ensure!(received.bytes == sent, "{sent} bytes were sent, but {} arrived", received.bytes);
        Ok(received)
    }
}

/// Sends a TCP stream from one container to another and verifies it.
pub fn tcp(from: &Container, to: &Container, amount: Amount) -> Result<Received> {
    TcpFlow::start(from, to, amount)?.finish()
}

fn send(mut stream: TcpStream, amount: Amount, manner: Manner, stop: &AtomicBool) -> Result<u64> {
    let started = Instant::now();
    let mut pace = Pace::new(manner, started);
    let mut buffer = vec![0; LONGEST_WRITE + BLOCK];
    let mut sent = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let wanted = match amount {
            Amount::Bytes(bytes) => bytes - sent,
            Amount::Time(time) if started.elapsed() >= time => 0,
            Amount::Time(_) | Amount::UntilStopped => u64::MAX,
        };
        if wanted == 0 {
            break;
        }
        let write = pace.next(sent);
        std::thread::sleep(write.pause);
        let length = write.length.min(usize::try_from(wanted).unwrap_or(usize::MAX));
        let skew = (sent % BLOCK as u64) as usize;
        fill(&mut buffer[..skew + length], sent - skew as u64);
        let bytes = &buffer[skew..skew + length];
        let outcome = if write.urgent {
            let flags = MsgFlags::MSG_OOB;
            nix::sys::socket::send(stream.as_raw_fd(), bytes, flags).map(drop).map_err(Into::into)
        } else {
            stream.write_all(bytes)
        };
        outcome.with_context(|| format!("sending stopped after {sent} bytes"))?;
        sent += length as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// The next write, and the pause before it.
struct Write {
    pause: Duration,
    length: usize,
    urgent: bool,
}

/// Draws one write after the other.
struct Pace {
    manner: Manner,
    started: Instant,
    rng: StdRng,
    /// Offset in the stream at which the current burst ends.
    burst_until: u64,
}

impl Pace {
    fn new(manner: Manner, started: Instant) -> Self {
        let seed = if let Manner::Moody(seed) = manner { seed } else { 0 };
        Self { manner, started, rng: StdRng::seed_from_u64(seed), burst_until: 0 }
    }

    fn next(&mut self, sent: u64) -> Write {
        match self.manner {
            Manner::Steady => Write { pause: Duration::ZERO, length: CHUNK, urgent: false },
            Manner::Rate(rate) => {
                let due = self.started + Duration::from_secs_f64(sent as f64 / rate as f64);
                let length = (rate as usize / 200).clamp(BLOCK, CHUNK) / BLOCK * BLOCK;
                Write {
                    pause: due.saturating_duration_since(Instant::now()),
                    length,
                    urgent: false,
                }
            }
            Manner::Moody(_) => {
                let rng = &mut self.rng;
                let mut pause = Duration::ZERO;
                if sent >= self.burst_until {
                    pause = Duration::from_millis(rng.random_range(5..120));
                    let longest = 1 << rng.random_range(17..25);
                    self.burst_until = sent + rng.random_range(1 << 10..longest);
                }
                let (length, urgent) = match rng.random_range(0..20) {
                    0 => (1, true),
                    1..10 => (rng.random_range(1..200), false),
                    _ => (rng.random_range(1..LONGEST_WRITE), false),
                };
                Write { pause, length, urgent }
            }
        }
    }
}

fn receive(mut stream: TcpStream, progress: &AtomicU64) -> Result<Received> {
    let (mut buffer, mut expected) = (vec![0; CHUNK], vec![0; CHUNK + BLOCK]);
    let (mut bytes, mut longest_pause) = (0u64, Duration::ZERO);
    let (mut started, mut last) = (None, Instant::now());
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("receiving stopped after {bytes} bytes"));
            }
        };
        let now = Instant::now();
        if started.is_some() {
            longest_pause = longest_pause.max(now - last);
        }
        started.get_or_insert(now);
        last = now;
        let skew = (bytes % BLOCK as u64) as usize;
        fill(&mut expected, bytes - skew as u64);
        ensure!(
            buffer[..length] == expected[skew..skew + length],
            "a byte between {bytes} and {} of the TCP stream is wrong",
            bytes + length as u64
        );
        bytes += length as u64;
        progress.store(bytes, Ordering::Relaxed);
    }
    Ok(Received {
        bytes,
        took: started.map_or(Duration::ZERO, |started| last - started),
        longest_pause,
    })
}

/// Fills the buffer with the stream's bytes from `start` on, a multiple of the block size.
fn fill(buffer: &mut [u8], start: u64) {
    for (number, block) in (start / BLOCK as u64..).zip(buffer.chunks_mut(BLOCK)) {
        let mut whole = [0; BLOCK];
        whole[..8].copy_from_slice(&MARKER);
        whole[8..].copy_from_slice(&number.to_be_bytes());
        block.copy_from_slice(&whole[..block.len()]);
    }
}

/// Result of a burst of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagrams {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that arrived, each counted once.
    pub received: u64,
    /// Further arrivals of the same datagram.
    pub duplicated: u64,
    /// Datagrams that arrived after a later one.
    pub reordered: u64,
    /// Datagrams that arrived with a wrong length or a wrong byte.
    pub corrupt: u64,
}

/// Sends `count` numbered datagrams, one per `interval`, and verifies what arrives until half a
/// second after the last one. Each has `size` bytes of payload, at least 16.
pub fn udp(
    from: &Container,
    to: &Container,
    count: u64,
    size: usize,
    interval: Duration,
) -> Result<Datagrams> {
    ensure!(size >= BLOCK, "a datagram needs at least {BLOCK} bytes for its number");
    let (source, target) = (from.address(), to.address());
    let ring = to.netns().enter(move || Ok(UdpSocket::bind((target, 0))?))?;
    let outbox = from.netns().enter(move || Ok(UdpSocket::bind((source, 0))?))?;
    let address = ring.local_addr()?;
    ring.set_read_timeout(Some(Duration::from_millis(100)))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| collect(&ring, count, size, &over));
        let sent = send_datagrams(&outbox, address, count, size, interval);
        std::thread::sleep(Duration::from_millis(500));
        over.store(true, Ordering::Relaxed);
        let received = receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        Ok(Datagrams { sent: sent?, ..received })
    })
}

fn send_datagrams(
    socket: &UdpSocket,
    to: SocketAddr,
    count: u64,
    size: usize,
    interval: Duration,
) -> Result<u64> {
    let started = Instant::now();
    let mut payload = vec![0; size];
    let mut sent = 0;
    for number in 0..count {
        fill(&mut payload, number * BLOCK as u64);
        match socket.send_to(&payload, to) {
            Ok(_) => sent += 1,
            // The path refused the datagram because it is too large. It counts as not sent.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
            Err(error) => return Err(error).context("cannot send a datagram"),
        }
        let due = started + interval * u32::try_from(number + 1).unwrap_or(u32::MAX);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(sent)
}

fn collect(socket: &UdpSocket, count: u64, size: usize, over: &AtomicBool) -> Result<Datagrams> {
    let (mut buffer, mut expected) = (vec![0; 65536], vec![0; size]);
    let mut seen = vec![false; usize::try_from(count)?];
    let mut result = Datagrams::default();
    let mut newest = None;
    loop {
        let length = match socket.recv_from(&mut buffer) {
            Ok((length, _)) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if over.load(Ordering::Relaxed) {
                    return Ok(result);
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let number = buffer[8..16].try_into().map_or(u64::MAX, u64::from_be_bytes);
        let genuine = number < count && {
            fill(&mut expected, number * BLOCK as u64);
            buffer[..length] == expected[..]
        };
        if !genuine {
            result.corrupt += 1;
            continue;
        }
        if std::mem::replace(&mut seen[number as usize], true) {
            result.duplicated += 1;
            continue;
        }
        result.received += 1;
        if newest.is_some_and(|newest| number < newest) {
            result.reordered += 1;
        }
        newest = newest.max(Some(number));
    }
}
