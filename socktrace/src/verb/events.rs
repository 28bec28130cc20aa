//! `socktrace events`: the stream.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use socktrace_common::NOBODY;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval_at, sleep},
};

use super::{
    need_privileges, now,
    output::{Lines, Printer},
    resolve::Resolver,
    say, start_log,
    watch::{Watch, WatchArgs},
};
use crate::{
    bpf::{self, Happened, Lost, Tracked},
    cli::EventsArgs,
    engine::{self, Now},
    error::{Error, Result},
    event::{self, Event, Kind, ListenerName, What},
    filter::Filter,
    host::Host,
    model::SynLimit,
    view::{self, column::by_address, story::Story, table::Style},
};

/// How often the ring buffer is emptied. Waking up for each record would cost more than the record.
const DRAIN: Duration = Duration::from_millis(10);
/// Listeners that closed are given up, and losses told, this often.
const INTERVAL: Duration = Duration::from_secs(1);
/// Records that are taken out of the ring buffer before signals are looked at again.
const BATCH: usize = 1 << 14;

pub fn run(args: &EventsArgs) -> Result<()> {
    start_log(args.view.verbose, args.view.quiet);
    let printer = Printer::new(&args.view, by_address)?;
    if args.view.sort.is_some() {
        return Err(Error::Usage("--sort: events come in the order of their times".into()));
    }
    need_privileges("events")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::run("cannot start the runtime"))?;
    runtime.block_on(trace(args, printer))
}

async fn trace(args: &EventsArgs, printer: Printer) -> Result<()> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(Error::run("cannot wait for SIGTERM"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(Error::run("cannot wait for SIGINT"))?;
    let mut stream = Stream::start(args, &printer)?;
    let log = bpf::drain_log(stream.watch.tracer.take_log());
    tokio::pin!(log);
    let mut drain = interval_at(tokio::time::Instant::now() + DRAIN, DRAIN);
    drain.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut interval = interval_at(tokio::time::Instant::now() + INTERVAL, INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = async {
        match args.duration {
            Some(duration) => sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);
    while !stream.is_done() {
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = &mut end => break,
            _ = drain.tick() => stream.drain(false)?,
            _ = interval.tick() => stream.interval()?,
            () = &mut log => {}
        }
    }
    stream.finish()
}

/// A listener that events may name.
struct Known {
    /// What tells one listener in a slot from the next: its address and when it began.
    of: (u64, u64),
    name: Arc<ListenerName>,
    /// `tcp_syncookies` and `tcp_max_syn_backlog` of its namespace.
    cookies: (u32, u32),
}

impl Known {
    fn new(t: &Tracked, host: &Host) -> Self {
        Self {
            of: (t.slot.sk, t.slot.opened_ns),
            name: Arc::new(engine::named(t, host)),
            cookies: (t.reading.syncookies, t.reading.max_syn_backlog),
        }
    }
}

struct Stream {
    watch: Watch,
    filter: Filter,
    resolver: Resolver,
    /// Listeners by slot.
    known: HashMap<u32, Known>,
    /// Read, but younger than the last look: a record of another CPU may still go before.
    pending: Vec<Happened>,
    story: Option<Story>,
    json: bool,
    style: Style,
    lines: Lines,
    delivered: u64,
    left: Option<u64>,
    lost: Lost,
    unwritten: u64,
}

impl Stream {
    fn start(args: &EventsArgs, printer: &Printer) -> Result<Self> {
        let filter = printer.filter().clone();
        let json = printer.is_json();
        let watch = Watch::start(&WatchArgs {
            backend: args.backend,
            max_listeners: args.max_listeners,
            events: Some(args.wanted(&filter)?),
            filter: &filter,
            quiet: args.view.quiet,
        })?;
        refuse_or_say(args, &watch)?;
        let mut stream = Self {
            watch,
            filter,
            resolver: Resolver::new(),
            known: HashMap::new(),
            pending: Vec::new(),
            story: (args.lifecycle && !json).then(Story::default),
            json,
            style: printer.style(),
            lines: Lines::start()?,
            delivered: 0,
            left: args.count,
            lost: Lost::default(),
            unwritten: 0,
        };
        if !json && !args.lifecycle && !args.view.no_header {
            stream.lines.push(view::event::header(stream.style));
        }
        let tracked = stream.watch.named()?;
        stream.learn(&tracked);
        stream.watch.announce();
        Ok(stream)
    }

    fn is_done(&self) -> bool {
        self.left == Some(0) || self.lines.is_closed()
    }

    /// Takes what is in the ring buffer, and prints what is in order.
    fn drain(&mut self, all: bool) -> Result<()> {
        let now = now();
        let mut more = true;
        while more {
            for _ in 0..BATCH {
                match self.watch.tracer.next_event() {
                    Some(happened) => self.pending.push(happened?),
                    None => {
                        more = false;
                        break;
                    }
                }
            }
            // With a limit of the batch, what floods in does not keep signals waiting.
            if !all {
                break;
            }
        }
        self.pending.sort_by_key(|happened| happened.event.time_ns);
        let ready = if all {
            self.pending.len()
        } else {
            self.pending.partition_point(|happened| happened.event.time_ns < now.monotonic_ns)
        };
        let batch: Vec<Happened> = self.pending.drain(..ready).collect();
        for happened in &batch {
            if self.left == Some(0) {
                break;
            }
            self.one(happened, now)?;
        }
        self.lines.flush();
        Ok(())
    }

    fn one(&mut self, happened: &Happened, now: Now) -> Result<()> {
        let ago = now.monotonic_ns.saturating_sub(happened.event.time_ns);
        let ahead = happened.event.time_ns.saturating_sub(now.monotonic_ns);
        let time = now.time - Duration::from_nanos(ago) + Duration::from_nanos(ahead);
        let Some(mut event) = event::decode(happened, time) else { return Ok(()) };
        if happened.event.slot != NOBODY {
            self.name(happened.event.slot, &mut event)?;
        }
        if event.kind == Kind::Close {
            let lost = engine::lost(happened.event.slot, &self.watch.tracer.look()?);
            if let What::Close { lost_on_close, .. } = &mut event.what {
                *lost_on_close = lost;
            }
        }
        let Watch { host, tracer, .. } = &mut self.watch;
        self.resolver.complete(&mut event, host, tracer);
        self.print(&event)
    }

    fn print(&mut self, event: &Event) -> Result<()> {
        self.delivered += 1;
        self.left = self.left.map(|left| left.saturating_sub(1));
        if let Some(story) = &mut self.story {
            for line in story.tell(event) {
                self.lines.push(line);
            }
        } else if self.json {
            let mut line = Vec::new();
            view::event::write(&mut line, event)?;
            self.lines.push_bytes(&line);
        } else {
            self.lines.push(view::event::line(event, self.style));
        }
        Ok(())
    }

    /// Names the listener in a slot, and the limit of its SYN queue.
    fn name(&mut self, index: u32, event: &mut Event) -> Result<()> {
        let Some(slot) = self.watch.tracer.slot(index) else { return Ok(()) };
        let of = (slot.sk, slot.opened_ns);
        if self.known.get(&index).is_none_or(|known| known.of != of) {
            let tracked = self.watch.named()?;
            self.learn(&tracked);
        }
        let Some(known) = self.known.get(&index).filter(|known| known.of == of) else {
            return Ok(());
        };
        if slot.ambiguous != 0 {
            // It may have been another one at the same address.
            event.listener = Some(Arc::new(ListenerName { id: None, ..(*known.name).clone() }));
            event.what.queues_mut().map(std::mem::take);
            return Ok(());
        }
        event.listener = Some(known.name.clone());
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
    fn learn(&mut self, tracked: &[Tracked]) {
        let host = &self.watch.host;
        for t in tracked {
            let known = Known::new(t, host);
            if self.filter.by_process() {
                let holders = host.owners.of(t.reading.inode);
                let process = holders.first().and_then(|owner| host.owners.process(owner.pid));
                let cgroup = process.and_then(|process| process.cgroup.as_deref());
                if self.filter.holds(holders, cgroup) {
                    let place = self.filter.place(known.name.family, known.name.netns);
                    self.watch.tracer.want(t.index, place);
                } else if t.slot.opened_ns == 0 {
                    self.watch.tracer.want(t.index, false);
                }
            }
            self.known.insert(t.index, known);
        }
    }

    fn interval(&mut self) -> Result<()> {
        // Everything that names a slot goes before the slot is given up.
        self.drain(false)?;
        let (_, tracked) = self.watch.interval()?;
        self.learn(&tracked);
        self.known.retain(|&index, known| {
            let slot = self.watch.tracer.slot(index);
            slot.is_some_and(|slot| (slot.sk, slot.opened_ns) == known.of)
        });
        self.tell_losses()
    }

    fn tell_losses(&mut self) -> Result<()> {
        let lost = self.watch.tracer.lost();
        let unwritten = self.lines.dropped();
        for (count, place) in [
            (lost.ring_full - self.lost.ring_full, "ring buffer full"),
            (lost.recursion.saturating_sub(self.lost.recursion), "program skipped by the kernel"),
            (unwritten - self.unwritten, "output too slow"),
        ] {
            if count > 0 {
                let what = What::Lost { count, place };
                let time = SystemTime::now();
                let kind = Kind::Lost;
                self.print(&Event {
                    time,
                    kind,
                    listener: None,
                    caller: None,
                    netns: None,
                    socket: None,
                    what,
                })?;
                self.delivered -= 1;
            }
        }
        (self.lost, self.unwritten) = (lost, unwritten);
        self.lines.flush();
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        if self.left != Some(0) {
            self.drain(true)?;
        }
        self.tell_losses()?;
        let delivered = self.delivered.saturating_sub(self.lines.dropped());
        let summary = self.watch.finish(Some((delivered, self.lines.dropped())))?;
        if self.json {
            let mut line = Vec::new();
            view::json::write(&mut line, &summary)?;
            self.lines.push_bytes(&line);
        }
        self.lines.finish()
    }
}

/// Says which kinds of events this kernel does not give; the error is that it gives none of them.
fn refuse_or_say(args: &EventsArgs, watch: &Watch) -> Result<()> {
    let missing: Vec<(Kind, String)> = watch
        .tracer
        .unseen(args.kinds())
        .into_iter()
        .filter_map(|(number, why)| Some((*Kind::SENT.get(number as usize)?, why)))
        .collect();
    let wanted = args.kinds().count_ones() as usize;
    let list = |missing: &[(Kind, String)]| {
        missing.iter().map(|(kind, why)| format!("\n  {}: {why}", kind.name())).collect::<String>()
    };
    if missing.len() == wanted {
        return Err(Error::Kernel {
            what: format!("this kernel gives none of these events:{}", list(&missing)),
            remedy: "`socktrace check` shows what this kernel allows; classic tracepoints need \
                     tracefs: mount -t tracefs tracefs /sys/kernel/tracing"
                .into(),
        });
    }
    if !missing.is_empty() && !args.view.quiet {
        let backend = watch.tracer.backend().map_or("none", bpf::Backend::name);
        say!("socktrace: not shown with {backend}:{}", list(&missing));
    }
    Ok(())
}
