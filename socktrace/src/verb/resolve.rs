//! What an event does not say by itself: whose control group it was, who holds the port that was wanted, how
//! full the range of ports is. Asked of the host, seldom enough that it does not matter.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use socktrace_common::{IPPROTO_TCP, IPPROTO_UDP};

use super::proc;
use crate::{
    bpf::Tracer,
    engine::{address, bytes, family},
    event::{Conflict, End, Event, Outcome, What, state},
    host::{self, CgroupIds, Host},
    model::{Family, SocketKind},
};

/// An answer about a port or a range is believed this long.
const FRESH: Duration = Duration::from_secs(1);
/// Answers that are kept.
const MOST_ANSWERS: usize = 1024;
/// Asking may take one part in so many of the time, and this much at once.
const SHARE: u32 = 20;
const ADVANCE: Duration = Duration::from_secs(2);
/// Holders of a port that an event names.
const MOST_HOLDERS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct RangeKey {
    netns: u32,
    low: u16,
    high: u16,
    from: Option<IpAddr>,
    to: Option<(IpAddr, u16)>,
}

pub(super) struct Resolver {
    cgroups: CgroupIds,
    /// `None`: there was no answer.
    ranges: HashMap<RangeKey, (Instant, Option<(u32, u32)>)>,
    began: Instant,
    spent: Duration,
}

impl Resolver {
    pub(super) fn new() -> Self {
        Self {
            cgroups: CgroupIds::new(Path::new("/sys")),
            ranges: HashMap::new(),
            began: Instant::now(),
            spent: Duration::ZERO,
        }
    }

    pub(super) fn complete(&mut self, event: &mut Event, host: &mut Host, tracer: &mut Tracer) {
        if let Some(caller) = &mut event.caller {
            let path = self.cgroups.path(caller.cgroup_id, Instant::now());
            caller.cgroup = path.map(str::to_owned);
        }
        let Some(netns) = event.netns else { return };
        let Some(socket) = &event.socket else { return };
        if socket.family == Family::Unix {
            return;
        }
        let What::Bind { asked, outcome, conflict, range, destination, at_listen, .. } =
            &mut event.what
        else {
            return;
        };
        let port = asked.port.filter(|&port| port != 0);
        if outcome.is(Errno::EADDRINUSE)
            && let Some(port) = port
        {
            let udp = socket.kind == SocketKind::Datagram || socket.protocol == IPPROTO_UDP;
            let protocol = if udp { IPPROTO_UDP } else { IPPROTO_TCP };
            *conflict = self.holders(host, tracer, (netns, protocol, port), asked);
        }
        // For a connect the ports that this destination leaves, for a bind to any port all of them.
        let any = destination.is_none()
            && (*at_listen || outcome.is(Errno::EADDRINUSE) && port.is_none());
        if let Some(range) = range
            && (any || destination.is_some())
        {
            let to = destination.as_ref();
            let key = RangeKey {
                netns,
                low: range.low,
                high: range.high,
                from: socket.local.address.filter(|address| !address.is_unspecified()),
                to: to.and_then(|to| to.address.zip(to.port)),
            };
            if let Some((in_use, time_wait)) = self.usage(host, key, *outcome) {
                (range.in_use, range.time_wait) = (Some(in_use), Some(time_wait));
            }
        }
    }

    /// Whether there is time left to ask the host something that takes long.
    fn may_ask(&self) -> bool {
        self.spent < ADVANCE + self.began.elapsed() / SHARE
    }

    /// Who holds a port. What is only bound, older kernels do not list: it is looked for among the file
    /// descriptors of all processes.
    fn holders(
        &mut self,
        host: &mut Host,
        tracer: &mut Tracer,
        (netns, protocol, port): (u32, u16, u16),
        asked: &End,
    ) -> Option<Vec<Conflict>> {
        if !self.may_ask() {
            return None;
        }
        let began = Instant::now();
        let path = find(host, netns);
        let listed = path
            .and_then(|path| host::holders(&path, u8::try_from(protocol).ok()?, port).ok())
            .unwrap_or_default();
        let mut conflicts: Vec<Conflict> = listed
            .iter()
            .filter(|holder| overlap(holder.address, asked.address))
            .map(|holder| Conflict {
                address: holder.address,
                port,
                state: state(holder.state),
                inode: (holder.inode != 0).then_some(holder.inode),
                owners: Vec::new(),
            })
            .collect();
        if conflicts.is_empty() {
            let found =
                tracer.port_holders(netns, protocol, port, MOST_HOLDERS).unwrap_or_default();
            for holder in &found {
                let address =
                    family(holder.family).and_then(|family| address(family, bytes(holder.address)));
                let Some(address) = address.filter(|&held| overlap(held, asked.address)) else {
                    continue;
                };
                let inode = Some(holder.inode);
                if conflicts.iter().all(|known| known.inode != inode) {
                    let owners = Vec::new();
                    conflicts.push(Conflict {
                        address,
                        port,
                        state: state(holder.state),
                        inode,
                        owners,
                    });
                }
            }
        }
        // Connections of a listener share its port; they go when it goes.
        let holds = |conflict: &Conflict| matches!(conflict.state, "LISTEN" | "CLOSE");
        if conflicts.iter().any(holds) {
            conflicts.retain(holds);
        }
        conflicts.truncate(MOST_HOLDERS);
        let unowned = |conflict: &Conflict| {
            conflict.inode.is_some_and(|inode| host.owners.of(inode).is_empty())
        };
        if conflicts.iter().any(unowned) {
            host.owners.read(proc());
        }
        for conflict in &mut conflicts {
            conflict.owners =
                conflict.inode.map_or_else(Vec::new, |inode| host.owners.of(inode).to_vec());
        }
        // The very address goes before those that stand for it.
        conflicts.sort_by_key(|conflict| Some(conflict.address) != asked.address);
        self.spent += began.elapsed();
        // The one that asked is not in its own way.
        (!conflicts.is_empty()).then_some(conflicts)
    }

    /// How many ports of a range are taken, and how many of them only by TIME_WAIT. An older answer will do
    /// unless the range turned out to be full.
    fn usage(&mut self, host: &mut Host, key: RangeKey, outcome: Outcome) -> Option<(u32, u32)> {
        let now = Instant::now();
        if let Some((when, answer)) = self.ranges.get(&key)
            && now.duration_since(*when) < FRESH
            && (answer.is_none() || !outcome.failed())
        {
            return *answer;
        }
        if !self.may_ask() {
            return None;
        }
        let ask = |path| host::range_use(&path, key.low, key.high, key.to, key.from).ok();
        let usage = find(host, key.netns).and_then(ask);
        let answer = usage.map(|usage| (usage.in_use, usage.time_wait));
        self.spent += now.elapsed();
        if self.ranges.len() >= MOST_ANSWERS {
            self.ranges.retain(|_, (when, _)| now.duration_since(*when) < FRESH);
        }
        if self.ranges.len() < MOST_ANSWERS {
            self.ranges.insert(key, (now, answer));
        }
        answer
    }
}

/// A way into a network namespace.
fn find(host: &mut Host, inode: u32) -> Option<host::NetnsPath> {
    let known = |host: &Host| host.netns.iter().find(|netns| netns.inode == inode).cloned();
    // A process id may be another process's by now.
    let there = |path: &host::NetnsPath| path.leads_there();
    if let Some(path) = known(host).filter(there) {
        return Some(path);
    }
    host.netns = host::reachable(proc());
    known(host)
}

/// Whether sockets at two addresses get in each other's way: `0.0.0.0` is every IPv4 address, `::` those too
/// (but for sockets that are IPv6's alone).
fn overlap(held: IpAddr, asked: Option<IpAddr>) -> bool {
    let Some(asked) = asked else { return true };
    let (held, asked) = (held.to_canonical(), asked.to_canonical());
    let covers =
        |all: IpAddr, one: IpAddr| all.is_unspecified() && (all.is_ipv6() || one.is_ipv4());
    held == asked || covers(held, asked) || covers(asked, held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_overlap() {
        let check = |held: &str, asked: &str, expect| {
            assert_eq!(
                overlap(held.parse().unwrap(), asked.parse().ok()),
                expect,
                "{held} {asked}"
            );
        };
        check("127.0.0.1", "127.0.0.1", true);
        check("127.0.0.1", "127.0.0.2", false);
        check("0.0.0.0", "127.0.0.2", true);
        check("127.0.0.1", "0.0.0.0", true);
        check("::ffff:127.0.0.1", "127.0.0.1", true);
        check("::", "127.0.0.1", true);
        check("::1", "127.0.0.1", false);
        check("0.0.0.0", "::1", false);
        check("0.0.0.0", "::", true);
    }
}
