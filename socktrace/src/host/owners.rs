//! Which processes hold which socket.

use std::{collections::HashMap, path::Path};

use procfs::{
    ProcessCGroups,
    process::{FDTarget, Process, all_processes_with_root},
};

use super::{root::Root, users::Users};
use crate::model::Owner;

/// Holders of sockets by the socket's inode.
#[derive(Debug, Default)]
pub struct Owners {
    by_inode: HashMap<u64, Vec<Owner>>,
    cgroups: HashMap<u32, String>,
    users: Users,
    /// Processes whose file descriptors could not be read: their sockets have no owner here.
    pub unreadable: usize,
}

impl Owners {
    #[must_use]
    pub fn of(&self, inode: u64) -> &[Owner] {
        self.by_inode.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// The name of a user.
    #[must_use]
    pub fn user(&self, uid: u32) -> Option<&str> {
        self.users.name(uid)
    }

    /// Reads the file descriptors of every process. One that ends meanwhile is not an error.
    pub fn read(&mut self, proc: &Path) {
        let mut now = Self { users: std::mem::take(&mut self.users), ..Self::default() };
        if let Some(root) = Root::of(proc) {
            now.users.refresh(&root);
        }
        for process in all_processes_with_root(proc).into_iter().flatten().flatten() {
            if add(&mut now, &process).is_err() {
                now.unreadable += 1;
            }
        }
        for holders in now.by_inode.values_mut() {
            holders.sort();
        }
        *self = now;
    }

    /// Looks at one process again, which is quick: the one that opened a new listener.
    pub fn look_at(&mut self, proc: &Path, pid: u32) {
        let mut now = Self::default();
        let process = Process::new_with_root(proc.join(pid.to_string()));
        // A process that ended meanwhile has no sockets.
        let _ = process.and_then(|process| add(&mut now, &process));
        for (inode, holders) in now.by_inode {
            let known = self.by_inode.entry(inode).or_default();
            known.retain(|owner| owner.pid != pid);
            known.extend(holders);
            known.sort();
        }
        self.cgroups.extend(now.cgroups);
    }

    /// Drops the processes that ended from the holders of these sockets; returns whether there were
    /// any.
    pub fn drop_dead(&mut self, proc: &Path, inodes: impl Iterator<Item = u64>) -> bool {
        let mut lives = HashMap::new();
        let mut died = false;
        for inode in inodes {
            let Some(holders) = self.by_inode.get_mut(&inode) else { continue };
            holders.retain(|owner| {
                let check = || proc.join(owner.pid.to_string()).exists();
                let lives = *lives.entry(owner.pid).or_insert_with(check);
                died |= !lives;
                lives
            });
        }
        died
    }

    /// The cgroup of a process that holds a socket.
    #[must_use]
    pub fn cgroup(&self, pid: u32) -> Option<&str> {
        self.cgroups.get(&pid).map(String::as_str)
    }
}

fn add(owners: &mut Owners, process: &Process) -> procfs::ProcResult<()> {
    let Ok(pid) = u32::try_from(process.pid()) else {
        return Ok(());
    };
    let mut comm = None;
    for fd in process.fd()?.flatten() {
        let FDTarget::Socket(inode) = fd.target else {
            continue;
        };
        let Ok(number) = u32::try_from(fd.fd) else {
            continue;
        };
        let comm = match &comm {
            Some(comm) => comm,
            None => {
                if let Ok(groups) = process.cgroups()
                    && let Some(path) = cgroup(&groups)
                {
                    owners.cgroups.insert(pid, path);
                }
                comm.insert(process.stat()?.comm)
            }
        };
        let owner = Owner { pid, comm: comm.clone(), fd: number };
        owners.by_inode.entry(inode).or_default().push(owner);
    }
    Ok(())
}

/// The path in the unified hierarchy; on a host that still uses version 1, systemd's.
fn cgroup(groups: &ProcessCGroups) -> Option<String> {
    let unified = groups.0.iter().find(|group| group.hierarchy == 0);
    let systemd = groups.0.iter().find(|g| g.controllers.iter().any(|name| name == "name=systemd"));
    match (unified, systemd) {
        (Some(unified), Some(systemd)) if unified.pathname == "/" => Some(&systemd.pathname),
        (Some(unified), _) => Some(&unified.pathname),
        (None, systemd) => systemd.map(|systemd| &systemd.pathname),
    }
    .cloned()
}
