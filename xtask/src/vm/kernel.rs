//! Provides Debian's kernel: unpacks its package into the target directory without installing it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::setup;
use crate::step::{Step, show};

/// The metapackage that depends on the current kernel package.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// The oldest supported series, which Debian 12 has.
const SERIES: &str = "6.1.";

/// A kernel and its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// The kernel image.
    pub image: PathBuf,
    /// The module directory, which contains `kernel/`.
    pub modules: PathBuf,
}

impl Kernel {
    /// Returns the kernel in `folder/kernel`. Downloads it with apt if it is missing.
    ///
    /// # Errors
    /// Returns an error if it is missing and this is not Debian 12, or if the download fails.
    pub(crate) fn get(folder: &Path) -> Result<Self> {
        let place = folder.join("kernel");
        if !place.is_dir() {
            download(folder, &place)?;
        }
        Self::in_folder(&place).with_context(|| format!("remove {} and try again", place.display()))
    }

    fn in_folder(place: &Path) -> Result<Self> {
        let boot = place.join("boot");
        let name = names_in(&boot)?.into_iter().find(|name| name.starts_with("vmlinuz-"));
        let name = name.with_context(|| format!("no kernel in {}", boot.display()))?;
        let release = name.trim_start_matches("vmlinuz-").to_owned();
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|folder| place.join(folder).join(&release))
            .into_iter()
            .find(|folder| folder.is_dir())
            .with_context(|| format!("no modules for {release} in {}", place.display()))?;
        Ok(Self { image: boot.join(&name), modules, release })
    }
}

fn download(folder: &Path, place: &Path) -> Result<()> {
    let package = match current_package() {
        Ok(package) => package,
        // The package lists may be missing, which only shows as an error here.
        Err(_) => {
            Step::start("read the package lists").show(setup::apt().args(["update", "-q"]))?;
            current_package()?
        }
    };
    ensure!(
        package.contains(SERIES),
        "{META_PACKAGE} is {package} on this machine, but Linux {SERIES}x of Debian 12 is needed: \
         run this on Debian 12, or unpack that package of Debian 12 with `dpkg-deb --extract` into \
         {}",
        place.display()
    );
    let step = Step::start(format!("download {package}"));
    let fresh = folder.join("download");
    let _ = std::fs::remove_dir_all(&fresh);
    std::fs::create_dir_all(&fresh)?;
    show(
        setup::apt()
            .args(["-o", "APT::Sandbox::User=root", "download", &package])
            .current_dir(&fresh),
    )?;
    let file = names_in(&fresh)?.into_iter().find(|name| name.ends_with(".deb"));
    let file = fresh.join(file.context("apt-get downloaded nothing")?);
    let unpacked = fresh.join("unpacked");
    show(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&unpacked))?;
    // Rename only when the directory is complete: later runs look for this name.
    std::fs::rename(&unpacked, place)?;
    std::fs::remove_dir_all(&fresh)?;
    step.done();
    Ok(())
}

fn current_package() -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", META_PACKAGE])
        .output()
        .context("apt-cache cannot be started: this needs Debian")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let package = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(package.with_context(|| format!("apt does not know {META_PACKAGE}"))?.to_owned())
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}
