//! The eBPF side's debug messages, behind `-vv`.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

pub(super) type Logger = EbpfLogger<&'static dyn ::log::Log>;

/// Level of the programs' messages: off, or as verbose as the user side. A read-only global, so the
/// verifier removes what is off.
pub(super) fn level() -> u8 {
    if ::log::log_enabled!(target: "socktrace_ebpf", ::log::Level::Debug) {
        aya_log::Level::Debug as u8
    } else {
        0
    }
}

pub(super) fn open(ebpf: &mut Ebpf) -> Option<Logger> {
    if level() == 0 {
        return None;
    }
    EbpfLogger::init(ebpf)
        .inspect_err(|error| ::log::warn!("no messages from the eBPF side: {error}"))
        .ok()
}

/// Prints the messages as they come, for as long as the task lives.
pub async fn drain(logger: Option<EbpfLogger<&'static dyn ::log::Log>>) {
    if let Some(logger) = logger {
        print(logger).await;
    }
    // Whoever waits for this waits for messages; there will be no more.
    std::future::pending::<()>().await;
}

async fn print(logger: Logger) {
    // SAFETY: the logger keeps its file descriptor open until it is dropped, and it is dropped
    // through the `AsyncFd` only.
    let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let Ok(mut logger) = registered else { return };
    loop {
        let Ok(mut guard) = logger.readable_mut().await else {
            return;
        };
        guard.get_inner_mut().flush();
        guard.clear_ready();
    }
}
