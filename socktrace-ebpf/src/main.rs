//! The kernel side of socktrace.
//!
//! `listener` and `account` say what a hook means; `fentry`, `kprobe` and `tracepoint` are thin shells that hand
//! it the arguments of one way to attach; `snapshot` and `adopt` run when the user side asks.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(clippy::needless_pass_by_value, reason = "aya hands the context over by value")]

mod account;
mod adopt;
mod calls;
mod connect;
mod events;
mod fentry;
mod filter;
mod group;
mod kprobe;
mod layout;
mod listener;
mod maps;
mod mem;
mod snapshot;
mod tracepoint;
mod unix;
mod waiting;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that read kernel memory are offered to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
