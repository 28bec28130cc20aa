//! Aligned text.

use std::io::{self, Write};

use super::column::{Align, COLUMNS, Column, Shown};
use crate::model::{Listener, Queue};

#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub wide: bool,
    pub header: bool,
    pub color: bool,
}

pub(super) const RED: &str = "\x1b[31m";
pub(super) const YELLOW: &str = "\x1b[33m";
pub(super) const BOLD: &str = "\x1b[1m";
pub(super) const RESET: &str = "\x1b[0m";

/// Writes one row a listener, columns as wide as they need to be.
pub fn write(out: &mut impl Write, listeners: &[Listener], style: Style) -> io::Result<()> {
    let columns: Vec<&Column> =
        COLUMNS.iter().filter(|column| shows(column, listeners, style.wide)).collect();
    let rows: Vec<Vec<String>> = listeners
        .iter()
        .map(|l| columns.iter().map(|column| (column.value)(l)).collect())
        .collect();
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(i, column)| {
            let cells = rows.iter().map(|row| width(&row[i]));
            cells.chain([column.title.len()]).max().unwrap_or(0)
        })
        .collect();
    if style.header {
        let titles: Vec<String> = columns.iter().map(|column| column.title.to_owned()).collect();
        line(out, &columns, &widths, &titles, style.color.then_some(BOLD))?;
    }
    for (listener, row) in listeners.iter().zip(&rows) {
        let color = if style.color { color(listener) } else { None };
        line(out, &columns, &widths, row, color)?;
    }
    Ok(())
}

fn shows(column: &Column, listeners: &[Listener], wide: bool) -> bool {
    match column.shown {
        Shown::Always => true,
        Shown::Wide => wide,
        Shown::WhenAny(holds) => wide || listeners.iter().any(holds),
        Shown::WhenDifferent => {
            wide || listeners
                .windows(2)
                .any(|two| (column.value)(&two[0]) != (column.value)(&two[1]))
        }
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn line(
    out: &mut impl Write,
    columns: &[&Column],
    widths: &[usize],
    cells: &[String],
    color: Option<&str>,
) -> io::Result<()> {
    let mut text = String::new();
    for ((column, cell), &wanted) in columns.iter().zip(cells).zip(widths) {
        text.push_str(&" ".repeat(column.gap));
        let padding = " ".repeat(wanted - width(cell));
        match column.align {
            Align::Left => text.extend([cell, padding.as_str()]),
            Align::Right => text.extend([padding.as_str(), cell]),
        }
    }
    let text = text.trim_end();
    match color {
        Some(color) => writeln!(out, "{color}{text}{RESET}"),
        None => writeln!(out, "{text}"),
    }
}

/// Red: connections were lost in this interval, or a queue was full. Yellow: a queue was at four
/// fifths of its limit or more.
fn color(listener: &Listener) -> Option<&'static str> {
    let queues = [listener.accept, listener.syn];
    let lost = listener.dropped > Some(0) || queues.iter().any(Queue::was_full);
    let near =
        || queues.iter().any(|queue| queue.limit.is_some_and(|l| l > 0) && queue.fill() >= 800);
    if lost {
        Some(RED)
    } else if near() {
        Some(YELLOW)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Owner, Totals};

    fn text(listeners: &[Listener], wide: bool, header: bool, color: bool) -> String {
        let mut out = Vec::new();
        write(&mut out, listeners, Style { wide, header, color }).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_normal_table() {
        let mut other = crate::view::sample();
        other.address = Some("::1".parse().unwrap());
        other.port = None;
        other.accept.peak = None;
        other.syn = Queue::default();
        other.totals = Totals::default();
        other.owners.clear();
        let expect = "\
LISTENER      ACCQ PEAK LIM  SYNQ PEAK LIM  DROPS  OWNER
0.0.0.0:8080     3  129 128     0    9 128    129  nginx/812 +1
[::1]:*          3    - 128     -    -   -      -  -
";
        let listeners = [crate::view::sample(), other];
        assert_eq!(text(&listeners, false, true, false), expect);
        let rows: String = expect.lines().skip(1).map(|row| format!("{row}\n")).collect();
        assert_eq!(text(&listeners, false, false, false), rows);
    }

    #[test]
    fn namespaces_are_shown_when_there_are_several() {
        let mut other = crate::view::sample();
        other.netns = 4_026_532_001;
        let table = text(&[crate::view::sample(), other], false, true, false);
        assert!(table.contains("4026531840") && table.contains("4026532001"), "{table}");
        assert!(!text(&[crate::view::sample()], false, true, false).contains("4026531840"));
    }

    #[test]
    fn the_syn_queue_has_a_limit_of_its_own_at_times() {
        let mut listener = crate::view::sample();
        assert!(text(&[listener.clone()], false, true, false).contains("SYNQ PEAK  DROPS"));
        listener.syn.limit = Some(96);
        assert!(text(&[listener], false, true, false).contains("SYNQ PEAK LIM  DROPS"));
    }

    #[test]
    fn normal_rows_fit_80_columns() {
        let mut listener = crate::view::sample();
        listener.address = Some([203, 113, 113, 213].into());
        listener.port = Some(65535);
        for queue in [&mut listener.accept, &mut listener.syn] {
            (queue.depth, queue.peak, queue.limit) = (Some(4097), Some(4097), Some(4096));
        }
        listener.totals.drops.other = Some(99_000);
        listener.owners = vec![Owner { pid: 999_999, comm: "fifteen-letters".into(), fd: 3 }];
        for row in text(&[listener], false, true, false).lines() {
            assert!(row.len() < 80, "{} columns: {row}", row.len());
        }
    }

    #[test]
    fn a_hostile_name_is_escaped_and_color_is_ours() {
        let mut listener = crate::view::sample();
        listener.owners = vec![Owner { pid: 1, comm: "\x1b]0;x\x07".into(), fd: 3 }];
        assert!(!text(&[listener.clone()], true, true, false).contains('\x1b'));
        assert!(text(&[listener], false, true, true).contains("\x1b[31m0.0.0.0:8080"));
    }
}
