//! Handshakes that take long, and so many of them that the SYN queue is full.

use std::time::Duration;

use super::{
    Look, Rule,
    syn_queue_full::{FACTS, Handshakes, SLOW_NS, full},
    time,
};
use crate::diagnose::{Case, Diagnosis, Finding};

pub(super) const RULE: Rule = Rule {
    id: "slow_clients",
    about: "slow handshakes of real clients filled the SYN queue",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let handshakes = Handshakes::of(case);
    let retransmits = case.last.totals.synack_retransmits.unwrap_or(0);
    let p90 = case.last.handshake.map_or(0, |times| times.p90_ns);
    // Without times (tracepoints), every second SYN-ACK that was sent again says the same.
    if handshakes.dropped == 0 || p90 < SLOW_NS && retransmits * 2 < handshakes.completed.max(1) {
        return None;
    }
    let slow = if p90 >= SLOW_NS {
        format!("one handshake in ten takes {} or more", time(Duration::from_nanos(p90)))
    } else {
        format!("{retransmits} SYN-ACKs had to be sent again before clients answered")
    };
    let why = format!(
        "The clients are real, {} came through, but each is half-open for long, {slow}: a long way, or packets \
         lost on it.",
        handshakes.completed,
    );
    Some(full(RULE.id, case, diagnosis, " of slow clients", &why))
}

#[cfg(test)]
mod tests {
    use crate::{
        diagnose::sample::{rules_of, with},
        model::Times,
    };

    #[test]
    fn slow_is_told_from_many() {
        let check = |p90_ns, retransmits, expect: &[&str]| {
            let case = with(8, |l| {
                l.totals.drops.syn_queue_full = Some(11);
                l.totals.established = Some(20);
                l.totals.synack_retransmits = Some(retransmits);
                l.handshake = Some(Times { count: 20, p90_ns, max_ns: p90_ns, ..Times::default() });
            });
            assert_eq!(rules_of(vec![case]), expect, "{p90_ns} {retransmits}");
        };
        check(1_500_000_000, 9, &["slow_clients"]);
        check(2_000_000, 0, &["syn_queue_full"]);
        check(0, 15, &["slow_clients"]);
    }
}
