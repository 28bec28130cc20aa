//! Tracepoint backend: the listeners of each port, in chains that the kernel side goes through.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::offset_of,
};

use socktrace_common::{AF_UNIX, GROUP_MAX, SLOT_LINKED, Slot, port_key, slot_state};

use super::{Tracer, Tracked, known::CERTAIN};
use crate::{
    bpf::backend::Backend,
    error::{Error, Result},
};

impl Tracer {
    /// Tracepoint backend: makes the chain of every port hold its open listeners, each once. The
    /// kernel side only puts new ones in front, and may do so at the very moment another is put in or
    /// taken out. A listener that was not in its chain was not watched in this interval.
    pub(super) fn relink(&mut self, tracked: &mut [Tracked]) -> Result<()> {
        if self.backend != Some(Backend::Tracepoint) {
            return Ok(());
        }
        let mut ports: BTreeMap<u64, Vec<&mut Tracked>> = BTreeMap::new();
        let mut unlinked = BTreeSet::new();
        for t in tracked.iter_mut() {
            if t.slot.family == AF_UNIX {
                continue;
            }
            if t.slot.flags & SLOT_LINKED == 0 {
                unlinked.insert((t.slot.netns_id(), t.slot.mib));
            }
            if t.port() != 0 {
                ports.entry(port_key(t.slot.netns, t.port())).or_default().push(t);
            }
        }
        for (key, mut members) in ports {
            for index in alike(&members) {
                self.slots.write_u32(members[index].index, offset_of!(Slot, ambiguous), 1);
                members[index].known &= CERTAIN;
            }
            let linked = self.chain(key, members.len());
            let seen = &linked[..linked.len().min(GROUP_MAX as usize)];
            members.retain_mut(|t| {
                t.watched &= t.closed() || seen.contains(&t.index);
                if !t.watched {
                    unlinked.insert((t.slot.netns_id(), t.slot.mib));
                }
                !t.closed()
            });
            let wanted: Vec<u32> = members.iter().map(|t| t.index).collect();
            let whole = linked.len() == wanted.len() && wanted.iter().all(|i| linked.contains(i));
            if !whole {
                self.make_chain(key, &wanted)?;
            }
        }
        // What happened to a listener outside its chain was taken for the next event's, or still would
        // be.
        for (netns_id, mib) in unlinked {
            self.note_counters(netns_id, mib, true);
            for t in tracked.iter_mut().filter(|t| t.slot.netns_id() == netns_id) {
                self.slots.write_u32(t.index, offset_of!(Slot, ambiguous), 1);
                t.known &= CERTAIN;
            }
        }
        Ok(())
    }

    /// The slots that the programs meet for a port, as far as it is worth looking.
    fn chain(&self, key: u64, members: usize) -> Vec<u32> {
        let mut chain = Vec::new();
        let mut next = self.ports.get(&key, 0).unwrap_or(0);
        while let Some(index) = next.checked_sub(1)
            && index < self.slots.len()
            && chain.len() <= members
        {
            chain.push(index);
            next = self.slots.read(index).next;
        }
        chain
    }

    fn make_chain(&mut self, key: u64, wanted: &[u32]) -> Result<()> {
        let mut next = 0;
        for &index in wanted.iter().rev() {
            let slot = self.slots.read(index);
            if slot.state != slot_state::OPEN {
                continue;
            }
            self.slots.write_u32(index, offset_of!(Slot, next), next);
            self.slots.write_u32(index, offset_of!(Slot, flags), slot.flags | SLOT_LINKED);
            next = index + 1;
        }
        let done = if next == 0 {
            self.ports.remove(&key).or(Ok(()))
        } else {
            self.ports.insert(key, next, 0)
        };
        done.map_err(Error::run("cannot note a listener's port"))
    }
}

/// Which of a port's listeners cannot be told from another one that was open at the same time: packets
/// come to all of them at the same address.
fn alike(members: &[&mut Tracked]) -> Vec<usize> {
    let address = |t: &Tracked| (t.slot.family, t.slot.address, t.slot.address6, t.slot.v6only);
    let before = |a: &Tracked, b: &Tracked| a.closed() && a.slot.closed_ns <= b.slot.opened_ns;
    // Which device a packet came by is not looked at.
    let by_device = members.iter().any(|t| t.reading.bound_if != 0);
    let same = |a: &Tracked, b: &Tracked| {
        let alike = by_device || address(a) == address(b);
        a.index != b.index && alike && !before(a, b) && !before(b, a)
    };
    let found = |a: &Tracked| members.iter().any(|b| same(a, b));
    (0..members.len()).filter(|&index| found(members[index])).collect()
}
