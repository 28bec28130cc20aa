//! `socktrace events`: the stream.

use std::{
    io::Write as _,
    time::{Duration, SystemTime},
};

use socktrace_common::NOBODY;

use super::{
    names::Names,
    need_privileges, now,
    output::{Lines, Printer},
    resolve::Resolver,
    runtime::{Signals, after, block_on, every},
    say, start_log,
    watch::{Watch, WatchArgs},
};
use crate::{
    bpf::{self, Happened, Lost},
    cli::EventsArgs,
    engine::{self, Now},
    error::{Error, Result},
    event::{self, Event, Kind, What},
    filter::Filter,
    view::{self, column::by_address, story::Story, table::Style},
};

/// How often the ring buffer is emptied. Waking up for each record would cost more than the record.
const DRAIN: Duration = Duration::from_millis(10);
/// Listeners that closed are given up, and losses told, this often.
const INTERVAL: Duration = Duration::from_secs(1);
/// Records that are taken out of the ring buffer before signals are looked at again.
const BATCH: usize = 1 << 14;
/// A record may get into the ring buffer this long after its time was taken: what makes it can be interrupted.
const LATE_NS: u64 = 10_000_000;

pub fn run(args: &EventsArgs) -> Result<()> {
    start_log(args.view.form.verbose, args.view.form.quiet);
    let printer = Printer::new(&args.view, by_address)?;
    if args.view.sort.is_some() {
        return Err(Error::Usage("--sort: events come in the order of their times".into()));
    }
    if args.kinds() == 0 {
        return Err(Error::Usage(
            "--kind lost: losses come with every other kind; name one".into(),
        ));
    }
    if !args.view.filter.port.is_empty() && args.kind.contains(&Kind::Socket) {
        return Err(Error::Usage(
            "--kind socket: a socket has no port yet that --port could choose".into(),
        ));
    }
    need_privileges("events")?;
    block_on(trace(args, printer))
}

async fn trace(args: &EventsArgs, printer: Printer) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut stream = Stream::start(args, &printer)?;
    let log = bpf::drain_log(stream.watch.tracer.take_log());
    tokio::pin!(log);
    let (mut drain, mut interval) = (every(DRAIN), every(INTERVAL));
    let end = after(args.trace.duration);
    tokio::pin!(end);
    while !stream.is_done() {
        tokio::select! {
            biased;
            () = signals.any() => break,
            () = &mut end => break,
            _ = drain.tick() => stream.drain(now(), BATCH)?,
            _ = interval.tick() => stream.interval()?,
            () = &mut log => {}
        }
    }
    stream.finish()
}

struct Stream {
    watch: Watch,
    filter: Filter,
    resolver: Resolver,
    names: Names,
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
            kernel: &args.trace.kernel,
            events: Some(args.wanted(&filter)?),
            samples: false,
            filter: &filter,
            quiet: args.view.form.quiet,
        })?;
        refuse_or_say(args, &watch)?;
        let mut stream = Self {
            watch,
            filter,
            resolver: Resolver::new(),
            names: Names::default(),
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
            let header = view::event::header(stream.style);
            stream.lines.write(0, |out| writeln!(out, "{header}"))?;
        }
        let tracked = stream.watch.named()?;
        stream.names.learn(&mut stream.watch, &stream.filter, &tracked);
        stream.watch.announce();
        Ok(stream)
    }

    fn is_done(&self) -> bool {
        self.left == Some(0) || self.lines.is_closed()
    }

    /// Takes up to `most` records out of the ring buffer, and prints what happened before `now`. However much
    /// floods in meanwhile, this comes to an end: later records are not waited for.
    fn drain(&mut self, now: Now, most: usize) -> Result<()> {
        for _ in 0..most {
            let Some(happened) = self.watch.tracer.next_event().transpose()? else { break };
            let is_last = happened.event.time_ns >= now.monotonic_ns + LATE_NS;
            self.pending.push(happened);
            if is_last {
                break;
            }
        }
        self.pending.sort_by_key(|happened| happened.event.time_ns);
        let ready =
            self.pending.partition_point(|happened| happened.event.time_ns < now.monotonic_ns);
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
        let time = now.time_of(happened.event.time_ns);
        let Some(mut event) = event::decode(happened, time) else { return Ok(()) };
        if happened.event.slot != NOBODY {
            self.names.name(&mut self.watch, happened.event.slot, &mut event)?;
        }
        if event.kind == Kind::Close {
            let lost = self.lost_on_close(happened.event.slot)?;
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
        self.write(event, 1)
    }

    /// `counts`: how many events that is, for the account.
    fn write(&mut self, event: &Event, counts: u64) -> Result<()> {
        let (story, json, style) = (&mut self.story, self.json, self.style);
        self.lines.write(counts, |out| {
            if let Some(story) = story {
                story.tell(event).iter().try_for_each(|line| writeln!(out, "{line}"))
            } else if json {
                view::event::write(out, event)
            } else {
                writeln!(out, "{}", view::event::line(event, style))
            }
        })
    }

    /// What a listener lost that has closed. Who may have taken over is looked for where connections can move.
    fn lost_on_close(&mut self, index: u32) -> Result<Option<u64>> {
        let Some(t) = self.watch.tracer.look_at(index)? else { return Ok(None) };
        let others = if engine::may_migrate(&t) { self.watch.tracer.look()? } else { Vec::new() };
        Ok(engine::lost(&t, &others))
    }

    fn interval(&mut self) -> Result<()> {
        // Everything that names a slot goes before the slot is given up.
        self.drain(now(), BATCH)?;
        let (_, tracked) = self.watch.interval()?;
        self.names.learn(&mut self.watch, &self.filter, &tracked);
        self.names.forget(&self.watch);
        self.tell_losses()
    }

    /// Tells what was lost since it was told last. What the reader of stdout is too slow for to be told now is
    /// told later.
    fn tell_losses(&mut self) -> Result<()> {
        self.lines.flush();
        let (lost, unwritten) = (self.watch.lost, self.lines.dropped());
        let mut any = false;
        for (now, before, place) in [
            (lost.ring_full, self.lost.ring_full, "ring buffer full"),
            (lost.recursion, self.lost.recursion, "program skipped by the kernel"),
            (lost.no_slot, self.lost.no_slot, "no room for a listener (--max-listeners)"),
            (lost.no_room, self.lost.no_room, "no room for a connection that waits"),
            (lost.read_failed, self.lost.read_failed, "kernel memory could not be read"),
            (lost.group_cut, self.lost.group_cut, "too many listeners of a port"),
            (unwritten, self.unwritten, "output too slow"),
        ] {
            let count = now.saturating_sub(before);
            if count > 0 {
                any = true;
                let what = What::Lost { count, place };
                let (time, kind) = (SystemTime::now(), Kind::Lost);
                let (listener, caller, netns, socket) = (None, None, None, None);
                let event = Event { time, kind, listener, caller, netns, socket, what };
                self.write(&event, 0)?;
            }
        }
        if any && self.lines.flush() {
            (self.lost, self.unwritten) = (lost, unwritten);
        }
        Ok(())
    }

    /// Tells what happened until now. What comes later is no part of the run: neither delivered nor lost.
    fn finish(mut self) -> Result<()> {
        let end = self.watch.end();
        if self.left != Some(0) {
            self.drain(end, usize::MAX)?;
        }
        self.lines.settle();
        self.tell_losses()?;
        let written = self.lines.settle();
        let unwritten = self.delivered.saturating_sub(written);
        let summary = self.watch.finish(Some((written, unwritten)))?;
        if self.json {
            self.lines.write(0, |out| view::json::write(out, &summary))?;
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
    if !missing.is_empty() && !args.view.form.quiet {
        let backend = watch.tracer.backend().map_or("none", bpf::Backend::name);
        say!("socktrace: not shown with {backend}:{}", list(&missing));
    }
    Ok(())
}
