//! Other people's programs to measure beside and to talk to, built from their Cargo packages.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::Step;
use crate::workspace::Workspace;

/// Cargo packages with a WireGuard of their own: package, version, program.
const RIVALS: [(&str, &str, &str); 2] =
    [("boringtun-cli", "0.7.1", "boringtun-cli"), ("gotatun-cli", "0.10.2", "gotatun")];

/// Makes sure that they are in `rivals/bin` of the target directory. The first time takes minutes.
///
/// # Errors
/// When one cannot be downloaded or does not build.
pub fn ensure(workspace: &Workspace) -> Result<()> {
    let folder = workspace.target.join("rivals");
    for (package, version, program) in RIVALS {
        // Written last: a program of another version, or half of one, does not count.
        let mark = folder.join(format!("{package}-{version}"));
        if mark.exists() && folder.join("bin").join(program).exists() {
            continue;
        }
        let step = Step::start(format!("install {package} {version} to compare with (once, a minute or two)"));
        step.show(&mut install(&folder, package, version))
            .with_context(|| format!("{package} {version} is needed to test and to measure against it"))?;
        std::fs::write(&mark, "").with_context(|| format!("{} cannot be written", mark.display()))?;
        // The programs stay; what they were built from is half a gigabyte.
        let _ = std::fs::remove_dir_all(folder.join("build"));
    }
    Ok(())
}

fn install(folder: &Path, package: &str, version: &str) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo.args(["install", "--quiet", "--locked", "--force", package, "--version", version]);
    cargo.arg("--root").arg(folder).arg("--target-dir").arg(folder.join("build"));
    // Flags meant for this workspace are not meant for them.
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
}
