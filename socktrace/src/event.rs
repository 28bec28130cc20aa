//! An event as the tool understands it. No I/O, no clock.

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use clap::ValueEnum;
use nix::errno::Errno;
use serde::Serialize;
use socktrace_common::{
    IPPROTO_MPTCP, IPPROTO_UDP, count,
    event::{
        EVENT_ABANDONED, EVENT_AT_LISTEN, EVENT_IMPLICIT, EVENT_QUEUES, EVENT_RELISTEN,
        EVENT_REQUESTED, EVENT_TIMED, Event as Raw, kind, step,
    },
};

use crate::{
    bpf::Happened,
    engine::{address, bytes, comm, family, name},
    model::{Backlog, Family, Id, Listener, Owner, SocketKind, Transport},
};

/// What happened, in the order in which a socket lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Socket,
    Bind,
    Listen,
    Connect,
    Syn,
    Established,
    Accept,
    Drop,
    Cookie,
    Retransmit,
    Expire,
    Reset,
    Close,
    /// Events that did not reach the reader; always shown.
    Lost,
}

impl Kind {
    /// What the kernel side sends, by its number.
    pub const SENT: [Self; kind::COUNT as usize] = [
        Self::Socket,
        Self::Bind,
        Self::Listen,
        Self::Connect,
        Self::Syn,
        Self::Established,
        Self::Accept,
        Self::Drop,
        Self::Cookie,
        Self::Retransmit,
        Self::Expire,
        Self::Reset,
        Self::Close,
    ];

    fn of(number: u32) -> Option<Self> {
        Self::SENT.get(usize::try_from(number).ok()?).copied()
    }

    /// The kernel side's bit for a bind that it makes at `connect()`.
    pub const CHOSEN: u32 = 1 << kind::CHOSEN;

    /// The kernel side's bits for all of them.
    #[must_use]
    pub fn all() -> u32 {
        Self::SENT.iter().fold(0, |bits, kind| bits | kind.bit())
    }

    /// The kernel side's bit for it.
    #[must_use]
    pub fn bit(self) -> u32 {
        Self::SENT.iter().position(|&kind| kind == self).map_or(0, |number| 1 << number)
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Bind => "bind",
            Self::Listen => "listen",
            Self::Connect => "connect",
            Self::Syn => "syn",
            Self::Established => "established",
            Self::Accept => "accept",
            Self::Drop => "drop",
            Self::Cookie => "cookie",
            Self::Retransmit => "retransmit",
            Self::Expire => "expire",
            Self::Reset => "reset",
            Self::Close => "close",
            Self::Lost => "lost",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Event {
    pub time: SystemTime,
    pub kind: Kind,
    /// Whom it happened to.
    pub listener: Option<Arc<ListenerName>>,
    /// Who called for it; never who ran on the CPU by chance.
    pub caller: Option<Caller>,
    pub netns: Option<u32>,
    /// The socket of a call.
    pub socket: Option<Socket>,
    pub what: What,
}

/// A listener in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerName {
    /// `None` when it may have been another one at the same address.
    pub id: Option<Id>,
    pub family: Family,
    pub transport: Option<Transport>,
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    pub path: Option<String>,
    pub netns: u32,
    /// `address:port` or the path, for people.
    pub endpoint: String,
    /// Its record, once it was written.
    pub json: OnceLock<String>,
}

impl ListenerName {
    /// When it may have been another one at the same address.
    #[must_use]
    pub fn without_id(&self) -> Self {
        Self { id: None, json: OnceLock::new(), ..self.clone() }
    }
}

impl From<&Listener> for ListenerName {
    fn from(listener: &Listener) -> Self {
        Self {
            id: Some(listener.id),
            family: listener.family,
            transport: listener.transport,
            address: listener.address,
            port: listener.port,
            path: listener.path.clone(),
            netns: listener.netns,
            endpoint: listener.endpoint(),
            json: OnceLock::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub pid: u32,
    pub comm: String,
    pub uid: u32,
    pub cgroup: Option<String>,
    /// Its id, from which the path was found.
    pub cgroup_id: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub family: Family,
    pub kind: SocketKind,
    pub protocol: u16,
    pub inode: Option<u64>,
    pub cookie: Option<u64>,
    /// `sk_state` after the event, by the kernel's name.
    pub state: &'static str,
    pub local: End,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct End {
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

impl End {
    #[must_use]
    pub fn text(&self) -> String {
        match (&self.path, self.address, self.port) {
            (Some(path), ..) => path.clone(),
            (None, Some(IpAddr::V6(address)), port) => format!("[{address}]:{}", star(port)),
            (None, Some(address), port) => format!("{address}:{}", star(port)),
            (None, None, port) => format!("*:{}", star(port)),
        }
    }
}

fn star(port: Option<u16>) -> String {
    port.map_or_else(|| "*".to_owned(), |port| port.to_string())
}

/// Both queues of a listener after an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queues {
    pub accept_depth: Option<u32>,
    pub accept_limit: Option<u32>,
    pub syn_depth: Option<u32>,
    pub syn_limit: Option<u32>,
}

/// What a call came to: what it returned, or a negative error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome(pub i32);

impl Outcome {
    #[must_use]
    pub fn failed(self) -> bool {
        self.0 < 0
    }

    /// The error's name in C.
    #[must_use]
    pub fn errno(self) -> Option<String> {
        self.failed().then(|| match Errno::from_raw(self.0.saturating_neg()) {
            Errno::UnknownErrno => self.0.saturating_neg().to_string(),
            known => format!("{known:?}"),
        })
    }

    #[must_use]
    pub fn is(self, errno: Errno) -> bool {
        self.0 == -(errno as i32)
    }
}

/// Who holds a port that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Conflict {
    pub address: IpAddr,
    pub port: u16,
    pub state: &'static str,
    pub inode: Option<u64>,
    pub owners: Vec<Owner>,
}

/// The ports that the kernel chooses from, and how many of them are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PortRange {
    pub low: u16,
    pub high: u16,
    /// For the destination of a connect, when that was counted.
    pub in_use: Option<u32>,
    /// How many of these only TIME_WAIT holds.
    pub time_wait: Option<u32>,
}

impl PortRange {
    #[must_use]
    pub fn size(&self) -> u32 {
        u32::from(self.high.saturating_sub(self.low)) + 1
    }
}

#[derive(Clone, Debug)]
pub enum What {
    Socket {
        outcome: Outcome,
    },
    Bind {
        asked: End,
        explicit: bool,
        /// The port was chosen at `listen()`, not at `connect()`.
        at_listen: bool,
        outcome: Outcome,
        conflict: Option<Vec<Conflict>>,
        range: Option<PortRange>,
        /// First port that everyone may bind to.
        unprivileged: Option<u32>,
        /// Where a connect that chose the port goes.
        destination: Option<End>,
    },
    Listen {
        backlog: Backlog,
        relisten: bool,
        outcome: Outcome,
        queues: Queues,
    },
    Connect {
        source: End,
        destination: End,
        implicit_bind: bool,
        /// `None`: the program gave up before an answer came.
        outcome: Option<Outcome>,
        took: Option<Duration>,
    },
    Syn {
        peer: End,
        queues: Queues,
    },
    Established {
        peer: End,
        handshake: Option<Duration>,
        queues: Queues,
    },
    Accept {
        peer: End,
        wait: Option<Duration>,
        queues: Queues,
        inode: Option<u64>,
        cookie: Option<u64>,
    },
    Drop {
        peer: End,
        reason: &'static str,
        queues: Queues,
    },
    Cookie {
        peer: End,
        step: &'static str,
    },
    /// `retransmit`, `expire` and `reset`.
    Request {
        peer: End,
        attempt: Option<u16>,
        queues: Queues,
    },
    Close {
        lost_on_close: Option<u64>,
        lifetime: Option<Duration>,
        queues: Queues,
    },
    Lost {
        count: u64,
        place: &'static str,
    },
}

impl What {
    /// Both queues of the listener, where they were read.
    pub fn queues_mut(&mut self) -> Option<&mut Queues> {
        match self {
            Self::Listen { queues, .. }
            | Self::Syn { queues, .. }
            | Self::Established { queues, .. }
            | Self::Accept { queues, .. }
            | Self::Drop { queues, .. }
            | Self::Request { queues, .. }
            | Self::Close { queues, .. } => Some(queues),
            _ => None,
        }
    }
}

/// States by the kernel's numbers (`include/net/tcp_states.h`).
#[must_use]
pub fn state(number: u8) -> &'static str {
    const STATES: [&str; 14] = [
        "UNKNOWN",
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
        "BOUND_INACTIVE",
    ];
    STATES.get(usize::from(number)).copied().unwrap_or("UNKNOWN")
}

/// A cause of a drop by its index in `count`, as the totals call it.
fn reason(index: u32) -> &'static str {
    match usize::try_from(index) {
        Ok(count::FULL_ON_SYN) => "accept_queue_full_on_syn",
        Ok(count::FULL_ON_ACK) => "accept_queue_full_on_ack",
        Ok(count::SYN_FULL) => "syn_queue_full",
        Ok(count::RESERVE) => "syn_backlog_reserve",
        _ => "other",
    }
}

fn socket_kind(number: u16) -> SocketKind {
    match number {
        socktrace_common::SOCK_STREAM => SocketKind::Stream,
        socktrace_common::SOCK_DGRAM => SocketKind::Datagram,
        socktrace_common::SOCK_SEQPACKET => SocketKind::SeqPacket,
        other => SocketKind::Other(other),
    }
}

/// How a protocol is called.
#[must_use]
pub fn protocol(socket: &Socket) -> &'static str {
    match (socket.family, socket.protocol) {
        (Family::Unix, _) => "unix",
        (_, IPPROTO_MPTCP) => "mptcp",
        (_, IPPROTO_UDP) => "udp",
        _ if socket.kind == SocketKind::Datagram => "udp",
        _ => "tcp",
    }
}

fn end(of: Option<Family>, words: [u64; 2], port: u16) -> End {
    let address = of.and_then(|family| address(family, bytes(words)));
    End { address, port: (port != 0).then_some(port), path: None }
}

fn queues(raw: &Raw) -> Queues {
    if raw.flags & EVENT_QUEUES == 0 {
        return Queues::default();
    }
    let unix = raw.family == socktrace_common::AF_UNIX;
    Queues {
        accept_depth: Some(raw.accept_depth),
        accept_limit: Some(raw.accept_limit),
        syn_depth: (!unix).then_some(raw.syn_depth),
        syn_limit: None,
    }
}

/// Makes an event of what the kernel side sent; `None` for a kind that this version does not know. What has
/// to be asked of the host (the listener's name, who holds a port) is still missing.
#[must_use]
pub fn decode(happened: &Happened, time: SystemTime) -> Option<Event> {
    let raw = &happened.event;
    let kind = Kind::of(raw.kind)?;
    let of = family(raw.family);
    let outcome = Outcome(raw.result);
    let timed = (raw.flags & EVENT_TIMED != 0).then(|| Duration::from_nanos(raw.ns));
    let path = happened.name.as_deref().and_then(name);
    let local = match of {
        Some(Family::Unix) => End { path: path.clone(), ..End::default() },
        of => end(of, raw.local, raw.local_port),
    };
    let mut peer = end(of, raw.peer, raw.peer_port);
    // The packet says IPv4, the socket of a listener for both families `::ffff:…`: the same client.
    peer.address = peer.address.map(|address| address.to_canonical());
    let implicit = raw.flags & EVENT_IMPLICIT != 0;
    let what = match kind {
        Kind::Socket => What::Socket { outcome },
        Kind::Bind => {
            let at_listen = raw.flags & EVENT_AT_LISTEN != 0;
            let [low, high] = raw.range;
            What::Bind {
                asked: match of {
                    Some(Family::Unix) => local.clone(),
                    of if implicit => End { port: None, ..end(of, raw.asked, 0) },
                    of => {
                        let End { address, .. } = end(of, raw.asked, 0);
                        End { address, port: Some(raw.asked_port), path: None }
                    }
                },
                explicit: !implicit,
                at_listen,
                outcome,
                conflict: None,
                range: (high != 0).then_some(PortRange {
                    low,
                    high,
                    in_use: None,
                    time_wait: None,
                }),
                unprivileged: (high != 0).then_some(raw.unprivileged),
                destination: (implicit && !at_listen).then(|| peer.clone()),
            }
        }
        Kind::Listen => What::Listen {
            backlog: Backlog::new(
                (raw.flags & EVENT_REQUESTED != 0).then_some(raw.requested),
                Some(raw.somaxconn),
                (raw.flags & EVENT_QUEUES != 0).then_some(raw.accept_limit),
            ),
            relisten: raw.flags & EVENT_RELISTEN != 0,
            outcome,
            queues: queues(raw),
        },
        Kind::Connect => What::Connect {
            source: if of == Some(Family::Unix) { End::default() } else { local.clone() },
            destination: if of == Some(Family::Unix) { local.clone() } else { peer },
            implicit_bind: implicit,
            outcome: (raw.flags & EVENT_ABANDONED == 0).then_some(outcome),
            took: timed,
        },
        Kind::Syn => What::Syn { peer, queues: queues(raw) },
        Kind::Established => What::Established { peer, handshake: timed, queues: queues(raw) },
        Kind::Accept => What::Accept {
            peer,
            wait: timed,
            queues: queues(raw),
            inode: (raw.inode != 0).then_some(raw.inode),
            cookie: (raw.cookie != 0).then_some(raw.cookie),
        },
        Kind::Drop => What::Drop { peer, reason: reason(raw.detail), queues: queues(raw) },
        Kind::Cookie => What::Cookie {
            peer,
            step: match raw.detail {
                step::SENT => "sent",
                step::ACCEPTED => "accepted",
                _ => "failed",
            },
        },
        Kind::Retransmit | Kind::Expire => {
            What::Request { peer, attempt: Some(raw.attempt), queues: queues(raw) }
        }
        Kind::Reset => What::Request { peer, attempt: None, queues: queues(raw) },
        Kind::Close => What::Close { lost_on_close: None, lifetime: timed, queues: queues(raw) },
        Kind::Lost => return None,
    };
    let call = matches!(kind, Kind::Socket | Kind::Bind | Kind::Listen | Kind::Connect);
    let socket = of.filter(|_| call).map(|family| Socket {
        family,
        kind: socket_kind(raw.socket_type),
        protocol: raw.protocol,
        inode: (raw.inode != 0).then_some(raw.inode),
        cookie: (raw.cookie != 0).then_some(raw.cookie),
        state: state(raw.state),
        local: if kind == Kind::Connect && family == Family::Unix { End::default() } else { local },
    });
    let caller = (raw.pid != 0).then(|| Caller {
        pid: raw.pid,
        comm: comm(bytes(raw.comm)).unwrap_or_default(),
        uid: raw.uid,
        cgroup: None,
        cgroup_id: raw.cgroup,
    });
    Some(Event {
        time,
        kind,
        listener: None,
        caller,
        netns: (raw.netns != 0).then_some(raw.netns),
        socket,
        what,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_kernel_sides_numbers() {
        for (kind, number) in [
            (Kind::Socket, kind::SOCKET),
            (Kind::Bind, kind::BIND),
            (Kind::Listen, kind::LISTEN),
            (Kind::Connect, kind::CONNECT),
            (Kind::Syn, kind::SYN),
            (Kind::Established, kind::ESTABLISHED),
            (Kind::Accept, kind::ACCEPT),
            (Kind::Drop, kind::DROP),
            (Kind::Cookie, kind::COOKIE),
            (Kind::Retransmit, kind::RETRANSMIT),
            (Kind::Expire, kind::EXPIRE),
            (Kind::Reset, kind::RESET),
            (Kind::Close, kind::CLOSE),
        ] {
            assert_eq!(kind.bit(), 1 << number, "{kind:?}");
            assert_eq!(Kind::of(number), Some(kind));
            let name = kind.to_possible_value().unwrap();
            assert_eq!(name.get_name(), kind.name());
        }
        assert_eq!(Kind::Lost.bit(), 0);
    }

    #[test]
    fn any_record_can_be_decoded() {
        // Bytes of all kinds, of which a hostile kernel or a damaged recording could make anything.
        for kind in 0..kind::COUNT + 2 {
            for fill in [0_u64, 0xffff_ffff_ffff_ffff, 0x0102_0304_0506_0708] {
                let mut happened = Happened { event: Raw::default(), name: None };
                let words = [fill, fill];
                (happened.event.local, happened.event.peer) = (words, words);
                happened.event.family = fill as u16;
                happened.event.flags = fill as u8;
                happened.event.result = fill as i32;
                happened.event.comm = words;
                happened.event.kind = kind;
                let event = decode(&happened, SystemTime::UNIX_EPOCH);
                assert_eq!(event.is_some(), kind < kind::COUNT);
            }
        }
    }

    #[test]
    fn errors_have_their_names() {
        let check = |result: i32, name: Option<&str>| {
            assert_eq!(Outcome(result).errno().as_deref(), name);
        };
        check(0, None);
        check(3, None);
        check(-98, Some("EADDRINUSE"));
        check(-13, Some("EACCES"));
        check(-99, Some("EADDRNOTAVAIL"));
        check(-4000, Some("4000"));
        check(i32::MIN, Some("2147483647"));
    }
}
