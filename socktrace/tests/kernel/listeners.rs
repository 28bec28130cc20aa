//! Which listeners there are, and what they are called.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Value, json};

use crate::{
    lab::{Kind, Listener, Netns, connect, many_files, ss, ss_queue},
    run::{Tracing, backends, in_vm, output, queue, records, sees_calls},
};

/// Each kind of listener, opened before the trace and after.
#[test]
fn every_kind_of_listener_is_known_by_its_socket() {
    let has_mptcp = Path::new("/proc/sys/net/mptcp/enabled").exists();
    let kinds = |reuseport| {
        let plain = Kind { reuseport, ..Kind::default() };
        let mut kinds = vec![
            ("127.0.0.1:0", plain, "ipv4", "tcp"),
            ("0.0.0.0:0", plain, "ipv4", "tcp"),
            ("[::1]:0", plain, "ipv6", "tcp"),
            ("[::]:0", Kind { v6only: Some(true), ..plain }, "ipv6", "tcp"),
            ("[::]:0", Kind { v6only: Some(false), ..plain }, "ipv6", "tcp"),
        ];
        if has_mptcp {
            kinds.push(("127.0.0.1:0", Kind { mptcp: true, ..plain }, "ipv4", "mptcp"));
            kinds.push(("[::]:0", Kind { mptcp: true, ..plain }, "ipv6", "mptcp"));
        }
        kinds
    };
    let open = |reuseport| -> Vec<_> {
        kinds(reuseport)
            .into_iter()
            .map(|(address, kind, family, transport)| {
                (Listener::with(address, 23, kind), kind, family, transport)
            })
            .collect()
    };
    for backend in backends() {
        let mut listeners = open(false);
        let older = listeners.len();
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        listeners.extend(open(true));
        let clients: Vec<_> = listeners
            .iter()
            .map(|(listener, ..)| {
                let mut to = listener.address;
                if to.ip().is_unspecified() {
                    to.set_ip(if to.is_ipv4() {
                        [127, 0, 0, 1].into()
                    } else {
                        std::net::Ipv6Addr::LOCALHOST.into()
                    });
                }
                connect(to, 2)
            })
            .collect();
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        for (i, (listener, kind, family, transport)) in listeners.iter().enumerate() {
            let record = run.last_of(&listener.id());
            let what = format!("{backend}: {record:#}");
            let is = &record["listener"];
            assert_eq!(is["family"], *family, "{what}");
            assert_eq!(is["transport"], *transport, "{what}");
            assert_eq!(is["address"], listener.address.ip().to_string(), "{what}");
            assert_eq!(is["port"], listener.port(), "{what}");
            assert_eq!(is["netns"], listener.netns, "{what}");
            assert_eq!(is["cookie"], listener.cookie(), "{what}");
            assert_eq!(is["inode"], listener.inode, "{what}");
            assert_eq!(is["reuseport"], kind.reuseport, "{what}");
            if let Some(only) = kind.v6only {
                assert_eq!(is["v6only"], only, "{what}");
            }
            let me = json!(std::process::id());
            assert!(
                is["owners"].as_array().is_some_and(|o| o.iter().any(|o| o["pid"] == me)),
                "{what}"
            );
            assert_eq!(queue(record, "accept_queue"), (2, 23, 2), "{what}");
            assert_eq!(ss_queue(listener.inode), (2, 23), "{what}");
            let asked = if i >= older && sees_calls(backend) { json!(23) } else { Value::Null };
            assert_eq!(record["backlog"]["requested"], asked, "{what}");
            assert_eq!(record["backlog"]["effective"], 23, "{what}");
        }
        drop(clients);
    }
}

#[test]
fn members_of_a_group_are_told_apart() {
    for backend in backends() {
        let first = group_member("127.0.0.1:0");
        let same = first.address.to_string();
        let older = [first, group_member(&same)];
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let younger = [group_member(&same), group_member(&same)];
        let clients = connect(older[0].address, 41);
        tracing.wait_interval();
        tracing.wait_interval();
        let members: Vec<&Listener> = older.iter().chain(&younger).collect();
        let truth: Vec<_> = members.iter().map(|member| ss_queue(member.inode)).collect();
        let run = tracing.stop();
        let mut sum = 0;
        for (member, (depth, limit)) in members.iter().zip(truth) {
            let record = run.last_of(&member.id());
            assert_eq!(
                queue(record, "accept_queue"),
                (depth, limit, depth),
                "{backend}: {record:#}"
            );
            assert_eq!(record["listener"]["reuseport"], true);
            sum += depth;
        }
        assert_eq!(sum, 41, "{backend}");
        drop(clients);
    }
}

fn group_member(address: &str) -> Listener {
    Listener::with(address, 64, Kind { reuseport: true, ..Kind::default() })
}

#[test]
fn a_second_listen_changes_the_limit() {
    for backend in backends() {
        let older = Listener::new("127.0.0.1:0", 5);
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let younger = Listener::new("127.0.0.1:0", 5);
        tracing.wait_interval();
        for listener in [&older, &younger] {
            listener.socket.listen(9).expect("listen again");
        }
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        for listener in [&older, &younger] {
            let record = run.last_of(&listener.id());
            assert_eq!(queue(record, "accept_queue").1, 9, "{backend}: {record:#}");
            let asked = if sees_calls(backend) { json!(9) } else { Value::Null };
            assert_eq!(record["backlog"]["requested"], asked, "{backend}: {record:#}");
        }
    }
}

#[test]
fn a_clamped_backlog_shows_what_was_asked_and_what_was_given() {
    for backend in backends() {
        let netns = Netns::new("clamped");
        netns.within(|| {
            std::fs::write("/proc/sys/net/core/somaxconn", "64").expect("somaxconn");
            let tracing = Tracing::start(backend, &["-i", "500ms"]);
            let listeners = [Listener::new("127.0.0.1:0", 1000), Listener::new("127.0.0.1:0", -1)];
            tracing.wait_interval();
            tracing.wait_interval();
            let run = tracing.stop();
            for (listener, asked) in listeners.iter().zip([1000, -1]) {
                let known = sees_calls(backend);
                let if_known = |value: Value| if known { value } else { Value::Null };
                let expect = json!({"requested": if_known(json!(asked)), "somaxconn": 64,
                                    "effective": 64, "clamped": if_known(json!(true))});
                assert_eq!(run.last_of(&listener.id())["backlog"], expect, "{backend}");
            }
        });
    }
}

#[test]
fn a_port_the_kernel_chose_is_known() {
    for backend in backends() {
        let older = Listener::unbound(3);
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let younger = Listener::unbound(3);
        tracing.wait_interval();
        let clients: Vec<_> =
            [&older, &younger].map(|l| connect(([127, 0, 0, 1], l.port()).into(), 2)).into();
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        for listener in [&older, &younger] {
            let record = run.last_of(&listener.id());
            assert_eq!(record["listener"]["port"], listener.port(), "{backend}: {record:#}");
            assert_eq!(queue(record, "accept_queue"), (2, 3, 2), "{backend}: {record:#}");
        }
        drop(clients);
    }
}

/// A listener that is gone is in one last record, with what it saw, and in none after.
#[test]
fn a_closed_listener_is_reported_once_more() {
    for backend in backends() {
        let tracing = Tracing::start(backend, &["-i", "1s"]);
        let stays = Listener::new("127.0.0.1:0", 9);
        tracing.wait_interval();
        let listener = Listener::new("127.0.0.1:0", 9);
        let clients = connect(listener.address, 5);
        let id = listener.id();
        drop(listener);
        drop(clients);
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        let mine = run.of(&id);
        assert_eq!(mine.len(), 1, "{backend}: {mine:#?}");
        assert_eq!(mine[0]["closed"], true, "{backend}: {mine:#?}");
        assert_eq!(queue(mine[0], "accept_queue"), (0, 9, 5), "{backend}: {mine:#?}");
        assert_eq!(run.last_of(&stays.id())["closed"], false);
    }
}

/// `listen()` that fails leaves nothing behind.
#[test]
fn a_listen_that_fails_is_no_listener() {
    use socket2::{Domain, Socket, Type};
    for backend in backends() {
        let first = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        let second = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        let any: std::net::SocketAddr = ([127, 0, 0, 1], 0).into();
        for socket in [&first, &second] {
            socket.set_reuse_address(true).expect("SO_REUSEADDR");
        }
        first.bind(&any.into()).expect("bind");
        let name = first.local_addr().expect("name");
        second.bind(&name).expect("bind the same");
        let port = name.as_socket().expect("an internet address").port();
        // Room for one round, so that a slot that is not given back is missed in the next.
        let tracing = Tracing::start(backend, &["-i", "500ms", "--max-listeners", "64"]);
        first.listen(5).expect("listen");
        for _ in 0..3 {
            for _ in 0..30 {
                let error = second.listen(5).expect_err("the port is taken");
                assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
            }
            for _ in 0..5 {
                tracing.wait_interval();
            }
        }
        let run = tracing.stop();
        assert_eq!(run.summary()["lost_events"], 0, "{backend}: {:#?}", run.stderr);
        for interval in run.intervals() {
            let here = interval.iter().filter(|r| r["listener"]["port"] == port).count();
            assert!(here <= 1, "{backend}: {interval:#?}");
        }
    }
}

/// 1,000 listeners before and 1,000 after the start, in three namespaces.
#[test]
fn thousands_of_listeners_come_and_go() {
    const EACH: usize = 334;
    many_files();
    for backend in backends() {
        let namespaces = ["a", "b", "c"].map(Netns::new);
        let open = || -> Vec<Listener> {
            let some = |netns: &Netns| {
                netns.within(|| {
                    (0..EACH).map(|_| Listener::new("127.0.0.1:0", 5)).collect::<Vec<_>>()
                })
            };
            namespaces.iter().flat_map(some).collect()
        };
        let older = open();
        // Intervals without a listener have no record to wait for.
        let keeper = Listener::new("127.0.0.1:0", 5);
        let tracing = Tracing::start(backend, &["-i", "1s"]);
        let younger = open();
        tracing.wait_interval();
        tracing.wait_interval();
        tracing.wait_interval();
        let ids: BTreeSet<String> = older.iter().chain(&younger).map(Listener::id).collect();
        let inside: BTreeSet<u64> = older.iter().map(|listener| listener.netns).collect();
        assert_eq!((ids.len(), inside.len()), (2 * 3 * EACH, 3));
        drop((older, younger));
        // One interval in which they closed, and two in which they are gone.
        for _ in 0..3 {
            tracing.wait_interval();
        }
        let run = tracing.stop();
        let seen: Vec<BTreeSet<String>> = run
            .intervals()
            .iter()
            .map(|interval| {
                let mine = interval.iter().filter(|r| {
                    r["listener"]["netns"].as_u64().is_some_and(|n| inside.contains(&n))
                });
                let ids: Vec<String> =
                    mine.map(|r| r["listener"]["id"].as_str().expect("id").to_owned()).collect();
                let unique: BTreeSet<String> = ids.iter().cloned().collect();
                assert_eq!(unique.len(), ids.len(), "{backend}: one is there twice");
                unique
            })
            .collect();
        let sizes: Vec<usize> = seen.iter().map(BTreeSet::len).collect();
        assert!(seen.contains(&ids), "{backend}: not all at once, but {sizes:?} of {}", ids.len());
        assert!(seen.iter().all(|some| some.is_subset(&ids)), "{backend}: {sizes:?}");
        assert_eq!(sizes.last(), Some(&0), "{backend}: {sizes:?}");
        assert!(!run.of(&keeper.id()).is_empty());
        assert_eq!(run.summary()["lost_events"], 0, "{backend}: {:#?}", run.stderr);
    }
}

/// A listener is taken in whatever its file descriptor and its namespace are, and seen in full.
#[test]
fn older_listeners_are_taken_in_wherever_they_are() {
    many_files();
    for backend in backends() {
        // Most of them have descriptors far beyond the first hundred.
        let crowd: Vec<Listener> = (0..301).map(|_| Listener::new("127.0.0.1:0", 7)).collect();
        // One lives in a namespace that no path leads to any more.
        let hidden = std::thread::spawn(|| {
            // SAFETY: a plain system call; the namespace is this thread's alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "unshare");
            let listener = Listener::new("127.0.0.1:0", 7);
            let id = listener.id();
            (listener, id)
        });
        let (hidden, hidden_id) = hidden.join().expect("a hidden listener");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let clients: Vec<_> = crowd.iter().map(|listener| connect(listener.address, 2)).collect();
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        for listener in &crowd {
            let record = run.last_of(&listener.id());
            assert_eq!(queue(record, "accept_queue"), (2, 7, 2), "{backend}: {record:#}");
            assert_eq!(queue(record, "syn_queue").1, 7, "{backend}: {record:#}");
            assert!(record["backlog"]["somaxconn"].is_u64(), "{backend}: {record:#}");
        }
        assert_eq!(queue(run.last_of(&hidden_id), "accept_queue"), (0, 7, 0), "{backend}");
        let listed = output(&["list", "--json"]);
        assert!(
            records(&listed).iter().any(|r| r["listener"]["id"] == hidden_id),
            "{hidden_id} is missing in list"
        );
        drop((clients, hidden));
    }
}

/// The classic daemon: who opened the socket is gone, a child has it.
#[test]
fn owners_are_processes_that_live() {
    for backend in backends() {
        let listener = Listener::new("127.0.0.1:0", 7);
        // The socket is inherited by a shell that goes on without us holding it.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&listener.socket);
        let spawn = || {
            let mut sleeper = std::process::Command::new("sleep");
            // SAFETY: a plain system call in the child.
            unsafe {
                std::os::unix::process::CommandExt::pre_exec(&mut sleeper, move || {
                    libc::fcntl(fd, libc::F_SETFD, 0);
                    Ok(())
                })
            };
            sleeper.arg("1000").spawn().expect("sleep")
        };
        let mut first = spawn();
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        tracing.wait_interval();
        let mut second = spawn();
        first.kill().expect("kill");
        first.wait().expect("wait");
        tracing.wait_interval();
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        second.kill().expect("kill");
        second.wait().expect("wait");
        let mine = run.of(&listener.id());
        let pids = |record: &Value| -> BTreeSet<u64> {
            let owners = record["listener"]["owners"].as_array().expect("owners");
            owners.iter().map(|owner| owner["pid"].as_u64().expect("pid")).collect()
        };
        let me = u64::from(std::process::id());
        assert_eq!(pids(mine[0]), [me, first.id().into()].into(), "{backend}");
        let last = mine.last().expect("a record");
        assert_eq!(pids(last), [me, second.id().into()].into(), "{backend}");
    }
}

/// Listeners beyond the room there is are shown as far as netlink knows them, and said to be lost.
#[test]
fn more_listeners_than_there_is_room_for_are_not_hidden() {
    for backend in backends() {
        let netns = Netns::new("crowd");
        let (run, listeners) = netns.within(|| {
            let tracing = Tracing::start(backend, &["-i", "500ms", "--max-listeners", "4"]);
            let open = || Listener::new("127.0.0.1:0", 5);
            let listeners: Vec<Listener> = (0..11).map(|_| open()).collect();
            let clients = connect(listeners[10].address, 3);
            for _ in 0..4 {
                tracing.wait_interval();
            }
            drop(clients);
            (tracing.stop(), listeners)
        });
        let mut without_peak = 0;
        for listener in &listeners {
            let record = run.last_of(&listener.id());
            assert_eq!(record["accept_queue"]["limit"], 5, "{backend}: {record:#}");
            without_peak += usize::from(record["accept_queue"]["peak"].is_null());
        }
        assert!((7..11).contains(&without_peak), "{backend}: {without_peak} of 11");
        assert_eq!(run.last_of(&listeners[10].id())["accept_queue"]["depth"], 3, "{backend}");
        assert!(run.summary()["lost_events"].as_u64() >= Some(7), "{backend}");
        let said = run.stderr.join("\n");
        assert!(said.contains("--max-listeners"), "{backend}: {said}");
    }
}

/// Snapshot against `ss`, every listener of the namespace.
#[test]
fn list_shows_what_ss_shows() {
    let listeners = [
        Listener::new("127.0.0.1:0", 6),
        Listener::with("[::]:0", 12, Kind { v6only: Some(false), ..Kind::default() }),
        group_member("127.0.0.1:0"),
    ];
    let clients = connect(listeners[0].address, 4);
    std::thread::sleep(std::time::Duration::from_millis(100));
    let truth: BTreeSet<(u64, u64, u64)> = ss("-Hlnte")
        .iter()
        .map(|line| {
            let inode = line.iter().find_map(|word| word.strip_prefix("ino:")).unwrap_or("0");
            let number = |text: &str| text.parse().expect("a number");
            (number(inode), number(&line[1]), number(&line[2]))
        })
        .collect();
    let here = crate::lab::netns();
    let result = output(&["list", "--json", "-N", &format!("inode:{here}")]);
    assert!(result.status.success());
    let ours: BTreeSet<(u64, u64, u64)> = records(&result)
        .iter()
        .map(|record| {
            let queue = &record["accept_queue"];
            let number = |value: &Value| value.as_u64().expect("a number");
            (number(&record["listener"]["inode"]), number(&queue["depth"]), number(&queue["limit"]))
        })
        .collect();
    assert_eq!(ours, truth);
    assert!(truth.contains(&(listeners[0].inode, 4, 6)));
    for record in records(&result) {
        assert_eq!(record["accept_queue"]["peak"], Value::Null, "a snapshot knows no peak");
        let known = record["syn_queue"]["depth"].is_u64();
        assert!(known || !in_vm(), "{record:#}");
    }
    drop(clients);
}

/// The filters choose, and name what they choose by.
#[test]
fn filters_choose() {
    let netns = Netns::new("filters");
    let inside = netns.within(|| Listener::new("127.0.0.1:0", 5));
    let outside = Listener::new("[::1]:0", 5);
    let ids = |arguments: &[&str]| -> BTreeSet<String> {
        let result = output(&[&["list", "--json"], arguments].concat());
        assert!(result.status.success(), "{arguments:?}: {}", crate::run::stderr(&result));
        let ours = [inside.id(), outside.id()];
        let id = |r: &Value| r["listener"]["id"].as_str().expect("id").to_owned();
        records(&result).iter().map(id).filter(|id| ours.contains(id)).collect()
    };
    let both: BTreeSet<String> = [inside.id(), outside.id()].into();
    let only = |listener: &Listener| BTreeSet::from([listener.id()]);
    let port = |listener: &Listener| listener.port().to_string();
    let none = BTreeSet::new();
    assert_eq!(ids(&[]), both);
    assert_eq!(ids(&["-N", &netns.name]), only(&inside));
    assert_eq!(ids(&["-N", &format!("inode:{}", inside.netns)]), only(&inside));
    assert_eq!(ids(&["-N", &std::process::id().to_string()]), only(&outside));
    assert_eq!(ids(&["-N", "/proc/self/ns/net"]), only(&outside));
    assert_eq!(ids(&["-4"]), only(&inside));
    assert_eq!(ids(&["-6"]), only(&outside));
    assert_eq!(ids(&["-46"]), both);
    assert_eq!(ids(&["-P", &port(&inside), "-4"]), only(&inside));
    assert_eq!(
        ids(&["-P", &format!("{}-{}", port(&outside), port(&outside)), "-6"]),
        only(&outside)
    );
    assert_eq!(ids(&["-p", &std::process::id().to_string()]), both);
    assert_eq!(ids(&["-p", "1"]), none);
    assert_eq!(ids(&["--comm", "no-such-name"]), none);
}
