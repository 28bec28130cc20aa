//! The least that tracing can cost: programs without a single instruction of work, on the functions
//! that every tool of this kind has to hook.

use std::{
    error::Error,
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `enum bpf_cmd`, `bpf_prog_type` and `bpf_attach_type` of the kernel's interface.
const PROG_LOAD: u32 = 5;
const RAW_TRACEPOINT_OPEN: u32 = 17;
const TRACING: u32 = 26;
const FENTRY: u32 = 24;
const FEXIT: u32 = 25;

/// `r0 = 0; exit`
const EMPTY: [u64; 2] = [0xb7, 0x95];

/// `union bpf_attr` as far as loading a program goes.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    _log_to_name: [u64; 5],
    _ifindex: u32,
    expected_attach_type: u32,
    _infos: [u32; 9],
    attach_btf_id: u32,
    _attach_fd: u64,
}

#[repr(C)]
struct Open {
    name: u64,
    prog_fd: u32,
    _zero: u32,
}

/// Attaches, says so, and stays until it is killed.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    let btf = fs::read("/sys/kernel/btf/vmlinux")?;
    let mut attached = Vec::new();
    for (function, kind) in [("tcp_conn_request", FENTRY), ("inet_csk_accept", FEXIT)] {
        let id = id_of(function, &btf).ok_or(format!("this kernel has no {function}"))?;
        attached.push(attach(id, kind).map_err(|error| format!("{function}: {error}"))?);
    }
    drop(btf);
    eprintln!("{}", super::tools::READY);
    loop {
        std::thread::park();
    }
}

/// The program and its link, which live as long as their descriptors.
fn attach(function: u32, kind: u32) -> io::Result<[OwnedFd; 2]> {
    let load = Load {
        prog_type: TRACING,
        insn_cnt: EMPTY.len() as u32,
        insns: EMPTY.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: kind,
        attach_btf_id: function,
        ..Load::default()
    };
    // SAFETY: the pointers in it are to constants.
    let program = unsafe { bpf(PROG_LOAD, &load) }?;
    let prog_fd = program.as_raw_fd() as u32;
    // SAFETY: there is no pointer in it.
    let link = unsafe { bpf(RAW_TRACEPOINT_OPEN, &Open { name: 0, prog_fd, _zero: 0 }) }?;
    Ok([program, link])
}

/// # Safety
///
/// `attributes` is what the command takes, and pointers in it are valid.
unsafe fn bpf<T>(command: u32, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as much as it is told that there is.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The number of a function in the kernel's type information
/// (https://docs.kernel.org/bpf/btf.html, "BTF Type and String Encoding").
fn id_of(function: &str, btf: &[u8]) -> Option<u32> {
    const FUNC: u32 = 12;
    let word = |at: usize| Some(u32::from_ne_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    let header = |at: usize| word(at).map(|value| value as usize);
    let start = header(4)?;
    let types = start + header(8)?;
    let end = types + header(12)?;
    let names = start + header(16)?;
    let name = [function.as_bytes(), b"\0"].concat();
    let mut at = types;
    let mut id = 1;
    while at < end {
        let info = word(at + 4)?;
        let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == FUNC && btf.get(names + header(at)?..)?.starts_with(&name) {
            return Some(id);
        }
        // What follows the twelve bytes that all types have.
        at += 12
            + match kind {
                // Integers, variables, tags.
                1 | 14 | 17 => 4,
                // Arrays.
                3 => 12,
                // Structures, unions, sections, enumerations of 64 bits.
                4 | 5 | 15 | 19 => 12 * members,
                // Enumerations, prototypes.
                6 | 13 => 8 * members,
                _ => 0,
            };
        id += 1;
    }
    None
}
