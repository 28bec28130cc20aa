//! Finds listeners that are older than the trace: from a process and a file descriptor, which
//! `/proc` names, to the socket. Nothing in the process is touched; every pointer is checked against
//! what `/proc` and the kernel said of the socket before it is believed.

use aya_ebpf::{
    helpers::generated::bpf_get_current_task, macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use socktrace_common::{
    IPPROTO_MPTCP, IPPROTO_TCP, TaskEntry, WALK_BATCH, tcp_state,
};

use crate::{
    layout as at, listener, maps,
    mem::{Mem, Probe, present},
    snapshot,
};

/// Visits the next [`WALK_BATCH`] processes after the task `arg(0)`; 0 begins at the caller.
#[raw_tracepoint]
pub(crate) fn walk_tasks(ctx: RawTracePointContext) -> i32 {
    let start: u64 = ctx.arg(0);
    let mut task = start as *const u8;
    if task.is_null() {
        // SAFETY: a plain helper call; `Probe` survives any address.
        let leader = unsafe {
            let current = bpf_get_current_task() as *const u8;
            Probe::read::<*const u8>(current, at::TASK_LEADER.load())
        };
        let Some(leader) = leader else { return -1 };
        task = leader;
    }
    for i in 0..WALK_BATCH {
        let Some(entry) = maps::TASKS.get_ptr_mut(i) else { return -1 };
        // SAFETY: `Probe` survives any address; array elements live as long as the map.
        let next = unsafe {
            *entry = TaskEntry::default();
            let Some(tgid) = Probe::read::<u32>(task, at::TASK_TGID.load()) else { return -1 };
            (*entry).task = task as u64;
            (*entry).tgid = tgid;
            Probe::read::<*const u8>(task, at::TASK_TASKS.load())
        };
        let Some(next) = next else { return -1 };
        task = next.wrapping_sub(at::TASK_TASKS.load() as usize);
    }
    if let Some(entry) = maps::TASKS.get_ptr_mut(WALK_BATCH) {
        // SAFETY: array elements live as long as the map.
        unsafe { (*entry).task = task as u64 };
    }
    0
}

/// Takes in the listener behind file descriptor `arg(2)` of task `arg(0)`, thread group `arg(1)`,
/// if its inode is `arg(3)`. Returns the slot plus one, or 0.
#[raw_tracepoint]
pub(crate) fn adopt_fd(ctx: RawTracePointContext) -> i32 {
    // SAFETY: `Probe` survives any address.
    let sk = unsafe { socket_at(ctx.arg::<u64>(0) as *const u8, ctx.arg(1), ctx.arg(2), ctx.arg(3)) };
    let Some(sk) = sk else { return 0 };
    let slot = match maps::slot_of(sk) {
        Some(slot) => Some(slot),
        None => listener::adopt(sk),
    };
    slot.map_or(0, |slot| slot as i32 + 1)
}

/// The listening TCP socket behind a file descriptor, if it is the one with that inode.
#[inline(always)]
unsafe fn socket_at(task: *const u8, tgid: u64, fd: u64, inode: u64) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if u64::from(Probe::read::<u32>(task, at::TASK_TGID.load())?) != tgid {
            return None;
        }
        let sk = listening(fd_to_sk(task, fd)?)?;
        (snapshot::inode_of(sk)? == inode).then_some(sk)
    }
}

/// `task->files->fdt->fd[fd]->private_data->sk`
#[inline(always)]
pub(crate) unsafe fn fd_to_sk(task: *const u8, fd: u64) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let files: *const u8 = Probe::read(task, at::TASK_FILES.load())?;
        let fdt: *const u8 = Probe::read(files, at::FILES_FDT.load())?;
        if fd >= u64::from(Probe::read::<u32>(fdt, at::FDT_MAX.load())?) {
            return None;
        }
        let table: *const u8 = Probe::read(fdt, at::FDT_FD.load())?;
        let file: *const u8 = Probe::read(table.wrapping_add(fd as usize * 8), 0)?;
        if file.is_null() {
            return None;
        }
        let socket: *const u8 = Probe::read(file, at::FILE_PRIVATE.load())?;
        let file_inode: *const u8 = Probe::read(file, at::FILE_INODE.load())?;
        // Only a socket's file has the inode that lies beside the `struct socket`.
        if file_inode != socket.wrapping_add(at::SOCKET_VFS_INODE.load() as usize) {
            return None;
        }
        Probe::read(socket, at::SOCKET_SK.load())
    }
}

/// The TCP socket that really listens: an MPTCP socket listens through its first subflow.
#[inline(always)]
pub(crate) unsafe fn listening(sk: *const u8) -> Option<*const u8> {
    let mut sk = sk;
    // SAFETY: `Probe` survives any address.
    unsafe {
        if Probe::read::<u16>(sk, at::SK_PROTOCOL.load())? == IPPROTO_MPTCP {
            if !present(at::MPTCP_FIRST.load()) {
                return None;
            }
            sk = Probe::read(sk, at::MPTCP_FIRST.load())?;
        }
        let tcp = Probe::read::<u16>(sk, at::SK_PROTOCOL.load())? == IPPROTO_TCP;
        let listens = Probe::read::<u8>(sk, at::SK_STATE.load())? == tcp_state::LISTEN;
        (tcp && listens).then_some(sk)
    }
}
