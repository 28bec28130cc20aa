//! Where the fields and the counters are in this kernel.

use super::btf::{Btf, Place};
use socktrace_common::layout::ABSENT;

use crate::error::{Error, Result};

pub(super) const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";

/// A field that the programs read: `(global, type, path, required, in bits)`.
type Field = (&'static str, &'static str, &'static str, bool, bool);

macro_rules! fields {
    ($($name:ident $type:literal $path:literal $need:ident $unit:ident;)*) => {
        &[$((stringify!($name), $type, $path, fields!(@ $need), fields!(@ $unit)),)*]
    };
    (@ required) => { true };
    (@ optional) => { false };
    (@ bits) => { true };
    (@ bytes) => { false };
}
const FIELDS: &[Field] = socktrace_common::for_each_field!(fields);

/// Fields that only tell how another one is laid out: nothing is missing without them.
const HINTS: &[&str] = &["NET_PORTS_LOCK"];

/// A counter that the programs read: `(global, enumerator, how far after the one before)`.
type Counter = (&'static str, &'static str, u32);

macro_rules! counters {
    ($($name:ident $enumerator:literal $after:literal;)*) => {
        &[$((stringify!($name), $enumerator, $after),)*]
    };
}
const COUNTERS: &[Counter] = socktrace_common::for_each_counter!(counters);

/// `unsigned long mibs[__LINUX_MIB_MAX]` (struct linux_mib)
const COUNTER_SIZE: u32 = 8;

/// Offsets by the name of their global.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) offsets: Vec<(&'static str, u32)>,
    /// Fields that this kernel does not have, as `type.member`.
    pub(super) absent: Vec<String>,
    /// `inet_reqsk_clone` is there.
    pub(super) migrates: bool,
    /// How many arguments `unix_find_other` has: its result stands behind them.
    pub(super) unix_find_arguments: Option<u32>,
}

pub(super) fn parse(bytes: &[u8]) -> Result<Btf<'_>> {
    Btf::new(bytes).map_err(|error| kernel(format!("{BTF_PATH} cannot be understood: {error}")))
}

impl Layout {
    pub(super) fn find(btf: &Btf<'_>) -> Result<Self> {
        let names: Vec<&str> = FIELDS.iter().map(|field| field.1).collect();
        let migrates = btf.has_function("inet_reqsk_clone");
        let unix_find_arguments = btf.arguments("unix_find_other");
        let mut layout =
            Self { offsets: Vec::new(), absent: Vec::new(), migrates, unix_find_arguments };
        for (&(global, type_name, path, required, bits), id) in FIELDS.iter().zip(find(btf, &names))
        {
            let found =
                id.and_then(|id| btf.place(id, path)).and_then(|place| in_unit(place, bits));
            match found {
                Some(offset) => layout.offsets.push((global, offset)),
                None if required => {
                    return Err(kernel(format!(
                        "this kernel's BTF has no field {type_name}.{path}, which socktrace reads"
                    )));
                }
                None => {
                    if !HINTS.contains(&global) {
                        layout.absent.push(format!("{type_name}.{path}"));
                    }
                    layout.offsets.push((global, ABSENT));
                }
            }
        }
        layout.offsets.extend(counters(btf)?);
        Ok(layout)
    }
}

/// Where the kernel's counters are, and that those which are read at once lie side by side.
fn counters(btf: &Btf<'_>) -> Result<Vec<(&'static str, u32)>> {
    let names: Vec<&str> = COUNTERS.iter().map(|counter| counter.1).collect();
    let mut offsets = Vec::new();
    let mut before = 0;
    for (&(global, name, after), value) in COUNTERS.iter().zip(btf.enumerators(&names)) {
        let value = value.ok_or_else(|| {
            kernel(format!("this kernel's BTF has no counter {name}, which socktrace reads"))
        })?;
        if after != 0 && value != before + after {
            return Err(kernel(format!(
                "this kernel's counter {name} does not stand beside its neighbour"
            )));
        }
        before = value;
        offsets.push((global, value * COUNTER_SIZE));
    }
    Ok(offsets)
}

/// Ids of structures, where a name may be asked for more than once.
fn find(btf: &Btf<'_>, names: &[&str]) -> Vec<Option<u32>> {
    let mut unique = names.to_vec();
    unique.sort_unstable();
    unique.dedup();
    let ids = btf.structs(&unique);
    names.iter().map(|name| unique.binary_search(name).ok().and_then(|index| ids[index])).collect()
}

/// A bit-field may have become a byte of its own on another kernel, so bits can be asked of either;
/// bytes cannot be asked of a bit-field.
fn in_unit(place: Place, bits: bool) -> Option<u32> {
    match (bits, place.bit_field) {
        (true, _) => Some(place.bits),
        (false, true) => None,
        (false, false) => Some(place.bits / 8),
    }
}

fn kernel(what: String) -> Error {
    Error::Kernel {
        what,
        remedy: "run a kernel of 5.10 or later with CONFIG_DEBUG_INFO_BTF=y, or report its version"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The running kernel's fields are where an independent library finds them.
    #[test]
    fn offsets_agree_with_btfparse() {
        use btfparse::{Error, ErrorKind, Offset, Readable, TypeInformation};
        struct Bytes(Vec<u8>);
        impl Readable for Bytes {
            fn read(&self, offset: u64, to: &mut [u8]) -> btfparse::Result<()> {
                let start = usize::try_from(offset).unwrap();
                let from = self.0.get(start..start + to.len());
                to.copy_from_slice(from.ok_or_else(|| Error::new(ErrorKind::EOF, "end"))?);
                Ok(())
            }
        }
        let bytes = std::fs::read(BTF_PATH).unwrap();
        let layout = Layout::find(&parse(&bytes).unwrap()).unwrap();
        let types = TypeInformation::new(&Bytes(bytes)).unwrap();
        for (&(global, type_name, path, _, bits), &(name, ours)) in
            FIELDS.iter().zip(&layout.offsets)
        {
            assert_eq!(global, name);
            let theirs = types
                .id_of(type_name)
                .and_then(|id| types.offset_of(id, path).ok())
                .map_or(ABSENT, |(_, offset)| match offset {
                    Offset::ByteOffset(byte) if bits => byte * 8,
                    Offset::ByteOffset(byte) => byte,
                    Offset::BitOffsetAndSize(bit, _) => bit,
                });
            assert_eq!(ours, theirs, "{type_name}.{path}");
        }
    }

    #[test]
    fn every_counter_is_found() {
        let bytes = std::fs::read(BTF_PATH).unwrap();
        let layout = Layout::find(&parse(&bytes).unwrap()).unwrap();
        let mut offsets: Vec<u32> = COUNTERS
            .iter()
            .map(|(global, ..)| layout.offsets.iter().find(|(name, _)| name == global).unwrap().1)
            .collect();
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len(), COUNTERS.len());
        assert!(offsets.iter().all(|offset| offset % COUNTER_SIZE == 0));
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = parse(b"").unwrap_err();
        assert!(error.to_string().contains(BTF_PATH), "{error}");
    }

    #[test]
    fn fields_are_listed_once() {
        let mut names: Vec<_> = FIELDS.iter().map(|field| field.0).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FIELDS.len());
    }
}
