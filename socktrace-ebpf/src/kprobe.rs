//! kprobe/kretprobe shells: the hooks of `fentry`, with arguments from registers.

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use crate::{
    account::{self, doing},
    calls, connect, layout as at, listener,
    mem::{Mem, Probe},
    unix, waiting,
};

/// The socket of a `struct socket`.
#[inline(always)]
fn sk_of(socket: Option<*const u8>) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe { Probe::read(socket?, at::SOCKET_SK.load()) }
}

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
    if let Some(sk) = sk_of(ctx.arg(0)) {
        calls::listen_asked(sk);
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
    enter(doing::SYN, ctx.arg(2), ctx.arg(3))
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
    enter(doing::COOKIE, ctx.arg(0), ctx.arg(1))
}

/// Exit of `cookie_v4_check`
#[kretprobe]
pub(crate) fn kretprobe_cookie_v4(_ctx: RetProbeContext) -> u32 {
    leave(doing::COOKIE)
}

/// `cookie_v6_check`
#[kprobe]
pub(crate) fn kprobe_cookie_v6(ctx: ProbeContext) -> u32 {
    enter(doing::COOKIE, ctx.arg(0), ctx.arg(1))
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
        let listener = unsafe { Probe::read(request, at::REQ_LISTENER.load()) };
        return enter(doing::ICMP, listener, Some(request));
    }
    0
}

/// Exit of `tcp_req_err`
#[kretprobe]
pub(crate) fn kretprobe_req_err(_ctx: RetProbeContext) -> u32 {
    leave(doing::ICMP)
}

#[inline(always)]
fn enter(doing: u32, sk: Option<*const u8>, skb: Option<*const u8>) -> u32 {
    if let Some(sk) = sk
        && let Some(skb) = skb
    {
        // SAFETY: `Probe` survives any address.
        unsafe { account::enter::<Probe>(doing, sk, skb) };
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
        waiting::established(sk, child, request);
    }
    0
}

/// `inet_csk_reqsk_queue_add`
#[kprobe]
pub(crate) fn kprobe_queue_add(ctx: ProbeContext) -> u32 {
    if let Some(child) = ctx.arg(2) {
        waiting::queue_add(child);
    }
    0
}

/// `security_sock_graft`
#[kprobe]
pub(crate) fn kprobe_sock_graft(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0)
        && let Some(parent) = ctx.arg(1)
    {
        // SAFETY: `Probe` survives any address.
        unsafe { waiting::accepted::<Probe>(sk, parent) };
    }
    0
}

/// `inet_child_forget`
#[kprobe]
pub(crate) fn kprobe_child_forget(ctx: ProbeContext) -> u32 {
    if let Some(child) = ctx.arg(2) {
        waiting::forgotten(child);
    }
    0
}

/// `inet_reqsk_clone`
#[kprobe]
pub(crate) fn kprobe_reqsk_clone(ctx: ProbeContext) -> u32 {
    if let Some(request) = ctx.arg(0)
        && let Some(sk) = ctx.arg(1)
    {
        waiting::migrates(request, sk);
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

/// `unix_listen`
#[kprobe]
pub(crate) fn kprobe_unix_listen(ctx: ProbeContext) -> u32 {
    if let Some(socket) = ctx.arg(0) {
        unix::listen(socket);
    }
    0
}

/// `unix_release`
#[kprobe]
pub(crate) fn kprobe_unix_release(ctx: ProbeContext) -> u32 {
    if let Some(socket) = ctx.arg(0) {
        unix::release(socket);
    }
    0
}

/// `unix_release_sock`
#[kprobe]
pub(crate) fn kprobe_unix_release_sock(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0)
        && ctx.arg::<u64>(1).is_some_and(|embryo| embryo as u32 != 0)
    {
        waiting::forgotten(sk);
    }
    0
}

/// `security_unix_stream_connect`
#[kprobe]
pub(crate) fn kprobe_unix_may_connect(ctx: ProbeContext) -> u32 {
    if let Some(other) = ctx.arg(1)
        && let Some(child) = ctx.arg(2)
    {
        unix::asked(other, child);
    }
    0
}

/// Exit of `security_unix_stream_connect`
#[kretprobe]
pub(crate) fn kretprobe_unix_may_connect(ctx: RetProbeContext) -> u32 {
    unix::allowed(ctx.ret::<u64>() as i32);
    0
}

/// `unix_stream_connect`
#[kprobe]
pub(crate) fn kprobe_unix_connects(_ctx: ProbeContext) -> u32 {
    unix::connects();
    0
}

/// `unix_wait_for_peer`
#[kprobe]
pub(crate) fn kprobe_unix_wait(ctx: ProbeContext) -> u32 {
    if let Some(other) = ctx.arg(0) {
        unix::waits_for_room(other);
    }
    0
}

/// Exit of `unix_find_other`
#[kretprobe]
pub(crate) fn kretprobe_unix_find(ctx: RetProbeContext) -> u32 {
    unix::found(ctx.ret());
    0
}

// From here on: what only `socktrace events` attaches.

/// `__sys_socket`
#[kprobe]
pub(crate) fn kprobe_sys_socket(ctx: ProbeContext) -> u32 {
    if let Some(family) = ctx.arg(0)
        && let Some(socket_type) = ctx.arg(1)
        && let Some(protocol) = ctx.arg(2)
    {
        calls::socket(family, socket_type, protocol);
    }
    0
}

/// Exit of `__sys_socket`
#[kretprobe]
pub(crate) fn kretprobe_sys_socket(ctx: RetProbeContext) -> u32 {
    calls::socket_done(ctx.ret::<u64>() as i32);
    0
}

/// `security_socket_post_create`
#[kprobe]
pub(crate) fn kprobe_post_create(ctx: ProbeContext) -> u32 {
    if let Some(socket) = ctx.arg(0)
        && let Some(by_kernel) = ctx.arg::<u64>(4)
    {
        calls::created(socket, by_kernel as u32 != 0);
    }
    0
}

/// `security_socket_bind`
#[kprobe]
pub(crate) fn kprobe_security_bind(ctx: ProbeContext) -> u32 {
    if let Some(sk) = sk_of(ctx.arg(0))
        && let Some(address) = ctx.arg(1)
        && let Some(len) = ctx.arg::<u64>(2)
    {
        calls::bind(sk, address, len as u32, false);
    }
    0
}

/// Exit of `__sys_bind`
#[kretprobe]
pub(crate) fn kretprobe_sys_bind(ctx: RetProbeContext) -> u32 {
    calls::bind_done(ctx.ret::<u64>() as i32);
    0
}

/// Exit of `__sys_bind_socket`
#[kretprobe]
pub(crate) fn kretprobe_sys_bind_socket(ctx: RetProbeContext) -> u32 {
    calls::bind_done(ctx.ret::<u64>() as i32);
    0
}

/// Exit of `__sys_listen`
#[kretprobe]
pub(crate) fn kretprobe_sys_listen(ctx: RetProbeContext) -> u32 {
    calls::listen_done(ctx.ret::<u64>() as i32);
    0
}

/// Exit of `__sys_listen_socket`
#[kretprobe]
pub(crate) fn kretprobe_sys_listen_socket(ctx: RetProbeContext) -> u32 {
    calls::listen_done(ctx.ret::<u64>() as i32);
    0
}

/// `tcp_v4_connect`
#[kprobe]
pub(crate) fn kprobe_connect_v4(ctx: ProbeContext) -> u32 {
    connect(&ctx)
}

/// Exit of `tcp_v4_connect`
#[kretprobe]
pub(crate) fn kretprobe_connect_v4(ctx: RetProbeContext) -> u32 {
    connect::sent(ctx.ret::<u64>() as i32);
    0
}

/// `tcp_v6_connect`
#[kprobe]
pub(crate) fn kprobe_connect_v6(ctx: ProbeContext) -> u32 {
    connect(&ctx)
}

/// Exit of `tcp_v6_connect`
#[kretprobe]
pub(crate) fn kretprobe_connect_v6(ctx: RetProbeContext) -> u32 {
    connect::sent(ctx.ret::<u64>() as i32);
    0
}

#[inline(always)]
fn connect(ctx: &ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(0)
        && let Some(address) = ctx.arg(1)
    {
        connect::begins(sk, address, false);
    }
    0
}

/// `inet_hash_connect`
#[kprobe]
pub(crate) fn kprobe_hash_connect(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(1) {
        connect::choose_port(sk);
    }
    0
}

/// `inet6_hash_connect`
#[kprobe]
pub(crate) fn kprobe_hash_connect_v6(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg(1) {
        connect::choose_port(sk);
    }
    0
}

/// `unix_stream_connect`: its end is seen where the system call returns, because it may block.
#[kprobe]
pub(crate) fn kprobe_unix_connect(ctx: ProbeContext) -> u32 {
    if let Some(sk) = sk_of(ctx.arg(0))
        && let Some(address) = ctx.arg(1)
        && let Some(len) = ctx.arg::<u64>(2)
    {
        connect::unix_begins(sk, address, len as u32, false);
    }
    0
}
