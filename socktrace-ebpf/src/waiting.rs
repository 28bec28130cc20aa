//! Connections in accept queues: since when each of them waits, and for whose `accept()`.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use socktrace_common::{
    AF_UNIX, BUCKETS, Histograms, NOBODY, QUEUE_BATCH, Slot, Waiting, acceptor, bucket, count,
    event::kind, slot_state, stat,
};

use crate::{
    account::{HAS_ESTABLISHED, HAS_OPENED_FAST, context, doing, now_doing},
    adopt, calls, events, filter, layout as at, maps,
    mem::{Mem, Probe},
    snapshot, unix,
};

/// `inet_csk_complete_hashdance(sk, child, req, own_req)`: a handshake is complete, the connection
/// is about to be put into the accept queue. Noted before it is there: another CPU may accept it at
/// once.
#[inline(always)]
pub(crate) fn established(sk: *const u8, child: *const u8, request: *const u8) {
    let Some(context) = context() else { return };
    let known = context.doing == doing::ACK && context.sk == sk as u64;
    let Some(index) = (if known { Some(context.slot) } else { maps::slot_of(sk) }) else {
        return;
    };
    let Some((cell, _)) = maps::cell(index) else { return };
    cell.counts[count::ESTABLISHED] += 1;
    if known {
        context.has |= HAS_ESTABLISHED;
    }
    // SAFETY: a plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    waits(child, index, now);
    // SAFETY: `Probe` survives any address.
    let sent: Option<u64> = unsafe { Probe::read(request, at::REQ_SYNACK_TIME.load()) };
    let Some(sent_us) = sent else { return };
    let took = now.saturating_sub(sent_us.wrapping_mul(1000));
    joins(index, child, if sent_us == 0 { events::UNTIMED } else { took });
    if sent_us == 0 {
        return;
    }
    cell.counts[count::HANDSHAKES] += 1;
    let sum = &mut cell.counts[count::HANDSHAKE_NS];
    add(index, offset_of!(Histograms, handshake), sum, &mut cell.handshake_max_ns, took);
}

/// `inet_csk_reqsk_queue_add(sk, req, child)`: the way of cookies and of Fast Open into the accept
/// queue. Where the compiler left it a function of its own, [`established`] goes through it too.
#[inline(always)]
pub(crate) fn queue_add(child: *const u8) {
    let Some(context) = context() else { return };
    if context.doing != doing::COOKIE && context.doing != doing::SYN {
        return;
    }
    let index = context.slot;
    let Some((cell, _)) = maps::cell(index) else { return };
    cell.counts[count::ESTABLISHED] += 1;
    if context.doing == doing::SYN {
        cell.counts[count::FASTOPEN] += 1;
        context.has |= HAS_OPENED_FAST;
    }
    // SAFETY: a plain helper call.
    waits(child, index, unsafe { bpf_ktime_get_ns() });
    joins(index, child, events::UNTIMED);
}

/// The event that a connection enters the accept queue.
#[inline(always)]
fn joins(index: u32, child: *const u8, handshake_ns: u64) {
    events::of_listener(kind::ESTABLISHED, index, |event| {
        // It is not in the queue yet.
        event.accept_depth += 1;
        // SAFETY: the connection is being made.
        unsafe { events::peer_of(event, child) };
        events::timed(event, handshake_ns);
    });
}

/// Tracepoint backend: the same for a connection that is in the queue.
#[inline(always)]
pub(crate) fn joined(index: u32, child: *const u8) {
    // SAFETY: the connection has just been made.
    events::of_listener(kind::ESTABLISHED, index, |event| unsafe {
        events::peer_of(event, child);
    });
}

/// A connection enters the accept queue of a slot.
#[inline(always)]
pub(crate) fn waits(child: *const u8, slot: u32, since_ns: u64) {
    if !maps::accepts_seen() {
        return;
    }
    let waiting = Waiting { slot, _reserved: 0, since_ns };
    if let Some(entry) = maps::WAITING.get_ptr_mut(child as u64) {
        // SAFETY: nobody else knows the connection yet.
        unsafe { *entry = waiting };
    } else if maps::WAITING.insert(child as u64, waiting, 0).is_ok() {
        maps::count(stat::WAITING_IN);
    } else {
        maps::count(stat::NO_ROOM);
    }
}

/// A connection leaves the accept queue.
#[inline(always)]
fn waited(child: *const u8) -> Option<Waiting> {
    let entry = maps::WAITING.get_ptr_mut(child as u64)?;
    // SAFETY: the element stays until this connection is accepted or forgotten, which is now.
    let waiting = unsafe { *entry };
    if waiting.slot == NOBODY {
        return None;
    }
    // SAFETY: as above.
    unsafe { (*entry).slot = NOBODY };
    if maps::crowded() && maps::WAITING.remove(child as u64).is_ok() {
        maps::count(stat::WAITING_OUT);
    }
    Some(waiting)
}

/// `security_sock_graft(sk, parent)`: `accept()` gives a connection its file.
///
/// # Safety
/// `sk` must be a `struct sock` pointer that `M` may read.
#[inline(always)]
pub(crate) unsafe fn accepted<M: Mem>(sk: *const u8, parent: *const u8) {
    // SAFETY: the caller's promise.
    let child = unsafe { adopt::first_subflow::<M>(sk) };
    let Some(Waiting { slot, since_ns, .. }) = waited(child) else { return };
    let Some((cell, _)) = maps::cell(slot) else { return };
    // SAFETY: a plain helper call.
    let now = unsafe { bpf_ktime_get_ns() };
    let took = now.saturating_sub(since_ns);
    cell.counts[count::ACCEPTED] += 1;
    cell.accepted_ns = now;
    let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    cell.acceptors[acceptor(pid)] = pid;
    // When a connection older than the trace was queued is not always known.
    let waited = if since_ns == 0 { events::UNTIMED } else { took };
    if filter::wants(kind::ACCEPT) {
        // SAFETY: `Probe` survives any address.
        let inode = unsafe { snapshot::inode_of_socket(parent) }.unwrap_or(0);
        calls::accepted(slot, child, inode, waited);
    }
    if waited == events::UNTIMED {
        return;
    }
    let sum = &mut cell.counts[count::WAIT_NS];
    add(slot, offset_of!(Histograms, accept_wait), sum, &mut cell.wait_max_ns, took);
}

/// Adds a sample: to the sum and the maximum of this CPU, and to the histogram that begins at `offset`, where
/// every CPU does so.
#[inline(always)]
fn add(slot: u32, offset: usize, sum: &mut u64, max: &mut u64, ns: u64) {
    const { assert!(BUCKETS.is_power_of_two()) };
    *sum += ns;
    *max = ns.max(*max);
    let Some(histograms) = maps::HISTOGRAMS.get_ptr_mut(slot) else { return };
    #[cfg_attr(not(target_arch = "bpf"), expect(unused_mut, reason = "changed by the assembly"))]
    let mut index = bucket(ns);
    // SAFETY: within the array, and array elements live as long as the map.
    unsafe {
        // The compiler knows that the index is small enough, older verifiers want to see it.
        #[cfg(target_arch = "bpf")]
        core::arch::asm!("{index} &= {last}", index = inout(reg) index, last = const BUCKETS - 1);
        maps::increment(histograms.byte_add(offset).cast::<u64>().add(index));
    }
}

/// `inet_child_forget(sk, req, child)`: a connection is reset because its listener closed.
#[inline(always)]
pub(crate) fn forgotten(child: *const u8) {
    let Some(waiting) = waited(child) else { return };
    // What was in the queue when the listener closed was read there; this one came after.
    let doing = now_doing();
    if (doing == doing::ACK || doing == doing::COOKIE || doing == doing::SYN)
        && let Some((cell, _)) = maps::cell(waiting.slot)
    {
        cell.counts[count::LATE] += 1;
    }
}

/// `inet_reqsk_clone(req, sk)`: a request, with its connection if it has one already, moves to the
/// listener `sk` of the same group.
#[inline(always)]
pub(crate) fn migrates(request: *const u8, sk: *const u8) {
    let Some(to) = maps::slot_of(sk) else { return };
    let Some((cell, _)) = maps::cell(to) else { return };
    cell.counts[count::MIGRATED_IN] += 1;
    // SAFETY: `Probe` survives any address.
    let child: Option<u64> = unsafe { Probe::read(request, at::REQ_CHILD.load()) };
    let Some(child) = child else { return };
    if child == 0 {
        return;
    }
    if let Some(waiting) = maps::WAITING.get_ptr_mut(child) {
        // SAFETY: the element stays until this connection is accepted or forgotten.
        let from = unsafe { (*waiting).slot };
        // Of a connection that was queued unseen, only an older one's time is known.
        if from == NOBODY {
            return;
        }
        // SAFETY: as above.
        unsafe { (*waiting).slot = to };
        if let Some((cell, _)) = maps::cell(from) {
            cell.counts[count::MIGRATED_OUT] += 1;
        }
    }
}

/// Takes in the connections that waited in the accept queue of slot `arg(0)` when the trace began:
/// [`QUEUE_BATCH`] at most, from the request `arg(1)` on, 0 for the head. Answers how many, and in
/// the last element of `TASKS` where to go on.
#[raw_tracepoint]
pub(crate) fn adopt_queue(ctx: RawTracePointContext) -> i32 {
    maps::answer(0);
    let index = ctx.arg::<u64>(0) as u32;
    let Some(slot) = maps::SLOTS.get(index) else { return 0 };
    if slot.state != slot_state::OPEN {
        return 0;
    }
    let mut request = ctx.arg::<u64>(1) as *const u8;
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        if slot.family == AF_UNIX {
            adopt_unix_queue(index, slot, request);
            return 0;
        }
        if request.is_null() {
            let sk = slot.sk as *const u8;
            let Some(head) = Probe::read(sk, at::ICSK_ACCEPT_HEAD.load()) else { return 0 };
            request = head;
        }
        for i in 0..QUEUE_BATCH {
            if request.is_null() {
                return 0;
            }
            let Some(child) = Probe::read::<u64>(request, at::REQ_CHILD.load()) else { return 0 };
            let since_ns = waiting_since(child as *const u8).unwrap_or(0);
            let waiting = Waiting { slot: index, _reserved: 0, since_ns };
            // One that the programs noted themselves is there already.
            if maps::WAITING.insert(child, waiting, BPF_NOEXIST.into()).is_ok() {
                maps::count(stat::WAITING_IN);
            }
            let Some(next) = Probe::read(request, at::REQ_NEXT.load()) else { return 0 };
            request = next;
            maps::answer(i + 1);
        }
    }
    maps::go_on(request as u64);
    0
}

/// The same for an AF_UNIX listener, whose queue is a ring of buffers. Since when a connection waits there is
/// not written down.
#[inline(always)]
unsafe fn adopt_unix_queue(index: u32, slot: &Slot, from: *const u8) {
    let ring = unix::ring(slot);
    let mut skb = if from.is_null() { ring } else { from };
    // SAFETY: `Probe` survives any address.
    unsafe {
        if from.is_null() {
            let Some(first) = Probe::read(ring, at::SKB_NEXT.load()) else { return };
            skb = first;
        }
        for i in 0..QUEUE_BATCH {
            if skb == ring {
                return;
            }
            let Some((child, next)) = unix::walk(skb) else { return };
            let waiting = Waiting { slot: index, _reserved: 0, since_ns: 0 };
            if maps::WAITING.insert(child, waiting, BPF_NOEXIST.into()).is_ok() {
                maps::count(stat::WAITING_IN);
            }
            skb = next;
            maps::answer(i + 1);
        }
    }
    maps::go_on(skb as u64);
}

/// When a connection was established, by CLOCK_MONOTONIC: until its program reads from it,
/// `rcvq_space.time` is when the kernel made its buffers ready (`tcp_init_buffer_space`).
#[inline(always)]
pub(crate) unsafe fn waiting_since(child: *const u8) -> Option<u64> {
    // SAFETY: `Probe` survives any address.
    let us: u64 = unsafe { Probe::read(child, at::TCP_ESTABLISHED_TIME.load()) }?;
    Some(us.wrapping_mul(1000))
}
