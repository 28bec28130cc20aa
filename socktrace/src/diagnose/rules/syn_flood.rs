//! Many SYNs, hardly any handshake comes to an end.

use super::{
    Look, Rule, count, rate,
    syn_queue_full::{FACTS, Handshakes, limit, sources, without_room},
};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

/// One prefix that sends this part of all is worth a rule of its own.
const LOUD_PERCENT: u64 = 50;
/// One that sends less is as good as any other.
const WORTH_NAMING_PERCENT: u64 = 5;
/// With fewer handshakes it may be anything.
const MANY: u64 = 100;

pub(super) const RULE: Rule = Rule {
    id: "syn_flood",
    about: "a SYN flood filled the SYN queue: many SYNs, few handshakes that come to an end",
    facts: FACTS,
    look: Look::Listener(look),
};

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let handshakes = Handshakes::of(case);
    if !handshakes.is_flooded() {
        return None;
    }
    let syns = case.last.totals.syns.unwrap_or(0);
    let a_second = syns as f64 / case.watched.as_secs_f64().max(f64::MIN_POSITIVE);
    let summary = format!(
        "a flood of SYNs: {} a second came, and {}. The SYN queue was full: {}",
        rate(a_second),
        count_of(handshakes.completed),
        without_room(handshakes, case)
    );
    let from = senders(case);
    let cause = format!(
        "Their senders do not answer the SYN-ACK, as forged ones do not. {from} {}",
        limit(case, diagnosis)
    );
    let lost = handshakes.dropped > 0;
    let severity = if lost { Severity::Critical } else { Severity::Warning };
    let confidence = if handshakes.unfinished + handshakes.dropped >= MANY {
        Confidence::Likely
    } else {
        Confidence::Possible
    };
    let finding = Finding::new(RULE.id, severity, confidence)
        .says(summary, cause)
        .advises(remedy(case, diagnosis));
    Some(sources(finding, case))
}

fn count_of(connections: u64) -> String {
    match connections {
        0 => "no connection".to_owned(),
        some => count(some, "connection in all", "connections in all"),
    }
}

/// Where they come from, in a sentence.
fn senders(case: &Case) -> String {
    let (addresses, more) = case.sources.addresses();
    let top = case.sources.top(3);
    let Some((_, most)) = top.first() else { return "Their senders were not seen.".to_owned() };
    let more = if more { "more than " } else { "" };
    if most * 100 < case.sources.total() * WORTH_NAMING_PERCENT {
        return format!("They come from everywhere: {more}{addresses} senders were seen.");
    }
    let top: Vec<String> =
        top.iter().map(|(prefix, packets)| format!("{prefix} ({packets})")).collect();
    format!(
        "Of {} packets with {more}{addresses} senders, most are from {}.",
        case.sources.total(),
        top.join(", ")
    )
}

fn remedy(case: &Case, diagnosis: &Diagnosis) -> Remedy {
    let settings = diagnosis.settings(case);
    let mut remedy = Remedy::default();
    if settings.syncookies == Some(0) {
        remedy.text =
            "Turn SYN cookies on: they answer without keeping anything, so real clients get in. "
                .into();
        remedy.commands.push(settings.sysctl("net.ipv4.tcp_syncookies", 1));
    }
    let loud = case
        .sources
        .top(1)
        .into_iter()
        .find(|&(_, packets)| packets * 100 >= case.sources.total() * LOUD_PERCENT);
    match loud {
        Some((prefix, _)) => {
            let six = if prefix.is_ipv6() { "-6 " } else { "" };
            let (from, whose) = match case.sources.only() {
                Some(address) => (address.to_canonical().to_string(), "All come"),
                None => (prefix.to_string(), "Most come"),
            };
            remedy.text.push_str(&format!(
                "{whose} from {from}. Filter them upstream, or give them no way back: without a route their SYNs \
                 take no room (the kernel still counts them as drops, of another cause). Real clients there are \
                 shut out too."
            ));
            remedy.commands.push(format!("{}ip {six}route add blackhole {from}", settings.enter));
        }
        None => remedy.text.push_str(
            "They come from everywhere, so filtering by source will not do: cookies are what keeps the service \
             up. A larger backlog does not help against a flood.",
        ),
    }
    remedy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{diagnosis, finding, with},
        event::End,
    };

    fn flooded(from: impl Fn(u32) -> std::net::Ipv4Addr) -> Case {
        let mut case = with(8, |l| {
            (l.syn.depth, l.syn_young, l.syn.peak) = (Some(9), Some(0), Some(9));
            l.totals.syns = Some(1000);
            l.totals.drops.syn_queue_full = Some(991);
        });
        for i in 0..991 {
            let address = Some(from(i).into());
            case.sources.add(&End { address, port: Some(1), path: None }, true);
        }
        case
    }

    #[test]
    fn a_loud_prefix_is_filtered_and_a_spread_flood_is_not() {
        let found = finding(flooded(|i| (0xc633_6400 + i % 200).into()));
        assert_eq!((found.rule, found.severity), ("syn_flood", Severity::Critical));
        assert_eq!(found.remedy.commands, ["ip route add blackhole 198.51.100.0/24"]);
        let found = finding(flooded(|_| 0xc633_6407.into()));
        assert_eq!(found.remedy.commands, ["ip route add blackhole 198.51.100.7"]);
        let found = finding(flooded(|i| (0x0a00_0000 + (i << 8)).into()));
        assert!(found.remedy.commands.is_empty(), "{found:?}");
    }

    #[test]
    fn cookies_are_turned_on_where_they_are_off() {
        let mut diagnosis = diagnosis(vec![flooded(|i| (0x0a00_0000 + (i << 8)).into())]);
        for settings in diagnosis.settings.values_mut() {
            settings.syncookies = Some(0);
            settings.enter = "nsenter -t 7 -n ".into();
        }
        let found = diagnosis.findings(&crate::filter::Filter::default());
        assert_eq!(
            found[0].remedy.commands,
            ["nsenter -t 7 -n sysctl -w net.ipv4.tcp_syncookies=1"]
        );
    }

    #[test]
    fn a_few_real_clients_make_no_flood_a_crowd() {
        let check = |young, expect: &[&str]| {
            let case = with(64, |l| {
                (l.syn.depth, l.syn_young, l.syn.limit) = (Some(48), Some(young), Some(48));
                l.totals.drops.syn_backlog_reserve = Some(1500);
                l.totals.established = Some(80);
            });
            let found = diagnosis(vec![case]).findings(&crate::filter::Filter::default());
            assert_eq!(found.iter().map(|one| one.rule).collect::<Vec<_>>(), expect);
        };
        check(0, &["syn_flood"]);
        // They are new: whether they end is not known yet.
        check(48, &["syn_queue_full"]);
    }
}
