//! Where a situation is built: a namespace, its servers, its clients.

use std::{net::SocketAddr, process::Command, time::Duration};

use socket2::Socket;

use crate::{
    lab::{self, Netns},
    process::{Scratch, Server, program},
    wire::{Reply, SERVER4, Wire},
};

pub(super) const PORT: u16 = 8080;

/// Python without its library. What follows opens its listener, prints that it is ready and accepts, or not.
const PYTHON: &str = "
import _socket, os, sys, time
def listen(address, backlog, group=False):
    family = _socket.AF_UNIX if isinstance(address, str) else _socket.AF_INET
    s = _socket.socket(family, _socket.SOCK_STREAM)
    if family == _socket.AF_INET:
        s.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if group:
            s.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 1)
    s.bind(address)
    s.listen(backlog)
    return s
def ready():
    print('ready', flush=True)
def serve(s, pause=0):
    while True:
        fd, _ = s._accept()
        if pause:
            time.sleep(pause)
        os.close(fd)
";

pub(super) struct Stage {
    pub(super) netns: Netns,
    pub(super) scratch: Scratch,
    pub(super) servers: Vec<Server>,
    clients: Vec<Socket>,
    wire: Option<Wire>,
    /// Added to the ports of clients on the wire: what they had before may not have ended yet.
    pub(super) ports: u16,
    /// What was advised.
    pub(super) backlog: Option<u32>,
    /// How many servers, where that was advised; 0 before.
    pub(super) workers: usize,
    /// Whatever else was advised was done.
    pub(super) mended: bool,
    /// The servers have to be started anew for it.
    pub(super) restart: bool,
}

impl Stage {
    pub(super) fn new(name: &str) -> Self {
        Self {
            netns: Netns::new(name),
            scratch: Scratch::new(name),
            servers: Vec::new(),
            clients: Vec::new(),
            wire: None,
            ports: 0,
            backlog: None,
            workers: 0,
            mended: false,
            restart: false,
        }
    }

    /// Sets a sysctl of the namespace.
    pub(super) fn set(&self, name: &str, value: u32) {
        let path = format!("/proc/sys/net/{name}");
        let write = || std::fs::write(&path, value.to_string());
        self.netns.within(write).unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    /// The advised backlog, or what the situation begins with.
    pub(super) fn backlog(&self, first: u32) -> u32 {
        self.backlog.unwrap_or(first)
    }

    pub(super) fn address(&self) -> SocketAddr {
        let loopback = [127, 0, 0, 1].into();
        let address = if self.wire.is_some() { SERVER4.into() } else { loopback };
        SocketAddr::new(address, PORT)
    }

    /// Starts a Python server that prints `ready`, and waits for that.
    pub(super) fn python(&mut self, script: &str) {
        let mut command = Command::new(program("python3"));
        command.args(["-I", "-S", "-c", &format!("{PYTHON}{script}")]);
        let server = Server::start(&self.netns, &mut command);
        assert_eq!(server.hear(), "ready");
        self.servers.push(server);
    }

    /// A Python server that accepts at once.
    pub(super) fn accepts(&mut self, backlog: u32) {
        let address = self.address().ip();
        self.python(&format!("s = listen(('{address}', {PORT}), {backlog})\nready()\nserve(s)"));
    }

    /// A signal to the first server and its children.
    pub(super) fn signal(&self, signal: i32) {
        let group = i32::try_from(self.servers[0].pid()).expect("a process id");
        // SAFETY: a plain system call on the group that was made for our own child.
        assert_eq!(unsafe { libc::kill(-group, signal) }, 0);
    }

    /// Clients that connect, each some time after the one before, and stay.
    pub(super) fn connect(&mut self, count: usize, gap: Duration) {
        self.connect_to(self.address(), count, gap);
    }

    /// Clients that go away when they do not get in at once.
    pub(super) fn connect_or_go(&mut self, count: usize, gap: Duration) {
        let address = self.address();
        let sockets = self.netns.within(|| {
            let one = |_| {
                std::thread::sleep(gap);
                let socket = lab::connect(address, 1).remove(0);
                // On this machine a handshake takes no longer than that.
                socket.peer_addr().is_ok().then_some(socket)
            };
            (0..count).filter_map(one).collect::<Vec<_>>()
        });
        self.clients.extend(sockets);
    }

    pub(super) fn connect_to(&mut self, address: SocketAddr, count: usize, gap: Duration) {
        let sockets = self.netns.within(|| {
            let one = |_| {
                std::thread::sleep(gap);
                lab::connect(address, 1).remove(0)
            };
            (0..count).map(one).collect::<Vec<_>>()
        });
        self.clients.extend(sockets);
    }

    /// A burst: so many connect while the first server does nothing for a moment, and are gone then.
    pub(super) fn burst(&mut self, count: usize) {
        self.signal(libc::SIGSTOP);
        let address = self.address();
        let sockets = self.netns.within(|| lab::connect(address, count));
        self.signal(libc::SIGCONT);
        // Those that found no room would send their SYN again.
        drop(sockets);
    }

    /// The clients go.
    pub(super) fn end_clients(&mut self) {
        self.clients.clear();
    }

    /// A wire to clients elsewhere, of whatever address.
    pub(super) fn cable(&mut self) {
        self.wire = Some(self.netns.within(|| {
            let wire = Wire::new();
            lab::ip("route add default dev wire0");
            wire
        }));
    }

    pub(super) fn wire(&mut self) -> &mut Wire {
        self.wire.as_mut().expect("a wire")
    }

    /// SYNs from so many ports, and the SYN-ACKs for them.
    pub(super) fn syns(&mut self, first: u16, count: u16) -> Vec<Reply> {
        let (address, first) = (self.address(), first + self.ports);
        let mut syn_acks = self.wire().syns(first, count, address);
        syn_acks.retain(|reply| (first..first + count).contains(&reply.port));
        syn_acks
    }

    pub(super) fn acks(&mut self, syn_acks: &[Reply]) {
        let address = self.address();
        self.wire().acks(address, syn_acks);
    }
}
