//! Runs commands with a time limit and records how they ended.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Run time.
    pub took: Duration,
}

impl Outcome {
    /// Returns the standard output of a command that must succeed.
    ///
    /// # Errors
    /// Fails if the exit code is not 0. The message names the command and what it printed.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "`{}` failed ({}): {}{}",
            self.command,
            self.status,
            self.stderr,
            self.stdout
        );
        Ok(self.stdout)
    }

    /// Returns the one line on standard error of a command that must fail with this exit code.
    ///
    /// # Errors
    /// Fails if the exit code differs, if something was printed to standard output, or if standard
    /// error is not exactly one line.
    pub fn failure(self, code: i32) -> Result<String> {
        ensure!(
            self.status.code() == Some(code),
            "`{}` ended with {} instead of exit code {code}: {}{}",
            self.command,
            self.status,
            self.stderr,
            self.stdout
        );
        self.complaint()
    }

    /// Returns the one line on standard error of a command that must fail, with exit code 1
    /// (failed) or 2 (wrong usage).
    ///
    /// # Errors
    /// Fails if the exit code differs, if something was printed to standard output, or if standard
    /// error is not exactly one line.
    pub fn complaint(self) -> Result<String> {
        ensure!(
            matches!(self.status.code(), Some(1 | 2)),
            "`{}` ended with {} instead of exit code 1 or 2: {}{}",
            self.command,
            self.status,
            self.stderr,
            self.stdout
        );
        ensure!(
            self.stdout.is_empty(),
            "`{}` failed, but printed to standard output: {}",
            self.command,
            self.stdout
        );
        let complaint = self.stderr.trim_end();
        ensure!(
            !complaint.is_empty() && complaint.lines().count() == 1,
            "`{}` printed {} lines to standard error instead of one: {complaint}",
            self.command,
            complaint.lines().count()
        );
        Ok(complaint.to_owned())
    }
}

/// Runs a command to its end. Output goes to files in `folder` instead of pipes, because a daemon
/// that the command leaves behind may inherit pipes and keep them open.
///
/// # Errors
/// Fails if the command cannot be started, or if it runs longer than `limit`. It is killed then.
pub fn run_limited(mut command: Command, folder: &Path, limit: Duration) -> Result<Outcome> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let paths = ["out", "err"].map(|kind| folder.join(format!("command-{number}.{kind}")));
    let text = describe(&command);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(File::create(&paths[0])?)
        .stderr(File::create(&paths[1])?)
        .spawn()
        .with_context(|| format!("cannot start `{text}`"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let took = started.elapsed();
    let [stdout, stderr] =
        paths.map(|path| (std::fs::read(&path).unwrap_or_default(), std::fs::remove_file(&path)).0);
    let [stdout, stderr] =
        [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let Some(status) = status else {
        bail!(
            "`{text}` was still running after {} s and was killed: {stderr}{stdout}",
            limit.as_secs()
        );
    };
    Ok(Outcome { command: text, status, stdout, stderr, took })
}

pub(crate) fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
