//! Filters that the kernel runs over each socket of a dump (`inet_diag_bc_run`).
//!
//! A filter is a row of tests. Each says how far to go on when it holds and when it does not; a socket
//! is let through when the way ends exactly behind the last test. The kernel accepts a filter only if
//! the way of those that hold visits every test (`inet_diag_bc_audit`), so only failing ones jump.

use std::net::IpAddr;

// Operations (include/uapi/linux/inet_diag.h).
/// Never holds.
const JMP: u8 = 1;
const S_GE: u8 = 2;
const S_LE: u8 = 3;
const AUTO: u8 = 6;
const S_COND: u8 = 7;
const D_COND: u8 = 8;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Size of an operation without its operand.
const OPERATION: usize = 4;
/// In a condition: a port that fits all.
const ANY_PORT: i32 = -1;

struct Test {
    code: u8,
    operand: Vec<u8>,
    otherwise: Otherwise,
}

/// What becomes of a socket that a test does not hold for.
#[derive(Clone, Copy)]
enum Otherwise {
    LeaveOut,
    LetThrough,
    /// The next operation, one without operand, is not for it.
    SkipOne,
}

impl Test {
    fn new(code: u8, operand: Vec<u8>, otherwise: Otherwise) -> Self {
        Self { code, operand, otherwise }
    }

    fn size(&self) -> usize {
        OPERATION + self.operand.len()
    }
}

/// Sockets whose local port is in a range.
#[must_use]
pub(super) fn local_ports(low: u16, high: u16) -> Vec<u8> {
    assemble(&range(low, high))
}

/// Sockets that keep a connection off a local port of a range: unconnected ones, those that were
/// bound to their port by number, and connections to the same destination, from `from` if that is
/// known.
#[must_use]
pub(super) fn in_the_way(low: u16, high: u16, to: (IpAddr, u16), from: Option<IpAddr>) -> Vec<u8> {
    let mut tests = Vec::from(range(low, high));
    tests.extend([
        // Holds where the kernel chose the port (no SOCK_BINDPORT_LOCK).
        Test::new(AUTO, Vec::new(), Otherwise::LetThrough),
        Test::new(D_COND, host(None, 0), Otherwise::SkipOne),
        Test::new(JMP, Vec::new(), Otherwise::LetThrough),
        Test::new(D_COND, host(Some(to.0), to.1.into()), Otherwise::LeaveOut),
    ]);
    if let Some(from) = from {
        tests.push(Test::new(S_COND, host(Some(from), ANY_PORT), Otherwise::LeaveOut));
    }
    assemble(&tests)
}

fn range(low: u16, high: u16) -> [Test; 2] {
    [(S_GE, low), (S_LE, high)].map(|(code, port)| {
        // The port stands where the next operation has its second jump.
        let [a, b] = port.to_ne_bytes();
        Test::new(code, vec![0, 0, a, b], Otherwise::LeaveOut)
    })
}

/// `struct inet_diag_hostcond` with the address behind it. An IPv4 address also fits its mapped form
/// on an IPv6 socket.
fn host(address: Option<IpAddr>, port: i32) -> Vec<u8> {
    let (family, octets) = match address.map(|address| address.to_canonical()) {
        None => (AF_UNSPEC, Vec::new()),
        Some(IpAddr::V4(address)) => (AF_INET, address.octets().to_vec()),
        Some(IpAddr::V6(address)) => (AF_INET6, address.octets().to_vec()),
    };
    let prefix = octets.len() as u8 * 8;
    [&[family, prefix, 0, 0][..], &port.to_ne_bytes(), &octets].concat()
}

fn assemble(tests: &[Test]) -> Vec<u8> {
    let total: usize = tests.iter().map(Test::size).sum();
    let mut code = Vec::with_capacity(total);
    for test in tests {
        let rest = total - code.len();
        let no = match test.otherwise {
            Otherwise::LeaveOut => rest + OPERATION,
            Otherwise::LetThrough => rest,
            Otherwise::SkipOne => test.size() + OPERATION,
        };
        code.extend([test.code, test.size() as u8]);
        code.extend((no as u16).to_ne_bytes());
        code.extend(&test.operand);
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the kernel goes from each test: `(offset, holds, does not)`.
    fn ways(code: &[u8]) -> Vec<(usize, usize, usize)> {
        let mut ways = Vec::new();
        let mut offset = 0;
        while offset < code.len() {
            let no = u16::from_ne_bytes([code[offset + 2], code[offset + 3]]);
            let yes = offset + usize::from(code[offset + 1]);
            ways.push((offset, yes, offset + usize::from(no)));
            offset = yes;
        }
        ways
    }

    #[test]
    fn jumps_lead_to_tests_or_to_an_end() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        // Behind the end by one operation: left out. At the end: let through.
        assert_eq!(ways(&local_ports(1, 2)), [(0, 8, 20), (8, 16, 20)]);
        let to = (address("192.0.2.1"), 443);
        assert_eq!(
            ways(&in_the_way(1, 2, to, None)),
            [(0, 8, 56), (8, 16, 56), (16, 20, 52), (20, 32, 36), (32, 36, 52), (36, 52, 56)]
        );
        let to = (address("2001:db8::1"), 443);
        let code = in_the_way(1, 2, to, Some(address("2001:db8::2")));
        assert_eq!(ways(&code).last(), Some(&(64, 92, 96)));
        assert_eq!(code.len(), 92);
    }

    #[test]
    fn a_mapped_address_is_an_ipv4_address() {
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        let expected = [&[AF_INET, 32, 0, 0][..], &443_i32.to_ne_bytes(), &[192, 0, 2, 1]].concat();
        assert_eq!(host(Some(mapped), 443), expected);
    }
}
