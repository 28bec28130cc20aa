//! Connects that wait for an answer to their SYN, which was sent again already.

use std::{io, net::IpAddr, ops::ControlFlow};

use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags, Timer};

use super::{
    netlink,
    netns::{NetnsPath, within},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// More of them tell no more.
const MOST: usize = 1024;

/// A connect without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    pub source: IpAddr,
    pub destination: (IpAddr, u16),
    pub inode: u64,
    /// How often its SYN was sent again.
    pub again: u8,
}

/// Those of a namespace.
pub fn unanswered(netns: &NetnsPath) -> io::Result<Vec<Waits>> {
    within(netns, || {
        let mut found = Vec::new();
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let (extensions, states) = (ExtensionFlags::empty(), StateFlags::SYN_SENT);
            let request =
                InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id };
            netlink::inet(request, None, |response| {
                let header = &response.header;
                if let Some(Timer::Retransmit(_, again @ 1..)) = header.timer {
                    let to = &header.socket_id;
                    found.push(Waits {
                        source: to.source_address,
                        destination: (to.destination_address, to.destination_port),
                        inode: header.inode.into(),
                        again,
                    });
                }
                if found.len() < MOST { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
        }
        Ok(found)
    })
}
