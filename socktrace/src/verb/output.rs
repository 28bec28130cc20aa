//! Listeners to stdout, in the form that was asked for.

use std::{
    io::{self, BufWriter, Stdout, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    cli::{Output, ViewArgs},
    error::{Error, Result},
    filter::Filter,
    model::Listener,
    view::{
        column::{self, COLUMNS},
        json::{self, ListenerRecord},
        table::{self, Style},
    },
};

/// How to order listeners when `--sort` does not say.
pub(super) type Order = fn(&Listener, &Listener) -> std::cmp::Ordering;

pub(super) struct Printer {
    out: BufWriter<Stdout>,
    output: Output,
    style: Style,
    filter: Filter,
    order: Order,
}

impl Printer {
    pub(super) fn new(args: &ViewArgs, order: Order) -> Result<Self> {
        let order = args
            .sort
            .as_ref()
            .and_then(|key| COLUMNS.iter().find(|column| column.key == key))
            .map_or(order, |column| column.order);
        let output = args.form.output();
        let style = Style {
            wide: output == Output::Wide,
            header: !args.no_header,
            color: args.form.color.on_stdout(),
        };
        Ok(Self {
            out: BufWriter::with_capacity(BATCH_SIZE, io::stdout()),
            output,
            style,
            filter: args.filter.filter()?,
            order,
        })
    }

    pub(super) fn filter(&self) -> &Filter {
        &self.filter
    }

    pub(super) fn style(&self) -> Style {
        self.style
    }

    pub(super) fn is_json(&self) -> bool {
        self.output == Output::Json
    }

    /// Prints the listeners that pass the filter; `title` stands above a table.
    pub(super) fn listeners(
        &mut self,
        mut listeners: Vec<Listener>,
        title: Option<&str>,
    ) -> Result<()> {
        listeners.retain(|listener| self.filter.matches(listener));
        listeners.sort_by(|a, b| (self.order)(a, b).then_with(|| column::by_address(a, b)));
        if self.is_json() {
            for listener in &listeners {
                json::write(&mut self.out, &ListenerRecord::from(listener))?;
            }
            self.out.flush()?;
            return Ok(());
        }
        if let Some(title) = title.filter(|_| self.style.header) {
            writeln!(self.out, "{title}")?;
        }
        table::write(&mut self.out, &listeners, self.style)?;
        if title.is_some() && self.style.header {
            writeln!(self.out)?;
        }
        self.out.flush()?;
        Ok(())
    }

    pub(super) fn record(&mut self, record: &impl serde::Serialize) -> Result<()> {
        json::write(&mut self.out, record)?;
        self.out.flush()?;
        Ok(())
    }
}

/// Lines to stdout through a thread of their own, so that a reader that does not read stops neither the
/// reading of events nor the end of the run. Events that it is too slow for are counted.
pub(super) struct Lines {
    batch: Vec<u8>,
    /// Events in `batch`.
    count: u64,
    dropped: u64,
    sent: u64,
    to: Option<SyncSender<(Vec<u8>, u64)>>,
    /// Batches that were written, empty now.
    spare: Receiver<Vec<u8>>,
    /// Batches and events that were written.
    written: Arc<[AtomicU64; 2]>,
    result: Receiver<io::Result<()>>,
    failed: Option<io::Error>,
    writer: JoinHandle<()>,
}

/// What is handed over at once.
const BATCH_SIZE: usize = 64 << 10;
/// Batches that wait for the reader of stdout.
const MOST_BATCHES: usize = 256;
/// How long a run waits for the reader of stdout when it ends.
const PATIENCE: Duration = Duration::from_secs(2);

impl Lines {
    pub(super) fn start() -> Result<Self> {
        let (to, from) = sync_channel::<(Vec<u8>, u64)>(MOST_BATCHES);
        let (give_back, spare) = channel();
        let (done, result) = channel();
        let written: Arc<[AtomicU64; 2]> = Arc::default();
        let counts = Arc::clone(&written);
        let writer = thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                let mut out = io::stdout().lock();
                let end = from.iter().try_for_each(|(mut batch, count)| {
                    out.write_all(&batch)?;
                    out.flush()?;
                    counts[1].fetch_add(count, Ordering::Relaxed);
                    counts[0].fetch_add(1, Ordering::Release);
                    batch.clear();
                    // Nobody needs it any more when the run has ended.
                    let _ = give_back.send(batch);
                    Ok(())
                });
                // Nobody asks any more when the run has ended.
                let _ = done.send(end);
            })
            .map_err(Error::run("cannot start a thread"))?;
        Ok(Self {
            batch: Vec::new(),
            count: 0,
            dropped: 0,
            sent: 0,
            to: Some(to),
            spare,
            written,
            result,
            failed: None,
            writer,
        })
    }

    /// Lines with their ends, that tell of so many events.
    pub(super) fn write(
        &mut self,
        events: u64,
        lines: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
    ) -> Result<()> {
        lines(&mut self.batch)?;
        self.count += events;
        if self.batch.len() >= BATCH_SIZE {
            self.flush();
        }
        Ok(())
    }

    /// Hands over what there is; returns whether there was room for it.
    pub(super) fn flush(&mut self) -> bool {
        let Some(to) = &self.to else { return false };
        if self.batch.is_empty() && self.count == 0 {
            return true;
        }
        let empty = self.spare.try_recv().unwrap_or_default();
        let batch = (std::mem::replace(&mut self.batch, empty), std::mem::take(&mut self.count));
        match to.try_send(batch) {
            Ok(()) => {
                self.sent += 1;
                true
            }
            Err(TrySendError::Full((mut batch, count))) => {
                self.dropped += count;
                batch.clear();
                self.batch = batch;
                false
            }
            Err(TrySendError::Disconnected(_)) => {
                self.to = None;
                self.failed = self.result.recv().ok().and_then(io::Result::err);
                false
            }
        }
    }

    /// Events that were not written because nobody read.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether stdout can be written to no more.
    pub(super) fn is_closed(&self) -> bool {
        self.to.is_none()
    }

    /// Waits a while until what was handed over is written, and says how many events were so far.
    pub(super) fn settle(&mut self) -> u64 {
        const STEP: Duration = Duration::from_millis(5);
        self.flush();
        let began = Instant::now();
        while !self.is_closed()
            && self.written[0].load(Ordering::Acquire) < self.sent
            && began.elapsed() < PATIENCE
            && !self.writer.is_finished()
        {
            thread::sleep(STEP);
        }
        self.written[1].load(Ordering::Relaxed)
    }

    /// Ends, without waiting for a reader that does not read.
    pub(super) fn finish(mut self) -> Result<()> {
        self.settle();
        self.to = None;
        if let Some(error) = self.failed {
            return Err(error.into());
        }
        match self.result.recv_timeout(Duration::from_millis(100)) {
            Ok(written) => Ok(written?),
            Err(_) => Ok(()),
        }
    }
}
