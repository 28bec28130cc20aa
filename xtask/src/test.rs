//! Every test there is.

use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    build,
    setup::{self, component},
    sh::{as_root, cargo, run, say},
    vm,
};

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Without the kernels in QEMU
    #[arg(long)]
    no_vm: bool,

    /// Without format and lints
    #[arg(long)]
    no_lint: bool,
}

pub(crate) fn all(args: &TestArgs) -> Result<()> {
    setup::compiler()?;
    setup::servers()?;
    setup::machines()?;
    if !args.no_lint {
        step("format", || {
            component("rustfmt", cargo().args(["fmt", "--version"]))?;
            run(cargo().args(["fmt", "--all", "--check"]))
        })?;
        step("lints", lints)?;
    }
    step("unit tests", || {
        run(build::static_cargo("test").args([
            "--package",
            "socktrace",
            "--package",
            "socktrace-common",
            "--package",
            "xtask",
        ]))
    })?;
    step("root tests on this kernel", root_tests)?;
    if !args.no_vm {
        step("kernel matrix", vm::matrix)?;
    }
    Ok(())
}

fn lints() -> Result<()> {
    component("clippy", cargo().args(["clippy", "--version"]))?;
    let deny = ["--", "--deny", "warnings"];
    run(cargo()
        .args(["clippy", "--quiet", "--all-targets", "--features", "socktrace/kernel-tests"])
        .args(["--package", "socktrace", "--package", "socktrace-common", "--package", "xtask"])
        .args(deny))?;
    // The eBPF crate compiles for this machine too, as far as types and lints go.
    let abort = ["--config", "profile.dev.panic=\"abort\""];
    run(cargo().args(["clippy", "--quiet", "--package", "socktrace-ebpf"]).args(abort).args(deny))
}

/// On this machine's own kernel, whichever backends it allows.
fn root_tests() -> Result<()> {
    let socktrace = build::socktrace(true)?;
    let tests = build::kernel_tests()?;
    let tests = tests.to_str().context("the path of the tests is not UTF-8")?;
    run(as_root("env")?
        .arg(format!("SOCKTRACE_BIN={}", socktrace.display()))
        .args([tests, "--test-threads=1"]))
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    say(format!("== {name}"));
    let began = Instant::now();
    work().with_context(|| name.to_owned())?;
    say(format!("== {name}: passed in {:.0} s", began.elapsed().as_secs_f64()));
    Ok(())
}
