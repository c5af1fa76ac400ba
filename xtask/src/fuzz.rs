//! `cargo xtask fuzz`: coverage-guided fuzzing of all decoders of data from the network or from
//! users.
//!
//! libFuzzer is built from source as a dependency of `tests/fuzz`, and the compiler's built-in pass
//! instruments the code. This requires neither a nightly compiler nor an installed fuzzer.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::setup::{self, Purpose};
use crate::step::{Step, describe};
use crate::workspace::Workspace;

/// The instrumentation that libFuzzer reads: edge counters, edge addresses and comparison operands.
const FLAGS: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// The target triple. Cargo gets it explicitly so that the flags above do not apply to build
/// scripts.
#[cfg(target_arch = "x86_64")]
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// The target triple, as above.
#[cfg(target_arch = "aarch64")]
const TRIPLE: &str = "aarch64-unknown-linux-gnu";

/// Options of the command.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    cargo xtask fuzz                          fuzz every target for a minute\n  \
    cargo xtask fuzz gossip --seconds 600     fuzz one target for ten minutes\n  \
    cargo xtask fuzz gossip --input FILE      run one input again, with a backtrace\n\n\
    A finding is written to tests/fuzz/regressions/TARGET: `cargo xtask test` fails until it is \
    fixed.")]
pub(crate) struct Arguments {
    /// Targets to fuzz [default: all, one after the other]
    #[arg(value_name = "TARGET", value_enum)]
    targets: Vec<Target>,
    /// Duration for each target, in seconds
    #[arg(
        long,
        value_name = "N",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    seconds: u64,
    /// Run this single input instead
    #[arg(long, value_name = "FILE", conflicts_with = "seconds", requires = "targets")]
    input: Option<PathBuf>,
}

/// The fuzz targets. They must match those in `tests/fuzz/bodies.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Messages and routed messages from neighbors that are members
    Gossip,
    /// WireGuard handshake messages, modified or forged
    Handshake,
    /// Frames, messages, hellos and verdicts of control connections
    Control,
    /// Messages of members to the address allocation
    Allocation,
    /// Requests to the daemon, and the names in them
    Api,
    /// Path state of a node that receives probes
    Path,
    /// Routed messages, probes, and the header of relayed messages
    Wire,
    /// Packets that the bulk path segments and coalesces
    Bulk,
    /// DNS queries from containers, and answers from upstream resolvers
    Dns,
    /// Requests and answers of a Docker engine
    Docker,
    /// Environment and standard input of the CNI plugin
    Cni,
    /// Records of dropped packets
    Monitor,
    /// Records and databases on disk
    Store,
}

impl Target {
    const ALL: [Self; 13] = [
        Self::Gossip,
        Self::Handshake,
        Self::Control,
        Self::Allocation,
        Self::Api,
        Self::Path,
        Self::Wire,
        Self::Bulk,
        Self::Dns,
        Self::Docker,
        Self::Cni,
        Self::Monitor,
        Self::Store,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Gossip => "gossip",
            Self::Handshake => "handshake",
            Self::Control => "control",
            Self::Allocation => "allocation",
            Self::Api => "api",
            Self::Path => "path",
            Self::Wire => "wire",
            Self::Bulk => "bulk",
            Self::Dns => "dns",
            Self::Docker => "docker",
            Self::Cni => "cni",
            Self::Monitor => "monitor",
            Self::Store => "store",
        }
    }
}

/// Builds and runs the fuzzer. Continues with the next target after a finding.
///
/// # Errors
/// Returns an error if something is missing and cannot be installed, or if there are findings.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(Purpose::Build)?;
    setup::programs(&[("c++", "g++")])?;
    let workspace = Workspace::find()?;
    let program = build(&workspace)?;
    let targets =
        if arguments.targets.is_empty() { Target::ALL.to_vec() } else { arguments.targets.clone() };
    let mut findings = Vec::new();
    for target in targets {
        let outcome = match &arguments.input {
            Some(file) => replay(&program, target, file),
            None => fuzz(&workspace, &program, target, arguments.seconds),
        };
        if let Err(error) = outcome {
            findings.push(format!("{}: {error:#}", target.name()));
        }
    }
    ensure!(findings.is_empty(), "{}", findings.join("\n"));
    Ok(())
}

fn build(workspace: &Workspace) -> Result<PathBuf> {
    let target = workspace.target.join("fuzz");
    let folder = workspace.root.join("tests/fuzz");
    // Use the workspace's versions. Cargo adds the packages that only the fuzzer needs.
    std::fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock"))
        .context("the workspace's lock file cannot be copied to tests/fuzz")?;
    let mut cargo = workspace.cargo();
    cargo.current_dir(folder);
    cargo.args(["build", "--release", "--target", TRIPLE, "--target-dir"]).arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    let step = Step::start("build the fuzzer (takes minutes the first time)");
    let status = cargo.stdin(Stdio::null()).status().context("cargo cannot be started")?;
    ensure!(status.success(), "the fuzzer could not be built ({status})");
    step.done();
    Ok(target.join(TRIPLE).join("release/fuzz"))
}

fn fuzzer(program: &Path, target: Target) -> Command {
    let mut fuzzer = Command::new(program);
    fuzzer
        .env("OVERNODE_FUZZ_TARGET", target.name())
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    // An input that takes ten seconds or 512 MiB is a finding.
    fuzzer.args(["-timeout=10", "-rss_limit_mb=512"]);
    fuzzer
}

fn replay(program: &Path, target: Target, file: &Path) -> Result<()> {
    let mut fuzzer = fuzzer(program, target);
    Step::start(format!("run {} on {}", target.name(), file.display())).show(fuzzer.arg(file))
}

fn fuzz(workspace: &Workspace, program: &Path, target: Target, seconds: u64) -> Result<()> {
    let name = target.name();
    let folder = workspace.root.join("tests/fuzz");
    // The corpus grows during a run and is kept for the next one.
    let grown = workspace.target.join("fuzz/corpus").join(name);
    let regressions = folder.join("regressions").join(name);
    for folder in [&grown, &regressions] {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut fuzzer = fuzzer(program, target);
    fuzzer.arg(format!("-max_total_time={seconds}"));
    fuzzer.arg(format!("-artifact_prefix={}/", regressions.display()));
    fuzzer.args(["-max_len=4096", "-print_final_stats=1", "-reload=0", "-use_value_profile=1"]);
    fuzzer.arg(&grown).arg(folder.join("corpus").join(name)).arg(&regressions);
    let step = Step::start(format!("fuzz {name} for {seconds} s"));
    let mut child =
        fuzzer.stderr(Stdio::piped()).spawn().context("the fuzzer cannot be started")?;
    let output = child.stderr.take().context("no pipe")?;
    let mut progress = Progress::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if progress.is_worth_showing(&line) {
            eprintln!("    {line}");
        }
    }
    let status = child.wait()?;
    // Remove the directory if it is empty, that is, if there is no finding.
    let _ = std::fs::remove_dir(&regressions);
    if !status.success() {
        bail!(
            "a finding ({status}), shown above and saved in {}; to reproduce it: `{}`",
            regressions.display(),
            describe(Command::new("cargo").args(["xtask", "fuzz", name, "--input", "FILE"]))
        );
    }
    step.done();
    println!("{name}: {progress}");
    Ok(())
}

/// The statistics that libFuzzer prints.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    executions: u64,
    /// Number of edges of the control-flow graph that were reached.
    edges: u64,
    /// Number of all edges in the program and its libraries.
    all: u64,
    inputs: u64,
}

impl Progress {
    /// Parses a line of output. Returns true if the user should see it: an occasional sign of
    /// progress, and everything about a finding.
    fn is_worth_showing(&mut self, line: &str) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |word: &str| {
            words
                .windows(2)
                .find(|pair| pair[0] == word)
                .and_then(|pair| pair[1].split('/').next()?.parse().ok())
        };
        if let (Some(executions), Some(edges)) = (
            line.strip_prefix('#').and_then(|rest| rest.split_whitespace().next()?.parse().ok()),
            after("cov:"),
        ) {
            (self.executions, self.edges) = (executions, edges);
            self.inputs = after("corp:").unwrap_or(self.inputs);
            return words.get(1).is_some_and(|kind| ["INITED", "pulse", "DONE"].contains(kind));
        }
        if let ["INFO:", "Loaded", _, "PC", "tables", count, ..] = words[..] {
            self.all = count.trim_start_matches('(').parse().unwrap_or(0);
        }
        !(words.is_empty()
            || words[0] == "INFO:"
            || line.starts_with("stat::")
            || line.starts_with(['#', '"']))
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { executions, edges, all, inputs } = self;
        write!(
            f,
            "no finding in {executions} executions; {inputs} inputs reach {edges} of {all} edges"
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn the_output_of_libfuzzer_is_parsed() {
        let mut progress = Progress::default();
        assert!(
            !progress.is_worth_showing("INFO: Loaded 1 PC tables (98765 PCs): 98765 [0x1,0x2), ")
        );
        assert!(!progress.is_worth_showing(
            "#12\tNEW    cov: 700 ft: 900 corp: 9/1Kb lim: 4 exec/s: 0 rss: 40Mb L: 3/9 MS: 1 x-"
        ));
        assert!(progress.is_worth_showing(
            "#65536\tpulse  cov: 834 ft: 1200 corp: 120/9Kb lim: 80 exec/s: 32 rss: 41Mb"
        ));
        assert_eq!(progress, Progress { executions: 65536, edges: 834, all: 98765, inputs: 120 });
        assert!(!progress.is_worth_showing(r#""\376\310" # Uses: 98"#));
        assert!(progress.is_worth_showing("thread '<unnamed>' panicked at bodies/api.rs:1:1:"));
        assert_eq!(
            progress.to_string(),
            "no finding in 65536 executions; 120 inputs reach 834 of 98765 edges"
        );
    }

    #[test]
    fn every_target_has_a_body_and_every_body_a_target() {
        let bodies = include_str!("../../tests/fuzz/bodies.rs");
        assert_eq!(bodies.matches("Target { name: ").count(), Target::ALL.len());
        for target in Target::ALL {
            assert!(bodies.contains(&format!("Target {{ name: \"{}\"", target.name())));
            assert_eq!(
                target.to_possible_value().expect("none is hidden").get_name(),
                target.name()
            );
        }
    }
}
