//! Finds the compiler and the linker for the eBPF programs, for `cargo xtask`, which installs them,
//! and for the daemon's build script, which runs them.
//!
//! Two setups are supported. rustup with `nightly` and `rust-src` is preferred. Without it,
//! Debian's `rustc-web`, `cargo-web` and `rust-web-src` packages provide a compiler with its own
//! library source, so that `-Z build-std` works without a download.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A cargo and a rustc that can build `core` for `bpfel-unknown-none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compiler {
    /// `cargo +nightly` from rustup, with rust-src.
    Rustup,
    /// Debian's packages: `/usr/bin/cargo` and `/usr/bin/rustc`.
    Debian,
}

impl Compiler {
    /// Returns this machine's compiler for the eBPF target, if there is one.
    pub fn find() -> Option<Self> {
        if has_library_source(Command::new("rustc").arg("+nightly")) {
            Some(Self::Rustup)
        } else if has_library_source(&mut Command::new("/usr/bin/rustc")) {
            Some(Self::Debian)
        } else {
            None
        }
    }

    /// Returns a cargo command that uses this compiler, independent of the compiler that the
    /// calling process uses.
    pub fn cargo(&self) -> Command {
        let mut cargo = match self {
            Self::Rustup => {
                let mut cargo = Command::new("cargo");
                cargo.arg("+nightly");
                cargo
            }
            Self::Debian => {
                let mut cargo = Command::new("/usr/bin/cargo");
                cargo.env("RUSTC", "/usr/bin/rustc");
                cargo
            }
        };
        // A build script runs inside cargo. Do not pass the outer cargo's choices on.
        for variable in [
            "CARGO",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTUP_TOOLCHAIN",
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTDOC",
            "CARGO_MAKEFLAGS",
            "MAKEFLAGS",
        ] {
            cargo.env_remove(variable);
        }
        if *self == Self::Rustup {
            cargo.env_remove("RUSTC");
        }
        cargo.env("RUSTC_BOOTSTRAP", "1");
        cargo
    }
}

fn has_library_source(rustc: &mut Command) -> bool {
    let Ok(output) =
        // This check must not make rustup download a toolchain.
        rustc
            .env_remove("RUSTUP_TOOLCHAIN")
            .env("RUSTUP_AUTO_INSTALL", "0")
            .args(["--print", "sysroot"])
            .stderr(Stdio::null())
            .output()
    else {
        return false;
    };
    let Ok(sysroot) = String::from_utf8(output.stdout) else { return false };
    output.status.success()
        && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

/// Returns the path of bpf-linker, from `PATH` or from cargo's directory of installed programs.
pub fn bpf_linker() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(cargo_programs())
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

/// Returns the directory where `cargo install` puts programs.
pub fn cargo_programs() -> Option<PathBuf> {
    std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"))
}
