//! Tests of the life cycle of nodes and containers, as the commands document it.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use lab::flow::{self, Amount};
use lab::process::run_limited;
use lab::{Entry, Family, Lab, eventually};

use crate::support::{
    MILLISECOND, TIMEOUT, TOKEN, all_reach_all, attached, counter, in_lab, launch, launch_all,
    launch_containers, list, one_each, peer, targets, wait_for_sessions,
};

fn containers_talk(builder: lab::Builder) -> Result<()> {
    in_lab(builder.hosts(3), |lab| {
        let containers = launch_containers(lab)?;
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            let received = flow::tcp(&containers[from], &containers[to], Amount::Bytes(3_000_001))?;
            assert_eq!(received.bytes, 3_000_001);
            let datagrams = flow::udp(&containers[from], &containers[to], 50, 1000, MILLISECOND)?;
            assert_eq!((datagrams.received, datagrams.corrupt, datagrams.duplicated), (50, 0, 0));
        }
        Ok(())
    })
}

#[test]
fn containers_talk_over_a_bridged_ipv4_underlay() -> Result<()> {
    containers_talk(Lab::new("bridged4"))
}

#[test]
fn containers_talk_over_a_bridged_ipv6_underlay() -> Result<()> {
    containers_talk(Lab::new("bridged6").family(Family::V6))
}

#[test]
fn containers_talk_over_a_routed_ipv4_underlay() -> Result<()> {
    containers_talk(Lab::new("routed4").routed())
}

#[test]
fn containers_talk_over_a_routed_ipv6_underlay() -> Result<()> {
    containers_talk(Lab::new("routed6").family(Family::V6).routed())
}

/// Hosts are entered as with `nsenter --net=`, so that the daemon's `/sys` shows another network.
#[test]
fn nodes_work_when_only_the_network_namespace_is_entered() -> Result<()> {
    containers_talk(Lab::new("setns").entry(Entry::Setns))
}

#[test]
fn containers_of_one_host_talk_without_the_underlay() -> Result<()> {
    in_lab(Lab::new("local").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let (one, two) = (attached(host, "one")?, attached(host, "two")?);
        one.reach(two.address(), TIMEOUT)?;
        let capture = lab.capture()?;
        flow::tcp(&one, &two, Amount::Bytes(10_000_000))?;
        assert_eq!(capture.stop()?.count(|packet| packet.wireguard_type().is_some())?, 0);
        assert!(counter(host, "local")? > 0);
        Ok(())
    })
}

#[test]
fn every_address_is_given_once_and_printed_with_its_prefix() -> Result<()> {
    in_lab(Lab::new("addresses").hosts(3), |lab| {
        launch_all(lab)?;
        let mut addresses = BTreeSet::new();
        let mut containers = Vec::new();
        for host in lab.hosts() {
            for number in 0..4 {
                let container = host.container(&format!("c{number}"))?;
                let address = host.attach(&container, &[])?;
                assert_eq!(address.prefix_len(), 12);
                assert!("10.40.0.0/13".parse::<IpNet>()?.contains(&address.addr()), "{address}");
                assert!(addresses.insert(address.addr()), "{address} was given twice");
                containers.push(container);
            }
        }
        assert!(addresses.contains(&"10.40.0.1".parse()?), "{addresses:?}");
        Ok(())
    })
}

#[test]
fn a_static_address_is_reached_from_everywhere() -> Result<()> {
    in_lab(Lab::new("static").hosts(2), |lab| {
        launch_all(lab)?;
        let fixed = lab.host(2).container("fixed")?;
        let address =
            lab.host(2).attach(&fixed, &["--ip", "10.33.7.5/12", "--name", "database"])?;
        assert_eq!(address.to_string(), "10.33.7.5/12");
        let (near, far) = (attached(lab.host(2), "near")?, attached(lab.host(1), "far")?);
        near.reach(fixed.address(), TIMEOUT)?;
        far.reach(fixed.address(), TIMEOUT)?;
        let status = lab.host(2).status()?;
        let endpoint = list(&status, "endpoints")?
            .iter()
            .find(|endpoint| endpoint["name"] == "database")
            .context("the endpoint is not listed under its name")?;
        assert_eq!(endpoint["address"], "10.33.7.5/12");
        assert_eq!(endpoint["static"], true);
        Ok(())
    })
}

#[test]
fn a_detached_container_is_unplugged_and_can_come_back() -> Result<()> {
    in_lab(Lab::new("detach").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let (host, gone) = (lab.host(2), containers[1].address());
        host.detach(&containers[1])?;
        assert_eq!(containers[1].netns().interfaces()?, Vec::<String>::new());
        assert_eq!(list(&host.status()?, "endpoints")?.len(), 0);
        assert_eq!(containers[0].ping(gone, 5, MILLISECOND)?.received, 0);
        host.overnode(&["detach", &containers[1].target()])?.failure(1)?;
        host.attach(&containers[1], &[])?;
        all_reach_all(&containers)
    })
}

#[test]
fn launching_again_is_harmless() -> Result<()> {
    in_lab(Lab::new("again").hosts(2), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let container = attached(host, "c")?;
        let pid = host.daemon_pid().context("no daemon")?;
        let said =
            host.overnode(&["launch", "--id", "1", "--token", TOKEN, "another"])?.success()?;
        assert!(said.contains("already running"), "{said}");
        assert_eq!(targets(host)?, ["another", "host1", "host2"]);
        assert_eq!(host.daemon_pid(), Some(pid));

        for (id, token, named) in [("2", TOKEN, "1"), ("1", "other", "token")] {
            let complaint = host.overnode(&["launch", "--id", id, "--token", token])?.failure(1)?;
            assert!(
                complaint.contains("overnode reset") && complaint.contains(named),
                "{complaint}"
            );
        }
        assert_eq!(targets(host)?, ["another", "host1", "host2"]);

        host.kill_daemon()?;
        host.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        assert_eq!(targets(host)?, ["another", "host1", "host2"]);
        host.kill_daemon()?;
        host.overnode(&["launch", "--id", "1", "--token", TOKEN, "host2"])?.success()?;
        assert_eq!(targets(host)?, ["host2"]);
        assert_eq!(list(&host.status()?, "endpoints")?.len(), 1);
        drop(container);
        Ok(())
    })
}

#[test]
fn targets_are_added_removed_replaced_and_kept() -> Result<()> {
    in_lab(Lab::new("targets").hosts(2), |lab| {
        let host = lab.host(1);
        host.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        assert_eq!(targets(host)?, Vec::<String>::new());
        host.overnode(&["connect", "host2", "no-such-host", "192.0.2.7"])?.success()?;
        assert_eq!(targets(host)?, ["192.0.2.7", "host2", "no-such-host"]);
        let complaint = host.overnode(&["forget", "host2", "unheard-of"])?.failure(1)?;
        assert!(complaint.contains("unheard-of"), "{complaint}");
        assert_eq!(targets(host)?, ["192.0.2.7", "host2", "no-such-host"], "a target was removed");
        host.overnode(&["forget", "192.0.2.7"])?.success()?;
        host.kill_daemon()?;
        host.overnode(&["resume"])?.success()?;
        assert_eq!(targets(host)?, ["host2", "no-such-host"]);
        host.overnode(&["connect", "--replace", "host1", "host2"])?.success()?;
        assert_eq!(targets(host)?, ["host1", "host2"]);
        eventually(TIMEOUT, || {
            let status = host.status()?;
            let own = list(&status, "targets")?.iter().find(|target| target["host"] == "host1");
            let state = own.context("no target host1")?["state"].clone();
            ensure!(state == "myself", "the target host1 is {state}, not myself");
            Ok(())
        })
    })
}

#[test]
fn forgetting_a_live_peer_keeps_the_connection() -> Result<()> {
    in_lab(Lab::new("forget").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        for host in lab.hosts() {
            host.overnode(&["forget", "host1", "host2"])?.success()?;
            assert_eq!(targets(host)?, Vec::<String>::new());
        }
        let stats = containers[0].ping(containers[1].address(), 1000, MILLISECOND)?;
        assert_eq!(stats.lost(), 0);
        assert_eq!(peer(lab.host(1), 2)?.context("node 2 is no longer known")?["reachable"], true);
        Ok(())
    })
}

#[test]
fn a_name_that_resolves_later_is_dialed_then() -> Result<()> {
    in_lab(Lab::new("later").hosts(2), |lab| {
        let [a, b] = lab.hosts() else { unreachable!() };
        a.overnode(&["launch", "--id", "1", "--token", TOKEN, "latecomer"])?.success()?;
        b.overnode(&["launch", "--id", "2", "--token", TOKEN])?.success()?;
        eventually(TIMEOUT, || {
            let status = a.status()?;
            let target = &list(&status, "targets")?[0];
            ensure!(target["last_error"]["message"].is_string(), "no error: {target}");
            Ok(())
        })?;
        assert!(peer(a, 2)?.is_none());
        let file = format!("/etc/netns/{}/hosts", a.netns().name());
        writeln!(OpenOptions::new().append(true).open(file)?, "{} latecomer", b.address())?;
        // The pause between attempts is at most 30 s.
        eventually(Duration::from_secs(40), || {
            ensure!(peer(a, 2)?.is_some(), "the name was not resolved again");
            Ok(())
        })?;
        wait_for_sessions(lab)
    })
}

/// Discovery turns a chain of targets into a full mesh.
#[test]
fn nodes_discover_each_other_through_others() -> Result<()> {
    in_lab(Lab::new("chain").hosts(3), |lab| {
        for (host, target) in lab.hosts().iter().zip([None, Some("host1"), Some("host2")]) {
            let id = host.number.to_string();
            let words = ["launch", "--id", &id, "--token", TOKEN];
            host.overnode(&[&words[..], target.as_slice()].concat())?.success()?;
        }
        wait_for_sessions(lab)?;
        let containers = one_each(lab)?;
        all_reach_all(&containers)
    })
}

#[test]
fn resume_starts_a_launched_node_and_says_if_it_already_runs() -> Result<()> {
    in_lab(Lab::new("resume").hosts(1), |lab| {
        let host = lab.host(1);
        let complaint = host.overnode(&["resume"])?.failure(1)?;
        assert!(complaint.contains("overnode launch"), "{complaint}");
        launch(lab, host)?;
        let said = host.overnode(&["resume"])?.success()?;
        assert!(said.contains("already running"), "{said}");
        host.kill_daemon()?;
        host.overnode(&["resume"])?.success()?;
        assert_eq!(host.status()?["node"]["id"], 1);
        Ok(())
    })
}

#[test]
fn status_has_every_section_and_inspect_no_secret() -> Result<()> {
    in_lab(Lab::new("status").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let host = lab.host(1);
        let all = host.overnode(&["status"])?.success()?;
        for section in ["--targets", "--peers", "--connections", "--ipam", "--endpoints"] {
            let table = host.overnode(&["status", section])?.success()?;
            assert!(!table.trim().is_empty(), "{section} is empty");
            assert!(table.len() < all.len(), "{section} is as long as the whole status");
        }
        let own = containers[0].address().to_string();
        assert!(host.overnode(&["status", "--endpoints"])?.success()?.contains(&own));
        assert!(host.overnode(&["status", "--connections"])?.success()?.contains("established"));
        let inspected = host.inspect()?.to_string();
        assert!(inspected.contains(&own) && !inspected.contains(TOKEN));
        Ok(())
    })
}

#[test]
fn the_token_is_not_kept() -> Result<()> {
    in_lab(Lab::new("kept").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let mut files = 0;
        for folder in [host.state_directory(), host.run_directory()] {
            for entry in std::fs::read_dir(folder)? {
                let path = entry?.path();
                let Ok(bytes) = std::fs::read(&path) else { continue };
                files += 1;
                let found = bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes());
                assert!(!found, "{} holds the token", path.display());
            }
        }
        assert!(files > 0);
        let pid = host.daemon_pid().context("no daemon")?;
        let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        assert!(!words.contains(TOKEN), "the process list shows the token: {words}");
        Ok(())
    })
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() -> Result<()> {
    in_lab(Lab::new("second").hosts(1), |lab| {
        let host = lab.host(1);
        launch(lab, host)?;
        let pid = host.daemon_pid().context("no daemon")?;
        let mut second = host.command("overnoded")?;
        second.arg("--state-dir").arg(host.state_directory());
        second.arg("--run-dir").arg(lab.folder().join("elsewhere")).stdin(Stdio::null());
        let outcome = run_limited(second, lab.folder(), TIMEOUT)?;
        assert!(!outcome.status.success() && !outcome.stderr.is_empty(), "{outcome:?}");
        assert_eq!(host.daemon_pid(), Some(pid));
        host.status().map(drop)
    })
}

#[test]
fn a_reset_node_can_join_again_with_another_id() -> Result<()> {
    in_lab(Lab::new("rejoin").hosts(2), |lab| {
        launch_all(lab)?;
        let (stays, leaves) = (lab.host(1), lab.host(2));
        leaves.overnode(&["reset"])?.success()?;
        eventually(TIMEOUT, || {
            let gone = peer(stays, 2)?.is_none_or(|peer| peer["reachable"] == false);
            ensure!(gone, "node 2 left but is still reported as reachable");
            Ok(())
        })?;
        leaves.overnode(&["launch", "--id", "3", "--token", TOKEN, "host1"])?.success()?;
        let (one, three) = (attached(stays, "one")?, attached(leaves, "three")?);
        one.reach(three.address(), TIMEOUT)?;
        leaves.overnode(&["reset", "--force"])?.success()?;
        drop(three);
        // The first ID is used again: a new incarnation with another key.
        launch(lab, leaves)?;
        let two = attached(leaves, "two")?;
        one.reach(two.address(), TIMEOUT)
    })
}

#[test]
fn packets_up_to_the_mtu_pass_and_larger_ones_are_refused() -> Result<()> {
    in_lab(Lab::new("mtu").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let to = containers[1].address().to_string();
        let ping = |fragment: &str, size: &str| {
            containers[0]
                .run("ping", &["-M", fragment, "-c", "3", "-i", "0.01", "-W", "1", "-s", size, &to])
        };
        // 1420 bytes with the headers of IPv4 and ICMP.
        ping("do", "1392")?;
        assert!(ping("do", "1393").is_err());
        // Fragments may be larger.
        ping("dont", "8000")?;
        for size in ["0", "1", "15", "16", "17", "1379", "1380", "1381", "1391"] {
            ping("do", size)?;
        }
        Ok(())
    })
}

#[test]
fn jumbo_underlays_carry_jumbo_packets() -> Result<()> {
    in_lab(Lab::new("jumbo").hosts(2).mtu(9000), |lab| {
        let containers = launch_containers(lab)?;
        let to = containers[1].address().to_string();
        containers[0].run("ping", &["-M", "do", "-c", "1", "-W", "1", "-s", "8892", &to])?;
        assert_eq!(
            flow::tcp(&containers[0], &containers[1], Amount::Bytes(5_000_000))?.bytes,
            5_000_000
        );
        Ok(())
    })
}

#[test]
fn nodes_with_later_ids_say_that_they_cannot_allocate_yet() -> Result<()> {
    in_lab(Lab::new("later-ids").hosts(1), |lab| {
        let host = lab.host(1);
        host.overnode(&["launch", "--id", "5", "--token", TOKEN])?.success()?;
        let container = host.container("c")?;
        let complaint = host.overnode(&["attach", &container.target()])?.failure(1)?;
        assert!(
            complaint.contains('5') || complaint.contains("1 to 4") || complaint.contains("1-4"),
            "{complaint}"
        );
        assert_eq!(container.netns().interfaces()?, Vec::<String>::new());
        Ok(())
    })
}

#[test]
fn a_connection_to_an_address_that_nobody_has_fails_at_once() -> Result<()> {
    in_lab(Lab::new("nobody").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let [here, there] = [attached(one, "a")?, attached(two, "b")?];
        all_reach_all(&[here, there])?;
        let client = attached(one, "c")?;
        // A static address that no node has claimed, and an address of this node's own space.
        for address in ["10.33.0.9", "10.40.77.7"] {
            let begun = Instant::now();
            let address: IpAddr = address.parse()?;
            let connected = client.netns().enter(|| {
                Ok(TcpStream::connect_timeout(&(address, 80).into(), Duration::from_secs(20)))
            })?;
            let error = connected.err().context("somebody has the address")?;
            let took = begun.elapsed();
            ensure!(error.kind() == ErrorKind::HostUnreachable, "{address}: {error}");
            ensure!(took < Duration::from_secs(2), "{address}: it took {took:?}");
        }
        Ok(())
    })
}

#[test]
fn settings_change_under_traffic_and_a_bad_one_changes_nothing() -> Result<()> {
    in_lab(Lab::new("settings").hosts(2), |lab| {
        launch_all(lab)?;
        let [one, two] = [lab.host(1), lab.host(2)];
        let containers = [attached(one, "a")?, attached(two, "b")?];
        all_reach_all(&containers)?;
        let pings = containers[0].start_pinging(containers[1].address(), 10 * MILLISECOND)?;

        let said = one.overnode(&["set", "mtu=1300", "bulk=off", "discovery=off"])?.success()?;
        ensure!(said.contains("mtu=1300") && said.contains("bulk=off"), "{said}");
        let status = one.status()?;
        ensure!(status["node"]["mtu"] == 1300, "{}", status["node"]);
        ensure!(status["node"]["settings"].to_string().contains("discovery=off"), "{status}");
        ensure!(one.overnode(&["get", "bulk"])?.success()? == "off\n");
        let table = one.overnode(&["status"])?.success()?;
        ensure!(table.contains("mtu=1300"), "{table}");
        let same = one.overnode(&["set", "mtu=1300"])?.success()?;
        ensure!(same.contains("nothing to change"), "{same}");

        // A launch does the same, and leaves alone what it does not name.
        let words = ["launch", "--id", "1", "--token", TOKEN, "--mtu", "1280"];
        let said = one.overnode(&words)?.success()?;
        ensure!(said.contains("restarted with mtu=1280"), "{said}");
        ensure!(one.overnode(&["get", "bulk"])?.success()? == "off\n");

        // All or nothing.
        for (words, why) in [
            (&["set", "mtu=1400", "bulk=maybe"][..], "off, auto, chacha, aes"),
            (&["set", "subnet=10.0.0.0/8"], "there is no setting"),
            (&["set", "xdp=on"], "interface=NAME"),
            (&["set", "mtu"], "KEY=VALUE"),
            (&["get", "colour"], "there is no setting"),
        ] {
            let complaint = one.overnode(words)?.complaint()?;
            ensure!(complaint.contains(why), "{words:?}: {complaint}");
        }
        let complaint = one.overnode(&["set", "interface=nosuch0"])?.failure(1)?;
        ensure!(complaint.contains("there is no interface nosuch0"), "{complaint}");
        ensure!(complaint.contains("nothing was changed"), "{complaint}");
        ensure!(one.overnode(&["get", "interface"])?.success()? == "auto\n");
        ensure!(one.overnode(&["get", "mtu"])?.success()? == "1280\n");

        one.overnode(&["set", "mtu=default", "bulk=default", "discovery=default"])?.success()?;
        let settings = one.status()?["node"]["settings"].clone();
        ensure!(settings.as_array().is_some_and(Vec::is_empty), "{settings}");
        all_reach_all(&containers)?;
        let pings = pings.stop()?;
        ensure!(pings.lost() == 0, "{pings:?}");
        Ok(())
    })
}
