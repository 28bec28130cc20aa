//! Listeners that only `sock_diag` knows: those that no process holds, or that there is no room for, and all of
//! them where nothing can be traced.

use super::{Now, belongs, socket_type};
use crate::{
    host::{DiagListener, Dump, Host, Owners, UnixListener},
    model::{Family, Id, Listener, Queue, SocketKind, Totals, Transport, unix_path},
};

/// Those of the host's listeners that are not known otherwise.
pub(super) fn listeners(now: Now, host: &Host, known: impl Fn(u32, u64) -> bool) -> Vec<Listener> {
    let mut listeners = Vec::new();
    for (&netns, dump) in &host.listeners {
        let new = dump.listeners.iter().filter(|diag| !known(netns, diag.cookie));
        listeners.extend(new.map(|diag| tcp(now, netns, diag, dump, &host.owners)));
    }
    for (&netns, dump) in &host.unix {
        let new = dump.iter().filter(|diag| !known(netns, diag.cookie));
        listeners.extend(new.map(|diag| unix(now, netns, diag, &host.owners)));
    }
    listeners
}

fn tcp(now: Now, netns: u32, diag: &DiagListener, dump: &Dump, owners: &Owners) -> Listener {
    Listener {
        id: Id::Cookie { netns, cookie: diag.cookie },
        family: if diag.ipv6 { Family::Ipv6 } else { Family::Ipv4 },
        transport: diag.mptcp.map(|mptcp| if mptcp { Transport::Mptcp } else { Transport::Tcp }),
        address: Some(diag.address),
        port: Some(diag.port),
        interface: (diag.interface != 0).then_some(diag.interface),
        v6only: diag.v6only,
        accept: unwatched(diag.accept_depth, diag.accept_limit),
        syn: Queue { depth: dump.syn_depth(diag), ..Queue::default() },
        ..unknown(now, netns, diag.inode, Some(diag.uid), owners)
    }
}

fn unix(now: Now, netns: u32, diag: &UnixListener, owners: &Owners) -> Listener {
    Listener {
        id: Id::Cookie { netns, cookie: diag.cookie },
        family: Family::Unix,
        transport: Some(Transport::Unix),
        socket_type: socket_type(diag.seqpacket),
        path: diag.name.as_deref().and_then(unix_path),
        accept: unwatched(diag.accept_depth, diag.accept_limit),
        ..unknown(now, netns, diag.inode, diag.uid, owners)
    }
}

/// An accept queue that no hook looks at.
fn unwatched(depth: u32, limit: u32) -> Queue {
    Queue {
        depth: Some(depth),
        limit: Some(limit),
        capacity: Some(limit.saturating_add(1)),
        peak: None,
    }
}

/// A listener of which nothing is known but who holds it.
fn unknown(now: Now, netns: u32, inode: u64, uid: Option<u32>, owners: &Owners) -> Listener {
    let holders = if inode == 0 { &[] } else { owners.of(inode) };
    let (cgroup, belongs) = belongs(owners, holders, &[], uid.unwrap_or(u32::MAX));
    Listener {
        time: now.time,
        id: Id::Inode { netns, inode },
        family: Family::Ipv4,
        transport: None,
        socket_type: SocketKind::Stream,
        address: None,
        port: None,
        path: None,
        inode: (inode != 0).then_some(inode),
        interface: None,
        reuseport: None,
        v6only: None,
        uid,
        owners: holders.to_vec(),
        opener: None,
        acceptors: Vec::new(),
        cgroup,
        belongs,
        netns,
        requested: None,
        somaxconn: None,
        accept: Queue::default(),
        syn: Queue::default(),
        syn_young: None,
        syn_rule: None,
        totals: Totals::default(),
        dropped: None,
        accept_wait: None,
        handshake: None,
        last_accept_age: None,
        oldest_wait: None,
        oldest_since: None,
        closed: false,
    }
}
