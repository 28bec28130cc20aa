//! Listeners by (netns, port), for the backend whose hooks see packets and children but not the
//! listener they belong to. The kernel side only ever puts a listener in front; the user side takes
//! closed ones out.

use socktrace_common::{GROUP_MAX, SLOT_LINKED, port_key, slot_state, stat};

use crate::{
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
