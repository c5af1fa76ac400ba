//! `cargo xtask sim`: attacks gossip and address allocation in simulated clusters, or measures
//! them.

use std::process::ExitCode;

use clap::Parser;
use overnode_sim::{run, scale};

/// Attack the address allocation.
#[derive(Debug, Parser)]
struct Arguments {
    /// Number of runs.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// First seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Run only this seed and print everything that happens.
    #[arg(long)]
    seed: Option<u64>,
    /// Number of nodes in each run.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(4..=200))]
    nodes: u16,
    /// Measure instead how clusters of 10, 100 and 1000 nodes converge, and what they cost.
    #[arg(long)]
    scale: bool,
    /// With --scale: measure only clusters of this size.
    #[arg(long, requires = "scale")]
    size: Option<u16>,
    /// With --scale: connect every node with every other one, whatever the size.
    #[arg(long, requires = "scale")]
    full_mesh: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.scale {
        let sizes = arguments.size.map_or_else(|| vec![10, 100, 1000], |size| vec![size]);
        return if scale::table(&sizes, arguments.full_mesh) {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let outcome = match arguments.seed {
        Some(seed) => run::replay(seed, arguments.nodes),
        None => run::many(arguments.first..arguments.first + arguments.seeds, arguments.nodes),
    };
    if outcome { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
