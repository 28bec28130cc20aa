//! What the costs should be, beside what they are.

use super::{
    record::Record,
    table::{mebibytes, number},
};

/// What is compared.
#[derive(Clone, Copy)]
enum Figure {
    /// Instructions for each of what the load counts.
    Cost,
    /// Its own instructions for each record that it printed.
    Line,
    /// KiB resident, and of maps.
    Resident,
    PeakKib,
    Lost,
}

/// How much it may be.
#[derive(Clone, Copy)]
enum Limit {
    AtMost(u64),
    /// So much of what this tool has under the same load.
    Share(f64, &'static str),
}

struct Goal {
    what: &'static str,
    tool: &'static str,
    load: &'static str,
    figure: Figure,
    limit: Limit,
}

const TOP: &str = "socktrace top, fentry";
const THREE: &str = "socktrace events, three kinds";
const ALL: &str = "socktrace events, all, fentry";
const ACCEPT: &str = "socktrace events, accept";

const fn goal(
    what: &'static str,
    tool: &'static str,
    load: &'static str,
    figure: Figure,
    limit: Limit,
) -> Goal {
    Goal { what, tool, load, figure, limit }
}

const GOALS: &[Goal] = &[
    goal("aggregating, a connection", TOP, "connect", Figure::Cost, Limit::AtMost(1_200)),
    goal("aggregating, a dropped SYN", TOP, "syn-drop", Figure::Cost, Limit::AtMost(300)),
    goal("the same with cookies on", TOP, "syn-drop-cookies", Figure::Cost, Limit::AtMost(300)),
    goal("aggregating, a queued SYN", TOP, "syn-queue", Figure::Cost, Limit::AtMost(300)),
    goal(
        "aggregating, a SYN answered by a cookie",
        TOP,
        "syn-cookie",
        Figure::Cost,
        Limit::AtMost(300),
    ),
    goal("three records a connection", THREE, "connect", Figure::Cost, Limit::AtMost(2_500)),
    goal("every kind, a connection", ALL, "connect", Figure::Cost, Limit::AtMost(4_500)),
    goal(
        "accept only, against bpftrace tcpaccept.bt",
        ACCEPT,
        "connect",
        Figure::Cost,
        Limit::Share(1.0 / 30.0, "bpftrace tcpaccept.bt"),
    ),
    goal(
        "every kind, against tcpstates",
        ALL,
        "connect",
        Figure::Cost,
        Limit::Share(1.0 / 15.0, "libbpf-tools tcpstates"),
    ),
    goal(
        "two instances, against one",
        "socktrace top, fentry, two at once",
        "connect",
        Figure::Cost,
        Limit::Share(2.1, TOP),
    ),
    goal("the reader, a printed line", ALL, "connect", Figure::Line, Limit::AtMost(3_000)),
    goal("records lost, every kind", ALL, "connect", Figure::Lost, Limit::AtMost(0)),
    goal(
        "a snapshot of 10,000 listeners",
        "socktrace list",
        "idle-10000",
        Figure::Cost,
        Limit::AtMost(20_000_000),
    ),
    goal(
        "resident with maps, 100 listeners",
        TOP,
        "idle-100",
        Figure::Resident,
        Limit::AtMost(10 << 10),
    ),
    goal("peak, 100 listeners", TOP, "idle-100", Figure::PeakKib, Limit::AtMost(32 << 10)),
    goal(
        "resident with maps, 1,000 listeners",
        TOP,
        "idle-1000",
        Figure::Resident,
        Limit::AtMost(24 << 10),
    ),
    goal(
        "resident with maps, 20,000 listeners",
        TOP,
        "idle-20000",
        Figure::Resident,
        Limit::AtMost(64 << 10),
    ),
];

/// Goals that these loads do not tell.
const ELSEWHERE: &str = "\
Not measured here: the reader's part of a record that it does not print, 30,000 connections a second for a \
minute, the start in native time.\n";

pub(super) fn render(records: &[Record]) -> String {
    let mut text = "| goal | limit | measured | met |\n| --- | ---: | ---: | --- |\n".to_owned();
    for goal in GOALS {
        let limit = match goal.limit {
            Limit::AtMost(limit) => Some(limit as f64),
            Limit::Share(share, of) => {
                value(records, of, goal.load, goal.figure).map(|whole| whole * share)
            }
        };
        let measured = value(records, goal.tool, goal.load, goal.figure);
        let met = match (measured, limit) {
            (Some(measured), Some(limit)) if measured <= limit => "yes",
            (Some(_), Some(_)) => "no",
            _ => "not measured",
        };
        let show = |value: Option<f64>| match (value, goal.figure) {
            (None, _) => "-".to_owned(),
            (Some(kib), Figure::Resident | Figure::PeakKib) => mebibytes(kib as u64),
            (Some(value), _) => number(value),
        };
        text.push_str(&format!(
            "| {} | {} | {} | {met} |\n",
            goal.what,
            show(limit),
            show(measured)
        ));
    }
    text.push('\n');
    text.push_str(ELSEWHERE);
    text
}

fn value(records: &[Record], tool: &str, load: &str, figure: Figure) -> Option<f64> {
    let wanted =
        |record: &&Record| record.tool == tool && record.load == load && record.error.is_none();
    let record = records.iter().find(wanted)?;
    match figure {
        Figure::Cost => Some(record.cost()),
        // The load warms up with a tenth more, which the tool prints too.
        Figure::Line => Some(record.own()? * record.count as f64 * 1.1 / record.events? as f64),
        Figure::Resident => Some((record.resident_kib? + record.maps_kib?) as f64),
        Figure::PeakKib => record.peak_kib.map(|kib| kib as f64),
        Figure::Lost => record.lost.map(|lost| lost as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(records: &[Record], what: &str) -> String {
        let text = render(records);
        let start = format!("| {what} |");
        text.lines().find(|line| line.starts_with(&start)).unwrap().to_owned()
    }

    #[test]
    fn a_goal_is_met_missed_or_not_measured() {
        let what = "aggregating, a connection";
        let check = |records: &[Record], expect: &str| {
            assert_eq!(line(records, what), format!("| {what} | 1,200 | {expect} |"));
        };
        check(&[Record::costing(TOP, 1_200)], "1,200 | yes");
        check(&[Record::costing(TOP, 1_201)], "1,201 | no");
        check(&[], "- | not measured");
        check(
            &[Record { error: Some("no".into()), ..Record::costing(TOP, 0) }],
            "- | not measured",
        );
    }

    #[test]
    fn a_goal_against_another_tool_needs_it() {
        let what = "accept only, against bpftrace tcpaccept.bt";
        let ours = || Record::costing(ACCEPT, 900);
        let check = |records: &[Record], expect: &str| {
            assert_eq!(line(records, what), format!("| {what} | {expect} |"));
        };
        check(&[ours(), Record::costing("bpftrace tcpaccept.bt", 30_000)], "1,000 | 900 | yes");
        check(&[ours()], "- | 900 | not measured");
    }
}
