//! Depths, limits and peaks of both queues.

use std::{net::SocketAddr, time::Duration};

use crate::{
    lab::{Listener, Netns, connect, counters, ss_half_open, ss_queue},
    process::eventually,
    run::{Finished, Tracing, backends, queue},
    wire::{RST, SERVER4, SERVER6, SYN, Wire},
};

/// 13 clients at a backlog of 7: the kernel lets 8 in.
#[test]
fn a_full_accept_queue_is_one_more_than_its_backlog() {
    for backend in backends() {
        let before = Listener::new("127.0.0.1:0", 7);
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let after = Listener::new("127.0.0.1:0", 7);
        let clients = [connect(before.address, 13), connect(after.address, 13)];
        tracing.wait_interval();
        tracing.wait_interval();
        for listener in [&before, &after] {
            assert_eq!(ss_queue(listener.inode), (8, 7), "ss");
        }
        let run = tracing.stop();
        for (listener, age) in [(&before, "older"), (&after, "younger")] {
            let last = run.last_of(&listener.id());
            assert_eq!(queue(last, "accept_queue"), (8, 7, 8), "{backend}, {age}");
        }
        drop(clients);
    }
}

/// Bursts of 60 connections at a backlog of 16, accepted right afterwards: whoever samples sees an
/// empty queue.
#[test]
fn a_burst_between_two_looks_is_in_the_peak() {
    const BURSTS: usize = 3;
    for backend in backends() {
        let listener = Listener::new("127.0.0.1:0", 16);
        let tracing = Tracing::start(backend, &["-i", "3s"]);
        for burst in 0..BURSTS {
            // Right after an interval began, so that the burst is over long before it ends: looking at it with `ss`
            // takes a slow machine longer than making it.
            tracing.wait_interval();
            let overflows = || counters()["ListenOverflows"];
            let before = overflows();
            let clients = connect(listener.address, 60);
            // A loaded machine handles some of the SYNs later.
            eventually("43 overflows", || (overflows() >= before + 43).then_some(()));
            // Those that were not let in would try again, into the place that accept() makes.
            drop(clients);
            assert_eq!(listener.drain(), 17, "burst {burst}");
            assert_eq!(ss_queue(listener.inode), (0, 16), "after burst {burst}");
        }
        tracing.wait_interval();
        tracing.wait_interval();
        let run = tracing.stop();
        let queues: Vec<_> =
            run.of(&listener.id()).iter().map(|record| queue(record, "accept_queue")).collect();
        assert!(queues.iter().all(|(depth, limit, _)| (*depth, *limit) == (0, 16)), "{queues:?}");
        let peaks: Vec<u64> = queues.iter().map(|(_, _, peak)| *peak).collect();
        let bursts = peaks.iter().filter(|peak| **peak == 17).count();
        let quiet = peaks.iter().filter(|peak| **peak == 0).count();
        assert_eq!(bursts, BURSTS, "{backend}: {peaks:?}");
        assert_eq!(bursts + quiet, peaks.len(), "{backend}: {peaks:?}");
    }
}

/// 11 SYNs whose final ACK never comes, then 11 resets.
#[test]
fn half_open_connections_fill_the_syn_queue() {
    for backend in backends() {
        for server in ["v4", "v6"] {
            let netns = Netns::new(&format!("halfopen-{server}"));
            let (run, before, after) = netns.within(|| half_open(backend, server));
            for id in [before, after] {
                check_half_open(&run, &id, &format!("{backend}, {server}"));
            }
        }
    }
}

fn half_open(backend: &str, server: &str) -> (Finished, String, String) {
    const COUNT: u16 = 11;
    let mut wire = Wire::new();
    let address: SocketAddr =
        if server == "v4" { (SERVER4, 0).into() } else { (SERVER6, 0).into() };
    let before = Listener::new(&address.to_string(), 64);
    let tracing = Tracing::start(backend, &["-i", "500ms"]);
    let after = Listener::new(&address.to_string(), 64);
    let listeners = [&before, &after];
    tracing.wait_interval();
    for listener in listeners {
        for port in 0..COUNT {
            wire.send(20_000 + port, listener.address, SYN, 1000);
        }
    }
    assert_eq!(wire.syn_acks(), 2 * usize::from(COUNT), "SYN-ACKs on the wire");
    for listener in listeners {
        assert_eq!(ss_half_open(listener.port()), usize::from(COUNT), "ss");
    }
    tracing.wait_interval();
    tracing.wait_interval();
    for listener in listeners {
        for port in 0..COUNT {
            wire.send(20_000 + port, listener.address, RST, 1001);
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    for listener in listeners {
        assert_eq!(ss_half_open(listener.port()), 0, "ss after the resets");
    }
    tracing.wait_interval();
    tracing.wait_interval();
    (tracing.stop(), before.id(), after.id())
}

fn check_half_open(run: &Finished, id: &str, what: &str) {
    let queues: Vec<_> = run.of(id).iter().map(|record| queue(record, "syn_queue")).collect();
    let peak = queues.iter().map(|queue| queue.2).max();
    assert_eq!(peak, Some(11), "{what}: {queues:?}");
    assert!(
        queues.iter().any(|(depth, limit, _)| (*depth, *limit) == (11, 64)),
        "{what}: {queues:?}"
    );
    let (depth, _, peak) = *queues.last().expect("records");
    assert_eq!((depth, peak), (0, 0), "{what}, at the end: {queues:?}");
    // The accept queue stayed empty all the time.
    let accept = run.of(id).iter().map(|record| queue(record, "accept_queue").2).max();
    assert_eq!(accept, Some(0), "{what}");
}

/// A queue that stays full without an event is full in every interval; one that drains is not.
#[test]
fn a_peak_restarts_with_each_interval() {
    for backend in backends() {
        let tracing = Tracing::start(backend, &["-i", "500ms"]);
        let listener = Listener::new("127.0.0.1:0", 4);
        let clients = connect(listener.address, 3);
        for _ in 0..4 {
            tracing.wait_interval();
        }
        assert_eq!(listener.drain(), 3);
        drop(clients);
        for _ in 0..3 {
            tracing.wait_interval();
        }
        let run = tracing.stop();
        let peaks: Vec<u64> =
            run.of(&listener.id()).iter().map(|record| queue(record, "accept_queue").2).collect();
        let full = peaks.iter().take_while(|peak| **peak == 3).count();
        assert!(full >= 4, "{backend}: {peaks:?}");
        assert!(peaks[full..].iter().all(|peak| *peak == 0), "{backend}: {peaks:?}");
        assert!(peaks.len() - full >= 2, "{backend}: {peaks:?}");
    }
}
