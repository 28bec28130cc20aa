//! What was typed, and what it means.

use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum, builder::PossibleValuesParser};

use crate::{
    bpf::{Backend, LONGEST_COMM, Room, Wanted},
    error::{Error, Result},
    event::Kind,
    filter::{Filter, Ports},
    host,
    model::Family,
    view::column::COLUMNS,
};

/// Shows which TCP listener loses connections: the accept queue and the SYN queue of every
/// listener, with depth, peak and limit, live.
///
/// The accept queue holds finished handshakes that the program has not accepted yet, the SYN queue
/// half-open connections. Peaks are kept in the kernel at every change, so a burst between two
/// looks is not missed. "-" and null mean unknown.
#[derive(Parser, Debug)]
#[command(name = "socktrace", version, args_conflicts_with_subcommands = true)]
#[command(
    after_help = "Exit codes: 0 fine, 1 failed while running, 2 wrong usage, 3 a privilege is \
                        missing, 4 the kernel lacks something, 10 `diagnose` found something."
)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Option<Verb>,

    /// Without a verb, `top` runs.
    #[command(flatten)]
    pub top: TopArgs,
}

#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Live view: one table an interval
    Top(TopArgs),
    /// One snapshot, like `ss -lnt` with owners and both queues; works without root as far as the
    /// kernel allows
    List(ListArgs),
    /// The stream: one line an event in the life of sockets, listeners and connections
    Events(EventsArgs),
    /// Watches for a while, then says in words which listener lost or delayed connections, why, and what to
    /// change
    Diagnose(DiagnoseArgs),
    /// What this kernel, this user and this build allow
    Check(CheckArgs),
}

#[derive(Args, Debug, Default)]
pub struct TopArgs {
    #[command(flatten)]
    pub view: ViewArgs,

    /// Time between two tables: 1, 0.5, 500ms, 2m
    #[arg(short, long, value_name = "DUR", default_value = "1s", value_parser = duration)]
    pub interval: Duration,

    /// Stop after this many tables
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    #[command(flatten)]
    pub trace: TraceArgs,

    /// Plain tables even on a terminal (the only kind so far)
    #[arg(short, long)]
    pub batch: bool,

    /// Interval, as in vmstat
    #[arg(value_name = "INTERVAL", value_parser = verb_or_duration, conflicts_with = "interval")]
    pub at: Option<Duration>,

    /// Number of tables, as in vmstat
    #[arg(value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..),
          conflicts_with = "count")]
    pub times: Option<u64>,
}

#[derive(Args, Debug, Default)]
pub struct EventsArgs {
    #[command(flatten)]
    pub view: ViewArgs,

    /// Only these kinds of events [default: all]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    pub kind: Vec<Kind>,

    /// Tell the life of each listener as a story: created, bound, listening, first connection,
    /// overflow, closed, with the kernel's state after each step
    #[arg(long, conflicts_with = "kind")]
    pub lifecycle: bool,

    /// Stop after this many events
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    #[command(flatten)]
    pub trace: TraceArgs,
}

impl EventsArgs {
    /// The kinds that are wanted, a bit each as the kernel side numbers them.
    #[must_use]
    pub fn kinds(&self) -> u32 {
        const LIFE: [Kind; 7] = [
            Kind::Socket,
            Kind::Bind,
            Kind::Listen,
            Kind::Established,
            Kind::Accept,
            Kind::Drop,
            Kind::Close,
        ];
        let kinds: &[Kind] = match (self.lifecycle, self.kind.as_slice()) {
            (true, _) => &LIFE,
            (false, []) => &Kind::SENT,
            (false, some) => some,
        };
        let all = kinds.iter().fold(0, |bits, kind| bits | kind.bit());
        // A socket has no port when it is made. The story waits for the bind that names it.
        let portless = !self.view.filter.port.is_empty() && !self.lifecycle;
        if portless { all & !Kind::Socket.bit() } else { all }
    }

    /// What the kernel side has to know to send only what is wanted.
    pub fn wanted(&self, filter: &Filter) -> Result<Wanted> {
        let cgroup = filter.cgroup.as_deref();
        let comm = filter.comm.clone();
        if comm.as_deref() == Some("") {
            return Err(Error::Usage("--comm: a process has a name".into()));
        }
        // A story is a listener's: what the kernel does for a client is none of it.
        let chosen = self.kinds() & Kind::Bind.bit() != 0 && !self.lifecycle;
        Ok(Wanted {
            kinds: self.kinds() | if chosen { Kind::CHOSEN } else { 0 },
            families: filter.families.clone(),
            ports: filter.ports.clone(),
            pids: filter.pids.clone(),
            netns: filter.netns,
            // The kernel keeps no more of it.
            comm: comm.map(String::into_bytes),
            cgroup: cgroup
                .map(|path| host::cgroup_directory(Path::new("/sys"), path))
                .transpose()?,
            trouble_only: false,
            room: Room::All,
        })
    }
}

/// How to trace.
#[derive(Args, Debug, Default)]
pub struct KernelArgs {
    /// How to attach to the kernel; auto takes the first that works, in this order
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub backend: BackendArg,

    /// Room for this many listeners [default: twice as many as there are, and 2048 on up to 128 CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub max_listeners: Option<u32>,
}

/// Flags of the verbs that trace until they are told to stop.
#[derive(Args, Debug, Default)]
pub struct TraceArgs {
    /// Stop after this time
    #[arg(short, long, value_name = "DUR", value_parser = duration)]
    pub duration: Option<Duration>,

    #[command(flatten)]
    pub kernel: KernelArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 all is well, 10 there are findings, else as of every command."
)]
pub struct DiagnoseArgs {
    #[command(flatten)]
    pub form: FormArgs,

    #[command(flatten)]
    pub filter: FilterArgs,

    /// Watch for this long; Ctrl-C ends it earlier
    #[arg(short, long, value_name = "DUR", default_value = "10s", value_parser = duration)]
    pub duration: Duration,

    /// Time between two looks at the queues: rates and bursts are told apart by it
    #[arg(short, long, value_name = "DUR", default_value = "100ms", value_parser = duration)]
    pub interval: Duration,

    #[command(flatten)]
    pub kernel: KernelArgs,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    pub view: ViewArgs,
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    pub json: bool,

    /// Say more on stderr; twice: everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Which listeners.
#[derive(Args, Debug, Default)]
pub struct FilterArgs {
    /// Only listeners held by these processes
    #[arg(short, long, value_name = "LIST", value_delimiter = ',')]
    pub pid: Vec<u32>,

    /// Only these local ports: 80,8000-8100
    #[arg(short = 'P', long, value_name = "LIST", value_delimiter = ',')]
    pub port: Vec<Ports>,

    /// Only IPv4 sockets
    #[arg(short = '4', long)]
    pub ipv4: bool,

    /// Only IPv6 sockets
    #[arg(short = '6', long)]
    pub ipv6: bool,

    /// Only AF_UNIX sockets
    #[arg(short = 'x', long)]
    pub unix: bool,

    /// Only this network namespace: a name of `ip netns`, a process id, a path, inode:N
    #[arg(short = 'N', long, value_name = "NAME|PID|PATH|inode:N")]
    pub netns: Option<String>,

    /// Only listeners of processes in this control group or below
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,

    /// Only listeners held by a process of this name
    #[arg(long, value_name = "NAME")]
    pub comm: Option<String>,
}

/// How to say it.
#[derive(Args, Debug, Default)]
pub struct FormArgs {
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// The same as -o json: one object a line
    #[arg(long, conflicts_with = "output")]
    pub json: bool,

    /// Mark trouble red, what is nearly trouble yellow
    #[arg(long, value_enum, default_value_t = Color::Auto)]
    pub color: Color,

    /// Say more on stderr; twice: messages of the eBPF programs too
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Say nothing on stderr but errors
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
}

impl FormArgs {
    #[must_use]
    pub fn output(&self) -> Output {
        if self.json { Output::Json } else { self.output }
    }
}

/// Flags common to the views.
#[derive(Args, Debug, Default)]
pub struct ViewArgs {
    #[command(flatten)]
    pub form: FormArgs,

    #[command(flatten)]
    pub filter: FilterArgs,

    /// Sort by this column [default: top: the fullest queue first; list: listener, by port]
    #[arg(long, value_name = "COLUMN",
          value_parser = PossibleValuesParser::new(COLUMNS.iter().map(|c| c.key)))]
    pub sort: Option<String>,

    /// Rows only
    #[arg(short = 'H', long)]
    pub no_header: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Output {
    #[default]
    Table,
    Wide,
    Json,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// Whether to use colours on standard output.
    #[must_use]
    pub fn on_stdout(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                std::io::stdout().is_terminal() && !no_color
            }
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendArg {
    #[default]
    Auto,
    Fentry,
    Kprobe,
    Tracepoint,
}

impl BackendArg {
    /// What to try, in order.
    #[must_use]
    pub fn candidates(self) -> &'static [Backend] {
        match self {
            Self::Auto => &Backend::ALL,
            Self::Fentry => &[Backend::Fentry],
            Self::Kprobe => &[Backend::Kprobe],
            Self::Tracepoint => &[Backend::Tracepoint],
        }
    }
}

impl TopArgs {
    /// The flag, or the positional argument that says the same.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.at.unwrap_or(self.interval)
    }

    #[must_use]
    pub fn count(&self) -> Option<u64> {
        self.times.or(self.count)
    }
}

impl FilterArgs {
    pub fn filter(&self) -> Result<Filter> {
        let mut families = Vec::new();
        if self.ipv4 {
            families.push(Family::Ipv4);
        }
        if self.ipv6 {
            families.push(Family::Ipv6);
        }
        if self.unix {
            families.push(Family::Unix);
        }
        let proc = PathBuf::from("/proc");
        let netns = self.netns.as_deref().map(|name| host::resolve(&proc, name)).transpose()?;
        Ok(Filter {
            ports: self.port.clone(),
            pids: self.pid.clone(),
            families,
            netns,
            comm: self.comm.as_deref().map(as_kept),
            cgroup: self.cgroup.as_deref().map(from_root),
        })
    }
}

/// A name of a process as far as the kernel keeps it.
fn as_kept(comm: &str) -> String {
    let fits = |&end: &usize| end <= LONGEST_COMM && comm.is_char_boundary(end);
    let end = (0..=comm.len()).rfind(fits).unwrap_or(0);
    comm[..end].to_owned()
}

/// The path of a control group from the root of its hierarchy.
fn from_root(path: &str) -> String {
    let path = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .iter()
        .find_map(|mount| {
            path.strip_prefix(mount).filter(|rest| rest.is_empty() || rest.starts_with('/'))
        })
        .unwrap_or(path);
    format!("/{}", path.trim_matches('/'))
}

/// `1`, `0.5` (seconds) or with a unit: `500ms`, `2m`, `1h30m`.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
    let duration = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds)
            .map_err(|_| format!("{text} is not a length of time"))?,
        Err(_) => humantime::parse_duration(text).map_err(|_| {
            format!("{text:?} is not a length of time, such as 1, 0.5, 500ms or 2m")
        })?,
    };
    if duration < SHORTEST || duration > LONGEST {
        return Err(format!("{text} is out of range (10ms to 10 years)"));
    }
    Ok(duration)
}

/// What stands where a verb may stand.
fn verb_or_duration(text: &str) -> std::result::Result<Duration, String> {
    duration(text)
        .map_err(|error| format!("{error}, nor a command (top, list, events, diagnose, check)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let check = |text: &str, millis: Option<u64>| {
            assert_eq!(duration(text).ok(), millis.map(Duration::from_millis), "{text:?}");
        };
        check("1", Some(1000));
        check("0.5", Some(500));
        check("500ms", Some(500));
        check("1m30s", Some(90_000));
        for wrong in ["", "0", "-1", "1ms", "NaN", "inf", "1e300", "x", "1parsec"] {
            check(wrong, None);
        }
    }

    #[test]
    fn a_command_line_means_what_vmstat_users_expect() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap();
        let top = parse("socktrace 2 5").top;
        assert_eq!((top.interval(), top.count()), (Duration::from_secs(2), Some(5)));
        let Some(Verb::Top(top)) = parse("socktrace top -i 500ms -c 3 -P 80,90-95 -46").verb else {
            panic!("not top");
        };
        assert_eq!((top.interval(), top.count()), (Duration::from_millis(500), Some(3)));
        assert_eq!(top.view.filter.port.len(), 2);
        assert_eq!(top.view.filter.filter().unwrap().families.len(), 2);
        assert_eq!(parse("socktrace --json").top.view.form.output(), Output::Json);
    }

    #[test]
    fn filters_are_what_the_kernel_compares_with() {
        for (typed, kept) in
            [("nginx", "nginx"), ("a-very-long-name-indeed", "a-very-long-nam"), ("", "")]
        {
            assert_eq!(as_kept(typed), kept);
        }
        assert_eq!(as_kept("aaaaaaaaaaaaaa\u{e4}"), "aaaaaaaaaaaaaa");
        for typed in ["/a/b", "a/b", "/sys/fs/cgroup/a/b/", "/sys/fs/cgroup/unified/a/b"] {
            assert_eq!(from_root(typed), "/a/b", "{typed}");
        }
        assert_eq!(from_root("/sys/fs/cgroup"), "/");
        let kinds = |line: &str| {
            let Some(Verb::Events(events)) = Cli::try_parse_from(line.split(' ')).unwrap().verb
            else {
                panic!("not events");
            };
            events.kinds()
        };
        assert_eq!(kinds("socktrace events"), Kind::all());
        assert_eq!(kinds("socktrace events --kind syn,drop"), Kind::Syn.bit() | Kind::Drop.bit());
        assert_eq!(kinds("socktrace events -P 80"), Kind::all() & !Kind::Socket.bit());
    }

    #[test]
    fn the_parser_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
