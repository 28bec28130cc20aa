//! A fixed load for measuring what tracing costs: `load COUNT [LOAD]` prints the time that one
//! connection or packet took by CLOCK_MONOTONIC. Under `cargo xtask vm --icount` that time counts
//! instructions. The loads are those of `cargo xtask bench`; without a name, `connect`.

#[path = "bench/loads.rs"]
mod loads;

use std::{
    error::Error,
    time::{Duration, Instant},
};

use loads::{Load, Meter};

struct Stopwatch(Duration);

impl Meter for Stopwatch {
    fn measure(&mut self, round: &mut dyn FnMut()) {
        let began = Instant::now();
        round();
        self.0 += began.elapsed();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: load COUNT [LOAD]";
    let count: u32 = arguments.next().ok_or(usage)?.parse()?;
    let load = match arguments.next() {
        None => Load::Connect,
        Some(name) => Load::ALL.into_iter().find(|load| load.name() == name).ok_or(usage)?,
    };
    let mut stopwatch = Stopwatch(Duration::ZERO);
    load.run(count, &mut stopwatch);
    println!(
        "{count} {}, {} ns each",
        load.unit(),
        stopwatch.0.as_nanos() / u128::from(count.max(1))
    );
    Ok(())
}
