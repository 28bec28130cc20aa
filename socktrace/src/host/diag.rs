//! Listeners as netlink `sock_diag` lists them: what can be known without eBPF.

use std::{collections::HashMap, io, net::IpAddr, ops::ControlFlow};

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla,
};

use super::{
    netlink,
    netns::{self, NetnsPath},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// `INET_DIAG_ULP_INFO` and, inside, `INET_ULP_INFO_NAME` (include/uapi/linux/inet_diag.h).
const INET_DIAG_ULP_INFO: u16 = 20;
const TCP_LISTEN: u8 = 10;

/// A listening TCP socket.
#[derive(Clone, Debug)]
pub struct DiagListener {
    pub cookie: u64,
    pub inode: u64,
    pub uid: u32,
    pub ipv6: bool,
    pub address: IpAddr,
    pub port: u16,
    pub interface: u32,
    pub v6only: Option<bool>,
    pub accept_depth: u32,
    pub accept_limit: u32,
    /// Whether it is the first subflow of an MPTCP listener; `None` where this user is not told.
    pub mptcp: Option<bool>,
}

/// The listeners of one namespace and its half-open requests by local address.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    pub listeners: Vec<DiagListener>,
    half_open: HashMap<(IpAddr, u16), u32>,
}

impl Dump {
    /// The SYN queue's depth of a listener, where its requests cannot belong to another one.
    ///
    /// A request knows its local address, not its listener, so a SO_REUSEPORT group has no answer.
    #[must_use]
    pub fn syn_depth(&self, of: &DiagListener) -> Option<u32> {
        let mut depth = 0;
        for (&(address, port), &count) in &self.half_open {
            if port != of.port {
                continue;
            }
            let Some(best) = self.listeners.iter().filter_map(|l| score(l, address, port)).max()
            else {
                continue;
            };
            let mut takers =
                self.listeners.iter().filter(|l| score(l, address, port) == Some(best));
            let mine = takers.clone().any(|l| l.cookie == of.cookie);
            if mine && takers.nth(1).is_some() {
                return None;
            }
            depth += if mine { count } else { 0 };
        }
        Some(depth)
    }
}

/// How well a listener fits a local address (`compute_score`, net/ipv4/inet_hashtables.c).
fn score(listener: &DiagListener, local: IpAddr, port: u16) -> Option<u32> {
    if listener.port != port {
        return None;
    }
    let v4 = match local {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => address.to_ipv4_mapped().is_some(),
    };
    let bound = !listener.address.is_unspecified();
    let fits = listener.address.to_canonical() == local.to_canonical();
    match (bound, listener.ipv6, v4) {
        (true, ..) if fits => Some(3),
        (true, ..) => None,
        (false, false, true) => Some(2),
        (false, false, false) => None,
        (false, true, true) if listener.v6only == Some(true) => None,
        (false, true, true) => Some(1),
        (false, true, false) => Some(2),
    }
}

/// Asks for the listeners of a namespace.
pub(super) fn dump(netns: &NetnsPath) -> io::Result<Dump> {
    netns::within(netns, || {
        let mut result = Dump::default();
        for family in [AF_INET, AF_INET6] {
            request(family, StateFlags::LISTEN | StateFlags::SYN_RECV, |response| {
                let header = &response.header;
                let id = &header.socket_id;
                if header.state == TCP_LISTEN {
                    result.listeners.push(listener(&response));
                } else if header.inode == 0 {
                    // A child of a Fast Open request is in this state too, but has no request.
                    *result.half_open.entry((id.source_address, id.source_port)).or_default() += 1;
                }
            })?;
        }
        Ok(result)
    })
}

fn listener(response: &InetResponse) -> DiagListener {
    let header = &response.header;
    let id = &header.socket_id;
    let mut v6only = None;
    let mut ulp = None;
    for nla in &response.nlas {
        match nla {
            Nla::SkV6Only(only) => v6only = Some(*only),
            Nla::Other(other) if other.kind() == INET_DIAG_ULP_INFO => {
                let mut value = vec![0; other.value_len()];
                other.emit_value(&mut value);
                ulp = Some(value.windows(5).any(|name| name == b"mptcp"));
            }
            _ => {}
        }
    }
    DiagListener {
        cookie: netlink::cookie(id.cookie),
        inode: header.inode.into(),
        uid: header.uid,
        ipv6: header.family == AF_INET6,
        address: id.source_address,
        port: id.source_port,
        interface: id.interface_id,
        v6only,
        accept_depth: header.recv_queue,
        accept_limit: header.send_queue,
        mptcp: ulp.or_else(|| super::Privileges::own().can_see_ulp().then_some(false)),
    }
}

fn request(family: u8, states: StateFlags, mut each: impl FnMut(InetResponse)) -> io::Result<()> {
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let extensions = ExtensionFlags::INFO;
    let request = InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id };
    netlink::inet(request, None, |response| {
        each(response);
        ControlFlow::Continue(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(cookie: u64, address: &str, v6only: Option<bool>) -> DiagListener {
        let address: IpAddr = address.parse().unwrap();
        DiagListener {
            cookie,
            inode: cookie,
            uid: 0,
            ipv6: address.is_ipv6(),
            address,
            port: 80,
            interface: 0,
            v6only,
            accept_depth: 0,
            accept_limit: 0,
            mptcp: Some(false),
        }
    }

    fn depths(listeners: Vec<DiagListener>, requests: &[(&str, u32)]) -> Vec<Option<u32>> {
        let half_open =
            requests.iter().map(|(address, n)| ((address.parse().unwrap(), 80), *n)).collect();
        let dump = Dump { listeners, half_open };
        dump.listeners.iter().map(|l| dump.syn_depth(l)).collect()
    }

    #[test]
    fn half_open_requests_go_to_the_listener_the_kernel_would_choose() {
        let one = listener(1, "0.0.0.0", None);
        assert_eq!(depths(vec![one.clone()], &[("10.0.0.1", 3), ("127.0.0.1", 4)]), [Some(7)]);
        // A bound address goes before the wildcard.
        let bound = listener(2, "10.0.0.1", None);
        assert_eq!(
            depths(vec![one.clone(), bound], &[("10.0.0.1", 3), ("127.0.0.1", 4)]),
            [Some(4), Some(3)]
        );
        // A dual-stack listener answers IPv4 clients only where nobody else does.
        let dual = listener(3, "::", Some(false));
        assert_eq!(depths(vec![dual.clone()], &[("10.0.0.1", 3), ("::1", 2)]), [Some(5)]);
        assert_eq!(depths(vec![one, dual], &[("10.0.0.1", 3), ("::1", 2)]), [Some(3), Some(2)]);
        let v6 = listener(4, "::", Some(true));
        assert_eq!(depths(vec![v6], &[("10.0.0.1", 3), ("::1", 2)]), [Some(2)]);
    }

    #[test]
    fn members_of_a_group_are_not_told_apart() {
        let group = vec![listener(1, "0.0.0.0", None), listener(2, "0.0.0.0", None)];
        assert_eq!(depths(group.clone(), &[("10.0.0.1", 3)]), [None, None]);
        assert_eq!(depths(group, &[]), [Some(0), Some(0)]);
    }
}
