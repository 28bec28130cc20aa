//! `socktrace top`: one table an interval.

use std::{
    collections::HashSet,
    os::fd::OwnedFd,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval_at, sleep},
};

use super::{
    give_cookies, limits, need_privileges, now, options, output::Printer, proc, say, start_log,
};
use crate::{
    bpf::{self, KernelBtf, Lost, Tracer},
    cli::TopArgs,
    engine::{Engine, Interval},
    error::{Error, Result},
    host::{self, Host, NetnsPath},
    ledger::{self, Look},
    view::{
        column::by_trouble,
        json::{Reconciliation, Summary},
    },
};

/// How long who holds which socket is believed: processes fork and pass sockets on.
const OWNERS_STAY: Duration = Duration::from_secs(5);
/// Looking for owners may take one part in so many of the time.
const OWNERS_SHARE: u32 = 100;

/// How often the room in the maps is looked after, however long an interval is.
const WATCH: Duration = Duration::from_secs(1);

pub fn run(args: &TopArgs) -> Result<()> {
    start_log(args.view.verbose, args.view.quiet);
    let printer = Printer::new(&args.view, by_trouble)?;
    need_privileges("top")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::run("cannot start the runtime"))?;
    runtime.block_on(trace(args, printer))
}

async fn trace(args: &TopArgs, printer: Printer) -> Result<()> {
    // Signals first: from here on a run ends with a summary.
    let mut terminate =
        signal(SignalKind::terminate()).map_err(Error::run("cannot wait for SIGTERM"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(Error::run("cannot wait for SIGINT"))?;
    let mut top = Top::start(args, printer)?;
    let log = bpf::drain_log(top.tracer.take_log());
    tokio::pin!(log);

    let every = args.interval();
    let mut ticks = interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watch = interval_at(tokio::time::Instant::now() + WATCH, WATCH);
    watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = async {
        match args.duration {
            Some(duration) => sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    let mut left = args.count();
    let mut tables = 0_u64;
    while left != Some(0) {
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = ticks.tick() => {
                top.interval()?;
                tables += 1;
                left = left.map(|left| left - 1);
            }
            () = &mut end => break,
            _ = watch.tick() => top.tracer.watch_room(),
            () = &mut log => {}
        }
    }
    // What happened since the last table is not thrown away.
    if left != Some(0) && (tables == 0 || top.since.elapsed() > every / 10 || top.tracer.has_news())
    {
        top.interval()?;
    }
    top.finish()
}

struct Top {
    tracer: Tracer,
    engine: Engine,
    host: Host,
    owners_read: Instant,
    owners_cost: Duration,
    /// How many there were when the last interval ended.
    listeners: usize,
    /// Namespaces with listeners that only `sock_diag` knows.
    untracked: HashSet<u32>,
    /// Namespaces that could not be entered, forgotten when the owners are read again.
    out_of_reach: HashSet<u32>,
    /// Inodes of sockets that no process holds, forgotten likewise.
    unowned: HashSet<u64>,
    printer: Printer,
    quiet: bool,
    started: Instant,
    /// When the running interval began.
    since: Instant,
    lost: Lost,
    /// What the kernel had counted, and what was attributed, when the trace began.
    baseline: Look,
}

impl Top {
    fn start(args: &TopArgs, printer: Printer) -> Result<Self> {
        let kernel = KernelBtf::read()?;
        let listeners = count_listeners();
        let options = options(listeners, args.max_listeners)?;
        let mut tracer = Tracer::start(&kernel, &options, args.backend.candidates())?;
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
        if !args.view.quiet {
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
        if !args.view.quiet {
            let backend = backend(&tracer);
            say!("socktrace: tracing with {backend} ({} listeners)", interval.listeners.len());
        }
        let mut top = Self {
            tracer,
            engine,
            host,
            owners_read: Instant::now(),
            owners_cost,
            listeners: 0,
            untracked: HashSet::new(),
            out_of_reach: HashSet::new(),
            unowned: HashSet::new(),
            printer,
            quiet: args.view.quiet,
            started: Instant::now(),
            since: Instant::now(),
            lost: Lost::default(),
            baseline,
        };
        top.remember(&interval);
        Ok(top)
    }

    fn interval(&mut self) -> Result<()> {
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
        let title = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        self.printer.listeners(interval.listeners, Some(&title))
    }

    /// Before the kernel side is read: listeners that only `sock_diag` knows, and owners that may
    /// have changed.
    fn ask_host(&mut self) -> Result<()> {
        self.host.listeners.clear();
        self.host.unreachable.clear();
        if !self.untracked.is_empty() {
            let namespaces: Vec<u32> = self.untracked.iter().copied().collect();
            self.host.ask(&namespaces);
        }
        if self.owners_read.elapsed() > OWNERS_STAY.max(self.owners_cost * OWNERS_SHARE) {
            self.read_owners();
            self.unowned.clear();
            self.out_of_reach.clear();
        }
        Ok(())
    }

    fn read_owners(&mut self) {
        let began = Instant::now();
        self.host.owners.read(proc());
        self.owners_cost = began.elapsed();
        self.owners_read = Instant::now();
    }

    /// For listeners that are new: gets them a cookie and looks for their owners. Returns whether
    /// the kernel was asked for something.
    fn complete(&mut self, tracked: &[bpf::Tracked]) -> bool {
        self.find_owners(tracked);
        give_cookies(&mut self.host, tracked, &mut self.out_of_reach)
    }

    /// First with whoever called `listen()`, then everywhere; what nobody holds is not looked for
    /// again until the owners are read anew.
    fn find_owners(&mut self, tracked: &[bpf::Tracked]) {
        let ownerless = |top: &Self, t: &bpf::Tracked| {
            let inode = t.reading.inode;
            let known = inode == 0 || top.unowned.contains(&inode);
            !known && !t.closed() && top.host.owners.of(inode).is_empty()
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
            self.unowned = unowned.chain(self.unowned.iter().copied()).collect();
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
        let others = lost.total() - lost.no_slot;
        let before = self.lost.total() - self.lost.no_slot;
        if others > before {
            log::warn!("{} events were lost: {lost:?}", others - before);
        }
        self.lost = lost;
    }

    /// Compares what was attributed with the kernel's counters, and warns of what is left over.
    fn reconcile(&mut self) -> Result<Vec<Reconciliation>> {
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

    fn finish(mut self) -> Result<()> {
        let account = self.reconcile()?;
        let summary = Summary::new(
            SystemTime::now(),
            backend(&self.tracer),
            host::release(),
            self.started.elapsed(),
            self.tracer.events(),
            self.tracer.lost().total(),
            account,
        );
        self.tracer.log_cost();
        if self.printer.is_json() {
            self.printer.record(&summary)?;
        }
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
        Ok(())
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
    host.listeners.values().map(|dump| dump.listeners.len()).sum()
}
