//! The one module that knows aya.

mod adopt;
pub mod backend;
mod btf;
mod layout;
mod log;
mod object;
mod shared;
mod times;
mod tracer;

pub use backend::Backend;
pub use log::drain as drain_log;
pub use object::{Attempt, KernelBtf, Options};
pub use tracer::{Counts, Lost, Netns, Tracer, Tracked};
