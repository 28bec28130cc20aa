//! What the hooks mean, whichever way they are attached.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use aya_log_ebpf::debug;
use socktrace_common::{
    AF_INET6, AF_UNIX, Cell, IPPROTO_TCP, SLOT_HAS_REQUESTED, SLOT_SUPERSEDED, Slot, count,
    event::kind, slot_state,
};

use crate::{
    events, filter, group, layout, maps,
    mem::{self, Mem, Probe, present, read_bit},
    snapshot,
};

/// A program asked for a backlog: `listen()` began.
///
/// `__sys_listen(fd, backlog)` cuts the number down to `somaxconn` before anything below sees it.
#[inline(always)]
pub(crate) fn requested(backlog: i32) {
    // Failure means the backlog stays unknown, which is shown as such.
    let _ = maps::REQUESTED.insert(bpf_get_current_pid_tgid(), backlog, 0);
}

/// `listen()` reached its socket. A socket that listens already only gets a new limit.
#[inline(always)]
pub(crate) fn listen(sk: *const u8) {
    if let Some(index) = maps::slot_of(sk)
        && let Some(slot) = maps::SLOTS.get_ptr_mut(index)
    {
        // SAFETY: array elements live as long as the map.
        take_requested(unsafe { &mut *slot });
    }
}

/// Moves what this thread asked for, if anything, into the slot.
#[inline(always)]
fn take_requested(slot: &mut Slot) {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: the value is copied at once.
    if let Some(backlog) = unsafe { maps::REQUESTED.get(thread) } {
        slot.requested = *backlog;
        slot.flags |= SLOT_HAS_REQUESTED;
        let _ = maps::REQUESTED.remove(thread);
    }
}

/// A socket enters LISTEN (`inet_csk_listen_start`).
#[inline(always)]
pub(crate) fn open(sk: *const u8) {
    // DCCP listens through the same function. An MPTCP socket listens through its first subflow,
    // which comes here by itself.
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(family) = Probe::read::<u16>(sk, layout::SK_FAMILY.load()) else { return };
        if family != AF_UNIX && Probe::read(sk, layout::SK_PROTOCOL.load()) != Some(IPPROTO_TCP) {
            return;
        }
    }
    // A slot that is still there belongs to an earlier socket at this address whose end was missed.
    if let Some(index) = maps::slot_of(sk) {
        mark_closed(index, SLOT_SUPERSEDED);
        maps::forget(sk);
    }
    let thread = bpf_get_current_pid_tgid();
    let mut slot = new(sk);
    // SAFETY: a plain helper call.
    slot.opened_ns = unsafe { bpf_ktime_get_ns() };
    slot.opener = (thread >> 32) as u32;
    slot.opener_comm = mem::current_comm();
    slot.wanted = filter::opened(&slot);
    take_requested(&mut slot);
    if let Some(index) = maps::claim(sk, &slot) {
        named(index, &slot);
        group::link(index, sk);
        debug!(&(), "listener opened in slot {}", index);
    }
}

/// A slot for `sk`, with what of it never changes.
#[inline(always)]
fn new(sk: *const u8) -> Slot {
    let mut slot = Slot { sk: sk as u64, state: slot_state::OPEN, ..Slot::default() };
    // SAFETY: `Probe` survives any address.
    unsafe {
        let net: *const u8 = Probe::value(sk, layout::SK_NET.load());
        slot.netns = Probe::value(net, layout::NET_INUM.load());
        slot.mib = Probe::value(net, layout::NET_STATISTICS.load());
        slot.mix = Probe::value(net, layout::NET_MIX.load());
        slot.family = Probe::value(sk, layout::SK_FAMILY.load());
        if slot.family == AF_UNIX {
            return slot;
        }
        slot.address = Probe::value(sk, layout::SK_RCV_SADDR.load());
        slot.port = Probe::value(sk, layout::SK_NUM.load());
        if slot.family == AF_INET6 && present(layout::SK_V6_RCV_SADDR.load()) {
            slot.address6 = Probe::value(sk, layout::SK_V6_RCV_SADDR.load());
            slot.v6only = read_bit(sk, layout::SK_IPV6ONLY.load()).into();
        }
    }
    slot
}

/// Notes the name of an AF_UNIX listener, which stays.
#[inline(always)]
fn named(index: u32, slot: &Slot) {
    if slot.family != AF_UNIX {
        return;
    }
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        if let Some(name) = events::unix_name(slot.sk as *const u8)
            && let Some(to) = maps::PATHS.get_ptr_mut(index)
        {
            *to = name;
        }
    }
}

/// Takes in a listener that is older than the trace. Returns its slot.
#[inline(always)]
pub(crate) fn adopt(sk: *const u8) -> Option<u32> {
    let mut slot = new(sk);
    slot.wanted = filter::adopted(&slot);
    let index = maps::claim(sk, &slot)?;
    named(index, &slot);
    group::link(index, sk);
    debug!(&(), "listener adopted in slot {}", index);
    Some(index)
}

/// A socket leaves LISTEN (`inet_csk_listen_stop`). Both queues are still as the kernel will find
/// them, so they are read a last time.
#[inline(always)]
pub(crate) fn close(sk: *const u8) {
    let Some(index) = maps::slot_of(sk) else {
        return;
    };
    snapshot::read(sk, index);
    // A snapshot on another CPU may read it once more, after it was emptied.
    if let Some(reading) = maps::READINGS.get(index)
        && let Some(slot) = maps::SLOTS.get_ptr_mut(index)
    {
        // SAFETY: array elements live as long as the map.
        unsafe {
            (*slot).closed_accept = reading.accept_depth;
            (*slot).closed_syn = reading.syn_depth;
        }
    }
    events::by_caller(kind::CLOSE, index, |event| {
        if let Some(slot) = maps::SLOTS.get(index)
            && slot.opened_ns != 0
        {
            let lived = event.time_ns.saturating_sub(slot.opened_ns);
            events::timed(event, lived);
        }
    });
    mark_closed(index, 0);
    maps::forget(sk);
    debug!(&(), "listener in slot {} closed", index);
}

#[inline(always)]
fn mark_closed(index: u32, flag: u32) {
    if let Some(slot) = maps::SLOTS.get_ptr_mut(index) {
        // SAFETY: array elements live as long as the map; the state is written last.
        unsafe {
            (*slot).closed_ns = bpf_ktime_get_ns();
            (*slot).flags |= flag;
            (&raw mut (*slot).state).write_volatile(slot_state::CLOSED);
        }
    }
}

/// Either queue of a listener may have grown: keep the highest values.
///
/// # Safety
/// `sk` must be a `struct sock` pointer that `M` may read.
#[inline(always)]
pub(crate) unsafe fn peaks<M: Mem>(sk: *const u8, cell: &mut Cell, half: usize) {
    // One early return a read: what 5.10's verifier cannot follow is a pair of options.
    // SAFETY: the caller's promise.
    let accept: Option<u32> = unsafe { M::read(sk, layout::SK_ACK_BACKLOG.load()) };
    let Some(accept) = accept else { return };
    // SAFETY: the caller's promise.
    let Some(tcp) = (unsafe { M::tcp_sock(sk) }) else {
        return;
    };
    // SAFETY: the caller's promise.
    let syn: Option<u32> = unsafe { M::read(tcp, layout::ICSK_QLEN.load()) };
    let Some(syn) = syn else { return };
    cell.counts[count::EVENTS] += 1;
    if accept > cell.accept_peak[half] {
        cell.accept_peak[half] = accept;
    }
    if syn > cell.syn_peak[half] {
        cell.syn_peak[half] = syn;
    }
}

/// The same for a slot found by other means than a hook's argument.
#[inline(always)]
pub(crate) fn note_slot(index: u32, slot: &Slot) {
    if let Some((cell, half)) = maps::cell(index) {
        // SAFETY: `Probe` survives any address, and the slot is open.
        unsafe { peaks::<Probe>(slot.sk as *const u8, cell, half) };
    }
}
