//! What kernel this is and what this user may do.

use std::path::Path;

use rustix::{
    thread::{CapabilitySet, capabilities},
    time::{ClockId, clock_gettime},
};

#[must_use]
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// CLOCK_MONOTONIC, as `bpf_ktime_get_ns` counts.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Number of CPUs the kernel may ever use: per-CPU memory has that many copies.
#[must_use]
pub fn possible_cpus(sys: &Path) -> u32 {
    std::fs::read_to_string(sys.join("devices/system/cpu/possible"))
        .ok()
        .and_then(|list| last_cpu(&list))
        .map_or(1, |last| last + 1)
}

/// The highest number in a list like `0-3,8`.
fn last_cpu(list: &str) -> Option<u32> {
    list.trim().rsplit([',', '-']).next()?.parse().ok()
}

/// Where tracefs is, if it can be read.
#[must_use]
pub fn tracefs() -> Option<&'static Path> {
    ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .map(Path::new)
        .into_iter()
        .find(|path| path.join("events").is_dir())
}

/// The capabilities that decide what can be traced.
#[derive(Clone, Copy, Debug)]
pub struct Privileges {
    effective: CapabilitySet,
}

impl Privileges {
    #[must_use]
    pub fn own() -> Self {
        let effective = capabilities(None)
            .map_or(CapabilitySet::empty(), |capabilities| capabilities.effective);
        Self { effective }
    }

    fn has(self, one: CapabilitySet) -> bool {
        self.effective.contains(CapabilitySet::SYS_ADMIN) || self.effective.contains(one)
    }

    /// What is missing to load and attach programs (`kernel/bpf/syscall.c`: `bpf_capable`,
    /// `perfmon_capable`).
    #[must_use]
    pub fn missing_to_trace(self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if !self.has(CapabilitySet::BPF) {
            missing.push("CAP_BPF");
        }
        if !self.has(CapabilitySet::PERFMON) {
            missing.push("CAP_PERFMON");
        }
        missing
    }

    /// Whether the listeners of other network namespaces can be listed (`setns(2)`).
    #[must_use]
    pub fn can_enter_netns(self) -> bool {
        self.effective.contains(CapabilitySet::SYS_ADMIN)
    }

    /// Whether the processes of other users can be looked at (`ptrace_may_access`).
    #[must_use]
    pub fn can_see_processes(self) -> bool {
        self.effective.contains(CapabilitySet::SYS_PTRACE)
    }

    /// Whether `sock_diag` tells an MPTCP listener from a TCP one (`tcp_diag_put_ulp`).
    #[must_use]
    pub fn can_see_ulp(self) -> bool {
        self.effective.contains(CapabilitySet::NET_ADMIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cpu_of_a_list() {
        for (list, last) in [("0", Some(0)), ("0-3\n", Some(3)), ("0-3,8-11", Some(11)), ("", None)]
        {
            assert_eq!(last_cpu(list), last, "{list:?}");
        }
    }
}
