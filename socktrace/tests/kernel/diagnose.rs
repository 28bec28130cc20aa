//! `socktrace diagnose` over situations built with real servers: what it finds, that it finds nothing else, and
//! that its advice, followed to the letter, makes the finding go away.
//!
//! `cargo xtask lab NAME` runs one of them and shows what socktrace says. Truth: what was built, the namespace's
//! own counters, and whether the remedy works.

mod scenarios;
mod stage;

use std::{
    collections::BTreeSet,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{lab::counters, run};
use stage::Stage;

/// A situation.
struct Scenario {
    /// What is built, for people.
    about: &'static str,
    /// Rules that must speak up.
    expect: &'static [&'static str],
    /// Where no hook tells what is needed, `otherwise` is found.
    needs: Needs,
    otherwise: &'static [&'static str],
    /// What is watched besides the namespace.
    arguments: &'static [&'static str],
    seconds: u64,
    /// Until the end.
    clients_stay: bool,
    /// Settings of the namespace, before anything runs.
    prepare: fn(&mut Stage),
    /// Starts the servers, with the backlog that was advised once there is one.
    serve: fn(&mut Stage),
    /// What clients do while it is watched.
    load: fn(&mut Stage),
    /// What a person does who reads the advice, where it is no command and no number.
    mend: fn(&mut Stage, &Value),
    /// What must be said besides.
    check: fn(&Value),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// System calls.
    Calls,
    /// Hooks of AF_UNIX.
    Unix,
}

const USUAL: Scenario = Scenario {
    about: "",
    expect: &[],
    needs: Needs::Nothing,
    otherwise: &[],
    arguments: &[],
    seconds: 3,
    clients_stay: false,
    prepare: |_| {},
    serve: |_| {},
    load: |_| {},
    mend: |_, _| {},
    check: |_| {},
};

/// What `diagnose` said.
struct Said {
    code: Option<i32>,
    records: Vec<Value>,
    stderr: String,
    backend: String,
}

impl Said {
    fn findings(&self) -> Vec<&Value> {
        self.records.iter().filter(|record| record["type"] == "finding").collect()
    }

    fn rules(&self) -> BTreeSet<&str> {
        self.findings().iter().map(|finding| finding["rule"].as_str().expect("a rule")).collect()
    }

    /// Whether what a scenario needs to be seen can be.
    fn can_see(&self, needs: Needs) -> bool {
        match needs {
            Needs::Nothing => true,
            Needs::Calls => run::sees_calls(&self.backend),
            Needs::Unix => self.backend != "tracepoint",
        }
    }

    /// The numbers of findings are those of the records, and these are the kernel's.
    fn is_true(&self, kernel: impl Fn(&str) -> u64, name: &str) {
        let listeners: Vec<&Value> =
            self.records.iter().filter(|record| record["type"] == "listener").collect();
        for finding in self.findings() {
            let Some(id) = finding["listener"]["id"].as_str() else { continue };
            let record = listeners.iter().find(|r| r["listener"]["id"] == id).expect("its record");
            let evidence = finding["evidence"].as_object().expect("an object");
            for (key, value) in evidence.iter().filter(|(key, _)| record.get(*key).is_some()) {
                assert!(is_part_of(value, &record[key]), "{name}: {key}: {value} of {record:#}");
            }
            for part in ["summary", "cause"] {
                assert!(finding[part].as_str().is_some_and(|text| text.len() > 20), "{finding:#}");
            }
            assert!(finding["remedy"]["text"].as_str().is_some_and(|text| !text.is_empty()));
        }
        let sum = |paths: &[&str]| -> Option<u64> {
            let of = |record: &&Value| {
                paths
                    .iter()
                    .map(|path| record["totals"]["drops"][path].as_u64())
                    .sum::<Option<u64>>()
            };
            // AF_UNIX has no such counts.
            listeners.iter().filter(|r| r["listener"]["family"] != "unix").map(of).sum()
        };
        let overflows = ["accept_queue_full_on_syn", "accept_queue_full_on_ack"];
        let drops = [&overflows[..], &["syn_queue_full", "syn_backlog_reserve", "other"]].concat();
        for (counter, paths) in [("ListenOverflows", &overflows[..]), ("ListenDrops", &drops)] {
            if let Some(sum) = sum(paths) {
                assert_eq!(sum, kernel(counter), "{name}: {counter}: {listeners:#?}");
            }
        }
    }
}

/// Whether everything in `part` is in `whole`.
fn is_part_of(part: &Value, whole: &Value) -> bool {
    match part {
        Value::Object(object) => object.iter().all(|(key, value)| is_part_of(value, &whole[key])),
        value => value == whole,
    }
}

/// Whether someone watches (`cargo xtask lab`).
fn is_shown() -> bool {
    std::env::var_os("SOCKTRACE_LAB").is_some()
}

/// Past the test harness, which keeps what is printed to itself.
fn show(text: &str) {
    if is_shown() {
        writeln!(std::io::stderr(), "{text}").expect("stderr");
    }
}

/// Watches while `load` runs.
fn diagnose(stage: &mut Stage, scenario: &Scenario) -> Said {
    let seconds = format!("{}s", scenario.seconds);
    let mut arguments = vec!["diagnose", "-d", &seconds, "-N", &stage.netns.name];
    let netns = stage.netns.name.clone();
    arguments[4] = &netns;
    arguments.extend(scenario.arguments);
    let mut shown = is_shown().then(|| {
        show(&format!("$ socktrace {}", arguments.join(" ")));
        run::start_with(&arguments, Stdio::inherit())
    });
    arguments.push("--json");
    let (mut child, mut said) = run::start(&arguments);
    let stdout = child.stdout.take().expect("stdout");
    let output = std::thread::spawn(move || run::read_all(stdout));
    let began = Instant::now();
    (scenario.load)(stage);
    if !scenario.clients_stay {
        // Their SYNs would still come when the counters are read.
        let last = Duration::from_millis(scenario.seconds * 1000 - 300);
        std::thread::sleep(last.saturating_sub(began.elapsed()));
        stage.end_clients();
    }
    let status = run::wait(&mut child);
    if let Some((child, _)) = &mut shown {
        run::wait(child);
    }
    let text = output.join().expect("output");
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut said, &mut stderr).expect("UTF-8");
    let records: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let summary = records.last().expect("records");
    assert_eq!(summary["type"], "summary", "{stderr}");
    let backend = summary["backend"].as_str().expect("a backend").to_owned();
    Said { code: status.code(), records, stderr, backend }
}

/// Builds a situation, has it diagnosed, does what the diagnosis says, and has it diagnosed again.
fn check(name: &str, scenario: &Scenario) {
    show(&format!("\n== {name}: {}\n", scenario.about));
    let mut stage = Stage::new(name);
    (scenario.prepare)(&mut stage);
    (scenario.serve)(&mut stage);
    let before = stage.netns.within(counters);
    let said = diagnose(&mut stage, scenario);
    let after = stage.netns.within(counters);
    stage.end_clients();
    let seen = said.can_see(scenario.needs);
    let expect = if seen { scenario.expect } else { scenario.otherwise };
    let expect: BTreeSet<&str> = expect.iter().copied().collect();
    let rules = said.rules();
    assert_eq!(rules, expect, "{name}, {}: {:#?}\n{}", said.backend, said.records, said.stderr);
    assert_eq!(said.code, Some(if rules.is_empty() { 0 } else { 10 }), "{name}");
    said.is_true(|counter| after[counter] - before[counter], name);
    let findings: Value = said.findings().into_iter().cloned().collect();
    if !seen || scenario.expect.is_empty() {
        return;
    }
    (scenario.check)(&findings);
    follow(&mut stage, scenario, &findings);
    let again = diagnose(&mut stage, scenario);
    assert_eq!(
        again.rules(),
        BTreeSet::new(),
        "{name}, mended: {:#?}\n{}",
        again.records,
        again.stderr
    );
    assert_eq!(again.code, Some(0), "{name}, mended");
}

/// Does what the findings advise, to the letter.
fn follow(stage: &mut Stage, scenario: &Scenario, findings: &Value) {
    for finding in findings.as_array().expect("findings") {
        for line in finding["remedy"]["commands"].as_array().expect("commands") {
            let line = line.as_str().expect("a command");
            show(&format!("# {line}"));
            let output = Command::new("sh").args(["-c", line]).output().expect("a shell");
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        if let Some(backlog) = finding["remedy"]["backlog"].as_u64() {
            stage.backlog = Some(u32::try_from(backlog).expect("a backlog"));
        }
    }
    (scenario.mend)(stage, findings);
    if stage.backlog.is_some() || stage.restart {
        show("# (servers are started anew, as advised)");
        stage.servers.clear();
        (scenario.serve)(stage);
    }
    show("");
    stage.ports += 1000;
    // What was on its way when the first watch ended is not the second one's.
    std::thread::sleep(Duration::from_millis(300));
}

/// The finding of a rule.
fn of<'a>(findings: &'a Value, rule: &str) -> &'a Value {
    let mut all = findings.as_array().expect("findings").iter();
    all.find(|finding| finding["rule"] == rule).unwrap_or_else(|| panic!("no {rule}: {findings:#}"))
}

#[test]
fn a_port_without_a_listener_is_a_finding_even_alone() {
    let output = run::output(&["diagnose", "-d", "300ms", "-P", "1", "--json"]);
    assert_eq!(output.status.code(), Some(10), "{}", run::stderr(&output));
    let records = run::records(&output);
    assert_eq!(records[0]["rule"], "port_not_listening");
    assert_eq!(records[0]["listener"], json!(null));
    assert_eq!(records.last().expect("a summary")["findings"], 1);
}
