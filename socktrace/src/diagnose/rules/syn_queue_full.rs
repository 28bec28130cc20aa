//! A burst of SYNs that the SYN queue had no room for; and what all rules about the SYN queue share.

use super::{Look, Rule, backlog, count};
use crate::{
    diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity},
    model::SynRule,
};

pub(super) const RULE: Rule = Rule {
    id: "syn_queue_full",
    about: "SYNs came in a burst that the SYN queue had no room for",
    facts: FACTS,
    look: Look::Listener(look),
};

/// What became of the handshakes that a listener began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Handshakes {
    /// SYNs dropped because the SYN queue was full, by either rule.
    pub(super) dropped: u64,
    /// SYNs that a cookie answered because it was full.
    pub(super) cookies: u64,
    pub(super) completed: u64,
    /// Given up, reset, or not answered within a second.
    pub(super) unfinished: u64,
    /// SYNs that came again for a request there was.
    pub(super) repeated: u64,
    /// Half of the SYN queue's limit is old requests, and handshakes that end are quick.
    is_stuck: bool,
}

/// So many handshakes that do not end, and one for so many that do, are more than clients that went away.
const MANY_UNFINISHED: u64 = 100;
const UNFINISHED_SHARE: u64 = 5;
/// A handshake that takes longer was on a long way, or its SYN-ACK was sent again.
pub(super) const SLOW_NS: u64 = 200_000_000;

impl Handshakes {
    pub(super) fn of(case: &Case) -> Self {
        let l = &case.last;
        let t = l.totals;
        let or_zero = |value: Option<u64>| value.unwrap_or(0);
        let always = l.syn_rule == Some(SynRule::Syncookies);
        let cookies = or_zero(t.cookies_sent);
        let old = u64::from(l.syn.depth.unwrap_or(0).saturating_sub(l.syn_young.unwrap_or(0)));
        Self {
            dropped: or_zero(t.drops.syn_queue_full) + or_zero(t.drops.syn_backlog_reserve),
            cookies: if always { 0 } else { cookies },
            completed: or_zero(t.established),
            unfinished: or_zero(t.requests_expired)
                + or_zero(t.requests_reset)
                + old
                + cookies.saturating_sub(or_zero(t.cookies_accepted)),
            repeated: or_zero(t.syns_repeated),
            is_stuck: old * 2 >= l.syn.limit.unwrap_or(u32::MAX).into()
                && l.handshake.is_none_or(|times| times.p90_ns < SLOW_NS),
        }
    }

    pub(super) fn was_full(&self) -> bool {
        self.dropped + self.cookies > 0
    }

    /// Whether most handshakes that began came to nothing.
    pub(super) fn mostly_unfinished(&self) -> bool {
        self.unfinished > self.completed
    }

    /// Whether more SYNs came without a client behind them than real clients explain: handshakes that do not end,
    /// or a SYN queue of old requests in which nothing moves.
    pub(super) fn is_flooded(&self) -> bool {
        let many = self.unfinished >= MANY_UNFINISHED
            && self.unfinished * UNFINISHED_SHARE >= self.completed;
        let stuck = self.is_stuck && self.dropped + self.cookies > self.completed;
        self.was_full() && (self.mostly_unfinished() || many || stuck)
    }
}

/// Which rule limits the SYN queue, and what does not.
pub(super) fn limit(case: &Case, diagnosis: &Diagnosis) -> String {
    let settings = diagnosis.settings(case);
    let limit = case.last.syn.limit.unwrap_or(0);
    match case.last.syn_rule {
        Some(SynRule::MaxSynBacklog) => format!(
            "Its SYN queue is limited to {limit}, three quarters of net.ipv4.tcp_max_syn_backlog{}, because \
             net.ipv4.tcp_syncookies is 0.",
            settings.max_syn_backlog.map_or_else(String::new, |most| format!(" ({most})"))
        ),
        Some(SynRule::Syncookies) => {
            "With net.ipv4.tcp_syncookies=2 no SYN is queued: every one is answered by a cookie."
                .to_owned()
        }
        _ => format!(
            "Its SYN queue is limited by the listener's own backlog, {limit}; net.ipv4.tcp_max_syn_backlog has \
             no effect here."
        ),
    }
}

/// What became of the SYNs that found no room.
pub(super) fn without_room(handshakes: Handshakes, case: &Case) -> String {
    let Handshakes { dropped, cookies, .. } = handshakes;
    let dropped_text =
        (dropped > 0).then(|| format!("{} dropped", count(dropped, "SYN was", "SYNs were")));
    let cookies_text = (cookies > 0).then(|| {
        let back = case.last.totals.cookies_accepted.unwrap_or(0);
        let back = if back == 0 { "none".to_owned() } else { back.to_string() };
        format!(
            "{} answered by a cookie, of which {back} came back",
            count(cookies, "SYN was", "SYNs were")
        )
    });
    dropped_text.into_iter().chain(cookies_text).collect::<Vec<_>>().join(" and ")
}

/// A larger SYN queue.
pub(super) fn enlarge(case: &Case, diagnosis: &Diagnosis) -> Remedy {
    let held = u64::from(case.last.syn.peak.unwrap_or(0));
    let turned_away = case.syns_turned_away();
    let settings = diagnosis.settings(case);
    let enough = backlog::enough(held + turned_away);
    let sum = backlog::sum(held, turned_away);
    let safety = if settings.syncookies == Some(0) {
        " net.ipv4.tcp_syncookies=1, the kernel's default, would make a full SYN queue harmless meanwhile."
    } else {
        ""
    };
    if case.last.syn_rule == Some(SynRule::MaxSynBacklog) {
        // Three quarters of it are the limit.
        let most = (enough + enough / 3 + 1).next_power_of_two();
        return Remedy {
            text: format!(
                "Raise net.ipv4.tcp_max_syn_backlog to {most}, so that {enough} fit: {sum}.{safety}"
            ),
            commands: vec![settings.sysctl("net.ipv4.tcp_max_syn_backlog", most)],
            backlog: None,
        };
    }
    let mut remedy = backlog::enlarge(case, diagnosis, enough);
    remedy.text = format!(
        "The backlog limits both queues; {enough} would do: {sum}. {}{safety}",
        remedy.text
    );
    remedy
}

/// Where in the record the numbers of these rules are.
pub(super) const FACTS: &[&str] = &[
    "syn_queue.depth",
    "syn_queue.young",
    "syn_queue.peak",
    "syn_queue.limit",
    "syn_queue.limit_rule",
    "totals.syns",
    "totals.syns_repeated",
    "totals.requests_queued",
    "totals.established",
    "totals.synack_retransmits",
    "totals.requests_expired",
    "totals.cookies_sent",
    "totals.cookies_accepted",
    "totals.cookies_failed",
    "totals.drops.syn_queue_full",
    "totals.drops.syn_backlog_reserve",
    "handshake.p90_us",
    "handshake.max_us",
];

/// Where the packets came from.
pub(super) fn sources(finding: Finding, case: &Case) -> Finding {
    const MOST: usize = 5;
    let top: Vec<_> = case
        .sources
        .top(MOST)
        .into_iter()
        .map(|(prefix, packets)| serde_json::json!({"prefix": prefix.to_string(), "packets": packets}))
        .collect();
    finding
        .measured("senders_seen", case.sources.addresses().0)
        .measured("packets_with_sender", case.sources.total())
        .measured("top_prefixes", top)
}

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let handshakes = Handshakes::of(case);
    // What cookies answered is told by another rule.
    if handshakes.dropped == 0 {
        return None;
    }
    let why = "More clients began a handshake at once than the SYN queue holds; most of those that fitted came \
               through quickly.";
    Some(full(RULE.id, case, diagnosis, "", why))
}

/// The SYN queue was full and clients were real: more of them fit into a larger one.
pub(super) fn full(
    rule: &'static str,
    case: &Case,
    diagnosis: &Diagnosis,
    of: &str,
    why: &str,
) -> Finding {
    let summary = format!(
        "the SYN queue was full ({} at a limit of {}){of}: {}",
        case.last.syn.peak.unwrap_or(0),
        case.last.syn.limit.unwrap_or(0),
        without_room(Handshakes::of(case), case)
    );
    let finding = Finding::new(rule, Severity::Critical, Confidence::Likely)
        .says(summary, format!("{why} {}", limit(case, diagnosis)))
        .advises(enlarge(case, diagnosis));
    sources(finding, case)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{finding, with};

    #[test]
    fn the_knob_that_binds_is_the_one_that_is_named() {
        let found = finding(with(8, |l| {
            l.syn.peak = Some(9);
            l.totals.established = Some(9);
            l.totals.drops.syn_queue_full = Some(21);
        }));
        assert_eq!(found.rule, "syn_queue_full");
        assert!(found.cause.contains("tcp_max_syn_backlog has no effect here"), "{found:?}");
        assert!(found.remedy.commands.is_empty());
        let found = finding(with(4096, |l| {
            l.syn.peak = Some(97);
            (l.syn.limit, l.syn_rule) = (Some(96), Some(SynRule::MaxSynBacklog));
            l.totals.established = Some(97);
            l.totals.drops.syn_backlog_reserve = Some(200);
        }));
        assert_eq!(found.remedy.commands, ["sysctl -w net.ipv4.tcp_max_syn_backlog=1024"]);
    }

    #[test]
    fn requests_that_wait_count_when_they_are_old() {
        let of = |depth, young| {
            let case = with(8, |l| (l.syn.depth, l.syn_young) = (Some(depth), Some(young)));
            Handshakes::of(&case).unfinished
        };
        assert_eq!((of(9, 9), of(9, 2)), (0, 7));
    }
}
