//! Project tasks as typed commands: `cargo xtask --help`.
//!
//! Each command first checks for the tools that it needs (see [`setup`]). It prints each step and
//! how long the step took.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is a program for a terminal")]

mod deny;
mod dist;
mod fuzz;
mod policy;
mod setup;
mod step;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use setup::Purpose;
use step::Step;
use workspace::Workspace;

/// Project tasks of overnode.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check for the compiler, linker and programs that the other commands need. Installs missing
    /// ones if run as root on Debian.
    Setup,
    /// Build the release binaries: target/release/overnode and target/release/overnoded.
    Build,
    /// Build the Debian package and the archive of static programs, with checksums.
    Dist(dist::Arguments),
    /// Check the formatting and the dependencies, run clippy and all tests. Needs root.
    Test(test::Arguments),
    /// Demonstrate a cluster of three hosts in network namespaces on this machine. Needs root.
    Demo,
    /// Run the eBPF programs and the nodes in QEMU on Linux 6.1, the oldest supported kernel. Takes
    /// minutes.
    Vm(vm::Arguments),
    /// Fuzz the decoders, guided by coverage. Runs each target for a minute, or for `--seconds`.
    Fuzz(fuzz::Arguments),
    /// Measure performance, side by side with other networks. Needs root.
    Bench(Bench),
    /// Attack gossip and address allocation in simulated clusters: `--seeds N --nodes M`,
    /// `--seed S`, `--scale`.
    Sim(Sim),
}

#[derive(Debug, clap::Args)]
struct Sim {
    /// Options of the simulation; see `cargo xtask sim -- --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Bench {
    /// The benchmark and its options: `datapath [--json FILE]`, see
    /// `cargo xtask bench datapath --help`; `stress [--bytes COUNT]`, which verifies streams of
    /// every kind; or `docker [CONTAINERS]` or `podman [CONTAINERS]`, which measure how long a
    /// container takes to start on each of two hosts.
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
            let mut cargo = Workspace::find()?.cargo();
            cargo.args(["run", "--release", "--locked", "--package", "overnode-sim", "--"]);
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
                        "many_podman_containers_come_and_go_on_both_hosts",
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
            // Cargo changes the working directory. File names in the options are relative to the
            // current one.
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
