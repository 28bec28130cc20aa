//! Events, as the kernel side puts them into the ring buffer.

/// One event. What a kind does not have is 0; the kinds say what they have.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `bpf_ktime_get_ns`
    pub time_ns: u64,
    /// One of [`kind`].
    pub kind: u32,
    /// The listener's slot, [`crate::NOBODY`] for none.
    pub slot: u32,
    /// `net.ns.inum` of the socket's namespace.
    pub netns: u32,
    /// What the call returned: 0 or more, or a negative error number.
    pub result: i32,
    /// Of the socket, in the kernel's numbers.
    pub family: u16,
    pub protocol: u16,
    pub socket_type: u16,
    /// `sk_state` after it.
    pub state: u8,
    /// Set of `EVENT_*` bits.
    pub flags: u8,
    /// Ports in host byte order: the socket's own, the peer's, and what `bind()` asked for.
    pub local_port: u16,
    pub peer_port: u16,
    pub asked_port: u16,
    /// How often a SYN-ACK was sent again, this time included.
    pub attempt: u16,
    /// Addresses as they lie in memory; IPv4 uses the first four bytes.
    pub local: [u64; 2],
    pub peer: [u64; 2],
    pub asked: [u64; 2],
    /// Of the socket's file; 0 when it has none.
    pub inode: u64,
    /// 0 until somebody asked the kernel for one.
    pub cookie: u64,
    /// How long the handshake, the wait for `accept()`, the connect took, or the listener lived.
    pub ns: u64,
    /// Both queues of the listener after it.
    pub accept_depth: u32,
    pub accept_limit: u32,
    pub syn_depth: u32,
    /// `listen`: the backlog that was asked for.
    pub requested: i32,
    /// `listen`: `net.core.somaxconn`.
    pub somaxconn: u32,
    /// `bind`: `net.ipv4.ip_unprivileged_port_start`.
    pub unprivileged: u32,
    /// `bind`: the ports that the kernel chooses from.
    pub range: [u16; 2],
    /// `drop`: an index of [`crate::count`]; `cookie`: one of [`step`].
    pub detail: u32,
    /// Of the calling process; 0 for an event that has no caller.
    pub pid: u32,
    pub uid: u32,
    /// Id of its control group in the unified hierarchy.
    pub cgroup: u64,
    /// Its name, bytes in memory's order.
    pub comm: [u64; 2],
}
const _: () = assert!(size_of::<Event>() == 176);

/// Values of [`Event::kind`].
pub mod kind {
    pub const SOCKET: u32 = 0;
    pub const BIND: u32 = 1;
    pub const LISTEN: u32 = 2;
    pub const CONNECT: u32 = 3;
    pub const SYN: u32 = 4;
    pub const ESTABLISHED: u32 = 5;
    pub const ACCEPT: u32 = 6;
    pub const DROP: u32 = 7;
    pub const COOKIE: u32 = 8;
    pub const RETRANSMIT: u32 = 9;
    pub const EXPIRE: u32 = 10;
    pub const RESET: u32 = 11;
    pub const CLOSE: u32 = 12;
    pub const COUNT: u32 = 13;
    /// No kind of its own: a [`BIND`] that the kernel makes at `connect()`. It is chosen by itself, because on a
    /// client it is most of them.
    pub const CHOSEN: u32 = COUNT;
}

/// Address families that events can be chosen by.
pub mod family {
    pub const IPV4: u32 = 1;
    pub const IPV6: u32 = 2;
    pub const UNIX: u32 = 4;
    pub const ALL: u32 = IPV4 | IPV6 | UNIX;
}

/// Values of [`Event::detail`] of a cookie.
pub mod step {
    pub const SENT: u32 = 0;
    pub const ACCEPTED: u32 = 1;
    pub const FAILED: u32 = 2;
}

/// `bind`: the kernel chose the port, at `connect()` or `listen()`. `connect`: it chose the port.
pub const EVENT_IMPLICIT: u8 = 1;
/// `listen`: the socket was listening already.
pub const EVENT_RELISTEN: u8 = 2;
/// The port of `bind` was chosen at `listen()`.
pub const EVENT_AT_LISTEN: u8 = 4;
/// The queues' depths and limits were read.
pub const EVENT_QUEUES: u8 = 8;
/// `ns` was measured.
pub const EVENT_TIMED: u8 = 16;
/// A connect that took longer sent its SYN again: the kernel waits for a second (`TCP_TIMEOUT_INIT`).
pub const SLOW_CONNECT_NS: u64 = 950_000_000;
/// `requested` is what the program passed to `listen()`.
pub const EVENT_REQUESTED: u8 = 32;

/// `connect`: the program closed the socket before an answer came.
pub const EVENT_ABANDONED: u8 = 64;

/// The name of an AF_UNIX socket, `sun_path` as the kernel keeps it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UnixName {
    /// How much of `path` means something, the NUL behind a path included; 0 for a socket without a
    /// name.
    pub len: u32,
    pub path: [u8; UNIX_PATH_MAX],
}
const _: () = assert!(size_of::<UnixName>() == 112);

impl Default for UnixName {
    fn default() -> Self {
        Self { len: 0, path: [0; UNIX_PATH_MAX] }
    }
}

/// `UNIX_PATH_MAX` (include/uapi/linux/un.h)
pub const UNIX_PATH_MAX: usize = 108;

/// An event of an AF_UNIX socket: its own name, or the one it connects to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct UnixEvent {
    pub event: Event,
    pub name: UnixName,
}
const _: () = assert!(size_of::<UnixEvent>() == 288);
