//! Tests of paths that fail (invariant L2): traffic moves to relays, and back to the direct path
//! once it works again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::ping::{PingStats, Pinging};
use lab::{Container, Host, Lab, eventually};
use serde_json::{Value, json};

use crate::support::{
    TIMEOUT, attached, counter, ensure_nothing_plain, in_lab, launch, launch_all, one_each, peer,
    wait_for_sessions,
};

/// Time within which a failed path must be replaced.
const REPLACED: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_millis(10);

/// Returns a host's route to a node, as its status reports it.
fn route(host: &Host, to: usize) -> Result<Value> {
    let peer = peer(host, to)?.with_context(|| format!("{} does not know node {to}", host.name))?;
    Ok(peer["data"]["route"].clone())
}

fn wait_for_path(host: &Host, to: usize, path: &Value) -> Result<()> {
    eventually(TIMEOUT, || {
        let route = route(host, to)?;
        ensure!(
            route["path"] == *path && route.is_object(),
            "the route of {} to node {to} is {route}, not {path}",
            host.name
        );
        Ok(())
    })
}

fn via(id: usize) -> Value {
    json!({ "via": id })
}

/// Returns the longest time without a reply.
fn longest_gap(stats: &PingStats) -> Duration {
    stats
        .missing
        .iter()
        .map(|(first, last)| INTERVAL * (last - first + 1))
        .max()
        .unwrap_or_default()
}

fn ping(from: &Container, to: &Container) -> Result<Pinging> {
    from.reach(to.address(), TIMEOUT)?;
    Pinging::start(from.netns(), to.address(), None, INTERVAL)
}

#[test]
fn nodes_without_a_direct_path_talk_through_a_relay_that_cannot_read() -> Result<()> {
    in_lab(Lab::new("chain").hosts(3), |lab| {
        let [one, two, three] = [1, 2, 3].map(|number| lab.host(number));
        lab.cut(one, three)?;
        for host in lab.hosts() {
            launch(lab, host)?;
        }
        wait_for_sessions(lab)?;
        wait_for_path(one, 3, &via(2))?;
        wait_for_path(three, 1, &via(2))?;
        wait_for_path(one, 2, &json!("direct"))?;
        let containers = one_each(lab)?;
        let capture = two.capture()?;
        let before = counter(two, "relayed")?;
        containers[0].reach(containers[2].address(), TIMEOUT)?;
        let received =
            lab::flow::tcp(&containers[0], &containers[2], lab::flow::Amount::Bytes(3_000_000))?;
        ensure!(received.bytes == 3_000_000, "{received:?}");
        let captured = capture.stop()?;
        ensure_nothing_plain(&captured)?;
        let relayed = captured.count(|packet| packet.is_relayed())?;
        ensure!(relayed > 1000, "only {relayed} relayed messages were captured");
        ensure!(counter(two, "relayed")? > before + 500, "node 2 does not count relayed messages");
        // Node 2 opens only messages for its own container, and there were none.
        ensure!(counter(two, "opened")? == 0, "node 2 opened a message");
        let sessions = two.inspect()?["data"]["peers"].clone();
        for of in sessions.as_array().context("no list of peers")? {
            ensure!(of["peer"] == 1 || of["peer"] == 3, "{of}");
        }
        Ok(())
    })
}

#[test]
fn a_path_that_fails_in_one_direction_is_replaced_and_reused_once_healed() -> Result<()> {
    in_lab(Lab::new("oneway").hosts(3), |lab| {
        let [one, three] = [1, 3].map(|number| lab.host(number));
        launch_all(lab)?;
        wait_for_path(one, 3, &json!("direct"))?;
        let containers = one_each(lab)?;
        let pings = ping(&containers[0], &containers[2])?;
        lab.cut_one_way(one, three)?;
        let cut = Instant::now();
        wait_for_path(one, 3, &via(2))?;
        wait_for_path(three, 1, &via(2))?;
        ensure!(cut.elapsed() < REPLACED + Duration::from_secs(1), "it took {:?}", cut.elapsed());
        lab.heal(one, three)?;
        wait_for_path(one, 3, &json!("direct"))?;
        wait_for_path(three, 1, &json!("direct"))?;
        let stats = pings.stop()?;
        let gap = longest_gap(&stats);
        ensure!(gap < REPLACED, "no reply for {gap:?}: {:?}", stats.missing);
        Ok(())
    })
}

#[test]
fn a_dead_relay_is_replaced_and_losing_the_last_one_is_reported() -> Result<()> {
    in_lab(Lab::new("relays").hosts(4), |lab| {
        let [one, three] = [1, 3].map(|number| lab.host(number));
        launch_all(lab)?;
        let containers = one_each(lab)?;
        lab.cut(one, three)?;
        eventually(TIMEOUT, || {
            let path = route(one, 3)?["path"].clone();
            ensure!(path == via(2) || path == via(4), "{path}");
            Ok(())
        })?;
        let relay = if route(one, 3)?["path"] == via(2) { 2 } else { 4 };
        let other = 6 - relay;
        let pings = ping(&containers[0], &containers[2])?;
        lab.unplug(lab.host(relay))?;
        wait_for_path(one, 3, &via(other))?;
        wait_for_path(three, 1, &via(other))?;
        let gap = longest_gap(&pings.stop()?);
        ensure!(gap < REPLACED, "no reply for {gap:?}");
        let dies = Instant::now();
        lab.unplug(lab.host(other))?;
        wait_for_path(one, 3, &Value::Null)?;
        ensure!(dies.elapsed() < REPLACED + Duration::from_secs(1), "it took {:?}", dies.elapsed());
        Ok(())
    })
}

/// The ends of a chain: the ID of each, and the ID of the other end.
const ENDS: [(usize, usize); 2] = [(1, 3), (3, 1)];

/// Launches three nodes, of which the first and the last reach each other only through the second.
/// Returns a container on each of these two.
fn chain(lab: &Lab) -> Result<[Container; 2]> {
    lab.cut(lab.host(1), lab.host(3))?;
    for host in lab.hosts() {
        launch(lab, host)?;
    }
    for (end, other) in ENDS {
        wait_for_path(lab.host(end), other, &via(2))?;
    }
    let containers = [attached(lab.host(1), "one")?, attached(lab.host(3), "three")?];
    containers[0].reach(containers[1].address(), TIMEOUT)?;
    Ok(containers)
}

/// Waits until the status of a host reports the node as reachable or not, in JSON and in the table.
fn wait_until_reported(host: &Host, node: usize, reachable: bool) -> Result<()> {
    eventually(TIMEOUT, || {
        let peer = peer(host, node)?
            .with_context(|| format!("{} does not know node {node}", host.name))?;
        ensure!(peer["reachable"] == reachable, "{} reports {peer}", host.name);
        let table = host.overnode(&["status", "--peers"])?.success()?;
        let name = format!("{node}(host{node})");
        let row = table.lines().find(|line| line.starts_with(&name)).context("no row")?;
        ensure!(row.contains("unreachable") != reachable, "{} shows {row}", host.name);
        Ok(())
    })
}

#[test]
fn when_the_only_relay_dies_both_ends_report_each_other_unreachable() -> Result<()> {
    in_lab(Lab::new("bridge").hosts(3), |lab| {
        let containers = chain(lab)?;
        lab.unplug(lab.host(2))?;
        let dies = Instant::now();
        for (end, other) in ENDS {
            for gone in [2, other] {
                wait_until_reported(lab.host(end), gone, false)?;
            }
        }
        ensure!(dies.elapsed() < REPLACED + Duration::from_secs(1), "it took {:?}", dies.elapsed());
        ensure!(
            containers[0].ping(containers[1].address(), 10, INTERVAL)?.received == 0,
            "a ping passed without a path"
        );
        lab.plug(lab.host(2))?;
        for (end, other) in ENDS {
            wait_until_reported(lab.host(end), other, true)?;
        }
        containers[0].reach(containers[1].address(), TIMEOUT)
    })
}

/// Invariant L1 for nodes that reach each other through a relay.
#[test]
fn dead_daemons_on_the_only_path_are_reported_but_packets_pass() -> Result<()> {
    in_lab(Lab::new("passes").hosts(3), |lab| {
        let containers = chain(lab)?;
        // Relays are trusted only after they have served for a while.
        std::thread::sleep(Duration::from_secs(6));
        let pings = ping(&containers[0], &containers[1])?;
        for (dies, witnesses) in
            [(2, &[(1, 2), (1, 3), (3, 2), (3, 1)][..]), (3, &[(1, 3), (2, 3)])]
        {
            lab.host(dies).kill_daemon()?;
            let died = Instant::now();
            for (witness, gone) in witnesses {
                wait_until_reported(lab.host(*witness), *gone, false)?;
            }
            ensure!(
                died.elapsed() < REPLACED + Duration::from_secs(1),
                "it took {:?}",
                died.elapsed()
            );
            // Wait longer than probes need.
            std::thread::sleep(REPLACED.saturating_sub(died.elapsed()));
            lab.host(dies).overnode(&["resume"])?.success()?;
            for (end, other) in ENDS {
                wait_for_path(lab.host(end), other, &via(2))?;
                wait_until_reported(lab.host(end), other, true)?;
            }
            std::thread::sleep(Duration::from_secs(6));
        }
        let stats = pings.stop()?;
        // The last ping may still be in flight.
        ensure!(
            stats.received > 500 && stats.lost() <= 1,
            "{} pings were lost: {:?}",
            stats.lost(),
            stats.missing
        );
        Ok(())
    })
}
