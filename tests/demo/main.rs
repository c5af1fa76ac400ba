//! `cargo xtask demo`: demonstrates a cluster of three hosts and checks each claim.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

mod story;

use std::process::ExitCode;
use std::time::Instant;

use lab::{Family, Lab};

use story::Story;

fn main() -> ExitCode {
    let started = Instant::now();
    let outcome = Lab::new("demo").hosts(3).family(Family::V4).build().and_then(|lab| {
        let outcome = Story::new(&lab).and_then(Story::tell);
        if outcome.is_err() {
            show_logs(&lab);
        }
        outcome
    });
    match outcome {
        Ok(()) => {
            println!(
                "\nEvery claim held. {:.1} s in total; nothing is left on this machine.",
                started.elapsed().as_secs_f32()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!(
                "\nThe demo failed after {:.1} s: {error:#}",
                started.elapsed().as_secs_f32()
            );
            ExitCode::FAILURE
        }
    }
}

/// Prints the last lines of the daemons' logs, which explain a failure.
fn show_logs(lab: &Lab) {
    const LINES: usize = 15;
    for host in lab.hosts() {
        let log = host.log();
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("\nlog of {}:", host.name);
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            eprintln!("    {line}");
        }
    }
}
