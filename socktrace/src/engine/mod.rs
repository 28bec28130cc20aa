//! Makes listeners of what the kernel side and the host say. Pure state: no I/O, no clock.

mod untracked;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, SystemTime},
};

use socktrace_common::{
    AF_INET, AF_INET6, AF_UNIX, READ_IPV6ONLY, READ_MIGRATES, READ_MPTCP, READ_REUSEPORT,
    READ_SEQPACKET, READ_SHUTDOWN, Reading, SLOT_HAS_REQUESTED, SLOT_SUPERSEDED, Slot, count,
    event::UnixName, tcp_state,
};

use crate::{
    bpf::Tracked,
    event::ListenerName,
    host::{Host, Owners},
    model::{
        Belongs, Drops, Family, Id, Listener, Owner, Process, Queue, SocketKind, SynLimit, Totals,
        Transport, unix_path,
    },
};

/// A socket that has been on its way into LISTEN for longer never gets there.
const OPENING_NS: u64 = 1_000_000_000;
/// `listen()` that fails on its last step looks to tracepoints like a listener that saw nothing, lived
/// this long at most and was never closed (`inet_csk_listen_start` sets the state, then takes the
/// port).
const STILLBORN_NS: u64 = 50_000_000;

/// When an interval ended, by the two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub time: SystemTime,
    /// CLOCK_MONOTONIC, as `bpf_ktime_get_ns` counts.
    pub monotonic_ns: u64,
}

impl Now {
    /// When something happened by the monotonic clock, by the other one.
    #[must_use]
    pub fn time_of(&self, monotonic_ns: u64) -> SystemTime {
        let ago = self.monotonic_ns.saturating_sub(monotonic_ns);
        let ahead = monotonic_ns.saturating_sub(self.monotonic_ns);
        self.time - Duration::from_nanos(ago) + Duration::from_nanos(ahead)
    }
}

/// What an interval came to.
#[derive(Debug, Default)]
pub struct Interval {
    pub listeners: Vec<Listener>,
    /// Slots whose socket turned out to be gone.
    pub gone: Vec<u32>,
    /// Namespaces with listeners that only `sock_diag` knows.
    pub untracked: HashSet<u32>,
}

/// What was known of a slot at the end of the interval before.
#[derive(Clone, Copy, Debug)]
struct Before {
    sk: u64,
    cookie: u64,
    port: u16,
    accept_depth: u32,
    syn_depth: u32,
    drops: Option<u64>,
}

#[derive(Debug, Default)]
pub struct Engine {
    before: HashMap<u32, Before>,
    /// Whether this kernel's SYN queue is full at its limit, once it was seen.
    pub full_at_limit: Option<bool>,
}

impl Engine {
    /// One interval: the tracked listeners, and those that only `sock_diag` knows. `host.listeners`
    /// must have been asked before `tracked` was read, so that a listener that closed in between is
    /// not taken for one nobody tracks.
    pub fn interval(&mut self, now: Now, tracked: &[Tracked], host: &Host) -> Interval {
        let mut result = Interval::default();
        let mut before = HashMap::new();
        let mut cookies = HashSet::new();
        for t in tracked {
            let earlier = self.before.get(&t.index).filter(|b| b.sk == t.slot.sk).copied();
            match fate(now, t, earlier) {
                Fate::Gone => result.gone.push(t.index),
                Fate::NotYet => {}
                Fate::Lives => {
                    let mut listener = listener(now, t, earlier, host, self.full_at_limit);
                    let heirs = t.closed() && tracked.iter().any(|other| inherits(t, other));
                    listener.totals.lost_on_close = lost_on_close(t, heirs);
                    before.insert(t.index, remember(t, earlier));
                    if let Id::Cookie { netns, cookie } = listener.id {
                        cookies.insert((netns, cookie));
                    }
                    result.listeners.push(listener);
                }
            }
        }
        self.before = before;
        let known = |netns, cookie| cookies.contains(&(netns, cookie));
        for listener in untracked::listeners(now, host, known) {
            result.untracked.insert(listener.netns);
            result.listeners.push(listener);
        }
        let names: HashMap<u32, &String> = host
            .netns
            .iter()
            .filter_map(|netns| Some((netns.inode, netns.name.as_ref()?)))
            .collect();
        for listener in &mut result.listeners {
            listener.belongs.netns_name = names.get(&listener.netns).copied().cloned();
        }
        result
    }
}

/// What a tracked listener is called.
#[must_use]
pub fn named(t: &Tracked, host: &Host) -> ListenerName {
    const NEVER: Now = Now { time: SystemTime::UNIX_EPOCH, monotonic_ns: 0 };
    let mut name = ListenerName::from(&listener(NEVER, t, None, host, None));
    // With tracepoints, members of a group cannot be told apart.
    if t.slot.ambiguous != 0 {
        name.id = None;
    }
    name
}

/// Whether connections of a listener that closed may have moved to another one.
#[must_use]
pub fn may_migrate(t: &Tracked) -> bool {
    const BOTH: u8 = READ_REUSEPORT | READ_MIGRATES;
    t.reading.flags & BOTH == BOTH
}

/// What a listener lost when it closed, among those that it may have left something to.
#[must_use]
pub fn lost(t: &Tracked, others: &[Tracked]) -> Option<u64> {
    let heirs = others.iter().any(|other| inherits(t, other));
    lost_on_close(t, heirs)
}

/// Whether connections of a listener that closed could move to another one of its SO_REUSEPORT group
/// that listened then (`net.ipv4.tcp_migrate_req`).
fn inherits(closed: &Tracked, other: &Tracked) -> bool {
    let group =
        |t: &Tracked| (t.slot.netns_id(), t.port(), t.slot.family, t.slot.address, t.slot.address6);
    let there = other.slot.opened_ns < closed.slot.closed_ns
        && (!other.closed() || other.slot.closed_ns > closed.slot.closed_ns);
    closed.index != other.index
        && may_migrate(closed)
        && may_migrate(other)
        && group(closed) == group(other)
        && there
}

/// What ended because the listener closed: what was in both queues then, but for what has moved to
/// another listener. Half-open requests move when their timer or their ACK comes, so with an heir they
/// are not lost.
fn lost_on_close(t: &Tracked, heirs: bool) -> Option<u64> {
    t.count(count::LATE)?;
    if !t.closed() || t.slot.flags & SLOT_SUPERSEDED != 0 {
        return Some(0);
    }
    let moved = if heirs { t.count(count::MIGRATED_OUT)? } else { 0 };
    let connections = u64::from(t.slot.closed_accept).saturating_sub(moved);
    let requests = if heirs { 0 } else { u64::from(t.slot.closed_syn) };
    Some(connections + requests + t.counts[count::LATE])
}

pub(crate) fn totals(t: &Tracked) -> Totals {
    let count = |index| t.count(index);
    Totals {
        syns: count(count::SYNS),
        syns_repeated: count(count::SYNS_AGAIN),
        requests_queued: count(count::QUEUED),
        established: count(count::ESTABLISHED),
        accepted: count(count::ACCEPTED),
        synack_retransmits: count(count::SYNACK_RETRANSMITS),
        cookies_sent: count(count::COOKIES_SENT),
        cookies_accepted: count(count::COOKIES_ACCEPTED),
        cookies_failed: count(count::COOKIES_FAILED),
        cookies_overflowed: count(count::COOKIES_OVERFLOWED),
        drops: Drops {
            accept_queue_full_on_syn: count(count::FULL_ON_SYN),
            accept_queue_full_on_ack: count(count::FULL_ON_ACK),
            syn_queue_full: count(count::SYN_FULL),
            syn_backlog_reserve: count(count::RESERVE),
            other: count(count::OTHER),
        },
        resets_on_overflow: count(count::RESETS_ON_OVERFLOW),
        requests_expired: count(count::EXPIRED),
        requests_reset: count(count::RESET),
        acks_deferred: count(count::DEFERRED),
        fastopen_established: count(count::FASTOPEN),
        fastopen_queue_full: count(count::FASTOPEN_FULL),
        lost_on_close: None,
        connects_waited: count(count::CONNECTS_WAITED),
        connects_refused: count(count::CONNECTS_REFUSED),
        migrated_out: count(count::MIGRATED_OUT),
        migrated_in: count(count::MIGRATED_IN),
    }
}

/// How long ago a moment was; 0 stands for none.
fn age(now: Now, then_ns: u64) -> Option<Duration> {
    (then_ns != 0).then(|| Duration::from_nanos(now.monotonic_ns.saturating_sub(then_ns)))
}

enum Fate {
    Lives,
    NotYet,
    Gone,
}

fn fate(now: Now, t: &Tracked, earlier: Option<Before>) -> Fate {
    let lifetime = t.slot.closed_ns.saturating_sub(t.slot.opened_ns);
    if t.closed() {
        let shut = t.reading.flags & READ_SHUTDOWN != 0;
        let brief = t.slot.opened_ns != 0 && lifetime < STILLBORN_NS && t.events() == 0;
        let superseded = t.slot.flags & SLOT_SUPERSEDED != 0;
        // The end of an AF_UNIX socket is seen only if it listened.
        let brief = brief && t.slot.family != AF_UNIX;
        let stillborn = (brief && !shut) || (superseded && earlier.is_none());
        return if stillborn { Fate::NotYet } else { Fate::Lives };
    }
    if t.reading.tcp_state != tcp_state::LISTEN {
        let opening = now.monotonic_ns.saturating_sub(t.slot.opened_ns) < OPENING_NS;
        return if opening { Fate::NotYet } else { Fate::Gone };
    }
    match earlier {
        // Another socket at the same address: the end of the first one was missed.
        Some(b) if b.cookie != 0 && b.cookie != t.reading.cookie => Fate::Gone,
        _ => Fate::Lives,
    }
}

fn remember(t: &Tracked, earlier: Option<Before>) -> Before {
    Before {
        sk: t.slot.sk,
        cookie: t.reading.cookie,
        port: port(t, earlier).unwrap_or(0),
        accept_depth: t.reading.accept_depth,
        syn_depth: t.reading.syn_depth,
        drops: drops(t),
    }
}

/// Everything that a listener threw away or refused.
fn drops(t: &Tracked) -> Option<u64> {
    let totals = totals(t);
    totals.drops.total().or(totals.connects_refused)
}

/// A port that the kernel chose is given back before the last reading.
fn port(t: &Tracked, earlier: Option<Before>) -> Option<u16> {
    let port = if t.port() == 0 { earlier.map_or(0, |b| b.port) } else { t.port() };
    (port != 0).then_some(port)
}

fn listener(
    now: Now,
    t: &Tracked,
    earlier: Option<Before>,
    host: &Host,
    full_at_limit: Option<bool>,
) -> Listener {
    let r = &t.reading;
    // The kernel side takes no other one for a listener.
    let family = family(r.family).unwrap_or(Family::Ipv4);
    let unix = family == Family::Unix;
    let holders = if r.inode == 0 { &[] } else { host.owners.of(r.inode) };
    let (cgroup, belongs) = belongs(&host.owners, holders, &t.acceptors, r.uid);
    let syn = SynLimit::new(r.accept_limit, r.syncookies, r.max_syn_backlog, full_at_limit);
    let (accept_depth, syn_depth) = if t.closed() { (0, 0) } else { (r.accept_depth, r.syn_depth) };
    Listener {
        time: now.time,
        id: id(r, earlier, host),
        family,
        transport: Some(match family {
            Family::Unix => Transport::Unix,
            _ if r.flags & READ_MPTCP == 0 => Transport::Tcp,
            _ => Transport::Mptcp,
        }),
        socket_type: socket_type(r.flags & READ_SEQPACKET != 0),
        address: address(family, r.address),
        port: port(t, earlier),
        path: t.name.as_ref().and_then(name),
        inode: (r.inode != 0).then_some(r.inode),
        interface: (r.bound_if != 0).then_some(r.bound_if),
        reuseport: (!unix).then_some(r.flags & READ_REUSEPORT != 0),
        v6only: (family == Family::Ipv6).then_some(r.flags & READ_IPV6ONLY != 0),
        uid: Some(r.uid),
        owners: holders.to_vec(),
        opener: opener(&t.slot),
        acceptors: processes(&t.acceptors, holders),
        cgroup,
        belongs,
        netns: r.netns,
        requested: requested(&t.slot, r),
        somaxconn: Some(r.somaxconn),
        accept: Queue {
            depth: Some(accept_depth),
            limit: Some(r.accept_limit),
            // `sk_acceptq_is_full` compares by `>`.
            capacity: Some(r.accept_limit.saturating_add(1)),
            peak: peak(t.watched, t.accept_peak, earlier.map(|b| b.accept_depth), r.accept_depth),
        },
        // An AF_UNIX connection is made at once.
        syn: if unix {
            Queue::default()
        } else {
            Queue {
                depth: Some(syn_depth),
                limit: Some(syn.limit),
                capacity: syn.capacity,
                peak: peak(t.watched, t.syn_peak, earlier.map(|b| b.syn_depth), r.syn_depth),
            }
        },
        syn_young: (!unix).then_some(if t.closed() { 0 } else { r.syn_young }),
        syn_rule: (!unix).then_some(syn.rule),
        totals: totals(t),
        dropped: drops(t)
            .map(|drops| drops.saturating_sub(earlier.and_then(|b| b.drops).unwrap_or(0))),
        accept_wait: t.accept_wait,
        handshake: t.handshake,
        last_accept_age: age(now, t.accepted_ns),
        oldest_wait: if t.closed() { None } else { age(now, r.oldest_ns) },
        oldest_since: (!t.closed() && r.oldest_ns != 0).then_some(r.oldest_ns),
        closed: t.closed(),
    }
}

/// The highest of what events saw and of what was there at both ends of the interval.
fn peak(watched: bool, events: Option<u32>, start: Option<u32>, end: u32) -> Option<u32> {
    watched.then(|| events.unwrap_or(0).max(start.unwrap_or(0)).max(end))
}

fn id(r: &Reading, earlier: Option<Before>, host: &Host) -> Id {
    let netns = r.netns;
    let known = [r.cookie, earlier.map_or(0, |b| b.cookie)].into_iter().find(|&cookie| cookie != 0);
    let asked = || {
        if r.family == AF_UNIX {
            let listeners = host.unix.get(&netns)?;
            return listeners.iter().find(|l| l.inode == r.inode).map(|l| l.cookie);
        }
        let dump = host.listeners.get(&netns)?;
        dump.listeners.iter().find(|d| d.inode == r.inode && r.inode != 0).map(|d| d.cookie)
    };
    match known.or_else(asked) {
        Some(cookie) => Id::Cookie { netns, cookie },
        None => Id::Inode { netns, inode: r.inode },
    }
}

/// What `listen()` was asked for, if that fits what it made of it: a thread whose `listen()` failed
/// may have left its number behind.
fn requested(slot: &Slot, r: &Reading) -> Option<i32> {
    let known = slot.flags & SLOT_HAS_REQUESTED != 0;
    // `__sys_listen`: anything above somaxconn, and anything negative, becomes somaxconn. The
    // sysctl may have changed since, so only the direction can be checked.
    let fits = slot.requested.cast_unsigned() >= r.accept_limit;
    (known && fits).then_some(slot.requested)
}

/// An address family by the kernel's number.
pub(crate) fn family(number: u16) -> Option<Family> {
    match number {
        AF_INET => Some(Family::Ipv4),
        AF_INET6 => Some(Family::Ipv6),
        AF_UNIX => Some(Family::Unix),
        _ => None,
    }
}

/// An address as it lies in the kernel's memory.
pub(crate) fn address(family: Family, bytes: [u8; 16]) -> Option<IpAddr> {
    match family {
        Family::Ipv6 => Some(IpAddr::V6(Ipv6Addr::from(bytes))),
        Family::Ipv4 => {
            let [a, b, c, d, ..] = bytes;
            Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))
        }
        Family::Unix => None,
    }
}

/// Only these two can listen.
fn socket_type(seqpacket: bool) -> SocketKind {
    if seqpacket { SocketKind::SeqPacket } else { SocketKind::Stream }
}

/// Two words as they lie in memory.
pub(crate) fn bytes(words: [u64; 2]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&words[1].to_ne_bytes());
    bytes
}

pub(crate) fn name(name: &UnixName) -> Option<String> {
    unix_path(name.path.get(..name.len as usize)?)
}

/// A name that the kernel pads with NULs.
pub(crate) fn comm(bytes: [u8; 16]) -> Option<String> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    (end > 0).then(|| String::from_utf8_lossy(&bytes[..end]).into_owned())
}

/// Who called `listen()`.
fn opener(slot: &Slot) -> Option<Process> {
    (slot.opener != 0).then(|| Process { pid: slot.opener, comm: comm(bytes(slot.opener_comm)) })
}

/// Processes by their numbers, each once.
fn processes(pids: &[u32], holders: &[Owner]) -> Vec<Process> {
    let comm = |pid| holders.iter().find(|owner| owner.pid == pid).map(|owner| owner.comm.clone());
    let pids: BTreeSet<u32> = pids.iter().copied().collect();
    pids.into_iter().map(|pid| Process { pid, comm: comm(pid) }).collect()
}

/// What the process that does a listener's work is part of: one that accepts goes before one that does not,
/// and every other one before the first process of all, which opens sockets for others.
fn belongs(
    owners: &Owners,
    holders: &[Owner],
    acceptors: &[u32],
    uid: u32,
) -> (Option<String>, Belongs) {
    let known = holders.iter().filter_map(|owner| Some((owner.pid, owners.process(owner.pid)?)));
    let process = known
        .min_by_key(|(pid, _)| (!acceptors.contains(pid), *pid == 1))
        .map(|(_, process)| process);
    let belongs = Belongs {
        exe: process.and_then(|process| process.exe.clone()),
        user: owners.user(uid).map(str::to_owned),
        unit: process.and_then(|process| process.unit.clone()),
        container: process.and_then(|process| process.container.clone()),
        netns_name: None,
    };
    (process.and_then(|process| process.cgroup.clone()), belongs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::NetnsPath;
    use socktrace_common::slot_state;

    const NOW: Now = Now { time: SystemTime::UNIX_EPOCH, monotonic_ns: 10_000_000_000 };

    fn tracked(change: impl FnOnce(&mut Tracked)) -> Tracked {
        let mut t = Tracked {
            index: 3,
            slot: Slot { sk: 0xffff_8880_0000_1000, state: slot_state::OPEN, ..Slot::default() },
            reading: Reading {
                cookie: 7,
                netns: 1,
                inode: 5,
                family: 2,
                port: 80,
                tcp_state: tcp_state::LISTEN,
                accept_limit: 16,
                syncookies: 1,
                ..Reading::default()
            },
            accept_peak: None,
            syn_peak: None,
            counts: [0; count::COUNT],
            known: u64::MAX,
            accept_wait: None,
            handshake: None,
            accepted_ns: 0,
            watched: true,
            name: None,
            acceptors: Vec::new(),
        };
        change(&mut t);
        t
    }

    fn one(engine: &mut Engine, t: Tracked) -> Listener {
        let mut interval = engine.interval(NOW, &[t], &Host::default());
        assert_eq!(interval.listeners.len(), 1);
        interval.listeners.remove(0)
    }

    #[test]
    fn a_peak_is_the_highest_of_events_start_and_end() {
        // (peak by events, depth at the end) of consecutive intervals, and the peak reported.
        let intervals = [
            (Some(17), 0, 17),
            (None, 0, 0),
            (None, 8, 8),
            // Nothing happened but a queue that drained: it was 8 deep when the interval began.
            (None, 0, 8),
            (Some(3), 2, 3),
            (Some(1), 0, 2),
        ];
        let mut engine = Engine::default();
        for (i, (events, depth, peak)) in intervals.into_iter().enumerate() {
            let t = tracked(|t| {
                t.accept_peak = events;
                t.reading.accept_depth = depth;
            });
            assert_eq!(one(&mut engine, t).accept.peak, Some(peak), "interval {i}");
        }
    }

    #[test]
    fn what_no_hook_sees_is_unknown() {
        let t = tracked(|t| t.watched = false);
        let listener = one(&mut Engine::default(), t);
        assert_eq!((listener.accept.peak, listener.syn.peak), (None, None));
        assert_eq!(listener.accept.depth, Some(0));
    }

    #[test]
    fn namespaces_have_the_names_that_the_host_knows() {
        let check = |inode, name: Option<&str>, expect: Option<&str>| {
            let netns = NetnsPath { inode, path: "/".into(), name: name.map(str::to_owned) };
            let host = Host { netns: vec![netns], ..Host::default() };
            let interval = Engine::default().interval(NOW, &[tracked(|_| {})], &host);
            assert_eq!(interval.listeners[0].belongs.netns_name.as_deref(), expect);
        };
        check(1, Some("blue"), Some("blue"));
        check(1, None, None);
        check(2, Some("blue"), None);
    }

    #[test]
    fn a_reused_address_is_another_socket() {
        let mut engine = Engine::default();
        one(&mut engine, tracked(|_| {}));
        let interval = engine.interval(NOW, &[tracked(|t| t.reading.cookie = 8)], &Host::default());
        assert!(interval.listeners.is_empty());
        assert_eq!(interval.gone, [3]);
    }

    #[test]
    fn sockets_that_do_not_listen_are_not_shown() {
        let check = |opened_ns, gone: &[u32]| {
            let t = tracked(|t| {
                t.reading.tcp_state = tcp_state::CLOSE;
                t.slot.opened_ns = opened_ns;
            });
            let interval = Engine::default().interval(NOW, &[t], &Host::default());
            assert!(interval.listeners.is_empty());
            assert_eq!(interval.gone, gone);
        };
        check(NOW.monotonic_ns - 1000, &[]);
        check(NOW.monotonic_ns - 2 * OPENING_NS, &[3]);
        check(0, &[3]);
    }

    #[test]
    fn a_closed_listener_is_reported_with_its_port_unless_it_never_was() {
        let closed = |opened_ns, closed_ns| {
            tracked(|t| {
                t.slot.state = slot_state::CLOSED;
                t.slot.opened_ns = opened_ns;
                t.slot.closed_ns = closed_ns;
                t.reading.port = 0;
            })
        };
        let mut engine = Engine::default();
        one(&mut engine, tracked(|_| {}));
        let last = one(&mut engine, closed(0, 5));
        assert!(last.closed);
        assert_eq!(last.port, Some(80));
        let brief = closed(1000, 2000);
        let (slot, reading) = (brief.slot, brief.reading);
        assert!(engine.interval(NOW, &[brief], &Host::default()).listeners.is_empty());
        let shut = tracked(|t| {
            (t.slot, t.reading) = (slot, Reading { flags: READ_SHUTDOWN, ..reading });
        });
        assert!(one(&mut engine, shut).closed);
    }

    #[test]
    fn what_is_lost_when_a_listener_closes() {
        let closed = |flags, moved| {
            tracked(|t| {
                t.slot.state = slot_state::CLOSED;
                t.slot.closed_ns = 1000;
                t.reading.flags = flags;
                t.slot.closed_accept = 5;
                t.slot.closed_syn = 3;
                t.counts[count::MIGRATED_OUT] = moved;
                t.counts[count::LATE] = 1;
            })
        };
        let check = |listeners: &[Tracked], lost| {
            let mut engine = Engine::default();
            let interval = engine.interval(NOW, listeners, &Host::default());
            assert_eq!(interval.listeners[0].totals.lost_on_close, lost);
        };
        let group = READ_REUSEPORT | READ_MIGRATES;
        let heir = |opened_ns, closed_ns| {
            tracked(|t| {
                t.index = 4;
                t.reading.flags = group;
                t.slot.opened_ns = opened_ns;
                t.slot.closed_ns = closed_ns;
                if closed_ns != 0 {
                    t.slot.state = slot_state::CLOSED;
                }
            })
        };
        check(&[closed(0, 0)], Some(9));
        check(&[closed(READ_REUSEPORT, 0), heir(1, 0)], Some(9));
        check(&[closed(group, 5), heir(1, 0)], Some(1));
        // The heir closed in its turn, before the interval ended.
        check(&[closed(group, 5), heir(1, 2000)], Some(1));
        // Nobody was left to move to, or not there yet.
        check(&[closed(group, 0)], Some(9));
        check(&[closed(group, 0), heir(1, 900)], Some(9));
        check(&[closed(group, 0), heir(1100, 0)], Some(9));
        let mut unknown = closed(group, 0);
        unknown.known &= !(1 << count::MIGRATED_OUT);
        check(&[unknown, heir(1, 0)], None);
        check(&[tracked(|t| t.counts[count::LATE] = 1)], Some(0));
    }

    #[test]
    fn a_requested_backlog_that_does_not_fit_is_not_believed() {
        let check = |asked, limit, requested| {
            let t = tracked(|t| {
                t.slot.requested = asked;
                t.slot.flags = SLOT_HAS_REQUESTED;
                t.reading.accept_limit = limit;
            });
            assert_eq!(one(&mut Engine::default(), t).requested, requested, "{asked} {limit}");
        };
        check(16, 16, Some(16));
        check(1024, 128, Some(1024));
        check(-1, 4096, Some(-1));
        check(0, 0, Some(0));
        check(5, 128, None);
    }
}
