//! Loads of a fixed count, from one thread to addresses of this machine only.

#[expect(dead_code, reason = "the tests need all of it")]
#[path = "../../tests/kernel/wire.rs"]
mod wire;

/// What `wire` needs of the tests' laboratory.
mod lab {
    use std::process::Command;

    pub(crate) fn ip(words: &str) {
        let status = Command::new("ip").args(words.split(' ')).status().expect("ip runs");
        assert!(status.success(), "ip {words}");
    }
}

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};
use wire::{ACK, Reply, SERVER4, SYN, Wire};

/// Takes the time of what is to be measured, and of nothing else.
pub(crate) trait Meter {
    fn measure(&mut self, round: &mut dyn FnMut());
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Socket, connect, accept, close with a reset, close.
    Connect,
    /// SYNs at a full accept queue, each dropped, with `tcp_syncookies` off.
    SynDrop,
    /// The same with cookies for every SYN (`tcp_syncookies` 2).
    SynDropCookies,
    /// SYNs that are answered and stay in the SYN queue.
    SynQueue,
    /// SYNs that are answered by cookies.
    SynCookie,
    /// The last ACKs of handshakes at a full accept queue, each dropped.
    AckDrop,
}

/// Packets in a round: sent within the second after which SYN-ACKs would be repeated.
const ROUND: u32 = 5_000;
/// Handshakes whose last ACK comes again and again; their SYN-ACKs fit the device's queue.
const HALF_OPEN: u16 = 200;
const FIRST_PORT: u16 = 10_000;

impl Load {
    pub(crate) const ALL: [Self; 6] = [
        Self::Connect,
        Self::SynDrop,
        Self::SynDropCookies,
        Self::SynQueue,
        Self::SynCookie,
        Self::AckDrop,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::SynDrop => "syn-drop",
            Self::SynDropCookies => "syn-drop-cookies",
            Self::SynQueue => "syn-queue",
            Self::SynCookie => "syn-cookie",
            Self::AckDrop => "ack-drop",
        }
    }

    /// What is counted.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Connect => "connections",
            Self::AckDrop => "ACKs",
            _ => "SYNs",
        }
    }

    /// Warms up, then does the work under the meter.
    pub(crate) fn run(self, count: u32, meter: &mut impl Meter) {
        match self {
            Self::Connect => connect(count, meter),
            Self::SynDrop => syn_drop(count, "0", meter),
            Self::SynDropCookies => syn_drop(count, "2", meter),
            Self::SynQueue => answered(count, "0", meter),
            Self::SynCookie => answered(count, "2", meter),
            Self::AckDrop => ack_drop(count, meter),
        }
    }
}

fn connect(count: u32, meter: &mut impl Meter) {
    let listener = listener(Ipv4Addr::LOCALHOST, 128);
    let address = address(&listener);
    let run = |count: u32| {
        for _ in 0..count {
            one_connection(&listener, &address);
        }
    };
    run(count / 10);
    meter.measure(&mut || run(count));
}

/// A connection from beginning to end.
pub(crate) fn one_connection(listener: &Socket, address: &SockAddr) {
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    client.connect(address).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    client.set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(client);
    drop(server);
}

fn syn_drop(count: u32, cookies: &str, meter: &mut impl Meter) {
    let mut wire = prepared(cookies);
    let listener = listener(SERVER4, 1);
    let to = address(&listener).as_socket().expect("an internet address");
    // It is full when there is one more than it has room for.
    wire.handshake(FIRST_PORT, to);
    wire.handshake(FIRST_PORT + 1, to);
    syns(&mut wire, to, ROUND / 10);
    for round in rounds(count) {
        meter.measure(&mut || syns(&mut wire, to, round));
    }
    assert_eq!(wire.syn_acks(), 0, "the accept queue is full");
}

/// A listener for each round: what stays in its SYN queue goes with it.
fn answered(count: u32, cookies: &str, meter: &mut impl Meter) {
    let mut wire = prepared(cookies);
    for round in rounds(count) {
        let listener = listener(SERVER4, 65_535);
        let to = address(&listener).as_socket().expect("an internet address");
        meter.measure(&mut || syns(&mut wire, to, round));
        assert_ne!(wire.syn_acks(), 0, "SYNs are answered");
    }
}

fn ack_drop(count: u32, meter: &mut impl Meter) {
    let mut wire = prepared("0");
    for round in rounds(count) {
        let listener = listener(SERVER4, 1024);
        let to = address(&listener).as_socket().expect("an internet address");
        wire.handshake(FIRST_PORT, to);
        wire.handshake(FIRST_PORT + 1, to);
        let half_open: Vec<Reply> = wire.syns(FIRST_PORT + 2, HALF_OPEN, to);
        assert_eq!(half_open.len(), usize::from(HALF_OPEN), "SYNs are answered");
        // From here on the accept queue is full, with the two that are in it.
        listener.listen(1).expect("listen");
        meter.measure(&mut || {
            for reply in half_open.iter().cycle().take(round as usize) {
                let acknowledged = reply.sequence.wrapping_add(1);
                wire.send_with(reply.port, to, ACK, 1001, acknowledged, b"");
            }
        });
    }
}

/// `count` in parts.
fn rounds(count: u32) -> impl Iterator<Item = u32> {
    (0..count).step_by(ROUND as usize).map(move |done| ROUND.min(count - done))
}

/// SYNs from different ports. Their answers are read after the round, as far as the device keeps them.
fn syns(wire: &mut Wire, to: SocketAddr, count: u32) {
    for (port, _) in (FIRST_PORT + 2..).zip(0..count) {
        wire.send(port, to, SYN, 1000);
    }
}

/// A wire, and a kernel with room for every SYN.
fn prepared(cookies: &str) -> Wire {
    let knobs = [
        ("core/somaxconn", "65535"),
        ("ipv4/tcp_max_syn_backlog", "262144"),
        ("ipv4/tcp_syncookies", cookies),
    ];
    for (knob, value) in knobs {
        std::fs::write(format!("/proc/sys/net/{knob}"), value).expect("a sysctl, as root");
    }
    Wire::new()
}

/// At a port that is free.
pub(crate) fn listener(address: Ipv4Addr, backlog: i32) -> Socket {
    listener_at((address, 0).into(), backlog)
}

pub(crate) fn listener_at(address: SocketAddr, backlog: i32) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&address.into()).expect("bind");
    socket.listen(backlog).expect("listen");
    socket
}

pub(crate) fn address(listener: &Socket) -> SockAddr {
    listener.local_addr().expect("a bound socket has an address")
}
