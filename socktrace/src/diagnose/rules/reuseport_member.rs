//! One member of a SO_REUSEPORT group loses what the others would have taken.

use super::{Look, Rule, acceptor_stalled, count, tenths};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

/// A member that does accept is the odd one if it loses one packet for so many connections, or more.
const LOSES: u64 = 5;

pub(super) const RULE: Rule = Rule {
    id: "reuseport_member",
    about: "one member of a SO_REUSEPORT group loses connections while the others are well",
    facts: &[
        "listener.reuseport",
        "accept_queue.depth",
        "accept_queue.peak",
        "accept_queue.limit",
        "totals.established",
        "totals.accepted",
        "totals.drops.accept_queue_full_on_syn",
        "totals.drops.accept_queue_full_on_ack",
        "oldest_wait_ms",
    ],
    look: Look::Listener(look),
};

fn is_bad(case: &Case) -> bool {
    case.lost_at_accept_queue() > 0 || acceptor_stalled::is_stalled(case)
}

/// Whether it loses so much that it is more than bad luck with the hash.
fn is_worse(case: &Case) -> bool {
    let served = case.last.totals.established.unwrap_or(0);
    acceptor_stalled::is_stalled(case) || case.lost_at_accept_queue() * LOSES > served
}

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let siblings: Vec<&Case> =
        diagnosis.siblings(case).filter(|other| !other.last.closed).collect();
    let bad = 1 + siblings.iter().filter(|other| is_bad(other)).count();
    let members = 1 + siblings.len();
    // Where half of the group is in trouble, it is no member's.
    if !is_bad(case) || bad * 2 > members || siblings.is_empty() || !is_worse(case) {
        return None;
    }
    let lost = case.lost_at_accept_queue();
    let dead = case.clients_turned_away() as u64;
    let served: u64 = siblings.iter().filter_map(|other| other.last.totals.established).sum();
    let share = 100.0 * dead as f64 / ((dead + served) as f64).max(1.0);
    let share_text =
        if dead > 0 { format!(", {share:.0} % of all who came,") } else { String::new() };
    let owner = case.owner();
    let summary = if lost > 0 {
        format!(
            "one of the {members} members of this SO_REUSEPORT group, {owner}, lost {}{share_text} while {} lost \
             nothing",
            count(lost, "packet of a client", "packets of clients"),
            if bad == 1 { "the others" } else { "most others" },
        )
    } else {
        format!(
            "one of the {members} members of this SO_REUSEPORT group, {owner}, accepts nothing: {} wait there",
            count(case.idle_depth.into(), "connection", "connections")
        )
    };
    let hash = "The kernel gives each connection to a member by a hash of its addresses and ports, whether that member \
                accepts or not.";
    let (does, mut remedy) = if acceptor_stalled::is_stalled(case) {
        (acceptor_stalled::doing(case), acceptor_stalled::remedy(case))
    } else {
        let does = format!("{owner} accepts more slowly than what comes to it.");
        (does, Remedy::text("Find what makes it slower than the others."))
    };
    let cause = format!("{hash} {does}");
    remedy.text = format!(
        "Only {owner} has to be mended or restarted. {} A supervisor should end members that do not accept.",
        remedy.text
    );
    let finding = Finding::new(RULE.id, Severity::Critical, Confidence::Certain)
        .says(summary, cause)
        .advises(remedy)
        .measured("members", members)
        .measured("established_by_others", served)
        .measured("share_percent", tenths(share));
    Some(acceptor_stalled::measured(finding, case))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{listener, rules_of},
        model::Id,
    };

    fn member(cookie: u64, dropped: u64) -> Case {
        let mut now = listener(16);
        now.id = Id::Cookie { netns: 1, cookie };
        now.reuseport = Some(true);
        let mut case = Case::new(now.clone());
        now.totals.drops.accept_queue_full_on_syn = Some(dropped);
        now.totals.established = Some(30);
        now.accept.peak = Some(17);
        case.interval(now, std::time::Duration::from_millis(100));
        case
    }

    #[test]
    fn who_accepts_is_not_said_to_accept_nothing() {
        let cases = vec![member(1, 0), member(2, 9), member(3, 0)];
        let found =
            crate::diagnose::sample::diagnosis(cases).findings(&crate::filter::Filter::default());
        assert!(found[0].cause.contains("accepts more slowly"), "{found:#?}");
        assert!(found[0].summary.contains("while the others lost nothing"), "{found:#?}");
    }

    #[test]
    fn the_odd_one_is_named_and_a_whole_group_is_not() {
        let check = |drops: &[u64], expect: &[&str]| {
            let cases =
                (1..).zip(drops).map(|(cookie, &dropped)| member(cookie, dropped)).collect();
            assert_eq!(rules_of(cases), expect, "{drops:?}");
        };
        check(&[0, 0, 0], &[]);
        check(&[0, 9, 0], &["reuseport_member"]);
        // Bad luck with the hash.
        check(&[0, 5, 0], &["accept_burst"]);
        check(&[9, 9, 0], &["accept_burst", "accept_burst"]);
        check(&[9], &["accept_burst"]);
    }
}
