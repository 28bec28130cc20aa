//! AF_UNIX listeners as netlink `sock_diag` lists them.

use std::{io, ops::ControlFlow};

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::unix::{
    ShowFlags, StateFlags, UnixRequest, UnixResponse,
    nlas::{Nla, UnixDiagName},
};

use super::{
    netlink,
    netns::{self, NetnsPath},
};

const SOCK_SEQPACKET: u8 = 5;
/// `UDIAG_SHOW_UID` and what it asks for (include/uapi/linux/unix_diag.h); since 5.3.
const UDIAG_SHOW_UID: u32 = 0x40;
const UNIX_DIAG_UID: u16 = 7;

/// A listening AF_UNIX socket, SOCK_STREAM or SOCK_SEQPACKET: others cannot listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixListener {
    pub inode: u64,
    pub cookie: u64,
    pub seqpacket: bool,
    /// `sun_path`: a path without the NUL at its end, or an abstract name, which begins with NUL and
    /// may hold any byte. `None` where it is not bound; the kernel lets no such socket listen
    /// (`unix_listen`).
    pub name: Option<Vec<u8>>,
    /// Length of the receive queue, where connections wait that nobody has accepted.
    pub accept_depth: u32,
    /// The queue may be one longer than this (`unix_recvq_full`).
    pub accept_limit: u32,
    /// Who created it, or whom it was given to, as seen from this process's user namespace.
    pub uid: Option<u32>,
}

/// Asks for the AF_UNIX listeners of a namespace. A path is reachable from any other, but a socket
/// belongs to the one it was created in.
pub(super) fn dump(netns: &NetnsPath) -> io::Result<Vec<UnixListener>> {
    netns::within(netns, || {
        let uid = ShowFlags::from_bits_retain(UDIAG_SHOW_UID);
        let request = UnixRequest {
            state_flags: StateFlags::LISTEN,
            inode: 0,
            show_flags: ShowFlags::NAME | ShowFlags::RQLEN | uid,
            cookie: [0xff; 8],
        };
        let mut listeners = Vec::new();
        netlink::unix(request, |response| {
            listeners.extend(listener(&response));
            ControlFlow::Continue(())
        })?;
        Ok(listeners)
    })
}

fn listener(response: &UnixResponse) -> Option<UnixListener> {
    let header = &response.header;
    // Of a listener these are its queue and its backlog (`sk_diag_show_rqlen`, net/unix/diag.c).
    let accept_depth = response.number_of_pending_connection()?;
    let accept_limit = response.max_number_of_pending_connection()?;
    let name = response.name().map(|name| match name {
        UnixDiagName::Pathname(path) => path.as_encoded_bytes().to_vec(),
        UnixDiagName::Abstract(name) => [&[0], name.as_slice()].concat(),
    });
    Some(UnixListener {
        inode: header.inode.into(),
        cookie: netlink::cookie(header.cookie),
        seqpacket: header.kind == SOCK_SEQPACKET,
        name,
        accept_depth,
        accept_limit,
        uid: response.nlas.iter().find_map(uid),
    })
}

fn uid(nla: &Nla) -> Option<u32> {
    let mut value = [0; 4];
    match nla {
        Nla::Other(other) if other.kind() == UNIX_DIAG_UID && other.value_len() == value.len() => {
            other.emit_value(&mut value);
            Some(u32::from_ne_bytes(value))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        io::ErrorKind,
        os::{fd::AsFd as _, unix::ffi::OsStrExt as _},
        path::{Path, PathBuf},
    };

    use rustix::{fs::fstat, net::sockopt::socket_cookie, process::geteuid};
    use socket2::{Domain, SockAddr, Socket, Type};

    use super::*;

    fn own() -> NetnsPath {
        let path = PathBuf::from("/proc/self/ns/net");
        NetnsPath { inode: netns::inode_at(&path).unwrap(), path, name: None }
    }

    fn address(name: &[u8]) -> SockAddr {
        SockAddr::unix(OsStr::from_bytes(name)).unwrap()
    }

    fn bound(name: &[u8], kind: Type) -> Socket {
        let socket = Socket::new(Domain::UNIX, kind, None).unwrap();
        socket.bind(&address(name)).unwrap();
        socket
    }

    fn inode(socket: &Socket) -> u64 {
        fstat(socket).unwrap().st_ino
    }

    /// What the dump says about a listener of the test's.
    fn listed(socket: &Socket) -> Option<UnixListener> {
        let inode = inode(socket);
        dump(&own()).unwrap().into_iter().find(|listener| listener.inode == inode)
    }

    /// Connects until the kernel lets no more in; returns who got in.
    fn fill(name: &[u8], kind: Type) -> Vec<Socket> {
        let mut clients = Vec::new();
        loop {
            let client = Socket::new(Domain::UNIX, kind, None).unwrap();
            client.set_nonblocking(true).unwrap();
            match client.connect(&address(name)) {
                Ok(()) => clients.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    return clients;
                }
            }
        }
    }

    fn check(name: &[u8], kind: Type, backlog: i32) {
        let socket = bound(name, kind);
        assert_eq!(listed(&socket), None, "it does not listen yet");
        socket.listen(backlog).unwrap();
        let limit = u32::try_from(backlog).unwrap();
        let mut expected = UnixListener {
            inode: inode(&socket),
            cookie: socket_cookie(socket.as_fd()).unwrap(),
            seqpacket: kind == Type::SEQPACKET,
            name: Some(name.to_vec()),
            accept_depth: 0,
            accept_limit: limit,
            uid: Some(geteuid().as_raw()),
        };
        assert_eq!(listed(&socket).unwrap(), expected);
        let clients = fill(name, kind);
        expected.accept_depth = limit + 1;
        assert_eq!(listed(&socket).unwrap(), expected);
        let child = socket.accept().unwrap();
        expected.accept_depth -= 1;
        assert_eq!(listed(&socket).unwrap(), expected);
        assert_eq!(listed(&clients[0]), None);
        assert_eq!(listed(&child.0), None);
    }

    /// Names that no other run of the tests uses.
    fn unique(rest: &[u8]) -> Vec<u8> {
        [format!("socktrace-{}-", std::process::id()).as_bytes(), rest].concat()
    }

    #[test]
    fn abstract_names_hold_any_byte() {
        let longest = [b'x'; 80];
        for (rest, kind, backlog) in [
            (&b"plain"[..], Type::STREAM, 7),
            (b"plain", Type::SEQPACKET, 3),
            (b"\0\n\x1b[31m\xff\xfe", Type::STREAM, 0),
            (b"a/b\0", Type::SEQPACKET, 1),
            (&longest, Type::STREAM, 1),
        ] {
            check(&[b"\0", unique(rest).as_slice()].concat(), kind, backlog);
        }
    }

    #[test]
    fn paths_end_before_their_nul() {
        let directory = std::env::temp_dir();
        for (rest, kind, backlog) in [
            (&b"stream"[..], Type::STREAM, 5),
            (b"seqpacket", Type::SEQPACKET, 2),
            (b"not \xff utf-8\n", Type::STREAM, 1),
        ] {
            let path = directory.join(OsStr::from_bytes(&unique(rest)));
            check(path.as_os_str().as_bytes(), kind, backlog);
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn a_path_that_fills_its_field_has_no_nul_of_its_own() {
        const FIELD: usize = 108;
        let mut path = std::env::temp_dir().join(OsStr::from_bytes(&unique(b"long")));
        let missing = FIELD - path.as_os_str().len();
        path.as_mut_os_string().push("x".repeat(missing));
        let name = path.as_os_str().as_bytes();
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        // SAFETY: the closure writes a whole `sockaddr_un` into a buffer that has room for any
        // address, and says so.
        let ((), whole) = unsafe {
            SockAddr::try_init(|storage, length| {
                let sun = &mut *storage.cast::<libc::sockaddr_un>();
                sun.sun_family = libc::AF_UNIX as libc::sa_family_t;
                for (to, from) in sun.sun_path.iter_mut().zip(name) {
                    *to = *from as libc::c_char;
                }
                *length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
                Ok(())
            })
        }
        .unwrap();
        socket.bind(&whole).unwrap();
        socket.listen(1).unwrap();
        std::fs::remove_file(Path::new(OsStr::from_bytes(name))).unwrap();
        assert_eq!(listed(&socket).unwrap().name.unwrap(), name);
    }

    #[test]
    fn what_does_not_listen_is_left_out() {
        let (one, other) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let datagram = bound(&[b"\0", unique(b"datagram").as_slice()].concat(), Type::DGRAM);
        for socket in [one, other, datagram] {
            assert_eq!(listed(&socket), None);
        }
        let unbound = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        assert_eq!(unbound.listen(1).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
