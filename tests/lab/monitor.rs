//! Runs `overnode monitor` and watches its output.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Host, Lab, eventually};

/// A monitor that is killed when this is dropped.
pub struct Watcher {
    child: Child,
    output: PathBuf,
    limit: Duration,
}

impl Watcher {
    /// Starts `overnode monitor` with these options. Returns once it is watching. `limit` is the
    /// timeout of all waits.
    ///
    /// # Errors
    /// Fails if it is not watching within the limit.
    pub fn start(lab: &Lab, host: &Host, options: &[&str], limit: Duration) -> Result<Self> {
        let watcher = Self::start_now(lab, host, &[&["monitor"], options].concat(), limit)?;
        watcher.wait_for_line(|line| line.contains("watching"))?;
        Ok(watcher)
    }

    /// Starts `overnode` with these arguments, without waiting until it watches. It may never do
    /// so.
    ///
    /// # Errors
    /// Fails if it cannot be started.
    pub fn start_now(lab: &Lab, host: &Host, arguments: &[&str], limit: Duration) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let output =
            lab.folder().join(format!("monitor-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let mut command = host.command("overnode")?;
        command.args(arguments).stdin(Stdio::null()).stdout(File::create(&output)?);
        let child = command.stderr(File::create(output.with_extension("err"))?).spawn()?;
        Ok(Self { child, output, limit })
    }

    /// Returns its output so far.
    pub fn text(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.output)?)
    }

    /// Parses all complete lines so far, each of which must be JSON.
    ///
    /// # Errors
    /// Fails if a line is not JSON.
    pub fn events(&self) -> Result<Vec<Value>> {
        whole_lines(&self.text()?)
            .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect()
    }

    /// Waits for the first complete line that satisfies `is_it`.
    ///
    /// # Errors
    /// Fails if there is none within the limit.
    pub fn wait_for_line(&self, is_it: impl Fn(&str) -> bool) -> Result<String> {
        eventually(self.limit, || {
            let text = self.text()?;
            let found = whole_lines(&text).find(|line| is_it(line)).map(str::to_owned);
            found.with_context(|| format!("no such line in {text}"))
        })
    }

    /// Waits for the first event that satisfies `is_it`. The monitor must have been started with
    /// `--json`.
    ///
    /// # Errors
    /// Fails if there is none within the limit, or if the output is not JSON.
    pub fn wait_for(&self, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        eventually(self.limit, || {
            let events = self.events()?;
            let last: Vec<_> = events.iter().rev().take(10).collect();
            events
                .iter()
                .find(|event| is_it(event))
                .cloned()
                .with_context(|| format!("no such event, the last ones are {last:?}"))
        })
    }

    /// Waits for the first packet that it shows as dropped for this reason.
    ///
    /// # Errors
    /// Fails like [`Self::wait_for`].
    pub fn drop_of(&self, reason: &str) -> Result<Value> {
        self.wait_for(|event| event["event"] == "drop" && event["reason"] == reason)
    }

    /// Sends a signal to the monitor.
    ///
    /// # Errors
    /// Fails if it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Waits until the monitor ends. Returns its exit status and its standard error.
    ///
    /// # Errors
    /// Fails if it does not end within the limit.
    pub fn end(mut self) -> Result<(ExitStatus, String)> {
        let status = eventually(self.limit, || {
            self.child.try_wait()?.context("the monitor is still running")
        })?;
        Ok((status, std::fs::read_to_string(self.output.with_extension("err"))?))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text.rsplit_once('\n').map_or("", |(whole, _)| whole).lines()
}
