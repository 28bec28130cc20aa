//! From the eBPF object to attached programs.

use std::collections::HashSet;

use aya::{
    Btf, Ebpf, EbpfLoader, Endianness, VerifierLogLevel, include_bytes_aligned,
    programs::{
        BtfTracePoint, FEntry, FExit, KProbe, Program, ProgramError, RawTracePoint, TracePoint,
    },
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socktrace_common::{Cell, Histograms, Reading, Slot, event::UnixName, stat};

use super::{
    backend::{Backend, Hook, Kind, Need, UNIX_COUNTS},
    layout::{self, BTF_PATH, Layout},
    log,
    wanted::{self, Wanted},
};
use crate::error::{Error, Result};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/socktrace-ebpf"));

#[derive(Clone, Debug)]
pub struct Options {
    /// How many listeners can be tracked at once.
    pub max_listeners: u32,
    /// Number of possible CPUs.
    pub cpus: u32,
    /// Which events are wanted; `None` for none at all.
    pub events: Option<Wanted>,
}

impl Options {
    /// Memory of the kernel side for each listener that there is room for.
    #[must_use]
    pub fn bytes_a_listener(cpus: u32) -> u64 {
        let cells = size_of::<Cell>() as u64 * u64::from(cpus);
        let rest = size_of::<Slot>()
            + size_of::<Reading>()
            + size_of::<UnixName>()
            + size_of::<Histograms>();
        cells + rest as u64
    }
}

/// Network namespaces, times CPUs, whose counters the tracepoint backend can follow.
const MOST_COUNTERS: u32 = 1 << 13;

/// Connections in accept queues that can be kept account of at once, on all listeners together.
pub(super) const MOST_WAITING: u32 = 1 << 16;

/// What the running kernel's type information says, read once.
#[derive(Debug)]
pub struct KernelBtf {
    /// Only the ids of what programs are attached to.
    ids: Btf,
    layout: Layout,
}

impl KernelBtf {
    pub fn read() -> Result<Self> {
        let bytes = std::fs::read(BTF_PATH).map_err(|error| Error::Kernel {
            what: format!("cannot read the kernel's type information {BTF_PATH}: {error}"),
            remedy: "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian 11, Ubuntu 20.10, \
                     RHEL 8.2, Fedora 31 and later have it; Linux 5.4 is the first that can) and \
                     mount sysfs at /sys"
                .into(),
        })?;
        let types = layout::parse(&bytes)?;
        let layout = Layout::find(&types)?;
        let hooks = || Backend::ALL.into_iter().flat_map(Backend::hooks);
        let functions = hooks().filter_map(Hook::btf_function).map(String::into_bytes).collect();
        let tracepoints =
            hooks().filter_map(Hook::btf_tracepoint).map(String::into_bytes).collect();
        // aya copies every type it is given.
        let ids = Btf::parse(&types.ids_only(&functions, &tracepoints), Endianness::default())
            .map_err(Error::run(format!("cannot parse {BTF_PATH}")))?;
        Ok(Self { ids, layout })
    }

    /// Whether connections of a listener that closes can move to another one
    /// (`net.ipv4.tcp_migrate_req`): some kernels have the switch, but not what it switches.
    pub(super) fn migrates(&self) -> bool {
        self.layout.migrates
    }

    /// Fields that this kernel lacks and socktrace can do without.
    #[must_use]
    pub fn absent(&self) -> &[String] {
        &self.layout.absent
    }
}

/// What became of a backend's hooks.
#[derive(Debug, Default)]
pub struct Attempt {
    /// Optional hooks that could not be attached: what is unknown without, and why.
    pub without: Vec<(&'static str, String)>,
    /// Names of the attached programs.
    pub attached: Vec<&'static str>,
}

impl Attempt {
    /// Whether this is unknown for want of a hook.
    pub(super) fn lacks(&self, what: &str) -> bool {
        self.without.iter().any(|(lacking, _)| *lacking == what)
    }
}

/// Creates the maps and prepares the programs; nothing is verified or attached yet.
pub(super) fn load(kernel: &KernelBtf, options: &Options) -> Result<Ebpf> {
    let slots = options.max_listeners;
    let level = log::level();
    let chosen = options.events.as_ref().map(wanted::Globals::from);
    let mut loader = loader_without_btf();
    loader
        .verifier_log_level(VerifierLogLevel::DEBUG)
        .map_max_entries("SLOTS", slots)
        .map_max_entries("READINGS", slots)
        .map_max_entries("HISTOGRAMS", slots)
        .map_max_entries("PATHS", slots)
        .map_max_entries("WAITING", MOST_WAITING)
        .map_max_entries("STATS", stat::COUNT * options.cpus)
        .map_max_entries("COUNTERS", MOST_COUNTERS)
        .map_max_entries("OLD", MOST_COUNTERS)
        .map_max_entries("CELLS", slots * options.cpus)
        .map_max_entries("FREE", slots)
        // Twice as many: a preallocated hash may run out of elements on one CPU before it is full.
        .map_max_entries("BY_SK", slots * 2)
        .map_max_entries("PORTS", slots * 2)
        .override_global("CPUS", &options.cpus, true)
        .override_global("AYA_LOG_LEVEL", &level, true);
    for (name, offset) in &kernel.layout.offsets {
        loader.override_global(name, offset, true);
    }
    if let Some(chosen) = &chosen {
        chosen.apply(&mut loader);
    }
    let mut ebpf = loader.load(OBJECT).map_err(Error::run("cannot create the BPF maps"))?;
    if let Some(wanted) = &options.events {
        wanted.fill(&mut ebpf)?;
    }
    Ok(ebpf)
}

/// A loader reads and parses all of the kernel's type information as it is made, for relocations that our
/// programs do not have: a third of the start-up, and most of its memory. It does without when there is no
/// file descriptor to be had.
fn loader_without_btf<'a>() -> EbpfLoader<'a> {
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit { current: Some(0), ..before };
    let is_limited = setrlimit(Resource::Nofile, none).is_ok();
    let loader = EbpfLoader::new();
    if is_limited {
        // What was allowed before is allowed again.
        let _ = setrlimit(Resource::Nofile, before);
    }
    loader
}

/// A program that runs on request only; most runs need not all of them.
pub(super) fn on_request<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut RawTracePoint> {
    let program: &mut RawTracePoint = program(ebpf, name)
        .and_then(TryInto::try_into)
        .map_err(Error::run(format!("the eBPF object is damaged: {name}")))?;
    if program.fd().is_err() {
        program.load().map_err(Error::run(format!("the kernel refused the program {name}")))?;
    }
    Ok(program)
}

/// Attaches every hook of a backend, or detaches again and says which one the kernel refused.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    kernel: &KernelBtf,
    backend: Backend,
    events: u32,
) -> std::result::Result<Attempt, String> {
    let mut attempt = Attempt::default();
    let mut without = HashSet::new();
    let wanted = |hook: &&Hook| match hook.need {
        Need::WithArguments(count, _) => kernel.layout.unix_find_arguments == Some(count),
        _ => hook.events == 0 || hook.events & events != 0,
    };
    for hook in backend.hooks().filter(wanted) {
        match attach_one(ebpf, kernel, hook) {
            Ok(()) => attempt.attached.push(hook.program),
            Err(error) => {
                let reason = format!("{}: {}", hook.target, explain(&error));
                ::log::debug!("{} not attached: {reason}", hook.program);
                match hook.need {
                    Need::Required => {
                        detach(ebpf, backend);
                        let forbidden = reason.contains(FORBIDDEN);
                        let needs = format!("{reason}; needs {}", backend.needs());
                        return Err(if forbidden { reason } else { needs });
                    }
                    Need::WhereItExists => {}
                    Need::For(what) | Need::WithArguments(_, what) => {
                        if without.insert(what) {
                            attempt.without.push((what, reason));
                        }
                    }
                }
            }
        }
    }
    let known = |count| backend.hooks().any(|hook| is_for(hook, count));
    let found = kernel.layout.unix_find_arguments;
    if backend == Backend::Fentry && !found.is_some_and(known) && without.insert(UNIX_COUNTS) {
        let reason = format!("unix_find_other has {found:?} arguments");
        attempt.without.push((UNIX_COUNTS, reason));
    }
    Ok(attempt)
}

/// Whether a hook is for a function with so many arguments.
fn is_for(hook: &Hook, count: u32) -> bool {
    matches!(hook.need, Need::WithArguments(wanted, _) if wanted == count)
}

fn detach(ebpf: &mut Ebpf, backend: Backend) {
    for hook in backend.hooks() {
        // Failure means that it was not loaded.
        let _ = match program(ebpf, hook.program) {
            Ok(Program::FEntry(program)) => program.unload(),
            Ok(Program::FExit(program)) => program.unload(),
            Ok(Program::KProbe(program)) => program.unload(),
            Ok(Program::BtfTracePoint(program)) => program.unload(),
            Ok(Program::TracePoint(program)) => program.unload(),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
    }
}

fn attach_one(
    ebpf: &mut Ebpf,
    kernel: &KernelBtf,
    hook: &Hook,
) -> std::result::Result<(), ProgramError> {
    let program = program(ebpf, hook.program)?;
    let btf = &kernel.ids;
    match hook.kind {
        Kind::Fentry => {
            let program: &mut FEntry = program.try_into()?;
            program.load(hook.target, btf)?;
            program.attach()?;
        }
        Kind::Fexit => {
            let program: &mut FExit = program.try_into()?;
            program.load(hook.target, btf)?;
            program.attach()?;
        }
        Kind::Kprobe => {
            let program: &mut KProbe = program.try_into()?;
            program.load()?;
            program.attach(hook.target, 0)?;
        }
        Kind::BtfTracepoint => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(hook.target, btf)?;
            program.attach()?;
        }
        Kind::Tracepoint(category) => {
            let program: &mut TracePoint = program.try_into()?;
            program.load()?;
            program.attach(category, hook.target)?;
        }
    }
    Ok(())
}

fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> std::result::Result<&'a mut Program, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)
}

const FORBIDDEN: &str = "forbidden by a policy of this kernel, or by its verifier";

/// The innermost cause, without the verifier's log, on one line.
fn explain(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        ::log::debug!("{verifier_log}");
        if io_error.kind() == std::io::ErrorKind::PermissionDenied {
            return format!("{FORBIDDEN} ({io_error})");
        }
        return format!("the kernel does not take the program ({io_error})");
    }
    let mut cause: &dyn std::error::Error = error;
    let mut text = cause.to_string();
    while let Some(next) = cause.source() {
        cause = next;
        let inner = cause.to_string();
        if !text.contains(&inner) {
            text = format!("{text}: {inner}");
        }
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use aya_obj::btf::BtfKind;

    use super::*;

    #[test]
    fn ids_agree_with_all_of_the_types() {
        let all = Btf::from_sys_fs().unwrap();
        let ids = KernelBtf::read().unwrap().ids;
        for hook in Backend::ALL.into_iter().flat_map(Backend::hooks) {
            let function = hook.btf_function().map(|name| (name, BtfKind::Func));
            let tracepoint = hook.btf_tracepoint().map(|name| (name, BtfKind::Typedef));
            for (name, kind) in function.into_iter().chain(tracepoint) {
                let id = |btf: &Btf| btf.id_by_type_name_kind(&name, kind).ok();
                assert_eq!(id(&ids), id(&all), "{name}");
            }
        }
    }

    #[test]
    fn descriptors_can_be_had_again() {
        let before = getrlimit(Resource::Nofile);
        let _ = loader_without_btf();
        assert_eq!(getrlimit(Resource::Nofile), before);
    }
}
