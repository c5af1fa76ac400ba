//! The lab: a small network of Linux hosts inside this kernel, for the tests, the demo and the
//! benchmarks.
//!
//! A host is a network namespace with a real daemon. A container is another namespace. The underlay
//! between the hosts is a bridge or a router in its own namespace. Nothing is created in the
//! machine's own network namespace, so labs can run side by side with the same addresses.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let lab = lab::Lab::new("example").hosts(2).build()?;
//! let [a, b] = lab.hosts() else { unreachable!() };
//! a.overnode(&["launch", "--id", "1", "--token", "secret", &b.name])?.success()?;
//! b.overnode(&["launch", "--id", "2", "--token", "secret", &a.name])?.success()?;
//! let one = a.container("one")?;
//! a.attach(&one, &[])?;
//! # Ok(()) }
//! ```
//!
//! Dropping a lab removes everything that it made, also when the test panics. SIGINT and SIGTERM
//! remove it as well. After a SIGKILL, the next lab that is built removes it (see [`cleanup`]).
//!
//! The lab needs root and the programs `ip`, `ping`, `tcpdump` and `nft`. [`iperf`] also needs
//! `iperf3`.

pub mod background;
pub mod binaries;
pub mod capture;
pub mod cleanup;
pub mod container;
pub mod docker;
pub mod flood;
pub mod flow;
pub mod gateway;
pub mod host;
mod http;
pub mod iperf;
pub mod lookups;
pub mod monitor;
pub mod netns;
pub mod parallel;
pub mod pcap;
pub mod ping;
pub mod podman;
pub mod process;
pub mod raw;
pub mod rough;
mod underlay;
pub mod wireguard;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use capture::Capture;
pub use container::Container;
pub use host::Host;
pub use netns::{Entry, Netns};
pub use ping::PingStats;
pub use process::Outcome;
pub use underlay::{Family, Topology};

use underlay::Underlay;

/// A network of hosts. See the [module's description](self).
pub struct Lab {
    hosts: Vec<Host>,
    underlay: Underlay,
    site: Site,
}

/// The description of a lab. Made by [`Lab::new`], completed by [`Self::build`].
#[derive(Clone, Debug)]
pub struct Builder {
    name: String,
    hosts: usize,
    family: Family,
    topology: Topology,
    mtu: u32,
    entry: Entry,
}

/// The names and the folder that belong to one lab.
pub(crate) struct Site {
    /// Start of every namespace's name: `ovl`, this process's ID, `x`, a number.
    prefix: String,
    /// Folder for state directories, captures and outputs.
    folder: PathBuf,
}

impl Lab {
    /// Starts the description of a lab with two hosts, IPv4, a bridge and an MTU of 1500 bytes.
    /// `name` appears in error messages.
    #[expect(clippy::new_ret_no_self, reason = "the builder is the only way to make a lab")]
    pub fn new(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            hosts: 2,
            family: Family::V4,
            topology: Topology::Bridged,
            mtu: 1500,
            entry: Entry::IpNetns,
        }
    }

    /// Returns the hosts in the order of their numbers.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Returns the host with this number. The first host has number 1.
    ///
    /// # Panics
    /// Panics if there is no such host.
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }

    /// Returns the folder of this lab, for files of the test. It is removed with the lab.
    pub fn folder(&self) -> &Path {
        &self.site.folder
    }

    /// Returns the namespace of the bridge or router between the hosts.
    pub fn underlay(&self) -> &Netns {
        &self.underlay.netns
    }

    /// Returns the HOST arguments with which a node dials every host of the lab. These are names if
    /// namespaces are entered by `ip netns exec`, which gives each its own `/etc/hosts`. Otherwise
    /// they are addresses.
    pub fn targets(&self) -> Vec<&str> {
        self.hosts.iter().map(Host::target).collect()
    }

    /// Captures everything that hosts send into the underlay, each frame once. Returns once the
    /// capture is listening.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.underlay.netns, &self.site.folder, self.underlay.capture_arguments())
    }

    /// Returns the name of the underlay's end of a host's link.
    pub fn port(&self, host: &Host) -> String {
        underlay::port(host.number)
    }

    /// Drops all packets between two hosts, in both directions.
    pub fn cut(&self, a: &Host, b: &Host) -> Result<()> {
        self.underlay.cut(a.number, b.number)?;
        self.underlay.cut(b.number, a.number)
    }

    /// Drops packets that `from` sends to `to`. The other direction keeps working.
    pub fn cut_one_way(&self, from: &Host, to: &Host) -> Result<()> {
        self.underlay.cut(from.number, to.number)
    }

    /// Ends every cut between two hosts.
    pub fn heal(&self, a: &Host, b: &Host) -> Result<()> {
        self.underlay.heal(a.number, b.number)?;
        self.underlay.heal(b.number, a.number)
    }

    /// Unplugs a host's cable: its underlay interface loses the carrier.
    pub fn unplug(&self, host: &Host) -> Result<()> {
        self.underlay.carrier(host.number, false)
    }

    /// Plugs a host's cable in again.
    pub fn plug(&self, host: &Host) -> Result<()> {
        self.underlay.carrier(host.number, true)
    }

    /// Makes a host's link an MTU black hole, in a lab with a router. The router's side silently
    /// drops packets larger than `mtu` bytes. The host's interface keeps its MTU.
    pub fn narrow(&self, host: &Host, mtu: u32) -> Result<()> {
        self.underlay.narrow(host.number, mtu)
    }

    /// Makes the hosts' underlay interfaces take single packets only from now on, like network
    /// cards without segmentation offload. `joins` sets whether they coalesce received packets
    /// (GRO).
    pub fn stop_segmenting(&self, joins: bool) -> Result<()> {
        let gro = if joins { "on" } else { "off" };
        let features = ["tso", "off", "gso", "on", "tx-udp-segmentation", "off", "gro", gro];
        self.hosts().iter().try_for_each(|host| {
            let words = [&["-K", host.interface()][..], &features].concat();
            host.netns().run("ethtool", &words).map(drop)
        })
    }

    /// Replaces a host's cable with a rough wire, in a lab with a bridge, until [`Self::smooth`].
    pub fn roughen(
        &self,
        host: &Host,
        roughness: rough::Roughness,
        seed: u64,
    ) -> Result<rough::Wire> {
        self.underlay.roughen(host, roughness, seed)
    }

    /// Replaces a host's rough wire with its cable.
    pub fn smooth(&self, host: &Host, wire: rough::Wire) -> Result<()> {
        self.underlay.smooth(host, wire)
    }

    /// Sets the MTU of a host's link at both ends, in bytes. A bridge uses the smallest MTU of its
    /// links.
    pub fn set_mtu(&self, host: &Host, mtu: u32) -> Result<()> {
        self.underlay.set_mtu(host, mtu)
    }

    /// Replaces a host's underlay address with another one of the same subnet, and returns it. In a
    /// lab with both families, this changes the IPv4 address. [`Host::addresses`] keeps the old
    /// addresses.
    pub fn renumber(&self, host: &Host, last_byte: u8) -> Result<std::net::IpAddr> {
        self.underlay.renumber(host, last_byte)
    }
}

impl Builder {
    /// Sets the number of hosts, 1 to 200. They are called host1, host2, and so on.
    pub fn hosts(mut self, hosts: usize) -> Self {
        self.hosts = hosts;
        self
    }

    /// Sets the address family of the underlay.
    pub fn family(mut self, family: Family) -> Self {
        self.family = family;
        self
    }

    /// Gives each host its own subnet, with a router between them.
    pub fn routed(mut self) -> Self {
        self.topology = Topology::Routed;
        self
    }

    /// Sets the MTU of every underlay link, in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Sets how commands enter a host's namespace. The default is [`Entry::IpNetns`].
    pub fn entry(mut self, entry: Entry) -> Self {
        self.entry = entry;
        self
    }

    /// Builds the lab, after removing what dead test processes left behind.
    ///
    /// # Errors
    /// Fails if the user is not root, or if a program is missing or fails. Nothing is left behind
    /// then.
    pub fn build(self) -> Result<Lab> {
        ensure!((1..=200).contains(&self.hosts), "a lab has 1 to 200 hosts");
        // SAFETY: geteuid has no preconditions.
        ensure!(unsafe { libc::geteuid() } == 0, "a lab needs root: run the tests as root");
        cleanup::prepare();
        cleanup::sweep();
        let site = Site::new()?;
        let name = self.name.clone();
        self.build_at(site).with_context(|| format!("lab {name}"))
    }

    fn build_at(self, site: Site) -> Result<Lab> {
        let underlay = Underlay::new(&site, self.topology, self.family, self.mtu)?;
        let hosts = (1..=self.hosts)
            .map(|number| Host::new(&site, &underlay, number, self.entry))
            .collect::<Result<Vec<_>>>()?;
        let lab = Lab { hosts, underlay, site };
        let names: String = lab
            .hosts
            .iter()
            .flat_map(|host| {
                host.addresses.iter().map(|address| format!("{address} {}\n", host.name))
            })
            .collect();
        for host in &lab.hosts {
            host.write_hosts_file(&names)?;
        }
        Ok(lab)
    }
}

impl Site {
    fn new() -> Result<Self> {
        static LABS: AtomicU32 = AtomicU32::new(1);
        let prefix = format!("ovl{}x{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let folder = cleanup::folder_of(&prefix);
        cleanup::register(&prefix);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { prefix, folder })
    }

    /// Returns the full name of the namespace that this lab calls `name`.
    fn netns_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        cleanup::remove(&self.prefix);
    }
}

/// Retries every 20 ms until `attempt` succeeds, at most for `limit`.
///
/// # Errors
/// Fails with the last error of `attempt` and the elapsed time.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if started.elapsed() >= limit => {
                return Err(error.context(format!(
                    "still failing after {:.1} s",
                    started.elapsed().as_secs_f32()
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Runs one of the machine's own programs, which must succeed. Returns its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!(
            "`{program} {}` failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
