//! The three ways to attach, as tables: which program goes to which kernel function.

use std::fmt;

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
                ("some totals", "requests_*, fastopen_*, acks_deferred, migrated_*: as above"),
                ("SO_REUSEPORT totals", "members of a group share the address that packets go to"),
            ],
        }
    }

    pub(super) fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Fentry => FENTRY,
            Self::Kprobe => KPROBE,
            Self::Tracepoint => TRACEPOINT,
        }
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Without it the backend cannot do its work.
    Required,
    /// Without it this is unknown.
    For(&'static str),
    /// Kernels that lack the function do not call it either.
    WhereItExists,
}

const fn hook(program: &'static str, kind: Kind, target: &'static str, need: Need) -> Hook {
    Hook { program, kind, target, need }
}

const REQUESTED: Need = Need::For("the backlog passed to listen()");

const ACCEPTS: Need = Need::For("accept(): how many, and how long connections waited");
const RETRANSMITS: Need = Need::For("repeated SYN-ACKs");

// Ends before beginnings: a listener that closes while the probes go on must not stay, and what was
// never begun has no end.
const FENTRY: &[Hook] = &[
    hook("fentry_listen_stop", Kind::Fentry, "inet_csk_listen_stop", Need::Required),
    hook("fentry_sys_listen", Kind::Fentry, "__sys_listen", REQUESTED),
    hook("fentry_sys_listen_socket", Kind::Fentry, "__sys_listen_socket", Need::WhereItExists),
    hook("fentry_security_socket_listen", Kind::Fentry, "security_socket_listen", REQUESTED),
    hook("fentry_listen_start", Kind::Fentry, "inet_csk_listen_start", Need::Required),
    hook("fentry_sock_graft", Kind::Fentry, "security_sock_graft", ACCEPTS),
    hook("fentry_child_forget", Kind::Fentry, "inet_child_forget", Need::WhereItExists),
    hook("fentry_reqsk_clone", Kind::Fentry, "inet_reqsk_clone", Need::WhereItExists),
    hook("fentry_queue_add", Kind::Fentry, "inet_csk_reqsk_queue_add", Need::Required),
    hook("fentry_hashdance", Kind::Fentry, "inet_csk_complete_hashdance", Need::Required),
    hook("tp_retransmit_synack", Kind::BtfTracepoint, "tcp_retransmit_synack", RETRANSMITS),
    hook("fexit_reqsk_timer", Kind::Fexit, "reqsk_timer_handler", Need::Required),
    hook("fentry_reqsk_timer", Kind::Fentry, "reqsk_timer_handler", Need::Required),
    hook("fexit_req_err", Kind::Fexit, "tcp_req_err", Need::Required),
    hook("fentry_req_err", Kind::Fentry, "tcp_req_err", Need::Required),
    hook("fexit_cookie_v6", Kind::Fexit, "cookie_v6_check", Need::WhereItExists),
    hook("fentry_cookie_v6", Kind::Fentry, "cookie_v6_check", Need::WhereItExists),
    hook("fexit_cookie_v4", Kind::Fexit, "cookie_v4_check", Need::Required),
    hook("fentry_cookie_v4", Kind::Fentry, "cookie_v4_check", Need::Required),
    hook("fexit_check_req", Kind::Fexit, "tcp_check_req", Need::Required),
    hook("fentry_check_req", Kind::Fentry, "tcp_check_req", Need::Required),
    hook("fexit_conn_request", Kind::Fexit, "tcp_conn_request", Need::Required),
    hook("fentry_conn_request", Kind::Fentry, "tcp_conn_request", Need::Required),
];

const KPROBE: &[Hook] = &[
    hook("kprobe_listen_stop", Kind::Kprobe, "inet_csk_listen_stop", Need::Required),
    hook("kprobe_sys_listen", Kind::Kprobe, "__sys_listen", REQUESTED),
    hook("kprobe_sys_listen_socket", Kind::Kprobe, "__sys_listen_socket", Need::WhereItExists),
    hook("kprobe_security_socket_listen", Kind::Kprobe, "security_socket_listen", REQUESTED),
    hook("kprobe_listen_start", Kind::Kprobe, "inet_csk_listen_start", Need::Required),
    hook("kprobe_sock_graft", Kind::Kprobe, "security_sock_graft", ACCEPTS),
    hook("kprobe_child_forget", Kind::Kprobe, "inet_child_forget", Need::WhereItExists),
    hook("kprobe_reqsk_clone", Kind::Kprobe, "inet_reqsk_clone", Need::WhereItExists),
    hook("kprobe_queue_add", Kind::Kprobe, "inet_csk_reqsk_queue_add", Need::Required),
    hook("kprobe_hashdance", Kind::Kprobe, "inet_csk_complete_hashdance", Need::Required),
    hook("tp_retransmit_synack", Kind::BtfTracepoint, "tcp_retransmit_synack", RETRANSMITS),
    hook("kretprobe_reqsk_timer", Kind::Kprobe, "reqsk_timer_handler", Need::Required),
    hook("kprobe_reqsk_timer", Kind::Kprobe, "reqsk_timer_handler", Need::Required),
    hook("kretprobe_req_err", Kind::Kprobe, "tcp_req_err", Need::Required),
    hook("kprobe_req_err", Kind::Kprobe, "tcp_req_err", Need::Required),
    hook("kretprobe_cookie_v6", Kind::Kprobe, "cookie_v6_check", Need::WhereItExists),
    hook("kprobe_cookie_v6", Kind::Kprobe, "cookie_v6_check", Need::WhereItExists),
    hook("kretprobe_cookie_v4", Kind::Kprobe, "cookie_v4_check", Need::Required),
    hook("kprobe_cookie_v4", Kind::Kprobe, "cookie_v4_check", Need::Required),
    hook("kretprobe_check_req", Kind::Kprobe, "tcp_check_req", Need::Required),
    hook("kprobe_check_req", Kind::Kprobe, "tcp_check_req", Need::Required),
    hook("kretprobe_conn_request", Kind::Kprobe, "tcp_conn_request", Need::Required),
    hook("kprobe_conn_request", Kind::Kprobe, "tcp_conn_request", Need::Required),
];

const TRACEPOINT: &[Hook] = &[
    hook("tp_sys_enter_listen", Kind::Tracepoint("syscalls"), "sys_enter_listen", REQUESTED),
    hook("tp_set_state", Kind::BtfTracepoint, "inet_sock_set_state", Need::Required),
    hook("tp_retransmit_synack", Kind::BtfTracepoint, "tcp_retransmit_synack", RETRANSMITS),
    hook("tp_kfree_skb", Kind::BtfTracepoint, "kfree_skb", Need::Required),
    hook("tp_consume_skb", Kind::BtfTracepoint, "consume_skb", Need::Required),
];
