//! Starts the daemon, waits until it answers, and stops it.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use overnode_api::{Version, routes};
use overnode_trust as trust;

use crate::client::{Client, POLL, RequestError};
use crate::failure::Failure;
use crate::options::Context;
use crate::presence::{self, Presence};
use crate::systemd;

/// File name of the daemon's executable.
const DAEMON: &str = "overnoded";

/// Directories in which packages install daemons. They are searched last, after the directory of
/// this command and PATH.
const DAEMON_DIRS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/sbin",
    "/usr/local/libexec",
    "/usr/libexec",
    "/usr/lib/overnode",
    "/usr/local/bin",
];

/// Name of the log of a daemon that systemd did not start, in the run directory.
pub(crate) const LOG: &str = "overnoded.log";

/// Startup timeout of a daemon. During startup the kernel verifies its programs.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(60);

/// Shutdown timeout of a daemon.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(20);

/// A daemon that this command started.
#[derive(Debug)]
pub(crate) struct Started {
    how: How,
    context: Context,
    before: Before,
}

/// State of the host before the daemon was started.
#[derive(Clone, Copy, Debug)]
struct Before {
    presence: Presence,
    state_dir: bool,
    run_dir: bool,
}

#[derive(Debug)]
enum How {
    Unit {
        was_enabled: bool,
    },
    Detached {
        child: Child,
        /// Length of the log before this daemon was started, in bytes.
        log_from: usize,
    },
}

/// Starts the daemon unless one answers already. Returns the daemon that was started, if any, and
/// the version of the running one.
///
/// # Errors
/// Fails if the daemon does not come up. No daemon is left running then.
pub(crate) async fn ensure_running(
    context: &Context,
    client: &Client,
) -> Result<(Option<Started>, Version), Failure> {
    if let Some(version) = client.running().await? {
        return Ok((None, version));
    }
    let mut started = if systemd::is_in_charge(context) {
        start_unit(context)?
    } else {
        start_detached(context).await?
    };
    match started.answer(client).await {
        Ok(version) if started.is(&version) => Ok((Some(started), version)),
        // Another command was faster. Everything on the host now belongs to its daemon.
        Ok(version) => {
            started.end().await?;
            Ok((None, version))
        }
        Err(why) => match started.stop().await {
            Ok(()) => Err(why),
            Err(also) => Err(why.and(also)),
        },
    }
}

impl Before {
    fn of(context: &Context) -> Self {
        Self {
            presence: Presence::of(&context.state_dir),
            state_dir: context.state_dir.exists(),
            run_dir: context.run_dir.exists(),
        }
    }

    async fn restore(self, context: &Context) -> Result<(), Failure> {
        let Context { state_dir, run_dir, .. } = context;
        let presence = Presence::of(state_dir);
        if matches!(presence, Presence::NotListening(_)) {
            // This daemon ended because another one already had the state directory.
            return Ok(());
        }
        // A daemon that got as far as creating a database may have created more than files.
        if self.presence == Presence::Never && presence == Presence::Stopped {
            offline(context, &["reset", "--force"]).map_err(|error| {
                Failure::failed(format_args!("{error}; run `overnode reset` to try again"))
            })?;
        }
        if !self.state_dir {
            let _ = fs::remove_file(state_dir.join(presence::LOCK));
            let _ = fs::remove_dir(state_dir);
        }
        let _ = fs::remove_file(run_dir.join(LOG));
        if !self.run_dir {
            let _ = fs::remove_dir(run_dir);
        }
        Ok(())
    }
}

/// Has the daemon's program do something while no daemon runs. `words` is one of its commands.
///
/// # Errors
/// Returns why it failed, without a full stop.
pub(crate) fn offline(context: &Context, words: &[&str]) -> Result<(), String> {
    let program = find_daemon().map_err(|error| error.to_string())?;
    let output = Command::new(&program)
        .arg("--state-dir")
        .arg(&context.state_dir)
        .arg("--run-dir")
        .arg(&context.run_dir)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be started: {error}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(reason_in(&said).unwrap_or_else(|| format!("{} failed", program.display())))
}

/// Waits until a daemon that announced its end has ended, then removes what starting it created.
///
/// # Errors
/// Fails if the daemon does not end.
pub(crate) async fn ended(context: &Context, client: &Client, pid: u32) -> Result<(), Failure> {
    let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
    while runs(pid)
        || client.try_get::<routes::Version>().await.is_ok_and(|version| version.pid == pid)
    {
        if Instant::now() > deadline {
            return Err(Failure::failed(format_args!(
                "the daemon (process {pid}) does not stop: end it with `kill {pid}`, then run \
                 `overnode reset` again"
            )));
        }
        tokio::time::sleep(POLL).await;
    }
    forget_start(context)
}

/// Removes what starting a daemon created: its log, its run directory, and its place among the
/// units that systemd starts at boot.
///
/// # Errors
/// Fails if systemd refuses.
pub(crate) fn forget_start(context: &Context) -> Result<(), Failure> {
    let _ = fs::remove_file(context.run_dir.join(LOG));
    // Remove the directory only if it is empty: other programs may use it too.
    let _ = fs::remove_dir(&context.run_dir);
    if systemd::is_in_charge(context) && systemd::is_enabled() {
        systemd::stop_and_disable()?;
    }
    Ok(())
}

impl Started {
    /// Stops the daemon and removes what starting it created. A node that was launched before stays
    /// launched.
    ///
    /// # Errors
    /// Fails if the daemon does not stop or something cannot be removed.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        self.end().await?;
        self.before.restore(&self.context).await
    }

    async fn end(&mut self) -> Result<(), Failure> {
        match &mut self.how {
            How::Unit { was_enabled: true } => systemd::stop(),
            How::Unit { was_enabled: false } => systemd::stop_and_disable(),
            How::Detached { child, .. } => end(child).await,
        }
    }

    fn is(&self, version: &Version) -> bool {
        match &self.how {
            How::Unit { .. } => true,
            How::Detached { child, .. } => child.id() == version.pid,
        }
    }

    async fn answer(&mut self, client: &Client) -> Result<Version, Failure> {
        let begun = Instant::now();
        let mut progress = Progress::default();
        loop {
            // A daemon that ends during startup may have accepted the request and broken the
            // connection. Only its log tells the real reason.
            match client.try_get::<routes::Version>().await {
                Ok(version) => return Ok(version),
                Err(why @ (RequestError::Denied | RequestError::Stranger(_))) => {
                    return Err(client.explain(why));
                }
                Err(
                    RequestError::NotRunning | RequestError::Refused(_) | RequestError::Broken(_),
                ) => {}
            }
            if let How::Detached { child, .. } = &mut self.how {
                match child.try_wait() {
                    Ok(None) => {}
                    Ok(Some(status)) => return self.ended_early(client, &status.to_string()).await,
                    Err(error) => {
                        return Err(Failure::failed(format_args!(
                            "cannot wait for the daemon: {error}"
                        )));
                    }
                }
            }
            if begun.elapsed() > STARTUP_TIMEOUT {
                return Err(Failure::failed(format_args!(
                    "the daemon did not answer on {} within {} s: {}",
                    client.socket().display(),
                    STARTUP_TIMEOUT.as_secs(),
                    self.last_words()
                )));
            }
            progress.show(begun);
            tokio::time::sleep(POLL).await;
        }
    }

    async fn ended_early(&self, client: &Client, status: &str) -> Result<Version, Failure> {
        match client.try_get::<routes::Version>().await {
            Ok(version) => Ok(version),
            Err(_) => Err(Failure::failed(format_args!(
                "the daemon did not start: {} ({status})",
                self.last_words()
            ))),
        }
    }

    fn last_words(&self) -> String {
        let log = self.context.run_dir.join(LOG);
        let text = fs::read(&log).unwrap_or_default();
        let from = match self.how {
            How::Detached { log_from, .. } => log_from.min(text.len()),
            How::Unit { .. } => 0,
        };
        reason_in(&String::from_utf8_lossy(&text[from..]))
            .unwrap_or_else(|| format!("it logged nothing to {}", log.display()))
    }
}

/// Returns why a daemon ended, from its log: the last error, without time and level. Without an
/// error, returns the last line that is not blank.
pub(crate) fn reason_in(log: &str) -> Option<String> {
    let said =
        |line: &str| line.split_once(" ERROR ").map(|(_, message)| message.trim().to_owned());
    log.lines().rev().find_map(said).or_else(|| {
        log.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    })
}

fn start_unit(context: &Context) -> Result<Started, Failure> {
    let before = Before::of(context);
    let was_enabled = systemd::is_enabled();
    let undo = |why: Failure| {
        let undone = if was_enabled { systemd::stop() } else { systemd::stop_and_disable() };
        match undone {
            Ok(()) => why,
            Err(also) => why.and(also),
        }
    };
    systemd::set_debug(context.debug).and_then(|()| systemd::start()).map_err(undo)?;
    Ok(Started { how: How::Unit { was_enabled }, context: context.clone(), before })
}

async fn start_detached(context: &Context) -> Result<Started, Failure> {
    let daemon = find_daemon()?;
    let before = Before::of(context);
    let started = open_log(context).and_then(|log| {
        let log_from = log.metadata()?.len() as usize;
        Ok(How::Detached { child: spawn(&daemon, context, log)?, log_from })
    });
    match started {
        Ok(how) => Ok(Started { how, context: context.clone(), before }),
        Err(error) => {
            let why = Failure::failed(format_args!(
                "{} could not be started with its log in {}: {error}; choose another directory \
                 with --run-dir",
                daemon.display(),
                context.run_dir.display()
            ));
            before.restore(context).await?;
            Err(why)
        }
    }
}

fn open_log(context: &Context) -> io::Result<File> {
    trust::check_path(&context.run_dir).map_err(io::Error::other)?;
    DirBuilder::new().recursive(true).mode(0o755).create(&context.run_dir)?;
    trust::check_directory(&context.run_dir).map_err(io::Error::other)?;
    let log = context.run_dir.join(LOG);
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(log)
}

fn spawn(daemon: &Path, context: &Context, log: File) -> io::Result<Child> {
    let mut command = Command::new(daemon);
    command
        .arg("--state-dir")
        .arg(&context.state_dir)
        .arg("--run-dir")
        .arg(&context.run_dir)
        .arg("--no-color")
        .current_dir("/")
        // Users who may read the daemon's environment must not learn the token from it.
        .env_remove("OVERNODE_TOKEN")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    if context.debug {
        command.arg("--debug");
    }
    // SAFETY: only system calls are made between fork and exec, and they take no pointers.
    unsafe {
        command.pre_exec(|| {
            // A new session detaches the daemon from the terminal. Closing the inherited
            // descriptors keeps the daemon from holding open a pipe that the caller reads to its
            // end.
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // Called by number, because not every C library has a function for it.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        });
    }
    command.spawn()
}

fn find_daemon() -> Result<PathBuf, Failure> {
    let beside = env::current_exe().ok().and_then(|own| own.parent().map(|dir| dir.join(DAEMON)));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path =
        env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(DAEMON));
    let elsewhere = DAEMON_DIRS.iter().map(|dir| Path::new(dir).join(DAEMON));
    beside.into_iter().chain(in_path).chain(elsewhere).find(|file| file.is_file()).ok_or_else(|| {
        Failure::failed(format_args!(
            "{DAEMON} was not found next to this command, in PATH, or in {}: install it in one of \
             these places",
            DAEMON_DIRS.join(", ")
        ))
    })
}

async fn end(child: &mut Child) -> Result<(), Failure> {
    let pid = child.id();
    let cannot = |error: io::Error| {
        Failure::failed(format_args!("the daemon (process {pid}) cannot be stopped: {error}"))
    };
    let asked = Instant::now();
    if child.try_wait().map_err(cannot)?.is_none() {
        // SAFETY: kill takes no pointers. The child was not waited for, so its process ID was not
        // reused.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
    }
    while child.try_wait().map_err(cannot)?.is_none() {
        if asked.elapsed() > SHUTDOWN_TIMEOUT {
            child.kill().map_err(cannot)?;
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Returns whether a process is running. A zombie is not.
fn runs(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name is in parentheses and may itself contain parentheses and spaces (proc(5)).
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// A progress line for users at a terminal, shown after 500 ms of waiting.
#[derive(Default)]
struct Progress {
    shown: bool,
}

impl Progress {
    fn show(&mut self, begun: Instant) {
        if !self.shown && begun.elapsed() > Duration::from_millis(500) && io::stderr().is_terminal()
        {
            let _ = write!(io::stderr(), "waiting for the daemon …");
            self.shown = true;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\u{1b}[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_in_a_log_is_the_reason() {
        let log = "2026-01-01T00:00:00.000000Z ERROR old\n\
                   2026-01-01T00:00:01.000000Z ERROR disk full: free some space\n\
                   2026-01-01T00:00:02.000000Z  INFO bye\n\n";
        assert_eq!(reason_in(log).as_deref(), Some("disk full: free some space"));
        assert_eq!(reason_in("Segmentation fault \n\n").as_deref(), Some("Segmentation fault"));
        assert_eq!(reason_in("\n"), None);
    }

    #[test]
    fn running_and_ended_processes_are_told_apart() {
        assert!(runs(std::process::id()));
        let mut child = Command::new("true").spawn().unwrap();
        let begun = Instant::now();
        while runs(child.id()) {
            assert!(begun.elapsed() < Duration::from_secs(10), "a zombie counts as running");
            std::thread::sleep(POLL);
        }
        child.wait().unwrap();
        assert!(!runs(u32::MAX));
    }
}
