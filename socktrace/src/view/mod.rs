//! What a user sees. Views know listeners, never maps.

pub mod column;
pub mod event;
pub mod finding;
pub mod json;
pub mod story;
pub mod table;

use std::borrow::Cow;

/// Text from outside (process names, paths) without anything that a terminal would obey.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    // Besides control characters: those that turn the direction of the text around or are unseen.
    let hostile = |c: char| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    if text.contains(hostile) {
        let escape = |c: char| {
            if hostile(c) { c.escape_default().to_string() } else { c.into() }
        };
        text.chars().map(escape).collect::<String>().into()
    } else {
        text.into()
    }
}

/// A container for tests.
#[cfg(test)]
pub(crate) fn sample_container() -> crate::model::Container {
    crate::model::Container {
        id: "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970".into(),
        runtime: Some("containerd"),
        name: Some("nginx".into()),
        pod: Some("web-0".into()),
        pod_uid: None,
        namespace: Some("shop".into()),
    }
}

/// A listener for tests.
#[cfg(test)]
pub(crate) fn sample() -> crate::model::Listener {
    use crate::model::{
        Belongs, Drops, Family, Id, Listener, Owner, Process, Queue, SocketKind, SynRule, Times,
        Totals, Transport,
    };
    use std::time::{Duration, SystemTime};

    Listener {
        time: SystemTime::UNIX_EPOCH + Duration::new(1_795_378_200, 123_456_789),
        id: Id::Cookie { netns: 4_026_531_840, cookie: 5121 },
        family: Family::Ipv4,
        transport: Some(Transport::Tcp),
        socket_type: SocketKind::Stream,
        address: Some([0, 0, 0, 0].into()),
        port: Some(8080),
        path: None,
        inode: Some(41231),
        interface: None,
        reuseport: Some(false),
        v6only: None,
        uid: Some(0),
        owners: vec![
            Owner { pid: 812, comm: "nginx".into(), fd: 6 },
            Owner { pid: 813, comm: "nginx".into(), fd: 6 },
        ],
        opener: Some(Process { pid: 811, comm: Some("nginx".into()) }),
        acceptors: vec![Process { pid: 812, comm: Some("nginx".into()) }],
        cgroup: Some("/system.slice/nginx.service".into()),
        belongs: Belongs {
            exe: Some("/usr/sbin/nginx".into()),
            user: Some("root".into()),
            unit: Some("nginx.service".into()),
            container: None,
            netns_name: None,
        },
        netns: 4_026_531_840,
        requested: Some(1024),
        somaxconn: Some(128),
        accept: Queue { depth: Some(3), limit: Some(128), peak: Some(129), capacity: Some(129) },
        syn: Queue { depth: Some(0), limit: Some(128), peak: Some(9), capacity: Some(129) },
        syn_young: Some(0),
        syn_rule: Some(SynRule::Backlog),
        totals: Totals {
            syns: Some(500),
            syns_repeated: Some(0),
            requests_queued: Some(371),
            established: Some(371),
            accepted: Some(368),
            synack_retransmits: Some(0),
            cookies_sent: Some(0),
            cookies_accepted: Some(0),
            cookies_failed: Some(0),
            cookies_overflowed: Some(0),
            drops: Drops {
                accept_queue_full_on_syn: Some(129),
                accept_queue_full_on_ack: Some(0),
                syn_queue_full: Some(0),
                syn_backlog_reserve: Some(0),
                other: Some(0),
            },
            resets_on_overflow: Some(0),
            requests_expired: Some(0),
            requests_reset: Some(0),
            acks_deferred: Some(0),
            fastopen_established: Some(0),
            fastopen_queue_full: Some(0),
            lost_on_close: Some(0),
            connects_waited: None,
            connects_refused: None,
            migrated_out: Some(0),
            migrated_in: None,
        },
        dropped: Some(0),
        accept_wait: Some(Times {
            count: 368,
            p50_ns: 41_200,
            p90_ns: 180_999,
            p99_ns: 2_200_000,
            max_ns: 5_100_000,
        }),
        handshake: None,
        last_accept_age: Some(Duration::from_millis(12)),
        oldest_wait: None,
        oldest_since: None,
        closed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_a_terminal_obeys_gets_through() {
        for (text, expect) in [
            ("nginx", "nginx"),
            ("naïve日本", "naïve日本"),
            ("a\x1b[31mb", "a\\u{1b}[31mb"),
            ("a\nb\tc\r", "a\\nb\\tc\\r"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("x\u{202e}y", "x\\u{202e}y"),
        ] {
            assert_eq!(printable(text), expect);
        }
    }
}
