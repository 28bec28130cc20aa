//! An artificial client: packets by hand, through a TUN device, so that every one is countable.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
};

use super::lab::ip;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;

/// A segment that the server sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    /// The client's port.
    pub(crate) port: u16,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
}

impl Reply {
    pub(crate) fn is_syn_ack(&self) -> bool {
        self.flags == SYN_ACK
    }

    pub(crate) fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }
}

/// The server's and the client's side of the wire.
pub(crate) const SERVER4: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 1);
pub(crate) const BROADCAST4: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 255);
const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 2);
pub(crate) const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xcb, 0, 0, 0, 0, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xcb, 0, 0, 0, 0, 0, 2);

/// The end of a TUN device that a client sits at.
pub(crate) struct Wire {
    tun: File,
}

impl Wire {
    /// In this thread's namespace.
    pub(crate) fn new() -> Self {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .expect("/dev/net/tun");
        #[repr(C)]
        struct Request {
            name: [u8; 16],
            flags: i16,
            _rest: [u8; 22],
        }
        let mut request = Request { name: [0; 16], flags: 0, _rest: [0; 22] };
        request.name[..5].copy_from_slice(b"wire0");
        request.flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).expect("flags");
        // SAFETY: the structure is a `struct ifreq`.
        let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
        ip(&format!("addr add {SERVER4}/24 dev wire0"));
        // An address that is not checked for duplicates is usable at once.
        for knob in ["accept_dad", "disable_ipv6"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/wire0/{knob}"), "0");
        }
        ip("link set wire0 up");
        ip(&format!("addr add {SERVER6}/64 dev wire0"));
        // Where the kernel checks it for duplicates all the same, it takes a moment to be usable.
        let usable = || std::net::UdpSocket::bind((SERVER6, 0)).is_ok();
        for _ in 0..500 {
            if usable() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(usable(), "{SERVER6} cannot be used");
        Self { tun }
    }

    /// Sends one segment without data from a client's port, which acknowledges nothing.
    pub(crate) fn send(&mut self, from: u16, to: SocketAddr, flags: u8, sequence: u32) {
        self.send_with(from, to, flags, sequence, 0, b"");
    }

    /// Sends a SYN from an address of its own.
    pub(crate) fn syn_from(&mut self, client: Ipv4Addr, port: u16, to: SocketAddr) {
        let IpAddr::V4(server) = to.ip() else { panic!("IPv4 only") };
        let pseudo = [&client.octets()[..], &server.octets(), &[0, 6, 0, 20]].concat();
        let tcp = segment(&pseudo, (port, to.port()), SYN, (1000, 0), b"");
        let packet = [ipv4(client, server, 6, 40), tcp].concat();
        self.tun.write_all(&packet).expect("a packet into the TUN device");
    }

    /// Sends one segment from a client's port.
    pub(crate) fn send_with(
        &mut self,
        from: u16,
        to: SocketAddr,
        flags: u8,
        sequence: u32,
        acknowledged: u32,
        data: &[u8],
    ) {
        let length = u8::try_from(20 + data.len()).expect("a short segment");
        let tcp = |pseudo: &[u8]| {
            segment(pseudo, (from, to.port()), flags, (sequence, acknowledged), data)
        };
        let packet = match to.ip() {
            IpAddr::V4(server) => {
                let pseudo = [&CLIENT4.octets()[..], &server.octets(), &[0, 6, 0, length]].concat();
                [ipv4(CLIENT4, server, 6, 20 + length), tcp(&pseudo)].concat()
            }
            IpAddr::V6(server) => {
                let pseudo =
                    [&CLIENT6.octets()[..], &server.octets(), &[0, 0, 0, length, 0, 0, 0, 6]]
                        .concat();
                let mut header = vec![0x60, 0, 0, 0, 0, length, 6, 64];
                header.extend(CLIENT6.octets());
                header.extend(server.octets());
                [header, tcp(&pseudo)].concat()
            }
        };
        self.tun.write_all(&packet).expect("a packet into the TUN device");
    }

    /// Sends SYNs from `count` ports and returns the SYN-ACKs.
    pub(crate) fn syns(&mut self, first: u16, count: u16, to: SocketAddr) -> Vec<Reply> {
        for port in first..first + count {
            self.send(port, to, SYN, 1000);
        }
        self.replies().into_iter().filter(Reply::is_syn_ack).collect()
    }

    /// Finishes the handshakes that these SYN-ACKs began.
    pub(crate) fn acks(&mut self, to: SocketAddr, syn_acks: &[Reply]) {
        for reply in syn_acks {
            self.send_with(reply.port, to, ACK, 1001, reply.sequence.wrapping_add(1), b"");
        }
    }

    /// Tells the server that a SYN-ACK found nobody: host unreachable.
    pub(crate) fn unreachable(&mut self, from: SocketAddr, reply: &Reply) {
        let IpAddr::V4(server) = from.ip() else { panic!("IPv4 only") };
        // The packet it is about: its header and the first eight bytes behind.
        let mut about = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
        about.extend(server.octets());
        about.extend(CLIENT4.octets());
        about.extend(from.port().to_be_bytes());
        about.extend(reply.port.to_be_bytes());
        about.extend(reply.sequence.to_be_bytes());
        let mut icmp = vec![3, 1, 0, 0, 0, 0, 0, 0];
        icmp.extend(about);
        let sum = checksum(&icmp).to_be_bytes();
        icmp[2..4].copy_from_slice(&sum);
        let length = u8::try_from(20 + icmp.len()).expect("a short packet");
        let packet = [ipv4(CLIENT4, server, 1, length), icmp].concat();
        self.tun.write_all(&packet).expect("a packet into the TUN device");
    }

    /// A handshake from a port, from beginning to end; the SYN must be answered.
    pub(crate) fn handshake(&mut self, port: u16, to: SocketAddr) {
        self.send(port, to, SYN, 1000);
        let syn_ack = self.first_replies().into_iter().find(Reply::is_syn_ack).expect("a SYN-ACK");
        self.acks(to, &[syn_ack]);
    }

    /// What the server has sent so far: it answers at once or not at all.
    pub(crate) fn first_replies(&mut self) -> Vec<Reply> {
        self.read(|replies| replies.iter().any(Reply::is_syn_ack))
    }

    /// Reads what the server sent until nothing comes for a while.
    pub(crate) fn replies(&mut self) -> Vec<Reply> {
        self.read(|_| false)
    }

    fn read(&mut self, enough: impl Fn(&[Reply]) -> bool) -> Vec<Reply> {
        let mut packet = [0; 2048];
        let mut replies = Vec::new();
        let mut quiet = 0;
        while quiet < 10 && !enough(&replies) {
            match self.tun.read(&mut packet) {
                Ok(size) => {
                    quiet = 0;
                    let tcp = if packet[0] >> 4 == 4 { 20 } else { 40 };
                    let is_tcp = if tcp == 20 { packet[9] == 6 } else { packet[6] == 6 };
                    if is_tcp && size >= tcp + 20 {
                        let word = |at: usize| [packet[at], packet[at + 1]];
                        let [a, b] = word(tcp + 4);
                        let [c, d] = word(tcp + 6);
                        replies.push(Reply {
                            port: u16::from_be_bytes(word(tcp + 2)),
                            flags: packet[tcp + 13],
                            sequence: u32::from_be_bytes([a, b, c, d]),
                        });
                    }
                }
                Err(_) => {
                    quiet += 1;
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
        replies
    }

    /// How many SYN-ACKs the server sent.
    pub(crate) fn syn_acks(&mut self) -> usize {
        self.replies().iter().filter(|reply| reply.is_syn_ack()).count()
    }
}

/// The header of a packet from the client.
fn ipv4(client: Ipv4Addr, server: Ipv4Addr, protocol: u8, length: u8) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, length, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    header.extend(client.octets());
    header.extend(server.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    header
}

fn segment(
    pseudo: &[u8],
    (from, to): (u16, u16),
    flags: u8,
    (sequence, acknowledged): (u32, u32),
    data: &[u8],
) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(20 + data.len());
    tcp.extend(from.to_be_bytes());
    tcp.extend(to.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(data);
    let sum = checksum(&[pseudo, &tcp].concat()).to_be_bytes();
    tcp[16..18].copy_from_slice(&sum);
    tcp
}

/// RFC 1071
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(0)
}
