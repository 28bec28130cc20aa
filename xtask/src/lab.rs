//! Situations to watch `socktrace diagnose` in: the scenarios of its root tests, shown.

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    build, setup,
    sh::{as_root, command, output},
    vm::{
        self,
        kernels::{self, Kernel},
    },
};

/// Where the scenarios are among the root tests.
const SCENARIOS: &str = "diagnose::scenarios::";
/// Has the tests show what they do.
const SHOWN: &str = "SOCKTRACE_LAB=1";

#[derive(Args)]
pub(crate) struct LabArgs {
    /// Which one; without it, their names are listed
    scenario: Option<String>,

    /// On this kernel of the matrix instead of this machine's
    #[arg(long, value_parser = kernels::parse)]
    kernel: Option<&'static Kernel>,
}

pub(crate) fn run(args: &LabArgs) -> Result<()> {
    setup::compiler()?;
    setup::servers()?;
    let tests = build::kernel_tests()?;
    let tests = tests.to_str().context("the path of the tests is not UTF-8")?;
    let listed = output(command(tests).args(["--list", SCENARIOS]))?;
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.strip_prefix(SCENARIOS)?.strip_suffix(": test"))
        .collect();
    let Some(wanted) = &args.scenario else {
        println!("{}", names.join("\n"));
        return Ok(());
    };
    if !names.contains(&wanted.as_str()) {
        bail!("there is no scenario {wanted}; there are {}", names.join(", "));
    }
    let name = format!("{SCENARIOS}{wanted}");
    let test = ["--exact", "--nocapture", &name];
    if let Some(kernel) = args.kernel {
        return vm::show(kernel, SHOWN, &test);
    }
    let socktrace = build::socktrace(true)?;
    crate::sh::run(
        as_root("env")?
            .arg(format!("SOCKTRACE_BIN={}", socktrace.display()))
            .args([SHOWN, tests])
            .args(test),
    )
}
