//! socktrace: both listen queues of every TCP listener, live.
//!
//! The way through the house: `bpf` (the only module that knows aya) and `host` (the only one that
//! reads `/proc`, netlink and namespaces) bring facts in, `engine` (no I/O, no clock) makes
//! [`model::Listener`]s of them, `view` prints those. `verb` connects the four for each command.

pub mod bpf;
pub mod cli;
pub mod diagnose;
pub mod engine;
pub mod error;
pub mod event;
pub mod filter;
pub mod host;
pub mod ledger;
pub mod model;
pub mod verb;
pub mod view;
