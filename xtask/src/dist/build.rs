//! The release binaries, the man pages and the list of libraries.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{Step, show};
use crate::workspace::Workspace;

use super::{output, quietly};

/// What is packed.
#[derive(Clone, Debug)]
pub struct Built {
    /// Holds `overnode` and `overnoded`.
    pub programs: PathBuf,
    /// Holds man pages and completions.
    pub documents: PathBuf,
    /// The libraries in the programs with their versions and licenses, one a line.
    pub libraries: String,
}

/// For this machine, with its C library.
///
/// # Errors
/// When it does not build.
pub fn host(workspace: &Workspace) -> Result<Built> {
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

/// The development build, as tests use it; its documents go to a folder.
///
/// # Errors
/// When it does not build.
pub fn development(workspace: &Workspace, documents: PathBuf) -> Result<Built> {
    let programs = workspace.target.join("debug");
    // `cargo xtask test` has built all of it.
    if std::env::var_os("OVERNODE_BIN_DIR").is_none() {
        let mut cargo = workspace.cargo();
        // With the tests: the features of dependencies would differ otherwise, and much be built
        // twice.
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

/// For any Linux: with musl, and no library outside.
///
/// # Errors
/// When it does not build.
pub fn static_programs(workspace: &Workspace, built: &Built) -> Result<Built> {
    let target = triple("musl");
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if !PathBuf::from(sysroot.trim()).join("lib/rustlib").join(&target).is_dir() {
        show(Command::new("rustup").args(["target", "add", &target])).with_context(|| {
            format!("the compiler has no library for {target}: install it (`rustup target add {target}`)")
        })?;
    }
    let mut cargo = cargo(workspace, &target);
    Step::start("build the static binaries").show(cargo.arg("--bins"))?;
    Ok(Built { programs: folder(workspace, &target), ..built.clone() })
}

/// The triple of this machine with a C library.
pub fn triple(library: &str) -> String {
    format!("{}-unknown-linux-{library}", std::env::consts::ARCH)
}

fn folder(workspace: &Workspace, target: &str) -> PathBuf {
    workspace.target.join("dist").join(target).join("release")
}

/// In a target directory of its own: its flags are not those of other builds.
fn cargo(workspace: &Workspace, target: &str) -> Command {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    // Where the sources lie is in the messages of panics.
    let mut flags = vec![format!("--remap-path-prefix={}=/build", workspace.root.display())];
    flags.extend(home.map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    let mut cargo = workspace.cargo();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    cargo.args(["build", "--release", "--locked", "--target", target, "--target-dir"]);
    cargo.arg(workspace.target.join("dist"));
    cargo.args(["--package", "overnode-daemon", "--package", "overnode-cli"]);
    cargo
}

/// Names and licenses are what the licenses of most of them ask for.
pub fn libraries(workspace: &Workspace, target: &str) -> Result<String> {
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
    // Those of the workspace come with their folder, and what was listed before with a star.
    let mut lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)").trim_end())
        .filter(|line| !line.is_empty() && !line.contains(" (/"))
        .collect();
    lines.sort_unstable();
    lines.dedup();
    Ok(lines.join("\n") + "\n")
}
