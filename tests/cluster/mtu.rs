//! Tests of underlays with a smaller or larger MTU than Ethernet, with real TCP between containers.
//! (`life.rs` has a plain jumbo underlay.)

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{Amount, Manner, TcpFlow};
use lab::{Container, Family, Host, Lab, eventually, flow};

use crate::support::{
    TIMEOUT, all_reach_all, attached, counter, in_lab, launch_all, launch_containers, list,
    one_each, peer,
};

/// Precision of the MTU search, in bytes.
const PRECISION: u64 = 8;
/// Bytes that the lab's interfaces accept beyond their MTU (a VLAN tag).
const SLACK: u64 = 4;
const BYTES: u64 = 5_000_000;
const IP_AND_ICMP: u64 = 28;

/// Returns the MTU of the path to a node, as a host's node reports it.
fn mtu(host: &Host, to: usize) -> Result<u64> {
    let peer = peer(host, to)?.with_context(|| format!("{} does not know node {to}", host.name))?;
    peer["data"]["mtu"].as_u64().context("no MTU")
}

/// Waits until a node has found the MTU of its path to another, where outer packets of `carries`
/// bytes fit. Returns the inner MTU.
fn found(host: &Host, to: usize, carries: u64) -> Result<u64> {
    // Overhead of WireGuard, UDP and IP.
    let most = carries - if host.address().is_ipv4() { 60 } else { 80 };
    eventually(TIMEOUT * 2, || {
        let mtu = mtu(host, to)?;
        ensure!(
            mtu > most - PRECISION && mtu <= most + SLACK,
            "the MTU of {} to node {to} is {mtu}, not {most}",
            host.name
        );
        Ok(mtu)
    })
}

/// Pings with packets of this many bytes that must not be fragmented.
fn ping(from: &Container, to: &Container, size: u64) -> Result<String> {
    let size = (size - IP_AND_ICMP).to_string();
    from.run(
        "ping",
        &["-M", "do", "-c", "3", "-i", "0.05", "-W", "2", "-s", &size, &to.address().to_string()],
    )
}

/// Checks that ICMP tells a container the MTU of the path, and that the container remembers it.
fn learns(from: &Container, to: &Container, mtu: u64) -> Result<()> {
    let refused = ping(from, to, mtu + 1);
    ensure!(refused.is_err(), "a packet larger than {mtu} bytes passed");
    let route = from.run("ip", &["route", "get", &to.address().to_string()])?;
    ensure!(
        route.contains(&format!("mtu {mtu}")),
        "{} did not learn the MTU {mtu}: {route}",
        from.name
    );
    ping(from, to, mtu).map(drop)
}

fn send(from: &Container, to: &Container) -> Result<()> {
    let received = flow::tcp(from, to, Amount::Bytes(BYTES))?;
    ensure!(received.bytes == BYTES, "{received:?}");
    Ok(())
}

/// Tests a path with a router whose MTU is smaller than that of the hosts, and which sends no ICMP.
fn black_hole(carries: u32, family: Family) -> Result<()> {
    in_lab(Lab::new("hole").hosts(2).routed().family(family), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        lab.narrow(b, carries)?;
        launch_all(lab)?;
        let containers = one_each(lab)?;
        let [one, two] = &containers[..] else { unreachable!() };
        let there = found(a, 2, carries.into())?;
        let back = found(b, 1, carries.into())?;
        learns(one, two, there)?;
        learns(two, one, back)?;
        send(one, two)?;
        send(two, one)?;
        for (host, to) in [(a, b), (b, a)] {
            // Nothing searches for the MTU of control connections.
            let filter = match to.address() {
                IpAddr::V4(v4) => format!("dst {v4} and ( sport = :6783 or dport = :6783 )"),
                IpAddr::V6(v6) => format!("dst [{v6}] and ( sport = :6783 or dport = :6783 )"),
            };
            let sockets = host.netns().run("ss", &["-Htni", "state", "established", &filter])?;
            let sizes: Vec<u32> = sockets
                .split_whitespace()
                .filter_map(|word| word.strip_prefix("mss:")?.parse().ok())
                .collect();
            ensure!(
                !sizes.is_empty() && sizes.iter().all(|size| *size <= 1220),
                "{}: {sockets}",
                host.name
            );
        }
        let route = a.netns().ip(&["route", "get", &b.address().to_string()])?;
        ensure!(!route.contains("mtu"), "the router sent ICMP: {route}");
        // The status shows the MTU, as a table and as JSON.
        let table = a.overnode(&["status", "--connections"])?.success()?;
        ensure!(table.contains(&there.to_string()), "{table}");
        ensure!(
            list(&a.status()?, "connections")?.iter().any(|it| it["mtu"] == there),
            "the MTU is missing in the JSON"
        );
        Ok(())
    })
}

#[test]
fn an_mtu_black_hole_of_1400_bytes_is_detected() -> Result<()> {
    black_hole(1400, Family::V4)
}

#[test]
fn an_mtu_black_hole_of_1280_bytes_is_detected() -> Result<()> {
    black_hole(1280, Family::V4)
}

#[test]
fn an_mtu_black_hole_of_1280_bytes_is_detected_over_ipv6() -> Result<()> {
    black_hole(1280, Family::V6)
}

#[test]
fn a_stream_survives_a_shrinking_path_mtu() -> Result<()> {
    in_lab(Lab::new("shrinks").hosts(2).routed(), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        let containers = launch_containers(lab)?;
        found(a, 2, 1480)?;
        let stream = TcpFlow::start_as(
            &containers[0],
            &containers[1],
            Amount::UntilStopped,
            Manner::Rate(200_000),
        )?;
        stream.wait_for(200_000, TIMEOUT)?;
        lab.narrow(b, 1280)?;
        found(a, 2, 1280)?;
        stream.wait_for(400_000, TIMEOUT * 2)?;
        let received = stream.stop()?;
        // The time for one check while containers send, for its probes, and for TCP's
        // retransmission timeout.
        ensure!(received.longest_pause < Duration::from_secs(18), "{received:?}");
        Ok(())
    })
}

/// Tests two nodes that reach each other only through a relay. The hop from the relay to the second
/// one may have a smaller MTU.
fn relayed(last_hop: Option<u32>) -> Result<()> {
    const RELAY_HEADER: u64 = 8;
    in_lab(Lab::new("relayed").hosts(3).routed(), |lab| {
        let [a, b, c] = lab.hosts() else { unreachable!() };
        lab.cut(a, c)?;
        if let Some(carries) = last_hop {
            lab.narrow(c, carries)?;
        }
        launch_all(lab)?;
        let containers = one_each(lab)?;
        let [one, _, three] = &containers[..] else { unreachable!() };
        let (there, back) = match last_hop {
            Some(carries) => (found(b, 3, carries.into())?, found(c, 2, carries.into())?),
            // The MTU that an underlay of 1500 bytes leaves to containers, with room for IPv6.
            None => (1420, 1420),
        };
        // Node 3 knows from the relay that it sends no larger packets than this to any node.
        let mtus = [there, back.min(there)].map(|mtu| mtu - RELAY_HEADER);
        eventually(TIMEOUT * 2, || {
            let found = [mtu(a, 3)?, mtu(c, 1)?];
            ensure!(found == mtus, "{found:?} instead of {mtus:?}");
            Ok(())
        })?;
        one.reach(three.address(), TIMEOUT)?;
        learns(one, three, mtus[0])?;
        learns(three, one, mtus[1])?;
        send(one, three)?;
        send(three, one)?;
        ensure!(
            counter(b, "relayed")? > 1000,
            "only {} messages were relayed",
            counter(b, "relayed")?
        );
        Ok(())
    })
}

#[test]
fn relayed_paths_use_the_mtu_of_both_hops() -> Result<()> {
    relayed(None)
}

#[test]
fn relayed_paths_use_the_mtu_of_a_narrow_second_hop() -> Result<()> {
    relayed(Some(1280))
}

#[test]
fn jumbo_packets_are_used_on_each_path_that_carries_them() -> Result<()> {
    in_lab(Lab::new("jumbos").hosts(3).routed(), |lab| {
        let [a, b, _] = lab.hosts() else { unreachable!() };
        launch_all(lab)?;
        let early = attached(a, "early")?;
        // Two of the hosts, and the router, get a larger MTU.
        for host in [a, b] {
            lab.set_mtu(host, 9000)?;
        }
        for host in [a, b] {
            eventually(TIMEOUT, || {
                let mtu = host.status()?["node"]["mtu"].clone();
                ensure!(mtu == 8920, "containers of {} would get an MTU of {mtu}", host.name);
                Ok(())
            })?;
        }
        let containers = one_each(lab)?;
        let [one, two, three] = &containers[..] else { unreachable!() };
        all_reach_all(&containers)?;
        let inside = |it: &Container| it.run("ip", &["link", "show", "overnode0"]);
        ensure!(
            inside(one)?.contains("mtu 8920") && inside(two)?.contains("mtu 8920"),
            "{}",
            inside(one)?
        );
        ensure!(
            inside(&early)?.contains("mtu 1420"),
            "an attached container must keep its MTU: {}",
            inside(&early)?
        );
        eventually(TIMEOUT * 2, || {
            ensure!(mtu(a, 2)? == 8920 && mtu(b, 1)? == 8920, "{} and {}", mtu(a, 2)?, mtu(b, 1)?);
            Ok(())
        })?;
        ping(one, two, 8920)?;
        send(one, two)?;
        // The path to the third host has an MTU of 1500. The router reports it, but the search does
        // not need that.
        let narrow = found(a, 3, 1500)?;
        learns(one, three, narrow)?;
        send(one, three)?;
        send(three, one)?;
        send(&early, three)?;
        send(two, &early)
    })
}

/// The smallest MTU that IPv4 hosts must accept. Linux ignores path MTUs below 552 bytes, so
/// containers could not be told about a smaller one.
#[test]
fn the_narrowest_underlay_carries_tcp() -> Result<()> {
    in_lab(Lab::new("narrowest").mtu(576), |lab| {
        launch_all(lab)?;
        let containers = one_each(lab)?;
        let [one, two] = &containers[..] else { unreachable!("two were made") };
        let inside = one.run("ip", &["link", "show", "overnode0"])?;
        ensure!(inside.contains("mtu 496"), "{inside}");
        all_reach_all(&containers)?;
        send(one, two)?;
        send(two, one)
    })
}
