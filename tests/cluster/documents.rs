//! Runs the examples of the manual word for word, and checks what it says about them.

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, eventually};
use serde_json::Value;

use crate::support::{TIMEOUT, all_reach_all, attached, in_lab, list, targets, wait_for_sessions};

const FIRST_FOUR: &str = "
host1 > sudo overnode launch --id 1 --token my-cluster-password host1 host2 host3 host4
host2 > sudo overnode launch --id 2 --token my-cluster-password host1 host2 host3 host4
host3 > sudo overnode launch --id 3 --token my-cluster-password host1 host2 host3 host4
host4 > sudo overnode launch --id 4 --token my-cluster-password host1 host2 host3 host4";

const FIFTH: &str = "
# add as many more nodes as needed
host5 > sudo overnode launch --id 5 --token my-cluster-password host1 host2 host3 host4";

const ALONE: &str = "
host1 > sudo overnode launch --id 1 --token my-cluster-password host1";

const SECOND: &str = "
host1 > sudo overnode connect host2
host2 > sudo overnode launch --id 2 --token my-cluster-password host1 host2";

const THIRD: &str = "
host1 > sudo overnode connect host3
host2 > sudo overnode connect host3
host3 > sudo overnode launch --id 3 --token my-cluster-password host1 host2 host3";

const REMOVED: &str = "
host3 > sudo overnode reset

host1 > sudo overnode forget host3
host2 > sudo overnode forget host3";

/// Runs the commands of an example on the hosts that it names. Each must succeed. `sudo` is left
/// out, because the tests run as root.
fn follow(lab: &Lab, text: &str) -> Result<()> {
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (host, command) =
            line.split_once(" > sudo overnode ").with_context(|| line.to_owned())?;
        let host =
            lab.hosts().iter().find(|it| it.name == host).with_context(|| line.to_owned())?;
        host.overnode(&command.split(' ').collect::<Vec<_>>())?.success()?;
    }
    Ok(())
}

/// Checks that each host in the list is a node with a connection to, a session with and a direct
/// path to every other one, and that it knows no further nodes.
fn are_all_connected(hosts: &[Host]) -> Result<()> {
    for host in hosts {
        eventually(TIMEOUT, || {
            let status = host.status()?;
            let of = |it: &Value, name: &str| it[name].as_u64().unwrap_or_default() as usize;
            let mut connected: Vec<usize> = list(&status, "connections")?
                .iter()
                .filter(|it| it["state"] == "established")
                .map(|it| of(it, "peer"))
                .collect();
            connected.sort_unstable();
            let others: Vec<usize> =
                hosts.iter().map(|it| it.number).filter(|it| *it != host.number).collect();
            ensure!(
                connected == others,
                "{} is connected to {connected:?} instead of {others:?}",
                host.name
            );
            let peers = list(&status, "peers")?;
            ensure!(peers.len() == hosts.len(), "{} knows {} nodes", host.name, peers.len());
            for peer in peers.iter().filter(|peer| peer["myself"] == false) {
                let is_direct = peer["reachable"] == true
                    && peer["path"] == "direct"
                    && peer["data"]["route"]["path"] == "direct"
                    && peer["data"]["session"] == "established";
                ensure!(is_direct, "{} has no direct path to {peer}", host.name);
            }
            let problems = &status["node"]["problems"];
            ensure!(problems.as_array().is_some_and(Vec::is_empty), "{}: {problems}", host.name);
            Ok(())
        })?;
    }
    Ok(())
}

/// Returns the row of a table that starts with these words.
fn row<'a>(table: &'a str, words: &[&str]) -> Option<Vec<&'a str>> {
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|row| row.len() >= words.len() && row[..words.len()] == *words)
}

/// Checks that `overnode status --…` on a host names all nodes, as in "Inspecting cluster nodes".
fn status_shows_all(host: &Host, hosts: &[Host], targets: &[&str]) -> Result<()> {
    let status = |section: &str| host.overnode(&["status", section])?.success();
    let name = |it: &Host| format!("{}({})", it.number, it.name);
    let table = status("--targets")?;
    let rows = table.lines().filter(|line| line.trim_start().starts_with("host")).count();
    ensure!(rows == targets.len(), "{} has unexpected targets:\n{table}", host.name);
    for target in targets {
        let state: &[&str] =
            if *target == host.name { &["this", "node"] } else { &["established"] };
        ensure!(
            row(&table, &[&[*target], state].concat()).is_some(),
            "{target} is not {state:?}:\n{table}"
        );
    }
    let table = status("--peers")?;
    for other in hosts {
        let row =
            row(&table, &[&name(other)]).with_context(|| format!("no {}:\n{table}", other.name))?;
        let said = row.join(" ");
        let wanted = if other.number == host.number { "this node" } else { "direct" };
        ensure!(said.contains(wanted) && !said.contains("unreachable"), "not {wanted:?}: {said}");
    }
    let table = status("--connections")?;
    for other in hosts.iter().filter(|other| other.number != host.number) {
        let line = table.lines().find(|line| line.contains(&name(other)));
        let line = line.with_context(|| format!("no {}:\n{table}", other.name))?;
        ensure!(
            line.contains("established") && (line.contains("->") || line.contains("<-")),
            "{line}"
        );
    }
    let table = status("--ipam")?;
    ensure!(table.contains("this node can give out addresses"), "{table}");
    for other in hosts {
        let line = table.lines().find(|line| line.contains(&name(other)));
        let line = line.with_context(|| format!("{} has no addresses:\n{table}", other.name))?;
        ensure!(line.contains("reachable") && !line.contains("unreachable"), "{line}");
    }
    Ok(())
}

/// Runs the "Related commands" on a healthy cluster.
fn related_commands_work(host: &Host) -> Result<()> {
    host.overnode(&["prime"])?.success()?;
    let said = host.overnode(&["resume"])?.success()?;
    ensure!(said.contains("running"), "{said}");
    ensure!(host.inspect()?["status"]["node"]["id"] == host.number);
    Ok(())
}

#[test]
fn four_nodes_are_launched_and_a_fifth_is_added() -> Result<()> {
    in_lab(Lab::new("example1").hosts(5), |lab| {
        let four = ["host1", "host2", "host3", "host4"];
        follow(lab, FIRST_FOUR)?;
        are_all_connected(&lab.hosts()[..4])?;
        let mut containers: Vec<_> =
            lab.hosts()[..4].iter().map(|host| attached(host, "a")).collect::<Result<_>>()?;
        all_reach_all(&containers)?;
        follow(lab, FIFTH)?;
        are_all_connected(lab.hosts())?;
        related_commands_work(lab.host(5))?;
        containers.push(attached(lab.host(5), "a")?);
        all_reach_all(&containers)?;
        for host in lab.hosts() {
            ensure!(targets(host)? == four, "{} has the targets {:?}", host.name, targets(host)?);
            eventually(TIMEOUT, || status_shows_all(host, lab.hosts(), &four))?;
        }
        Ok(())
    })
}

#[test]
fn one_node_grows_to_three_and_one_of_them_is_removed() -> Result<()> {
    in_lab(Lab::new("example2").hosts(3), |lab| {
        let hosts = lab.hosts();
        follow(lab, ALONE)?;
        are_all_connected(&hosts[..1])?;
        eventually(TIMEOUT, || status_shows_all(lab.host(1), &hosts[..1], &["host1"]))?;
        let first = attached(lab.host(1), "a")?;
        follow(lab, SECOND)?;
        are_all_connected(&hosts[..2])?;
        for host in &hosts[..2] {
            eventually(TIMEOUT, || status_shows_all(host, &hosts[..2], &["host1", "host2"]))?;
        }
        let second = attached(lab.host(2), "a")?;
        first.reach(second.address(), TIMEOUT)?;
        follow(lab, THIRD)?;
        are_all_connected(hosts)?;
        let third = attached(lab.host(3), "a")?;
        let all = ["host1", "host2", "host3"];
        for host in hosts {
            related_commands_work(host)?;
            eventually(TIMEOUT, || status_shows_all(host, hosts, &all))?;
        }
        let mut containers = vec![first, second, third];
        all_reach_all(&containers)?;

        let third = containers.pop().context("no third container")?;
        lab.host(3).detach(&third)?;
        follow(lab, REMOVED)?;
        ensure!(lab.host(3).remains()?.is_empty(), "{:?}", lab.host(3).remains()?);
        are_all_connected(&hosts[..2])?;
        for host in &hosts[..2] {
            ensure!(targets(host)? == ["host1", "host2"], "{:?}", targets(host)?);
            eventually(TIMEOUT, || status_shows_all(host, &hosts[..2], &["host1", "host2"]))?;
        }
        all_reach_all(&containers)?;
        // After the reset, the node can be launched again.
        follow(lab, THIRD)?;
        wait_for_sessions(lab)?;
        are_all_connected(hosts)?;
        drop((third, containers));
        for host in &hosts[..2] {
            ensure!(targets(host)? == all, "{:?}", targets(host)?);
        }
        all_reach_all(
            &lab.hosts().iter().map(|host| attached(host, "b")).collect::<Result<Vec<_>>>()?,
        )
    })
}
