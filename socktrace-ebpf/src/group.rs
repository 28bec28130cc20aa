//! Listeners by (netns, port), for the backend whose hooks see packets and children but not the
//! listener they belong to. The kernel side only ever puts a listener in front; the user side takes
//! closed ones out.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use socktrace_common::{
    AF_INET6, GROUP_MAX, SLOT_LINKED, Slot, event::kind, port_key, slot_state, stat,
};

use crate::{
    account::{self, doing},
    filter, layout as at, listener, maps,
    mem::{Mem, Probe},
    waiting,
};

/// Puts a listener in front of the chain of its port.
#[inline(always)]
pub(crate) fn link(index: u32, sk: *const u8) {
    if !maps::by_port() {
        return;
    }
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        let Some(key) = key_of(sk) else { return };
        let Some(slot) = maps::SLOTS.get_ptr_mut(index) else {
            return;
        };
        (*slot).next = maps::PORTS.get(key).copied().unwrap_or(0);
        if maps::PORTS.insert(key, index + 1, 0).is_ok() {
            (*slot).flags |= SLOT_LINKED;
        }
    }
}

/// What a packet or a connection was for.
pub(crate) struct Local {
    pub(crate) family: u16,
    /// IPv4, as it lies in memory.
    pub(crate) address: u32,
    pub(crate) address6: [u64; 2],
}

/// The listener of a port that the kernel gives something for this address to (`compute_score`,
/// net/ipv4/inet_hashtables.c and net/ipv6/inet6_hashtables.c): an exact address goes before any
/// address, IPv4 before both families. Of several equals one is returned, so that their namespace's
/// sum stays right; the user side knows that it may have been another.
#[inline(always)]
pub(crate) fn find(key: u64, to: &Local) -> Option<u32> {
    // SAFETY: the value is copied at once.
    let mut next = unsafe { maps::PORTS.get(key) }.copied()?;
    // In memory: the verifier would follow every way through the loop for each value of a register.
    let best = BEST.get_ptr_mut(0)?;
    // SAFETY: the element belongs to this CPU, and packets are handled with bottom halves off.
    let best = unsafe { &mut *best };
    *best = Best { score: 0, found: 0 };
    for _ in 0..GROUP_MAX {
        if next == 0 {
            break;
        }
        let slot = maps::SLOTS.get(next - 1)?;
        let score = score(slot, to);
        if score > best.score {
            *best = Best { score, found: next.into() };
        }
        next = slot.next;
    }
    (best.found as u32).checked_sub(1)
}

#[repr(C)]
struct Best {
    score: u64,
    /// The slot plus one, 0 for none.
    found: u64,
}

#[map]
static BEST: PerCpuArray<Best> = PerCpuArray::with_max_entries(1, 0);

/// Without a branch: in a loop, the verifier follows every way through all of them.
#[inline(always)]
fn score(slot: &Slot, to: &Local) -> u64 {
    let to6 = is_zero(u64::from(to.family ^ AF_INET6));
    let to4 = 1 - to6;
    let only4 = 1 - is_zero(u64::from(slot.family ^ AF_INET6));
    let (a, b) = (slot.address6[0], slot.address6[1]);
    let other6 = (a ^ to.address6[0]) | (b ^ to.address6[1]);
    let exact = to6 * is_zero(other6) + to4 * is_zero(u64::from(slot.address ^ to.address));
    let any = to6 * is_zero(a | b) + to4 * is_zero(u64::from(slot.address));
    let fits = to6 * (1 - only4) + to4 * (only4 | is_zero(u64::from(slot.v6only)));
    let open = is_zero(u64::from(slot.state ^ slot_state::OPEN));
    open * fits * (exact * 4 + any * 2 + (exact | any) * only4)
}

/// 1 for 0, else 0. In assembly, because the compiler would make a branch of it.
#[inline(always)]
fn is_zero(value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let zero: u64;
        // The sign of what is not zero, or of its opposite, is set.
        // SAFETY: registers only.
        unsafe {
            core::arch::asm!(
                "{zero} = {value}",
                "{zero} = -{zero}",
                "{zero} |= {value}",
                "{zero} >>= 63",
                "{zero} ^= 1",
                value = in(reg) value,
                zero = out(reg) zero,
            );
        }
        zero
    }
    #[cfg(not(target_arch = "bpf"))]
    u64::from(value == 0)
}

/// A connection of a listener begins, as a copy of it.
#[inline(always)]
pub(crate) fn established(child: *const u8) {
    if let Some(index) = listener_of(child) {
        account::happened(doing::ACK, index, core::ptr::null(), false);
    }
}

/// A connection was put into the accept queue.
#[inline(always)]
pub(crate) fn joined(child: *const u8) {
    if filter::wants(kind::ESTABLISHED)
        && let Some(index) = listener_of(child)
    {
        waiting::joined(index, child);
    }
}

/// The listener that a connection came from.
#[inline(always)]
fn listener_of(child: *const u8) -> Option<u32> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let key = key_of(child)?;
        let family = Probe::read(child, at::SK_FAMILY.load())?;
        let address = Probe::read(child, at::SK_RCV_SADDR.load())?;
        let mut to = Local { family, address, address6: [0; 2] };
        if family == AF_INET6 {
            to.address6 = Probe::read(child, at::SK_V6_RCV_SADDR.load())?;
        }
        find(key, &to)
    }
}

/// The key of a socket's port; `None` while the port is not chosen yet.
#[inline(always)]
unsafe fn key_of(sk: *const u8) -> Option<u64> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let port: u16 = Probe::read(sk, at::SK_NUM.load())?;
        let net: *const u8 = Probe::read(sk, at::SK_NET.load())?;
        let netns: u32 = Probe::read(net, at::NET_INUM.load())?;
        // An AF_UNIX socket has none.
        (port != 0).then_some(port_key(netns, port))
    }
}

/// Looks at the queues of every listener of a port: which of them a packet was for is not known,
/// and a depth that was really there is true for whichever it is.
#[inline(always)]
pub(crate) fn note_all(key: u64) {
    // SAFETY: the value is copied at once.
    let Some(mut next) = (unsafe { maps::PORTS.get(key) }).copied() else {
        return;
    };
    for _ in 0..GROUP_MAX {
        if next == 0 {
            return;
        }
        let Some(slot) = maps::SLOTS.get(next - 1) else {
            return;
        };
        if slot.state == slot_state::OPEN {
            listener::note_slot(next - 1, slot);
        }
        next = slot.next;
    }
    if next != 0 {
        maps::count(stat::GROUP_CUT);
    }
}

/// The same for the port of a connection's own socket.
#[inline(always)]
pub(crate) fn note_all_of(child: *const u8) {
    // SAFETY: `Probe` survives any address.
    if let Some(key) = unsafe { key_of(child) } {
        note_all(key);
    }
}
