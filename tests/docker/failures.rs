//! Tests of failures of the engine, of the node, and of the whole host.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::docker::IMAGE;
use lab::eventually;

use crate::support::{TIMEOUT, endpoint, endpoints, nothing_left, with_engines};

#[test]
fn containers_stay_connected_when_the_engine_is_killed() -> Result<()> {
    with_engines("docker-kill", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let always = two.run("always", &["--restart", "always"])?;
        let fixed = two.run("fixed", &["--restart", "always", "--ip", "10.36.0.1"])?;
        two.run("once", &[])?;
        one.run("here", &[])?;
        one.reach("here", &always, TIMEOUT)?;
        one.reach("here", &fixed, TIMEOUT)?;
        two.kill()?;
        // Traffic does not depend on the engine.
        one.reach("here", &always, TIMEOUT)?;
        two.start()?;
        eventually(TIMEOUT, || {
            let running = two.docker(&["ps", "--format", "{{.Names}}"])?.success()?;
            ensure!(
                running.lines().filter(|it| ["always", "fixed"].contains(it)).count() == 2,
                "{running}"
            );
            Ok(())
        })?;
        one.reach("here", &two.address("always")?, TIMEOUT)?;
        one.reach("here", "10.36.0.1", TIMEOUT)?;
        // The engine releases the attachment of the container that it did not restart.
        eventually(TIMEOUT, || {
            let listed = endpoints(lab.host(2))?;
            ensure!(listed.len() == 2, "{listed:?}");
            Ok(())
        })?;
        two.docker(&["rm", "--force", "always", "fixed", "once"])?.success()?;
        nothing_left(lab.host(2))
    })
}

#[test]
fn containers_stay_connected_when_the_node_is_killed() -> Result<()> {
    with_engines("docker-node", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let old = two.run("old", &[])?;
        one.run("here", &[])?;
        one.reach("here", &old, TIMEOUT)?;
        lab.host(2).kill_daemon()?;
        one.reach("here", &old, Duration::from_secs(5))?;
        // The engine retries for half a minute.
        let new = std::thread::scope(|scope| -> Result<String> {
            let starting = scope.spawn(|| two.run("new", &[]));
            std::thread::sleep(Duration::from_secs(2));
            two.overnode(&["resume"])?.success()?;
            starting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        one.reach("here", &new, TIMEOUT)?;
        one.reach("here", &old, TIMEOUT)?;
        ensure!(endpoint(lab.host(2), "old")?["address"] == format!("{old}/12"));

        // A container that is removed while no daemon runs.
        lab.host(2).kill_daemon()?;
        let stopping = std::thread::scope(|scope| {
            let stopping = scope.spawn(|| two.docker(&["rm", "--force", "old"]));
            std::thread::sleep(Duration::from_secs(1));
            let resumed = two.overnode(&["resume"]).and_then(lab::Outcome::success);
            (stopping.join(), resumed)
        });
        stopping.1?;
        stopping.0.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?.success()?;
        two.docker(&["rm", "--force", "new"])?.success()?;
        nothing_left(lab.host(2))
    })
}

#[test]
fn containers_come_back_after_a_power_failure() -> Result<()> {
    with_engines("docker-power", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        one.run("here", &[])?;
        two.run("always", &["--restart", "always"])?;
        two.run("fixed", &["--restart", "unless-stopped", "--ip", "10.36.0.2"])?;
        two.run("once", &[])?;
        one.reach("here", "10.36.0.2", TIMEOUT)?;
        two.lose_power()?;
        // In the order of the systemd units.
        two.overnode(&["resume"])?.success()?;
        two.start()?;
        eventually(TIMEOUT, || {
            let running = two.docker(&["ps", "--format", "{{.Names}}"])?.success()?;
            ensure!(running.lines().count() == 2, "{running}");
            Ok(())
        })?;
        one.reach("here", &two.address("always")?, TIMEOUT)?;
        one.reach("here", "10.36.0.2", TIMEOUT)?;
        two.reach("fixed", &one.address("here")?, TIMEOUT)?;
        endpoint(lab.host(2), "always")?;
        eventually(TIMEOUT, || {
            let listed = endpoints(lab.host(2))?;
            ensure!(listed.len() == 2, "{listed:?}");
            Ok(())
        })?;
        // New containers still start.
        let words = [
            "run",
            "--rm",
            "--network",
            "overnode",
            IMAGE,
            "ping",
            "-c",
            "1",
            "-W",
            "5",
            "10.36.0.2",
        ];
        two.docker(&words)?.success()?;
        two.docker(&["rm", "--force", "always", "fixed", "once"])?.success()?;
        nothing_left(lab.host(2))
    })
}

/// If the engine's gateway took packets for the container network to other hosts, they would be
/// unencrypted.
#[test]
fn a_cut_off_containers_packets_do_not_leave_by_the_engines_gateway() -> Result<()> {
    with_engines("docker-guard", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        // The container uses a network that the user created, because a reset does not remove it.
        let create =
            ["network", "create", "--driver", "overnode", "--ipam-driver", "overnode", "mine"];
        one.docker(&create)?.success()?;
        let run = [
            "run",
            "--detach",
            "--network",
            "mine",
            "--name",
            "here",
            IMAGE,
            "/bin/sleep",
            "100000",
        ];
        one.docker(&run)?.success()?;
        let there = two.run("there", &[])?;
        let outside = lab.host(2).address().to_string();
        one.reach("here", &there, TIMEOUT)?;
        one.reach("here", &outside, TIMEOUT)?;
        let capture = lab.capture()?;
        let before = endpoint(lab.host(1), "here")?;
        // The interface is deleted by accident, and the node makes the same one again.
        let interface = before["interface"].as_str().unwrap_or_default();
        lab.host(1).netns().ip(&["link", "del", interface])?;
        one.reach("here", &there, TIMEOUT)?;
        ensure!(endpoint(lab.host(1), "here")?["address"] == before["address"]);
        one.overnode(&["reset", "--force"])?.success()?;
        let pinged = one.docker(&["exec", "here", "ping", "-c", "2", "-W", "1", &there])?;
        ensure!(!pinged.status.success(), "{}", pinged.stdout);
        // Addresses outside the container network are still reachable.
        one.reach("here", &outside, TIMEOUT)?;
        ensure_nothing_plain(&capture.stop()?)
    })
}

fn ensure_nothing_plain(captured: &lab::capture::Captured) -> Result<()> {
    let of_ours = |ip: std::net::IpAddr| {
        let std::net::IpAddr::V4(v4) = ip else { return false };
        v4.octets()[0] == 10 && (32..48).contains(&v4.octets()[1])
    };
    let bare =
        captured.count(|packet| packet.ip.is_some_and(|ip| of_ours(ip.from) || of_ours(ip.to)))?;
    ensure!(bare == 0, "{bare} packets of containers are unencrypted on the underlay");
    Ok(())
}
