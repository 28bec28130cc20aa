//! AF_UNIX listeners. A connection is in the accept queue as soon as it is asked for: the kernel puts a
//! buffer that leads to it into the listener's receive queue.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::map,
    maps::LruHashMap,
};
use socktrace_common::{AF_UNIX, Cell, SOCK_DGRAM, Slot, count, event::kind, tcp_state};

use crate::{
    account, events, layout as at, listener, maps,
    mem::{Mem, Probe},
    waiting,
};

/// What a thread's `connect()` has met.
#[repr(C)]
#[derive(Clone, Copy)]
struct Attempt {
    /// The listener's slot.
    slot: u32,
    /// 1 when it had to wait.
    waited: u32,
}

/// Both ends of a connection that the kernel is asked to allow: for probes that see no arguments when it
/// did.
#[repr(C)]
#[derive(Clone, Copy)]
struct Asked {
    other: u64,
    child: u64,
}

#[map]
static ASKED: LruHashMap<u64, Asked> = LruHashMap::with_max_entries(1024, 0);

/// Thread to its `connect()`, once that has found a listener.
#[map]
static ATTEMPTS: LruHashMap<u64, Attempt> = LruHashMap::with_max_entries(4096, 0);

const EAGAIN: i32 = 11;
const MAX_ERRNO: u64 = 4095;

/// The length of a listener's accept queue, and the limit: the kernel compares by `>`
/// (`unix_recvq_full`).
#[inline(always)]
unsafe fn queue(sk: *const u8) -> Option<(u32, u32)> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let depth: u32 = Probe::read(sk, at::SK_RECEIVE_LEN.load())?;
        Some((depth, Probe::read(sk, at::SK_MAX_ACK_BACKLOG.load())?))
    }
}

/// Whether a socket is an AF_UNIX one that listens.
#[inline(always)]
pub(crate) unsafe fn listens(sk: *const u8) -> bool {
    // SAFETY: `Probe` survives any address.
    unsafe {
        Probe::value::<u16>(sk, at::SK_FAMILY.load()) == AF_UNIX
            && Probe::value::<u8>(sk, at::SK_STATE.load()) == tcp_state::LISTEN
            && Probe::value::<u16>(sk, at::SK_TYPE.load()) != SOCK_DGRAM
    }
}

/// `unix_listen(sock, backlog)` begins. On a socket that listens already it only changes the limit.
#[inline(always)]
pub(crate) fn listen(socket: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if let Some(sk) = Probe::read(socket, at::SOCKET_SK.load()) {
            begins(sk);
        }
    }
}

/// The system call `listen()` begins, before anybody knows whether it is allowed.
#[inline(always)]
pub(crate) unsafe fn asked_to_listen(sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if Probe::read::<u16>(sk, at::SK_TYPE.load()).is_some_and(|of| of != SOCK_DGRAM) {
            begins(sk);
        }
    }
}

#[inline(always)]
unsafe fn begins(sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    if unsafe { listens(sk) } && maps::slot_of(sk).is_some() {
        return;
    }
    listener::open(sk);
}

/// A connection is about to be put into the accept queue (`security_unix_stream_connect` returned 0).
#[inline(always)]
pub(crate) fn queued(other: *const u8, child: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(index) = maps::slot_of(other) else { return };
        let Some((cell, half)) = maps::cell(index) else { return };
        increment(cell, count::ESTABLISHED);
        note(other, cell, half);
        waiting::waits(child, index, bpf_ktime_get_ns());
        // The queue is looked at again when the connection is in it.
        let attempt = Attempt { slot: index, waited: 0 };
        let _ = ATTEMPTS.insert(bpf_get_current_pid_tgid(), attempt, BPF_ANY.into());
        // The connecting task is not the listener's, so it does not choose.
        events::of_listener(kind::ESTABLISHED, index, |event| {
            // It is not in the queue yet.
            event.accept_depth += 1;
            events::caller(event);
        });
    }
}

/// `security_unix_stream_connect(sk, other, child)` begins.
#[inline(always)]
pub(crate) fn asked(other: *const u8, child: *const u8) {
    let asked = Asked { other: other as u64, child: child as u64 };
    let _ = ASKED.insert(bpf_get_current_pid_tgid(), asked, BPF_ANY.into());
}

/// It has ended, for probes that see no arguments then.
#[inline(always)]
pub(crate) fn allowed(result: i32) {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: the value is copied at once.
    if let Some(Asked { other, child }) = (unsafe { ASKED.get(thread) }).copied()
        && result == 0
    {
        queued(other as *const u8, child as *const u8);
    }
}

/// Counts. These hooks run where another task may get in between.
#[inline(always)]
fn increment(cell: &mut Cell, index: usize) {
    // SAFETY: a cell is an element of a map.
    unsafe { maps::increment(&raw mut cell.counts[index]) };
}

/// `unix_stream_connect` begins: what the thread met before is over, even if its end was not seen.
#[inline(always)]
pub(crate) fn connects() {
    // Failure means that there was nothing.
    let _ = ATTEMPTS.remove(bpf_get_current_pid_tgid());
}

/// Keeps the highest depth of the queue.
#[inline(always)]
unsafe fn note(sk: *const u8, cell: &mut Cell, half: usize) {
    // SAFETY: `Probe` survives any address.
    let Some((depth, _)) = (unsafe { queue(sk) }) else { return };
    increment(cell, count::EVENTS);
    if depth > cell.accept_peak[half] {
        cell.accept_peak[half] = depth;
    }
}

/// `unix_find_other` found whom a thread connects to.
#[inline(always)]
pub(crate) fn found(other: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let slot = if let Some(slot) = maps::slot_of(other) {
            slot
        } else {
            // Nobody, or an error in a pointer's clothes (`ERR_PTR`).
            if other.is_null() || other as u64 >= MAX_ERRNO.wrapping_neg() || !listens(other) {
                return;
            }
            let Some(slot) = listener::adopt(other) else { return };
            slot
        };
        let Some((depth, limit)) = queue(other) else { return };
        if account::is_calm(depth, limit) {
            return;
        }
        let thread = bpf_get_current_pid_tgid();
        // A connect that waited looks for the listener again.
        if ATTEMPTS.get(thread).is_none_or(|attempt| attempt.slot != slot) {
            let _ = ATTEMPTS.insert(thread, Attempt { slot, waited: 0 }, BPF_ANY.into());
        }
    }
}

/// `unix_wait_for_peer(other, timeout)`: a connect waits for room.
#[inline(always)]
pub(crate) fn waits_for_room(other: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(slot) = maps::slot_of(other) else { return };
        let Some((cell, half)) = maps::cell(slot) else { return };
        note(other, cell, half);
        let thread = bpf_get_current_pid_tgid();
        if ATTEMPTS.get(thread).is_some_and(|attempt| attempt.slot == slot && attempt.waited == 1) {
            return;
        }
        let _ = ATTEMPTS.insert(thread, Attempt { slot, waited: 1 }, BPF_ANY.into());
        increment(cell, count::CONNECTS_WAITED);
    }
}

/// `unix_stream_connect` ends.
#[inline(always)]
pub(crate) fn connected(result: i32) {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: the value is copied at once.
    let Some(Attempt { slot, .. }) = (unsafe { ATTEMPTS.get(thread) }).copied() else { return };
    let _ = ATTEMPTS.remove(thread);
    let Some(entry) = maps::SLOTS.get(slot) else { return };
    let Some((cell, half)) = maps::cell(slot) else { return };
    // SAFETY: `Probe` survives any address.
    unsafe { note(entry.sk as *const u8, cell, half) };
    if result == -EAGAIN {
        increment(cell, count::CONNECTS_REFUSED);
    }
}

/// `unix_release(sock)`: a listener closes with what is in its queue.
#[inline(always)]
pub(crate) fn release(socket: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(sk) = Probe::read::<*const u8>(socket, at::SOCKET_SK.load()) else { return };
        if !sk.is_null() && listens(sk) {
            listener::close(sk);
        }
    }
}

/// The connection that a buffer in an accept queue leads to, and the next buffer.
#[inline(always)]
pub(crate) unsafe fn walk(skb: *const u8) -> Option<(u64, *const u8)> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let child: u64 = Probe::read(skb, at::SKB_SK.load())?;
        Some((child, Probe::read(skb, at::SKB_NEXT.load())?))
    }
}

/// Where the queue of a listener begins and, being a ring, ends.
#[inline(always)]
pub(crate) fn ring(slot: &Slot) -> *const u8 {
    (slot.sk as *const u8).wrapping_add(at::SK_RECEIVE_QUEUE.load() as usize)
}
