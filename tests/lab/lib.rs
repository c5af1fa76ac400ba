//! The lab: a small network of Linux hosts inside this kernel, for the tests, the demo and the
//! benchmarks.
//!
//! A host is a network namespace with a real daemon, a container is another one, and the underlay
//! between the hosts is a bridge or a router in a namespace of its own. Nothing is made in the
//! machine's own network namespace, so labs run side by side, with the same addresses.
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
//! What a lab made goes away when it is dropped: also when the test panics, on SIGINT and SIGTERM,
//! and, after a SIGKILL, when the next lab is built (see [`cleanup`]).
//!
//! It needs root and the programs `ip`, `ping`, `tcpdump` and `nft`; for [`iperf`] also `iperf3`.

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

/// What a lab shall be like; made by [`Lab::new`], ended by [`Self::build`].
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
    /// Starts every namespace's name: `ovl`, this process's ID, `x`, a number.
    prefix: String,
    /// Holds state directories, captures and outputs.
    folder: PathBuf,
}

impl Lab {
    /// Starts the description of a lab: two hosts, IPv4, a bridge, MTU 1500. `name` appears in
    /// error messages.
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

    /// The hosts, in the order of their numbers.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host with this number; the first is 1.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }

    /// The folder of this lab, for files of the test; it goes away with the lab.
    pub fn folder(&self) -> &Path {
        &self.site.folder
    }

    /// The namespace of the bridge or router between the hosts.
    pub fn underlay(&self) -> &Netns {
        &self.underlay.netns
    }

    /// What to give as HOST arguments so that a node dials every host of the lab: names where
    /// namespaces are entered by `ip netns exec` (which gives each its own `/etc/hosts`), else
    /// addresses.
    pub fn targets(&self) -> Vec<&str> {
        self.hosts.iter().map(Host::target).collect()
    }

    /// Captures everything that hosts send into the underlay, each frame once. Returns when it is
    /// listening.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.underlay.netns, &self.site.folder, self.underlay.capture_arguments())
    }

    /// The underlay's end of a host's link.
    pub fn port(&self, host: &Host) -> String {
        underlay::port(host.number)
    }

    /// Drops everything between two hosts, in both directions.
    pub fn cut(&self, a: &Host, b: &Host) -> Result<()> {
        self.underlay.cut(a.number, b.number)?;
        self.underlay.cut(b.number, a.number)
    }

    /// Drops what `from` sends to `to`; the other direction keeps working.
    pub fn cut_one_way(&self, from: &Host, to: &Host) -> Result<()> {
        self.underlay.cut(from.number, to.number)
    }

    /// Ends every cut between the two hosts.
    pub fn heal(&self, a: &Host, b: &Host) -> Result<()> {
        self.underlay.heal(a.number, b.number)?;
        self.underlay.heal(b.number, a.number)
    }

    /// Pulls a host's cable: the carrier of its underlay interface goes away.
    pub fn unplug(&self, host: &Host) -> Result<()> {
        self.underlay.carrier(host.number, false)
    }

    /// Puts the cable back.
    pub fn plug(&self, host: &Host) -> Result<()> {
        self.underlay.carrier(host.number, true)
    }

    /// Makes a black hole of a host's link, in a lab with a router: the router's side takes packets
    /// of up to `mtu` bytes and drops larger ones without a word; the host's interface stays as it
    /// is.
    pub fn narrow(&self, host: &Host, mtu: u32) -> Result<()> {
        self.underlay.narrow(host.number, mtu)
    }

    /// From now on the underlay takes single packets only, as network cards without segmentation
    /// do; `joins`: and its interfaces join what they receive (GRO).
    pub fn stop_segmenting(&self, joins: bool) -> Result<()> {
        let gro = if joins { "on" } else { "off" };
        let features = ["tso", "off", "gso", "on", "tx-udp-segmentation", "off", "gro", gro];
        self.hosts().iter().try_for_each(|host| {
            let words = [&["-K", host.interface()][..], &features].concat();
            host.netns().run("ethtool", &words).map(drop)
        })
    }

    /// Puts a rough wire in place of a host's cable, in a lab with a bridge, until
    /// [`Self::smooth`].
    pub fn roughen(
        &self,
        host: &Host,
        roughness: rough::Roughness,
        seed: u64,
    ) -> Result<rough::Wire> {
        self.underlay.roughen(host, roughness, seed)
    }

    /// Puts the cable back.
    pub fn smooth(&self, host: &Host, wire: rough::Wire) -> Result<()> {
        self.underlay.smooth(host, wire)
    }

    /// Gives a host's link another MTU, in bytes, at both ends. (A bridge goes on with the least of
    /// all links.)
    pub fn set_mtu(&self, host: &Host, mtu: u32) -> Result<()> {
        self.underlay.set_mtu(host, mtu)
    }

    /// Gives a host another underlay address in the same subnet (family of the lab's first), in
    /// place of its present one; [`Host::addresses`] keeps naming the old ones.
    pub fn renumber(&self, host: &Host, last_byte: u8) -> Result<std::net::IpAddr> {
        self.underlay.renumber(host, last_byte)
    }
}

impl Builder {
    /// How many hosts; they are called host1, host2, and so on.
    pub fn hosts(mut self, hosts: usize) -> Self {
        self.hosts = hosts;
        self
    }

    /// Addresses of the underlay.
    pub fn family(mut self, family: Family) -> Self {
        self.family = family;
        self
    }

    /// Each host gets a subnet of its own, with a router between them.
    pub fn routed(mut self) -> Self {
        self.topology = Topology::Routed;
        self
    }

    /// MTU of every underlay link, in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// How commands get into a host's namespace; default [`Entry::IpNetns`].
    pub fn entry(mut self, entry: Entry) -> Self {
        self.entry = entry;
        self
    }

    /// Makes it all, after removing what dead test processes left.
    ///
    /// # Errors
    /// When this is not root, or a program is missing or fails; nothing is left behind then.
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
            .with_context(|| format!("{} cannot be made", folder.display()))?;
        Ok(Self { prefix, folder })
    }

    /// The full name of the namespace that this lab calls `name`.
    fn netns_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        cleanup::remove(&self.prefix);
    }
}

/// Tries again every 20 ms until `attempt` succeeds, at the most for `limit`.
///
/// # Errors
/// The last error of `attempt`, with the time that went by.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if started.elapsed() >= limit => {
                return Err(error
                    .context(format!("still so after {:.1} s", started.elapsed().as_secs_f32())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Runs one of the machine's own programs, which must succeed; returns its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
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
