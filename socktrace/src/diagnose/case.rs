//! What happened to one listener while it was watched.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Duration};

use super::{Acceptor, Sources};
use crate::{
    event::{End, Event, What},
    model::{Family, Listener, Queue, Totals},
};

/// Bursts of a listener whose sizes are kept: the first ones.
const MOST_BURSTS: usize = 1 << 12;

/// A time during which the accept queue was full in every interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// At most: in its last interval it may have been full for a moment.
    pub time: Duration,
    /// Of that, intervals at whose end most of the queue was still there.
    pub held: Duration,
    /// How many intervals these were.
    pub looks: u32,
    /// Connections that entered the queue.
    pub entered: u64,
    pub accepted: u64,
    /// Clients that found it full, each once.
    pub turned_away: u64,
    pub peak: u32,
}

impl Run {
    /// How many would have had to fit for nobody to be turned away.
    #[must_use]
    pub fn need(&self) -> u64 {
        u64::from(self.peak) + self.turned_away
    }

    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Clients that came, a second.
    #[must_use]
    pub fn arrival_rate(&self) -> f64 {
        self.per_second(self.entered + self.turned_away)
    }

    #[must_use]
    pub fn accept_rate(&self) -> f64 {
        self.per_second(self.accepted)
    }
}

#[derive(Clone, Debug)]
pub struct Case {
    /// The newest record, with the peaks of the whole time.
    pub last: Arc<Listener>,
    pub watched: Duration,
    /// The run that goes on, the one that went on for longest, the one that most clients came in.
    run: Option<Run>,
    pub longest: Run,
    pub largest: Run,
    /// How often the queue became full.
    pub runs: u32,
    /// What each of these that is over would have needed.
    needs: Vec<u64>,
    /// How long no connection was accepted though there was one, up to now and at most.
    idle: Duration,
    pub longest_idle: Duration,
    /// How many waited then.
    pub idle_depth: u32,
    /// Such times that are over: the first ones.
    idles: Vec<Duration>,
    /// The longest that the head of the queue was seen to have waited.
    pub longest_wait: Duration,
    pub accepted: u64,
    /// Who sent what the SYN queue had no room for, or what was never finished.
    pub sources: Sources,
    /// What the processes that should accept did while none of them did.
    pub acceptors: Vec<Acceptor>,
    turned_away: HashSet<(IpAddr, u16)>,
    /// Clients that found the SYN queue full.
    syns_turned_away: HashSet<(IpAddr, u16)>,
    /// Packets of these whose sender was seen.
    syns_seen: u64,
    /// New among these since the last interval.
    new_clients: u64,
    /// Packets of these: all, those whose sender was seen, and those that were counted as a client's for want of that.
    drops: u64,
    drops_seen: u64,
    drops_unseen: u64,
}

impl Case {
    #[must_use]
    pub fn new(listener: Listener) -> Self {
        Self {
            last: Arc::new(listener),
            watched: Duration::ZERO,
            run: None,
            longest: Run::default(),
            largest: Run::default(),
            runs: 0,
            needs: Vec::new(),
            idle: Duration::ZERO,
            longest_idle: Duration::ZERO,
            idle_depth: 0,
            idles: Vec::new(),
            longest_wait: Duration::ZERO,
            accepted: 0,
            sources: Sources::default(),
            acceptors: Vec::new(),
            turned_away: HashSet::new(),
            syns_turned_away: HashSet::new(),
            syns_seen: 0,
            new_clients: 0,
            drops: 0,
            drops_seen: 0,
            drops_unseen: 0,
        }
    }

    /// An interval of this length has ended.
    pub fn interval(&mut self, mut now: Listener, time: Duration) {
        self.watched += time;
        let (accepted, entered, lost) = {
            let before = &*self.last;
            let since = |count: fn(&Listener) -> Option<u64>| {
                Some(count(&now)?.saturating_sub(count(before).unwrap_or(0)))
            };
            (accepted(before, &now), since(|l| l.totals.established), since(lost_at_accept_queue))
        };
        let lost = lost.unwrap_or(0);
        let new_clients = self.new_clients(lost);
        self.accepted += accepted.unwrap_or(0);

        let drains_not =
            now.accept.depth.unwrap_or(0) * 2 >= now.accept.capacity.unwrap_or(u32::MAX);
        let waited = now.accept.depth > Some(0) && self.last.accept.depth > Some(0);
        if waited && none_accepted(&self.last, &now) {
            self.idle += time;
            if self.idle >= self.longest_idle {
                self.longest_idle = self.idle;
                self.idle_depth = now.accept.depth.unwrap_or(0);
            }
        } else {
            let over = std::mem::take(&mut self.idle);
            if !over.is_zero() && self.idles.len() < MOST_BURSTS {
                self.idles.push(over);
            }
        }
        self.longest_wait = self.longest_wait.max(now.oldest_wait.unwrap_or_default());

        if now.accept.was_full() || lost > 0 {
            self.runs += u32::from(self.run.is_none());
            let run = self.run.get_or_insert_default();
            run.time += time;
            if drains_not {
                run.held += time;
                run.looks += 1;
            }
            run.entered += entered.unwrap_or(0);
            run.accepted += accepted.unwrap_or(0);
            run.turned_away += new_clients;
            run.peak = run.peak.max(now.accept.peak.max(now.accept.depth).unwrap_or(0));
            if run.time >= self.longest.time {
                self.longest = *run;
            }
            if run.need() >= self.largest.need() {
                self.largest = *run;
            }
        }
        // A queue that drained begins another run when it is full again.
        if !drains_not
            && let Some(over) = self.run.take()
            && self.needs.len() < MOST_BURSTS
        {
            self.needs.push(over.need());
        }

        for (queue, before) in [(&mut now.accept, self.last.accept), (&mut now.syn, self.last.syn)]
        {
            queue.peak = queue.peak.max(before.peak);
            queue.capacity = queue.capacity.or(before.capacity);
        }
        // Who held it, of one that closed.
        if now.owners.is_empty() {
            now.owners.clone_from(&self.last.owners);
            now.belongs.clone_from(&self.last.belongs);
        }
        self.last = Arc::new(now);
    }

    /// Something happened to it. Returns how many clients and senders are told apart now that were not before:
    /// none where there is no room.
    pub fn event(&mut self, event: &Event, room: bool) -> usize {
        match &event.what {
            What::Drop { peer, reason, .. } if reason.starts_with("accept_queue_full") => {
                self.drops_seen += 1;
                let new = room && insert(&mut self.turned_away, peer);
                // Without room each may be another one.
                self.new_clients += u64::from(new || !room);
                usize::from(new)
            }
            What::Drop { peer, .. } => self.syn_without_room(peer, room),
            What::Cookie { peer, step } if *step == "sent" => self.syn_without_room(peer, room),
            What::Request { peer, .. } => usize::from(self.sources.add(peer, room)),
            _ => 0,
        }
    }

    fn syn_without_room(&mut self, peer: &End, room: bool) -> usize {
        let new = room && insert(&mut self.syns_turned_away, peer);
        if room {
            self.syns_seen += 1;
        }
        usize::from(new) + usize::from(self.sources.add(peer, room))
    }

    /// Whether a rule may have something to say of it when it is gone.
    #[must_use]
    pub fn lost_anything(&self) -> bool {
        let Totals { drops, lost_on_close, cookies_sent, .. } = self.last.totals;
        let times = [lost_on_close, cookies_sent, drops.total()];
        times.iter().any(|&count| count > Some(0))
            || self.lost_at_accept_queue() > 0
            || !self.acceptors.is_empty()
    }

    /// Packets, or connects of an AF_UNIX socket, that found the accept queue full.
    #[must_use]
    pub fn lost_at_accept_queue(&self) -> u64 {
        lost_at_accept_queue(&self.last).unwrap_or(0)
    }

    /// What 99 of 100 bursts would not have exceeded.
    #[must_use]
    pub fn burst_p99(&self) -> u64 {
        let mut needs: Vec<u64> =
            self.needs.iter().copied().chain(self.run.map(|run| run.need())).collect();
        needs.sort_unstable();
        let rank = (needs.len() * 99).div_ceil(100);
        rank.checked_sub(1).map_or(0, |at| needs[at])
    }

    /// Clients that found the accept queue full, as far as they were told apart.
    #[must_use]
    pub fn clients_turned_away(&self) -> usize {
        self.turned_away.len()
    }

    /// Clients that found the SYN queue full. Those whose packet nobody saw may all be different ones.
    #[must_use]
    pub fn syns_turned_away(&self) -> u64 {
        let totals = self.last.totals;
        let drops = totals.drops;
        let all = [drops.syn_queue_full, drops.syn_backlog_reserve, totals.cookies_sent];
        let all: u64 = all.into_iter().flatten().sum();
        self.syns_turned_away.len() as u64 + all.saturating_sub(self.syns_seen)
    }

    /// How long nothing was accepted, usually: the median of such times but for the longest.
    #[must_use]
    pub fn usual_idle(&self) -> Duration {
        let mut idles = self.idles.clone();
        idles.sort_unstable();
        if idles.last() == Some(&self.longest_idle) {
            idles.pop();
        }
        idles.get(idles.len() / 2).copied().unwrap_or_default()
    }

    /// Whether nothing was accepted at all, and connections wait still.
    #[must_use]
    pub fn never_accepted(&self) -> bool {
        self.accepted == 0 && !self.idle.is_zero()
    }

    /// How many clients found the accept queue full since the last interval, which lost so many packets. Those
    /// whose sender was not seen may all be different ones; their events may come a little later than their count.
    fn new_clients(&mut self, lost: u64) -> u64 {
        self.drops += lost;
        let seen = std::mem::take(&mut self.new_clients);
        let unseen = self.drops.saturating_sub(self.drops_seen);
        let before = std::mem::replace(&mut self.drops_unseen, unseen);
        (seen + unseen).saturating_sub(before)
    }

    /// Whether no connection is accepted now though one waits, for long enough to look at who should.
    #[must_use]
    pub fn is_idle_for(&self, time: Duration) -> bool {
        self.idle >= time
    }

    #[must_use]
    pub fn is_unix(&self) -> bool {
        self.last.family == Family::Unix
    }

    /// How many fit into the accept queue.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        let Queue { capacity, limit, .. } = self.last.accept;
        capacity.or(limit).unwrap_or(0)
    }

    /// The first process that holds it, for people.
    #[must_use]
    pub fn owner(&self) -> String {
        let owners = &self.last.owners;
        let accepts = |pid| self.last.acceptors.iter().any(|process| process.pid == pid);
        let first = owners.iter().find(|owner| accepts(owner.pid)).or_else(|| owners.first());
        match first {
            Some(owner) => format!("{}/{}", owner.comm, owner.pid),
            None => "its program".to_owned(),
        }
    }
}

/// Takes a client in; whether it is a new one.
fn insert(clients: &mut HashSet<(IpAddr, u16)>, client: &End) -> bool {
    let End { address: Some(address), port: Some(port), .. } = client else { return false };
    clients.insert((*address, *port))
}

/// What a full accept queue cost.
fn lost_at_accept_queue(l: &Listener) -> Option<u64> {
    if l.family == Family::Unix {
        return Some(l.totals.connects_refused? + l.totals.connects_waited.unwrap_or(0));
    }
    let drops = l.totals.drops;
    Some(drops.accept_queue_full_on_syn? + drops.accept_queue_full_on_ack?)
}

/// How many connections were accepted between two records. Without a count of accepts it follows from what
/// entered the queue and what is left in it.
fn accepted(before: &Listener, now: &Listener) -> Option<u64> {
    if let Some(accepted) = now.totals.accepted {
        return Some(accepted.saturating_sub(before.totals.accepted.unwrap_or(0)));
    }
    let entered = now.totals.established?.saturating_sub(before.totals.established?);
    let (was, is) = (before.accept.depth?, now.accept.depth?);
    Some((entered + u64::from(was)).saturating_sub(is.into()))
}

/// Whether nothing was accepted between two records, by what tells it best: a count of accepts, the head of the
/// queue that stayed, or what entered and what is left.
fn none_accepted(before: &Listener, now: &Listener) -> bool {
    if now.totals.accepted.is_some() {
        return accepted(before, now) == Some(0);
    }
    match (before.oldest_since, now.oldest_since) {
        (Some(was), Some(is)) => was == is,
        _ => accepted(before, now) == Some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::sample::{Look, watched};

    #[test]
    fn a_burst_needs_room_for_everyone_who_came_at_once() {
        let case = watched(
            16,
            &[
                Look { depth: 0, ..Look::default() },
                Look { entered: 17, accepted: 17, dropped: 43, peak: 17, ..Look::default() },
                Look::default(),
                Look { entered: 17, accepted: 17, dropped: 3, peak: 17, ..Look::default() },
            ],
        );
        assert_eq!((case.runs, case.largest.need(), case.largest.turned_away), (2, 60, 43));
        assert_eq!(case.burst_p99(), 60);
        assert_eq!(case.longest.time, Duration::from_millis(100));
        assert_eq!(case.longest_idle, Duration::ZERO);
        assert_eq!(case.last.accept.peak, Some(17));
    }

    #[test]
    fn nobody_accepts_though_connections_wait() {
        let idle = Look { depth: 17, dropped: 1, peak: 17, ..Look::default() };
        let mut looks = vec![Look { entered: 17, ..idle }];
        looks.extend([idle; 20]);
        looks.push(Look { accepted: 17, ..Look::default() });
        let case = watched(16, &looks);
        assert_eq!(case.longest_idle, Duration::from_secs(2));
        assert!(!case.is_idle_for(Duration::from_millis(1)));
        assert_eq!(case.accepted, 17);
    }

    #[test]
    fn accepts_that_no_hook_counts_follow_from_the_queue() {
        let listener = |established, depth| {
            let mut l = crate::view::sample();
            (l.totals.established, l.totals.accepted) = (established, None);
            l.accept.depth = Some(depth);
            l
        };
        let check = |before: (Option<u64>, u32), now: (Option<u64>, u32), expect| {
            assert_eq!(accepted(&listener(before.0, before.1), &listener(now.0, now.1)), expect);
        };
        check((Some(5), 3), (Some(9), 2), Some(5));
        check((Some(5), 3), (Some(5), 3), Some(0));
        check((None, 3), (None, 2), None);
    }
}
