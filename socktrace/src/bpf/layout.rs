//! Where the fields are in this kernel.

use btfparse::{Offset, Readable, TypeInformation};
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

/// Offsets by the name of their global.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) offsets: Vec<(&'static str, u32)>,
    /// Fields that this kernel does not have, as `type.member`.
    pub(super) absent: Vec<String>,
}

struct Bytes<'a>(&'a [u8]);

impl Readable for Bytes<'_> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> btfparse::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match self.0.get(start..start.saturating_add(buffer.len())) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(btfparse::Error::new(btfparse::ErrorKind::EOF, "the BTF is cut short")),
        }
    }
}

impl Layout {
    pub(super) fn find(btf: &[u8]) -> Result<Self> {
        let types = TypeInformation::new(&Bytes(btf))
            .map_err(|error| kernel(format!("{BTF_PATH} cannot be understood: {error:?}")))?;
        let mut layout = Self { offsets: Vec::new(), absent: Vec::new() };
        for &(global, type_name, path, required, bits) in FIELDS {
            let found = types
                .id_of(type_name)
                .and_then(|id| types.offset_of(id, path).ok())
                .and_then(|(_, offset)| in_unit(offset, bits));
            match found {
                Some(offset) => layout.offsets.push((global, offset)),
                None if required => {
                    return Err(kernel(format!(
                        "this kernel's BTF has no field {type_name}.{path}, which socktrace reads"
                    )));
                }
                None => {
                    layout.absent.push(format!("{type_name}.{path}"));
                    layout.offsets.push((global, ABSENT));
                }
            }
        }
        Ok(layout)
    }
}

/// A bit-field may have become a byte of its own on another kernel, so bits can be asked of either;
/// bytes cannot be asked of a bit-field.
fn in_unit(offset: Offset, bits: bool) -> Option<u32> {
    match (offset, bits) {
        (Offset::ByteOffset(byte), false) => Some(byte),
        (Offset::ByteOffset(byte), true) => byte.checked_mul(8),
        (Offset::BitOffsetAndSize(bit, _), true) => Some(bit),
        (Offset::BitOffsetAndSize(..), false) => None,
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

    #[test]
    fn rubbish_is_an_error_not_a_panic() {
        for bytes in [&b""[..], b"\x9f\xeb", &[0xff; 64], b"not BTF at all, but long enough to read"]
        {
            assert!(Layout::find(bytes).is_err());
        }
    }

    #[test]
    fn fields_are_listed_once() {
        let mut names: Vec<_> = FIELDS.iter().map(|field| field.0).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FIELDS.len());
    }
}
