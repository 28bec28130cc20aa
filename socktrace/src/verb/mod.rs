//! One module a verb, and what they share.

pub mod check;
pub mod list;
mod output;
pub mod top;

use std::path::Path;

use crate::{
    bpf::Options,
    error::{Error, Result},
    host::{Privileges, possible_cpus},
};

const PROC: &str = "/proc";

/// A line on stderr. A reader that went away is no reason to fail.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}
use say;

/// Messages on stderr: warnings always, more with `-v`.
fn start_log(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => log::LevelFilter::Error,
        (false, 0) => log::LevelFilter::Warn,
        (false, 1) => log::LevelFilter::Info,
        (false, _) => log::LevelFilter::Debug,
    };
    let mut builder = env_logger::Builder::new();
    builder
        .filter_level(log::LevelFilter::Off)
        .filter_module("socktrace", level)
        .filter_module("socktrace_ebpf", level)
        .format(|out, record| {
            use std::io::Write as _;
            writeln!(out, "socktrace: {}: {}", record.level(), record.args())
        });
    // A second call is a test's; the first one's level stays.
    let _ = builder.try_init();
}

fn proc() -> &'static Path {
    Path::new(PROC)
}

/// Room for the listeners: twice as many as there are, bounded by what per-CPU cells would take.
fn options(listeners: usize, wanted: Option<u32>) -> Options {
    const LEAST: u32 = 8192;
    const MOST: u32 = 1 << 20;
    let cpus = possible_cpus(Path::new("/sys"));
    let twice = u32::try_from(listeners).unwrap_or(MOST).saturating_mul(2);
    let max_listeners = wanted.unwrap_or_else(|| twice.clamp(LEAST, MOST).next_power_of_two());
    Options { max_listeners, cpus }
}

/// Tracing needs privileges: says which are missing, before anything fails for want of them.
fn need_privileges(verb: &str) -> Result<()> {
    let missing = Privileges::own().missing_to_trace();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Privilege {
        what: format!("{verb} loads eBPF programs, which this user may not"),
        missing: missing.join(" and "),
        remedy: format!(
            "run `sudo socktrace {verb}`; `socktrace list` works without, and says what it cannot \
             see"
        ),
    })
}
