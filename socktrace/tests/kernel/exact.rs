//! Every packet a listener loses, by cause: what socktrace counted against what the kernel counted
//! in the same network namespace, and against what the client put on the wire.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::SocketAddr,
    os::fd::AsRawFd as _,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    lab::{Kind, Listener, Netns, connect, many_files, netns, ss_half_open, ss_queue},
    run::{Finished, Tracing, backends},
    wire::{ACK, RST, SERVER4, SERVER6, SYN, Wire},
};

/// The kernel's counters that a run explains.
const EXPLAINED: [&str; 7] = [
    "ListenOverflows",
    "ListenDrops",
    "TCPReqQFullDrop",
    "TCPReqQFullDoCookies",
    "SyncookiesSent",
    "SyncookiesRecv",
    "SyncookiesFailed",
];

type Counters = BTreeMap<String, u64>;

/// What the kernel counted in this thread's namespace.
fn counters() -> Counters {
    let mut counters = Counters::new();
    for file in ["netstat", "snmp"] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect(file);
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.chunks(2) {
            let names = pair[0].split(' ').skip(1);
            let values = pair[1].split(' ').skip(1);
            counters.extend(names.zip(values).map(|(name, value)| {
                // "-1": no limit to the number of connections.
                (name.to_owned(), value.parse().unwrap_or(0))
            }));
        }
    }
    counters
}

/// A namespace with a client on a wire, and a trace that runs.
struct Lab {
    backend: &'static str,
    wire: Wire,
    before: Counters,
    tracing: Tracing,
    /// Keeps records coming when nothing else listens.
    _keeper: Listener,
}

impl Lab {
    fn start(backend: &'static str) -> Self {
        let wire = Wire::new();
        let keeper = Listener::new("127.0.0.1:0", 1);
        let before = counters();
        let tracing = Tracing::start(backend, &["-i", "300ms"]);
        Self { backend, wire, before, tracing, _keeper: keeper }
    }

    fn listen(&self, backlog: i32) -> Listener {
        Listener::new(&format!("{SERVER4}:0"), backlog)
    }

    /// Makes `count` connections that wait to be accepted, from the client's port `first` on.
    fn fill(&mut self, listener: SocketAddr, first: u16, count: u16) {
        for port in first..first + count {
            self.wire.handshake(port, listener);
        }
    }

    /// Ends the trace, and compares all that it says of this namespace with the kernel.
    fn finish(self, name: &str) -> Outcome {
        self.tracing.wait_interval();
        let run = self.tracing.stop();
        let after = counters();
        let kernel: Counters = after
            .into_iter()
            .map(|(name, value)| {
                let before = self.before.get(&name).copied().unwrap_or(0);
                (name, value.wrapping_sub(before))
            })
            .collect();
        let outcome = Outcome { what: format!("{name}, {}", self.backend), kernel, run };
        outcome.check();
        outcome
    }
}

/// What a workload came to.
struct Outcome {
    what: String,
    kernel: Counters,
    run: Finished,
}

impl Outcome {
    /// A total of a listener at its end; a dot leads into `drops`.
    fn total(&self, id: &str, name: &str) -> u64 {
        let record = self.run.last_of(id);
        let value = match name.split_once('.') {
            Some((outer, inner)) => &record["totals"][outer][inner],
            None => &record["totals"][name],
        };
        value.as_u64().unwrap_or_else(|| panic!("{}: {name} is unknown: {record:#}", self.what))
    }

    fn totals(&self, id: &str, expect: &[(&str, u64)]) {
        for (name, count) in expect {
            let is = self.total(id, name);
            assert_eq!(
                is,
                *count,
                "{}: {name} of {id}: {:#}",
                self.what,
                self.run.last_of(id)["totals"]
            );
        }
    }

    /// Everything that is lost in this outcome is these.
    fn drops(&self, id: &str, expect: &[(&str, u64)]) {
        for cause in [
            "accept_queue_full_on_syn",
            "accept_queue_full_on_ack",
            "syn_queue_full",
            "syn_backlog_reserve",
            "other",
        ] {
            let count =
                expect.iter().find(|(name, _)| *name == cause).map_or(0, |(_, count)| *count);
            self.totals(id, &[(&format!("drops.{cause}"), count)]);
        }
    }

    fn kernel(&self, name: &str) -> u64 {
        *self.kernel.get(name).unwrap_or_else(|| panic!("the kernel has no counter {name}"))
    }

    /// The account of the run, its listeners' totals and the kernel agree.
    fn check(&self) {
        let netns = netns();
        let summary = self.run.summary();
        let mut last: BTreeMap<&str, &Value> = BTreeMap::new();
        for record in &self.run.records {
            if record["listener"]["netns"] == netns {
                last.insert(record["listener"]["id"].as_str().expect("id"), record);
            }
        }
        let sum = |names: &[&str]| -> u64 {
            let one = |record: &Value, name: &str| {
                let totals = &record["totals"];
                let value = totals["drops"].get(name).unwrap_or(&totals[name]);
                value.as_u64().unwrap_or_else(|| panic!("{}: {name}: {record:#}", self.what))
            };
            last.values().flat_map(|record| names.iter().map(move |name| one(record, name))).sum()
        };
        println!(
            "{}:\n  {:<21} {:>7} {:>9} {:>10}",
            self.what, "", "kernel", "socktrace", "listeners"
        );
        for counter in EXPLAINED {
            let kernel = self.kernel(counter);
            let all = summary["reconciliation"].as_array().expect("reconciliation");
            let one = all
                .iter()
                .find(|one| one["netns"] == netns && one["counter"] == counter)
                .unwrap_or_else(|| panic!("{}: no {counter}: {summary:#}", self.what));
            let listeners = match counter {
                "ListenOverflows" => {
                    Some(sum(&["accept_queue_full_on_syn", "accept_queue_full_on_ack"]))
                }
                "ListenDrops" => Some(sum(&[
                    "accept_queue_full_on_syn",
                    "accept_queue_full_on_ack",
                    "syn_queue_full",
                    "syn_backlog_reserve",
                    "other",
                ])),
                "TCPReqQFullDrop" => Some(sum(&["syn_queue_full"])),
                "SyncookiesSent" => Some(sum(&["cookies_sent"])),
                "SyncookiesRecv" => Some(sum(&["cookies_accepted"])),
                "SyncookiesFailed" => Some(sum(&["cookies_failed"])),
                _ => None,
            };
            let shown = listeners.map_or_else(|| "-".to_owned(), |n| n.to_string());
            println!("  {counter:<21} {kernel:>7} {:>9} {shown:>10}", one["socktrace"]);
            assert_eq!(one["kernel"], kernel, "{}: {counter}", self.what);
            assert_eq!(one["socktrace"], kernel, "{}: {counter}: {last:#?}", self.what);
            assert_eq!(one["unexplained"], 0, "{}: {counter}", self.what);
            if let Some(listeners) = listeners {
                assert_eq!(listeners, kernel, "{}: {counter}: {last:#?}", self.what);
            }
        }
        assert_eq!(summary["lost_events"], 0, "{}: {:#?}", self.what, self.run.stderr);
    }
}

/// A workload on every backend that counts, each in a namespace of its own.
fn on_each(name: &str, work: impl Fn(&mut Lab) + Sync, check: impl Fn(&Outcome) + Sync) {
    for &backend in backends().iter().filter(|backend| **backend != "tracepoint") {
        let netns = Netns::new("exact");
        netns.within(|| {
            let mut lab = Lab::start(backend);
            work(&mut lab);
            let outcome = lab.finish(name);
            check(&outcome);
        });
    }
}

fn sysctl(name: &str, value: impl std::fmt::Display) {
    let path = format!("/proc/sys/net/ipv4/{name}");
    std::fs::write(&path, format!("{value}")).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// What a workload leaves for its check: the workload runs on another thread.
type Note<T> = std::sync::Mutex<Option<T>>;

fn note<T>(note: &Note<T>, value: T) {
    *note.lock().expect("lock") = Some(value);
}

fn noted<T>(note: &Note<T>) -> T {
    note.lock().expect("lock").take().expect("the workload ran")
}

/// `setsockopt` with a number.
fn set_option(socket: &Socket, option: i32, value: i32) {
    // SAFETY: the kernel reads four bytes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            4,
        )
    };
    assert_eq!(result, 0, "setsockopt {option}: {}", std::io::Error::last_os_error());
}

#[test]
fn a_full_accept_queue_drops_syns() {
    let id = Note::default();
    on_each(
        "accept queue full on SYN",
        |lab| {
            let listener = lab.listen(2);
            lab.fill(listener.address, 20_000, 3);
            // Seven that find the queue full, and one of them again: it is a packet.
            assert!(lab.wire.syns(21_000, 7, listener.address).is_empty());
            assert!(lab.wire.syns(21_000, 1, listener.address).is_empty());
            assert_eq!(ss_queue(listener.inode), (3, 2));
            note(&id, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&id);
            outcome.drops(&id, &[("accept_queue_full_on_syn", 8)]);
            outcome.totals(
                &id,
                &[("syns", 11), ("requests_queued", 3), ("established", 3), ("accepted", 0)],
            );
        },
    );
}

#[test]
fn a_full_accept_queue_drops_final_acks() {
    for abort in [0, 1] {
        let left = Note::default();
        on_each(
            &format!("accept queue full on ACK, abort {abort}"),
            |lab| {
                sysctl("tcp_abort_on_overflow", abort);
                let listener = lab.listen(4);
                lab.fill(listener.address, 20_000, 3);
                let syn_acks = lab.wire.syns(21_000, 4, listener.address);
                assert_eq!(syn_acks.len(), 4);
                // Two fit in, two do not.
                lab.wire.acks(listener.address, &syn_acks);
                assert_eq!(ss_queue(listener.inode), (5, 4));
                let resets = lab.wire.replies().iter().filter(|reply| reply.is_reset()).count();
                assert_eq!(resets, if abort == 1 { 2 } else { 0 }, "RSTs on the wire");
                note(&left, (listener.id(), listener));
            },
            |outcome| {
                let (id, _) = noted(&left);
                outcome.drops(&id, &[("accept_queue_full_on_ack", 2)]);
                let resets = if abort == 1 { 2 } else { 0 };
                assert_eq!(outcome.kernel("EmbryonicRsts"), resets);
                outcome.totals(
                    &id,
                    &[
                        ("syns", 7),
                        ("requests_queued", 7),
                        ("established", 5),
                        ("resets_on_overflow", resets),
                        ("requests_reset", 0),
                    ],
                );
            },
        );
    }
}

#[test]
fn a_full_syn_queue_drops_or_answers_with_cookies() {
    for cookies in [0, 1, 2] {
        let left = Note::default();
        on_each(
            &format!("30 SYNs at backlog 8, cookies {cookies}"),
            |lab| {
                sysctl("tcp_syncookies", cookies);
                let listener = lab.listen(8);
                let answers = lab.wire.syns(20_000, 30, listener.address).len();
                let kept = ss_half_open(listener.port());
                note(&left, (listener.id(), answers, kept, listener));
            },
            |outcome| {
                let (id, answers, kept, _) = noted(&left);
                let (answers, kept) = (answers as u64, kept as u64);
                // 8 or 9: `>=` became `>` in the middle of stable series.
                match cookies {
                    0 => assert!(answers == kept && (8..=9).contains(&kept), "{answers} {kept}"),
                    1 => assert!(answers == 30 && (8..=9).contains(&kept), "{answers} {kept}"),
                    _ => assert_eq!((answers, kept), (30, 0)),
                }
                outcome.drops(&id, &[("syn_queue_full", 30 - answers)]);
                outcome.totals(
                    &id,
                    &[("syns", 30), ("requests_queued", kept), ("cookies_sent", answers - kept)],
                );
                let queue = &outcome.run.last_of(&id)["syn_queue"];
                let rule = if cookies == 2 { "syncookies" } else { "backlog" };
                assert_eq!(queue["limit_rule"], rule, "{}", outcome.what);
                // How many fit was seen, not assumed.
                assert_eq!(queue["capacity"], kept, "{}: {queue}", outcome.what);
            },
        );
    }
}

#[test]
fn the_last_quarter_is_kept_for_known_peers() {
    for (most, kept) in [(128_u64, 97_u64), (64, 49)] {
        let left = Note::default();
        on_each(
            &format!("300 SYNs at backlog 4096, tcp_max_syn_backlog {most}"),
            |lab| {
                sysctl("tcp_syncookies", 0);
                sysctl("tcp_max_syn_backlog", most);
                let listener = lab.listen(4096);
                let answers = lab.wire.syns(20_000, 300, listener.address).len();
                assert_eq!(answers as u64, kept, "SYN-ACKs on the wire");
                note(&left, (listener.id(), listener));
            },
            |outcome| {
                let (id, _) = noted(&left);
                outcome.drops(&id, &[("syn_backlog_reserve", 300 - kept)]);
                outcome.totals(&id, &[("syns", 300), ("requests_queued", kept)]);
                let queue = &outcome.run.last_of(&id)["syn_queue"];
                assert_eq!(queue["limit_rule"], "max_syn_backlog");
                assert_eq!(
                    (&queue["limit"], &queue["capacity"]),
                    (&(kept - 1).into(), &kept.into())
                );
                assert_eq!(queue["peak"], kept);
            },
        );
    }
}

#[test]
fn cookies_come_back_to_a_full_queue_or_forged() {
    let left = Note::default();
    on_each(
        "5 cookies at backlog 2, 3 forged",
        |lab| {
            sysctl("tcp_syncookies", 2);
            let listener = lab.listen(2);
            let syn_acks = lab.wire.syns(20_000, 5, listener.address);
            assert_eq!(syn_acks.len(), 5);
            lab.wire.acks(listener.address, &syn_acks);
            for port in 22_000..22_003 {
                lab.wire.send_with(port, listener.address, ACK, 77, 4242, b"");
            }
            assert_eq!(ss_queue(listener.inode), (3, 2));
            note(&left, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&left);
            outcome.drops(&id, &[("accept_queue_full_on_ack", 2)]);
            outcome.totals(
                &id,
                &[
                    ("syns", 5),
                    ("requests_queued", 0),
                    ("cookies_sent", 5),
                    ("cookies_accepted", 5),
                    ("cookies_overflowed", 2),
                    ("cookies_failed", 3),
                    ("established", 3),
                ],
            );
        },
    );
}

#[test]
fn one_dead_member_of_a_group_is_told_from_the_others() {
    let left = Note::default();
    on_each(
        "SO_REUSEPORT, one of three never accepts",
        |lab| {
            let kind = Kind { reuseport: true, ..Kind::default() };
            let first = Listener::with(&format!("{SERVER4}:0"), 4, kind);
            let address = first.address;
            let same = || Listener::with(&address.to_string(), 4, kind);
            let members = [first, same(), same()];
            let mut accepted = 0;
            for port in 20_000..20_060 {
                lab.wire.send(port, address, SYN, 1000);
                let syn_acks = lab.wire.replies();
                lab.wire.acks(address, &syn_acks);
                accepted += members[1].drain() + members[2].drain();
            }
            assert_eq!(ss_queue(members[0].inode), (5, 4), "60 clients fill one of three");
            let ids = members.each_ref().map(Listener::id);
            note(&left, (ids, accepted, members));
        },
        |outcome| {
            let ([dead, second, third], accepted, _) = noted(&left);
            let lost = outcome.kernel("ListenOverflows");
            assert!(lost > 0);
            outcome.drops(&dead, &[("accept_queue_full_on_syn", lost)]);
            outcome.drops(&second, &[]);
            outcome.drops(&third, &[]);
            outcome.totals(&dead, &[("established", 5), ("accepted", 0), ("syns", 5 + lost)]);
            let sum = outcome.total(&second, "accepted") + outcome.total(&third, "accepted");
            assert_eq!(sum, accepted as u64);
            assert_eq!(sum, 60 - 5 - lost);
        },
    );
}

#[test]
fn ipv6_and_mapped_clients_are_counted_once() {
    for server in [SocketAddr::from((SERVER6, 0)), SocketAddr::from((SERVER4, 0))] {
        let left = Note::default();
        on_each(
            &format!("[::] listener, client of {}", server.ip()),
            |lab| {
                let kind = Kind { v6only: Some(false), ..Kind::default() };
                let listener = Listener::with("[::]:0", 2, kind);
                let address = SocketAddr::new(server.ip(), listener.port());
                let half_open = lab.wire.syns(21_000, 1, address);
                assert_eq!(half_open.len(), 1);
                lab.fill(address, 20_000, 3);
                lab.wire.acks(address, &half_open);
                assert!(lab.wire.syns(22_000, 4, address).is_empty());
                assert_eq!(listener.drain(), 3);
                note(&left, (listener.id(), listener));
            },
            |outcome| {
                let (id, _) = noted(&left);
                outcome.drops(
                    &id,
                    &[("accept_queue_full_on_syn", 4), ("accept_queue_full_on_ack", 1)],
                );
                outcome.totals(&id, &[("syns", 8), ("established", 3), ("accepted", 3)]);
            },
        );
    }
}

#[test]
fn an_mptcp_listener_is_counted_once() {
    if !Path::new("/proc/sys/net/mptcp/enabled").exists() {
        // That the kernel says so is all there is to assert.
        let refused = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(262)));
        assert!(refused.is_err(), "no MPTCP in /proc/sys, but sockets of it");
        return;
    }
    let left = Note::default();
    on_each(
        "MPTCP listener, plain and MPTCP clients",
        |lab| {
            let kind = Kind { mptcp: true, ..Kind::default() };
            let listener = Listener::with("0.0.0.0:0", 3, kind);
            let wire = SocketAddr::from((SERVER4, listener.port()));
            let local = SocketAddr::from(([127, 0, 0, 1], listener.port()));
            lab.fill(wire, 20_000, 2);
            assert_eq!(listener.drain(), 2);
            let clients: Vec<Socket> = (0..2)
                .map(|_| {
                    let protocol = Some(Protocol::from(262));
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, protocol).expect("MPTCP");
                    socket.connect(&local.into()).expect("connect");
                    socket
                })
                .collect();
            assert_eq!(listener.drain(), 2);
            lab.fill(wire, 21_000, 4);
            assert!(lab.wire.syns(22_000, 5, wire).is_empty());
            note(&left, (listener.id(), listener, clients));
        },
        |outcome| {
            let (id, ..) = noted(&left);
            outcome.drops(&id, &[("accept_queue_full_on_syn", 5)]);
            outcome.totals(&id, &[("syns", 13), ("established", 8), ("accepted", 4)]);
            assert_eq!(outcome.run.last_of(&id)["accept_wait"]["count"], 4);
            assert_eq!(outcome.run.last_of(&id)["listener"]["transport"], "mptcp");
        },
    );
}

#[test]
fn deferred_acks_are_no_loss() {
    const TCP_DEFER_ACCEPT: i32 = 9;
    let left = Note::default();
    on_each(
        "TCP_DEFER_ACCEPT",
        |lab| {
            let listener = lab.listen(8);
            set_option(&listener.socket, TCP_DEFER_ACCEPT, 30);
            let syn_acks = lab.wire.syns(20_000, 4, listener.address);
            lab.wire.acks(listener.address, &syn_acks);
            assert_eq!(ss_queue(listener.inode), (0, 8));
            // What the client has to say lets two of them in.
            for reply in &syn_acks[..2] {
                let acknowledged = reply.sequence.wrapping_add(1);
                lab.wire.send_with(reply.port, listener.address, ACK, 1001, acknowledged, b"GET");
            }
            assert_eq!(ss_queue(listener.inode), (2, 8));
            note(&left, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&left);
            assert_eq!(outcome.kernel("TCPDeferAcceptDrop"), 4);
            outcome.drops(&id, &[]);
            outcome.totals(&id, &[("acks_deferred", 4), ("established", 2), ("syns", 4)]);
        },
    );
}

#[test]
fn fast_open_has_its_own_limit() {
    /// `TFO_SERVER_ENABLE | TFO_SERVER_COOKIE_NOT_REQD`: a SYN with data is enough.
    const WITHOUT_COOKIE: u32 = 0x202;
    const TCP_FASTOPEN: i32 = 23;
    let left = Note::default();
    on_each(
        "Fast Open, 2 of 5 fit",
        |lab| {
            sysctl("tcp_fastopen", WITHOUT_COOKIE);
            let listener = lab.listen(16);
            set_option(&listener.socket, TCP_FASTOPEN, 2);
            for port in 20_000..20_005 {
                lab.wire.send_with(port, listener.address, SYN, 1000, 0, b"GET");
            }
            let answers = lab.wire.replies().iter().filter(|reply| reply.is_syn_ack()).count();
            assert_eq!(answers, 5, "SYN-ACKs");
            let fast = ss_queue(listener.inode).0;
            assert_eq!(fast, 2, "accepted with their SYN");
            assert_eq!(listener.drain(), 2);
            note(&left, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&left);
            assert_eq!(outcome.kernel("TCPFastOpenPassive"), 2);
            assert_eq!(outcome.kernel("TCPFastOpenListenOverflow"), 3);
            outcome.drops(&id, &[]);
            outcome.totals(
                &id,
                &[
                    ("syns", 5),
                    ("fastopen_established", 2),
                    ("fastopen_queue_full", 3),
                    ("requests_queued", 3),
                    ("established", 2),
                    ("accepted", 2),
                ],
            );
            let record = outcome.run.last_of(&id);
            assert_eq!(record["handshake"]["count"], 0, "{}", outcome.what);
            let max = record["accept_wait"]["max_us"].as_u64().expect("a wait");
            assert!(max < 60_000_000, "{}: {max}", outcome.what);
        },
    );
}

#[test]
fn both_queues_are_lost_when_a_listener_closes() {
    let left = Note::default();
    on_each(
        "closed with 5 connections and 3 requests",
        |lab| {
            let listener = lab.listen(16);
            lab.fill(listener.address, 20_000, 5);
            assert_eq!(lab.wire.syns(21_000, 3, listener.address).len(), 3);
            lab.tracing.wait_interval();
            let id = listener.id();
            drop(listener);
            let resets = lab.wire.replies().iter().filter(|reply| reply.is_reset()).count();
            assert_eq!(resets, 5, "RSTs on the wire");
            lab.tracing.wait_interval();
            note(&left, id);
        },
        |outcome| {
            let id = noted(&left);
            outcome.totals(&id, &[("lost_on_close", 8), ("established", 5), ("migrated_out", 0)]);
            let records = outcome.run.of(&id);
            assert_eq!(records.iter().filter(|record| record["closed"] == true).count(), 1);
            assert_eq!(outcome.run.last_of(&id)["closed"], true);
        },
    );
}

#[test]
fn connections_of_a_closed_member_migrate() {
    let knob = Path::new("/proc/sys/net/ipv4/tcp_migrate_req");
    if !knob.exists() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
        assert!(release.starts_with("5.10."), "{release} has no tcp_migrate_req");
        return;
    }
    let left = Note::default();
    on_each(
        "closed with tcp_migrate_req",
        |lab| {
            sysctl("tcp_migrate_req", 1);
            let kind = Kind { reuseport: true, ..Kind::default() };
            let closing = Listener::with(&format!("{SERVER4}:0"), 16, kind);
            let address = closing.address;
            lab.fill(address, 20_000, 5);
            let half_open = lab.wire.syns(21_000, 3, address);
            assert_eq!(half_open.len(), 3);
            let heir = Listener::with(&address.to_string(), 16, kind);
            lab.tracing.wait_interval();
            let id = closing.id();
            drop(closing);
            let resets = lab.wire.replies().iter().filter(|reply| reply.is_reset()).count();
            assert_eq!(resets, 0, "RSTs on the wire");
            // The half-open ones move with their ACK.
            lab.wire.acks(address, &half_open);
            lab.tracing.wait_interval();
            assert_eq!(ss_queue(heir.inode), (8, 16));
            assert_eq!(heir.drain(), 8);
            note(&left, (id, heir.id(), heir));
        },
        |outcome| {
            let (closed, heir, _) = noted(&left);
            assert_eq!(outcome.kernel("TCPMigrateReqSuccess"), 8);
            outcome.totals(&closed, &[("lost_on_close", 0), ("migrated_out", 5)]);
            outcome.totals(&heir, &[("migrated_in", 8), ("accepted", 8), ("established", 3)]);
            assert_eq!(outcome.run.last_of(&heir)["accept_wait"]["count"], 8);
        },
    );
}

#[test]
fn a_second_listen_moves_the_point_of_loss() {
    let left = Note::default();
    on_each(
        "listen(2), full, listen(5)",
        |lab| {
            let listener = lab.listen(2);
            lab.fill(listener.address, 20_000, 3);
            assert!(lab.wire.syns(21_000, 2, listener.address).is_empty());
            listener.socket.listen(5).expect("listen again");
            lab.fill(listener.address, 22_000, 3);
            assert!(lab.wire.syns(23_000, 4, listener.address).is_empty());
            note(&left, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&left);
            outcome.drops(&id, &[("accept_queue_full_on_syn", 6)]);
            outcome.totals(&id, &[("established", 6), ("syns", 12)]);
            assert_eq!(outcome.run.last_of(&id)["backlog"]["requested"], 5);
        },
    );
}

#[test]
fn requests_expire_or_are_reset() {
    let left = Note::default();
    on_each(
        "5 requests expire, 4 are reset, 2 unreachable",
        |lab| {
            sysctl("tcp_synack_retries", 1);
            let listener = lab.listen(64);
            let silent = lab.wire.syns(20_000, 5, listener.address).len();
            let reset = lab.wire.syns(21_000, 4, listener.address);
            for reply in &reset {
                lab.wire.send(reply.port, listener.address, RST, 1001);
            }
            let unreachable = lab.wire.syns(22_000, 2, listener.address);
            for reply in &unreachable {
                lab.wire.unreachable(listener.address, reply);
            }
            // A SYN that comes again is answered again, from the request there is.
            lab.wire.send(20_000, listener.address, SYN, 1000);
            let mut answers = silent + reset.len() + unreachable.len();
            assert_eq!(answers, 11);
            let deadline = Instant::now() + Duration::from_secs(30);
            while ss_half_open(listener.port()) > 0 {
                assert!(Instant::now() < deadline, "half-open requests stay");
                answers += lab.wire.syn_acks();
            }
            note(&left, (listener.id(), answers as u64, listener));
        },
        |outcome| {
            let (id, answers, _) = noted(&left);
            outcome.drops(&id, &[("other", 2)]);
            assert_eq!(outcome.kernel("EmbryonicRsts"), 4);
            outcome.totals(
                &id,
                &[
                    ("syns", 12),
                    ("requests_queued", 11),
                    ("requests_expired", 5),
                    ("requests_reset", 4),
                    ("synack_retransmits", answers - 11),
                    ("established", 0),
                ],
            );
            assert_eq!(outcome.kernel("TCPSynRetrans"), answers - 11);
        },
    );
}

#[test]
fn waits_and_handshakes_take_as_long_as_they_take() {
    const PAUSE: Duration = Duration::from_millis(300);
    let left = Note::default();
    on_each(
        "handshakes and accepts after a pause",
        |lab| {
            let listener = lab.listen(64);
            let began = Instant::now();
            let syn_acks = lab.wire.syns(20_000, 20, listener.address);
            std::thread::sleep(PAUSE);
            let established = Instant::now();
            lab.wire.acks(listener.address, &syn_acks);
            let handshake = began.elapsed();
            std::thread::sleep(PAUSE);
            lab.tracing.wait_interval();
            assert_eq!(listener.drain(), 20);
            let wait = established.elapsed();
            note(&left, (listener.id(), handshake, wait, listener));
        },
        |outcome| {
            let (id, handshake, wait, _) = noted(&left);
            let record = outcome.run.last_of(&id);
            for (name, most) in [("handshake", handshake), ("accept_wait", wait)] {
                let times = &record[name];
                assert_eq!(times["count"], 20, "{}: {times}", outcome.what);
                let us = |key: &str| u128::from(times[key].as_u64().expect("a time"));
                let range = PAUSE.as_micros()..=most.as_micros();
                assert!(
                    range.contains(&us("max_us")),
                    "{}: {name} {times} {range:?}",
                    outcome.what
                );
                for key in ["p50_us", "p90_us", "p99_us"] {
                    let (low, high) = (PAUSE.as_micros() * 9 / 10, most.as_micros() * 11 / 10);
                    assert!((low..=high).contains(&us(key)), "{}: {name} {times}", outcome.what);
                }
            }
            // While they waited, the oldest of them was known.
            let oldest =
                outcome.run.of(&id).into_iter().filter_map(|r| r["oldest_wait_ms"].as_u64());
            let oldest = oldest.max().expect("waiting connections");
            assert!(u128::from(oldest) <= wait.as_millis(), "{}: {oldest} ms", outcome.what);
            assert!(record["oldest_wait_ms"].is_null());
            assert!(record["last_accept_age_ms"].is_u64());
        },
    );
}

/// Programs that call `accept()` before there is anything to accept.
#[test]
fn no_wait_is_missed_when_accept_blocks() {
    const THREADS: usize = 64;
    let left = Note::default();
    on_each(
        "64 threads in accept()",
        |_| {
            let listener = Listener::new("127.0.0.1:0", 128);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| listener.socket.accept().expect("accept"));
                }
                std::thread::sleep(Duration::from_millis(300));
                let clients = connect(listener.address, THREADS);
                drop(clients);
            });
            note(&left, (listener.id(), listener));
        },
        |outcome| {
            let (id, _) = noted(&left);
            let all = THREADS as u64;
            outcome.totals(&id, &[("accepted", all), ("established", all)]);
            assert_eq!(outcome.run.last_of(&id)["accept_wait"]["count"], all);
        },
    );
}

/// Connections that waited before the trace began are counted when they are accepted.
#[test]
fn older_connections_are_known_when_they_are_accepted() {
    for &backend in backends().iter().filter(|backend| **backend != "tracepoint") {
        let listener = Listener::new("127.0.0.1:0", 200);
        let clients = connect(listener.address, 150);
        assert_eq!(ss_queue(listener.inode), (150, 200));
        let waiting = Instant::now();
        std::thread::sleep(Duration::from_millis(500));
        let tracing = Tracing::start(backend, &["-i", "300ms"]);
        assert_eq!(listener.drain(), 150);
        let most = waiting.elapsed() + Duration::from_secs(1);
        tracing.wait_interval();
        let run = tracing.stop();
        let record = run.last_of(&listener.id());
        assert_eq!(record["totals"]["accepted"], 150, "{backend}");
        assert_eq!(record["totals"]["established"], 0, "{backend}");
        assert_eq!(record["accept_wait"]["count"], 150, "{backend}");
        let p50 = u128::from(record["accept_wait"]["p50_us"].as_u64().expect("a time"));
        assert!((450_000..most.as_micros()).contains(&p50), "{backend}: {p50}");
        drop(clients);
    }
}

/// 10,000 connections from several threads, accepted by several others, into a queue that overflows
/// now and then.
#[test]
fn nothing_is_miscounted_in_a_race() {
    const CLIENTS: usize = 4;
    const EACH: usize = 2500;
    many_files();
    let left = Note::default();
    on_each(
        "10,000 connections, accepts racing",
        |_| {
            let listener = Listener::new("127.0.0.1:0", 8);
            let accepted = AtomicUsize::new(0);
            let done = AtomicBool::new(false);
            listener.socket.set_nonblocking(true).expect("O_NONBLOCK");
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !done.load(Ordering::Acquire)
                            || listener.socket.accept().is_ok_and(|_| {
                                accepted.fetch_add(1, Ordering::Relaxed);
                                true
                            })
                        {
                            while listener.socket.accept().is_ok() {
                                accepted.fetch_add(1, Ordering::Relaxed);
                            }
                            std::thread::yield_now();
                        }
                    });
                }
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|_| {
                        scope.spawn(|| {
                            for _ in 0..EACH {
                                let socket =
                                    Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
                                socket.set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
                                socket.connect(&listener.address.into()).expect("connect");
                            }
                        })
                    })
                    .collect();
                for client in clients {
                    client.join().expect("a client");
                }
                done.store(true, Ordering::Release);
            });
            std::io::stdout().flush().expect("stdout");
            note(&left, (listener.id(), accepted.into_inner(), listener));
        },
        |outcome| {
            let (id, accepted, _) = noted(&left);
            // A client whose last ACK was dropped believes in its connection; its reset ends a request.
            assert!(accepted > CLIENTS * EACH * 9 / 10, "{}: {accepted}", outcome.what);
            let all = accepted as u64;
            let lost = outcome.kernel("ListenDrops");
            let dropped: u64 = ["drops.accept_queue_full_on_syn", "drops.accept_queue_full_on_ack"]
                .iter()
                .map(|name| outcome.total(&id, name))
                .sum();
            assert_eq!(dropped, lost);
            outcome.totals(&id, &[("established", all), ("accepted", all)]);
            let record = outcome.run.last_of(&id);
            assert_eq!(record["accept_wait"]["count"], all);
        },
    );
}

/// Another socket at a dead one's address begins at zero.
#[test]
fn a_reused_address_begins_at_zero() {
    const ROUNDS: usize = 40;
    let left = Note::default();
    on_each(
        "40 listeners one after another",
        |lab| {
            let address = format!("{SERVER4}:7777");
            let mut ids = Vec::new();
            for round in 0..ROUNDS {
                let listener = Listener::new(&address, 0);
                let port = 20_000 + u16::try_from(round * 4).expect("a port");
                lab.fill(listener.address, port, 1);
                assert!(lab.wire.syns(port + 1, 2, listener.address).is_empty());
                ids.push(listener.id());
            }
            note(&left, ids);
        },
        |outcome| {
            for id in noted(&left) {
                outcome.drops(&id, &[("accept_queue_full_on_syn", 2)]);
                outcome.totals(&id, &[("syns", 3), ("established", 1), ("lost_on_close", 1)]);
            }
        },
    );
}
