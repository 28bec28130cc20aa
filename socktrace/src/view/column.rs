//! The columns, each defined once: the tables, their order and `--sort` come from here.

use std::cmp::Ordering;

use super::printable;
use crate::model::{Listener, Owner, SynRule, Transport};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Which tables show a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    Always,
    /// In the normal table only when its rows differ.
    WhenDifferent,
    Wide,
}

pub struct Column {
    /// What `--sort` calls it.
    pub key: &'static str,
    pub title: &'static str,
    pub help: &'static str,
    pub align: Align,
    /// Spaces between this column and the one before.
    pub gap: usize,
    pub shown: Shown,
    pub value: fn(&Listener) -> String,
    pub order: fn(&Listener, &Listener) -> Ordering,
}

/// How an unknown value is written.
const UNKNOWN: &str = "-";

fn number<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| value.to_string())
}

macro_rules! numeric {
    ($key:literal, $title:literal, $gap:literal, $shown:ident, $value:expr, $help:literal) => {
        Column {
            key: $key,
            title: $title,
            help: $help,
            align: Align::Right,
            gap: $gap,
            shown: Shown::$shown,
            value: |l| number(($value)(l)),
            // The highest first: that is where trouble is.
            order: |a, b| ($value)(b).cmp(&($value)(a)),
        }
    };
}

macro_rules! text {
    ($key:literal, $title:literal, $shown:ident, $value:expr, $help:literal) => {
        Column {
            key: $key,
            title: $title,
            help: $help,
            align: Align::Left,
            gap: 2,
            shown: Shown::$shown,
            value: $value,
            order: |a, b| ($value)(a).cmp(&($value)(b)),
        }
    };
}

pub static COLUMNS: &[Column] = &[
    Column {
        key: "listener",
        title: "LISTENER",
        help: "Local address and port of the listening socket.",
        align: Align::Left,
        gap: 0,
        shown: Shown::Always,
        value: Listener::endpoint,
        order: |a, b| (a.port, a.address).cmp(&(b.port, b.address)),
    },
    text!(
        "netns",
        "NETNS",
        WhenDifferent,
        |l: &Listener| l.netns.to_string(),
        "Network namespace, by the number that `lsns -t net` shows."
    ),
    numeric!(
        "accept",
        "ACCEPT",
        2,
        Always,
        |l: &Listener| l.accept.depth,
        "Accept queue: finished handshakes that the program has not accepted yet."
    ),
    numeric!(
        "accept_peak",
        "PEAK",
        1,
        Always,
        |l: &Listener| l.accept.peak,
        "Highest depth of the accept queue in the interval, of every change, not of samples."
    ),
    numeric!(
        "accept_limit",
        "LIM",
        1,
        Always,
        |l: &Listener| l.accept.limit,
        "What the kernel compares the accept queue with: it is full at one more than this."
    ),
    numeric!(
        "syn",
        "SYN",
        2,
        Always,
        |l: &Listener| l.syn.depth,
        "SYN queue: half-open connections, SYN-ACK sent, the client's ACK awaited."
    ),
    numeric!(
        "syn_peak",
        "PEAK",
        1,
        Always,
        |l: &Listener| l.syn.peak,
        "Highest depth of the SYN queue in the interval."
    ),
    numeric!(
        "syn_limit",
        "LIM",
        1,
        Always,
        |l: &Listener| l.syn.limit,
        "What the kernel compares the SYN queue with."
    ),
    text!(
        "rule",
        "RULE",
        Wide,
        |l: &Listener| match l.syn_rule {
            Some(SynRule::Backlog) => "backlog".to_owned(),
            Some(SynRule::MaxSynBacklog) => "max_syn_backlog".to_owned(),
            Some(SynRule::Syncookies) => "syncookies".to_owned(),
            None => UNKNOWN.to_owned(),
        },
        "The rule that sets the SYN queue's limit: the listener's backlog, three quarters of \
         tcp_max_syn_backlog (cookies off), or cookies for every SYN (tcp_syncookies=2)."
    ),
    numeric!(
        "young",
        "YOUNG",
        2,
        Wide,
        |l: &Listener| l.syn_young,
        "Half-open connections whose SYN-ACK was never repeated."
    ),
    numeric!(
        "requested",
        "ASKED",
        2,
        Wide,
        |l: &Listener| l.requested,
        "Backlog that the program passed to listen(); unknown for one that listened before the trace."
    ),
    numeric!(
        "somaxconn",
        "SOMAXCONN",
        2,
        Wide,
        |l: &Listener| l.somaxconn,
        "net.core.somaxconn of the listener's network namespace, which cuts the backlog down."
    ),
    text!(
        "transport",
        "TYPE",
        Wide,
        |l: &Listener| match l.transport {
            Some(Transport::Tcp) => "tcp".to_owned(),
            Some(Transport::Mptcp) => "mptcp".to_owned(),
            None => UNKNOWN.to_owned(),
        },
        "tcp or mptcp."
    ),
    text!(
        "reuseport",
        "GROUP",
        Wide,
        |l: &Listener| match l.reuseport {
            Some(true) => "reuseport".to_owned(),
            Some(false) => "single".to_owned(),
            None => UNKNOWN.to_owned(),
        },
        "Whether the socket shares its address with others through SO_REUSEPORT."
    ),
    numeric!(
        "inode",
        "INODE",
        2,
        Wide,
        |l: &Listener| l.inode,
        "Inode of the socket, as in /proc/PID/fd."
    ),
    text!(
        "id",
        "ID",
        Wide,
        |l: &Listener| l.id.to_string(),
        "Network namespace and socket cookie: the identity of the socket."
    ),
    text!(
        "cgroup",
        "CGROUP",
        Wide,
        |l: &Listener| printable(l.cgroup.as_deref().unwrap_or(UNKNOWN)).into_owned(),
        "Control group of the first process that holds the socket."
    ),
    text!(
        "owner",
        "OWNER",
        Always,
        |l: &Listener| owner(l),
        "Process that holds the socket, and how many others do."
    ),
];

fn owner(listener: &Listener) -> String {
    let mut pids: Vec<&Owner> = listener.owners.iter().collect();
    pids.dedup_by_key(|owner| owner.pid);
    let mut text = match pids.as_slice() {
        [] => UNKNOWN.to_owned(),
        [one] => format!("{}/{}", printable(&one.comm), one.pid),
        [first, rest @ ..] => {
            format!("{}/{} +{}", printable(&first.comm), first.pid, rest.len())
        }
    };
    if listener.closed {
        text.push_str(" (closed)");
    }
    text
}

/// Sorts the fullest queue first, then by address.
pub fn by_trouble(a: &Listener, b: &Listener) -> Ordering {
    let fill = |l: &Listener| l.accept.fill().max(l.syn.fill());
    fill(b).cmp(&fill(a)).then_with(|| by_address(a, b))
}

pub fn by_address(a: &Listener, b: &Listener) -> Ordering {
    (a.port, a.address, a.netns, a.id).cmp(&(b.port, b.address, b.netns, b.id))
}
