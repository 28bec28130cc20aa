//! Clients that ask again and again: they do not see the answer.

use super::{
    Look, Rule, count,
    syn_queue_full::{FACTS, Handshakes, sources, without_room},
};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

/// Fewer handshakes are no pattern.
const LEAST: u64 = 3;

pub(super) const RULE: Rule = Rule {
    id: "synacks_lost",
    about: "clients send their SYN again though it was answered: SYN-ACKs are lost on the way back",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, _: &Diagnosis) -> Option<Finding> {
    let handshakes = Handshakes::of(case);
    let Handshakes { unfinished, repeated, .. } = handshakes;
    // Forged senders send once; a client that lives and hears nothing asks again.
    if unfinished < LEAST || !handshakes.mostly_unfinished() || repeated * 2 < unfinished {
        return None;
    }
    let mut summary = format!(
        "{} not come to an end, and their clients sent {} again: they do not see the SYN-ACK",
        count(unfinished, "handshake has", "handshakes have"),
        count(repeated, "SYN", "SYNs"),
    );
    if handshakes.was_full() {
        summary.push_str(&format!(
            ". The SYN queue filled up with them: {}",
            without_room(handshakes, case)
        ));
    }
    let finding = Finding::new(RULE.id, Severity::Critical, Confidence::Likely)
        .says(
            summary,
            "The listener answered, and had room to. The way back to these clients loses the answer: a route, a \
             firewall or a load balancer that expects it elsewhere, a device that drops the options in it. The \
             listener can do nothing about that.",
        )
        .advises(Remedy::text(
            "Follow a SYN-ACK on its way to one of the senders below: `ip route get ADDRESS` shows where it leaves, \
             `tcpdump -ni any 'tcp[tcpflags] == (tcp-syn|tcp-ack)'` that it does, and the same on the client or \
             the next hop whether it arrives.",
        ));
    Some(sources(finding, case))
}

#[cfg(test)]
mod tests {
    use crate::diagnose::sample::{rules_of, with};

    #[test]
    fn who_asks_again_is_no_flood() {
        let check = |unfinished, repeated, completed, expect: &[&str]| {
            let case = with(64, |l| {
                l.totals.requests_expired = Some(unfinished);
                l.totals.syns_repeated = Some(repeated);
                l.totals.established = Some(completed);
            });
            assert_eq!(rules_of(vec![case]), expect, "{unfinished} {repeated} {completed}");
        };
        check(5, 9, 0, &["synacks_lost"]);
        check(5, 0, 0, &[]);
        check(5, 9, 100, &[]);
        check(2, 9, 0, &[]);
    }
}
