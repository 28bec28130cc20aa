//! BTF tracepoints, most of them for the backend that has nothing else, and `sys_enter_listen` where
//! tracefs is to be had.

use aya_ebpf::{
    helpers::generated::bpf_get_current_task,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use socktrace_common::{AF_INET, AF_INET6, AF_UNIX, port_key, tcp_state};

use crate::{
    account::{self, doing},
    adopt, calls, connect,
    group::{self, Local},
    layout as at, listener, maps,
    mem::{Direct, Mem, Probe},
    unix,
};

/// `sock:inet_sock_set_state (const struct sock *sk, int oldstate, int newstate)`
///
/// A connection begins as a copy of its listener that goes from LISTEN to SYN_RECV
/// (`inet_csk_clone_lock`), its addresses still the listener's. When it becomes ESTABLISHED it was put
/// into the accept queue just before (`tcp_child_process`); one that is accepted and reset at once never
/// does.
#[btf_tracepoint]
pub(crate) fn tp_set_state(ctx: BtfTracePointContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    let old = ctx.arg::<u64>(1) as u8;
    let new = ctx.arg::<u64>(2) as u8;
    match (old, new) {
        (tcp_state::LISTEN, tcp_state::SYN_RECV) => group::established(sk),
        (tcp_state::SYN_RECV, tcp_state::ESTABLISHED) => group::note_all_of(sk),
        (_, tcp_state::LISTEN) => listener::open(sk),
        (tcp_state::LISTEN, tcp_state::CLOSE) => listener::close(sk),
        _ => {}
    }
    0
}

/// The same for events of kind established.
#[btf_tracepoint]
pub(crate) fn tp_joined(ctx: BtfTracePointContext) -> i32 {
    let states = (ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2) as u8);
    if states == (tcp_state::SYN_RECV, tcp_state::ESTABLISHED) {
        group::joined(ctx.arg(0));
    }
    0
}

/// The same: a connect sends its SYN.
#[btf_tracepoint]
pub(crate) fn tp_sends_syn(ctx: BtfTracePointContext) -> i32 {
    let states = (ctx.arg::<u64>(1) as u8, ctx.arg::<u64>(2) as u8);
    if states == (tcp_state::CLOSE, tcp_state::SYN_SENT) {
        connect::sends_syn(ctx.arg(0));
    }
    0
}

/// The same, for every backend: a connect is answered.
#[btf_tracepoint]
pub(crate) fn tp_answered(ctx: BtfTracePointContext) -> i32 {
    if ctx.arg::<u64>(1) as u8 == tcp_state::SYN_SENT {
        connect::answered(ctx.arg(0), ctx.arg::<u64>(2) as u8);
    }
    0
}

/// `skb:consume_skb (struct sk_buff *skb[, void *location])`
///
/// Every SYN that a listener handled, dropped or not, ends here (`tcp_rcv_state_process`).
#[btf_tracepoint]
pub(crate) fn tp_consume_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: the argument is a `struct sk_buff`.
    if let Some(segment) = unsafe { Segment::of(skb, true) }
        // SAFETY: as above.
        && unsafe { segment.reached_tcp(skb) } == Some(true)
    {
        if let Some(index) = group::find(segment.key, &segment.to) {
            account::happened(doing::SYN, index, skb, false);
        }
        group::note_all(segment.key);
    }
    0
}

/// `skb:kfree_skb (struct sk_buff *skb, void *location[, reason[, struct sock *rx_sk]])`
///
/// Every other segment that a listener did not make a connection of ends here (`tcp_v4_rcv`).
#[btf_tracepoint]
pub(crate) fn tp_kfree_skb(ctx: BtfTracePointContext) -> i32 {
    let skb: *const u8 = ctx.arg(0);
    // SAFETY: the argument is a `struct sk_buff`.
    unsafe {
        if let Some(segment) = Segment::of(skb, false)
            && segment.reached_tcp(skb) == Some(true)
            && let Some(index) = group::find(segment.key, &segment.to)
        {
            // A SYN that came again while its request was half-open. What got further, to a
            // connection, has no device any more (`tcp_v4_rcv`).
            let device: Option<u64> = Direct::read(skb, at::SKB_DEV.load());
            let again = segment.flags & FIN_SYN_RST_ACK == SYN && device != Some(0);
            account::happened(doing::NOTHING, index, skb, again);
        }
    }
    0
}

/// `tcp:tcp_retransmit_synack (const struct sock *sk, const struct request_sock *req)`
#[btf_tracepoint]
pub(crate) fn tp_retransmit_synack(ctx: BtfTracePointContext) -> i32 {
    account::synack_again(ctx.arg(1));
    0
}

const FIN_SYN_RST_ACK: u8 = 0x17;
const SYN: u8 = 0x02;

/// A TCP segment for this machine.
struct Segment {
    key: u64,
    to: Local,
    flags: u8,
    sequence: u32,
}

impl Segment {
    /// What a buffer holds; `None` when it is something else, or for a port without a listener, or
    /// not the SYN that was asked for.
    #[inline(always)]
    unsafe fn of(skb: *const u8, only_syn: bool) -> Option<Self> {
        const ETH_P_IP: u16 = 0x0800;
        const ETH_P_IPV6: u16 = 0x86dd;
        // Of the address it goes to, in the two headers. That it is TCP is seen by what TCP left in
        // the buffer: IPv6 may have other headers in between.
        const TO: u32 = 16;
        const TO6: u32 = 24;
        // SAFETY: the reads of the buffer go through the typed pointer, the others survive any
        // address.
        unsafe {
            let protocol = u16::from_be(Direct::read(skb, at::SKB_PROTOCOL.load())?);
            if protocol != ETH_P_IP && protocol != ETH_P_IPV6 {
                return None;
            }
            // The lowest bit of the pointer says whether a reference is held (include/linux/skbuff.h).
            let dst = (Direct::read::<u64>(skb, at::SKB_DST.load())? & !1) as *const u8;
            if dst.is_null() {
                return None;
            }
            let head: *const u8 = Direct::read(skb, at::SKB_HEAD.load())?;
            let transport: u16 = Direct::read(skb, at::SKB_TRANSPORT.load())?;
            let tcp: [u8; 14] = Probe::read(head, u32::from(transport))?;
            if only_syn && tcp[13] & FIN_SYN_RST_ACK != SYN {
                return None;
            }
            let port = u16::from_be_bytes([tcp[2], tcp[3]]);
            let dev: *const u8 = Probe::read(dst, at::DST_DEV.load())?;
            let net: *const u8 = Probe::read(dev, at::DEV_NET.load())?;
            let netns: u32 = Probe::read(net, at::NET_INUM.load())?;
            let key = port_key(netns, port);
            maps::PORTS.get(key)?;
            let network = u32::from(Direct::read::<u16>(skb, at::SKB_NETWORK.load())?);
            let mut to = Local { family: AF_INET, address: 0, address6: [0; 2] };
            if protocol == ETH_P_IP {
                to.address = Probe::read(head, network + TO)?;
            } else {
                to.family = AF_INET6;
                to.address6 = Probe::read(head, network + TO6)?;
            }
            let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            Some(Self { key, to, flags: tcp[13], sequence })
        }
    }

    /// Whether the kernel's TCP has looked at it: it leaves its notes in the buffer
    /// (`tcp_v4_fill_cb`).
    #[inline(always)]
    unsafe fn reached_tcp(&self, skb: *const u8) -> Option<bool> {
        // SAFETY: the reads go through the typed pointer.
        unsafe {
            let cb = at::SKB_CB.load();
            let sequence: u32 = Direct::read(skb, cb + at::TCP_CB_SEQ.load())?;
            let flags: u8 = Direct::read(skb, cb + at::TCP_CB_FLAGS.load())?;
            Some(sequence == self.sequence && flags == self.flags)
        }
    }
}

/// Argument `n` of a system call: behind the common header and the number, 8 bytes each.
#[inline(always)]
fn arg(ctx: &TracePointContext, n: usize) -> Option<u64> {
    // SAFETY: the records of these tracepoints are 16 bytes and 8 for each argument long.
    unsafe { ctx.read_at(16 + 8 * n) }.ok()
}

/// What a system call returned: it stands where the first argument does.
#[inline(always)]
fn returned(ctx: &TracePointContext) -> Option<i64> {
    arg(ctx, 0).map(|value| value as i64)
}

/// The socket behind a file descriptor of the running task.
#[inline(always)]
fn socket_of(fd: u64) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe { adopt::fd_to_sk(bpf_get_current_task() as *const u8, fd) }
}

/// `syscalls:sys_enter_listen (int fd, int backlog)`
#[tracepoint]
pub(crate) fn tp_sys_enter_listen(ctx: TracePointContext) -> u32 {
    if let Some(fd) = arg(&ctx, 0)
        && let Some(backlog) = arg(&ctx, 1)
    {
        listener::requested(backlog as i32);
        if let Some(sk) = socket_of(fd) {
            calls::listen_asked(sk);
            // SAFETY: `Probe` survives any address.
            unsafe {
                if let Some(sk) = adopt::listening(sk) {
                    listener::listen(sk);
                } else if Probe::read(sk, at::SK_FAMILY.load()) == Some(AF_UNIX) {
                    unix::asked_to_listen(sk);
                }
            }
        }
    }
    0
}

/// `syscalls:sys_exit_listen (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_listen(ctx: TracePointContext) -> u32 {
    if let Some(result) = returned(&ctx) {
        calls::listen_done(result as i32);
    }
    0
}

/// `syscalls:sys_enter_socket (int family, int type, int protocol)`
#[tracepoint]
pub(crate) fn tp_sys_enter_socket(ctx: TracePointContext) -> u32 {
    if let Some(family) = arg(&ctx, 0)
        && let Some(socket_type) = arg(&ctx, 1)
        && let Some(protocol) = arg(&ctx, 2)
    {
        calls::socket(family, socket_type, protocol);
    }
    0
}

/// `syscalls:sys_exit_socket (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_socket(ctx: TracePointContext) -> u32 {
    if let Some(result) = returned(&ctx) {
        if let Ok(fd) = u64::try_from(result)
            && let Some(sk) = socket_of(fd)
        {
            calls::created_as(sk);
        }
        calls::socket_done(result as i32);
    }
    0
}

/// `syscalls:sys_enter_bind (int fd, struct sockaddr *umyaddr, int addrlen)`
#[tracepoint]
pub(crate) fn tp_sys_enter_bind(ctx: TracePointContext) -> u32 {
    if let Some(fd) = arg(&ctx, 0)
        && let Some(address) = arg(&ctx, 1)
        && let Some(len) = arg(&ctx, 2)
        && let Some(sk) = socket_of(fd)
    {
        calls::bind(sk, address as *const u8, len as u32, true);
    }
    0
}

/// `syscalls:sys_exit_bind (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_bind(ctx: TracePointContext) -> u32 {
    if let Some(result) = returned(&ctx) {
        calls::bind_done(result as i32);
    }
    0
}

/// `syscalls:sys_enter_connect (int fd, struct sockaddr *uservaddr, int addrlen)`
#[tracepoint]
pub(crate) fn tp_sys_enter_connect(ctx: TracePointContext) -> u32 {
    if let Some(fd) = arg(&ctx, 0)
        && let Some(address) = arg(&ctx, 1)
        && let Some(len) = arg(&ctx, 2)
        && let Some(sk) = socket_of(fd)
    {
        let address = address as *const u8;
        // SAFETY: `Probe` survives any address.
        let family: Option<u16> = unsafe { Probe::read(sk, at::SK_FAMILY.load()) };
        if family == Some(AF_UNIX) {
            connect::unix_begins(sk, address, len as u32, true);
        } else {
            connect::begins(sk, address, true);
        }
    }
    0
}

/// `syscalls:sys_exit_connect (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_connect(ctx: TracePointContext) -> u32 {
    if let Some(result) = returned(&ctx) {
        connect::done(result as i32);
    }
    0
}

/// The same for the kprobe backend: the end of an AF_UNIX connect, which may have blocked.
#[tracepoint]
pub(crate) fn tp_unix_connected(ctx: TracePointContext) -> u32 {
    if let Some(result) = returned(&ctx) {
        unix::connected(result as i32);
        connect::unix_done(result as i32);
    }
    0
}

/// `syscalls:sys_enter_accept4 (int fd, addr, addrlen, int flags)`
#[tracepoint]
pub(crate) fn tp_sys_enter_accept4(ctx: TracePointContext) -> u32 {
    accept(&ctx)
}

/// `syscalls:sys_enter_accept (int fd, addr, addrlen)`
#[tracepoint]
pub(crate) fn tp_sys_enter_accept(ctx: TracePointContext) -> u32 {
    accept(&ctx)
}

#[inline(always)]
fn accept(ctx: &TracePointContext) -> u32 {
    if let Some(fd) = arg(ctx, 0)
        && let Some(sk) = socket_of(fd)
        // SAFETY: `Probe` survives any address.
        && let Some(sk) = unsafe { adopt::listening(sk) }
    {
        calls::accept(sk);
    }
    0
}

/// `syscalls:sys_exit_accept4 (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_accept4(ctx: TracePointContext) -> u32 {
    accept_done(&ctx)
}

/// `syscalls:sys_exit_accept (long ret)`
#[tracepoint]
pub(crate) fn tp_sys_exit_accept(ctx: TracePointContext) -> u32 {
    accept_done(&ctx)
}

#[inline(always)]
fn accept_done(ctx: &TracePointContext) -> u32 {
    let fd = returned(ctx).and_then(|result| u64::try_from(result).ok());
    let mut sk = None;
    if let Some(fd) = fd {
        sk = socket_of(fd);
    }
    calls::accept_done(sk);
    0
}
