//! The networks to compare. Each has two containers on a host each. One veth pair with an MTU of
//! 1500 between the hosts is the underlay:
//!
//! ```text
//! container a ── host a ══ underlay ══ host b ── container b
//! ```
//!
//! Every rival is an interface on both hosts, and the hosts forward the containers' packets through
//! it. Overnode's packets take the same path, and a container host with a VPN does the same.
//! Encrypted rivals get overnode's inner MTU of 1420 bytes and otherwise run with their defaults.
//! `veth` has no hosts: two containers share one cable, the least work that the kernel can do.
//! `routed` has the hosts but no tunnel.

mod nebula;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use ipnet::{IpNet, Ipv4Net};
use lab::wireguard::{Configuration, Device, Peer, Stock, key_pair};
use lab::{Container, Entry, Lab, gateway};
use serde_json::Value;

use crate::probe;

const UNDERLAY: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 77, 1), Ipv4Addr::new(192, 168, 77, 2)];
const UNDERLAY_MTU: u32 = 1500;
/// Tunnel addresses of the hosts.
const TUNNEL: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];
const CONTAINER: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 98, 1, 2), Ipv4Addr::new(10, 98, 2, 2)];
const GATEWAY: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 98, 1, 1), Ipv4Addr::new(10, 98, 2, 1)];
/// MTU that overnode leaves to containers on this underlay.
const TUNNEL_MTU: u32 = 1420;
const VXLAN_MTU: u32 = 1450;
const WIREGUARD_PORT: u16 = 51820;
const TOKEN: &str = "the token of the benchmark";
/// Congestion control of the containers' TCP: Linux's default, whatever this machine is configured
/// to use. BBR, for one, paces with timers, whose interrupts cost a virtual machine more than the
/// network does.
pub(crate) const CONGESTION: &str = "cubic";
/// Pairs of a host and the other host.
const PAIRS: [(usize, usize); 2] = [(0, 1), (1, 0)];

/// A network that connects two containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// One veth pair, without hosts in between.
    Veth,
    /// Hosts that forward without a tunnel.
    Routed,
    /// The kernel's VXLAN, without encryption.
    Vxlan,
    /// Mullvad's userspace WireGuard.
    Gotatun,
    /// Cloudflare's userspace WireGuard.
    Boringtun,
    /// Slack's Nebula.
    Nebula,
    /// VXLAN over an underlay without segmentation offload.
    VxlanNotso,
    /// VXLAN over an underlay without segmentation offload, but with GRO.
    VxlanNotsoGro,
    /// This project.
    Overnode,
    /// Overnode with ChaCha20-Poly1305 for bulk flows.
    OvernodeChacha,
    /// Overnode with AES-256-GCM for bulk flows.
    OvernodeAes,
    /// The same over an underlay without segmentation offload.
    OvernodeAesNotso,
    /// The same over an underlay without segmentation offload, but with GRO.
    OvernodeAesNotsoGro,
    /// Overnode without workers: the programs alone.
    OvernodeOff,
}

impl Kind {
    /// All networks, in the order of the table.
    pub(crate) const ALL: [Self; 14] = [
        Self::Veth,
        Self::Routed,
        Self::Vxlan,
        Self::VxlanNotso,
        Self::VxlanNotsoGro,
        Self::Gotatun,
        Self::Boringtun,
        Self::Nebula,
        Self::Overnode,
        Self::OvernodeChacha,
        Self::OvernodeAes,
        Self::OvernodeAesNotso,
        Self::OvernodeAesNotsoGro,
        Self::OvernodeOff,
    ];

    /// Returns whether this is overnode.
    pub(crate) const fn is_own(self) -> bool {
        self.bulk().is_some()
    }

    /// Returns the value of `--bulk` if this is overnode.
    const fn bulk(self) -> Option<&'static str> {
        match self {
            Self::Overnode => Some("auto"),
            Self::OvernodeChacha => Some("chacha"),
            Self::OvernodeAes | Self::OvernodeAesNotso | Self::OvernodeAesNotsoGro => Some("aes"),
            Self::OvernodeOff => Some("off"),
            _ => None,
        }
    }

    /// Returns whether the underlay's interfaces coalesce what they receive (GRO). `None` where the
    /// underlay has segmentation offload.
    const fn joins_without_tso(self) -> Option<bool> {
        match self {
            Self::VxlanNotso | Self::OvernodeAesNotso => Some(false),
            Self::VxlanNotsoGro | Self::OvernodeAesNotsoGro => Some(true),
            _ => None,
        }
    }

    /// Returns whether this is another project's encrypted network.
    pub(crate) const fn is_rival(self) -> bool {
        matches!(self, Self::Gotatun | Self::Boringtun | Self::Nebula)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Veth => "veth",
            Self::Routed => "routed",
            Self::Vxlan => "vxlan",
            Self::Gotatun => "gotatun",
            Self::Boringtun => "boringtun",
            Self::Nebula => "nebula",
            Self::VxlanNotso => "vxlan, TSO off",
            Self::VxlanNotsoGro => "vxlan, TSO off, GRO",
            Self::Overnode => "overnode",
            Self::OvernodeChacha => "overnode chacha",
            Self::OvernodeAes => "overnode aes",
            Self::OvernodeAesNotso => "overnode aes, TSO off",
            Self::OvernodeAesNotsoGro => "overnode aes, TSO off, GRO",
            Self::OvernodeOff => "overnode off",
        })
    }
}

/// Two containers that can reach each other. The fields are dropped in order, so that the tunnel
/// goes before the hosts that it runs on.
pub(crate) struct Network {
    /// The container that sends.
    pub a: Container,
    /// The container that receives.
    pub b: Container,
    /// The address of `b`.
    pub to: Ipv4Addr,
    _tunnel: Tunnel,
    _lab: Lab,
}

/// The processes that the tunnel needs.
enum Tunnel {
    None,
    WireGuard { _devices: Vec<Device> },
    Nebula { _nodes: nebula::Nodes },
}

impl Network {
    /// Sets up the network and waits until the first ping is answered.
    ///
    /// # Errors
    /// When something that the network needs is missing, or when no ping is answered within 30
    /// seconds.
    pub(crate) fn set_up(kind: Kind) -> Result<Self> {
        let lab = Lab::new("bench").entry(Entry::Setns).build()?;
        let [a, b] = [lab.host(1).container("a")?, lab.host(2).container("b")?];
        let tunnel = match kind {
            Kind::Veth => {
                veth(&a, &b)?;
                Tunnel::None
            }
            Kind::Routed => {
                forward(&lab, [&a, &b], UNDERLAY_MTU)?;
                for (own, other) in PAIRS {
                    route(&lab, own, &["via", &UNDERLAY[other].to_string()])?;
                }
                Tunnel::None
            }
            Kind::Vxlan | Kind::VxlanNotso | Kind::VxlanNotsoGro => {
                forward(&lab, [&a, &b], VXLAN_MTU)?;
                vxlan(&lab)?;
                Tunnel::None
            }
            Kind::Gotatun | Kind::Boringtun => {
                forward(&lab, [&a, &b], TUNNEL_MTU)?;
                let stock = if kind == Kind::Gotatun { Stock::Gotatun } else { Stock::Boringtun };
                Tunnel::WireGuard { _devices: wireguard(&lab, stock)? }
            }
            Kind::Nebula => {
                forward(&lab, [&a, &b], TUNNEL_MTU)?;
                Tunnel::Nebula { _nodes: nebula::start(&lab)? }
            }
            Kind::Overnode
            | Kind::OvernodeChacha
            | Kind::OvernodeAes
            | Kind::OvernodeAesNotso
            | Kind::OvernodeAesNotsoGro
            | Kind::OvernodeOff => {
                overnode(&lab, [&a, &b], kind.bulk().unwrap_or_default())?;
                Tunnel::None
            }
        };
        if let Some(joins) = kind.joins_without_tso() {
            lab.stop_segmenting(joins)?;
        }
        let IpAddr::V4(to) = b.address() else {
            anyhow::bail!("{} is not an IPv4 address", b.address())
        };
        lab::eventually(Duration::from_secs(30), || {
            let lost = probe::ping(a.netns(), to, 1, Duration::from_millis(1))?.lost();
            ensure!(lost == 0, "the containers cannot reach each other");
            Ok(())
        })?;
        for (container, other) in [(&a, to.into()), (&b, a.address())] {
            control_congestion(container, other).context("cannot set the congestion control")?;
        }
        Ok(Self { a, b, to, _tunnel: tunnel, _lab: lab })
    }
}

/// Makes a container use [`CONGESTION`] toward an address.
fn control_congestion(container: &Container, to: IpAddr) -> Result<()> {
    let to = to.to_string();
    let routes: Value =
        serde_json::from_str(&container.netns().ip(&["-json", "route", "get", &to])?)?;
    let part = |key: &str| routes[0][key].as_str();
    let way = [("via", part("gateway")), ("dev", part("dev"))];
    let way = way.into_iter().filter_map(|(word, value)| Some([word, value?])).flatten();
    let words: Vec<_> =
        ["route", "replace", &to].into_iter().chain(way).chain(["congctl", CONGESTION]).collect();
    container.netns().ip(&words).map(drop)
}

fn veth(a: &Container, b: &Container) -> Result<()> {
    let mtu = UNDERLAY_MTU.to_string();
    let peer = ["peer", "name", "eth0", "mtu", &mtu, "netns", b.netns().name()];
    a.netns().ip(&[&["link", "add", "eth0", "mtu", &mtu, "type", "veth"], &peer[..]].concat())?;
    for (container, address) in [a, b].into_iter().zip(CONTAINER) {
        container.netns().ip(&["address", "add", &format!("{address}/16"), "dev", "eth0"])?;
        container.netns().ip(&["link", "set", "eth0", "up"])?;
        container.set_address(Some(address.into()));
    }
    Ok(())
}

/// Connects the hosts with a cable instead of the lab's bridge, which would be one more hop.
fn cable(lab: &Lab) -> Result<()> {
    let (first, second) = (lab.host(1).netns(), lab.host(2).netns());
    let mtu = UNDERLAY_MTU.to_string();
    for host in lab.hosts() {
        host.netns().ip(&["link", "del", host.interface()])?;
    }
    let peer = ["peer", "name", "eth0", "mtu", &mtu, "netns", second.name()];
    first.ip(&[&["link", "add", "eth0", "mtu", &mtu, "type", "veth"], &peer[..]].concat())?;
    for (host, address) in lab.hosts().iter().zip(UNDERLAY) {
        host.netns().ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        host.netns().ip(&["link", "set", "eth0", "up"])?;
    }
    Ok(())
}

/// Connects the hosts with a cable and makes them forward for the containers behind them.
fn forward(lab: &Lab, containers: [&Container; 2], mtu: u32) -> Result<()> {
    cable(lab)?;
    for (own, container) in containers.into_iter().enumerate() {
        gateway::plug(&lab.hosts()[own], container, CONTAINER[own], GATEWAY[own], mtu)?;
    }
    Ok(())
}

/// Adds a route to the other host's container.
fn route(lab: &Lab, own: usize, way: &[&str]) -> Result<()> {
    let network = network_of(1 - own).to_string();
    lab.hosts()[own].netns().ip(&[&["route", "add", &network], way].concat()).map(drop)
}

fn network_of(side: usize) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(CONTAINER[side], 24).trunc())
}

fn vxlan(lab: &Lab) -> Result<()> {
    for (own, other) in PAIRS {
        let host = lab.hosts()[own].netns();
        let remote = UNDERLAY[other].to_string();
        let port = ["dstport", "4789", "dev", "eth0"];
        host.ip(&[
            &["link", "add", "vx0", "type", "vxlan", "id", "77", "remote", &remote],
            &port[..],
        ]
        .concat())?;
        host.ip(&["address", "add", &format!("{}/24", TUNNEL[own]), "dev", "vx0"])?;
        host.ip(&["link", "set", "vx0", "mtu", &VXLAN_MTU.to_string(), "up"])?;
        route(lab, own, &["via", &TUNNEL[other].to_string()])?;
    }
    Ok(())
}

fn wireguard(lab: &Lab, stock: Stock) -> Result<Vec<Device>> {
    let keys = [key_pair()?, key_pair()?];
    let mut devices = Vec::new();
    for (own, other) in PAIRS {
        let host = lab.hosts()[own].netns();
        let device = Device::start(stock, host)?;
        device.configure(&Configuration {
            private_key: &keys[own].0,
            listen_port: WIREGUARD_PORT,
            peer: Peer {
                public_key: keys[other].1,
                preshared_key: None,
                endpoint: Some(SocketAddr::new(UNDERLAY[other].into(), WIREGUARD_PORT)),
                allowed_ips: &[network_of(other)],
                keepalive: None,
            },
        })?;
        device.up(host, TUNNEL_MTU, &[network_of(other)])?;
        devices.push(device);
    }
    Ok(devices)
}

fn overnode(lab: &Lab, containers: [&Container; 2], bulk: &str) -> Result<()> {
    cable(lab)?;
    launch(lab, containers, UNDERLAY.map(IpAddr::V4), bulk)
}

/// Launches a node with one of these addresses on each host, and attaches a container on each.
/// Returns once the nodes have a session and, unless `bulk` is `off`, workers are in use.
pub(crate) fn launch(
    lab: &Lab,
    containers: [&Container; 2],
    addresses: [IpAddr; 2],
    bulk: &str,
) -> Result<()> {
    for (own, other) in PAIRS {
        let (id, target) = ((own + 1).to_string(), addresses[other].to_string());
        let words = ["launch", "--bulk", bulk, "--id", &id, &target];
        lab.hosts()[own].overnode_with(&words, &[("OVERNODE_TOKEN", TOKEN)])?.success()?;
    }
    for host in lab.hosts() {
        lab::eventually(Duration::from_secs(30), || {
            let status = host.status()?;
            let mut peers =
                status["peers"].as_array().into_iter().flatten().map(|peer| &peer["data"]);
            let is_ready = peers.any(|data| {
                data["session"] == "established"
                    && (bulk == "off" || data["bulk"]["in_use"] == true)
            });
            ensure!(is_ready, "no session or no workers in use: {}", host.log());
            Ok(())
        })?;
    }
    // Nodes know the underlay's MTU only now, and containers get theirs from it.
    for (host, container) in lab.hosts().iter().zip(containers) {
        host.attach(container, &[]).with_context(|| format!("the daemon's log: {}", host.log()))?;
    }
    Ok(())
}
