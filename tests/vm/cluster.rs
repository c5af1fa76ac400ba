//! Tests two nodes from `launch` to `reset`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount, Manner, TcpFlow};
use lab::pcap::UDP;
use lab::ping::Pinging;
use lab::raw::{self, Injector, Listener};
use lab::{Container, Family, Host, Lab, eventually};
use serde_json::Value;

use crate::{TIMEOUT, TOKEN, datagrams, ensure_no, in_lab, pings_both_ways, step};

/// Runs the test over both families of the underlay, and with XDP.
pub(crate) fn run() -> Result<()> {
    for (name, family, options) in [
        ("IPv4", Family::V4, &[][..]),
        ("IPv6", Family::V6, &[]),
        ("IPv4, XDP", Family::V4, &["--interface", "eth0", "--xdp"]),
    ] {
        println!("two hosts, {name} between them");
        in_lab(Lab::new("vm").hosts(2).family(family), |lab| live(lab, options))?;
    }
    Ok(())
}

fn live(lab: &Lab, options: &[&str]) -> Result<()> {
    for host in lab.hosts() {
        // Emulate a network card without checksum offload. If the kernel still expected a partial
        // checksum, it would complete it here, in the ciphertext.
        host.netns().run("ethtool", &["-K", host.interface(), "tx", "off"])?;
    }
    step("launch", || lab.hosts().iter().try_for_each(|host| launch(lab, host, options)))?;
    let containers = step("attach", || {
        [(1, "a"), (1, "b"), (2, "c")]
            .map(|(host, name)| attach(lab.host(host), name))
            .into_iter()
            .collect()
    });
    let containers: Vec<Container> = containers?;
    let [a, b, c] = &containers[..] else { unreachable!("three were attached") };
    step("all containers reach each other", || {
        [(a, b), (a, c), (c, b)].into_iter().try_for_each(|(one, other)| {
            one.reach(other.address(), TIMEOUT)?;
            pings_both_ways(one, other)
        })
    })?;
    let hook = if options.is_empty() { "clsact" } else { "clsact+xdp" };
    lab.hosts().iter().try_for_each(|host| ensure_attached_by(host, hook))?;
    step("TCP between and within hosts", || {
        for (from, to) in [(a, c), (c, a), (a, b)] {
            let received = flow::tcp(from, to, Amount::Bytes(4_000_000))?;
            ensure!(received.bytes == 4_000_000, "{received:?}");
        }
        Ok(())
    })?;
    step("UDP of several lengths", || datagrams(a, c))?;
    step("SIGKILL and restart of each daemon during pings and TCP", || die_and_return(lab, a, c))?;
    lab.hosts()
        .iter()
        .try_for_each(|host| ensure_no(host, &["forged", "replayed", "malformed", "offload"]))?;
    step("no checksum position allows impersonation", || {
        [c, b].into_iter().try_for_each(|to| forge(a, b, to))
    })?;
    step("reset", || lab.hosts().iter().try_for_each(reset))?;
    for container in &containers {
        let interfaces = container.netns().interfaces()?;
        ensure!(interfaces.is_empty(), "left inside {}: {interfaces:?}", container.name);
    }
    Ok(())
}

fn launch(lab: &Lab, host: &Host, options: &[&str]) -> Result<()> {
    let id = host.number.to_string();
    let words = [&["launch", "--id", &id, "--token", TOKEN], options, &lab.targets()[..]].concat();
    host.overnode(&words)?.success().map(drop)
}

/// Checks how a host's programs are attached. tcx requires Linux 6.6, so this kernel tests the
/// fallback. Interfaces toward peers are known only once there are peers.
fn ensure_attached_by(host: &Host, wanted: &str) -> Result<()> {
    let hook = host.status()?["node"]["attachment"].clone();
    ensure!(hook == wanted, "programs of {} are attached by {hook}, not by {wanted}", host.name);
    Ok(())
}

fn attach(host: &Host, name: &str) -> Result<Container> {
    let container = host.container(name)?;
    host.attach(&container, &[])?;
    Ok(container)
}

/// The thief aims partial checksums at every position of its packets, both those that are sealed at
/// once and those that go through the offload veth. No packet may arrive from the victim, and some
/// packets must be dropped.
fn forge(thief: &Container, victim: &Container, to: &Container) -> Result<()> {
    const INTERFACE: &str = "overnode0";
    let links: Value =
        serde_json::from_str(&thief.netns().ip(&["-j", "link", "show", INTERFACE])?)?;
    let mac = links[0]["address"].as_str().context("no hardware address")?;
    let bytes =
        mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    let mac: [u8; 6] = bytes.try_into().ok().context("not six bytes")?;
    let listener = Listener::open(to.netns(), INTERFACE)?;
    let injector = Injector::open(thief.netns(), INTERFACE)?;
    for len in [60, 300] {
        let honest =
            raw::packet([[2, 0, 0, 0, 0, 9], mac], [thief.address(), to.address()], UDP, len);
        let wanted = raw::wanted(&honest, victim.address());
        let frames = raw::aimed(&honest, &wanted, (0, 0), |place| place < 44);
        let (mut sent, mut arrived) = (0, 0);
        for batch in frames.chunks(50) {
            sent += injector.send_offloaded(batch)?;
            for (offload, mut frame) in listener.frames(20)? {
                offload.finish(&mut frame);
                ensure!(
                    frame[raw::SOURCE..raw::SOURCE + 4] != raw::octets(victim.address()),
                    "{} impersonated {}: {offload:?}",
                    thief.name,
                    victim.name
                );
                arrived += 1;
            }
        }
        ensure!(
            sent > 200 && arrived > 0 && arrived < sent,
            "{arrived} of {sent} arrived with {len} bytes"
        );
    }
    Ok(())
}

fn die_and_return(lab: &Lab, from: &Container, to: &Container) -> Result<()> {
    const SOME: u64 = 500_000;
    let pings = Pinging::start(from.netns(), to.address(), Some(2500), Duration::from_millis(10))?;
    let stream = TcpFlow::start_as(from, to, Amount::UntilStopped, Manner::Rate(400_000))?;
    for host in [lab.host(2), lab.host(1)] {
        stream.wait_for(SOME, TIMEOUT)?;
        host.kill_daemon()?;
        stream.wait_for(SOME, TIMEOUT)?;
        ensure!(host.daemon_pid().is_none(), "a daemon runs although none was started");
        host.overnode(&["resume"])?.success()?;
        eventually(TIMEOUT, || {
            let state = host.status()?["node"]["state"].clone();
            ensure!(state == "running", "{} is {state}", host.name);
            Ok(())
        })?;
    }
    stream.wait_for(SOME, TIMEOUT)?;
    let pings = pings.finish()?;
    ensure!(pings.lost() == 0, "{} of {} pings were lost", pings.lost(), pings.sent);
    stream.stop().context("the TCP stream").map(drop)
}

fn reset(host: &Host) -> Result<()> {
    host.overnode(&["reset", "--force"])?.success()?;
    eventually(Duration::from_secs(5), || {
        let remains = host.remains()?;
        ensure!(remains.is_empty(), "left on {}: {}", host.name, remains.join(", "));
        Ok(())
    })
}
