//! Whether what the trace attributed to listeners is what the kernel counted. Pure: it is given what
//! was read.

use std::collections::{BTreeMap, BTreeSet};

use socktrace_common::count;

use crate::{
    bpf::{Counts, Netns},
    host::{EXPLAINED, Netstat},
    view::json::Reconciliation,
};

/// What the trace had attributed at some moment, and the kernel's counters right before and right
/// after that: events go on meanwhile.
#[derive(Clone, Debug, Default)]
pub struct Look {
    pub before: BTreeMap<u32, Netstat>,
    pub attributed: BTreeMap<Netns, Counts>,
    pub after: BTreeMap<u32, Netstat>,
    /// Which namespace had the inode number then.
    pub namespaces: BTreeMap<u32, u32>,
}

impl Look {
    /// Whether nothing happened between the two readings of the kernel's counters.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.before == self.after
    }

    fn explained(&self, netns: Netns) -> Netstat {
        self.attributed.get(&netns).map_or_else(Netstat::default, explained)
    }

    /// The namespace of an inode number; without the privilege to ask, the only one there was.
    fn namespace(&self, inode: u32) -> Netns {
        let attributed = || self.attributed.keys().rev().find(|netns| netns.0 == inode);
        let mix = self.namespaces.get(&inode).copied();
        mix.or_else(|| attributed().map(|netns| netns.1)).map_or((inode, 0), |mix| (inode, mix))
    }
}

/// What of the counts each of the kernel's counters is, in the order of [`EXPLAINED`].
fn explained(counts: &Counts) -> Netstat {
    let overflows = counts[count::FULL_ON_SYN] + counts[count::FULL_ON_ACK];
    let drops = overflows + counts[count::SYN_FULL] + counts[count::RESERVE] + counts[count::OTHER];
    [
        overflows,
        drops,
        counts[count::SYN_FULL],
        counts[count::COOKIES_WANTED],
        counts[count::COOKIES_SENT],
        counts[count::COOKIES_ACCEPTED],
        counts[count::COOKIES_FAILED],
    ]
}

/// Compares what happened between two looks. A namespace that the first one does not know is younger
/// and began at zero; one that the last one does not know any more has no answer.
#[must_use]
pub fn reconcile(start: &Look, end: &Look) -> Vec<Reconciliation> {
    let now = end.after.keys().map(|&inode| end.namespace(inode));
    let namespaces: BTreeSet<Netns> =
        now.chain(end.attributed.keys().copied()).filter(|netns| netns.0 != 0).collect();
    let mut result = Vec::new();
    for netns in namespaces {
        let (first, last) = (start.explained(netns), end.explained(netns));
        let zero = Netstat::default();
        let old = start.namespace(netns.0) == netns;
        let began = start.before.get(&netns.0).zip(start.after.get(&netns.0));
        let began = began.filter(|_| old).unwrap_or((&zero, &zero));
        let there = end.namespace(netns.0) == netns;
        let ended = end.before.get(&netns.0).zip(end.after.get(&netns.0)).filter(|_| there);
        for (index, counter) in EXPLAINED.into_iter().enumerate() {
            let socktrace = last[index].wrapping_sub(first[index]);
            let kernel = ended.map(|(before, after)| {
                let least = before[index].saturating_sub(began.1[index]);
                let most = after[index].saturating_sub(began.0[index]);
                // Which of the values in between it was cannot be told; the one that fits is possible.
                socktrace.clamp(least.min(most), most)
            });
            result.push(Reconciliation {
                netns: netns.0,
                counter,
                kernel,
                socktrace,
                unexplained: kernel.map(|kernel| kernel.wrapping_sub(socktrace).cast_signed()),
            });
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETNS: u32 = 7;
    const MIX: u32 = 99;

    fn look(before: u64, attributed: u64, after: u64) -> Look {
        let mut counts = [0; count::COUNT];
        counts[count::FULL_ON_SYN] = attributed;
        let kernel = |value| BTreeMap::from([(NETNS, [value, value, 0, 0, 0, 0, 0])]);
        Look {
            before: kernel(before),
            attributed: BTreeMap::from([((NETNS, MIX), counts)]),
            after: kernel(after),
            namespaces: BTreeMap::from([(NETNS, MIX)]),
        }
    }

    fn overflows(start: &Look, end: &Look) -> (Option<u64>, u64, Option<i64>) {
        let all = reconcile(start, end);
        assert_eq!(all.len(), EXPLAINED.len());
        let one = all.iter().find(|one| one.counter == "ListenOverflows").unwrap();
        assert_eq!(one.netns, NETNS);
        (one.kernel, one.socktrace, one.unexplained)
    }

    #[test]
    fn the_rest_is_shown() {
        assert_eq!(overflows(&look(100, 0, 100), &look(112, 12, 112)), (Some(12), 12, Some(0)));
        assert_eq!(overflows(&look(100, 3, 100), &look(112, 12, 112)), (Some(12), 9, Some(3)));
        assert_eq!(overflows(&look(100, 0, 100), &look(110, 12, 110)), (Some(10), 12, Some(-2)));
    }

    #[test]
    fn events_between_the_readings_are_no_rest() {
        assert_eq!(overflows(&look(100, 1, 103), &look(120, 21, 125)), (Some(20), 20, Some(0)));
        assert_eq!(overflows(&look(100, 1, 103), &look(120, 31, 125)), (Some(25), 30, Some(-5)));
        assert_eq!(overflows(&look(100, 1, 103), &look(120, 11, 125)), (Some(17), 10, Some(7)));
    }

    #[test]
    fn namespaces_come_and_go() {
        assert_eq!(overflows(&Look::default(), &look(12, 12, 12)), (Some(12), 12, Some(0)));
        // Another namespace has the inode number now, and began at zero.
        let mut reused = look(4, 0, 4);
        reused.namespaces = BTreeMap::from([(NETNS, MIX + 1)]);
        let counts = look(0, 4, 0).attributed[&(NETNS, MIX)];
        reused.attributed = BTreeMap::from([((NETNS, MIX + 1), counts)]);
        assert_eq!(overflows(&look(100, 9, 100), &reused), (Some(4), 4, Some(0)));
        let gone = Look { attributed: look(0, 5, 0).attributed, ..Look::default() };
        assert_eq!(overflows(&look(9, 1, 9), &gone), (None, 4, None));
    }
}
