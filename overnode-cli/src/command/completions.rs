//! Implements `overnode completions`.

use clap::CommandFactory;

use crate::options::{Cli, Completions};

/// Returns the script that completes the command line in a shell.
pub(super) fn run(wanted: &Completions) -> String {
    let mut script = Vec::new();
    clap_complete::generate(wanted.shell, &mut Cli::command(), "overnode", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
