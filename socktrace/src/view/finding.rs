//! Findings, for people and as records.

use std::{
    io::{self, Write},
    time::SystemTime,
};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    event::ShortListener as Short,
    json::{ListenerRecord, SCHEMA, Time},
    printable,
    table::{BOLD, RED, RESET, YELLOW},
};
use crate::{
    diagnose::{Confidence, Finding, Remedy, Severity},
    event::ListenerName,
    model::{Listener, Queue, Times},
};

#[derive(Serialize)]
pub struct FindingRecord<'a> {
    r#type: &'static str,
    schema: u32,
    time: Time,
    rule: &'static str,
    listener: Option<Short<'a>>,
    severity: Severity,
    confidence: Confidence,
    summary: &'a str,
    evidence: Value,
    cause: &'a str,
    remedy: &'a Remedy,
}

/// Writes a finding as a record.
pub fn write(out: &mut impl Write, finding: &Finding, time: SystemTime) -> io::Result<()> {
    let name = finding.listener.as_deref().map(ListenerName::from);
    let record = FindingRecord {
        r#type: "finding",
        schema: SCHEMA,
        time: Time(time),
        rule: finding.rule,
        listener: name.as_ref().map(Short::from),
        severity: finding.severity,
        confidence: finding.confidence,
        summary: &finding.summary,
        evidence: evidence(finding),
        cause: &finding.cause,
        remedy: &finding.remedy,
    };
    super::json::write(out, &record)
}

/// The numbers, where the listener's record has them; what was measured besides stands at the top.
fn evidence(finding: &Finding) -> Value {
    let mut evidence = Map::new();
    if let Some(listener) = &finding.listener {
        let record = record(listener);
        for fact in finding.facts {
            let keys: Vec<&str> = fact.split('.').collect();
            insert(&mut evidence, &keys, at(&record, &keys));
        }
    }
    for (name, value) in &finding.measured {
        evidence.insert((*name).to_owned(), value.clone());
    }
    Value::Object(evidence)
}

fn record(listener: &Listener) -> Value {
    // Made of numbers and strings: that cannot fail.
    serde_json::to_value(ListenerRecord::from(listener)).unwrap_or_default()
}

fn at(record: &Value, keys: &[&str]) -> Value {
    keys.iter().fold(record, |value, key| &value[*key]).clone()
}

fn insert(to: &mut Map<String, Value>, keys: &[&str], value: Value) {
    let [first, rest @ ..] = keys else { return };
    if rest.is_empty() {
        to.insert((*first).to_owned(), value);
    } else if let Value::Object(inner) =
        to.entry(*first).or_insert_with(|| Value::Object(Map::new()))
    {
        insert(inner, rest, value);
    }
}

/// How findings are laid out.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub columns: usize,
    pub color: bool,
    /// With the numbers.
    pub wide: bool,
    /// Whether the listeners are of several network namespaces.
    pub netns: bool,
}

impl Page {
    fn paint(self, color: &str, text: &str) -> String {
        if self.color { format!("{color}{text}{RESET}") } else { text.to_owned() }
    }

    /// A paragraph behind a word in the margin.
    fn paragraph(self, out: &mut impl Write, margin: &str, text: &str) -> io::Result<()> {
        const INDENT: &str = "           ";
        let first = format!("  {margin:<9}");
        let options = textwrap::Options::new(self.columns)
            .initial_indent(&first)
            .subsequent_indent(INDENT)
            .break_words(false);
        for line in textwrap::wrap(&printable(text), options) {
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    /// A listener and whose it is.
    fn place(self, l: &Listener) -> String {
        let mut place = l.endpoint();
        if let Some(owner) = l.owners.first() {
            place.push_str(&format!("  {}/{}", owner.comm, owner.pid));
            if l.owners.len() > 1 {
                place.push_str(&format!(" +{}", l.owners.len() - 1));
            }
        }
        if self.netns {
            let number = || l.netns.to_string();
            place.push_str(&format!(
                "  netns {}",
                l.belongs.netns_name.clone().unwrap_or_else(number)
            ));
        }
        place
    }

    /// Writes a finding for people.
    pub fn finding(self, out: &mut impl Write, number: usize, finding: &Finding) -> io::Result<()> {
        let (color, severity) = match finding.severity {
            Severity::Critical => (RED, "CRITICAL"),
            Severity::Warning => (YELLOW, "WARNING"),
            Severity::Info => (BOLD, "INFO"),
        };
        let place = |l: &Listener| self.place(l);
        let place = finding.listener.as_deref().map_or_else(|| "this machine".to_owned(), place);
        writeln!(
            out,
            "{} {}  {} ({})",
            self.paint(color, &format!("{number}. {severity}")),
            self.paint(BOLD, &printable(&place)),
            finding.rule,
            match finding.confidence {
                Confidence::Certain => "certain",
                Confidence::Likely => "likely",
                Confidence::Possible => "possible",
            }
        )?;
        self.paragraph(out, "what", &capital(&finding.summary))?;
        self.paragraph(out, "why", &finding.cause)?;
        self.paragraph(out, "remedy", &finding.remedy.text)?;
        for command in &finding.remedy.commands {
            // Not wrapped: it is there to be copied.
            writeln!(out, "             {}", self.paint(BOLD, &printable(command)))?;
        }
        if self.wide {
            self.paragraph(out, "numbers", &numbers(&evidence(finding)))?;
        }
        writeln!(out)
    }

    /// Writes that all is well with these listeners, and the numbers that show it; the fullest first.
    pub fn well(self, out: &mut impl Write, listeners: &[&Listener]) -> io::Result<()> {
        const MOST: usize = 10;
        let active =
            |l: &&&Listener| l.totals.established.is_none_or(|n| n > 0) || l.accept.peak > Some(0);
        let busy: Vec<&&Listener> = listeners.iter().filter(active).collect();
        for l in busy.iter().take(MOST) {
            let mut text = format!("accept queue at most {}", of_limit(&l.accept));
            if l.syn.limit.is_some() {
                text.push_str(&format!(", SYN queue {}", of_limit(&l.syn)));
            }
            if let Some(n) = l.totals.established {
                let plural = if n == 1 { "" } else { "s" };
                text.push_str(&format!("; {n} connection{plural}"));
            }
            if let Some(Times { p99_ns, max_ns, count: 1.., .. }) = l.accept_wait {
                let wait = |ns| super::column::duration(Some(ns));
                text.push_str(&format!(
                    ", waited {} at p99 and {} at most for accept()",
                    wait(p99_ns),
                    wait(max_ns)
                ));
            }
            let line = format!("{}: {text}", self.place(l));
            let options = textwrap::Options::new(self.columns)
                .initial_indent("  ")
                .subsequent_indent("      ")
                .break_words(false);
            for line in textwrap::wrap(&printable(&line), options) {
                writeln!(out, "{line}")?;
            }
        }
        let rest = listeners.len() - busy.len().min(MOST);
        if rest > 0 {
            let what =
                if busy.len() > MOST { "with emptier queues" } else { "without a connection" };
            match (busy.is_empty(), rest) {
                (true, 1) => writeln!(out, "  1 listener without a connection")?,
                (true, _) => writeln!(out, "  {rest} listeners without a connection")?,
                (false, _) => writeln!(out, "  {rest} more, {what}")?,
            }
        }
        Ok(())
    }
}

fn of_limit(queue: &Queue) -> String {
    let number =
        |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    format!("{} of {}", number(queue.peak.max(queue.depth)), number(queue.capacity.or(queue.limit)))
}

/// A sentence; names of processes stay as they are.
fn capital(text: &str) -> String {
    if text.split(' ').next().is_some_and(|word| word.contains('/')) {
        return format!("{text}.");
    }
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
        + "."
}

/// Every number with its place in the record; without nulls.
fn numbers(evidence: &Value) -> String {
    let mut all = Vec::new();
    leaves(evidence, "", &mut all);
    all.join(", ")
}

fn leaves(value: &Value, path: &str, all: &mut Vec<String>) {
    match value {
        Value::Null => {}
        Value::Object(object) => {
            for (key, value) in object {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                leaves(value, &path, all);
            }
        }
        Value::Array(array) if array.is_empty() => {}
        Value::String(text) => all.push(format!("{path} {text}")),
        value => all.push(format!("{path} {value}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::view::sample;

    fn finding() -> Finding {
        let mut listener = sample();
        listener.owners[0].comm = "ng\x1b[2Jinx".into();
        let mut finding = Finding::new("accept_burst", Severity::Critical, Confidence::Certain)
            .says("129 packets of clients were lost in 1 burst", "More came at once than fits.")
            .advises(Remedy {
                text: "Set `listen … backlog=256`.".into(),
                commands: vec!["sysctl -w net.core.somaxconn=256".into()],
                backlog: Some(256),
            })
            .facts(&["accept_queue.peak", "totals.drops.accept_queue_full_on_syn", "totals.syns"])
            .measured("bursts", 1);
        finding.listener = Some(Arc::new(listener));
        finding
    }

    #[test]
    fn evidence_has_the_numbers_under_the_records_names() {
        let mut out = Vec::new();
        write(&mut out, &finding(), SystemTime::UNIX_EPOCH).unwrap();
        let record: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            record["evidence"],
            json!({
                "accept_queue": {"peak": 129},
                "totals": {"drops": {"accept_queue_full_on_syn": 129}, "syns": 500},
                "bursts": 1
            })
        );
        assert_eq!(record["listener"]["id"], "4026531840:5121");
        assert_eq!(record["remedy"]["commands"][0], "sysctl -w net.core.somaxconn=256");
        assert_eq!((&record["type"], &record["severity"]), (&json!("finding"), &json!("critical")));
    }

    #[test]
    fn a_finding_reads_well_and_obeys_no_hostile_name() {
        let mut out = Vec::new();
        let page = Page { columns: 60, color: false, wide: true, netns: false };
        page.finding(&mut out, 1, &finding()).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "\
1. CRITICAL 0.0.0.0:8080  ng\\u{1b}[2Jinx/812 +1  accept_burst (certain)
  what     129 packets of clients were lost in 1 burst.
  why      More came at once than fits.
  remedy   Set `listen … backlog=256`.
             sysctl -w net.core.somaxconn=256
  numbers  accept_queue.peak 129, bursts 1,
           totals.drops.accept_queue_full_on_syn 129,
           totals.syns 500

"
        );
    }

    #[test]
    fn every_fact_of_every_rule_is_in_the_record() {
        let record = record(&sample());
        let missing = Map::new();
        for fact in
            crate::diagnose::RULES.iter().flat_map(|topic| *topic).flat_map(|rule| rule.facts)
        {
            let keys: Vec<&str> = fact.split('.').collect();
            let (last, before) = keys.split_last().unwrap();
            let parent = at(&record, before);
            // Times may be unknown as a whole.
            let parent = parent.as_object().unwrap_or(&missing);
            assert!(parent.is_empty() || parent.contains_key(*last), "{fact}");
        }
    }

    #[test]
    fn all_is_well_with_numbers() {
        let mut out = Vec::new();
        let idle = {
            let mut l = sample();
            (l.totals.established, l.accept.peak) = (Some(0), Some(0));
            l
        };
        let page = Page { columns: 80, color: false, wide: false, netns: false };
        page.well(&mut out, &[&sample(), &idle]).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "  0.0.0.0:8080  nginx/812 +1: accept queue at most 129 of 129, SYN queue 9 of\n      \
             129; 371 connections, waited 2.2ms at p99 and 5.1ms at most for accept()\n  \
             1 more, without a connection\n"
        );
    }
}
