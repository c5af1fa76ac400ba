//! Finds out the state of this host's node when no daemon answers.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// File name of the database that every launched node has.
const DATABASE: &str = "overnode.redb";

/// Name of the file that a running daemon keeps locked.
pub(crate) const LOCK: &str = "lock";

/// State of this host's node when no daemon answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// No node was launched on this host.
    Never,
    /// A node was launched on this host, and its daemon is not running.
    Stopped,
    /// The current user may not look into the state directory.
    Unknown,
    /// A daemon with this process ID runs on the state directory, but does not listen on the
    /// socket.
    NotListening(u32),
}

impl Presence {
    /// Looks at the state directory without changing anything.
    pub(crate) fn of(state_dir: &Path) -> Self {
        if let Some(pid) = lock_holder(&state_dir.join(LOCK)) {
            return Self::NotListening(pid);
        }
        match fs::metadata(state_dir.join(DATABASE)) {
            Ok(_) => Self::Stopped,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Self::Never
            }
            Err(_) => Self::Unknown,
        }
    }

    /// Returns the error message: what is wrong, why, and what to do.
    pub(crate) fn not_running(self, socket: &Path) -> String {
        match self {
            Self::Never => "overnode is not running on this host: no node was launched here; \
                 start one with `overnode launch --id ID --token-file FILE`"
                .to_owned(),
            Self::Stopped => "overnode is not running on this host: its node is stopped; \
                 start it with `overnode resume`"
                .to_owned(),
            Self::Unknown => format!(
                "overnode is not running on this host: nothing listens on {}; start it with \
                 `overnode resume` or `overnode launch`",
                socket.display()
            ),
            Self::NotListening(pid) => format!(
                "overnode does not answer: its daemon is running (process {pid}), but nothing \
                 listens on {}; check --run-dir, or stop the daemon with `kill {pid}` and start it \
                 with `overnode resume`",
                socket.display()
            ),
        }
    }
}

/// Returns the process ID of the daemon that has locked the file. Reads the kernel's list of locks.
/// Trying to take the lock could disturb a daemon that is just starting.
fn lock_holder(file: &Path) -> Option<u32> {
    let inode = fs::metadata(file).ok()?.ino();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| holder(line, inode)).filter(|pid| {
        // On some file systems, the device in the list differs from the one that stat(2) shows. So
        // only the inode is compared, and the process name confirms the match.
        fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name.trim_end() == "overnoded")
    })
}

/// Returns the process that has locked the inode, from a line such as
/// `1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF`.
fn holder(line: &str, inode: u64) -> Option<u32> {
    let mut fields = line.split_whitespace().skip(1);
    let (kind, _, access) = (fields.next()?, fields.next()?, fields.next()?);
    let (pid, file) = (fields.next()?, fields.next()?);
    let locked: u64 = file.rsplit(':').next()?.parse().ok()?;
    (kind == "FLOCK" && access == "WRITE" && locked == inode).then(|| pid.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_found_by_its_inode() {
        assert_eq!(holder("1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF", 1234), Some(4711));
        assert_eq!(holder("1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF", 123), None);
        assert_eq!(holder("1: POSIX  ADVISORY  WRITE 4711 fe:01:1234 0 EOF", 1234), None);
        assert_eq!(holder("1: -> FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF", 1234), None);
        assert_eq!(holder("", 1), None);
    }

    #[test]
    fn never_launched_and_stopped_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Presence::of(dir.path()), Presence::Never);
        assert_eq!(Presence::of(&dir.path().join("absent")), Presence::Never);
        fs::write(dir.path().join(DATABASE), "").unwrap();
        assert_eq!(Presence::of(dir.path()), Presence::Stopped);
    }
}
