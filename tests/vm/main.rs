//! Tests that `cargo xtask vm` runs inside a virtual machine with the oldest supported kernel: real
//! daemons on two hosts, and the kernel's own WireGuard as a peer.
//!
//! The machine is emulated in software and ten to fifty times slower than the real one. The tests
//! prove that packets arrive, not how fast.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

mod cluster;
mod wireguard;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use lab::{Container, Host, Lab, flow};

const TOKEN: &str = "virtual-machine";
/// Time limit for everything that waits for no timer, in an emulated machine.
const TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let part = std::env::args().nth(1).unwrap_or_default();
    let outcome = match part.as_str() {
        "cluster" => cluster::run(),
        "wireguard" => wireguard::run(),
        "rekey" => wireguard::rekey(),
        _ => Err(anyhow!("name one test: cluster, wireguard or rekey")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds a lab and runs `story` in it. Appends the last lines of the daemons' logs to an error.
fn in_lab(builder: lab::Builder, story: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    const LINES: usize = 25;
    let lab = builder.build()?;
    story(&lab).map_err(|error| {
        let mut text = format!("{error:#}");
        for host in lab.hosts() {
            let log = host.log();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(LINES)..].join("\n");
            text += &format!("\n--- log of {}:\n{end}", host.name);
        }
        anyhow!("{text}")
    })
}

/// Does a step of a test and prints that it worked.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    println!("  {what}: ok ({:.1} s)", started.elapsed().as_secs_f32());
    Ok(done)
}

/// Pings in both directions between two containers, without a loss.
fn pings_both_ways(one: &Container, other: &Container) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        let pings = from.ping(to.address(), 100, Duration::from_millis(10))?;
        ensure!(
            pings.lost() == 0 && pings.duplicates == 0,
            "{} to {}: {pings:?}",
            from.name,
            to.name
        );
    }
    Ok(())
}

/// Sends datagrams that must all arrive unchanged: short ones, one that needs padding, and the
/// longest.
fn datagrams(from: &Container, to: &Container) -> Result<()> {
    const COUNT: u64 = 50;
    for size in [16, 17, 600, 1392] {
        let found = flow::udp(from, to, COUNT, size, Duration::from_millis(10))?;
        ensure!(
            found.received == COUNT && found.corrupt == 0,
            "{size} bytes to {}: {found:?}",
            to.name
        );
    }
    Ok(())
}

/// Fails if the node's programs dropped a packet for one of these reasons.
fn ensure_no(host: &Host, reasons: &[&str]) -> Result<()> {
    let status = host.status()?;
    let counters = status["counters"].as_array().context("no counters")?;
    for counter in counters {
        let reason = counter["reason"].as_str().unwrap_or_default();
        ensure!(!reasons.contains(&reason) || counter["count"] == 0, "{}: {counters:?}", host.name);
    }
    Ok(())
}
