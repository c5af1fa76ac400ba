//! Tests of `overnode monitor`: drops and events are reported as they happen, and monitors do not
//! slow the node down.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::flow::MARKER;
use lab::monitor::Watcher;
use lab::raw::Injector;
use lab::{Host, Lab, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::hostile::{attacker, record};
use crate::spoofing::{datagram, learnt_mac, own_mac};
use crate::support::{
    MILLISECOND, TIMEOUT, attached, counter, in_lab, launch_all, launch_containers, wait_for_peers,
};

/// Starts a monitor with `--json` and waits until it is watching.
pub(crate) fn watch(lab: &Lab, host: &Host, options: &[&str]) -> Result<Watcher> {
    let watcher = Watcher::start(lab, host, &[&["--json"], options].concat(), TIMEOUT)?;
    watcher.wait_for(|event| event["event"] == "watching")?;
    Ok(watcher)
}

#[test]
fn dropped_packets_are_shown_with_their_owner_and_without_payload() -> Result<()> {
    in_lab(Lab::new("drops").hosts(2), |lab| {
        let containers = launch_containers(lab)?;
        let [thief, far] = &containers[..] else { bail!("expected two containers") };
        let (shop, unnamed) = (lab.host(1).container("shop")?, attached(lab.host(1), "unnamed")?);
        lab.host(1).attach(&shop, &["--name", "shop"])?;
        let watchers = [watch(lab, lab.host(1), &[])?, watch(lab, lab.host(1), &[])?];
        let (mac, gateway) = (own_mac(thief)?, learnt_mac(thief, far.address())?);
        let injector = Injector::open(thief.netns(), "overnode0")?;
        injector.send(&datagram(mac, gateway, "10.42.0.77".parse()?, far.address()))?;
        injector.send(&datagram(mac, gateway, thief.address(), "10.46.0.1".parse()?))?;
        injector.send(&datagram(mac, gateway, shop.address(), unnamed.address()))?;
        for watcher in &watchers {
            let spoofed = watcher.drop_of("spoofed")?;
            ensure!(spoofed["program"] == "from-container", "{spoofed}");
            ensure!(spoofed["container"]["address"] == json!(thief.address()), "{spoofed}");
            ensure!(spoofed["container"]["target"] == thief.target(), "{spoofed}");
            ensure!(spoofed["peer"] == json!({"id": 2, "name": "host2"}), "{spoofed}");
            let inner = &spoofed["inner"];
            ensure!(inner["source"] == "10.42.0.77" && inner["protocol"] == "udp", "{spoofed}");
            ensure!(inner["destination"] == json!(far.address()), "{spoofed}");
            ensure!(inner["source_port"] == 5000 && inner["destination_port"] == 5001, "{spoofed}");
            ensure!(spoofed["names"].is_null(), "no address here has a name: {spoofed}");
            let beside = watcher.wait_for(|it| it["inner"]["source"] == json!(shop.address()))?;
            let names = [(shop.address().to_string(), "shop".to_owned())];
            let names =
                names.into_iter().chain([(unnamed.address().to_string(), unnamed.target())]);
            ensure!(
                beside["names"] == names.map(|(at, it)| (at, json!(it))).collect::<Value>(),
                "{beside}"
            );
            ensure!(beside["container"]["target"] == thief.target(), "{beside}");
            let lost = watcher.drop_of("no-route")?;
            ensure!(
                lost["inner"]["destination"] == "10.46.0.1" && lost["peer"].is_null(),
                "{lost}"
            );
            ensure!(lost["unix_milliseconds"].as_u64() > Some(1_600_000_000_000), "{lost}");
        }
        // A message from node 1 that an attacker modified.
        let watcher = watch(lab, lab.host(2), &["--reason", "forged"])?;
        let mut forged = record(lab, &containers)?.swap_remove(0);
        forged[42 + 8..42 + 16].copy_from_slice(&(1_u64 << 33).to_le_bytes());
        *forged.last_mut().context("no bytes")? ^= 1;
        attacker(lab)?.send(&forged)?;
        let seen = watcher.drop_of("forged")?;
        ensure!(seen["peer"] == json!({"id": 1, "name": "host1"}), "{seen}");
        ensure!(seen["message"]["counter"] == 1_u64 << 33 && seen["inner"].is_null(), "{seen}");
        ensure!(seen["outer"]["source"] == json!(lab.host(1).address()), "{seen}");
        ensure!(seen["interface"] == lab.host(2).interface(), "{seen}");
        for watcher in watchers.iter().chain([&watcher]) {
            let text = watcher.text()?;
            ensure!(
                !text.as_bytes().windows(MARKER.len()).any(|window| window == MARKER),
                "the monitor shows payload: {text}"
            );
        }
        Ok(())
    })
}

#[test]
fn events_of_peers_paths_and_containers_are_reported() -> Result<()> {
    in_lab(Lab::new("events").hosts(3), |lab| {
        let [one, two, three] = [1, 2, 3].map(|number| lab.host(number));
        launch_all(lab)?;
        wait_for_peers(one, 3)?;
        let watcher = watch(lab, one, &["--events"])?;
        let of = |id: usize, event: &Value| event["peer"]["id"] == id;
        let container = attached(one, "c")?;
        let told = watcher.wait_for(|event| event["event"] == "attached")?;
        ensure!(told["address"] == json!(container.address()), "{told}");
        one.detach(&container)?;
        watcher.wait_for(|event| {
            event["event"] == "detached" && event["address"] == told["address"]
        })?;

        lab.cut(one, three)?;
        watcher.wait_for(|it| it["event"] == "direct-path" && of(3, it) && it["works"] == false)?;
        let path = |to: Value| {
            watcher.wait_for(|it| it["event"] == "path-changed" && of(3, it) && it["path"] == to)
        };
        path(json!({"via": 2}))?;
        lab.heal(one, three)?;
        watcher.wait_for(|it| it["event"] == "direct-path" && of(3, it) && it["works"] == true)?;
        path(json!("direct"))?;

        two.kill_daemon()?;
        let told = watcher.wait_for(|it| it["event"] == "disconnected" && of(2, it))?;
        ensure!(told["why"].as_str().is_some_and(|why| !why.is_empty()), "{told}");
        watcher.wait_for(|it| it["event"] == "node-unreachable" && of(2, it))?;
        two.overnode(&["resume"])?.success()?;
        watcher.wait_for(|it| it["event"] == "connected" && of(2, it))?;
        watcher.wait_for(|it| it["event"] == "node-reachable" && of(2, it))?;
        three.overnode(&["reset"])?.success()?;
        watcher.wait_for(|it| it["event"] == "node-left" && of(3, it))?;
        watcher.wait_for(|it| it["event"] == "session-lost" && of(3, it))?;
        Ok(())
    })
}

#[test]
fn a_monitor_ends_on_a_signal_its_time_limit_or_a_closed_pipe() -> Result<()> {
    in_lab(Lab::new("end").hosts(1), |lab| {
        let host = lab.host(1);
        launch_all(lab)?;
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let watcher = watch(lab, host, &[])?;
            watcher.signal(signal)?;
            let (status, complaint) = watcher.end()?;
            ensure!(status.success() && complaint.is_empty(), "{signal}: {status}, {complaint}");
        }
        let begun = Instant::now();
        let (status, _) = watch(lab, host, &["--for", "1s"])?.end()?;
        ensure!(status.success() && begun.elapsed() >= Duration::from_secs(1), "{status}");
        // A reader takes one line and closes the pipe.
        let mut command = host.command("overnode")?;
        let mut child = command.arg("monitor").stdout(Stdio::piped()).spawn()?;
        let mut reader = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        ensure!(line.contains("watching") && line.contains("node 1 (host1)"), "{line:?}");
        drop(reader);
        attached(host, "c")?;
        let status = eventually(TIMEOUT, || child.try_wait()?.context("the monitor still runs"))?;
        ensure!(status.success(), "{status}");
        // The daemon ends, first killed, then with a clean shutdown.
        let watcher = watch(lab, host, &[])?;
        host.kill_daemon()?;
        let (status, complaint) = watcher.end()?;
        ensure!(status.code() == Some(1), "{status}");
        ensure!(
            complaint.lines().count() == 1 && complaint.contains("overnode resume"),
            "{complaint}"
        );
        host.overnode(&["resume"])?.success()?;
        let watcher = watch(lab, host, &[])?;
        let pid = host.daemon_pid().context("no daemon")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let (status, complaint) = watcher.end()?;
        ensure!(
            status.code() == Some(1) && complaint.contains("overnode resume"),
            "{status}: {complaint}"
        );
        let refused = host.overnode(&["monitor"])?.failure(1)?;
        ensure!(refused.contains("overnode resume"), "{refused}");
        Ok(())
    })
}

/// Returns the resident memory in KiB.
fn memory(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).context("no number")
}

#[test]
fn neither_a_flood_nor_a_stalled_reader_disturbs_the_daemon() -> Result<()> {
    const FLOOD: usize = 100_000;
    const MORE_MEMORY: u64 = 48 * 1024;
    in_lab(Lab::new("flood").hosts(2), |lab| {
        let host = lab.host(1);
        let containers = launch_containers(lab)?;
        let watcher = watch(lab, host, &[])?;
        // This monitor never reads its events.
        let mut sleeper = UnixStream::connect(host.socket())?;
        write!(sleeper, "GET /v1/monitor HTTP/1.1\r\nHost: overnode\r\n\r\n")?;
        let (thief, far) = (&containers[0], &containers[1]);
        let frame = datagram(
            own_mac(thief)?,
            learnt_mac(thief, far.address())?,
            "10.42.0.77".parse()?,
            far.address(),
        );
        let pid = host.daemon_pid().context("no daemon")?;
        let (memory_before, counted_before) = (memory(pid)?, counter(host, "spoofed")?);
        let injector = Injector::open(thief.netns(), "overnode0")?;
        let frames = vec![frame; FLOOD / 100];
        let mut slowest = Duration::ZERO;
        for _ in 0..100 {
            injector.send_all(&frames)?;
            let begun = Instant::now();
            if slowest < Duration::from_secs(1) {
                host.request("GET", "/v1/status", "")?;
            }
            slowest = slowest.max(begun.elapsed());
        }
        ensure!(slowest < Duration::from_secs(5), "the daemon took {slowest:?} to answer");
        let more = memory(pid)?.saturating_sub(memory_before);
        ensure!(more < MORE_MEMORY, "the daemon uses {more} KiB more");
        let counted = counter(host, "spoofed")? - counted_before;
        ensure!(counted >= FLOOD as u64, "only {counted} drops are counted");
        // All drops are accounted for, but few of them individually.
        let shown = eventually(TIMEOUT, || {
            let (mut one_by_one, mut all) = (0, 0);
            for event in watcher.events()?.iter().filter(|event| event["reason"] == "spoofed") {
                match event["event"].as_str() {
                    Some("drop") => (one_by_one, all) = (one_by_one + 1, all + 1),
                    _ => all += event["count"].as_u64().context("no count")?,
                }
            }
            ensure!(all == counted, "only {all} of {counted} drops are reported");
            Ok(one_by_one)
        })?;
        ensure!((1..10_000).contains(&shown), "{shown} drops are shown one by one");
        ensure!(
            containers[0].ping(far.address(), 100, MILLISECOND)?.lost() == 0,
            "pings were lost"
        );
        // No monitor is left. Drops from now on are not recorded, and a later monitor does not see
        // them.
        drop((watcher, sleeper));
        std::thread::sleep(Duration::from_millis(2500));
        injector.send_all(&frames)?;
        let late = watch(lab, host, &["--reason", "spoofed"])?;
        std::thread::sleep(Duration::from_millis(1500));
        let seen = late.events()?;
        ensure!(seen.len() == 1, "earlier events are reported: {seen:?}");
        Ok(())
    })
}

#[test]
fn the_number_of_monitors_is_limited() -> Result<()> {
    in_lab(Lab::new("readers").hosts(1), |lab| {
        let host = lab.host(1);
        launch_all(lab)?;
        let mut watchers = Vec::new();
        for _ in 0..16 {
            watchers.push(watch(lab, host, &[])?);
        }
        let refused = host.overnode(&["monitor"])?.failure(1)?;
        ensure!(refused.contains("16 monitors"), "{refused}");
        watchers.pop();
        eventually(TIMEOUT, || {
            Watcher::start_now(lab, host, &["monitor", "--for", "1s"], TIMEOUT)?.end().and_then(
                |(status, why)| {
                    ensure!(status.success(), "{why}");
                    Ok(())
                },
            )
        })
    })
}
