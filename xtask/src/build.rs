//! Building and running.

use std::{
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result};

use crate::sh::{as_root, cargo, output, run, target};

/// An explicit target keeps the flags for it away from build scripts and procedural macros.
fn triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// Builds the program and returns where it is.
pub(crate) fn socktrace(static_: bool) -> Result<PathBuf> {
    if static_ {
        run(static_cargo("build").args(["--package", "socktrace"]))?;
        return Ok(target().join(triple()).join("release/socktrace"));
    }
    run(cargo().args(["build", "--release", "--package", "socktrace"]))?;
    Ok(target().join("release/socktrace"))
}

/// Everything that runs on other kernels is linked statically.
pub(crate) fn static_cargo(verb: &str) -> Command {
    let mut command = cargo();
    command
        .args([verb, "--release", "--target", &triple()])
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    command
}

/// Builds the root tests and returns where they are.
pub(crate) fn kernel_tests() -> Result<PathBuf> {
    let messages = output(
        static_cargo("test")
            .args(["--package", "socktrace", "--test", "kernel", "--features", "kernel-tests"])
            .args(["--no-run", "--message-format=json-render-diagnostics"]),
    )?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "kernel")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not say where the root tests are")
}

/// Builds a program for measuring and returns where it is.
pub(crate) fn example(name: &str) -> Result<PathBuf> {
    run(static_cargo("build").args(["--package", "socktrace", "--example", name]))?;
    Ok(target().join(triple()).join("release/examples").join(name))
}

/// Builds socktrace and runs it as root.
pub(crate) fn run_socktrace(arguments: &[String]) -> Result<ExitCode> {
    let program = socktrace(false)?;
    let program = program.to_str().context("the path of the program is not UTF-8")?;
    let mut command = as_root(program)?;
    command.args(arguments).stdin(Stdio::inherit());
    let status = command.status().context("cannot run socktrace")?;
    // A signal that ends socktrace ends this with the number a shell would give.
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
