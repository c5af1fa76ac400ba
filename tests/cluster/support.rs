//! Helpers that the tests of this folder share.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::{Container, Host, Lab, eventually};
use serde_json::Value;

pub(crate) const TOKEN: &str = "my-cluster-password";
pub(crate) const MILLISECOND: Duration = Duration::from_millis(1);
/// Time limit for everything that waits for no timer, generous for a loaded machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Builds a lab and runs a test in it. Appends the last lines of the daemons' logs to an error.
pub(crate) fn in_lab(builder: lab::Builder, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    const LINES: usize = 25;
    let lab = builder.build()?;
    test(&lab).map_err(|error| {
        let mut text = format!("{error:#}");
        for host in lab.hosts() {
            let log = host.log();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!(
                "\n--- log of {}:\n{}",
                host.name,
                lines[lines.len().saturating_sub(LINES)..].join("\n")
            );
        }
        anyhow!("{text}")
    })
}

/// Runs `overnode launch` with the host's number as the ID and every host as a target.
pub(crate) fn launch(lab: &Lab, host: &Host) -> Result<String> {
    launch_as(lab, host, host.number)
}

/// Runs `overnode launch` with this ID and every host as a target.
pub(crate) fn launch_as(lab: &Lab, host: &Host, id: usize) -> Result<String> {
    let id = id.to_string();
    let targets = lab.targets();
    host.overnode(&[&["launch", "--id", &id, "--token", TOKEN], &targets[..]].concat())?.success()
}

/// Launches every host's node and waits until each has a data session with every other.
pub(crate) fn launch_all(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        launch(lab, host)?;
    }
    wait_for_sessions(lab)
}

/// Waits until each node has a data session with every other.
pub(crate) fn wait_for_sessions(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        for other in lab.hosts().iter().filter(|other| other.number != host.number) {
            eventually(TIMEOUT, || {
                let peer = peer(host, other.number)?
                    .with_context(|| format!("{} does not know {}", host.name, other.name))?;
                let session = &peer["data"]["session"];
                ensure!(
                    session == "established",
                    "{}'s session with {} is {session}",
                    host.name,
                    other.name
                );
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Waits until the host's node reaches this many nodes, including itself.
pub(crate) fn wait_for_peers(host: &Host, count: usize) -> Result<()> {
    eventually(TIMEOUT * 2, || {
        let status = host.status()?;
        let reachable =
            list(&status, "peers")?.iter().filter(|peer| peer["reachable"] == true).count();
        ensure!(reachable == count, "{} reaches {reachable} nodes instead of {count}", host.name);
        Ok(())
    })
}

/// Returns the status of the peer with this ID, as a host's node reports it.
pub(crate) fn peer(host: &Host, id: usize) -> Result<Option<Value>> {
    Ok(list(&host.status()?, "peers")?.iter().find(|peer| peer["id"] == id).cloned())
}

/// Returns a list of the status document.
pub(crate) fn list<'a>(status: &'a Value, name: &str) -> Result<&'a Vec<Value>> {
    status[name].as_array().with_context(|| format!("the status has no list {name:?}"))
}

/// Returns a counter of a host's programs.
pub(crate) fn counter(host: &Host, reason: &str) -> Result<u64> {
    let status = host.status()?;
    let counters = list(&status, "counters")?;
    Ok(counters
        .iter()
        .find(|counter| counter["reason"] == reason)
        .and_then(|it| it["count"].as_u64())
        .unwrap_or(0))
}

/// Returns the targets of a host's node as they were given, sorted.
pub(crate) fn targets(host: &Host) -> Result<Vec<String>> {
    let status = host.status()?;
    let mut targets: Vec<String> = list(&status, "targets")?
        .iter()
        .filter_map(|it| it["host"].as_str().map(str::to_owned))
        .collect();
    targets.sort();
    Ok(targets)
}

/// Returns the interface that containers reach the node's name server through. Its name contains
/// the node's address, which is 10.39.240.0 plus the ID.
pub(crate) fn dns_interface(host: &Host) -> String {
    format!("ov0a27f0{:02x}", host.number)
}

/// Returns a new container of the host, attached.
pub(crate) fn attached(host: &Host, name: &str) -> Result<Container> {
    let container = host.container(name)?;
    host.attach(&container, &[])?;
    Ok(container)
}

/// Attaches a container on each host. Returns them in the order of the hosts.
pub(crate) fn one_each(lab: &Lab) -> Result<Vec<Container>> {
    lab.hosts().iter().map(|host| attached(host, "c")).collect()
}

/// Launches every host's node and attaches a container on each. Returns the containers in the order
/// of the hosts, once they all reach each other.
pub(crate) fn launch_containers(lab: &Lab) -> Result<Vec<Container>> {
    launch_all(lab)?;
    let containers = one_each(lab)?;
    all_reach_all(&containers)?;
    Ok(containers)
}

/// Waits until every container reaches every other.
pub(crate) fn all_reach_all<T: Borrow<Container>>(containers: &[T]) -> Result<()> {
    for from in containers.iter().map(Borrow::borrow) {
        for to in containers.iter().map(Borrow::borrow) {
            if from.address() != to.address() {
                from.reach(to.address(), TIMEOUT)?;
            }
        }
    }
    Ok(())
}

/// Fails if two containers have the same address.
pub(crate) fn ensure_unique<'a>(containers: impl IntoIterator<Item = &'a Container>) -> Result<()> {
    let mut owners = BTreeMap::new();
    for container in containers {
        let (address, name) = (container.address(), container.netns().name());
        if let Some(other) = owners.insert(address, name) {
            bail!("{address} was given to both {other} and {name}");
        }
    }
    Ok(())
}

/// Returns true for an address of the container network.
pub(crate) fn is_overlay(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 10 && (32..48).contains(&v4.octets()[1]),
        IpAddr::V6(_) => false,
    }
}

/// Fails if the capture is incomplete, has no data message, or shows anything that containers sent:
/// their payload, or a packet with one of their addresses.
pub(crate) fn ensure_sealed(captured: &lab::capture::Captured) -> Result<()> {
    ensure!(captured.missed == 0, "the capture missed {} packets", captured.missed);
    let data = captured.count(|packet| packet.wireguard_type() == Some(4))?;
    ensure!(data > 0, "no data message was captured");
    ensure_nothing_plain(captured)
}

/// Like [`ensure_sealed`], but data messages are not required.
pub(crate) fn ensure_nothing_plain(captured: &lab::capture::Captured) -> Result<()> {
    let plain = captured.containing(&lab::flow::MARKER)?;
    ensure!(
        plain.is_empty(),
        "{} packets show the containers' payload; the first: {:?}",
        plain.len(),
        plain[0].ip
    );
    let bare = captured
        .count(|packet| packet.ip.is_some_and(|ip| is_overlay(ip.from) || is_overlay(ip.to)))?;
    ensure!(bare == 0, "{bare} packets of containers are unencrypted on the underlay");
    Ok(())
}

/// Returns whether a host's workers serve all other nodes.
pub(crate) fn serves(host: &Host) -> Result<bool> {
    let status = host.status()?;
    let mut others =
        status["peers"].as_array().into_iter().flatten().filter(|peer| peer["myself"] == false);
    Ok(others.all(|peer| peer["data"]["bulk"]["in_use"] == true))
}

/// Waits until the workers of all hosts serve each other.
pub(crate) fn wait_for_workers(lab: &Lab) -> Result<()> {
    wait_for_sessions(lab)?;
    lab.hosts().iter().try_for_each(|host| {
        eventually(TIMEOUT, || {
            ensure!(
                serves(host)?,
                "the workers of {} do not serve all nodes: {}\n{}",
                host.name,
                host.status()?,
                host.log()
            );
            Ok(())
        })
    })
}
