//! The one module that knows aya.

mod adopt;
pub mod backend;
mod btf;
mod layout;
mod log;
mod object;
mod ring;
mod shared;
mod times;
mod tracer;
mod wanted;

pub use adopt::PortHolder;
pub use backend::Backend;
pub use log::drain as drain_log;
pub use object::{Attempt, KernelBtf, Options};
pub use ring::Happened;
pub use tracer::{Counts, Lost, Netns, Tracer, Tracked};
pub use wanted::{LONGEST_COMM, Room, Wanted};
