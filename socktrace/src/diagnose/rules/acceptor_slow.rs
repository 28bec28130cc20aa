//! Connections come faster than the program accepts them.

use std::time::Duration;

use super::{Look, Rule, lost, milliseconds, rate, tenths, time};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity},
    model::Times,
};

/// A queue that is full for so long at a stretch is no burst.
const SUSTAINED: Duration = Duration::from_secs(1);
/// And so many looks have to have found it full.
const LEAST_LOOKS: u32 = 3;
/// A wait in the accept queue that users notice, and how many connections make a percentile.
const LONG_WAIT_NS: u64 = 500_000_000;
const LEAST_WAITS: u64 = 10;
/// A single wait is told of when it was so long.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

pub(super) const RULE: Rule = Rule {
    id: "acceptor_slow",
    about: "connections arrive faster than the program accepts them",
    facts: &[
        "accept_queue.peak",
        "accept_queue.limit",
        "totals.established",
        "totals.accepted",
        "totals.drops.accept_queue_full_on_syn",
        "totals.drops.accept_queue_full_on_ack",
        "accept_wait.p99_us",
        "accept_wait.max_us",
    ],
    look: Look::Listener(look),
};

pub(super) const ADVICE: &str = "Accept sooner: more threads or processes that call accept(), or less work \
                                 between two accept() calls. The backlog has nothing to do with it.";

/// Whether the queue stayed full for so long that it was no burst.
pub(super) fn is_sustained(case: &Case) -> bool {
    case.longest.held >= SUSTAINED && case.longest.looks >= LEAST_LOOKS
}

/// Whether connections waited so long in the accept queue that users notice.
fn waits_long(case: &Case) -> bool {
    let often = |waits: &Times| waits.count >= LEAST_WAITS && waits.p99_ns >= LONG_WAIT_NS;
    case.last.accept_wait.as_ref().is_some_and(often) || case.longest_wait >= LONGEST_WAIT
}

fn look(case: &Case, _: &Diagnosis) -> Option<Finding> {
    let drops = case.lost_at_accept_queue();
    let run = case.longest;
    let overflows = drops > 0 && is_sustained(case);
    if !overflows && (drops > 0 || !waits_long(case)) {
        return None;
    }
    let finding = if overflows {
        let (arrive, accept) = (run.arrival_rate(), run.accept_rate());
        let summary = format!(
            "{}: for {} the accept queue was full ({} of {}) while {} clients a second came and {} a \
             second were accepted",
            lost(case),
            time(run.time),
            run.peak,
            case.capacity(),
            rate(arrive),
            rate(accept),
        );
        let wait = f64::from(case.capacity()) / accept.max(0.1);
        let cause = format!(
            "{} accepts, but more slowly than connections arrive. A full queue also makes everyone in it wait: \
             some {} at this rate.",
            case.owner(),
            time(Duration::from_secs_f64(wait.min(1e6)))
        );
        let times = (arrive / accept.max(0.1)).ceil();
        let text = format!(
            "Accept faster: more threads or processes that call accept() ({} times as many for this load), or \
             less work between two accept() calls. A larger backlog helps only against short bursts.",
            if times < 100.0 { format!("{times:.0}") } else { "many".to_owned() }
        );
        Finding::new(RULE.id, Severity::Critical, Confidence::Certain)
            .says(summary, cause)
            .advises(Remedy::text(text))
            .measured("longest_full_ms", milliseconds(run.time))
            .measured("arrival_rate_per_s", tenths(arrive))
            .measured("accept_rate_per_s", tenths(accept))
    } else {
        let summary = match case.last.accept_wait.filter(|waits| waits.p99_ns >= LONG_WAIT_NS) {
            Some(waits) => format!(
                "no connection was lost, but one in a hundred waited {} or more for accept(), the last {}",
                time(Duration::from_nanos(waits.p99_ns)),
                time(Duration::from_nanos(waits.max_ns)),
            ),
            None => format!(
                "no connection was lost, but some waited for accept(), up to {}",
                time(case.longest_wait)
            ),
        };
        let cause = format!("{} takes that long to come back to accept().", case.owner());
        Finding::new(RULE.id, Severity::Warning, Confidence::Certain)
            .says(summary, cause)
            .advises(Remedy::text(ADVICE))
            .measured("longest_wait_seen_ms", milliseconds(case.longest_wait))
    };
    Some(finding)
}

#[cfg(test)]
mod tests {
    use crate::{
        diagnose::sample::{Look, finding, rules_of, watched, with},
        model::Times,
    };

    #[test]
    fn both_rates_are_told() {
        let full = Look { depth: 16, peak: 17, entered: 2, accepted: 2, dropped: 4 };
        let found = finding(watched(16, &[full; 20]));
        assert_eq!(found.rule, "acceptor_slow");
        assert!(
            found.summary.contains("60 clients a second came and 20 a second were"),
            "{found:?}"
        );
        assert!(found.remedy.text.contains("3 times as many"), "{found:?}");
    }

    #[test]
    fn a_long_wait_is_trouble_without_a_loss() {
        let times = |count, p99_ns| Times { count, p99_ns, max_ns: p99_ns, ..Times::default() };
        let check = |times, expect: &[&str]| {
            assert_eq!(rules_of(vec![with(16, |l| l.accept_wait = Some(times))]), expect);
        };
        check(times(100, 900_000_000), &["acceptor_slow"]);
        check(times(9, 900_000_000), &[]);
        check(times(100, 90_000_000), &[]);
    }
}
