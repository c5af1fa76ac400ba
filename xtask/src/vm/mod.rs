//! `cargo xtask vm`: tests the promise "Linux 6.1 and later" in a virtual machine.
//!
//! QEMU boots Debian's cloud kernel with an initramfs that contains the programs under test and
//! everything they call. The host's kernel and root file system are not involved. QEMU emulates the
//! machine in software, which also works where KVM is missing or cannot be nested.

mod image;
mod kernel;
mod package;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::setup::{self, Purpose};
use crate::step::{Step, describe, seconds};
use crate::workspace::Workspace;

use kernel::Kernel;

/// Time limit of the virtual machine.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// The prefix of the line in which the init process reports a part's name and exit status.
const RESULT: &str = "vm-part";

/// Programs and the Debian packages that contain them. The first [`HERE_ONLY`] run on the host, the
/// others in the virtual machine.
const PROGRAMS: [(&str, &str); 12] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("strip", "binutils"),
    ("busybox", "busybox-static"),
    ("ethtool", "ethtool"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("ping", "iputils-ping"),
    ("nft", "nftables"),
    ("mountpoint", "util-linux"),
    ("wg", "wireguard-tools"),
];
const HERE_ONLY: usize = 4;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Parts to run [default: all]
    #[arg(value_name = "PART", value_enum)]
    parts: Vec<Part>,
}

/// A part of the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The cipher under BPF_PROG_TEST_RUN
    Aead,
    /// The eBPF programs under BPF_PROG_TEST_RUN, and their size for this kernel's verifier
    Programs,
    /// Two nodes, from launch to reset
    Cluster,
    /// A node and the kernel's WireGuard
    Wireguard,
    /// Rekeying between a node and the kernel's WireGuard
    Rekey,
    /// The Debian package on Debian 12 with systemd: install, reboot, upgrade, purge
    Package,
}

impl Part {
    const ALL: [Self; 6] =
        [Self::Aead, Self::Programs, Self::Cluster, Self::Wireguard, Self::Rekey, Self::Package];

    /// Returns the part's name, which the init process prints after [`RESULT`].
    const fn name(self) -> &'static str {
        match self {
            Self::Aead => "aead",
            Self::Programs => "programs",
            Self::Cluster => "cluster",
            Self::Wireguard => "wireguard",
            Self::Rekey => "rekey",
            Self::Package => "package",
        }
    }

    const fn command(self) -> &'static str {
        match self {
            Self::Aead => "bpf_aead",
            Self::Programs => "bpf_programs",
            Self::Cluster => "vm cluster",
            Self::Wireguard => "vm wireguard",
            Self::Rekey => "vm rekey",
            Self::Package => "has a machine of its own",
        }
    }
}

/// Builds, packs and boots, and evaluates the results.
///
/// # Errors
/// Returns an error if something is missing and cannot be installed, or if a part fails. The
/// machine's output has been shown by then.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run(Purpose::Build)?;
    setup::programs(&PROGRAMS)?;
    let workspace = Workspace::find()?;
    let folder = workspace.target.join("vm");
    std::fs::create_dir_all(&folder)?;
    let kernel = Kernel::get(&folder)?;
    let mut parts =
        if arguments.parts.is_empty() { Part::ALL.to_vec() } else { arguments.parts.clone() };
    if parts.contains(&Part::Package) {
        package::run(&workspace, &folder, &kernel)?;
        parts.retain(|part| *part != Part::Package);
        if parts.is_empty() {
            return Ok(());
        }
    }
    let mut programs = build(&workspace)?;
    for (program, _) in &PROGRAMS[HERE_ONLY..] {
        let file =
            setup::find(program).with_context(|| format!("{program} is no longer installed"))?;
        programs.push(((*program).to_owned(), file));
    }
    let step = Step::start("pack the initramfs");
    let image = image::pack(&folder, &kernel, &programs, &image::MODULES, &init(&parts))?;
    step.done();
    let started = Instant::now();
    let step =
        Step::start(format!("boot Linux {} in QEMU and run {}", kernel.release, names(&parts)));
    let lines = boot(&Machine { kernel: &kernel.image, initramfs: &image, disk: None })?;
    judge(&parts, &lines)?;
    step.done();
    println!(
        "passed on Linux {}: {}; {}",
        kernel.release,
        names(&parts),
        seconds(started.elapsed())
    );
    Ok(())
}

fn names(parts: &[Part]) -> String {
    parts.iter().map(|part| part.name()).collect::<Vec<_>>().join(", ")
}

/// Builds the programs that run in the machine. Returns their names in the machine and their files
/// on the host.
fn build(workspace: &Workspace) -> Result<Vec<(String, PathBuf)>> {
    let words = [
        "--package",
        "overnode-cli",
        "--package",
        "overnode-daemon",
        "--package",
        "overnode-tests",
    ];
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--locked", "--bins"]).args(words);
    Step::start("build overnode, overnoded and the test program").show(&mut cargo)?;
    let folder = workspace.target.join("debug");
    let mut programs: Vec<(String, PathBuf)> =
        ["overnode", "overnoded", "vm"].map(|name| (name.to_owned(), folder.join(name))).into();
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--locked", "--no-run", "--message-format", "json-render-diagnostics"]);
    cargo.args(["--package", "overnode-tests", "--test", "bpf_aead", "--test", "bpf_programs"]);
    let step = Step::start("build the tests of the eBPF programs");
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "`{}` failed ({})", describe(&cargo), output.status);
    for line in output.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<Value>(line) else { continue };
        if let (Some(file), Some(name)) =
            (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            programs.push((name.to_owned(), file.into()));
        }
    }
    step.done();
    Ok(programs)
}

/// Returns the script that runs as the machine's first process.
fn init(parts: &[Part]) -> String {
    let mut script = "#!/bin/busybox sh\n\
        export PATH=/bin OVERNODE_BIN_DIR=/bin RUST_BACKTRACE=0\n\
        /bin/busybox --install -s /bin\n\
        mount -t proc proc /proc\n\
        mount -t sysfs sys /sys\n\
        mount -t devtmpfs dev /dev\n\
        mount -t bpf -o mode=0700 bpf /sys/fs/bpf\n\
        mount -t tmpfs tmp /tmp\n\
        mount -t tmpfs run /run\n\
        ip link set lo up\n"
        .to_owned();
    for part in parts {
        let (name, command) = (part.name(), part.command());
        script += &format!("echo '--- {name}'\n{command} 2>&1\necho {RESULT} {name} $?\n");
    }
    script + "poweroff -f\n"
}

/// The configuration of a virtual machine.
struct Machine<'a> {
    kernel: &'a Path,
    initramfs: &'a Path,
    /// An image of the root file system.
    disk: Option<&'a Path>,
}

/// Runs the machine until it powers off or reboots. Shows and returns the lines that it prints.
fn boot(machine: &Machine<'_>) -> Result<Vec<String>> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "2048",
        "-no-reboot",
        "-nodefaults",
    ]);
    qemu.args(["-display", "none", "-serial", "stdio", "-device", "virtio-rng-pci"]);
    if let Some(disk) = machine.disk {
        qemu.arg("-drive").arg(format!("if=virtio,format=raw,file={}", disk.display()));
    }
    qemu.arg("-kernel").arg(machine.kernel).arg("-initrd").arg(machine.initramfs);
    // With AppArmor, Debian's Docker starts no container unless a package that it only recommends
    // is installed.
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 apparmor=0"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = qemu.spawn().context("QEMU cannot be started")?;
    let output = child.stdout.take().context("no pipe")?;
    let over = Arc::new(AtomicBool::new(false));
    let watch = {
        let (over, pid) =
            (Arc::clone(&over), nix::unistd::Pid::from_raw(i32::try_from(child.id())?));
        std::thread::spawn(move || stop_in_time(pid, &over))
    };
    let mut lines = Vec::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        println!("    {line}");
        lines.push(line);
    }
    over.store(true, Ordering::Relaxed);
    let was_stopped = watch.join().unwrap_or(false);
    let status = child.wait()?;
    ensure!(!was_stopped, "the virtual machine did not finish within {}", seconds(LIMIT));
    ensure!(status.success(), "QEMU failed ({status})");
    Ok(lines)
}

/// Kills the process at the time limit. Returns true if it did. The caller waits for the process
/// only after setting `over`, so the process ID cannot be reused before.
fn stop_in_time(pid: nix::unistd::Pid, over: &AtomicBool) -> bool {
    let deadline = Instant::now() + LIMIT;
    while !over.load(Ordering::Relaxed) {
        if Instant::now() > deadline {
            return nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).is_ok();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    false
}

/// Checks that every part has reported success.
fn judge(parts: &[Part], lines: &[String]) -> Result<()> {
    let mut failures = Vec::new();
    for part in parts {
        let name = part.name();
        let status = lines.iter().find_map(|line| line.strip_prefix(&format!("{RESULT} {name} ")));
        match status {
            Some("0") => {}
            Some(status) => failures.push(format!("{name} failed (exit status {status})")),
            None => failures.push(format!("{name} did not finish")),
        }
    }
    if !failures.is_empty() {
        bail!("{}: see above", failures.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_must_report_success() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let parts = [Part::Aead, Part::Cluster];
        assert!(judge(&parts, &lines("x\nvm-part aead 0\nvm-part cluster 0")).is_ok());
        let error =
            judge(&parts, &lines("vm-part aead 101\nvm-part clus")).unwrap_err().to_string();
        assert!(error.contains("aead failed (exit status 101), cluster did not finish"), "{error}");
    }

    #[test]
    fn the_first_process_reports_on_each_part() {
        let script = init(&[Part::Wireguard]);
        assert!(script.contains("vm wireguard 2>&1\necho vm-part wireguard $?\n"), "{script}");
        assert!(script.ends_with("poweroff -f\n"), "{script}");
    }
}
