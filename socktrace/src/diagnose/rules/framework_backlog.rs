//! Nobody chose the backlog: it is the default of a program or of its library.

use super::{
    Look, Rule,
    accept_burst::{FACTS, burst, meanwhile},
};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Severity, programs};

pub(super) const RULE: Rule = Rule {
    id: "framework_backlog",
    about: "the backlog is the default of a program or framework, and was too small",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    if case.lost_at_accept_queue() == 0 {
        return None;
    }
    let default = programs::default_of(&case.last)?;
    let cause = format!(
        "{} Its backlog of {} is too small for such a burst; that is the default of {}, so probably nobody chose \
         it.",
        meanwhile(case),
        default.backlog,
        default.whose
    );
    Some(burst(
        Finding::new(RULE.id, Severity::Critical, Confidence::Likely),
        case,
        diagnosis,
        &cause,
    ))
}

#[cfg(test)]
mod tests {
    use crate::diagnose::sample::{finding, with};

    #[test]
    fn pythons_five_is_nobodys_choice() {
        let found = finding(with(5, |l| {
            l.belongs.exe = Some("/usr/bin/python3.11".into());
            l.totals.drops.accept_queue_full_on_syn = Some(7);
            l.accept.peak = Some(6);
        }));
        assert_eq!(found.rule, "framework_backlog");
        assert!(found.cause.contains("Python's socketserver and http.server"), "{found:?}");
        assert!(found.remedy.text.contains("`request_queue_size = 32`"), "{found:?}");
    }
}
