//! Builds the Debian package.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::Workspace;

use super::build::Built;
use super::{Release, Tree, output, quietly};

/// The compression level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// For releases: small files.
    Small,
    /// For tests: fast compression.
    Fast,
}

/// A package and its dependencies.
#[derive(Debug)]
pub(crate) struct Package {
    /// The `.deb` file.
    pub file: PathBuf,
    /// The `Depends` field of its control file.
    pub depends: String,
}

/// Creates the package in `out`.
///
/// # Errors
/// Returns an error if something is missing or a step fails.
pub(crate) fn make(
    workspace: &Workspace,
    built: &Built,
    release: &Release,
    out: &Path,
    compression: Compression,
) -> Result<Package> {
    let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.trim();
    let name = format!("overnode_{}_{architecture}", release.version);
    let tree = Tree::new(out.join(format!("{name}.tree")))?;
    let dist = workspace.root.join("dist");
    fill(&tree, &dist, built, release)?;
    let depends = depends(&tree, &out.join(format!("{name}.needs")))?;
    let control = std::fs::read_to_string(dist.join("debian/control"))?
        .replace("@VERSION@", &release.version)
        .replace("@ARCHITECTURE@", architecture)
        .replace("@SIZE@", &tree.size()?.to_string())
        .replace("@DEPENDS@", &depends);
    let sums = sums(&tree)?;
    tree.put("DEBIAN/control", 0o644, control.as_bytes())?;
    tree.put("DEBIAN/md5sums", 0o644, sums.as_bytes())?;
    tree.put("DEBIAN/conffiles", 0o644, b"/etc/default/overnode\n")?;
    for script in ["postinst", "postrm", "prerm"] {
        tree.copy(&format!("DEBIAN/{script}"), 0o755, &dist.join("debian").join(script))?;
    }
    let file = out.join(format!("{name}.deb"));
    let mut dpkg = Command::new("dpkg-deb");
    // With several threads, the compressed bytes depend on the number of threads.
    dpkg.env("SOURCE_DATE_EPOCH", release.time.to_string()).arg("--threads-max=1");
    match compression {
        Compression::Small => dpkg.arg("-Zxz"),
        Compression::Fast => dpkg.args(["-Zgzip", "-z1"]),
    };
    dpkg.args(["--root-owner-group", "--build"]).arg(tree.root()).arg(&file);
    quietly(&format!("pack {name}.deb"), &mut dpkg)?;
    std::fs::remove_dir_all(tree.root())?;
    Ok(Package { file, depends })
}

fn fill(tree: &Tree, dist: &Path, built: &Built, release: &Release) -> Result<()> {
    tree.program("usr/bin/overnode", &built.programs.join("overnode"))?;
    tree.program("usr/sbin/overnoded", &built.programs.join("overnoded"))?;
    // The command, under the name by which container engines invoke it.
    tree.link("usr/lib/cni/overnode-cni", "../../bin/overnode")?;
    tree.copy("usr/lib/systemd/system/overnode.service", 0o644, &dist.join("overnode.service"))?;
    tree.copy("etc/default/overnode", 0o644, &dist.join("overnode.default"))?;
    tree.copy("usr/share/doc/overnode/copyright", 0o644, &dist.join("debian/copyright"))?;
    tree.compressed("usr/share/doc/overnode/changelog.gz", changelog(dist, release)?.as_bytes())?;
    tree.compressed("usr/share/doc/overnode/libraries.gz", built.libraries.as_bytes())?;
    documents(tree, &built.documents, "usr/share")
}

/// Copies man pages and completions to the places below `share` where shells look for them.
pub(crate) fn documents(tree: &Tree, from: &Path, share: &str) -> Result<()> {
    let mut names: Vec<String> = std::fs::read_dir(from)
        .with_context(|| from.display().to_string())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        let file = from.join(&name);
        match name.rsplit_once('.') {
            Some(("overnode", "bash")) => {
                tree.copy(&format!("{share}/bash-completion/completions/overnode"), 0o644, &file)?;
            }
            Some(("overnode", "fish")) => {
                tree.copy(
                    &format!("{share}/fish/vendor_completions.d/overnode.fish"),
                    0o644,
                    &file,
                )?;
            }
            Some((_, section @ ("1" | "8"))) => {
                tree.compressed(
                    &format!("{share}/man/man{section}/{name}.gz"),
                    &std::fs::read(&file)?,
                )?;
            }
            _ => tree.copy(&format!("{share}/zsh/vendor-completions/{name}"), 0o644, &file)?,
        }
    }
    Ok(())
}

/// Returns the changelog of the tree. If it has no entry for the version, adds one at the top.
fn changelog(dist: &Path, release: &Release) -> Result<String> {
    let written = std::fs::read_to_string(dist.join("debian/changelog"))?;
    if written.starts_with(&format!("overnode ({})", release.version)) {
        return Ok(written);
    }
    let when = output(Command::new("date").args([
        "--utc",
        "--rfc-email",
        "--date",
        &format!("@{}", release.time),
    ]))?;
    let who = written.lines().find_map(|line| line.strip_prefix(" -- ")?.split("  ").next());
    let who = who.context("the changelog names no maintainer")?;
    let entry = format!(
        "overnode ({}) unstable; urgency=medium\n\n  * Same as {}.\n\n -- {who}  {}\n\n",
        release.version,
        env!("CARGO_PKG_VERSION"),
        when.trim()
    );
    Ok(entry + &written)
}

/// Returns the Debian packages that the programs link to.
fn depends(tree: &Tree, folder: &Path) -> Result<String> {
    // dpkg-shlibdeps reads the control file of a source package.
    std::fs::create_dir_all(folder.join("debian"))?;
    std::fs::write(
        folder.join("debian/control"),
        "Source: overnode\n\nPackage: overnode\nArchitecture: any\n",
    )?;
    let mut needs = Command::new("dpkg-shlibdeps");
    needs.current_dir(folder).arg("-O");
    for program in ["usr/bin/overnode", "usr/sbin/overnoded"] {
        needs.arg(tree.root().join(program));
    }
    let text = output(&mut needs)?;
    std::fs::remove_dir_all(folder)?;
    let depends = text
        .trim()
        .strip_prefix("shlibs:Depends=")
        .context("dpkg-shlibdeps printed no dependencies")?;
    // The maintainer scripts call the helpers for services.
    Ok(format!("{depends}, init-system-helpers (>= 1.54~)"))
}

/// Returns the content of `md5sums`, which `dpkg --verify` reads.
fn sums(tree: &Tree) -> Result<String> {
    let mut find = Command::new("find");
    find.current_dir(tree.root()).args(["etc", "usr", "-type", "f", "-exec", "md5sum", "{}", "+"]);
    let text = output(&mut find)?;
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.contains("  etc/")).collect();
    lines.sort_unstable_by_key(|line| line.split_once("  ").map(|(_, file)| file));
    Ok(lines.join("\n") + "\n")
}
