//! A load test with many containers at once.

use anyhow::{Context, Result, ensure};
use lab::docker::{Engine, IMAGE};
use lab::parallel::{both, each, milliseconds_each};

use crate::support::{TIMEOUT, nothing_left, with_engines};

/// Number of containers on each host, unless the environment sets another:
/// `cargo xtask bench docker` uses 200.
const CONTAINERS: usize = 12;
/// Number of clients that use one engine at the same time.
const CLIENTS: usize = 8;

#[test]
fn many_containers_come_and_go_on_both_hosts() -> Result<()> {
    let count = match std::env::var("OVERNODE_DOCKER_CONTAINERS") {
        Ok(text) => text.parse().context("OVERNODE_DOCKER_CONTAINERS is not a number")?,
        Err(_) => CONTAINERS,
    };
    with_engines("docker-many", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let without = both(one, two, |engine| start(engine, "bridge", count))?;
        both(one, two, |engine| remove(engine, count))?;
        let with = both(one, two, |engine| start(engine, "overnode", count))?;
        let last = format!("c{}", count - 1);
        one.reach("c0", &two.address(&last)?, TIMEOUT)?;
        two.reach("c0", &one.address(&last)?, TIMEOUT)?;
        let mut addresses = Vec::new();
        for host in lab.hosts() {
            let listed = crate::support::endpoints(host)?;
            ensure!(listed.len() == count, "{} lists {} containers", host.name, listed.len());
            addresses.extend(listed.iter().map(|it| it["address"].to_string()));
        }
        addresses.sort();
        addresses.dedup();
        ensure!(addresses.len() == 2 * count, "some addresses were given twice");
        let removed = both(one, two, |engine| remove(engine, count))?;
        lab.hosts().iter().try_for_each(nothing_left)?;
        for (host, ((without, with), removed)) in
            lab.hosts().iter().zip(without.iter().zip(with).zip(removed))
        {
            println!(
                "{}: {count} containers, {CLIENTS} at a time: {:.0} ms each on Docker's bridge, \
                 {:.0} ms on overnode; removed in {:.0} ms each",
                host.name,
                milliseconds_each(*without, count),
                milliseconds_each(with, count),
                milliseconds_each(removed, count),
            );
        }
        Ok(())
    })
}

fn start(engine: &Engine<'_>, network: &str, count: usize) -> Result<()> {
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
        engine.docker(&words)?.success().map(drop)
    })
}

fn remove(engine: &Engine<'_>, count: usize) -> Result<()> {
    each(count, CLIENTS, |number| {
        engine.docker(&["rm", "--force", &format!("c{number}")])?.success().map(drop)
    })
}
