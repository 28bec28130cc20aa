//! Trouble of clients and servers of this machine that no listener has: binds and connects that failed.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use nix::errno::Errno;
use serde::Serialize;
use socktrace_common::event::SLOW_CONNECT_NS;

use crate::{
    event::{Conflict, End, Event, Outcome, What},
    model::{Owner, SocketKind},
};

/// Places (addresses, ports, paths) that are told apart; beyond, nothing new is taken in.
const MOST_PLACES: usize = 256;
/// Who waited for so long lost a SYN.
const SYN_AGAIN: Duration = Duration::from_nanos(SLOW_CONNECT_NS);

/// Who called, once: others may have called too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Caller {
    pub pid: u32,
    pub comm: String,
}

/// A `bind()` that failed.
#[derive(Clone, Debug)]
pub struct Bind {
    pub count: u64,
    pub outcome: Outcome,
    pub asked: End,
    pub caller: Option<Caller>,
    pub conflict: Vec<Conflict>,
    pub unprivileged: Option<u32>,
}

/// Connects that nobody listened for.
#[derive(Clone, Debug)]
pub struct Refused {
    pub count: u64,
    pub caller: Option<Caller>,
}

/// Connects whose SYN was not answered.
#[derive(Clone, Debug, Default)]
pub struct Unanswered {
    /// In vain.
    pub failed: u64,
    /// Answered after the SYN was sent again.
    pub slow: u64,
    /// Still waiting when the watch ended, the SYN sent again already.
    pub pending: u64,
    pub slowest: Duration,
    pub caller: Option<Caller>,
    /// To an address of its own network namespace.
    pub is_local: bool,
}

/// A network namespace and where to in it.
pub(super) type Place = (u32, String);

#[derive(Debug, Default)]
pub struct Clients {
    pub binds: BTreeMap<(Place, i32), Bind>,
    pub refused: BTreeMap<Place, (End, Refused)>,
    pub unanswered: BTreeMap<Place, (End, Unanswered)>,
}

impl Clients {
    pub fn event(&mut self, event: &Event) {
        let netns = event.netns.unwrap_or(0);
        let caller = event.caller.as_ref();
        let caller = caller.map(|c| Caller { pid: c.pid, comm: c.comm.clone() });
        match &event.what {
            What::Bind { asked, explicit: true, outcome, conflict, unprivileged, .. }
                if is_refused(*outcome)
                    && asked.path.is_none()
                    && event.socket.as_ref().is_none_or(|s| s.kind != SocketKind::Datagram) =>
            {
                let key = ((netns, asked.text()), outcome.0);
                let new = || Bind {
                    count: 0,
                    outcome: *outcome,
                    asked: asked.clone(),
                    caller,
                    conflict: Vec::new(),
                    unprivileged: *unprivileged,
                };
                let Some(bind) = entry(&mut self.binds, key, new) else { return };
                bind.count += 1;
                if let Some(conflict) = conflict {
                    bind.conflict.clone_from(conflict);
                }
            }
            What::Connect { source, destination, outcome, took, .. } => {
                let took = took.unwrap_or_default();
                let place = (netns, destination.text());
                if outcome.is_some_and(|outcome| outcome.is(Errno::ECONNREFUSED)) {
                    if is_local(source, destination) {
                        let new = || (destination.clone(), Refused { count: 0, caller });
                        if let Some((_, refused)) = entry(&mut self.refused, place, new) {
                            refused.count += 1;
                        }
                    }
                    return;
                }
                let failed = match outcome {
                    Some(outcome) => outcome.is(Errno::ETIMEDOUT),
                    None => took >= SYN_AGAIN,
                };
                let slow = took >= SYN_AGAIN && outcome.is_some_and(|outcome| !outcome.failed());
                if !failed && !slow || destination.path.is_some() {
                    return;
                }
                let is_local = is_local(source, destination);
                let new = || {
                    (destination.clone(), Unanswered { caller, is_local, ..Unanswered::default() })
                };
                if let Some((_, unanswered)) = entry(&mut self.unanswered, place, new) {
                    unanswered.failed += u64::from(failed);
                    unanswered.slow += u64::from(slow);
                    unanswered.slowest = unanswered.slowest.max(took);
                }
            }
            _ => {}
        }
    }

    /// A connect that waits for an answer when the watch ends, though the SYN was sent again.
    pub fn waits(&mut self, netns: u32, source: IpAddr, to: (IpAddr, u16), owner: Option<&Owner>) {
        let (address, port) = to;
        let is_local = source == address;
        let caller = owner.map(|owner| Caller { pid: owner.pid, comm: owner.comm.clone() });
        let to = End { address: Some(address), port: Some(port), path: None };
        let place = (netns, to.text());
        let new = || (to, Unanswered { caller, is_local, ..Unanswered::default() });
        if let Some((_, unanswered)) = entry(&mut self.unanswered, place, new) {
            unanswered.pending += 1;
        }
    }
}

/// What is known of a key, made anew if there is room.
fn entry<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, new: impl FnOnce() -> V) -> Option<&mut V> {
    if map.len() >= MOST_PLACES && !map.contains_key(&key) {
        return None;
    }
    Some(map.entry(key).or_insert_with(new))
}

/// Whether a `bind()` failed for a reason that is not the program's own mistake.
fn is_refused(outcome: Outcome) -> bool {
    [Errno::EADDRINUSE, Errno::EACCES, Errno::EADDRNOTAVAIL].iter().any(|&errno| outcome.is(errno))
}

/// Whether a connect stayed on this machine: to itself the kernel connects from the address it connects to.
fn is_local(source: &End, destination: &End) -> bool {
    let Some(to) = destination.address else { return destination.path.is_some() };
    to.is_loopback() || to.is_unspecified() || source.address == Some(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Kind;
    use std::time::SystemTime;

    fn connect(source: &str, to: &str, outcome: Option<i32>, took_ms: u64) -> Event {
        let end = |address: &str| End {
            address: Some(address.parse().unwrap()),
            port: Some(80),
            path: None,
        };
        Event {
            time: SystemTime::UNIX_EPOCH,
            kind: Kind::Connect,
            listener: None,
            caller: None,
            netns: Some(1),
            socket: None,
            what: What::Connect {
                source: end(source),
                destination: end(to),
                implicit_bind: true,
                outcome: outcome.map(Outcome),
                took: Some(Duration::from_millis(took_ms)),
            },
        }
    }

    #[test]
    fn connects_are_told_apart_by_how_they_end() {
        const REFUSED: i32 = -(Errno::ECONNREFUSED as i32);
        const TIMED_OUT: i32 = -(Errno::ETIMEDOUT as i32);
        let check = |source, to, outcome, took, expect| {
            let mut clients = Clients::default();
            clients.event(&connect(source, to, outcome, took));
            let sum = |f: fn(&Unanswered) -> u64| {
                clients.unanswered.values().map(|(_, u)| f(u)).sum::<u64>()
            };
            let found = (clients.refused.len(), sum(|u| u.failed), sum(|u| u.slow));
            assert_eq!(found, expect, "{to} {outcome:?} {took}");
        };
        check("127.0.0.1", "127.0.0.1", Some(REFUSED), 0, (1, 0, 0));
        check("10.0.0.1", "10.0.0.1", Some(REFUSED), 0, (1, 0, 0));
        check("10.0.0.1", "10.0.0.2", Some(REFUSED), 0, (0, 0, 0));
        check("10.0.0.1", "10.0.0.2", Some(TIMED_OUT), 3000, (0, 1, 0));
        check("10.0.0.1", "10.0.0.2", Some(0), 1030, (0, 0, 1));
        check("10.0.0.1", "10.0.0.2", Some(0), 30, (0, 0, 0));
        check("10.0.0.1", "10.0.0.2", None, 5000, (0, 1, 0));
        check("10.0.0.1", "10.0.0.2", None, 50, (0, 0, 0));
    }

    #[test]
    fn places_are_bounded() {
        let mut clients = Clients::default();
        for i in 0..1000_u32 {
            let to = std::net::Ipv4Addr::from(0x0a00_0000 + i).to_string();
            clients.event(&connect("10.9.0.1", &to, Some(0), 2000));
        }
        assert_eq!(clients.unanswered.len(), MOST_PLACES);
    }
}
