//! Many containers at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::docker::{Engine, IMAGE};

use crate::support::{PATIENCE, nothing_left, with_engines};

/// How many on each host, unless the environment says otherwise: `cargo xtask bench docker` takes 200.
const CONTAINERS: usize = 12;
/// Clients of one engine at the same time.
const CLIENTS: usize = 8;

#[test]
fn many_containers_come_and_go_on_both_hosts() -> Result<()> {
    let count = match std::env::var("OVERNODE_DOCKER_CONTAINERS") {
        Ok(text) => text.parse().context("OVERNODE_DOCKER_CONTAINERS is no number")?,
        Err(_) => CONTAINERS,
    };
    with_engines("docker-many", 2, |lab, engines| {
        let [one, two] = engines else { unreachable!() };
        let without = both(one, two, |engine| start(engine, "bridge", count))?;
        both(one, two, |engine| remove(engine, count))?;
        let with = both(one, two, |engine| start(engine, "overnode", count))?;
        let last = format!("c{}", count - 1);
        one.reach("c0", &two.address(&last)?, PATIENCE)?;
        two.reach("c0", &one.address(&last)?, PATIENCE)?;
        let mut addresses = Vec::new();
        for host in lab.hosts() {
            let listed = crate::support::endpoints(host)?;
            ensure!(listed.len() == count, "{} lists {} containers", host.name, listed.len());
            addresses.extend(listed.iter().map(|it| it["address"].to_string()));
        }
        addresses.sort();
        addresses.dedup();
        ensure!(addresses.len() == 2 * count, "addresses were given twice");
        let removed = both(one, two, |engine| remove(engine, count))?;
        lab.hosts().iter().try_for_each(nothing_left)?;
        for (host, ((without, with), removed)) in
            lab.hosts().iter().zip(without.iter().zip(with).zip(removed))
        {
            println!(
                "{}: {count} containers, {CLIENTS} at a time: {:.0} ms each on Docker's bridge, {:.0} ms on overnode; removed in {:.0} ms each",
                host.name,
                per_container(*without, count),
                per_container(with, count),
                per_container(removed, count),
            );
        }
        Ok(())
    })
}

fn per_container(took: Duration, count: usize) -> f64 {
    took.as_secs_f64() * 1000.0 / count as f64
}

/// The same on both hosts at the same time; how long each took.
fn both(
    one: &Engine<'_>,
    two: &Engine<'_>,
    work: impl Fn(&Engine<'_>) -> Result<()> + Sync,
) -> Result<[Duration; 2]> {
    let timed = |engine: &Engine<'_>| -> Result<Duration> {
        let started = Instant::now();
        work(engine)?;
        Ok(started.elapsed())
    };
    std::thread::scope(|scope| {
        let there = scope.spawn(|| timed(two));
        let here = timed(one);
        Ok([here?, there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?])
    })
}

fn start(engine: &Engine<'_>, network: &str, count: usize) -> Result<()> {
    each(count, |number| {
        let name = format!("c{number}");
        let words = ["run", "--detach", "--network", network, "--name", &name, IMAGE, "/bin/sleep", "100000"];
        engine.docker(&words)?.success().map(drop)
    })
}

fn remove(engine: &Engine<'_>, count: usize) -> Result<()> {
    each(count, |number| engine.docker(&["rm", "--force", &format!("c{number}")])?.success().map(drop))
}

/// A few at a time.
fn each(count: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let work = &work;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| scope.spawn(move || (client..count).step_by(CLIENTS).try_for_each(work)))
            .collect();
        for client in clients {
            client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })
}
