//! `socktrace list`: one snapshot.

use std::collections::HashSet;

use super::{give_cookies, limits, now, options, output::Printer, proc, say, start_log};
use crate::{
    bpf::{KernelBtf, Tracer},
    cli::ListArgs,
    engine::Engine,
    error::Result,
    host::{Host, Privileges},
    view::column::by_address,
};

pub fn run(args: &ListArgs) -> Result<()> {
    start_log(args.view.form.verbose, args.view.form.quiet);
    let mut printer = Printer::new(&args.view, by_address)?;
    let mut host = Host::read(proc())?;
    let mut missing = limits(&host);
    let tracked = match read_kernel(&mut host) {
        Ok(tracked) => tracked,
        Err(reason) => {
            missing.push(format!(
                "somaxconn, limit of the SYN queue and SYN queues of SO_REUSEPORT groups ({reason})"
            ));
            Vec::new()
        }
    };
    let interval = Engine::default().interval(now(), &tracked, &host);
    printer.listeners(interval.listeners, None)?;
    if !args.view.form.quiet {
        for missing in missing {
            say!("socktrace: not shown: {missing}");
        }
    }
    Ok(())
}

/// What the eBPF side can read without attaching to anything.
fn read_kernel(host: &mut Host) -> std::result::Result<Vec<crate::bpf::Tracked>, String> {
    let lacking = Privileges::own().missing_to_trace();
    if !lacking.is_empty() {
        return Err(format!("needs {}: try sudo", lacking.join(" and ")));
    }
    let tcp: usize = host.listeners.values().map(|dump| dump.listeners.len()).sum();
    let listeners = tcp + host.unix.values().map(Vec::len).sum::<usize>();
    let mut read = || {
        let kernel = KernelBtf::read()?;
        let mut tracer = Tracer::start(&kernel, &options(listeners, None)?, &[])?;
        tracer.adopt()?;
        let tracked = tracer.look()?;
        if give_cookies(host, &tracked, &mut HashSet::new()) { tracer.look() } else { Ok(tracked) }
    };
    read().map_err(|error: crate::error::Error| error.to_string().replace("\n ", ";"))
}
