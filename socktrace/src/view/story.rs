//! The life of a socket as a story: each step with the time since the one before, and what the kernel's
//! state was after it.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, SystemTime},
};

use super::{
    column::duration,
    event::{queues_text, what},
    printable,
};
use crate::{
    event::{Event, Kind, Queues, What},
    model::SocketKind,
};

/// Sockets that were made but not bound yet are remembered, so many of them.
const MOST_UNBOUND: usize = 4096;
/// Sockets that have a story.
const MOST_STORIES: usize = 4096;

/// What is told of one socket.
#[derive(Debug)]
struct Life {
    number: u32,
    last: SystemTime,
    connections: u64,
    drops: u64,
    accepts: u64,
    listens: bool,
}

impl Life {
    fn new(number: u32, began: SystemTime, listens: bool) -> Self {
        Self { number, last: began, connections: 0, drops: 0, accepts: 0, listens }
    }
}

/// Tells the lives of the sockets whose events it is given.
#[derive(Debug, Default)]
pub struct Story {
    /// By network namespace and inode: sockets that may become listeners.
    unbound: HashMap<(u32, u64), Event>,
    /// In the order of their making.
    order: VecDeque<(u32, u64)>,
    lives: HashMap<String, Life>,
    by_inode: HashMap<(u32, u64), String>,
    begun: u32,
    given_up: u64,
}

impl Story {
    /// The lines that an event adds; often none.
    pub fn tell(&mut self, event: &Event) -> Vec<String> {
        match event.kind {
            Kind::Socket => {
                self.remember(event);
                Vec::new()
            }
            // A datagram socket cannot listen.
            Kind::Bind if event.socket.as_ref().is_some_and(|s| s.kind == SocketKind::Datagram) => {
                Vec::new()
            }
            // A port that the kernel chooses at connect() is a client's.
            Kind::Bind if is_at_connect(event) => Vec::new(),
            Kind::Bind => self.call(event, "bound"),
            Kind::Listen => self.listening(event),
            Kind::Established | Kind::Accept | Kind::Drop | Kind::Close => self.listener(event),
            Kind::Lost => vec![format!("  -- {}", what(event))],
            _ => Vec::new(),
        }
    }

    fn remember(&mut self, event: &Event) {
        let Some(key) = key(event) else { return };
        if self.order.len() == MOST_UNBOUND
            && let Some(oldest) = self.order.pop_front()
        {
            self.unbound.remove(&oldest);
        }
        self.order.push_back(key);
        self.unbound.insert(key, event.clone());
    }

    /// Room for one more: the one that was silent for longest goes, listeners last.
    fn make_room(&mut self, lines: &mut Vec<String>) {
        if self.lives.len() < MOST_STORIES {
            return;
        }
        let oldest = self.lives.iter().min_by_key(|(_, life)| (life.listens, life.last));
        let Some((name, number)) = oldest.map(|(name, life)| (name.clone(), life.number)) else {
            return;
        };
        self.lives.remove(&name);
        self.by_inode.retain(|_, known| *known != name);
        if self.given_up == 0 {
            lines.push(format!(
                "  -- more than {MOST_STORIES} sockets: the oldest, #{number}, is told of no more"
            ));
        }
        self.given_up += 1;
    }

    /// `bind()`, with the `socket()` before it when that was seen.
    fn call(&mut self, event: &Event, step: &str) -> Vec<String> {
        let Some(key) = key(event) else { return Vec::new() };
        let mut lines = Vec::new();
        let name = match self.by_inode.get(&key) {
            Some(name) => name.clone(),
            None => {
                let name = format!("{}:{}", key.0, key.1);
                self.begin(&name, key, event, &mut lines);
                name
            }
        };
        let step = if matches!(&event.what, What::Bind { outcome, .. } if outcome.failed()) {
            "refused"
        } else {
            step
        };
        lines.extend(self.step(&name, event, step, &what(event)));
        lines
    }

    fn begin(&mut self, name: &str, key: (u32, u64), event: &Event, lines: &mut Vec<String>) {
        self.make_room(lines);
        self.begun += 1;
        let made = self.unbound.remove(&key);
        let first = made.as_ref().unwrap_or(event);
        self.lives.insert(name.to_owned(), Life::new(self.begun, first.time, false));
        self.by_inode.insert(key, name.to_owned());
        lines.push(heading(self.begun, event));
        if let Some(made) = made {
            lines.extend(self.step(name, &made, "created", &what(&made)));
        }
    }

    fn listening(&mut self, event: &Event) -> Vec<String> {
        let step = match &event.what {
            What::Listen { outcome, .. } if outcome.failed() => "refused",
            What::Listen { relisten: true, .. } => "listening again",
            _ => "listening",
        };
        let mut lines = self.call(event, step);
        // From now on its events name the listener.
        if let Some(id) =
            event.listener.as_ref().and_then(|listener| Some(listener.id?.to_string()))
            && let Some(key) = key(event)
            && let Some(name) = self.by_inode.insert(key, id.clone())
            && let Some(life) = self.lives.remove(&name)
        {
            self.lives.insert(id, Life { listens: true, ..life });
        }
        if lines.is_empty() {
            lines = self.listener(event);
        }
        lines
    }

    /// What happens to a listener: the first of each kind is a step, the others are counted.
    fn listener(&mut self, event: &Event) -> Vec<String> {
        let Some(listener) = &event.listener else { return Vec::new() };
        let name = listener.id.map_or_else(|| listener.endpoint.clone(), |id| id.to_string());
        let mut lines = Vec::new();
        if !self.lives.contains_key(&name) {
            self.make_room(&mut lines);
            self.begun += 1;
            self.lives.insert(name.clone(), Life::new(self.begun, event.time, true));
            lines.push(format!("{} (older than the trace)", heading(self.begun, event)));
        }
        let Some(life) = self.lives.get_mut(&name) else { return lines };
        let step = match (event.kind, &event.what) {
            (Kind::Established, _) => {
                life.connections += 1;
                (life.connections == 1).then_some(("first connection", what(event)))
            }
            (Kind::Accept, _) => {
                life.accepts += 1;
                (life.accepts == 1).then_some(("first accept", what(event)))
            }
            (Kind::Drop, _) => {
                life.drops += 1;
                (life.drops == 1).then_some(("overflow", what(event)))
            }
            (Kind::Close, _) => {
                let Life { connections, accepts, drops, .. } = *life;
                let text = format!(
                    "{}; {connections} connections, {accepts} accepted, {drops} drops",
                    what(event)
                );
                Some(("closed", text))
            }
            _ => None,
        };
        if let Some((step, text)) = step {
            lines.extend(self.step(&name, event, step, &text));
        }
        if event.kind == Kind::Close {
            self.lives.remove(&name);
            self.by_inode.retain(|_, known| *known != name);
        }
        lines
    }

    /// A step and, below it, the kernel's state.
    fn step(&mut self, name: &str, event: &Event, step: &str, text: &str) -> Vec<String> {
        let Some(life) = self.lives.get_mut(name) else { return Vec::new() };
        let since = event.time.duration_since(life.last).unwrap_or_default();
        life.last = event.time;
        let who = event.caller.as_ref().map_or_else(String::new, |caller| {
            format!(", by {}/{}", printable(&caller.comm), caller.pid)
        });
        let number = life.number;
        vec![
            format!("#{number} {:>9}  {step}: {}{who}", gap(since), printable(text)),
            format!("#{number} {:>9}      {}", "", printable(&state(event))),
        ]
    }
}

fn is_at_connect(event: &Event) -> bool {
    matches!(event.what, What::Bind { explicit: false, at_listen: false, .. })
}

fn gap(time: Duration) -> String {
    format!("+{}", duration(Some(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))))
}

fn heading(number: u32, event: &Event) -> String {
    let place = match (&event.listener, &event.socket, &event.what) {
        (Some(listener), ..) => listener.endpoint.clone(),
        (_, _, What::Bind { asked, outcome, .. }) if outcome.failed() => asked.text(),
        (_, Some(socket), _) => socket.local.text(),
        _ => "-".to_owned(),
    };
    let netns =
        event.netns.map_or_else(String::new, |netns| format!(", network namespace {netns}"));
    format!("#{number} {}{netns}", printable(&place))
}

/// The kernel's own words for where the socket stands.
fn state(event: &Event) -> String {
    let queues = match &event.what {
        What::Listen { queues, .. }
        | What::Established { queues, .. }
        | What::Accept { queues, .. }
        | What::Drop { queues, .. }
        | What::Close { queues, .. } => *queues,
        _ => Queues::default(),
    };
    let state = match (&event.socket, event.kind) {
        (Some(socket), _) => socket.state,
        // The queues were read just before the kernel emptied them.
        (None, Kind::Close) => "LISTEN -> CLOSE",
        (None, _) => "LISTEN",
    };
    let local = match (&event.listener, &event.socket) {
        (Some(listener), _) => listener.endpoint.clone(),
        (None, Some(socket)) => socket.local.text(),
        (None, None) => "-".to_owned(),
    };
    let queues =
        if queues == Queues::default() { "no queues".to_owned() } else { queues_text(&queues) };
    format!("sk_state {state}, local {local}, {queues}")
}

/// Which socket a call was about.
fn key(event: &Event) -> Option<(u32, u64)> {
    Some((event.netns?, event.socket.as_ref()?.inode?))
}
