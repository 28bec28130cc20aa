//! The program asked for a larger backlog than it got.

use super::{
    Look, Rule,
    accept_burst::{FACTS, burst},
};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Severity, programs};

pub(super) const RULE: Rule = Rule {
    id: "backlog_clamped",
    about: "net.core.somaxconn cut the backlog that the program asked for, and it was too small",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    if case.lost_at_accept_queue() == 0 {
        return None;
    }
    let (effective, somaxconn) = (case.last.accept.limit?, case.last.somaxconn?);
    let (asked, confidence) = match case.last.requested {
        Some(asked) => (i64::from(asked), Confidence::Certain),
        // Older than the trace: a program whose default is more, at exactly the most there is.
        None if somaxconn != effective => return None,
        None => {
            // Of a language, each program may ask for something else.
            let program = programs::of(&case.last).filter(|program| program.setting.is_some())?;
            let defaults = program.defaults;
            let usual = defaults.iter().map(|default| default.backlog).max()?;
            (usual.into(), Confidence::Likely)
        }
    };
    if asked <= i64::from(effective) {
        return None;
    }
    let asked_for =
        if confidence == Confidence::Certain { "asked for" } else { "asks by default for" };
    let then = if somaxconn == effective {
        format!("net.core.somaxconn of its network namespace is {somaxconn}")
    } else {
        format!(
            "net.core.somaxconn of its network namespace was {effective} at that time (it is {somaxconn} now)"
        )
    };
    let cause = format!(
        "{} {asked_for} a backlog of {asked} and got {effective}, because {then}: the kernel cuts it without \
         an error when listen() is called.",
        case.owner()
    );
    Some(burst(Finding::new(RULE.id, Severity::Critical, confidence), case, diagnosis, &cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::with;

    #[test]
    fn what_was_asked_for_and_what_it_got() {
        let check = |requested, effective, exe: &str, expect: Option<Confidence>| {
            let case = with(effective, |l| {
                (l.requested, l.somaxconn) = (requested, Some(128));
                l.belongs.exe = Some(exe.into());
                l.totals.drops.accept_queue_full_on_syn = Some(7);
            });
            let found =
                look(&case, &crate::diagnose::sample::diagnosis(vec![with(effective, |_| {})]));
            assert_eq!(found.map(|found| found.confidence), expect, "{requested:?} {effective}");
        };
        check(Some(1024), 128, "/opt/mine", Some(Confidence::Certain));
        check(Some(128), 128, "/opt/mine", None);
        check(None, 128, "/opt/mine", None);
        check(None, 128, "/usr/sbin/nginx", Some(Confidence::Likely));
        check(None, 64, "/usr/sbin/nginx", None);
        check(None, 128, "/usr/bin/node", None);
        check(Some(-1), 128, "/opt/mine", None);
    }
}
