//! What a process does at this moment.

use std::{collections::BTreeMap, path::Path};

use procfs::process::Process;

use crate::diagnose::Acceptor;

/// Of a process with more threads, the others are not looked at.
const MOST_THREADS: usize = 64;

/// Looks at a process that should accept; `None` when it is gone.
#[must_use]
pub fn acceptor(proc: &Path, pid: u32) -> Option<Acceptor> {
    let directory = proc.join(pid.to_string());
    let stat = Process::new_with_root(directory.clone()).ok()?.stat().ok()?;
    let mut waits = BTreeMap::new();
    let threads = std::fs::read_dir(directory.join("task")).into_iter().flatten().flatten();
    for thread in threads.take(MOST_THREADS) {
        *waits.entry(wchan(&thread.path()).unwrap_or_else(|| "running".into())).or_default() += 1;
    }
    let mut waits: Vec<(String, u32)> = waits.into_iter().collect();
    waits.sort_by_key(|(_, threads)| std::cmp::Reverse(*threads));
    Some(Acceptor {
        pid,
        comm: stat.comm,
        state: stat.state,
        wchan: wchan(&directory),
        threads: u32::try_from(stat.num_threads).unwrap_or(1),
        waits,
    })
}

/// The kernel function that a task sleeps in. Where `wchan` says 0, the task runs, or the kernel cannot tell (x86
/// before 5.16) and its stack has to.
fn wchan(task: &Path) -> Option<String> {
    let read = |file| std::fs::read_to_string(task.join(file)).ok();
    let wchan = read("wchan").filter(|name| !name.is_empty() && name != "0");
    wchan.or_else(|| outermost(&read("stack")?).map(str::to_owned))
}

/// The function that went to sleep: `[<0>] do_epoll_wait+0x5e/0x70`, without the scheduler's own.
fn outermost(stack: &str) -> Option<&str> {
    let mut functions = stack.lines().filter_map(|line| line.split_once("] ")?.1.split('+').next());
    functions.find(|name| !name.contains("schedule"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduler_is_not_what_a_task_waits_in() {
        let stack =
            "[<0>] __schedule+0x1/0x2\n[<0>] schedule_timeout+0x3/0x4\n[<0>] ep_poll+0x5/0x6\n";
        assert_eq!(outermost(stack), Some("ep_poll"));
        assert_eq!(outermost(""), None);
    }

    #[test]
    fn this_process_runs_and_has_threads() {
        let own = acceptor(Path::new("/proc"), std::process::id()).unwrap();
        assert_eq!(own.pid, std::process::id());
        assert!(own.threads >= 1 && !own.waits.is_empty(), "{own:?}");
        assert_eq!(acceptor(Path::new("/proc"), u32::MAX), None);
    }
}
