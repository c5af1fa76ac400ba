//! Checks for what the other commands need and installs what is missing. A second run changes
//! nothing and costs next to nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use overnode_toolchain::{Compiler, bpf_linker, cargo_programs};

use crate::step::{Step, show};
use crate::workspace::Workspace;

/// The version of bpf-linker to install if there is none.
const LINKER_VERSION: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// Debian's packages of a compiler for the eBPF target.
const DEBIAN_COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const BPFFS: &str = "/sys/fs/bpf";

/// What the machine must be ready for. Each level includes the previous ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// Building.
    Build,
    /// Running hosts as network namespaces: needs system programs and root.
    Lab,
    /// Running all tests: also needs other WireGuard implementations to talk to.
    Test,
    /// Benchmarks against other software.
    Bench,
}

/// Programs, the Debian packages that contain them, and the lowest purpose that needs them.
const PROGRAMS: &[(&str, &str, Purpose)] = &[
    ("cc", "gcc", Purpose::Build),
    ("ip", "iproute2", Purpose::Lab),
    ("tc", "iproute2", Purpose::Lab),
    ("ping", "iputils-ping", Purpose::Lab),
    ("tcpdump", "tcpdump", Purpose::Lab),
    ("nft", "nftables", Purpose::Lab),
    ("ethtool", "ethtool", Purpose::Lab),
    ("iperf3", "iperf3", Purpose::Lab),
    ("dig", "bind9-dnsutils", Purpose::Test),
    ("sysctl", "procps", Purpose::Lab),
    ("mountpoint", "util-linux", Purpose::Lab),
    ("sha256sum", "coreutils", Purpose::Lab),
    ("dockerd", "docker.io", Purpose::Test),
    ("docker-compose", "docker-compose", Purpose::Test),
    ("podman", "podman", Purpose::Test),
    ("runc", "runc", Purpose::Test),
    ("/usr/lib/cni/portmap", "containernetworking-plugins", Purpose::Test),
    ("iptables", "iptables", Purpose::Test),
    ("busybox", "busybox-static", Purpose::Test),
    ("dpkg-shlibdeps", "dpkg-dev", Purpose::Test),
    ("strip", "binutils", Purpose::Test),
    ("systemd-analyze", "systemd", Purpose::Test),
    ("man", "man-db", Purpose::Test),
    ("zsh", "zsh", Purpose::Test),
    ("fish", "fish", Purpose::Test),
    ("nebula", "nebula", Purpose::Bench),
];

/// Other WireGuard implementations: program, cargo package and version. They are installed in the
/// target directory, so that no existing installation is touched.
const RIVALS: [(&str, &str, &str); 2] =
    [("boringtun-cli", "boringtun-cli", "0.7.1"), ("gotatun", "gotatun-cli", "0.10.2")];

/// Checks for everything, and installs missing parts if possible.
///
/// # Errors
/// Returns an error if something is missing and cannot be installed, such as without root or on a
/// system other than Debian. The message lists the commands to type.
pub(crate) fn run(purpose: Purpose) -> Result<()> {
    let machine = Machine::look();
    let mut packages: Vec<String> = Vec::new();
    for (program, package, needed_by) in PROGRAMS {
        if *needed_by <= purpose && find(program).is_none() {
            packages.push((*package).to_owned());
        }
    }
    let mut compiler = recent_compiler();
    if compiler.is_none() {
        packages.extend(DEBIAN_COMPILER.map(str::to_owned));
    }
    packages.dedup();
    machine.install(&packages, compiler.is_none())?;
    if compiler.is_none() {
        compiler = recent_compiler();
    }
    let compiler = compiler.context(
        "Debian's Rust compiler was installed but cannot be found, or it is older than required \
         (rustc-web 1.96). Check that apt uses the sources of bookworm-security, or use rustup \
         instead:\n    rustup toolchain install nightly --component rust-src",
    )?;
    if bpf_linker().is_none() {
        install_linker(&machine, &compiler)?;
    }
    if purpose >= Purpose::Lab {
        machine.need_root()?;
        mount_bpffs()?;
    }
    if purpose >= Purpose::Test {
        let folder = Workspace::find()?.target.join("rivals");
        for (program, package, version) in RIVALS {
            if !folder.join("bin").join(program).is_file() {
                cargo_install(package, version, &["--root", &folder.to_string_lossy()], &[])?;
            }
        }
    }
    Ok(())
}

/// Does the same as [`run`] for programs that only one command needs. Each is given with its Debian
/// package.
///
/// # Errors
/// Returns an error under the same conditions as [`run`].
pub(crate) fn programs(wanted: &[(&str, &str)]) -> Result<()> {
    let missing = wanted.iter().filter(|(program, _)| find(program).is_none());
    let mut packages: Vec<String> = missing.map(|(_, package)| (*package).to_owned()).collect();
    packages.dedup();
    Machine::look().install(&packages, false)
}

/// What this process can do on this machine.
struct Machine {
    root: bool,
    apt: bool,
}

impl Machine {
    fn look() -> Self {
        Self { root: nix::unistd::geteuid().is_root(), apt: find("apt-get").is_some() }
    }

    /// Installs Debian packages, or fails with instructions.
    fn install(&self, packages: &[String], compiler: bool) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        let list = packages.join(" ");
        if !self.apt || !self.root {
            let mut advice = format!("missing on this machine: {list}.");
            if self.apt {
                advice += &format!(
                    "\nInstall it:\n    sudo apt-get update && \
                     sudo apt-get install -y --no-install-recommends {list}"
                );
            } else {
                advice +=
                    "\nInstall it with the system's package manager (these are Debian's names).";
            }
            if compiler {
                advice += "\nInstead of rustc-web, cargo-web and rust-web-src, use rustup:\n    \
                           rustup toolchain install nightly --component rust-src";
            }
            bail!("{advice}");
        }
        let step = Step::start(format!("install {list}"));
        let install = || {
            let mut apt = apt();
            apt.args(["install", "-y", "--no-install-recommends"]).args(packages);
            apt
        };
        // Outdated package lists lead to outdated packages, or to packages that no longer exist. A
        // failing update is not fatal: it may concern an unrelated source.
        if let Err(error) = show(apt().args(["update", "-q"])) {
            eprintln!("    continuing with the existing package lists: {error:#}");
        }
        show(&mut install())?;
        step.done();
        Ok(())
    }

    fn need_root(&self) -> Result<()> {
        if !self.root {
            bail!(
                "this command creates network namespaces and loads eBPF programs: run it as root \
                 (sudo --preserve-env=PATH,HOME cargo xtask …)"
            );
        }
        Ok(())
    }
}

/// Returns an `apt-get` command that never prompts and waits for the dpkg lock.
pub(crate) fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt.args([
        "-qq",
        "-o",
        "Acquire::Retries=3",
        "-o",
        "DPkg::Lock::Timeout=300",
        "-o",
        "Dpkg::Use-Pty=0",
    ]);
    apt
}

/// Returns this machine's compiler for the eBPF target, unless it is an outdated one of Debian's.
fn recent_compiler() -> Option<Compiler> {
    let compiler = Compiler::find()?;
    let is_recent = compiler == Compiler::Rustup
        || llvm_major(&compiler).is_some_and(|major| major >= *LINKER_LLVM.start());
    is_recent.then_some(compiler)
}

/// Installs bpf-linker. It reads the compiler's output, so it must be built with an LLVM at least
/// as new as the compiler's.
fn install_linker(machine: &Machine, compiler: &Compiler) -> Result<()> {
    let major = llvm_major(compiler).context("the compiler does not report its LLVM version")?;
    let wanted = major.max(*LINKER_LLVM.start());
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{wanted}"));
    let advice = || {
        format!(
            "bpf-linker is missing, and this machine's packages do not provide LLVM {wanted}, \
             which the compiler for eBPF uses. Install a bpf-linker that includes LLVM:\n    \
             cargo binstall bpf-linker\nor unpack the archive for this machine from \
             https://github.com/aya-rs/bpf-linker/releases into a directory in PATH"
        )
    };
    if !LINKER_LLVM.contains(&wanted) {
        bail!("{}", advice());
    }
    if !prefix.join("include/llvm-c").is_dir() {
        let package = format!("llvm-{wanted}-dev");
        machine.install(&[package], false).with_context(advice)?;
    }
    cargo_install(
        "bpf-linker",
        LINKER_VERSION,
        &["--no-default-features", "--features", &format!("llvm-{wanted}")],
        &[("LLVM_PREFIX", &prefix)],
    )
}

fn llvm_major(compiler: &Compiler) -> Option<u32> {
    let mut rustc = match compiler {
        Compiler::Rustup => {
            let mut rustc = Command::new("rustc");
            rustc.arg("+nightly");
            rustc
        }
        Compiler::Debian => Command::new("/usr/bin/rustc"),
    };
    let output = rustc.env_remove("RUSTUP_TOOLCHAIN").arg("-vV").output().ok()?;
    parse_llvm_major(&String::from_utf8_lossy(&output.stdout))
}

fn parse_llvm_major(version: &str) -> Option<u32> {
    version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Runs `cargo install` with the toolchain that builds the workspace.
fn cargo_install(
    package: &str,
    version: &str,
    options: &[&str],
    environment: &[(&str, &Path)],
) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["install", "--quiet", "--locked", package, "--version", version]).args(options);
    command.envs(environment.iter().copied());
    Step::start(format!("install {package} {version} (cargo install)")).show(&mut command)
}

fn mount_bpffs() -> Result<()> {
    const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;
    // SAFETY: all-zero is a valid statfs, and the path is a C string.
    let is_mounted = unsafe {
        let mut about: libc::statfs = std::mem::zeroed();
        libc::statfs(c"/sys/fs/bpf".as_ptr(), &raw mut about) == 0 && about.f_type == BPF_FS_MAGIC
    };
    if is_mounted {
        return Ok(());
    }
    let mut mount = Command::new("mount");
    Step::start(format!("mount {BPFFS}"))
        .show(mount.args(["-t", "bpf", "-o", "mode=0700", "bpf", BPFFS]).stderr(Stdio::inherit()))
        .context(
            "bpffs, where programs and maps are pinned, cannot be mounted: this kernel or \
             container does not allow it",
        )
}

/// Returns the path of a program, from `PATH`, from cargo's directory of installed programs or from
/// Debian's directories for root.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(cargo_programs())
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_version_of_a_compiler_is_parsed() {
        assert_eq!(parse_llvm_major("rustc 1.96.0\nhost: x\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(parse_llvm_major("rustc 1.96.0\n"), None);
    }

    #[test]
    fn programs_are_found() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-of-overnode"), None);
    }

    #[test]
    fn without_root_the_error_lists_the_commands_to_type() {
        let machine = Machine { root: false, apt: true };
        assert!(machine.install(&[], false).is_ok());
        let advice =
            machine.install(&["tcpdump".into(), "rustc-web".into()], true).unwrap_err().to_string();
        assert!(
            advice.contains("sudo apt-get install -y --no-install-recommends tcpdump rustc-web"),
            "{advice}"
        );
        assert!(
            advice.contains("rustup toolchain install nightly --component rust-src"),
            "{advice}"
        );
        assert!(machine.need_root().is_err());
    }
}
