//! A node on one host, and the kernel's WireGuard, configured with `wg`, on the other.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lab::flow::{self, Amount};
use lab::ping::Pinging;
use lab::{Container, Entry, Family, Host, Lab, gateway};

use crate::{TIMEOUT, TOKEN, datagrams, ensure_no, in_lab, pings_both_ways, step};

/// An address in the static part of the subnet, which the node's containers consider on-link.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 7);
const OUTSIDE_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 254);
const SUBNET: &str = "10.32.0.0/12";
const MTU: u32 = 1420;
const KERNEL_PORT: u16 = 51820;
const NODE_PORT: u16 = 6784;

/// The side that knows the other one's endpoint and therefore has to initiate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Initiator {
    Node,
    Kernel,
}

/// Tests each side as the initiator, over IPv4 and IPv6, with a preshared key and without.
pub(crate) fn run() -> Result<()> {
    for (initiator, family, preshared) in [
        (Initiator::Node, Family::V4, true),
        (Initiator::Kernel, Family::V4, false),
        (Initiator::Node, Family::V6, false),
        (Initiator::Kernel, Family::V6, true),
    ] {
        println!(
            "the kernel's WireGuard; initiator: {initiator:?}, {family:?}, \
             preshared key: {preshared}"
        );
        in_lab(Lab::new("kernel").family(family).entry(Entry::Setns), |lab| {
            talk(lab, initiator, preshared)
        })?;
    }
    Ok(())
}

/// Tests a rekey, which WireGuard does after 120 seconds. Both roles run in parallel, with pings
/// that last 15 seconds longer.
pub(crate) fn rekey() -> Result<()> {
    const INTERVAL: Duration = Duration::from_millis(50);
    const PINGS: u32 = 2700;
    let watch = |initiator: Initiator| -> Result<()> {
        let plan = Lab::new("rekey").entry(Entry::Setns);
        in_lab(plan, |lab| {
            let (inside, outside) = meet(lab, initiator, true)?;
            let first = handshake(lab.host(2))?;
            step(&format!("rekey during pings; initiator: {initiator:?}"), || {
                let out = Pinging::start(inside.netns(), outside.address(), Some(PINGS), INTERVAL)?;
                let back =
                    Pinging::start(outside.netns(), inside.address(), Some(PINGS), INTERVAL)?;
                for pings in [out.finish()?, back.finish()?] {
                    ensure!(pings.lost() == 0 && pings.duplicates == 0, "{pings:?}");
                }
                ensure!(handshake(lab.host(2))? > first, "no new handshake took place");
                Ok(())
            })
        })
    };
    thread::scope(|scope| {
        let watches = [Initiator::Node, Initiator::Kernel]
            .map(|initiator| scope.spawn(move || watch(initiator)));
        watches
            .into_iter()
            .try_for_each(|watch| watch.join().map_err(|_| anyhow!("a thread panicked"))?)
    })
}

fn talk(lab: &Lab, initiator: Initiator, preshared: bool) -> Result<()> {
    let (inside, outside) = meet(lab, initiator, preshared)?;
    step("pings both ways", || pings_both_ways(&inside, &outside))?;
    step("TCP both ways", || {
        for (from, to) in [(&inside, &outside), (&outside, &inside)] {
            let received = flow::tcp(from, to, Amount::Bytes(4_000_000))?;
            ensure!(received.bytes == 4_000_000, "{received:?}");
        }
        Ok(())
    })?;
    step("UDP of several lengths", || {
        [(&inside, &outside), (&outside, &inside)]
            .into_iter()
            .try_for_each(|(from, to)| datagrams(from, to))
    })?;
    ensure_no(lab.host(1), &["forged", "replayed", "foreign-source", "malformed", "offload"])
}

/// Returns a container of the node and one behind the kernel's WireGuard, after the first ping.
fn meet(lab: &Lab, initiator: Initiator, preshared: bool) -> Result<(Container, Container)> {
    let (node, kernel) = (lab.host(1), lab.host(2));
    let [inside, outside] = [node.container("inside")?, kernel.container("outside")?];
    gateway::plug(kernel, &outside, OUTSIDE, OUTSIDE_GATEWAY, MTU)?;
    step("configure both", || {
        node.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        node.attach(&inside, &[])?;
        introduce(lab, initiator, preshared)
    })?;
    step("handshake", || {
        match initiator {
            Initiator::Node => inside.reach(outside.address(), TIMEOUT)?,
            Initiator::Kernel => outside.reach(inside.address(), TIMEOUT)?,
        }
        ensure!(handshake(kernel)? > 0, "pings passed without a handshake");
        Ok(())
    })?;
    Ok((inside, outside))
}

/// Returns the time of the last handshake of the kernel's WireGuard, in seconds since the Unix
/// epoch. Returns 0 before the first handshake.
fn handshake(kernel: &Host) -> Result<u64> {
    let line = kernel.netns().run("wg", &["show", "wg0", "latest-handshakes"])?;
    let time = line.split_whitespace().last().with_context(|| format!("wg has no peer: {line}"))?;
    time.parse().with_context(|| line.clone())
}

/// Configures the two sides as peers. Only the initiator gets the other's endpoint.
fn introduce(lab: &Lab, initiator: Initiator, preshared: bool) -> Result<()> {
    let (node, kernel) = (lab.host(1), lab.host(2));
    let secret = lab.folder().join("secret");
    let private = wg(&["genkey"], "")?;
    std::fs::write(&secret, &private)?;
    let shared = lab.folder().join("preshared");
    std::fs::write(&shared, wg(&["genpsk"], "")?)?;
    let public = wg(&["pubkey"], &private)?;
    let node_key = add_peer(
        node,
        &public,
        preshared.then_some(&shared),
        match initiator {
            Initiator::Node => Some(SocketAddr::new(kernel.address(), KERNEL_PORT)),
            Initiator::Kernel => None,
        },
    )?;

    let netns = kernel.netns();
    netns.ip(&["link", "add", "wg0", "mtu", &MTU.to_string(), "type", "wireguard"])?;
    let [secret, shared] = [secret, shared].map(|file| file.display().to_string());
    let (port, endpoint) =
        (KERNEL_PORT.to_string(), SocketAddr::new(node.address(), NODE_PORT).to_string());
    let mut words =
        vec!["set", "wg0", "private-key", &secret, "listen-port", &port, "peer", &node_key];
    words.extend(["allowed-ips", SUBNET]);
    if preshared {
        words.extend(["preshared-key", &shared]);
    }
    if initiator == Initiator::Kernel {
        words.extend(["endpoint", &endpoint]);
    }
    netns.run("wg", &words)?;
    netns.ip(&["link", "set", "wg0", "up"])?;
    netns.ip(&["route", "add", SUBNET, "dev", "wg0"]).map(drop)
}

/// Runs `overnode peer add`. Returns the node's own key, which the command prints for the peer's
/// configuration.
fn add_peer(
    node: &Host,
    key: &str,
    preshared: Option<&Path>,
    endpoint: Option<SocketAddr>,
) -> Result<String> {
    let outside = format!("{OUTSIDE}/32");
    let shared = preshared.map(|file| file.display().to_string());
    let endpoint = endpoint.map(|endpoint| endpoint.to_string());
    let mut words = vec!["peer", "add", key, "--allowed-ips", &outside];
    words.extend(shared.iter().flat_map(|file| ["--preshared-key-file", file]));
    words.extend(endpoint.iter().flat_map(|endpoint| ["--endpoint", endpoint]));
    let printed = node.overnode(&words)?.success()?;
    let key = printed.lines().find_map(|line| line.strip_prefix("PublicKey = "));
    Ok(key.with_context(|| format!("`overnode peer add` printed no key: {printed}"))?.to_owned())
}

/// Runs `wg` with this input. Returns the line that it prints.
fn wg(words: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new("wg")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start wg")?;
    child.stdin.take().context("no pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "`wg {}` failed ({})", words.join(" "), output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
