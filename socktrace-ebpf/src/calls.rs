//! What programs ask of sockets: `socket`, `bind`, `listen`, `connect`. A call is noted when it begins and
//! becomes an event when it ends, because only then its result and what the kernel chose are known.
//!
//! Nothing here runs unless `socktrace events` asked for it.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::map,
    maps::LruHashMap,
};
use socktrace_common::{
    AF_INET, AF_INET6, AF_UNIX, IPPROTO_MPTCP, IPPROTO_TCP, IPPROTO_UDP, SOCK_DGRAM,
    SOCK_SEQPACKET, SOCK_STREAM,
    event::{
        EVENT_AT_LISTEN, EVENT_IMPLICIT, EVENT_RELISTEN, EVENT_REQUESTED, Event, UnixName, kind,
    },
    tcp_state,
};

use crate::{
    adopt,
    events::{self, caller, describe, emit, emit_unix},
    filter::{self, wants},
    layout as at, maps,
    mem::{self, Mem, Probe, present},
    snapshot, waiting,
};

/// A call that runs.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Call {
    /// Its socket; 0 while that is not there yet.
    pub(crate) sk: u64,
    pub(crate) asked: [u64; 2],
    /// One of `event::kind`.
    pub(crate) kind: u32,
    requested: i32,
    pub(crate) asked_port: u16,
    pub(crate) family: u16,
    socket_type: u16,
    protocol: u16,
    /// Set of `EVENT_*` and `CALL_*` bits.
    pub(crate) flags: u32,
    _padding: u32,
}

/// The socket had no port when the call began.
pub(crate) const CALL_PORTLESS: u32 = 1 << 16;
/// A connect sent its SYN: its end is seen elsewhere.
pub(crate) const CALL_SENT: u32 = 1 << 17;

/// Thread to the call that it is in.
#[map]
pub(crate) static CALLS: LruHashMap<u64, Call> = LruHashMap::with_max_entries(4096, 0);

/// Thread to the AF_UNIX name that its call is about.
#[map]
static CALL_NAMES: LruHashMap<u64, UnixName> = LruHashMap::with_max_entries(1024, 0);

const SOCK_TYPE_MASK: u64 = 0xf;

#[inline(always)]
pub(crate) fn begin(kind: u32, sk: *const u8) -> Call {
    Call {
        sk: sk as u64,
        asked: [0; 2],
        kind,
        requested: 0,
        asked_port: 0,
        family: 0,
        socket_type: 0,
        protocol: 0,
        flags: 0,
        _padding: 0,
    }
}

#[inline(always)]
pub(crate) fn note(call: &Call) {
    // Cannot fail: the map makes room by itself.
    let _ = CALLS.insert(bpf_get_current_pid_tgid(), call, BPF_ANY.into());
}

/// The call of this thread, if it is of this kind, which ends with that.
#[inline(always)]
pub(crate) fn take(kind: u32) -> Option<Call> {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: the entry is this thread's.
    let call = *unsafe { CALLS.get(thread) }?;
    if call.kind != kind {
        return None;
    }
    let _ = CALLS.remove(thread);
    Some(call)
}

/// `socket()` begins.
#[inline(always)]
pub(crate) fn socket(family: u64, socket_type: u64, protocol: u64) {
    let mut call = begin(kind::SOCKET, core::ptr::null());
    call.family = family as u16;
    call.socket_type = (socket_type & SOCK_TYPE_MASK) as u16;
    call.protocol = protocol as u16;
    note(&call);
}

/// A socket was made (`security_socket_post_create`).
#[inline(always)]
pub(crate) fn created(socket: *const u8, by_kernel: bool) {
    if by_kernel {
        return;
    }
    // SAFETY: `Probe` survives any address.
    if let Some(sk) = unsafe { Probe::read::<*const u8>(socket, at::SOCKET_SK.load()) } {
        created_as(sk);
    }
}

/// The same for a socket that was found by its file descriptor.
#[inline(always)]
pub(crate) fn created_as(sk: *const u8) {
    if let Some(call) = CALLS.get_ptr_mut(bpf_get_current_pid_tgid()) {
        // SAFETY: the entry is this thread's.
        unsafe {
            if (*call).kind == kind::SOCKET {
                (*call).sk = sk as u64;
            }
        }
    }
}

/// `socket()` ends: a file descriptor, or why there is none.
#[inline(always)]
pub(crate) fn socket_done(result: i32) {
    let Some(call) = take(kind::SOCKET) else { return };
    socket_event(&call, result);
}

#[inline(always)]
fn socket_event(call: &Call, result: i32) {
    let inet = call.family == AF_INET || call.family == AF_INET6;
    let stream = call.socket_type == SOCK_STREAM
        || call.family == AF_UNIX && call.socket_type == SOCK_SEQPACKET;
    if !(inet || call.family == AF_UNIX) || !stream {
        return;
    }
    // SAFETY: `Probe` survives any address.
    let netns = unsafe {
        if call.sk == 0 { adopt::current_netns() } else { events::netns_of(call.sk as *const u8) }
    };
    if !filter::call(call.family, netns) {
        return;
    }
    emit(kind::SOCKET, |event| {
        if call.sk != 0 && result >= 0 {
            // SAFETY: the socket was made by this thread.
            unsafe { describe(event, call.sk as *const u8) };
        } else {
            event.protocol = call.protocol;
            event.netns = netns;
        }
        event.family = call.family;
        event.socket_type = call.socket_type;
        event.result = result;
        caller(event);
    });
}

/// `bind()` reached its socket. `user`: the address is the caller's own copy.
#[inline(always)]
pub(crate) fn bind(sk: *const u8, address: *const u8, len: u32, user: bool) {
    let mut call = begin(kind::BIND, sk);
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(family) = Probe::read(sk, at::SK_FAMILY.load()) else { return };
        let Some(socket_type) = Probe::read(sk, at::SK_TYPE.load()) else { return };
        call.family = family;
        call.socket_type = socket_type;
        if family == AF_UNIX {
            if socket_type == SOCK_DGRAM {
                return;
            }
            name(address, len, user);
        } else if family == AF_INET || family == AF_INET6 {
            // Not raw sockets, whose port is their protocol's number, nor SCTP.
            let protocol: u16 = Probe::value(sk, at::SK_PROTOCOL.load());
            if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_MPTCP {
                return;
            }
            sockaddr(&mut call, address, user);
        } else {
            return;
        }
    }
    note(&call);
}

/// Reads a `struct sockaddr_in` or `struct sockaddr_in6`.
#[inline(always)]
pub(crate) unsafe fn sockaddr(call: &mut Call, from: *const u8, user: bool) {
    const PORT: usize = 2;
    const ADDRESS: usize = 4;
    const ADDRESS6: usize = 8;
    // SAFETY: any address will do.
    unsafe {
        let Some(family) = mem::read_from::<u16>(from, user) else { return };
        let port = mem::read_from::<u16>(from.wrapping_add(PORT), user);
        call.asked_port = u16::from_be(port.unwrap_or(0));
        if family == AF_INET6 {
            if let Some(address) = mem::read_from(from.wrapping_add(ADDRESS6), user) {
                call.asked = address;
            }
        } else if let Some(address) = mem::read_from::<u32>(from.wrapping_add(ADDRESS), user) {
            call.asked[0] = address.into();
            // IPv4 asked of an IPv6 socket.
            if call.family == AF_INET6 {
                call.asked = [0, (u64::from(address) << 32) | 0xffff_0000];
            }
        }
    }
}

/// Keeps an AF_UNIX name until the call ends.
#[inline(always)]
pub(crate) unsafe fn name(address: *const u8, len: u32, user: bool) {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: any address will do.
    if let Some(name) = unsafe { events::sockaddr_un(address, len, user) } {
        let _ = CALL_NAMES.insert(thread, name, BPF_ANY.into());
    } else {
        let _ = CALL_NAMES.remove(thread);
    }
}

/// `bind()` ends.
#[inline(always)]
pub(crate) fn bind_done(result: i32) {
    let Some(call) = take(kind::BIND) else { return };
    if !filter::result(result) {
        return;
    }
    let sk = call.sk as *const u8;
    // SAFETY: the caller holds its socket.
    unsafe {
        if !filter::call(call.family, events::netns_of(sk)) {
            return;
        }
        if call.family == AF_UNIX {
            unix_event(kind::BIND, sk, result);
            return;
        }
        let port: u16 = Probe::value(sk, at::SK_NUM.load());
        if !filter::ports(call.asked_port, port) {
            return;
        }
        emit(kind::BIND, |event| {
            describe(event, sk);
            event.asked = call.asked;
            event.asked_port = call.asked_port;
            event.result = result;
            ports_of(event, sk);
            caller(event);
        });
    }
}

/// An event of an AF_UNIX socket that a call of this thread was about.
#[inline(always)]
pub(crate) unsafe fn unix_event(kind: u32, sk: *const u8, result: i32) {
    if !filter::ports(0, 0) {
        return;
    }
    emit_unix(kind, |to| {
        // SAFETY: the caller holds its socket; the entry is this thread's.
        unsafe {
            describe(&mut to.event, sk);
            if let Some(name) = CALL_NAMES.get(bpf_get_current_pid_tgid()) {
                to.name = *name;
            }
        }
        to.event.result = result;
        caller(&mut to.event);
    });
}

/// The ports that the kernel may choose for a socket, and those that not everyone may have.
#[inline(always)]
pub(crate) unsafe fn ports_of(event: &mut Event, sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(net) = Probe::read::<*const u8>(sk, at::SK_NET.load()) else { return };
        if present(at::NET_UNPRIVILEGED.load()) {
            event.unprivileged = Probe::value(net, at::NET_UNPRIVILEGED.load());
        }
        // Two numbers under a lock, or one word (6.8 and later).
        if present(at::NET_PORTS_LOCK.load()) {
            if let Some(range) = Probe::read::<[u32; 2]>(net, at::NET_PORTS.load()) {
                event.range = [range[0] as u16, range[1] as u16];
            }
        } else if let Some(range) = Probe::read(net, at::NET_PORTS.load()) {
            event.range = range;
        }
        // IP_LOCAL_PORT_RANGE, within the namespace's (`inet_sk_get_local_port_range`).
        if present(at::INET_PORTS.load())
            && let Some([low, high]) = Probe::read::<[u16; 2]>(sk, at::INET_PORTS.load())
        {
            let [first, last] = event.range;
            if low >= first && low <= last {
                event.range[0] = low;
            }
            if high != 0 && high >= first && high <= last {
                event.range[1] = high;
            }
        }
    }
}

/// `listen()` reached its socket.
#[inline(always)]
pub(crate) fn listen_asked(sk: *const u8) {
    if !wants(kind::LISTEN) && !wants(kind::BIND) {
        return;
    }
    let mut call = begin(kind::LISTEN, sk);
    // SAFETY: `Probe` survives any address.
    unsafe {
        call.family = Probe::value(sk, at::SK_FAMILY.load());
        if Probe::read(sk, at::SK_STATE.load()) == Some(tcp_state::LISTEN) {
            call.flags |= u32::from(EVENT_RELISTEN);
        }
        if call.family != AF_UNIX && Probe::read::<u16>(sk, at::SK_NUM.load()) == Some(0) {
            call.flags |= CALL_PORTLESS;
        }
    }
    // SAFETY: the entry is this thread's.
    if let Some(backlog) = unsafe { maps::REQUESTED.get(bpf_get_current_pid_tgid()) } {
        call.requested = *backlog;
        call.flags |= u32::from(EVENT_REQUESTED);
    }
    note(&call);
}

/// `listen()` ends.
#[inline(always)]
pub(crate) fn listen_done(result: i32) {
    let Some(call) = take(kind::LISTEN) else { return };
    let sk = call.sk as *const u8;
    let inet = call.family == AF_INET || call.family == AF_INET6;
    if !(inet || call.family == AF_UNIX) {
        return;
    }
    // SAFETY: the caller holds its socket.
    unsafe {
        if !filter::call(call.family, events::netns_of(sk)) {
            return;
        }
        let port = if inet { Probe::value(sk, at::SK_NUM.load()) } else { 0 };
        if !filter::ports(port, 0) {
            return;
        }
        if call.flags & CALL_PORTLESS != 0
            && result == 0
            && wants(kind::BIND)
            && filter::result(result)
        {
            emit(kind::BIND, |event| {
                describe(event, sk);
                event.flags |= EVENT_IMPLICIT | EVENT_AT_LISTEN;
                ports_of(event, sk);
                caller(event);
            });
        }
        if !wants(kind::LISTEN) {
            return;
        }
        let listener = adopt::listening(sk).unwrap_or(sk);
        emit(kind::LISTEN, |event| {
            if let Some(index) = maps::slot_of(listener)
                && let Some(slot) = maps::SLOTS.get(index)
            {
                events::listener(event, index, slot);
            }
            describe(event, sk);
            event.flags |= call.flags as u8;
            event.requested = call.requested;
            event.result = result;
            if let Some(net) = Probe::read::<*const u8>(sk, at::SK_NET.load()) {
                event.somaxconn = Probe::value(net, at::NET_SOMAXCONN.load());
            }
            caller(event);
        });
    }
}

/// `accept()` gave out a connection: its file's inode is the new socket's.
#[inline(always)]
pub(crate) fn accepted(slot: u32, child: *const u8, inode: u64, waited_ns: u64) {
    events::by_caller(kind::ACCEPT, slot, |event| {
        // SAFETY: the connection has just been accepted.
        unsafe {
            events::peer_of(event, child);
            event.cookie = Probe::value(child, at::SK_COOKIE.load());
        }
        event.inode = inode;
        events::timed(event, waited_ns);
    });
}

/// Tracepoint backend: `accept()` on a listener begins.
#[inline(always)]
pub(crate) fn accept(sk: *const u8) {
    note(&begin(kind::ACCEPT, sk));
}

/// Tracepoint backend: `accept()` has returned a connection.
#[inline(always)]
pub(crate) fn accept_done(sk: Option<*const u8>) {
    // Whatever came of it, the call is over.
    let Some(call) = take(kind::ACCEPT) else { return };
    let Some(sk) = sk else { return };
    let Some(slot) = maps::slot_of(call.sk as *const u8) else { return };
    // SAFETY: the caller holds its socket.
    unsafe {
        let child = adopt::first_subflow::<Probe>(sk);
        let inode = snapshot::inode_of(sk).unwrap_or(0);
        let family: u16 = Probe::value(sk, at::SK_FAMILY.load());
        let mut waited = events::UNTIMED;
        if family != AF_UNIX
            && let Some(since) = waiting::waiting_since(child)
        {
            waited = bpf_ktime_get_ns().saturating_sub(since);
        }
        accepted(slot, child, inode, waited);
    }
}
