//! Reports steps and how long they took.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A step that takes noticeably long.
#[derive(Debug)]
pub(crate) struct Step {
    what: String,
    started: Instant,
}

impl Step {
    /// Announces the step.
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        eprintln!("==> {what}");
        Self { what, started: Instant::now() }
    }

    /// Runs a command with visible output, and ends the step with it.
    ///
    /// # Errors
    /// Returns an error if the command cannot be started or does not exit with 0.
    pub(crate) fn show(self, command: &mut Command) -> Result<()> {
        show(command)?;
        self.done();
        Ok(())
    }

    /// Reports how long the step took.
    pub(crate) fn done(self) {
        eprintln!("    {}: {}", self.what, seconds(self.started.elapsed()));
    }
}

/// Runs a command with this program's standard output and error, and without input.
///
/// # Errors
/// Returns an error if the command cannot be started or does not exit with 0.
pub(crate) fn show(command: &mut Command) -> Result<()> {
    let text = describe(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("`{text}` cannot be started"))?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    Ok(())
}

/// Returns the command line, with its environment variables, as a user would type it.
pub(crate) fn describe(command: &Command) -> String {
    let mut words: Vec<String> = command
        .get_envs()
        .filter_map(|(name, value)| {
            Some(format!("{}={}", name.to_string_lossy(), value?.to_string_lossy()))
        })
        .collect();
    words.push(command.get_program().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Formats a duration, as in `0.4 s`, `12 s` or `3 min 20 s`.
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{:.1} s", time.as_secs_f32()),
        10..60 => format!("{:.0} s", time.as_secs_f32()),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_formatted_briefly() {
        assert_eq!(seconds(Duration::from_millis(440)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(12)), "12 s");
        assert_eq!(seconds(Duration::from_secs(200)), "3 min 20 s");
    }

    #[test]
    fn a_failing_command_is_named() {
        assert!(show(&mut Command::new("true")).is_ok());
        let error = show(Command::new("false").arg("word")).unwrap_err().to_string();
        assert!(error.contains("`false word` failed"), "{error}");
        assert!(show(&mut Command::new("/no/such/program")).is_err());
    }
}
