//! Tests the Debian package on Debian 12 with systemd: install, launch, reboot, upgrade, remove,
//! purge.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use super::{Machine, RESULT, boot, image};
use crate::setup;
use crate::step::{Step, show};
use crate::workspace::Workspace;

const STORY: &str = include_str!("package.sh");
/// Packages to install in addition to Debian's base system.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,udev,kmod,iproute2,iputils-ping,procps,docker.io,\
    iptables,ca-certificates,init-system-helpers,busybox-static";
/// Modules that the initramfs needs to mount the disk.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];
const INIT: &str = "#!/bin/busybox sh\n\
    export PATH=/bin\n\
    /bin/busybox --install -s /bin\n\
    mount -t proc proc /proc\n\
    mount -t sysfs sys /sys\n\
    mount -t devtmpfs dev /dev\n\
    for module in virtio_pci virtio_blk crc32c_generic ext4; do \
    modprobe $module 2>/dev/null; done\n\
    mkdir /disk\n\
    mount -t ext4 /dev/vda /disk || poweroff -f\n\
    umount /proc /sys\n\
    mount --move /dev /disk/dev\n\
    exec switch_root /disk /sbin/init\n";
const UNIT: &str = "[Unit]\n\
    Description=Story\n\
    DefaultDependencies=no\n\
    After=sysinit.target dbus.socket\n\
    [Service]\n\
    ExecStart=/opt/story/story\n\
    TimeoutSec=infinity\n\
    [Install]\n\
    WantedBy=multi-user.target\n";

/// Installs, reboots, upgrades and purges the package.
///
/// # Errors
/// Returns an error if something is missing or fails. The machine's output has been shown by then.
pub(crate) fn run(workspace: &Workspace, folder: &Path, kernel: &Kernel) -> Result<()> {
    setup::programs(&[("debootstrap", "debootstrap"), ("mkfs.ext4", "e2fsprogs")])?;
    let packages = crate::dist::trials(workspace, ["", "+1"])?;
    let debian = debian(folder)?;
    let disk = disk(workspace, folder, &debian, kernel, &packages)?;
    let busybox = setup::find("busybox").context("busybox is no longer installed")?;
    let initramfs = folder.join("package");
    fs::create_dir_all(&initramfs)?;
    let initramfs =
        image::pack(&initramfs, kernel, &[("busybox".to_owned(), busybox)], &MODULES, INIT)?;
    let machine = Machine { kernel: &kernel.image, initramfs: &initramfs, disk: Some(&disk) };
    let step = Step::start("start Debian, install and launch");
    let lines = boot(&machine)?;
    step.done();
    // The first boot ends with a reboot, which ends QEMU. It reports a result only if it fails.
    let failed = lines.iter().any(|line| line.starts_with(RESULT));
    ensure!(!failed, "package failed before the reboot: see above");
    let step = Step::start("start it again, upgrade, remove, purge");
    let lines = boot(&machine)?;
    step.done();
    fs::remove_file(&disk)?;
    ensure!(
        lines.iter().any(|line| *line == format!("{RESULT} package 0")),
        "package failed: see above"
    );
    Ok(())
}

/// Returns the root file system. debootstrap creates it once.
fn debian(folder: &Path) -> Result<PathBuf> {
    let place = folder.join("debian-12");
    if !place.is_dir() {
        let fresh = folder.join("debian-12.new");
        let _ = fs::remove_dir_all(&fresh);
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}"), "bookworm"]);
        Step::start("debootstrap Debian 12 (takes minutes the first time)")
            .show(debootstrap.arg(&fresh))?;
        for folder in ["var/cache/apt/archives", "var/lib/apt/lists"] {
            let _ = fs::remove_dir_all(fresh.join(folder));
        }
        // Rename only when the directory is complete: later runs look for this name.
        fs::rename(&fresh, &place)?;
    }
    Ok(place)
}

/// Creates the disk: the root file system with the kernel's modules, the packages and the test
/// script.
fn disk(
    workspace: &Workspace,
    folder: &Path,
    debian: &Path,
    kernel: &Kernel,
    packages: &[PathBuf; 2],
) -> Result<PathBuf> {
    let step = Step::start("create the disk");
    let modules = debian.join("lib/modules").join(&kernel.release);
    if !modules.is_dir() {
        fs::create_dir_all(
            modules.parent().context("the module directory has no parent directory")?,
        )?;
        show(Command::new("cp").arg("-a").arg(&kernel.modules).arg(&modules))?;
        let depmod = setup::find("depmod").context("depmod is no longer installed")?;
        show(Command::new(depmod).arg("-b").arg(debian).arg(&kernel.release))?;
    }
    let story = debian.join("opt/story");
    fs::create_dir_all(story.join("bin"))?;
    for (number, package) in packages.iter().enumerate() {
        fs::copy(package, story.join(format!("{}.deb", number + 1)))?;
    }
    let programs = workspace.target.join("debug");
    for program in ["overnode", "overnoded"] {
        let to = story.join("bin").join(program);
        show(Command::new("strip").arg("-o").arg(to).arg(programs.join(program)))?;
    }
    fs::write(story.join("story"), STORY)?;
    fs::set_permissions(story.join("story"), fs::Permissions::from_mode(0o755))?;
    fs::write(debian.join("etc/hostname"), "host1\n")?;
    fs::write(debian.join("etc/hosts"), "127.0.0.1 localhost host1\n")?;
    let unit = debian.join("etc/systemd/system/story.service");
    fs::write(&unit, UNIT)?;
    let wanted = debian.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    let _ = fs::remove_file(wanted.join("story.service"));
    symlink("/etc/systemd/system/story.service", wanted.join("story.service"))?;
    // A login prompt would take over the serial line that the script writes to.
    let prompt = debian.join("etc/systemd/system/serial-getty@ttyS0.service");
    let _ = fs::remove_file(&prompt);
    symlink("/dev/null", prompt)?;
    let disk = folder.join("debian-12.ext4");
    let _ = fs::remove_file(&disk);
    let mkfs = setup::find("mkfs.ext4").context("mkfs.ext4 is no longer installed")?;
    let mut mkfs = Command::new(mkfs);
    show(mkfs.args(["-q", "-F", "-E", "root_owner=0:0", "-d"]).arg(debian).arg(&disk).arg("3G"))?;
    step.done();
    Ok(disk)
}
