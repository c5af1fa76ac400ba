//! A separate host for each test: directories that are removed with it, and the real command that
//! runs on them.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The directories in which a node would live.
pub(crate) struct Host {
    dir: TempDir,
}

/// Exit code and output of a command.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Returns a command for this executable, with the host's directories and a known environment.
pub(crate) fn overnode(executable: &Path, host: &Host, arguments: &[&str]) -> Command {
    let mut command = Command::new(executable);
    for name in ["OVERNODE_TOKEN", "NO_COLOR", "COLUMNS", "OVERNODE_DEBUG"] {
        command.env_remove(name);
    }
    command
        .env("OVERNODE_STATE_DIR", host.state_dir())
        .env("OVERNODE_RUN_DIR", host.run_dir())
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Creates an executable file. Another process writes it. If this process had it open, a test that
/// forks at that moment would keep it open too, and it could not be executed ("text file busy").
pub(crate) fn install(file: &Path, content: &[u8]) {
    let mut writer = Command::new("sh")
        .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
        .arg(file)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    writer.stdin.take().unwrap().write_all(content).unwrap();
    assert!(writer.wait().unwrap().success());
}

/// Copies the command into this directory, where any user may execute it.
pub(crate) fn install_overnode(directory: &Path) -> PathBuf {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.join("overnode");
    install(&copy, &fs::read(env!("CARGO_BIN_EXE_overnode")).unwrap());
    copy
}

impl Host {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path().join("state")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.path().join("run")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir().join("overnode.sock")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        overnode(Path::new(env!("CARGO_BIN_EXE_overnode")), self, arguments)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(arguments))
    }

    /// Leaves the host as a stopped daemon does.
    pub(crate) fn pretend_launched(&self) {
        fs::create_dir_all(self.state_dir()).unwrap();
        fs::write(self.state_dir().join("overnode.redb"), "").unwrap();
    }

    /// Returns whether nothing was created.
    pub(crate) fn is_untouched(&self) -> bool {
        fs::read_dir(self.path()).unwrap().next().is_none()
    }
}

impl Outcome {
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        Self {
            code: output.status.code().expect("it was not killed"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Returns the one line that a failing command writes to standard error.
    pub(crate) fn error_line(&self) -> String {
        let line = self.stderr.strip_suffix('\n').unwrap_or_else(|| panic!("not a line: {self:?}"));
        assert!(
            !line.contains('\n')
                && (line.starts_with("overnode: ")
                    || line.starts_with("overnode is not running on this host: ")),
            "{self:?}"
        );
        line.to_owned()
    }
}
