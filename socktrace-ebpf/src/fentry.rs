//! fentry/fexit shells. Each names the kernel function it is for; the prototypes are the same from
//! 5.10 to 7.3 as far as the arguments that are used go.

use aya_ebpf::{
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};

use crate::{
    account::{self, doing},
    calls, connect, layout as at, listener,
    mem::{Direct, Mem, Probe},
    unix, waiting,
};

/// `int __sys_listen(int fd, int backlog)`,
/// `int __sys_listen_socket(struct socket *sock, int backlog)` (6.11 and later)
#[fentry]
pub(crate) fn fentry_sys_listen(ctx: FEntryContext) -> i32 {
    listener::requested(ctx.arg::<u64>(1) as i32);
    0
}

/// The same for kernels that have both functions.
#[fentry]
pub(crate) fn fentry_sys_listen_socket(ctx: FEntryContext) -> i32 {
    listener::requested(ctx.arg::<u64>(1) as i32);
    0
}

/// `int security_socket_listen(struct socket *sock, int backlog)`
#[fentry]
pub(crate) fn fentry_security_socket_listen(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is a `struct socket`.
    if let Some(sk) = unsafe { Direct::read::<*const u8>(ctx.arg(0), at::SOCKET_SK.load()) } {
        calls::listen_asked(sk);
        listener::listen(sk);
    }
    0
}

/// `int inet_csk_listen_start(struct sock *sk[, int backlog])`
#[fentry]
pub(crate) fn fentry_listen_start(ctx: FEntryContext) -> i32 {
    listener::open(ctx.arg(0));
    0
}

/// `void inet_csk_listen_stop(struct sock *sk)`
#[fentry]
pub(crate) fn fentry_listen_stop(ctx: FEntryContext) -> i32 {
    listener::close(ctx.arg(0));
    0
}

/// `int tcp_conn_request(rsk_ops, af_ops, struct sock *sk, struct sk_buff *skb)`: a SYN arrived.
#[fentry]
pub(crate) fn fentry_conn_request(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::enter::<Direct>(doing::SYN, ctx.arg(2), ctx.arg(3)) };
    0
}

/// The SYN was handled.
#[fexit]
pub(crate) fn fexit_conn_request(ctx: FExitContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::leave::<Direct>(doing::SYN, ctx.arg(2)) };
    0
}

/// `tcp_check_req(struct sock *sk, skb, struct request_sock *req, bool fastopen, ...)`: a segment for
/// a half-open request. With `fastopen` the socket is the connection's own, which has been in the
/// accept queue since its SYN.
#[fentry]
pub(crate) fn fentry_check_req(ctx: FEntryContext) -> i32 {
    if ctx.arg::<u64>(3) as u8 == 0 {
        // SAFETY: the arguments are the listener and the segment.
        unsafe { account::enter_ack::<Direct>(ctx.arg(0), ctx.arg(1)) };
    }
    0
}

/// The segment was handled.
#[fexit]
pub(crate) fn fexit_check_req(ctx: FExitContext) -> i32 {
    if ctx.arg::<u64>(3) as u8 == 0 {
        // SAFETY: the argument is the listener.
        unsafe { account::leave::<Direct>(doing::ACK, ctx.arg(0)) };
    }
    0
}

/// `struct sock *cookie_v4_check(struct sock *sk, struct sk_buff *skb)`
#[fentry]
pub(crate) fn fentry_cookie_v4(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::enter::<Direct>(doing::COOKIE, ctx.arg(0), ctx.arg(1)) };
    0
}

/// The cookie was checked.
#[fexit]
pub(crate) fn fexit_cookie_v4(ctx: FExitContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::leave::<Direct>(doing::COOKIE, ctx.arg(0)) };
    0
}

/// `struct sock *cookie_v6_check(struct sock *sk, struct sk_buff *skb)`
#[fentry]
pub(crate) fn fentry_cookie_v6(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::enter::<Direct>(doing::COOKIE, ctx.arg(0), ctx.arg(1)) };
    0
}

/// The cookie was checked.
#[fexit]
pub(crate) fn fexit_cookie_v6(ctx: FExitContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { account::leave::<Direct>(doing::COOKIE, ctx.arg(0)) };
    0
}

/// `void tcp_req_err(struct sock *sk, u32 seq, bool abort)`: an ICMP error for a half-open request,
/// which `sk` really is.
#[fentry]
pub(crate) fn fentry_req_err(ctx: FEntryContext) -> i32 {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if let Some(sk) = Probe::read(ctx.arg(0), at::REQ_LISTENER.load()) {
            account::enter::<Probe>(doing::ICMP, sk, ctx.arg(0));
        }
    }
    0
}

/// The error was handled.
#[fexit]
pub(crate) fn fexit_req_err(_ctx: FExitContext) -> i32 {
    account::leave_kept(doing::ICMP);
    0
}

/// `inet_csk_complete_hashdance(sk, struct sock *child, struct request_sock *req, bool own_req)`
#[fentry]
pub(crate) fn fentry_hashdance(ctx: FEntryContext) -> i32 {
    if ctx.arg::<u64>(3) as u8 != 0 {
        waiting::established(ctx.arg(0), ctx.arg(1), ctx.arg(2));
    }
    0
}

/// `inet_csk_reqsk_queue_add(sk, struct request_sock *req, struct sock *child)`
#[fentry]
pub(crate) fn fentry_queue_add(ctx: FEntryContext) -> i32 {
    waiting::queue_add(ctx.arg(2));
    0
}

/// `void security_sock_graft(struct sock *sk, struct socket *parent)`
#[fentry]
pub(crate) fn fentry_sock_graft(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is a `struct sock`.
    unsafe { waiting::accepted::<Direct>(ctx.arg(0), ctx.arg(1)) };
    0
}

/// `void inet_child_forget(struct sock *sk, struct request_sock *req, struct sock *child)`
#[fentry]
pub(crate) fn fentry_child_forget(ctx: FEntryContext) -> i32 {
    waiting::forgotten(ctx.arg(2));
    0
}

/// `struct request_sock *inet_reqsk_clone(struct request_sock *req, struct sock *sk)` (5.14 and later)
#[fentry]
pub(crate) fn fentry_reqsk_clone(ctx: FEntryContext) -> i32 {
    waiting::migrates(ctx.arg(0), ctx.arg(1));
    0
}

/// `void reqsk_timer_handler(struct timer_list *t)`
#[fentry]
pub(crate) fn fentry_reqsk_timer(ctx: FEntryContext) -> i32 {
    account::timer(ctx.arg(0));
    0
}

/// The timer has done its work.
#[fexit]
pub(crate) fn fexit_reqsk_timer(_ctx: FExitContext) -> i32 {
    account::timer_done();
    0
}

/// `int unix_listen(struct socket *sock, int backlog)`
#[fentry]
pub(crate) fn fentry_unix_listen(ctx: FEntryContext) -> i32 {
    unix::listen(ctx.arg(0));
    0
}

/// `int unix_release(struct socket *sock)`
#[fentry]
pub(crate) fn fentry_unix_release(ctx: FEntryContext) -> i32 {
    unix::release(ctx.arg(0));
    0
}

/// `void unix_release_sock(struct sock *sk, int embrion)`
#[fentry]
pub(crate) fn fentry_unix_release_sock(ctx: FEntryContext) -> i32 {
    if ctx.arg::<u64>(1) as u32 != 0 {
        waiting::forgotten(ctx.arg(0));
    }
    0
}

/// `int security_unix_stream_connect(struct sock *sock, struct sock *other, struct sock *newsk)`
#[fexit]
pub(crate) fn fexit_unix_may_connect(ctx: FExitContext) -> i32 {
    if ctx.arg::<u64>(3) as i32 == 0 {
        unix::queued(ctx.arg(1), ctx.arg(2));
    }
    0
}

/// `long unix_wait_for_peer(struct sock *other, long timeo)`
#[fentry]
pub(crate) fn fentry_unix_wait(ctx: FEntryContext) -> i32 {
    unix::waits_for_room(ctx.arg(0));
    0
}

/// `struct sock *unix_find_other(net, sunaddr, addr_len, type)` (from 5.17 on)
#[fexit]
pub(crate) fn fexit_unix_find_4(ctx: FExitContext) -> i32 {
    unix::found(ctx.arg(4));
    0
}

/// `struct sock *unix_find_other(net, sunaddr, addr_len, type, flags)` (6.16)
#[fexit]
pub(crate) fn fexit_unix_find_5(ctx: FExitContext) -> i32 {
    unix::found(ctx.arg(5));
    0
}

/// `struct sock *unix_find_other(net, sunname, len, type, hash, error)` (before 5.17)
#[fexit]
pub(crate) fn fexit_unix_find_6(ctx: FExitContext) -> i32 {
    unix::found(ctx.arg(6));
    0
}

/// `int unix_stream_connect(struct socket *sock, struct sockaddr *uaddr, int addr_len, int flags)`
#[fexit]
pub(crate) fn fexit_unix_connect(ctx: FExitContext) -> i32 {
    unix::connected(ctx.arg::<u64>(4) as i32);
    0
}

// From here on: what only `socktrace events` attaches.

/// The connect of an AF_UNIX socket begins.
#[fentry]
pub(crate) fn fentry_unix_connect_call(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is a `struct socket`.
    if let Some(sk) = unsafe { Direct::read(ctx.arg(0), at::SOCKET_SK.load()) } {
        connect::unix_begins(sk, ctx.arg(1), ctx.arg::<u64>(2) as u32, false);
    }
    0
}

/// The connect of an AF_UNIX socket ends.
#[fexit]
pub(crate) fn fexit_unix_connect_call(ctx: FExitContext) -> i32 {
    connect::unix_done(ctx.arg::<u64>(4) as i32);
    0
}

/// `int __sys_socket(int family, int type, int protocol)`
#[fentry]
pub(crate) fn fentry_sys_socket(ctx: FEntryContext) -> i32 {
    calls::socket(ctx.arg(0), ctx.arg(1), ctx.arg(2));
    0
}

/// It ends.
#[fexit]
pub(crate) fn fexit_sys_socket(ctx: FExitContext) -> i32 {
    calls::socket_done(ctx.arg::<u64>(3) as i32);
    0
}

/// `int security_socket_post_create(struct socket *sock, family, type, protocol, int kern)`
#[fentry]
pub(crate) fn fentry_post_create(ctx: FEntryContext) -> i32 {
    calls::created(ctx.arg(0), ctx.arg::<u64>(4) as u32 != 0);
    0
}

/// `int security_socket_bind(struct socket *sock, struct sockaddr *address, int addrlen)`
#[fentry]
pub(crate) fn fentry_security_bind(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is a `struct socket`.
    if let Some(sk) = unsafe { Direct::read(ctx.arg(0), at::SOCKET_SK.load()) } {
        calls::bind(sk, ctx.arg(1), ctx.arg::<u64>(2) as u32, false);
    }
    0
}

/// `int __sys_bind(int fd, struct sockaddr *umyaddr, int addrlen)`
#[fexit]
pub(crate) fn fexit_sys_bind(ctx: FExitContext) -> i32 {
    calls::bind_done(ctx.arg::<u64>(3) as i32);
    0
}

/// `int __sys_bind_socket(struct socket *sock, address, int addrlen)` (6.11 and later): io_uring's way.
#[fexit]
pub(crate) fn fexit_sys_bind_socket(ctx: FExitContext) -> i32 {
    calls::bind_done(ctx.arg::<u64>(3) as i32);
    0
}

/// `__sys_listen` ends.
#[fexit]
pub(crate) fn fexit_sys_listen(ctx: FExitContext) -> i32 {
    calls::listen_done(ctx.arg::<u64>(2) as i32);
    0
}

/// `__sys_listen_socket` ends.
#[fexit]
pub(crate) fn fexit_sys_listen_socket(ctx: FExitContext) -> i32 {
    calls::listen_done(ctx.arg::<u64>(2) as i32);
    0
}

/// `int tcp_v4_connect(struct sock *sk, struct sockaddr *uaddr, int addr_len)`
#[fentry]
pub(crate) fn fentry_connect_v4(ctx: FEntryContext) -> i32 {
    connect::begins(ctx.arg(0), ctx.arg(1), false);
    0
}

/// The SYN was sent, or not.
#[fexit]
pub(crate) fn fexit_connect_v4(ctx: FExitContext) -> i32 {
    connect::sent(ctx.arg::<u64>(3) as i32);
    0
}

/// `int tcp_v6_connect(struct sock *sk, struct sockaddr *uaddr, int addr_len)`
#[fentry]
pub(crate) fn fentry_connect_v6(ctx: FEntryContext) -> i32 {
    connect::begins(ctx.arg(0), ctx.arg(1), false);
    0
}

/// The SYN was sent, or not.
#[fexit]
pub(crate) fn fexit_connect_v6(ctx: FExitContext) -> i32 {
    connect::sent(ctx.arg::<u64>(3) as i32);
    0
}

/// `int inet_hash_connect(struct inet_timewait_death_row *death_row, struct sock *sk)`
#[fentry]
pub(crate) fn fentry_hash_connect(ctx: FEntryContext) -> i32 {
    connect::choose_port(ctx.arg(1));
    0
}

/// `int inet6_hash_connect(struct inet_timewait_death_row *death_row, struct sock *sk)`
#[fentry]
pub(crate) fn fentry_hash_connect_v6(ctx: FEntryContext) -> i32 {
    connect::choose_port(ctx.arg(1));
    0
}
