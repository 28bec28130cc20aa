//! Files of the host below its root directory. What they say, and where their links lead, is up to
//! whoever wrote them.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
};

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat, openat2};

/// Larger files are not read.
const MOST_BYTES: u64 = 1 << 20;
/// Entries of a directory beyond these are not seen.
const MOST_ENTRIES: usize = 1 << 14;

/// A directory whose links lead nowhere outside of it.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

/// Tells whether a file changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, u64),
}

/// What was made of a file, until the file changes.
#[derive(Debug, Default)]
pub(super) struct Cached<T> {
    stamp: Option<Stamp>,
    value: T,
}

impl Root {
    /// The root of the first process, which a mount namespace of our own does not hide; our own where
    /// that one must not be looked at.
    pub(super) fn of(proc: &Path) -> Option<Self> {
        Self::at(&proc.join("1/root")).or_else(|| Self::at(Path::new("/")))
    }

    pub(super) fn at(path: &Path) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, path, flags, Mode::empty()).ok().map(Self)
    }

    fn open(&self, path: &str, flags: OFlags) -> Option<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve).ok()
    }

    /// The whole of a regular file that is not too large.
    pub(super) fn read(&self, path: &str) -> Option<Vec<u8>> {
        // A device may act on being opened, so what it is comes first.
        let found = self.open(path, OFlags::PATH)?;
        let stat = fstat(&found).ok()?;
        let size = u64::try_from(stat.st_size).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || size > MOST_BYTES {
            return None;
        }
        let again = format!("/proc/self/fd/{}", found.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(open(again, flags, Mode::empty()).ok()?);
        let mut bytes = Vec::new();
        // It may have grown meanwhile.
        let read = file.take(MOST_BYTES + 1).read_to_end(&mut bytes).ok()?;
        (u64::try_from(read).ok()? <= MOST_BYTES).then_some(bytes)
    }

    /// The names in a directory.
    pub(super) fn list(&self, path: &str) -> Vec<String> {
        let opened = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY);
        let Some(entries) = opened.and_then(|opened| Dir::new(opened).ok()) else {
            return Vec::new();
        };
        entries
            .take(MOST_ENTRIES)
            .flatten()
            .filter_map(|entry| Some(entry.file_name().to_str().ok()?.to_owned()))
            .filter(|name| name != "." && name != "..")
            .collect()
    }

    fn stamp(&self, path: &str) -> Option<Stamp> {
        let stat = fstat(self.open(path, OFlags::PATH)?).ok()?;
        Some(Stamp {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
        })
    }
}

impl<T: Default> Cached<T> {
    /// What `read` makes of a file or a directory, read again when that has changed.
    pub(super) fn get(&mut self, root: &Root, path: &str, read: impl FnOnce() -> T) -> &T {
        let stamp = root.stamp(path);
        if stamp != self.stamp {
            self.value = if stamp.is_some() { read() } else { T::default() };
            self.stamp = stamp;
        }
        &self.value
    }

    /// As it was last.
    pub(super) fn value(&self) -> &T {
        &self.value
    }
}

/// Directories for tests, gone when they end.
#[cfg(test)]
pub(super) mod made {
    use std::{
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
    };

    pub(crate) struct Made(pub(crate) PathBuf);

    impl Made {
        pub(crate) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("socktrace-test-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub(crate) fn file(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }

        pub(crate) fn link(&self, path: impl AsRef<Path>, target: impl AsRef<Path>) {
            let path = self.0.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(target, path).unwrap();
        }
    }

    impl Drop for Made {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{made::Made, *};

    #[test]
    fn only_ordinary_files_below_the_root_are_read() {
        let made = Made::new();
        made.file("outside", "secret");
        made.file("root/inside", "fine");
        made.file("root/large", vec![b'x'; 1 << 20]);
        made.file("root/larger", vec![b'x'; (1 << 20) + 1]);
        made.link("root/up", "../outside");
        made.link("root/away", made.0.join("outside"));
        made.link("root/absolute", "/inside");
        made.link("root/loop", "loop");
        made.link("root/proc", "/proc/self/environ");
        rustix::fs::mknodat(CWD, made.0.join("root/fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let root = Root::at(&made.0.join("root")).unwrap();
        let check = |path: &str, expect: Option<&str>| {
            let read = root.read(path).map(|bytes| String::from_utf8(bytes).unwrap());
            assert_eq!(read.as_deref(), expect, "{path}");
        };
        check("inside", Some("fine"));
        check("/inside", Some("fine"));
        check("../../inside", Some("fine"));
        check("absolute", Some("fine"));
        for path in ["up", "away", "../outside", "loop", "proc", "fifo", "larger", ".", "none"] {
            check(path, None);
        }
        assert_eq!(root.read("large").unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_file_is_read_again_when_it_changed() {
        let made = Made::new();
        let root = Root::at(&made.0).unwrap();
        let mut cached = Cached::<usize>::default();
        let mut reads = 0;
        let mut check = |expect| {
            let is = *cached.get(&root, "file", || {
                reads += 1;
                root.read("file").unwrap().len()
            });
            assert_eq!((is, reads), expect);
        };
        check((0, 0));
        made.file("file", "one");
        check((3, 1));
        check((3, 1));
        made.file("file", "three");
        check((5, 2));
        std::fs::remove_file(made.0.join("file")).unwrap();
        check((0, 2));
    }
}
