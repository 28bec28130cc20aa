//! A burst that was larger than the backlog.

use std::time::Duration;

use super::{Look, Rule, backlog, count, lost, milliseconds, time};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Severity};

/// Who accepts nothing for so long has a part in a burst.
const PAUSE: Duration = Duration::from_millis(300);

pub(super) const RULE: Rule = Rule {
    id: "accept_burst",
    about: "connections came in a burst that the accept queue had no room for",
    facts: FACTS,
    look: Look::Listener(|case, diagnosis| {
        if case.lost_at_accept_queue() == 0 {
            return None;
        }
        let cause = format!(
            "{} More connections came at once than the backlog of {} lets in (one more than the backlog fits).",
            meanwhile(case),
            case.last.accept.limit.unwrap_or(0)
        );
        let found = Finding::new(RULE.id, Severity::Critical, Confidence::Certain);
        Some(burst(found, case, diagnosis, &cause))
    }),
};

/// Whether the acceptor had a part in it.
pub(super) fn meanwhile(case: &Case) -> String {
    if case.longest_idle >= PAUSE {
        let pause = time(case.longest_idle);
        return format!("{} accepted nothing for {pause} meanwhile.", case.owner());
    }
    format!("{} was not held up, or for a moment only.", case.owner())
}

/// Where in the record its numbers are.
pub(super) const FACTS: &[&str] = &[
    "backlog.requested",
    "backlog.somaxconn",
    "backlog.effective",
    "accept_queue.peak",
    "accept_queue.limit",
    "totals.established",
    "totals.drops.accept_queue_full_on_syn",
    "totals.drops.accept_queue_full_on_ack",
    "accept_wait.p99_us",
];

/// A burst, and the backlog that would have done.
pub(super) fn burst(finding: Finding, case: &Case, diagnosis: &Diagnosis, cause: &str) -> Finding {
    let run = case.largest;
    let p99 = case.burst_p99();
    let size = if p99 == run.need() {
        format!("of up to {p99}")
    } else {
        format!("of {p99} (p99) and {} at most", run.need())
    };
    let summary = format!(
        "{} in {} {size} connections at once, where {} fit: the accept queue was full for {} at most",
        lost(case),
        count(case.runs.into(), "burst", "bursts"),
        case.capacity(),
        time(case.longest.time),
    );
    let enough = backlog::enough(run.need());
    let mut remedy = backlog::enlarge(case, diagnosis, enough);
    remedy.text = format!(
        "A backlog of {enough} holds such a burst: {}. {}",
        backlog::sum(run.peak.into(), run.turned_away),
        remedy.text
    );
    finding
        .says(summary, cause)
        .advises(remedy)
        .measured("bursts", case.runs)
        .measured("burst_p99", p99)
        .measured("longest_full_ms", milliseconds(case.longest.time))
        .measured("clients_turned_away", case.clients_turned_away())
        .measured("backlog_needed", run.need())
}

#[cfg(test)]
mod tests {
    use crate::diagnose::sample::{Look, finding, rules_of, watched};

    #[test]
    fn the_backlog_that_would_have_done_is_a_sum() {
        let burst = Look { entered: 17, accepted: 17, dropped: 43, peak: 17, ..Look::default() };
        let found = finding(watched(16, &[burst, Look::default()]));
        assert_eq!(found.rule, "accept_burst");
        assert_eq!(found.remedy.backlog, Some(128));
        assert!(
            found.summary.starts_with("43 packets of clients were lost in 1 burst of up to 60"),
            "{found:?}"
        );
    }

    #[test]
    fn a_full_queue_that_lost_nothing_is_fine() {
        let full = Look { entered: 17, accepted: 17, peak: 17, ..Look::default() };
        assert!(rules_of(vec![watched(16, &[full])]).is_empty());
    }
}
