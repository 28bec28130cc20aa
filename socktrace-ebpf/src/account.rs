//! What the kernel did to a listener's connections, counted as the kernel counts.
//!
//! `tcp_conn_request`, `tcp_check_req`, `cookie_v4_check`, `cookie_v6_check` and `tcp_req_err` run
//! with bottom halves off, so between their entry and their exit nothing else moves this CPU's copy of
//! the network namespace's counters: what moved is this listener's. [`enter`] and [`leave`] stand
//! around them; what happens in between (a connection is put into the accept queue) finds in
//! [`Context`] where it is.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_smp_processor_id, bpf_probe_read_kernel, generated::bpf_get_current_task},
    macros::{map, raw_tracepoint},
    maps::PerCpuArray,
    programs::RawTracePointContext,
};
use socktrace_common::{
    Cell, Mib, Slot, count, counters_key, counting,
    event::{kind, step},
    stat, tcp_state,
};

use crate::{
    adopt, events, layout as at, listener, maps,
    mem::{Mem, Probe},
};

/// What this CPU is doing, by the kernel function it is in.
pub(crate) mod doing {
    pub(crate) const NOTHING: u32 = 0;
    /// `tcp_conn_request`
    pub(crate) const SYN: u32 = 1;
    /// `tcp_check_req`
    pub(crate) const ACK: u32 = 2;
    /// `cookie_v4_check`, `cookie_v6_check`
    pub(crate) const COOKIE: u32 = 3;
    /// `tcp_req_err`
    pub(crate) const ICMP: u32 = 4;
    /// `reqsk_timer_handler`
    pub(crate) const TIMER: u32 = 5;
}

/// Where this CPU is.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Context {
    /// What to add to a per-CPU pointer of the kernel's; 0 until it was found out.
    percpu: u64,
    pub(crate) sk: u64,
    request: u64,
    /// The segment that is handled; with [`doing::ICMP`], the request.
    skb: u64,
    pub(crate) doing: u32,
    pub(crate) slot: u32,
    /// The SYN queue's depth before.
    syn_depth: u32,
    /// Set of `HAS_*` bits.
    pub(crate) has: u32,
    before: Mib,
}

const HAS_DEFER: u32 = 1;
const HAS_FASTOPEN: u32 = 2;
/// Fast Open put a connection into the accept queue.
pub(crate) const HAS_OPENED_FAST: u32 = 4;
/// The segment for a half-open request is its SYN again.
const HAS_SYN: u32 = 8;
/// A handshake was completed, so nothing was dropped.
pub(crate) const HAS_ESTABLISHED: u32 = 16;
/// A queue may be full or the segment is a RST or a SYN: more counters than ListenDrops can move.
const HAS_TROUBLE: u32 = 32;

#[map]
static CONTEXT: PerCpuArray<Context> = PerCpuArray::with_max_entries(1, 0);

/// `net.ipv4.tcp_syncookies`: cookies are sent whatever the SYN queue's depth is.
const COOKIES_ALWAYS: u8 = 2;

/// Other CPUs may change a queue's depth by this much between the kernel's look and ours.
const MEANWHILE: u32 = 64;

#[inline(always)]
pub(crate) fn context() -> Option<&'static mut Context> {
    // SAFETY: the element belongs to this CPU, and whoever uses it runs with bottom halves off.
    CONTEXT.get_ptr_mut(0).map(|context| unsafe { &mut *context })
}

/// What this CPU is doing.
#[inline(always)]
pub(crate) fn now_doing() -> u32 {
    context().map_or(doing::NOTHING, |context| context.doing)
}

/// The distance between a per-CPU pointer and this CPU's copy: an element of a per-CPU array is at
/// `array->pptrs[index]` plus that (`percpu_array_map_lookup_elem`).
#[inline(always)]
fn percpu_offset(context: &mut Context) -> Option<u64> {
    if context.percpu == 0 {
        // The verifier lets pointers become numbers on the way through memory.
        let pointers: [*const u8; 2] = [(&raw const CONTEXT).cast(), (&raw const *context).cast()];
        // SAFETY: the helper survives any address.
        unsafe {
            let [map, element] =
                bpf_probe_read_kernel((&raw const pointers).cast::<[u64; 2]>()).ok()?;
            let copies: u64 = Probe::read(map as *const u8, at::BPF_ARRAY_PPTRS.load())?;
            context.percpu = element.wrapping_sub(copies);
        }
    }
    Some(context.percpu)
}

/// Whether a queue is so far from full that other CPUs cannot fill it while this one handles a
/// segment.
#[inline(always)]
pub(crate) fn is_calm(depth: u32, limit: u32) -> bool {
    depth < limit / 4
}

/// ListenOverflows and ListenDrops.
#[inline(always)]
fn read_listen(mib: u64) -> Option<[u64; 2]> {
    // SAFETY: `Probe` survives any address.
    unsafe { Probe::read(mib as *const u8, at::MIB_OVERFLOWS.load()) }
}

/// Reads the other counters that a function may move.
#[inline(always)]
fn read_others(mib: u64, doing: u32, has: u32, to: &mut Mib) -> Option<()> {
    let mib = mib as *const u8;
    // SAFETY: `Probe` survives any address.
    unsafe {
        let trouble = has & HAS_TROUBLE != 0;
        if doing == doing::SYN && trouble {
            to.full = Probe::read(mib, at::MIB_DO_COOKIES.load())?;
        }
        if doing == doing::COOKIE || trouble {
            to.cookies = Probe::read(mib, at::MIB_COOKIES_SENT.load())?;
        }
        if doing == doing::ACK && has & HAS_DEFER != 0 {
            to.deferred = Probe::read(mib, at::MIB_DEFERRED.load())?;
        }
        if doing == doing::SYN && has & HAS_FASTOPEN != 0 {
            to.fastopen_full = Probe::read(mib, at::MIB_FASTOPEN_FULL.load())?;
        }
    }
    Some(())
}

/// Reads all of them.
#[inline(always)]
fn read(mib: u64, doing: u32, has: u32, to: &mut Mib) -> Option<()> {
    to.listen = read_listen(mib)?;
    read_others(mib, doing, has, to)
}

/// A function began to work for the listener `sk`.
///
/// # Safety
/// `sk` must be a `struct sock` pointer that `M` may read; `skb` is the segment, if there is one.
#[inline(always)]
pub(crate) unsafe fn enter<M: Mem>(doing: u32, sk: *const u8, skb: *const u8) {
    // SAFETY: the caller's promise.
    unsafe { enter_with::<M>(doing, sk, skb, 0) };
}

/// `tcp_check_req` began to work on a segment.
///
/// # Safety
/// As for [`enter`], and `skb` must be a `struct sk_buff` pointer that `M` may read.
#[inline(always)]
pub(crate) unsafe fn enter_ack<M: Mem>(sk: *const u8, skb: *const u8) {
    const SYN_RST_ACK: u8 = 0x16;
    const SYN_RST: u8 = 0x06;
    const SYN: u8 = 0x02;
    // SAFETY: the caller's promise. The low byte is the first one.
    let flags: Option<u8> = unsafe { M::read(skb, at::SKB_CB.load() + at::TCP_CB_FLAGS.load()) };
    let Some(flags) = flags else { return };
    let mut has = 0;
    if flags & SYN_RST_ACK == SYN {
        has |= HAS_SYN;
    }
    if flags & SYN_RST != 0 {
        has |= HAS_TROUBLE;
    }
    // SAFETY: the caller's promise.
    unsafe { enter_with::<M>(doing::ACK, sk, skb, has) };
}

#[inline(always)]
unsafe fn enter_with<M: Mem>(doing: u32, sk: *const u8, skb: *const u8, has: u32) {
    let Some(context) = context() else { return };
    context.doing = doing::NOTHING;
    // SAFETY: the caller's promise.
    let Some((index, slot)) = (unsafe { slot_of::<M>(context, doing, sk) }) else { return };
    let mib = slot.mib;
    if mib == 0 {
        return;
    }
    context.has = has;
    // SAFETY: the caller's promise.
    unsafe {
        let Some(limit) = M::read::<u32>(sk, at::SK_MAX_ACK_BACKLOG.load()) else { return };
        let Some(tcp) = M::tcp_sock(sk) else { return };
        if doing == doing::SYN {
            let Some(depth) = M::read::<u32>(tcp, at::ICSK_QLEN.load()) else { return };
            context.syn_depth = depth;
            let Some(net) = M::read::<*const u8>(sk, at::SK_NET.load()) else { return };
            let Some(cookies) = M::read::<u8>(net, at::NET_SYNCOOKIES.load()) else { return };
            if !is_calm(depth, limit) || cookies == COOKIES_ALWAYS {
                context.has |= HAS_TROUBLE;
            }
            let Some(most) = M::read::<u32>(tcp, at::ICSK_FASTOPEN_MAX.load()) else { return };
            if most != 0 {
                context.has |= HAS_FASTOPEN;
            }
        }
        if doing == doing::ACK {
            let Some(depth) = M::read::<u32>(sk, at::SK_ACK_BACKLOG.load()) else { return };
            if !is_calm(depth, limit) {
                context.has |= HAS_TROUBLE;
            }
            let Some(seconds) = M::read::<u8>(tcp, at::ICSK_DEFER.load()) else { return };
            if seconds != 0 {
                context.has |= HAS_DEFER;
            }
        }
    }
    let Some(offset) = percpu_offset(context) else { return };
    if read(mib.wrapping_add(offset), doing, context.has, &mut context.before).is_none() {
        return;
    }
    context.slot = index;
    context.skb = skb as u64;
    context.doing = doing;
}

/// The slot of a listener. One that nobody knew yet is taken in at its next SYN: no process holds it, or it is
/// from before the trace and has not been looked for yet.
#[inline(always)]
unsafe fn slot_of<M: Mem>(
    context: &mut Context,
    doing: u32,
    sk: *const u8,
) -> Option<(u32, &'static Slot)> {
    // The verifier lets pointers become numbers on the way through memory.
    let address = &raw mut context.sk;
    // SAFETY: a reference is valid.
    let known = unsafe {
        address.write_volatile(sk as u64);
        maps::met(address.read_volatile())
    };
    if known.is_some() || doing != doing::SYN {
        return known;
    }
    // SAFETY: the caller's promise.
    let state: Option<u8> = unsafe { M::read(sk, at::SK_STATE.load()) };
    if state != Some(tcp_state::LISTEN) {
        return None;
    }
    let index = listener::adopt(sk)?;
    Some((index, maps::SLOTS.get(index)?))
}

/// The listener of the function that ends, for probes that see no arguments then.
#[inline(always)]
pub(crate) fn leave_kept(doing: u32) {
    if let Some(context) = context() {
        let sk = context.sk as *const u8;
        // SAFETY: `Probe` survives any address.
        unsafe { leave::<Probe>(doing, sk) };
    }
}

/// The function ends: what moved meanwhile is the listener's.
///
/// # Safety
/// As for [`enter`].
#[inline(always)]
pub(crate) unsafe fn leave<M: Mem>(doing: u32, sk: *const u8) {
    let Some(context) = context() else { return };
    if context.doing != doing {
        return;
    }
    context.doing = doing::NOTHING;
    let index = context.slot;
    let Some(slot) = maps::SLOTS.get(index) else { return };
    let Some((cell, half)) = maps::cell(index) else { return };
    if doing != doing::ACK || context.has & HAS_ESTABLISHED == 0 {
        let before = &context.before;
        let mib = slot.mib.wrapping_add(context.percpu);
        let Some(listen) = read_listen(mib) else { return };
        let about = About { index, skb: context.skb };
        let is_plain = doing != doing::COOKIE && context.has & !HAS_OPENED_FAST == 0;
        if is_plain && listen == before.listen {
            if doing == doing::SYN {
                queued(cell, context.has, about);
            }
            // SAFETY: the caller's promise.
            unsafe { listener::peaks::<M>(sk, cell, half) };
            return;
        }
        // What is not read has not moved. (Copies, because zeroes would be written byte by byte.)
        let mut after = *before;
        after.listen = listen;
        if read_others(mib, doing, context.has, &mut after).is_none() {
            return;
        }
        match doing {
            // SAFETY: the caller's promise.
            doing::SYN => unsafe { syn::<M>(cell, context, &after, sk) },
            doing::ACK => ack(cell, before, &after, context.has, about),
            doing::COOKIE => cookie(cell, before, &after, about),
            _ => {
                let drops = after.listen[1].wrapping_sub(before.listen[1]);
                cell.counts[count::OTHER] += drops;
                if drops != 0 {
                    let request = context.skb as *const u8;
                    // SAFETY: the request is there until its function returns.
                    events::of_listener(kind::DROP, index, |event| unsafe {
                        event.detail = count::OTHER as u32;
                        events::peer_of(event, request);
                    });
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { listener::peaks::<M>(sk, cell, half) };
}

/// `tcp_conn_request` has handled a SYN, far from any limit, and dropped nothing.
#[inline(always)]
fn queued(cell: &mut Cell, has: u32, about: About) {
    events::segment(kind::SYN, about.index, about.skb, 0);
    cell.counts[count::SYNS] += 1;
    if has & HAS_OPENED_FAST == 0 {
        cell.counts[count::QUEUED] += 1;
    }
}

/// `tcp_conn_request` has handled a SYN.
#[inline(always)]
unsafe fn syn<M: Mem>(cell: &mut Cell, context: &Context, after: &Mib, sk: *const u8) {
    let about = About { index: context.slot, skb: context.skb };
    let answered = syn_counts(cell, &context.before, after, sk, about);
    if context.has & HAS_FASTOPEN != 0 {
        let full = after.fastopen_full.wrapping_sub(context.before.fastopen_full);
        cell.counts[count::FASTOPEN_FULL] += full;
    }
    let queued = answered == Answered::No && context.has & HAS_OPENED_FAST == 0;
    if queued {
        cell.counts[count::QUEUED] += 1;
    }
    // SAFETY: the caller's promise.
    unsafe { observe_limit::<M>(sk, context.syn_depth, queued, answered == Answered::Full) };
}

/// What became of a SYN, as far as the counters tell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answered {
    /// It was neither dropped nor answered by a cookie.
    No,
    /// The SYN queue was full.
    Full,
    Otherwise,
}

/// Whom a segment was for.
#[derive(Clone, Copy)]
struct About {
    /// The listener's slot.
    index: u32,
    skb: u64,
}

/// Counts a SYN by what moved meanwhile.
#[inline(always)]
fn syn_counts(cell: &mut Cell, before: &Mib, after: &Mib, sk: *const u8, about: About) -> Answered {
    let About { index, skb } = about;
    events::segment(kind::SYN, index, skb, 0);
    let counts = &mut cell.counts;
    let overflows = after.listen[0].wrapping_sub(before.listen[0]);
    let drops = after.listen[1].wrapping_sub(before.listen[1]);
    let wanted = after.full[0].wrapping_sub(before.full[0]);
    let full = after.full[1].wrapping_sub(before.full[1]);
    let sent = after.cookies[0].wrapping_sub(before.cookies[0]);
    counts[count::SYNS] += 1;
    counts[count::FULL_ON_SYN] += overflows;
    counts[count::SYN_FULL] += full;
    counts[count::COOKIES_WANTED] += wanted;
    counts[count::COOKIES_SENT] += sent;
    let rest = drops.wrapping_sub(overflows).wrapping_sub(full);
    let mut reason = if overflows != 0 { count::FULL_ON_SYN } else { count::SYN_FULL };
    if rest != 0 {
        // SAFETY: `Probe` survives any address.
        let reserve = unsafe { reserve_taken(sk) };
        reason = if reserve { count::RESERVE } else { count::OTHER };
        if reserve {
            counts[count::RESERVE] += rest;
        } else {
            counts[count::OTHER] += rest;
        }
    }
    if drops != 0 {
        events::segment(kind::DROP, index, skb, reason as u32);
    }
    if sent != 0 {
        events::segment(kind::COOKIE, index, skb, step::SENT);
    }
    if full | wanted != 0 {
        Answered::Full
    } else if drops | sent != 0 {
        Answered::Otherwise
    } else {
        Answered::No
    }
}

/// Whether `tcp_conn_request` keeps what is left of `tcp_max_syn_backlog` for peers it knows.
#[inline(always)]
unsafe fn reserve_taken(sk: *const u8) -> bool {
    // SAFETY: `Probe` survives any address.
    let taken = unsafe {
        let read = || {
            let net: *const u8 = Probe::read(sk, at::SK_NET.load())?;
            if Probe::read::<u8>(net, at::NET_SYNCOOKIES.load())? != 0 {
                return Some(false);
            }
            let most: u32 = Probe::read(net, at::NET_MAX_SYN_BACKLOG.load())?;
            let depth: u32 = Probe::read(sk, at::ICSK_QLEN.load())?;
            // Requests that ended on another CPU since the kernel looked do not hide the cause.
            let depth = depth + if most / 16 < MEANWHILE { most / 16 } else { MEANWHILE };
            Some(depth > most - (most >> 2))
        };
        read()
    };
    taken == Some(true)
}

/// Whether a SYN queue is full at its limit or above it differs between stable releases of the
/// kernel: what is seen here tells. Only a depth that was the limit all the time is evidence.
#[inline(always)]
unsafe fn observe_limit<M: Mem>(sk: *const u8, before: u32, queued: bool, full: bool) {
    // SAFETY: the caller's promise; `Probe` survives any address.
    unsafe {
        let Some(limit) = M::read::<u32>(sk, at::SK_MAX_ACK_BACKLOG.load()) else { return };
        if before != limit || limit == 0 {
            return;
        }
        let Some(depth) = Probe::read::<u32>(sk, at::ICSK_QLEN.load()) else { return };
        if queued && depth == limit + 1 {
            maps::count(stat::QUEUED_AT_LIMIT);
        }
        if full && depth == limit {
            let Some(net) = Probe::read::<*const u8>(sk, at::SK_NET.load()) else { return };
            if Probe::read::<u8>(net, at::NET_SYNCOOKIES.load()) != Some(COOKIES_ALWAYS) {
                maps::count(stat::FULL_AT_LIMIT);
            }
        }
    }
}

/// `tcp_check_req` has handled a segment for a half-open request.
#[inline(always)]
fn ack(cell: &mut Cell, before: &Mib, after: &Mib, has: u32, about: About) {
    let About { index, skb } = about;
    let counts = &mut cell.counts;
    let overflows = after.listen[0].wrapping_sub(before.listen[0]);
    let drops = after.listen[1].wrapping_sub(before.listen[1]);
    let resets = after.cookies[3].wrapping_sub(before.cookies[3]);
    counts[count::FULL_ON_ACK] += overflows;
    counts[count::OTHER] += drops.wrapping_sub(overflows);
    // Which the kernel answers without making another request of it.
    if has & HAS_SYN != 0 {
        counts[count::SYNS] += 1;
        counts[count::SYNS_AGAIN] += 1;
        events::segment(kind::SYN, index, skb, 0);
    }
    if drops != 0 {
        let reason = if overflows != 0 { count::FULL_ON_ACK } else { count::OTHER };
        events::segment(kind::DROP, index, skb, reason as u32);
    }
    if resets != 0 {
        events::segment(kind::RESET, index, skb, 0);
    }
    // With tcp_abort_on_overflow the server resets what it could not take.
    counts[if drops == 0 { count::RESET } else { count::RESETS_ON_OVERFLOW }] += resets;
    if has & HAS_DEFER != 0 {
        counts[count::DEFERRED] += after.deferred.wrapping_sub(before.deferred);
    }
}

/// `cookie_v4_check` or `cookie_v6_check` has handled a segment that no request was found for.
#[inline(always)]
fn cookie(cell: &mut Cell, before: &Mib, after: &Mib, about: About) {
    let About { index, skb } = about;
    let counts = &mut cell.counts;
    let overflows = after.listen[0].wrapping_sub(before.listen[0]);
    let drops = after.listen[1].wrapping_sub(before.listen[1]);
    let accepted = after.cookies[1].wrapping_sub(before.cookies[1]);
    let failed = after.cookies[2].wrapping_sub(before.cookies[2]);
    if accepted | failed != 0 {
        let step = if accepted != 0 { step::ACCEPTED } else { step::FAILED };
        events::segment(kind::COOKIE, index, skb, step);
    }
    if drops != 0 {
        let reason = if overflows != 0 { count::FULL_ON_ACK } else { count::OTHER };
        events::segment(kind::DROP, index, skb, reason as u32);
    }
    counts[count::COOKIES_ACCEPTED] += accepted;
    counts[count::COOKIES_FAILED] += failed;
    counts[count::COOKIES_OVERFLOWED] += overflows;
    counts[count::FULL_ON_ACK] += overflows;
    counts[count::OTHER] += drops.wrapping_sub(overflows);
}

/// `tcp_retransmit_synack(sk, req)`: a SYN-ACK was sent again.
#[inline(always)]
pub(crate) fn synack_again(request: *const u8) {
    // SAFETY: `Probe` survives any address.
    let listener: Option<*const u8> = unsafe { Probe::read(request, at::REQ_LISTENER.load()) };
    if let Some(sk) = listener
        && let Some(index) = maps::slot_of(sk)
        && let Some((cell, _)) = maps::cell(index)
    {
        cell.counts[count::SYNACK_RETRANSMITS] += 1;
        // SAFETY: as above.
        events::of_listener(kind::RETRANSMIT, index, |event| unsafe {
            events::peer_of(event, request);
            // The kernel counts it when it was sent.
            event.attempt = attempts(request) + 1;
        });
    }
}

/// How often the SYN-ACK of a request was sent again.
#[inline(always)]
unsafe fn attempts(request: *const u8) -> u16 {
    // SAFETY: `Probe` survives any address.
    unsafe { Probe::value::<u8>(request, at::REQ_RETRANS.load()) }.into()
}

/// `reqsk_timer_handler(timer)` begins: a SYN-ACK was not answered in time.
#[inline(always)]
pub(crate) fn timer(timer: u64) {
    let Some(context) = context() else { return };
    context.doing = doing::NOTHING;
    let request = timer.wrapping_sub(u64::from(at::REQ_TIMER.load())) as *const u8;
    // SAFETY: `Probe` survives any address.
    let listener: Option<*const u8> = unsafe { Probe::read(request, at::REQ_LISTENER.load()) };
    let Some(sk) = listener else { return };
    let Some(index) = maps::slot_of(sk) else { return };
    if !is_queued(request) {
        return;
    }
    context.request = request as u64;
    context.slot = index;
    context.doing = doing::TIMER;
}

/// The timer's work is done: a request that is not in the queue any more has expired.
#[inline(always)]
pub(crate) fn timer_done() {
    let Some(context) = context() else { return };
    if context.doing != doing::TIMER {
        return;
    }
    context.doing = doing::NOTHING;
    // The memory may be free already, but nobody on this CPU can have taken it yet.
    let request = context.request as *const u8;
    let index = context.slot;
    if !is_queued(request)
        && let Some((cell, _)) = maps::cell(index)
    {
        cell.counts[count::EXPIRED] += 1;
        // SAFETY: as above.
        events::of_listener(kind::EXPIRE, index, |event| unsafe {
            events::peer_of(event, request);
            event.attempt = attempts(request);
        });
    }
}

/// Whether a request is in the hash table: what is taken out has no back pointer
/// (`hlist_nulls_del_init_rcu`).
#[inline(always)]
fn is_queued(request: *const u8) -> bool {
    // SAFETY: `Probe` survives any address.
    let back: Option<u64> = unsafe { Probe::read(request, at::REQ_PPREV.load()) };
    back.is_some_and(|back| back != 0)
}

/// Tracepoint backend: something happened to the listener in slot `index`, whose namespace's counters
/// have moved on this CPU since the event before. `doing` says what, `skb` is the segment, if there is one.
#[inline(always)]
pub(crate) fn happened(doing: u32, index: u32, skb: *const u8, again: bool) {
    let phase = maps::counting_phase();
    if phase == counting::OFF {
        return;
    }
    let Some(slot) = maps::SLOTS.get_ptr_mut(index) else { return };
    // SAFETY: array elements live as long as the map.
    let slot = unsafe { &mut *slot };
    let Some(context) = context() else { return };
    let Some(offset) = percpu_offset(context) else { return };
    if slot.mib == 0 {
        return;
    }
    // Everything that these events can move. (A copy, because zeroes would be written byte by byte.)
    let mut after = context.before;
    if read(slot.mib.wrapping_add(offset), doing::SYN, HAS_TROUBLE, &mut after).is_none() {
        return;
    }
    // SAFETY: a plain helper call.
    let key = counters_key(slot.netns_id(), unsafe { bpf_get_smp_processor_id() });
    let before = if let Some(last) = maps::COUNTERS.get_ptr_mut(key) {
        // SAFETY: the element is this CPU's; it is never removed.
        unsafe { core::mem::replace(&mut *last, after) }
    } else {
        // SAFETY: nothing is read through the reference.
        let old = unsafe { maps::OLD.get(slot.netns_id()) }.is_some();
        let full = maps::COUNTERS.insert(key, after, 0).is_err();
        if full {
            maps::count(stat::NO_ROOM);
        }
        if phase == counting::NOTING {
            return;
        }
        // A younger namespace began at zero; what an older one had is not known.
        if old || full {
            slot.ambiguous = 1;
            after
        } else {
            Mib::default()
        }
    };
    let Some((cell, _)) = maps::cell(index) else { return };
    let about = About { index, skb: skb as u64 };
    match doing {
        doing::SYN => {
            syn_counts(cell, &before, &after, slot.sk as *const u8, about);
        }
        _ => {
            let recv = after.cookies[1].wrapping_sub(before.cookies[1]);
            if recv != 0 || after.cookies[2] != before.cookies[2] {
                cookie(cell, &before, &after, about);
            } else {
                ack(cell, &before, &after, if again { HAS_SYN } else { 0 }, about);
            }
            if doing == doing::ACK {
                cell.counts[count::ESTABLISHED] += 1;
            }
        }
    }
}

/// Tells which namespace the socket behind file descriptor `arg(0)` of the caller is in: answers its
/// `hash_mix`, and in the last element of `TASKS` the per-CPU pointer to its counters.
#[raw_tracepoint]
pub(crate) fn identify(ctx: RawTracePointContext) -> i32 {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let task = bpf_get_current_task() as *const u8;
        let Some(sk) = adopt::fd_to_sk(task, ctx.arg(0)) else { return 0 };
        let Some(net) = Probe::read::<*const u8>(sk, at::SK_NET.load()) else { return 0 };
        let Some(mib) = Probe::read(net, at::NET_STATISTICS.load()) else { return 0 };
        let Some(mix) = Probe::read(net, at::NET_MIX.load()) else { return 0 };
        maps::go_on(mib);
        maps::answer(mix);
    }
    0
}

/// Tracepoint backend: notes the counters of the namespace `arg(0)` (`Slot::netns_id`), a per-CPU
/// pointer to which is `arg(1)`, on the CPU that this runs on; with `arg(2)` anew.
#[raw_tracepoint]
pub(crate) fn note_counters(ctx: RawTracePointContext) -> i32 {
    let netns = ctx.arg::<u64>(0) as u32;
    let mib: u64 = ctx.arg(1);
    let anew: u64 = ctx.arg(2);
    let Some(context) = context() else { return 0 };
    let Some(offset) = percpu_offset(context) else { return 0 };
    let mut now = Mib::default();
    if read(mib.wrapping_add(offset), doing::SYN, HAS_TROUBLE, &mut now).is_some() {
        // SAFETY: a plain helper call.
        let key = counters_key(netns, unsafe { bpf_get_smp_processor_id() });
        let flag = if anew == 0 { BPF_NOEXIST } else { BPF_ANY };
        // What there is no room for is counted as a loss when it is missed.
        let _ = maps::COUNTERS.insert(key, now, flag.into());
    }
    0
}
