//! Records: one JSON object a line, as `product.md` fixed them.

use std::{
    cell::Cell,
    io::{self, Write},
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Serialize, Serializer};

use crate::model::{
    Backlog, Container, Family, Listener, Owner, Process, Queue, SynRule, Times, Totals, Transport,
};

pub(super) const SCHEMA: u32 = 1;

/// RFC 3339, UTC, nanoseconds.
pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

/// A time of a record, in the same form. Thousands of events have the same second, so its text is kept.
#[derive(Clone, Debug)]
pub(super) struct Time(pub(super) SystemTime);

/// `2026-11-23T08:30:10.377482362Z`
const TIME_LENGTH: usize = 30;
/// Up to the point, with it.
const SECOND_LENGTH: usize = 20;

thread_local! {
    /// The second that was written last, and a time in it.
    static SECOND: Cell<(u64, [u8; TIME_LENGTH])> = const { Cell::new((u64::MAX, [0; TIME_LENGTH])) };
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (second, mut text) = SECOND.get();
        if second == since.as_secs() {
            let mut rest = since.subsec_nanos();
            for digit in text[SECOND_LENGTH..TIME_LENGTH - 1].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
        } else {
            let new = rfc3339(self.0);
            match new.as_bytes().try_into() {
                Ok(new) => text = new,
                // A year of five digits.
                Err(_) => return serializer.serialize_str(&new),
            }
            SECOND.set((since.as_secs(), text));
        }
        serializer.serialize_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

/// Writes a record as a line.
pub fn write(out: &mut impl Write, record: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, record)?;
    out.write_all(b"\n")
}

#[derive(Serialize)]
pub struct ListenerRecord<'a> {
    r#type: &'static str,
    schema: u32,
    time: Time,
    listener: Identity<'a>,
    backlog: Backlog,
    accept_queue: QueueRecord,
    syn_queue: SynQueue,
    totals: Totals,
    accept_wait: Option<TimesRecord>,
    handshake: Option<TimesRecord>,
    last_accept_age_ms: Option<u64>,
    /// `null` when no connection waits.
    oldest_wait_ms: Option<u64>,
    closed: bool,
}

#[derive(Serialize)]
struct Identity<'a> {
    id: String,
    family: &'static str,
    transport: Option<&'static str>,
    socket_type: String,
    address: Option<IpAddr>,
    port: Option<u16>,
    path: Option<&'a str>,
    netns: u32,
    cookie: Option<u64>,
    inode: Option<u64>,
    interface: Option<u32>,
    reuseport: Option<bool>,
    v6only: Option<bool>,
    uid: Option<u32>,
    owners: &'a [Owner],
    opener: Option<&'a Process>,
    acceptors: &'a [Process],
    cgroup: Option<&'a str>,
    container: Option<&'a Container>,
    unit: Option<&'a str>,
    exe: Option<&'a str>,
    user: Option<&'a str>,
    netns_name: Option<&'a str>,
}

#[derive(Serialize)]
struct QueueRecord {
    depth: Option<u32>,
    limit: Option<u32>,
    peak: Option<u32>,
    capacity: Option<u32>,
}

#[derive(Serialize)]
struct SynQueue {
    depth: Option<u32>,
    young: Option<u32>,
    limit: Option<u32>,
    limit_rule: Option<&'static str>,
    peak: Option<u32>,
    capacity: Option<u32>,
}

/// Microseconds, as `product.md` has them, cut off.
#[derive(Serialize)]
struct TimesRecord {
    count: u64,
    p50_us: u64,
    p90_us: u64,
    p99_us: u64,
    max_us: u64,
}

impl From<Times> for TimesRecord {
    fn from(times: Times) -> Self {
        let Times { count, p50_ns, p90_ns, p99_ns, max_ns } = times;
        let us = |ns| ns / 1000;
        Self {
            count,
            p50_us: us(p50_ns),
            p90_us: us(p90_ns),
            p99_us: us(p99_ns),
            max_us: us(max_ns),
        }
    }
}

pub(super) fn family(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ipv4",
        Family::Ipv6 => "ipv6",
        Family::Unix => "unix",
    }
}

pub(super) fn transport(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Mptcp => "mptcp",
        Transport::Unix => "unix",
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<Queue> for QueueRecord {
    fn from(Queue { depth, limit, peak, capacity }: Queue) -> Self {
        Self { depth, limit, peak, capacity }
    }
}

impl<'a> From<&'a Listener> for ListenerRecord<'a> {
    fn from(l: &'a Listener) -> Self {
        let Queue { depth, limit, peak, capacity } = l.syn;
        Self {
            r#type: "listener",
            schema: SCHEMA,
            time: Time(l.time),
            listener: Identity {
                id: l.id.to_string(),
                family: family(l.family),
                transport: l.transport.map(transport),
                socket_type: l.socket_type.name(),
                address: l.address,
                port: l.port,
                path: l.path.as_deref(),
                netns: l.netns,
                cookie: match l.id {
                    crate::model::Id::Cookie { cookie, .. } => Some(cookie),
                    crate::model::Id::Inode { .. } => None,
                },
                inode: l.inode,
                interface: l.interface,
                reuseport: l.reuseport,
                v6only: l.v6only,
                uid: l.uid,
                owners: &l.owners,
                opener: l.opener.as_ref(),
                acceptors: &l.acceptors,
                cgroup: l.cgroup.as_deref(),
                container: l.belongs.container.as_deref(),
                unit: l.belongs.unit.as_deref(),
                exe: l.belongs.exe.as_deref(),
                user: l.belongs.user.as_deref(),
                netns_name: l.belongs.netns_name.as_deref(),
            },
            backlog: l.backlog(),
            accept_queue: l.accept.into(),
            syn_queue: SynQueue {
                depth,
                young: l.syn_young,
                limit,
                limit_rule: l.syn_rule.map(|rule| match rule {
                    SynRule::Backlog => "backlog",
                    SynRule::MaxSynBacklog => "max_syn_backlog",
                    SynRule::Syncookies => "syncookies",
                }),
                peak,
                capacity,
            },
            totals: l.totals,
            accept_wait: l.accept_wait.map(TimesRecord::from),
            handshake: l.handshake.map(TimesRecord::from),
            last_accept_age_ms: l.last_accept_age.map(milliseconds),
            oldest_wait_ms: l.oldest_wait.map(milliseconds),
            closed: l.closed,
        }
    }
}

/// The last record of a run.
#[derive(Serialize, Clone, Debug)]
pub struct Summary {
    r#type: &'static str,
    schema: u32,
    time: Time,
    pub backend: &'static str,
    pub kernel: String,
    pub duration_ms: u64,
    pub events: u64,
    pub lost_events: u64,
    /// Of `diagnose`: how many there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub findings: Option<usize>,
    pub reconciliation: Vec<Reconciliation>,
}

/// One of the kernel's counters and what the trace made of it. What the kernel counted is `null` when
/// its namespace was gone at the end of the run.
#[derive(Serialize, Clone, Debug, PartialEq, Eq)]
pub struct Reconciliation {
    pub netns: u32,
    pub counter: &'static str,
    pub kernel: Option<u64>,
    pub socktrace: u64,
    pub unexplained: Option<i64>,
}

impl Summary {
    #[must_use]
    pub fn new(
        time: SystemTime,
        backend: &'static str,
        kernel: String,
        duration: std::time::Duration,
        events: u64,
        lost_events: u64,
        reconciliation: Vec<Reconciliation>,
    ) -> Self {
        Self {
            r#type: "summary",
            schema: SCHEMA,
            time: Time(time),
            backend,
            kernel,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            events,
            lost_events,
            findings: None,
            reconciliation,
        }
    }
}

/// One line of `socktrace check`.
#[derive(Serialize, Clone, Debug)]
pub struct CheckRecord {
    r#type: &'static str,
    schema: u32,
    time: Time,
    pub feature: String,
    pub available: Option<bool>,
    pub detail: String,
    pub remedy: Option<String>,
}

impl CheckRecord {
    #[must_use]
    pub fn new(
        time: SystemTime,
        feature: impl Into<String>,
        available: Option<bool>,
        detail: impl Into<String>,
        remedy: Option<String>,
    ) -> Self {
        Self {
            r#type: "check",
            schema: SCHEMA,
            time: Time(time),
            feature: feature.into(),
            available,
            detail: detail.into(),
            remedy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_humantimes() {
        let base = UNIX_EPOCH + Duration::from_secs(1_795_420_798);
        for ns in [0, 1, 999_999_999, 1_000_000_000, 1_000_000_010, 377_482_362, 86_400_000_000_000]
        {
            let time = base + Duration::from_nanos(ns);
            let json = serde_json::to_string(&Time(time)).unwrap();
            assert_eq!(json, format!("\"{}\"", rfc3339(time)), "{ns}");
        }
    }
    use serde_json::{Value, json};

    #[test]
    fn a_listener_record_has_the_agreed_names() {
        let mut out = Vec::new();
        write(&mut out, &ListenerRecord::from(&crate::view::sample())).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        assert!(text.ends_with("}\n"));
        let record: Value = serde_json::from_str(&text).unwrap();
        let unknown = Value::Null;
        assert_eq!(
            record,
            json!({
                "type": "listener", "schema": 1, "time": "2026-11-22T20:10:00.123456789Z",
                "listener": {
                    "id": "4026531840:5121", "family": "ipv4", "transport": "tcp", "socket_type": "stream",
                    "address": "0.0.0.0", "port": 8080, "path": unknown, "netns": 4026531840u32,
                    "cookie": 5121, "inode": 41231, "interface": unknown, "reuseport": false, "v6only": unknown, "uid": 0,
                    "owners": [{"pid": 812, "comm": "nginx", "fd": 6},
                               {"pid": 813, "comm": "nginx", "fd": 6}],
                    "opener": {"pid": 811, "comm": "nginx"},
                    "acceptors": [{"pid": 812, "comm": "nginx"}],
                    "cgroup": "/system.slice/nginx.service", "container": unknown,
                    "unit": "nginx.service", "exe": "/usr/sbin/nginx", "user": "root",
                    "netns_name": unknown
                },
                "backlog": {"requested": 1024, "somaxconn": 128, "effective": 128, "clamped": true},
                "accept_queue": {"depth": 3, "limit": 128, "peak": 129, "capacity": 129},
                "syn_queue": {"depth": 0, "young": 0, "limit": 128, "limit_rule": "backlog",
                              "peak": 9, "capacity": 129},
                "totals": {
                    "syns": 500, "syns_repeated": 0, "requests_queued": 371, "established": 371, "accepted": 368,
                    "synack_retransmits": 0, "cookies_sent": 0, "cookies_accepted": 0,
                    "cookies_failed": 0, "cookies_overflowed": 0,
                    "drops": {"accept_queue_full_on_syn": 129, "accept_queue_full_on_ack": 0,
                              "syn_queue_full": 0, "syn_backlog_reserve": 0, "other": 0},
                    "resets_on_overflow": 0, "requests_expired": 0, "requests_reset": 0,
                    "acks_deferred": 0, "fastopen_established": 0, "fastopen_queue_full": 0,
                    "lost_on_close": 0, "connects_waited": unknown, "connects_refused": unknown,
                    "migrated_out": 0, "migrated_in": unknown
                },
                "accept_wait": {"count": 368, "p50_us": 41, "p90_us": 180, "p99_us": 2200,
                                "max_us": 5100},
                "handshake": unknown, "last_accept_age_ms": 12, "oldest_wait_ms": unknown,
                "closed": false
            })
        );
    }
    #[test]
    fn a_container_is_an_object() {
        let mut listener = crate::view::sample();
        listener.belongs.container = Some(crate::view::sample_container().into());
        let record = serde_json::to_value(ListenerRecord::from(&listener)).unwrap();
        assert_eq!(
            record["listener"]["container"],
            json!({
                "id": "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970",
                "runtime": "containerd", "name": "nginx", "pod": "web-0",
                "pod_uid": Value::Null, "namespace": "shop"
            })
        );
    }
}
