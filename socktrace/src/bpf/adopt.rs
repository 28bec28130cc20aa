//! Finds the sockets of listeners that are older than the trace.

use std::collections::HashMap;

use aya::{
    Ebpf,
    programs::{RawTracePointRunOptions, TestRun as _},
};
use socktrace_common::{TaskEntry, WALK_BATCH};

use super::{object, shared::Shared};
use crate::error::{Error, Result};

/// A listening socket as `/proc` shows it: a process, a file descriptor, the socket's inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub pid: u32,
    pub fd: u32,
    pub inode: u64,
}

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

/// Addresses of the kernel's task structures by process id.
pub(super) fn tasks(ebpf: &mut Ebpf, met: &Shared<TaskEntry>) -> Result<HashMap<u32, u64>> {
    let mut tasks = HashMap::new();
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
            tasks.insert(entry.tgid, entry.task);
        }
        if result != 0 {
            return Ok(tasks);
        }
        next = met.read(WALK_BATCH).task;
    }
    Ok(tasks)
}
