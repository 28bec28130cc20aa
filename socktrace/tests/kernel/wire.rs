//! An artificial client: packets by hand, through a TUN device, so that every one is countable.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
};

use crate::lab::ip;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
const SYN_ACK: u8 = 0x12;

/// The server's and the client's side of the wire.
pub(crate) const SERVER4: Ipv4Addr = Ipv4Addr::new(10, 203, 0, 1);
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
        Self { tun }
    }

    /// Sends one segment from a client's port.
    pub(crate) fn send(&mut self, from: u16, to: SocketAddr, flags: u8, sequence: u32) {
        let tcp = |pseudo: &[u8]| segment(pseudo, from, to.port(), flags, sequence);
        let packet = match to.ip() {
            IpAddr::V4(server) => {
                let pseudo = [&CLIENT4.octets()[..], &server.octets(), &[0, 6, 0, 20]].concat();
                let mut header = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
                header.extend(CLIENT4.octets());
                header.extend(server.octets());
                let sum = checksum(&header).to_be_bytes();
                header[10..12].copy_from_slice(&sum);
                [header, tcp(&pseudo)].concat()
            }
            IpAddr::V6(server) => {
                let pseudo =
                    [&CLIENT6.octets()[..], &server.octets(), &[0, 0, 0, 20, 0, 0, 0, 6]].concat();
                let mut header = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
                header.extend(CLIENT6.octets());
                header.extend(server.octets());
                [header, tcp(&pseudo)].concat()
            }
        };
        self.tun.write_all(&packet).expect("a packet into the TUN device");
    }

    /// Reads what the server sent until nothing comes for a while; returns how many SYN-ACKs.
    pub(crate) fn syn_acks(&mut self) -> usize {
        let mut packet = [0; 2048];
        let mut count = 0;
        let mut quiet = 0;
        while quiet < 10 {
            match self.tun.read(&mut packet) {
                Ok(size) => {
                    quiet = 0;
                    let tcp = if packet[0] >> 4 == 4 { 20 } else { 40 };
                    let is_tcp = if tcp == 20 { packet[9] == 6 } else { packet[6] == 6 };
                    count += usize::from(size >= tcp + 14 && is_tcp && packet[tcp + 13] == SYN_ACK);
                }
                Err(_) => {
                    quiet += 1;
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
        count
    }
}

fn segment(pseudo: &[u8], from: u16, to: u16, flags: u8, sequence: u32) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(20);
    tcp.extend(from.to_be_bytes());
    tcp.extend(to.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
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
