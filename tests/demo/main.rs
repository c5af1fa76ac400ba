//! `cargo xtask demo`: a cluster of three hosts at work, each claim checked while one watches.

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
                "\nAll of it held. {:.1} s in all; nothing is left on this machine.",
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

/// The ends of the daemons' logs: without them, a failure cannot be understood.
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
