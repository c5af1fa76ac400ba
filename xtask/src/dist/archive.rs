//! Builds the archive of static programs, for systems other than Debian.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::workspace::Workspace;

use super::build::Built;
use super::package::documents;
use super::{Release, Tree, quietly};

/// Creates the archive in `out`. If it is unpacked with `--strip-components=1` into `/usr/local`,
/// every file is at its expected location.
///
/// # Errors
/// Returns an error if something is missing or a step fails.
pub(crate) fn make(
    workspace: &Workspace,
    built: &Built,
    release: &Release,
    out: &Path,
) -> Result<PathBuf> {
    let name = format!("overnode-{}-{}-linux", release.version, std::env::consts::ARCH);
    let tree = Tree::new(out.join("archive.tree"))?;
    let dist = workspace.root.join("dist");
    let place = |file: &str| format!("{name}/{file}");
    tree.program(&place("bin/overnode"), &built.programs.join("overnode"))?;
    tree.program(&place("sbin/overnoded"), &built.programs.join("overnoded"))?;
    tree.link(&place("lib/cni/overnode-cni"), "../../bin/overnode")?;
    tree.copy(
        &place("lib/systemd/system/overnode.service"),
        0o644,
        &dist.join("overnode.service"),
    )?;
    let doc = place("share/doc/overnode");
    tree.copy(&format!("{doc}/overnode.default"), 0o644, &dist.join("overnode.default"))?;
    tree.put(&format!("{doc}/libraries"), 0o644, built.libraries.as_bytes())?;
    for file in ["LICENSE-APACHE", "LICENSE-MIT"] {
        let to = file.rsplit('/').next().unwrap_or(file);
        tree.copy(&format!("{doc}/{to}"), 0o644, &workspace.root.join(file))?;
    }
    documents(&tree, &built.documents, &place("share"))?;
    let file = out.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.current_dir(tree.root()).args([
        "--create",
        "--sort=name",
        "--format=gnu",
        "--owner=0",
        "--group=0",
    ]);
    tar.args(["--numeric-owner", &format!("--mtime=@{}", release.time)]);
    tar.args(["--use-compress-program", "gzip -9 --no-name", "--file"]).arg(&file).arg(&name);
    quietly(&format!("pack {name}.tar.gz"), &mut tar)?;
    std::fs::remove_dir_all(tree.root())?;
    Ok(file)
}
