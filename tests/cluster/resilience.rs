//! Tests of invariant L1: killing or upgrading the daemon loses no packet of established traffic,
//! and the restarted daemon adopts the pinned objects.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount, Manner, TcpFlow};
use lab::ping::Pinging;
use lab::raw::Injector;
use lab::{Family, Host, Lab, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::monitor::watch;
use crate::spoofing::{datagram, learnt_mac, own_mac};
use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, all_reach_all, attached, counter, in_lab, launch_containers, list,
    one_each, peer, wait_for_sessions,
};

/// Kills and resumes the daemons of both hosts in turn, during pings and streams.
fn deaths_lose_nothing(builder: lab::Builder) -> Result<()> {
    const PINGS: u32 = 6000;
    in_lab(builder.hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let (one, two) = (&containers[0], &containers[1]);
        let pings = Pinging::start(one.netns(), two.address(), Some(PINGS), MILLISECOND)?;
        let there = TcpFlow::start_as(one, two, Amount::UntilStopped, Manner::Rate(20_000_000))?;
        let back = TcpFlow::start_as(two, one, Amount::UntilStopped, Manner::Rate(20_000_000))?;
        for host in [lab.host(2), lab.host(1), lab.host(2)] {
            there.wait_for(1_000_000, TIMEOUT)?;
            host.kill_daemon()?;
            // Traffic continues without a daemon.
            there.wait_for(4_000_000, TIMEOUT)?;
            back.wait_for(1_000_000, TIMEOUT)?;
            ensure!(host.daemon_pid().is_none(), "a daemon runs although none was started");
            host.overnode(&["resume"])?.success()?;
        }
        let stats = pings.finish()?;
        ensure!(
            stats.lost() == 0,
            "{} of {} pings were lost: {:?}",
            stats.lost(),
            stats.sent,
            stats.missing
        );
        for flow in [there, back] {
            let received = flow.stop()?;
            ensure!(
                received.longest_pause < Duration::from_millis(200),
                "the stream paused for too long: {received:?}"
            );
        }
        wait_for_sessions(lab)
    })
}

#[test]
fn killed_daemons_lose_nothing_over_ipv4() -> Result<()> {
    deaths_lose_nothing(Lab::new("killed4"))
}

#[test]
fn killed_daemons_lose_nothing_over_ipv6() -> Result<()> {
    deaths_lose_nothing(Lab::new("killed6").family(Family::V6))
}

/// Sends SIGTERM to the daemon, and returns once it is gone.
fn terminate(host: &Host) -> Result<()> {
    let pid = host.daemon_pid().context("no daemon")?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    eventually(TIMEOUT, || {
        ensure!(host.daemon_pid().is_none(), "SIGTERM does not stop the daemon");
        Ok(())
    })
}

/// Stops and starts the daemon as an upgrade does: SIGTERM, then a new process.
#[test]
fn stopped_daemons_lose_nothing() -> Result<()> {
    in_lab(Lab::new("stopped").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let pings = Pinging::start(
            containers[0].netns(),
            containers[1].address(),
            Some(4000),
            MILLISECOND,
        )?;
        for host in lab.hosts() {
            terminate(host)?;
            host.overnode(&["resume"])?.success()?;
        }
        let stats = pings.finish()?;
        ensure!(stats.lost() == 0, "{} of {} pings were lost", stats.lost(), stats.sent);
        Ok(())
    })
}

/// An older version had fewer maps. The new daemon adopts the pinned maps and creates the others,
/// without effect on traffic.
#[test]
fn maps_missing_in_an_older_version_are_created_under_traffic() -> Result<()> {
    const NEWER: [&str; 5] = ["MONITOR", "DROPS", "BULK_WORKERS", "BULK_PEERS", "BULK_FLOWS"];
    in_lab(Lab::new("newer-maps").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let (thief, far) = (&containers[0], &containers[1]);
        let pings = Pinging::start(thief.netns(), far.address(), Some(8000), MILLISECOND)?;
        for host in lab.hosts() {
            let sealed = counter(host, "sealed")?;
            terminate(host)?;
            let before = host.pins()?;
            for name in NEWER {
                host.unpin(&format!("maps/{name}"))?;
            }
            ensure!(host.pins()?.len() == before.len() - NEWER.len(), "{:?}", host.pins()?);
            host.overnode(&["resume"])?.success()?;
            let after = host.pins()?;
            ensure!(
                before.iter().all(|pin| after.contains(pin)),
                "{after:?} instead of {before:?}"
            );
            ensure!(counter(host, "sealed")? >= sealed, "the earlier counts are lost");
        }
        let stats = pings.finish()?;
        ensure!(
            stats.lost() == 0,
            "{} of {} pings were lost: {:?}",
            stats.lost(),
            stats.sent,
            stats.missing
        );
        wait_for_sessions(lab)?;
        // The programs write to the new maps, not to ones that nothing reads.
        let watcher = watch(lab, lab.host(1), &["--reason", "spoofed"])?;
        let (mac, gateway) = (own_mac(thief)?, learnt_mac(thief, far.address())?);
        let injector = Injector::open(thief.netns(), "overnode0")?;
        injector.send(&datagram(mac, gateway, "10.42.0.77".parse()?, far.address()))?;
        watcher.drop_of("spoofed").map(drop)
    })
}

#[test]
fn the_restarted_daemon_adopts_sessions_containers_and_counters() -> Result<()> {
    in_lab(Lab::new("adopts").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let host = lab.host(1);
        let before = host.status()?;
        let sealed = counter(host, "sealed")?;
        ensure!(sealed > 0, "nothing was sealed");
        std::thread::sleep(Duration::from_millis(2100));
        host.kill_daemon()?;
        host.overnode(&["resume"])?.success()?;
        let after = host.status()?;
        assert_eq!(after["node"]["public_key"], before["node"]["public_key"]);
        assert_eq!(list(&after, "endpoints")?, list(&before, "endpoints")?);
        let data = peer(host, 2)?.context("node 2 is not known")?["data"].clone();
        assert_eq!(data["session"], "established");
        // The session is not a new one: its age has increased.
        assert!(data["session_age_seconds"].as_u64() >= Some(2), "{data}");
        assert!(counter(host, "sealed")? >= sealed);
        // The address space is remembered as well.
        let another = attached(host, "another")?;
        assert_ne!(another.address(), containers[0].address());
        another.reach(containers[1].address(), TIMEOUT)
    })
}

#[test]
fn traffic_passes_while_both_daemons_are_down() -> Result<()> {
    in_lab(Lab::new("away").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        for host in lab.hosts() {
            host.kill_daemon()?;
        }
        let stats = containers[0].ping(containers[1].address(), 5000, MILLISECOND)?;
        assert_eq!(stats.lost(), 0);
        flow::tcp(&containers[1], &containers[0], Amount::Bytes(20_000_000))?;
        for host in lab.hosts() {
            host.overnode(&["resume"])?.success()?;
        }
        wait_for_sessions(lab)?;
        all_reach_all(&containers)
    })
}

#[test]
fn traffic_recovers_after_an_underlay_outage() -> Result<()> {
    in_lab(Lab::new("heals").hosts(3).routed(), |lab| {
        let containers = launch_containers(lab)?;
        lab.unplug(lab.host(2))?;
        assert_eq!(containers[0].ping(containers[1].address(), 20, MILLISECOND)?.received, 0);
        // The other hosts are unaffected.
        assert_eq!(containers[0].ping(containers[2].address(), 500, MILLISECOND)?.lost(), 0);
        lab.plug(lab.host(2))?;
        all_reach_all(&containers)
    })
}

fn roaming(family: Family) -> Result<()> {
    in_lab(Lab::new("roaming").hosts(2).family(family), |lab| {
        let containers = launch_containers(lab)?;
        let new = lab.renumber(lab.host(2), 77)?;
        all_reach_all(&containers)?;
        eventually(TIMEOUT, || {
            let data = peer(lab.host(1), 2)?.context("node 2 is not known")?["data"].clone();
            let endpoint = data["endpoint"].as_str().unwrap_or_default().to_owned();
            ensure!(endpoint.contains(&new.to_string()), "host1 still sends to {endpoint}");
            Ok(())
        })
    })
}

#[test]
fn a_peer_that_moves_is_followed_over_ipv4() -> Result<()> {
    roaming(Family::V4)
}

#[test]
fn a_peer_that_moves_is_followed_over_ipv6() -> Result<()> {
    roaming(Family::V6)
}

/// Drops a host's packets to and from a port. If `address` is given, drops only those with this
/// local address.
fn block(host: &lab::Host, protocol: &str, port: u16, address: Option<&str>) -> Result<()> {
    let port = port.to_string();
    let nft = |words: &[&str]| host.netns().run("nft", words).map(drop);
    nft(&["add", "table", "inet", "block"])?;
    for (chain, side) in [("input", "daddr"), ("output", "saddr")] {
        let hook = format!("{{ type filter hook {chain} priority 0; }}");
        nft(&["add", "chain", "inet", "block", chain, &hook])?;
        let whose: Vec<&str> = address.map_or(Vec::new(), |address| vec!["ip", side, address]);
        for end in ["sport", "dport"] {
            nft(&[
                &["add", "rule", "inet", "block", chain],
                &whose[..],
                &[protocol, end, &port, "drop"],
            ]
            .concat())?;
        }
    }
    Ok(())
}

#[test]
fn a_restarted_daemon_keeps_sending_to_a_roamed_peer() -> Result<()> {
    in_lab(Lab::new("moved").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        let containers = launch_containers(lab)?;
        // From now on, only packets show node 2's address, and its containers send none themselves.
        block(a, "tcp", 6783, None)?;
        let new = lab.renumber(b, 77)?;
        eventually(TIMEOUT, || {
            let data = peer(a, 2)?.context("node 2 is not known")?["data"].clone();
            let endpoint = data["endpoint"].as_str().unwrap_or_default().to_owned();
            ensure!(endpoint.contains(&new.to_string()), "host1 still sends to {endpoint}");
            Ok(())
        })?;
        let pings = containers[0].start_pinging(containers[1].address(), MILLISECOND)?;
        std::thread::sleep(Duration::from_millis(300));
        a.kill_daemon()?;
        a.overnode(&["resume"])?.success()?;
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(pings.stop()?.lost(), 0);
        Ok(())
    })
}

#[test]
fn a_peer_is_tried_at_every_address_and_replies_from_the_one_used() -> Result<()> {
    const SECOND: &str = "192.168.48.99";
    in_lab(Lab::new("second").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        b.netns().ip(&["address", "add", &format!("{SECOND}/24"), "dev", b.interface()])?;
        block(b, "udp", 6784, Some(&b.address().to_string()))?;
        b.overnode(&["launch", "--id", "2", "--token", TOKEN])?.success()?;
        a.overnode(&["launch", "--id", "1", "--token", TOKEN, &b.address().to_string()])?
            .success()?;
        eventually(TIMEOUT, || peer(a, 2)?.map(drop).context("node 1 does not know node 2"))?;
        a.overnode(&["connect", SECOND])?.success()?;
        wait_for_sessions(lab)?;
        all_reach_all(&one_each(lab)?)
    })
}
