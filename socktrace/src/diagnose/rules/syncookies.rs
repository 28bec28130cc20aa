//! SYN cookies answer real clients.

use super::{
    Look, Rule, count,
    syn_queue_full::{FACTS, Handshakes, enlarge, limit},
};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity},
    model::SynRule,
};

pub(super) const RULE: Rule = Rule {
    id: "syncookies",
    about: "SYN cookies are in use: why, and what real clients lose by it",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let totals = case.last.totals;
    let sent = totals.cookies_sent.filter(|&sent| sent > 0)?;
    let back = totals.cookies_accepted.unwrap_or(0);
    let handshakes = Handshakes::of(case);
    let always = case.last.syn_rule == Some(SynRule::Syncookies);
    // Whom a full accept queue turned away comes again, with all the others: one thing to mend is enough.
    if !always && case.lost_at_accept_queue() > 0 {
        return None;
    }
    // A flood that only cookies answered is another rule's.
    if back == 0 && handshakes.is_flooded() {
        return None;
    }
    let settings = diagnosis.settings(case);
    let why = if always {
        String::new()
    } else {
        format!(" because the SYN queue was full. {}", limit(case, diagnosis))
    };
    let summary = format!(
        "{} answered by a SYN cookie, {back} of which became connections: these lose TCP options",
        count(sent, "SYN was", "SYNs were")
    );
    let options = match settings.timestamps {
        Some(0) => {
            "With net.ipv4.tcp_timestamps=0 such a connection has no window scaling (64 KiB in flight at \
             most), no SACK and one of four segment sizes"
        }
        _ => {
            "A client that sends timestamps keeps window scaling and SACK, one that does not loses both (64 KiB \
             in flight at most); the segment size becomes one of four for everyone"
        }
    };
    let began = if always { limit(case, diagnosis) } else { format!("Cookies began{why}") };
    let cause = format!("{began} {options}, and a SYN-ACK that is lost is not sent again.");
    let mut remedy = if always {
        Remedy {
            text: "Use cookies only when the SYN queue is full, as the kernel does by default."
                .into(),
            commands: vec![settings.sysctl("net.ipv4.tcp_syncookies", 1)],
            backlog: None,
        }
    } else if handshakes.is_flooded() {
        Remedy::text(
            "Leave cookies on while the flood lasts: without them these clients would not get in.",
        )
    } else {
        let mut remedy = enlarge(case, diagnosis);
        remedy.text =
            format!("{} Leave cookies on: without them these SYNs would be dropped.", remedy.text);
        remedy
    };
    if settings.timestamps == Some(0) {
        remedy.text.push_str(" And turn timestamps on, which carry the options through a cookie.");
        remedy.commands.push(settings.sysctl("net.ipv4.tcp_timestamps", 1));
    }
    Some(
        Finding::new(RULE.id, Severity::Warning, Confidence::Certain)
            .says(summary, cause)
            .advises(remedy),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{finding, with};

    #[test]
    fn why_cookies_began() {
        let found = finding(with(4096, |l| {
            (l.syn.limit, l.syn_rule) = (Some(0), Some(SynRule::Syncookies));
            l.totals.cookies_sent = Some(5);
            l.totals.cookies_accepted = Some(5);
            l.totals.established = Some(5);
        }));
        assert_eq!(found.rule, "syncookies");
        assert_eq!(found.remedy.commands, ["sysctl -w net.ipv4.tcp_syncookies=1"]);
        let found = finding(with(8, |l| {
            l.syn.peak = Some(9);
            l.totals.cookies_sent = Some(5);
            l.totals.cookies_accepted = Some(5);
            l.totals.established = Some(14);
        }));
        assert!(found.cause.contains("because the SYN queue was full"), "{found:?}");
        assert_eq!(found.remedy.backlog, Some(32));
    }
}
