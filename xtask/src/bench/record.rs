//! What the guest reports: one tool under one load.

use anyhow::{Context as _, Result};
use serde_json::Value;

/// What a line of the guest begins with that is a record.
const MARK: &str = "bench: ";

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Record {
    pub(crate) load: String,
    /// What is counted: connections, SYNs, ACKs, looks.
    pub(crate) unit: String,
    pub(crate) tool: String,
    pub(crate) count: u64,
    /// The same load without a tool, before and after.
    pub(crate) none_ns: [u64; 2],
    /// Why there is nothing below.
    pub(crate) error: Option<String>,
    pub(crate) with_ns: u64,
    /// The tool's own part, where it hooks something too.
    pub(crate) own_ns: Option<u64>,
    pub(crate) attached_ns: Option<u64>,
    pub(crate) first_record_ns: Option<u64>,
    pub(crate) events: Option<u64>,
    pub(crate) lost: Option<u64>,
    pub(crate) peak_kib: Option<u64>,
    pub(crate) resident_kib: Option<u64>,
    pub(crate) maps_kib: Option<u64>,
}

impl Record {
    /// Instructions for each of what is counted, without a tool.
    pub(crate) fn none(&self) -> f64 {
        let [before, after] = self.none_ns;
        (before + after) as f64 / 2.0 / self.count as f64
    }

    /// Instructions for each above that.
    pub(crate) fn cost(&self) -> f64 {
        self.with_ns as f64 / self.count as f64 - self.none()
    }

    /// A tool that costs so many instructions for each connection.
    #[cfg(test)]
    pub(crate) fn costing(tool: &str, cost: u64) -> Self {
        Self {
            load: "connect".into(),
            tool: tool.into(),
            count: 10,
            none_ns: [100_000, 101_000],
            with_ns: 100_500 + 10 * cost,
            ..Self::default()
        }
    }

    /// How far the two runs without a tool are apart, in per cent.
    pub(crate) fn spread(&self) -> f64 {
        let [before, after] = self.none_ns;
        if before == 0 { 0.0 } else { before.abs_diff(after) as f64 / before as f64 * 100.0 }
    }

    /// The tool's own instructions for each.
    pub(crate) fn own(&self) -> Option<f64> {
        self.own_ns.map(|own| own as f64 / self.count as f64)
    }
}

/// The records among the lines.
pub(crate) fn parse(lines: &[String]) -> Result<Vec<Record>> {
    let records = lines.iter().filter_map(|line| line.strip_prefix(MARK));
    records.map(|line| one(line).with_context(|| format!("the guest's record {line}"))).collect()
}

fn one(line: &str) -> Result<Record> {
    let value: Value = serde_json::from_str(line)?;
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    let number = |key: &str| value[key].as_u64();
    let error = text("error");
    let none = |at: usize| value["none_ns"][at].as_u64();
    let measured = if error.is_some() { Some(0) } else { number("with_ns") };
    Ok(Record {
        load: text("load").context("no load")?,
        unit: text("unit").context("no unit")?,
        tool: text("tool").context("no tool")?,
        count: number("count").filter(|&count| count > 0).context("no count")?,
        none_ns: [none(0).unwrap_or(0), none(1).unwrap_or(0)],
        with_ns: measured.context("no with_ns")?,
        error,
        own_ns: number("own_ns"),
        attached_ns: number("attached_ns"),
        first_record_ns: number("first_record_ns"),
        events: number("events"),
        lost: number("lost"),
        peak_kib: number("peak_kib"),
        resident_kib: number("resident_kib"),
        maps_kib: number("maps_kib"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn records_are_found_among_other_lines() {
        let records = parse(&lines(
            "something else\n\
             bench: {\"load\":\"connect\",\"unit\":\"connections\",\"tool\":\"x\",\"count\":100,\
             \"none_ns\":[1000,3000],\"with_ns\":5000,\"own_ns\":1000,\"lost\":null}\n\
             bench: {\"load\":\"connect\",\"unit\":\"connections\",\"tool\":\"y\",\"count\":100,\
             \"none_ns\":[1000,1000],\"error\":\"no\"}",
        ))
        .unwrap();
        let [x, y] = &records[..] else { panic!("{records:?}") };
        assert_eq!((x.none(), x.cost(), x.own(), x.lost), (20.0, 30.0, Some(10.0), None));
        assert_eq!(x.spread(), 200.0);
        assert_eq!(y.error.as_deref(), Some("no"));
    }

    #[test]
    fn a_record_without_a_measurement_is_an_error() {
        for broken in [
            "{}",
            "{\"load\":\"a\",\"unit\":\"b\",\"tool\":\"c\",\"count\":0,\"with_ns\":1}",
            "{\"load\":\"a\",\"unit\":\"b\",\"tool\":\"c\",\"count\":1}",
            "not JSON",
        ] {
            assert!(parse(&[format!("bench: {broken}")]).is_err(), "{broken}");
        }
    }
}
