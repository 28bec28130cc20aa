//! Where packets come from: the prefixes that send most, in bounded room however many there are.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::event::End;

/// Prefixes that are counted at once. The rarest makes room for a new one, which takes over its count
/// (Metwally's space-saving), so what a prefix sent more than one part in so many of is among them.
const MOST_PREFIXES: usize = 512;

/// A prefix of addresses, `/24` or `/64`: what one site or one spoofer's range usually is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix(IpAddr);

impl Prefix {
    fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => {
                let [a, b, c, _] = address.octets();
                Ipv4Addr::new(a, b, c, 0).into()
            }
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
        })
    }

    #[must_use]
    pub fn is_ipv6(&self) -> bool {
        self.0.is_ipv6()
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.0, if self.0.is_ipv4() { 24 } else { 64 })
    }
}

/// Packets of a prefix: at most so many, some of which may have been those of the one before in its place.
#[derive(Clone, Copy, Debug)]
struct Count {
    most: u64,
    inherited: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Sources {
    counts: HashMap<Prefix, Count>,
    addresses: HashSet<IpAddr>,
    total: u64,
    /// Not all addresses were told apart.
    is_cut: bool,
}

impl Sources {
    /// Counts a packet of this sender; whether that is a new one. Without room, senders are not told apart.
    pub fn add(&mut self, peer: &End, room: bool) -> bool {
        let Some(address) = peer.address else { return false };
        self.total += 1;
        self.count(Prefix::of(address));
        self.is_cut |= !room;
        room && self.addresses.insert(address)
    }

    fn count(&mut self, prefix: Prefix) {
        if let Some(count) = self.counts.get_mut(&prefix) {
            count.most += 1;
            return;
        }
        let mut inherited = 0;
        if self.counts.len() == MOST_PREFIXES
            && let Some((&rarest, count)) = self.counts.iter().min_by_key(|(_, count)| count.most)
        {
            inherited = count.most;
            self.counts.remove(&rarest);
        }
        self.counts.insert(prefix, Count { most: inherited + 1, inherited });
    }

    /// Packets whose sender was seen.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Different addresses, and whether there may be more.
    #[must_use]
    pub fn addresses(&self) -> (usize, bool) {
        (self.addresses.len(), self.is_cut)
    }

    /// The only one there is.
    #[must_use]
    pub fn only(&self) -> Option<IpAddr> {
        let mut all = self.addresses.iter();
        all.next().copied().filter(|_| all.next().is_none() && !self.is_cut)
    }

    /// The prefixes that sent most, with what each sent at least.
    #[must_use]
    pub fn top(&self, most: usize) -> Vec<(Prefix, u64)> {
        let mut all: Vec<_> = self
            .counts
            .iter()
            .map(|(&prefix, count)| (prefix, count.most - count.inherited))
            .collect();
        all.sort_by_key(|&(prefix, count)| (std::cmp::Reverse(count), prefix));
        all.truncate(most);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(address: impl Into<IpAddr>) -> End {
        End { address: Some(address.into()), port: Some(1), path: None }
    }

    #[test]
    fn prefixes_are_what_a_site_has() {
        for (address, prefix) in [
            ("198.51.100.7", "198.51.100.0/24"),
            ("::ffff:198.51.100.7", "198.51.100.0/24"),
            ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ] {
            assert_eq!(Prefix::of(address.parse().unwrap()).to_string(), prefix);
        }
    }

    #[test]
    fn the_loudest_is_found_among_more_than_there_is_room_for() {
        let mut sources = Sources::default();
        for i in 0..20_000_u32 {
            sources.add(&end(Ipv4Addr::from(0x0a00_0000 + (i << 8))), i < 10_000);
            if i % 10 == 0 {
                sources.add(&end(Ipv4Addr::new(198, 51, 100, 7)), i < 10_000);
            }
        }
        assert_eq!(sources.total(), 22_000);
        assert_eq!(sources.addresses(), (10_001, true));
        assert_eq!(sources.counts.len(), MOST_PREFIXES);
        let (prefix, count) = sources.top(1)[0];
        assert_eq!(prefix.to_string(), "198.51.100.0/24");
        assert_eq!(count, 2000);
    }
}
