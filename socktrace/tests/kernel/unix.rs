//! AF_UNIX listeners.

use std::{
    os::{
        fd::AsRawFd as _,
        linux::net::SocketAddrExt as _,
        unix::{
            fs::MetadataExt as _,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    time::Duration,
};

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    lab::{netns, ss},
    run::{Finished, Tracing, backends, output, records, sees_calls},
};

/// A listening socket at a path of its own.
struct Server {
    socket: Socket,
    path: PathBuf,
    inode: u64,
}

impl Server {
    fn new(name: &str, kind: Type, backlog: i32) -> Self {
        let path = std::env::temp_dir().join(format!("socktrace-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let socket = Socket::new(Domain::UNIX, kind, None).expect("socket");
        socket.bind(&SockAddr::unix(&path).expect("a path")).expect("bind");
        socket.listen(backlog).expect("listen");
        let inode = inode(&socket);
        Self { socket, path, inode }
    }

    fn path(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    fn connect(&self, kind: Type, count: usize) -> Vec<Socket> {
        let one = |_| {
            let client = Socket::new(Domain::UNIX, kind, None).expect("socket");
            client.connect(&SockAddr::unix(&self.path).expect("a path")).expect("connect");
            client
        };
        (0..count).map(one).collect()
    }

    /// A connect that does not wait; returns what it got.
    fn try_connect(&self) -> Option<i32> {
        let client = Socket::new(Domain::UNIX, Type::STREAM, None).expect("socket");
        client.set_nonblocking(true).expect("O_NONBLOCK");
        let to = SockAddr::unix(&self.path).expect("a path");
        client.connect(&to).err().and_then(|error| error.raw_os_error())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn inode(socket: &Socket) -> u64 {
    let path = format!("/proc/thread-self/fd/{}", socket.as_raw_fd());
    std::fs::metadata(path).expect("stat").ino()
}

/// The records of the listener with this inode, one an interval.
fn of(run: &Finished, inode: u64) -> Vec<&Value> {
    let mine = |r: &&Value| r["type"] == "listener" && r["listener"]["inode"] == inode;
    run.records.iter().filter(mine).collect()
}

/// `(Recv-Q, Send-Q)` of `ss` for a listening socket's path.
fn ss_queue(path: &str) -> (u64, u64) {
    let line = ss("-Hlx").into_iter().find(|line| line.iter().any(|word| word == path));
    let line = line.unwrap_or_else(|| panic!("ss does not show {path}"));
    (line[2].parse().expect("Recv-Q"), line[3].parse().expect("Send-Q"))
}

/// Whether a backend has hooks for AF_UNIX.
fn counts(backend: &str) -> bool {
    backend != "tracepoint"
}

/// A backlog of 4 lets 5 in, as with TCP; depth, limit and path are what `ss` shows.
#[test]
fn a_unix_listener_is_a_listener() {
    for backend in backends() {
        for (kind, name) in [(Type::STREAM, "stream"), (Type::SEQPACKET, "seqpacket")] {
            let older = Server::new(&format!("older-{name}"), kind, 4);
            let waiting = older.connect(kind, 2);
            let tracing = Tracing::start(backend, &["-i", "500ms", "-x"]);
            let younger = Server::new(&format!("younger-{name}"), kind, 4);
            let clients = [older.connect(kind, 3), younger.connect(kind, 5)];
            // One that nothing tells of is found when the owners are looked through again.
            tracing.wait_events(|records| {
                records.iter().any(|r| r["listener"]["inode"] == younger.inode)
            });
            tracing.wait_interval();
            tracing.wait_interval();
            let run = tracing.stop();
            for (server, age) in [(&older, "older"), (&younger, "younger")] {
                let what = format!("{backend}, {name}, {age}");
                assert_eq!(ss_queue(server.path()), (5, 4), "{what}: ss");
                let last = of(&run, server.inode).pop().unwrap_or_else(|| panic!("{what}"));
                let listener = &last["listener"];
                assert_eq!(listener["family"], "unix", "{what}");
                assert_eq!(listener["transport"], "unix", "{what}");
                assert_eq!(listener["socket_type"], name, "{what}");
                assert_eq!(listener["path"], server.path(), "{what}");
                assert!(listener["address"].is_null() && listener["port"].is_null(), "{what}");
                assert_eq!(listener["netns"], netns(), "{what}");
                assert_eq!(listener["owners"][0]["pid"], std::process::id(), "{what}: {last:#}");
                let queue = &last["accept_queue"];
                assert_eq!((&queue["depth"], &queue["limit"]), (&5.into(), &4.into()), "{what}");
                assert_eq!(queue["capacity"], 5, "{what}");
                let peak = if counts(backend) { 5.into() } else { Value::Null };
                assert_eq!(queue["peak"], peak, "{what}: {last:#}");
                assert!(last["syn_queue"]["depth"].is_null(), "{what}: {last:#}");
            }
            if sees_calls(backend) {
                let last = of(&run, younger.inode).pop().expect("a record");
                assert_eq!(last["backlog"]["requested"], 4, "{backend}: {last:#}");
                assert_eq!(last["listener"]["opener"]["pid"], std::process::id(), "{backend}");
            }
            drop((clients, waiting));
        }
    }
}

/// Connects that find the queue full: those that wait, and those that get EAGAIN, as many as there were.
#[test]
fn a_full_unix_queue_counts_who_waited_and_who_was_refused() {
    const REFUSED: usize = 7;
    const WAITERS: usize = 3;
    for backend in backends().iter().filter(|backend| counts(backend)) {
        let server = Server::new("full", Type::STREAM, 2);
        let tracing = Tracing::start(backend, &["-i", "500ms", "-x"]);
        tracing.wait_interval();
        let clients = server.connect(Type::STREAM, 3);
        for _ in 0..REFUSED {
            assert_eq!(server.try_connect(), Some(libc::EAGAIN));
        }
        let accepted = std::thread::scope(|scope| {
            let waiters: Vec<_> =
                (0..WAITERS).map(|_| scope.spawn(|| server.connect(Type::STREAM, 1))).collect();
            // Until all of them wait.
            let waiting = || {
                let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
                let states = tasks
                    .flatten()
                    .filter_map(|task| std::fs::read_to_string(task.path().join("wchan")).ok());
                states.filter(|state| state.contains("unix_wait_for_peer")).count()
            };
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while waiting() < WAITERS && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(50));
            }
            std::thread::sleep(Duration::from_millis(200));
            let accepted: Vec<_> =
                (0..3 + WAITERS).map(|_| server.socket.accept().expect("accept")).collect();
            for waiter in waiters {
                waiter.join().expect("a client");
            }
            accepted
        });
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        let last = of(&run, server.inode).pop().expect("a record");
        let totals = &last["totals"];
        assert_eq!(totals["connects_refused"], REFUSED, "{backend}: {last:#}");
        assert_eq!(totals["connects_waited"], WAITERS, "{backend}: {last:#}");
        assert_eq!(totals["established"], 3 + WAITERS, "{backend}: {last:#}");
        assert_eq!(totals["accepted"], 3 + WAITERS, "{backend}: {last:#}");
        assert_eq!(last["accept_wait"]["count"], 3 + WAITERS, "{backend}: {last:#}");
        let longest = last["accept_wait"]["max_us"].as_u64().expect("a time");
        assert!(longest >= 200_000, "{backend}: the first waited 200 ms at least: {longest} us");
        let peaks =
            of(&run, server.inode).into_iter().filter_map(|r| r["accept_queue"]["peak"].as_u64());
        assert_eq!(peaks.max(), Some(3), "{backend}");
        assert!(totals["syns"].is_null(), "{backend}: {last:#}");
        drop((clients, accepted));
    }
}

/// Connections that nobody accepted end with their listener.
#[test]
fn what_waits_is_lost_when_a_unix_listener_closes() {
    for backend in backends().iter().filter(|backend| counts(backend)) {
        let tracing = Tracing::start(backend, &["-i", "500ms", "-x"]);
        let server = Server::new("closes", Type::STREAM, 16);
        let clients = server.connect(Type::STREAM, 5);
        tracing.wait_interval();
        tracing.wait_interval();
        let inode = server.inode;
        drop(server);
        // There may be no other listener, so its last record is the last of all.
        let last = |r: &Value| r["listener"]["inode"] == inode && r["closed"] == true;
        tracing.wait_events(|records| records.iter().any(last));
        let run = tracing.stop();
        let last = of(&run, inode).pop().expect("a record");
        assert_eq!(last["closed"], true, "{backend}: {last:#}");
        assert_eq!(last["totals"]["lost_on_close"], 5, "{backend}: {last:#}");
        drop(clients);
    }
}

/// A name that is no path, with bytes that a terminal would obey.
#[test]
fn abstract_names_are_shown_and_harmless() {
    let name = format!("\x1b[31msocktrace-{}\n", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("bind");
    let run = output(&["list", "--json", "-x"]);
    let shown = |r: &Value| r["listener"]["path"] == format!("@{name}");
    assert!(records(&run).iter().any(shown), "{:#?}", records(&run));
    let table = String::from_utf8(output(&["list", "-x"]).stdout).expect("UTF-8");
    assert!(!table.contains('\x1b'), "{table:?}");
    assert!(table.contains("@\\u{1b}[31msocktrace-"), "{table}");
    drop(listener);
}

/// The life of an AF_UNIX listener as events.
#[test]
fn unix_sockets_have_events() {
    for backend in backends().iter().filter(|backend| sees_calls(backend)) {
        let tracing =
            Tracing::verb("events", backend, &["-x", "-p", &std::process::id().to_string()]);
        let server = Server::new("events", Type::STREAM, 2);
        let path = server.path().to_owned();
        let clients = server.connect(Type::STREAM, 3);
        assert_eq!(server.try_connect(), Some(libc::EAGAIN));
        let accepted: Vec<_> = (0..3).map(|_| server.socket.accept().expect("accept")).collect();
        assert!(UnixListener::bind(&path).is_err());
        drop(server);
        assert!(UnixStream::connect(&path).is_err());
        std::thread::sleep(Duration::from_millis(500));
        let run = tracing.stop();
        let binds = run.events("bind");
        let of = |errno: Value| binds.iter().filter(|r| r["errno"] == errno).count();
        assert_eq!((of(Value::Null), of("EADDRINUSE".into())), (1, 1), "{backend}: {binds:#?}");
        assert!(binds.iter().all(|r| r["path"] == path), "{backend}: {binds:#?}");
        assert_eq!(run.events("listen").len(), 1, "{backend}");
        assert_eq!(run.events("listen")[0]["backlog"]["requested"], 2, "{backend}");
        let connects = run.events("connect");
        let errors: Vec<&Value> = connects.iter().map(|r| &r["errno"]).collect();
        let expect = ["", "", "", "EAGAIN", "ENOENT"];
        let expect: Vec<Value> =
            expect.map(|e| if e.is_empty() { Value::Null } else { e.into() }).to_vec();
        assert_eq!(errors, expect.iter().collect::<Vec<_>>(), "{backend}: {connects:#?}");
        assert!(connects.iter().all(|r| r["destination"]["path"] == path), "{backend}");
        if counts(backend) {
            assert_eq!(run.events("established").len(), 3, "{backend}");
            assert_eq!(run.events("accept").len(), 3, "{backend}");
            assert_eq!(run.events("close").len(), 1, "{backend}");
            assert_eq!(run.events("accept")[0]["listener"]["path"], path, "{backend}");
            assert!(run.events("accept").iter().all(|r| r["accept_wait_us"].is_u64()), "{backend}");
            // With the connection itself, one after another.
            let depths: Vec<_> = run
                .events("established")
                .iter()
                .map(|r| r["accept_queue_depth"].as_u64())
                .collect();
            assert_eq!(depths, [Some(1), Some(2), Some(3)], "{backend}");
        }
        // A path that leads nowhere is nobody's loss.
        assert_eq!(run.summary()["lost_events"], 0, "{backend}: {:#}", run.summary());
        drop((clients, accepted));
    }
}
