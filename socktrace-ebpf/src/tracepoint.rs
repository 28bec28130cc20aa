//! BTF tracepoints, most of them for the backend that has nothing else, and `sys_enter_listen` where
//! tracefs is to be had.

use aya_ebpf::{
    helpers::generated::bpf_get_current_task,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use socktrace_common::{AF_INET, AF_INET6, port_key, tcp_state};

use crate::{
    account::{self, doing},
    adopt,
    group::{self, Local},
    layout as at, listener, maps,
    mem::{Direct, Mem, Probe},
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
            account::happened(doing::SYN, index, false);
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
            account::happened(doing::NOTHING, index, again);
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

/// `syscalls:sys_enter_listen (int fd, int backlog)`
#[tracepoint]
pub(crate) fn tp_sys_enter_listen(ctx: TracePointContext) -> u32 {
    // Offsets of a system call's arguments: the common header, the number, then 8 bytes each.
    const FD: usize = 16;
    const BACKLOG: usize = 24;
    // SAFETY: the record of this tracepoint is 32 bytes long; `Probe` survives any address.
    unsafe {
        if let (Ok(fd), Ok(backlog)) = (ctx.read_at::<u64>(FD), ctx.read_at::<u64>(BACKLOG)) {
            listener::requested(backlog as i32);
            let task = bpf_get_current_task() as *const u8;
            if let Some(sk) = adopt::fd_to_sk(task, fd)
                && let Some(sk) = adopt::listening(sk)
            {
                listener::listen(sk);
            }
        }
    }
    0
}
