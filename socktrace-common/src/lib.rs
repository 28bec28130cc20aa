//! What the eBPF programs and the user side agree on: the layout of shared memory and the list of
//! kernel fields whose offsets the loader fills in.
//!
//! Every type here is `#[repr(C)]`, made of integers only and free of implicit padding, so any bit
//! pattern is a valid value on both sides. Sizes are asserted beside the types.
#![no_std]

pub mod event;
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
    /// `net.ns.inum` of the socket's namespace; 0 when it could not be read.
    pub netns: u32,
    /// `net->mib.net_statistics`, a per-CPU pointer; 0 when it could not be read.
    pub mib: u64,
    /// Tracepoint backend: 1 when an event could have been another listener's.
    pub ambiguous: u32,
    /// `skc_rcv_saddr`, as it lies in memory.
    pub address: u32,
    /// `skc_v6_rcv_saddr`, likewise.
    pub address6: [u64; 2],
    pub family: u16,
    /// 1 when it answers IPv6 only.
    pub v6only: u16,
    /// `skc_num` when it began to listen; 0 when it was not chosen yet.
    pub port: u16,
    pub _padding: u16,
    /// `net.hash_mix`, a random number: another namespace may get the inode number of a dead one.
    pub mix: u32,
    /// Depths of both queues when it ceased to listen.
    pub closed_accept: u32,
    pub closed_syn: u32,
    /// Whether its events were asked for: one of [`wanted`].
    pub wanted: u32,
    /// Name of the task that called `listen()`, bytes in memory's order.
    pub opener_comm: [u64; 2],
}
const _: () = assert!(size_of::<Slot>() == 120);

impl Slot {
    /// Tells its namespace from every other, dead ones too, as far as 32 bits do.
    #[must_use]
    #[inline(always)]
    pub const fn netns_id(&self) -> u32 {
        self.netns ^ self.mix
    }
}

/// Values of [`Slot::state`]. Not an enum: the value crosses the kernel boundary.
pub mod slot_state {
    pub const FREE: u32 = 0;
    pub const OPEN: u32 = 1;
    pub const CLOSED: u32 = 2;
}

/// Values of [`Slot::wanted`].
pub mod wanted {
    /// The user side has to say: it knows the processes that hold the socket.
    pub const UNKNOWN: u32 = 0;
    pub const YES: u32 = 1;
    pub const NO: u32 = 2;
}

/// [`Slot::requested`] holds what the program passed to `listen()`.
pub const SLOT_HAS_REQUESTED: u32 = 1;
/// The slot is a member of its (netns, port) chain (tracepoint backend).
pub const SLOT_LINKED: u32 = 2;
/// The socket began to listen again (or another one at its address did) and no end was seen before.
pub const SLOT_SUPERSEDED: u32 = 4;

/// What one CPU saw of one listener: cache lines of its own, so that neither locks nor atomics are
/// needed. Index: `slot * cpus + cpu`.
///
/// The two elements of each array of peaks belong to the even and the odd interval; `epoch` says
/// which interval the values are of, so that nobody has to reset them. All else counts from the
/// slot's beginning.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Cell {
    pub epoch: [u32; 2],
    pub accept_peak: [u32; 2],
    pub syn_peak: [u32; 2],
    /// Longest that an accepted connection waited, and that a handshake took.
    pub wait_max_ns: u64,
    pub handshake_max_ns: u64,
    /// `bpf_ktime_get_ns` of the last `accept()`, 0 for none.
    pub accepted_ns: u64,
    /// By the indices of [`count`].
    pub counts: [u64; count::COUNT],
    /// Thread groups that called `accept()`, each at the place that [`acceptor`] gives it.
    pub acceptors: [u32; ACCEPTORS],
}
const _: () = assert!(size_of::<Cell>() == 320);

/// Places in [`Cell::acceptors`].
pub const ACCEPTORS: usize = 6;

/// Where a process that accepts is noted. Workers of one server have neighbouring numbers; of two at one
/// place the last is known, and the other one again when it accepts next.
#[must_use]
#[inline(always)]
pub const fn acceptor(pid: u32) -> usize {
    // The verifier follows a mask and a branch, but no division.
    let place = (pid & 7) as usize;
    if place < ACCEPTORS { place } else { place - 4 }
}
const _: () = assert!(ACCEPTORS == 6);

/// Indices of [`Cell::counts`]. They count packets where the kernel counts packets.
pub mod count {
    /// SYNs, those that were sent again too.
    pub const SYNS: usize = 0;
    /// SYNs that became a half-open request.
    pub const QUEUED: usize = 1;
    /// Connections that were put into the accept queue.
    pub const ESTABLISHED: usize = 2;
    pub const ACCEPTED: usize = 3;
    pub const SYNACK_RETRANSMITS: usize = 4;
    /// Half-open requests that ran out of SYN-ACKs.
    pub const EXPIRED: usize = 5;
    /// Half-open requests that a RST of the client ended.
    pub const RESET: usize = 6;
    pub const FULL_ON_SYN: usize = 7;
    pub const FULL_ON_ACK: usize = 8;
    pub const SYN_FULL: usize = 9;
    pub const RESERVE: usize = 10;
    pub const OTHER: usize = 11;
    /// SYNs for which cookies were chosen (TCPReqQFullDoCookies).
    pub const COOKIES_WANTED: usize = 12;
    pub const COOKIES_SENT: usize = 13;
    pub const COOKIES_ACCEPTED: usize = 14;
    pub const COOKIES_FAILED: usize = 15;
    /// Valid cookies that came back to a full accept queue; in [`FULL_ON_ACK`] as well.
    pub const COOKIES_OVERFLOWED: usize = 16;
    pub const RESETS_ON_OVERFLOW: usize = 17;
    /// Bare ACKs that TCP_DEFER_ACCEPT held back.
    pub const DEFERRED: usize = 18;
    /// Connections that Fast Open put into the accept queue with their SYN; in [`ESTABLISHED`] too.
    pub const FASTOPEN: usize = 19;
    /// SYNs with a Fast Open cookie that found too many such connections.
    pub const FASTOPEN_FULL: usize = 20;
    /// Connections that found the listener closed at the very end of their handshake.
    pub const LATE: usize = 21;
    /// Connections that moved to another listener when this one closed.
    pub const MIGRATED_OUT: usize = 22;
    /// Connections and requests that came from another listener.
    pub const MIGRATED_IN: usize = 23;
    /// Samples of the handshake histogram: cookies and Fast Open have none.
    pub const HANDSHAKES: usize = 24;
    pub const HANDSHAKE_NS: usize = 25;
    pub const WAIT_NS: usize = 26;
    /// How often a hook looked at the listener.
    pub const EVENTS: usize = 27;
    /// AF_UNIX: connects that had to wait because the accept queue was full, and that were refused with
    /// EAGAIN instead.
    pub const CONNECTS_WAITED: usize = 28;
    pub const CONNECTS_REFUSED: usize = 29;
    /// SYNs that came again while their request was half-open; in [`SYNS`] too.
    pub const SYNS_AGAIN: usize = 30;
    pub const COUNT: usize = 31;
}

/// How long connections took, by [`bucket`]. Shared by all CPUs, added to atomically.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Histograms {
    pub accept_wait: [u64; BUCKETS],
    pub handshake: [u64; BUCKETS],
}
const _: () = assert!(size_of::<Histograms>() == 4096);

/// Buckets of a histogram: one for everything below [`SHORTEST_NS`], 8 for each doubling from there
/// on, so that a bucket is at most an eighth wide and its middle at most 6.25 % off, and the last one
/// for everything above 36 minutes.
pub const BUCKETS: usize = 256;
const SHORTEST_LOG: u32 = 10;
pub const SHORTEST_NS: u64 = 1 << SHORTEST_LOG;

/// The bucket of a duration.
#[must_use]
#[inline(always)]
pub const fn bucket(ns: u64) -> usize {
    if ns < SHORTEST_NS {
        return 0;
    }
    // By halves: eBPF has no instruction for it.
    let mut rest = ns;
    let mut log = 0;
    if rest >> 32 != 0 {
        rest >>= 32;
        log = 32;
    }
    if rest >> 16 != 0 {
        rest >>= 16;
        log += 16;
    }
    if rest >> 8 != 0 {
        rest >>= 8;
        log += 8;
    }
    if rest >> 4 != 0 {
        rest >>= 4;
        log += 4;
    }
    if rest >> 2 != 0 {
        rest >>= 2;
        log += 2;
    }
    if rest >> 1 != 0 {
        log += 1;
    }
    let index = 1 + (log - SHORTEST_LOG) as usize * 8 + (ns >> (log - 3) & 7) as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// The shortest duration of a bucket.
#[must_use]
pub const fn bucket_start(index: usize) -> u64 {
    if index == 0 {
        return 0;
    }
    let octave = (index as u64 - 1) / 8;
    let eighth = (index as u64 - 1) % 8;
    (8 + eighth) << (octave + SHORTEST_LOG as u64 - 3)
}

/// A connection in an accept queue. Sockets come back at the same addresses, so what was accepted stays
/// in the map, as [`NOBODY`]'s, and is written over: that costs half of taking it out and putting it in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Waiting {
    /// Of its listener, or [`NOBODY`].
    pub slot: u32,
    pub _reserved: u32,
    /// When it got there, by `bpf_ktime_get_ns`.
    pub since_ns: u64,
}
const _: () = assert!(size_of::<Waiting>() == 16);
/// [`Waiting::slot`] of an address at which no connection waits.
pub const NOBODY: u32 = u32::MAX;

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
    /// When the connection at the head of the accept queue got there, by CLOCK_MONOTONIC; 0 when
    /// the queue is empty.
    pub oldest_ns: u64,
    pub _reserved2: [u64; 5],
}
const _: () = assert!(size_of::<Reading>() == 128);

pub const READ_REUSEPORT: u8 = 1;
pub const READ_IPV6ONLY: u8 = 2;
pub const READ_MPTCP: u8 = 4;
/// `sk_shutdown` is set: the socket was closed, it did not fail to listen.
pub const READ_SHUTDOWN: u8 = 8;
/// `net.ipv4.tcp_migrate_req` is on.
pub const READ_MIGRATES: u8 = 16;
/// AF_UNIX: it takes SOCK_SEQPACKET connections, not SOCK_STREAM.
pub const READ_SEQPACKET: u8 = 32;
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
/// Words that `scan_port` leaves for each file descriptor: inode, two of the address as it lies in memory, family and
/// state (`family << 8 | state`). All are 0 for a descriptor of something else.
pub const HOLDER_WORDS: u32 = 4;
const _: () = assert!(FD_BATCH * HOLDER_WORDS <= WALK_BATCH);
/// Waiting connections that one run of the `adopt_queue` program takes in.
pub const QUEUE_BATCH: u32 = 32;
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
    /// 1 when `accept()` can be seen, so that connections in the queue are kept account of.
    pub const ACCEPTS: u32 = 3;
    /// Tracepoint backend: one of the `COUNTING_*`.
    pub const COUNTING: u32 = 4;
    /// 1 when the map of waiting connections is half full: what is accepted has to leave it.
    pub const CROWDED: u32 = 5;
    pub const COUNT: u32 = 6;
}

/// Values of [`control::COUNTING`]. While the counters of all namespaces are noted, an event without a
/// note only makes one.
pub mod counting {
    pub const OFF: u32 = 0;
    pub const NOTING: u32 = 1;
    pub const ON: u32 = 2;
}

/// Indices of the `STATS` map: what the kernel side could not do, per CPU.
pub mod stat {
    /// A listener appeared and every slot was taken.
    pub const NO_SLOT: u32 = 0;
    /// `bpf_probe_read_kernel` failed.
    pub const READ_FAILED: u32 = 1;
    /// A (netns, port) group has more members than [`crate::GROUP_MAX`].
    pub const GROUP_CUT: u32 = 2;
    /// A connection entered an accept queue and there was no room to note it: its `accept()` is not
    /// counted.
    pub const NO_ROOM: u32 = 3;
    /// Not losses: how often the SYN queue was found full with exactly as many requests as the
    /// limit, and how often a request was queued when there were as many.
    pub const FULL_AT_LIMIT: u32 = 4;
    pub const QUEUED_AT_LIMIT: u32 = 5;
    /// Not losses: elements that were put into the map of waiting connections, and taken out.
    pub const WAITING_IN: u32 = 6;
    pub const WAITING_OUT: u32 = 7;
    /// An event found the ring buffer full.
    pub const RING_FULL: u32 = 8;
    pub const COUNT: u32 = 9;
}

/// Key of the tracepoint backend's map of counters, a namespace's ([`Slot::netns_id`]) on a CPU.
#[must_use]
pub const fn counters_key(netns_id: u32, cpu: u32) -> u64 {
    ((netns_id as u64) << 32) | cpu as u64
}

/// Key of the tracepoint backend's (netns, port) map.
#[must_use]
pub const fn port_key(netns: u32, port: u16) -> u64 {
    ((netns as u64) << 16) | port as u64
}

/// The kernel's counters that concern listeners, one CPU's copy of one network namespace's
/// (`struct linux_mib`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Mib {
    /// ListenOverflows, ListenDrops
    pub listen: [u64; 2],
    /// TCPReqQFullDoCookies, TCPReqQFullDrop
    pub full: [u64; 2],
    /// SyncookiesSent, SyncookiesRecv, SyncookiesFailed, EmbryonicRsts
    pub cookies: [u64; 4],
    /// TCPDeferAcceptDrop; only where the listener defers.
    pub deferred: u64,
    /// TCPFastOpenListenOverflow; only where the listener takes Fast Open.
    pub fastopen_full: u64,
}
const _: () = assert!(size_of::<Mib>() == 80);

/// TCP states as the kernel numbers them (`include/net/tcp_states.h`).
pub mod tcp_state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const CLOSE: u8 = 7;
    pub const LISTEN: u8 = 10;
}

pub const AF_UNIX: u16 = 1;
pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;
pub const SOCK_STREAM: u16 = 1;
pub const SOCK_DGRAM: u16 = 2;
pub const SOCK_SEQPACKET: u16 = 5;

pub const IPPROTO_TCP: u16 = 6;
pub const IPPROTO_UDP: u16 = 17;
pub const IPPROTO_MPTCP: u16 = 262;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut before = 0;
        for ns in (0..64).flat_map(|log| {
            let base = 1_u64 << log;
            [
                base - 1,
                base,
                base + base / 8 - 1,
                base + base / 8,
                base + base / 2,
                base + (base - 1),
            ]
        }) {
            let index = bucket(ns);
            assert!(index >= before || ns < SHORTEST_NS, "{ns} ns: {index} after {before}");
            before = before.max(index);
            assert!(bucket_start(index) <= ns, "{ns} ns begins at {}", bucket_start(index));
            if index < BUCKETS - 1 {
                let (start, end) = (bucket_start(index), bucket_start(index + 1));
                assert!(ns < end, "{ns} ns in {start}..{end}");
                assert!(index == 0 || (end - start) * 8 <= start, "{start}..{end} is too wide");
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        for index in 0..BUCKETS {
            assert_eq!(bucket(bucket_start(index)), index);
        }
    }
}
