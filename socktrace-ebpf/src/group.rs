//! Listeners by (netns, port), for the backend whose hooks see packets and children but not the
//! listener they belong to. The kernel side only ever puts a listener in front; the user side takes
//! closed ones out.

use socktrace_common::{
    AF_INET, AF_INET6, GROUP_MAX, SLOT_LINKED, Slot, port_key, slot_state, stat,
};

use crate::{
    account::{self, doing},
    layout as at, listener, maps,
    mem::{Mem, Probe},
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
/// address, IPv4 before both families. Which of several equals it was is not known: they are marked,
/// and one of them is returned all the same, so that their namespace's sum stays right.
#[inline(always)]
pub(crate) fn find(key: u64, to: &Local) -> Option<u32> {
    // SAFETY: the value is copied at once.
    let mut next = unsafe { maps::PORTS.get(key) }.copied()?;
    let mut best = 0;
    let mut found = 0;
    for _ in 0..GROUP_MAX {
        if next == 0 {
            break;
        }
        let index = next - 1;
        let slot = maps::SLOTS.get_ptr_mut(index)?;
        // SAFETY: array elements live as long as the map.
        let slot = unsafe { &mut *slot };
        let score = if slot.state == slot_state::OPEN { score(slot, to) } else { 0 };
        if score > best {
            best = score;
            found = index;
        } else if score == best && score != 0 {
            slot.ambiguous = 1;
            if let Some(first) = maps::SLOTS.get_ptr_mut(found) {
                // SAFETY: as above.
                unsafe { (*first).ambiguous = 1 };
            }
        }
        next = slot.next;
    }
    (best != 0).then_some(found)
}

#[inline(always)]
fn score(slot: &Slot, to: &Local) -> u32 {
    const EXACT: u32 = 4;
    const ANY: u32 = 2;
    if to.family == AF_INET6 {
        return if slot.family != AF_INET6 {
            0
        } else if slot.address6[0] == to.address6[0] && slot.address6[1] == to.address6[1] {
            EXACT
        } else if slot.address6[0] | slot.address6[1] == 0 {
            ANY
        } else {
            0
        };
    }
    if slot.family == AF_INET6 && slot.v6only != 0 {
        return 0;
    }
    let ipv4 = u32::from(slot.family == AF_INET);
    if slot.address == to.address {
        EXACT + ipv4
    } else if slot.address == 0 {
        ANY + ipv4
    } else {
        0
    }
}

/// A connection was put into the accept queue of a listener.
#[inline(always)]
pub(crate) fn established(child: *const u8) {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let Some(key) = key_of(child) else { return };
        let Some(family) = Probe::read(child, at::SK_FAMILY.load()) else { return };
        let Some(address) = Probe::read(child, at::SK_RCV_SADDR.load()) else { return };
        let mut to = Local { family, address, address6: [0; 2] };
        if family == AF_INET6 {
            let Some(address6) = Probe::read(child, at::SK_V6_RCV_SADDR.load()) else { return };
            to.address6 = address6;
            // A client of IPv4: `::ffff:a.b.c.d`.
            const MAPPED: u32 = u32::from_be(0xffff);
            if address6[0] == 0 && address6[1] as u32 == MAPPED {
                to.family = AF_INET;
            }
        }
        if let Some(index) = find(key, &to) {
            account::happened(doing::ACK, index, false);
        }
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
