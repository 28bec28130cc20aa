//! Two ways to read kernel memory, one interface.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::{
    bpf_probe_read_kernel, bpf_probe_read_user,
    generated::{
        bpf_get_current_task, bpf_probe_read_kernel as read_kernel, bpf_probe_read_kernel_str,
        bpf_skc_to_tcp_sock,
    },
};
use socktrace_common::{layout::ABSENT, stat};

use crate::{layout as at, maps};

/// How a program may read a kernel object.
pub(crate) trait Mem {
    /// Reads a `T` at `base + offset`; `None` when the kernel refused (and counted).
    ///
    /// # Safety
    /// `base` must be a pointer the verifier accepts for this way of reading.
    unsafe fn read<T: Copy>(base: *const u8, offset: u32) -> Option<T>;

    /// The listener as `struct tcp_sock`, which is what may be read beyond `struct sock`.
    ///
    /// # Safety
    /// `sk` must point to a `struct sock`.
    unsafe fn tcp_sock(sk: *const u8) -> Option<*const u8>;
}

/// Loads through a pointer whose type the verifier knows: fentry, fexit, BTF tracepoints.
pub(crate) struct Direct;

impl Mem for Direct {
    #[inline(always)]
    unsafe fn read<T: Copy>(base: *const u8, offset: u32) -> Option<T> {
        // SAFETY: the verifier checks the access against the kernel's own type; a load that faults
        // reads as zero.
        Some(unsafe { base.add(offset as usize).cast::<T>().read_volatile() })
    }

    #[inline(always)]
    unsafe fn tcp_sock(sk: *const u8) -> Option<*const u8> {
        // SAFETY: `sk` is a `struct sock` pointer of the program's context.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast_mut().cast()) };
        (!tcp.is_null()).then_some(tcp.cast_const().cast())
    }
}

/// Reads through `bpf_probe_read_kernel`: kprobes, and pointers that were found, not given.
pub(crate) struct Probe;

impl Mem for Probe {
    #[inline(always)]
    unsafe fn read<T: Copy>(base: *const u8, offset: u32) -> Option<T> {
        // SAFETY: the helper survives any address.
        match unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) } {
            Ok(value) => Some(value),
            Err(_) => {
                maps::count(stat::READ_FAILED);
                None
            }
        }
    }

    #[inline(always)]
    unsafe fn tcp_sock(sk: *const u8) -> Option<*const u8> {
        Some(sk)
    }
}

impl Probe {
    /// Reads a `T`; what the kernel refuses is counted and is all zeroes. Where a verifier has to follow what
    /// comes after `read` once with the value and once without, there is one way through this.
    ///
    /// # Safety
    /// All zeroes must be a `T`.
    #[inline(always)]
    pub(crate) unsafe fn value<T: Copy>(base: *const u8, offset: u32) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        let from = base.wrapping_add(offset as usize);
        // SAFETY: the helper survives any address, and clears what it could not fill.
        unsafe {
            let size = size_of::<T>() as u32;
            if read_kernel(value.as_mut_ptr().cast(), size, from.cast()) != 0 {
                maps::count(stat::READ_FAILED);
            }
            value.assume_init()
        }
    }
}

/// Whether the running kernel has the field.
#[inline(always)]
pub(crate) fn present(offset: u32) -> bool {
    offset != ABSENT
}

/// Reads one bit; `offset` counts bits from the start of the object.
#[inline(always)]
pub(crate) unsafe fn read_bit(base: *const u8, offset: u32) -> bool {
    // SAFETY: `Probe` survives any address.
    let byte: u8 = unsafe { Probe::value(base, offset / 8) };
    byte >> (offset % 8) & 1 == 1
}

/// Reads a `T` of the kernel's memory, or of the running task's.
///
/// # Safety
/// Any address will do.
#[inline(always)]
pub(crate) unsafe fn read_from<T: Copy>(from: *const u8, user: bool) -> Option<T> {
    // SAFETY: the helpers survive any address.
    unsafe {
        if user {
            bpf_probe_read_user(from.cast::<T>()).ok()
        } else {
            bpf_probe_read_kernel(from.cast::<T>()).ok()
        }
    }
}

/// The name of the running process, in words: bytes would be copied one by one. It belongs to the process
/// id that it stands beside, so it is the first thread's name, as `/proc/PID/comm` has it.
#[inline(always)]
pub(crate) fn current_comm() -> [u64; 2] {
    let mut comm = [0_u64; 2];
    // SAFETY: the helpers survive any address; the last one writes 16 bytes at most.
    let length = unsafe {
        let task = bpf_get_current_task() as *const u8;
        let leader: *const u8 = Probe::value(task, at::TASK_LEADER.load());
        // Up to the NUL: older kernels leave what was behind a longer name (`__set_task_comm`).
        let name = leader.wrapping_add(at::TASK_COMM.load() as usize);
        bpf_probe_read_kernel_str((&raw mut comm).cast(), 16, name.cast())
    };
    if length > 0 { comm } else { [0; 2] }
}
