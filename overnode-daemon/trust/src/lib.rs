//! Checks that root can trust a path or its own memory on a machine with other users.
//!
//! A user who owns a directory, or can rename it, controls its content: files in it can be removed
//! and replaced whatever their own mode. Programs, maps, keys, sockets and logs are therefore kept
//! only where no user but root can do so. In tests, the user of this process is trusted as well.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::geteuid;

const WRITABLE_BY_GROUP: u32 = 0o020;
const WRITABLE_BY_OTHERS: u32 = 0o002;
/// With this bit on a directory, only the owner of an entry can rename or remove it.
const STICKY: u32 = 0o1000;

/// Why a path is not trusted: another user can change it, or it could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// The path belongs to another user.
    #[error(
        "{path} belongs to user {owner}, who can replace its contents: find out why, then remove \
         it (`rm -r {path}`) or make root its owner"
    )]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// The user ID of the owner.
        owner: u32,
    },
    /// Other users can write to the directory.
    #[error(
        "other users can write to {path} (mode {mode:04o}) and replace its contents: find out why, \
         then remove their write permission (`chmod go-w {path}`)"
    )]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The path cannot be created, opened or examined.
    #[error("{path} cannot be used: {why}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        why: io::Error,
    },
}

/// Returns true for root and for the user of this process.
pub fn is_trusted_user(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Checks that no other user can change what a path leads to. Every directory and symbolic link
/// along the path, as written and as resolved, must belong to root or to this process's user, and
/// other users must not be able to rename any component. Components that do not exist yet are
/// skipped. Once this check succeeds, other users cannot make it fail.
///
/// # Errors
/// Returns [`Untrusted`] if the path fails the check or cannot be examined.
pub fn check_path(path: &Path) -> Result<(), Untrusted> {
    let failed = |why| Untrusted::Io { path: path.to_owned(), why };
    let absolute = std::path::absolute(path).map_err(failed)?;
    check_each(&absolute)?;
    match absolute.canonicalize() {
        Ok(resolved) => check_each(&resolved),
        // A dangling link is a mistake. Opening it reports the error.
        Err(why) if is_missing(&why) => match absolute.parent() {
            Some(parent) => check_path(parent),
            None => Ok(()),
        },
        Err(why) => Err(failed(why)),
    }
}

/// Checks the path as [`check_path`] does, and that other users cannot write to the directory
/// itself. The sticky bit does not help here.
///
/// # Errors
/// Returns [`Untrusted`] if the directory fails the check or cannot be examined.
pub fn check_directory(path: &Path) -> Result<(), Untrusted> {
    check_path(path)?;
    let found = fs::metadata(path).map_err(|why| Untrusted::Io { path: path.to_owned(), why })?;
    check_own(path, &found)
}

/// Checks a file or directory that should belong to this process: its owner is trusted and other
/// users cannot write to it.
///
/// # Errors
/// Returns [`Untrusted`] if another user owns it or can write to it.
pub fn check_own(path: &Path, found: &Metadata) -> Result<(), Untrusted> {
    check_owner(path, found)?;
    if is_open(found) {
        return Err(Untrusted::Mode { path: path.to_owned(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

/// Checks only that the owner is trusted.
///
/// # Errors
/// Returns [`Untrusted::Owner`] if another user owns it.
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

/// Checks that other users cannot rename or remove entries that this process creates in a
/// directory.
///
/// # Errors
/// Returns [`Untrusted`] if another user owns the directory, or can write to it and it has no
/// sticky bit.
pub fn check_entries(path: &Path, found: &Metadata) -> Result<(), Untrusted> {
    check_owner(path, found)?;
    if is_open(found) && found.mode() & STICKY == 0 {
        return Err(Untrusted::Mode { path: path.to_owned(), mode: found.mode() & 0o7777 });
    }
    Ok(())
}

/// Returns true if other users can write to it. Root's group does not count as another user.
fn is_open(found: &Metadata) -> bool {
    let by_group = found.mode() & WRITABLE_BY_GROUP != 0 && found.gid() != 0;
    by_group || found.mode() & WRITABLE_BY_OTHERS != 0
}

/// Protects this process's memory, which contains keys, from other processes and from the disk.
/// Disables core dumps, whatever the system's settings, and denies `ptrace(2)` and `/proc/PID` to
/// processes without `CAP_SYS_PTRACE`, even of the same user. (Later kernels also let `CAP_PERFMON`
/// read.)
///
/// # Errors
/// Returns an error if the kernel refuses.
pub fn protect_memory() -> io::Result<()> {
    // The kernel ignores the limit when it pipes dumps to a program, but it respects the dumpable
    // flag.
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
    fn a_path_is_trusted_only_if_no_other_user_can_change_it() {
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

    /// Needs root to give files to another user. The daemon usually runs as root, too.
    #[test]
    fn a_path_of_another_user_is_refused_even_through_a_link() {
        let place = tempfile::tempdir().unwrap();
        let theirs = directory(&place.path().join("theirs"), 0o700);
        let inside = directory(&theirs.join("inside"), 0o700);
        chown(&theirs, Some(STRANGER), None).unwrap();
        for path in [&theirs, &inside, &theirs.join("new")] {
            let why = check_path(path).unwrap_err().to_string();
            assert!(why.contains("theirs belongs to user 1000"), "{why}");
        }
        // Also through a link that root owns.
        let link = place.path().join("link");
        symlink(&theirs, &link).unwrap();
        check_path(&link).unwrap_err();
        // A link that another user owns is not trusted either, wherever it currently leads.
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
