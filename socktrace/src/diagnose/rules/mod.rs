//! What is looked for. A rule is a file: its thresholds, its words, its tests.
//!
//! Rules of one topic are alternatives, the first that applies speaks: a queue that overflows because nobody
//! accepts needs no larger backlog.

mod accept_burst;
mod acceptor_slow;
mod acceptor_stalled;
mod backlog;
mod backlog_clamped;
mod bind_failed;
mod connect_unanswered;
mod final_ack_dropped;
mod framework_backlog;
mod losses_uncounted;
mod lost_on_close;
mod port_not_listening;
mod reuseport_member;
mod slow_clients;
mod syn_flood;
mod syn_queue_full;
mod synacks_lost;
mod syncookies;
mod unix_backlog;

pub use acceptor_stalled::STALLED;
pub(crate) use losses_uncounted::is_uncounted;

use std::time::Duration;

use super::{Case, Diagnosis, Finding};
use crate::filter::Filter;

#[derive(Clone, Copy)]
pub struct Rule {
    pub id: &'static str,
    /// What it finds, for `diagnose --help` and the docs.
    pub about: &'static str,
    /// Numbers of the listener's record that show it, by their place there.
    pub facts: &'static [&'static str],
    look: Look,
}

#[derive(Clone, Copy)]
enum Look {
    /// At one listener.
    Listener(fn(&Case, &Diagnosis) -> Option<Finding>),
    /// At what no listener has.
    Host(fn(&Diagnosis, &Filter) -> Vec<Finding>),
}

/// By topic.
pub static RULES: &[&[Rule]] = &[
    &[
        reuseport_member::RULE,
        unix_backlog::RULE,
        acceptor_stalled::RULE,
        acceptor_slow::RULE,
        backlog_clamped::RULE,
        framework_backlog::RULE,
        accept_burst::RULE,
    ],
    &[final_ack_dropped::RULE],
    &[synacks_lost::RULE, syn_flood::RULE, slow_clients::RULE, syn_queue_full::RULE],
    &[syncookies::RULE],
    &[lost_on_close::RULE],
    &[connect_unanswered::RULE],
    &[port_not_listening::RULE],
    &[bind_failed::RULE],
    &[losses_uncounted::RULE],
];

pub(super) fn all(diagnosis: &Diagnosis, filter: &Filter) -> Vec<Finding> {
    let mut found = Vec::new();
    for topic in RULES {
        for case in diagnosis.cases() {
            let first = topic.iter().find_map(|rule| match rule.look {
                Look::Listener(look) => Some(look(case, diagnosis)?.facts(rule.facts).of(case)),
                Look::Host(_) => None,
            });
            found.extend(first);
        }
        for rule in *topic {
            if let Look::Host(look) = rule.look {
                let host = look(diagnosis, filter).into_iter().map(|one| one.facts(rule.facts));
                found.extend(host);
            }
        }
    }
    found
}

/// A length of time, for people.
fn time(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.0} ms", seconds * 1000.0),
        seconds if seconds < 100.0 => format!("{seconds:.1} s"),
        seconds => format!("{seconds:.0} s"),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// So many of something.
fn count(count: u64, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {many}") }
}

/// What a full accept queue cost.
fn lost(case: &Case) -> String {
    let packets = case.lost_at_accept_queue();
    match (packets, case.clients_turned_away()) {
        (1, _) => "1 packet of a client was lost".to_owned(),
        (_, 0) => format!("{packets} packets of clients were lost"),
        (_, 1) => format!("{packets} packets of one client were lost"),
        (_, clients) => format!("{packets} packets of {clients} clients were lost"),
    }
}

/// A rate, to a tenth where that says something.
fn rate(rate: f64) -> String {
    if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

/// A rate for a record.
fn tenths(rate: f64) -> f64 {
    (rate * 10.0).round() / 10.0
}
