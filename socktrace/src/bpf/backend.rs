//! The three ways to attach, as tables: which program goes to which kernel function.

use std::fmt;

use socktrace_common::event;

/// A way to attach to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    Fentry,
    Kprobe,
    Tracepoint,
}

impl Backend {
    /// In the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::Fentry, Self::Kprobe, Self::Tracepoint];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// What a kernel needs for it.
    #[must_use]
    pub fn needs(self) -> &'static str {
        match self {
            Self::Fentry => "5.5 or later on x86-64 (6.4 on arm64), CONFIG_DEBUG_INFO_BTF=y",
            Self::Kprobe => "CONFIG_KPROBES=y and CONFIG_BPF_EVENTS=y",
            Self::Tracepoint => "5.5 or later, CONFIG_DEBUG_INFO_BTF=y",
        }
    }

    /// What it can never tell, and why; `null` in the records.
    #[must_use]
    pub fn blind_to(self) -> &'static [(&'static str, &'static str)] {
        const NOWHERE: &str = "no tracepoint stands where it happens";
        match self {
            Self::Fentry | Self::Kprobe => &[],
            Self::Tracepoint => &[
                ("accepts, waits, handshakes", NOWHERE),
                ("events of kind expire", NOWHERE),
                ("AF_UNIX counts and peaks", NOWHERE),
                ("some totals", "requests_*, fastopen_*, acks_deferred, migrated_*: as above"),
                ("SO_REUSEPORT totals", "members of a group share the address that packets go to"),
            ],
        }
    }

    /// Whether events of this kind can be seen at all.
    pub(super) fn sends(self, kind: u32) -> bool {
        !(self == Self::Tracepoint && kind == event::kind::EXPIRE)
    }

    /// What sends events of a kind and may not be there, and what is unknown then; `None` when the hooks that are
    /// always there send them.
    pub(super) fn sender(self, kind: u32) -> Option<(&'static Hook, &'static str)> {
        let is_for = |hook: &Hook| match kind {
            // These are counted as well.
            event::kind::ACCEPT if self != Self::Tracepoint => {
                hook.program.ends_with("_sock_graft")
            }
            event::kind::RETRANSMIT => hook.program == "tp_retransmit_synack",
            _ => hook.events >> kind & 1 == 1,
        };
        self.hooks().find_map(|hook| match hook.need {
            Need::For(what) if is_for(hook) => Some((hook, what)),
            _ => None,
        })
    }

    /// In the order in which they are attached.
    pub(super) fn hooks(self) -> impl Iterator<Item = &'static Hook> {
        let (first, second): (&[Hook], &[Hook]) = match self {
            Self::Fentry => (FENTRY, ONLY_FENTRY),
            Self::Kprobe => (KPROBE, ONLY_KPROBE),
            Self::Tracepoint => (TRACEPOINT, &[]),
        };
        first.iter().chain(second)
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fentry,
    Fexit,
    Kprobe,
    BtfTracepoint,
    /// A classic tracepoint of this category; needs tracefs.
    Tracepoint(&'static str),
}

/// One program and the function it goes to.
#[derive(Debug)]
pub(super) struct Hook {
    pub(super) program: &'static str,
    pub(super) kind: Kind,
    pub(super) target: &'static str,
    pub(super) need: Need,
    /// Set of kinds of events that it is for; 0 when it is for the listeners' counts.
    pub(super) events: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Without it the backend cannot do its work.
    Required,
    /// Without it this is unknown.
    For(&'static str),
    /// Kernels that lack the function do not call it either.
    WhereItExists,
    /// Only where the function has so many arguments; without any of these programs this is unknown.
    WithArguments(u32, &'static str),
}

impl Hook {
    /// The function that has to be named to the kernel by its id.
    pub(super) fn btf_function(&self) -> Option<String> {
        matches!(self.kind, Kind::Fentry | Kind::Fexit).then(|| self.target.to_owned())
    }

    /// The same for a tracepoint: the type of its probes.
    pub(super) fn btf_tracepoint(&self) -> Option<String> {
        (self.kind == Kind::BtfTracepoint).then(|| format!("btf_trace_{}", self.target))
    }
}

const fn hook(program: &'static str, kind: Kind, target: &'static str, need: Need) -> Hook {
    Hook { program, kind, target, need, events: 0 }
}

/// For events of these kinds only.
const fn event(
    program: &'static str,
    kind: Kind,
    target: &'static str,
    need: Need,
    events: u32,
) -> Hook {
    Hook { program, kind, target, need, events }
}

const SOCKET: u32 = 1 << event::kind::SOCKET;
const BIND: u32 = 1 << event::kind::BIND;
const LISTEN: u32 = 1 << event::kind::LISTEN;
const CONNECT: u32 = 1 << event::kind::CONNECT;
const ESTABLISHED: u32 = 1 << event::kind::ESTABLISHED;
/// Binds at `connect()`.
const CHOSEN: u32 = 1 << event::kind::CHOSEN;
const ACCEPT: u32 = 1 << event::kind::ACCEPT;

const REQUESTED: Need = Need::For("the backlog passed to listen()");
const ACCEPTS: Need = Need::For("accept(): how many, and how long connections waited");
const RETRANSMITS: Need = Need::For("repeated SYN-ACKs");
const UNIX: Need = Need::For(UNIX_COUNTS);
pub(super) const UNIX_COUNTS: &str = "counts and peaks of AF_UNIX listeners";
const SOCKETS: Need = Need::For("events of kind socket");
const BINDS: Need = Need::For("events of kind bind");
const LISTENS: Need = Need::For("events of kind listen");
const CONNECTS: Need = Need::For("events of kind connect");
const IMPLICIT: Need = Need::For("ports that the kernel chose at connect()");
const ESTABLISHES: Need = Need::For("events of kind established");
const ACCEPTED: Need = Need::For("events of kind accept");

/// What the fentry and kprobe backends attach alike, their programs named after the same functions.
///
/// Ends before beginnings: a listener that closes while the probes go on must not stay, and what was
/// never begun has no end.
macro_rules! functions {
    ($entry:literal $at_entry:expr, $exit:literal $at_exit:expr) => {
        &[
            hook(concat!($entry, "listen_stop"), $at_entry, "inet_csk_listen_stop", Need::Required),
            hook(concat!($entry, "sys_listen"), $at_entry, "__sys_listen", REQUESTED),
            hook(
                concat!($entry, "sys_listen_socket"),
                $at_entry,
                "__sys_listen_socket",
                Need::WhereItExists,
            ),
            hook(
                concat!($entry, "security_socket_listen"),
                $at_entry,
                "security_socket_listen",
                REQUESTED,
            ),
            hook(
                concat!($entry, "listen_start"),
                $at_entry,
                "inet_csk_listen_start",
                Need::Required,
            ),
            hook(concat!($entry, "sock_graft"), $at_entry, "security_sock_graft", ACCEPTS),
            hook(
                concat!($entry, "child_forget"),
                $at_entry,
                "inet_child_forget",
                Need::WhereItExists,
            ),
            hook(
                concat!($entry, "reqsk_clone"),
                $at_entry,
                "inet_reqsk_clone",
                Need::WhereItExists,
            ),
            hook(
                concat!($entry, "queue_add"),
                $at_entry,
                "inet_csk_reqsk_queue_add",
                Need::Required,
            ),
            hook(
                concat!($entry, "hashdance"),
                $at_entry,
                "inet_csk_complete_hashdance",
                Need::Required,
            ),
            hook("tp_retransmit_synack", Kind::BtfTracepoint, "tcp_retransmit_synack", RETRANSMITS),
            hook(concat!($exit, "reqsk_timer"), $at_exit, "reqsk_timer_handler", Need::Required),
            hook(concat!($entry, "reqsk_timer"), $at_entry, "reqsk_timer_handler", Need::Required),
            hook(concat!($exit, "req_err"), $at_exit, "tcp_req_err", Need::Required),
            hook(concat!($entry, "req_err"), $at_entry, "tcp_req_err", Need::Required),
            hook(concat!($exit, "cookie_v6"), $at_exit, "cookie_v6_check", Need::WhereItExists),
            hook(concat!($entry, "cookie_v6"), $at_entry, "cookie_v6_check", Need::WhereItExists),
            hook(concat!($exit, "cookie_v4"), $at_exit, "cookie_v4_check", Need::Required),
            hook(concat!($entry, "cookie_v4"), $at_entry, "cookie_v4_check", Need::Required),
            hook(concat!($exit, "check_req"), $at_exit, "tcp_check_req", Need::Required),
            hook(concat!($entry, "check_req"), $at_entry, "tcp_check_req", Need::Required),
            hook(concat!($exit, "conn_request"), $at_exit, "tcp_conn_request", Need::Required),
            hook(concat!($entry, "conn_request"), $at_entry, "tcp_conn_request", Need::Required),
            hook(concat!($entry, "unix_release"), $at_entry, "unix_release", UNIX),
            hook(concat!($entry, "unix_release_sock"), $at_entry, "unix_release_sock", UNIX),
            hook(concat!($entry, "unix_listen"), $at_entry, "unix_listen", UNIX),
            hook(concat!($entry, "unix_wait"), $at_entry, "unix_wait_for_peer", UNIX),
            hook(
                concat!($exit, "unix_may_connect"),
                $at_exit,
                "security_unix_stream_connect",
                UNIX,
            ),
            event(concat!($exit, "sys_socket"), $at_exit, "__sys_socket", SOCKETS, SOCKET),
            event(
                concat!($entry, "post_create"),
                $at_entry,
                "security_socket_post_create",
                SOCKETS,
                SOCKET,
            ),
            event(concat!($entry, "sys_socket"), $at_entry, "__sys_socket", SOCKETS, SOCKET),
            event(concat!($exit, "sys_bind"), $at_exit, "__sys_bind", BINDS, BIND),
            event(
                concat!($exit, "sys_bind_socket"),
                $at_exit,
                "__sys_bind_socket",
                Need::WhereItExists,
                BIND,
            ),
            event(concat!($entry, "security_bind"), $at_entry, "security_socket_bind", BINDS, BIND),
            // A port may be chosen at listen().
            event(
                concat!($exit, "sys_listen_socket"),
                $at_exit,
                "__sys_listen_socket",
                Need::WhereItExists,
                LISTEN | BIND,
            ),
            event(concat!($exit, "sys_listen"), $at_exit, "__sys_listen", LISTENS, LISTEN | BIND),
            event("tp_answered", Kind::BtfTracepoint, "inet_sock_set_state", CONNECTS, CONNECT),
            event(
                concat!($exit, "connect_v6"),
                $at_exit,
                "tcp_v6_connect",
                Need::WhereItExists,
                CONNECT | CHOSEN,
            ),
            event(
                concat!($exit, "connect_v4"),
                $at_exit,
                "tcp_v4_connect",
                CONNECTS,
                CONNECT | CHOSEN,
            ),
            event(
                concat!($entry, "hash_connect_v6"),
                $at_entry,
                "inet6_hash_connect",
                Need::WhereItExists,
                CONNECT | CHOSEN,
            ),
            event(
                concat!($entry, "hash_connect"),
                $at_entry,
                "inet_hash_connect",
                IMPLICIT,
                CONNECT | CHOSEN,
            ),
            event(
                concat!($entry, "connect_v6"),
                $at_entry,
                "tcp_v6_connect",
                Need::WhereItExists,
                CONNECT | CHOSEN,
            ),
            event(
                concat!($entry, "connect_v4"),
                $at_entry,
                "tcp_v4_connect",
                CONNECTS,
                CONNECT | CHOSEN,
            ),
        ]
    };
}

const FENTRY: &[Hook] = functions!("fentry_" Kind::Fentry, "fexit_" Kind::Fexit);
const KPROBE: &[Hook] = functions!("kprobe_" Kind::Kprobe, "kretprobe_" Kind::Kprobe);

const ONLY_FENTRY: &[Hook] = &[
    hook("fexit_unix_connect", Kind::Fexit, "unix_stream_connect", UNIX),
    hook("fexit_unix_find_4", Kind::Fexit, "unix_find_other", Need::WithArguments(4, UNIX_COUNTS)),
    hook("fexit_unix_find_5", Kind::Fexit, "unix_find_other", Need::WithArguments(5, UNIX_COUNTS)),
    hook("fexit_unix_find_6", Kind::Fexit, "unix_find_other", Need::WithArguments(6, UNIX_COUNTS)),
    event("fexit_unix_connect_call", Kind::Fexit, "unix_stream_connect", CONNECTS, CONNECT),
    event("fentry_unix_connect_call", Kind::Fentry, "unix_stream_connect", CONNECTS, CONNECT),
];

// Of many that wait in one function, a return probe misses some (`maxactive`), so the end of a connect, which waits
// for room, is seen where its system call returns.
const ONLY_KPROBE: &[Hook] = &[
    hook("tp_unix_connected", Kind::Tracepoint("syscalls"), "sys_exit_connect", UNIX),
    hook("kretprobe_unix_find", Kind::Kprobe, "unix_find_other", UNIX),
    hook("kprobe_unix_connects", Kind::Kprobe, "unix_stream_connect", UNIX),
    hook("kprobe_unix_may_connect", Kind::Kprobe, "security_unix_stream_connect", UNIX),
    event("kprobe_unix_connect", Kind::Kprobe, "unix_stream_connect", CONNECTS, CONNECT),
];

const SYSCALLS: Kind = Kind::Tracepoint("syscalls");

const TRACEPOINT: &[Hook] = &[
    hook("tp_sys_enter_listen", SYSCALLS, "sys_enter_listen", REQUESTED),
    hook("tp_set_state", Kind::BtfTracepoint, "inet_sock_set_state", Need::Required),
    hook("tp_retransmit_synack", Kind::BtfTracepoint, "tcp_retransmit_synack", RETRANSMITS),
    hook("tp_kfree_skb", Kind::BtfTracepoint, "kfree_skb", Need::Required),
    hook("tp_consume_skb", Kind::BtfTracepoint, "consume_skb", Need::Required),
    event("tp_sys_exit_socket", SYSCALLS, "sys_exit_socket", SOCKETS, SOCKET),
    event("tp_sys_enter_socket", SYSCALLS, "sys_enter_socket", SOCKETS, SOCKET),
    event("tp_sys_exit_bind", SYSCALLS, "sys_exit_bind", BINDS, BIND),
    event("tp_sys_enter_bind", SYSCALLS, "sys_enter_bind", BINDS, BIND),
    // A port may be chosen at listen().
    event("tp_sys_exit_listen", SYSCALLS, "sys_exit_listen", LISTENS, LISTEN | BIND),
    event("tp_joined", Kind::BtfTracepoint, "inet_sock_set_state", ESTABLISHES, ESTABLISHED),
    event("tp_sys_exit_connect", SYSCALLS, "sys_exit_connect", CONNECTS, CONNECT | CHOSEN),
    event("tp_answered", Kind::BtfTracepoint, "inet_sock_set_state", CONNECTS, CONNECT),
    event("tp_sends_syn", Kind::BtfTracepoint, "inet_sock_set_state", CONNECTS, CONNECT | CHOSEN),
    event("tp_sys_enter_connect", SYSCALLS, "sys_enter_connect", CONNECTS, CONNECT | CHOSEN),
    event("tp_sys_exit_accept", SYSCALLS, "sys_exit_accept", ACCEPTED, ACCEPT),
    event("tp_sys_enter_accept", SYSCALLS, "sys_enter_accept", ACCEPTED, ACCEPT),
    event("tp_sys_exit_accept4", SYSCALLS, "sys_exit_accept4", ACCEPTED, ACCEPT),
    event("tp_sys_enter_accept4", SYSCALLS, "sys_enter_accept4", ACCEPTED, ACCEPT),
];
