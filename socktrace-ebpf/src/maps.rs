//! The maps. Their sizes are set by the loader, the numbers here are placeholders.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    helpers::bpf_get_smp_processor_id,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, Stack},
};
use socktrace_common::{
    Cell, Histograms, Mib, Reading, Slot, TaskEntry, WALK_BATCH, Waiting, control, counting,
    event::UnixName, slot_state, stat,
};

use crate::layout;

#[map]
pub(crate) static SLOTS: Array<Slot> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static CELLS: Array<Cell> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
pub(crate) static HISTOGRAMS: Array<Histograms> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
pub(crate) static READINGS: Array<Reading> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Tasks that the last run of `walk_tasks` met; the element behind the last is where to go on.
#[map]
pub(crate) static TASKS: Array<TaskEntry> = Array::with_max_entries(WALK_BATCH + 1, BPF_F_MMAPABLE);

/// What the user side tells the programs: see [`control`].
#[map]
static CONTROL: Array<u32> = Array::with_max_entries(control::COUNT, BPF_F_MMAPABLE);

/// Slots that nobody uses. A stack, so that few listeners mean few slots touched.
#[map]
static FREE: Stack<u32> = Stack::with_max_entries(1, 0);

/// Address of a listening `struct sock` to its slot.
#[map]
static BY_SK: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);

/// A listener that this CPU handled a segment for lately.
#[repr(C)]
#[derive(Clone, Copy)]
struct Met {
    sk: u64,
    slot: u64,
}

const MET_COUNT: u32 = 64;

/// By some bits of the listener's address.
#[map]
static MET: PerCpuArray<Met> = PerCpuArray::with_max_entries(MET_COUNT, 0);

/// Address of a connection in an accept queue to its listener's slot.
#[map]
pub(crate) static WAITING: HashMap<u64, Waiting> = HashMap::with_max_entries(1, 0);

/// (netns, port) to the first slot plus one of the chain of its listeners (tracepoint backend).
#[map]
pub(crate) static PORTS: HashMap<u64, u32> = HashMap::with_max_entries(1, 0);

/// What the counters of a namespace were on a CPU at the event before (tracepoint backend), by
/// `counters_key`. A namespace that ends leaves its notes behind.
#[map]
pub(crate) static COUNTERS: HashMap<u64, Mib> = HashMap::with_max_entries(1, 0);

/// Namespaces that are older than the trace (tracepoint backend), by `Slot::netns_id`: their counters
/// did not begin at zero.
#[map]
pub(crate) static OLD: HashMap<u32, u8> = HashMap::with_max_entries(1, 0);

/// Names of AF_UNIX listeners, by slot.
#[map]
pub(crate) static PATHS: Array<UnixName> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Thread to the backlog it passed to a `listen()` that is still running.
#[map]
pub(crate) static REQUESTED: LruHashMap<u64, i32> = LruHashMap::with_max_entries(1024, 0);

/// Index: `cpu * stat::COUNT + index`. Not a per-CPU map: reading one is a system call during which the
/// kernel skips kprobe programs on that CPU (`bpf_disable_instrumentation`).
#[map]
static STATS: Array<u64> = Array::with_max_entries(stat::COUNT, BPF_F_MMAPABLE);

/// Counts something that could not be done.
#[inline(always)]
pub(crate) fn count(index: u32) {
    // SAFETY: a plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    if let Some(value) = STATS.get_ptr_mut(cpu * stat::COUNT + index) {
        // SAFETY: array elements live as long as the map.
        unsafe { increment(value) };
    }
}

/// Adds one atomically: another program may run on this CPU meanwhile, and what is shared other CPUs change.
/// In assembly, because Rust's own atomics need a compare-and-swap, which eBPF has since 5.12 only.
///
/// # Safety
/// `value` must be an element of a map.
#[inline(always)]
pub(crate) unsafe fn increment(value: *mut u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({value} + 0) += {one}",
            value = in(reg) value,
            one = in(reg) 1_u64,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's promise.
    unsafe {
        value.write(value.read() + 1);
    }
}

/// Whether listeners have to be found by (netns, port).
#[inline(always)]
pub(crate) fn by_port() -> bool {
    CONTROL.get(control::BY_PORT).is_some_and(|&on| on == 1)
}

/// Whether a hook sees `accept()`.
#[inline(always)]
pub(crate) fn accepts_seen() -> bool {
    CONTROL.get(control::ACCEPTS).is_some_and(|&on| on == 1)
}

/// Whether events may be counted by what the kernel's counters were before: see `counting`.
#[inline(always)]
pub(crate) fn counting_phase() -> u32 {
    CONTROL.get(control::COUNTING).copied().unwrap_or(counting::OFF)
}

/// Tells the user side where the next run is to go on.
#[inline(always)]
pub(crate) fn go_on(address: u64) {
    if let Some(entry) = TASKS.get_ptr_mut(WALK_BATCH) {
        // SAFETY: array elements live as long as the map.
        unsafe { (*entry).task = address };
    }
}

/// Whether connections that are accepted have to leave the map of those that wait.
#[inline(always)]
pub(crate) fn crowded() -> bool {
    CONTROL.get(control::CROWDED).is_some_and(|&on| on == 1)
}

/// Tells the user side something about the program that runs on request.
#[inline(always)]
pub(crate) fn answer(value: u32) {
    if let Some(answer) = CONTROL.get_ptr_mut(control::ANSWER) {
        // SAFETY: the user side runs one program at a time and reads when it has ended.
        unsafe { *answer = value };
    }
}

/// Makes a slot free.
#[inline(always)]
pub(crate) fn release(index: u32) {
    // The stack has room for every slot there is, so this cannot fail.
    let _ = FREE.push(index, 0);
}

#[inline(always)]
pub(crate) fn slot_of(sk: *const u8) -> Option<u32> {
    // SAFETY: the value is copied at once.
    unsafe { BY_SK.get(sk as u64) }.copied()
}

/// The same for a listener that a segment is for: one that was met lately is found without a look into the hash
/// table. Only with bottom halves off. `address` is that of the socket, as a number to the verifier.
#[inline(always)]
pub(crate) fn met(address: u64) -> Option<(u32, &'static Slot)> {
    // A `struct tcp_sock` takes 2 KiB and more.
    let place = (address >> 11 ^ address >> 17) as u32 % MET_COUNT;
    let met = MET.get_ptr_mut(place)?;
    // SAFETY: the element belongs to this CPU, and nothing else runs on it meanwhile.
    let met = unsafe { &mut *met };
    if met.sk == address
        && let Some(slot) = SLOTS.get(met.slot as u32)
        && slot.sk == address
        && slot.state == slot_state::OPEN
    {
        return Some((met.slot as u32, slot));
    }
    let index = slot_of(address as *const u8)?;
    *met = Met { sk: address, slot: index.into() };
    Some((index, SLOTS.get(index)?))
}

/// Takes a free slot for `sk`. When another CPU was faster, its slot is returned.
#[inline(always)]
pub(crate) fn claim(sk: *const u8, slot: &Slot) -> Option<u32> {
    let Ok(Some(index)) = FREE.pop() else {
        count(stat::NO_SLOT);
        return None;
    };
    let entry = SLOTS.get_ptr_mut(index)?;
    // SAFETY: the slot was free and is ours until `BY_SK` names it.
    unsafe { *entry = *slot };
    if BY_SK.insert(sk as u64, index, BPF_NOEXIST.into()).is_err() {
        // SAFETY: as above, nobody else knows this slot.
        unsafe { (*entry).state = slot_state::FREE };
        release(index);
        return slot_of(sk);
    }
    Some(index)
}

/// Ends the connection between a socket's address and its slot.
#[inline(always)]
pub(crate) fn forget(sk: *const u8) {
    // Failure means that it was not there.
    let _ = BY_SK.remove(sk as u64);
}

/// This CPU's cell of a slot, and which half of it belongs to the running interval.
#[inline(always)]
pub(crate) fn cell(slot: u32) -> Option<(&'static mut Cell, usize)> {
    let epoch = *CONTROL.get(control::EPOCH)?;
    // SAFETY: a plain helper call.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let cell = CELLS.get_ptr_mut(slot * layout::CPUS.load() + cpu)?;
    // SAFETY: only programs on this CPU write to the cell, and those run with bottom halves off.
    let cell = unsafe { &mut *cell };
    let half = (epoch & 1) as usize;
    if cell.epoch[half] != epoch {
        cell.epoch[half] = epoch;
        cell.accept_peak[half] = 0;
        cell.syn_peak[half] = 0;
    }
    Some((cell, half))
}
