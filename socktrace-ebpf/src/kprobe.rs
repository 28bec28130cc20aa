//! kprobe/kretprobe shells: the hooks of `fentry`, with arguments from registers.

use aya_ebpf::{
    macros::{kprobe, kretprobe, map},
    maps::PerCpuArray,
    programs::{ProbeContext, RetProbeContext},
};

use crate::{
    layout as at, listener,
    mem::{Mem, Probe},
};

/// The listener of the `tcp_conn_request` that runs on this CPU. It runs with bottom halves off, so
/// there is one at most.
#[map]
static CONN_REQUEST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

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

/// Entry of `tcp_conn_request`: a return probe sees no arguments.
#[kprobe]
pub(crate) fn kprobe_conn_request(ctx: ProbeContext) -> u32 {
    if let (Some(sk), Some(kept)) = (ctx.arg::<u64>(2), CONN_REQUEST.get_ptr_mut(0)) {
        // SAFETY: the element belongs to this CPU.
        unsafe { *kept = sk };
    }
    0
}

/// Exit of `tcp_conn_request`
#[kretprobe]
pub(crate) fn kretprobe_conn_request(_ctx: RetProbeContext) -> u32 {
    if let Some(kept) = CONN_REQUEST.get_ptr_mut(0) {
        // SAFETY: the element belongs to this CPU; `Probe` survives any address.
        unsafe {
            let sk = core::mem::take(&mut *kept) as *const u8;
            if !sk.is_null() {
                listener::queues::<Probe>(sk);
            }
        }
    }
    0
}

/// `tcp_child_process`
#[kprobe]
pub(crate) fn kprobe_child_process(ctx: ProbeContext) -> u32 {
    if let Some(parent) = ctx.arg(0) {
        // SAFETY: `Probe` survives any address.
        unsafe { listener::queues::<Probe>(parent) };
    }
    0
}
