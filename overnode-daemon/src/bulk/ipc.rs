//! Implements the daemon's side: starts the workers' process, connects to one that an earlier
//! daemon started, and exchanges messages with it.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, UnixAddr, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Pid;
use overnode_ebpf::wire::BULK_PORT;
use tokio::io::unix::AsyncFd;

use super::control::{FromWorkers, SOCKET, ToWorkers, receive, send};
use super::process::{ARGUMENT, FIRST_FD, NAME, Start};
use crate::datapath::BulkDevice;
use overnode_trust as trust;
use overnode_types::PublicKey;

/// Buffer size of a worker's socket in each direction, in bytes.
const SOCKET_BUFFER: usize = 4 << 20;

/// A connection to the workers' process.
#[derive(Debug)]
pub struct WorkersConnection {
    socket: AsyncFd<OwnedFd>,
    pid: Pid,
}

impl WorkersConnection {
    /// Connects to the process whose socket is in `run_dir`. Returns `None` if no process listens
    /// there.
    ///
    /// # Errors
    /// Fails if another user's process listens there, or if the socket cannot be used.
    pub fn connect(run_dir: &Path) -> Result<Option<Self>> {
        let address = UnixAddr::new(&run_dir.join(SOCKET))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        match socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => return Ok(None),
            Err(error) => return Err(error).context("the bulk workers' socket cannot be used"),
        }
        let peer = socket::getsockopt(&socket, sockopt::PeerCredentials)?;
        // The listening process is given session keys.
        ensure!(
            trust::is_trusted_user(peer.uid()),
            "a process of user {} listens on the bulk workers' socket",
            peer.uid()
        );
        let pid = Pid::from_raw(peer.pid());
        // SAFETY: the descriptor is owned, and never changes.
        let socket = unsafe { AsyncFd::register(socket) };
        Ok(Some(Self { socket: socket.context("the bulk workers' socket cannot be polled")?, pid }))
    }

    /// Returns the next message, or `None` if the process is gone. This method is cancel safe.
    ///
    /// # Errors
    /// Fails if a message cannot be received or decoded.
    pub async fn next(&self) -> io::Result<Option<FromWorkers>> {
        loop {
            let mut ready = self.socket.readable().await?;
            if let Ok(message) = ready.try_io(|socket| receive(socket.get_ref())) {
                return message;
            }
        }
    }

    /// Sends a message to the process.
    ///
    /// # Errors
    /// Fails if the process is gone, or has not read its messages for too long.
    pub fn tell(&self, message: &ToWorkers) -> io::Result<()> {
        send(self.socket.get_ref(), message)
    }

    /// Returns the ID of the process that listened when the connection was made.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Tells the process to exit and waits until it has. Kills it if it cannot be told or takes
    /// more than 2 seconds.
    pub async fn stop(self) {
        const STOP_TIMEOUT: Duration = Duration::from_secs(2);
        let ended = async { while let Ok(Some(_)) = self.next().await {} };
        if self.tell(&ToWorkers::Stop).is_err()
            || tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err()
        {
            self.kill();
        }
    }

    /// Kills the process.
    pub fn kill(&self) {
        let _ = kill(self.pid, Signal::SIGKILL);
    }
}

/// The UDP sockets of all workers.
#[derive(Debug)]
pub struct WorkerSockets {
    v4: Vec<OwnedFd>,
    v6: Vec<OwnedFd>,
}

impl WorkerSockets {
    /// Binds UDP port 6783 once per worker, for IPv4 and IPv6 separately. A family that the host
    /// lacks is skipped. A message goes to the worker whose number is that of the sending worker,
    /// modulo `workers`.
    ///
    /// # Errors
    /// Fails if the port is in use, or if the host has neither IPv4 nor IPv6.
    pub fn bind(workers: usize) -> Result<Self> {
        let group = |address: SocketAddr| -> Result<Vec<OwnedFd>> {
            let mut sockets = Vec::new();
            for _ in 0..workers {
                match bind(address) {
                    Ok(socket) => sockets.push(socket),
                    Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => return Ok(Vec::new()),
                    Err(error) => {
                        return Err(error).with_context(|| {
                            format!(
                                "UDP port {BULK_PORT} cannot be opened: stop what uses it \
                                 (`ss -lnup` shows it)"
                            )
                        });
                    }
                }
            }
            if let Some(first) = sockets.first().filter(|_| workers > 1) {
                select_socket_by_sender(first, workers as u32)?;
            }
            Ok(sockets)
        };
        let ports = Self {
            v4: group((Ipv4Addr::UNSPECIFIED, BULK_PORT).into())?,
            v6: group((Ipv6Addr::UNSPECIFIED, BULK_PORT).into())?,
        };
        ensure!(!ports.v4.is_empty() || !ports.v6.is_empty(), "the host has neither IPv4 nor IPv6");
        Ok(ports)
    }
}

fn bind(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(family, SockType::Datagram, flags, SockProtocol::Udp)?;
    socket::setsockopt(&socket, sockopt::ReusePort, &true)?;
    if address.is_ipv6() {
        socket::setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    // Root may exceed the system's limits. Without that privilege the limits apply.
    if socket::setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        socket::setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER)?;
    }
    if socket::setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        socket::setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER)?;
    }
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

/// Makes the kernel choose among the sockets of one port by the byte that names the sending worker
/// (classic BPF on the UDP payload, Linux 4.5). One worker therefore opens everything that one
/// remote worker sends, in order. No datagram can reach a different worker's replay window.
fn select_socket_by_sender(socket: &OwnedFd, workers: u32) -> Result<()> {
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const MODULO: u16 = (libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_A) as u16;
    const WORKER: u32 = 2;
    let step = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut steps = [step(LOAD_BYTE, WORKER), step(MODULO, workers), step(RETURN, 0)];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program and its instructions are valid during the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(set).map(drop).context("messages cannot be distributed over the bulk workers")
}

/// Starts the process. It outlives its parent.
///
/// # Errors
/// Fails if the socket cannot be created or the process cannot be started.
pub fn start(
    run_dir: &Path,
    mode: overnode_api::bulk::Mode,
    public_key: &PublicKey,
    maps: [BorrowedFd<'_>; 4],
    devices: Vec<BulkDevice>,
    ports: WorkerSockets,
) -> Result<Child> {
    let settings = Start {
        mode,
        public_key: public_key.0,
        devices: devices.iter().map(|device| device.ifindex).collect(),
        has_v4: !ports.v4.is_empty(),
        has_v6: !ports.v6.is_empty(),
        coalesces_udp: devices.iter().all(|device| device.takes_uso),
    };
    let mut fds = vec![named_socket(run_dir)?];
    for map in maps {
        fds.push(map.try_clone_to_owned()?);
    }
    let (mut v4, mut v6) = (ports.v4.into_iter(), ports.v6.into_iter());
    for device in devices {
        fds.push(device.file.into());
        fds.extend(v4.next());
        fds.extend(v6.next());
    }
    let mappings = (FIRST_FD..)
        .zip(fds)
        .map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd })
        .collect();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(NAME)
        .arg(ARGUMENT)
        .arg(serde_json::to_string(&settings)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        // The daemon's environment may contain secrets such as a join token.
        .env_clear()
        .fd_mappings(mappings)
        .context("file descriptors of the bulk workers collide")?;
    command.spawn().context("the bulk worker process cannot be started")
}

/// Creates the named socket, on which the process itself calls `listen`. The kernel then reports
/// that process, not the daemon, as the peer of each connection.
fn named_socket(run_dir: &Path) -> Result<OwnedFd> {
    let path = run_dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} cannot be replaced", path.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    // Linux creates the socket file with the mode of the socket, less the umask.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(&path)?)
        .with_context(|| format!("the socket {} cannot be created", path.display()))?;
    Ok(socket)
}
