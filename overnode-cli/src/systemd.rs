//! The daemon as a unit of systemd.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use overnode_daemon::options::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};

use crate::failure::Failure;
use crate::options::Context;
use crate::start::reason_in;

/// The unit.
pub const UNIT: &str = "overnode.service";

/// Where packages and administrators put units (systemd.unit(5)).
const UNIT_DIRS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Whether the daemon of these directories is systemd's: it runs, has the unit, and would start it
/// in the network namespace that this command runs in.
pub fn is_in_charge(context: &Context) -> bool {
    Path::new("/run/systemd/system").is_dir()
        && context.state_dir == Path::new(DEFAULT_STATE_DIR)
        && context.run_dir == Path::new(DEFAULT_RUN_DIR)
        && UNIT_DIRS.iter().any(|dir| Path::new(dir).join(UNIT).exists())
        && same_network_namespace()
}

/// Makes the unit start with or without `--debug`, until the host is started anew.
///
/// # Errors
/// When systemd cannot be told.
pub fn set_debug(debug: bool) -> Result<(), Failure> {
    let dir = Path::new("/run/systemd/system").join(format!("{UNIT}.d"));
    let file = dir.join("overnode-debug.conf");
    if debug == file.exists() {
        return Ok(());
    }
    let changed = if debug {
        fs::create_dir_all(&dir)
            .and_then(|()| fs::write(&file, "[Service]\nEnvironment=OVERNODE_DEBUG=1\n"))
    } else {
        // The directory may hold files of others.
        fs::remove_file(&file).map(|()| fs::remove_dir(&dir).unwrap_or(()))
    };
    changed.map_err(|error| Failure::failed(format_args!("{}: {error}", file.display())))?;
    demand(&["daemon-reload"])
}

/// Starts the unit, now and whenever the host starts. Comes back when the daemon says that it is
/// ready.
///
/// # Errors
/// With the last error in the unit's log.
pub fn start() -> Result<(), Failure> {
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
    Err(Failure::failed(format_args!(
        "{UNIT} did not start: {why}; `journalctl -u {UNIT}` tells more"
    )))
}

/// Stops the unit, and does not start it with the host any more.
///
/// # Errors
/// What systemctl says.
pub fn stop_and_disable() -> Result<(), Failure> {
    demand(&["disable", "--now", UNIT])
}

/// Stops the unit; it starts again with the host.
///
/// # Errors
/// What systemctl says.
pub fn stop() -> Result<(), Failure> {
    demand(&["stop", UNIT])
}

/// Whether the unit starts with the host.
pub fn is_enabled() -> bool {
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
        .map_err(|error| Failure::failed(format_args!("systemctl could not be run: {error}")))
}

fn same_network_namespace() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    namespace("self").is_some_and(|mine| namespace("1") == Some(mine))
}
