//! BTF tracepoints, most of them for the backend that has nothing else, and `sys_enter_listen` where
//! tracefs is to be had.

use aya_ebpf::{
    helpers::generated::bpf_get_current_task,
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use socktrace_common::{port_key, tcp_state};

use crate::{
    account, adopt, group, layout as at, listener,
    mem::{Direct, Mem, Probe},
};

/// `sock:inet_sock_set_state (const struct sock *sk, int oldstate, int newstate)`
///
/// A child that becomes ESTABLISHED was put into its listener's accept queue just before
/// (`tcp_child_process`).
#[btf_tracepoint]
pub(crate) fn tp_set_state(ctx: BtfTracePointContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    let old = ctx.arg::<u64>(1) as u8;
    let new = ctx.arg::<u64>(2) as u8;
    match (old, new) {
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
    // SAFETY: the argument is a `struct sk_buff`.
    if let Some(key) = unsafe { syn_key(ctx.arg(0)) } {
        group::note_all(key);
    }
    0
}

/// `tcp:tcp_retransmit_synack (const struct sock *sk, const struct request_sock *req)`
#[btf_tracepoint]
pub(crate) fn tp_retransmit_synack(ctx: BtfTracePointContext) -> i32 {
    account::synack_again(ctx.arg(1));
    0
}

/// The (netns, port) that a SYN was sent to; `None` for anything else.
#[inline(always)]
unsafe fn syn_key(skb: *const u8) -> Option<u64> {
    const ETH_P_IP: u16 = 0x0800;
    const ETH_P_IPV6: u16 = 0x86dd;
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    // SAFETY: the first three reads go through the typed pointer, the others survive any address.
    unsafe {
        let protocol = u16::from_be(Direct::read(skb, at::SKB_PROTOCOL.load())?);
        if protocol != ETH_P_IP && protocol != ETH_P_IPV6 {
            return None;
        }
        let head: *const u8 = Direct::read(skb, at::SKB_HEAD.load())?;
        let transport: u16 = Direct::read(skb, at::SKB_TRANSPORT.load())?;
        let tcp: [u8; 14] = Probe::read(head, u32::from(transport))?;
        if tcp[13] & FIN_SYN_RST_ACK != SYN {
            return None;
        }
        let port = u16::from_be_bytes([tcp[2], tcp[3]]);
        // The lowest bit of the pointer says whether a reference is held (include/linux/skbuff.h).
        let dst = (Direct::read::<u64>(skb, at::SKB_DST.load())? & !1) as *const u8;
        if dst.is_null() {
            return None;
        }
        let dev: *const u8 = Probe::read(dst, at::DST_DEV.load())?;
        let net: *const u8 = Probe::read(dev, at::DEV_NET.load())?;
        let netns: u32 = Probe::read(net, at::NET_INUM.load())?;
        Some(port_key(netns, port))
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
