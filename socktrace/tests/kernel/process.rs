//! Servers as other processes.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, mpsc::Receiver},
    time::{Duration, Instant},
};

use crate::{lab::Netns, run::PATIENCE};

/// Asks again and again until there is an answer.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where Debian puts a program: what is first on PATH may be a script that stands for it.
pub(crate) fn program(name: &str) -> PathBuf {
    let places = ["/usr/sbin", "/usr/bin"].map(|directory| Path::new(directory).join(name));
    let found = places.into_iter().find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is missing; `cargo xtask setup` installs it"))
}

/// A directory that ordinary users may enter.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("socktrace-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server with its children, all of whom end with it.
pub(crate) struct Server {
    child: Child,
    lines: Mutex<Receiver<String>>,
}

impl Server {
    pub(crate) fn start(netns: &Netns, command: &mut Command) -> Self {
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = netns.within(|| command.spawn()).expect("a server");
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        Self { child, lines: Mutex::new(lines) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    pub(crate) fn hear(&self) -> String {
        self.lines.lock().expect("lock").recv_timeout(PATIENCE).expect("a line")
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        eventually("the end of a process", || self.child.try_wait().expect("wait"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let group = i32::try_from(self.pid()).expect("a process id");
        // SAFETY: a plain system call on the group that was made for our own child.
        let _ = unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = self.child.wait();
    }
}
