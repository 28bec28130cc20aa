//! Offsets of kernel fields and other constants that the loader fills in.

use aya_ebpf::Global;
use socktrace_common::layout::ABSENT;

macro_rules! fields {
    ($($name:ident $type:literal $path:literal $need:ident $unit:ident;)*) => {
        $(
            #[doc = concat!("Offset of `", $type, ".", $path, "`.")]
            #[unsafe(no_mangle)]
            pub(crate) static $name: Global<u32> = Global::new(ABSENT);
        )*
    };
}
socktrace_common::for_each_field!(fields);

/// Number of possible CPUs: the stride of the `CELLS` map.
#[unsafe(no_mangle)]
pub(crate) static CPUS: Global<u32> = Global::new(1);

macro_rules! counters {
    ($($name:ident $enumerator:literal $after:literal;)*) => {
        $(
            #[doc = concat!("Offset of the counter ", $enumerator, " in `struct linux_mib`.")]
            #[unsafe(no_mangle)]
            pub(crate) static $name: Global<u32> = Global::new(ABSENT);
        )*
    };
}
socktrace_common::for_each_counter!(counters);
