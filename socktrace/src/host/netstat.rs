//! The kernel's own counters of a network namespace.

use std::{collections::BTreeMap, io};

use super::netns::{NetnsPath, within};

/// The counters that the trace explains, as `/proc/net/netstat` names them.
pub const EXPLAINED: [&str; 7] = [
    "ListenOverflows",
    "ListenDrops",
    "TCPReqQFullDrop",
    "TCPReqQFullDoCookies",
    "SyncookiesSent",
    "SyncookiesRecv",
    "SyncookiesFailed",
];

/// Their values, in that order.
pub type Netstat = [u64; EXPLAINED.len()];

/// Reads the counters of every namespace that can be entered.
#[must_use]
pub fn read_netstat(namespaces: &[NetnsPath]) -> BTreeMap<u32, Netstat> {
    let read = |netns: &NetnsPath| {
        within(netns, || std::fs::read_to_string("/proc/thread-self/net/netstat")).and_then(
            |text| parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData)),
        )
    };
    let mut found = BTreeMap::new();
    for netns in namespaces {
        match read(netns) {
            Ok(netstat) => {
                found.insert(netns.inode, netstat);
            }
            Err(error) => log::debug!("counters of {}: {error}", netns.path.display()),
        }
    }
    found
}

/// A line of names and a line of numbers, both after the same word.
fn parse(text: &str) -> Option<Netstat> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let names: Vec<&str> = lines.next()?.split(' ').collect();
    let values: Vec<&str> = lines.next()?.split(' ').collect();
    let mut netstat = Netstat::default();
    for (name, value) in EXPLAINED.iter().zip(&mut netstat) {
        let index = names.iter().position(|is| is == name)?;
        *value = values.get(index)?.parse().ok()?;
    }
    Some(netstat)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent SyncookiesRecv SyncookiesFailed ListenOverflows X \
                    ListenDrops TCPReqQFullDoCookies TCPReqQFullDrop\nTcpExt: 1 2 3 4 9 5 6 7\n\
                    IpExt: InNoRoutes\nIpExt: 8\n";
        assert_eq!(parse(text), Some([4, 5, 7, 6, 1, 2, 3]));
        assert!(parse("TcpExt: ListenDrops\nTcpExt: 1\n").is_none());
        assert!(parse("").is_none());
        let own = std::fs::read_to_string("/proc/self/net/netstat").unwrap();
        assert!(parse(&own).is_some());
    }
}
