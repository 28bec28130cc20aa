//! A tool that runs, and what the kernel says of it.

use std::{
    error::Error,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    loads,
    tools::{Ready, SELF},
};

const OUT: &str = "/tmp/bench-out";
const ERR: &str = "/tmp/bench-err";

/// The longest start: bpftrace compiles first.
const START: Duration = Duration::from_secs(120);
/// A tool that has used no CPU for so long has started.
const STARTED: Duration = Duration::from_secs(2);
const END: Duration = Duration::from_secs(20);
/// Longer than readers of ring buffers sleep between two looks.
pub(crate) const QUIET: Duration = Duration::from_millis(30);

pub(crate) struct Running {
    child: Child,
    began: Instant,
    /// From its start until it was attached, and until its first record was out.
    pub(crate) attached: Duration,
    pub(crate) first_record: Option<Duration>,
}

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) peak_kib: u64,
    pub(crate) resident_kib: u64,
    /// Of its BPF maps, which no process is charged for.
    pub(crate) maps_kib: u64,
}

impl Running {
    /// Returns when it is attached.
    pub(crate) fn start(command: &[&str], ready: Ready) -> Result<Self, Box<dyn Error>> {
        let mut command = words(command)?;
        command.stdout(File::create(OUT)?).stderr(File::create(ERR)?);
        let began = Instant::now();
        let child = command.spawn()?;
        let mut running = Self { child, began, attached: Duration::ZERO, first_record: None };
        match ready {
            Ready::Says(text) => {
                running.wait_for(START, || Ok(fs::read_to_string(ERR)?.contains(text)))?;
                running.attached = began.elapsed();
            }
            Ready::Quiet => {
                let mut last = Duration::ZERO;
                while began.elapsed() < running.attached + STARTED {
                    running.check()?;
                    if began.elapsed() > START {
                        return Err("it does not come to rest".into());
                    }
                    sleep(Duration::from_millis(10));
                    let cpu = running.cpu();
                    if cpu > last + Duration::from_millis(1) {
                        running.attached = began.elapsed();
                    }
                    last = cpu;
                }
            }
        }
        Ok(running)
    }

    /// Makes a connection and waits for the first thing on stdout.
    pub(crate) fn await_first_record(&mut self) -> Result<(), Box<dyn Error>> {
        let listener = loads::listener(std::net::Ipv4Addr::LOCALHOST, 1);
        loads::one_connection(&listener, &loads::address(&listener));
        self.wait_for(Duration::from_secs(10), || Ok(fs::metadata(OUT)?.len() > 0))?;
        self.first_record = Some(self.began.elapsed());
        Ok(())
    }

    /// What its threads have used, in the kernel and outside.
    pub(crate) fn cpu(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten();
        let used = threads.flatten().filter_map(|thread| {
            let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            schedstat.split_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(used.sum())
    }

    /// Waits until it has done what there was to do. One that is always busy is not waited for.
    pub(crate) fn wait_until_quiet(&self) {
        let since = Instant::now();
        while since.elapsed() < START {
            let before = self.cpu();
            sleep(QUIET);
            if self.cpu().saturating_sub(before) < QUIET / 10 {
                return;
            }
        }
    }

    pub(crate) fn memory(&self) -> Memory {
        let process = format!("/proc/{}", self.child.id());
        let status = fs::read_to_string(format!("{process}/status")).unwrap_or_default();
        let of = |text: &str, key: &str| -> u64 {
            let value =
                text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next());
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        let maps = fs::read_dir(format!("{process}/fdinfo")).into_iter().flatten().flatten();
        let maps = maps.filter_map(|fd| fs::read_to_string(fd.path()).ok());
        let maps = maps.filter(|info| info.contains("map_type:"));
        Memory {
            peak_kib: of(&status, "VmHWM:"),
            resident_kib: of(&status, "VmRSS:"),
            maps_kib: maps.map(|info| of(&info, "memlock:")).sum::<u64>() / 1024,
        }
    }

    /// Ends it and returns what it wrote last.
    pub(crate) fn stop(mut self) -> Result<String, Box<dyn Error>> {
        let pid = i32::try_from(self.child.id())?;
        // SAFETY: a plain system call, to the group of a child that was not waited for yet.
        unsafe { libc::kill(-pid, libc::SIGINT) };
        let asked = Instant::now();
        while self.child.try_wait()?.is_none() {
            if asked.elapsed() > END {
                self.child.kill()?;
            }
            sleep(Duration::from_millis(10));
        }
        // The file may be large; a line is not.
        let mut file = File::open(OUT)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(end.saturating_sub(1 << 16)))?;
        let mut out = Vec::new();
        file.read_to_end(&mut out)?;
        let last = out.trim_ascii_end().rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
        Ok(String::from_utf8_lossy(last).into_owned())
    }

    fn wait_for(
        &mut self,
        limit: Duration,
        mut done: impl FnMut() -> io::Result<bool>,
    ) -> Result<(), Box<dyn Error>> {
        let since = Instant::now();
        while !done()? {
            self.check()?;
            if since.elapsed() > limit {
                return Err(format!("nothing came within {} s", limit.as_secs()).into());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Fails with what it said when it has ended.
    pub(crate) fn check(&mut self) -> Result<(), Box<dyn Error>> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(last_words(status).into()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has usually ended; then both fail, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a look cost that runs to its end: time, which is all its own, and its peak of memory in KiB.
pub(crate) fn look(command: &[&str]) -> Result<(Duration, u64), Box<dyn Error>> {
    let mut command = words(command)?;
    command.stdout(File::create(OUT)?).stderr(File::create(ERR)?);
    let began = Instant::now();
    let child = command.spawn()?;
    let mut status = 0;
    // SAFETY: plain data, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills both.
    let waited =
        unsafe { libc::wait4(i32::try_from(child.id())?, &raw mut status, 0, &raw mut usage) };
    let took = began.elapsed();
    let status = ExitStatus::from_raw(status);
    if waited < 0 || !status.success() {
        return Err(last_words(status).into());
    }
    Ok((took, u64::try_from(usage.ru_maxrss)?))
}

fn words(command: &[&str]) -> io::Result<Command> {
    let (&program, arguments) = command.split_first().expect("a command has a name");
    let program = if program == SELF { std::env::current_exe()? } else { program.into() };
    let mut command = Command::new(program);
    // A group of its own, to end it with its children.
    command.args(arguments).stdin(Stdio::null()).process_group(0);
    Ok(command)
}

fn last_words(status: ExitStatus) -> String {
    let said = [ERR, OUT].map(|file| fs::read_to_string(file).unwrap_or_default());
    let lines = said.iter().flat_map(|text| text.lines()).filter(|line| !line.trim().is_empty());
    let last: Vec<&str> = lines.take(3).collect();
    if last.is_empty() { status.to_string() } else { last.join("; ") }
}
