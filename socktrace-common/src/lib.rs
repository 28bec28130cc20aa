//! What the eBPF programs and the user side agree on: the layout of shared memory and the list of
//! kernel fields whose offsets the loader fills in.
//!
//! Every type here is `#[repr(C)]`, made of integers only and free of implicit padding, so any bit
//! pattern is a valid value on both sides. Sizes are asserted beside the types.
#![no_std]

pub mod layout;

/// One tracked listening socket. Written by the kernel side, released by the user side.
///
/// A socket's address is reused as soon as the socket dies, so nothing is keyed by the address
/// for longer than the socket lives: the slot is the identity.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// Address of the `struct sock`.
    pub sk: u64,
    /// `bpf_ktime_get_ns` at `listen()`, 0 when the listener is older than the trace.
    pub opened_ns: u64,
    /// `bpf_ktime_get_ns` when it left LISTEN, 0 before.
    pub closed_ns: u64,
    /// One of [`slot_state`].
    pub state: u32,
    /// Tracepoint backend: the next slot with the same (netns, port), plus one; 0 ends the chain.
    pub next: u32,
    /// The backlog passed to `listen()`; valid with [`SLOT_HAS_REQUESTED`].
    pub requested: i32,
    /// Set of `SLOT_*` bits.
    pub flags: u32,
    /// Thread group of the task that called `listen()`, 0 when unknown.
    pub opener: u32,
    pub _reserved: [u32; 5],
}
const _: () = assert!(size_of::<Slot>() == 64);

/// Values of [`Slot::state`]. Not an enum: the value crosses the kernel boundary.
pub mod slot_state {
    pub const FREE: u32 = 0;
    pub const OPEN: u32 = 1;
    pub const CLOSED: u32 = 2;
}

/// [`Slot::requested`] holds what the program passed to `listen()`.
pub const SLOT_HAS_REQUESTED: u32 = 1;
/// The slot is a member of its (netns, port) chain (tracepoint backend).
pub const SLOT_LINKED: u32 = 2;
/// The socket began to listen again (or another one at its address did) and no end was seen before.
pub const SLOT_SUPERSEDED: u32 = 4;

/// What one CPU saw of one listener's queues: a cache line of its own, so that neither locks nor
/// atomics are needed. Index: `slot * cpus + cpu`.
///
/// The two elements of each array belong to the even and the odd interval; `epoch` says which
/// interval the values are of, so that nobody has to reset them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Cell {
    pub epoch: [u32; 2],
    pub accept_peak: [u32; 2],
    pub syn_peak: [u32; 2],
    /// How often a hook looked at the queues.
    pub events: u64,
    pub _reserved: [u64; 4],
}
const _: () = assert!(size_of::<Cell>() == 64);

/// One listener as the snapshot program read it from the kernel's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// `sock.__sk_common.skc_cookie`; 0 until somebody asked the kernel for one.
    pub cookie: u64,
    /// Inode of the socket's file; 0 when it has none.
    pub inode: u64,
    /// `net.ns.inum`.
    pub netns: u32,
    /// `sk_ack_backlog`: the accept queue's depth.
    pub accept_depth: u32,
    /// `sk_max_ack_backlog`: the limit both queues are compared with.
    pub accept_limit: u32,
    /// `icsk_accept_queue.qlen`: the SYN queue's depth.
    pub syn_depth: u32,
    /// `icsk_accept_queue.young`: requests whose SYN-ACK was never repeated.
    pub syn_young: u32,
    /// `net.core.sysctl_somaxconn`.
    pub somaxconn: u32,
    /// `net.ipv4.sysctl_max_syn_backlog`.
    pub max_syn_backlog: u32,
    /// `net.ipv4.sysctl_tcp_syncookies`.
    pub syncookies: u32,
    /// `skc_bound_dev_if`, 0 for any.
    pub bound_if: u32,
    /// `sk_uid`.
    pub uid: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: u16,
    /// Local port, host byte order.
    pub port: u16,
    /// `skc_state` at the moment of reading.
    pub tcp_state: u8,
    /// Set of `READ_*` bits.
    pub flags: u8,
    pub _reserved: [u8; 2],
    /// Local address; IPv4 uses the first four bytes.
    pub address: [u8; 16],
    pub _reserved2: [u64; 6],
}
const _: () = assert!(size_of::<Reading>() == 128);

pub const READ_REUSEPORT: u8 = 1;
pub const READ_IPV6ONLY: u8 = 2;
pub const READ_MPTCP: u8 = 4;
/// `sk_shutdown` is set: the socket was closed, it did not fail to listen.
pub const READ_SHUTDOWN: u8 = 8;
/// Every field was read; without it nothing in the record may be used.
pub const READ_DONE: u8 = 128;

/// One entry of the process list, as `walk_tasks` fills it in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TaskEntry {
    /// Address of the `struct task_struct`.
    pub task: u64,
    pub tgid: u32,
    pub _reserved: u32,
}
const _: () = assert!(size_of::<TaskEntry>() == 16);

/// Slots that one run of the `snapshot` program reads. A verifier bound, not a limit of the tool.
pub const SNAPSHOT_BATCH: u32 = 8;
/// Tasks that one run of the `walk_tasks` program visits.
pub const WALK_BATCH: u32 = 64;
/// File descriptors that one run of the `scan_fds` program looks at.
pub const FD_BATCH: u32 = 16;
/// Slots that one run of the `fill_free` program makes free.
pub const FILL_BATCH: u32 = 256;
/// Listeners of one (netns, port) that the tracepoint backend looks at for one packet.
pub const GROUP_MAX: u32 = 32;

/// Indices of the `CONTROL` map: what the user side tells the programs while they run.
pub mod control {
    /// Number of the running interval.
    pub const EPOCH: u32 = 0;
    /// 1 when listeners have to be found by (netns, port): the tracepoint backend.
    pub const BY_PORT: u32 = 1;
    /// What the last program that ran on request has to say: aya's programs return 0 always.
    pub const ANSWER: u32 = 2;
    pub const COUNT: u32 = 3;
}

/// Indices of the `STATS` map: what the kernel side could not do, per CPU.
pub mod stat {
    /// A listener appeared and every slot was taken.
    pub const NO_SLOT: u32 = 0;
    /// `bpf_probe_read_kernel` failed.
    pub const READ_FAILED: u32 = 1;
    /// A (netns, port) group has more members than [`crate::GROUP_MAX`].
    pub const GROUP_CUT: u32 = 2;
    pub const COUNT: u32 = 3;
}

/// Key of the tracepoint backend's (netns, port) map.
#[must_use]
pub const fn port_key(netns: u32, port: u16) -> u64 {
    ((netns as u64) << 16) | port as u64
}

/// TCP states as the kernel numbers them (`include/net/tcp_states.h`).
pub mod tcp_state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_RECV: u8 = 3;
    pub const CLOSE: u8 = 7;
    pub const LISTEN: u8 = 10;
}

pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;
pub const IPPROTO_TCP: u16 = 6;
pub const IPPROTO_MPTCP: u16 = 262;
