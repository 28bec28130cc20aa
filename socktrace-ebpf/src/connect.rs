//! `connect()`: a call of [`crate::calls`] whose answer may come long after it has returned. No probe waits for
//! the peer: what was asked for is kept by the socket until `inet_sock_set_state` tells what came of it.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::map,
    maps::LruHashMap,
};
use socktrace_common::{
    AF_UNIX, IPPROTO_MPTCP, IPPROTO_TCP, SOCK_DGRAM,
    event::{EVENT_ABANDONED, EVENT_IMPLICIT, Event, kind},
    tcp_state,
};

use crate::{
    calls::{
        CALL_PORTLESS, CALL_SENT, CALLS, Call, begin, name, note, ports_of, sockaddr, take,
        unix_event,
    },
    events::{self, Caller, caller, describe, emit},
    filter::{self, wants},
    layout as at,
    mem::{Mem, Probe},
};

/// A connect that waits for its answer.
#[repr(C)]
#[derive(Clone, Copy)]
struct Connecting {
    since_ns: u64,
    to: [u64; 2],
    port: u16,
    flags: u16,
    _padding: u32,
    caller: Caller,
}

/// By the address of its socket.
#[map]
static CONNECTING: LruHashMap<u64, Connecting> = LruHashMap::with_max_entries(8192, 0);

const EINPROGRESS: i32 = 115;

/// `connect()` of a TCP socket reached its protocol. For an IPv4 address in IPv6 clothes the kernel comes by
/// here twice.
#[inline(always)]
pub(crate) fn begins(sk: *const u8, address: *const u8, user: bool) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let protocol: u16 = Probe::value(sk, at::SK_PROTOCOL.load());
        if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
            return;
        }
        if let Some(call) = CALLS.get(bpf_get_current_pid_tgid())
            && call.kind == kind::CONNECT
            && call.sk == sk as u64
            && !user
        {
            return;
        }
        let mut call = begin(kind::CONNECT, sk);
        call.family = Probe::value(sk, at::SK_FAMILY.load());
        // A program that asks again, or whose call is restarted after a signal.
        if Probe::read(sk, at::SK_STATE.load()) == Some(tcp_state::SYN_SENT) {
            call.flags |= CALL_SENT;
        }
        sockaddr(&mut call, address, user);
        note(&call);
    }
}

/// The kernel is about to choose the port of a socket that connects, if it has none.
#[inline(always)]
pub(crate) fn choose_port(sk: *const u8) {
    if let Some(call) = CALLS.get_ptr_mut(bpf_get_current_pid_tgid())
        // SAFETY: `Probe` survives any address; the entry is this thread's.
        && unsafe { Probe::read::<u16>(sk, at::SK_NUM.load()) } == Some(0)
    {
        // SAFETY: as above.
        unsafe {
            if (*call).kind == kind::CONNECT {
                (*call).flags |= CALL_PORTLESS;
            }
        }
    }
}

/// The connect of this thread has sent its SYN, or failed to.
#[inline(always)]
pub(crate) fn sent(result: i32) {
    let Some(call) = take(kind::CONNECT) else { return };
    let sk = call.sk as *const u8;
    // SAFETY: the caller holds its socket.
    unsafe {
        if !ended(&call, sk, result) {
            return;
        }
        if result == 0 {
            wait_for_answer(&call, sk);
        } else {
            failed(&call, sk, result);
        }
    }
}

/// A connect ends: tells of the port that the kernel chose. Returns whether the connect is to be told of too.
#[inline(always)]
unsafe fn ended(call: &Call, sk: *const u8, result: i32) -> bool {
    // SAFETY: the caller holds its socket.
    unsafe {
        if !wanted(call, sk) {
            return false;
        }
        if call.flags & CALL_PORTLESS != 0 {
            implicit_bind(call, sk, result);
        }
        wants(kind::CONNECT)
    }
}

/// A connect that has failed before anything was sent, or without an answer.
#[inline(always)]
unsafe fn failed(call: &Call, sk: *const u8, result: i32) {
    emit(kind::CONNECT, |event| {
        // SAFETY: the caller holds its socket.
        unsafe { describe(event, sk) };
        connect_fields(event, call);
        event.result = result;
        caller(event);
    });
}

/// Where a connect goes: when it failed, the socket knows no more.
#[inline(always)]
fn connect_fields(event: &mut Event, call: &Call) {
    event.peer = call.asked;
    event.peer_port = call.asked_port;
    if call.flags & CALL_PORTLESS != 0 {
        event.flags |= EVENT_IMPLICIT;
    }
}

#[inline(always)]
unsafe fn wanted(call: &Call, sk: *const u8) -> bool {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let port = Probe::value(sk, at::SK_NUM.load());
        filter::call(call.family, events::netns_of(sk)) && filter::ports(port, call.asked_port)
    }
}

/// The kernel chose the port, or found none.
#[inline(always)]
unsafe fn implicit_bind(call: &Call, sk: *const u8, result: i32) {
    // SAFETY: the caller holds its socket.
    unsafe {
        let port: u16 = Probe::value(sk, at::SK_NUM.load());
        // It may fail for other reasons before or after.
        if !wants(kind::CHOSEN) || port == 0 && result != -EADDRNOTAVAIL {
            return;
        }
        emit(kind::BIND, |event| {
            describe(event, sk);
            connect_fields(event, call);
            if port == 0 {
                event.result = result;
            }
            ports_of(event, sk);
            caller(event);
        });
    }
}

const EADDRNOTAVAIL: i32 = 99;

/// Keeps a connect until it is answered.
#[inline(always)]
unsafe fn wait_for_answer(call: &Call, sk: *const u8) {
    let implicit = call.flags & CALL_PORTLESS != 0;
    let connecting = Connecting {
        // SAFETY: a plain helper call.
        since_ns: unsafe { bpf_ktime_get_ns() },
        to: call.asked,
        port: call.asked_port,
        flags: if implicit { EVENT_IMPLICIT.into() } else { 0 },
        _padding: 0,
        caller: Caller::current(),
    };
    let _ = CONNECTING.insert(sk as u64, connecting, BPF_ANY.into());
}

/// A connect was answered: its socket left SYN_SENT.
#[inline(always)]
pub(crate) fn answered(sk: *const u8, state: u8) {
    if !wants(kind::CONNECT) || (state != tcp_state::ESTABLISHED && state != tcp_state::CLOSE) {
        return;
    }
    // SAFETY: the value is read at once.
    let Some(began) = (unsafe { CONNECTING.get(sk as u64) }) else { return };
    // SAFETY: a plain helper call.
    let took = unsafe { bpf_ktime_get_ns() }.saturating_sub(began.since_ns);
    if state == tcp_state::ESTABLISHED && !filter::answered_after(took) {
        let _ = CONNECTING.remove(sk as u64);
        return;
    }
    // SAFETY: `Probe` survives any address.
    let error: i32 = unsafe { Probe::value(sk, at::SK_ERR.load()) };
    let thread = bpf_get_current_pid_tgid();
    if state == tcp_state::CLOSE && error == 0 {
        // A connect that fails before it is sent ends with its call, which knows why.
        // SAFETY: the entry is this thread's.
        if let Some(call) = unsafe { CALLS.get(thread) }
            && call.kind == kind::CONNECT
            && call.sk == sk as u64
        {
            return;
        }
    }
    emit(kind::CONNECT, |event| {
        // SAFETY: the socket is changing its state.
        unsafe { describe(event, sk) };
        event.peer = began.to;
        event.peer_port = began.port;
        // A port that the kernel chose is given back before the state changes (`tcp_set_state`).
        if event.local_port == 0 {
            // SAFETY: as above.
            let port: Option<u16> = unsafe { Probe::read(sk, at::INET_SPORT.load()) };
            event.local_port = u16::from_be(port.unwrap_or(0));
        }
        event.flags |= began.flags as u8;
        event.state = state;
        began.caller.tell(event);
        events::timed(event, took);
        if state == tcp_state::CLOSE {
            event.result = -error;
            if error == 0 {
                event.flags |= EVENT_ABANDONED;
            }
        }
    });
    let _ = CONNECTING.remove(sk as u64);
}

/// Tracepoint backend: a socket sends its SYN, within `connect()`.
#[inline(always)]
pub(crate) fn sends_syn(sk: *const u8) {
    choose_port(sk);
    let thread = bpf_get_current_pid_tgid();
    let Some(call) = CALLS.get_ptr_mut(thread) else { return };
    // SAFETY: the entry is this thread's; `Probe` survives any address.
    unsafe {
        if (*call).kind != kind::CONNECT || (*call).sk != sk as u64 {
            return;
        }
        (*call).flags |= CALL_SENT;
        if wants(kind::CONNECT) && wanted(&*call, sk) {
            wait_for_answer(&*call, sk);
        }
    }
}

/// Tracepoint backend: `connect()` ends.
#[inline(always)]
pub(crate) fn done(result: i32) {
    let Some(call) = take(kind::CONNECT) else { return };
    if call.family == AF_UNIX {
        unix_answered(&call, result);
        return;
    }
    let sk = call.sk as *const u8;
    // SAFETY: the caller holds its socket.
    unsafe {
        if !ended(&call, sk, result) {
            return;
        }
        // SAFETY: nothing is read through the reference.
        let waits = CONNECTING.get(sk as u64).is_some();
        let sent = call.flags & CALL_SENT != 0;
        // Answered already, or to be answered yet.
        if result == 0 || result == -EINPROGRESS || sent && !waits {
            return;
        }
        // Interrupted, or asked for again: the answer may still come.
        if Probe::read(sk, at::SK_STATE.load()) == Some(tcp_state::SYN_SENT) || restarts(result) {
            return;
        }
        let _ = CONNECTING.remove(sk as u64);
        failed(&call, sk, result);
    }
}

/// Whether a call was interrupted and will be made again (`ERESTARTSYS` and its kin, include/linux/errno.h).
#[inline(always)]
fn restarts(result: i32) -> bool {
    (-516..=-512).contains(&result)
}

/// `connect()` of an AF_UNIX stream socket begins.
#[inline(always)]
pub(crate) fn unix_begins(sk: *const u8, address: *const u8, len: u32, user: bool) {
    // SAFETY: any address will do.
    unsafe {
        if Probe::read(sk, at::SK_TYPE.load()) == Some(SOCK_DGRAM) {
            return;
        }
        name(address, len, user);
    }
    let mut call = begin(kind::CONNECT, sk);
    call.family = AF_UNIX;
    note(&call);
}

/// `connect()` of an AF_UNIX stream socket ends.
#[inline(always)]
pub(crate) fn unix_done(result: i32) {
    let Some(call) = take(kind::CONNECT) else { return };
    if call.family == AF_UNIX {
        unix_answered(&call, result);
    }
}

#[inline(always)]
fn unix_answered(call: &Call, result: i32) {
    if restarts(result) || !wants(kind::CONNECT) || !filter::result(result) {
        return;
    }
    let sk = call.sk as *const u8;
    // SAFETY: the caller holds its socket.
    unsafe {
        if filter::call(call.family, events::netns_of(sk)) {
            unix_event(kind::CONNECT, sk, result);
        }
    }
}
