//! What a user sees. Views know listeners, never maps.

pub mod column;
pub mod json;
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

/// A listener for tests.
#[cfg(test)]
pub(crate) fn sample() -> crate::model::Listener {
    use crate::model::{Family, Id, Listener, Owner, Queue, SynRule, Transport};
    use std::time::{Duration, SystemTime};

    Listener {
        time: SystemTime::UNIX_EPOCH + Duration::new(1_795_378_200, 123_456_789),
        id: Id::Cookie { netns: 4_026_531_840, cookie: 5121 },
        family: Family::Ipv4,
        transport: Some(Transport::Tcp),
        address: [0, 0, 0, 0].into(),
        port: Some(8080),
        inode: Some(41231),
        interface: None,
        reuseport: Some(false),
        v6only: None,
        uid: Some(0),
        owners: vec![
            Owner { pid: 812, comm: "nginx".into(), fd: 6 },
            Owner { pid: 813, comm: "nginx".into(), fd: 6 },
        ],
        cgroup: Some("/system.slice/nginx.service".into()),
        netns: 4_026_531_840,
        requested: Some(1024),
        somaxconn: Some(128),
        accept: Queue { depth: Some(3), limit: Some(128), peak: Some(129) },
        syn: Queue { depth: Some(0), limit: Some(128), peak: Some(9) },
        syn_young: Some(0),
        syn_rule: Some(SynRule::Backlog),
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
