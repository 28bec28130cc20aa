use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use socktrace::{
    cli::{Cli, Verb},
    error::Error,
    verb,
};

/// `diagnose` has findings.
const FOUND_SOMETHING: u8 = 10;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to stdout; clap knows which is which.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let result = match cli.verb.unwrap_or(Verb::Top(cli.top)) {
        Verb::Top(args) => verb::top::run(&args),
        Verb::List(args) => verb::list::run(&args),
        Verb::Events(args) => verb::events::run(&args),
        Verb::Check(args) => verb::check::run(&args),
        Verb::Diagnose(args) => match verb::diagnose::run(&args) {
            Ok(0) => Ok(()),
            Ok(_) => return ExitCode::from(FOUND_SOMETHING),
            Err(error) => Err(error),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, Error::BrokenPipe) {
                let bold = std::io::stderr().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
                let (on, off) = if bold { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
                let _ = writeln!(std::io::stderr(), "{on}socktrace:{off} {error}");
            }
            error.exit_code()
        }
    }
}
