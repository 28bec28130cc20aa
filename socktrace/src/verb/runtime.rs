//! What wakes a run up, and what ends it.

use std::{future::Future, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep},
};

use crate::error::{Error, Result};

pub(super) fn block_on(run: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::run("cannot start the runtime"))?;
    runtime.block_on(run)
}

/// Signals that end a run with its summary, from the moment this is made.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self> {
        let of = |kind, what| signal(kind).map_err(Error::run(what));
        Ok(Self {
            terminate: of(SignalKind::terminate(), "cannot wait for SIGTERM")?,
            interrupt: of(SignalKind::interrupt(), "cannot wait for SIGINT")?,
        })
    }

    pub(super) async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Ticks, the first of them when the time has passed once; none is made up for.
pub(super) fn every(time: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + time, time);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Waits so long, without a time for ever.
pub(super) async fn after(time: Option<Duration>) {
    match time {
        Some(time) => sleep(time).await,
        None => std::future::pending().await,
    }
}
