//! Tests against a real kernel, as root. `cargo xtask test` runs them on this machine's kernel and
//! on every kernel of the matrix.
//!
//! Every expectation comes from outside socktrace: from what the workload did, from the socket's own
//! `getsockopt`, from `ss`. What a kernel cannot do is asserted to be refused, never skipped.
#![cfg(target_os = "linux")]

mod calls;
mod diagnose;
mod events;
mod exact;
mod lab;
mod listeners;
mod manners;
mod owners;
mod process;
mod queues;
mod run;
mod unix;
mod wire;
