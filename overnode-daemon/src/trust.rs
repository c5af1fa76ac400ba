//! What root needs before it trusts a place in the file system, or its own memory, on a machine
//! with other users.
//!
//! A directory that another user owns, or may rename, is that user's: files in it can be taken away
//! and replaced, whatever their own mode. Programs, maps, keys, sockets and logs lie only where
//! nobody but root (or, in tests, the user of this process) can do so.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::geteuid;

const WRITABLE_BY_GROUP: u32 = 0o020;
const WRITABLE_BY_OTHERS: u32 = 0o002;
/// In a directory with this bit, only the owner of an entry may rename or remove it.
const STICKY: u32 = 0o1000;

/// A place that another user can change.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// Made by another user.
    #[error(
        "{path} belongs to user {owner}, who can replace whatever lies there: find out why, then remove \
         it (`rm -r {path}`) or let it belong to root"
    )]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// The user's number.
        owner: u32,
    },
    /// Open to other users.
    #[error(
        "other users can write to {path} (mode {mode:04o}) and replace whatever lies there: find out why, \
         then take that from them (`chmod go-w {path}`)"
    )]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It cannot be made, opened or looked at.
    #[error("{path} cannot be used: {why}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        why: io::Error,
    },
}

/// True for root, and for the user of this process.
pub fn is_trusted_user(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Checks that no other user can change what a path leads to: each directory and each symbolic link
/// on the way, as it is written and as it is resolved, belongs to root or to this process's user,
/// and other users can rename nothing on it. What does not exist yet is left out. Once this holds,
/// other users cannot make it untrue.
///
/// # Errors
/// [`Untrusted`].
pub fn check_path(path: &Path) -> Result<(), Untrusted> {
    let failed = |why| Untrusted::Io { path: path.to_owned(), why };
    let absolute = std::path::absolute(path).map_err(failed)?;
    check_each(&absolute)?;
    match absolute.canonicalize() {
        Ok(resolved) => check_each(&resolved),
        // A link that leads nowhere is somebody's mistake, and is told by whoever opens it.
        Err(why) if is_missing(&why) => match absolute.parent() {
            Some(parent) => check_path(parent),
            None => Ok(()),
        },
        Err(why) => Err(failed(why)),
    }
}

/// As [`check_path`]; besides, the directory itself is not open to other users, not even one in
/// which everybody keeps things.
///
/// # Errors
/// [`Untrusted`].
pub fn check_directory(path: &Path) -> Result<(), Untrusted> {
    check_path(path)?;
    let found = fs::metadata(path).map_err(|why| Untrusted::Io { path: path.to_owned(), why })?;
    check_own(path, &found)
}

/// Checks what was found at a path that is to be this process's own: its owner, and that nobody
/// else writes to it.
///
/// # Errors
/// [`Untrusted`].
pub fn check_own(path: &Path, found: &Metadata) -> Result<(), Untrusted> {
    check_owner(path, found)?;
    if is_open(found) {
        return Err(Untrusted::Mode { path: path.to_owned(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

/// Checks the owner only.
///
/// # Errors
/// [`Untrusted::Owner`].
pub fn check_owner(path: &Path, found: &Metadata) -> Result<(), Untrusted> {
    if is_trusted_user(found.uid()) {
        return Ok(());
    }
    Err(Untrusted::Owner { path: path.to_owned(), owner: found.uid() })
}

fn is_missing(why: &io::Error) -> bool {
    matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn check_each(absolute: &Path) -> Result<(), Untrusted> {
    let mut ancestors: Vec<&Path> = absolute.ancestors().collect();
    ancestors.reverse();
    for path in ancestors {
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(why) if is_missing(&why) => return Ok(()),
            Err(why) => return Err(Untrusted::Io { path: path.to_owned(), why }),
        };
        if path != absolute && found.is_dir() {
            check_entries(path, &found)?;
        }
        check_owner(path, &found)?;
    }
    Ok(())
}

/// Checks that no other user can rename or remove what this process makes in a directory.
///
/// # Errors
/// [`Untrusted`].
pub fn check_entries(path: &Path, found: &Metadata) -> Result<(), Untrusted> {
    check_owner(path, found)?;
    if is_open(found) && found.mode() & STICKY == 0 {
        return Err(Untrusted::Mode { path: path.to_owned(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

/// Whether other users write there. The group of root is root.
fn is_open(found: &Metadata) -> bool {
    let by_group = found.mode() & WRITABLE_BY_GROUP != 0 && found.gid() != 0;
    by_group || found.mode() & WRITABLE_BY_OTHERS != 0
}

/// Keeps this process's memory, which has keys in it, from other processes and from the disk: no
/// core dump, whatever the system's settings, and neither `ptrace(2)` nor `/proc/PID` for a process
/// without `CAP_SYS_PTRACE` (or, with later kernels, `CAP_PERFMON` to read), even of the same user.
///
/// # Errors
/// The kernel refuses.
pub fn protect_memory() -> io::Result<()> {
    // The limit is not asked where dumps go to a program; being dumpable is.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(prctl::set_dumpable(false)?)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    const STRANGER: u32 = 1000;

    fn directory(path: &Path, mode: u32) -> PathBuf {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        path.to_owned()
    }

    #[test]
    fn a_place_is_trusted_if_nobody_else_can_change_the_way_to_it() {
        let place = tempfile::tempdir().unwrap();
        let own = directory(&place.path().join("own"), 0o755);
        check_directory(&own).unwrap();
        check_path(&own.join("missing/below")).unwrap();
        let shared = directory(&place.path().join("shared"), 0o1777);
        check_path(&shared.join("new")).unwrap();
        check_directory(&shared).unwrap_err();

        let open = directory(&place.path().join("open"), 0o777);
        let why = check_path(&open.join("new")).unwrap_err().to_string();
        assert!(why.contains("open (mode 0777)") && why.contains("chmod go-w"), "{why}");
        let below = directory(&open.join("below"), 0o700);
        check_directory(&below).unwrap_err();
    }

    /// Needs root, as most of this does in earnest.
    #[test]
    fn what_another_user_owns_is_not_trusted_however_it_is_reached() {
        let place = tempfile::tempdir().unwrap();
        let theirs = directory(&place.path().join("theirs"), 0o700);
        let inside = directory(&theirs.join("inside"), 0o700);
        chown(&theirs, Some(STRANGER), None).unwrap();
        for path in [&theirs, &inside, &theirs.join("new")] {
            let why = check_path(path).unwrap_err().to_string();
            assert!(why.contains("theirs belongs to user 1000"), "{why}");
        }
        // By root's own link, too.
        let link = place.path().join("link");
        symlink(&theirs, &link).unwrap();
        check_path(&link).unwrap_err();
        // Nor is their link, wherever it leads at this moment.
        let own = directory(&place.path().join("own"), 0o700);
        let trap = place.path().join("trap");
        symlink(&own, &trap).unwrap();
        nix::unistd::fchownat(
            nix::fcntl::AT_FDCWD,
            &trap,
            Some(STRANGER.into()),
            None,
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .unwrap();
        check_path(&trap).unwrap_err();
        check_path(&trap.join("new")).unwrap_err();
    }
}
