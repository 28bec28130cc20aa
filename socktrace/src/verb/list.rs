//! `socktrace list`: one snapshot.

use std::time::SystemTime;

use super::{options, output::Printer, proc, say, start_log};
use crate::{
    bpf::{KernelBtf, Tracer},
    cli::ListArgs,
    engine::{Engine, Now},
    error::Result,
    host::{Host, Privileges},
    view::column::by_address,
};

pub fn run(args: &ListArgs) -> Result<()> {
    start_log(args.view.verbose, args.view.quiet);
    let mut printer = Printer::new(&args.view, by_address)?;
    let host = Host::read(proc())?;
    let mut missing = limits(&host);
    let tracked = match read_kernel(&host) {
        Ok(tracked) => tracked,
        Err(reason) => {
            missing.push(format!(
                "somaxconn, limit of the SYN queue and SYN queues of SO_REUSEPORT groups ({reason})"
            ));
            Vec::new()
        }
    };
    let now = Now { time: SystemTime::now(), monotonic_ns: u64::MAX };
    let interval = Engine::default().interval(now, &tracked, &host);
    printer.listeners(interval.listeners, None)?;
    if !args.view.quiet {
        for missing in missing {
            say!("socktrace: not shown: {missing}");
        }
    }
    Ok(())
}

/// What the eBPF side can read without attaching to anything.
fn read_kernel(host: &Host) -> std::result::Result<Vec<crate::bpf::Tracked>, String> {
    let lacking = Privileges::own().missing_to_trace();
    if !lacking.is_empty() {
        return Err(format!("needs {}: try sudo", lacking.join(" and ")));
    }
    let listeners: usize = host.listeners.values().map(|dump| dump.listeners.len()).sum();
    let read = || {
        let kernel = KernelBtf::read()?;
        let mut tracer = Tracer::start(&kernel, &options(listeners, None), &[])?;
        tracer.adopt()?;
        tracer.look()
    };
    read().map_err(|error: crate::error::Error| error.to_string().replace("\n ", ";"))
}

/// What this user cannot see.
fn limits(host: &Host) -> Vec<String> {
    let privileges = Privileges::own();
    let mut missing = Vec::new();
    if !host.unreachable.is_empty() {
        let what = host.unreachable.len();
        let why = if privileges.can_enter_netns() {
            host.unreachable.join("; ")
        } else {
            "needs CAP_SYS_ADMIN: try sudo".to_owned()
        };
        missing.push(format!("listeners of {what} other network namespaces ({why})"));
    }
    if host.owners.unreadable > 0 && !privileges.can_see_processes() {
        missing.push(format!(
            "sockets of {} processes of other users (needs CAP_SYS_PTRACE: try sudo)",
            host.owners.unreadable
        ));
    }
    missing
}
