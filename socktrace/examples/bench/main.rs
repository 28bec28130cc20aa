//! What `cargo xtask bench` runs in the guest: every tool under every load, with the same load
//! without a tool before and after. A record of each goes to stdout.
//!
//! The clock counts instructions, and there is one CPU: time that passes is work of the load, of the
//! kernel on its behalf, or of the tool.

mod floor;
mod loads;
mod running;
mod tools;

use std::{
    error::Error,
    net::Ipv4Addr,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use loads::{Load, Meter};
use running::{QUIET, Running};
use serde_json::{Value, json};
use tools::{LOOKS, On, PEERS, TOOLS, Tool};

/// Boot threads double the cost of the first second; waiting is free.
const SETTLE: Duration = Duration::from_secs(10);
/// After a tool was attached or detached.
const PAUSE: Duration = Duration::from_millis(1500);
const CONNECTIONS: u32 = 30_000;
const PACKETS: u32 = 50_000;
const FIRST_PORT: u16 = 10_000;
const IDLE: [u16; 4] = [100, 1_000, 10_000, 20_000];
/// Looks of `socktrace top` that are averaged.
const TOP_LOOKS: u32 = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["floor"] => floor::run(),
        ["twice", command @ ..] => twice(command),
        ["every", milliseconds, command @ ..] => every(milliseconds.parse()?, command),
        // What names have to contain; nothing is in all of them.
        ["run", tool, load] => run(tool, load),
        _ => Err("usage: bench run TOOL LOAD".into()),
    }
}

fn run(only: &str, on: &str) -> Result<(), Box<dyn Error>> {
    for directory in ["proc", "sys", "dev", "tmp"] {
        let to = format!("{PEERS}/{directory}");
        std::fs::create_dir_all(&to)?;
        Command::new("mount").args(["--rbind", &format!("/{directory}"), &to]).status()?;
    }
    sleep(SETTLE);
    for load in Load::ALL.into_iter().filter(|load| load.name().contains(on)) {
        let count = if load == Load::Connect { CONNECTIONS } else { PACKETS };
        // The first of its kind finds caches cold.
        without_tool(load, count);
        let mut before = without_tool(load, count);
        let tools = TOOLS.iter().filter(|tool| tool.name.contains(only));
        for tool in tools.filter(|tool| load == Load::Connect || tool.on == On::Packets) {
            let measured = with_tool(tool, load, count);
            sleep(PAUSE);
            let after = without_tool(load, count);
            let mut record = json!({
                "load": load.name(), "unit": load.unit(), "tool": tool.name, "count": count,
                "none_ns": [nanoseconds(before), nanoseconds(after)],
            });
            say(&mut record, measured);
            before = after;
        }
    }
    for count in IDLE {
        let load = format!("idle-{count}");
        if load.contains(on) {
            idle(count, &load, only)?;
        }
    }
    Ok(())
}

/// Prints a record: what was measured, or why nothing was.
fn say(record: &mut Value, measured: Result<Value, Box<dyn Error>>) {
    match measured {
        Ok(Value::Object(fields)) => {
            for (key, value) in fields {
                record[key] = value;
            }
        }
        Ok(_) => {}
        Err(error) => record["error"] = error.to_string().into(),
    }
    println!("bench: {record}");
}

/// Takes the time of rounds, and what the tool used in them and on account of them.
struct Account<'a> {
    tool: Option<&'a Running>,
    elapsed: Duration,
    /// Within the rounds, and including what it had left to do after each.
    own_within: Duration,
    own: Duration,
}

impl Meter for Account<'_> {
    fn measure(&mut self, round: &mut dyn FnMut()) {
        let cpu = || self.tool.map_or(Duration::ZERO, Running::cpu);
        // The same pause for all: what the kernel has put off is done in it.
        let wait = || self.tool.map_or_else(|| sleep(QUIET), Running::wait_until_quiet);
        wait();
        let before = cpu();
        let began = Instant::now();
        round();
        self.elapsed += began.elapsed();
        self.own_within += cpu().saturating_sub(before);
        wait();
        self.own += cpu().saturating_sub(before);
    }
}

fn account(tool: Option<&Running>, load: Load, count: u32) -> Account<'_> {
    let zero = Duration::ZERO;
    let mut account = Account { tool, elapsed: zero, own_within: zero, own: zero };
    load.run(count, &mut account);
    account
}

fn without_tool(load: Load, count: u32) -> Duration {
    account(None, load, count).elapsed
}

fn with_tool(tool: &Tool, load: Load, count: u32) -> Result<Value, Box<dyn Error>> {
    let mut running = Running::start(tool.command, tool.ready)?;
    let ours = tool.command.first() == Some(&"socktrace");
    // A diagnosis says nothing until its end.
    if ours && tool.command.get(1) != Some(&"diagnose") {
        running.await_first_record()?;
    }
    sleep(PAUSE);
    let account = account((!tool.own_unknown).then_some(&running), load, count);
    let with = nanoseconds((account.elapsed + account.own).saturating_sub(account.own_within));
    let own = nanoseconds(account.own);
    running.check()?;
    let memory = running.memory();
    let (attached, first_record) = (running.attached, running.first_record);
    let summary: Value = serde_json::from_str(&running.stop()?).unwrap_or_default();
    let mut record = json!({
        "with_ns": with,
        "own_ns": own,
        "attached_ns": nanoseconds(attached),
        "first_record_ns": first_record.map(nanoseconds),
        "lost": summary["lost_events"],
        "events": summary["events"],
    });
    if tool.own_unknown {
        record["own_ns"] = Value::Null;
        record["attached_ns"] = Value::Null;
    } else {
        record["peak_kib"] = memory.peak_kib.into();
        record["resident_kib"] = memory.resident_kib.into();
        record["maps_kib"] = memory.maps_kib.into();
    }
    if ours && summary["type"] != "summary" {
        return Err("it did not end with a summary".into());
    }
    Ok(record)
}

/// What one look costs, at listeners to which nothing happens.
fn idle(count: u16, load: &str, only: &str) -> Result<(), Box<dyn Error>> {
    let limit = libc::rlimit { rlim_cur: 65_536, rlim_max: 65_536 };
    // SAFETY: a plain system call.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(format!("RLIMIT_NOFILE: {}", std::io::Error::last_os_error()).into());
    }
    // The kernel takes long to find thousands of free ports.
    let ports = FIRST_PORT..FIRST_PORT + count;
    let listeners: Vec<_> =
        ports.map(|port| loads::listener_at((Ipv4Addr::LOCALHOST, port).into(), 128)).collect();
    let record = |tool: &str| json!({"load": load, "unit": "looks", "tool": tool, "count": 1});
    for (name, command) in LOOKS.iter().filter(|(name, _)| name.contains(only)) {
        // The second: files are in memory then.
        let looked = running::look(command).and_then(|_| running::look(command));
        let looked = looked.map(|(took, peak_kib)| {
            json!({"none_ns": [0, 0], "with_ns": nanoseconds(took), "peak_kib": peak_kib})
        });
        say(&mut record(name), looked);
    }
    for tool in TOOLS.iter().filter(|tool| tool.name == "socktrace top, fentry") {
        if tool.name.contains(only) {
            say(&mut record(tool.name), top_look(tool));
        }
    }
    drop(listeners);
    Ok(())
}

fn top_look(tool: &Tool) -> Result<Value, Box<dyn Error>> {
    let mut running = Running::start(tool.command, tool.ready)?;
    running.await_first_record()?;
    sleep(PAUSE);
    let before = running.cpu();
    sleep(Duration::from_secs(1) * TOP_LOOKS);
    let own = nanoseconds(running.cpu().saturating_sub(before) / TOP_LOOKS);
    let memory = running.memory();
    Ok(json!({
        "none_ns": [0, 0], "with_ns": own, "own_ns": own,
        "attached_ns": nanoseconds(running.attached),
        "first_record_ns": running.first_record.map(nanoseconds),
        "peak_kib": memory.peak_kib, "resident_kib": memory.resident_kib,
        "maps_kib": memory.maps_kib,
    }))
}

/// A look every so often, as a shell loop would take it.
fn every(milliseconds: u64, command: &[&str]) -> Result<(), Box<dyn Error>> {
    let (program, arguments) = command.split_first().ok_or("usage: bench every MS COMMAND")?;
    eprintln!("{}", tools::READY);
    let every = Duration::from_millis(milliseconds);
    let mut next = Instant::now();
    loop {
        Command::new(program).args(arguments).stdout(Stdio::null()).status()?;
        next = Instant::now().max(next + every);
        sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Two of a tool at once.
fn twice(command: &[&str]) -> Result<(), Box<dyn Error>> {
    let (program, arguments) = command.split_first().ok_or("usage: bench twice COMMAND")?;
    let spawn = || Command::new(program).args(arguments).spawn();
    let mut both = [spawn()?, spawn()?];
    // Twice as long as it takes.
    sleep(SETTLE);
    for one in &mut both {
        if let Some(status) = one.try_wait()? {
            return Err(status.to_string().into());
        }
    }
    // They are asked to end together with this process, which waits for them.
    // SAFETY: a plain system call.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    eprintln!("{}", tools::READY);
    for one in &mut both {
        one.wait()?;
    }
    Ok(())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
