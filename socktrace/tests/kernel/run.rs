//! Running socktrace and reading what it says.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        mpsc::{self, Receiver},
    },
    time::{Duration, Instant},
};

use serde_json::Value;

/// A guest under emulation is slow, a loaded machine too; nothing here waits that long in vain.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn program() -> String {
    std::env::var("SOCKTRACE_BIN").expect("SOCKTRACE_BIN: run these tests with `cargo xtask test`")
}

pub(crate) fn in_vm() -> bool {
    std::env::var_os("SOCKTRACE_VM").is_some()
}

/// Whether this kernel was built with kprobes, asked of the kernel itself. The development
/// machines' kernel was not, and refuses fentry too.
pub(crate) fn has_kprobes() -> bool {
    Path::new("/sys/bus/event_source/devices/kprobe/type").exists()
}

/// The backends that must work here.
pub(crate) fn backends() -> &'static [&'static str] {
    if has_kprobes() {
        return &["fentry", "kprobe", "tracepoint"];
    }
    assert!(!in_vm(), "every kernel of the matrix has kprobes");
    &["tracepoint"]
}

/// Whether a backend can see system calls and what they were asked for: tracepoints show them only where tracefs
/// is mounted.
pub(crate) fn sees_calls(backend: &str) -> bool {
    let tracefs = Path::new("/sys/kernel/tracing/events").is_dir();
    assert!(tracefs || !in_vm(), "the guests have tracefs");
    backend != "tracepoint" || tracefs
}

/// Whether a backend can see who calls `accept()`: no tracepoint does.
pub(crate) fn sees_accept(backend: &str) -> bool {
    backend != "tracepoint"
}

pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Starts socktrace with a pipe for each of its outputs. Returns when everything that starts from now on is
/// seen, with what comes on stderr after that.
pub(crate) fn start(arguments: &[&str]) -> (Child, BufReader<ChildStderr>) {
    start_with(arguments, Stdio::piped())
}

/// The same with another standard output.
pub(crate) fn start_with(arguments: &[&str], stdout: Stdio) -> (Child, BufReader<ChildStderr>) {
    let mut child =
        command(arguments).stdout(stdout).stderr(Stdio::piped()).spawn().expect("socktrace starts");
    let mut said = BufReader::new(child.stderr.take().expect("stderr"));
    let mut line = String::new();
    while !line.contains("tracing with") {
        line.clear();
        assert!(said.read_line(&mut line).expect("stderr") > 0, "socktrace ended");
    }
    (child, said)
}

pub(crate) fn signal(child: &Child, signal: i32) {
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: a plain system call on our own child.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return status;
        }
        assert!(Instant::now() < deadline, "socktrace does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs to the end.
pub(crate) fn output(arguments: &[&str]) -> Output {
    command(arguments).output().expect("socktrace runs")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The JSON records of a finished run.
pub(crate) fn records(output: &Output) -> Vec<Value> {
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[derive(Default)]
struct Seen {
    records: Vec<Value>,
    ended: bool,
}

/// A `socktrace top --json` that runs.
pub(crate) struct Tracing {
    child: Child,
    seen: Arc<(Mutex<Seen>, Condvar)>,
    stderr: Mutex<Receiver<String>>,
    said: Vec<String>,
}

impl Tracing {
    /// Returns when everything that starts from now on is seen.
    pub(crate) fn start(backend: &str, arguments: &[&str]) -> Self {
        Self::verb("top", backend, arguments)
    }

    /// The same for another verb.
    pub(crate) fn verb(verb: &str, backend: &str, arguments: &[&str]) -> Self {
        let mut child = command(&[verb, "--json", "--backend", backend])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("socktrace starts");
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let shared = Arc::clone(&seen);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let record = serde_json::from_str(&line).expect(&line);
                shared.0.lock().expect("lock").records.push(record);
                shared.1.notify_all();
            }
            shared.0.lock().expect("lock").ended = true;
            shared.1.notify_all();
        });
        let (send, stderr) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().expect("stderr"));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let mut tracing = Self { child, seen, stderr: Mutex::new(stderr), said: Vec::new() };
        tracing.wait_until_tracing(backend);
        tracing
    }

    fn wait_until_tracing(&mut self, backend: &str) {
        let wanted = format!("socktrace: tracing with {backend} (");
        loop {
            let line =
                self.stderr.get_mut().expect("lock").recv_timeout(PATIENCE).unwrap_or_else(|_| {
                    panic!("no line {wanted:?} on stderr, but: {:#?}", self.said)
                });
            let done = line.starts_with(&wanted);
            self.said.push(line);
            if done {
                return;
            }
        }
    }

    /// Waits for the end of the interval that runs now.
    pub(crate) fn wait_interval(&self) {
        let (lock, changed) = &*self.seen;
        let mut seen = lock.lock().expect("lock");
        let last = |seen: &Seen| seen.records.last().map(|record| record["time"].clone());
        let before = last(&seen);
        let deadline = Instant::now() + PATIENCE;
        while last(&seen) == before {
            assert!(!seen.ended, "socktrace ended");
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no interval for {PATIENCE:?}");
            seen = changed.wait_timeout(seen, left).expect("lock").0;
        }
        drop(seen);
        // The records of an interval come one after another.
        std::thread::sleep(Duration::from_millis(50));
    }

    /// Waits until so many records of events have come, or nothing comes any more.
    pub(crate) fn wait_events(&self, wanted: impl Fn(&[Value]) -> bool) {
        let (lock, changed) = &*self.seen;
        let mut seen = lock.lock().expect("lock");
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&seen.records) && !seen.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            seen = changed.wait_timeout(seen, left).expect("lock").0;
        }
    }

    /// Waits for a record that is as wanted, among those that come from now on, and returns it.
    pub(crate) fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let (lock, changed) = &*self.seen;
        let mut seen = lock.lock().expect("lock");
        let deadline = Instant::now() + PATIENCE;
        let began = seen.records.len();
        let mut looked_at = began;
        loop {
            if let Some(record) = seen.records[looked_at..].iter().find(|record| wanted(record)) {
                return record.clone();
            }
            looked_at = seen.records.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if seen.ended || left.is_zero() {
                let last = &seen.records[began.max(looked_at.saturating_sub(5))..];
                panic!("no record with {what} for {PATIENCE:?}; the last ones: {last:#?}");
            }
            seen = changed.wait_timeout(seen, left).expect("lock").0;
        }
    }

    pub(crate) fn signal(&self, number: i32) {
        signal(&self.child, number);
    }

    /// Ends the run cleanly and returns what it said.
    pub(crate) fn stop(mut self) -> Finished {
        self.signal(libc::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}");
        self.collect()
    }

    /// What a run that ended by itself said.
    pub(crate) fn stop_after_end(mut self) -> Finished {
        let status = self.wait();
        assert!(status.success(), "{status}");
        self.collect()
    }

    fn collect(&mut self) -> Finished {
        let (lock, changed) = &*self.seen;
        let mut seen = lock.lock().expect("lock");
        while !seen.ended {
            seen = changed.wait(seen).expect("lock");
        }
        self.said.extend(self.stderr.get_mut().expect("lock").iter());
        let records = std::mem::take(&mut seen.records);
        Finished { records, stderr: std::mem::take(&mut self.said) }
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run that is over.
pub(crate) struct Finished {
    pub(crate) records: Vec<Value>,
    pub(crate) stderr: Vec<String>,
}

impl Finished {
    /// Listener records by interval, in order.
    pub(crate) fn intervals(&self) -> Vec<Vec<&Value>> {
        let mut intervals: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        for record in self.records.iter().filter(|record| record["type"] == "listener") {
            intervals.entry(record["time"].as_str().expect("time")).or_default().push(record);
        }
        intervals.into_values().collect()
    }

    /// The records of one listener, an interval each.
    pub(crate) fn of(&self, id: &str) -> Vec<&Value> {
        let mut result = Vec::new();
        for interval in self.intervals() {
            let mine: Vec<_> = interval.into_iter().filter(|r| r["listener"]["id"] == id).collect();
            assert!(mine.len() <= 1, "{id} is twice in an interval: {mine:#?}");
            result.extend(mine);
        }
        result
    }

    pub(crate) fn last_of(&self, id: &str) -> &Value {
        self.of(id).pop().unwrap_or_else(|| panic!("no record of {id}: {:#?}", self.stderr))
    }

    /// Events of a kind, in order.
    pub(crate) fn events(&self, kind: &str) -> Vec<&Value> {
        let wanted = |r: &&Value| r["type"] == "event" && r["kind"] == kind;
        self.records.iter().filter(wanted).collect()
    }

    pub(crate) fn summary(&self) -> &Value {
        let last = self.records.last().expect("records");
        assert_eq!(last["type"], "summary", "the last record");
        last
    }
}

/// What a child wrote until it ended.
pub(crate) fn read_all(mut from: impl std::io::Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).expect("UTF-8");
    text
}

/// `(depth, limit, peak)` of a queue of a record.
pub(crate) fn queue(record: &Value, name: &str) -> (u64, u64, u64) {
    let number = |key: &str| {
        record[name][key].as_u64().unwrap_or_else(|| panic!("{name}.{key} is unknown: {record:#}"))
    };
    (number("depth"), number("limit"), number("peak"))
}
