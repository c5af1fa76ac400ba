//! Benchmarks behind `cargo xtask bench`.
//!
//! `cargo xtask bench datapath` measures what sealing and opening cost in the kernel, and what
//! containers on two hosts get through overnode and through other tunnels in the same run. All
//! networks are set up first. Then they are measured one after the other, round by round, so that a
//! slow minute of the machine affects all of them. The report prints the median of the rounds.
//!
//! `cargo xtask bench stress` is in [`stress`].

#![allow(clippy::print_stdout, reason = "the program prints tables")]
#![allow(clippy::print_stderr, reason = "the program reports progress on stderr")]

mod measure;
mod network;
mod probe;
mod programs;
mod report;
mod stress;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use measure::{Loaded, Round, Times};
use network::{Kind, Network};
use report::{Beside, Outcome, Report};

/// Measures overnode and other networks. Needs root.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Accepted because cargo adds it.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure the programs alone, then traffic between containers on two hosts.
    Datapath(Datapath),
    /// Verify every byte of many kinds of streams over many kinds of underlays, and count what is
    /// retransmitted and why.
    Stress(stress::Stress),
}

#[derive(Debug, Parser)]
struct Datapath {
    /// Also write all measurements to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run one short round, which shows that everything works but not how fast it is.
    #[arg(long)]
    quick: bool,
    /// Number of times that each network is measured.
    #[arg(long, value_name = "COUNT", default_value_t = 3, conflicts_with = "quick")]
    rounds: u32,
    /// Measure only these networks.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<Kind>,
    /// Measure only the programs, no networks.
    #[arg(long, conflicts_with = "only")]
    programs_only: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Datapath(arguments) => datapath(arguments),
        Command::Stress(arguments) => root().and_then(|()| stress::run(&arguments)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark creates network namespaces and loads programs: run it as root"
    );
    Ok(())
}

fn datapath(arguments: Datapath) -> Result<()> {
    root()?;
    let start = Instant::now();
    let (rounds, times) =
        if arguments.quick { (1, Times::QUICK) } else { (arguments.rounds.max(1), Times::FULL) };
    let kinds = match (arguments.programs_only, arguments.only) {
        (true, _) => Vec::new(),
        (false, only) if only.is_empty() => Kind::ALL.to_vec(),
        (false, only) => only,
    };

    eprintln!("programs: running each with packets of {:?} bytes", programs::SIZES);
    let programs = programs::measure(if arguments.quick { 200 } else { 5000 });
    if let Err(error) = &programs {
        eprintln!("programs: {error:#}");
    }
    let mut networks = set_up(&kinds);
    measure_networks(&mut networks, rounds, times);
    let beside = measure_beside(&networks, times).map_err(|error| format!("{error:#}"));

    let report = Report {
        programs: programs.map_err(|error| format!("{error:#}")),
        networks: networks.into_iter().map(Measured::outcome).collect(),
        beside,
        rounds,
        took: start.elapsed(),
    };
    print!("{report}");
    if let Some(file) = arguments.json {
        let folder =
            std::env::var_os("OVERNODE_BENCH_FOLDER").map(PathBuf::from).unwrap_or_default();
        let file = folder.join(file);
        let text = serde_json::to_string_pretty(&report.to_json())?;
        std::fs::write(&file, text + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(report.is_complete(), "some measurements failed: see the reasons above");
    Ok(())
}

/// A network, or the reason why it could not be set up, and the results of its rounds.
struct Measured {
    kind: Kind,
    network: Result<Network>,
    rounds: Vec<Round>,
}

impl Measured {
    fn outcome(self) -> Outcome {
        let result = self.network.map(|_| self.rounds).map_err(|error| format!("{error:#}"));
        Outcome { kind: self.kind, result }
    }
}

fn set_up(kinds: &[Kind]) -> Vec<Measured> {
    let set_up = |&kind: &Kind| {
        eprintln!("setting up {kind}");
        Measured { kind, network: Network::set_up(kind), rounds: Vec::new() }
    };
    kinds.iter().map(set_up).collect()
}

fn measure_networks(networks: &mut [Measured], rounds: u32, times: Times) {
    let total = times.of_a_round() * rounds * u32::try_from(networks.len()).unwrap_or(u32::MAX);
    eprintln!("measuring for about {}", report::spoken(total));
    for round in 1..=rounds {
        for Measured { kind, network, rounds: results } in &mut *networks {
            let Ok(ready) = network else { continue };
            eprintln!("round {round} of {rounds}: {kind}");
            match measure::round(ready, times) {
                Ok(result) => results.push(result),
                Err(error) => *network = Err(error),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Measures pings next to a flow, without workers and with them, one right after the other, because
/// this machine varies more between rounds than the two cases differ. Returns an empty list unless
/// both networks were set up.
fn measure_beside(networks: &[Measured], times: Times) -> Result<Vec<Beside>> {
    let find = |kind| {
        let found = networks.iter().find(|measured: &&Measured| measured.kind == kind)?;
        found.network.as_ref().ok()
    };
    let (Some(without), Some(with)) = (find(Kind::OvernodeOff), find(Kind::Overnode)) else {
        return Ok(Vec::new());
    };
    let vxlan = find(Kind::Vxlan);
    let total = times.of_a_flow() * times.turns * if vxlan.is_some() { 4 } else { 3 };
    eprintln!("pinging next to a flow, in turn, for about {}", report::spoken(total));
    (0..times.turns)
        .map(|_| {
            let measure = |network: &Network, limit| -> Result<Loaded> {
                measure::beside_a_flow(network, times, limit)
            };
            let without = measure(without, None)?;
            Ok(Beside {
                without,
                paced: measure(with, Some(without.rate))?,
                with: measure(with, None)?,
                vxlan: vxlan.map(|network| measure(network, None)).transpose()?,
            })
        })
        .collect()
}
