//! `socktrace check`: what this kernel, this user and this build allow.

use std::{
    io::{IsTerminal as _, Write as _},
    time::SystemTime,
};

use super::{options, proc, start_log};
use crate::{
    bpf::{Backend, KernelBtf, Options, Tracer, Wanted},
    cli::{CheckArgs, Output},
    error::{Error, Result},
    event::Kind,
    host::{self, Host, Privileges},
    view::json::{self, CheckRecord},
};

pub fn run(args: &CheckArgs) -> Result<()> {
    start_log(args.verbose, false);
    let mut rows = Rows { time: SystemTime::now(), rows: Vec::new() };
    rows.add("kernel", Some(true), host::release(), None);
    let verdict = backends(&mut rows);
    system(&mut rows);

    let mut out = std::io::stdout().lock();
    if args.json || args.output == Output::Json {
        for row in &rows.rows {
            json::write(&mut out, row)?;
        }
    } else {
        table(&mut out, &rows.rows)?;
    }
    out.flush()?;
    verdict
}

struct Rows {
    time: SystemTime,
    rows: Vec<CheckRecord>,
}

impl Rows {
    fn add(
        &mut self,
        feature: impl Into<String>,
        available: Option<bool>,
        detail: impl Into<String>,
        remedy: Option<String>,
    ) {
        self.rows.push(CheckRecord::new(self.time, feature, available, detail, remedy));
    }
}

/// Attaches each backend for a moment. The error is the one that `top` would end with.
fn backends(rows: &mut Rows) -> Result<()> {
    let missing = Privileges::own().missing_to_trace();
    let privileged = missing.is_empty();
    let remedy = || Some("run as root, or give the program these capabilities".to_owned());
    if privileged {
        rows.add("privileges", Some(true), "CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN)", None);
    } else {
        rows.add("privileges", Some(false), format!("{} missing", missing.join(", ")), remedy());
    }
    let kernel = match KernelBtf::read() {
        Ok(kernel) => {
            let absent = kernel.absent();
            let detail = if absent.is_empty() {
                "every field was found".to_owned()
            } else {
                format!("not on this kernel, done without: {}", absent.join(", "))
            };
            rows.add("type information (BTF)", Some(true), detail, None);
            kernel
        }
        Err(error) => {
            let (detail, remedy) = split(&error);
            rows.add("type information (BTF)", Some(false), detail, remedy);
            for backend in Backend::ALL {
                let name = format!("backend {backend}");
                rows.add(name, Some(false), "needs the kernel's type information", None);
            }
            return Err(error);
        }
    };
    if !privileged {
        for backend in Backend::ALL {
            let detail = "cannot be tried without the privileges above";
            rows.add(format!("backend {backend}"), None, detail, remedy());
        }
        return super::need_privileges("top");
    }
    try_each(rows, &kernel)
}

fn try_each(rows: &mut Rows, kernel: &KernelBtf) -> Result<()> {
    // With everything that any verb would attach.
    let events = Some(Wanted { kinds: Kind::all(), ..Wanted::default() });
    let options = Options { events, ..options(0, Some(64))? };
    let mut works = false;
    let mut refused = Vec::new();
    for backend in Backend::ALL {
        let name = format!("backend {backend}");
        match Tracer::start(kernel, &options, &[backend]) {
            Ok(tracer) => {
                let chosen = if works { "works" } else { "works; auto takes it" };
                works = true;
                rows.add(name, Some(true), chosen, None);
                for (what, why) in backend.blind_to() {
                    let remedy = "where the kernel allows it, take fentry or kprobe".to_owned();
                    rows.add(format!("{backend}: {what}"), Some(false), *why, Some(remedy));
                }
                for (what, why) in tracer.without() {
                    let remedy = (backend == Backend::Tracepoint)
                        .then(|| "mount -t tracefs tracefs /sys/kernel/tracing".to_owned());
                    rows.add(format!("{backend}: {what}"), Some(false), why.as_str(), remedy);
                }
            }
            Err(Error::Refused(reasons)) => {
                for (_, reason) in &reasons {
                    let (why, remedy) = match reason.split_once("; needs ") {
                        Some((why, needs)) => (why, format!("needs {needs}")),
                        None => (reason.as_str(), "use another backend on this kernel".to_owned()),
                    };
                    rows.add(name.as_str(), Some(false), why, Some(remedy));
                }
                refused.extend(reasons);
            }
            Err(error) => return Err(error),
        }
    }
    if works { Ok(()) } else { Err(Error::Refused(refused)) }
}

/// An error's text without its remedy, and the remedy, each on one line.
fn split(error: &Error) -> (String, Option<String>) {
    let text = error.to_string();
    let (what, remedy) = match text.split_once("\n  remedy: ") {
        Some((what, remedy)) => (what, Some(remedy.replace("\n  ", " "))),
        None => (text.as_str(), None),
    };
    (what.replace("\n  ", "; "), remedy)
}

/// What does not decide whether tracing works, but how much is known.
fn system(rows: &mut Rows) {
    let host = Host::read(proc());
    let privileges = Privileges::own();
    match host {
        Ok(host) => {
            let listeners: usize = host.listeners.values().map(|dump| dump.listeners.len()).sum();
            let detail = format!("{listeners} TCP listeners found");
            if host.listeners.is_empty() {
                rows.add(
                    "netlink sock_diag",
                    Some(false),
                    host.unreachable.join("; "),
                    Some("load the modules inet_diag and tcp_diag".to_owned()),
                );
            } else {
                rows.add("netlink sock_diag", Some(true), detail, None);
            }
            let out = host.netns.len() - host.listeners.len();
            let remedy = (!privileges.can_enter_netns())
                .then(|| "run as root: entering a namespace needs CAP_SYS_ADMIN".to_owned());
            let detail = format!("{} of {} reached", host.listeners.len(), host.netns.len());
            rows.add("network namespaces", Some(out == 0), detail, remedy.filter(|_| out > 0));
            let blind = host.owners.unreadable;
            let remedy = "run as root: other users' processes need CAP_SYS_PTRACE";
            let ok = blind == 0 || privileges.can_see_processes();
            let detail = if ok {
                "of all processes".to_owned()
            } else {
                format!("{blind} processes cannot be looked at")
            };
            rows.add("owners", Some(ok), detail, (!ok).then(|| remedy.to_owned()));
        }
        Err(error) => rows.add("host", Some(false), error.to_string(), None),
    }
    match host::tracefs() {
        Some(path) => rows.add("tracefs", Some(true), path.display().to_string(), None),
        None => rows.add(
            "tracefs",
            Some(false),
            "not mounted; the tracepoint backend then cannot see the backlog passed to listen()",
            Some("mount -t tracefs tracefs /sys/kernel/tracing".to_owned()),
        ),
    }
}

fn table(out: &mut impl std::io::Write, rows: &[CheckRecord]) -> std::io::Result<()> {
    let color = std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let width = rows.iter().map(|row| row.feature.chars().count()).max().unwrap_or(0);
    for row in rows {
        let (word, on) = match row.available {
            Some(true) => ("yes", "\x1b[32m"),
            Some(false) => ("no", "\x1b[31m"),
            None => ("?", "\x1b[33m"),
        };
        let (on, off) = if color { (on, "\x1b[0m") } else { ("", "") };
        let padding = " ".repeat(width - row.feature.chars().count());
        writeln!(out, "{}{padding}  {on}{word:<3}{off}  {}", row.feature, row.detail)?;
        if let Some(remedy) = &row.remedy {
            writeln!(out, "{:width$}       remedy: {remedy}", "")?;
        }
    }
    Ok(())
}
