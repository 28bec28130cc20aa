//! Dumps of `sock_diag`: a request goes out, the sockets it asks for come back one by one.

use std::{io, ops::ControlFlow};

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    SOCK_DIAG_BY_FAMILY, SockDiagMessage,
    inet::{InetRequest, InetResponse},
    unix::{UnixRequest, UnixResponse},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

/// `INET_DIAG_REQ_BYTECODE` (include/uapi/linux/inet_diag.h)
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// The kernel puts one message into at most this much (`__netlink_dump_start`).
const RECEIVE_BUFFER: usize = 32 * 1024;

/// Asks for TCP or UDP sockets, those that a `filter` of `bytecode` lets through. Reads no further
/// when `each` has seen enough.
pub(super) fn inet(
    request: InetRequest,
    filter: Option<Vec<u8>>,
    mut each: impl FnMut(InetResponse) -> ControlFlow<()>,
) -> io::Result<()> {
    let filter = filter.map(|bytes| DefaultNla::new(INET_DIAG_REQ_BYTECODE, bytes));
    let request = Request { fixed: request, filter };
    dump(request, |answer| match answer {
        SockDiagMessage::InetResponse(response) => each(*response),
        _ => ControlFlow::Continue(()),
    })
}

/// Asks for AF_UNIX sockets.
pub(super) fn unix(
    request: UnixRequest,
    mut each: impl FnMut(UnixResponse) -> ControlFlow<()>,
) -> io::Result<()> {
    let request = Request { fixed: request, filter: None };
    dump(request, |answer| match answer {
        SockDiagMessage::UnixResponse(response) => each(*response),
        _ => ControlFlow::Continue(()),
    })
}

/// A cookie is two numbers of the machine's own byte order, the lower half first
/// (`sock_diag_save_cookie`).
pub(super) fn cookie([a, b, c, d, e, f, g, h]: [u8; 8]) -> u64 {
    let low = u32::from_ne_bytes([a, b, c, d]);
    let high = u32::from_ne_bytes([e, f, g, h]);
    u64::from(high) << 32 | u64::from(low)
}

/// What the crate's requests have no place for: an attribute behind them.
struct Request<Fixed> {
    fixed: Fixed,
    filter: Option<DefaultNla>,
}

impl<Fixed: Emitable> NetlinkSerializable for Request<Fixed> {
    fn message_type(&self) -> u16 {
        SOCK_DIAG_BY_FAMILY
    }

    fn buffer_len(&self) -> usize {
        self.fixed.buffer_len() + self.filter.as_ref().map_or(0, DefaultNla::buffer_len)
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (fixed, attribute) = buffer.split_at_mut(self.fixed.buffer_len());
        self.fixed.emit(fixed);
        if let Some(filter) = &self.filter {
            filter.emit(attribute);
        }
    }
}

fn dump(
    request: Request<impl Emitable>,
    mut each: impl FnMut(SockDiagMessage) -> ControlFlow<()>,
) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut buffer = vec![0; RECEIVE_BUFFER];
    loop {
        let size = socket.recv(&mut &mut buffer[..], 0)?;
        let mut rest = &buffer[..size];
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            let length = (message.header.length as usize).next_multiple_of(4).min(rest.len());
            match message.payload {
                NetlinkPayload::InnerMessage(answer) => match each(answer) {
                    ControlFlow::Continue(()) => {}
                    ControlFlow::Break(()) => return Ok(()),
                },
                // A protocol the kernel cannot list says so at the end (`__inet_diag_dump`).
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            if length == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an empty message"));
            }
            rest = &rest[length..];
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use netlink_packet_sock_diag::inet::{ExtensionFlags, SocketId, StateFlags};
    use rustix::net::sockopt::socket_cookie;

    use super::*;

    fn sockets(protocol: u8, filter: Option<Vec<u8>>) -> io::Result<Vec<InetResponse>> {
        let request = InetRequest {
            family: 2,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id: SocketId::new_v4(),
        };
        let mut found = Vec::new();
        inet(request, filter, |response| {
            found.push(response);
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    #[test]
    fn a_cookie_is_the_one_the_socket_knows() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = sockets(6, None).unwrap();
        let found = found.iter().find(|r| r.header.socket_id.source_port == port).unwrap();
        let expected = socket_cookie(listener.as_fd()).unwrap();
        assert_eq!(cookie(found.header.socket_id.cookie), expected);
        let halves = [0x1111_1111_u32.to_ne_bytes(), 0x2222_2222_u32.to_ne_bytes()].concat();
        assert_eq!(cookie(halves.try_into().unwrap()), 0x2222_2222_1111_1111);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        // No protocol has this number.
        assert_eq!(sockets(251, None).unwrap_err().kind(), io::ErrorKind::NotFound);
        // Not a filter.
        let error = sockets(6, Some(vec![255; 8])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
