//! Which events were asked for. An event that nobody asked for costs no room in the ring buffer.

use aya_ebpf::{
    Global,
    helpers::bpf_get_current_pid_tgid,
    macros::map,
    maps::{Array, CgroupArray, HashMap},
};
use socktrace_common::{
    AF_INET, AF_INET6, AF_UNIX, Slot,
    event::{SLOW_CONNECT_NS, family},
    wanted,
};

use crate::{
    layout as at,
    mem::{self, Mem, Probe},
};

/// Set of bits, one for each of `event::kind`; 0 when no events are wanted at all. All of these are
/// read-only, so the verifier takes out what is not wanted.
#[unsafe(no_mangle)]
pub(crate) static KINDS: Global<u32> = Global::new(0);

/// Set of `event::family`.
#[unsafe(no_mangle)]
pub(crate) static FAMILIES: Global<u32> = Global::new(family::ALL);

/// `net.ns.inum` of the only namespace wanted, 0 for all.
#[unsafe(no_mangle)]
pub(crate) static ONLY_NETNS: Global<u32> = Global::new(0);

/// 1 when only the ports in `PORT_FILTER` are wanted.
#[unsafe(no_mangle)]
pub(crate) static BY_PORTS: Global<u32> = Global::new(0);

/// 1 when only the processes in `PID_FILTER` are wanted.
#[unsafe(no_mangle)]
pub(crate) static BY_PIDS: Global<u32> = Global::new(0);

/// 1 when only processes below the first of `CGROUP_FILTER` are wanted.
#[unsafe(no_mangle)]
pub(crate) static BY_CGROUP: Global<u32> = Global::new(0);

/// The only name of a process wanted, NULs behind it, both 0 for all.
#[unsafe(no_mangle)]
pub(crate) static COMM_HEAD: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static COMM_TAIL: Global<u64> = Global::new(0);

/// 1 when only calls that failed, and connects that took long, are wanted.
#[unsafe(no_mangle)]
pub(crate) static TROUBLE: Global<u32> = Global::new(0);

/// A bit a port.
#[map]
static PORT_FILTER: Array<u64> = Array::with_max_entries(1, 0);

/// Thread groups.
#[map]
static PID_FILTER: HashMap<u32, u8> = HashMap::with_max_entries(1, 0);

#[map]
static CGROUP_FILTER: CgroupArray = CgroupArray::with_max_entries(1, 0);

/// Whether events of this kind are wanted.
#[inline(always)]
pub(crate) fn wants(kind: u32) -> bool {
    KINDS.load() >> kind & 1 == 1
}

/// Whether anything is wanted of sockets of this family in this namespace.
#[inline(always)]
fn place(of: u16, netns: u32) -> bool {
    let bit = match of {
        AF_INET => family::IPV4,
        AF_INET6 => family::IPV6,
        AF_UNIX => family::UNIX,
        _ => 0,
    };
    let only = ONLY_NETNS.load();
    FAMILIES.load() & bit != 0 && (only == 0 || only == netns)
}

/// Whether events are chosen by process.
#[inline(always)]
fn by_process() -> bool {
    BY_PIDS.load() != 0 || BY_CGROUP.load() != 0 || COMM_HEAD.load() != 0
}

/// Whether anything is wanted of the running task.
#[inline(always)]
fn process() -> bool {
    if BY_PIDS.load() != 0 {
        let pid = (bpf_get_current_pid_tgid() >> 32) as u32;
        // SAFETY: nothing is read through the reference.
        if unsafe { PID_FILTER.get(pid) }.is_none() {
            return false;
        }
    }
    if BY_CGROUP.load() != 0 && CGROUP_FILTER.current_task_under_cgroup(0) != Ok(true) {
        return false;
    }
    if COMM_HEAD.load() != 0 {
        let words = mem::current_comm();
        if words[0] != COMM_HEAD.load() || words[1] != COMM_TAIL.load() {
            return false;
        }
    }
    true
}

/// Whether a call that came to this is wanted.
#[inline(always)]
pub(crate) fn result(result: i32) -> bool {
    TROUBLE.load() == 0 || result < 0
}

/// Whether a connect that was answered after this time is wanted.
#[inline(always)]
pub(crate) fn answered_after(ns: u64) -> bool {
    TROUBLE.load() == 0 || ns >= SLOW_CONNECT_NS
}

/// Whether either of two ports is wanted; 0 is none.
#[inline(always)]
pub(crate) fn ports(a: u16, b: u16) -> bool {
    BY_PORTS.load() == 0 || port(a) || port(b)
}

#[inline(always)]
fn port(port: u16) -> bool {
    let bits = PORT_FILTER.get(u32::from(port) / 64).copied().unwrap_or(0);
    port != 0 && bits >> (port % 64) & 1 == 1
}

/// Whether something that the running task does to a socket is wanted.
#[inline(always)]
pub(crate) fn call(family: u16, netns: u32) -> bool {
    place(family, netns) && process()
}

/// What is wanted of a listener that the running task opened.
#[inline(always)]
pub(crate) fn opened(slot: &Slot) -> u32 {
    if KINDS.load() != 0 && call(slot.family, slot.netns) { wanted::YES } else { wanted::NO }
}

/// What is wanted of a listener that is older than the trace.
#[inline(always)]
pub(crate) fn adopted(slot: &Slot) -> u32 {
    match (KINDS.load() != 0 && place(slot.family, slot.netns), by_process()) {
        (false, _) => wanted::NO,
        (true, true) => wanted::UNKNOWN,
        (true, false) => wanted::YES,
    }
}

/// Whether an event of a listener is wanted, that the running task did not cause.
#[inline(always)]
pub(crate) fn listener(slot: &Slot) -> bool {
    slot.wanted == wanted::YES && port_of(slot)
}

/// Whether a listener's port is wanted. One that the kernel chooses at `listen()` is not there yet when the slot
/// is taken.
#[inline(always)]
fn port_of(slot: &Slot) -> bool {
    if BY_PORTS.load() == 0 {
        return true;
    }
    if slot.port != 0 || slot.family == AF_UNIX {
        return port(slot.port);
    }
    // SAFETY: `Probe` survives any address.
    let chosen: Option<u16> = unsafe { Probe::read(slot.sk as *const u8, at::SK_NUM.load()) };
    port(chosen.unwrap_or(0))
}

/// Whether an event of a listener is wanted that the running task caused: a worker may be wanted and neither
/// the one that opened the listener nor its other workers.
#[inline(always)]
pub(crate) fn listener_call(slot: &Slot) -> bool {
    let wanted = if by_process() {
        place(slot.family, slot.netns) && process()
    } else {
        slot.wanted == wanted::YES
    };
    wanted && port_of(slot)
}
