//! Controls the daemon as a systemd unit.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use overnode_api::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};

use crate::failure::Failure;
use crate::options::Context;
use crate::start::reason_in;

/// Name of the daemon's unit.
pub(crate) const UNIT: &str = "overnode.service";

/// Directories in which packages and administrators install units (systemd.unit(5)).
const UNIT_DIRS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Returns whether systemd manages the daemon of these directories. This is the case if systemd
/// runs on this host, the directories are the default ones, the unit is installed, and this command
/// runs in the network namespace in which systemd starts the daemon.
pub(crate) fn is_in_charge(context: &Context) -> bool {
    Path::new("/run/systemd/system").is_dir()
        && context.state_dir == Path::new(DEFAULT_STATE_DIR)
        && context.run_dir == Path::new(DEFAULT_RUN_DIR)
        && UNIT_DIRS.iter().any(|dir| Path::new(dir).join(UNIT).exists())
        && same_network_namespace()
}

/// Makes the unit start with or without `--debug`, until the next reboot.
///
/// # Errors
/// Fails if the drop-in file cannot be changed or systemd does not reload its configuration.
pub(crate) fn set_debug(debug: bool) -> Result<(), Failure> {
    let dir = Path::new("/run/systemd/system").join(format!("{UNIT}.d"));
    let file = dir.join("overnode-debug.conf");
    if debug == file.exists() {
        return Ok(());
    }
    let changed = if debug {
        fs::create_dir_all(&dir)
            .and_then(|()| fs::write(&file, "[Service]\nEnvironment=OVERNODE_DEBUG=1\n"))
    } else {
        // The directory may hold other drop-in files.
        fs::remove_file(&file).map(|()| fs::remove_dir(&dir).unwrap_or(()))
    };
    changed.map_err(|error| Failure::failed(format_args!("{}: {error}", file.display())))?;
    demand(&["daemon-reload"])
}

/// Starts the unit now and enables it for every boot. Returns once the daemon reports that it is
/// ready.
///
/// # Errors
/// Fails if the unit does not start. The message holds the last error in the unit's log.
pub(crate) fn start() -> Result<(), Failure> {
    let output = systemctl(&["enable", "--now", UNIT])?;
    if output.status.success() {
        return Ok(());
    }
    let log = Command::new("journalctl")
        .args(["--unit", UNIT, "--lines", "20", "--output", "cat", "--no-pager"])
        .stdin(Stdio::null())
        .output();
    let why = log
        .ok()
        .and_then(|log| reason_in(&String::from_utf8_lossy(&log.stdout)))
        .unwrap_or_else(|| String::from_utf8_lossy(&output.stderr).trim().to_owned());
    Err(Failure::failed(format_args!("{UNIT} did not start: {why}; see `journalctl -u {UNIT}`")))
}

/// Stops the unit and disables it, so that it no longer starts at boot.
///
/// # Errors
/// Fails with the message of systemctl.
pub(crate) fn stop_and_disable() -> Result<(), Failure> {
    demand(&["disable", "--now", UNIT])
}

/// Stops the unit. An enabled unit starts again at the next boot.
///
/// # Errors
/// Fails with the message of systemctl.
pub(crate) fn stop() -> Result<(), Failure> {
    demand(&["stop", UNIT])
}

/// Returns whether the unit starts at boot.
pub(crate) fn is_enabled() -> bool {
    systemctl(&["is-enabled", "--quiet", UNIT]).is_ok_and(|output| output.status.success())
}

fn demand(arguments: &[&str]) -> Result<(), Failure> {
    let output = systemctl(arguments)?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(Failure::failed(format_args!("systemctl {}: {}", arguments.join(" "), why.trim())))
}

fn systemctl(arguments: &[&str]) -> Result<Output, Failure> {
    Command::new("systemctl")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure::failed(format_args!("cannot run systemctl: {error}")))
}

fn same_network_namespace() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    namespace("self").is_some_and(|mine| namespace("1") == Some(mine))
}
