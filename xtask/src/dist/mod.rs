//! `cargo xtask dist`: builds the Debian package, and the archive of static programs for other
//! Linux systems.
//!
//! The build is reproducible: the same tree at the same path, built with the same compiler,
//! produces the same bytes. File times come from the commit, owners and modes are fixed, and names
//! are sorted.

mod archive;
mod build;
mod package;
#[cfg(test)]
mod tests;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::setup::{self, Purpose};
use crate::step::{Step, describe};
use crate::workspace::Workspace;

use tree::Tree;

/// The required programs and the Debian packages that contain them.
const PROGRAMS: [(&str, &str); 5] = [
    ("dpkg-deb", "dpkg"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("strip", "binutils"),
    ("musl-gcc", "musl-tools"),
    ("systemd-analyze", "systemd"),
];

/// Options of the command.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    cargo xtask dist                          into target/dist\n  \
    cargo xtask dist --version-suffix +2      the same with a later version, to test an upgrade")]
pub(crate) struct Arguments {
    /// Output directory [default: target/dist]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Text to append to the version
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = suffix)]
    version_suffix: String,
}

/// The version and the time stamp of a release.
#[derive(Debug)]
pub(crate) struct Release {
    /// The workspace's version with the requested suffix.
    pub version: String,
    /// The time of the commit, in seconds since 1970. All files get this time.
    pub time: u64,
}

impl Release {
    /// Returns the release of this tree.
    ///
    /// # Errors
    /// Returns an error if neither git nor SOURCE_DATE_EPOCH provides a time.
    pub(crate) fn of(workspace: &Workspace, suffix: &str) -> Result<Self> {
        let time = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(time) => time,
            Err(_) => {
                let mut git = Command::new("git");
                git.current_dir(&workspace.root).args(["log", "-1", "--format=%ct"]);
                output(&mut git)
                    .context("the time of the last commit is unknown: set SOURCE_DATE_EPOCH")?
            }
        };
        let time =
            time.trim().parse().with_context(|| format!("{time:?} is not a time in seconds"))?;
        Ok(Self { version: format!("{}{suffix}", env!("CARGO_PKG_VERSION")), time })
    }
}

/// Builds and packs, and prints the results.
///
/// # Errors
/// Returns an error if something is missing and cannot be installed, or if a step fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(Purpose::Build)?;
    setup::programs(&PROGRAMS)?;
    let workspace = Workspace::find()?;
    let release = Release::of(&workspace, &arguments.version_suffix)?;
    let out = arguments.out.clone().unwrap_or_else(|| workspace.target.join("dist"));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let built = build::host(&workspace)?;
    let static_built = build::static_programs(&workspace, &built)?;
    let package = package::make(&workspace, &built, &release, &out, package::Compression::Small)?;
    let archive = archive::make(&workspace, &static_built, &release, &out)?;
    println!("depends on: {}", package.depends);
    for file in [&package.file, &archive] {
        report(file)?;
    }
    println!("overnode.service: {}", exposure(&workspace)?);
    Ok(())
}

/// Builds a package of the development build for each suffix, for tests that install packages.
///
/// # Errors
/// Returns an error under the same conditions as [`run`].
pub(crate) fn trials(workspace: &Workspace, suffixes: [&str; 2]) -> Result<[PathBuf; 2]> {
    setup::programs(&PROGRAMS[..3])?;
    let out = workspace.target.join("dist-test");
    std::fs::create_dir_all(&out)?;
    let built = build::development(workspace, out.join("documents"))?;
    let make = |suffix| -> Result<PathBuf> {
        let release = Release::of(workspace, suffix)?;
        Ok(package::make(workspace, &built, &release, &out, package::Compression::Fast)?.file)
    };
    Ok([make(suffixes[0])?, make(suffixes[1])?])
}

/// Returns systemd's rating of the unit's hardening as one line. 0 means not exposed, 10 means
/// fully exposed.
///
/// # Errors
/// Returns an error if `systemd-analyze` fails or reports no rating.
fn exposure(workspace: &Workspace) -> Result<String> {
    let unit = workspace.root.join("dist/overnode.service");
    let mut analyze = Command::new("systemd-analyze");
    let text = output(analyze.args(["security", "--offline=true", "--no-pager"]).arg(unit))?;
    let line = text.lines().find(|line| line.contains("Overall exposure level"));
    let line = line
        .with_context(|| format!("`{}` reports no exposure level: {text}", describe(&analyze)))?;
    // The rating is followed by an emoji.
    let words: Vec<&str> = line.split_whitespace().filter(|word| word.is_ascii()).collect();
    Ok(words.join(" ").split_once(": ").context("the exposure level is missing")?.1.replacen(
        "",
        "overall exposure level ",
        1,
    ))
}

fn report(file: &Path) -> Result<()> {
    let size = std::fs::metadata(file)?.len();
    let mut sum = Command::new("sha256sum");
    let text = output(sum.arg(file))?;
    let sum = text.split_whitespace().next().context("sha256sum printed nothing")?;
    println!("{}: {:.1} MB, SHA-256 {sum}", file.display(), size as f64 / 1e6);
    Ok(())
}

/// Runs a command and returns its standard output. The command must exit with 0.
fn output(command: &mut Command) -> Result<String> {
    let output =
        command.output().with_context(|| format!("`{}` cannot be started", describe(command)))?;
    ensure!(
        output.status.success(),
        "`{}` failed ({}): {}",
        describe(command),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Checks that Debian allows the suffix in a version without epoch and revision (deb-version(7)).
fn suffix(text: &str) -> Result<String, &'static str> {
    let fits = text.chars().all(|c| c.is_ascii_alphanumeric() || ".+~".contains(c));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("a version may only contain letters, digits, `.`, `+` and `~`")
    }
}

/// Runs a step of one command without showing its output.
fn quietly(what: &str, command: &mut Command) -> Result<()> {
    let step = Step::start(what);
    output(command)?;
    step.done();
    Ok(())
}
