//! Runs processes of third-party programs next to a test.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::describe;

/// How much of a process's output an error message shows, in bytes.
const LAST_WORDS: u64 = 2048;

/// A process that is killed when this is dropped, and its output.
#[derive(Debug)]
pub struct Background {
    command: String,
    child: Child,
    log: File,
}

impl Background {
    /// Starts a process. Its standard output and standard error go to an unnamed file.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let log = tempfile::tempfile().context("cannot create a log file")?;
        let text = describe(&command);
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start `{text}`"))?;
        Ok(Self { command: text, child, log })
    }

    /// Checks that the process is still running.
    ///
    /// # Errors
    /// Fails if it has ended. The message holds the end of its output.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        bail!("`{}` ended unexpectedly ({status}): {}", self.command, self.last_words())
    }

    /// Returns the end of its output.
    pub fn last_words(&self) -> String {
        let length = self.log.metadata().map_or(0, |metadata| metadata.len());
        let start = length.saturating_sub(LAST_WORDS);
        let mut text = vec![0; (length - start) as usize];
        match self.log.read_exact_at(&mut text, start) {
            Ok(()) => String::from_utf8_lossy(&text).trim().to_owned(),
            Err(error) => format!("(cannot read its output: {error})"),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
