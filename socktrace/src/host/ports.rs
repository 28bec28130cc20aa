//! Who holds a local port, and how many of a range are left.

use std::{io, net::IpAddr, ops::ControlFlow};

use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags,
};

use super::{
    bytecode, netlink,
    netns::{self, NetnsPath},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_SYN_RECV: u8 = 3;
const TCP_TIME_WAIT: u8 = 6;
/// `TCP_BOUND_INACTIVE` as a bit: TCP sockets that are bound, but neither listen nor are connected.
/// They are reported in state CLOSE. Kernels before 6.8 have no socket in such a state and list none.
const BOUND_INACTIVE: StateFlags = StateFlags::from_bits_retain(1 << 13);
const PORTS: usize = 1 << 16;

/// No more than this many holders of a port are listed.
pub const MOST_HOLDERS: usize = 64;

/// A socket with a local port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub address: IpAddr,
    pub port: u16,
    /// The kernel's number: 10 is LISTEN, 7 is CLOSE (bound to its port), 6 is TIME_WAIT. A UDP socket
    /// is in 1 when it is connected, else in 7.
    pub state: u8,
    /// 0 where it belongs to no process (any more): in TIME_WAIT, closed, not yet accepted.
    pub inode: u64,
    /// Of such sockets the kernel does not tell it.
    pub uid: Option<u32>,
    /// What SO_BINDTODEVICE bound it to, else 0.
    pub interface: u32,
    pub ipv6: bool,
}

/// How many ports of a range are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeUse {
    pub in_use: u32,
    /// Those of them that only connections in TIME_WAIT hold.
    pub time_wait: u32,
}

/// The sockets of a namespace with a local port, listeners first, then bound ones, then connections;
/// no more than `MOST_HOLDERS`. `protocol` is 6 for TCP, 17 for UDP.
pub fn holders(netns: &NetnsPath, protocol: u8, port: u16) -> io::Result<Vec<Holder>> {
    let bound = BOUND_INACTIVE | StateFlags::CLOSE;
    let connected = StateFlags::all().difference(StateFlags::LISTEN | StateFlags::CLOSE);
    netns::within(netns, || {
        let mut found = Vec::new();
        for states in [StateFlags::LISTEN, bound, connected] {
            for family in [AF_INET, AF_INET6] {
                if found.len() == MOST_HOLDERS {
                    return Ok(found);
                }
                let mut request = request(family, protocol, states.clone());
                // Bound sockets are not compared with this (`tcp_diag_dump`), so a filter says it too.
                request.socket_id.source_port = port;
                let filter = bytecode::local_ports(port, port);
                netlink::inet(request, Some(filter), |response| {
                    let header = &response.header;
                    // A request has its listener's port and holds none.
                    let half_open = header.state == TCP_SYN_RECV && header.inode == 0;
                    if header.socket_id.source_port == port && !half_open {
                        found.push(holder(header));
                    }
                    enough(found.len())
                })?;
            }
        }
        Ok(found)
    })
}

fn enough(found: usize) -> ControlFlow<()> {
    if found < MOST_HOLDERS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

fn holder(header: &InetResponseHeader) -> Holder {
    Holder {
        address: header.socket_id.source_address,
        port: header.socket_id.source_port,
        state: header.state,
        inode: header.inode.into(),
        uid: (header.inode != 0).then_some(header.uid),
        interface: header.socket_id.interface_id,
        ipv6: header.family == AF_INET6,
    }
}

/// How many of the TCP ports `low..=high` a connection to `to` cannot get, as `connect()` chooses
/// (`__inet_hash_connect`): those of connections from `from` to there, and those that belong to
/// somebody who listens or was bound to a port by number, whatever the address. Without `to`, how
/// many ports anything uses.
///
/// Less than the truth by the ports that `bind()` chose for sockets which are connected by now, by
/// those of connections whose listener is gone and of bound connections in TIME_WAIT: the kernel
/// passes them over too, but does not say which they are. Before 6.8 also by those of sockets that are
/// only bound. More by those in TIME_WAIT that `tcp_tw_reuse` gives away.
pub fn range_use(
    netns: &NetnsPath,
    low: u16,
    high: u16,
    to: Option<(IpAddr, u16)>,
    from: Option<IpAddr>,
) -> io::Result<RangeUse> {
    let from = from.filter(|address| !address.is_unspecified());
    let filter = match to {
        Some(to) => bytecode::in_the_way(low, high, to, from),
        None => bytecode::local_ports(low, high),
    };
    netns::within(netns, || {
        let mut live = Ports::new();
        let mut waiting = Ports::new();
        for family in [AF_INET, AF_INET6] {
            let request = request(family, IPPROTO_TCP, StateFlags::all() | BOUND_INACTIVE);
            netlink::inet(request, Some(filter.clone()), |response| {
                let waits = response.header.state == TCP_TIME_WAIT;
                let ports = if waits { &mut waiting } else { &mut live };
                let port = response.header.socket_id.source_port;
                if (low..=high).contains(&port) {
                    ports.insert(port);
                }
                ControlFlow::Continue(())
            })?;
        }
        Ok(RangeUse {
            in_use: live.count_with(&waiting, |live, waiting| live | waiting),
            time_wait: live.count_with(&waiting, |live, waiting| waiting & !live),
        })
    })
}

fn request(family: u8, protocol: u8, states: StateFlags) -> InetRequest {
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id }
}

/// A set of ports, a bit each.
struct Ports(Vec<u64>);

impl Ports {
    fn new() -> Self {
        Self(vec![0; PORTS / 64])
    }

    fn insert(&mut self, port: u16) {
        self.0[usize::from(port / 64)] |= 1 << (port % 64);
    }

    fn count_with(&self, other: &Self, both: impl Fn(u64, u64) -> u64) -> u32 {
        self.0.iter().zip(&other.0).map(|(a, b)| both(*a, *b).count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
        os::fd::{AsFd, AsRawFd as _},
        path::PathBuf,
        time::{Duration, Instant},
    };

    use rustix::{fs::fstat, process::geteuid};
    use socket2::{Domain, Socket, Type};

    use super::*;

    const IPPROTO_UDP: u8 = 17;
    const ESTABLISHED: u8 = 1;
    const CLOSE: u8 = 7;
    const LISTEN: u8 = 10;

    fn own() -> NetnsPath {
        let path = PathBuf::from("/proc/self/ns/net");
        NetnsPath { inode: netns::inode_at(&path).unwrap(), path, name: None }
    }

    fn kernel_has(major: u32, minor: u32) -> bool {
        let release = super::super::release();
        let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap()) >= (major, minor)
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn tcp(local: SocketAddr) -> Socket {
        let socket = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&local.into()).unwrap();
        socket
    }

    fn local(socket: &Socket) -> SocketAddr {
        socket.local_addr().unwrap().as_socket().unwrap()
    }

    /// Two sockets at one port; the first had the kernel choose it, the second asked for it.
    fn two_at_one_port() -> [Socket; 2] {
        let first = tcp(address("127.0.0.1:0"));
        let second = tcp(local(&first));
        [first, second]
    }

    /// A connection whose port `connect()` chose, and the other end of it.
    fn connect(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        (client, server)
    }

    /// The holders of a port that have this address. Others may have the same port: connections of
    /// theirs, and whoever is bound to another address.
    fn at(protocol: u8, local: SocketAddr) -> Vec<Holder> {
        let mut found = holders(&own(), protocol, local.port()).unwrap();
        found.retain(|holder| holder.address == local.ip());
        found
    }

    /// Leaves a connection in TIME_WAIT at the client's side, which has an address nobody else uses.
    fn time_wait(listener: &TcpListener) -> SocketAddr {
        let client = tcp(address("127.0.0.3:0"));
        let bound = local(&client);
        client.connect(&listener.local_addr().unwrap().into()).unwrap();
        let (server, _) = listener.accept().unwrap();
        drop(client);
        // The server's FIN has to come second, or it would be the one that waits.
        assert_eq!(std::io::Read::read(&mut &server, &mut [0]).unwrap(), 0);
        drop(server);
        eventually(|| {
            let found = at(IPPROTO_TCP, bound);
            found.len() == 1 && found[0].state == TCP_TIME_WAIT
        });
        bound
    }

    /// The other end of a connection may be a moment behind.
    fn eventually(holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
    }

    fn expect(socket: impl AsFd, address: SocketAddr, state: u8) -> Holder {
        Holder {
            address: address.ip(),
            port: address.port(),
            state,
            inode: fstat(socket).unwrap().st_ino,
            uid: Some(geteuid().as_raw()),
            interface: 0,
            ipv6: address.is_ipv6(),
        }
    }

    #[test]
    fn a_listener_comes_before_its_connections() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(any).unwrap();
            let bound = listener.local_addr().unwrap();
            let listening = expect(&listener, bound, LISTEN);
            assert_eq!(at(IPPROTO_TCP, bound), std::slice::from_ref(&listening));
            let client = TcpStream::connect(bound).unwrap();
            eventually(|| at(IPPROTO_TCP, bound).len() > 1);
            let waiting = Holder { inode: 0, uid: None, state: ESTABLISHED, ..listening.clone() };
            assert_eq!(at(IPPROTO_TCP, bound), [listening.clone(), waiting]);
            let (server, peer) = listener.accept().unwrap();
            let accepted = expect(&server, bound, ESTABLISHED);
            assert_eq!(at(IPPROTO_TCP, bound), [listening, accepted]);
            assert!(at(IPPROTO_TCP, peer).contains(&expect(&client, peer, ESTABLISHED)));
        }
    }

    #[test]
    fn a_connection_in_time_wait_belongs_to_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bound = time_wait(&listener);
        let expected = Holder { inode: 0, uid: None, ..expect(&listener, bound, TCP_TIME_WAIT) };
        assert_eq!(at(IPPROTO_TCP, bound), [expected]);
    }

    #[test]
    fn sockets_that_are_only_bound_are_seen_since_6_8() {
        for any in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let socket = tcp(address(any));
            let bound = local(&socket);
            let expected = kernel_has(6, 8).then(|| expect(&socket, bound, CLOSE));
            assert_eq!(at(IPPROTO_TCP, bound), expected.as_slice());
        }
    }

    #[test]
    fn udp_sockets_hold_ports_of_their_own() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let bound = socket.local_addr().unwrap();
        assert_eq!(at(IPPROTO_UDP, bound), [expect(&socket, bound, CLOSE)]);
        // The same number of the other protocol is another port.
        let inode = fstat(&socket).unwrap().st_ino;
        assert!(at(IPPROTO_TCP, bound).iter().all(|holder| holder.inode != inode));
        socket.connect(bound).unwrap();
        assert_eq!(at(IPPROTO_UDP, bound), [expect(&socket, bound, ESTABLISHED)]);
    }

    #[test]
    fn the_interface_is_the_one_it_is_bound_to() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind_device(Some(b"lo")).unwrap();
        socket.bind(&address("0.0.0.0:0").into()).unwrap();
        socket.listen(1).unwrap();
        let bound = local(&socket);
        let expected = Holder { interface: 1, ..expect(&socket, bound, LISTEN) };
        assert_eq!(at(IPPROTO_TCP, bound), [expected]);
    }

    #[test]
    fn there_is_an_end_to_the_list() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = SocketAddr::new(address("127.0.0.1:0").ip(), port);
        let _clients: Vec<_> =
            (0..=MOST_HOLDERS).map(|_| TcpStream::connect(to).unwrap()).collect();
        eventually(|| holders(&own(), IPPROTO_TCP, port).unwrap().len() == MOST_HOLDERS);
        let found = holders(&own(), IPPROTO_TCP, port).unwrap();
        assert_eq!(found.len(), MOST_HOLDERS);
        assert_eq!(found[0].state, LISTEN);
        assert!(found[1..].iter().all(|holder| holder.state == ESTABLISHED && holder.ipv6));
    }

    /// Whether `connect()` takes a port when it has no other to choose from; since 6.3.
    fn connects(from: u16, to: SocketAddr) -> bool {
        // IP_LOCAL_PORT_RANGE (include/uapi/linux/in.h)
        const RANGE: libc::c_int = 51;
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        let range = u32::from(from) << 16 | u32::from(from);
        // SAFETY: the kernel reads the four bytes of a number that lives until it has.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                RANGE,
                std::ptr::from_ref(&range).cast(),
                size_of_val(&range) as libc::socklen_t,
            )
        };
        assert_eq!(result, 0);
        match socket.connect(&to.into()) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
                false
            }
        }
    }

    /// Whether a port is taken for a connection to `to`, by this module and by `connect()`.
    fn check(port: u16, to: SocketAddr, expected: bool) {
        let found = range_use(&own(), port, port, Some((to.ip(), to.port())), None).unwrap();
        assert_eq!(found, RangeUse { in_use: expected.into(), time_wait: 0 }, "{port} to {to}");
        if kernel_has(6, 3) {
            assert_eq!(!connects(port, to), expected, "{port} to {to}");
        }
    }

    #[test]
    fn a_connection_takes_its_port_from_one_destination() {
        let [v4, other_v4] = ["127.0.0.1:0"; 2].map(|any| TcpListener::bind(any).unwrap());
        let [v6, other_v6] = ["[::1]:0"; 2].map(|any| TcpListener::bind(any).unwrap());
        for (listener, other) in [(&v4, &other_v4), (&v6, &other_v6)] {
            let (client, _server) = connect(listener);
            let port = client.local_addr().unwrap().port();
            check(port, listener.local_addr().unwrap(), true);
            check(port, other.local_addr().unwrap(), false);
        }
        // An IPv6 socket that talks IPv4 is in the way of IPv4.
        let to = v4.local_addr().unwrap();
        let mapped = SocketAddr::new(address("[::ffff:127.0.0.1]:0").ip(), to.port());
        let client = TcpStream::connect(mapped).unwrap();
        let port = client.local_addr().unwrap().port();
        check(port, to, true);
        check(port, mapped, true);
    }

    #[test]
    fn whoever_is_bound_takes_a_port_from_all() {
        let [one, other] = ["127.0.0.1:0"; 2].map(|any| TcpListener::bind(any).unwrap());
        let [one, other] = [&one, &other].map(|listener| listener.local_addr().unwrap());
        // By its own listener, on whatever address and of whatever family.
        for any in ["127.0.0.1:0", "127.0.0.2:0", "[::1]:0"] {
            let listener = TcpListener::bind(any).unwrap();
            check(listener.local_addr().unwrap().port(), one, true);
            if kernel_has(6, 8) {
                let bound = tcp(address(any));
                check(local(&bound).port(), one, true);
            }
        }
        // By a connection that asked for the port by number.
        let [chosen, socket] = two_at_one_port();
        drop(chosen);
        socket.connect(&one.into()).unwrap();
        let port = local(&socket).port();
        check(port, one, true);
        check(port, other, true);
    }

    #[test]
    fn where_from_and_time_wait_are_told_apart() {
        let [listener, other] = ["127.0.0.1:0"; 2].map(|any| TcpListener::bind(any).unwrap());
        let [to, other] = [&listener, &other].map(|listener| listener.local_addr().unwrap());
        let (client, _server) = connect(&listener);
        let live = client.local_addr().unwrap().port();
        let waits = time_wait(&listener).port();
        let from = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let to_ = |to: SocketAddr| Some((to.ip(), to.port()));
        for (port, to, from, in_use, time_wait) in [
            (live, to_(to), None, 1, 0),
            (live, to_(to), from("127.0.0.1"), 1, 0),
            (live, to_(to), from("::ffff:127.0.0.1"), 1, 0),
            (live, to_(to), from("0.0.0.0"), 1, 0),
            (live, to_(to), from("127.0.0.2"), 0, 0),
            (live, to_(to), from("::1"), 0, 0),
            (live, to_(other), from("127.0.0.1"), 0, 0),
            (live, None, None, 1, 0),
            (waits, to_(to), None, 1, 1),
            (waits, to_(to), from("127.0.0.3"), 1, 1),
            (waits, to_(to), from("127.0.0.2"), 0, 0),
            (waits, to_(other), from("127.0.0.3"), 0, 0),
            (to.port(), to_(other), from("127.0.0.2"), 1, 0),
        ] {
            assert_eq!(
                range_use(&own(), port, port, to, from).unwrap(),
                RangeUse { in_use, time_wait },
                "{port} to {to:?} from {from:?}"
            );
        }
    }

    #[test]
    fn a_port_counts_once() {
        let [one, other] = ["127.0.0.1:0"; 2].map(|any| TcpListener::bind(any).unwrap());
        let to = one.local_addr().unwrap();
        let clients: Vec<_> = (0..5).map(|_| connect(&one)).collect();
        let ports: Vec<_> =
            clients.iter().map(|(client, _)| client.local_addr().unwrap().port()).collect();
        let own = own();
        // Other tests have ports among these, so what is known is a bound.
        let (low, high) = (*ports.iter().min().unwrap(), *ports.iter().max().unwrap());
        let found = range_use(&own, low, high, Some((to.ip(), to.port())), None).unwrap();
        assert!(found.in_use >= 5 && found.in_use <= u32::from(high - low) + 1, "{found:?}");
        assert_eq!(range_use(&own, high, low, None, None).unwrap().in_use, 0);
        // Two connections from one port.
        let two = two_at_one_port();
        for (socket, listener) in two.iter().zip([&one, &other]) {
            socket.connect(&listener.local_addr().unwrap().into()).unwrap();
        }
        let port = local(&two[0]).port();
        assert_eq!(local(&two[1]).port(), port);
        let found = range_use(&own, port, port, None, None).unwrap();
        assert_eq!(found, RangeUse { in_use: 1, time_wait: 0 });
    }

    #[test]
    fn a_set_of_ports_has_all_of_them() {
        let [mut one, mut other] = [Ports::new(), Ports::new()];
        for port in [0, 63, 64, 65535, 64] {
            one.insert(port);
        }
        other.insert(64);
        other.insert(1);
        assert_eq!(one.count_with(&other, |a, b| a | b), 5);
        assert_eq!(one.count_with(&other, |a, b| b & !a), 1);
    }
}
