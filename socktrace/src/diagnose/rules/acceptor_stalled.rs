//! Connections wait and nobody accepts them.

use std::time::Duration;

use super::{Look, Rule, count, milliseconds, time};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

/// So long without an `accept()` while connections wait is a stall…
pub const STALLED: Duration = Duration::from_secs(1);
/// …unless it is no more than so many times what it usually takes from one to the next: then it is slow.
const TIMES_THE_USUAL: u32 = 4;

pub(super) const RULE: Rule = Rule {
    id: "acceptor_stalled",
    about: "connections wait in the accept queue and the program accepts none",
    facts: &[
        "accept_queue.depth",
        "accept_queue.peak",
        "accept_queue.limit",
        "totals.accepted",
        "totals.drops.accept_queue_full_on_syn",
        "totals.drops.accept_queue_full_on_ack",
        "oldest_wait_ms",
        "last_accept_age_ms",
    ],
    look: Look::Listener(look),
};

pub(super) fn is_stalled(case: &Case) -> bool {
    let long =
        case.longest_idle >= STALLED && case.longest_idle >= case.usual_idle() * TIMES_THE_USUAL;
    long || never_in_a_short_watch(case)
}

/// Too short a watch to be sure, but it accepted nothing in it.
fn never_in_a_short_watch(case: &Case) -> bool {
    case.never_accepted() && case.lost_at_accept_queue() > 0 && case.watched < STALLED * 2
}

fn look(case: &Case, _: &Diagnosis) -> Option<Finding> {
    if !is_stalled(case) {
        return None;
    }
    let lost = case.lost_at_accept_queue();
    let depth = case.idle_depth;
    let idle = time(case.longest_idle);
    let summary = if lost > 0 {
        format!(
            "{}: the accept queue was full ({} of {}) and nothing was accepted for {idle}",
            super::lost(case),
            case.last.accept.peak.unwrap_or(depth),
            case.capacity(),
        )
    } else {
        format!(
            "{} for {idle}, and none was accepted",
            count(depth.into(), "connection waited", "connections waited")
        )
    };
    let severity = if lost > 0 { Severity::Critical } else { Severity::Warning };
    let sure = case.longest_idle >= STALLED;
    let confidence = if sure { Confidence::Certain } else { Confidence::Possible };
    let finding = Finding::new(RULE.id, severity, confidence)
        .says(summary, doing(case))
        .advises(no_backlog(remedy(case)));
    Some(measured(finding, case))
}

pub(super) fn measured(finding: Finding, case: &Case) -> Finding {
    finding
        .measured("longest_without_accept_ms", milliseconds(case.longest_idle))
        .measured("acceptors", serde_json::to_value(&case.acceptors).unwrap_or_default())
}

/// What those do who should accept.
pub(super) fn doing(case: &Case) -> String {
    match case.acceptors.as_slice() {
        [] => format!(
            "{} does not call accept(); what it does instead could not be read.",
            case.owner()
        ),
        acceptors => {
            let one = |a: &super::super::Acceptor| format!("{}/{} {}", a.comm, a.pid, a.does());
            let all: Vec<String> = acceptors.iter().map(one).collect();
            format!("Meanwhile {}.", all.join("; "))
        }
    }
}

/// What runbooks say instead.
pub(super) fn no_backlog(remedy: Remedy) -> Remedy {
    let text = format!("{} A larger backlog would only make clients wait longer.", remedy.text);
    Remedy { text, ..remedy }
}

/// What to do about those.
pub(super) fn remedy(case: &Case) -> Remedy {
    let Some(first) = case.acceptors.first() else {
        return Remedy::text(format!("Find what {} does instead of accept().", case.owner()));
    };
    let (advice, _) = first.advice();
    let commands = case.acceptors.iter().flat_map(|acceptor| acceptor.advice().1).collect();
    Remedy { text: advice, commands, backlog: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::{
        Acceptor,
        sample::{Look, finding, rules_of, watched},
    };

    const FULL: Look = Look { depth: 17, peak: 17, entered: 0, accepted: 0, dropped: 1 };

    #[test]
    fn a_stopped_server_is_told_to_go_on() {
        let mut case = watched(16, &[FULL; 12]);
        let comm = "server".to_owned();
        let wchan = Some("do_signal_stop".to_owned());
        case.acceptors =
            vec![Acceptor { pid: 77, comm, state: 'T', wchan, threads: 1, waits: Vec::new() }];
        let found = finding(case);
        assert_eq!((found.rule, found.severity), ("acceptor_stalled", Severity::Critical));
        assert_eq!(
            found.summary,
            "12 packets of clients were lost: the accept queue was full (17 of 17) and nothing was accepted \
             for 1.1 s"
        );
        assert_eq!(found.remedy.commands, ["kill -CONT 77"]);
    }

    #[test]
    fn waiting_without_a_loss_is_a_warning() {
        let waits = Look { depth: 2, ..Look::default() };
        let found = finding(watched(16, &[waits; 20]));
        assert_eq!((found.rule, found.severity), ("acceptor_stalled", Severity::Warning));
    }

    #[test]
    fn one_accept_before_does_not_hide_a_stall() {
        let waits = Look { depth: 3, ..Look::default() };
        let first = Look { entered: 4, accepted: 1, ..waits };
        let mut looks = vec![first];
        looks.extend([waits; 100]);
        assert_eq!(rules_of(vec![watched(16, &looks)]), ["acceptor_stalled"]);
    }

    #[test]
    fn who_accepts_one_every_second_is_slow_and_not_stalled() {
        let waits = Look { depth: 17, peak: 17, dropped: 1, ..Look::default() };
        let mut looks = Vec::new();
        for _ in 0..5 {
            looks.extend([waits; 11]);
            looks.push(Look { accepted: 1, entered: 1, ..waits });
        }
        assert_eq!(rules_of(vec![watched(16, &looks)]), ["acceptor_slow"]);
    }
}
