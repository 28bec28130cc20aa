//! Which counts the attached hooks can tell, a bit each.

use socktrace_common::count;

use crate::bpf::{backend::Backend, object::Attempt};

/// Which counts the hooks of a backend can tell.
pub(super) fn by(backend: Backend, attempt: &Attempt) -> u64 {
    let mut known = match backend {
        Backend::Fentry | Backend::Kprobe => (1 << count::COUNT) - 1,
        // No tracepoint stands where these happen.
        Backend::Tracepoint => [
            count::QUEUED,
            count::ACCEPTED,
            count::WAIT_NS,
            count::EXPIRED,
            count::DEFERRED,
            count::FASTOPEN,
            count::FASTOPEN_FULL,
            count::MIGRATED_OUT,
            count::MIGRATED_IN,
            count::HANDSHAKES,
            count::HANDSHAKE_NS,
        ]
        .iter()
        .fold((1 << count::COUNT) - 1, |known, index| known & !(1 << index)),
    };
    let attached = |name: &str| attempt.attached.iter().any(|program| program.ends_with(name));
    let mut without = |hook: &str, counts: &[usize]| {
        for index in counts {
            if !attached(hook) {
                known &= !(1 << index);
            }
        }
    };
    if backend != Backend::Tracepoint {
        without("_sock_graft", &[count::ACCEPTED, count::WAIT_NS]);
    }
    without("_retransmit_synack", &[count::SYNACK_RETRANSMITS]);
    known
}

/// The program that sees every connect of the machine end (kprobe), for the sake of a few: a run that the kernel
/// skips is seldom a loss.
pub(super) const UNIX_CONNECTED: &str = "tp_unix_connected";

/// What means something for an AF_UNIX listener.
pub(super) const OF_UNIX: u64 = 1 << count::ESTABLISHED
    | 1 << count::ACCEPTED
    | 1 << count::WAIT_NS
    | 1 << count::LATE
    | 1 << count::EVENTS
    | ONLY_UNIX;
pub(super) const ONLY_UNIX: u64 = 1 << count::CONNECTS_WAITED | 1 << count::CONNECTS_REFUSED;

/// What the tracepoint backend can tell of a listener even if it cannot tell packets apart.
pub(super) const CERTAIN: u64 =
    1 << count::SYNACK_RETRANSMITS | 1 << count::LATE | 1 << count::EVENTS;
