//! Runs stock userspace WireGuard: boringtun and gotatun as processes, configured through their
//! sockets.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;

use crate::background::Background;
use crate::netns::{Entry, Netns};

/// Directory in which userspace WireGuard creates its configuration sockets. All network namespaces
/// share it, so interface names must differ.
const SOCKETS: &str = "/var/run/wireguard";

/// A Curve25519 key or a preshared key.
pub type Key = [u8; 32];

/// A third-party WireGuard implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
    /// Cloudflare's implementation.
    Boringtun,
    /// Mullvad's implementation.
    Gotatun,
}

impl Stock {
    /// All implementations.
    pub const ALL: [Self; 2] = [Self::Boringtun, Self::Gotatun];

    const fn program(self) -> &'static str {
        match self {
            Self::Boringtun => "boringtun-cli",
            Self::Gotatun => "gotatun",
        }
    }
}

impl fmt::Display for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
        })
    }
}

/// Returns the file of a third-party program: in `rivals/bin` of the target directory, where
/// `cargo xtask` installs it.
///
/// # Errors
/// Fails if it is not there.
pub fn installed(program: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the path of this program")?;
    own.ancestors()
        .map(|folder| folder.join("rivals/bin").join(program))
        .find(|file| file.is_file())
        .with_context(|| format!("{program} is not installed: run `cargo xtask setup` first"))
}

/// Returns a new private key and its public key.
pub fn key_pair() -> Result<(Key, Key)> {
    let mut bytes = [0; 32];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    let public = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(bytes));
    Ok((bytes, public.to_bytes()))
}

/// Configuration of a device, like the `[Interface]` and `[Peer]` of `wg`.
#[derive(Debug)]
pub struct Configuration<'a> {
    /// Private key of the interface.
    pub private_key: &'a Key,
    /// UDP port to listen on.
    pub listen_port: u16,
    /// The only peer.
    pub peer: Peer<'a>,
}

/// A peer from the stock process's point of view.
#[derive(Debug)]
pub struct Peer<'a> {
    /// Public key.
    pub public_key: Key,
    /// Preshared key to mix into the handshake, if any.
    pub preshared_key: Option<&'a Key>,
    /// Endpoint. Without one, the process can only respond.
    pub endpoint: Option<SocketAddr>,
    /// Networks that the peer may send from and that are routed to it.
    pub allowed_ips: &'a [IpNet],
    /// Interval of persistent keepalives, in whole seconds.
    pub keepalive: Option<Duration>,
}

/// A running stock WireGuard with its TUN interface.
#[derive(Debug)]
pub struct Device {
    stock: Stock,
    interface: String,
    process: Background,
}

/// State of a device's peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Time since the last handshake; `None` before the first one.
    pub handshake_age: Option<Duration>,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}

impl Device {
    /// Starts the process and waits for its socket.
    ///
    /// # Errors
    /// Fails if the program is not installed or does not come up within 5 seconds. In the second
    /// case the message holds the end of its output.
    pub fn start(stock: Stock, netns: &Netns) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Unique on the machine, and within the kernel's length limit for every process ID.
        let interface =
            format!("ovw{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ensure_tun()?;
        let mut command = netns.command(Entry::Setns, installed(stock.program())?);
        command.args([
            "--foreground",
            "--disable-drop-privileges",
            "--verbosity",
            "error",
            &interface,
        ]);
        let process = Background::start(command)?;
        let mut device = Self { stock, interface, process };
        let deadline = Instant::now() + Duration::from_secs(5);
        while device.get().is_err() {
            device.process.check()?;
            ensure!(
                Instant::now() < deadline,
                "{stock} does not answer on its socket: {}",
                device.process.last_words()
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(device)
    }

    /// Sets the whole configuration, replacing the previous one.
    ///
    /// # Errors
    /// Fails if the process refuses.
    pub fn configure(&self, configuration: &Configuration<'_>) -> Result<()> {
        let Configuration { private_key, listen_port, peer } = configuration;
        let mut text = format!(
            "private_key={}\nlisten_port={listen_port}\nreplace_peers=true\n",
            hex(*private_key)
        );
        text += &format!("public_key={}\n", hex(&peer.public_key));
        if let Some(key) = peer.preshared_key {
            text += &format!("preshared_key={}\n", hex(key));
        }
        if let Some(endpoint) = peer.endpoint {
            text += &format!("endpoint={endpoint}\n");
        }
        if let Some(keepalive) = peer.keepalive {
            text += &format!("persistent_keepalive_interval={}\n", keepalive.as_secs());
        }
        text += "replace_allowed_ips=true\n";
        for range in peer.allowed_ips {
            text += &format!("allowed_ip={range}\n");
        }
        self.ask(&format!("set=1\n{text}\n"))?;
        Ok(())
    }

    /// Brings the interface up and routes these networks into it.
    ///
    /// # Errors
    /// Fails if `ip` refuses.
    pub fn up(&self, netns: &Netns, mtu: u32, networks: &[IpNet]) -> Result<()> {
        netns.ip(&["link", "set", &self.interface, "mtu", &mtu.to_string(), "up"])?;
        for network in networks {
            netns.ip(&["route", "add", &network.to_string(), "dev", &self.interface])?;
        }
        Ok(())
    }

    /// Returns the state of the device's peer.
    ///
    /// # Errors
    /// Fails if the device does not answer.
    pub fn peer(&self) -> Result<PeerState> {
        let lines = self.get()?;
        let number = |name: &str| -> u64 {
            lines
                .iter()
                .find(|(key, _)| key == name)
                .and_then(|(_, value)| value.parse().ok())
                .unwrap_or(0)
        };
        let last = Duration::new(
            number("last_handshake_time_sec"),
            number("last_handshake_time_nsec") as u32,
        );
        // The protocol specifies the time since the Unix epoch. boringtun reports the age instead.
        let age = match self.stock {
            Stock::Boringtun => last,
            Stock::Gotatun => SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(last),
        };
        Ok(PeerState {
            handshake_age: (!last.is_zero()).then_some(age),
            received: number("rx_bytes"),
            sent: number("tx_bytes"),
        })
    }

    /// Checks that the process is still running.
    ///
    /// # Errors
    /// Fails if it has ended. The message holds the end of its output.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }

    fn get(&self) -> Result<Vec<(String, String)>> {
        self.ask("get=1\n\n")
    }

    fn ask(&self, request: &str) -> Result<Vec<(String, String)>> {
        let mut socket = UnixStream::connect(self.socket())?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.write_all(request.as_bytes())?;
        let mut lines = Vec::new();
        for line in BufReader::new(socket).lines() {
            let line = line?;
            let Some((key, value)) = line.split_once('=') else { continue };
            if key == "errno" {
                if value != "0" {
                    bail!("{} rejects the request: error {value}", self.interface);
                }
                return Ok(lines);
            }
            lines.push((key.to_owned(), value.to_owned()));
        }
        bail!("the answer of {} is incomplete", self.interface)
    }

    fn socket(&self) -> PathBuf {
        Path::new(SOCKETS).join(format!("{}.sock", self.interface))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.socket());
    }
}

/// Creates `/dev/net/tun` on a machine that lacks it.
///
/// # Errors
/// Fails if it cannot be created, for example without root.
pub fn ensure_tun() -> Result<()> {
    let file = Path::new("/dev/net/tun");
    if file.exists() {
        return Ok(());
    }
    fs::create_dir_all("/dev/net")?;
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    let device = nix::sys::stat::makedev(10, 200);
    nix::sys::stat::mknod(file, nix::sys::stat::SFlag::S_IFCHR, mode, device)
        .context("cannot create /dev/net/tun")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
