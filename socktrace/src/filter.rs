//! Which listeners the user asked for.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use crate::model::{Family, Listener, Owner};

/// A port or a range of ports, as in `-P 80,8000-8100`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(RangeInclusive<u16>);

impl Ports {
    pub fn iter(&self) -> impl Iterator<Item = u16> + use<> {
        self.0.clone()
    }

    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.0.contains(&port)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.start(), self.0.end());
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.trim().parse::<u16>().map_err(|_| format!("{text:?} is not a port (0 to 65535)"))
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(text)?, number(text)?),
        };
        if first > last {
            return Err(format!("the range {text} ends before it begins"));
        }
        Ok(Self(first..=last))
    }
}

/// Everything must match; an empty list matches all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub ports: Vec<Ports>,
    pub pids: Vec<u32>,
    pub families: Vec<Family>,
    pub netns: Option<u32>,
    pub comm: Option<String>,
    pub cgroup: Option<String>,
}

impl Filter {
    #[must_use]
    pub fn matches(&self, listener: &Listener) -> bool {
        let port = || listener.port.is_some_and(|p| self.ports.iter().any(|r| r.contains(p)));
        (self.ports.is_empty() || port())
            && self.place(listener.family, listener.netns)
            && self.holds(&listener.owners, listener.cgroup.as_deref())
    }

    /// Whether sockets are chosen by the processes that hold them.
    #[must_use]
    pub fn by_process(&self) -> bool {
        !self.pids.is_empty() || self.comm.is_some() || self.cgroup.is_some()
    }

    #[must_use]
    pub fn place(&self, family: Family, netns: u32) -> bool {
        (self.families.is_empty() || self.families.contains(&family))
            && self.netns.is_none_or(|only| only == netns)
    }

    /// Whether a process matches, whose control group this is.
    #[must_use]
    pub fn process(&self, process: &Owner, cgroup: Option<&str>) -> bool {
        self.holds(std::slice::from_ref(process), cgroup)
    }

    /// Whether a connect to somewhere is of interest.
    #[must_use]
    pub fn wants_client(&self, (address, port): (IpAddr, u16), owner: Option<&Owner>) -> bool {
        let family = if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
        (self.ports.is_empty() || self.ports.iter().any(|ports| ports.contains(port)))
            && (self.families.is_empty() || self.families.contains(&family))
            && (!self.by_process() || owner.is_some_and(|owner| self.process(owner, None)))
    }

    /// Whether the processes that hold a socket match.
    #[must_use]
    pub fn holds(&self, owners: &[Owner], cgroup: Option<&str>) -> bool {
        let pid = || owners.iter().any(|owner| self.pids.contains(&owner.pid));
        let comm = |wanted: &String| owners.iter().any(|owner| owner.comm == *wanted);
        let below = |wanted: &String| {
            let wanted = wanted.trim_end_matches('/');
            cgroup.is_some_and(|path| {
                path.strip_prefix(wanted)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        };
        (self.pids.is_empty() || pid())
            && self.comm.as_ref().is_none_or(comm)
            && self.cgroup.as_ref().is_none_or(below)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_numbers_and_ranges() {
        let check = |text: &str, expect: Option<RangeInclusive<u16>>| {
            assert_eq!(text.parse().ok(), expect.map(Ports), "{text:?}");
        };
        check("80", Some(80..=80));
        check("8000-8100", Some(8000..=8100));
        check("0-65535", Some(0..=65535));
        for wrong in ["", "-", "80-", "-80", "81-80", "65536", "http", "1-2-3"] {
            check(wrong, None);
        }
    }

    #[test]
    fn all_filters_must_match() {
        let listener = crate::view::sample();
        let check = |expect: bool, change: fn(&mut Filter)| {
            let mut filter = Filter::default();
            change(&mut filter);
            assert_eq!(filter.matches(&listener), expect, "{filter:?}");
        };
        check(true, |_| {});
        check(true, |f| f.ports = vec![Ports(8000..=9000)]);
        check(false, |f| f.ports = vec![Ports(80..=80)]);
        check(true, |f| f.pids = vec![1, 812]);
        check(false, |f| f.pids = vec![1]);
        check(false, |f| f.families = vec![Family::Ipv6]);
        check(true, |f| f.netns = Some(4_026_531_840));
        check(false, |f| f.netns = Some(1));
        check(true, |f| f.comm = Some("nginx".into()));
        check(false, |f| f.comm = Some("ngin".into()));
        check(true, |f| f.cgroup = Some("/system.slice/".into()));
        check(false, |f| f.cgroup = Some("/system".into()));
        check(false, |f| {
            f.pids = vec![812];
            f.comm = Some("haproxy".into());
        });
    }
}
