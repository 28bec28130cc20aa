//! Network namespaces: which there are, and how to get into one.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::statfs,
    net::{AddressFamily, SocketType, socket},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::error::{Error, Result};

/// Where `ip netns` and container engines keep names of namespaces.
const NAMED: &[&str] = &["run/netns", "run/docker/netns"];

/// `NSFS_MAGIC` (include/uapi/linux/magic.h)
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// A network namespace and a path that leads into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetnsPath {
    pub inode: u32,
    pub path: PathBuf,
    /// As `ip netns` names it.
    pub name: Option<String>,
}

impl NetnsPath {
    /// Whether the path still leads into this namespace.
    #[must_use]
    pub fn leads_there(&self) -> bool {
        inode_at(&self.path) == Some(self.inode)
    }
}

/// The inode of the namespace at a path, if that is one.
#[must_use]
pub(super) fn inode_at(path: &Path) -> Option<u32> {
    // A file of `ip netns` that nothing is mounted on any more is an ordinary file.
    if statfs(path).ok()?.f_type != NSFS_MAGIC {
        return None;
    }
    u32::try_from(std::fs::metadata(path).ok()?.ino()).ok()
}

/// The network namespace of this thread.
#[must_use]
pub fn own() -> Option<u32> {
    inode_at(Path::new("/proc/thread-self/ns/net"))
}

/// Every network namespace that a process lives in or a name stands for, each once.
#[must_use]
pub fn reachable(proc: &Path) -> Vec<NetnsPath> {
    let mut found = BTreeMap::new();
    let mut add = |path: PathBuf, name: Option<String>| {
        if let Some(inode) = inode_at(&path) {
            let entry =
                found.entry(inode).or_insert_with(|| NetnsPath { inode, path, name: name.clone() });
            if entry.name.is_none() {
                entry.name = name;
            }
        }
    };
    // Names before processes: those end. From /proc's point of view, so that a mount namespace of our
    // own does not hide them.
    let root = proc.join("1/root");
    for directory in NAMED {
        for base in [root.join(directory), Path::new("/").join(directory)] {
            for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
                add(entry.path(), entry.file_name().into_string().ok());
            }
        }
    }
    add(proc.join("self/ns/net"), None);
    for entry in std::fs::read_dir(proc).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()) {
            add(entry.path().join("ns/net"), None);
        }
    }
    found.into_values().collect()
}

/// A namespace that only a thread of this process may live in.
#[must_use]
pub fn of_thread(proc: &Path, pid: u32, inode: u32) -> Option<NetnsPath> {
    std::fs::read_dir(proc.join(pid.to_string()).join("task"))
        .ok()?
        .flatten()
        .map(|thread| thread.path().join("ns/net"))
        .find(|path| inode_at(path) == Some(inode))
        .map(|path| NetnsPath { inode, path, name: None })
}

/// Runs `work` in a namespace, on a thread of its own that ends with it.
pub(super) fn within<T: Send>(
    netns: &NetnsPath,
    work: impl FnOnce() -> std::io::Result<T> + Send,
) -> std::io::Result<T> {
    if inode_at(Path::new("/proc/thread-self/ns/net")) == Some(netns.inode) {
        return work();
    }
    let file = File::open(&netns.path)?;
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            })
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread in the namespace died")))
    })
}

/// A socket that lives in a namespace, for whoever has to find the kernel's side of it.
pub fn socket_in(netns: &NetnsPath) -> std::io::Result<OwnedFd> {
    within(netns, || Ok(socket(AddressFamily::INET, SocketType::DGRAM, None)?))
}

/// What `-N` names: a name of `ip netns`, a process id, a path, or `inode:N`.
pub fn resolve(proc: &Path, wanted: &str) -> Result<u32> {
    if let Some(inode) = wanted.strip_prefix("inode:") {
        return inode
            .parse()
            .map_err(|_| Error::Usage(format!("--netns {wanted}: the inode is not a number")));
    }
    let mut paths = Vec::new();
    if wanted.contains('/') {
        paths.push(PathBuf::from(wanted));
    } else {
        if wanted.parse::<u32>().is_ok() {
            paths.push(proc.join(wanted).join("ns/net"));
        }
        paths.extend(NAMED.iter().map(|directory| Path::new("/").join(directory).join(wanted)));
    }
    paths.iter().find_map(|path| inode_at(path)).ok_or_else(|| {
        Error::Usage(format!(
            "--netns {wanted}: no network namespace is there; give a name of `ip netns`, a process \
             id, a path or inode:N"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_namespaces() {
        let proc = Path::new("/proc");
        let own = inode_at(&proc.join("self/ns/net")).unwrap();
        let check = |wanted: &str| resolve(proc, wanted);
        assert_eq!(check("inode:4026531840").unwrap(), 4_026_531_840);
        assert_eq!(check(&std::process::id().to_string()).unwrap(), own);
        assert_eq!(check("/proc/self/ns/net").unwrap(), own);
        for wrong in ["inode:x", "no-such-namespace", "/nowhere/net", "4294967295", "/etc/passwd"] {
            assert!(matches!(check(wrong), Err(Error::Usage(_))), "{wrong}");
        }
    }
}
