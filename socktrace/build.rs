//! Builds the eBPF object, with whichever of two compilers this machine has.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// Debian's compiler; its package `libstd-rust-web-dev-bpf` has `core` for the BPF target.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
const PACKAGE: &str = "socktrace-ebpf";

fn main() -> Result<()> {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let root = manifest_dir.parent().context("the workspace has no root")?;
    for input in [PACKAGE, "socktrace-common/src", "Cargo.lock", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(input).display());
    }

    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    // A directory of its own: cargo locks the one it builds in.
    let target_dir = out_dir.join("ebpf");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH")?;
    let mut cargo = compiler()?;
    cargo
        .args(["build", "--quiet", "--release", "--bins", "--package", PACKAGE, "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .current_dir(root)
        // What cargo and clippy set for the crate that is being built is not meant for this one.
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{arch}\""));
    let status = cargo.status().with_context(|| format!("cannot run {cargo:?}"))?;
    ensure!(
        status.success(),
        "the eBPF programs do not build; `cargo xtask setup` installs what they need"
    );
    let object = target_dir.join(TARGET).join("release").join(PACKAGE);
    std::fs::copy(&object, out_dir.join(PACKAGE))
        .with_context(|| format!("cannot copy {}", object.display()))?;
    Ok(())
}

fn variable(name: &str) -> Result<OsString> {
    env::var_os(name).with_context(|| format!("cargo did not set {name}"))
}

/// A nightly compiler with the standard library's source can build `core` itself; without one, the
/// distribution's compiler has it ready.
fn compiler() -> Result<Command> {
    if nightly_has_source() {
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo", "-Zbuild-std=core"]).env_remove("RUSTC");
        // `-Z` is for every crate here, and nightly allows it anyway.
        cargo.env_remove("RUSTC_BOOTSTRAP");
        return Ok(cargo);
    }
    let mut cargo = Command::new(variable("CARGO")?);
    // Assembly for eBPF is unstable; naming the crates keeps others out.
    cargo.env("RUSTC", SYSTEM_RUSTC).env("RUSTC_BOOTSTRAP", "aya_ebpf,socktrace_ebpf");
    Ok(cargo)
}

fn nightly_has_source() -> bool {
    let sysroot =
        Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    sysroot.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout);
        output.status.success()
            && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir()
    })
}
