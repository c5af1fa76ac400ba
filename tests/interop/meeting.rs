//! A node with a container on one host, and a stock WireGuard program with a container behind it on
//! another.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::flow::{self, Amount};
use lab::wireguard::{Configuration, Device, Peer, Stock, key_pair};
use lab::{Container, Entry, Family, Host, Lab, gateway};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::DATA_PORT;
use overnode_types::PublicKey;

use crate::MTU;

/// An address in the static part of the subnet, which the node's containers consider on-link.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 7);
const OUTSIDE_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 254);
const SUBNET: &str = "10.32.0.0/12";
const STOCK_PORT: u16 = 51820;

/// The side that knows the other one's endpoint and therefore has to initiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begins {
    /// The stock program initiates the handshake.
    Stock,
    /// The node initiates the handshake, and the stock program responds.
    Node,
}

/// Configuration of a meeting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    stock: Stock,
    begins: Begins,
    preshared: bool,
    mistaken: bool,
    family: Family,
}

impl Plan {
    /// Gives both sides the same preshared key.
    pub(crate) fn preshared(mut self) -> Self {
        self.preshared = true;
        self
    }

    /// Gives the stock program a different preshared key from the node's.
    pub(crate) fn mistaken(mut self) -> Self {
        self.mistaken = true;
        self
    }

    /// Gives the hosts only IPv6 addresses.
    pub(crate) fn ipv6(mut self) -> Self {
        self.family = Family::V6;
        self
    }

    /// Sets up the meeting.
    ///
    /// # Errors
    /// When a program is missing or fails.
    pub(crate) fn hold(self) -> Result<Meeting> {
        let name = format!("{}, {:?} initiates", self.stock, self.begins);
        self.try_to_hold().with_context(|| name)
    }

    fn try_to_hold(self) -> Result<Meeting> {
        let lab = Lab::new("interop").family(self.family).entry(Entry::Setns).build()?;
        let (node, stock) = (lab.host(1), lab.host(2));
        let [inside, outside] = [node.container("inside")?, stock.container("outside")?];
        gateway::plug(stock, &outside, OUTSIDE, OUTSIDE_GATEWAY, MTU)?;
        node.overnode(&["launch", "--id", "1", "--token", "interop"])?.success()?;
        node.attach(&inside, &[])?;

        let (private_key, public_key) = key_pair()?;
        let (preshared, other) = (key_pair()?.0, key_pair()?.0);
        let endpoint = SocketAddr::new(stock.address(), STOCK_PORT);
        let key = PublicKey(public_key).to_string();
        let known = self.begins == Begins::Node;
        let node_key =
            add(&lab, node, &key, self.preshared.then_some(preshared), known.then_some(endpoint))?;

        let device = Device::start(self.stock, stock.netns())?;
        let subnet: IpNet = SUBNET.parse()?;
        device.configure(&Configuration {
            private_key: &private_key,
            listen_port: STOCK_PORT,
            peer: Peer {
                public_key: node_key.0,
                preshared_key: self.preshared.then_some(if self.mistaken {
                    &other
                } else {
                    &preshared
                }),
                endpoint: (!known).then_some(SocketAddr::new(node.address(), DATA_PORT)),
                allowed_ips: &[subnet],
                keepalive: None,
            },
        })?;
        device.up(stock.netns(), MTU, &[subnet])?;
        Ok(Meeting { inside, outside, device, key, plan: self, lab })
    }
}

/// Runs `overnode peer add`. Returns the node's own key, which the command prints for the peer's
/// configuration.
fn add(
    lab: &Lab,
    node: &Host,
    key: &str,
    preshared: Option<[u8; 32]>,
    endpoint: Option<SocketAddr>,
) -> Result<PublicKey> {
    let mut words = vec!["peer".to_owned(), "add".into(), key.into(), "--allowed-ips".into()];
    words.push(IpNet::from(IpAddr::V4(OUTSIDE)).to_string());
    if let Some(preshared) = preshared {
        let file = lab.folder().join("preshared");
        // A public key's text form works for any 32 bytes.
        std::fs::write(&file, PublicKey(preshared).to_string())?;
        words.extend(["--preshared-key-file".into(), file.display().to_string()]);
    }
    if let Some(endpoint) = endpoint {
        words.extend(["--endpoint".into(), endpoint.to_string()]);
    }
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let printed = node.overnode(&words)?.success()?;
    let line = printed.lines().find_map(|line| line.strip_prefix("PublicKey = "));
    Ok(line.with_context(|| format!("`overnode peer add` printed no key: {printed}"))?.parse()?)
}

/// A node and a stock program that are configured as peers. The fields are dropped in this order.
pub(crate) struct Meeting {
    /// The node's container.
    pub inside: Container,
    /// The container behind the stock program.
    pub outside: Container,
    /// The stock program.
    pub device: Device,
    /// The stock program's public key.
    key: String,
    plan: Plan,
    /// The lab. Host 1 runs the node, and host 2 the stock program.
    pub lab: Lab,
}

impl Meeting {
    /// Returns a plan over IPv4 without a preshared key.
    #[expect(clippy::new_ret_no_self, reason = "the plan is the only way to a meeting")]
    pub(crate) fn new(stock: Stock, begins: Begins) -> Plan {
        Plan { stock, begins, preshared: false, mistaken: false, family: Family::V4 }
    }

    /// Waits for the handshake and the first ping, from the side that initiates.
    ///
    /// # Errors
    /// When no ping is answered within 15 seconds, or when pings pass without a handshake.
    pub(crate) fn is_up(&self) -> Result<()> {
        let (from, to) = match self.plan.begins {
            Begins::Stock => (&self.outside, &self.inside),
            Begins::Node => (&self.inside, &self.outside),
        };
        from.reach(to.address(), Duration::from_secs(15)).with_context(|| {
            format!(
                "{:?}: {}; the node's log: {}",
                self.plan,
                self.counters().unwrap_or_default(),
                self.node().log()
            )
        })?;
        ensure!(self.device.peer()?.handshake_age.is_some(), "pings passed without a handshake");
        Ok(())
    }

    /// Pings in both directions without a loss.
    ///
    /// # Errors
    /// When a ping is lost or duplicated.
    pub(crate) fn passes_pings(&self) -> Result<()> {
        for (from, to) in [(&self.inside, &self.outside), (&self.outside, &self.inside)] {
            let pings = from.ping(to.address(), 500, Duration::from_millis(2))?;
            ensure!(
                pings.sent == 500 && pings.lost() == 0 && pings.duplicates == 0,
                "{}: {pings:?}",
                from.name
            );
        }
        Ok(())
    }

    /// Checks the handshake, pings, and 100 MB of TCP in each direction. Nothing may be forged,
    /// replayed or unencrypted.
    ///
    /// # Errors
    /// When any of these checks fails.
    pub(crate) fn exchanges_everything(mut self) -> Result<()> {
        const BYTES: u64 = 100_000_000;
        let capture = self.lab.capture()?;
        self.is_up()?;
        self.passes_pings()?;
        let captured = capture.stop()?;
        ensure!(
            captured.count(|packet| !packet.bytes.is_empty())? > 2000,
            "the capture does not show this traffic"
        );
        ensure!(
            captured.missed == 0 && captured.containing(&flow::MARKER)?.is_empty(),
            "the capture shows unencrypted pings"
        );
        for (from, to) in [(&self.inside, &self.outside), (&self.outside, &self.inside)] {
            let received = flow::tcp(from, to, Amount::Bytes(BYTES))
                .with_context(|| format!("TCP from {}", from.name))?;
            ensure!(received.bytes == BYTES, "{received:?}");
        }
        self.device.check()?;
        let peer = self.device.peer()?;
        ensure!(peer.received > BYTES && peer.sent > BYTES, "{peer:?}");
        for reason in [
            Reason::Forged,
            Reason::Replayed,
            Reason::ForeignSource,
            Reason::Offload,
            Reason::Malformed,
        ] {
            ensure!(self.count(reason.as_str())? == 0, "{}", self.counters()?);
        }
        Ok(())
    }

    /// Runs `overnode peer remove`.
    ///
    /// # Errors
    /// When the command fails.
    pub(crate) fn remove(&self) -> Result<()> {
        self.node().overnode(&["peer", "remove", &self.key])?.success().map(drop)
    }

    /// Returns a counter of the node's programs.
    ///
    /// # Errors
    /// When the node does not answer.
    pub(crate) fn count(&self, reason: &str) -> Result<u64> {
        let status = self.node().status()?;
        let counters = status["counters"].as_array().context("no counters")?;
        let counter = counters.iter().find(|counter| counter["reason"] == reason);
        // Counters that are zero may be left out.
        Ok(counter.and_then(|counter| counter["count"].as_u64()).unwrap_or(0))
    }

    /// Returns the counters of the node's programs as a text for messages.
    ///
    /// # Errors
    /// When the node does not answer.
    pub(crate) fn counters(&self) -> Result<String> {
        let status = self.node().status()?;
        let mut text = String::from("counters:");
        for counter in status["counters"].as_array().into_iter().flatten() {
            write!(text, " {}={}", counter["reason"].as_str().unwrap_or("?"), counter["count"])?;
        }
        Ok(text)
    }

    fn node(&self) -> &Host {
        self.lab.host(1)
    }
}
