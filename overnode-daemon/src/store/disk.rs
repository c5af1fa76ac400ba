//! Manages the directory, the files and the lock.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use redb::{DatabaseError, StorageError};

use super::{DATABASE, LOCK, Result, StoreError};
use overnode_trust as trust;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Creates the directory with mode 0700 at a path that no other user can change. Adopts an existing
/// directory that belongs to this process's user.
pub(super) fn make_directory(directory: &Path) -> Result<()> {
    trust::check_path(directory)?;
    let created = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => fs::create_dir_all(parent),
        Some(_) | None => Ok(()),
    };
    created.map_err(|why| io_error("could not create the parent directory of", directory, why))?;
    match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
        Ok(()) => {}
        Err(why) if why.kind() == io::ErrorKind::AlreadyExists => check_is_ours(directory)?,
        Err(why) => return Err(io_error("could not create the state directory", directory, why)),
    }
    // The umask may have removed bits, and an existing directory may have too many.
    let make_private = || {
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(directory)?;
        let owner = opened.metadata()?;
        opened.set_permissions(Permissions::from_mode(DIRECTORY_MODE))?;
        Ok(owner)
    };
    let found = make_private()
        .map_err(|why| io_error("could not set the mode of the state directory", directory, why))?;
    Ok(trust::check_owner(directory, &found)?)
}

/// Checks that an existing directory is empty or ours, since it is made private afterwards. This
/// must not happen to a directory that is used for something else, such as `/tmp`.
fn check_is_ours(directory: &Path) -> Result<()> {
    let look = || {
        let is_empty = fs::read_dir(directory)?.next().transpose()?.is_none();
        Ok(is_empty
            || directory.join(DATABASE).try_exists()?
            || directory.join(LOCK).try_exists()?)
    };
    if look().map_err(|why| io_error("could not read", directory, why))? {
        return Ok(());
    }
    Err(StoreError::Foreign { path: directory.to_owned() })
}

pub(super) fn make_private_file(path: &Path) -> Result<File> {
    let open = || {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        let found = file.metadata()?;
        Ok((file, found))
    };
    let failed = |why| io_error("could not open for writing", path, why);
    let (file, found) = open().map_err(failed)?;
    // If the directory was writable for other users before, it may contain files that they created.
    trust::check_owner(path, &found)?;
    file.set_permissions(Permissions::from_mode(FILE_MODE)).map_err(failed)?;
    Ok(file)
}

/// Retries briefly. Between `fork` and `exec`, a child of the previous holder has its parent's
/// locks.
pub(super) fn retry_while_locked<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..LOCK_TRIES {
        match attempt() {
            Err(StoreError::Locked { .. }) => std::thread::sleep(LOCK_PAUSE),
            outcome => return outcome,
        }
    }
    attempt()
}

pub(super) fn lock(directory: &Path) -> Result<File> {
    retry_while_locked(|| lock_now(directory))
}

fn lock_now(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    loop {
        let mut file = make_private_file(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let holder =
                    file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(StoreError::Locked { path: directory.to_owned(), holder });
            }
            Err(TryLockError::Error(why)) => return Err(io_error("could not lock", &path, why)),
        }
        if is_still_at(&file, &path) {
            let mut write = || {
                file.set_len(0)?;
                file.rewind()?;
                writeln!(file, "{}", std::process::id())
            };
            write().map_err(|why| io_error("could not write", &path, why))?;
            return Ok(file);
        }
    }
}

/// Returns false if a reset removed the file between opening and locking it. Such a lock is
/// worthless.
fn is_still_at(file: &File, path: &Path) -> bool {
    let inode = |metadata: io::Result<fs::Metadata>| {
        metadata.map(|metadata| (metadata.dev(), metadata.ino())).ok()
    };
    let locked = inode(file.metadata());
    locked.is_some() && locked == inode(fs::symlink_metadata(path))
}

/// Removes the files, and the directory if it is then empty.
pub(super) fn remove(directory: &Path, files: &[&str]) -> Result<()> {
    for file in files {
        let path = directory.join(file);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => return Err(io_error("could not remove", &path, why)),
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => Ok(()),
        Err(why)
            if matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
        {
            Ok(())
        }
        // The directory is a mount point, or its parent is not writable. It is sufficient that it
        // is empty.
        Err(why)
            if matches!(
                why.kind(),
                io::ErrorKind::ResourceBusy
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Ok(())
        }
        Err(why) => Err(io_error("could not remove", directory, why)),
    }
}

pub(super) fn open_error(directory: &Path, path: &Path, why: DatabaseError) -> StoreError {
    match why {
        DatabaseError::DatabaseAlreadyOpen => {
            StoreError::Locked { path: directory.to_owned(), holder: None }
        }
        DatabaseError::UpgradeRequired(found) => StoreError::Schema {
            path: directory.to_owned(),
            found: format!("of database format {found}"),
        },
        // redb reports these two kinds for a file that is not a redb database and for a truncated
        // one.
        DatabaseError::Storage(StorageError::Io(why))
            if !matches!(why.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
        {
            io_error("could not open", path, why)
        }
        other => StoreError::Damaged { path: path.to_owned(), why: other.to_string() },
    }
}

pub(super) fn io_error(what: &'static str, path: &Path, why: io::Error) -> StoreError {
    let advice = match why.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as root, or use a --state-dir that you can write to"
        }
        io::ErrorKind::ReadOnlyFilesystem => "use a --state-dir on a writable file system",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some disk space",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "use a --state-dir that is a directory"
        }
        _ => "check the path, or use another --state-dir",
    };
    StoreError::Io { what, path: path.to_owned(), why, advice }
}
