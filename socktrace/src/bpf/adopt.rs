//! Finds the sockets of listeners that are older than the trace.

use aya::{
    Ebpf,
    programs::{RawTracePointRunOptions, TestRun as _},
};
use socktrace_common::{FD_BATCH, TaskEntry, WALK_BATCH};

use super::{object, shared::Shared};
use crate::error::{Error, Result};

/// No kernel has more processes than this (`PID_MAX_LIMIT`, include/linux/threads.h).
const MOST_TASKS: usize = 4 << 20;

pub(super) fn run(ebpf: &mut Ebpf, name: &str, args: &[u64]) -> Result<u32> {
    let mut options = RawTracePointRunOptions::new();
    options.args[..args.len()].copy_from_slice(args);
    let result = object::on_request(ebpf, name)?
        .test_run(options)
        .map_err(Error::run(format!("cannot run the program {name}")))?;
    Ok(result.return_value)
}

/// The kernel's task structures of all processes, with their process ids.
fn tasks(ebpf: &mut Ebpf, met: &Shared<TaskEntry>) -> Result<Vec<TaskEntry>> {
    let mut tasks = Vec::new();
    let mut next = 0;
    let mut start = 0;
    while tasks.len() < MOST_TASKS {
        let result = run(ebpf, "walk_tasks", &[next])?;
        for i in 0..WALK_BATCH {
            let entry = met.read(i);
            // A pointer that cannot be read ends the walk: the process it belonged to is gone.
            if entry.task == 0 {
                return Ok(tasks);
            }
            if start == 0 {
                start = entry.task;
            } else if entry.task == start {
                return Ok(tasks);
            }
            tasks.push(entry);
        }
        if result != 0 {
            return Ok(tasks);
        }
        next = met.read(WALK_BATCH).task;
    }
    Ok(tasks)
}

/// Looks through the file descriptors of every process for listeners that are not tracked yet.
pub(super) fn scan(ebpf: &mut Ebpf, met: &Shared<TaskEntry>) -> Result<()> {
    for TaskEntry { task, tgid, .. } in tasks(ebpf, met)? {
        let mut first = 0;
        let mut size = 1;
        while first < size {
            size = run(ebpf, "scan_fds", &[task, tgid.into(), first.into()])?;
            first += FD_BATCH;
        }
    }
    Ok(())
}
