//! Exit codes, signals, and what is left behind.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::Stdio,
    time::Duration,
};

use crate::{
    lab::Listener,
    run::{Tracing, backends, command, has_kprobes, output, read_all, records, stderr},
};

#[test]
fn a_backend_that_the_kernel_refuses_is_an_error_that_says_so() {
    for backend in ["fentry", "kprobe", "tracepoint"] {
        let result = output(&["top", "--backend", backend, "-c", "1", "-i", "100ms"]);
        if backends().contains(&backend) {
            assert_eq!(result.status.code(), Some(0), "{backend}: {}", stderr(&result));
        } else {
            assert_eq!(result.status.code(), Some(4), "{backend}: {}", stderr(&result));
            let text = stderr(&result);
            assert!(text.contains(backend) && text.contains("remedy"), "{text}");
        }
    }
}

#[test]
fn auto_takes_the_first_backend_that_works() {
    let result = output(&["-c", "1", "-i", "100ms"]);
    assert_eq!(result.status.code(), Some(0), "{}", stderr(&result));
    let wanted = format!("tracing with {} (", backends()[0]);
    assert!(stderr(&result).contains(&wanted), "{}", stderr(&result));
}

#[test]
fn check_tells_what_works() {
    let result = output(&["check", "--json"]);
    assert_eq!(result.status.code(), Some(0), "{}", stderr(&result));
    let records = records(&result);
    for backend in ["fentry", "kprobe", "tracepoint"] {
        let feature = format!("backend {backend}");
        let record = records.iter().find(|r| r["feature"] == feature).expect("a record");
        let works = backends().contains(&backend);
        assert_eq!(record["available"], works, "{record:#}");
        assert_eq!(record["remedy"].is_string(), !works, "{record:#}");
    }
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
    assert!(records.iter().any(|r| r["feature"] == "kernel" && r["detail"] == kernel.trim()));
}

#[test]
fn wrong_usage_is_2() {
    for wrong in [
        &["--no-such-flag"][..],
        &["no-such-verb"],
        &["-P", "99999"],
        &["-i", "0"],
        &["-c", "0"],
        &["--backend", "dtrace"],
        &["--sort", "colour"],
        &["-N", "no-such-namespace"],
        &["1", "2", "-c", "3"],
    ] {
        let result = output(wrong);
        assert_eq!(result.status.code(), Some(2), "{wrong:?}: {}", stderr(&result));
        assert!(result.stdout.is_empty(), "{wrong:?}");
        assert!(!stderr(&result).is_empty(), "{wrong:?}");
    }
    assert_eq!(output(&["--help"]).status.code(), Some(0));
    assert_eq!(output(&["--version"]).status.code(), Some(0));
}

#[test]
fn an_ordinary_user_is_told_what_is_missing() {
    const NOBODY: u32 = 65534;
    let listener = Listener::new("127.0.0.1:0", 6);
    let run = |arguments: &[&str]| {
        command(arguments).uid(NOBODY).gid(NOBODY).output().expect("socktrace runs")
    };
    for verb in [&["top"][..], &[]] {
        let result = run(verb);
        assert_eq!(result.status.code(), Some(3), "{}", stderr(&result));
        let text = stderr(&result);
        assert!(text.contains("CAP_BPF") && text.contains("sudo"), "{text}");
    }
    let result = run(&["list", "--json"]);
    assert_eq!(result.status.code(), Some(0), "{}", stderr(&result));
    let id = listener.id();
    let records = records(&result);
    let record = records.iter().find(|r| r["listener"]["id"] == id).expect("the listener");
    assert_eq!(record["accept_queue"]["limit"], 6);
    // Nobody may look into this process.
    assert_eq!(record["listener"]["owners"], serde_json::json!([]));
    assert!(stderr(&result).contains("not shown:"), "{}", stderr(&result));
    assert_eq!(run(&["check"]).status.code(), Some(3));
}

#[test]
fn a_kernel_without_type_information_is_an_error_that_says_so() {
    let hide = || {
        // SAFETY: plain system calls in the child, before it becomes socktrace.
        unsafe {
            let private = libc::MS_REC | libc::MS_PRIVATE;
            if libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(
                    std::ptr::null(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    private,
                    std::ptr::null(),
                ) != 0
                || libc::mount(
                    c"none".as_ptr(),
                    c"/sys/kernel/btf".as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    std::ptr::null(),
                ) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    for (verb, code) in [("top", 4), ("check", 4), ("list", 0)] {
        let mut command = command(&[verb]);
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(hide) };
        let result = command.output().expect("socktrace runs");
        let said = stderr(&result) + &String::from_utf8_lossy(&result.stdout);
        assert_eq!(result.status.code(), Some(code), "{verb}: {said}");
        assert!(said.contains("/sys/kernel/btf/vmlinux"), "{verb}: {said}");
    }
}

#[test]
fn a_reader_that_goes_away_is_success() {
    let _listener = Listener::new("127.0.0.1:0", 6);
    for arguments in [&["-i", "100ms", "--json"][..], &["-i", "100ms"], &["list"], &["check"]] {
        let mut child = command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("socktrace starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
        assert!(!line.is_empty(), "{arguments:?}");
        let errors = read_all(child.stderr.take().expect("stderr"));
        let status = child.wait().expect("wait");
        assert_eq!(status.code(), Some(0), "{arguments:?}: {errors}");
        assert!(!errors.contains("roken pipe") && !errors.contains("panicked"), "{errors}");
    }
}

#[test]
fn a_signal_ends_the_run_with_a_summary() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut tracing = Tracing::start(backends()[0], &["-i", "10s"]);
        tracing.signal(signal);
        assert_eq!(tracing.wait().code(), Some(0));
        let run = tracing.stop_after_end();
        let summary = run.summary();
        assert_eq!(summary["backend"], backends()[0]);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
        assert_eq!(summary["kernel"], kernel.trim());
        assert_eq!(summary["lost_events"], 0);
        assert!(run.stderr.iter().any(|line| line.contains("events")), "{:#?}", run.stderr);
    }
}

#[test]
fn a_run_ends_when_it_was_told_to() {
    let _listener = Listener::new("127.0.0.1:0", 6);
    let intervals = |arguments: &[&str]| {
        let result = output(&[&["top", "--json"], arguments].concat());
        assert_eq!(result.status.code(), Some(0), "{}", stderr(&result));
        let records = records(&result);
        assert_eq!(records.last().expect("a record")["type"], "summary");
        let mut times: Vec<_> =
            records.iter().filter(|r| r["type"] == "listener").map(|r| r["time"].clone()).collect();
        times.dedup();
        times.len()
    };
    assert_eq!(intervals(&["-i", "200ms", "-c", "3"]), 3);
    assert_eq!(intervals(&["0.2", "2"]), 2);
    // A run shorter than its interval still tells what it saw.
    assert_eq!(intervals(&["-i", "10s", "-d", "500ms"]), 1);
}

/// Programs of socktrace's that are in the kernel, whoever holds them.
fn loaded_programs() -> usize {
    let ours =
        ["fentry_", "fexit_", "kprobe_", "kretprobe_", "tp_", "snapshot", "walk_tasks", "scan_fds"];
    aya::programs::loaded_programs()
        .flatten()
        .filter(|program| {
            program
                .name_as_str()
                .is_some_and(|name| ours.iter().any(|start| name.starts_with(start)))
        })
        .count()
}

#[test]
fn nothing_stays_behind() {
    let _listener = Listener::new("127.0.0.1:0", 6);
    settles("at first");
    for backend in backends() {
        let mut killed = Tracing::start(backend, &["-i", "100ms"]);
        killed.wait_interval();
        assert!(loaded_programs() > 0, "{backend}: nothing was loaded");
        killed.signal(libc::SIGKILL);
        assert_eq!(killed.wait().signal(), Some(libc::SIGKILL));
        settles(backend);
        // And it starts again, twice at once.
        let first = Tracing::start(backend, &["-i", "100ms"]);
        let second = Tracing::start(backend, &["-i", "100ms"]);
        for tracing in [first, second] {
            tracing.wait_interval();
            assert!(!tracing.stop().records.is_empty());
        }
        settles(backend);
    }
    if has_kprobes()
        && let Ok(list) = std::fs::read_to_string("/sys/kernel/tracing/kprobe_events")
    {
        assert!(list.trim().is_empty(), "{list}");
    }
}

/// The kernel frees programs a little after their last user.
fn settles(when: &str) {
    for _ in 0..100 {
        if loaded_programs() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{when}: {} programs are left", loaded_programs());
}

/// The eBPF side's own messages.
#[test]
fn very_verbose_shows_messages_of_the_programs() {
    // Intervals without a listener have no record to wait for.
    let _keeper = Listener::new("127.0.0.1:0", 6);
    for backend in backends() {
        let tracing = Tracing::start(backend, &["-i", "200ms", "-vv"]);
        let listener = Listener::new("127.0.0.1:0", 6);
        drop(listener);
        tracing.wait_interval();
        tracing.wait_interval();
        let said = tracing.stop().stderr.join("\n");
        assert!(said.contains("listener opened in slot"), "{backend}: {said}");
        assert!(said.contains("closed"), "{backend}: {said}");
    }
}
