//! The least that tracing can cost: programs without a single instruction of work, on the functions
//! that every tool of this kind has to hook.

use std::{
    error::Error,
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use btfparse::{ErrorKind, Readable, TypeInformation};

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
    let types = TypeInformation::new(&Bytes(fs::read("/sys/kernel/btf/vmlinux")?))
        .map_err(|error| error.message().to_owned())?;
    let mut attached = Vec::new();
    for (function, kind) in [("tcp_conn_request", FENTRY), ("inet_csk_accept", FEXIT)] {
        let id = types.id_of(function).ok_or(format!("this kernel has no {function}"))?;
        attached.push(attach(id, kind).map_err(|error| format!("{function}: {error}"))?);
    }
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

struct Bytes(Vec<u8>);

impl Readable for Bytes {
    fn read(&self, offset: u64, to: &mut [u8]) -> btfparse::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.0.get(at..at + to.len()));
        to.copy_from_slice(from.ok_or_else(|| btfparse::Error::new(ErrorKind::EOF, "the end"))?);
        Ok(())
    }
}
