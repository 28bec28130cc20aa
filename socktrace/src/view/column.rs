//! The columns, each defined once: the tables, their order and `--sort` come from here.

use std::cmp::Ordering;

use super::printable;
use crate::model::{Container, Listener, Owner, Process, SocketKind, SynRule, Transport};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Which tables show a column.
#[derive(Clone, Copy, Debug)]
pub enum Shown {
    Always,
    /// In the normal table only when its rows differ.
    WhenDifferent,
    /// In the normal table only when this holds for one of its rows.
    WhenAny(fn(&Listener) -> bool),
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

pub(super) fn number<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), |value| value.to_string())
}

/// Nanoseconds in three digits or so.
pub(super) fn duration(ns: Option<u64>) -> String {
    let Some(ns) = ns else { return UNKNOWN.to_owned() };
    let (unit, one) = match ns {
        0..1_000_000 => ("us", 1_000),
        1_000_000..1_000_000_000 => ("ms", 1_000_000),
        _ => ("s", 1_000_000_000),
    };
    let (whole, tenths) = (ns / one, ns % one * 10 / one);
    if whole < 10 { format!("{whole}.{tenths}{unit}") } else { format!("{whole}{unit}") }
}

macro_rules! numeric {
    ($key:literal, $title:literal, $gap:literal, $shown:ident $(($when:expr))?, $value:expr, $help:literal) => {
        numeric!(as number, $key, $title, $gap, $shown $(($when))?, $value, $help)
    };
    (as $text:ident, $key:literal, $title:literal, $gap:literal, $shown:ident $(($when:expr))?, $value:expr, $help:literal) => {
        Column {
            key: $key,
            title: $title,
            help: $help,
            align: Align::Right,
            gap: $gap,
            shown: Shown::$shown $(($when))?,
            value: |l| $text(($value)(l)),
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
        help: "Local address and port of the listening socket, or the path of an AF_UNIX one.",
        align: Align::Left,
        gap: 0,
        shown: Shown::Always,
        value: |l| printable(&l.endpoint()).into_owned(),
        order: by_address,
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
        "ACCQ",
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
        "SYNQ",
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
        WhenAny(|l| l.syn.limit != l.accept.limit),
        |l: &Listener| l.syn.limit,
        "What the kernel compares the SYN queue with; left out while that is the backlog, as for the \
         accept queue."
    ),
    numeric!(
        "drops",
        "DROPS",
        2,
        Always,
        |l: &Listener| l.totals.drops.total(),
        "SYNs and final ACKs that the listener threw away since it or the trace began: ListenDrops."
    ),
    numeric!(
        "full_on_syn",
        "SYN-ACCQ",
        2,
        Wide,
        |l: &Listener| l.totals.drops.accept_queue_full_on_syn,
        "Of these, SYNs that found the accept queue full."
    ),
    numeric!(
        "full_on_ack",
        "ACK-ACCQ",
        2,
        Wide,
        |l: &Listener| l.totals.drops.accept_queue_full_on_ack,
        "Of these, final ACKs that found the accept queue full: the client believes it is connected."
    ),
    numeric!(
        "syn_full",
        "SYN-SYNQ",
        2,
        Wide,
        |l: &Listener| l.totals.drops.syn_queue_full,
        "Of these, SYNs that found the SYN queue full, with cookies off."
    ),
    numeric!(
        "reserve",
        "RESERVE",
        2,
        Wide,
        |l: &Listener| l.totals.drops.syn_backlog_reserve,
        "Of these, SYNs that found only the last quarter of tcp_max_syn_backlog left, with cookies off."
    ),
    numeric!(
        "other",
        "OTHER",
        2,
        Wide,
        |l: &Listener| l.totals.drops.other,
        "Of these, the rest: no memory, no route, a security module, an ICMP error."
    ),
    numeric!("syns", "SYNS", 2, Wide, |l: &Listener| l.totals.syns, "SYNs, repeated ones too."),
    numeric!(
        "established",
        "ESTAB",
        2,
        Wide,
        |l: &Listener| l.totals.established,
        "Connections that were put into the accept queue."
    ),
    numeric!(
        "accepted",
        "ACCEPTED",
        2,
        Wide,
        |l: &Listener| l.totals.accepted,
        "Connections that the program accepted."
    ),
    numeric!(
        "cookies",
        "COOKIES",
        2,
        Wide,
        |l: &Listener| l.totals.cookies_sent,
        "SYN cookies sent: SYNs that found the SYN queue full, with cookies on."
    ),
    numeric!(
        "retransmits",
        "RETRANS",
        2,
        Wide,
        |l: &Listener| l.totals.synack_retransmits,
        "SYN-ACKs sent again."
    ),
    numeric!(
        "expired",
        "EXPIRED",
        2,
        Wide,
        |l: &Listener| l.totals.requests_expired,
        "Half-open connections given up because no ACK came."
    ),
    numeric!(
        "resets",
        "RESETS",
        2,
        Wide,
        |l: &Listener| l.totals.resets_on_overflow,
        "Clients reset because of net.ipv4.tcp_abort_on_overflow."
    ),
    numeric!(
        "lost",
        "LOST",
        2,
        Wide,
        |l: &Listener| l.totals.lost_on_close,
        "Connections and half-open connections that ended because the listener closed."
    ),
    numeric!(
        as duration,
        "wait",
        "WAIT99",
        2,
        Wide,
        |l: &Listener| l.accept_wait.map(|times| times.p99_ns),
        "How long 99 of 100 connections waited at most from the end of the handshake to accept()."
    ),
    numeric!(
        as duration,
        "handshake",
        "SHAKE99",
        2,
        Wide,
        |l: &Listener| l.handshake.map(|times| times.p99_ns),
        "How long 99 of 100 handshakes took at most, from the SYN-ACK to the client's ACK."
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
        |l: &Listener| match (l.transport, l.socket_type) {
            (Some(Transport::Tcp), _) => "tcp".to_owned(),
            (Some(Transport::Mptcp), _) => "mptcp".to_owned(),
            (Some(Transport::Unix), SocketKind::SeqPacket) => "unix-seqpacket".to_owned(),
            (Some(Transport::Unix), _) => "unix".to_owned(),
            (None, _) => UNKNOWN.to_owned(),
        },
        "tcp, mptcp, unix or unix-seqpacket."
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
        |l: &Listener| outside(l.cgroup.as_deref()),
        "Control group of the first process that holds the socket."
    ),
    text!(
        "unit",
        "UNIT",
        Wide,
        |l: &Listener| outside(l.belongs.unit.as_deref()),
        "systemd unit of that process."
    ),
    text!(
        "container",
        "CONTAINER",
        Wide,
        |l: &Listener| l.belongs.container.as_deref().map_or_else(|| UNKNOWN.to_owned(), container),
        "Container of that process: pod and name, or name, or the first 12 digits of its id."
    ),
    text!(
        "user",
        "USER",
        Wide,
        |l: &Listener| outside(l.belongs.user.as_deref()),
        "User of the socket, as /etc/passwd names it."
    ),
    text!(
        "exe",
        "EXE",
        Wide,
        |l: &Listener| outside(l.belongs.exe.as_deref()),
        "Executable of that process."
    ),
    text!(
        "opener",
        "OPENER",
        Wide,
        |l: &Listener| l.opener.as_ref().map_or_else(|| UNKNOWN.to_owned(), process),
        "Process that called listen(); unknown for a listener older than the trace."
    ),
    text!(
        "acceptors",
        "ACCEPTS",
        Wide,
        |l: &Listener| match l.acceptors.as_slice() {
            [] => UNKNOWN.to_owned(),
            [one] => process(one),
            [first, rest @ ..] => format!("{} +{}", process(first), rest.len()),
        },
        "Process that calls accept(), and how many others do."
    ),
    text!(
        "owner",
        "OWNER",
        Always,
        |l: &Listener| owner(l),
        "Process that holds the socket, and how many others do."
    ),
];

/// Text from outside.
fn outside(text: Option<&str>) -> String {
    printable(text.unwrap_or(UNKNOWN)).into_owned()
}

fn container(container: &Container) -> String {
    const SHORT: usize = 12;
    let short = container.id.get(..SHORT).unwrap_or(&container.id);
    let name = container.name.as_deref().unwrap_or(short);
    match &container.pod {
        Some(pod) => printable(&format!("{pod}/{name}")).into_owned(),
        None => printable(name).into_owned(),
    }
}

fn process(process: &Process) -> String {
    match &process.comm {
        Some(comm) => format!("{}/{}", printable(comm), process.pid),
        None => process.pid.to_string(),
    }
}

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

/// Sorts what loses connections now first, then the fullest queue, then by address.
pub fn by_trouble(a: &Listener, b: &Listener) -> Ordering {
    let trouble = |l: &Listener| (l.dropped, l.accept.fill().max(l.syn.fill()));
    trouble(b).cmp(&trouble(a)).then_with(|| by_address(a, b))
}

pub fn by_address(a: &Listener, b: &Listener) -> Ordering {
    // AF_UNIX behind all ports.
    fn key(l: &Listener) -> impl Ord {
        (l.address.is_none(), l.port, l.address, l.path.clone(), l.netns, l.id)
    }
    key(a).cmp(&key(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let texts = [0, 999, 41_200, 999_999, 1_000_000, 5_123_000, 41_000_000, 1_500_000_000]
            .map(|ns| duration(Some(ns)));
        assert_eq!(texts, ["0.0us", "0.9us", "41us", "999us", "1.0ms", "5.1ms", "41ms", "1.5s"]);
        assert_eq!(duration(None), "-");
    }

    #[test]
    fn a_container_has_the_name_that_says_most() {
        let check = |name: Option<&str>, pod: Option<&str>, expect: &str| {
            let (name, pod) = (name.map(str::to_owned), pod.map(str::to_owned));
            let sample = crate::view::sample_container();
            assert_eq!(container(&Container { name, pod, ..sample }), expect);
        };
        check(Some("nginx"), Some("web-0"), "web-0/nginx");
        check(Some("nginx"), None, "nginx");
        check(None, Some("web-0"), "web-0/4f797c539e6c");
        check(None, None, "4f797c539e6c");
        check(Some("a\u{202e}"), Some("\x1b[m"), "\\u{1b}[m/a\\u{202e}");
    }

    #[test]
    fn nothing_from_outside_reaches_a_terminal_as_it_is() {
        let mut l = crate::view::sample();
        let hostile = || Some("\x1b]0;\n".to_owned());
        l.cgroup = hostile();
        (l.belongs.unit, l.belongs.exe, l.belongs.user) = (hostile(), hostile(), hostile());
        for column in COLUMNS {
            assert!(!(column.value)(&l).contains(char::is_control), "{}", column.key);
        }
    }

    #[test]
    fn what_loses_connections_now_comes_first() {
        let with = |port, dropped, depth| {
            let mut l = crate::view::sample();
            (l.port, l.dropped, l.accept.peak, l.accept.depth) =
                (Some(port), dropped, None, Some(depth));
            l
        };
        let mut all =
            [with(1, Some(0), 128), with(2, Some(7), 0), with(3, None, 3), with(4, Some(0), 3)];
        all.sort_by(by_trouble);
        assert_eq!(all.map(|l| l.port.unwrap()), [2, 1, 4, 3]);
    }
}
