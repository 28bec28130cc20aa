//! A Unix socket whose accept queue was full.

use super::{Look, Rule, acceptor_slow, acceptor_stalled, backlog, count, rate, time};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

pub(super) const RULE: Rule = Rule {
    id: "unix_backlog",
    about: "connects of a Unix socket found the accept queue full",
    facts: &[
        "accept_queue.depth",
        "accept_queue.peak",
        "accept_queue.limit",
        "totals.established",
        "totals.accepted",
        "totals.connects_waited",
        "totals.connects_refused",
    ],
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let lost = case.lost_at_accept_queue();
    if !case.is_unix() || lost == 0 {
        return None;
    }
    let totals = case.last.totals;
    let (refused, waited) =
        (totals.connects_refused.unwrap_or(0), totals.connects_waited.unwrap_or(0));
    let happened: Vec<String> = [
        (refused > 0).then(|| {
            format!("{} refused with EAGAIN", count(refused, "connect was", "connects were"))
        }),
        (waited > 0)
            .then(|| format!("{} to wait for room", count(waited, "connect had", "connects had"))),
    ]
    .into_iter()
    .flatten()
    .collect();
    let summary = format!(
        "{}: the accept queue was full ({} of {})",
        happened.join(" and "),
        case.last.accept.peak.unwrap_or(0),
        case.capacity()
    );
    let why = "A connect() of a Unix socket enters the accept queue at once; when that is full a blocking \
               socket waits and a non-blocking one gets EAGAIN (unix_stream_connect).";
    let (cause, remedy) = if acceptor_stalled::is_stalled(case) {
        let idle = time(case.longest_idle);
        let cause =
            format!("{why} Nothing was accepted for {idle}. {}", acceptor_stalled::doing(case));
        (cause, acceptor_stalled::no_backlog(acceptor_stalled::remedy(case)))
    } else if acceptor_slow::is_sustained(case) {
        let run = case.longest;
        let cause = format!(
            "{why} For {} it was full, while {} connects a second came and {} a second were accepted.",
            time(run.time),
            rate(run.arrival_rate()),
            rate(run.accept_rate())
        );
        (cause, Remedy::text(acceptor_slow::ADVICE))
    } else {
        let run = case.largest;
        let enough = backlog::enough(run.need());
        let mut remedy = backlog::enlarge(case, diagnosis, enough);
        remedy.text = format!(
            "A backlog of {enough} holds this: {}. {}",
            backlog::sum(run.peak.into(), run.turned_away),
            remedy.text
        );
        (why.to_owned(), remedy)
    };
    let severity = if refused > 0 { Severity::Critical } else { Severity::Warning };
    let finding =
        Finding::new(RULE.id, severity, Confidence::Certain).says(summary, cause).advises(remedy);
    Some(acceptor_stalled::measured(finding, case))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{finding, with},
        model::Family,
    };

    fn unix(refused: u64, waited: u64) -> Finding {
        finding(with(2, |l| {
            l.family = Family::Unix;
            l.path = Some("/run/x.sock".into());
            l.accept.peak = Some(3);
            l.totals.connects_refused = Some(refused);
            l.totals.connects_waited = Some(waited);
        }))
    }

    #[test]
    fn refused_is_worse_than_having_to_wait() {
        let found = unix(2, 1);
        assert_eq!((found.rule, found.severity), ("unix_backlog", Severity::Critical));
        assert_eq!(
            found.summary,
            "2 connects were refused with EAGAIN and 1 connect had to wait for room: the accept queue was full \
             (3 of 3)"
        );
        assert_eq!(unix(0, 4).severity, Severity::Warning);
    }
}
