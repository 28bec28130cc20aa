//! A server that could not take its port.

use nix::errno::Errno;

use super::{Look, Rule, count};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity, clients::Bind},
    event::{Conflict, End},
    filter::Filter,
};

pub(super) const RULE: Rule = Rule {
    id: "bind_failed",
    about: "bind() failed: who holds the port, or which privilege is missing",
    facts: &[],
    look: Look::Host(look),
};

fn look(diagnosis: &Diagnosis, _: &Filter) -> Vec<Finding> {
    let mut found = Vec::new();
    for (((netns, place), _), bind) in &diagnosis.clients.binds {
        if got_it_after_all(diagnosis, *netns, bind) {
            continue;
        }
        let who = bind
            .caller
            .as_ref()
            .map_or_else(|| "a program".to_owned(), |c| format!("{}/{}", c.comm, c.pid));
        let errno = bind.outcome.errno().unwrap_or_default();
        let summary = format!(
            "{who} could not bind to {place}: {errno}{}",
            if bind.count > 1 {
                format!(" ({})", count(bind.count, "time", "times"))
            } else {
                String::new()
            }
        );
        let (cause, remedy) =
            why(bind.outcome.is(Errno::EADDRINUSE), bind.outcome.is(Errno::EACCES), bind);
        let mut finding = Finding::new(RULE.id, Severity::Critical, Confidence::Certain)
            .says(summary, cause)
            .advises(remedy)
            .measured("netns", *netns)
            .measured("address", place.as_str())
            .measured("errno", errno)
            .measured("binds_failed", bind.count)
            .measured("conflict", serde_json::to_value(&bind.conflict).unwrap_or_default());
        if let Some(caller) = &bind.caller {
            finding = finding.measured("caller", serde_json::to_value(caller).unwrap_or_default());
        }
        found.push(finding);
    }
    found
}

/// Whether who failed listens at that port by now.
fn got_it_after_all(diagnosis: &Diagnosis, netns: u32, bind: &Bind) -> bool {
    let holds = |case: &Case, pid| case.last.owners.iter().any(|owner| owner.pid == pid);
    bind.caller.as_ref().is_some_and(|caller| {
        diagnosis.cases().any(|case| {
            let at = (case.last.netns, case.last.port) == (netns, bind.asked.port);
            at && case.last.address == bind.asked.address
                && !case.last.closed
                && holds(case, caller.pid)
        })
    })
}

fn why(in_use: bool, denied: bool, bind: &Bind) -> (String, Remedy) {
    if in_use {
        let Some(holder) = bind.conflict.first() else {
            return (
                "Somebody holds the address, but nobody was found who does.".into(),
                Remedy::text(
                    "Look again while it fails: `ss -lntp`, `socktrace events --kind bind`.",
                ),
            );
        };
        let owner = holder.owners.first();
        let name = owner.map_or_else(
            || {
                if holder.state == "TIME_WAIT" {
                    "an old connection".into()
                } else {
                    "the kernel".to_owned()
                }
            },
            |owner| format!("{}/{}", owner.comm, owner.pid),
        );
        let end = End { address: Some(holder.address), port: Some(holder.port), path: None };
        let cause = format!("{name} holds {} ({}).", end.text(), holder.state);
        return (cause, in_use_remedy(bind, holder, &name));
    }
    if denied {
        let first = bind.unprivileged.unwrap_or(1024);
        return (
            format!(
                "Ports below {first} (net.ipv4.ip_unprivileged_port_start) need CAP_NET_BIND_SERVICE."
            ),
            Remedy::text(
                "Give the service that capability (systemd: AmbientCapabilities=CAP_NET_BIND_SERVICE), or have it \
                 listen at a higher port.",
            ),
        );
    }
    let cause = if bind.outcome.is(Errno::EADDRNOTAVAIL) {
        "This machine, or this network namespace, does not have that address."
    } else {
        "The kernel refused it."
    };
    (
        cause.into(),
        Remedy::text(
            "Correct the address in the configuration; `ip address` shows which there are.",
        ),
    )
}

fn in_use_remedy(bind: &Bind, holder: &Conflict, name: &str) -> Remedy {
    let Some(owner) = holder.owners.first() else {
        return Remedy::text("Set SO_REUSEADDR before bind(), as servers do, or wait a minute.");
    };
    if bind.caller.as_ref().is_some_and(|caller| caller.pid == owner.pid) {
        return Remedy::text(
            "The program is in its own way: it binds the port twice. For both families either [::] alone will do, or \
             IPV6_V6ONLY on that one.",
        );
    }
    if !matches!(holder.state, "LISTEN" | "CLOSE") {
        return Remedy::text(format!(
            "A connection of {name} has that port by chance: reserve it (net.ipv4.ip_local_reserved_ports) so that \
             the kernel gives it to no client, and start the server again when the connection has ended."
        ));
    }
    let text = format!("Stop {name} if it should not be there, or choose another port.");
    Remedy { text, commands: vec![format!("kill {}", owner.pid)], backlog: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{diagnose::sample::diagnosis, event::Outcome, model::Owner};

    fn found(errno: Errno, conflict: Vec<Conflict>) -> Finding {
        let mut diagnosis = diagnosis(Vec::new());
        let bind = Bind {
            count: 2,
            outcome: Outcome(-(errno as i32)),
            asked: End::default(),
            caller: None,
            conflict,
            unprivileged: Some(1024),
        };
        diagnosis.clients.binds.insert(((1, "0.0.0.0:443".into()), bind.outcome.0), bind);
        diagnosis.findings(&Filter::default()).remove(0)
    }

    #[test]
    fn who_holds_the_port_is_named() {
        let holder = Conflict {
            address: [0, 0, 0, 0].into(),
            port: 443,
            state: "LISTEN",
            inode: Some(5),
            owners: vec![Owner { pid: 640, comm: "nginx".into(), fd: 6 }],
        };
        let finding = found(Errno::EADDRINUSE, vec![holder]);
        assert_eq!(
            finding.summary,
            "a program could not bind to 0.0.0.0:443: EADDRINUSE (2 times)"
        );
        assert_eq!(finding.cause, "nginx/640 holds 0.0.0.0:443 (LISTEN).");
        assert_eq!(finding.remedy.commands, ["kill 640"]);
        assert!(found(Errno::EACCES, Vec::new()).cause.contains("CAP_NET_BIND_SERVICE"));
        assert!(
            found(Errno::EADDRNOTAVAIL, Vec::new()).cause.contains("does not have that address")
        );
    }
}
