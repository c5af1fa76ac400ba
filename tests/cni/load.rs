//! A load test with many podman containers at once.

use anyhow::{Context, Result, ensure};
use lab::parallel::{both, each, milliseconds_each};
use lab::podman::{IMAGE, Podman};

use crate::podman::{TIMEOUT, nothing_left, with_podmans};

/// Number of containers on each host, unless the environment sets another:
/// `cargo xtask bench podman` uses 200.
const CONTAINERS: usize = 8;
/// Number of commands that run on one host at the same time.
const CLIENTS: usize = 4;

#[test]
fn many_podman_containers_come_and_go_on_both_hosts() -> Result<()> {
    let count = match std::env::var("OVERNODE_PODMAN_CONTAINERS") {
        Ok(text) => text.parse().context("OVERNODE_PODMAN_CONTAINERS is not a number")?,
        Err(_) => CONTAINERS,
    };
    with_podmans("cni-many", |lab, one, two| {
        let without = both(one, two, |podman| start(podman, "other", count))?;
        both(one, two, |podman| remove(podman, count))?;
        let with = both(one, two, |podman| start(podman, "overnode", count))?;
        let last = format!("c{}", count - 1);
        one.reach("c0", &two.address(&last)?, TIMEOUT)?;
        two.reach("c0", &one.address(&last)?, TIMEOUT)?;
        let mut addresses = Vec::new();
        for host in lab.hosts() {
            let listed =
                host.status()?["endpoints"].as_array().context("no list of endpoints")?.clone();
            ensure!(listed.len() == count, "{} lists {} containers", host.name, listed.len());
            addresses.extend(listed.iter().map(|it| it["address"].to_string()));
        }
        addresses.sort();
        addresses.dedup();
        ensure!(addresses.len() == 2 * count, "some addresses were given twice");
        let removed = both(one, two, |podman| remove(podman, count))?;
        lab.hosts().iter().try_for_each(nothing_left)?;
        for (index, host) in lab.hosts().iter().enumerate() {
            println!(
                "{}: {count} containers, {CLIENTS} at a time: {:.0} ms each on podman's bridge, \
                 {:.0} ms with overnode chained after it; removed in {:.0} ms each",
                host.name,
                milliseconds_each(without[index], count),
                milliseconds_each(with[index], count),
                milliseconds_each(removed[index], count),
            );
        }
        Ok(())
    })
}

fn start(podman: &Podman<'_>, network: &str, count: usize) -> Result<()> {
    each(count, CLIENTS, |number| {
        let name = format!("c{number}");
        let words = [
            "run",
            "--detach",
            "--network",
            network,
            "--name",
            &name,
            IMAGE,
            "/bin/sleep",
            "100000",
        ];
        podman.run(&words)?.success().map(drop)
    })
}

fn remove(podman: &Podman<'_>, count: usize) -> Result<()> {
    each(count, CLIENTS, |number| {
        podman.run(&["rm", "--force", "--time", "0", &format!("c{number}")])?.success().map(drop)
    })
}
