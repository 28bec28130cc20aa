//! fentry/fexit shells. Each names the kernel function it is for; the prototypes are the same from
//! 5.10 to 7.3 as far as the arguments that are used go.

use aya_ebpf::{
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};

use crate::{
    layout as at, listener,
    mem::{Direct, Mem},
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

/// `int tcp_conn_request(rsk_ops, af_ops, struct sock *sk, struct sk_buff *skb)`: a SYN was handled.
#[fexit]
pub(crate) fn fexit_conn_request(ctx: FExitContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { listener::queues::<Direct>(ctx.arg(2)) };
    0
}

/// `tcp_child_process(struct sock *parent, struct sock *child, struct sk_buff *skb)`: a finished
/// handshake was put into the accept queue.
#[fentry]
pub(crate) fn fentry_child_process(ctx: FEntryContext) -> i32 {
    // SAFETY: the argument is the listener.
    unsafe { listener::queues::<Direct>(ctx.arg(0)) };
    0
}
