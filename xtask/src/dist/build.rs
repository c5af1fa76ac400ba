//! Builds the release binaries, the man pages and the list of libraries.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{Step, show};
use crate::workspace::Workspace;

use super::{output, quietly};

/// The build results that are packed.
#[derive(Clone, Debug)]
pub(crate) struct Built {
    /// The directory of `overnode` and `overnoded`.
    pub programs: PathBuf,
    /// The directory of the man pages and shell completions.
    pub documents: PathBuf,
    /// The libraries that the programs contain, one per line, with version and license.
    pub libraries: String,
}

/// Builds for this machine, linked to its C library.
///
/// # Errors
/// Returns an error if the build fails.
pub(crate) fn host(workspace: &Workspace) -> Result<Built> {
    let target = triple("gnu");
    let mut cargo = cargo(workspace, &target);
    cargo.args(["--bins", "--example", "documents"]);
    Step::start("build the release binaries").show(&mut cargo)?;
    let programs = folder(workspace, &target);
    let documents = workspace.target.join("dist/documents");
    let program = programs.join("examples/documents");
    let _ = std::fs::remove_dir_all(&documents);
    quietly("write the man pages and the completions", Command::new(program).arg(&documents))?;
    Ok(Built { programs, documents, libraries: libraries(workspace, &target)? })
}

/// Returns the development build, which the tests use. Writes its documents to the given directory.
///
/// # Errors
/// Returns an error if the build fails.
pub(crate) fn development(workspace: &Workspace, documents: PathBuf) -> Result<Built> {
    let programs = workspace.target.join("debug");
    // `cargo xtask test`, which sets this variable, has already built everything.
    if std::env::var_os("OVERNODE_BIN_DIR").is_none() {
        let mut cargo = workspace.cargo();
        // Include the tests. Without them, dependencies would have other features and much would be
        // built twice.
        cargo.args([
            "build",
            "--locked",
            "--package",
            "overnode-daemon",
            "--package",
            "overnode-cli",
        ]);
        cargo.args(["--package", "overnode-tests", "--bins", "--example", "documents"]);
        Step::start("build the programs").show(&mut cargo)?;
    }
    let _ = std::fs::remove_dir_all(&documents);
    output(Command::new(programs.join("examples/documents")).arg(&documents))?;
    Ok(Built { programs, documents, libraries: libraries(workspace, &triple("gnu"))? })
}

/// Builds static programs with musl, which run on any Linux.
///
/// # Errors
/// Returns an error if the build fails.
pub(crate) fn static_programs(workspace: &Workspace, built: &Built) -> Result<Built> {
    let target = triple("musl");
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if !PathBuf::from(sysroot.trim()).join("lib/rustlib").join(&target).is_dir() {
        show(Command::new("rustup").args(["target", "add", &target])).with_context(|| {
            format!(
                "the compiler has no library for {target}: install it with \
                 `rustup target add {target}`"
            )
        })?;
    }
    let mut cargo = cargo(workspace, &target);
    Step::start("build the static binaries").show(cargo.arg("--bins"))?;
    Ok(Built { programs: folder(workspace, &target), ..built.clone() })
}

/// Returns the target triple of this machine with the given C library.
pub(crate) fn triple(library: &str) -> String {
    format!("{}-unknown-linux-{library}", std::env::consts::ARCH)
}

fn folder(workspace: &Workspace, target: &str) -> PathBuf {
    workspace.target.join("dist").join(target).join("release")
}

/// Returns a cargo command for a release build. It uses a separate target directory because its
/// flags differ from those of other builds.
fn cargo(workspace: &Workspace, target: &str) -> Command {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    // Panic messages contain source paths. Remap them.
    let mut flags = vec![format!("--remap-path-prefix={}=/build", workspace.root.display())];
    flags.extend(home.map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    let mut cargo = workspace.cargo();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    cargo.args(["build", "--release", "--locked", "--target", target, "--target-dir"]);
    cargo.arg(workspace.target.join("dist"));
    cargo.args(["--package", "overnode-daemon", "--package", "overnode-cli"]);
    cargo
}

/// Returns the names, versions and licenses of all libraries. Most of their licenses require this
/// list.
pub(crate) fn libraries(workspace: &Workspace, target: &str) -> Result<String> {
    let mut cargo = workspace.cargo();
    cargo.args(["tree", "--locked", "--target", target, "--edges", "normal", "--prefix", "none"]);
    cargo.args([
        "--format",
        "{p} {l}",
        "--package",
        "overnode-daemon",
        "--package",
        "overnode-cli",
    ]);
    let text = output(&mut cargo)?;
    // Skip packages of the workspace, which are listed with their path. A repeated package is
    // marked with an asterisk.
    let mut lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)").trim_end())
        .filter(|line| !line.is_empty() && !line.contains(" (/"))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    Ok(lines.join("\n") + "\n")
}
