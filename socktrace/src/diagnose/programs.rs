//! Backlogs that programs ask for unless told otherwise, and where to set them.

use crate::model::Listener;

pub struct Program {
    /// How the executable, or the process, is called, without a version.
    names: &'static [&'static str],
    /// What it passes to `listen()` by default; several where its libraries differ.
    pub defaults: &'static [Default],
    /// Where an administrator sets it, with `{}` for the number; `None` where only the program's own code can.
    pub setting: Option<&'static str>,
}

pub struct Default {
    pub backlog: u32,
    /// Who chose the number.
    pub whose: &'static str,
    /// Where to set it instead.
    pub setting: &'static str,
}

const fn default(backlog: u32, whose: &'static str, setting: &'static str) -> Default {
    Default { backlog, whose, setting }
}

/// From the programs' own documentation.
const PROGRAMS: &[Program] = &[
    Program {
        names: &["nginx", "openresty", "angie"],
        defaults: &[default(511, "nginx", "`listen … backlog={}` in its configuration")],
        setting: Some("`listen … backlog={}` in its configuration"),
    },
    Program {
        names: &["redis-server", "valkey-server", "keydb-server"],
        defaults: &[default(511, "Redis", "`tcp-backlog {}` in its configuration")],
        setting: Some("`tcp-backlog {}` in its configuration"),
    },
    Program {
        names: &["haproxy"],
        defaults: &[],
        setting: Some("`backlog {}` in the frontend (without it, maxconn is the backlog)"),
    },
    Program {
        names: &["apache2", "httpd"],
        defaults: &[default(511, "Apache httpd", "`ListenBackLog {}`")],
        setting: Some("`ListenBackLog {}`"),
    },
    Program {
        names: &["envoy"],
        defaults: &[],
        setting: Some("`tcp_backlog_size: {}` of the listener"),
    },
    Program {
        names: &["php-fpm"],
        defaults: &[default(511, "PHP-FPM", "`listen.backlog = {}` of the pool")],
        setting: Some("`listen.backlog = {}` of the pool"),
    },
    Program {
        names: &["uwsgi"],
        defaults: &[default(100, "uWSGI", "`listen = {}`")],
        setting: Some("`listen = {}`"),
    },
    Program {
        names: &["node", "nodejs"],
        defaults: &[default(511, "Node.js", "`server.listen({ port, backlog: {} })`")],
        setting: None,
    },
    Program {
        names: &["python"],
        defaults: &[
            default(
                5,
                "Python's socketserver and http.server",
                "`request_queue_size = {}` of the server class",
            ),
            default(10, "Django's runserver", "a server for production (Gunicorn: `--backlog {}`)"),
            default(
                100,
                "Python's asyncio",
                "`backlog={}` of loop.create_server() or start_server()",
            ),
            default(
                128,
                "Python's socket.listen() (Tornado and Werkzeug keep it)",
                "the argument of listen()",
            ),
        ],
        setting: None,
    },
    Program {
        names: &["java"],
        defaults: &[
            default(50, "Java's ServerSocket", "the second argument of ServerSocket()"),
            default(100, "Tomcat", "`acceptCount=\"{}\"` of the connector"),
        ],
        setting: None,
    },
    Program {
        names: &["beam"],
        defaults: &[default(5, "Erlang's gen_tcp", "`{backlog, {}}` of gen_tcp:listen()")],
        setting: None,
    },
    Program {
        names: &["perl"],
        defaults: &[default(5, "Perl's IO::Socket", "`Listen => {}`")],
        setting: None,
    },
];

/// The program that owns a listener, if it is a known one.
#[must_use]
pub fn of(listener: &Listener) -> Option<&'static Program> {
    let exe = listener.belongs.exe.as_deref().and_then(|path| path.rsplit('/').next());
    let comms = listener.owners.iter().map(|owner| owner.comm.as_str());
    let names: Vec<&str> = exe.into_iter().chain(comms).collect();
    PROGRAMS
        .iter()
        .find(|program| program.names.iter().any(|known| names.iter().any(|name| is(name, known))))
}

/// Whether a name is a program's, with its version perhaps.
fn is(name: &str, program: &str) -> bool {
    let version =
        |rest: &str| rest.is_empty() || rest.starts_with(|c: char| c == '.' || c.is_ascii_digit());
    name.strip_prefix(program).is_some_and(version)
}

/// The default that a listener's backlog is, if its program is known for that.
#[must_use]
pub fn default_of(listener: &Listener) -> Option<&'static Default> {
    // What it asked for is what tells; of an older listener only what it got is known.
    let backlog = match listener.requested {
        Some(requested) => u32::try_from(requested).ok()?,
        None => listener.accept.limit?,
    };
    of(listener)?.defaults.iter().find(|default| default.backlog == backlog)
}

/// Where to set the backlog of a listener.
#[must_use]
pub fn setting(listener: &Listener, backlog: u32) -> String {
    let known = default_of(listener).map(|default| default.setting);
    let known = known.or_else(|| of(listener).and_then(|program| program.setting));
    match known {
        Some(setting) if setting.contains("{}") => setting.replacen("{}", &backlog.to_string(), 1),
        Some(setting) => format!("{backlog} as {setting}"),
        None => {
            format!("{backlog} as the second argument of listen(), or the setting that leads there")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_need_the_program_and_the_number() {
        let check = |exe: &str, comm: &str, requested, limit, whose: Option<&str>| {
            let mut listener = crate::view::sample();
            listener.belongs.exe = Some(exe.into());
            listener.owners.iter_mut().for_each(|owner| owner.comm = comm.into());
            (listener.requested, listener.accept.limit) = (requested, Some(limit));
            assert_eq!(default_of(&listener).map(|default| default.whose), whose, "{exe} {comm}");
        };
        check("/usr/sbin/nginx", "nginx", Some(511), 511, Some("nginx"));
        check("/usr/sbin/nginx", "nginx", Some(511), 128, Some("nginx"));
        check("/usr/sbin/nginx", "nginx", None, 511, Some("nginx"));
        check("/usr/sbin/nginx", "nginx", Some(1024), 511, None);
        check("/usr/bin/python3.11", "gunicorn", None, 2048, None);
        check("/usr/bin/busybox", "redis-server", None, 511, Some("Redis"));
        check("/opt/mine", "mine", Some(511), 511, None);
        check("/usr/bin/node", "node", Some(-1), 511, None);
        check("/usr/bin/node", "node", Some(511), 511, Some("Node.js"));
        check("/usr/bin/node_exporter", "node_exporter", Some(511), 511, None);
        check("/usr/sbin/php-fpm8.2", "php-fpm8.2", Some(511), 511, Some("PHP-FPM"));
    }

    #[test]
    fn a_setting_names_the_number() {
        let listener = crate::view::sample();
        assert_eq!(setting(&listener, 256), "`listen … backlog=256` in its configuration");
        let mut unknown = crate::view::sample();
        unknown.belongs.exe = Some("/opt/mine".into());
        unknown.owners.clear();
        assert!(setting(&unknown, 256).starts_with("256 as the second argument"));
    }
}
