//! `socktrace top`: one table an interval.

use std::time::{Duration, SystemTime};

use super::{
    need_privileges,
    output::Printer,
    runtime::{Signals, after, block_on, every},
    start_log,
    watch::{Watch, WatchArgs},
};
use crate::{bpf, cli::TopArgs, error::Result, view::column::by_trouble};

/// How often the room in the maps is looked after, however long an interval is.
const WATCH: Duration = Duration::from_secs(1);

pub fn run(args: &TopArgs) -> Result<()> {
    start_log(args.view.form.verbose, args.view.form.quiet);
    let printer = Printer::new(&args.view, by_trouble)?;
    need_privileges("top")?;
    block_on(trace(args, printer))
}

async fn trace(args: &TopArgs, mut printer: Printer) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut watch = Watch::start(&WatchArgs {
        kernel: &args.trace.kernel,
        events: None,
        samples: false,
        filter: printer.filter(),
        quiet: args.view.form.quiet,
    })?;
    watch.announce();
    let log = bpf::drain_log(watch.tracer.take_log());
    tokio::pin!(log);

    let interval = args.interval();
    let (mut ticks, mut room) = (every(interval), every(WATCH));
    let end = after(args.trace.duration);
    tokio::pin!(end);
    let mut left = args.count();
    let mut tables = 0_u64;
    while left != Some(0) {
        tokio::select! {
            biased;
            () = signals.any() => break,
            _ = ticks.tick() => {
                table(&mut watch, &mut printer)?;
                tables += 1;
                left = left.map(|left| left - 1);
            }
            () = &mut end => break,
            _ = room.tick() => watch.tracer.watch_room(),
            () = &mut log => {}
        }
    }
    // What happened since the last table is not thrown away.
    if left != Some(0)
        && (tables == 0 || watch.since.elapsed() > interval / 10 || watch.tracer.has_news())
    {
        table(&mut watch, &mut printer)?;
    }
    watch.end();
    let summary = watch.finish(None)?;
    if printer.is_json() { printer.record(&summary) } else { Ok(()) }
}

fn table(watch: &mut Watch, printer: &mut Printer) -> Result<()> {
    let (interval, _) = watch.interval()?;
    let title = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    printer.listeners(interval.listeners, Some(&title))
}
