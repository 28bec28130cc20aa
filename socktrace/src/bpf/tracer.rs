//! The running trace: attached programs, and the listeners they see.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData},
};
use socktrace_common::{
    AF_UNIX, BUCKETS, Cell, FILL_BATCH, Histograms, READ_DONE, READ_MIGRATES, READ_MPTCP, Reading,
    SLOT_LINKED, SNAPSHOT_BATCH, Slot, TaskEntry, WALK_BATCH, control, count, counting,
    event::{self, UnixName},
    slot_state, stat, wanted,
};

mod chains;
mod known;

use self::known::{CERTAIN, OF_UNIX, ONLY_UNIX, UNIX_CONNECTED};
use super::{
    adopt::{self, Answers, PortHolder},
    backend::{Backend, UNIX_COUNTS},
    log,
    object::{self, Attempt, KernelBtf, MOST_WAITING, Options},
    ring::{Happened, Ring},
    shared::{Shared, Shelf},
    times::times,
};
use crate::{
    error::{Error, Result},
    host::monotonic_ns,
    model::Times,
};

/// One listener as the kernel side sees it at the end of an interval.
#[derive(Clone, Debug)]
pub struct Tracked {
    pub index: u32,
    pub slot: Slot,
    pub reading: Reading,
    /// Highest depths that events of the interval saw; `None` without an event.
    pub accept_peak: Option<u32>,
    pub syn_peak: Option<u32>,
    /// By the indices of [`count`], since the slot's beginning.
    pub counts: [u64; count::COUNT],
    /// Bit by bit, which of `counts` the hooks can tell for this listener.
    pub known: u64,
    pub accept_wait: Option<Times>,
    pub handshake: Option<Times>,
    /// `bpf_ktime_get_ns` of the last `accept()`, 0 for none.
    pub accepted_ns: u64,
    /// Whether the hooks can see this listener's events.
    pub watched: bool,
    /// Of an AF_UNIX listener.
    pub name: Option<UnixName>,
    /// Thread groups that called `accept()` lately.
    pub acceptors: Vec<u32>,
}

impl Tracked {
    #[must_use]
    pub fn closed(&self) -> bool {
        self.slot.state == slot_state::CLOSED
    }

    /// As it was when it began to listen, where it has none any more.
    #[must_use]
    pub fn port(&self) -> u16 {
        if self.reading.port == 0 { self.slot.port } else { self.reading.port }
    }

    /// How often a hook looked at it.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.counts[count::EVENTS]
    }

    /// One of the counts, when it is known.
    #[must_use]
    pub fn count(&self, index: usize) -> Option<u64> {
        (self.known >> index & 1 == 1).then(|| self.counts[index])
    }
}

/// What was attributed to the listeners of one network namespace.
pub type Counts = [u64; count::COUNT];

/// Inode number and `hash_mix`: an inode number comes back when its namespace is gone.
pub type Netns = (u32, u32);

/// What `inet_csk_listen_stop` may need to empty a queue.
const SETTLING: Duration = Duration::from_millis(10);

fn add(sum: &mut Counts, counts: &Counts) {
    for (sum, count) in sum.iter_mut().zip(counts) {
        *sum = sum.wrapping_add(*count);
    }
}

/// What did not reach the reader, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Listeners that found no free slot.
    pub no_slot: u64,
    pub read_failed: u64,
    pub group_cut: u64,
    /// Connections in accept queues that there was no room to note.
    pub no_room: u64,
    /// Runs of a program that the kernel skipped because the program ran already on that CPU.
    pub recursion: u64,
    /// Events that found the ring buffer full.
    pub ring_full: u64,
}

impl Lost {
    #[must_use]
    pub fn total(&self) -> u64 {
        self.no_slot
            + self.read_failed
            + self.group_cut
            + self.no_room
            + self.recursion
            + self.ring_full
    }
}

/// A histogram without samples.
const EMPTY: Histograms = Histograms { accept_wait: [0; BUCKETS], handshake: [0; BUCKETS] };

pub struct Tracer {
    // Dropped first: nothing runs any more when the maps go.
    ebpf: Ebpf,
    /// `None`: nothing is attached, listeners are only read.
    backend: Option<Backend>,
    attempt: Attempt,
    cpus: u32,
    slots: Shared<Slot>,
    cells: Shared<Cell>,
    readings: Shared<Reading>,
    /// Mapped a slot at a time: all of it would be most of the memory.
    histograms: Shelf<Histograms>,
    tasks: Shared<TaskEntry>,
    control: Shared<u32>,
    by_sk: HashMap<MapData, u64, u32>,
    ports: HashMap<MapData, u64, u32>,
    old: HashMap<MapData, u32, u8>,
    stats: Shared<u64>,
    names: Shared<UnixName>,
    ring: Ring,
    /// Some ends of connects were not seen, whatever they connected to.
    refusals_missed: bool,
    /// Kinds of events that are wanted, a bit each.
    events: u32,
    /// Slots that the last reading found closed, those without a usable reading too.
    closed: Vec<u32>,
    /// Closed slots that were reported and become free at the next interval.
    reported: Vec<u32>,
    /// What of a reading's flags means something on this kernel.
    flags: u8,
    /// Bits of the counts that the attached hooks can tell.
    known: u64,
    /// What slots that are free again had counted, by namespace.
    past: BTreeMap<Netns, Counts>,
    /// [`Self::activity`] when the last interval ended.
    seen: u64,
    log: Option<log::Logger>,
}

impl Tracer {
    /// Attaches the backend, or the first one that the kernel allows; without a list of backends
    /// nothing is attached. The error names what each of them failed at.
    pub fn start(kernel: &KernelBtf, options: &Options, backends: &[Backend]) -> Result<Self> {
        let mut tracer = Self::prepare(kernel, options)?;
        let mut refusals = Vec::new();
        for &backend in backends {
            tracer.control.write(control::BY_PORT, u32::from(backend == Backend::Tracepoint));
            match object::attach(&mut tracer.ebpf, kernel, backend, tracer.events) {
                Ok(attempt) => {
                    tracer.known = known::by(backend, &attempt);
                    let accepts = tracer.known >> count::ACCEPTED & 1;
                    tracer.control.write(control::ACCEPTS, u32::from(accepts == 1));
                    tracer.attempt = attempt;
                    tracer.backend = Some(backend);
                    return Ok(tracer);
                }
                Err(reason) => {
                    ::log::info!("backend {backend}: {reason}");
                    refusals.push((backend, reason));
                }
            }
        }
        if backends.is_empty() { Ok(tracer) } else { Err(Error::Refused(refusals)) }
    }

    fn prepare(kernel: &KernelBtf, options: &Options) -> Result<Self> {
        let mut ebpf = object::load(kernel, options)?;
        let log = log::open(&mut ebpf);
        // Not when the first listener is looked at: that may be in the middle of its work.
        object::on_request(&mut ebpf, "snapshot")?;
        let slots = options.max_listeners;
        let mut map = |name: &str| -> Result<Map> {
            ebpf.take_map(name).ok_or_else(|| Error::Run {
                what: "the eBPF object is damaged".into(),
                source: format!("no map {name}").into(),
            })
        };
        let damaged = || Error::run("the eBPF object is damaged");
        let tracer = Self {
            slots: Shared::new("SLOTS", map("SLOTS")?, slots)?,
            cells: Shared::new("CELLS", map("CELLS")?, slots * options.cpus)?,
            readings: Shared::new("READINGS", map("READINGS")?, slots)?,
            histograms: Shelf::new("HISTOGRAMS", map("HISTOGRAMS")?, slots)?,
            tasks: Shared::new("TASKS", map("TASKS")?, WALK_BATCH + 1)?,
            control: Shared::new("CONTROL", map("CONTROL")?, control::COUNT)?,
            by_sk: map("BY_SK")?.try_into().map_err(damaged())?,
            ports: map("PORTS")?.try_into().map_err(damaged())?,
            old: map("OLD")?.try_into().map_err(damaged())?,
            stats: Shared::new("STATS", map("STATS")?, stat::COUNT * options.cpus)?,
            names: Shared::new("PATHS", map("PATHS")?, slots)?,
            ring: Ring::new(map("EVENTS")?)?,
            refusals_missed: false,
            events: options.events.as_ref().map_or(0, |wanted| wanted.kinds),
            backend: None,
            attempt: Attempt::default(),
            cpus: options.cpus,
            closed: Vec::new(),
            reported: Vec::new(),
            flags: if kernel.migrates() { u8::MAX } else { !READ_MIGRATES },
            known: 0,
            past: BTreeMap::new(),
            seen: 0,
            log,
            ebpf,
        };
        tracer.fill(slots)
    }

    /// Every slot is free, the first ones on top.
    fn fill(mut self, slots: u32) -> Result<Self> {
        let mut left = slots;
        while left > 0 {
            adopt::run(&mut self.ebpf, "fill_free", &[left.into(), FILL_BATCH.into()])?;
            left = left.saturating_sub(FILL_BATCH);
        }
        self.control.write(control::EPOCH, 1);
        Ok(self)
    }

    #[must_use]
    pub fn backend(&self) -> Option<Backend> {
        self.backend
    }

    /// What is unknown because an optional hook could not be attached, and why.
    #[must_use]
    pub fn without(&self) -> &[(&'static str, String)] {
        &self.attempt.without
    }

    /// Which of these kinds of events no attached program sends, and why.
    #[must_use]
    pub fn unseen(&self, kinds: u32) -> Vec<(u32, String)> {
        let missing = |kind: u32| {
            let backend = self.backend?;
            if !backend.sends(kind) {
                return Some("no tracepoint stands where it happens".to_owned());
            }
            let (hook, what) = backend.sender(kind)?;
            if self.attempt.attached.contains(&hook.program) {
                return None;
            }
            let why = self.attempt.without.iter().find(|(lacking, _)| *lacking == what);
            Some(why.map_or_else(|| "its function is not there".to_owned(), |(_, why)| why.clone()))
        };
        (0..event::kind::COUNT)
            .filter(|kind| kinds >> kind & 1 == 1)
            .filter_map(|kind| Some((kind, missing(kind)?)))
            .collect()
    }

    /// Where the eBPF side's messages come out; `None` when they are off. Can be taken once.
    pub fn take_log(&mut self) -> Option<log::Logger> {
        self.log.take()
    }

    /// The oldest event that was not read yet.
    pub fn next_event(&mut self) -> Option<Result<Happened>> {
        self.ring.next()
    }

    /// The listener in a slot as it is known without reading the kernel again.
    #[must_use]
    pub fn slot(&self, index: u32) -> Option<Slot> {
        let slot = (index < self.slots.len()).then(|| self.slots.read(index))?;
        (slot.state != slot_state::FREE).then_some(slot)
    }

    /// Says whether the events of a listener are wanted, whose processes the kernel side does not know.
    pub fn want(&self, index: u32, is_wanted: bool) {
        let value = if is_wanted { wanted::YES } else { wanted::NO };
        self.slots.write_u32(index, offset_of!(Slot, wanted), value);
    }

    /// Looks at queues so far, by events.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.attributed().values().map(|counts| counts[count::EVENTS]).sum()
    }

    /// Whether the attached hooks count what the kernel counts.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.known != 0
    }

    /// What was attributed so far to the listeners of each network namespace, those that have closed
    /// too.
    #[must_use]
    pub fn attributed(&self) -> BTreeMap<Netns, Counts> {
        let mut sums = self.past.clone();
        for index in 0..self.used() {
            let slot = self.slots.read(index);
            if slot.state != slot_state::FREE {
                let netns = (slot.netns, slot.mix);
                add(sums.entry(netns).or_insert([0; count::COUNT]), &self.counts_of(index));
            }
        }
        sums
    }

    /// Whether this kernel's SYN queue is full at its limit or only above, once it was seen.
    #[must_use]
    pub fn full_at_limit(&self) -> Option<bool> {
        let (at, above) = (self.stat(stat::FULL_AT_LIMIT), self.stat(stat::QUEUED_AT_LIMIT));
        // A race between two CPUs can look like the other answer, now and then.
        (at != above).then_some(at > above)
    }

    /// Takes in the listeners that are older than the trace and belong to a process.
    pub fn adopt(&mut self) -> Result<()> {
        let answers = Answers { control: &self.control, tasks: &self.tasks };
        adopt::scan(&mut self.ebpf, &answers)?;
        if self.control.read(control::ACCEPTS) == 1 {
            for index in 0..self.used() {
                adopt::queue(&mut self.ebpf, &answers, index)?;
            }
        }
        Ok(())
    }

    /// Sockets that hold a port, the ones that `sock_diag` cannot list too.
    pub fn port_holders(
        &mut self,
        netns: u32,
        protocol: u16,
        port: u16,
        most: usize,
    ) -> Result<Vec<PortHolder>> {
        let answers = Answers { control: &self.control, tasks: &self.tasks };
        adopt::port_holders(&mut self.ebpf, &answers, netns, protocol, port, most)
    }

    /// Tells namespaces from dead ones that had the same inode number: a random number of each by
    /// inode number. `sockets` live in them.
    pub fn identify(&mut self, sockets: &[(u32, OwnedFd)]) -> Result<BTreeMap<u32, u32>> {
        let found = self.find_counters(sockets)?;
        Ok(found.into_iter().map(|(inum, (mix, _))| (inum, mix)).collect())
    }

    /// By inode number: `hash_mix`, and the per-CPU pointer to the counters.
    fn find_counters(&mut self, sockets: &[(u32, OwnedFd)]) -> Result<BTreeMap<u32, (u32, u64)>> {
        let answers = Answers { control: &self.control, tasks: &self.tasks };
        let mut found = BTreeMap::new();
        for (inum, socket) in sockets {
            let fd = u64::try_from(socket.as_raw_fd()).unwrap_or(u64::MAX);
            let mix = answers.ask(&mut self.ebpf, "identify", &[fd])?;
            found.insert(*inum, (mix, self.tasks.read(WALK_BATCH).task));
        }
        Ok(found)
    }

    /// Tracepoint backend: notes what the kernel has counted in the namespaces that there are, and
    /// counts from here on. What begins later begins at zero. `sockets` live in these namespaces.
    pub fn begin_counting(&mut self, sockets: &[(u32, OwnedFd)]) -> Result<()> {
        if self.backend != Some(Backend::Tracepoint) {
            return Ok(());
        }
        let mut counters: BTreeMap<u32, u64> = self
            .find_counters(sockets)?
            .into_iter()
            .map(|(inum, (mix, mib))| (inum ^ mix, mib))
            .collect();
        for index in 0..self.used() {
            let slot = self.slots.read(index);
            if slot.state == slot_state::OPEN {
                counters.insert(slot.netns_id(), slot.mib);
            }
        }
        for id in counters.keys() {
            self.old.insert(id, 1, 0).map_err(Error::run("cannot note a namespace"))?;
        }
        self.control.write(control::COUNTING, counting::NOTING);
        for (id, mib) in counters {
            self.note_counters(id, mib, false);
        }
        self.control.write(control::COUNTING, counting::ON);
        Ok(())
    }

    fn note_counters(&mut self, netns_id: u32, mib: u64, anew: bool) {
        for cpu in 0..self.cpus {
            let args = [netns_id.into(), mib, anew.into()];
            // A CPU that is off: should it come on, what it has counted is unknown.
            let _ = adopt::run_on(&mut self.ebpf, "note_counters", &args, Some(cpu));
        }
    }

    /// Ends the interval: its peaks and the listeners as they are now. A closed listener is in it
    /// once.
    pub fn interval(&mut self) -> Result<Vec<Tracked>> {
        self.settle();
        self.release()?;
        let ended = self.control.read(control::EPOCH);
        self.control.write(control::EPOCH, ended.wrapping_add(1));
        self.watch_room();
        let mut tracked = self.read(ended)?;
        self.seen = self.activity();
        self.reported = std::mem::take(&mut self.closed);
        self.relink(&mut tracked)?;
        Ok(tracked)
    }

    /// Whether anything happened since the last interval.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let closed = |index| {
            self.slots.read_u32(index, offset_of!(Slot, state)) == slot_state::CLOSED
                && !self.reported.contains(&index)
        };
        self.activity() != self.seen || (0..self.used()).any(closed)
    }

    /// A number that grows with every count: accepts and expired requests are no look at a queue.
    fn activity(&self) -> u64 {
        self.attributed().values().flatten().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// To be called every second or so, however long an interval is.
    pub fn watch_room(&self) {
        let waiting = self.stat(stat::WAITING_IN).saturating_sub(self.stat(stat::WAITING_OUT));
        let crowded = waiting > u64::from(MOST_WAITING / 2);
        self.control.write(control::CROWDED, crowded.into());
    }

    /// A listener is marked closed before the kernel has emptied its queues: lets it finish.
    fn settle(&self) {
        let now = monotonic_ns();
        let fresh = (0..self.used())
            .map(|index| self.slots.read(index))
            .filter(|slot| slot.state == slot_state::CLOSED)
            .any(|slot| u128::from(now.saturating_sub(slot.closed_ns)) < SETTLING.as_nanos());
        if fresh {
            std::thread::sleep(SETTLING);
        }
    }

    /// The listeners as they are now, without ending the interval.
    pub fn look(&mut self) -> Result<Vec<Tracked>> {
        self.read(self.control.read(control::EPOCH))
    }

    /// The listener in one slot as it is now; `None` when it cannot be read.
    pub fn look_at(&mut self, index: u32) -> Result<Option<Tracked>> {
        let Some(slot) = self.slot(index) else { return Ok(None) };
        if slot.state == slot_state::OPEN {
            let end = u64::from(index) + 1;
            adopt::run(&mut self.ebpf, "snapshot", &[index.into(), end])?;
        }
        let mut reading = self.readings.read(index);
        reading.flags &= self.flags;
        if reading.flags & READ_DONE == 0 {
            return Ok(None);
        }
        let epoch = self.control.read(control::EPOCH);
        self.tracked(index, self.slots.read(index), reading, epoch, false).map(Some)
    }

    /// All slots from this one on are free.
    fn used(&self) -> u32 {
        (0..self.slots.len())
            .rev()
            .find(|&index| self.slots.read_u32(index, offset_of!(Slot, state)) != slot_state::FREE)
            .map_or(0, |last| last + 1)
    }

    fn read(&mut self, epoch: u32) -> Result<Vec<Tracked>> {
        let used = self.used();
        for first in (0..used).step_by(SNAPSHOT_BATCH as usize) {
            adopt::run(&mut self.ebpf, "snapshot", &[u64::from(first), u64::from(used)])?;
        }
        self.refusals_missed = self.misses_of(UNIX_CONNECTED) > 0;
        let mut tracked = Vec::new();
        // An event that was missed moved counters that the next one took for its own. One that found the ring buffer
        // full was counted before.
        let lost = self.lost();
        let unsure = self.backend == Some(Backend::Tracepoint) && lost.total() > lost.ring_full;
        self.closed.clear();
        for index in 0..used {
            let slot = self.slots.read(index);
            if slot.state == slot_state::FREE {
                continue;
            }
            if slot.state == slot_state::CLOSED {
                self.closed.push(index);
            }
            let mut reading = self.readings.read(index);
            reading.flags &= self.flags;
            if reading.flags & READ_DONE != 0 {
                tracked.push(self.tracked(index, slot, reading, epoch, unsure)?);
            }
        }
        Ok(tracked)
    }

    /// Whether the hooks can tell this listener's events.
    fn sees(&self, slot: &Slot) -> bool {
        match self.backend {
            None => false,
            Some(_) if slot.family == AF_UNIX => self.sees_unix(),
            Some(Backend::Tracepoint) => slot.flags & SLOT_LINKED != 0,
            Some(Backend::Fentry | Backend::Kprobe) => true,
        }
    }

    /// Whether AF_UNIX listeners have hooks.
    fn sees_unix(&self) -> bool {
        let known = |backend: Backend| backend != Backend::Tracepoint;
        self.backend.is_some_and(known) && !self.attempt.lacks(UNIX_COUNTS)
    }

    /// Whether AF_UNIX listeners begin without being seen.
    #[must_use]
    pub fn misses_unix(&self) -> bool {
        self.backend.is_some() && !self.sees_unix()
    }

    fn tracked(
        &self,
        index: u32,
        slot: Slot,
        reading: Reading,
        epoch: u32,
        unsure: bool,
    ) -> Result<Tracked> {
        let mut t = Tracked {
            index,
            slot,
            reading,
            watched: self.sees(&slot),
            accept_peak: None,
            syn_peak: None,
            counts: [0; count::COUNT],
            known: self.known & self.certain(&slot, &reading, unsure),
            accept_wait: None,
            handshake: None,
            accepted_ns: 0,
            name: (slot.family == AF_UNIX).then(|| self.names.read(index)),
            acceptors: Vec::new(),
        };
        let (mut wait_max, mut handshake_max) = (0, 0);
        let half = (epoch & 1) as usize;
        for cpu in 0..self.cpus {
            let cell = self.cells.read(index * self.cpus + cpu);
            add(&mut t.counts, &cell.counts);
            wait_max = wait_max.max(cell.wait_max_ns);
            handshake_max = handshake_max.max(cell.handshake_max_ns);
            t.accepted_ns = t.accepted_ns.max(cell.accepted_ns);
            t.acceptors.extend(cell.acceptors.iter().filter(|&&pid| pid != 0));
            if cell.epoch[half] == epoch {
                t.accept_peak = t.accept_peak.max(Some(cell.accept_peak[half]));
                t.syn_peak = t.syn_peak.max(Some(cell.syn_peak[half]));
            }
        }
        let any = t.counts[count::ACCEPTED] + t.counts[count::HANDSHAKES] > 0;
        let histograms = if any { Some(self.histograms.at(index)?.read(0)) } else { None };
        let times = |buckets: fn(&Histograms) -> &[u64; BUCKETS], max| {
            histograms.as_ref().map_or_else(Times::default, |all| times(buckets(all), max))
        };
        t.accept_wait = t.count(count::ACCEPTED).map(|_| times(|all| &all.accept_wait, wait_max));
        t.handshake =
            t.count(count::HANDSHAKES).map(|_| times(|all| &all.handshake, handshake_max));
        Ok(t)
    }

    /// What of the counts can be right for a listener.
    fn certain(&self, slot: &Slot, reading: &Reading, unsure: bool) -> u64 {
        if slot.family == AF_UNIX {
            return match (self.sees_unix(), self.refusals_missed) {
                (false, _) => 0,
                (true, false) => OF_UNIX,
                (true, true) => OF_UNIX & !(1 << count::CONNECTS_REFUSED),
            };
        }
        !ONLY_UNIX & self.certain_tcp(slot, reading, unsure)
    }

    fn certain_tcp(&self, slot: &Slot, reading: &Reading, unsure: bool) -> u64 {
        if unsure || slot.ambiguous != 0 {
            CERTAIN
        } else if self.backend == Some(Backend::Tracepoint) && reading.flags & READ_MPTCP != 0 {
            // Subflows that join a connection begin like one.
            !(1 << count::ESTABLISHED)
        } else {
            u64::MAX
        }
    }

    /// What all CPUs counted for a slot.
    fn counts_of(&self, index: u32) -> Counts {
        let mut sum = [0; count::COUNT];
        for cpu in 0..self.cpus {
            add(&mut sum, &self.cells.read(index * self.cpus + cpu).counts);
        }
        sum
    }

    /// Gives up a slot whose socket turned out to be gone: its end was missed.
    pub fn drop_slot(&mut self, index: u32) -> Result<()> {
        let slot = self.slots.read(index);
        if slot.state == slot_state::OPEN && self.by_sk.get(&slot.sk, 0).ok() == Some(index) {
            // Failure means that the kernel side was faster.
            let _ = self.by_sk.remove(&slot.sk);
        }
        self.slots.write_u32(index, offset_of!(Slot, state), slot_state::CLOSED);
        self.reported.push(index);
        Ok(())
    }

    /// Frees the slots that were reported closed. An interval has passed, so no program still holds
    /// one.
    fn release(&mut self) -> Result<()> {
        for index in std::mem::take(&mut self.reported) {
            let (slot, counts) = (self.slots.read(index), self.counts_of(index));
            add(self.past.entry((slot.netns, slot.mix)).or_insert([0; count::COUNT]), &counts);
            for cpu in 0..self.cpus {
                self.cells.write(index * self.cpus + cpu, Cell::default());
            }
            if counts[count::ACCEPTED] + counts[count::HANDSHAKES] > 0 {
                self.histograms.at(index)?.write(0, EMPTY);
            }
            self.readings.write(index, Reading::default());
            self.names.write(index, UnixName::default());
            self.slots.write(index, Slot::default());
            // Not by a system call on the map: kprobes would be skipped meanwhile.
            adopt::run(&mut self.ebpf, "fill_free", &[u64::from(index) + 1, 1])?;
        }
        Ok(())
    }

    /// What the kernel side could not do since the start.
    #[must_use]
    pub fn lost(&self) -> Lost {
        Lost {
            no_slot: self.stat(stat::NO_SLOT),
            read_failed: self.stat(stat::READ_FAILED),
            group_cut: self.stat(stat::GROUP_CUT),
            no_room: self.stat(stat::NO_ROOM),
            recursion: self.recursion_misses(),
            ring_full: self.stat(stat::RING_FULL),
        }
    }

    fn stat(&self, index: u32) -> u64 {
        (0..self.cpus).map(|cpu| self.stats.read(cpu * stat::COUNT + index)).sum()
    }

    /// The kernel counts them per program since 5.12 (`bpf_prog_show_fdinfo`).
    fn recursion_misses(&self) -> u64 {
        let counts = |name: &&&str| **name != UNIX_CONNECTED;
        self.attempt.attached.iter().filter(counts).map(|name| self.misses_of(name)).sum()
    }

    fn misses_of(&self, name: &str) -> u64 {
        let attached = self.attempt.attached.contains(&name);
        let misses = || number(&self.fdinfo(name)?, "recursion_misses:");
        if attached { misses().unwrap_or(0) } else { 0 }
    }

    /// What the programs cost so far, of those that run on request too: nanoseconds only where
    /// `kernel.bpf_stats_enabled` is on.
    pub fn log_cost(&self) {
        if !::log::log_enabled!(::log::Level::Debug) {
            return;
        }
        for (name, _) in self.ebpf.programs() {
            let Some(info) = self.fdinfo(name) else { continue };
            let get = |key| number(&info, key).unwrap_or(0);
            let (runs, ns) = (get("run_cnt:"), get("run_time_ns:"));
            ::log::debug!(
                "{name}: {runs} runs, {} ns each; the verifier looked at {} instructions",
                ns.checked_div(runs).unwrap_or(0),
                get("verified_insns:")
            );
        }
    }

    fn fdinfo(&self, name: &str) -> Option<String> {
        let fd = self.ebpf.program(name)?.fd().ok()?.as_fd().as_raw_fd();
        std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()
    }
}

/// The number behind a word of a `/proc/PID/fdinfo` file.
fn number(info: &str, key: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix(key))?.trim().parse().ok()
}
