//! Records: one JSON object a line, as `product.md` fixed them.

use std::{
    io::{self, Write},
    time::SystemTime,
};

use serde::Serialize;

use crate::model::{Family, Listener, Queue, SynRule, Transport};

const SCHEMA: u32 = 1;

/// RFC 3339, UTC, nanoseconds.
fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
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
    time: String,
    listener: Identity<'a>,
    backlog: Backlog,
    accept_queue: QueueRecord,
    syn_queue: SynQueue,
    totals: Totals,
    accept_wait: Option<()>,
    handshake: Option<()>,
    last_accept_age_ms: Option<u64>,
    closed: bool,
}

#[derive(Serialize)]
struct Identity<'a> {
    id: String,
    family: &'static str,
    transport: Option<&'static str>,
    address: String,
    port: Option<u16>,
    path: Option<&'a str>,
    netns: u32,
    cookie: Option<u64>,
    inode: Option<u64>,
    interface: Option<u32>,
    reuseport: Option<bool>,
    v6only: Option<bool>,
    uid: Option<u32>,
    owners: Vec<OwnerRecord<'a>>,
    cgroup: Option<&'a str>,
    container: Option<&'a str>,
}

#[derive(Serialize)]
struct OwnerRecord<'a> {
    pid: u32,
    comm: &'a str,
    fd: u32,
}

#[derive(Serialize)]
struct Backlog {
    requested: Option<i32>,
    somaxconn: Option<u32>,
    effective: Option<u32>,
    clamped: Option<bool>,
}

#[derive(Serialize)]
struct QueueRecord {
    depth: Option<u32>,
    limit: Option<u32>,
    peak: Option<u32>,
}

#[derive(Serialize)]
struct SynQueue {
    depth: Option<u32>,
    young: Option<u32>,
    limit: Option<u32>,
    limit_rule: Option<&'static str>,
    peak: Option<u32>,
}

/// Not counted yet, so unknown.
#[derive(Serialize, Default)]
struct Totals {
    syns: Option<u64>,
    established: Option<u64>,
    accepted: Option<u64>,
    synack_retransmits: Option<u64>,
    cookies_sent: Option<u64>,
    cookies_accepted: Option<u64>,
    cookies_failed: Option<u64>,
    drops: Drops,
    resets_on_overflow: Option<u64>,
    requests_expired: Option<u64>,
    lost_on_close: Option<u64>,
}

#[derive(Serialize, Default)]
struct Drops {
    accept_queue_full_on_syn: Option<u64>,
    accept_queue_full_on_ack: Option<u64>,
    syn_queue_full: Option<u64>,
    syn_backlog_reserve: Option<u64>,
    other: Option<u64>,
}

impl From<Queue> for QueueRecord {
    fn from(Queue { depth, limit, peak }: Queue) -> Self {
        Self { depth, limit, peak }
    }
}

impl<'a> From<&'a Listener> for ListenerRecord<'a> {
    fn from(l: &'a Listener) -> Self {
        let Queue { depth, limit, peak } = l.syn;
        Self {
            r#type: "listener",
            schema: SCHEMA,
            time: rfc3339(l.time),
            listener: Identity {
                id: l.id.to_string(),
                family: match l.family {
                    Family::Ipv4 => "ipv4",
                    Family::Ipv6 => "ipv6",
                },
                transport: l.transport.map(|transport| match transport {
                    Transport::Tcp => "tcp",
                    Transport::Mptcp => "mptcp",
                }),
                address: l.address.to_string(),
                port: l.port,
                path: None,
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
                owners: l
                    .owners
                    .iter()
                    .map(|owner| OwnerRecord { pid: owner.pid, comm: &owner.comm, fd: owner.fd })
                    .collect(),
                cgroup: l.cgroup.as_deref(),
                container: None,
            },
            backlog: Backlog {
                requested: l.requested,
                somaxconn: l.somaxconn,
                effective: l.effective(),
                clamped: l.clamped(),
            },
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
            },
            totals: Totals::default(),
            accept_wait: None,
            handshake: None,
            last_accept_age_ms: None,
            closed: l.closed,
        }
    }
}

/// The last record of a run.
#[derive(Serialize, Clone, Debug)]
pub struct Summary {
    r#type: &'static str,
    schema: u32,
    time: String,
    pub backend: &'static str,
    pub kernel: String,
    pub duration_ms: u64,
    pub events: u64,
    pub lost_events: u64,
    /// Empty until the trace explains the kernel's counters.
    pub reconciliation: [(); 0],
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
    ) -> Self {
        Self {
            r#type: "summary",
            schema: SCHEMA,
            time: rfc3339(time),
            backend,
            kernel,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            events,
            lost_events,
            reconciliation: [],
        }
    }
}

/// One line of `socktrace check`.
#[derive(Serialize, Clone, Debug)]
pub struct CheckRecord {
    r#type: &'static str,
    schema: u32,
    time: String,
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
            time: rfc3339(time),
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
                    "id": "4026531840:5121", "family": "ipv4", "transport": "tcp",
                    "address": "0.0.0.0", "port": 8080, "path": unknown, "netns": 4026531840u32,
                    "cookie": 5121, "inode": 41231, "interface": unknown, "reuseport": false, "v6only": unknown, "uid": 0,
                    "owners": [{"pid": 812, "comm": "nginx", "fd": 6},
                               {"pid": 813, "comm": "nginx", "fd": 6}],
                    "cgroup": "/system.slice/nginx.service", "container": unknown
                },
                "backlog": {"requested": 1024, "somaxconn": 128, "effective": 128, "clamped": true},
                "accept_queue": {"depth": 3, "limit": 128, "peak": 129},
                "syn_queue": {"depth": 0, "young": 0, "limit": 128, "limit_rule": "backlog",
                              "peak": 9},
                "totals": {
                    "syns": unknown, "established": unknown, "accepted": unknown,
                    "synack_retransmits": unknown, "cookies_sent": unknown,
                    "cookies_accepted": unknown, "cookies_failed": unknown,
                    "drops": {"accept_queue_full_on_syn": unknown,
                              "accept_queue_full_on_ack": unknown, "syn_queue_full": unknown,
                              "syn_backlog_reserve": unknown, "other": unknown},
                    "resets_on_overflow": unknown, "requests_expired": unknown,
                    "lost_on_close": unknown
                },
                "accept_wait": unknown, "handshake": unknown, "last_accept_age_ms": unknown,
                "closed": false
            })
        );
    }
}
