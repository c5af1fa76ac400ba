//! The `overnode` command: parses the command line, sends requests to the daemon and prints the
//! answers.
//!
//! [`options`] defines the command line. `command` has one module per command. `client` talks to
//! the daemon, `start` starts and stops it, and `render` formats tables. [`cni`] is the plugin for
//! container runtimes.
//!
//! A command returns its standard output as text, and this module writes it. (`monitor` prints its
//! events itself.) This module also writes the one line on standard error of a command that fails.
//!
//! Only the program, the documents made from the command line, and the fuzzer use this library.

mod client;
pub mod cni;
mod command;
mod container;
mod duration;
pub mod failure;
pub mod options;
mod presence;
#[cfg(test)]
mod reference;
mod render;
mod start;
mod strength;
mod systemd;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};
use overnode_trust as trust;

use crate::failure::Failure;
use crate::options::Cli;

/// Runs the command that this process was started as. Returns its exit status.
pub fn main() -> ExitCode {
    if cni::is_meant(std::env::args_os().next().as_deref()) {
        return cni::main();
    }
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => return options::explain(&error),
    };
    // A token or a key may pass through this process.
    if let Err(error) = trust::protect_memory() {
        let _ = writeln!(
            io::stderr(),
            "overnode: cannot protect its memory from other processes: {error}"
        );
        return ExitCode::FAILURE;
    }
    match run(cli) {
        Ok(output) => write_out(&output),
        Err(failure) => {
            let text = failure.to_string();
            let name = if text.starts_with("overnode ") { "" } else { "overnode: " };
            // A failed write cannot be reported anywhere else.
            let _ = writeln!(io::stderr(), "{name}{text}");
            ExitCode::from(failure.exit())
        }
    }
}

/// Parses the command line. The option that turns off colors holds for help and errors, too.
fn parse() -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    if std::env::args_os().any(|argument| argument == "--no-color") {
        command = command.color(clap::ColorChoice::Never);
    }
    Cli::from_arg_matches(&command.try_get_matches()?)
}

fn run(cli: Cli) -> Result<String, Failure> {
    let context = cli.global.context()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            Failure::failed(format_args!("the asynchronous runtime did not start: {error}"))
        })?;
    runtime.block_on(command::run(&context, cli.command))
}

fn write_out(output: &str) -> ExitCode {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(output.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe because it has seen enough (`overnode status | head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "overnode: standard output: {error}");
            ExitCode::FAILURE
        }
    }
}
