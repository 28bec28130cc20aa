//! The one module that reads the host: `/proc`, netlink, namespaces, sysctls.

mod bytecode;
mod cgroup;
mod cgroup_ids;
mod container;
mod diag;
mod doing;
mod kernel;
mod names;
mod netlink;
mod netns;
mod netstat;
mod owners;
mod ports;
mod root;
mod settings;
mod unanswered;
mod unix;
mod users;

pub use cgroup_ids::{CgroupIds, directory as cgroup_directory};
pub use diag::{DiagListener, Dump};
pub use doing::acceptor;
pub use kernel::{Privileges, monotonic_ns, possible_cpus, release, tracefs};
pub use netns::{NetnsPath, of_thread, own as own_netns, reachable, resolve, socket_in};
pub use netstat::{EXPLAINED, Netstat, read_netstat};
pub use owners::Owners;
pub use ports::{Holder, MOST_HOLDERS, RangeUse, holders, range_use};
pub use settings::settings;
pub use unanswered::{Waits, unanswered};
pub use unix::UnixListener;

use std::{collections::HashMap, path::Path};

use crate::error::Result;

/// What the host says about its listeners, all at one moment.
#[derive(Debug, Default)]
pub struct Host {
    pub netns: Vec<NetnsPath>,
    /// Listeners by network namespace, as `sock_diag` lists them.
    pub listeners: HashMap<u32, Dump>,
    /// AF_UNIX listeners by network namespace.
    pub unix: HashMap<u32, Vec<UnixListener>>,
    pub owners: Owners,
    /// Namespaces that could not be asked, and why.
    pub unreachable: Vec<String>,
}

impl Host {
    /// Reads everything that can be reached. `proc` is where procfs is mounted.
    pub fn read(proc: &Path) -> Result<Self> {
        let mut host = Self { netns: netns::reachable(proc), ..Self::default() };
        host.owners.read(proc);
        let wanted: Vec<_> = host.netns.iter().map(|netns| netns.inode).collect();
        host.ask(&wanted);
        host.ask_unix(&wanted);
        Ok(host)
    }

    /// Asks `sock_diag` for the listeners of some namespaces. That also makes the kernel give each
    /// of them a cookie.
    pub fn ask(&mut self, wanted: &[u32]) {
        for netns in self.netns.iter().filter(|netns| wanted.contains(&netns.inode)) {
            match diag::dump(netns) {
                Ok(dump) => {
                    self.listeners.insert(netns.inode, dump);
                }
                Err(error) => {
                    self.unreachable.push(format!("{}: {error}", netns.path.display()));
                }
            }
        }
    }
    /// Asks for the AF_UNIX listeners of some namespaces.
    pub fn ask_unix(&mut self, wanted: &[u32]) {
        for netns in self.netns.iter().filter(|netns| wanted.contains(&netns.inode)) {
            match unix::dump(netns) {
                Ok(listeners) => {
                    self.unix.insert(netns.inode, listeners);
                }
                Err(error) => {
                    self.unreachable.push(format!("{}: AF_UNIX: {error}", netns.path.display()));
                }
            }
        }
    }
}
