//! The kernel counted losses that no listener could be given.

use super::{Look, Rule, count};
use crate::{
    diagnose::{Confidence, Diagnosis, Finding, Remedy, Severity},
    filter::Filter,
    model::{Family, Listener},
};

pub(super) const RULE: Rule = Rule {
    id: "losses_uncounted",
    about: "the kernel dropped packets of listeners that this backend cannot tell apart",
    facts: &[],
    look: Look::Host(look),
};

/// Whether what a listener lost is not known.
pub(crate) fn is_uncounted(l: &Listener) -> bool {
    l.family != Family::Unix && l.totals.drops.total().is_none()
}

fn look(diagnosis: &Diagnosis, _: &Filter) -> Vec<Finding> {
    let mut found = Vec::new();
    for (&netns, &drops) in &diagnosis.kernel_drops {
        let there = || diagnosis.cases().map(|case| &case.last).filter(move |l| l.netns == netns);
        let uncounted: Vec<String> =
            there().filter(|l| is_uncounted(l)).map(|l| l.endpoint()).collect();
        let counted: u64 = there().filter_map(|l| l.totals.drops.total()).sum();
        let rest = drops.saturating_sub(counted);
        if uncounted.is_empty() || rest == 0 {
            continue;
        }
        let listeners = count(uncounted.len() as u64, "listener", "listeners");
        let summary = format!(
            "the kernel dropped {} in network namespace {netns}, and which of {listeners} lost them is not known",
            count(rest, "packet", "packets")
        );
        const MOST: usize = 5;
        let cause = format!(
            "With tracepoints, what members of a SO_REUSEPORT group lose cannot be told apart, nor what any listener \
             loses once the kernel has skipped a run of a program. These could not be counted: {}{}.",
            uncounted[..uncounted.len().min(MOST)].join(", "),
            if uncounted.len() > MOST { "…" } else { "" }
        );
        let remedy = "Run it where the kernel allows fentry or kprobe (`socktrace check`); or look which of them has the \
                      drops (`ss -lntm`: the number behind `d` in skmem) and a full queue.";
        let finding = Finding::new(RULE.id, Severity::Critical, Confidence::Possible)
            .says(summary, cause)
            .advises(Remedy::text(remedy))
            .measured("netns", netns)
            .measured("packets", rest)
            .measured("listeners", uncounted);
        found.push(Finding { netns: Some(netns), ..finding });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diagnose::sample::{diagnosis, with},
        model::Drops,
    };

    #[test]
    fn what_the_kernel_lost_is_not_called_well() {
        let check = |drops: Option<u64>, kernel, expect: &[&str]| {
            let case = with(16, |l| {
                l.totals.drops = Drops { other: drops, ..l.totals.drops };
            });
            let netns = case.last.netns;
            let mut diagnosis = diagnosis(vec![case]);
            diagnosis.kernel_drops.insert(netns, kernel);
            let found = diagnosis.findings(&Filter::default());
            let rules: Vec<&str> = found.iter().map(|finding| finding.rule).collect();
            assert_eq!(rules, expect);
        };
        check(None, 5, &["losses_uncounted"]);
        check(None, 0, &[]);
        check(Some(0), 5, &[]);
    }
}
