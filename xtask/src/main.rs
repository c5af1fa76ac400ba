//! Every chore of the project as a typed command: `cargo xtask --help`.
//!
//! Each command first makes sure of what it needs (see [`setup`]) and says what it does and how
//! long that took.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

mod deny;
mod dist;
mod fuzz;
mod setup;
mod step;
mod test;
#[expect(dead_code, reason = "the build of the programs uses more of it")]
mod toolchain;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use setup::Purpose;
use step::Step;
use workspace::Workspace;

/// Chores of overnode.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make sure of all that the other commands need: compiler, linker, programs. Installs it when
    /// root on Debian.
    Setup,
    /// Build the release binaries: target/release/overnode and target/release/overnoded.
    Build,
    /// Make the Debian package and the archive of static programs, with checksums.
    Dist(dist::Arguments),
    /// Check the formatting and the dependencies, run clippy and every test. Needs root.
    Test(test::Arguments),
    /// Show a cluster of three hosts at work, in network namespaces of this machine. Needs root.
    Demo,
    /// Run the programs and the nodes on Linux 6.1, the oldest kernel promised, in QEMU. Takes
    /// minutes.
    Vm(vm::Arguments),
    /// Give the decoders what nobody would think of, guided by what it reaches. A minute each, or
    /// `--seconds`.
    Fuzz(fuzz::Arguments),
    /// Measure, beside rivals. Needs root.
    Bench(Bench),
    /// Attack gossip and the allocation of addresses in simulated clusters: `--seeds N --nodes M`,
    /// `--seed S`, `--scale`.
    Sim(Sim),
}

#[derive(Debug, clap::Args)]
struct Sim {
    /// Options of the simulation: see `cargo xtask sim -- --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Bench {
    /// What to measure, with its options: `datapath [--json FILE]`, see
    /// `cargo xtask bench datapath --help`; `stress [--bytes COUNT]`, streams of every kind,
    /// verified; or `docker [CONTAINERS]` or `podman [CONTAINERS]`, the time that a container takes
    /// to start, on each of two hosts.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "WHAT"
    )]
    what: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup => {
            setup::run(Purpose::Bench)?;
            println!("everything is in place");
            Ok(())
        }
        Command::Build => {
            setup::run(Purpose::Build)?;
            let workspace = Workspace::find()?;
            build_release(&workspace, &[])?;
            let folder = workspace.target.join("release");
            println!("{0}/overnode\n{0}/overnoded", folder.display());
            Ok(())
        }
        Command::Dist(arguments) => dist::run(&arguments),
        Command::Test(arguments) => {
            setup::run(Purpose::Test)?;
            test::run(&Workspace::find()?, &arguments)
        }
        Command::Demo => {
            setup::run(Purpose::Lab)?;
            let workspace = Workspace::find()?;
            build_release(&workspace, &["--package", "overnode-tests"])?;
            let folder = workspace.target.join("release");
            step::show(
                std::process::Command::new(folder.join("demo")).env("OVERNODE_BIN_DIR", &folder),
            )
        }
        Command::Vm(arguments) => vm::run(&arguments),
        Command::Sim(sim) => {
            setup::run(Purpose::Build)?;
            let mut cargo = Workspace::find()?.cargo();
            cargo.args([
                "bench",
                "--locked",
                "--package",
                "overnode-tests",
                "--bench",
                "sim",
                "--",
            ]);
            step::show(cargo.args(sim.options))
        }
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Bench(bench) => {
            setup::run(Purpose::Bench)?;
            let workspace = Workspace::find()?;
            build_release(&workspace, &[])?;
            if let Some((what @ ("docker" | "podman"), options)) =
                bench.what.split_first().map(|(what, rest)| (what.as_str(), rest))
            {
                let (test, name, count) = match what {
                    "docker" => (
                        "docker",
                        "many_containers_come_and_go_on_both_hosts",
                        "OVERNODE_DOCKER_CONTAINERS",
                    ),
                    _ => (
                        "cni",
                        "many_containers_of_podman_come_and_go_on_both_hosts",
                        "OVERNODE_PODMAN_CONTAINERS",
                    ),
                };
                let mut cargo = workspace.cargo();
                cargo.args([
                    "test",
                    "--locked",
                    "--package",
                    "overnode-tests",
                    "--test",
                    test,
                    "--",
                ]);
                cargo.args(["--exact", &format!("load::{name}"), "--nocapture"]);
                cargo.env("OVERNODE_BIN_DIR", workspace.target.join("release"));
                cargo.env(count, options.first().map_or("200", String::as_str));
                return step::show(&mut cargo);
            }
            let mut cargo = workspace.cargo();
            cargo.args([
                "bench",
                "--locked",
                "--package",
                "overnode-tests",
                "--bench",
                "datapath",
                "--",
            ]);
            cargo.args(bench.what).env("OVERNODE_BIN_DIR", workspace.target.join("release"));
            // Cargo changes the folder; file names given here are meant from this one.
            step::show(cargo.env("OVERNODE_BENCH_FOLDER", std::env::current_dir()?))
        }
    }
}

fn build_release(workspace: &Workspace, more: &[&str]) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args([
        "build",
        "--release",
        "--locked",
        "--package",
        "overnode-cli",
        "--package",
        "overnode-daemon",
    ]);
    Step::start("build the release binaries").show(cargo.args(more).arg("--bins"))
}
