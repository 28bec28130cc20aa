//! One module a verb, and what they share.

pub mod check;
pub mod diagnose;
pub mod events;
pub mod list;
mod names;
mod output;
mod resolve;
mod runtime;
pub mod top;
mod watch;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::SystemTime,
};

use crate::{
    bpf::{Options, Tracked},
    engine::Now,
    error::{Error, Result},
    host::{self, Host, Privileges, possible_cpus},
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
fn options(listeners: usize, wanted: Option<u32>) -> Result<Options> {
    const LEAST: u32 = 2048;
    const MOST: u32 = 1 << 20;
    // 80 MiB of cells.
    const LEAST_CELLS: u32 = 1 << 18;
    // 8 GiB: more than anyone means.
    const MOST_CELLS: u64 = 8 << 30;
    let cpus = possible_cpus(Path::new("/sys"));
    let twice = u32::try_from(listeners).unwrap_or(MOST).saturating_mul(2);
    let least = LEAST.min(LEAST_CELLS / cpus);
    let max_listeners = wanted.unwrap_or_else(|| twice.clamp(least, MOST).next_power_of_two());
    let size = Options::bytes_a_listener(cpus);
    if u64::from(max_listeners) * size > MOST_CELLS {
        return Err(Error::Usage(format!(
            "--max-listeners {max_listeners} takes too much memory on {cpus} CPUs; give less than {}",
            MOST_CELLS / size
        )));
    }
    Ok(Options { max_listeners, cpus, events: None })
}

/// Tracing needs privileges: says which are missing, before anything fails for want of them.
fn need_privileges(verb: &str) -> Result<()> {
    let missing = Privileges::own().missing_to_trace();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Privilege {
        what: format!("{verb} loads eBPF programs, which this user may not"),
        missing: missing.join(", "),
        remedy: format!(
            "run `sudo socktrace {verb}`; `socktrace list` works without, and says what it cannot \
             see"
        ),
    })
}

/// Makes the kernel give every listener a cookie, where its namespace can be entered. Returns whether
/// it was asked, and the listeners have to be read again.
fn give_cookies(host: &mut Host, tracked: &[Tracked], out_of_reach: &mut HashSet<u32>) -> bool {
    let nameless: HashMap<u32, u32> = tracked
        .iter()
        .filter(|t| !t.closed() && t.reading.cookie == 0)
        .filter(|t| !out_of_reach.contains(&t.reading.netns))
        .map(|t| {
            let holder = host.owners.of(t.reading.inode).first().map_or(0, |owner| owner.pid);
            (t.reading.netns, if t.slot.opener == 0 { holder } else { t.slot.opener })
        })
        .collect();
    if nameless.is_empty() {
        return false;
    }
    let known = |host: &Host, inode| host.netns.iter().any(|netns| netns.inode == inode);
    if nameless.keys().any(|&inode| !known(host, inode)) {
        host.netns = host::reachable(proc());
    }
    for (&inode, &holder) in &nameless {
        if !known(host, inode) {
            host.netns.extend(host::of_thread(proc(), holder, inode));
        }
    }
    // For the cookies only: these dumps may list what was opened after `tracked` was read.
    let mut asked = Host { netns: host.netns.clone(), ..Host::default() };
    let ask = |asked: &mut Host, wanted: &[u32]| {
        asked.ask(wanted);
        asked.ask_unix(wanted);
    };
    ask(&mut asked, &nameless.keys().copied().collect::<Vec<_>>());
    let missing = |asked: &Host| -> Vec<u32> {
        nameless.keys().copied().filter(|inode| !asked.listeners.contains_key(inode)).collect()
    };
    if !missing(&asked).is_empty() {
        // The process that led there may have ended.
        host.netns = host::reachable(proc());
        asked.netns.clone_from(&host.netns);
        let missing = missing(&asked);
        ask(&mut asked, &missing);
    }
    out_of_reach.extend(missing(&asked));
    true
}

/// What this user cannot see.
fn limits(host: &Host) -> Vec<String> {
    let privileges = Privileges::own();
    let mut missing = Vec::new();
    if !host.unreachable.is_empty() {
        missing.push(if privileges.can_enter_netns() {
            format!("what sock_diag did not list ({})", host.unreachable.join("; "))
        } else {
            let what = host.unreachable.len();
            format!("listeners of {what} other network namespaces (needs CAP_SYS_ADMIN: try sudo)")
        });
    }
    if host.owners.unreadable > 0 && !privileges.can_see_processes() {
        missing.push(format!(
            "sockets of {} processes of other users (needs CAP_SYS_PTRACE: try sudo)",
            host.owners.unreadable
        ));
    }
    missing
}

/// This moment by both clocks.
fn now() -> Now {
    Now { time: SystemTime::now(), monotonic_ns: host::monotonic_ns() }
}
