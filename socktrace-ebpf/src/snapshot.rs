//! Reads the listeners as they are now. Runs when the user side asks (`BPF_PROG_TEST_RUN`), and for
//! one listener when it closes.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};
use socktrace_common::{
    AF_INET, AF_INET6, AF_UNIX, FILL_BATCH, READ_DONE, READ_IPV6ONLY, READ_MIGRATES, READ_MPTCP,
    READ_REUSEPORT, READ_SEQPACKET, READ_SHUTDOWN, Reading, SNAPSHOT_BATCH, SOCK_SEQPACKET,
    slot_state,
};

use crate::{
    layout as at, maps,
    mem::{Mem, Probe, present, read_bit},
    waiting,
};

/// Reads the open slots from `arg(0)` on, [`SNAPSHOT_BATCH`] at most, `arg(1)` the end.
#[raw_tracepoint]
pub(crate) fn snapshot(ctx: RawTracePointContext) -> i32 {
    let first: u64 = ctx.arg(0);
    let end: u64 = ctx.arg(1);
    for i in 0..SNAPSHOT_BATCH {
        let index = first as u32 + i;
        if u64::from(index) >= end {
            break;
        }
        let Some(slot) = maps::SLOTS.get(index) else {
            break;
        };
        if slot.state == slot_state::OPEN {
            read(slot.sk as *const u8, index);
        }
    }
    0
}

/// Makes `arg(1)` slots below `arg(0)` free, downwards, [`FILL_BATCH`] at most.
#[raw_tracepoint]
pub(crate) fn fill_free(ctx: RawTracePointContext) -> i32 {
    let end = ctx.arg::<u64>(0) as u32;
    let most = ctx.arg::<u64>(1) as u32;
    for i in 0..FILL_BATCH {
        if i >= end || i >= most {
            break;
        }
        maps::release(end - 1 - i);
    }
    0
}

/// Reads the listener at `sk` into the reading of its slot.
#[inline(always)]
pub(crate) fn read(sk: *const u8, index: u32) {
    let Some(reading) = maps::READINGS.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: array elements live as long as the map.
    let reading = unsafe { &mut *reading };
    reading.flags = 0;
    // SAFETY: `Probe` survives any address.
    if let Some(flags) = unsafe { fill(sk, reading) } {
        reading.flags = flags | READ_DONE;
    }
}

#[inline(always)]
unsafe fn fill(sk: *const u8, to: &mut Reading) -> Option<u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        // Where that can be read, the rest can be.
        to.tcp_state = Probe::read(sk, at::SK_STATE.load())?;
        to.family = Probe::value(sk, at::SK_FAMILY.load());
        to.port = Probe::value(sk, at::SK_NUM.load());
        to.cookie = Probe::value(sk, at::SK_COOKIE.load());
        to.bound_if = Probe::value(sk, at::SK_BOUND_IF.load());
        to.uid = Probe::value(sk, at::SK_UID.load());
        to.accept_limit = Probe::value(sk, at::SK_MAX_ACK_BACKLOG.load());
        to.address = [0; 16];
        if to.family == AF_UNIX {
            return unix(sk, to);
        }
        to.accept_depth = Probe::value(sk, at::SK_ACK_BACKLOG.load());
        to.syn_depth = Probe::value(sk, at::ICSK_QLEN.load());
        to.syn_young = Probe::value(sk, at::ICSK_YOUNG.load());
        if to.family == AF_INET6 && present(at::SK_V6_RCV_SADDR.load()) {
            to.address = Probe::value(sk, at::SK_V6_RCV_SADDR.load());
        } else if to.family == AF_INET {
            let v4: [u8; 4] = Probe::value(sk, at::SK_RCV_SADDR.load());
            to.address[0] = v4[0];
            to.address[1] = v4[1];
            to.address[2] = v4[2];
            to.address[3] = v4[3];
        }
        to.inode = inode_of(sk)?;
        to.oldest_ns = oldest(sk).unwrap_or(0);

        let net: *const u8 = Probe::value(sk, at::SK_NET.load());
        to.netns = Probe::value(net, at::NET_INUM.load());
        to.somaxconn = Probe::value(net, at::NET_SOMAXCONN.load());
        to.max_syn_backlog = Probe::value(net, at::NET_MAX_SYN_BACKLOG.load());
        to.syncookies = u32::from(Probe::value::<u8>(net, at::NET_SYNCOOKIES.load()));

        let mut flags = 0;
        if read_bit(sk, at::SK_REUSEPORT.load()) {
            flags |= READ_REUSEPORT;
        }
        if read_bit(sk, at::SK_IPV6ONLY.load()) {
            flags |= READ_IPV6ONLY;
        }
        if present(at::TCP_IS_MPTCP.load())
            && Probe::value::<u8>(sk, at::TCP_IS_MPTCP.load()) & 1 == 1
        {
            flags |= READ_MPTCP;
        }
        if Probe::value::<u8>(sk, at::SK_SHUTDOWN.load()) != 0 {
            flags |= READ_SHUTDOWN;
        }
        if present(at::NET_MIGRATE_REQ.load())
            && Probe::value::<u8>(net, at::NET_MIGRATE_REQ.load()) != 0
        {
            flags |= READ_MIGRATES;
        }
        Some(flags)
    }
}

/// What of it an AF_UNIX listener has.
#[inline(always)]
unsafe fn unix(sk: *const u8, to: &mut Reading) -> Option<u8> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        to.accept_depth = Probe::value(sk, at::SK_RECEIVE_LEN.load());
        to.inode = inode_of(sk)?;
        let net: *const u8 = Probe::value(sk, at::SK_NET.load());
        to.netns = Probe::value(net, at::NET_INUM.load());
        to.somaxconn = Probe::value(net, at::NET_SOMAXCONN.load());
        (to.syn_depth, to.syn_young, to.port, to.oldest_ns) = (0, 0, 0, 0);
        let mut flags = 0;
        if Probe::value::<u16>(sk, at::SK_TYPE.load()) == SOCK_SEQPACKET {
            flags |= READ_SEQPACKET;
        }
        if Probe::value::<u8>(sk, at::SK_SHUTDOWN.load()) != 0 {
            flags |= READ_SHUTDOWN;
        }
        Some(flags)
    }
}

/// When the connection at the head of the accept queue got there; `None` when there is none.
#[inline(always)]
unsafe fn oldest(sk: *const u8) -> Option<u64> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let head: *const u8 = Probe::read(sk, at::ICSK_ACCEPT_HEAD.load())?;
        if head.is_null() {
            return None;
        }
        let child: *const u8 = Probe::read(head, at::REQ_CHILD.load())?;
        waiting::waiting_since(child)
    }
}

/// Inode of the socket's file, 0 when it has none (sockets of the kernel itself).
#[inline(always)]
pub(crate) unsafe fn inode_of(sk: *const u8) -> Option<u64> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        let socket: *const u8 = Probe::read(sk, at::SK_SOCKET.load())?;
        if socket.is_null() {
            return Some(0);
        }
        inode_of_socket(socket)
    }
}

/// The same for the `struct socket` itself.
#[inline(always)]
pub(crate) unsafe fn inode_of_socket(socket: *const u8) -> Option<u64> {
    // SAFETY: `Probe` survives any address.
    unsafe {
        // `struct socket` is the first member of `struct socket_alloc` (include/net/sock.h).
        let inode = socket.wrapping_add(at::SOCKET_VFS_INODE.load() as usize);
        Probe::read(inode, at::INODE_INO.load())
    }
}
