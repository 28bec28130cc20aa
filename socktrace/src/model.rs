//! A listener as the tool understands it. No I/O, no clock, no kernel types.

use std::{fmt, net::IpAddr, time::SystemTime};

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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Mptcp,
}

/// A process that holds the listening socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    pub pid: u32,
    pub comm: String,
    pub fd: u32,
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
}

impl SynLimit {
    /// From the listener's backlog and the namespace's `tcp_syncookies` and `tcp_max_syn_backlog`
    /// (`tcp_conn_request`, read in 5.10, 6.1, 6.12 and 6.18).
    #[must_use]
    pub fn new(backlog: u32, syncookies: u32, max_syn_backlog: u32) -> Self {
        let three_quarters = max_syn_backlog - (max_syn_backlog >> 2);
        match syncookies {
            2 => Self { limit: 0, rule: SynRule::Syncookies },
            0 if three_quarters < backlog => {
                Self { limit: three_quarters, rule: SynRule::MaxSynBacklog }
            }
            _ => Self { limit: backlog, rule: SynRule::Backlog },
        }
    }
}

/// One listening socket over one interval. `None` is unknown, never zero.
#[derive(Clone, Debug)]
pub struct Listener {
    pub time: SystemTime,
    pub id: Id,
    pub family: Family,
    pub transport: Option<Transport>,
    pub address: IpAddr,
    /// `None` while the kernel has not chosen one.
    pub port: Option<u16>,
    pub inode: Option<u64>,
    /// Index of the only network device it listens on; `None` for any.
    pub interface: Option<u32>,
    pub reuseport: Option<bool>,
    /// Answers IPv6 only (`IPV6_V6ONLY`).
    pub v6only: Option<bool>,
    pub uid: Option<u32>,
    pub owners: Vec<Owner>,
    pub cgroup: Option<String>,
    pub netns: u32,

    pub requested: Option<i32>,
    pub somaxconn: Option<u32>,
    pub accept: Queue,
    pub syn: Queue,
    pub syn_young: Option<u32>,
    pub syn_rule: Option<SynRule>,
    /// It left LISTEN during this interval; this is its last record.
    pub closed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    pub depth: Option<u32>,
    pub limit: Option<u32>,
    /// Highest depth that an event of the interval saw.
    pub peak: Option<u32>,
}

impl Queue {
    /// How full the queue got, in thousandths of its limit; for sorting.
    #[must_use]
    pub fn fill(&self) -> u64 {
        let high = u64::from(self.peak.max(self.depth).unwrap_or(0));
        high * 1000 / u64::from(self.limit.unwrap_or(0)).max(1)
    }
}

impl Listener {
    /// The backlog that `listen()` made of what it was asked for.
    #[must_use]
    pub fn effective(&self) -> Option<u32> {
        self.accept.limit
    }

    /// Whether `listen()` got less than it asked for. A negative number asks for the most there is.
    #[must_use]
    pub fn clamped(&self) -> Option<bool> {
        self.requested.zip(self.accept.limit).map(|(asked, got)| asked.cast_unsigned() > got)
    }

    /// `address:port` as `ss` writes it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let port = self.port.map_or_else(|| "*".to_owned(), |port| port.to_string());
        let device = self.interface.map_or_else(String::new, |index| format!("%{index}"));
        match self.address {
            // Both families, as `ss` tells it from IPv6 alone.
            IpAddr::V6(any) if any.is_unspecified() && self.v6only == Some(false) => {
                format!("*{device}:{port}")
            }
            IpAddr::V4(address) => format!("{address}{device}:{port}"),
            IpAddr::V6(address) => format!("[{address}]{device}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syn_limit_is_the_rule_that_binds() {
        // The counts of half-open requests that stay are the kernel's: 9 at backlog 8, 97 at
        // tcp_max_syn_backlog 128 with cookies off. The limit is what they are compared with.
        let check = |backlog, cookies, max, limit, rule| {
            assert_eq!(SynLimit::new(backlog, cookies, max), SynLimit { limit, rule });
        };
        check(8, 1, 1024, 8, SynRule::Backlog);
        check(4096, 1, 16, 4096, SynRule::Backlog);
        check(4096, 0, 128, 96, SynRule::MaxSynBacklog);
        check(4096, 0, 64, 48, SynRule::MaxSynBacklog);
        check(8, 0, 128, 8, SynRule::Backlog);
        check(8, 2, 128, 0, SynRule::Syncookies);
    }

    #[test]
    fn endpoints_are_written_as_ss_does() {
        let check = |address: &str, v6only, interface, expect: &str| {
            let address = address.parse().unwrap();
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
        let mut listener = crate::view::sample();
        for (asked, got, clamped) in [(-1, 4096, true), (128, 128, false), (1024, 128, true)] {
            listener.requested = Some(asked);
            listener.accept.limit = Some(got);
            assert_eq!(listener.clamped(), Some(clamped), "listen({asked}) got {got}");
        }
        listener.requested = None;
        assert_eq!(listener.clamped(), None);
    }
}
