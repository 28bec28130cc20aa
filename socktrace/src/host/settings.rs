//! What a network namespace is set to.

use super::netns::{NetnsPath, within};
use crate::diagnose::Settings;

/// Reads the sysctls that listeners depend on; what cannot be read stays unknown. `enter` is what has to stand
/// before a command to run it there.
#[must_use]
pub fn settings(netns: &NetnsPath, enter: String) -> Settings {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let there = within(netns, || {
        Ok(Settings {
            somaxconn: read("core/somaxconn"),
            syncookies: read("ipv4/tcp_syncookies"),
            max_syn_backlog: read("ipv4/tcp_max_syn_backlog"),
            abort_on_overflow: read("ipv4/tcp_abort_on_overflow"),
            synack_retries: read("ipv4/tcp_synack_retries"),
            timestamps: read("ipv4/tcp_timestamps"),
            migrate_req: read("ipv4/tcp_migrate_req"),
            enter: String::new(),
        })
    });
    Settings { enter, ..there.unwrap_or_default() }
}
