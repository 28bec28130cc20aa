//! What tracing costs, in instructions: `socktrace/examples/bench` measures in a guest whose clock
//! counts them, and this makes one table of it.

mod goals;
mod record;
mod table;

use anyhow::{Result, ensure};
use clap::Args;

use crate::{
    sh::say,
    vm::{self, kernels},
};
use record::Record;

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// One of 5.10, 6.1, 6.12, 7.2
    #[arg(long, default_value = "6.12", value_parser = kernels::parse)]
    kernel: &'static kernels::Kernel,

    /// Only tools whose name contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    only: String,

    /// Only loads whose name contains this
    #[arg(long, value_name = "NAME", default_value = "")]
    load: String,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let (release, lines) = vm::bench(args.kernel, &["run", &args.only, &args.load])?;
    let records = record::parse(&lines)?;
    ensure!(!records.is_empty(), "no tool and load of these names; `--only`, `--load`");
    let failed: Vec<&Record> = records.iter().filter(|record| record.error.is_some()).collect();
    for record in &failed {
        say(format!("{} did not run under {}", record.tool, record.load));
    }
    println!("Linux {release}\n\n{}\n{}", table::render(&records), goals::render(&records));
    Ok(())
}
