//! Builds the initramfs: programs with their libraries, and kernel modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::step::{describe, show};

/// The kernel modules that the lab, WireGuard and overnode use. Their dependencies are included.
/// They are loaded on demand, as on any machine.
pub(crate) const MODULES: [&str; 7] =
    ["veth", "bridge", "nf_tables", "sch_ingress", "cls_bpf", "tun", "wireguard"];
const FOLDERS: [&str; 11] =
    ["bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "run", "var", "root", "usr/bin"];

/// Packs the initramfs into a file in `folder` and returns its path.
///
/// # Errors
/// Returns an error if a program, a library or a module is missing.
pub(crate) fn pack(
    folder: &Path,
    kernel: &Kernel,
    programs: &[(String, PathBuf)],
    modules: &[&str],
    init: &str,
) -> Result<PathBuf> {
    let root = folder.join("root");
    let _ = fs::remove_dir_all(&root);
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    for (name, file) in programs {
        put_program(&root, name, file).with_context(|| format!("{name} ({})", file.display()))?;
    }
    put_modules(&root, kernel, modules)?;
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    // The kernel calls this program to load a missing module.
    symlink("/bin/busybox", root.join("sbin/modprobe"))?;
    symlink("/run", root.join("var/run"))?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    let image = folder.join("initramfs.cpio");
    archive(&root, &image)?;
    Ok(image)
}

/// Copies a program without its debugging information, and the libraries that `ldd` lists.
fn put_program(root: &Path, name: &str, file: &Path) -> Result<()> {
    let place = root.join("bin").join(name);
    show(
        Command::new("strip").args(["--strip-debug", "-o"]).arg(&place).arg(file.canonicalize()?),
    )?;
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
    // For a static program, `ldd` fails and lists no libraries.
    let output = Command::new("ldd").arg(file).output().context("ldd cannot be started")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!text.contains("not found"), "libraries are missing: {text}");
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let place = root.join(library.trim_start_matches('/').trim_end_matches(':'));
        if !place.exists() {
            fs::create_dir_all(place.parent().context("a library has no parent directory")?)?;
            fs::copy(library, place).with_context(|| library.to_owned())?;
        }
    }
    Ok(())
}

/// Copies the modules and the tables that `modprobe` uses to find them.
fn put_modules(root: &Path, kernel: &Kernel, modules: &[&str]) -> Result<()> {
    // The path is FOLDER/lib/modules/RELEASE.
    let base = kernel.modules.ancestors().nth(3).context("the modules are not in lib/modules")?;
    let tables = kernel.modules.join("modules.dep");
    if !tables.exists() {
        depmod(base, &kernel.release)?;
    }
    let text = fs::read_to_string(&tables)?;
    let built_in = fs::read_to_string(kernel.modules.join("modules.builtin"))?;
    let mut files = BTreeSet::new();
    for module in modules {
        if built_in.lines().any(|file| file.ends_with(&format!("/{module}.ko"))) {
            continue;
        }
        let line = text.lines().find(|line| {
            let name =
                line.split(':').next().and_then(|file| file.rsplit('/').next()).unwrap_or_default();
            name.split('.').next().is_some_and(|name| name.replace('-', "_") == *module)
        });
        let line =
            line.with_context(|| format!("Linux {} has no module {module}", kernel.release))?;
        files.extend(line.split([':', ' ']).filter(|file| !file.is_empty()));
    }
    let place = root.join("lib/modules").join(&kernel.release);
    for file in files {
        let to = place.join(file);
        fs::create_dir_all(to.parent().context("a module has no parent directory")?)?;
        fs::copy(kernel.modules.join(file), to).with_context(|| file.to_owned())?;
    }
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(kernel.modules.join(list), place.join(list)).with_context(|| list.to_owned())?;
    }
    depmod(root, &kernel.release)
}

fn depmod(base: &Path, release: &str) -> Result<()> {
    let depmod = crate::setup::find("depmod").context("depmod is no longer installed")?;
    show(Command::new(depmod).arg("-b").arg(base).arg(release))
}

fn archive(root: &Path, image: &Path) -> Result<()> {
    let mut list = String::new();
    let mut folders = vec![PathBuf::from(".")];
    while let Some(folder) = folders.pop() {
        list += &format!("{}\n", folder.display());
        for entry in fs::read_dir(root.join(&folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else {
                list += &format!("{}\n", path.display());
            }
        }
    }
    let mut cpio = Command::new("cpio");
    cpio.args(["--quiet", "--create", "--format=newc", "--owner=0:0"]).current_dir(root);
    let mut child = cpio
        .stdin(Stdio::piped())
        .stdout(File::create(image)?)
        .spawn()
        .context("cpio cannot be started")?;
    child.stdin.take().context("no pipe")?.write_all(list.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "`{}` failed ({status})", describe(&cpio));
    Ok(())
}
