//! Connections that ended because their listener closed.

use super::{Look, Rule, count};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

pub(super) const RULE: Rule = Rule {
    id: "lost_on_close",
    about: "connections were thrown away because their listener closed",
    facts: &[
        "totals.lost_on_close",
        "totals.established",
        "totals.accepted",
        "totals.migrated_out",
    ],
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let lost = case.last.totals.lost_on_close.filter(|&lost| lost > 0)?;
    let l = &case.last;
    let place = |l: &crate::model::Listener| (l.netns, l.address, l.port, l.path.clone());
    let heir = diagnosis.cases().find(|other| !other.last.closed && place(&other.last) == place(l));
    let owner = case.owner();
    let summary = format!(
        "{} when {owner} closed this listener",
        count(lost, "connection was lost", "connections were lost")
    );
    let then = match heir {
        Some(heir) => format!(
            " {} listens there now, but what waited in the old queue is gone: a reload or a deploy that opens a \
             new socket.",
            heir.owner()
        ),
        None => " Nobody listens there now.".to_owned(),
    };
    let cause = format!(
        "Connections that nobody has accepted yet belong to the listening socket: when its last descriptor is \
         closed, the kernel resets them, and half-open ones get no answer any more.{then}"
    );
    let settings = diagnosis.settings(case);
    let mut remedy = Remedy::text(
        "Pass the listening socket on instead of opening a new one (systemd socket activation, a supervisor that \
         holds it, a reload that inherits it); or accept what waits before closing.",
    );
    if l.reuseport == Some(true) && settings.migrate_req == Some(0) {
        remedy.text.push_str(
            " Members of a SO_REUSEPORT group can hand over to each other (5.14 and later, the new one has to \
             listen before the old one closes).",
        );
        remedy.commands.push(settings.sysctl("net.ipv4.tcp_migrate_req", 1));
    }
    Some(
        Finding::new(RULE.id, Severity::Critical, Confidence::Certain)
            .says(summary, cause)
            .advises(remedy),
    )
}

#[cfg(test)]
mod tests {
    use crate::diagnose::sample::{finding, rules_of, with};

    #[test]
    fn what_waited_is_told_with_the_process() {
        let closed = |lost| {
            with(16, |l| {
                l.closed = true;
                l.totals.lost_on_close = Some(lost);
            })
        };
        let found = finding(closed(5));
        assert_eq!(found.summary, "5 connections were lost when server/812 closed this listener");
        assert!(rules_of(vec![closed(0)]).is_empty());
    }
}
