//! Clients that believe they are connected, and are not.

use std::time::Duration;

use super::{Look, Rule, count, time};
use crate::diagnose::{Case, Confidence, Diagnosis, Finding, Remedy, Severity};

/// `net.ipv4.tcp_synack_retries` unless it was changed.
const USUAL_RETRIES: u32 = 5;
const MOST_RETRIES: u32 = 16;

pub(super) const RULE: Rule = Rule {
    id: "final_ack_dropped",
    about: "final ACKs found the accept queue full: clients believe they are connected",
    facts: &[
        "accept_queue.peak",
        "accept_queue.limit",
        "totals.drops.accept_queue_full_on_ack",
        "totals.resets_on_overflow",
        "totals.synack_retransmits",
        "totals.requests_expired",
        "handshake.max_us",
    ],
    look: Look::Listener(look),
};

/// How long a SYN-ACK that is never answered is sent again: after 1 s, then after twice as long each.
fn patience(retries: u32) -> Duration {
    Duration::from_secs((1 << (retries.min(MOST_RETRIES) + 1)) - 1)
}

fn look(case: &Case, diagnosis: &Diagnosis) -> Option<Finding> {
    let totals = case.last.totals;
    let dropped = totals.drops.accept_queue_full_on_ack.filter(|&dropped| dropped > 0)?;
    let settings = diagnosis.settings(case);
    let retries = settings.synack_retries.unwrap_or(USUAL_RETRIES);
    let resets = totals.resets_on_overflow.unwrap_or(0);
    let aborts = settings.abort_on_overflow.map_or(resets > 0, |abort| abort != 0);
    let acks = count(dropped, "final ACK was", "final ACKs were");
    let (summary, cause) = if aborts {
        (
            format!("{acks} dropped and {} reset because the accept queue was full", count(resets, "client was", "clients were")),
            "With net.ipv4.tcp_abort_on_overflow=1 the kernel resets such a client: it sees its new \
             connection reset and has to try again by itself. With 0 the kernel would have kept the request \
             and sent the SYN-ACK again, so a burst would only have cost a second."
                .to_owned(),
        )
    } else {
        let slowest = case.last.handshake.map_or_else(String::new, |times| {
            format!(
                " The slowest handshake of this listener took {}.",
                time(Duration::from_nanos(times.max_ns))
            )
        });
        (
            format!(
                "{acks} dropped because the accept queue was full: these clients believe they are connected"
            ),
            format!(
                "The client's handshake is over for the client. The kernel keeps the request and sends the \
                 SYN-ACK again after 1, 2, 4… s, {retries} times (net.ipv4.tcp_synack_retries), so for up to {} \
                 the client may wait for an answer to what it sent, and is then forgotten without a word.{slowest} \
                 With net.ipv4.tcp_abort_on_overflow=1 it would be reset at once instead.",
                time(patience(retries))
            ),
        )
    };
    let mut remedy = Remedy::text(
        "The accept queue is what to mend (see the other finding of this listener). Leave \
         net.ipv4.tcp_abort_on_overflow at 0 where overflows are short.",
    );
    if aborts {
        remedy.commands.push(settings.sysctl("net.ipv4.tcp_abort_on_overflow", 0));
    }
    Some(
        Finding::new(RULE.id, Severity::Warning, Confidence::Certain)
            .says(summary, cause)
            .advises(remedy)
            .measured("tcp_abort_on_overflow", u32::from(aborts))
            .measured("tcp_synack_retries", retries),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{rules_of, with};

    #[test]
    fn clients_wait_as_long_as_the_kernel_tries() {
        for (retries, seconds) in [(0, 1), (1, 3), (5, 63)] {
            assert_eq!(patience(retries), Duration::from_secs(seconds));
        }
        assert!(patience(u32::MAX) < Duration::from_secs(1 << 18));
    }

    #[test]
    fn only_drops_on_the_final_ack_count() {
        let drops = |syn, ack| {
            with(16, |l| {
                l.totals.drops.accept_queue_full_on_syn = Some(syn);
                l.totals.drops.accept_queue_full_on_ack = Some(ack);
            })
        };
        assert_eq!(rules_of(vec![drops(2, 0)]), ["accept_burst"]);
        assert_eq!(rules_of(vec![drops(2, 3)]), ["accept_burst", "final_ack_dropped"]);
    }
}
