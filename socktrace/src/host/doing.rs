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

/// The kernel function that a task sleeps in; of one that runs the kernel says 0.
fn wchan(task: &Path) -> Option<String> {
    let text = std::fs::read_to_string(task.join("wchan")).ok()?;
    (!text.is_empty() && text != "0").then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_and_has_threads() {
        let own = acceptor(Path::new("/proc"), std::process::id()).unwrap();
        assert_eq!(own.pid, std::process::id());
        assert!(own.threads >= 1 && !own.waits.is_empty(), "{own:?}");
        assert_eq!(acceptor(Path::new("/proc"), u32::MAX), None);
    }
}
