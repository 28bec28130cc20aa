//! Events on their way into the ring buffer.

use aya_ebpf::{
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        bpf_ktime_get_ns,
    },
    macros::map,
    maps::{RingBuf, ring_buf::RingBufEntry},
};
use socktrace_common::{
    AF_INET, AF_INET6, AF_UNIX, NOBODY, Slot,
    event::{EVENT_QUEUES, EVENT_TIMED, Event, UNIX_PATH_MAX, UnixEvent, UnixName},
    stat,
};

use crate::{
    filter, layout as at, maps,
    mem::{self, Mem, Probe, present},
    snapshot,
};

#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// The reader looks every few milliseconds; waking it for a record costs more than the record.
const NO_WAKEUP: u64 = aya_ebpf::bindings::BPF_RB_NO_WAKEUP as u64;

/// Puts an event into the ring buffer, or counts it as lost.
#[inline(always)]
pub(crate) fn emit(kind: u32, fill: impl FnOnce(&mut Event)) {
    let Some(mut entry) = reserve::<Event>() else { return };
    // SAFETY: the record is ours until it is submitted, and was cleared.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    begin(event, kind);
    fill(event);
    entry.submit(NO_WAKEUP);
}

/// The same for an AF_UNIX socket, with a name.
#[inline(always)]
pub(crate) fn emit_unix(kind: u32, fill: impl FnOnce(&mut UnixEvent)) {
    let Some(mut entry) = reserve::<UnixEvent>() else { return };
    // SAFETY: as above.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    begin(&mut event.event, kind);
    fill(event);
    entry.submit(NO_WAKEUP);
}

#[inline(always)]
fn reserve<T: 'static>() -> Option<RingBufEntry<T>> {
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        maps::count(stat::RING_FULL);
        return None;
    };
    let words: *mut u64 = entry.as_mut_ptr().cast();
    for i in 0..size_of::<T>() / 8 {
        // SAFETY: within the record. Volatile, because the compiler would call a byte-wise `memset`.
        unsafe { words.add(i).write_volatile(0) };
    }
    Some(entry)
}

#[inline(always)]
fn begin(event: &mut Event, kind: u32) {
    // SAFETY: a plain helper call.
    event.time_ns = unsafe { bpf_ktime_get_ns() };
    event.kind = kind;
    event.slot = NOBODY;
}

/// A task that called for an event.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    pid: u32,
    uid: u32,
    cgroup: u64,
    comm: [u64; 2],
}

impl Caller {
    /// The running one.
    #[inline(always)]
    pub(crate) fn current() -> Self {
        Self {
            pid: (bpf_get_current_pid_tgid() >> 32) as u32,
            uid: bpf_get_current_uid_gid() as u32,
            // SAFETY: a plain helper call.
            cgroup: unsafe { bpf_get_current_cgroup_id() },
            comm: mem::current_comm(),
        }
    }

    #[inline(always)]
    pub(crate) fn tell(&self, event: &mut Event) {
        event.pid = self.pid;
        event.uid = self.uid;
        event.cgroup = self.cgroup;
        event.comm = self.comm;
    }
}

/// The running task called for this event.
#[inline(always)]
pub(crate) fn caller(event: &mut Event) {
    Caller::current().tell(event);
}

/// What the socket is, and where its ends are.
///
/// # Safety
/// `sk` must have been a `struct sock` a moment ago.
#[inline(always)]
pub(crate) unsafe fn describe(event: &mut Event, sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        event.family = Probe::value(sk, at::SK_FAMILY.load());
        event.protocol = Probe::value(sk, at::SK_PROTOCOL.load());
        event.socket_type = Probe::value(sk, at::SK_TYPE.load());
        event.state = Probe::value(sk, at::SK_STATE.load());
        event.cookie = Probe::value(sk, at::SK_COOKIE.load());
        event.inode = snapshot::inode_of(sk).unwrap_or(0);
        event.netns = netns_of(sk);
        if event.family != AF_UNIX {
            event.local_port = Probe::value(sk, at::SK_NUM.load());
            local_of(event, sk);
            peer_of(event, sk);
        }
    }
}

/// `net.ns.inum` of a socket's namespace, 0 when it cannot be read.
#[inline(always)]
pub(crate) unsafe fn netns_of(sk: *const u8) -> u32 {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let net: *const u8 = Probe::value(sk, at::SK_NET.load());
        Probe::value(net, at::NET_INUM.load())
    }
}

#[inline(always)]
unsafe fn local_of(event: &mut Event, sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if event.family == AF_INET6 && present(at::SK_V6_RCV_SADDR.load()) {
            event.local = Probe::value(sk, at::SK_V6_RCV_SADDR.load());
        } else {
            event.local[0] = Probe::value::<u32>(sk, at::SK_RCV_SADDR.load()).into();
        }
    }
}

/// The other end of a connection or of a half-open request, whose first part is laid out alike
/// (`struct sock_common`).
#[inline(always)]
pub(crate) unsafe fn peer_of(event: &mut Event, sk: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let family: u16 = Probe::value(sk, at::SK_FAMILY.load());
        event.peer_port = u16::from_be(Probe::value(sk, at::SK_DPORT.load()));
        if family == AF_INET6 && present(at::SK_V6_DADDR.load()) {
            event.peer = Probe::value(sk, at::SK_V6_DADDR.load());
        } else {
            event.peer[0] = Probe::value::<u32>(sk, at::SK_DADDR.load()).into();
        }
        if event.family == 0 {
            event.family = family;
        }
    }
}

/// Where a segment came from.
#[inline(always)]
pub(crate) unsafe fn sender_of(event: &mut Event, skb: *const u8) {
    const ETH_P_IPV6: u16 = 0x86dd;
    // Of the address it comes from, in the two headers.
    const FROM: u32 = 12;
    const FROM6: u32 = 8;
    if skb.is_null() {
        return;
    }
    // SAFETY: `Probe` survives any address.
    unsafe {
        let head: *const u8 = Probe::value(skb, at::SKB_HEAD.load());
        let network: u16 = Probe::value(skb, at::SKB_NETWORK.load());
        let transport: u16 = Probe::value(skb, at::SKB_TRANSPORT.load());
        let protocol: u16 = Probe::value(skb, at::SKB_PROTOCOL.load());
        event.peer_port = u16::from_be(Probe::value(head, transport.into()));
        if u16::from_be(protocol) == ETH_P_IPV6 {
            event.family = AF_INET6;
            event.peer = Probe::value(head, u32::from(network) + FROM6);
        } else {
            event.family = AF_INET;
            event.peer[0] = Probe::value::<u32>(head, u32::from(network) + FROM).into();
        }
    }
}

/// The listener, and both its queues as they are now.
#[inline(always)]
pub(crate) unsafe fn listener(event: &mut Event, index: u32, slot: &Slot) {
    let sk = slot.sk as *const u8;
    event.slot = index;
    event.netns = slot.netns;
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(limit) = Probe::read(sk, at::SK_MAX_ACK_BACKLOG.load()) else { return };
        event.accept_limit = limit;
        if slot.family == AF_UNIX {
            event.family = AF_UNIX;
            let Some(depth) = Probe::read(sk, at::SK_RECEIVE_LEN.load()) else { return };
            event.accept_depth = depth;
        } else {
            let Some(depth) = Probe::read(sk, at::SK_ACK_BACKLOG.load()) else { return };
            event.accept_depth = depth;
            let Some(depth) = Probe::read(sk, at::ICSK_QLEN.load()) else { return };
            event.syn_depth = depth;
        }
        event.flags |= EVENT_QUEUES;
    }
}

/// An event of a listener that no task called for.
#[inline(always)]
pub(crate) fn of_listener(kind: u32, index: u32, fill: impl FnOnce(&mut Event)) {
    if !filter::wants(kind) {
        return;
    }
    let Some(slot) = maps::SLOTS.get(index) else { return };
    if !filter::listener(slot) {
        return;
    }
    emit(kind, |event| {
        // SAFETY: the slot's socket listens, or did a moment ago.
        unsafe { listener(event, index, slot) };
        fill(event);
    });
}

/// An event of a listener that the running task called for.
#[inline(always)]
pub(crate) fn by_caller(kind: u32, index: u32, fill: impl FnOnce(&mut Event)) {
    if !filter::wants(kind) {
        return;
    }
    let Some(slot) = maps::SLOTS.get(index) else { return };
    if !filter::listener_call(slot) {
        return;
    }
    emit(kind, |event| {
        // SAFETY: as above.
        unsafe { listener(event, index, slot) };
        caller(event);
        fill(event);
    });
}

/// Something became of a segment; `detail` is of its kind.
#[inline(always)]
pub(crate) fn segment(kind: u32, index: u32, skb: u64, detail: u32) {
    of_listener(kind, index, |event| {
        event.detail = detail;
        // SAFETY: the segment is there until its function returns.
        unsafe { sender_of(event, skb as *const u8) };
    });
}

/// A duration that could not be measured. (Verifiers cannot follow an `Option` of a number.)
pub(crate) const UNTIMED: u64 = u64::MAX;

/// A duration, unless it is [`UNTIMED`].
#[inline(always)]
pub(crate) fn timed(event: &mut Event, ns: u64) {
    if ns != UNTIMED {
        event.ns = ns;
        event.flags |= EVENT_TIMED;
    }
}

/// The name of an AF_UNIX socket (`unix_sk(sk)->addr`).
#[inline(always)]
pub(crate) unsafe fn unix_name(sk: *const u8) -> Option<UnixName> {
    if !present(at::UNIX_ADDR.load()) || !present(at::UNIX_ADDR_NAME.load()) {
        return None;
    }
    // SAFETY: `Probe` survives any address.
    unsafe {
        let address: *const u8 = Probe::read(sk, at::UNIX_ADDR.load())?;
        if address.is_null() {
            return None;
        }
        let len: u32 = Probe::read(address, at::UNIX_ADDR_LEN.load())?;
        sockaddr_un(address.wrapping_add(at::UNIX_ADDR_NAME.load() as usize), len, false)
    }
}

/// The name in a `struct sockaddr_un` of `len` bytes.
#[inline(always)]
pub(crate) unsafe fn sockaddr_un(from: *const u8, len: u32, user: bool) -> Option<UnixName> {
    // The address family goes before.
    const FAMILY: u32 = 2;
    let len = len.wrapping_sub(FAMILY);
    if len > UNIX_PATH_MAX as u32 {
        return None;
    }
    // SAFETY: any address will do. Behind a short name is something else, which `len` cuts off.
    let path = unsafe { mem::read_from(from.wrapping_add(FAMILY as usize), user) }?;
    Some(UnixName { len, path })
}
