//! Whom a listener belongs to, with servers that people run.
//!
//! Truth: the processes that were started and their children, `/proc` and `ss`. Each server lives in a
//! network namespace of its own, where its port is free.

mod handover;
mod servers;

use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    os::{fd::RawFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    lab::{Netns, connected, ss},
    process::{Scratch, Server, eventually, program},
    run::{PATIENCE, Tracing, in_vm, sees_accept},
};

const PORT: u16 = 8080;

/// Python that answers each connection by a byte, from a `listener`.
const SERVE: &str = "
while True:
    fd, _ = listener._accept()
    peer = _socket.socket(fileno=fd)
    peer.send(b'x')
    peer.close()
";

/// A control group with a unit's name, where one can be made.
struct Cgroup {
    directory: PathBuf,
    name: String,
}

impl Cgroup {
    /// Under version 2, or under the part of it that a host with version 1 has.
    fn new(name: &str) -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let root = roots.into_iter().find(|root| root.join("cgroup.procs").exists());
        let name = format!("/socktrace.slice/{name}-{}.service", std::process::id());
        let made = root.map(|root| root.join(&name[1..])).filter(|directory| {
            fs::create_dir_all(directory).is_ok() && directory.join("cgroup.procs").exists()
        });
        assert!(made.is_some() || !in_vm(), "the guests have control groups");
        Some(Self { directory: made?, name })
    }

    fn unit(&self) -> &str {
        self.name.rsplit('/').next().expect("a segment")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes that were killed are still on their way out.
        eventually("an empty control group", || fs::remove_dir(&self.directory).ok());
        // Another run of the tests may have something there.
        let _ = self.directory.parent().map(fs::remove_dir);
    }
}

/// Python without its library, as a service is started: `LISTEN_PID` is its own process id, and the
/// control group is its own where there is one.
fn python(script: impl AsRef<OsStr>, cgroup: Option<&Cgroup>) -> Command {
    // A shell keeps its process id when it becomes another program.
    let become_it = "export LISTEN_PID=$$
        [ -z \"$CGROUP\" ] || echo 0 > \"$CGROUP/cgroup.procs\"
        exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", become_it, "sh"]).arg(program("python3")).args(["-I", "-S", "-c"]);
    command.arg(script);
    if let Some(cgroup) = cgroup {
        command.env("CGROUP", &cgroup.directory);
    }
    command
}

/// Makes `fd` the child's descriptor 3.
fn as_third(command: &mut Command, fd: RawFd) -> &mut Command {
    const THIRD: RawFd = 3;
    // SAFETY: plain system calls in the child. `dup2` to itself would keep the descriptor's flags.
    unsafe {
        command.pre_exec(move || {
            if fd == THIRD {
                libc::fcntl(fd, libc::F_SETFD, 0);
            } else {
                libc::dup2(fd, THIRD);
            }
            Ok(())
        })
    }
}

/// The sockets that listen on the port, by their inodes, once there are as many.
fn sockets(netns: &Netns, count: usize) -> Vec<u64> {
    let words = format!("-Hlnte sport = :{PORT}");
    let inode = |line: &Vec<String>| {
        line.iter().find_map(|word| word.strip_prefix("ino:")?.parse().ok()).filter(|&ino| ino != 0)
    };
    eventually("sockets that listen", || {
        let inodes: Vec<u64> = netns.within(|| ss(&words)).iter().filter_map(inode).collect();
        (inodes.len() == count).then_some(inodes)
    })
}

/// Makes connections, all of them open at once, and waits until each was answered.
fn talk(netns: &Netns, request: &[u8], count: usize) {
    netns.within(|| {
        for mut socket in connected(([127, 0, 0, 1], PORT).into(), count) {
            socket.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
            socket.write_all(request).expect("a request");
            assert!(socket.read(&mut [0; 64]).expect("an answer") > 0, "no answer");
        }
    });
}

fn proc(pid: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

fn comm(pid: u32) -> String {
    fs::read_to_string(proc(pid, "comm")).expect("a process").trim_end().to_owned()
}

fn exe(pid: u32) -> Value {
    json!(fs::read_link(proc(pid, "exe")).expect("a process").to_str())
}

/// What a record must say of processes: each with its name.
fn processes(pids: &[u32]) -> Value {
    pids.iter().map(|&pid| json!({"pid": pid, "comm": comm(pid)})).collect()
}

/// What `owners` must be: the descriptors of these processes that lead to the socket.
fn holders(inode: u64, pids: &[u32]) -> Value {
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    let mut holders = Vec::new();
    for &pid in pids {
        for entry in fs::read_dir(proc(pid, "fd")).expect("descriptors").flatten() {
            if fs::read_link(entry.path()).is_ok_and(|target| target == socket) {
                let name = entry.file_name().into_string().expect("UTF-8");
                holders.push((pid, name.parse::<u32>().expect("a number")));
            }
        }
    }
    holders.sort_unstable();
    let owner = |&(pid, fd): &_| json!({"pid": pid, "comm": comm(pid), "fd": fd});
    holders.iter().map(owner).collect()
}

/// The processes that a process started, once there are as many.
fn children(parent: u32, count: usize) -> Vec<u32> {
    eventually("the children of a server", || {
        let mut children = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            // pid (comm) state ppid
            let mut words = stat.rsplit(')').next()?.split_whitespace();
            if words.nth(1)?.parse() == Ok(parent) {
                children.push(entry.file_name().to_str()?.parse().ok()?);
            }
        }
        children.sort_unstable();
        (children.len() == count).then_some(children)
    })
}

/// The first record from now on in which the socket has these owners.
fn with_owners(tracing: &Tracing, inode: u64, owners: &Value) -> Value {
    assert_ne!(owners, &json!([]), "nobody holds {inode}");
    let what = format!("inode {inode} and owners {owners}");
    tracing
        .wait_for(&what, |r| r["listener"]["inode"] == inode && r["listener"]["owners"] == *owners)
}

/// A record of the socket that tells of so many connections that were accepted: the backend counts
/// them, or time has passed since.
fn with_accepted(tracing: &Tracing, backend: &str, inode: u64, count: usize) -> Value {
    let expect = if sees_accept(backend) { json!(count) } else { Value::Null };
    tracing.wait_interval();
    let what = format!("inode {inode} and {count} accepted");
    tracing
        .wait_for(&what, |r| r["listener"]["inode"] == inode && r["totals"]["accepted"] == expect)
}
