//! From what was watched to what to change. Pure: no I/O, no clock.
//!
//! [`Case`] gathers what happened to a listener, [`Clients`] what went wrong elsewhere; each rule in `rules`
//! looks at them and says one thing.

mod acceptor;
mod case;
mod clients;
mod finding;
pub mod programs;
mod rules;
mod sources;

pub use acceptor::Acceptor;
pub use case::{Case, Run};
pub use clients::{Clients, Unanswered};
pub use finding::{Confidence, Finding, Remedy, Severity};
pub(crate) use rules::is_uncounted;
pub use rules::{RULES, STALLED};
pub use sources::Sources;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use crate::{
    event::Event,
    filter::{Filter, Ports},
    model::{Id, Listener},
};

/// What a namespace is set to, as far as it could be read.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub somaxconn: Option<u32>,
    pub syncookies: Option<u32>,
    pub max_syn_backlog: Option<u32>,
    pub abort_on_overflow: Option<u32>,
    pub synack_retries: Option<u32>,
    pub timestamps: Option<u32>,
    pub migrate_req: Option<u32>,
    /// What stands before a command to run it in this namespace.
    pub enter: String,
}

impl Settings {
    /// The command that sets a sysctl there.
    #[must_use]
    pub fn sysctl(&self, name: &str, value: u32) -> String {
        format!("{}sysctl -w {name}={value}", self.enter)
    }
}

/// Clients and senders that are told apart, of all listeners together.
const MOST_CLIENTS: usize = 1 << 18;

/// Everything that was seen. What it remembers grows with the listeners, not with what they see.
#[derive(Debug, Default)]
pub struct Diagnosis {
    cases: HashMap<Id, Case>,
    /// Clients that were told apart so far.
    known_clients: usize,
    /// Ports that somebody listened at.
    heard: HashSet<u16>,
    pub clients: Clients,
    pub settings: HashMap<u32, Settings>,
    /// What the kernel dropped of listeners' packets in a namespace (ListenDrops).
    pub kernel_drops: BTreeMap<u32, u64>,
    pub watched: Duration,
}

impl Diagnosis {
    /// Somebody listens at the ports of these, whether they are watched or not.
    pub fn hear(&mut self, listeners: &[Listener]) {
        self.heard.extend(listeners.iter().filter_map(|listener| listener.port));
    }

    /// An interval of this length has ended with these listeners.
    pub fn interval(&mut self, listeners: Vec<Listener>, time: Duration) {
        self.watched += time;
        for listener in listeners {
            let (id, closed) = (listener.id, listener.closed);
            match self.cases.get_mut(&listener.id) {
                Some(case) => case.interval(listener, time),
                None => {
                    // What it counted so far, it counted in this interval.
                    let mut case = Case::new(before_all(listener.clone()));
                    case.interval(listener, time);
                    self.cases.insert(id, case);
                }
            }
            // Of one that closed without a loss nothing is left to say.
            if closed && self.cases.get(&id).is_some_and(|case| !case.lost_anything()) {
                self.cases.remove(&id);
            }
        }
    }

    pub fn event(&mut self, event: &Event) {
        let id = event.listener.as_ref().and_then(|listener| listener.id);
        match id.and_then(|id| self.cases.get_mut(&id)) {
            Some(case) => {
                let room = MOST_CLIENTS.saturating_sub(self.known_clients);
                self.known_clients += case.event(event, room > 0);
            }
            None => self.clients.event(event),
        }
    }

    #[must_use]
    pub fn knows(&self, id: Id) -> bool {
        self.cases.contains_key(&id)
    }

    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.cases.values()
    }

    pub fn cases_mut(&mut self) -> impl Iterator<Item = &mut Case> {
        self.cases.values_mut()
    }

    #[must_use]
    pub fn settings(&self, case: &Case) -> Settings {
        self.settings.get(&case.last.netns).cloned().unwrap_or_default()
    }

    /// The other members of a listener's SO_REUSEPORT group.
    pub fn siblings<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = &'a Case> {
        let group = |l: &Listener| (l.netns, l.family, l.address, l.port, l.interface);
        self.cases().filter(move |other| {
            let (one, two) = (&case.last, &other.last);
            one.reuseport == Some(true)
                && two.reuseport == Some(true)
                && one.id != two.id
                && group(one) == group(two)
        })
    }

    /// Whether anybody listened at one of these ports.
    fn has_listener(&self, ports: &Ports) -> bool {
        self.heard.iter().any(|&port| ports.contains(port))
    }

    /// What every rule has to say, the worst first.
    #[must_use]
    pub fn findings(&self, filter: &Filter) -> Vec<Finding> {
        let mut findings = rules::all(self, filter);
        // Whose trouble is known by other signs is not unknown.
        let known: HashSet<u32> = findings
            .iter()
            .filter_map(|finding| finding.listener.as_deref())
            .filter(|listener| rules::is_uncounted(listener))
            .map(|listener| listener.netns)
            .collect();
        findings.retain(|finding| finding.netns.is_none_or(|netns| !known.contains(&netns)));
        let place = |finding: &Finding| finding.listener.as_ref().map(|l| (l.endpoint(), l.id));
        findings.sort_by_cached_key(|finding| (finding.severity, place(finding)));
        findings
    }
}

/// A listener as it was before anything was counted.
fn before_all(mut listener: Listener) -> Listener {
    listener.totals = crate::model::Totals::default();
    listener.accept.peak = None;
    listener.syn.peak = None;
    // How long what waits has waited for nothing is not known yet.
    listener.accept.depth = None;
    listener.oldest_since = None;
    listener
}

/// Cases for the tests of the rules.
#[cfg(test)]
pub(crate) mod sample {
    use super::*;
    use crate::model::{Drops, Queue, Totals};

    /// What an interval of 100 ms brought.
    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct Look {
        /// At its end.
        pub(crate) depth: u32,
        pub(crate) peak: u32,
        pub(crate) entered: u64,
        pub(crate) accepted: u64,
        pub(crate) dropped: u64,
    }

    /// A listener of this backlog to which nothing has happened.
    pub(crate) fn listener(backlog: u32) -> Listener {
        let mut listener = crate::view::sample();
        listener.requested = Some(i32::try_from(backlog).unwrap());
        listener.somaxconn = Some(4096);
        let capacity = Some(backlog + 1);
        let empty = Queue { depth: Some(0), limit: Some(backlog), peak: Some(0), capacity };
        (listener.accept, listener.syn) = (empty, empty);
        let zero = Some(0);
        listener.totals = Totals {
            syns: zero,
            syns_repeated: zero,
            requests_queued: zero,
            established: zero,
            accepted: zero,
            synack_retransmits: zero,
            cookies_sent: zero,
            cookies_accepted: zero,
            drops: Drops {
                accept_queue_full_on_syn: zero,
                accept_queue_full_on_ack: zero,
                syn_queue_full: zero,
                syn_backlog_reserve: zero,
                other: zero,
            },
            ..crate::view::sample().totals
        };
        (listener.accept_wait, listener.handshake) = (None, None);
        listener.belongs.exe = Some("/opt/shop/server".into());
        listener.owners.truncate(1);
        listener.owners[0].comm = "server".into();
        listener
    }

    /// A case of which only the last record matters.
    pub(crate) fn with(backlog: u32, change: impl FnOnce(&mut Listener)) -> Case {
        let mut last = listener(backlog);
        change(&mut last);
        let mut case = Case::new(listener(backlog));
        case.interval(listener(backlog), Duration::from_millis(9900));
        case.interval(last, Duration::from_millis(100));
        case
    }

    /// A listener of this backlog to which this happened, each client losing one packet.
    pub(crate) fn watched(backlog: u32, looks: &[Look]) -> Case {
        let mut now = listener(backlog);
        let mut case = Case::new(now.clone());
        let add = |to: &mut Option<u64>, more| *to = Some(to.unwrap_or(0) + more);
        for look in looks {
            now.accept.depth = Some(look.depth);
            now.accept.peak = Some(look.peak.max(look.depth));
            add(&mut now.totals.established, look.entered);
            add(&mut now.totals.accepted, look.accepted);
            add(&mut now.totals.drops.accept_queue_full_on_syn, look.dropped);
            case.interval(now.clone(), Duration::from_millis(100));
        }
        case
    }

    /// A diagnosis of these.
    pub(crate) fn diagnosis(cases: Vec<Case>) -> Diagnosis {
        let watched = cases.first().map_or(Duration::ZERO, |case| case.watched);
        let settings = Settings {
            somaxconn: Some(4096),
            syncookies: Some(1),
            max_syn_backlog: Some(1024),
            abort_on_overflow: Some(0),
            synack_retries: Some(5),
            timestamps: Some(1),
            migrate_req: Some(0),
            enter: String::new(),
        };
        Diagnosis {
            settings: cases.iter().map(|case| (case.last.netns, settings.clone())).collect(),
            known_clients: 0,
            heard: cases.iter().filter_map(|case| case.last.port).collect(),
            cases: cases.into_iter().map(|case| (case.last.id, case)).collect(),
            clients: Clients::default(),
            kernel_drops: BTreeMap::new(),
            watched,
        }
    }

    /// The rules that speak up about these.
    pub(crate) fn rules_of(cases: Vec<Case>) -> Vec<&'static str> {
        let found = diagnosis(cases).findings(&Filter::default());
        found.iter().map(|finding| finding.rule).collect()
    }

    /// The one finding about a case.
    pub(crate) fn finding(case: Case) -> Finding {
        let mut found = diagnosis(vec![case]).findings(&Filter::default());
        assert_eq!(found.len(), 1, "{found:#?}");
        found.remove(0)
    }
}
