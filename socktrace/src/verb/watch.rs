//! A running trace, as every verb that traces needs it: the kernel side, the host and the engine.

use std::{
    collections::HashSet,
    os::fd::OwnedFd,
    time::{Duration, Instant, SystemTime},
};

use super::{give_cookies, limits, now, options, proc, say};
use crate::{
    bpf::{self, KernelBtf, Lost, Tracer, Wanted},
    cli::KernelArgs,
    engine::{Engine, Interval, Now},
    error::Result,
    filter::{Filter, Ports},
    host::{self, Host, NetnsPath},
    ledger::{self, Look},
    model::Listener,
    view::{
        json::{Reconciliation, Summary},
        printable,
    },
};

/// How long who holds which socket is believed: processes fork and pass sockets on.
const OWNERS_STAY: Duration = Duration::from_secs(5);
/// Looking for owners may take one part in so many of the time.
const OWNERS_SHARE: u32 = 100;

/// Asking for a cookie between two intervals may take one part in so many of the time, and this much at once.
const NAMES_SHARE: u32 = 20;
const NAMES_ADVANCE: Duration = Duration::from_secs(1);

/// What was asked for.
pub(super) struct WatchArgs<'a> {
    pub(super) kernel: &'a KernelArgs,
    pub(super) events: Option<Wanted>,
    /// Events that found no room are no loss: a sample of them will do.
    pub(super) samples: bool,
    pub(super) filter: &'a Filter,
    pub(super) quiet: bool,
}

pub(super) struct Watch {
    pub(super) tracer: Tracer,
    engine: Engine,
    pub(super) host: Host,
    owners_read: Instant,
    owners_cost: Duration,
    /// How many there were when the last interval ended.
    listeners: usize,
    /// Namespaces with listeners that only `sock_diag` knows.
    untracked: HashSet<u32>,
    /// Namespaces that could not be entered, forgotten when the owners are read again.
    out_of_reach: HashSet<u32>,
    /// Time spent on asking for the cookies of single listeners.
    naming: Duration,
    /// Namespaces that nothing is known of, not even a name, forgotten likewise.
    nameless: HashSet<u32>,
    /// Inodes of sockets that no process holds, forgotten likewise.
    unowned: HashSet<u64>,
    quiet: bool,
    samples: bool,
    started: Instant,
    /// When the running interval began.
    pub(super) since: Instant,
    /// What was lost until the last interval, or the run, ended.
    pub(super) lost: Lost,
    /// What the kernel had counted, and what was attributed, when the trace began.
    baseline: Look,
}

impl Watch {
    /// Attaches, and takes in the listeners that there are.
    pub(super) fn start(args: &WatchArgs<'_>) -> Result<Self> {
        let kernel = KernelBtf::read()?;
        let listeners = count_listeners();
        let mut options = options(listeners, args.kernel.max_listeners)?;
        options.events.clone_from(&args.events);
        let mut tracer = Tracer::start(&kernel, &options, args.kernel.backend.candidates())?;
        let blind = tracer.backend().map_or(&[][..], bpf::Backend::blind_to);
        let blind = blind.iter().map(|(what, why)| (*what, *why));
        for (what, why) in
            blind.chain(tracer.without().iter().map(|(what, why)| (*what, why.as_str())))
        {
            log::info!("unknown with this backend: {what} ({why})");
        }
        // After the probes are on, so that no listener falls between them and this look.
        let began = Instant::now();
        let host = Host::read(proc())?;
        let owners_cost = began.elapsed();
        if !args.quiet {
            for missing in limits(&host) {
                say!("socktrace: not shown: {missing}");
            }
        }
        tracer.adopt()?;
        let sockets = sockets(&host.netns);
        tracer.begin_counting(&sockets)?;
        let baseline = look(&mut tracer, &host.netns, &sockets)?;
        let tracked = tracer.look()?;
        let mut engine = Engine::default();
        let interval = engine.interval(now(), &tracked, &host);
        if !args.quiet {
            say_if_udp(args.filter, &interval.listeners, &host, &mut tracer);
        }
        let mut watch = Self {
            tracer,
            engine,
            host,
            owners_read: Instant::now(),
            owners_cost,
            listeners: 0,
            untracked: HashSet::new(),
            out_of_reach: HashSet::new(),
            nameless: HashSet::new(),
            unowned: HashSet::new(),
            naming: Duration::ZERO,
            quiet: args.quiet,
            samples: args.samples,
            started: Instant::now(),
            since: Instant::now(),
            lost: Lost::default(),
            baseline,
        };
        watch.remember(&interval);
        Ok(watch)
    }

    /// Says that everything that starts from now on is seen.
    pub(super) fn announce(&self) {
        if !self.quiet {
            let backend = backend(&self.tracer);
            say!("socktrace: tracing with {backend} ({} listeners)", self.listeners);
        }
    }

    /// Ends an interval; what it came to, and what the kernel side knew.
    pub(super) fn interval(&mut self) -> Result<(Interval, Vec<bpf::Tracked>)> {
        self.ask_host()?;
        self.since = Instant::now();
        let mut tracked = self.tracer.interval()?;
        if self.complete(&tracked) {
            // Cookies were given out, sockets were taken in: the same interval, read again.
            let fresh = self.tracer.look()?;
            for t in tracked.iter_mut().filter(|t| !t.closed()) {
                if let Ok(at) = fresh.binary_search_by_key(&t.index, |fresh| fresh.index)
                    && fresh[at].slot.sk == t.slot.sk
                {
                    t.reading.cookie = fresh[at].reading.cookie;
                }
            }
        }
        self.engine.full_at_limit = self.tracer.full_at_limit();
        let interval = self.engine.interval(now(), &tracked, &self.host);
        for &index in &interval.gone {
            self.tracer.drop_slot(index)?;
        }
        self.remember(&interval);
        self.warn_of_loss();
        Ok((interval, tracked))
    }

    /// The tracked listeners as they are now, each with its cookie and its owners where they can be had; the
    /// interval goes on.
    pub(super) fn named(&mut self) -> Result<Vec<bpf::Tracked>> {
        let tracked = self.tracer.look()?;
        if self.complete(&tracked) { self.tracer.look() } else { Ok(tracked) }
    }

    /// One listener that is new, with its cookie unless asking for that has taken too much of the time lately.
    pub(super) fn named_at(&mut self, index: u32) -> Result<Option<bpf::Tracked>> {
        let Some(t) = self.tracer.look_at(index)? else { return Ok(None) };
        let budget = NAMES_ADVANCE + self.started.elapsed() / NAMES_SHARE;
        if t.reading.cookie != 0 || t.closed() || self.naming > budget {
            return Ok(Some(t));
        }
        let began = Instant::now();
        let asked = give_cookies(&mut self.host, std::slice::from_ref(&t), &mut self.out_of_reach);
        self.naming += began.elapsed();
        if asked { self.tracer.look_at(index) } else { Ok(Some(t)) }
    }

    /// Before the kernel side is read: listeners that only `sock_diag` knows, and owners that may
    /// have changed.
    fn ask_host(&mut self) -> Result<()> {
        self.host.listeners.clear();
        self.host.unix.clear();
        self.host.unreachable.clear();
        if !self.untracked.is_empty() {
            let namespaces: Vec<u32> = self.untracked.iter().copied().collect();
            self.host.ask(&namespaces);
            self.host.ask_unix(&namespaces);
        }
        if self.owners_read.elapsed() > OWNERS_STAY.max(self.owners_cost * OWNERS_SHARE) {
            self.read_owners();
            // Where no hook tells of new AF_UNIX listeners.
            if self.tracer.misses_unix() {
                self.tracer.adopt()?;
            }
        }
        Ok(())
    }

    /// Reads everything of processes and namespaces anew, and forgets what was in vain before.
    fn read_owners(&mut self) {
        let began = Instant::now();
        self.host.owners.read(proc());
        self.host.netns = host::reachable(proc());
        self.unowned.clear();
        self.nameless.clear();
        self.out_of_reach.clear();
        self.owners_cost = began.elapsed();
        self.owners_read = Instant::now();
    }

    /// For listeners that are new: gets them a cookie and looks for their owners and the names of their
    /// namespaces. Returns whether the kernel was asked for something.
    fn complete(&mut self, tracked: &[bpf::Tracked]) -> bool {
        self.find_owners(tracked);
        self.find_namespaces(tracked);
        give_cookies(&mut self.host, tracked, &mut self.out_of_reach)
    }

    /// First with whoever called `listen()`, then everywhere; what nobody holds is not looked for
    /// again until the owners are read anew.
    fn find_owners(&mut self, tracked: &[bpf::Tracked]) {
        let ownerless = |watch: &Self, t: &bpf::Tracked| {
            let inode = t.reading.inode;
            let known = inode == 0 || watch.unowned.contains(&inode);
            !known && !t.closed() && watch.host.owners.of(inode).is_empty()
        };
        let mut openers = HashSet::new();
        for t in tracked {
            if ownerless(self, t) && openers.insert(t.slot.opener) {
                self.host.owners.look_at(proc(), t.slot.opener);
            }
        }
        let inodes = tracked.iter().filter(|t| !t.closed()).map(|t| t.reading.inode);
        let died = self.host.owners.drop_dead(proc(), inodes);
        if died || tracked.iter().any(|t| ownerless(self, t)) {
            self.read_owners();
            let unowned = tracked.iter().filter(|t| ownerless(self, t)).map(|t| t.reading.inode);
            self.unowned = unowned.collect();
        }
    }

    fn find_namespaces(&mut self, tracked: &[bpf::Tracked]) {
        let unknown = |watch: &Self| -> HashSet<u32> {
            let all = tracked.iter().filter(|t| !t.closed()).map(|t| t.reading.netns);
            let known: HashSet<u32> = watch.host.netns.iter().map(|netns| netns.inode).collect();
            all.filter(|inode| !known.contains(inode) && !watch.nameless.contains(inode)).collect()
        };
        if !unknown(self).is_empty() {
            self.host.netns = host::reachable(proc());
            self.nameless.extend(unknown(self));
        }
    }

    fn remember(&mut self, interval: &Interval) {
        self.listeners = interval.listeners.iter().filter(|listener| !listener.closed).count();
        self.untracked.clone_from(&interval.untracked);
    }

    fn warn_of_loss(&mut self) {
        let lost = self.tracer.lost();
        if lost.no_slot > self.lost.no_slot {
            log::warn!(
                "{} events of listeners that --max-listeners has no room for were lost",
                lost.no_slot - self.lost.no_slot
            );
            // They are shown all the same, as far as `sock_diag` knows them.
            self.host.netns = host::reachable(proc());
            self.untracked.extend(self.host.netns.iter().map(|netns| netns.inode));
        }
        let others = |lost: &Lost| {
            lost.total() - lost.no_slot - if self.samples { lost.ring_full } else { 0 }
        };
        let (others, before) = (others(&lost), others(&self.lost));
        if others > before {
            log::warn!("{} events were lost: {lost:?}", others - before);
        }
        self.lost = lost;
    }

    /// Compares what was attributed with the kernel's counters, and warns of what is left over.
    pub(super) fn reconcile(&mut self) -> Result<Vec<Reconciliation>> {
        if !self.tracer.counts() {
            return Ok(Vec::new());
        }
        let namespaces = host::reachable(proc());
        let end = look(&mut self.tracer, &namespaces, &sockets(&namespaces))?;
        let result = ledger::reconcile(&self.baseline, &end);
        for rest in result.iter().filter(|one| one.unexplained.is_some_and(|rest| rest != 0)) {
            log::warn!(
                "{}: the kernel counted {} in namespace {}, of which {} were attributed to a listener{}",
                rest.counter,
                rest.kernel.unwrap_or(0),
                rest.netns,
                rest.socktrace,
                hint(self.tracer.lost())
            );
        }
        Ok(result)
    }

    /// The moment when the run ends, with what was lost until then.
    pub(super) fn end(&mut self) -> Now {
        let now = now();
        self.lost = self.tracer.lost();
        now
    }

    /// The account of a run that has ended, as the last record and in a sentence.
    /// `events`: how many were delivered, and how many of them nobody could write.
    pub(super) fn finish(mut self, events: Option<(u64, u64)>) -> Result<Summary> {
        let account = self.reconcile()?;
        Ok(self.finish_with(events, account))
    }

    /// The same with the account that was made already.
    pub(super) fn finish_with(
        self,
        events: Option<(u64, u64)>,
        account: Vec<Reconciliation>,
    ) -> Summary {
        let summary = Summary::new(
            SystemTime::now(),
            backend(&self.tracer),
            host::release(),
            self.started.elapsed(),
            events.map_or_else(|| self.tracer.events(), |(delivered, _)| delivered),
            self.lost.total() + events.map_or(0, |(_, unwritten)| unwritten),
            account,
        );
        self.tracer.log_cost();
        if !self.quiet {
            say!(
                "socktrace: {:.1} s with {}, {} listeners at the end, {} events, {} lost{}",
                self.started.elapsed().as_secs_f64(),
                summary.backend,
                self.listeners,
                summary.events,
                summary.lost_events,
                verdict(&summary.reconciliation)
            );
        }
        summary
    }
}

/// Reads both sides of the account, again if something happened meanwhile, but not for ever: on a
/// machine that loses connections all the time it always does. `sockets` live in the namespaces.
fn look(tracer: &mut Tracer, namespaces: &[NetnsPath], sockets: &[(u32, OwnedFd)]) -> Result<Look> {
    const TRIES: u32 = 3;
    let identities = tracer.identify(sockets)?;
    let mut before = host::read_netstat(namespaces);
    let mut tries = 0;
    loop {
        let attributed = tracer.attributed();
        let after = host::read_netstat(namespaces);
        let look = Look { before, attributed, after, namespaces: identities.clone() };
        tries += 1;
        if look.is_exact() || tries == TRIES {
            return Ok(look);
        }
        before = look.after;
    }
}

/// A socket in each namespace that can be entered, by its inode number.
fn sockets(namespaces: &[NetnsPath]) -> Vec<(u32, OwnedFd)> {
    let one = |netns: &NetnsPath| Some((netns.inode, host::socket_in(netns).ok()?));
    namespaces.iter().filter_map(one).collect()
}

/// The account in a few words.
fn verdict(account: &[Reconciliation]) -> String {
    let rest: u64 = account.iter().filter_map(|one| one.unexplained).map(i64::unsigned_abs).sum();
    let kernel = |counter| -> u64 {
        account.iter().filter(|one| one.counter == counter).filter_map(|one| one.kernel).sum()
    };
    match (account.is_empty(), rest) {
        (true, _) => String::new(),
        (false, 0) => {
            format!("; all {} drops of the kernel explained", kernel("ListenDrops"))
        }
        (false, rest) => format!("; {rest} counts of the kernel unexplained"),
    }
}

/// Where a remainder may come from.
fn hint(lost: Lost) -> &'static str {
    if lost.total() > 0 {
        "; events were lost (see above)"
    } else {
        "; SYNs to a broadcast or multicast address and SYN cookies made by an XDP program belong to \
         no listener (docs/LIMITATIONS.md)"
    }
}

fn backend(tracer: &Tracer) -> &'static str {
    tracer.backend().map_or("none", bpf::Backend::name)
}

/// How many listeners there are, to size the maps.
fn count_listeners() -> usize {
    let mut host = Host { netns: host::reachable(proc()), ..Host::default() };
    let all: Vec<u32> = host.netns.iter().map(|netns| netns.inode).collect();
    host.ask(&all);
    host.ask_unix(&all);
    let unix: usize = host.unix.values().map(Vec::len).sum();
    unix + host.listeners.values().map(|dump| dump.listeners.len()).sum::<usize>()
}

/// UDP has no queue of connections: says so to whoever watches the port of a UDP socket.
fn say_if_udp(filter: &Filter, listeners: &[Listener], host: &Host, tracer: &mut Tracer) {
    const MOST_PORTS: usize = 16;
    const MOST_NAMESPACES: usize = 64;
    const UDP: u8 = 17;
    let heard = |port| listeners.iter().any(|l| l.port == Some(port));
    let ports = filter.ports.iter().flat_map(Ports::iter).take(MOST_PORTS);
    for port in ports.filter(|&port| !heard(port)) {
        let namespaces =
            host.netns.iter().filter(|n| filter.netns.is_none_or(|only| only == n.inode));
        for netns in namespaces.take(MOST_NAMESPACES) {
            // A kernel may have no udp_diag.
            let inodes: Vec<u64> = match host::holders(netns, UDP, port) {
                Ok(holders) => holders.iter().map(|holder| holder.inode).collect(),
                Err(_) => {
                    let found = tracer.port_holders(netns.inode, UDP.into(), port, 1);
                    found.unwrap_or_default().iter().map(|holder| holder.inode).collect()
                }
            };
            let Some(&inode) = inodes.first() else { continue };
            let who = host.owners.of(inode).first().map_or_else(String::new, |owner| {
                format!(" ({}/{})", printable(&owner.comm), owner.pid)
            });
            say!(
                "socktrace: port {port} is a UDP socket's{who}: UDP has no listen() and no accept(), \
                 so it has no queue of connections; `ss -lun` shows its receive queue"
            );
            break;
        }
    }
}
