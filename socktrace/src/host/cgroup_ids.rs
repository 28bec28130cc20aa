//! Paths of control groups by the number that the kernel knows them by: the inode of their directory.

use std::{
    collections::HashMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::statfs;

use crate::error::{Error, Result};

/// `CGROUP2_SUPER_MAGIC` (include/uapi/linux/magic.h)
const CGROUP2_MAGIC: rustix::fs::FsWord = 0x6367_7270;
/// Where the unified hierarchy is: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["fs/cgroup", "fs/cgroup/unified"];
/// More groups than this are not looked through.
const MOST: usize = 1 << 16;
/// An unknown number is not looked for more often.
const PATIENCE: Duration = Duration::from_secs(1);
/// Walking may take one part in so many of the time.
const SHARE: u32 = 50;

/// Where the unified hierarchy is mounted; `sys` is where sysfs is.
#[must_use]
fn unified(sys: &Path) -> Option<PathBuf> {
    MOUNTS
        .iter()
        .map(|mount| sys.join(mount))
        .find(|path| statfs(path).is_ok_and(|found| found.f_type == CGROUP2_MAGIC))
}

/// The directory that `--cgroup` names: a path in the hierarchy, or of the directory itself.
pub fn directory(sys: &Path, wanted: &str) -> Result<PathBuf> {
    let Some(mount) = unified(sys) else {
        return Err(Error::Kernel {
            what: "--cgroup needs the unified control group hierarchy (version 2), which is not \
                   mounted at /sys/fs/cgroup"
                .into(),
            remedy: "boot with systemd.unified_cgroup_hierarchy=1, or choose by --pid or --comm"
                .into(),
        });
    };
    let path = if Path::new(wanted).starts_with(&mount) {
        PathBuf::from(wanted)
    } else {
        mount.join(wanted.trim_start_matches('/'))
    };
    if path.is_dir() {
        Ok(path)
    } else {
        Err(Error::Usage(format!(
            "--cgroup {wanted}: there is no control group {}; `systemd-cgls` lists them",
            path.display()
        )))
    }
}

/// Paths by number, read when a number is met that is not known yet.
#[derive(Debug, Default)]
pub struct CgroupIds {
    mount: Option<PathBuf>,
    paths: HashMap<u64, String>,
    read: Option<Instant>,
}

impl CgroupIds {
    #[must_use]
    pub fn new(sys: &Path) -> Self {
        Self { mount: unified(sys), ..Self::default() }
    }

    /// The path of a control group, from the root of the hierarchy.
    pub fn path(&mut self, id: u64, now: Instant) -> Option<&str> {
        let stale = self.read.is_none_or(|read| now.saturating_duration_since(read) >= PATIENCE);
        if !self.paths.contains_key(&id)
            && stale
            && let Some(mount) = self.mount.clone()
        {
            let began = Instant::now();
            self.walk(&mount);
            // The larger the hierarchy, the longer what is not in it has to wait.
            self.read = Some(now + began.elapsed() * SHARE);
        }
        self.paths.get(&id).map(String::as_str)
    }

    fn walk(&mut self, mount: &Path) {
        let mut open = vec![mount.to_owned()];
        while let Some(directory) = open.pop() {
            if self.paths.len() >= MOST {
                self.paths.clear();
            }
            // A group that is removed meanwhile is none.
            let Ok(metadata) = directory.metadata() else { continue };
            let path = directory.strip_prefix(mount).unwrap_or(&directory);
            self.paths.insert(metadata.ino(), format!("/{}", path.to_string_lossy()));
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            let is_directory =
                |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            open.extend(entries.filter(is_directory).map(|entry| entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_by_the_inodes_of_directories() {
        let root = std::env::temp_dir().join(format!("socktrace-cgroups-{}", std::process::id()));
        let deep = root.join("system.slice/nginx.service");
        std::fs::create_dir_all(&deep).unwrap();
        let id = |path: &Path| path.metadata().unwrap().ino();
        let mut ids = CgroupIds { mount: Some(root.clone()), ..CgroupIds::default() };
        let start = Instant::now();
        assert_eq!(ids.path(id(&deep), start), Some("/system.slice/nginx.service"));
        assert_eq!(ids.path(id(&root), start), Some("/"));
        // One that is younger is found when it is asked for later.
        let young = root.join("young.scope");
        std::fs::create_dir(&young).unwrap();
        assert_eq!(ids.path(id(&young), start), None);
        assert_eq!(ids.path(id(&young), start + 10 * PATIENCE), Some("/young.scope"));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
