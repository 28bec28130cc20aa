//! What the listeners that events are about are called.

use std::{collections::HashMap, sync::Arc};

use socktrace_common::Slot;

use super::watch::Watch;
use crate::{
    bpf::Tracked,
    engine,
    error::Result,
    event::{Event, ListenerName},
    filter::Filter,
    host::Host,
    model::{Owner, SynLimit},
};

/// A listener that events may name.
struct Known {
    of: (u64, u64),
    /// `None` when it could not be read.
    name: Option<Arc<ListenerName>>,
    /// The name has its cookie and its port or path: it stays as it is.
    is_settled: bool,
    /// `tcp_syncookies` and `tcp_max_syn_backlog` of its namespace.
    cookies: (u32, u32),
}

impl Known {
    fn new(t: &Tracked, host: &Host) -> Self {
        let name = engine::named(t, host);
        let has_place = name.port.is_some() || name.path.is_some();
        Self {
            of: identity(&t.slot),
            is_settled: t.reading.cookie != 0 && has_place,
            name: Some(Arc::new(name)),
            cookies: cookies(t),
        }
    }
}

/// What tells one listener in a slot from the next: its address and when it began.
fn identity(slot: &Slot) -> (u64, u64) {
    (slot.sk, slot.opened_ns)
}

fn cookies(t: &Tracked) -> (u32, u32) {
    (t.reading.syncookies, t.reading.max_syn_backlog)
}

/// Listeners by slot.
#[derive(Default)]
pub(super) struct Names {
    known: HashMap<u32, Known>,
}

impl Names {
    /// Names the listener in a slot, and the limit of its SYN queue.
    pub(super) fn name(&mut self, watch: &mut Watch, index: u32, event: &mut Event) -> Result<()> {
        let Some(slot) = watch.tracer.slot(index) else { return Ok(()) };
        let of = identity(&slot);
        if self.known.get(&index).is_none_or(|known| known.of != of) {
            let known = match watch.named_at(index)? {
                Some(t) => Known::new(&t, &watch.host),
                None => Known { of, name: None, is_settled: false, cookies: (0, 0) },
            };
            self.known.insert(index, known);
        }
        let known = self.known.get(&index).filter(|known| known.of == of);
        let Some((known, name)) = known.and_then(|known| Some((known, known.name.as_ref()?)))
        else {
            return Ok(());
        };
        if slot.ambiguous != 0 {
            // It may have been another one at the same address.
            event.listener = Some(Arc::new(name.without_id()));
            event.what.queues_mut().map(std::mem::take);
            return Ok(());
        }
        event.listener = Some(Arc::clone(name));
        if let Some(queues) = event.what.queues_mut()
            && queues.syn_depth.is_some()
        {
            let (cookies, most) = known.cookies;
            let limit = |limit| SynLimit::new(limit, cookies, most, None).limit;
            queues.syn_limit = queues.accept_limit.map(limit);
        }
        Ok(())
    }

    /// Keeps what events will say of these listeners, and says which of them are wanted where that depends on
    /// the processes that hold them.
    pub(super) fn learn(&mut self, watch: &mut Watch, filter: &Filter, tracked: &[Tracked]) {
        let host = &watch.host;
        for t in tracked {
            let settled = |known: &&mut Known| known.is_settled && known.of == identity(&t.slot);
            match self.known.get_mut(&t.index).filter(settled) {
                Some(known) => known.cookies = cookies(t),
                None => {
                    self.known.insert(t.index, Known::new(t, host));
                }
            }
            if filter.by_process()
                && let Some(name) = self.known.get(&t.index).and_then(|known| known.name.as_ref())
            {
                let mut holders = host.owners.of(t.reading.inode).iter();
                let cgroup = |owner: &Owner| host.owners.process(owner.pid)?.cgroup.as_deref();
                if holders.any(|owner| filter.process(owner, cgroup(owner))) {
                    watch.tracer.want(t.index, filter.place(name.family, name.netns));
                } else if t.slot.opened_ns == 0 {
                    watch.tracer.want(t.index, false);
                }
            }
        }
    }

    /// Drops those whose slot has another listener, or none, by now.
    pub(super) fn forget(&mut self, watch: &Watch) {
        self.known.retain(|&index, known| {
            let slot = watch.tracer.slot(index);
            slot.is_some_and(|slot| identity(&slot) == known.of)
        });
    }
}
