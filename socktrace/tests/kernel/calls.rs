//! What programs ask of sockets, and what they are told when it fails.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    events::{end, settle, trace},
    lab::{Kind, Listener, Netns, connect, connected, ss_queue},
    process::eventually,
    run::{Finished, backends, sees_calls},
};

fn tcp() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("socket")
}

fn bind(socket: &Socket, address: &str) -> Option<i32> {
    let address: SocketAddr = address.parse().expect("an address");
    socket.bind(&address.into()).err().and_then(|error| error.raw_os_error())
}

/// Runs `work` on a thread that is nobody's, without any capability.
fn unprivileged<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    const NOBODY: libc::c_long = 65_534;
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: the plain system call changes this thread alone, unlike libc's function.
                let done = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
                assert_eq!(done, 0, "setresuid: {}", std::io::Error::last_os_error());
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn backends_with_calls() -> impl Iterator<Item = &'static str> {
    backends().iter().copied().filter(|backend| sees_calls(backend))
}

/// The event of a bind to a port.
fn bind_of<'a>(run: &'a Finished, port: u16, errno: Option<&str>) -> &'a Value {
    let wanted = |r: &&Value| {
        r["requested"]["port"] == port && r["errno"] == errno.map_or(Value::Null, Value::from)
    };
    let binds = run.events("bind");
    let found: Vec<&&Value> = binds.iter().filter(|record| wanted(record)).collect();
    assert_eq!(found.len(), 1, "port {port}, {errno:?}: {binds:#?}");
    found[0]
}

/// Every way in which a bind is refused, with the error that the program got and the reason in words.
#[test]
fn refused_binds_say_why() {
    for backend in backends_with_calls() {
        let netns = Netns::new("refused");
        let tracing = trace(backend, &netns, &["--kind", "bind"]);
        let holder = netns.within(|| {
            let holder = Listener::new("127.0.0.1:31013", 5);
            assert_eq!(bind(&tcp(), "127.0.0.1:31013"), Some(libc::EADDRINUSE));
            // One that is bound and no more.
            let only_bound = tcp();
            assert_eq!(bind(&only_bound, "127.0.0.1:31051"), None);
            assert_eq!(bind(&tcp(), "0.0.0.0:31051"), Some(libc::EADDRINUSE));
            assert_eq!(unprivileged(|| bind(&tcp(), "127.0.0.1:83")), Some(libc::EACCES));
            assert_eq!(bind(&tcp(), "203.0.113.7:31019"), Some(libc::EADDRNOTAVAIL));
            let twice = tcp();
            assert_eq!(bind(&twice, "127.0.0.1:31021"), None);
            assert_eq!(bind(&twice, "127.0.0.1:31023"), Some(libc::EINVAL));
            let udp = UdpSocket::bind("127.0.0.1:31031").expect("bind");
            assert!(UdpSocket::bind("127.0.0.1:31031").is_err());
            (holder, only_bound, udp)
        });
        settle(&tracing, "bind", 10);
        let run = tracing.stop();
        drop(holder);
        let own = std::process::id();
        let binds = run.events("bind");
        assert_eq!(binds.len(), 10, "{backend}: {binds:#?}");
        assert!(binds.iter().all(|r| r["pid"] == own && r["explicit"] == true), "{backend}");

        let taken = bind_of(&run, 31_013, Some("EADDRINUSE"));
        let conflict = &taken["conflict"][0];
        assert_eq!(conflict["state"], "LISTEN", "{backend}: {taken:#}");
        assert_eq!(end(conflict), "127.0.0.1:31013".parse().expect("an address"), "{backend}");
        assert_eq!(conflict["owners"][0]["pid"], own, "{backend}: {taken:#}");
        assert_eq!(taken["result"], -libc::EADDRINUSE, "{backend}");
        let words = taken["explanation"].as_str().expect("words");
        assert!(words.contains(&format!("/{own} (LISTEN 127.0.0.1:31013)")), "{backend}: {words}");

        let bound = bind_of(&run, 31_051, Some("EADDRINUSE"));
        let conflict = &bound["conflict"][0];
        assert_eq!(end(conflict), "127.0.0.1:31051".parse().expect("an address"), "{backend}");
        assert_eq!(conflict["state"], "CLOSE", "{backend}: {bound:#}");
        assert_eq!(conflict["owners"][0]["pid"], own, "{backend}: {bound:#}");

        let denied = bind_of(&run, 83, Some("EACCES"));
        assert_eq!(denied["unprivileged_port_start"], 1024, "{backend}: {denied:#}");
        assert_eq!(denied["uid"], 65_534, "{backend}: {denied:#}");
        let words = denied["explanation"].as_str().expect("words");
        assert!(words.contains("CAP_NET_BIND_SERVICE"), "{backend}: {words}");

        let nowhere = bind_of(&run, 31_019, Some("EADDRNOTAVAIL"));
        let words = nowhere["explanation"].as_str().expect("words");
        assert!(words.contains("no interface"), "{backend}: {words}");

        let twice = bind_of(&run, 31_023, Some("EINVAL"));
        assert_eq!(twice["explanation"], "the socket has an address already", "{backend}");

        bind_of(&run, 31_021, None);
        let udp = bind_of(&run, 31_031, None);
        assert_eq!(udp["socket"]["protocol"], "udp", "{backend}: {udp:#}");
        let udp = bind_of(&run, 31_031, Some("EADDRINUSE"));
        assert_eq!(udp["conflict"][0]["owners"][0]["pid"], own, "{backend}: {udp:#}");
        assert!(run.events("listen").is_empty() && run.events("accept").is_empty());
    }
}

/// Wildcards, one interface, and a port that the kernel chooses at `bind()` or at `listen()`.
#[test]
fn binds_say_what_was_asked_for_and_what_was_got() {
    for backend in backends_with_calls() {
        let netns = Netns::new("asked");
        let tracing = trace(backend, &netns, &["--kind", "bind,listen"]);
        let (got, ports) = netns.within(|| {
            let all = [
                Listener::new("0.0.0.0:31013", 5),
                Listener::new("[::]:31019", 5),
                Listener::new("127.0.0.1:0", 5),
                Listener::unbound(7),
            ];
            let ports: Vec<u16> = all.iter().map(Listener::port).collect();
            let addresses: BTreeSet<SocketAddr> = all.iter().map(|l| l.address).collect();
            all[0].socket.listen(11).expect("listen");
            // Refused: a datagram socket cannot listen, nor can a connected one.
            let client = connected("127.0.0.1:31013".parse().expect("an address"), 1);
            assert!(client[0].listen(5).is_err());
            (addresses, ports)
        });
        settle(&tracing, "listen", 6);
        let run = tracing.stop();
        let (explicit, implicit): (Vec<&Value>, Vec<&Value>) =
            run.events("bind").into_iter().partition(|record| record["explicit"] == true);
        assert_eq!(explicit.len(), 3, "{backend}");
        // One at listen(), one at the client's connect().
        let at: BTreeSet<&str> = implicit.iter().filter_map(|r| r["at"].as_str()).collect();
        assert_eq!(at, BTreeSet::from(["connect", "listen"]), "{backend}: {implicit:#?}");
        let at_listen: Vec<_> = implicit.iter().filter(|r| r["at"] == "listen").collect();
        assert_eq!(at_listen.len(), 1, "{backend}");
        assert_eq!(end(at_listen[0]).port(), ports[3], "{backend}");
        let names: BTreeSet<SocketAddr> = explicit
            .iter()
            .chain(&at_listen[..1].iter().map(|r| **r).collect::<Vec<_>>())
            .map(|record| end(record))
            .collect();
        assert_eq!(names, got, "{backend}");
        let asked: BTreeSet<u64> =
            explicit.iter().filter_map(|r| r["requested"]["port"].as_u64()).collect();
        assert_eq!(asked, BTreeSet::from([0, 31_013, 31_019]), "{backend}");

        let listens = run.events("listen");
        assert_eq!(listens.len(), 6, "{backend}: {listens:#?}");
        let again: Vec<_> = listens.iter().filter(|r| r["relisten"] == true).collect();
        assert_eq!(again.len(), 1, "{backend}");
        assert_eq!(again[0]["backlog"]["requested"], 11, "{backend}: {:#}", again[0]);
        assert_eq!(again[0]["backlog"]["effective"], 11, "{backend}");
        let refused: Vec<_> = listens.iter().filter(|r| r["errno"] == "EINVAL").collect();
        assert_eq!(refused.len(), 1, "{backend}");
        let somaxconn = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("sysctl");
        let somaxconn: u64 = somaxconn.trim().parse().expect("a number");
        assert!(listens.iter().all(|r| r["backlog"]["somaxconn"] == somaxconn), "{backend}");
    }
}

/// A backlog that `somaxconn` of the namespace cuts down.
#[test]
fn a_backlog_is_clamped_by_its_own_namespace() {
    for backend in backends_with_calls() {
        let netns = Netns::new("clamped");
        let tracing = trace(backend, &netns, &["--kind", "listen"]);
        netns.within(|| {
            std::fs::write("/proc/sys/net/core/somaxconn", "17").expect("somaxconn");
            Listener::new("127.0.0.1:0", 1024);
            Listener::new("127.0.0.1:0", -1);
        });
        settle(&tracing, "listen", 2);
        let run = tracing.stop();
        for (record, asked) in run.events("listen").iter().zip([1024, -1]) {
            let expect = serde_json::json!(
                {"requested": asked, "somaxconn": 17, "effective": 17, "clamped": true}
            );
            assert_eq!(record["backlog"], expect, "{backend}");
        }
        assert_eq!(run.events("listen").len(), 2, "{backend}");
    }
}

/// Connects that fail, each as the program saw it.
#[test]
fn failed_connects_say_why() {
    for backend in backends_with_calls() {
        let netns = Netns::new("failed");
        let tracing = trace(backend, &netns, &["--kind", "connect"]);
        netns.within(|| {
            std::fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "1").expect("sysctl");
            let to = |address: &str| {
                let address: SocketAddr = address.parse().expect("an address");
                tcp().connect(&address.into()).err().and_then(|error| error.raw_os_error())
            };
            // Nobody listens.
            for _ in 0..5 {
                assert_eq!(to("127.0.0.1:31013"), Some(libc::ECONNREFUSED));
            }
            assert_eq!(to("203.0.113.7:80"), Some(libc::ENETUNREACH));
            // A full queue answers nobody.
            let full = Listener::new("127.0.0.1:0", 0);
            let one = connected(full.address, 1);
            // The client may be ahead of the server's side.
            eventually("a full queue", || (ss_queue(full.inode).0 == 1).then_some(()));
            assert_eq!(to(&full.address.to_string()), Some(libc::ETIMEDOUT));
            // A program that does not wait for the answer.
            drop(connect(full.address, 1));
            drop(one);
        });
        settle(&tracing, "connect", 9);
        let run = tracing.stop();
        let connects = run.events("connect");
        let count = |errno: Value| connects.iter().filter(|r| r["errno"] == errno).count();
        assert_eq!(count("ECONNREFUSED".into()), 5, "{backend}: {connects:#?}");
        assert_eq!(count("ENETUNREACH".into()), 1, "{backend}: {connects:#?}");
        assert_eq!(count("ETIMEDOUT".into()), 1, "{backend}: {connects:#?}");
        let (done, given_up): (Vec<&&Value>, Vec<&&Value>) =
            connects.iter().filter(|r| r["errno"].is_null()).partition(|r| r["result"] == 0);
        assert_eq!((done.len(), given_up.len()), (1, 1), "{backend}: {connects:#?}");
        assert!(given_up[0]["result"].is_null(), "{backend}: {:#}", given_up[0]);
        for (errno, words) in [
            ("ECONNREFUSED", "nobody listens there"),
            ("ETIMEDOUT", "the SYNs were not answered"),
            ("ENETUNREACH", "no route leads there"),
        ] {
            let record = connects.iter().find(|r| r["errno"] == errno).expect("an event");
            assert_eq!(record["explanation"], words, "{backend}");
        }
        // The port is known though the kernel has taken it back.
        let refused = connects.iter().filter(|r| r["errno"] == "ECONNREFUSED");
        assert!(refused.into_iter().all(|r| end(&r["source"]).port() != 0), "{backend}");
    }
}

/// Eight ports for eight connections: the ninth connect finds none, and the event says so. (Of an odd number
/// `__inet_hash_connect` leaves one out.)
#[test]
fn an_exhausted_range_of_ports_is_named() {
    for backend in backends_with_calls() {
        let netns = Netns::new("exhausted");
        let tracing = trace(backend, &netns, &["--kind", "bind,connect"]);
        let (address, clients) = netns.within(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40007")
                .expect("sysctl");
            let listener = Listener::new("127.0.0.1:31013", 64);
            let clients = connected(listener.address, 8);
            let failed = tcp().connect(&listener.address.into()).expect_err("no port is left");
            assert_eq!(failed.raw_os_error(), Some(libc::EADDRNOTAVAIL));
            let bound = bind(&tcp(), "127.0.0.1:0");
            assert_eq!(bound, Some(libc::EADDRINUSE));
            (listener.address, (listener, clients))
        });
        settle(&tracing, "connect", 9);
        let run = tracing.stop();
        drop(clients);
        let binds = run.events("bind");
        let implicit: Vec<_> = binds.iter().filter(|r| r["explicit"] == false).collect();
        assert_eq!(implicit.len(), 9, "{backend}: {implicit:#?}");
        let (failed, chosen): (Vec<&&Value>, Vec<&&Value>) =
            implicit.into_iter().partition(|r| r["errno"] == "EADDRNOTAVAIL");
        let ports: BTreeSet<u16> = chosen.iter().map(|record| end(record).port()).collect();
        assert_eq!(ports, (40_000..=40_007).collect(), "{backend}");
        assert_eq!(failed.len(), 1, "{backend}");
        let range = serde_json::json!({"low": 40_000, "high": 40_007, "in_use": 8, "time_wait": 0});
        assert_eq!(failed[0]["port_range"], range, "{backend}: {:#}", failed[0]);
        assert_eq!(end(&failed[0]["destination"]), address, "{backend}");
        let words = failed[0]["explanation"].as_str().expect("words");
        assert!(
            words.contains("no port of 40000-40007 (8 of 8 in use) is left"),
            "{backend}: {words}"
        );
        let any = binds.iter().find(|r| r["errno"] == "EADDRINUSE").expect("the bind to any port");
        assert_eq!(any["explanation"], "no port of 40000-40007 is left", "{backend}");
        let connects = run.events("connect");
        let refused = connects.iter().filter(|r| r["errno"] == "EADDRNOTAVAIL").count();
        assert_eq!((connects.len(), refused), (9, 1), "{backend}: {connects:#?}");
    }
}

/// `socket()` that fails, and protocols.
#[test]
fn sockets_say_what_they_are() {
    for backend in backends_with_calls() {
        let netns = Netns::new("sockets");
        let tracing = trace(backend, &netns, &["--kind", "socket"]);
        let mptcp = netns.within(|| {
            for _ in 0..11 {
                drop(tcp());
            }
            for _ in 0..3 {
                drop(Socket::new(Domain::IPV6, Type::STREAM, None).expect("socket"));
            }
            for kind in [Type::STREAM, Type::SEQPACKET, Type::STREAM, Type::SEQPACKET, Type::STREAM]
            {
                drop(Socket::new(Domain::UNIX, kind, None).expect("socket"));
            }
            // Neither of these can listen.
            drop(Socket::new(Domain::UNIX, Type::DGRAM, None).expect("socket"));
            drop(UdpSocket::bind("127.0.0.1:0").expect("bind"));
            let unknown = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(255)));
            assert_eq!(
                unknown.expect_err("no such protocol").raw_os_error(),
                Some(libc::EPROTONOSUPPORT)
            );
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(262))).is_ok()
        });
        settle(&tracing, "socket", 21);
        let run = tracing.stop();
        let sockets = run.events("socket");
        let count = |family: &str, kind: &str, errno: Value| {
            let of = |r: &&&Value| {
                r["family"] == family && r["socket_type"] == kind && r["errno"] == errno
            };
            sockets.iter().filter(of).count()
        };
        assert_eq!(count("ipv4", "stream", Value::Null), 11 + usize::from(mptcp), "{backend}");
        assert_eq!(count("ipv6", "stream", Value::Null), 3, "{backend}");
        assert_eq!(count("unix", "stream", Value::Null), 3, "{backend}");
        assert_eq!(count("unix", "seqpacket", Value::Null), 2, "{backend}");
        // A kernel without MPTCP refuses it like any protocol that it does not know.
        let refused = 1 + usize::from(!mptcp);
        assert_eq!(count("ipv4", "stream", "EPROTONOSUPPORT".into()), refused, "{backend}");
        assert_eq!(sockets.len(), 21, "{backend}: {sockets:#?}");
        let known = sockets.iter().filter(|r| r["protocol"] == "mptcp" && r["errno"].is_null());
        assert_eq!(known.count(), usize::from(mptcp), "{backend}");
    }
}

/// MPTCP goes other ways through the kernel (`mptcp_bind`, `mptcp_listen`, `mptcp_connect`).
#[test]
fn mptcp_sockets_have_the_same_events() {
    for backend in backends_with_calls() {
        let netns = Netns::new("mptcp");
        let there = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(262))).is_ok();
        // Debian's 5.10 is built without.
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
        assert_eq!(there, !release.starts_with("5.10"), "MPTCP on {release}");
        if !there {
            continue;
        }
        let tracing = trace(backend, &netns, &[]);
        let (id, address) = netns.within(|| {
            let kind = Kind { mptcp: true, ..Kind::default() };
            let listener = Listener::with("127.0.0.1:0", 16, kind);
            let id = listener.id();
            let clients: Vec<Socket> = (0..5)
                .map(|_| {
                    let client = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(262)))
                        .expect("socket");
                    client.connect(&listener.address.into()).expect("connect");
                    client
                })
                .collect();
            let accepted: Vec<_> =
                (0..5).map(|_| listener.socket.accept().expect("accept")).collect();
            let address = listener.address;
            drop((listener, clients, accepted));
            (id, address)
        });
        settle(&tracing, "close", 1);
        std::thread::sleep(Duration::from_millis(200));
        let run = tracing.stop();
        let count = |kind: &str| run.events(kind).len();
        let explicit: Vec<_> =
            run.events("bind").into_iter().filter(|r| r["explicit"] == true).collect();
        assert_eq!(explicit.len(), 1, "{backend}: {explicit:#?}");
        assert_eq!(end(explicit[0]), address, "{backend}");
        assert_eq!(count("listen"), 1, "{backend}");
        assert_eq!(run.events("listen")[0]["socket"]["protocol"], "mptcp", "{backend}");
        assert_eq!(count("syn"), 5, "{backend}");
        assert_eq!(count("established"), 5, "{backend}");
        assert_eq!(count("accept"), 5, "{backend}");
        assert_eq!(count("connect"), 5, "{backend}: {:#?}", run.events("connect"));
        assert_eq!(count("close"), 1, "{backend}");
        for kind in ["syn", "established", "accept", "close"] {
            for record in run.events(kind) {
                assert_eq!(record["listener"]["id"], id.as_str(), "{backend}: {record:#}");
                assert_eq!(record["listener"]["transport"], "mptcp", "{backend}: {record:#}");
            }
        }
        assert!(Ipv4Addr::LOCALHOST == address.ip());
    }
}
