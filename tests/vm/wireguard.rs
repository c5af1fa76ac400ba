//! A node on one host, the kernel's WireGuard, as `wg` configures it, on the other.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount};
use lab::{Container, Entry, Family, Host, Lab, gateway};

use crate::{PATIENCE, TOKEN, ensure_no, in_lab, pings_both_ways, step};

/// In the static part of the subnet: the node's containers look for it on their own link.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 7);
const OUTSIDE_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 38, 0, 254);
const SUBNET: &str = "10.32.0.0/12";
const MTU: u32 = 1420;
const KERNEL_PORT: u16 = 51820;
const NODE_PORT: u16 = 6784;

/// Who knows where the other one is, and so has to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Initiator {
    Node,
    Kernel,
}

/// Each as the initiator; IPv4 and IPv6; with a pre-shared key and without.
pub fn run() -> Result<()> {
    for (initiator, family, preshared) in [
        (Initiator::Node, Family::V4, true),
        (Initiator::Kernel, Family::V4, false),
        (Initiator::Node, Family::V6, false),
        (Initiator::Kernel, Family::V6, true),
    ] {
        println!("the kernel's WireGuard; initiator: {initiator:?}, {family:?}, pre-shared key: {preshared}");
        in_lab(Lab::new("kernel").family(family).entry(Entry::Setns), |lab| meet(lab, initiator, preshared))?;
    }
    Ok(())
}

fn meet(lab: &Lab, initiator: Initiator, preshared: bool) -> Result<()> {
    let (node, kernel) = (lab.host(1), lab.host(2));
    let [inside, outside] = [node.container("inside")?, kernel.container("outside")?];
    gateway::plug(kernel, &outside, OUTSIDE, OUTSIDE_GATEWAY, MTU)?;
    step("configure both", || {
        node.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        node.attach(&inside, &[])?;
        introduce(lab, initiator, preshared)
    })?;
    let (from, to): (&Container, &Container) = match initiator {
        Initiator::Node => (&inside, &outside),
        Initiator::Kernel => (&outside, &inside),
    };
    step("handshake", || {
        from.reach(to.address(), PATIENCE)?;
        let handshakes = kernel.netns().run("wg", &["show", "wg0", "latest-handshakes"])?;
        ensure!(!handshakes.trim_end().ends_with("\t0"), "pings pass without a handshake: {handshakes}");
        Ok(())
    })?;
    step("pings both ways", || pings_both_ways(&inside, &outside))?;
    step("TCP both ways", || {
        for (from, to) in [(&inside, &outside), (&outside, &inside)] {
            let received = flow::tcp(from, to, Amount::Bytes(4_000_000))?;
            ensure!(received.bytes == 4_000_000, "{received:?}");
        }
        Ok(())
    })?;
    step("UDP of every kind of length", || {
        for (from, to) in [(&inside, &outside), (&outside, &inside)] {
            for size in [16, 17, 600, 1392] {
                let datagrams = flow::udp(from, to, 50, size, Duration::from_millis(10))?;
                ensure!(datagrams.received == 50 && datagrams.corrupt == 0, "{size} bytes: {datagrams:?}");
            }
        }
        Ok(())
    })?;
    ensure_no(node, &["forged", "replayed", "foreign-source", "malformed", "offload"])
}

/// Tells each of the other, and only the initiator where the other is.
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
    let (port, endpoint) = (KERNEL_PORT.to_string(), SocketAddr::new(node.address(), NODE_PORT).to_string());
    let mut words = vec!["set", "wg0", "private-key", &secret, "listen-port", &port, "peer", &node_key];
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

/// `overnode peer add`; gives back the node's own key, which it prints for the peer's configuration.
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

/// `wg` with this input; gives back the line it prints.
fn wg(words: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new("wg")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("wg cannot be started")?;
    child.stdin.take().context("no pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "`wg {}` failed ({})", words.join(" "), output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
