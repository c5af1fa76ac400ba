//! The networks to compare. Each has two containers, each in a host of its own, joined by an underlay of one veth pair
//! with an MTU of 1500:
//!
//! ```text
//! container a ── host a ══ underlay ══ host b ── container b
//! ```
//!
//! Every rival is an interface on both hosts, and the hosts forward the containers' packets through it: the same path
//! that overnode's packets take, and what a container host does with a VPN. Encrypted rivals get overnode's inner MTU of
//! 1420 bytes; else they run as they come. `veth` leaves the hosts out: two containers on one cable, the least
//! that the kernel can do.

mod nebula;
mod node;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use ipnet::{IpNet, Ipv4Net};
use lab::rig::probe;
use lab::rig::space::Space;
use lab::rig::wireguard::{Configuration, Device, Peer, Stock, key_pair};

const UNDERLAY: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 168, 77, 1), Ipv4Addr::new(192, 168, 77, 2)];
const UNDERLAY_MTU: u32 = 1500;
/// Addresses of the tunnel's ends on the hosts.
const TUNNEL: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];
const CONTAINER: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 98, 1, 2), Ipv4Addr::new(10, 98, 2, 2)];
const GATEWAY: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 98, 1, 1), Ipv4Addr::new(10, 98, 2, 1)];
/// What overnode leaves to containers on this underlay.
const TUNNEL_MTU: u32 = 1420;
const VXLAN_MTU: u32 = 1450;
const WIREGUARD_PORT: u16 = 51820;

/// A way to join two containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// One veth pair, no hosts between.
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
    /// This project.
    Overnode,
}

impl Kind {
    /// All, in the order of the table.
    pub const ALL: [Self; 7] =
        [Self::Veth, Self::Routed, Self::Vxlan, Self::Gotatun, Self::Boringtun, Self::Nebula, Self::Overnode];

    /// Whether it is another's encrypted network.
    pub const fn is_rival(self) -> bool {
        match self {
            Self::Gotatun | Self::Boringtun | Self::Nebula => true,
            Self::Veth | Self::Routed | Self::Vxlan | Self::Overnode => false,
        }
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
            Self::Overnode => "overnode",
        })
    }
}

/// Two containers that can reach each other.
pub struct Network {
    /// The container that sends.
    pub a: Space,
    /// The container that receives.
    pub b: Space,
    /// The address of `b`.
    pub to: Ipv4Addr,
    /// What keeps the network up. Dropped before the hosts are.
    _parts: Parts,
    _hosts: Vec<Space>,
}

#[derive(Default)]
struct Parts {
    _devices: Vec<Device>,
    _nebula: Vec<nebula::Node>,
    _nodes: Vec<node::Node>,
}

impl Network {
    /// Makes it, and waits until the first ping has come back.
    ///
    /// # Errors
    /// When something it needs is missing, or no ping comes back within 30 seconds.
    pub fn set_up(kind: Kind) -> Result<Self> {
        let network = match kind {
            Kind::Veth => veth()?,
            Kind::Routed => through_hosts(kind, UNDERLAY_MTU, |hosts| {
                for (own, other) in PAIRS {
                    hosts[own].run(&format!("ip route add {} via {}", network_of(other), UNDERLAY[other]))?;
                }
                Ok(Parts::default())
            })?,
            Kind::Vxlan => through_hosts(kind, VXLAN_MTU, vxlan)?,
            Kind::Gotatun => through_hosts(kind, TUNNEL_MTU, |hosts| wireguard(hosts, Stock::Gotatun))?,
            Kind::Boringtun => through_hosts(kind, TUNNEL_MTU, |hosts| wireguard(hosts, Stock::Boringtun))?,
            Kind::Nebula => through_hosts(kind, TUNNEL_MTU, nebula::start)?,
            Kind::Overnode => overnode()?,
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while probe::ping(&network.a, network.to, 1, Duration::from_millis(1))?.lost() > 0 {
            ensure!(Instant::now() < deadline, "the containers cannot reach each other after 30 seconds");
        }
        Ok(network)
    }
}

/// Each host and the other one.
const PAIRS: [(usize, usize); 2] = [(0, 1), (1, 0)];

fn veth() -> Result<Network> {
    let (a, b) = (Space::new("veth-ca")?, Space::new("veth-cb")?);
    a.join("eth0", &b, "eth0", UNDERLAY_MTU)?;
    for (space, address) in [(&a, TUNNEL[0]), (&b, TUNNEL[1])] {
        space.run(&format!("ip address add {address}/24 dev eth0"))?;
    }
    Ok(Network { a, b, to: TUNNEL[1], _parts: Parts::default(), _hosts: Vec::new() })
}

fn hosts(kind: Kind) -> Result<[Space; 2]> {
    let hosts = [Space::new(&format!("{kind}-ha"))?, Space::new(&format!("{kind}-hb"))?];
    hosts[0].join("under", &hosts[1], "under", UNDERLAY_MTU)?;
    for (own, host) in hosts.iter().enumerate() {
        host.run(&format!("ip address add {}/24 dev under", UNDERLAY[own]))?;
    }
    Ok(hosts)
}

/// Containers behind hosts that forward; `tunnel` adds the routes between the hosts.
fn through_hosts(kind: Kind, mtu: u32, tunnel: impl FnOnce(&[Space; 2]) -> Result<Parts>) -> Result<Network> {
    let hosts = hosts(kind)?;
    let containers = [Space::new(&format!("{kind}-ca"))?, Space::new(&format!("{kind}-cb"))?];
    for (own, (host, container)) in hosts.iter().zip(&containers).enumerate() {
        host.set("ipv4/ip_forward", "1")?;
        host.join("box0", container, "eth0", mtu)?;
        host.run(&format!("ip address add {}/24 dev box0", GATEWAY[own]))?;
        container.run(&format!("ip address add {}/24 dev eth0", CONTAINER[own]))?;
        container.run(&format!("ip route add default via {}", GATEWAY[own]))?;
    }
    let parts = tunnel(&hosts)?;
    let [a, b] = containers;
    Ok(Network { a, b, to: CONTAINER[1], _parts: parts, _hosts: hosts.into() })
}

fn network_of(side: usize) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(CONTAINER[side], 24).trunc())
}

fn vxlan(hosts: &[Space; 2]) -> Result<Parts> {
    for (own, other) in PAIRS {
        let host = &hosts[own];
        let remote = UNDERLAY[other];
        host.run(&format!("ip link add vx0 type vxlan id 77 remote {remote} dstport 4789 dev under"))?;
        host.run(&format!("ip address add {}/24 dev vx0", TUNNEL[own]))?;
        host.run(&format!("ip link set vx0 mtu {VXLAN_MTU} up"))?;
        host.run(&format!("ip route add {} via {}", network_of(other), TUNNEL[other]))?;
    }
    Ok(Parts::default())
}

fn wireguard(hosts: &[Space; 2], stock: Stock) -> Result<Parts> {
    let keys = [key_pair()?, key_pair()?];
    let mut devices = Vec::new();
    for (own, other) in PAIRS {
        let host = &hosts[own];
        let letter = if stock == Stock::Gotatun { 'g' } else { 'b' };
        let interface = format!("ov{letter}{}{own}", std::process::id());
        let device = Device::start(stock, host, &interface)?;
        device.configure(&Configuration {
            private_key: &keys[own].0,
            listen_port: WIREGUARD_PORT,
            peer: Peer {
                public_key: keys[other].1,
                preshared_key: None,
                endpoint: Some(SocketAddr::new(IpAddr::V4(UNDERLAY[other]), WIREGUARD_PORT)),
                allowed_ips: &[network_of(other)],
                keepalive: None,
            },
        })?;
        host.run(&format!("ip link set {interface} mtu {TUNNEL_MTU} up"))?;
        host.run(&format!("ip route add {} dev {interface}", network_of(other)))?;
        devices.push(device);
    }
    Ok(Parts { _devices: devices, ..Parts::default() })
}

fn overnode() -> Result<Network> {
    let hosts = hosts(Kind::Overnode)?;
    let containers = [Space::new("overnode-ca")?, Space::new("overnode-cb")?];
    let mut nodes = Vec::new();
    let mut addresses = Vec::new();
    for (own, other) in PAIRS {
        let node = node::Node::launch(&hosts[own], own + 1, UNDERLAY[other])?;
        addresses.push(node.attach(&containers[own])?);
        nodes.push(node);
    }
    let to = addresses.pop().context("no address")?;
    let [a, b] = containers;
    Ok(Network { a, b, to, _parts: Parts { _nodes: nodes, ..Parts::default() }, _hosts: hosts.into() })
}
