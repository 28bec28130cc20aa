//! kprobe/kretprobe shells: the hooks of `fentry`, with arguments from registers.

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use crate::{
    account::{self, doing},
    layout as at, listener,
    mem::{Mem, Probe},
};

/// `__sys_listen`, `__sys_listen_socket`
#[kprobe]
pub(crate) fn kprobe_sys_listen(ctx: ProbeContext) -> u32 {
    if let Some(backlog) = ctx.arg::<u64>(1) {
        listener::requested(backlog as i32);
    }
    0
}

/// The same for kernels that have both functions.
#[kprobe]
pub(crate) fn kprobe_sys_listen_socket(ctx: ProbeContext) -> u32 {
    if let Some(backlog) = ctx.arg::<u64>(1) {
        listener::requested(backlog as i32);
    }
    0
}

/// `security_socket_listen`
#[kprobe]
pub(crate) fn kprobe_security_socket_listen(ctx: ProbeContext) -> u32 {
    if let Some(socket) = ctx.arg::<*const u8>(0)
        // SAFETY: `Probe` survives any address.
        && let Some(sk) = unsafe { Probe::read::<*const u8>(socket, at::SOCKET_SK.load()) }
    {
        listener::listen(sk);
    }
    0
}

/// `inet_csk_listen_start`
#[kprobe]
pub(crate) fn kprobe_listen_start(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0) {
        listener::open(sk);
    }
    0
}

/// `inet_csk_listen_stop`
#[kprobe]
pub(crate) fn kprobe_listen_stop(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0) {
        listener::close(sk);
    }
    0
}

/// `tcp_conn_request`: a return probe sees no arguments, so the entry keeps them.
#[kprobe]
pub(crate) fn kprobe_conn_request(ctx: ProbeContext) -> u32 {
    enter(doing::SYN, ctx.arg(2))
}

/// Exit of `tcp_conn_request`
#[kretprobe]
pub(crate) fn kretprobe_conn_request(_ctx: RetProbeContext) -> u32 {
    leave(doing::SYN)
}

/// `tcp_check_req`
#[kprobe]
pub(crate) fn kprobe_check_req(ctx: ProbeContext) -> u32 {
    if ctx.arg::<u64>(3).is_some_and(|fastopen| fastopen as u8 == 0)
        && let Some(sk) = ctx.arg(0)
        && let Some(skb) = ctx.arg(1)
    {
        // SAFETY: `Probe` survives any address.
        unsafe { account::enter_ack::<Probe>(sk, skb) };
    }
    0
}

/// Exit of `tcp_check_req`
#[kretprobe]
pub(crate) fn kretprobe_check_req(_ctx: RetProbeContext) -> u32 {
    leave(doing::ACK)
}

/// `cookie_v4_check`
#[kprobe]
pub(crate) fn kprobe_cookie_v4(ctx: ProbeContext) -> u32 {
    enter(doing::COOKIE, ctx.arg(0))
}

/// Exit of `cookie_v4_check`
#[kretprobe]
pub(crate) fn kretprobe_cookie_v4(_ctx: RetProbeContext) -> u32 {
    leave(doing::COOKIE)
}

/// `cookie_v6_check`
#[kprobe]
pub(crate) fn kprobe_cookie_v6(ctx: ProbeContext) -> u32 {
    enter(doing::COOKIE, ctx.arg(0))
}

/// Exit of `cookie_v6_check`
#[kretprobe]
pub(crate) fn kretprobe_cookie_v6(_ctx: RetProbeContext) -> u32 {
    leave(doing::COOKIE)
}

/// `tcp_req_err`
#[kprobe]
pub(crate) fn kprobe_req_err(ctx: ProbeContext) -> u32 {
    if let Some(request) = ctx.arg::<*const u8>(0) {
        // SAFETY: `Probe` survives any address.
        return enter(doing::ICMP, unsafe { Probe::read(request, at::REQ_LISTENER.load()) });
    }
    0
}

/// Exit of `tcp_req_err`
#[kretprobe]
pub(crate) fn kretprobe_req_err(_ctx: RetProbeContext) -> u32 {
    leave(doing::ICMP)
}

#[inline(always)]
fn enter(doing: u32, sk: Option<*const u8>) -> u32 {
    if let Some(sk) = sk {
        // SAFETY: `Probe` survives any address.
        unsafe { account::enter::<Probe>(doing, sk) };
    }
    0
}

#[inline(always)]
fn leave(doing: u32) -> u32 {
    account::leave_kept(doing);
    0
}

/// `inet_csk_complete_hashdance`
#[kprobe]
pub(crate) fn kprobe_hashdance(ctx: ProbeContext) -> u32 {
    if ctx.arg::<u64>(3).is_none_or(|own| own as u8 == 0) {
        return 0;
    }
    if let Some(sk) = ctx.arg(0)
        && let Some(child) = ctx.arg(1)
        && let Some(request) = ctx.arg(2)
    {
        account::established(sk, child, request);
    }
    0
}

/// `inet_csk_reqsk_queue_add`
#[kprobe]
pub(crate) fn kprobe_queue_add(ctx: ProbeContext) -> u32 {
    if let Some(child) = ctx.arg(2) {
        account::queue_add(child);
    }
    0
}

/// `security_sock_graft`
#[kprobe]
pub(crate) fn kprobe_sock_graft(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0) {
        // SAFETY: `Probe` survives any address.
        unsafe { account::accepted::<Probe>(sk) };
    }
    0
}

/// `inet_child_forget`
#[kprobe]
pub(crate) fn kprobe_child_forget(ctx: ProbeContext) -> u32 {
    if let Some(child) = ctx.arg(2) {
        account::forgotten(child);
    }
    0
}

/// `inet_reqsk_clone`
#[kprobe]
pub(crate) fn kprobe_reqsk_clone(ctx: ProbeContext) -> u32 {
    if let Some(request) = ctx.arg(0)
        && let Some(sk) = ctx.arg(1)
    {
        account::migrates(request, sk);
    }
    0
}

/// `reqsk_timer_handler`
#[kprobe]
pub(crate) fn kprobe_reqsk_timer(ctx: ProbeContext) -> u32 {
    if let Some(timer) = ctx.arg(0) {
        account::timer(timer);
    }
    0
}

/// Exit of `reqsk_timer_handler`
#[kretprobe]
pub(crate) fn kretprobe_reqsk_timer(_ctx: RetProbeContext) -> u32 {
    account::timer_done();
    0
}
