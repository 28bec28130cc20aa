//! Events: a line of text, and a record.

use std::{io, net::IpAddr, time::Duration};

use nix::errno::Errno;
use serde::Serialize;

use super::{
    column::{duration, number},
    json::{self, SCHEMA, Time, rfc3339},
    printable,
    table::{BOLD, RED, RESET, Style, YELLOW},
};
use crate::{
    event::{
        Conflict, End, Event, ListenerName, Outcome, PortRange, Queues, Socket, What, protocol,
    },
    model::{Backlog, Family},
};

/// Writes an event as a line of JSON.
///
/// There can be hundreds of thousands a second, so what all of them begin with is put together from parts: keys that
/// need no escaping, and the listener as it was written the first time.
pub fn write(out: &mut Vec<u8>, event: &Event) -> io::Result<()> {
    let caller = event.caller.as_ref();
    put(out, r#"{"type":"event","schema":"#, &SCHEMA)?;
    put(out, r#","time":"#, &Time(event.time))?;
    put(out, r#","kind":"#, &event.kind.name())?;
    out.extend_from_slice(br#","listener":"#);
    match event.listener.as_deref() {
        None => out.extend_from_slice(b"null"),
        Some(name) => match name.json.get() {
            Some(json) => out.extend_from_slice(json.as_bytes()),
            None => {
                let json = serde_json::to_string(&ShortListener::from(name))?;
                out.extend_from_slice(name.json.get_or_init(|| json).as_bytes());
            }
        },
    }
    put(out, r#","pid":"#, &caller.map(|caller| caller.pid))?;
    put(out, r#","comm":"#, &caller.map(|caller| &caller.comm))?;
    put(out, r#","uid":"#, &caller.map(|caller| caller.uid))?;
    put(out, r#","cgroup":"#, &caller.and_then(|caller| caller.cgroup.as_deref()))?;
    put(out, r#","netns":"#, &event.netns)?;
    if let Some(socket) = &event.socket {
        put(out, r#","socket":"#, &SocketRecord::from(socket))?;
    }
    // Goes on in the same object: its opening brace becomes a comma.
    let brace = out.len();
    json::write(out, &detail(event))?;
    out[brace] = b',';
    Ok(())
}

fn put(out: &mut Vec<u8>, key: &str, value: &impl Serialize) -> io::Result<()> {
    out.extend_from_slice(key.as_bytes());
    Ok(serde_json::to_writer(out, value)?)
}

#[derive(Serialize)]
pub(super) struct ShortListener<'a> {
    id: Option<String>,
    family: &'static str,
    transport: Option<&'static str>,
    address: Option<IpAddr>,
    port: Option<u16>,
    path: Option<&'a str>,
    netns: u32,
}

#[derive(Serialize)]
struct SocketRecord<'a> {
    family: &'static str,
    protocol: &'static str,
    inode: Option<u64>,
    cookie: Option<u64>,
    state: &'static str,
    address: Option<IpAddr>,
    port: Option<u16>,
    path: Option<&'a str>,
}

/// What a kind has of its own.
#[derive(Serialize)]
#[serde(untagged)]
enum Detail<'a> {
    Socket {
        family: Option<&'static str>,
        socket_type: Option<String>,
        protocol: Option<&'static str>,
        #[serde(flatten)]
        result: ResultRecord,
    },
    Bind {
        address: Option<IpAddr>,
        port: Option<u16>,
        path: Option<&'a str>,
        requested: &'a End,
        explicit: bool,
        at: &'static str,
        #[serde(flatten)]
        result: ResultRecord,
        conflict: Option<&'a [Conflict]>,
        port_range: Option<PortRange>,
        unprivileged_port_start: Option<u32>,
        destination: Option<&'a End>,
        explanation: Option<String>,
    },
    Listen {
        backlog: Backlog,
        relisten: bool,
        #[serde(flatten)]
        result: ResultRecord,
        explanation: Option<String>,
    },
    Connect {
        source: &'a End,
        destination: &'a End,
        implicit_bind: bool,
        #[serde(flatten)]
        result: ResultRecord,
        took_us: Option<u64>,
        explanation: Option<String>,
    },
    Syn {
        peer: &'a End,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Established {
        peer: &'a End,
        handshake_us: Option<u64>,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Accept {
        peer: &'a End,
        accept_wait_us: Option<u64>,
        accepted: Accepted,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Drop {
        peer: &'a End,
        reason: &'static str,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Cookie {
        peer: &'a End,
        step: &'static str,
    },
    Request {
        peer: &'a End,
        attempt: Option<u16>,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Close {
        lost_on_close: Option<u64>,
        lifetime_ms: Option<u64>,
        #[serde(flatten)]
        queues: QueuesRecord,
    },
    Lost {
        count: u64,
        r#where: &'static str,
    },
}

/// The socket that `accept()` gave out.
#[derive(Serialize)]
struct Accepted {
    inode: Option<u64>,
    cookie: Option<u64>,
}

#[derive(Serialize)]
struct ResultRecord {
    result: Option<i32>,
    errno: Option<String>,
}

impl From<Outcome> for ResultRecord {
    fn from(outcome: Outcome) -> Self {
        Self { result: Some(outcome.0), errno: outcome.errno() }
    }
}

#[derive(Serialize)]
struct QueuesRecord {
    accept_queue_depth: Option<u32>,
    accept_queue_limit: Option<u32>,
    syn_queue_depth: Option<u32>,
    syn_queue_limit: Option<u32>,
}

impl From<Queues> for QueuesRecord {
    fn from(queues: Queues) -> Self {
        Self {
            accept_queue_depth: queues.accept_depth,
            accept_queue_limit: queues.accept_limit,
            syn_queue_depth: queues.syn_depth,
            syn_queue_limit: queues.syn_limit,
        }
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl<'a> From<&'a ListenerName> for ShortListener<'a> {
    fn from(name: &'a ListenerName) -> Self {
        Self {
            id: name.id.map(|id| id.to_string()),
            family: json::family(name.family),
            transport: name.transport.map(json::transport),
            address: name.address,
            port: name.port,
            path: name.path.as_deref(),
            netns: name.netns,
        }
    }
}

impl<'a> From<&'a Socket> for SocketRecord<'a> {
    fn from(socket: &'a Socket) -> Self {
        Self {
            family: json::family(socket.family),
            protocol: protocol(socket),
            inode: socket.inode,
            cookie: socket.cookie,
            state: socket.state,
            address: socket.local.address,
            port: socket.local.port,
            path: socket.local.path.as_deref(),
        }
    }
}

fn detail(event: &Event) -> Detail<'_> {
    let socket = event.socket.as_ref();
    match &event.what {
        What::Socket { outcome } => Detail::Socket {
            family: socket.map(|socket| json::family(socket.family)),
            socket_type: socket.map(|socket| socket.kind.name()),
            protocol: socket.map(protocol),
            result: (*outcome).into(),
        },
        What::Bind {
            asked,
            explicit,
            at_listen,
            outcome,
            conflict,
            range,
            unprivileged,
            destination,
        } => {
            let got = if outcome.failed() { asked } else { socket.map_or(asked, |s| &s.local) };
            Detail::Bind {
                address: got.address,
                port: got.port,
                path: got.path.as_deref(),
                requested: asked,
                explicit: *explicit,
                at: match (explicit, at_listen) {
                    (true, _) => "bind",
                    (false, true) => "listen",
                    (false, false) => "connect",
                },
                result: (*outcome).into(),
                conflict: conflict.as_deref(),
                port_range: *range,
                unprivileged_port_start: *unprivileged,
                destination: destination.as_ref(),
                explanation: explanation(event),
            }
        }
        What::Listen { backlog, relisten, outcome, .. } => Detail::Listen {
            backlog: *backlog,
            relisten: *relisten,
            result: (*outcome).into(),
            explanation: explanation(event),
        },
        What::Connect { source, destination, implicit_bind, outcome, took } => Detail::Connect {
            source,
            destination,
            implicit_bind: *implicit_bind,
            result: outcome.map_or(ResultRecord { result: None, errno: None }, ResultRecord::from),
            took_us: took.map(us),
            explanation: explanation(event),
        },
        What::Syn { peer, queues } => Detail::Syn { peer, queues: (*queues).into() },
        What::Established { peer, handshake, queues } => {
            Detail::Established { peer, handshake_us: handshake.map(us), queues: (*queues).into() }
        }
        What::Accept { peer, wait, queues, inode, cookie } => Detail::Accept {
            peer,
            accept_wait_us: wait.map(us),
            accepted: Accepted { inode: *inode, cookie: *cookie },
            queues: (*queues).into(),
        },
        What::Drop { peer, reason, queues } => {
            Detail::Drop { peer, reason, queues: (*queues).into() }
        }
        What::Cookie { peer, step } => Detail::Cookie { peer, step },
        What::Request { peer, attempt, queues } => {
            Detail::Request { peer, attempt: *attempt, queues: (*queues).into() }
        }
        What::Close { lost_on_close, lifetime, queues } => Detail::Close {
            lost_on_close: *lost_on_close,
            lifetime_ms: lifetime.map(|time| us(time) / 1000),
            queues: (*queues).into(),
        },
        What::Lost { count, place } => Detail::Lost { count: *count, r#where: place },
    }
}

/// Why a call failed, in words; `None` when it did not, or when the error says it all.
#[must_use]
pub fn explanation(event: &Event) -> Option<String> {
    match &event.what {
        What::Bind { outcome, conflict, .. } if outcome.is(Errno::EADDRINUSE) => {
            Some(in_use(event, conflict.as_deref()))
        }
        What::Bind { asked, outcome, range, unprivileged, explicit, destination, .. } => {
            refused(event, asked, *outcome, *range, *unprivileged, *explicit, destination.as_ref())
        }
        What::Listen { outcome, .. } => [
            (Errno::EADDRINUSE, "another socket listens at this address, or no port is left"),
            (Errno::EINVAL, "the socket is connected, or has no name to listen at"),
            (Errno::EOPNOTSUPP, "sockets of this type cannot listen"),
        ]
        .into_iter()
        .find(|(errno, _)| outcome.is(*errno))
        .map(|(_, why)| why.to_owned()),
        What::Connect { outcome: None, .. } => {
            Some("the program closed the socket before an answer came".to_owned())
        }
        What::Connect { outcome: Some(outcome), .. } => {
            unanswered(event, *outcome).map(str::to_owned)
        }
        _ => None,
    }
}

fn is_unix(event: &Event) -> bool {
    event.socket.as_ref().is_some_and(|socket| socket.family == Family::Unix)
}

fn in_use(event: &Event, conflict: Option<&[Conflict]>) -> String {
    let What::Bind { asked, range, .. } = &event.what else { return String::new() };
    if is_unix(event) {
        return match &asked.path {
            Some(path) if path.starts_with('@') => "another socket has this name".to_owned(),
            _ => "the path exists; a server that has ended leaves it behind, and the next one has \
                  to remove it first"
                .to_owned(),
        };
    }
    if asked.port == Some(0) {
        return range.map_or_else(
            || "no port is left".to_owned(),
            |range| format!("no port of {}-{} is left", range.low, range.high),
        );
    }
    match conflict {
        None => "the port is held by another socket".to_owned(),
        Some([]) => "the port was held by a socket that is gone".to_owned(),
        Some([first, rest @ ..]) => {
            let more =
                if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            format!("held by {}{more}", holder(first))
        }
    }
}

/// Who holds a port, and how.
fn holder(conflict: &Conflict) -> String {
    let end = End { address: Some(conflict.address), port: Some(conflict.port), path: None };
    let who = match conflict.owners.as_slice() {
        [] => "a socket that no process holds".to_owned(),
        [owner] => format!("{}/{}", owner.comm, owner.pid),
        [owner, rest @ ..] => format!("{}/{} +{}", owner.comm, owner.pid, rest.len()),
    };
    format!("{who} ({} {})", conflict.state, end.text())
}

fn refused(
    event: &Event,
    asked: &End,
    outcome: Outcome,
    range: Option<PortRange>,
    unprivileged: Option<u32>,
    explicit: bool,
    destination: Option<&End>,
) -> Option<String> {
    if outcome.is(Errno::EACCES)
        && let (Some(port), Some(start)) = (asked.port, unprivileged)
        && port != 0
        && u32::from(port) < start
    {
        return Some(format!(
            "ports below {start} (net.ipv4.ip_unprivileged_port_start of this network namespace) \
             need CAP_NET_BIND_SERVICE"
        ));
    }
    if outcome.is(Errno::EADDRNOTAVAIL) && !explicit {
        let to = destination.map_or_else(String::new, |to| format!(" for {}", to.text()));
        let ports = range.map_or_else(
            || "the range".to_owned(),
            |range| {
                let used = range.in_use.map_or_else(String::new, |used| {
                    format!(" ({used} of {} in use)", range.size())
                });
                format!("{}-{}{used}", range.low, range.high)
            },
        );
        return Some(format!(
            "no port of {ports} is left{to}: widen net.ipv4.ip_local_port_range, or reuse connections"
        ));
    }
    if outcome.is(Errno::EADDRNOTAVAIL) {
        return Some("no interface of this network namespace has the address".to_owned());
    }
    let bound = event.socket.as_ref().is_some_and(|socket| socket.local.port.is_some());
    (outcome.is(Errno::EINVAL) && bound).then(|| "the socket has an address already".to_owned())
}

fn unanswered(event: &Event, outcome: Outcome) -> Option<&'static str> {
    let unix = is_unix(event);
    let cases: [(Errno, bool, &str); 8] = [
        (Errno::ECONNREFUSED, false, "nobody listens there"),
        (Errno::ECONNREFUSED, true, "nobody listens at this path any more"),
        (Errno::ENOENT, true, "there is no socket at this path"),
        (Errno::EAGAIN, true, "the listener's accept queue is full"),
        (Errno::ETIMEDOUT, false, "the SYNs were not answered"),
        (Errno::EADDRNOTAVAIL, false, "no local port is left for this destination"),
        (Errno::ENETUNREACH, false, "no route leads there"),
        (Errno::EHOSTUNREACH, false, "the host cannot be reached"),
    ];
    cases
        .into_iter()
        .find(|&(errno, of_unix, _)| of_unix == unix && outcome.is(errno))
        .map(|(.., text)| text)
}

/// Titles of the columns of [`line`].
const HEADER: &str = "TIME             KIND         PROCESS           SOCKET                 WHAT";

/// The titles.
#[must_use]
pub fn header(style: Style) -> String {
    if style.color { format!("{BOLD}{HEADER}{RESET}") } else { HEADER.to_owned() }
}

/// One line of text.
#[must_use]
pub fn line(event: &Event, style: Style) -> String {
    let time = rfc3339(event.time);
    let time = time.get(11..26).unwrap_or(&time);
    let who = event.caller.as_ref().map_or_else(
        || "-".to_owned(),
        |caller| format!("{}/{}", printable(&caller.comm), caller.pid),
    );
    let place = printable(&place(event)).into_owned();
    let mut what = what(event);
    if style.wide {
        what.push_str(&more(event));
    }
    let text =
        format!("{time}  {:<11}  {who:<16}  {place:<21}  {}", event.kind.name(), printable(&what));
    let text = text.trim_end();
    match color(event).filter(|_| style.color) {
        Some(color) => format!("{color}{text}{RESET}"),
        None => text.to_owned(),
    }
}

/// Red: something was lost. Yellow: a call failed.
fn color(event: &Event) -> Option<&'static str> {
    let failed = match &event.what {
        What::Drop { .. } | What::Lost { .. } => return Some(RED),
        What::Close { lost_on_close, .. } if lost_on_close.is_some_and(|lost| lost > 0) => {
            return Some(RED);
        }
        What::Socket { outcome } | What::Bind { outcome, .. } | What::Listen { outcome, .. } => {
            outcome.failed()
        }
        What::Connect { outcome, .. } => outcome.is_none_or(Outcome::failed),
        _ => false,
    };
    failed.then_some(YELLOW)
}

/// What only the wide lines have.
fn more(event: &Event) -> String {
    let mut text = String::new();
    if let Some(id) = event.listener.as_ref().and_then(|listener| listener.id.as_ref()) {
        text.push_str(&format!("  id={id}"));
    }
    if let Some(netns) = event.netns {
        text.push_str(&format!("  netns={netns}"));
    }
    if let Some(socket) = &event.socket {
        text.push_str(&format!("  sk_state={}", socket.state));
        if let Some(inode) = socket.inode {
            text.push_str(&format!("  inode={inode}"));
        }
    }
    if let Some(caller) = &event.caller {
        text.push_str(&format!("  uid={}", caller.uid));
        if let Some(cgroup) = &caller.cgroup {
            text.push_str(&format!("  cgroup={cgroup}"));
        }
    }
    text
}

fn place(event: &Event) -> String {
    if let Some(listener) = &event.listener {
        return listener.endpoint.clone();
    }
    match &event.what {
        What::Bind { asked, outcome, .. } if outcome.failed() => asked.text(),
        What::Connect { source, .. } if !is_unix(event) => source.text(),
        _ => match &event.socket {
            Some(socket) if socket.local != End::default() => socket.local.text(),
            _ => "-".to_owned(),
        },
    }
}

fn time(of: Option<Duration>) -> String {
    duration(of.map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))
}

/// `3/128`
fn fill(depth: Option<u32>, limit: Option<u32>) -> String {
    format!("{}/{}", number(depth), number(limit))
}

/// Both queues, as far as there are two.
pub(super) fn queues_text(queues: &Queues) -> String {
    let accept = fill(queues.accept_depth, queues.accept_limit);
    match queues.syn_depth {
        Some(_) => format!("accept {accept}, SYN {}", fill(queues.syn_depth, queues.syn_limit)),
        None if queues.accept_depth.is_some() => format!("accept {accept}"),
        None => "queues unknown".to_owned(),
    }
}

/// What happened, in a few words.
pub(super) fn what(event: &Event) -> String {
    match &event.what {
        What::Socket { outcome } => {
            let kind = event.socket.as_ref().map_or_else(String::new, |socket| {
                format!(
                    "{} {} {}",
                    json::family(socket.family),
                    protocol(socket),
                    socket.kind.name()
                )
            });
            match outcome.errno() {
                Some(errno) => format!("{kind}: {errno}"),
                None => format!("{kind}, fd {}", outcome.0),
            }
        }
        What::Bind { outcome, .. } => bind(event, *outcome),
        What::Listen { backlog, relisten, outcome, .. } => {
            if outcome.failed() {
                return failed(event, "refused".to_owned(), Some(*outcome));
            }
            let Backlog { requested, somaxconn, effective, .. } = *backlog;
            let again = if *relisten { ", again" } else { "" };
            format!(
                "backlog {} (asked {}, somaxconn {}){again}",
                number(effective),
                number(requested),
                number(somaxconn)
            )
        }
        What::Connect { destination, outcome, took, .. } => {
            let to = destination.text();
            match outcome {
                Some(outcome) if !outcome.failed() => match took {
                    Some(_) => format!("to {to} in {}", time(*took)),
                    None => format!("to {to}"),
                },
                outcome => failed(event, format!("to {to}"), *outcome),
            }
        }
        What::Syn { peer, queues } => format!("from {}, {}", peer.text(), queues_text(queues)),
        What::Established { peer, handshake, queues } => {
            let from = from(peer);
            let took =
                handshake.map_or_else(String::new, |_| format!("handshake {}, ", time(*handshake)));
            format!("{from}{took}{}", queues_text(queues))
        }
        What::Accept { peer, wait, queues, .. } => {
            format!("{}waited {}, {}", from(peer), time(*wait), queues_text(queues))
        }
        What::Drop { peer, reason, queues } => {
            format!("{}{}; {}", from(peer), words(reason), queues_text(queues))
        }
        What::Cookie { peer, step } => {
            let direction = if *step == "sent" { "to" } else { "from" };
            format!("{step} {direction} {}", peer.text())
        }
        What::Request { peer, attempt, queues } => {
            let what = match (event.kind, attempt) {
                (crate::event::Kind::Retransmit, Some(n)) => {
                    format!("SYN-ACK sent again, time {n}")
                }
                (crate::event::Kind::Expire, Some(n)) => format!("no answer to 1+{n} SYN-ACKs"),
                _ => "the client reset its request".to_owned(),
            };
            format!("{}: {what}; {}", peer.text(), queues_text(queues))
        }
        What::Close { lost_on_close, lifetime, .. } => {
            format!("after {}, {} connections lost", time(*lifetime), number(*lost_on_close))
        }
        What::Lost { count, place } => format!("{count} events: {place}"),
    }
}

/// Of an AF_UNIX connection the peer has no name.
fn from(peer: &End) -> String {
    if *peer == End::default() { String::new() } else { format!("from {}, ", peer.text()) }
}

fn bind(event: &Event, outcome: Outcome) -> String {
    let What::Bind { asked, explicit, at_listen, range, destination, .. } = &event.what else {
        return String::new();
    };
    let got = event.socket.as_ref().map_or_else(End::default, |socket| socket.local.clone());
    if outcome.failed() {
        let about = if *explicit { "asked for by the program" } else { "chosen by the kernel" };
        return failed(event, about.to_owned(), Some(outcome));
    }
    let every = got.address.is_some_and(|address| address.is_unspecified());
    let scope = if every { ", on every address" } else { "" };
    if *explicit {
        return if asked.port == Some(0) {
            let of = range.map_or_else(String::new, |r| format!(" of {}-{}", r.low, r.high));
            format!("asked for any port, got {}{of}{scope}", number(got.port))
        } else {
            format!("as asked{scope}")
        };
    }
    let of = range.map_or_else(String::new, |range| {
        let used = range
            .in_use
            .map_or_else(String::new, |used| format!(", {used} of {} in use", range.size()));
        format!(" of {}-{}{used}", range.low, range.high)
    });
    let at = if *at_listen { "listen()" } else { "connect()" };
    let to = destination.as_ref().map_or_else(String::new, |to| format!(" to {}", to.text()));
    format!("the kernel chose {}{of}, at {at}{to}{scope}", number(got.port))
}

fn failed(event: &Event, about: String, outcome: Option<Outcome>) -> String {
    let errno = outcome.and_then(Outcome::errno);
    match (errno, explanation(event)) {
        (Some(errno), Some(why)) => format!("{about}: {errno}, {why}"),
        (Some(errno), None) => format!("{about}: {errno}"),
        (None, Some(why)) => format!("{about}: {why}"),
        (None, None) => about,
    }
}

/// A cause of a drop, in words.
fn words(reason: &str) -> &'static str {
    match reason {
        "accept_queue_full_on_syn" => "SYN dropped, accept queue full",
        "accept_queue_full_on_ack" => "final ACK dropped, accept queue full",
        "syn_queue_full" => "SYN dropped, SYN queue full",
        "syn_backlog_reserve" => "SYN dropped, the rest of tcp_max_syn_backlog is for known peers",
        _ => "dropped for another reason",
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::UNIX_EPOCH};

    use serde_json::json;

    use super::*;
    use crate::event::{Caller, Kind};

    /// A record that is put together from parts is one object, with everything in it once.
    #[test]
    fn a_line_is_one_object() {
        let listener = Arc::new(ListenerName::from(&crate::view::sample()));
        let peer = End { address: Some([127, 0, 0, 1].into()), port: Some(49022), path: None };
        let queues = Queues { accept_depth: Some(3), accept_limit: Some(128), ..Queues::default() };
        let event = |comm: Option<&str>| Event {
            time: UNIX_EPOCH + Duration::from_nanos(1_795_420_798_000_000_001),
            kind: Kind::Syn,
            listener: comm.is_none().then(|| Arc::clone(&listener)),
            caller: comm.map(|comm| Caller {
                pid: 7,
                comm: comm.into(),
                uid: 1000,
                cgroup: None,
                cgroup_id: 0,
            }),
            netns: Some(4_026_531_840),
            socket: None,
            what: What::Syn { peer: peer.clone(), queues },
        };
        let written = |event: &Event| {
            let mut out = b"before\n".to_vec();
            write(&mut out, event).unwrap();
            let text = String::from_utf8(out).unwrap();
            let line = text.strip_prefix("before\n").and_then(|line| line.strip_suffix('\n'));
            serde_json::from_str::<serde_json::Value>(line.unwrap()).unwrap()
        };
        let name = json!({
            "id": "4026531840:5121", "family": "ipv4", "transport": "tcp", "address": "0.0.0.0",
            "port": 8080, "path": null, "netns": 4_026_531_840_u32,
        });
        let record = |listener: serde_json::Value, caller: serde_json::Value| {
            json!({
                "type": "event", "schema": SCHEMA, "time": "2026-11-23T07:59:58.000000001Z",
                "kind": "syn", "listener": listener,
                "pid": caller[0], "comm": caller[1], "uid": caller[2], "cgroup": null,
                "netns": 4_026_531_840_u32, "peer": {"address": "127.0.0.1", "port": 49022},
                "accept_queue_depth": 3, "accept_queue_limit": 128,
                "syn_queue_depth": null, "syn_queue_limit": null,
            })
        };
        // The second time its listener is there already.
        for _ in 0..2 {
            assert_eq!(written(&event(None)), record(name.clone(), json!([null, null, null])));
        }
        let hostile = "\"},\u{1b}[2J\n";
        assert_eq!(written(&event(Some(hostile))), record(json!(null), json!([7, hostile, 1000])));
        assert_eq!(listener.without_id().json.get(), None);
    }
}
