//! Servers that open their own listener.

use std::{fmt::Write as _, os::unix::process::CommandExt as _, process::Command};

use serde_json::{Value, json};

use super::{
    Cgroup, PORT, SERVE, Scratch, Server, children, exe, holders, processes, program, python,
    sockets, talk, with_accepted, with_owners,
};
use crate::{
    lab::Netns,
    run::{Tracing, backends, sees_accept},
};

const NOBODY: u32 = 65534;
const GET: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

fn among(all: &Value, one: &Value) -> bool {
    all.as_array().expect("processes").contains(one)
}

/// Everything that it writes goes to the directory.
fn nginx(directory: &Scratch) -> Command {
    let home = directory.0.display();
    let mut config = format!(
        "daemon off; master_process on; worker_processes 4; user nobody nogroup;
         pid {home}/pid; error_log {home}/log;
         events {{ worker_connections 64; }}
         http {{
             access_log off;
             server {{ listen 127.0.0.1:{PORT}; return 200; }}\n"
    );
    for what in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(config, "{what}_temp_path {home}/{what};").expect("a line");
    }
    let config = directory.write("nginx.conf", &(config + "}"));
    let mut command = Command::new(program("nginx"));
    command.arg("-p").arg(&directory.0).arg("-e").arg(directory.0.join("log"));
    command.arg("-c").arg(config);
    command
}

/// A master that opens, four workers that accept; other workers after a reload.
#[test]
fn nginx_is_owned_by_its_master_and_its_workers() {
    const CONNECTIONS: usize = 13;
    for backend in backends() {
        let directory = Scratch::new("nginx");
        let netns = Netns::new("nginx");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let server = Server::start(&netns, &mut nginx(&directory));
        let master = server.pid();
        let [inode] = sockets(&netns, 1)[..] else { unreachable!() };
        let workers = children(master, 4);
        let all = [&[master], &workers[..]].concat();
        let record = with_owners(&tracing, inode, &holders(inode, &all));
        let owners = record["listener"]["owners"].as_array().expect("owners");
        assert_eq!(owners.len(), 5, "{backend}: {record:#}");
        assert!(owners.iter().all(|owner| owner["comm"] == "nginx"), "{backend}: {record:#}");
        assert_eq!(record["listener"]["opener"], processes(&[master])[0], "{backend}");
        assert_eq!(record["listener"]["acceptors"], json!([]), "{backend}: {record:#}");
        assert_eq!(record["listener"]["user"], "root", "{backend}: {record:#}");

        talk(&netns, GET, CONNECTIONS);
        let record = with_accepted(&tracing, backend, inode, CONNECTIONS);
        let acceptors = record["listener"]["acceptors"].as_array().expect("acceptors");
        assert_eq!(acceptors.is_empty(), !sees_accept(backend), "{backend}: {record:#}");
        let known = |one| among(&processes(&workers), one);
        assert!(acceptors.iter().all(known), "{backend}: {acceptors:?}, not of {workers:?}");
        assert_eq!(record["listener"]["exe"], exe(workers[0]), "{backend}: {record:#}");

        // SAFETY: a plain system call on our own child.
        let asked = unsafe { libc::kill(i32::try_from(master).expect("a pid"), libc::SIGHUP) };
        assert_eq!(asked, 0, "SIGHUP");
        let fresh = super::eventually("other workers", || {
            let now = children(master, 4);
            now.iter().all(|pid| !workers.contains(pid)).then_some(now)
        });
        let all = [&[master], &fresh[..]].concat();
        let record = with_owners(&tracing, inode, &holders(inode, &all));
        assert_eq!(record["listener"]["opener"], processes(&[master])[0], "{backend}");
        talk(&netns, GET, CONNECTIONS);
        let record = with_accepted(&tracing, backend, inode, 2 * CONNECTIONS);
        let acceptors = record["listener"]["acceptors"].as_array().expect("acceptors");
        let gone: Value = workers.iter().map(|pid| json!({"pid": pid, "comm": null})).collect();
        let fresh = processes(&fresh);
        let known = |one| among(&fresh, one) || among(&gone, one);
        assert!(acceptors.iter().all(known), "{backend}: {acceptors:?}, not of {all:?}");
        let new = acceptors.iter().any(|one| among(&fresh, one));
        assert_eq!(new, sees_accept(backend), "{backend}: {record:#}");
        tracing.stop();
    }
}

/// Two sockets on one port (SO_REUSEPORT), each with a descriptor, a count and an acceptor of its own.
#[test]
fn haproxy_owns_each_of_its_listeners() {
    const CONNECTIONS: usize = 17;
    for backend in backends() {
        let directory = Scratch::new("haproxy");
        let config = directory.write(
            "haproxy.cfg",
            &format!(
                "global
                    nbthread 2
                defaults
                    mode http
                    timeout connect 60s
                    timeout client 60s
                    timeout server 60s
                frontend web
                    bind 127.0.0.1:{PORT}
                    bind 127.0.0.1:{PORT}
                    http-request return status 200\n"
            ),
        );
        let netns = Netns::new("haproxy");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let mut command = Command::new(program("haproxy"));
        let server = Server::start(&netns, command.args(["-db", "-q", "-f"]).arg(config));
        let pid = server.pid();
        let inodes = sockets(&netns, 2);
        for &inode in &inodes {
            let record = with_owners(&tracing, inode, &holders(inode, &[pid]));
            let listener = &record["listener"];
            assert_eq!(listener["owners"].as_array().map(Vec::len), Some(1), "{backend}");
            assert_eq!(listener["owners"][0]["comm"], "haproxy", "{backend}: {record:#}");
            assert_eq!(listener["opener"], processes(&[pid])[0], "{backend}: {record:#}");
            assert_eq!(listener["reuseport"], true, "{backend}: {record:#}");
            assert_eq!(listener["exe"], exe(pid), "{backend}: {record:#}");
        }
        talk(&netns, GET, CONNECTIONS);
        tracing.wait_interval();
        let mut accepted = 0;
        for &inode in &inodes {
            let record = with_owners(&tracing, inode, &holders(inode, &[pid]));
            let count = record["totals"]["accepted"].as_u64();
            assert_eq!(count.is_some(), sees_accept(backend), "{backend}: {record:#}");
            let some = count.is_some_and(|count| count > 0);
            let expect = if some { processes(&[pid]) } else { json!([]) };
            assert_eq!(record["listener"]["acceptors"], expect, "{backend}: {record:#}");
            accepted += count.unwrap_or(0);
        }
        let expect = if sees_accept(backend) { CONNECTIONS } else { 0 };
        assert_eq!(accepted, u64::try_from(expect).expect("a count"), "{backend}");
        tracing.stop();
    }
}

/// An ordinary user's server, opened before the trace: all but the opener is known.
#[test]
fn redis_has_one_owner_an_executable_and_a_user() {
    const CONNECTIONS: usize = 5;
    for backend in backends() {
        let netns = Netns::new("redis");
        let mut command = Command::new(program("redis-server"));
        command.args(["--bind", "127.0.0.1", "--port", &PORT.to_string(), "--save", ""]);
        command.args(["--daemonize", "no", "--appendonly", "no", "--loglevel", "warning"]);
        let server = Server::start(&netns, command.current_dir("/").uid(NOBODY).gid(NOBODY));
        let pid = server.pid();
        let [inode] = sockets(&netns, 1)[..] else { unreachable!() };
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let owners = holders(inode, &[pid]);
        talk(&netns, b"PING\r\n", CONNECTIONS);
        let record = with_accepted(&tracing, backend, inode, CONNECTIONS);
        let listener = &record["listener"];
        assert_eq!(owners.as_array().map(Vec::len), Some(1));
        assert_eq!(listener["owners"], owners, "{backend}: {record:#}");
        assert_eq!(listener["owners"][0]["comm"], "redis-server", "{backend}: {record:#}");
        assert_eq!(listener["opener"], Value::Null, "{backend}: {record:#}");
        let acceptors = if sees_accept(backend) { processes(&[pid]) } else { json!([]) };
        assert_eq!(listener["acceptors"], acceptors, "{backend}: {record:#}");
        assert_eq!(listener["exe"], exe(pid), "{backend}: {record:#}");
        let (user, uid) = (&listener["user"], &listener["uid"]);
        assert_eq!((user, uid), (&json!("nobody"), &json!(NOBODY)), "{backend}: {record:#}");
        let run = tracing.stop();
        // From the first record on.
        for interval in run.intervals() {
            let mine = interval.iter().find(|r| r["listener"]["inode"] == inode).expect("a record");
            assert_eq!(mine["listener"]["owners"], owners, "{backend}: {mine:#}");
        }
    }
}

/// What a container has: a network namespace, here one younger than the trace, and a control group.
#[test]
fn a_server_in_namespaces_has_their_names() {
    const CONNECTIONS: usize = 3;
    let script = format!(
        "import _socket
listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
listener.bind(('127.0.0.1', {PORT}))
listener.listen(7)
{SERVE}"
    );
    for backend in backends() {
        let cgroup = Cgroup::new("web");
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let netns = Netns::new("web");
        let server = Server::start(&netns, &mut python(&script, cgroup.as_ref()));
        let pid = server.pid();
        let [inode] = sockets(&netns, 1)[..] else { unreachable!() };
        let owners = holders(inode, &[pid]);
        with_owners(&tracing, inode, &owners);
        // Not at once: the namespace may have got the number of one that has just gone.
        let name = netns.name.as_str();
        tracing.wait_for(&format!("inode {inode} and namespace {name}"), |r| {
            r["listener"]["inode"] == inode && r["listener"]["netns_name"] == name
        });
        talk(&netns, b"", CONNECTIONS);
        let record = with_accepted(&tracing, backend, inode, CONNECTIONS);
        let listener = &record["listener"];
        assert_eq!(listener["owners"], owners, "{backend}: {record:#}");
        assert_eq!(listener["opener"], processes(&[pid])[0], "{backend}: {record:#}");
        assert_eq!(listener["netns"], netns.within(crate::lab::netns), "{backend}: {record:#}");
        assert_eq!(listener["netns_name"], name, "{backend}: {record:#}");
        assert_eq!(listener["container"], Value::Null, "{backend}: {record:#}");
        assert_eq!(listener["exe"], exe(pid), "{backend}: {record:#}");
        if let Some(cgroup) = &cgroup {
            assert_eq!(listener["cgroup"], cgroup.name.as_str(), "{backend}: {record:#}");
            assert_eq!(listener["unit"], cgroup.unit(), "{backend}: {record:#}");
        }
        tracing.stop();
        // Before its control group goes.
        drop(server);
    }
}
