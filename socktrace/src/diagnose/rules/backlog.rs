//! How large a backlog would have done, and how to get it.

use super::super::{Case, Diagnosis, Remedy, programs};

/// Half as much again as was needed: the next burst is another one.
const MARGIN: (u64, u64) = (3, 2);
/// Nobody saves anything by asking for less.
const LEAST: u64 = 16;

/// The backlog for so many connections at once.
pub(super) fn enough(need: u64) -> u32 {
    let wanted = (need * MARGIN.0 / MARGIN.1).max(LEAST).next_power_of_two();
    u32::try_from(wanted).unwrap_or(u32::MAX)
}

/// The sum behind it, for people.
pub(super) fn sum(held: u64, turned_away: u64) -> String {
    let need = held + turned_away;
    format!(
        "{held} that fitted and {turned_away} that did not make {need}, half as much again {}, the next \
         power of two {}",
        need * MARGIN.0 / MARGIN.1,
        enough(need)
    )
}

/// What has to be done for a listener to have this backlog.
pub(super) fn enlarge(case: &Case, diagnosis: &Diagnosis, backlog: u32) -> Remedy {
    let settings = diagnosis.settings(case);
    let mut text = String::new();
    let mut commands = Vec::new();
    let somaxconn = settings.somaxconn.or(case.last.somaxconn);
    if let Some(somaxconn) = somaxconn.filter(|&somaxconn| somaxconn < backlog) {
        text = format!(
            "net.core.somaxconn of its network namespace is {somaxconn} and caps every backlog at the \
             moment of listen(): raise it first (and in /etc/sysctl.d for the next boot). "
        );
        commands.push(settings.sysctl("net.core.somaxconn", backlog));
    }
    let asks_enough =
        case.last.requested.is_some_and(|asked| asked < 0 || asked.cast_unsigned() >= backlog);
    if asks_enough {
        text.push_str(
            "The program asks for enough already, but has to call listen() again: restart it (most \
             programs keep the socket over a reload).",
        );
    } else {
        text.push_str(&format!(
            "Set {}, and restart the program: most keep the listening socket over a reload.",
            programs::setting(&case.last, backlog)
        ));
    }
    Remedy { text, commands, backlog: Some(backlog) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{diagnosis, with};

    #[test]
    fn a_backlog_has_room_to_spare() {
        assert_eq!([0, 17, 60, 90, 4000].map(enough), [16, 32, 128, 256, 8192]);
        assert_eq!(
            sum(17, 43),
            "17 that fitted and 43 that did not make 60, half as much again 90, the next power of two 128"
        );
    }

    #[test]
    fn somaxconn_is_raised_only_where_it_is_in_the_way() {
        let remedy =
            |backlog| enlarge(&with(16, |_| {}), &diagnosis(vec![with(16, |_| {})]), backlog);
        assert!(remedy(128).commands.is_empty());
        assert_eq!(remedy(8192).commands, ["sysctl -w net.core.somaxconn=8192"]);
        assert_eq!(remedy(8192).backlog, Some(8192));
    }
}
