//! `cargo xtask test`: runs all checks that a change must pass.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::deny;
use crate::policy;
use crate::step::{Step, seconds};
use crate::workspace::Workspace;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run only tests whose names contain one of these, and skip formatting, dependencies and
    /// clippy.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

/// The counts in the summary of a test run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Summary {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Checks the formatting, the dependencies and the documentation, runs clippy, builds the binaries
/// and runs all tests.
///
/// # Errors
/// Returns an error if a step fails. A failed test does not prevent the other tests from running.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    if arguments.filters.is_empty() {
        Step::start("check the formatting")
            .show(workspace.cargo().args(["fmt", "--all", "--check"]))?;
        let step = Step::start("check licenses, bans and sources of the dependencies");
        deny::check(workspace)?;
        step.done();
        let step = Step::start("check line widths, links between pages and unused dependencies");
        policy::check(&workspace.root)?;
        step.done();
        Step::start("clippy").show(workspace.cargo().args([
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]))?;
        Step::start("documentation").show(
            workspace
                .cargo()
                .args(["doc", "--locked", "--workspace", "--no-deps", "--quiet"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )?;
    }
    // Build everything together. Otherwise dependencies would have other features and much would be
    // built twice.
    let build = ["build", "--locked", "--workspace", "--all-targets"];
    Step::start("build the programs and their tests").show(workspace.cargo().args(build))?;
    let outcome = run_tests(workspace, &arguments.filters);
    let took = seconds(started.elapsed());
    match outcome {
        Ok(summary) => {
            println!("all tests passed: {summary}; {took} in total");
            Ok(())
        }
        Err(error) => Err(error.context(format!("the checks failed after {took}"))),
    }
}

fn run_tests(workspace: &Workspace, filters: &[String]) -> Result<Summary> {
    let mut summary = Summary::default();
    let nextest = workspace
        .cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut failures = Vec::new();
    let mut run = |arguments: &[&str]| -> Result<()> {
        let mut cargo = with_binaries(workspace);
        cargo.args(arguments);
        summary.add(watch(&mut cargo, &mut failures)?);
        Ok(())
    };
    let step = Step::start(if nextest { "tests (cargo nextest)" } else { "tests (cargo test)" });
    if nextest {
        let mut words = vec!["nextest", "run", "--locked", "--workspace", "--no-fail-fast"];
        words.extend([
            "--status-level",
            "slow",
            "--final-status-level",
            "fail",
            "--no-tests",
            "pass",
        ]);
        words.extend(filters.iter().map(String::as_str));
        run(&words)?;
    } else {
        let mut words = vec![
            "test",
            "--locked",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
            "--",
        ];
        words.extend(filters.iter().map(String::as_str));
        run(&words)?;
    }
    step.done();
    if filters.is_empty() {
        let step = Step::start("examples in the documentation");
        run(&["test", "--locked", "--workspace", "--no-fail-fast", "--doc"])?;
        step.done();
    }
    if !failures.is_empty() || summary.failed > 0 {
        bail!("{summary}; {}", failures.join("; "));
    }
    Ok(summary)
}

fn with_binaries(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.env("OVERNODE_BIN_DIR", workspace.target.join("debug"));
    cargo
}

/// Passes the output on line by line, and adds up the test counts in it.
fn watch(cargo: &mut Command, failures: &mut Vec<String>) -> Result<Summary> {
    // Use one pipe for both streams: nextest reports on standard error, `cargo test` on standard
    // output.
    let (reader, writer) = std::io::pipe()?;
    cargo.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = cargo.spawn().context("cargo cannot be started")?;
    // The command object keeps the pipe's writing end open until its streams are replaced.
    cargo.stdout(Stdio::null()).stderr(Stdio::null());
    let mut summary = Summary::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        summary.add(Summary::parse(&line));
    }
    let status = child.wait()?;
    if !status.success() {
        failures.push(format!("`{}` failed ({status})", crate::step::describe(cargo)));
    }
    Ok(summary)
}

impl Summary {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Parses the summary line of `cargo test` or nextest. Any other line counts nothing.
    fn parse(line: &str) -> Self {
        let closing =
            line.starts_with("test result:") || line.trim_start().starts_with("Summary [");
        if !closing {
            return Self::default();
        }
        let words: Vec<&str> =
            line.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
        let count = |what: &str| -> u64 {
            words
                .windows(2)
                .find(|pair| pair[1] == what)
                .and_then(|pair| pair[0].parse().ok())
                .unwrap_or(0)
        };
        let timed_out = count("timed");
        Self {
            passed: count("passed"),
            failed: count("failed") + timed_out,
            ignored: count("ignored") + count("skipped"),
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_lines_are_counted() {
        let cargo = "test result: FAILED. 17 passed; 2 failed; 1 ignored; 0 measured; 0 filtered \
                     out; finished in 14.99s";
        assert_eq!(Summary::parse(cargo), Summary { passed: 17, failed: 2, ignored: 1 });
        let cargo = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; \
                     finished in 0.01s";
        assert_eq!(Summary::parse(cargo), Summary { passed: 3, failed: 0, ignored: 0 });
        let nextest = "     Summary [  15.126s] 21 tests run: 19 passed (1 slow), 1 failed, 1 \
                       timed out, 4 skipped";
        assert_eq!(Summary::parse(nextest), Summary { passed: 19, failed: 2, ignored: 4 });
        assert_eq!(Summary::parse("running 17 tests"), Summary::default());
    }
}
