//! Finds listeners that are older than the trace, in the file descriptors of every process of the
//! machine, whichever namespaces it lives in. Nothing is touched, only read; a pointer is believed
//! when what it points to is consistent (a file whose inode lies beside its socket, a TCP socket in
//! LISTEN).

use aya_ebpf::{
    helpers::generated::bpf_get_current_task, macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use socktrace_common::{
    AF_INET6, AF_UNIX, FD_BATCH, HOLDER_WORDS, IPPROTO_MPTCP, IPPROTO_TCP, TaskEntry, WALK_BATCH,
    tcp_state,
};

use crate::{
    events, layout as at, listener, maps,
    mem::{Mem, Probe, present},
    snapshot, unix,
};

/// Visits the next [`WALK_BATCH`] processes from the task `arg(0)` on; 0 begins at the caller.
/// Answers how many were read; the element behind the last of a full batch is where to go on.
#[raw_tracepoint]
pub(crate) fn walk_tasks(ctx: RawTracePointContext) -> i32 {
    maps::answer(0);
    let start: u64 = ctx.arg(0);
    let mut task = start as *const u8;
    if task.is_null() {
        // SAFETY: a plain helper call; `Probe` survives any address.
        let leader = unsafe {
            let current = bpf_get_current_task() as *const u8;
            Probe::read::<*const u8>(current, at::TASK_LEADER.load())
        };
        let Some(leader) = leader else { return 0 };
        task = leader;
    }
    for i in 0..WALK_BATCH {
        let Some(entry) = maps::TASKS.get_ptr_mut(i) else { return 0 };
        // SAFETY: `Probe` survives any address; array elements live as long as the map.
        let next = unsafe {
            let Some(tgid) = Probe::read::<u32>(task, at::TASK_TGID.load()) else { return 0 };
            *entry = TaskEntry { task: task as u64, tgid, _reserved: 0 };
            Probe::read::<*const u8>(task, at::TASK_TASKS.load())
        };
        // A process that cannot be read is gone, and the way on with it.
        let Some(next) = next else { return 0 };
        task = next.wrapping_sub(at::TASK_TASKS.load() as usize);
        maps::answer(i + 1);
    }
    maps::go_on(task as u64);
    0
}

/// Looks for listeners among the [`FD_BATCH`] file descriptors from `arg(2)` on, of task `arg(0)`, thread
/// group `arg(1)`, and leaves their addresses in `TASKS`, 0 for none. Answers the size of its table of
/// descriptors, 0 when it is gone.
#[raw_tracepoint]
pub(crate) fn scan_fds(ctx: RawTracePointContext) -> i32 {
    // SAFETY: `Probe` survives any address.
    let size = unsafe { scan(ctx.arg::<u64>(0) as *const u8, ctx.arg(1), ctx.arg(2)) };
    maps::answer(size.unwrap_or(0));
    0
}

#[inline(always)]
unsafe fn scan(task: *const u8, tgid: u64, first: u64) -> Option<u32> {
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        look(task, tgid, first, |bit, sk| {
            let entry = maps::TASKS.get_ptr_mut(bit)?;
            if let Some(sk) = listening(sk) {
                (*entry).task = sk as u64;
            }
            Some(())
        })
    }
}

/// Hands the sockets among the [`FD_BATCH`] file descriptors from `first` on to `each`, with their number
/// from there; the words in `TASKS` are 0 before. Returns the size of the table of descriptors.
#[inline(always)]
unsafe fn look(
    task: *const u8,
    tgid: u64,
    first: u64,
    each: impl Fn(u32, *const u8) -> Option<()>,
) -> Option<u32> {
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        if u64::from(Probe::read::<u32>(task, at::TASK_TGID.load())?) != tgid {
            return None;
        }
        let fdt = fd_table(task)?;
        let size = Probe::read::<u32>(fdt, at::FDT_MAX.load())?;
        if first >= u64::from(size) {
            return Some(size);
        }
        for index in 0..WALK_BATCH {
            put(index, 0);
        }
        let open: *const u8 = Probe::read(fdt, at::FDT_OPEN.load())?;
        let open: u16 = Probe::read(open.wrapping_add(first as usize / 8), 0)?;
        for bit in 0..FD_BATCH {
            if open >> bit & 1 == 1
                && let Some(sk) = socket_at(fdt, first + u64::from(bit))
            {
                each(bit, sk)?;
            }
        }
        Some(size)
    }
}

/// Looks for sockets that hold a port among the [`FD_BATCH`] file descriptors from `arg(2)` on, of task
/// `arg(0)`, thread group `arg(1)`: of the namespace `arg(3)`, with the protocol and port `arg(4)`. Leaves what it
/// finds in `TASKS`, see [`HOLDER_WORDS`]. Answers the size of its table of descriptors, 0 when it is gone.
#[raw_tracepoint]
pub(crate) fn scan_port(ctx: RawTracePointContext) -> i32 {
    let wanted = (ctx.arg::<u64>(3) as u32, ctx.arg::<u64>(4) as u32);
    // SAFETY: `Probe` survives any address.
    let size = unsafe {
        look(ctx.arg::<u64>(0) as *const u8, ctx.arg(1), ctx.arg(2), |bit, sk| {
            holder(bit, sk, wanted);
            Some(())
        })
    };
    maps::answer(size.unwrap_or(0));
    0
}

/// Writes down a socket, if it is in this namespace and has this protocol and port.
#[inline(always)]
unsafe fn holder(bit: u32, sk: *const u8, (netns, protocol_port): (u32, u32)) {
    // SAFETY: `Probe` survives any address; array elements live as long as the map.
    unsafe {
        let port: u16 = Probe::value(sk, at::SK_NUM.load());
        let protocol: u16 = Probe::value(sk, at::SK_PROTOCOL.load());
        if u32::from(protocol) << 16 | u32::from(port) != protocol_port {
            return;
        }
        if events::netns_of(sk) != netns {
            return;
        }
        let family: u16 = Probe::value(sk, at::SK_FAMILY.load());
        let state: u8 = Probe::value(sk, at::SK_STATE.load());
        let address: u32 = Probe::value(sk, at::SK_RCV_SADDR.load());
        let mut words = [u64::from(address), 0];
        if family == AF_INET6 && present(at::SK_V6_RCV_SADDR.load()) {
            words = Probe::value(sk, at::SK_V6_RCV_SADDR.load());
        }
        let inode = snapshot::inode_of(sk).unwrap_or(0);
        put(bit * HOLDER_WORDS, inode);
        put(bit * HOLDER_WORDS + 1, words[0]);
        put(bit * HOLDER_WORDS + 2, words[1]);
        put(bit * HOLDER_WORDS + 3, u64::from(family) << 8 | u64::from(state));
    }
}

#[inline(always)]
unsafe fn put(index: u32, word: u64) {
    if let Some(entry) = maps::TASKS.get_ptr_mut(index) {
        // SAFETY: array elements live as long as the map.
        unsafe { (*entry).task = word };
    }
}

/// Takes in the listener at the address `arg(0)`, unless it is known or is none.
#[raw_tracepoint]
pub(crate) fn adopt_sk(ctx: RawTracePointContext) -> i32 {
    let sk = ctx.arg::<u64>(0) as *const u8;
    // SAFETY: `Probe` survives any address.
    if unsafe { listening(sk) } == Some(sk) && maps::slot_of(sk).is_none() {
        listener::adopt(sk);
    }
    0
}

#[inline(always)]
unsafe fn fd_table(task: *const u8) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let files: *const u8 = Probe::read(task, at::TASK_FILES.load())?;
        // Kernel threads and processes that end have none.
        if files.is_null() {
            return None;
        }
        Probe::read(files, at::FILES_FDT.load())
    }
}

/// The socket behind a file descriptor, if it is one.
#[inline(always)]
pub(crate) unsafe fn fd_to_sk(task: *const u8, fd: u64) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let fdt = fd_table(task)?;
        if fd >= u64::from(Probe::read::<u32>(fdt, at::FDT_MAX.load())?) {
            return None;
        }
        socket_at(fdt, fd)
    }
}

/// `fdt->fd[fd]->private_data->sk`, when that file is a socket.
#[inline(always)]
unsafe fn socket_at(fdt: *const u8, fd: u64) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let table: *const u8 = Probe::value(fdt, at::FDT_FD.load());
        let file: *const u8 = Probe::value(table.wrapping_add(fd as usize * 8), 0);
        if file.is_null() {
            return None;
        }
        let socket: *const u8 = Probe::value(file, at::FILE_PRIVATE.load());
        let inode: *const u8 = Probe::value(file, at::FILE_INODE.load());
        // Only a socket's file has the inode that lies beside the `struct socket` it points to.
        if socket.is_null() || inode != socket.wrapping_add(at::SOCKET_VFS_INODE.load() as usize) {
            return None;
        }
        Probe::read(socket, at::SOCKET_SK.load())
    }
}

/// Inode number of the running task's network namespace, 0 when it cannot be read.
#[inline(always)]
pub(crate) unsafe fn current_netns() -> u32 {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let task = bpf_get_current_task() as *const u8;
        let Some(proxy) = Probe::read::<*const u8>(task, at::TASK_NSPROXY.load()) else { return 0 };
        let Some(net) = Probe::read::<*const u8>(proxy, at::NSPROXY_NET.load()) else { return 0 };
        Probe::value(net, at::NET_INUM.load())
    }
}

/// What queues and is queued for an MPTCP socket is its first subflow; every other socket is itself.
///
/// # Safety
/// `sk` must be a `struct sock` pointer that `M` may read.
#[inline(always)]
pub(crate) unsafe fn first_subflow<M: Mem>(sk: *const u8) -> *const u8 {
    // SAFETY: the caller's promise; `Probe` survives any address.
    unsafe {
        let first = at::MPTCP_FIRST.load();
        if present(first) && M::read(sk, at::SK_PROTOCOL.load()) == Some(IPPROTO_MPTCP) {
            Probe::value(sk, first)
        } else {
            sk
        }
    }
}

/// The socket that really listens.
#[inline(always)]
pub(crate) unsafe fn listening(sk: *const u8) -> Option<*const u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        if Probe::value::<u16>(sk, at::SK_FAMILY.load()) == AF_UNIX {
            return unix::listens(sk).then_some(sk);
        }
        let sk = first_subflow::<Probe>(sk);
        let tcp = Probe::value::<u16>(sk, at::SK_PROTOCOL.load()) == IPPROTO_TCP;
        let listens = Probe::value::<u8>(sk, at::SK_STATE.load()) == tcp_state::LISTEN;
        (tcp && listens).then_some(sk)
    }
}
