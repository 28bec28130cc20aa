//! The table, in Markdown.

use super::record::Record;

/// Whose costs the others are compared with.
const FLOOR: &str = "floor";

const HEAD: &str = "\
| load | tool | cost | over no tool | times the floor | of it own CPU | lost | resident | peak | maps \
| attached | first record |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

pub(super) fn render(records: &[Record]) -> String {
    let mut text = HEAD.to_owned();
    let mut load = "";
    for record in records {
        if record.load != load && record.none_ns[0] > 0 {
            row(&mut text, &[record.load.clone(), "none".into(), number(record.none())]);
        }
        load = &record.load;
        let mut cells = vec![record.load.clone(), record.tool.clone()];
        match &record.error {
            Some(error) => cells.push(format!("did not run: {}", escaped(error))),
            None => cells.extend(measured(record, floor(records, load))),
        }
        row(&mut text, &cells);
    }
    let spread = records.iter().map(Record::spread).fold(0.0, f64::max);
    text.push_str(&format!(
        "\nTwo runs without a tool, before and after one with it, differ by at most {spread:.1} %.\n"
    ));
    text
}

fn measured(record: &Record, floor: Option<f64>) -> [String; 10] {
    let none = record.none();
    let of_none = (none > 0.0).then(|| tenths(record.cost() / none * 100.0) + " %");
    let of_floor = floor.map(|floor| tenths(record.cost() / floor));
    [
        number(record.cost()),
        or_dash(of_none),
        or_dash(of_floor),
        or_dash(record.own().map(number)),
        or_dash(record.lost.map(|lost| number(lost as f64))),
        or_dash(record.resident_kib.map(mebibytes)),
        or_dash(record.peak_kib.map(mebibytes)),
        or_dash(record.maps_kib.map(mebibytes)),
        or_dash(record.attached_ns.map(milliseconds)),
        or_dash(record.first_record_ns.map(milliseconds)),
    ]
}

/// What the floor costs under a load.
fn floor(records: &[Record], load: &str) -> Option<f64> {
    let found = |record: &&Record| record.load == load && record.tool == FLOOR;
    let cost = records.iter().find(found).filter(|record| record.error.is_none())?.cost();
    (cost >= 1.0).then_some(cost)
}

/// A row of the table; cells that are missing are empty.
fn row(text: &mut String, cells: &[String]) {
    let columns = HEAD.lines().next().map_or(0, |head| head.matches('|').count() - 1);
    text.push('|');
    for at in 0..columns {
        text.push_str(&format!(" {} |", cells.get(at).map_or("", String::as_str)));
    }
    text.push('\n');
}

fn or_dash(cell: Option<String>) -> String {
    cell.unwrap_or_else(|| "-".into())
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// Rounded, in groups of three digits.
pub(super) fn number(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if value < 0.0 && digits != "0" { format!("-{grouped}") } else { grouped }
}

/// With one digit behind the point, and no minus before nothing.
fn tenths(value: f64) -> String {
    let text = format!("{value:.1}");
    if text == "-0.0" { "0.0".into() } else { text }
}

pub(super) fn mebibytes(kib: u64) -> String {
    format!("{:.1} MiB", kib as f64 / 1024.0)
}

/// A nanosecond is an instruction.
fn milliseconds(nanoseconds: u64) -> String {
    format!("{} ms", nanoseconds / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_for_no_tool_and_for_each_tool() {
        let records = [
            Record::costing("floor", 300),
            Record {
                own_ns: Some(20_000),
                lost: Some(0),
                resident_kib: Some(1536),
                peak_kib: Some(2048),
                maps_kib: Some(512),
                attached_ns: Some(170_000_000),
                first_record_ns: Some(180_900_000),
                ..Record::costing("x", 3_000)
            },
            Record { error: Some("no a|b".into()), ..Record::costing("y", 0) },
        ];
        let expect = [
            "| connect | none | 10,050 |  |  |  |  |  |  |  |  |  |",
            "| connect | floor | 300 | 3.0 % | 1.0 | - | - | - | - | - | - | - |",
            "| connect | x | 3,000 | 29.9 % | 10.0 | 2,000 | 0 | 1.5 MiB | 2.0 MiB | 0.5 MiB \
             | 170 ms | 180 ms |",
            "| connect | y | did not run: no a\\|b |  |  |  |  |  |  |  |  |  |",
            "",
            "Two runs without a tool, before and after one with it, differ by at most 1.0 %.",
        ];
        let text = render(&records);
        assert_eq!(text.lines().skip(2).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn without_a_floor_there_is_no_ratio() {
        let text = render(&[Record::costing("x", 3_000)]);
        assert!(text.contains("| connect | x | 3,000 | 29.9 % | - |"), "{text}");
    }

    #[test]
    fn nothing_has_no_sign() {
        assert_eq!([-0.04, -0.06, 1.25].map(tenths), ["0.0", "-0.1", "1.2"]);
    }

    #[test]
    fn numbers_are_grouped() {
        let check = |value: f64, expect: &str| assert_eq!(number(value), expect);
        check(0.4, "0");
        check(-0.4, "0");
        check(999.5, "1,000");
        check(-1234.0, "-1,234");
        check(12_345_678.0, "12,345,678");
    }
}
