//! A listener as the tool understands it. No I/O, no clock, no kernel types.

use std::{
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Serialize;

/// What tells one socket from every other: never its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Id {
    /// The kernel's own number for the socket.
    Cookie { netns: u32, cookie: u64 },
    /// Nobody could ask the kernel for a cookie (its network namespace is out of reach).
    Inode { netns: u32, inode: u64 },
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cookie { netns, cookie } => write!(f, "{netns}:{cookie}"),
            Self::Inode { netns, inode } => write!(f, "{netns}:inode-{inode}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6,
    Unix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Mptcp,
    Unix,
}

/// What `socket()` was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    Stream,
    Datagram,
    SeqPacket,
    Other(u16),
}

impl SocketKind {
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Stream => "stream".into(),
            Self::Datagram => "dgram".into(),
            Self::SeqPacket => "seqpacket".into(),
            Self::Other(number) => number.to_string(),
        }
    }
}

/// A process that holds the listening socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Owner {
    pub pid: u32,
    pub comm: String,
    pub fd: u32,
}

/// A container, as its control group and the host's own files name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    pub id: String,
    /// `docker`, `containerd`, `cri-o` or `podman`.
    pub runtime: Option<&'static str>,
    pub name: Option<String>,
    /// Kubernetes' name of its pod, and that one's namespace.
    pub pod: Option<String>,
    pub pod_uid: Option<String>,
    pub namespace: Option<String>,
}

/// A process that did something to a socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Process {
    pub pid: u32,
    /// `None` when it ended before anybody asked.
    pub comm: Option<String>,
}

/// What else is known of whom a listener belongs to: by its user, its network namespace and the first
/// process that holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Belongs {
    /// Where the link `/proc/PID/exe` leads.
    pub exe: Option<String>,
    /// Name of the socket's user.
    pub user: Option<String>,
    /// systemd's unit.
    pub unit: Option<String>,
    pub container: Option<Arc<Container>>,
    /// The network namespace's name, where it has one.
    pub netns_name: Option<String>,
}

/// The rule that limits the SYN queue. `Backlog`: `inet_csk_reqsk_queue_is_full` compares with the
/// listener's backlog. `MaxSynBacklog`: with cookies off, `tcp_conn_request` keeps the last quarter
/// of `tcp_max_syn_backlog` for peers it knows. `Syncookies`: with `tcp_syncookies=2` every SYN is
/// answered by a cookie, so nothing is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynRule {
    Backlog,
    MaxSynBacklog,
    Syncookies,
}

/// The limit the kernel compares the SYN queue's depth with, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynLimit {
    pub limit: u32,
    pub rule: SynRule,
    /// How many half-open requests there can be; `None` until it was seen whether the queue is full
    /// at its limit or above.
    pub capacity: Option<u32>,
}

impl SynLimit {
    /// From the listener's backlog and the namespace's `tcp_syncookies` and `tcp_max_syn_backlog`
    /// (`tcp_conn_request`, read in 5.10, 6.1, 6.12 and 6.18). `full_at_limit` is what was seen of
    /// `inet_csk_reqsk_queue_is_full`, whose `>=` became `>` in the middle of stable series.
    #[must_use]
    pub fn new(
        backlog: u32,
        syncookies: u32,
        max_syn_backlog: u32,
        full_at_limit: Option<bool>,
    ) -> Self {
        let reserve = max_syn_backlog - (max_syn_backlog >> 2);
        let capacity = full_at_limit.map(|at| if at { backlog } else { backlog.saturating_add(1) });
        match syncookies {
            2 => Self { limit: 0, rule: SynRule::Syncookies, capacity: Some(0) },
            0 if reserve < backlog && capacity.is_none_or(|capacity| reserve + 1 < capacity) => {
                Self { limit: reserve, rule: SynRule::MaxSynBacklog, capacity: Some(reserve + 1) }
            }
            _ => Self { limit: backlog, rule: SynRule::Backlog, capacity },
        }
    }
}

/// What the kernel did to the connections of a listener since it began, or since the trace began,
/// whichever is later. Packets where the kernel counts packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// SYNs, repeated ones too.
    pub syns: Option<u64>,
    /// SYNs that came again for a half-open request: its client has not seen the SYN-ACK.
    pub syns_repeated: Option<u64>,
    /// SYNs that became a half-open request.
    pub requests_queued: Option<u64>,
    /// Connections that were put into the accept queue.
    pub established: Option<u64>,
    pub accepted: Option<u64>,
    pub synack_retransmits: Option<u64>,
    pub cookies_sent: Option<u64>,
    /// Valid cookies that came back.
    pub cookies_accepted: Option<u64>,
    pub cookies_failed: Option<u64>,
    /// Valid cookies that came back to a full accept queue; part of `accept_queue_full_on_ack`.
    pub cookies_overflowed: Option<u64>,
    pub drops: Drops,
    /// Resets of clients that `tcp_abort_on_overflow` tells the truth.
    pub resets_on_overflow: Option<u64>,
    /// Half-open requests whose SYN-ACKs were never answered.
    pub requests_expired: Option<u64>,
    /// Half-open requests that the client itself reset.
    pub requests_reset: Option<u64>,
    /// Bare ACKs that `TCP_DEFER_ACCEPT` held back; not a loss.
    pub acks_deferred: Option<u64>,
    /// Connections that Fast Open put into the accept queue with their SYN; part of `established`.
    pub fastopen_established: Option<u64>,
    /// SYNs that found too many such connections and took the long way; not a loss.
    pub fastopen_queue_full: Option<u64>,
    /// Connections and half-open requests that ended because the listener closed.
    pub lost_on_close: Option<u64>,
    /// AF_UNIX: connects that had to wait for room in the accept queue.
    pub connects_waited: Option<u64>,
    /// AF_UNIX: connects that found the accept queue full and got `EAGAIN`.
    pub connects_refused: Option<u64>,
    /// Connections that moved to another listener of the group when this one closed.
    pub migrated_out: Option<u64>,
    /// Connections and requests that came from another listener of the group when that closed.
    pub migrated_in: Option<u64>,
}

impl Totals {
    /// Every one of the counts.
    fn counts(&mut self) -> [&mut Option<u64>; 26] {
        let drops = &mut self.drops;
        [
            &mut self.syns,
            &mut self.syns_repeated,
            &mut self.requests_queued,
            &mut self.established,
            &mut self.accepted,
            &mut self.synack_retransmits,
            &mut self.cookies_sent,
            &mut self.cookies_accepted,
            &mut self.cookies_failed,
            &mut self.cookies_overflowed,
            &mut self.resets_on_overflow,
            &mut self.requests_expired,
            &mut self.requests_reset,
            &mut self.acks_deferred,
            &mut self.fastopen_established,
            &mut self.fastopen_queue_full,
            &mut self.lost_on_close,
            &mut self.connects_waited,
            &mut self.connects_refused,
            &mut self.migrated_out,
            &mut self.migrated_in,
            &mut drops.accept_queue_full_on_syn,
            &mut drops.accept_queue_full_on_ack,
            &mut drops.syn_queue_full,
            &mut drops.syn_backlog_reserve,
            &mut drops.other,
        ]
    }

    /// Takes away what had been counted at some moment.
    pub fn subtract(&mut self, mut before: Self) {
        for (count, before) in self.counts().into_iter().zip(before.counts()) {
            *count = count.map(|count| count.saturating_sub(before.unwrap_or(0)));
        }
    }
}

/// SYNs and final ACKs that the listener threw away, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Drops {
    pub accept_queue_full_on_syn: Option<u64>,
    pub accept_queue_full_on_ack: Option<u64>,
    pub syn_queue_full: Option<u64>,
    pub syn_backlog_reserve: Option<u64>,
    pub other: Option<u64>,
}

impl Drops {
    /// All of them: ListenDrops.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        [
            self.accept_queue_full_on_syn,
            self.accept_queue_full_on_ack,
            self.syn_queue_full,
            self.syn_backlog_reserve,
            self.other,
        ]
        .into_iter()
        .sum()
    }
}

/// How long something took, in nanoseconds. Percentiles are at most 6.25 % off, the maximum is
/// exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub count: u64,
    pub p50_ns: u64,
    pub p90_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
}

/// One listening socket over one interval. `None` is unknown, never zero.
#[derive(Clone, Debug)]
pub struct Listener {
    pub time: SystemTime,
    pub id: Id,
    pub family: Family,
    pub transport: Option<Transport>,
    /// SOCK_SEQPACKET is AF_UNIX's alone.
    pub socket_type: SocketKind,
    /// `None` for AF_UNIX.
    pub address: Option<IpAddr>,
    /// `None` while the kernel has not chosen one, and for AF_UNIX.
    pub port: Option<u16>,
    /// AF_UNIX only; an abstract name begins with `@`.
    pub path: Option<String>,
    pub inode: Option<u64>,
    /// Index of the only network device it listens on; `None` for any.
    pub interface: Option<u32>,
    pub reuseport: Option<bool>,
    /// Answers IPv6 only (`IPV6_V6ONLY`).
    pub v6only: Option<bool>,
    pub uid: Option<u32>,
    pub owners: Vec<Owner>,
    /// Who called `listen()`; unknown for a listener older than the trace.
    pub opener: Option<Process>,
    /// Who called `accept()` lately.
    pub acceptors: Vec<Process>,
    pub cgroup: Option<String>,
    pub belongs: Belongs,
    pub netns: u32,

    pub requested: Option<i32>,
    pub somaxconn: Option<u32>,
    pub accept: Queue,
    pub syn: Queue,
    pub syn_young: Option<u32>,
    pub syn_rule: Option<SynRule>,
    pub totals: Totals,
    /// Drops of this interval, all causes together.
    pub dropped: Option<u64>,
    /// From the accept queue to `accept()`.
    pub accept_wait: Option<Times>,
    /// From the SYN-ACK to the final ACK.
    pub handshake: Option<Times>,
    /// How long ago the last `accept()` was.
    pub last_accept_age: Option<Duration>,
    /// How long the connection at the head of the accept queue has waited; `None` when none waits.
    pub oldest_wait: Option<Duration>,
    /// Since when, by CLOCK_MONOTONIC in nanoseconds: tells one head of the queue from the next.
    pub oldest_since: Option<u64>,
    /// It left LISTEN during this interval; this is its last record.
    pub closed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    pub depth: Option<u32>,
    pub limit: Option<u32>,
    /// Highest depth that an event of the interval saw.
    pub peak: Option<u32>,
    /// How many fit.
    pub capacity: Option<u32>,
}

impl Queue {
    /// How full the queue got, in thousandths of its limit; for sorting.
    #[must_use]
    pub fn fill(&self) -> u64 {
        let high = u64::from(self.peak.max(self.depth).unwrap_or(0));
        high * 1000 / u64::from(self.limit.unwrap_or(0)).max(1)
    }

    /// Whether it was full at some moment of the interval.
    #[must_use]
    pub fn was_full(&self) -> bool {
        let high = self.peak.max(self.depth);
        let full = self.capacity.or(self.limit.map(|limit| limit.saturating_add(1)));
        high.zip(full).is_some_and(|(high, full)| high >= full && high > 0)
    }
}

/// What `listen()` asked for, what it got, and the sysctl that may have come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Backlog {
    pub requested: Option<i32>,
    pub somaxconn: Option<u32>,
    pub effective: Option<u32>,
    /// It got less than it asked for. A negative number asks for the most there is.
    pub clamped: Option<bool>,
}

impl Backlog {
    #[must_use]
    pub fn new(requested: Option<i32>, somaxconn: Option<u32>, effective: Option<u32>) -> Self {
        let clamped = requested.zip(effective).map(|(asked, got)| asked.cast_unsigned() > got);
        Self { requested, somaxconn, effective, clamped }
    }
}

impl Listener {
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        Backlog::new(self.requested, self.somaxconn, self.accept.limit)
    }

    /// `address:port` as `ss` writes it, or the path.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let Some(address) = self.address else {
            return self.path.clone().unwrap_or_else(|| "*".to_owned());
        };
        let port = self.port.map_or_else(|| "*".to_owned(), |port| port.to_string());
        let device = self.interface.map_or_else(String::new, |index| format!("%{index}"));
        match address {
            // Both families, as `ss` tells it from IPv6 alone.
            IpAddr::V6(any) if any.is_unspecified() && self.v6only == Some(false) => {
                format!("*{device}:{port}")
            }
            IpAddr::V4(address) => format!("{address}{device}:{port}"),
            IpAddr::V6(address) => format!("[{address}]{device}:{port}"),
        }
    }
}

/// The name of an AF_UNIX socket, as `ss` writes it: an abstract one begins with `@`.
#[must_use]
pub fn unix_path(name: &[u8]) -> Option<String> {
    let (first, rest) = name.split_first()?;
    if *first == 0 {
        return Some(format!("@{}", String::from_utf8_lossy(rest)));
    }
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    Some(String::from_utf8_lossy(&name[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syn_limit_is_the_rule_that_binds() {
        // The counts of half-open requests that stay are the kernel's: 9 at backlog 8, 97 at
        // tcp_max_syn_backlog 128 with cookies off. The limit is what they are compared with.
        let check = |backlog, cookies, max, limit, rule| {
            let is = SynLimit::new(backlog, cookies, max, None);
            assert_eq!((is.limit, is.rule), (limit, rule));
        };
        check(8, 1, 1024, 8, SynRule::Backlog);
        check(4096, 1, 16, 4096, SynRule::Backlog);
        check(4096, 0, 128, 96, SynRule::MaxSynBacklog);
        check(4096, 0, 64, 48, SynRule::MaxSynBacklog);
        check(8, 0, 128, 8, SynRule::Backlog);
        check(8, 2, 128, 0, SynRule::Syncookies);
    }

    #[test]
    fn what_fits_depends_on_what_the_kernel_was_seen_to_do() {
        let check = |backlog, cookies, max, at, capacity| {
            assert_eq!(SynLimit::new(backlog, cookies, max, at).capacity, capacity);
        };
        check(8, 1, 1024, None, None);
        check(8, 1, 1024, Some(false), Some(9));
        check(8, 1, 1024, Some(true), Some(8));
        check(4096, 0, 128, None, Some(97));
        // 96 and 97 fit: the rule that lets in fewer binds.
        let tie = SynLimit::new(97, 0, 128, Some(true));
        assert_eq!((tie.rule, tie.capacity), (SynRule::Backlog, Some(97)));
    }

    #[test]
    fn every_total_is_subtracted() {
        let mut totals = crate::view::sample().totals;
        let all = serde_json::to_value(totals).unwrap().as_object().unwrap().len();
        let drops = serde_json::to_value(totals.drops).unwrap().as_object().unwrap().len();
        assert_eq!(totals.counts().len(), all - 1 + drops);
        totals.subtract(totals);
        assert_eq!(totals.counts().iter().filter_map(|count| **count).sum::<u64>(), 0);
    }

    #[test]
    fn names_of_unix_sockets() {
        let check = |name: &[u8], expect: Option<&str>| {
            assert_eq!(unix_path(name).as_deref(), expect, "{name:?}");
        };
        check(b"", None);
        check(b"/run/x.sock\0", Some("/run/x.sock"));
        check(b"/run/x.sock", Some("/run/x.sock"));
        check(b"\0web", Some("@web"));
        check(b"\0", Some("@"));
        check(b"/\xff", Some("/\u{fffd}"));
    }

    #[test]
    fn endpoints_are_written_as_ss_does() {
        let check = |address: &str, v6only, interface, expect: &str| {
            let address = Some(address.parse().unwrap());
            let listener = Listener { address, v6only, interface, ..crate::view::sample() };
            assert_eq!(listener.endpoint(), expect);
        };
        check("127.0.0.1", None, None, "127.0.0.1:8080");
        check("0.0.0.0", None, Some(2), "0.0.0.0%2:8080");
        check("::1", Some(true), None, "[::1]:8080");
        check("::", Some(true), None, "[::]:8080");
        check("::", Some(false), None, "*:8080");
    }

    #[test]
    fn a_negative_backlog_asks_for_the_most() {
        let check = |asked: Option<i32>, got: u32, clamped: Option<bool>| {
            let backlog = Backlog::new(asked, None, Some(got));
            assert_eq!(backlog.clamped, clamped, "listen({asked:?}) got {got}");
        };
        check(Some(-1), 4096, Some(true));
        check(Some(128), 128, Some(false));
        check(Some(1024), 128, Some(true));
        check(None, 128, None);
    }
}
