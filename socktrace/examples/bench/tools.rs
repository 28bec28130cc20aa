//! What is measured: each tool as it is run.

/// What this program says when it runs as a tool and is attached.
pub(crate) const READY: &str = "bench: attached";

/// How to know that a tool is attached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ready {
    /// It says so on stderr.
    Says(&'static str),
    /// It uses no more CPU: its start is over.
    Quiet,
}

/// Where a tool runs besides `connect`, which all run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    Connect,
    Packets,
}

#[derive(Debug)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) command: &'static [&'static str],
    pub(crate) ready: Ready,
    pub(crate) on: On,
    /// Its own CPU is that of its children, which are not asked.
    pub(crate) own_unknown: bool,
}

/// The path of this program in the commands below.
pub(crate) const SELF: &str = "bench";
pub(crate) const SOCKTRACE_READY: Ready = Ready::Says("socktrace: tracing with");

const fn tool(name: &'static str, command: &'static [&'static str], ready: Ready, on: On) -> Tool {
    Tool { name, command, ready, on, own_unknown: false }
}

const fn top(name: &'static str, command: &'static [&'static str]) -> Tool {
    tool(name, command, SOCKTRACE_READY, On::Packets)
}

const fn peer(name: &'static str, command: &'static [&'static str]) -> Tool {
    tool(name, command, Ready::Quiet, On::Connect)
}

const fn parent(name: &'static str, command: &'static [&'static str]) -> Tool {
    Tool { own_unknown: true, ..tool(name, command, Ready::Says(READY), On::Connect) }
}

pub(crate) const TOOLS: &[Tool] = &[
    tool("floor", &[SELF, "floor"], Ready::Says(READY), On::Packets),
    top("socktrace top, fentry", &["socktrace", "top", "--json", "-i1s", "--backend=fentry"]),
    top("socktrace top, kprobe", &["socktrace", "top", "--json", "-i1s", "--backend=kprobe"]),
    top(
        "socktrace top, tracepoint",
        &["socktrace", "top", "--json", "-i1s", "--backend=tracepoint"],
    ),
    parent(
        "socktrace top, fentry, two at once",
        &[SELF, "twice", "socktrace", "top", "--json", "-i1s", "--backend=fentry"],
    ),
    tool(
        "socktrace events, accept",
        &["socktrace", "events", "--json", "--backend=fentry", "--kind=accept"],
        SOCKTRACE_READY,
        On::Connect,
    ),
    tool(
        "socktrace events, three kinds",
        &["socktrace", "events", "--json", "--backend=fentry", "--kind=syn,established,accept"],
        SOCKTRACE_READY,
        On::Connect,
    ),
    tool(
        "socktrace events, all, fentry",
        &["socktrace", "events", "--json", "--backend=fentry"],
        SOCKTRACE_READY,
        On::Packets,
    ),
    tool(
        "socktrace events, all, kprobe",
        &["socktrace", "events", "--json", "--backend=kprobe"],
        SOCKTRACE_READY,
        On::Connect,
    ),
    tool(
        "socktrace events, all, tracepoint",
        &["socktrace", "events", "--json", "--backend=tracepoint"],
        SOCKTRACE_READY,
        On::Connect,
    ),
    tool(
        "socktrace diagnose, fentry",
        &["socktrace", "diagnose", "--json", "-d1h", "--backend=fentry"],
        SOCKTRACE_READY,
        On::Packets,
    ),
    tool(
        "libbpf-tools tcpsynbl",
        &["chroot", PEERS, "/usr/sbin/tcpsynbl-libbpf"],
        Ready::Quiet,
        On::Packets,
    ),
    peer("libbpf-tools tcpstates", &["chroot", PEERS, "/usr/sbin/tcpstates-libbpf"]),
    peer("libbpf-tools tcplife", &["chroot", PEERS, "/usr/sbin/tcplife-libbpf"]),
    peer("libbpf-tools tcptracer", &["chroot", PEERS, "/usr/sbin/tcptracer-libbpf"]),
    peer(
        "bpftrace tcpaccept.bt",
        &["chroot", PEERS, "/usr/bin/bpftrace", "/usr/sbin/tcpaccept.bt"],
    ),
    peer("bpftrace tcpsynbl.bt", &["chroot", PEERS, "/usr/bin/bpftrace", "/usr/sbin/tcpsynbl.bt"]),
    parent("ss -lnt every 100 ms", &[SELF, "every", "100", "ss", "-lnt"]),
    parent("ss -lnt every 10 ms", &[SELF, "every", "10", "ss", "-lnt"]),
];

/// The other tools, in a tree with the libraries of their own distribution.
pub(crate) const PEERS: &str = "/peers";

/// One look at idle listeners.
pub(crate) const LOOKS: &[(&str, &[&str])] =
    &[("socktrace list", &["socktrace", "list"]), ("ss -lnt", &["ss", "-lnt"])];
