//! Builds the eBPF programs and passes their object file to the crate, which embeds it.

use std::path::{Path, PathBuf};

use overnode_toolchain::{Compiler, bpf_linker};

fn main() {
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in a workspace");
    for watched in ["overnode-ebpf", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }
    let object =
        build(workspace).unwrap_or_else(|why| panic!("the eBPF programs were not built: {why}"));
    println!("cargo:rustc-env=OVERNODE_EBPF_OBJECT={}", object.display());
}

fn build(workspace: &Path) -> Result<PathBuf, String> {
    let set_up = "run `cargo xtask build`, which installs what is missing";
    let compiler = Compiler::find()
        .ok_or_else(|| format!("no compiler with the source of its library was found; {set_up}"))?;
    let linker = bpf_linker().ok_or_else(|| format!("bpf-linker was not found; {set_up}"))?;
    // One directory for every profile and for clippy, because building `core` takes half a minute.
    let target = target_directory()?.join("ebpf");
    let flags = [
        format!("-Clinker={}", linker.display()),
        // v3 has 32-bit arithmetic and atomics that return a value (Linux 5.12).
        "-Ctarget-cpu=v3".into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        // aya-log-ebpf and related crates choose their bindings by this flag.
        format!(
            "--cfg=bpf_target_arch=\"{}\"",
            std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default()
        ),
    ];
    let output = compiler
        .cargo()
        .current_dir(workspace)
        .args([
            "build",
            "--release",
            "--locked",
            "--package",
            "overnode-ebpf",
            "--bin",
            "overnode-ebpf",
        ])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .output()
        .map_err(|error| format!("cargo could not be started: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(target.join("bpfel-unknown-none/release/overnode-ebpf"))
}

/// Returns the workspace's target directory. It is derived from `OUT_DIR`
/// (`target/PROFILE/build/CRATE-HASH/out`), so that `--target-dir` and `CARGO_TARGET_DIR` are
/// honored.
fn target_directory() -> Result<PathBuf, String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    out.ancestors()
        .nth(4)
        .map(Path::to_owned)
        .ok_or_else(|| format!("{} has too few parents", out.display()))
}
