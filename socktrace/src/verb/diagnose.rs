//! `socktrace diagnose`: watches for a while, then says what happened and what to change.

use std::{
    collections::{HashMap, HashSet},
    io::{self, BufWriter, Write as _},
    time::{Duration, Instant, SystemTime},
};

use socktrace_common::NOBODY;

use super::{
    names::Names,
    need_privileges, now, proc,
    resolve::Resolver,
    runtime::{Signals, after, block_on, every},
    say, start_log,
    watch::{Watch, WatchArgs},
};
use crate::{
    bpf::{self, Happened, Room, Wanted},
    cli::{DiagnoseArgs, Output},
    diagnose::{Acceptor, Case, Diagnosis, Finding, STALLED, is_uncounted},
    engine::{self, Now},
    error::{Error, Result},
    event::{self, Kind},
    filter::Filter,
    host,
    model::{Id, Listener, Owner, Totals},
    view::{
        column::by_trouble,
        finding::{self, Page},
        json::{self, ListenerRecord},
    },
};

/// How often the ring buffer is emptied.
const DRAIN: Duration = Duration::from_millis(10);
/// Records that are taken out of it before signals are looked at again.
const BATCH: usize = 1 << 12;
/// Looks at the queues may take one part in so many of the time.
const LOOK_SHARE: u32 = 20;
/// Of a listener that many processes share, so many are looked at.
const MOST_ACCEPTORS: usize = 4;
/// Lines are no longer than people read, and as long as this where nobody knows how wide the terminal is.
const WIDEST: usize = 110;
const USUAL: usize = 80;

/// Returns how many findings there are.
pub fn run(args: &DiagnoseArgs) -> Result<usize> {
    start_log(args.form.verbose, args.form.quiet);
    let filter = args.filter.filter()?;
    if args.interval > args.duration {
        return Err(Error::Usage(
            "--interval is longer than --duration: it would never look".into(),
        ));
    }
    need_privileges("diagnose")?;
    let mut findings = 0;
    block_on(async {
        findings = watch(args, filter).await?;
        Ok(())
    })?;
    Ok(findings)
}

async fn watch(args: &DiagnoseArgs, filter: Filter) -> Result<usize> {
    let mut signals = Signals::new()?;
    let mut run = Run::start(args, filter)?;
    let log = bpf::drain_log(run.watch.tracer.take_log());
    tokio::pin!(log);
    let (mut drain, mut look) = (every(DRAIN), every(args.interval));
    let end = after(Some(args.duration));
    tokio::pin!(end);
    loop {
        tokio::select! {
            biased;
            () = signals.any() => break,
            () = &mut end => break,
            _ = drain.tick() => run.drain(now(), BATCH)?,
            _ = look.tick() => {
                let took = run.look()?;
                look.reset_after(args.interval.max(took * LOOK_SHARE));
            }
            () = &mut log => {}
        }
    }
    run.finish(args)
}

struct Run {
    watch: Watch,
    filter: Filter,
    names: Names,
    resolver: Resolver,
    diagnosis: Diagnosis,
    /// What listeners had counted when the watch began: some goes on while everything is being attached.
    base: HashMap<Id, Totals>,
    /// When the queues were looked at last.
    looked: Instant,
    events: u64,
}

impl Run {
    fn start(args: &DiagnoseArgs, filter: Filter) -> Result<Self> {
        let mut watch = Watch::start(&WatchArgs {
            kernel: &args.kernel,
            events: Some(wanted(&filter)),
            samples: true,
            filter: &filter,
            quiet: args.form.quiet,
        })?;
        let mut names = Names::default();
        let tracked = watch.named()?;
        // Whose listener an event is of is asked here; the kernel side sends all of the ports.
        names.learn(&mut watch, &Filter::default(), &tracked);
        let base = |t| Some((engine::named(t, &watch.host).id?, engine::totals(t)));
        let base = tracked.iter().filter_map(base).collect();
        watch.announce();
        if !args.form.quiet {
            if let Some(missing) = unseen(&watch) {
                say!("socktrace: {missing}");
            }
            let time = humantime::format_duration(args.duration);
            say!("socktrace: watching for {time}; Ctrl-C ends it earlier");
        }
        Ok(Self {
            watch,
            filter,
            names,
            resolver: Resolver::new(),
            diagnosis: Diagnosis::default(),
            base,
            looked: Instant::now(),
            events: 0,
        })
    }

    /// Takes up to `most` records out of the ring buffer.
    fn drain(&mut self, now: Now, most: usize) -> Result<()> {
        for _ in 0..most {
            let Some(happened) = self.watch.tracer.next_event().transpose()? else { break };
            self.one(&happened, now)?;
            if happened.event.time_ns >= now.monotonic_ns {
                break;
            }
        }
        Ok(())
    }

    fn one(&mut self, happened: &Happened, now: Now) -> Result<()> {
        self.events += 1;
        let time = now.time_of(happened.event.time_ns);
        let Some(mut event) = event::decode(happened, time) else { return Ok(()) };
        if happened.event.slot != NOBODY {
            self.names.name(&mut self.watch, happened.event.slot, &mut event)?;
        } else if let Some(caller) = &event.caller {
            let owner = Owner { pid: caller.pid, comm: caller.comm.clone(), fd: 0 };
            if !self.filter.process(&owner, caller.cgroup.as_deref()) {
                return Ok(());
            }
            let Watch { host, tracer, .. } = &mut self.watch;
            self.resolver.complete(&mut event, host, tracer);
        }
        self.diagnosis.event(&event);
        Ok(())
    }

    /// Looks at the queues, and at who does not accept; returns how long that took.
    fn look(&mut self) -> Result<Duration> {
        // What was dropped belongs to the interval that ends now.
        self.drain(now(), BATCH)?;
        let began = Instant::now();
        let (interval, tracked) = self.watch.interval()?;
        let time = self.watch.since.saturating_duration_since(self.looked);
        self.looked = self.watch.since;
        let mut listeners = interval.listeners;
        self.diagnosis.hear(&listeners);
        listeners.retain(|l| self.filter.matches(l) || l.closed && self.diagnosis.knows(l.id));
        for l in &mut listeners {
            if let Some(base) = self.base.get(&l.id) {
                l.totals.subtract(*base);
            }
        }
        self.diagnosis.interval(listeners, time);
        self.names.learn(&mut self.watch, &Filter::default(), &tracked);
        self.names.forget(&self.watch);
        for case in self.diagnosis.cases_mut() {
            if case.acceptors.is_empty() && case.is_idle_for(STALLED) {
                case.acceptors = acceptors(case);
            }
        }
        Ok(began.elapsed())
    }

    fn finish(mut self, args: &DiagnoseArgs) -> Result<usize> {
        let end = self.watch.end();
        self.drain(end, usize::MAX)?;
        self.look()?;
        self.ask_host();
        let account = self.watch.reconcile()?;
        let drops = account.iter().filter(|one| one.counter == "ListenDrops");
        self.diagnosis.kernel_drops =
            drops.filter_map(|one| Some((one.netns, one.kernel?))).collect();
        let findings = self.diagnosis.findings(&self.filter);
        let mut listeners: Vec<&Listener> =
            self.diagnosis.cases().map(|case| &*case.last).collect();
        listeners.sort_by(|a, b| by_trouble(a, b).then_with(|| a.id.cmp(&b.id)));
        let watched = self.diagnosis.watched;
        let mut out = BufWriter::new(io::stdout());
        let output = args.form.output();
        let json = output == Output::Json;
        if json {
            let time = SystemTime::now();
            for finding in &findings {
                finding::write(&mut out, finding, time)?;
            }
            for &listener in &listeners {
                json::write(&mut out, &ListenerRecord::from(listener))?;
            }
        } else {
            let columns = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
            let page = Page {
                columns: columns.unwrap_or(USUAL).clamp(40, WIDEST),
                color: args.form.color.on_stdout(),
                wide: output == Output::Wide,
                netns: listeners.windows(2).any(|two| two[0].netns != two[1].netns),
            };
            text(&mut out, page, &findings, &listeners, watched)?;
        }
        out.flush()?;
        let mut summary = self.watch.finish_with(Some((self.events, 0)), account);
        summary.findings = Some(findings.len());
        if json {
            json::write(&mut out, &summary)?;
            out.flush()?;
        }
        Ok(findings.len())
    }

    /// Asks the host what only trouble makes interesting.
    fn ask_host(&mut self) {
        let host = &mut self.watch.host;
        let own = host::own_netns();
        let holders: HashMap<u32, u32> = self
            .diagnosis
            .cases()
            .filter_map(|case| Some((case.last.netns, case.last.owners.first()?.pid)))
            .collect();
        let wanted: HashSet<u32> = self.diagnosis.cases().map(|case| case.last.netns).collect();
        host.netns = host::reachable(proc());
        for netns in &host.netns {
            let inode = netns.inode;
            if self.filter.netns.is_some_and(|only| only != inode) {
                continue;
            }
            if wanted.contains(&inode) {
                let enter = match holders.get(&inode) {
                    _ if own == Some(inode) => String::new(),
                    Some(pid) => format!("nsenter -t {pid} -n "),
                    None => format!("nsenter --net={} ", netns.path.display()),
                };
                self.diagnosis.settings.insert(inode, host::settings(netns, enter));
            }
            match host::unanswered(netns) {
                Ok(waiting) => {
                    for waits in waiting {
                        let owner = host.owners.of(waits.inode).first();
                        if self.filter.wants_client(waits.destination, owner) {
                            self.diagnosis.clients.waits(
                                inode,
                                waits.source,
                                waits.destination,
                                owner,
                            );
                        }
                    }
                }
                Err(error) => log::debug!("connects of {}: {error}", netns.path.display()),
            }
        }
    }
}

/// Events that say who; what happened is counted.
const KINDS: [Kind; 7] = [
    Kind::Drop,
    Kind::Cookie,
    Kind::Retransmit,
    Kind::Expire,
    Kind::Reset,
    Kind::Bind,
    Kind::Connect,
];

fn kinds() -> u32 {
    KINDS.iter().fold(0, |bits, kind| bits | kind.bit())
}

/// What this backend does not see, so that a finding may be missing.
fn unseen(watch: &Watch) -> Option<String> {
    let backend = watch.tracer.backend()?;
    let blind = backend.blind_to().iter().map(|(what, _)| (*what).to_owned());
    let events = watch.tracer.unseen(kinds()).into_iter().filter_map(|(number, why)| {
        // Told above, and not needed: what expires is half-open for a minute before.
        let kind = Kind::SENT.get(number as usize).filter(|&&kind| kind != Kind::Expire)?;
        Some(format!("events of kind {} ({why})", kind.name()))
    });
    let without = watch.tracer.without().iter().map(|(what, why)| format!("{what} ({why})"));
    let all: Vec<String> = blind.chain(events).chain(without).collect();
    (!all.is_empty()).then(|| {
        format!(
            "{} does not see, so findings about it may be missing: {}",
            backend.name(),
            all.join("; ")
        )
    })
}

/// What the kernel side has to send.
fn wanted(filter: &Filter) -> Wanted {
    Wanted {
        kinds: kinds(),
        families: filter.families.clone(),
        ports: filter.ports.clone(),
        netns: filter.netns,
        trouble_only: true,
        room: Room::Sample,
        ..Wanted::default()
    }
}

/// What those do who should accept.
fn acceptors(case: &Case) -> Vec<Acceptor> {
    let l = &case.last;
    let lives = |pid: u32| l.owners.iter().any(|owner| owner.pid == pid);
    let mut pids: Vec<u32> = l.acceptors.iter().map(|p| p.pid).filter(|&pid| lives(pid)).collect();
    if pids.is_empty() {
        pids = l.owners.iter().map(|owner| owner.pid).collect();
        pids.dedup();
    }
    let look = |&pid: &u32| host::acceptor(proc(), pid);
    let mut found: Vec<Acceptor> = pids.iter().filter_map(look).collect();
    // The parent of those who accept waits for signals.
    let is_parent = |a: &Acceptor| a.wchan.as_deref().is_some_and(|at| at.contains("sigsuspend"));
    if !found.iter().all(is_parent) {
        found.retain(|acceptor| !is_parent(acceptor));
    }
    found.truncate(MOST_ACCEPTORS);
    found
}

fn text(
    out: &mut impl io::Write,
    page: Page,
    findings: &[Finding],
    listeners: &[&Listener],
    watched: Duration,
) -> Result<()> {
    let seconds = watched.as_secs_f64();
    let many = listeners.len();
    let plural = if many == 1 { "" } else { "s" };
    // With tracepoints, what some of them lost may not be known.
    let unknown = listeners.iter().filter(|l| is_uncounted(l)).count();
    if findings.is_empty() {
        let said = if many == 0 {
            format!("No listener that matches was there to watch in {seconds:.1} s.")
        } else if unknown > 0 {
            format!(
                "Nothing was found about {many} listener{plural} in {seconds:.1} s, but what {unknown} of them lost \
                 could not be counted."
            )
        } else {
            format!(
                "All is well: {many} listener{plural} lost or delayed nothing in {seconds:.1} s."
            )
        };
        writeln!(out, "{said}")?;
        page.well(out, listeners)?;
        return Ok(());
    }
    let plural_findings = if findings.len() == 1 { "" } else { "s" };
    writeln!(
        out,
        "{} finding{plural_findings} about {many} listener{plural} in {seconds:.1} s:\n",
        findings.len(),
    )?;
    for (number, finding) in (1..).zip(findings) {
        page.finding(out, number, finding)?;
    }
    let well: Vec<&Listener> = listeners
        .iter()
        .filter(|l| !findings.iter().any(|f| f.listener.as_ref().is_some_and(|of| of.id == l.id)))
        .copied()
        .collect();
    if !well.is_empty() {
        writeln!(out, "All is well with the others:")?;
        page.well(out, &well)?;
    }
    Ok(())
}
