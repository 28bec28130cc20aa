//! Nobody listens where clients, or the user, look.

use super::{Look, Rule, count};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity},
    event::End,
    filter::Filter,
    model::Listener,
};

pub(super) const RULE: Rule = Rule {
    id: "port_not_listening",
    about: "nobody listens at a port that was asked for, or that a local client connects to",
    facts: &[],
    look: Look::Host(look),
};

fn look(diagnosis: &Diagnosis, filter: &Filter) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut asked = Vec::new();
    for ports in filter.ports.iter().filter(|ports| !diagnosis.has_listener(ports)) {
        asked.push(ports.clone());
        let refused: u64 = diagnosis
            .clients
            .refused
            .values()
            .filter(|(to, _)| to.port.is_some_and(|port| ports.contains(port)))
            .map(|(_, refused)| refused.count)
            .sum();
        let clients = if refused > 0 {
            format!(" ({} of this machine refused)", count(refused, "connect", "connects"))
        } else {
            String::new()
        };
        let summary = format!("nobody listened at port {ports}{clients}");
        found.push(
            finding(
                Severity::Critical,
                summary,
                "Clients get a reset (ECONNREFUSED) at once; no queue is involved.",
            )
            .measured("port", ports.to_string())
            .measured("connects_refused", refused),
        );
    }
    for ((netns, place), (to, refused)) in &diagnosis.clients.refused {
        if to.port.is_some_and(|port| asked.iter().any(|ports| ports.contains(port))) {
            continue;
        }
        if diagnosis.cases().any(|case| is_other_loopback(&case.last, *netns, to)) {
            continue;
        }
        let who = refused
            .caller
            .as_ref()
            .map_or_else(String::new, |c| format!(" by {}/{}", c.comm, c.pid));
        let at_port = |case: &&Case| {
            case.last.port == to.port && case.last.netns == *netns && !case.last.closed
        };
        let here = |case: &&Case| {
            case.last.address.is_some_and(|held| held.is_unspecified() || Some(held) == to.address)
        };
        let name = |case: &Case| format!("{} ({})", case.last.endpoint(), case.owner());
        let now = diagnosis.cases().filter(at_port).find(here).map(name);
        let others: Vec<String> = diagnosis.cases().filter(at_port).map(name).collect();
        let cause = match (now, others.is_empty()) {
            (Some(now), _) => format!(
                "Nobody listened there at that moment, so the kernel refused at once (ECONNREFUSED); {now} does now."
            ),
            (None, true) => {
                "Nobody listens there, so the kernel refuses at once (ECONNREFUSED); no queue is \
                             involved."
                    .to_owned()
            }
            (None, false) => format!(
                "Somebody listens at that port, but at another address: {}. The kernel refuses at once; no queue is \
                 involved.",
                others.join(", ")
            ),
        };
        let summary =
            format!("{} to {place}{who} refused", count(refused.count, "connect", "connects"));
        found.push(
            finding(Severity::Warning, summary, &cause)
                .measured("netns", *netns)
                .measured("destination", place.as_str())
                .measured("connects_refused", refused.count),
        );
    }
    found
}

/// Whether a listener is what a client gets next that tried the other family's loopback address first, as those do
/// that connect to `localhost`.
fn is_other_loopback(l: &Listener, netns: u32, to: &End) -> bool {
    let (Some(tried), Some(held)) = (to.address, l.address) else { return false };
    let covers = held.is_loopback() || held.is_unspecified();
    tried.is_loopback()
        && covers
        && tried.is_ipv4() != held.is_ipv4()
        && (l.netns, l.port) == (netns, to.port)
}

fn finding(severity: Severity, summary: String, cause: &str) -> Finding {
    Finding::new(RULE.id, severity, Confidence::Certain).says(summary, cause).advises(Remedy::text(
        "Start the service, or look why it ended (`systemctl status`, its log); `socktrace list` shows who listens \
         where, `socktrace events --kind bind,listen` why it fails to.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{diagnosis, with};

    #[test]
    fn clients_of_localhost_try_both_families() {
        let check = |held: &str, tried: &str, expect| {
            let case = with(16, |l| l.address = Some(held.parse().unwrap()));
            let to = End { address: Some(tried.parse().unwrap()), port: Some(8080), path: None };
            assert_eq!(
                is_other_loopback(&case.last, case.last.netns, &to),
                expect,
                "{held} {tried}"
            );
        };
        check("127.0.0.1", "::1", true);
        check("0.0.0.0", "::1", true);
        check("10.0.0.1", "::1", false);
        check("127.0.0.1", "127.0.0.2", false);
    }

    #[test]
    fn a_port_that_was_asked_for_has_to_have_a_listener() {
        let check = |ports: &str, expect: &[&str]| {
            let filter = Filter { ports: vec![ports.parse().unwrap()], ..Filter::default() };
            let found = diagnosis(vec![with(16, |_| {})]).findings(&filter);
            let summaries: Vec<&str> = found.iter().map(|f| f.summary.as_str()).collect();
            assert_eq!(summaries, expect);
        };
        check("8080", &[]);
        check("8000-9000", &[]);
        check("81", &["nobody listened at port 81"]);
        check("81-82", &["nobody listened at port 81-82"]);
    }
}
