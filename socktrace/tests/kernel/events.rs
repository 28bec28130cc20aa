//! The stream of events: what happens to listeners and connections.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::{
    lab::{Listener, Netns, connected, ip},
    run::{
        Finished, PATIENCE, Tracing, backends, has_kprobes, in_vm, output, read_all, sees_calls,
        signal, start, stderr, wait,
    },
    wire::{RST, SERVER4, SYN, Wire},
};

/// A prime.
const CONNECTIONS: usize = 23;

/// A traced network namespace of its own.
pub(crate) fn trace(backend: &str, netns: &Netns, arguments: &[&str]) -> Tracing {
    let mut all = vec!["-N", &netns.name];
    all.extend(arguments);
    Tracing::verb("events", backend, &all)
}

/// Waits until everything that has happened was printed: the ring buffer is emptied all the time.
pub(crate) fn settle(tracing: &Tracing, kind: &str, count: usize) {
    tracing.wait_events(|records| {
        records.iter().filter(|record| record["kind"] == kind).count() >= count
    });
    std::thread::sleep(Duration::from_millis(300));
}

pub(crate) fn end(value: &Value) -> SocketAddr {
    let address = value["address"].as_str().unwrap_or_else(|| panic!("no address: {value}"));
    let port = value["port"].as_u64().expect("a port");
    SocketAddr::new(address.parse().expect("an address"), u16::try_from(port).expect("a port"))
}

fn pid() -> Value {
    std::process::id().into()
}

fn times_rise(run: &Finished) {
    let times: Vec<&str> = run
        .records
        .iter()
        .filter(|record| record["type"] == "event")
        .map(|record| record["time"].as_str().expect("a time"))
        .collect();
    assert!(times.is_sorted(), "{times:#?}");
}

/// 23 connections from beginning to end: every step of each is there once, and all of them agree with what
/// the sockets themselves say.
#[test]
fn every_step_of_a_connection_is_an_event() {
    for backend in backends() {
        for server in ["127.0.0.1:0", "[::1]:0"] {
            let netns = Netns::new("steps");
            let tracing = trace(backend, &netns, &[]);
            let (listener, clients, inodes) = netns.within(|| {
                let listener = Listener::new(server, 64);
                let clients = connected(listener.address, CONNECTIONS);
                let accepted: Vec<_> =
                    (0..CONNECTIONS).map(|_| listener.socket.accept().expect("accept").0).collect();
                let inodes: BTreeSet<u64> = accepted.iter().map(inode).collect();
                let peers: BTreeSet<SocketAddr> = clients.iter().map(local).collect();
                // Both ends at once would leave the ports in TIME_WAIT.
                (listener, peers, inodes)
            });
            let (id, address) = (listener.id(), listener.address);
            settle(&tracing, "established", CONNECTIONS);
            netns.within(|| drop(listener));
            settle(&tracing, "close", 1);
            let run = tracing.stop();
            let what = format!("{backend}, {server}");
            times_rise(&run);
            for kind in ["syn", "established"] {
                check_peers(&run, kind, &id, &clients, &what);
            }
            for record in run.events("established") {
                let known = record["handshake_us"].is_u64();
                assert_eq!(known, backend != &"tracepoint", "{what}: {record:#}");
            }
            let close = run.events("close");
            assert_eq!(close.len(), 1, "{what}");
            assert_eq!(close[0]["listener"]["id"], id.as_str(), "{what}");
            assert_eq!(close[0]["lost_on_close"], 0, "{what}: {:#}", close[0]);
            assert_eq!(close[0]["pid"], pid(), "{what}");
            if sees_calls(backend) {
                check_peers(&run, "accept", &id, &clients, &what);
                let accepted = run.events("accept");
                let seen: BTreeSet<u64> =
                    accepted.iter().filter_map(|r| r["accepted"]["inode"].as_u64()).collect();
                assert_eq!(seen, inodes, "{what}: the sockets that accept() gave out");
                assert!(accepted.iter().all(|r| r["accept_wait_us"].is_u64()), "{what}");
                assert!(accepted.iter().all(|r| r["pid"] == pid()), "{what}");
                check_calls(&run, address, &clients, &what);
            }
            let summary = run.summary();
            assert_eq!(summary["lost_events"], 0, "{what}: {summary:#}");
            let events = run.records.iter().filter(|record| record["type"] == "event").count();
            assert_eq!(summary["events"], events, "{what}");
        }
    }
}

fn inode(socket: &socket2::Socket) -> u64 {
    use std::os::{fd::AsRawFd as _, unix::fs::MetadataExt as _};
    let path = format!("/proc/thread-self/fd/{}", socket.as_raw_fd());
    std::fs::metadata(path).expect("stat").ino()
}

fn local(socket: &socket2::Socket) -> SocketAddr {
    socket.local_addr().expect("a name").as_socket().expect("an internet address")
}

fn check_peers(run: &Finished, kind: &str, id: &str, clients: &BTreeSet<SocketAddr>, what: &str) {
    let events = run.events(kind);
    let peers: BTreeSet<SocketAddr> = events.iter().map(|record| end(&record["peer"])).collect();
    assert_eq!(events.len(), CONNECTIONS, "{what}: {kind}");
    assert_eq!(peers, *clients, "{what}: {kind}");
    assert!(events.iter().all(|r| r["listener"]["id"] == id), "{what}: {kind}: {events:#?}");
}

/// What the programs called: `socket`, `bind` by hand and by the kernel, `listen`, `connect`.
fn check_calls(run: &Finished, address: SocketAddr, clients: &BTreeSet<SocketAddr>, what: &str) {
    let sockets = run.events("socket");
    assert_eq!(sockets.len(), CONNECTIONS + 1, "{what}: socket");
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    for record in &sockets {
        assert_eq!(record["family"], family, "{what}");
        assert_eq!(record["socket_type"], "stream", "{what}");
        assert_eq!(record["protocol"], "tcp", "{what}");
        assert!(record["result"].as_i64().is_some_and(|fd| fd > 2), "{what}: {record:#}");
        assert_eq!(record["socket"]["state"], "CLOSE", "{what}");
    }
    let (explicit, implicit): (Vec<&Value>, Vec<&Value>) =
        run.events("bind").into_iter().partition(|record| record["explicit"] == true);
    assert_eq!(explicit.len(), 1, "{what}: explicit binds");
    assert_eq!(end(explicit[0]), address, "{what}");
    assert_eq!(explicit[0]["requested"]["port"], 0, "{what}");
    let chosen: BTreeSet<SocketAddr> = implicit.iter().map(|record| end(record)).collect();
    assert_eq!(chosen, *clients, "{what}: ports that the kernel chose");
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("sysctl");
    let mut range = range.split_whitespace().map(|n| n.parse::<u64>().expect("a number"));
    let (low, high) = (range.next(), range.next());
    for record in &implicit {
        assert_eq!(record["at"], "connect", "{what}");
        let range = &record["port_range"];
        assert_eq!((range["low"].as_u64(), range["high"].as_u64()), (low, high), "{what}");
    }
    let connects = run.events("connect");
    assert_eq!(connects.len(), CONNECTIONS, "{what}: connect");
    for record in &connects {
        assert_eq!(record["result"], 0, "{what}: {record:#}");
        assert_eq!(end(&record["destination"]), address, "{what}");
        assert_eq!(record["implicit_bind"], true, "{what}");
        assert!(record["took_us"].is_u64(), "{what}: {record:#}");
        assert_eq!(record["pid"], pid(), "{what}");
    }
    let sources: BTreeSet<SocketAddr> = connects.iter().map(|r| end(&r["source"])).collect();
    assert_eq!(sources, *clients, "{what}: connect");
    let listens = run.events("listen");
    assert_eq!(listens.len(), 1, "{what}: listen");
    assert_eq!(listens[0]["backlog"]["requested"], 64, "{what}");
    assert_eq!(listens[0]["backlog"]["effective"], 64, "{what}: {:#}", listens[0]);
    assert_eq!(listens[0]["relisten"], false, "{what}");
    assert_eq!(listens[0]["socket"]["state"], "LISTEN", "{what}");
}

fn set(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{name}"), value).expect(name);
}

/// The kernel's count in this thread's namespace.
fn netstat(wanted: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").expect("netstat");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    lines
        .chunks(2)
        .find_map(|pair| pair[0].iter().position(|name| *name == wanted).map(|at| pair[1][at]))
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no {wanted}"))
}

/// Drops, cookies, repeated SYN-ACKs, resets and expired requests, as many events as the kernel counts.
#[test]
fn what_goes_wrong_at_the_door_is_an_event() {
    for backend in backends() {
        let netns = Netns::new("door");
        let kinds = "syn,drop,cookie,retransmit,expire,reset";
        let tracing = trace(backend, &netns, &["--kind", kinds]);
        let (drops, cookies, resets) = netns.within(|| {
            set("ipv4/tcp_syncookies", "0");
            set("ipv4/tcp_synack_retries", "1");
            let mut wire = Wire::new();
            // 13 SYNs at a SYN queue of 8 or 9, two of which the client resets.
            let small = Listener::new(&format!("{SERVER4}:0"), 8);
            for port in 0..13 {
                wire.send(20_000 + port, small.address, SYN, 1000);
            }
            let answered: BTreeSet<u16> = wire
                .replies()
                .iter()
                .filter(|reply| reply.is_syn_ack())
                .map(|reply| reply.port)
                .collect();
            for port in answered.iter().take(2) {
                wire.send(*port, small.address, RST, 1001);
            }
            wire.first_replies();
            assert_eq!(netstat("EmbryonicRsts"), 2, "{answered:?}");
            // The others are asked once more, and expire.
            let half_open = || crate::lab::ss_half_open(small.port());
            for _ in 0..300 {
                if half_open() == 0 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            assert_eq!(half_open(), 0, "requests expire");
            wire.replies();
            set("ipv4/tcp_syncookies", "2");
            let open = Listener::new(&format!("{SERVER4}:0"), 8);
            for port in 0..7 {
                wire.send(21_000 + port, open.address, SYN, 1000);
            }
            assert_eq!(wire.syn_acks(), 7, "cookies");
            (netstat("ListenDrops"), netstat("SyncookiesSent"), answered.len())
        });
        settle(&tracing, "cookie", 7);
        let run = tracing.stop();
        let count = |kind: &str| run.events(kind).len() as u64;
        assert_eq!(count("drop"), drops, "{backend}: drops");
        assert!(drops > 0);
        for record in run.events("drop") {
            assert_eq!(record["reason"], "syn_queue_full", "{backend}: {record:#}");
            assert_eq!(record["peer"]["address"], "10.203.0.2", "{backend}: {record:#}");
            assert_eq!(record["accept_queue_limit"], 8, "{backend}: {record:#}");
        }
        assert_eq!(count("syn"), 20, "{backend}: SYNs");
        let sent = run.events("cookie");
        assert_eq!(
            sent.iter().filter(|r| r["step"] == "sent").count() as u64,
            cookies,
            "{backend}"
        );
        assert_eq!(count("reset"), 2, "{backend}: {:#?}", run.events("reset"));
        let left = resets as u64 - 2;
        assert_eq!(count("retransmit"), left, "{backend}: SYN-ACKs sent again");
        assert!(run.events("retransmit").iter().all(|r| r["attempt"] == 1), "{backend}");
        let expired = if *backend == "tracepoint" { 0 } else { left };
        assert_eq!(count("expire"), expired, "{backend}: expired requests");
        if *backend == "tracepoint" {
            let said = run.stderr.iter().any(|line| line.contains("expire: no tracepoint"));
            assert!(said, "{:#?}", run.stderr);
        }
    }
}

/// An accept queue that is full, seen from the drops.
#[test]
fn an_overflow_is_as_many_events_as_the_kernel_counts() {
    for backend in backends() {
        let netns = Netns::new("overflow");
        let tracing = trace(backend, &netns, &["--kind", "drop,established,close"]);
        let (overflows, id, clients) = netns.within(|| {
            let listener = Listener::new("127.0.0.1:0", 3);
            let id = listener.id();
            let clients = crate::lab::connect(listener.address, 11);
            // The fourth is in, the others try again, until they give up.
            std::thread::sleep(Duration::from_millis(1500));
            let (in_queue, late): (Vec<_>, Vec<_>) =
                clients.into_iter().partition(|client| client.peer_addr().is_ok());
            // On a slow machine one more may believe it: its last ACK came to the full queue.
            assert!(in_queue.len() >= 4, "connected: {}", in_queue.len());
            drop(late);
            std::thread::sleep(Duration::from_millis(300));
            (netstat("ListenOverflows"), id, (listener, in_queue))
        });
        settle(&tracing, "established", 4);
        netns.within(|| drop(clients));
        settle(&tracing, "close", 1);
        let run = tracing.stop();
        let drops = run.events("drop");
        assert!(overflows >= 7, "{backend}: {overflows}");
        assert_eq!(drops.len() as u64, overflows, "{backend}");
        for record in &drops {
            let reason = record["reason"].as_str().expect("a reason");
            assert!(reason.starts_with("accept_queue_full_on_"), "{backend}: {record:#}");
            assert_eq!(record["accept_queue_depth"], 4, "{backend}: {record:#}");
            assert_eq!(record["listener"]["id"], id.as_str(), "{backend}");
        }
        assert_eq!(run.events("established").len(), 4, "{backend}");
        let close = run.events("close");
        assert_eq!(close[0]["lost_on_close"], 4, "{backend}: {:#}", close[0]);
    }
}

/// Each filter lets through what it names, and nothing else comes out of the kernel: the summary counts what
/// went through the ring buffer.
#[test]
fn filters_are_the_kernels() {
    for backend in backends() {
        let netns = Netns::new("filters");
        let (a, b) = netns.within(|| {
            ip("addr add 10.7.7.7/32 dev lo");
            (Listener::new("127.0.0.1:0", 64), Listener::new("[::1]:0", 64))
        });
        let own = std::process::id().to_string();
        let comm = std::fs::read_to_string("/proc/self/comm").expect("comm");
        let port = a.port().to_string();
        let cases: &[(&[&str], usize)] = &[
            (&["-P", &port], 7),
            (&["-P", "1-2"], 0),
            (&["-4"], 7),
            (&["-6"], 5),
            (&["-x"], 0),
            (&["-p", &own], 12),
            (&["-p", "1"], 0),
            (&["--comm", comm.trim()], 12),
            (&["--comm", "no-such-name"], 0),
        ];
        // The programs are the same for all backends.
        let some = if *backend == backends()[0] { cases } else { &cases[..2] };
        for (filter, expect) in some {
            let mut arguments = vec!["--kind", "established"];
            arguments.extend(*filter);
            let tracing = trace(backend, &netns, &arguments);
            let clients = netns.within(|| [connected(a.address, 7), connected(b.address, 5)]);
            settle(&tracing, "established", *expect);
            let run = tracing.stop();
            assert_eq!(run.events("established").len(), *expect, "{backend}: {filter:?}");
            assert_eq!(run.summary()["events"], *expect, "{backend}: {filter:?}");
            drop(clients);
            netns.within(|| (a.drain(), b.drain()));
        }
    }
}

/// What a listener's worker or another process does is told apart; a port that the kernel chose is known; what a
/// filter says of calls holds too.
#[test]
fn filters_know_ports_and_processes_of_calls() {
    for backend in backends().iter().filter(|backend| sees_calls(backend)) {
        let netns = Netns::new("calls");
        let port = 23_459;
        let tracing = trace(
            backend,
            &netns,
            &["-P", "23459,40000-40006", "--kind", "bind,listen,syn,accept"],
        );
        netns.within(|| {
            set("ipv4/ip_local_port_range", "40000 40006");
            drop(Listener::new(&format!("127.0.0.1:{port}"), 5));
            drop(Listener::new("127.0.0.1:23461", 5));
            // Its port is chosen at listen(), below the slot's beginning.
            let chosen = Listener::unbound(5);
            assert!((40_000..=40_006).contains(&chosen.port()));
            let clients = connected(([127, 0, 0, 1], chosen.port()).into(), 3);
            for _ in 0..3 {
                drop(chosen.socket.accept().expect("accept"));
            }
            drop(clients);
        });
        settle(&tracing, "accept", 3);
        let run = tracing.stop();
        let binds: Vec<_> = run.events("bind").iter().map(|r| r["at"].clone()).collect();
        let of = |at: &str| binds.iter().filter(|one| **one == at).count();
        // The clients' own ports are of the range, too.
        assert_eq!((of("bind"), of("listen"), of("connect")), (1, 1, 3), "{backend}: {binds:?}");
        assert_eq!(run.events("listen").len(), 2, "{backend}");
        // Tracepoints know packets by a port that was not there when the listener began.
        let syns = if *backend == "tracepoint" { 0 } else { 3 };
        assert_eq!(run.events("syn").len(), syns, "{backend}");
        assert_eq!(run.events("accept").len(), 3, "{backend}");

        let netns = Netns::new("others");
        let tracing =
            trace(backend, &netns, &["-p", "1", "--kind", "socket,bind,listen,accept,connect"]);
        netns.within(|| {
            let listener = Listener::new("127.0.0.1:0", 5);
            let clients = connected(listener.address, 3);
            assert_eq!(listener.drain(), 3);
            drop(clients);
        });
        std::thread::sleep(Duration::from_millis(500));
        let run = tracing.stop();
        assert_eq!(run.summary()["events"], 0, "{backend}: {:#?}", run.records);
    }
}

/// Sockets of a control group and of what is below it; the others are none of its business.
#[test]
fn a_control_group_chooses() {
    const SOCKETS: usize = 7;
    let group = Path::new("/sys/fs/cgroup/socktrace-test");
    let unified = Path::new("/sys/fs/cgroup/cgroup.procs").exists();
    if !unified || std::fs::create_dir_all(group.join("below")).is_err() {
        assert!(!in_vm(), "the guests have a unified hierarchy");
        return;
    }
    for backend in backends().iter().filter(|backend| sees_calls(backend)) {
        let arguments = ["--kind", "socket", "--cgroup", "/socktrace-test"];
        let tracing = Tracing::verb("events", backend, &arguments);
        for (directory, count) in [(group.to_owned(), 3), (group.join("below"), 4)] {
            let procs = format!("{}/cgroup.procs\0", directory.display());
            // SAFETY: between fork and _exit the child makes system calls only.
            unsafe {
                let child = libc::fork();
                assert!(child >= 0, "fork");
                if child == 0 {
                    let file = libc::open(procs.as_ptr().cast(), libc::O_WRONLY);
                    let moved = libc::write(file, c"0".as_ptr().cast(), 1);
                    for _ in 0..count {
                        libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                    }
                    libc::_exit(i32::from(moved != 1));
                }
                let mut status = 0;
                libc::waitpid(child, &raw mut status, 0);
                assert_eq!(status, 0, "the child moves itself");
            }
        }
        drop(Listener::new("127.0.0.1:0", 5));
        settle(&tracing, "socket", SOCKETS);
        let run = tracing.stop();
        let sockets = run.events("socket");
        let of = |path: &str| sockets.iter().filter(|r| r["cgroup"] == path).count();
        let seen = (of("/socktrace-test"), of("/socktrace-test/below"), sockets.len());
        assert_eq!(seen, (3, 4, SOCKETS), "{backend}: {sockets:#?}");
        assert_eq!(run.summary()["events"], SOCKETS, "{backend}");
    }
    std::fs::remove_dir(group.join("below")).expect("rmdir");
    std::fs::remove_dir(group).expect("rmdir");
}

/// Records that the ring buffer had no room for are counted: produced = delivered + lost.
#[test]
fn lost_events_are_counted() {
    const SYNS: usize = 10_007;
    for backend in backends() {
        let netns = Netns::new("lost");
        let tracing = trace(backend, &netns, &["--kind", "syn"]);
        netns.within(|| {
            let mut wire = Wire::new();
            set("ipv4/tcp_syncookies", "2");
            let listener = Listener::new(&format!("{SERVER4}:0"), 8);
            // A listener is looked at when its first event comes.
            wire.send(19_999, listener.address, SYN, 1000);
            settle(&tracing, "syn", 1);
            tracing.signal(libc::SIGSTOP);
            for i in 1..SYNS {
                let port = 20_000 + u16::try_from(i % 10_000).expect("small");
                wire.send(port, listener.address, SYN, 1000);
                if i % 100 == 0 {
                    wire.first_replies();
                }
            }
            wire.replies();
            tracing.signal(libc::SIGCONT);
        });
        settle(&tracing, "lost", 1);
        let run = tracing.stop();
        let delivered = run.events("syn").len();
        let lost: u64 = run.events("lost").iter().filter_map(|r| r["count"].as_u64()).sum();
        assert!(lost > 0, "{backend}: nothing was lost");
        assert_eq!(delivered + usize::try_from(lost).expect("small"), SYNS, "{backend}");
        let summary = run.summary();
        assert_eq!(summary["events"], delivered, "{backend}");
        assert_eq!(summary["lost_events"], lost, "{backend}: {summary:#}");
    }
}

/// A reader that does not read stops nothing: neither the end of the run, nor others.
#[test]
fn a_run_ends_though_nobody_reads() {
    let backend = backends()[0];
    let (mut child, said) = start(&["events", "--backend", backend]);
    let netns = Netns::new("unread");
    netns.within(|| {
        let listener = Listener::new("127.0.0.1:0", 4096);
        // More than a pipe holds.
        for _ in 0..20 {
            drop(connected(listener.address, 53));
            listener.drain();
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, libc::SIGTERM);
    let status = wait(&mut child);
    assert!(status.success(), "{status}");
    // The last line is the run in a sentence: "…, 1060 events, 731 lost; …".
    let said = read_all(said);
    let lost = said
        .lines()
        .last()
        .and_then(|line| line.split(", ").find_map(|part| part.split_once(" lost")))
        .and_then(|(count, _)| count.parse::<u64>().ok());
    assert!(lost.is_some_and(|lost| lost > 0), "what nobody read is lost: {said}");
}

/// A run ends though more comes all the time, and tells of everything that had happened by then.
#[test]
fn a_run_ends_in_a_flood() {
    for backend in backends().iter().filter(|backend| sees_calls(backend)) {
        // On a thread of its own, whose CPU is chosen.
        std::thread::scope(|scope| scope.spawn(|| end_in_a_flood(backend)).join()).expect(backend);
    }
}

/// QEMU's emulator lets a CPU run on in code that another one is just changing, and then the kernel panics: in a
/// guest the flood and what takes its hooks away share one CPU.
fn on_one_cpu() {
    // SAFETY: a plain system call on a set of CPUs that is all zeros but for the first.
    let result = unsafe {
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cpus);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cpus)
    };
    assert_eq!(result, 0, "sched_setaffinity");
}

fn end_in_a_flood(backend: &str) {
    if in_vm() {
        on_one_cpu();
    }
    let own = std::process::id().to_string();
    let (mut child, _said) =
        start(&["events", "--json", "--backend", backend, "-p", &own, "--kind", "socket"]);
    let stdout = child.stdout.take().expect("stdout");
    let (stop, made, began) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let (before, text) = std::thread::scope(|scope| {
        let flood = || {
            while !stop.load(Ordering::Relaxed) && began.elapsed() < 2 * PATIENCE {
                drop(Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket"));
                made.fetch_add(1, Ordering::Relaxed);
            }
        };
        let reader = scope.spawn(|| read_all(stdout));
        let flooders = [scope.spawn(flood), scope.spawn(flood)];
        std::thread::sleep(Duration::from_millis(500));
        let before = made.load(Ordering::Relaxed);
        signal(&child, libc::SIGTERM);
        let status = wait(&mut child);
        stop.store(true, Ordering::Relaxed);
        for flooder in flooders {
            flooder.join().expect("sockets");
        }
        assert!(status.success(), "{backend}: {status}");
        (before, reader.join().expect("stdout"))
    });
    let delivered = text.matches("\"kind\":\"socket\"").count() as u64;
    let last: Value = serde_json::from_str(text.lines().last().expect("lines")).expect("JSON");
    assert_eq!(last["type"], "summary", "{backend}");
    assert_eq!(last["events"], delivered, "{backend}: {last:#}");
    let lost = last["lost_events"].as_u64().expect("a number");
    assert!(delivered > 0 && delivered + lost >= before, "{backend}: {before}, {last:#}");
}

/// What no hook of a backend sees is refused in words.
#[test]
fn kinds_that_cannot_be_seen_are_refused() {
    let run = output(&["events", "--backend", "tracepoint", "--kind", "expire", "-d", "1"]);
    assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("expire: no tracepoint stands where it happens"),
        "{}",
        stderr(&run)
    );
    let run = output(&["events", "--kind", "nonsense"]);
    assert_eq!(run.status.code(), Some(2));
    let run = output(&["events", "--sort", "listener"]);
    assert_eq!(run.status.code(), Some(2));
    let run = output(&["events", "--cgroup", "/no/such/group"]);
    assert!([Some(2), Some(4)].contains(&run.status.code()), "{}", stderr(&run));
    if !has_kprobes() {
        assert!(!in_vm());
        let run = output(&["events", "--backend", "fentry", "-d", "1"]);
        assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    }
}

/// The story of one listener, for people.
#[test]
fn a_lifecycle_is_told_as_a_story() {
    for backend in backends().iter().filter(|backend| sees_calls(backend)) {
        let netns = Netns::new("story");
        // A port of our own choice, known before it is bound.
        let port = 23_457;
        let (mut child, _said) = start(&[
            "events",
            "--lifecycle",
            "--backend",
            backend,
            "-N",
            &netns.name,
            "-P",
            &port.to_string(),
        ]);
        netns.within(|| {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let listener = Listener::new(&address.to_string(), 2);
            let clients = connected(address, 3);
            // A client is connected before its last ACK has arrived.
            for _ in 0..100 {
                if crate::lab::ss_queue(listener.inode).0 == 3 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let late = crate::lab::connect(address, 1);
            std::thread::sleep(Duration::from_millis(200));
            drop(listener.socket.accept().expect("accept"));
            drop((clients, late));
        });
        std::thread::sleep(Duration::from_millis(500));
        signal(&child, libc::SIGTERM);
        let text = read_all(child.stdout.take().expect("stdout"));
        child.wait().expect("wait");
        let steps = [
            "created: ipv4 tcp stream",
            "sk_state CLOSE, local",
            "bound: as asked",
            "sk_state CLOSE, local 127.0.0.1:23457",
            "listening: backlog 2 (asked 2,",
            "sk_state LISTEN, local 127.0.0.1:23457, accept 0/2",
            "first connection: from 127.0.0.1:",
            "accept 1/2",
            "overflow: from 127.0.0.1:",
            "SYN dropped, accept queue full",
            "accept 3/2",
            "first accept: from 127.0.0.1:",
            "closed: after",
        ];
        let mut rest = text.as_str();
        for step in steps {
            let at = rest.find(step).unwrap_or_else(|| panic!("{backend}: no {step:?} in\n{text}"));
            rest = &rest[at..];
        }
        assert!(
            text.contains(&format!("/{}", std::process::id())),
            "{backend}: who did it\n{text}"
        );
    }
}

/// UDP has no queue of connections, which is said to whoever watches for one.
#[test]
fn the_port_of_a_udp_socket_is_named_as_such() {
    let netns = Netns::new("udp");
    let socket = netns.within(|| std::net::UdpSocket::bind("127.0.0.1:0").expect("bind"));
    let port = socket.local_addr().expect("a name").port().to_string();
    let backend = backends()[0];
    for verb in ["top", "events"] {
        let run =
            output(&[verb, "--backend", backend, "-N", &netns.name, "-P", &port, "-d", "300ms"]);
        assert!(run.status.success(), "{}", stderr(&run));
        let said = stderr(&run);
        assert!(said.contains(&format!("port {port} is a UDP socket's")), "{verb}: {said}");
        assert!(said.contains("UDP has no listen() and no accept()"), "{verb}: {said}");
    }
}
