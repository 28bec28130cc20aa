//! What a process that should accept does instead, as the kernel says.

use serde::Serialize;

/// A process that should accept, looked at while connections waited for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Acceptor {
    pub pid: u32,
    pub comm: String,
    /// `/proc/PID/stat`: R runs, S sleeps, D waits for a device, T is stopped, t traced.
    pub state: char,
    /// The kernel function that it sleeps in (`/proc/PID/wchan`).
    pub wchan: Option<String>,
    pub threads: u32,
    /// Of several threads: what they sleep in, or `running`, and how many of them, most first.
    pub waits: Vec<(String, u32)>,
}

/// What keeps a process from accepting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// By SIGSTOP and its like.
    Stopped,
    Traced,
    Dead,
    Busy,
    Device,
    Sleep,
    Lock,
    /// For descriptors, among which the listener is not.
    Events,
    Peer,
    Pipe,
    Child,
    Accept,
    Other,
}

/// Kernel functions that processes sleep in, by parts of their names, 5.10 to 7.2.
const SLEEPS: &[(&str, Blocked)] = &[
    ("do_signal_stop", Blocked::Stopped),
    ("ptrace_stop", Blocked::Traced),
    ("nanosleep", Blocked::Sleep),
    ("futex", Blocked::Lock),
    ("ep_poll", Blocked::Events),
    ("epoll_wait", Blocked::Events),
    ("schedule_hrtimeout_range", Blocked::Events),
    ("do_sys_poll", Blocked::Events),
    ("poll_schedule_timeout", Blocked::Events),
    ("do_select", Blocked::Events),
    ("io_cqring_wait", Blocked::Events),
    ("csk_accept", Blocked::Accept),
    ("csk_wait_for_connect", Blocked::Accept),
    ("wait_woken", Blocked::Peer),
    ("sk_wait_data", Blocked::Peer),
    ("recvmsg", Blocked::Peer),
    ("sk_stream_wait", Blocked::Peer),
    ("unix_stream", Blocked::Peer),
    ("pipe", Blocked::Pipe),
    ("do_wait", Blocked::Child),
    ("io_schedule", Blocked::Device),
    ("folio_wait", Blocked::Device),
    ("wait_on_page", Blocked::Device),
    ("rpc_wait", Blocked::Device),
];

impl Acceptor {
    #[must_use]
    pub fn blocked(&self) -> Blocked {
        let asleep = || {
            let wchan = self.wchan.as_deref()?;
            SLEEPS.iter().find(|(part, _)| wchan.contains(part)).map(|(_, blocked)| *blocked)
        };
        // Which of several threads should accept is not known.
        if self.waits.len() > 1 && !matches!(self.state, 'T' | 't' | 'Z' | 'X') {
            return Blocked::Other;
        }
        match self.state {
            'T' => Blocked::Stopped,
            't' => Blocked::Traced,
            'Z' | 'X' => Blocked::Dead,
            'R' => Blocked::Busy,
            'D' => Blocked::Device,
            _ => asleep().unwrap_or(Blocked::Other),
        }
    }

    /// What it does, as the end of a sentence that begins with its name.
    #[must_use]
    pub fn does(&self) -> String {
        if self.blocked() == Blocked::Other && self.waits.len() > 1 {
            let waits: Vec<String> =
                self.waits.iter().map(|(wchan, threads)| format!("{threads} in {wchan}")).collect();
            return format!("has {} threads: {}", self.threads, waits.join(", "));
        }
        let what = match self.blocked() {
            Blocked::Stopped => "is stopped by a signal (SIGSTOP, Ctrl-Z)",
            Blocked::Traced => "is held by a debugger",
            Blocked::Dead => "has ended, but its parent has not taken note",
            Blocked::Busy => "is running: it computes instead of accepting",
            Blocked::Device => "waits for a disk or a network file system",
            Blocked::Sleep => "sleeps until a time it chose itself",
            Blocked::Lock => "waits for a lock or for another thread",
            Blocked::Events => {
                "waits for events, and this listener is not among what it waits for: a limit on its \
                 connections was reached, or it forgot"
            }
            Blocked::Peer => "waits for data of one peer: it serves one connection at a time",
            Blocked::Pipe => "waits for a pipe that nobody writes to or reads from",
            Blocked::Child => "waits for a child process to end",
            Blocked::Accept => "is in accept()",
            Blocked::Other => "sleeps",
        };
        match &self.wchan {
            Some(wchan) => format!("{what} ({wchan})"),
            None => what.to_owned(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> (String, Vec<String>) {
        let pid = self.pid;
        let text = match self.blocked() {
            Blocked::Stopped => {
                return ("Let it run again.".to_owned(), vec![format!("kill -CONT {pid}")]);
            }
            Blocked::Traced => "Detach the debugger.",
            Blocked::Dead => "Restart the service.",
            Blocked::Busy => "Move the work out of the thread that accepts, or run more of them.",
            Blocked::Device => {
                "Find the device or file system that does not answer (dmesg, iostat)."
            }
            Blocked::Sleep => "Take the sleep out of the thread that accepts.",
            Blocked::Lock => "Find who holds the lock: a dump of all its threads shows it.",
            Blocked::Events => {
                "Raise its limit on connections (nginx worker_connections, haproxy maxconn, a pool's \
                 size, the limit on open files), or make connections end sooner."
            }
            Blocked::Peer => {
                "Serve connections in threads, processes or an event loop, with a timeout."
            }
            Blocked::Pipe => "Find the other end of the pipe: a log reader that hangs, often.",
            Blocked::Child => "Do not wait for children in the thread that accepts.",
            Blocked::Accept | Blocked::Other => {
                "Look at all its threads while it hangs: a dump of their stacks shows what each does."
            }
        };
        (text.to_owned(), Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_waits_in_says_what_for() {
        let check = |state, wchan: &str, expect| {
            let wchan = (!wchan.is_empty()).then(|| wchan.to_owned());
            let comm = "x".to_owned();
            let acceptor = Acceptor { pid: 7, comm, state, wchan, threads: 1, waits: Vec::new() };
            assert_eq!(acceptor.blocked(), expect);
        };
        check('T', "do_signal_stop", Blocked::Stopped);
        check('S', "hrtimer_nanosleep", Blocked::Sleep);
        check('S', "ep_poll", Blocked::Events);
        check('S', "do_epoll_wait", Blocked::Events);
        check('S', "futex_wait_queue", Blocked::Lock);
        check('S', "wait_woken", Blocked::Peer);
        check('S', "inet_csk_accept", Blocked::Accept);
        check('S', "anon_pipe_read", Blocked::Pipe);
        check('S', "something_new", Blocked::Other);
        check('S', "", Blocked::Other);
        check('D', "", Blocked::Device);
        check('R', "", Blocked::Busy);
    }
}
