//! Installs what is missing.
//!
//! Two ways lead to an eBPF compiler. A nightly toolchain with the standard library's source builds
//! `core` for the BPF target itself. Debian's `rustc-web` has `core` for it ready; then bpf-linker
//! must be built against the same LLVM.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::sh::{self, as_root, command, exists, output, run, say, succeeds};

const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
/// The last bpf-linker that brings its own LLVM and fits nightly, and the last that takes the
/// system's.
const LINKER_WITH_LLVM: &str = "0.10.4";
const LINKER_FOR_SYSTEM_LLVM: &str = "0.13.0";

/// What building needs.
pub(crate) fn compiler() -> Result<()> {
    if !exists("cc") {
        apt_install(&["gcc", "libc6-dev"])?;
    }
    if nightly_has_source() {
        if !exists("bpf-linker") {
            say(format!("installing bpf-linker {LINKER_WITH_LLVM} for the nightly toolchain"));
            let arguments = ["install", "bpf-linker", "--locked", "--version", LINKER_WITH_LLVM];
            run(sh::cargo().args(arguments))?;
        }
        return Ok(());
    }
    if !system_compiler() {
        let packages = ["rustc-web", "libstd-rust-web-dev-bpf"];
        if !debian_has(&packages) {
            return from_rustup();
        }
        apt_install(&packages)?;
        if !system_compiler() {
            bail!(
                "{SYSTEM_RUSTC} still has no BPF target after installing {}",
                packages.join(" and ")
            );
        }
    }
    system_linker()
}

/// Debian's, whatever else is first on PATH.
pub(crate) const PYTHON: &str = "/usr/bin/python3";
/// What the root tests watch; each is a package, and a service of that name.
pub(crate) const SERVERS: &[&str] = &["nginx", "haproxy", "redis-server"];

/// What puts load on them.
pub(crate) const CLIENTS: &[&str] = &["wrk"];

/// What the root tests need: servers to watch, and their clients.
pub(crate) fn servers() -> Result<()> {
    if !Path::new(PYTHON).exists() {
        apt_install(&["python3-minimal"])?;
    }
    let missing: Vec<&str> = CLIENTS.iter().copied().filter(|name| !exists(name)).collect();
    if !missing.is_empty() {
        apt_install(&missing)?;
    }
    let missing: Vec<&str> = SERVERS.iter().copied().filter(|name| !exists(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    apt_install(&missing)?;
    // Nor at the next boot. Where that fails they run beside the tests, which live in namespaces of
    // their own.
    if exists("systemctl") {
        succeeds(as_root("systemctl")?.args(["--quiet", "disable"]).args(&missing));
    }
    Ok(())
}

/// What the kernel matrix needs.
pub(crate) fn machines() -> Result<()> {
    let needed = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("cpio", "cpio"),
        ("ss", "iproute2"),
        ("xz", "xz-utils"),
        ("ip", "iproute2"),
    ];
    let packages: Vec<&str> = needed
        .iter()
        .filter(|(program, _)| !exists(program))
        .map(|(_, package)| *package)
        .collect();
    if !packages.is_empty() {
        apt_install(&packages)?;
    }
    Ok(())
}

fn nightly_has_source() -> bool {
    let mut rustc = command("rustup");
    rustc
        .args(["run", "nightly", "rustc", "--print", "sysroot"])
        .stderr(std::process::Stdio::null());
    rustc.output().is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout);
        output.status.success()
            && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir()
    })
}

/// Whether Debian's compiler is there, with its library for the BPF target.
fn system_compiler() -> bool {
    let libraries = output(command(SYSTEM_RUSTC).args([
        "--print",
        "target-libdir",
        "--target",
        "bpfel-unknown-none",
    ]));
    Path::new(SYSTEM_RUSTC).exists() && libraries.is_ok_and(|path| Path::new(path.trim()).is_dir())
}

/// bpf-linker against the LLVM that Debian's compiler was built with.
fn system_linker() -> Result<()> {
    if exists("bpf-linker") {
        return Ok(());
    }
    let version = output(command(SYSTEM_RUSTC).arg("-vV"))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .with_context(|| format!("{SYSTEM_RUSTC} does not say which LLVM it has"))?
        .to_owned();
    let home = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&home).join("bin/llvm-config").exists() {
        apt_install(&[&format!("llvm-{llvm}-dev"), &format!("libpolly-{llvm}-dev")])?;
    }
    say(format!("building bpf-linker {LINKER_FOR_SYSTEM_LLVM} against LLVM {llvm}"));
    let path = std::env::var("PATH").unwrap_or_default();
    run(sh::cargo()
        .args(["install", "bpf-linker", "--version", LINKER_FOR_SYSTEM_LLVM])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")])
        .env("PATH", format!("{home}/bin:{path}")))
}

fn from_rustup() -> Result<()> {
    say("no Debian packages with a BPF compiler; asking rustup for a nightly toolchain");
    let rustup = run(command("rustup").args([
        "toolchain",
        "install",
        "nightly",
        "--component",
        "rust-src",
        "--profile",
        "minimal",
    ]));
    if rustup.is_err() {
        bail!(
            "there is no eBPF compiler to be had here. Either of these makes one:\n  \
             rustup toolchain install nightly --component rust-src\n  \
             apt-get install rustc-web libstd-rust-web-dev-bpf    (Debian 12 or later)"
        );
    }
    compiler()
}

/// Whether apt can install all of them.
fn debian_has(packages: &[&str]) -> bool {
    if !exists("apt-get") {
        return false;
    }
    let known = |package: &&str| {
        output(command("apt-cache").args(["policy", package])).is_ok_and(|policy| {
            policy.contains("Candidate:") && !policy.contains("(none)\n  Version")
        })
    };
    if packages.iter().all(known) {
        return true;
    }
    // A machine that was never updated knows no packages.
    apt(&["update"]).is_ok() && packages.iter().all(known)
}

fn apt_install(packages: &[&str]) -> Result<()> {
    say(format!("installing {}", packages.join(", ")));
    let install = [&["install", "--yes", "--no-install-recommends"], packages].concat();
    if apt(&install).is_ok() {
        return Ok(());
    }
    // The usual reason is a package list that is too old.
    apt(&["update"])?;
    apt(&install).with_context(|| format!("install {} by hand", packages.join(", ")))
}

/// Runs its arguments while no package may start a service (`invoke-rc.d(8)`: 101 forbids it).
const WITHOUT_SERVICES: &str = r#"
policy=/usr/sbin/policy-rc.d
if ! [ -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
fi
"$@"
"#;

fn apt(arguments: &[&str]) -> Result<()> {
    let quiet = ["-qq", "-o=Dpkg::Use-Pty=0"];
    run(as_root("sh")?
        .args(["-c", WITHOUT_SERVICES, "sh"])
        .args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"])
        .args(quiet)
        .args(arguments))
}

/// Whether a component of the toolchain runs, installing it where rustup can.
pub(crate) fn component(name: &str, probe: &mut Command) -> Result<()> {
    if succeeds(probe) {
        return Ok(());
    }
    say(format!("installing {name}"));
    run(command("rustup").args(["component", "add", name]))
}
