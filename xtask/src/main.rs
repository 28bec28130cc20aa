//! `cargo xtask`: everything a developer does to socktrace, from a bare machine on.
//!
//! What each verb prints for people goes to stderr; stdout is for what scripts want to know.

mod bench;
mod build;
mod lab;
mod setup;
mod sh;
mod test;
mod verifier;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Sets up, builds, runs and tests socktrace")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Installs what is missing on this machine; safe to run again
    Setup,
    /// Builds socktrace; the last line on stdout is the path of the program
    Build(BuildArgs),
    /// Builds socktrace and runs it as root; arguments after `--` go to it
    Run(RunArgs),
    /// Runs every test: format, lints, unit tests, root tests on this kernel, the kernel matrix
    Test(test::TestArgs),
    /// Boots kernels of the matrix and runs the root tests, or a command given after `--`, inside
    Vm(vm::VmArgs),
    /// Builds a situation with real servers and shows what `socktrace diagnose` makes of it
    Lab(lab::LabArgs),
    /// Measures what tracing costs, and what other tools cost; the table goes to stdout
    Bench(bench::BenchArgs),
    /// Lists how many instructions each kernel's verifier looks at, for docs/VERIFIER.md
    Verifier,
}

#[derive(Args)]
struct BuildArgs {
    /// A program without shared libraries, for any Linux of this architecture
    #[arg(long = "static")]
    static_: bool,
}

#[derive(Args)]
struct RunArgs {
    #[arg(last = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Setup => {
            setup::compiler()?;
            setup::servers()?;
            setup::machines()?;
        }
        Verb::Build(args) => {
            setup::compiler()?;
            println!("{}", build::socktrace(args.static_)?.display());
        }
        Verb::Run(args) => {
            setup::compiler()?;
            return build::run_socktrace(&args.args);
        }
        Verb::Test(args) => test::all(&args)?,
        Verb::Vm(args) => vm::run(&args)?,
        Verb::Lab(args) => lab::run(&args)?,
        Verb::Bench(args) => bench::run(&args)?,
        Verb::Verifier => verifier::run()?,
    }
    Ok(ExitCode::SUCCESS)
}
