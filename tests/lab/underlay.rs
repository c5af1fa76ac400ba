//! The network between the hosts: a bridge or a router in its own namespace, which can be told to
//! drop packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};

use crate::host::Host;
use crate::netns::Netns;
use crate::rough::{Roughness, Wire};
use crate::{Site, run};

/// Name of each host's underlay interface.
pub(crate) const INTERFACE: &str = "eth0";

/// Address families of the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both, IPv4 first.
    Dual,
}

/// How hosts are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// One Ethernet: 192.168.48.0/24 and fd00:48::/64. The last part of host n is 10 + n.
    Bridged,
    /// A router between separate subnets: host n is 192.168.(48 + n).10 and fd00:48:n::10.
    Routed,
}

#[derive(Debug)]
pub(crate) struct Underlay {
    pub(crate) netns: Netns,
    topology: Topology,
    family: Family,
    mtu: u32,
}

impl Underlay {
    pub(crate) fn new(site: &Site, topology: Topology, family: Family, mtu: u32) -> Result<Self> {
        let netns = Netns::new(&site.netns_name("u"))?;
        let underlay = Self { netns, topology, family, mtu };
        match topology {
            Topology::Bridged => {
                let bridge = ["link", "add", "br0", "mtu", &mtu.to_string(), "type", "bridge"];
                underlay.netns.ip(&[&bridge[..], &["mcast_snooping", "0"]].concat())?;
                underlay.netns.ip(&["link", "set", "br0", "up"])?;
            }
            Topology::Routed => underlay.netns.enter(|| {
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
                // Keep the router's IPv6 addresses when a cable is unplugged.
                std::fs::write("/proc/sys/net/ipv6/conf/default/keep_addr_on_down", "1")?;
                std::fs::write("/proc/sys/net/ipv6/conf/all/keep_addr_on_down", "1")?;
                Ok(std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
            })?,
        }
        underlay.netns.run("nft", &["add", "table", underlay.table(), "lab"])?;
        let hook = "{ type filter hook forward priority 0; }";
        underlay.netns.run("nft", &["add", "chain", underlay.table(), "lab", "cuts", hook])?;
        Ok(underlay)
    }

    /// Connects a host, with its addresses and routes. Returns its addresses.
    pub(crate) fn connect(&self, number: usize, host: &Netns) -> Result<Vec<IpAddr>> {
        let (port, mtu) = (port(number), self.mtu.to_string());
        self.netns.ip(&[
            "link",
            "add",
            &port,
            "mtu",
            &mtu,
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "mtu",
            &mtu,
            "netns",
            host.name(),
        ])?;
        if self.topology == Topology::Bridged {
            self.netns.ip(&["link", "set", &port, "master", "br0"])?;
        }
        self.netns.ip(&["link", "set", &port, "up"])?;
        host.ip(&["link", "set", INTERFACE, "up"])?;
        let addresses = self.addresses(number);
        for address in &addresses {
            self.add_address(host, *address)?;
            if let Some(gateway) = self.gateway(number, *address) {
                add_address(&self.netns, &port, gateway, prefix(gateway))?;
                let family = if gateway.is_ipv4() { "-4" } else { "-6" };
                host.ip(&[family, "route", "add", "default", "via", &gateway.to_string()])?;
            }
        }
        Ok(addresses)
    }

    fn add_address(&self, host: &Netns, address: IpAddr) -> Result<()> {
        add_address(host, INTERFACE, address, prefix(address))
    }

    pub(crate) fn cut(&self, from: usize, to: usize) -> Result<()> {
        let (from, to) = (format!("\"{}\"", port(from)), format!("\"{}\"", port(to)));
        let rule =
            ["add", "rule", self.table(), "lab", "cuts", "iifname", &from, "oifname", &to, "drop"];
        self.netns.run("nft", &rule).map(drop)
    }

    pub(crate) fn heal(&self, from: usize, to: usize) -> Result<()> {
        let rules = self.netns.run("nft", &["-a", "list", "chain", self.table(), "lab", "cuts"])?;
        let wanted = format!("iifname \"{}\" oifname \"{}\" drop", port(from), port(to));
        for rule in rules.lines().filter(|rule| rule.trim().starts_with(&wanted)) {
            let Some((_, handle)) = rule.rsplit_once("handle ") else { continue };
            self.netns.run(
                "nft",
                &["delete", "rule", self.table(), "lab", "cuts", "handle", handle.trim()],
            )?;
        }
        Ok(())
    }

    pub(crate) fn carrier(&self, number: usize, up: bool) -> Result<()> {
        self.netns.ip(&["link", "set", &port(number), if up { "up" } else { "down" }]).map(drop)
    }

    /// Limits the link to a host to `mtu` bytes on the router's side, and drops the router's ICMP
    /// errors. Only for routers.
    pub(crate) fn narrow(&self, number: usize, mtu: u32) -> Result<()> {
        ensure!(
            self.topology == Topology::Routed,
            "a bridge has one MTU: build the lab with `routed`"
        );
        let silent = "{ type filter hook output priority 0; }";
        self.netns.run("nft", &["add", "chain", self.table(), "lab", "silent", silent])?;
        for error in [["icmp", "destination-unreachable"], ["icmpv6", "packet-too-big"]] {
            let [family, kind] = error;
            self.netns.run(
                "nft",
                &["add", "rule", self.table(), "lab", "silent", family, "type", kind, "drop"],
            )?;
        }
        self.netns.ip(&["link", "set", &port(number), "mtu", &mtu.to_string()]).map(drop)
    }

    /// Replaces a host's link with a rough wire. Only for bridges. The wire carries frames as a
    /// cable does, so the interfaces in front of it must not leave checksums or segmentation to
    /// others.
    pub(crate) fn roughen(&self, host: &Host, roughness: Roughness, seed: u64) -> Result<Wire> {
        ensure!(self.topology == Topology::Bridged, "only a bridged lab can have rough links");
        let (port, [near, far]) = (port(host.number), rough_ends(host.number));
        let mtu = self.mtu.to_string();
        self.netns.ip(&[
            "link", "add", &near, "mtu", &mtu, "type", "veth", "peer", "name", &far, "mtu", &mtu,
        ])?;
        self.netns.ip(&["link", "set", &port, "nomaster"])?;
        self.netns.ip(&["link", "set", &far, "master", "br0"])?;
        for (netns, interface) in [(&self.netns, far.as_str()), (host.netns(), INTERFACE)] {
            offloads(netns, interface, "off")?;
        }
        for end in [&near, &far] {
            self.netns.ip(&["link", "set", end, "up"])?;
        }
        Wire::start(&self.netns, [&port, &near], roughness, seed)
    }

    /// Replaces a rough wire with the host's link again.
    pub(crate) fn smooth(&self, host: &Host, mut wire: Wire) -> Result<()> {
        wire.stop()?;
        self.netns.ip(&["link", "del", &rough_ends(host.number)[0]])?;
        self.netns.ip(&["link", "set", &port(host.number), "master", "br0"])?;
        offloads(host.netns(), INTERFACE, "on")
    }

    /// Sets the MTU of both ends of a host's link, in bytes.
    pub(crate) fn set_mtu(&self, host: &Host, mtu: u32) -> Result<()> {
        let mtu = mtu.to_string();
        self.netns.ip(&["link", "set", &port(host.number), "mtu", &mtu])?;
        host.netns().ip(&["link", "set", INTERFACE, "mtu", &mtu]).map(drop)
    }

    pub(crate) fn renumber(&self, host: &Host, last_byte: u8) -> Result<IpAddr> {
        let old = host.address();
        let new = with_last_byte(old, last_byte);
        ensure!(!host.addresses.contains(&new), "the host already has the address {new}");
        let removed = format!("{old}/{}", prefix(old));
        // Delete the old address first. If the new IPv4 address joined it in the same subnet,
        // deleting the old one would delete the new one too.
        host.netns().ip(&["address", "del", &removed, "dev", INTERFACE])?;
        self.add_address(host.netns(), new)?;
        if let Some(gateway) = self.gateway(host.number, new) {
            let family = if gateway.is_ipv4() { "-4" } else { "-6" };
            host.netns().ip(&[
                family,
                "route",
                "replace",
                "default",
                "via",
                &gateway.to_string(),
            ])?;
        }
        Ok(new)
    }

    /// Returns the arguments that make `tcpdump` see each frame once.
    pub(crate) fn capture_arguments(&self) -> &'static [&'static str] {
        match self.topology {
            // On `any`, libpcap hides frames addressed to others. A promiscuous bridge receives all
            // of them.
            Topology::Bridged => &["-i", "br0"],
            Topology::Routed => &["-i", "any", "-Q", "in"],
        }
    }

    fn addresses(&self, number: usize) -> Vec<IpAddr> {
        let byte = number as u8;
        let (v4, v6) = match self.topology {
            Topology::Bridged => (
                Ipv4Addr::new(192, 168, 48, 10 + byte),
                Ipv6Addr::new(0xfd00, 0x48, 0, 0, 0, 0, 0, u16::from(10 + byte)),
            ),
            Topology::Routed => (
                Ipv4Addr::new(192, 168, 48 + byte, 10),
                Ipv6Addr::new(0xfd00, 0x48, u16::from(byte), 0, 0, 0, 0, 0x10),
            ),
        };
        match self.family {
            Family::V4 => vec![v4.into()],
            Family::V6 => vec![v6.into()],
            Family::Dual => vec![v4.into(), v6.into()],
        }
    }

    fn gateway(&self, number: usize, address: IpAddr) -> Option<IpAddr> {
        debug_assert!(number > 0);
        match self.topology {
            Topology::Bridged => None,
            Topology::Routed => Some(with_last_byte(address, 1)),
        }
    }

    fn table(&self) -> &'static str {
        match self.topology {
            Topology::Bridged => "bridge",
            Topology::Routed => "inet",
        }
    }
}

fn with_last_byte(address: IpAddr, byte: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            Ipv4Addr::new(a, b, c, byte).into()
        }
        IpAddr::V6(v6) => {
            let mut octets = v6.octets();
            octets[15] = byte;
            Ipv6Addr::from(octets).into()
        }
    }
}

fn add_address(netns: &Netns, interface: &str, address: IpAddr, bits: u8) -> Result<()> {
    let mut arguments = vec!["-n", netns.name(), "address", "add"];
    let address_text = format!("{address}/{bits}");
    arguments.extend([address_text.as_str(), "dev", interface]);
    if address.is_ipv6() {
        arguments.push("nodad");
    }
    run("ip", &arguments).map(drop)
}

fn prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

/// Turns the checksum and segmentation offloads of an interface on or off.
fn offloads(netns: &Netns, interface: &str, state: &str) -> Result<()> {
    let features = ["tx", "tso", "gso", "tx-udp-segmentation"];
    let words = features.iter().flat_map(|feature| [*feature, state]);
    netns.run("ethtool", &["-K", interface].into_iter().chain(words).collect::<Vec<_>>()).map(drop)
}

/// Returns the names of the pair between a rough wire and the bridge: the wire's end, the bridge's
/// end.
fn rough_ends(number: usize) -> [String; 2] {
    [format!("r{number}"), format!("b{number}")]
}

pub(crate) fn port(number: usize) -> String {
    format!("p{number}")
}
