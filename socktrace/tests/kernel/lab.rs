//! Sockets, namespaces and what `ss` says of them.

use std::{
    collections::BTreeMap,
    fs::File,
    net::SocketAddr,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    process::Command,
};

use socket2::{Domain, Protocol, Socket, Type};

/// A listening socket and what the kernel calls it.
pub(crate) struct Listener {
    pub(crate) socket: Socket,
    pub(crate) address: SocketAddr,
    pub(crate) netns: u64,
    pub(crate) inode: u64,
    mptcp: bool,
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Kind {
    pub(crate) reuseport: bool,
    pub(crate) v6only: Option<bool>,
    pub(crate) mptcp: bool,
}

/// `IPPROTO_MPTCP`
const MPTCP: i32 = 262;

impl Listener {
    pub(crate) fn new(address: &str, backlog: i32) -> Self {
        Self::with(address, backlog, Kind::default())
    }

    pub(crate) fn with(address: &str, backlog: i32, kind: Kind) -> Self {
        let address: SocketAddr = address.parse().expect("address");
        let protocol = if kind.mptcp { Protocol::from(MPTCP) } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))
            .expect("socket");
        socket.set_reuse_address(true).expect("SO_REUSEADDR");
        if kind.reuseport {
            socket.set_reuse_port(true).expect("SO_REUSEPORT");
        }
        if let Some(only) = kind.v6only {
            socket.set_only_v6(only).expect("IPV6_V6ONLY");
        }
        socket.bind(&address.into()).expect("bind");
        socket.listen(backlog).expect("listen");
        Self::around(socket, kind.mptcp)
    }

    /// `listen()` on a socket that was never bound.
    pub(crate) fn unbound(backlog: i32) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("socket");
        socket.listen(backlog).expect("listen");
        Self::around(socket, false)
    }

    fn around(socket: Socket, mptcp: bool) -> Self {
        let address = socket.local_addr().expect("name").as_socket().expect("an internet address");
        let stat = std::fs::metadata(format!("/proc/thread-self/fd/{}", socket.as_raw_fd()));
        Self { socket, address, netns: netns(), inode: stat.expect("stat").ino(), mptcp }
    }

    /// The id that socktrace must give it, from the socket itself. The socket that listens for an
    /// MPTCP one is its first subflow, which `ss -lt` shows and nobody has a descriptor of.
    pub(crate) fn id(&self) -> String {
        format!("{}:{}", self.netns, self.cookie())
    }

    pub(crate) fn cookie(&self) -> u64 {
        if self.mptcp {
            let line = ss_line(self.inode);
            let cookie = line.iter().find_map(|word| word.strip_prefix("sk:")).expect("a cookie");
            return u64::from_str_radix(cookie, 16).expect("a number");
        }
        let mut cookie = 0_u64;
        let mut length = 8;
        // SAFETY: the kernel writes 8 bytes.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0, "SO_COOKIE");
        cookie
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Accepts everything that waits and returns how many that were.
    pub(crate) fn drain(&self) -> usize {
        self.socket.set_nonblocking(true).expect("O_NONBLOCK");
        std::iter::from_fn(|| self.socket.accept().ok()).count()
    }
}

/// Room for thousands of sockets in this process.
pub(crate) fn many_files() {
    let limit = libc::rlimit { rlim_cur: 16_384, rlim_max: 16_384 };
    // SAFETY: a plain system call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert_eq!(result, 0, "RLIMIT_NOFILE: {}", std::io::Error::last_os_error());
}

/// Begins connections without waiting for them.
pub(crate) fn connect(address: SocketAddr, count: usize) -> Vec<Socket> {
    let one = |_| {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).expect("socket");
        socket.set_nonblocking(true).expect("O_NONBLOCK");
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{error}"),
        }
        socket
    };
    (0..count).map(one).collect()
}

/// Makes connections, one after another.
pub(crate) fn connected(address: SocketAddr, count: usize) -> Vec<Socket> {
    let one = |_| {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).expect("socket");
        socket.connect(&address.into()).expect("connect");
        socket
    };
    (0..count).map(one).collect()
}

/// The namespace of this thread.
pub(crate) fn netns() -> u64 {
    std::fs::metadata("/proc/thread-self/ns/net").expect("namespace").ino()
}

/// A network namespace with a name, as `ip netns add` makes them.
pub(crate) struct Netns {
    path: PathBuf,
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("socktrace-{name}-{}", std::process::id());
        let path = PathBuf::from("/run/netns").join(&name);
        std::fs::create_dir_all("/run/netns").expect("/run/netns");
        File::create(&path).expect("a file to mount on");
        let to = c_string(&path);
        std::thread::spawn(move || {
            // SAFETY: plain system calls; the namespace is this thread's alone.
            unsafe {
                assert_eq!(libc::unshare(libc::CLONE_NEWNET), 0, "unshare");
                let result = libc::mount(
                    c"/proc/thread-self/ns/net".as_ptr(),
                    to.as_ptr(),
                    std::ptr::null(),
                    libc::MS_BIND,
                    std::ptr::null(),
                );
                assert_eq!(result, 0, "mount: {}", std::io::Error::last_os_error());
            }
            ip("link set lo up");
        })
        .join()
        .expect("a namespace");
        Self { path, name }
    }

    /// Runs `work` inside, on a thread of its own.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(&self.path).expect("the namespace");
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                // SAFETY: a plain system call.
                let entered = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(entered, 0, "setns");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let path = c_string(&self.path);
        // SAFETY: a plain system call; failure leaves a mount behind, which harms nobody.
        let _ = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_file(&self.path);
    }
}

fn c_string(path: &std::path::Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().expect("UTF-8")).expect("no NUL")
}

/// `ip` with these words, in this thread's namespace.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("ip runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {stderr}");
}

/// `ss` with these words, in this thread's namespace, a vector of words a line.
pub(crate) fn ss(words: &str) -> Vec<Vec<String>> {
    let output = Command::new("ss").args(words.split(' ')).output().expect("ss runs");
    assert!(output.status.success(), "ss {words}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

fn ss_line(inode: u64) -> Vec<String> {
    let wanted = format!("ino:{inode}");
    ss("-Hlnte").into_iter().find(|line| line.contains(&wanted)).expect("a line of ss")
}

/// `(Recv-Q, Send-Q)` that `ss` shows for the listener with this inode: accept queue and limit.
pub(crate) fn ss_queue(inode: u64) -> (u64, u64) {
    let line = ss_line(inode);
    (line[1].parse().expect("Recv-Q"), line[2].parse().expect("Send-Q"))
}

/// How many half-open connections `ss` shows for a local port.
pub(crate) fn ss_half_open(port: u16) -> usize {
    ss(&format!("-Hnt state syn-recv sport = :{port}")).len()
}

/// The kernel's counters of a namespace, by name.
pub(crate) type Counters = BTreeMap<String, u64>;

/// What the kernel counted in this thread's namespace.
pub(crate) fn counters() -> Counters {
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
