//! The situations.

use std::{net::Ipv4Addr, process::Command, time::Duration};

use serde_json::Value;

use super::{
    Needs, Scenario, USUAL, check, of,
    stage::{PORT, Stage},
};
use crate::{
    lab,
    process::{Server, eventually, program},
    wire::SYN,
};

/// A test of that name for each.
macro_rules! scenarios {
    ($($name:ident: $scenario:expr;)*) => {
        $(
            #[test]
            fn $name() {
                check(stringify!($name), &$scenario);
            }
        )*
    };
}

const SHORT: Duration = Duration::from_millis(20);

fn sleep(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// From 198.51.100.0/24 (RFC 5737), where nobody answers.
fn flood(stage: &mut Stage, count: u16) {
    let (address, first) = (stage.address(), 10_000 + stage.ports);
    for i in 0..count {
        let [_, host] = i.to_be_bytes();
        stage.wire().syn_from(Ipv4Addr::new(198, 51, 100, host), first + i, address);
    }
}

fn nginx(stage: &mut Stage, options: &str) {
    let home = stage.scratch.0.display();
    let mut config = format!(
        "daemon off; master_process on; worker_processes 1; user root;
         pid {home}/pid; error_log {home}/log;
         events {{ worker_connections 512; }}
         http {{ access_log off; server {{ listen 127.0.0.1:{PORT} {options}; return 200; }}\n"
    );
    for what in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        config.push_str(&format!("{what}_temp_path {home}/{what};\n"));
    }
    let config = stage.scratch.write("nginx.conf", &(config + "}"));
    let mut command = Command::new(program("nginx"));
    command.arg("-p").arg(&stage.scratch.0).arg("-e").arg(stage.scratch.0.join("log"));
    start(stage, command.arg("-c").arg(config));
}

fn redis(stage: &mut Stage, backlog: u32) {
    let mut command = Command::new(program("redis-server"));
    command.args(["--bind", "127.0.0.1", "--port", &PORT.to_string(), "--save", ""]);
    command.args(["--daemonize", "no", "--appendonly", "no", "--loglevel", "warning"]);
    command.args(["--tcp-backlog", &backlog.to_string()]);
    start(stage, command.current_dir("/"));
}

/// One frontend that takes so many connections.
fn haproxy(stage: &mut Stage, most: u32) {
    let config = format!(
        "global
            nbthread 1
        defaults
            mode http
            timeout connect 60s
            timeout client 60s
            timeout server 60s
        frontend web
            maxconn {most}
            backlog 16
            bind 127.0.0.1:{PORT}
            http-request return status 200\n"
    );
    let config = stage.scratch.write("haproxy.cfg", &config);
    let mut command = Command::new(program("haproxy"));
    start(stage, command.args(["-db", "-q", "-f"]).arg(config));
}

/// Starts a server and waits until it listens.
fn start(stage: &mut Stage, command: &mut Command) {
    let server = Server::start(&stage.netns, command);
    let listens = || (!lab::ss(&format!("-Hlnt sport = :{PORT}")).is_empty()).then_some(());
    stage.netns.within(|| eventually("a listener", listens));
    stage.servers.push(server);
}

/// Four clients whose final ACKs come to a queue with room for two more, for a moment.
fn late_acks(stage: &mut Stage) {
    stage.signal(libc::SIGSTOP);
    for (first, count) in [(30_000, 3), (30_100, 4)] {
        let syn_acks = stage.syns(first, count);
        stage.acks(&syn_acks);
    }
    sleep(300);
    stage.signal(libc::SIGCONT);
}

fn text<'a>(finding: &'a Value, part: &str) -> &'a str {
    finding
        .pointer(part)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no {part}: {finding:#}"))
}

fn number(finding: &Value, name: &str) -> f64 {
    let value = finding["evidence"][name].as_f64();
    value.unwrap_or_else(|| panic!("no {name}: {finding:#}"))
}

scenarios! {
    stalled: Scenario {
        about: "a Python server with room for 17 was stopped (SIGSTOP); 24 clients come",
        expect: &["acceptor_stalled"],
        serve: |stage| {
            stage.accepts(16);
            stage.signal(libc::SIGSTOP);
        },
        load: |stage| stage.connect(24, SHORT),
        check: |findings| {
            let finding = of(findings, "acceptor_stalled");
            assert_eq!((text(finding, "/confidence"), text(finding, "/severity")), ("certain", "critical"));
            assert_eq!(text(finding, "/evidence/acceptors/0/state"), "T");
        },
        ..USUAL
    };

    sleeping: Scenario {
        about: "a Python server sleeps instead of accepting; 3 clients wait, nobody is turned away",
        expect: &["acceptor_stalled"],
        serve: |stage| {
            let then = if stage.mended { "serve(s)" } else { "time.sleep(60)" };
            stage.python(&format!("s = listen(('127.0.0.1', {PORT}), 16)\nready()\n{then}"));
        },
        load: |stage| stage.connect(3, SHORT),
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "acceptor_stalled");
            assert_eq!(text(finding, "/severity"), "warning");
            assert!(text(finding, "/cause").contains("sleeps until a time it chose itself"), "{finding:#}");
        },
        ..USUAL
    };

    one_at_a_time: Scenario {
        about: "a Python server waits for what its first client says; three more clients wait for it",
        expect: &["acceptor_stalled"],
        serve: |stage| {
            let then = if stage.mended {
                "serve(s)"
            } else {
                "fd, _ = s._accept()\n_socket.socket(fileno=fd).recv(1)\ntime.sleep(60)"
            };
            stage.python(&format!("s = listen(('127.0.0.1', {PORT}), 16)\nready()\n{then}"));
        },
        load: |stage| stage.connect(4, SHORT),
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "acceptor_stalled");
            assert!(text(finding, "/cause").contains("serves one connection at a time"), "{finding:#}");
        },
        ..USUAL
    };

    slow_but_enough_room: Scenario {
        about: "a Python server with room for all takes 600 ms for each of 6 clients",
        expect: &["acceptor_slow"],
        seconds: 4,
        serve: |stage| {
            let pause = if stage.mended { "0" } else { "0.6" };
            stage.python(&format!(
                "s = listen(('127.0.0.1', {PORT}), 16)\nready()\nserve(s, {pause})"
            ));
        },
        load: |stage| stage.connect(6, SHORT),
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "acceptor_slow");
            assert_eq!(text(finding, "/severity"), "warning");
            // The sixth waits for five others.
            assert!(number(finding, "longest_wait_seen_ms") >= 2000.0, "{finding:#}");
        },
        ..USUAL
    };

    maxconn: Scenario {
        about: "haproxy has as many connections as it may have (maxconn 5); 24 more clients come",
        expect: &["acceptor_stalled"],
        serve: |stage| haproxy(stage, if stage.mended { 500 } else { 5 }),
        load: |stage| stage.connect(29, SHORT),
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "acceptor_stalled");
            assert!(text(finding, "/remedy/text").contains("haproxy maxconn"), "{finding:#}");
        },
        ..USUAL
    };

    slow: Scenario {
        about: "a Python server with room for 17 accepts 20 connections a second, 60 a second come",
        expect: &["acceptor_slow"],
        seconds: 4,
        serve: |stage| {
            let forks = "os.fork() or serve(s, 0.05)\n".repeat(stage.workers.saturating_sub(1));
            stage.python(&format!(
                "s = listen(('127.0.0.1', {PORT}), 16)\nready()\n{forks}serve(s, 0.05)"
            ));
        },
        load: |stage| stage.connect_or_go(200, Duration::from_micros(16_600)),
        mend: |stage, findings| {
            let finding = of(findings, "acceptor_slow");
            let times = number(finding, "arrival_rate_per_s") / number(finding, "accept_rate_per_s");
            // "so many times as many", and one for good measure.
            (stage.workers, stage.restart) = (times.ceil() as usize + 1, true);
        },
        check: |findings| {
            let finding = of(findings, "acceptor_slow");
            // A sleep of 50 ms, and what comes on top.
            assert!((8.0..=22.0).contains(&number(finding, "accept_rate_per_s")), "{finding:#}");
            assert!((25.0..=65.0).contains(&number(finding, "arrival_rate_per_s")), "{finding:#}");
        },
        ..USUAL
    };

    burst: Scenario {
        about: "nginx with a backlog of 16; 60 clients come within milliseconds, three times",
        expect: &["accept_burst"],
        serve: |stage| {
            let backlog = stage.backlog(16);
            nginx(stage, &format!("backlog={backlog}"));
        },
        load: |stage| {
            for _ in 0..3 {
                stage.burst(60);
                sleep(500);
            }
        },
        check: |findings| {
            let finding = of(findings, "accept_burst");
            assert_eq!(finding["evidence"]["accept_queue"]["peak"], 17, "{finding:#}");
            assert_eq!(number(finding, "backlog_needed"), 60.0, "{finding:#}");
            assert_eq!(finding["evidence"]["totals"]["drops"]["accept_queue_full_on_syn"], 129, "{finding:#}");
            assert_eq!(finding["remedy"]["backlog"], 128, "{finding:#}");
            assert!(text(finding, "/remedy/text").contains("`listen … backlog=128`"), "{finding:#}");
        },
        ..USUAL
    };

    clamped: Scenario {
        about: "redis asks for 511 in a namespace whose somaxconn is 32; 80 clients come at once",
        expect: &["backlog_clamped"],
        prepare: |stage| stage.set("core/somaxconn", 32),
        serve: |stage| {
            let backlog = stage.backlog(511);
            redis(stage, backlog);
        },
        load: |stage| stage.burst(80),
        check: |findings| {
            let finding = of(findings, "backlog_clamped");
            // The listener is older than the trace: what it asked for is redis's default.
            assert_eq!(text(finding, "/confidence"), "likely");
            let command = text(finding, "/remedy/commands/0");
            assert!(command.ends_with("sysctl -w net.core.somaxconn=128"), "{command}");
        },
        ..USUAL
    };

    clamped_before_our_eyes: Scenario {
        about: "a Python server asks for 1024 while socktrace watches; somaxconn is 32",
        expect: &["backlog_clamped"],
        otherwise: &["accept_burst"],
        needs: Needs::Calls,
        prepare: |stage| stage.set("core/somaxconn", 32),
        load: |stage| {
            stage.servers.clear();
            stage.accepts(1024);
            stage.burst(80);
        },
        check: |findings| {
            let finding = of(findings, "backlog_clamped");
            assert_eq!(text(finding, "/confidence"), "certain");
            assert_eq!(finding["evidence"]["backlog"]["requested"], 1024);
            assert_eq!(finding["evidence"]["backlog"]["effective"], 32);
        },
        ..USUAL
    };

    framework: Scenario {
        about: "a Python server with socketserver's backlog of 5; 30 clients come at once",
        expect: &["framework_backlog"],
        serve: |stage| stage.accepts(stage.backlog(5)),
        load: |stage| stage.burst(30),
        check: |findings| {
            let finding = of(findings, "framework_backlog");
            assert!(text(finding, "/cause").contains("socketserver"), "{finding:#}");
        },
        ..USUAL
    };

    flooded: Scenario {
        about: "200 SYNs of forged senders for a server with room for 9, without SYN cookies",
        expect: &["syn_flood"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 0);
        },
        serve: |stage| stage.accepts(8),
        load: |stage| {
            flood(stage, 200);
            sleep(1500);
        },
        check: |findings| {
            let finding = of(findings, "syn_flood");
            assert_eq!(text(finding, "/severity"), "critical");
            assert_eq!(text(finding, "/evidence/top_prefixes/0/prefix"), "198.51.100.0/24");
            let commands = finding["remedy"]["commands"].to_string();
            assert!(commands.contains("net.ipv4.tcp_syncookies=1"), "{commands}");
            assert!(commands.contains("ip route add blackhole 198.51.100.0/24"), "{commands}");
        },
        ..USUAL
    };

    flooded_with_cookies: Scenario {
        about: "the same with SYN cookies, and two real clients who get in by them",
        expect: &["syn_flood", "syncookies"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 1);
        },
        serve: |stage| stage.accepts(stage.backlog(8)),
        load: |stage| {
            flood(stage, 200);
            let syn_acks = stage.syns(30_000, 2);
            assert_eq!(syn_acks.len(), 2);
            stage.acks(&syn_acks);
            sleep(1500);
        },
        // What is left of the flood would fill the SYN queue for another minute.
        mend: |stage, _| stage.restart = true,
        check: |findings| {
            assert_eq!(text(of(findings, "syn_flood"), "/severity"), "warning");
            let finding = of(findings, "syncookies");
            assert_eq!(finding["evidence"]["totals"]["cookies_accepted"], 2, "{finding:#}");
        },
        ..USUAL
    };

    slow_handshakes: Scenario {
        about: "20 clients at once whose ACK takes 1.3 s; the SYN queue has room for 9, no cookies",
        expect: &["slow_clients"],
        seconds: 5,
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 0);
        },
        serve: |stage| stage.accepts(stage.backlog(8)),
        load: |stage| {
            let first = 30_000 + stage.ports;
            let mut waiting: Vec<u16> = (first..first + 20).collect();
            let address = stage.address();
            while !waiting.is_empty() {
                for &port in &waiting {
                    stage.wire().send(port, address, SYN, 1000);
                }
                let mut answered = stage.wire().replies();
                answered.retain(|reply| reply.is_syn_ack() && waiting.contains(&reply.port));
                sleep(1300);
                stage.acks(&answered);
                waiting.retain(|&port| answered.iter().all(|reply| reply.port != port));
                // What the server says to these is of no interest.
                stage.wire().replies();
            }
        },
        ..USUAL
    };

    syn_burst: Scenario {
        about: "20 quick clients at once; the SYN queue has room for 9, no cookies",
        expect: &["syn_queue_full"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 0);
        },
        serve: |stage| stage.accepts(stage.backlog(8)),
        load: |stage| {
            let syn_acks = stage.syns(30_000, 20);
            stage.acks(&syn_acks);
        },
        check: |findings| {
            let finding = of(findings, "syn_queue_full");
            assert!(text(finding, "/cause").contains("tcp_max_syn_backlog has no effect here"), "{finding:#}");
            assert_eq!(finding["remedy"]["backlog"], 32, "{finding:#}");
        },
        ..USUAL
    };

    reserve: Scenario {
        about: "150 quick clients at once; three quarters of tcp_max_syn_backlog is 97, no cookies",
        expect: &["syn_queue_full"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 0);
            stage.set("ipv4/tcp_max_syn_backlog", 128);
        },
        serve: |stage| stage.accepts(4096),
        load: |stage| {
            let syn_acks = stage.syns(30_000, 150);
            stage.acks(&syn_acks);
        },
        check: |findings| {
            let finding = of(findings, "syn_queue_full");
            assert_eq!(text(finding, "/evidence/syn_queue/limit_rule"), "max_syn_backlog");
            let command = text(finding, "/remedy/commands/0");
            assert!(command.ends_with("sysctl -w net.ipv4.tcp_max_syn_backlog=512"), "{command}");
        },
        ..USUAL
    };

    no_way_back: Scenario {
        about: "5 clients send their SYN three times, because the SYN-ACKs never reach them",
        expect: &["synacks_lost"],
        prepare: Stage::cable,
        serve: |stage| stage.accepts(64),
        load: |stage| {
            if stage.mended {
                let syn_acks = stage.syns(30_000, 5);
                stage.acks(&syn_acks);
                return;
            }
            for _ in 0..3 {
                stage.syns(30_000, 5);
                sleep(600);
            }
        },
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "synacks_lost");
            assert_eq!(finding["evidence"]["totals"]["syns_repeated"], 10, "{finding:#}");
        },
        ..USUAL
    };

    last_ack: Scenario {
        about: "four clients whose final ACKs come to an accept queue with room for two more",
        expect: &["accept_burst", "final_ack_dropped"],
        prepare: Stage::cable,
        serve: |stage| stage.accepts(stage.backlog(4)),
        load: late_acks,
        check: |findings| {
            let finding = of(findings, "final_ack_dropped");
            assert_eq!(finding["evidence"]["totals"]["drops"]["accept_queue_full_on_ack"], 2);
            assert_eq!(number(finding, "tcp_abort_on_overflow"), 0.0);
        },
        ..USUAL
    };

    last_ack_reset: Scenario {
        about: "the same with tcp_abort_on_overflow=1",
        expect: &["accept_burst", "final_ack_dropped"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_abort_on_overflow", 1);
        },
        serve: |stage| stage.accepts(stage.backlog(4)),
        load: late_acks,
        check: |findings| {
            let finding = of(findings, "final_ack_dropped");
            assert_eq!(finding["evidence"]["totals"]["resets_on_overflow"], 2, "{finding:#}");
            let command = text(finding, "/remedy/commands/0");
            assert!(command.ends_with("net.ipv4.tcp_abort_on_overflow=0"), "{command}");
        },
        ..USUAL
    };

    bad_member: Scenario {
        about: "three processes share a port by SO_REUSEPORT, one was stopped; 90 clients come",
        expect: &["reuseport_member"],
        serve: |stage| {
            for _ in 0..3 {
                stage.python(&format!(
                    "s = listen(('127.0.0.1', {PORT}), 8, True)\nready()\nserve(s)"
                ));
            }
            stage.signal(libc::SIGSTOP);
        },
        load: |stage| stage.connect(90, Duration::from_millis(10)),
        check: |findings| {
            let finding = of(findings, "reuseport_member");
            assert_eq!(text(finding, "/confidence"), "certain");
            assert_eq!(number(finding, "members"), 3.0);
            assert_eq!(text(finding, "/evidence/acceptors/0/state"), "T");
        },
        ..USUAL
    };

    closed: Scenario {
        about: "a server ends while 5 connections wait to be accepted",
        expect: &["lost_on_close"],
        serve: |stage| {
            let first = if stage.mended { "serve(s)" } else { "time.sleep(60)" };
            stage.python(&format!("s = listen(('127.0.0.1', {PORT}), 16)\nready()\n{first}"));
        },
        load: |stage| {
            stage.connect(5, SHORT);
            sleep(300);
            stage.servers.clear();
        },
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        check: |findings| {
            let finding = of(findings, "lost_on_close");
            assert_eq!(finding["evidence"]["totals"]["lost_on_close"], 5, "{finding:#}");
            assert!(text(finding, "/summary").contains("python3/"), "{finding:#}");
        },
        ..USUAL
    };

    always_cookies: Scenario {
        about: "tcp_syncookies=2: every client gets a cookie",
        expect: &["syncookies"],
        prepare: |stage| {
            stage.cable();
            stage.set("ipv4/tcp_syncookies", 2);
        },
        serve: |stage| stage.accepts(64),
        load: |stage| {
            let syn_acks = stage.syns(30_000, 7);
            stage.acks(&syn_acks);
        },
        check: |findings| {
            let finding = of(findings, "syncookies");
            assert_eq!(text(finding, "/confidence"), "certain");
            assert_eq!(finding["evidence"]["totals"]["cookies_accepted"], 7, "{finding:#}");
        },
        ..USUAL
    };

    unix_socket: Scenario {
        about: "a Unix socket with a backlog of 2 whose server was stopped; 6 clients connect",
        expect: &["unix_backlog"],
        needs: Needs::Unix,
        arguments: &["-x"],
        serve: |stage| {
            let path = stage.scratch.0.join("socket");
            stage.python(&format!("s = listen('{}', 2)\nready()\nserve(s)", path.display()));
            stage.signal(libc::SIGSTOP);
        },
        load: |stage| {
            let path = socket2::SockAddr::unix(stage.scratch.0.join("socket")).expect("a path");
            let connect = |_| {
                let kind = socket2::Type::STREAM;
                let socket = socket2::Socket::new(socket2::Domain::UNIX, kind, None).expect("socket");
                socket.set_nonblocking(true).expect("O_NONBLOCK");
                // EAGAIN where there is no room.
                let _ = socket.connect(&path);
                sleep(20);
                socket
            };
            let clients = stage.netns.within(|| (0..6).map(connect).collect::<Vec<_>>());
            sleep(1500);
            drop(clients);
        },
        check: |findings| {
            let finding = of(findings, "unix_backlog");
            assert_eq!(finding["evidence"]["totals"]["connects_refused"], 3, "{finding:#}");
            assert_eq!(text(finding, "/listener/family"), "unix");
        },
        ..USUAL
    };

    nobody_there: Scenario {
        about: "clients of a port that nobody listens at",
        expect: &["port_not_listening"],
        arguments: &["-P", "8080"],
        serve: |stage| {
            if stage.mended {
                stage.accepts(64);
            }
        },
        load: |stage| {
            let address = stage.address();
            let connect = || {
                for _ in 0..7 {
                    // It is refused, or not, at once.
                    let _ = std::net::TcpStream::connect(address);
                }
            };
            stage.netns.within(connect);
        },
        mend: |stage, _| (stage.mended, stage.restart) = (true, true),
        ..USUAL
    };

    unanswered: Scenario {
        about: "a client connects to an address that never answers",
        expect: &["connect_unanswered"],
        clients_stay: true,
        prepare: Stage::cable,
        load: |stage| {
            let address = (Ipv4Addr::new(10, 203, 0, 9), PORT).into();
            stage.connect_to(address, 3, SHORT);
        },
        mend: |stage, _| {
            stage.netns.within(|| lab::ip("addr add 10.203.0.9/32 dev lo"));
            stage.python(&format!("s = listen(('10.203.0.9', {PORT}), 16)\nready()\nserve(s)"));
        },
        check: |findings| {
            let finding = of(findings, "connect_unanswered");
            assert_eq!(text(finding, "/evidence/destination"), "10.203.0.9:8080");
            assert_eq!(number(finding, "connects_pending"), 3.0);
        },
        ..USUAL
    };

    port_taken: Scenario {
        about: "a server wants a port that another one holds",
        expect: &["bind_failed"],
        needs: Needs::Calls,
        serve: |stage| stage.accepts(64),
        load: |stage| {
            let bind = || std::net::TcpListener::bind(("127.0.0.1", PORT)).is_ok();
            stage.netns.within(bind);
        },
        check: |findings| {
            let finding = of(findings, "bind_failed");
            assert_eq!(text(finding, "/evidence/errno"), "EADDRINUSE");
            assert_eq!(text(finding, "/evidence/conflict/0/owners/0/comm"), "python3");
        },
        ..USUAL
    };

    healthy: Scenario {
        about: "nginx under wrk, with connections that stay and with connections that do not",
        serve: |stage| nginx(stage, ""),
        load: |stage| {
            let url = format!("http://{}/", stage.address());
            for more in [&[][..], &["-H", "Connection: close"]] {
                let mut wrk = Command::new(program("wrk"));
                wrk.args(["-t", "2", "-c", "40", "-d", "1s"]).args(more).arg(&url);
                let output = stage.netns.within(|| wrk.output()).expect("wrk runs");
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
        },
        ..USUAL
    };
}
