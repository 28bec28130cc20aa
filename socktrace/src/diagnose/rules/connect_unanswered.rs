//! Clients of this machine whose SYNs nobody answers, and no queue is to blame.

use super::{Look, Rule, count, time};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity, Unanswered},
    event::End,
    filter::Filter,
};

pub(super) const RULE: Rule = Rule {
    id: "connect_unanswered",
    about: "connects from this machine get no answer, and no listener of this machine dropped them",
    facts: &["totals.syns"],
    look: Look::Host(look),
};

fn look(diagnosis: &Diagnosis, _: &Filter) -> Vec<Finding> {
    let found = diagnosis.clients.unanswered.iter();
    found.filter_map(|((netns, _), (to, what))| one(diagnosis, *netns, to, what)).collect()
}

/// Whether a listener is the one that a connect goes to: it has that very address, or any of a namespace that has
/// it.
fn is_at(case: &Case, netns: u32, to: &End, is_local: bool) -> bool {
    let l = &case.last;
    let (Some(held), Some(to_address)) = (l.address, to.address) else { return false };
    let here = is_local && l.netns == netns;
    let address = if held.is_unspecified() {
        here
    } else {
        held.to_canonical() == to_address.to_canonical() && (here || !held.is_loopback())
    };
    l.port.is_some() && l.port == to.port && address
}

/// Whether a listener lost something itself, which explains it.
fn lost(case: &Case) -> bool {
    let totals = case.last.totals;
    totals.drops.total().is_none_or(|drops| drops > 0) || totals.lost_on_close > Some(0)
}

fn one(diagnosis: &Diagnosis, netns: u32, to: &End, what: &Unanswered) -> Option<Finding> {
    let at: Vec<&Case> =
        diagnosis.cases().filter(|case| is_at(case, netns, to, what.is_local)).collect();
    if at.iter().any(|case| lost(case)) {
        return None;
    }
    let total = what.failed + what.slow + what.pending;
    let who = what
        .caller
        .as_ref()
        .map_or_else(String::new, |c| format!(", {}/{} among them,", c.comm, c.pid));
    let slowest = if what.slowest.is_zero() {
        String::new()
    } else {
        format!("; the slowest took {}", time(what.slowest))
    };
    let summary = format!(
        "{} to {}{who} had to send the SYN again: {} answered late, {} in vain, {} still waiting{slowest}",
        count(total, "connect", "connects"),
        to.text(),
        what.slow,
        what.failed,
        what.pending,
    );
    // Of another namespace with the same address: somebody else's.
    let here = at.iter().find(|case| case.last.totals.syns == Some(0));
    let (cause, confidence) = match here {
        Some(case) => (
            format!(
                "{} listens there, and no SYN has reached that socket: it is dropped before (a firewall, a policy, \
                 a route), so no queue is to blame.",
                case.owner()
            ),
            Confidence::Likely,
        ),
        None if at.is_empty() => (
            "No listener of this machine is at that address: the SYN or its answer is lost on the way, or the other \
             machine drops it, which a full queue there does too."
                .to_owned(),
            Confidence::Possible,
        ),
        None => (
            "A listener of this machine at that port got SYNs and dropped none, so these were lost before it, or \
             their answers after it."
                .to_owned(),
            Confidence::Possible,
        ),
    };
    let remedy = if at.is_empty() {
        "Run socktrace on the machine that listens: there a full queue has a number. Here, `ip route get` and \
         `tcpdump -ni any 'tcp[tcpflags] & tcp-syn != 0'` show whether the SYN leaves."
    } else {
        "Look for what drops packets on the way: `nft list ruleset`, `ip rule`, `ip route get`, network policies; \
         `tcpdump -ni any 'tcp[tcpflags] & tcp-syn != 0'` shows how far the SYN comes."
    };
    let severity = if at.is_empty() { Severity::Info } else { Severity::Warning };
    let mut finding = Finding::new(RULE.id, severity, confidence)
        .says(summary, cause)
        .advises(Remedy::text(remedy))
        .measured("netns", netns)
        .measured("destination", to.text())
        .measured("connects_failed", what.failed)
        .measured("connects_slow", what.slow)
        .measured("connects_pending", what.pending);
    if let Some(caller) = &what.caller {
        finding = finding.measured("caller", serde_json::to_value(caller).unwrap_or_default());
    }
    if let Some(case) = here {
        finding = finding.of(case);
    }
    Some(finding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{diagnosis, with};

    fn rules(from: [u8; 4], syns: u64, drops: u64, port: u16) -> Vec<(&'static str, Confidence)> {
        let mut diagnosis = diagnosis(vec![with(16, |l| {
            l.totals.syns = Some(syns);
            l.totals.drops.accept_queue_full_on_syn = Some(drops);
        })]);
        let here = [10, 0, 0, 1].into();
        let netns = diagnosis.cases().next().unwrap().last.netns;
        diagnosis.clients.waits(netns, from.into(), (here, port), None);
        let found = diagnosis.findings(&Filter::default());
        found.iter().filter(|f| f.rule == RULE.id).map(|f| (f.rule, f.confidence)).collect()
    }

    #[test]
    fn a_full_queue_explains_it_and_an_idle_listener_does_not() {
        const SELF: [u8; 4] = [10, 0, 0, 1];
        assert_eq!(rules(SELF, 0, 0, 8080), [(RULE.id, Confidence::Likely)]);
        assert_eq!(rules(SELF, 9, 0, 8080), [(RULE.id, Confidence::Possible)]);
        assert_eq!(rules(SELF, 9, 5, 8080), []);
        assert_eq!(rules(SELF, 9, 5, 81), [(RULE.id, Confidence::Possible)]);
        // Elsewhere, whatever listens at that port here.
        assert_eq!(rules([10, 0, 0, 7], 9, 5, 8080), [(RULE.id, Confidence::Possible)]);
    }
}
