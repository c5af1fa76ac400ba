//! A directory tree that becomes a package. Every file has an explicit mode. The packers set the
//! same time for all files.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::step::describe;

use super::output;

/// A directory tree that is being filled.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Creates an empty tree. Removes what exists at the path.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be created.
    pub(crate) fn new(root: PathBuf) -> Result<Self> {
        let _ = fs::remove_dir_all(&root);
        let tree = Self { root };
        tree.folder("")?;
        Ok(tree)
    }

    /// Returns the path of the tree.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a file and creates its parent directories.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub(crate) fn put(&self, place: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.above(place)?;
        let file = self.root.join(place);
        fs::write(&file, content).with_context(|| file.display().to_string())?;
        Ok(fs::set_permissions(&file, Permissions::from_mode(mode))?)
    }

    /// Copies a file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or written.
    pub(crate) fn copy(&self, place: &str, mode: u32, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| from.display().to_string())?;
        self.put(place, mode, &content)
    }

    /// Copies a program and strips the symbols that only a debugger needs.
    ///
    /// # Errors
    /// Returns an error if the program cannot be stripped.
    pub(crate) fn program(&self, place: &str, from: &Path) -> Result<()> {
        self.above(place)?;
        let file = self.root.join(place);
        let mut strip = Command::new("strip");
        strip.args([
            "--strip-unneeded",
            "--remove-section=.comment",
            "--remove-section=.note",
            "-o",
        ]);
        output(strip.arg(&file).arg(from))?;
        Ok(fs::set_permissions(&file, Permissions::from_mode(0o755))?)
    }

    /// Writes a gzip-compressed file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub(crate) fn compressed(&self, place: &str, content: &[u8]) -> Result<()> {
        self.put(place, 0o644, &gzip(content)?)
    }

    /// Creates a symbolic link.
    ///
    /// # Errors
    /// Returns an error if the link cannot be created.
    pub(crate) fn link(&self, place: &str, to: &str) -> Result<()> {
        self.above(place)?;
        Ok(symlink(to, self.root.join(place))?)
    }

    /// Returns the installed size in KiB as Debian counts it, with each file rounded up.
    ///
    /// # Errors
    /// Returns an error if the tree cannot be read.
    pub(crate) fn size(&self) -> Result<u64> {
        fn below(folder: &Path) -> Result<u64> {
            let mut sum = 1;
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                sum += match () {
                    () if kind.is_dir() => below(&entry.path())?,
                    () if kind.is_file() => entry.metadata()?.len().div_ceil(1024),
                    () => 1,
                };
            }
            Ok(sum)
        }
        below(&self.root)
    }

    fn above(&self, place: &str) -> Result<()> {
        let mut folder = String::new();
        let (folders, _) = place.rsplit_once('/').unwrap_or_default();
        for name in folders.split('/').filter(|name| !name.is_empty()) {
            folder = format!("{folder}{name}/");
            self.folder(&folder)?;
        }
        Ok(())
    }

    /// Creates a directory whose mode does not depend on the umask.
    fn folder(&self, place: &str) -> Result<()> {
        let folder = self.root.join(place);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(fs::set_permissions(&folder, Permissions::from_mode(0o755))?)
    }
}

/// Compresses with gzip, without a file name and a time stamp.
fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = Command::new("gzip");
    gzip.args(["-9", "--no-name", "--stdout"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = gzip.spawn().context("gzip cannot be started")?;
    let mut input = child.stdin.take().context("no pipe")?;
    let written = std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut input, content));
        child.wait_with_output()
    })?;
    ensure!(written.status.success(), "`{}` failed ({})", describe(&gzip), written.status);
    Ok(written.stdout)
}
