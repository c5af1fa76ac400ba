//! An overnode node, run through its command line as people do.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use lab::rig::space::{self, Space};
use tempfile::TempDir;

const TOKEN: &str = "the token of the benchmark";

/// A launched node. Dropping it resets it.
pub struct Node {
    host: String,
    files: TempDir,
}

impl Node {
    /// Launches a node with the other host as its target.
    ///
    /// # Errors
    /// When the programs are not built, or `launch` fails.
    pub fn launch(host: &Space, id: usize, target: Ipv4Addr) -> Result<Self> {
        let node = Self { host: host.name().to_owned(), files: tempfile::tempdir()? };
        let mut command = node.command()?;
        command.env("OVERNODE_TOKEN", TOKEN);
        space::run(command.args(["launch", "--id", &id.to_string(), &target.to_string()]))?;
        Ok(node)
    }

    /// Plugs a container in and gives back its address.
    ///
    /// # Errors
    /// When `attach` fails.
    pub fn attach(&self, container: &Space) -> Result<Ipv4Addr> {
        let mut command = self.command()?;
        let line = space::run(command.args(["attach", &format!("netns:{}", container.name())]))?;
        let (address, _) = line.trim().split_once('/').context("attach printed no address with a prefix")?;
        address.parse().with_context(|| format!("attach printed {line:?}"))
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.host)).arg(built("overnode")?);
        for (option, folder) in [("--state-dir", "state"), ("--run-dir", "run")] {
            command.arg(option).arg(self.files.path().join(folder));
        }
        Ok(command)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Ok(mut command) = self.command() {
            // What it leaves goes with its namespace.
            let _ = space::run(command.args(["reset", "--force"]));
        }
    }
}

/// A program of this project, built beside this one.
fn built(program: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let file = own.with_file_name(program);
    file.is_file().then_some(file).with_context(|| {
        format!("{program} is not built beside {}: run `cargo xtask bench datapath`", own.display())
    })
}
