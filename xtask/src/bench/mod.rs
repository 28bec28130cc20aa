//! What tracing costs, in instructions: `socktrace/examples/bench` measures in a guest whose clock
//! counts them, and this makes one table of it.

mod goals;
mod record;
mod table;

use anyhow::{Result, ensure};
use clap::Args;

use crate::vm::{self, kernels};
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
    println!("Linux {release}\n\n{}\n{}", table::render(&records), goals::render(&records));
    all_ran(&records)
}

/// An error that names the rows which did not run.
fn all_ran(records: &[Record]) -> Result<()> {
    let failed = records.iter().filter(|record| record.error.is_some());
    let rows: Vec<_> =
        failed.map(|record| format!("{} under {}", record.tool, record.load)).collect();
    ensure!(rows.is_empty(), "did not run: {}", rows.join("; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_did_not_run_are_an_error() {
        let failed = |tool| Record { error: Some("no".into()), ..Record::costing(tool, 0) };
        assert!(all_ran(&[Record::costing("x", 1)]).is_ok());
        let error = all_ran(&[failed("a, b"), Record::costing("x", 1), failed("c")]).unwrap_err();
        assert_eq!(error.to_string(), "did not run: a, b under connect; c under connect");
    }
}
