//! Controls the data plane in the kernel: interfaces, eBPF programs and maps. This module is thin;
//! other modules decide what to do.
//!
//! All programs and maps are pinned, and every program stays attached when the daemon exits, so
//! traffic keeps flowing. The next daemon finds them by a name derived from the state directory
//! ([`node_name`]) and replaces the programs one by one, in place. The data plane belongs to the
//! network namespace of the thread that calls [`Datapath::open`]. All threads that use it must be
//! in that namespace.

mod address;
mod bpffs;
mod bulk;
mod clock;
mod drops;
mod endpoint;
mod guard;
mod interfaces;
mod maps;
mod netns;
mod offload;
mod offload_veth;
mod path;
mod programs;
mod receive_ring;
mod reconcile;
mod resolver;
mod routes;
mod session;
mod teardown;
mod underlay;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use overnode_ebpf::map::{Address, Config, Route};
use tracing::{info, warn};

pub use self::address::{from_map, to_map};
pub use self::bpffs::node_name;
pub use self::bulk::{BulkDevice, BulkMaps};
pub use self::clock::{Clock, boot_now};
pub use self::drops::Drops;
pub use self::endpoint::{
    Attached, Attachment, CONTAINER_INTERFACE, EndPlacement, cut, random_mac,
};
pub use self::netns::{NetnsId, NetnsRef, OwnNetns};
pub use self::path::{Probe, Probes};
pub use self::programs::Hook;
pub use self::receive_ring::{Origin, ReceiveRing};
pub use self::reconcile::{KnownEndpoint, Lost};
pub use self::resolver::NetnsCookie;
pub use self::session::{PeerState, SessionState};
pub use self::underlay::{UnderlayInterface, UnderlayStatus};
pub use self::watch::LinkEvent;

use self::bpffs::{Pin, Pins};
use self::endpoint::is_ours;
use self::interfaces::Netlink;
use self::maps::{Maps, pinned_mismatches};
use self::offload_veth::OffloadVeth;
use self::programs::{FROM_CONTAINER, FROM_UNDERLAY, Programs, SEAL, TO_CONTAINER};
use self::routes::{Change, Destination, RouteTable, difference};
use self::underlay::Underlay;
use crate::failpoint;
use overnode_core::handshake::mac1_state;
use overnode_types::{InterfaceIndex, MacAddr, Network, NodeId, PeerIndex, PublicKey};

/// Options for opening the data plane.
#[derive(Clone, Debug)]
pub struct OpenOptions<'a> {
    /// State directory of the node. The node's kernel objects are named after it. It need not
    /// exist.
    pub state_dir: &'a Path,
    /// Address ranges of the cluster.
    pub network: Network,
    /// ID of this node, which relayed messages carry.
    pub node_id: NodeId,
    /// Overlay address of this node: the source of ICMP errors, and the destination of probes.
    pub node_address: IpAddr,
    /// Public key of this node. The programs drop handshake messages from senders that do not know
    /// it.
    pub public_key: PublicKey,
    /// The only underlay interface to use. `None` uses every interface that leads to a peer.
    pub interface: Option<String>,
    /// MTU of containers, in bytes. `None` derives it from the underlay.
    pub mtu: Option<u32>,
    /// Makes the programs log each packet.
    pub debug: bool,
    /// Also attaches the opening program in native XDP mode to the underlay interfaces.
    pub xdp: bool,
}

/// The open data plane of one node.
pub struct Datapath {
    node: String,
    alias: String,
    network: Network,
    node_id: NodeId,
    node_address: IpAddr,
    public_key: PublicKey,
    interface: Option<String>,
    mtu: Option<u32>,
    xdp: bool,
    netlink: Netlink,
    programs: Programs,
    maps: Maps,
    pins: Pins,
    offload_veth: OffloadVeth,
    /// Whether this process has attached the programs that redirect DNS queries.
    redirects: bool,
    routes: RouteTable,
    /// Contents of `ROUTES`, also entries that this version cannot read.
    installed: BTreeMap<IpNet, Route>,
    underlay: Underlay,
    /// Interface index of each host-side veth end, by name.
    endpoints: BTreeMap<String, InterfaceIndex>,
    /// Interface indexes of the bulk workers' devices.
    bulk_devices: BTreeSet<InterfaceIndex>,
    /// Largest inner packet that fits the underlay interface on the direct path, in bytes, by peer.
    largest: BTreeMap<PeerIndex, u32>,
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the programs, takes over what an earlier daemon left, and creates the offload veth.
    ///
    /// Maps and sessions are adopted. Attached programs are replaced in place. The caller must then
    /// call [`Datapath::reconcile`] with the containers that the node knows.
    ///
    /// # Errors
    /// Fails if the process is not root, if the kernel lacks a feature (the error names it), if
    /// another owner has an interface named `ovn0` or `ovn1`, or if maps of another version are in
    /// use.
    pub async fn open(options: OpenOptions<'_>) -> Result<Self> {
        let node = node_name(options.state_dir);
        let alias = alias_of(&node);
        let pins = Pins::find(&node)?;
        pins.create()?;
        pins.remove_other_namespaces()
            .context("links of another network namespace cannot be removed")?;
        let netlink = Netlink::open()?;
        let links = netlink.links().await?;
        if let Some(name) = &options.interface {
            ensure!(
                links.iter().any(|link| link.name == *name),
                "there is no interface {name}: correct `--interface` (`ip link` lists them)"
            );
        }
        check_maps(&pins, &links.iter().map(|link| link.index).collect::<Vec<_>>())?;
        let (mut programs, maps) =
            Programs::load(crate::PROGRAMS, &pins, options.debug, options.xdp)?;
        failpoint::reached("maps");
        let offload_veth = OffloadVeth::ensure(&netlink, &alias, &node).await?;
        failpoint::reached("offload_veth");
        programs.attach(SEAL, &offload_veth.second, &pins)?;
        failpoint::reached("seal");
        offload_veth.set_up(&netlink).await?;

        let installed = maps.routes()?;
        let mut datapath = Self {
            network: options.network,
            node_id: options.node_id,
            node_address: options.node_address,
            public_key: options.public_key,
            interface: options.interface,
            mtu: options.mtu,
            xdp: options.xdp,
            routes: RouteTable::adopt(&installed),
            installed,
            underlay: Underlay::default(),
            endpoints: BTreeMap::new(),
            bulk_devices: BTreeSet::new(),
            largest: BTreeMap::new(),
            node,
            alias,
            netlink,
            programs,
            maps,
            pins,
            offload_veth,
            redirects: false,
        };
        datapath.write_config()?;
        datapath.refresh_host().await?;
        datapath.adopt().await?;
        info!(node = datapath.node, hook = ?datapath.programs.hook(), "the data plane is open");
        Ok(datapath)
    }

    /// Sets the prefixes that a peer owns, replacing its previous ones.
    ///
    /// # Errors
    /// Fails if the index is out of range or the table is full.
    pub fn set_routes(&mut self, peer: PeerIndex, prefixes: &[IpNet]) -> Result<()> {
        self.peer_cell(peer)?;
        self.routes.set_peer(peer, prefixes);
        self.sync_routes()
    }

    /// Sets the prefixes of several peers at once, like [`Self::set_routes`].
    ///
    /// # Errors
    /// Fails if an index is out of range or the table is full.
    pub fn set_routes_of<'a>(
        &mut self,
        peers: impl IntoIterator<Item = (PeerIndex, &'a [IpNet])>,
    ) -> Result<()> {
        for (peer, prefixes) in peers {
            self.peer_cell(peer)?;
            self.routes.set_peer(peer, prefixes);
        }
        self.sync_routes()
    }

    /// Returns the prefixes that a peer owns.
    pub fn routes(&self, peer: PeerIndex) -> Vec<IpNet> {
        self.routes.owned_by(peer).collect()
    }

    /// Sets the prefixes that this node owns, replacing its previous ones. Packets for an address
    /// in them that is not attached here are dropped.
    ///
    /// # Errors
    /// Fails if the table is full.
    pub fn set_own_routes(&mut self, prefixes: &[IpNet]) -> Result<()> {
        self.routes.set_own(prefixes);
        self.sync_routes()
    }

    /// Returns the number of packets by reason, counted since the maps were created.
    ///
    /// # Errors
    /// Fails if the map cannot be read.
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        self.maps.counters()
    }

    /// Returns true if a container is attached through this host-side interface.
    pub fn is_attached(&self, host_interface: &str) -> bool {
        self.endpoints.contains_key(host_interface)
    }

    /// Returns the node's name, which its pinned objects and interface aliases carry.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Replaces the programs that an earlier daemon attached.
    async fn adopt(&mut self) -> Result<()> {
        let links = self.netlink.links().await?;
        let pins = self.pins.list();
        for link in &links {
            let has = |program: &str| {
                pins.iter().any(|pin| match pin {
                    Pin::Link { ifindex, program: found }
                    | Pin::Filter { ifindex, program: found } => {
                        *ifindex == link.index && found == program
                    }
                    Pin::Qdisc { .. } => false,
                })
            };
            if is_ours(link, &self.alias, &self.node) && has(FROM_CONTAINER) {
                // On failure the interface keeps its old program, or it is about to disappear. Only
                // this container is affected.
                for program in [FROM_CONTAINER, TO_CONTAINER] {
                    if let Err(error) = self.programs.attach(program, link, &self.pins) {
                        warn!(
                            %error,
                            program,
                            interface = link.name,
                            "keeping the program of an earlier daemon"
                        );
                    }
                }
                self.endpoints.insert(link.name.clone(), link.index);
            }
            if has(FROM_UNDERLAY)
                && let Err(error) = self.watch_interface(link)
            {
                warn!(
                    %error,
                    interface = link.name,
                    "no longer receiving messages on this interface"
                );
                for error in endpoint::detach_all(link, &self.pins) {
                    warn!(%error, interface = link.name, "the old program cannot be removed");
                }
            }
        }
        Ok(())
    }

    fn write_config(&mut self) -> Result<()> {
        let subnet = self.network.subnet;
        let v4_bits = if subnet.network().is_ipv4() { Address::V4_BITS } else { 0 };
        self.maps.set_config(Config {
            subnet: to_map(subnet.network()),
            subnet_bits: u32::from(subnet.prefix_len()) + v4_bits,
            offload_veth: self.offload_veth.first.index.get(),
            node: to_map(self.node_address),
            node_id: self.node_id.get().into(),
            mac1: mac1_state(&self.public_key),
        })
    }

    /// Brings the map in line with the table as far as possible. The next change retries entries
    /// that failed.
    fn sync_routes(&mut self) -> Result<()> {
        let wanted = self.routes.wanted();
        // The first attempt may have freed the space that it lacked.
        self.try_routes(&wanted).or_else(|_| self.try_routes(&wanted))
    }

    fn try_routes(&mut self, wanted: &BTreeMap<IpNet, Destination>) -> Result<()> {
        let mut result = Ok(());
        for change in difference(&self.installed, wanted) {
            let changed = match change {
                Change::Put(prefix, destination) => {
                    let route = Route::from(destination);
                    self.maps.set_route(prefix, route).map(|()| {
                        self.installed.insert(prefix, route);
                    })
                }
                Change::Delete(prefix) => self.maps.remove_route(prefix).map(|()| {
                    self.installed.remove(&prefix);
                }),
            };
            result = result.and(changed);
        }
        result
    }
}

/// Checks the layout of the pinned maps. Maps with another layout are unusable: they are removed if
/// no container uses them, otherwise this fails.
fn check_maps(pins: &Pins, interfaces: &[InterfaceIndex]) -> Result<()> {
    let mismatches = pinned_mismatches(pins);
    if mismatches.is_empty() {
        return Ok(());
    }
    let is_container = |pin: &Pin| match pin {
        Pin::Link { ifindex, program } | Pin::Filter { ifindex, program } => {
            program == FROM_CONTAINER && interfaces.contains(ifindex)
        }
        Pin::Qdisc { .. } => false,
    };
    if pins.list().iter().any(is_container) {
        bail!(
            "the maps in use were created by another version of overnode ({}): detach the \
             containers and run `overnode reset`, or start the version that created them",
            mismatches.join("; ")
        );
    }
    pins.remove_maps().context("maps of another version cannot be removed")
}

/// Returns the interface alias that marks an interface as this node's.
fn alias_of(node: &str) -> String {
    format!("overnode:{node}")
}

/// Returns a locally administered MAC address. The first 4 bytes identify the node, the last 2 are
/// `last`.
fn mac_of(node: &str, last: [u8; 2]) -> MacAddr {
    let byte = |at: usize| {
        node.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(0)
    };
    MacAddr::new([2, byte(0), byte(2), byte(4), last[0], last[1]])
}

/// Returns true for the addresses that [`mac_of`] returns for this node.
fn is_mac_of(node: &str, mac: MacAddr) -> bool {
    let [.., low, last] = mac.octets();
    mac == mac_of(node, [low, last])
}

/// Turns off IPv6 on one of our interfaces and keeps its packets away from the host's own stack. If
/// its program is ever detached, the host neither forwards nor delivers packets from containers.
/// Write errors are ignored: where /proc is read-only, only addr_gen_mode takes effect (see
/// [`Netlink::mark`]).
fn isolate_interface(interface: &str) {
    for (family, setting, value) in
        [("ipv6", "disable_ipv6", "1"), ("ipv4", "forwarding", "0"), ("ipv4", "rp_filter", "1")]
    {
        let _ = std::fs::write(format!("/proc/sys/net/{family}/conf/{interface}/{setting}"), value);
    }
}
