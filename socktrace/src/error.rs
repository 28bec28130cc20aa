//! What can go wrong, in words that say what to do next, and the exit code of each.

use std::process::ExitCode;

use crate::bpf::Backend;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Wrong usage that the argument parser could not see.
    #[error("{0}")]
    Usage(String),

    /// The user lacks a privilege.
    #[error("{what}; missing: {missing}\n  remedy: {remedy}")]
    Privilege { what: String, missing: String, remedy: String },

    /// The kernel lacks something.
    #[error("{what}\n  remedy: {remedy}")]
    Kernel { what: String, remedy: String },

    /// The kernel refused every way to attach that was tried, each for a reason.
    #[error(
        "{}{}\n  remedy: `socktrace check` shows what this kernel allows; --backend auto takes the \
         first that works",
        match .0.as_slice() {
            [_] => "the kernel does not allow this way to attach:",
            _ => "the kernel allows none of the ways to attach:",
        },
        .0.iter().map(|(backend, why)| format!("\n  {backend}: {why}")).collect::<String>()
    )]
    Refused(Vec<(Backend, String)>),

    /// It went wrong while running.
    #[error("{what}: {source}")]
    Run {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The reader of stdout went away, which is how `| head` ends a run.
    #[error("the reader of standard output went away")]
    BrokenPipe,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn run<E>(what: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        |source| Self::Run { what: what.into(), source: source.into() }
    }

    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::BrokenPipe => ExitCode::SUCCESS,
            Self::Run { .. } => ExitCode::from(1),
            Self::Usage(_) => ExitCode::from(2),
            Self::Privilege { .. } => ExitCode::from(3),
            Self::Kernel { .. } | Self::Refused(_) => ExitCode::from(4),
        }
    }
}

/// Errors of writing to stdout: a broken pipe is the end of the run, not a failure.
impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self::BrokenPipe
        } else {
            Self::Run { what: "cannot write the output".into(), source: error.into() }
        }
    }
}
