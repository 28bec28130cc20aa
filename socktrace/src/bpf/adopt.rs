//! Finds the sockets of listeners that are older than the trace, and the connections that wait there.

use aya::{
    Ebpf,
    programs::{RawTracePointRunOptions, TestRun as _},
};
use socktrace_common::{FD_BATCH, HOLDER_WORDS, QUEUE_BATCH, TaskEntry, WALK_BATCH, control};

use super::{object, shared::Shared};
use crate::error::{Error, Result};

/// No kernel has more processes than this (`PID_MAX_LIMIT`, include/linux/threads.h).
const MOST_TASKS: usize = 4 << 20;

/// Connections that a walk over one accept queue takes in at most.
const LONGEST_QUEUE: u32 = 1 << 16;

pub(super) fn run(ebpf: &mut Ebpf, name: &str, args: &[u64]) -> Result<()> {
    run_on(ebpf, name, args, None)
}

/// On a certain CPU, or on the one that this thread is on.
pub(super) fn run_on(ebpf: &mut Ebpf, name: &str, args: &[u64], cpu: Option<u32>) -> Result<()> {
    let mut options = RawTracePointRunOptions::new();
    options.args[..args.len()].copy_from_slice(args);
    options.cpu = cpu;
    object::on_request(ebpf, name)?
        .test_run(options)
        .map_err(Error::run(format!("cannot run the program {name}")))?;
    Ok(())
}

/// The memory through which the programs answer.
pub(super) struct Answers<'a> {
    pub(super) control: &'a Shared<u32>,
    pub(super) tasks: &'a Shared<TaskEntry>,
}

impl Answers<'_> {
    pub(super) fn ask(&self, ebpf: &mut Ebpf, name: &str, args: &[u64]) -> Result<u32> {
        self.control.write(control::ANSWER, 0);
        run(ebpf, name, args)?;
        Ok(self.control.read(control::ANSWER))
    }

    /// The kernel's task structures of all processes, with their process ids.
    fn processes(&self, ebpf: &mut Ebpf) -> Result<Vec<TaskEntry>> {
        let mut found: Vec<TaskEntry> = Vec::new();
        let mut next = 0;
        while found.len() < MOST_TASKS {
            let read = self.ask(ebpf, "walk_tasks", &[next])?;
            for i in 0..read.min(WALK_BATCH) {
                let entry = self.tasks.read(i);
                // The list is a ring.
                if found.first().is_some_and(|first| first.task == entry.task) {
                    return Ok(found);
                }
                found.push(entry);
            }
            // A process that ended under the walk's feet ends the walk.
            if read < WALK_BATCH {
                break;
            }
            next = self.tasks.read(WALK_BATCH).task;
        }
        Ok(found)
    }
}

/// Looks through the file descriptors of every process for listeners that are not tracked yet.
pub(super) fn scan(ebpf: &mut Ebpf, answers: &Answers<'_>) -> Result<()> {
    for TaskEntry { task, tgid, .. } in answers.processes(ebpf)? {
        let mut first = 0;
        let mut size = 1;
        while first < size {
            size = answers.ask(ebpf, "scan_fds", &[task, tgid.into(), first.into()])?;
            let found = (0..FD_BATCH).map(|i| answers.tasks.read(i).task);
            for sk in found.filter(|&sk| first < size && sk != 0).collect::<Vec<_>>() {
                run(ebpf, "adopt_sk", &[sk])?;
            }
            first += FD_BATCH;
        }
    }
    Ok(())
}

/// A socket that holds a port, and the file descriptor by which a process holds it.
#[derive(Clone, Copy, Debug)]
pub struct PortHolder {
    pub pid: u32,
    pub fd: u32,
    pub inode: u64,
    pub family: u16,
    pub state: u8,
    pub address: [u64; 2],
}

/// Looks through the file descriptors of every process for sockets that hold a port; `most` are enough.
pub(super) fn port_holders(
    ebpf: &mut Ebpf,
    answers: &Answers<'_>,
    netns: u32,
    protocol: u16,
    port: u16,
    most: usize,
) -> Result<Vec<PortHolder>> {
    let wanted = u64::from(protocol) << 16 | u64::from(port);
    let mut found = Vec::new();
    for TaskEntry { task, tgid, .. } in answers.processes(ebpf)? {
        let mut first = 0;
        let mut size = 1;
        while first < size && found.len() < most {
            let args = [task, tgid.into(), first.into(), netns.into(), wanted];
            size = answers.ask(ebpf, "scan_port", &args)?;
            for bit in (0..FD_BATCH).take_while(|_| first < size) {
                let word = |index| answers.tasks.read(bit * HOLDER_WORDS + index).task;
                let kind = word(3);
                if kind != 0 {
                    found.push(PortHolder {
                        pid: tgid,
                        fd: first + bit,
                        inode: word(0),
                        family: u16::try_from(kind >> 8).unwrap_or(0),
                        state: (kind & 0xff) as u8,
                        address: [word(1), word(2)],
                    });
                }
            }
            first += FD_BATCH;
        }
    }
    Ok(found)
}

/// Takes in the connections that wait in the accept queue of a slot's listener.
pub(super) fn queue(ebpf: &mut Ebpf, answers: &Answers<'_>, slot: u32) -> Result<()> {
    let mut request = 0;
    // A queue that changes under the walk's feet could lead in a circle; none is longer than this.
    for _ in 0..LONGEST_QUEUE / QUEUE_BATCH {
        if answers.ask(ebpf, "adopt_queue", &[slot.into(), request])? < QUEUE_BATCH {
            break;
        }
        request = answers.tasks.read(WALK_BATCH).task;
        if request == 0 {
            break;
        }
    }
    Ok(())
}
