//! Removes everything that labs create, however a test ends.
//!
//! Everything that a lab makes outside its own namespaces carries the lab's prefix (`ovl`, the
//! process ID, `x`, a number) or is in its folder. So the prefix is enough to remove a lab. A lab
//! is removed by its own `Drop`, by the handler of SIGINT, SIGTERM and SIGHUP, or by another
//! process after its maker died.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;

const NAMESPACES: &str = "/run/netns";
const NAME_FILES: &str = "/etc/netns";
/// Directory in which nodes pin their programs and maps, in one folder per node.
const PINS: &str = "/sys/fs/bpf/overnode";
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// Write end of the pipe through which the signal handler wakes the cleanup thread.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

/// Mounts bpffs where nodes look for it and installs the signal handler, once per process.
pub(crate) fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = Command::new("sh")
            .args(["-c", "mountpoint -q /sys/fs/bpf || mount -t bpf -o mode=0700 bpf /sys/fs/bpf"])
            .stderr(Stdio::null())
            .status();
        watch_signals();
    });
}

/// Removes the labs of processes that died without removing them.
pub fn sweep() {
    let Ok(_one_at_a_time) = lock() else { return };
    let dead = names_in(NAMESPACES)
        .chain(names_in(NAME_FILES))
        .chain(names_in(&std::env::temp_dir()))
        .chain(crate::docker::cgroups())
        .filter_map(|name| {
            split(&name).filter(|(pid, _)| !is_alive(*pid)).map(|(_, prefix)| prefix)
        })
        .collect::<BTreeSet<_>>();
    for prefix in dead {
        remove_all(&prefix);
    }
}

/// Returns the folder of the pins of the node with this state directory.
///
/// # Errors
/// Fails if the directory or `sha256sum` does not exist.
pub fn pins_of(state_directory: &Path) -> Result<PathBuf> {
    let canonical = state_directory
        .canonicalize()
        .with_context(|| format!("cannot resolve {}", state_directory.display()))?;
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start sha256sum")?;
    let mut input = child.stdin.take().context("no pipe")?;
    input.write_all(canonical.as_os_str().as_encoded_bytes())?;
    drop(input);
    let digest = String::from_utf8(child.wait_with_output()?.stdout)?;
    Ok(Path::new(PINS).join(digest.get(..12).context("sha256sum printed nothing")?))
}

/// Kills the processes in a namespace, waits until they are gone, and removes the namespace.
pub(crate) fn remove_netns(name: &str) {
    if let Ok(meta) = std::fs::metadata(Path::new(NAMESPACES).join(name)) {
        kill_all(&processes_in(meta.ino()));
        let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
    }
    let _ = std::fs::remove_dir_all(Path::new(NAME_FILES).join(name));
}

/// Kills processes with SIGKILL and waits for their end, for at most five seconds.
pub(crate) fn kill_all(pids: &[i32]) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while pids.iter().any(|pid| is_alive(*pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns the processes whose network namespace has this inode number, without this process.
pub(crate) fn processes_in(inode: u64) -> Vec<i32> {
    pids()
        .filter(|pid| *pid != std::process::id() as i32)
        .filter(|pid| {
            std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|meta| meta.ino() == inode)
        })
        .collect()
}

/// Returns the IDs of all processes of the machine.
pub(crate) fn pids() -> impl Iterator<Item = i32> {
    names_in("/proc").filter_map(|name| name.parse().ok())
}

/// Returns whether a process has not ended yet. A zombie has ended, unless some of its other
/// threads are still running. These hold its sockets and locks.
pub(crate) fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let first_ended = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']));
    !first_ended || names_in(format!("/proc/{pid}/task")).count() > 1
}

/// Takes the lock for creating namespaces and for sweeping, which is shared by all processes.
/// Without it, `ip netns add` races with itself when it creates `/run/netns`.
pub(crate) fn lock() -> Result<File> {
    let file = File::create(std::env::temp_dir().join("overnode-lab.lock"))
        .context("cannot take the lab's lock")?;
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot take the lab's lock");
    }
    Ok(file)
}

/// Returns the folder of the lab with this prefix.
pub(crate) fn folder_of(prefix: &str) -> PathBuf {
    std::env::temp_dir().join(prefix)
}

/// Registers a lab for removal when a signal ends this process.
pub(crate) fn register(prefix: &str) {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner).insert(prefix.to_owned());
}

/// Removes a lab unless that has been done already.
pub(crate) fn remove(prefix: &str) {
    if LIVE.lock().unwrap_or_else(PoisonError::into_inner).remove(prefix) {
        remove_all(prefix);
    }
}

fn remove_all(prefix: &str) {
    // `ovl12x1` must not match `ovl12x10`. A prefix is never followed by a digit.
    let ours = |name: &String| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
    };
    for name in
        names_in(NAMESPACES).chain(names_in(NAME_FILES)).filter(ours).collect::<BTreeSet<_>>()
    {
        remove_netns(&name);
    }
    for name in crate::docker::cgroups().filter(ours).collect::<BTreeSet<_>>() {
        crate::docker::remove_cgroup(&name);
    }
    let folder = folder_of(prefix);
    for state in names_in(&folder).map(|name| folder.join(name).join(crate::host::STATE)) {
        if let Ok(pins) = pins_of(&state) {
            let _ = std::fs::remove_dir_all(pins);
        }
    }
    let _ = std::fs::remove_dir_all(folder);
}

/// Splits a name into a process ID and a prefix: `ovl12x1h2` → 12 and `ovl12x1`.
fn split(name: &str) -> Option<(i32, String)> {
    let (pid, rest) = name.strip_prefix("ovl")?.split_once('x')?;
    let digits = rest.find(|next: char| !next.is_ascii_digit()).unwrap_or(rest.len());
    let number = rest.get(..digits).filter(|number| !number.is_empty())?;
    Some((pid.parse().ok()?, format!("ovl{pid}x{number}")))
}

fn names_in(folder: impl AsRef<Path>) -> impl Iterator<Item = String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

fn watch_signals() {
    let Ok((mut reader, writer)) = UnixStream::pair() else { return };
    SIGNAL_PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
    std::thread::spawn(move || {
        let mut signal = [0u8];
        if std::io::Read::read_exact(&mut reader, &mut signal).is_err() {
            return;
        }
        let live = std::mem::take(&mut *LIVE.lock().unwrap_or_else(PoisonError::into_inner));
        for prefix in live {
            remove_all(&prefix);
        }
        std::process::exit(128 + i32::from(signal[0]));
    });
    let action =
        SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: the handler calls only write(2), which is async-signal-safe.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: writes one byte from a live variable to a descriptor that is never closed.
    unsafe { libc::write(SIGNAL_PIPE.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn namespace_names_identify_their_creator() {
        assert_eq!(split("ovl12x1h2"), Some((12, "ovl12x1".into())));
        assert_eq!(split("ovl12x10u"), Some((12, "ovl12x10".into())));
        assert_eq!(split("ovl12x1"), Some((12, "ovl12x1".into())));
        for other in ["ovl", "ovl12", "ovl12xh1", "ovlx1", "weave12x1", "ovlabcx1"] {
            assert_eq!(split(other), None, "{other}");
        }
    }
}
