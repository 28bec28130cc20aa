//! Listeners that are not held by whoever opened them.

use std::{
    collections::BTreeSet,
    os::{fd::AsRawFd as _, unix::net::UnixStream},
};

use serde_json::{Value, json};

use super::{
    Cgroup, PORT, SERVE, Server, as_third, exe, holders, processes, python, sockets, talk,
    with_accepted, with_owners,
};
use crate::{
    lab::{Listener, Netns},
    run::{Tracing, backends, sees_accept},
};

/// As systemd does it: one process opens, another, which gets the socket as descriptor 3, accepts.
#[test]
fn an_activated_service_is_told_from_its_opener_by_owners() {
    const CONNECTIONS: usize = 3;
    let script = format!(
        "import _socket, os
assert os.environ['LISTEN_FDS'] == '1' and os.environ['LISTEN_PID'] == str(os.getpid())
listener = _socket.socket(fileno=3)
{SERVE}"
    );
    let me = std::process::id();
    for backend in backends() {
        let cgroup = Cgroup::new("activated");
        let netns = Netns::new("activated");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let listener = netns.within(|| Listener::new(&format!("127.0.0.1:{PORT}"), 7));
        let inode = listener.inode;
        let mut command = python(&script, cgroup.as_ref());
        command.env("LISTEN_FDS", "1");
        let server = Server::start(&netns, as_third(&mut command, listener.socket.as_raw_fd()));
        talk(&netns, b"", CONNECTIONS);
        let pid = server.pid();
        let opener = processes(&[me])[0].clone();
        let acceptors = if sees_accept(backend) { processes(&[pid]) } else { json!([]) };
        let check = |record: &Value, process: u32| {
            let listener = &record["listener"];
            assert_eq!(listener["opener"], opener, "{backend}: {record:#}");
            assert_eq!(listener["acceptors"], acceptors, "{backend}: {record:#}");
            assert_eq!(listener["exe"], exe(process), "{backend}: {record:#}");
            if let Some(cgroup) = &cgroup {
                let service = process == pid;
                assert_eq!(listener["cgroup"] == cgroup.name.as_str(), service, "{record:#}");
                assert_eq!(listener["unit"] == cgroup.unit(), service, "{backend}: {record:#}");
            }
        };
        with_owners(&tracing, inode, &holders(inode, &[me, pid]));
        let record = with_accepted(&tracing, backend, inode, CONNECTIONS);
        // Where nobody sees who accepts, the first holder stands for the listener.
        check(&record, if sees_accept(backend) { pid } else { me.min(pid) });

        drop(listener);
        let record = with_owners(&tracing, inode, &holders(inode, &[pid]));
        assert_eq!(record["closed"], false, "{backend}: {record:#}");
        check(&record, pid);
        tracing.stop();
        // Before its control group goes.
        drop(server);
    }
}

/// Passed on over a UNIX socket, on its way held by nobody at all.
#[test]
fn a_socket_that_was_passed_on_has_its_receiver_among_the_owners() {
    const CONNECTIONS: usize = 3;
    let opens = format!(
        "import _socket, os, sys
os.write(os.open('/proc/self/comm', os.O_WRONLY), b'passer')
listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
listener.bind(('127.0.0.1', {PORT}))
listener.listen(7)
rights = listener.fileno().to_bytes(4, sys.byteorder)
_socket.socket(fileno=3).sendmsg([b'x'], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])"
    );
    let receives = format!(
        "import _socket, sys
_, ancillary, _, _ = _socket.socket(fileno=3).recvmsg(1, _socket.CMSG_SPACE(4))
listener = _socket.socket(fileno=int.from_bytes(ancillary[0][2][:4], sys.byteorder))
print('received', flush=True)
{SERVE}"
    );
    for backend in backends() {
        let netns = Netns::new("passed");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let (from, to) = UnixStream::pair().expect("a pair");
        let mut command = python(&opens, None);
        let mut sender = Server::start(&netns, as_third(&mut command, from.as_raw_fd()));
        assert!(sender.ended().success());
        let opener = json!({"pid": sender.pid(), "comm": "passer"});
        let [inode] = sockets(&netns, 1)[..] else { unreachable!() };
        let record = tracing.wait_for("a socket on its way", |r| {
            r["listener"]["inode"] == inode && r["listener"]["owners"] == json!([])
        });
        assert_eq!(record["listener"]["opener"], opener, "{backend}: {record:#}");
        assert_eq!(record["listener"]["exe"], Value::Null, "{backend}: {record:#}");

        let mut command = python(&receives, None);
        let receiver = Server::start(&netns, as_third(&mut command, to.as_raw_fd()));
        let pid = receiver.pid();
        assert_eq!(receiver.hear(), "received");
        let owners = holders(inode, &[pid]);
        with_owners(&tracing, inode, &owners);
        talk(&netns, b"", CONNECTIONS);
        let record = with_accepted(&tracing, backend, inode, CONNECTIONS);
        let listener = &record["listener"];
        let acceptors = if sees_accept(backend) { processes(&[pid]) } else { json!([]) };
        assert_eq!(listener["owners"], owners, "{backend}: {record:#}");
        assert_eq!(listener["opener"], opener, "{backend}: {record:#}");
        assert_eq!(listener["acceptors"], acceptors, "{backend}: {record:#}");
        assert_eq!(listener["exe"], exe(pid), "{backend}: {record:#}");
        tracing.stop();
    }
}

/// Processes that are killed at any moment of an interval, while they are looked up too.
#[test]
fn owners_that_die_while_they_are_looked_up_leave_nothing() {
    const PROCESSES: usize = 97;
    let script = format!(
        "import _socket, os, time
for turn in range({PROCESSES}):
    ready, listens = os.pipe()
    child = os.fork()
    if child == 0:
        listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        listener.bind(('127.0.0.1', 0))
        listener.listen(7)
        os.write(listens, b'x')
        while True:
            time.sleep(60)
    os.read(ready, 1)
    time.sleep(turn % 7 * 0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(listens)
    print(child, flush=True)"
    );
    for backend in backends() {
        let netns = Netns::new("mortal");
        // Intervals without a listener have no record to wait for.
        let keeper = Listener::new("127.0.0.1:0", 7);
        let tracing = Tracing::start(backend, &["-i", "100ms"]);
        let mut server = Server::start(&netns, &mut python(&script, None));
        let name = "python3";
        let pids: BTreeSet<u64> =
            (0..PROCESSES).map(|_| server.hear().parse().expect("a pid")).collect();
        assert!(server.ended().success());
        for _ in 0..3 {
            tracing.wait_interval();
        }
        let inside = netns.within(crate::lab::netns);
        let run = tracing.stop();
        let mut seen = BTreeSet::new();
        for record in run.records.iter().filter(|r| r["listener"]["netns"] == inside) {
            let listener = &record["listener"];
            let opener = &listener["opener"];
            assert!(
                opener["pid"].as_u64().is_some_and(|pid| pids.contains(&pid)),
                "{backend}: {record:#}"
            );
            assert_eq!(opener["comm"], name, "{backend}: {record:#}");
            for owner in listener["owners"].as_array().expect("owners") {
                assert_eq!(owner["pid"], opener["pid"], "{backend}: {record:#}");
                assert_eq!(owner["comm"], name, "{backend}: {record:#}");
            }
            seen.insert(opener["pid"].as_u64());
        }
        assert_eq!(seen.len(), PROCESSES, "{backend}: not each was seen");
        let last = run.intervals().pop().expect("intervals");
        let left: Vec<_> = last.iter().filter(|r| r["listener"]["netns"] == inside).collect();
        assert!(left.is_empty(), "{backend}: {left:#?}");
        assert!(last.iter().any(|r| r["listener"]["id"] == keeper.id()), "{backend}");
        assert_eq!(run.summary()["lost_events"], 0, "{backend}: {:#?}", run.stderr);
        let bad = |line: &&String| line.contains("error") || line.contains("panicked");
        assert_eq!(run.stderr.iter().find(bad), None, "{backend}");
    }
}
