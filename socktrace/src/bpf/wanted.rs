//! Which events the kernel side sends: what it needs to know to choose.

use std::{fs::File, path::PathBuf};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, CgroupArray, HashMap, MapData},
};
use socktrace_common::event::family;

use crate::{
    error::{Error, Result},
    filter::Ports,
    model::Family,
};

/// Everything must match; what is empty matches all.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// A bit for each of `event::kind`.
    pub kinds: u32,
    pub families: Vec<Family>,
    pub ports: Vec<Ports>,
    pub pids: Vec<u32>,
    pub netns: Option<u32>,
    pub comm: Option<Vec<u8>>,
    /// Directory of a control group of the unified hierarchy.
    pub cgroup: Option<PathBuf>,
    /// Only calls that failed, and connects that took long.
    pub trouble_only: bool,
    /// How much of what happens between two looks into the ring buffer there is room for.
    pub room: Room,
}

/// Size of the ring buffer.
#[derive(Clone, Copy, Debug, Default)]
pub enum Room {
    /// At 200,000 events a second some 30 ms.
    #[default]
    All = 1 << 20,
    /// Some 1,000 events: a flood costs no more than it takes to find it full.
    Sample = 1 << 18,
}

/// Bits for all ports.
const PORT_WORDS: u32 = 1 << 10;

/// The kernel's longest name of a task, without the NUL behind it (`TASK_COMM_LEN`).
pub const LONGEST_COMM: usize = 15;

/// The read-only variables of the programs.
pub(super) struct Globals {
    kinds: u32,
    families: u32,
    netns: u32,
    ports: u32,
    pids: u32,
    cgroup: u32,
    comm: [u64; 2],
    pid_room: u32,
    trouble: u32,
    ring: u32,
}

impl From<&Wanted> for Globals {
    fn from(wanted: &Wanted) -> Self {
        let mut comm = [0; 16];
        for (to, byte) in comm.iter_mut().zip(wanted.comm.iter().flatten()) {
            *to = *byte;
        }
        let words: [[u8; 8]; 2] = [0, 8].map(|at| std::array::from_fn(|i| comm[at + i]));
        let bits = wanted.families.iter().map(|family| match family {
            Family::Ipv4 => family::IPV4,
            Family::Ipv6 => family::IPV6,
            Family::Unix => family::UNIX,
        });
        Self {
            kinds: wanted.kinds,
            families: bits.reduce(|a, b| a | b).unwrap_or(family::ALL),
            netns: wanted.netns.unwrap_or(0),
            ports: u32::from(!wanted.ports.is_empty()),
            pids: u32::from(!wanted.pids.is_empty()),
            cgroup: u32::from(wanted.cgroup.is_some()),
            comm: words.map(u64::from_ne_bytes),
            pid_room: u32::try_from(wanted.pids.len()).unwrap_or(u32::MAX).max(1),
            trouble: u32::from(wanted.trouble_only),
            ring: wanted.room as u32,
        }
    }
}

impl Globals {
    pub(super) fn apply<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader
            .override_global("KINDS", &self.kinds, true)
            .override_global("FAMILIES", &self.families, true)
            .override_global("ONLY_NETNS", &self.netns, true)
            .override_global("BY_PORTS", &self.ports, true)
            .override_global("BY_PIDS", &self.pids, true)
            .override_global("BY_CGROUP", &self.cgroup, true)
            .override_global("TROUBLE", &self.trouble, true)
            .override_global("COMM_HEAD", &self.comm[0], true)
            .override_global("COMM_TAIL", &self.comm[1], true)
            .map_max_entries("PORT_FILTER", PORT_WORDS)
            .map_max_entries("PID_FILTER", self.pid_room)
            .map_max_entries("EVENTS", self.ring);
    }
}

impl Wanted {
    /// Fills the maps that the programs choose by.
    pub(super) fn fill(&self, ebpf: &mut Ebpf) -> Result<()> {
        let failed = || Error::run("cannot fill a filter of the kernel side");
        let mut words = vec![0_u64; PORT_WORDS as usize];
        for ports in &self.ports {
            for port in ports.iter() {
                words[usize::from(port) / 64] |= 1 << (port % 64);
            }
        }
        let mut ports: Array<&mut MapData, u64> = map(ebpf, "PORT_FILTER")?;
        for (index, word) in (0..).zip(words) {
            if word != 0 {
                ports.set(index, word, 0).map_err(failed())?;
            }
        }
        let mut pids: HashMap<&mut MapData, u32, u8> = map(ebpf, "PID_FILTER")?;
        for pid in &self.pids {
            pids.insert(pid, 1, 0).map_err(failed())?;
        }
        if let Some(path) = &self.cgroup {
            let directory = File::open(path)
                .map_err(Error::run(format!("cannot open the control group {}", path.display())))?;
            let mut cgroups: CgroupArray<&mut MapData> = map(ebpf, "CGROUP_FILTER")?;
            cgroups.set(0, directory, 0).map_err(Error::run(format!(
                "{} is not a control group of the unified hierarchy",
                path.display()
            )))?;
        }
        Ok(())
    }
}

fn map<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<&'a mut aya::maps::Map>,
    T::Error: std::error::Error + Send + Sync + 'static,
{
    let map = ebpf.map_mut(name).ok_or_else(|| Error::Run {
        what: "the eBPF object is damaged".into(),
        source: format!("no map {name}").into(),
    })?;
    T::try_from(map).map_err(Error::run("the eBPF object is damaged"))
}
