//! Finds the built `overnode` and `overnoded`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail, ensure};

/// Returns the folder that holds `overnode` and `overnoded`. This is `OVERNODE_BIN_DIR` if it is
/// set (`cargo xtask` sets it). Otherwise it is the development build, which is brought up to date
/// first.
///
/// # Errors
/// Fails if the folder does not hold them or they do not build.
pub fn folder() -> Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = FOLDER.get_or_init(|| find().map_err(|error| format!("{error:#}")));
    found.as_deref().map_err(|error| anyhow!("{error}"))
}

fn find() -> Result<PathBuf> {
    let folder = match std::env::var_os("OVERNODE_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => build()?,
    };
    for binary in ["overnode", "overnoded"] {
        ensure!(
            folder.join(binary).is_file(),
            "{} has no `{binary}`: run `cargo xtask build`, or set OVERNODE_BIN_DIR",
            folder.display()
        );
    }
    Ok(folder)
}

fn build() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(&workspace)
        .args([
            "build",
            "--quiet",
            "--package",
            "overnode-cli",
            "--package",
            "overnode-daemon",
            "--bins",
        ])
        .output()?;
    if !output.status.success() {
        bail!("cannot build overnode: {}", String::from_utf8_lossy(&output.stderr));
    }
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => Ok(PathBuf::from(target).join("debug")),
        None => Ok(workspace.canonicalize()?.join("target/debug")),
    }
}
