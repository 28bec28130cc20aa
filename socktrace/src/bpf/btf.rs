//! Offsets of fields and values of enumerators from BTF, the kernel's description of its own types
//! (Documentation/bpf/btf.rst).
//!
//! Only as much as is needed for that: types are walked over once, without a copy of any. Libraries
//! that build a model of all 150,000 types take longer for it than the rest of the start-up.

use std::{collections::HashSet, ffi::CStr};

/// The offset of a field in bits, and whether it is a bit-field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) bits: u32,
    pub(super) bit_field: bool,
}

#[derive(Debug)]
pub(super) struct Btf<'a> {
    /// Each type's record, its id less one the index.
    types: Vec<&'a [u8]>,
    strings: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BtfError {
    #[error("it is not BTF")]
    NotBtf,
    #[error("it is cut short")]
    CutShort,
    #[error("it has a kind of type, {0}, that this version of socktrace does not know")]
    UnknownKind(u32),
}

/// Kinds of types (include/uapi/linux/btf.h).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

const MAGIC: u16 = 0xeb9f;
const HEADER: u32 = 24;
/// Name, information, size or type.
const RECORD: usize = 12;
/// Name, type, offset.
const MEMBER: usize = 12;
/// Name, value.
const ENUMERATOR: usize = 8;
/// Deeper nesting than any kernel's; what is deeper is damaged and may go round in circles.
const DEEPEST: u32 = 32;

impl<'a> Btf<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, BtfError> {
        if bytes.get(..2) != Some(&MAGIC.to_ne_bytes()) {
            return Err(BtfError::NotBtf);
        }
        let header = |index: usize| u32_at(bytes, 4 + 4 * index).map(|n| n as usize);
        let section = |offset: Option<usize>, length: Option<usize>| {
            let start = header(0)?.checked_add(offset?)?;
            bytes.get(start..start.checked_add(length?)?)
        };
        let mut rest = section(header(1), header(2)).ok_or(BtfError::CutShort)?;
        let strings = section(header(3), header(4)).ok_or(BtfError::CutShort)?;
        let mut types = Vec::new();
        while !rest.is_empty() {
            let length = length(rest)?;
            let (record, after) = rest.split_at_checked(length).ok_or(BtfError::CutShort)?;
            types.push(record);
            rest = after;
        }
        Ok(Self { types, strings })
    }

    /// Ids of the structures with these names, in their order.
    pub(super) fn structs(&self, names: &[&str]) -> Vec<Option<u32>> {
        let mut found = vec![None; names.len()];
        for (id, record) in (1..).zip(&self.types) {
            if kind(record) != kind::STRUCT {
                continue;
            }
            let Some(name) = self.name(record) else {
                continue;
            };
            if let Some(index) = names.iter().position(|wanted| wanted.as_bytes() == name) {
                found[index].get_or_insert(id);
            }
        }
        found
    }

    /// Values of the enumerators with these names, in their order.
    pub(super) fn enumerators(&self, names: &[&str]) -> Vec<Option<u32>> {
        let mut found = vec![None; names.len()];
        for record in self.types.iter().filter(|record| kind(record) == kind::ENUM) {
            for enumerator in record.get(RECORD..).unwrap_or(&[]).chunks_exact(ENUMERATOR) {
                let Some(name) = u32_at(enumerator, 0).and_then(|name| self.string(name)) else {
                    continue;
                };
                if let Some(index) = names.iter().position(|wanted| wanted.as_bytes() == name) {
                    found[index] = found[index].or(u32_at(enumerator, 4));
                }
            }
        }
        found
    }

    /// Whether the kernel has a function of this name.
    pub(super) fn has_function(&self, name: &str) -> bool {
        let mut functions = self.types.iter().filter(|record| kind(record) == kind::FUNC);
        functions.any(|record| self.name(record) == Some(name.as_bytes()))
    }

    /// How many arguments a function of the kernel has.
    pub(super) fn arguments(&self, name: &str) -> Option<u32> {
        let function = self.types.iter().find(|record| {
            kind(record) == kind::FUNC && self.name(record) == Some(name.as_bytes())
        })?;
        let prototype = self.resolve(u32_at(function, 8)?)?;
        (kind(prototype) == kind::FUNC_PROTO).then_some(u32_at(prototype, 4)? & 0xffff)
    }

    /// BTF in which functions, and types of tracepoints, of these names have the ids they have here, and all
    /// else is nameless: whoever only asks for ids by names need not read all of it.
    pub(super) fn ids_only(
        &self,
        functions: &HashSet<Vec<u8>>,
        tracepoints: &HashSet<Vec<u8>>,
    ) -> Vec<u8> {
        const NAMELESS: [[u8; 4]; 3] = [[0; 4], (kind::FWD << 24).to_ne_bytes(), [0; 4]];
        let mut strings = vec![0];
        let mut types = Vec::with_capacity(self.types.len() * RECORD);
        for record in &self.types {
            let kind = kind(record);
            let wanted = match kind {
                kind::FUNC => functions,
                kind::TYPEDEF => tracepoints,
                _ => &HashSet::new(),
            };
            let name = if wanted.is_empty() { None } else { self.name(record) };
            if let Some(name) = name.filter(|name| wanted.contains(*name)) {
                let at = strings.len() as u32;
                types.extend([at, kind << 24, 0].map(u32::to_ne_bytes).as_flattened());
                strings.extend_from_slice(name);
                strings.push(0);
            } else {
                types.extend(NAMELESS.as_flattened());
            }
        }
        let length = types.len() as u32;
        let header = [HEADER, 0, length, length, strings.len() as u32].map(u32::to_ne_bytes);
        [&MAGIC.to_ne_bytes()[..], &[1, 0], header.as_flattened(), &types, &strings].concat()
    }

    /// Where a member is, by its path (`outer.inner`); members of unnamed members count as the
    /// outer type's own.
    pub(super) fn place(&self, id: u32, path: &str) -> Option<Place> {
        self.place_below(id, path, 0, DEEPEST)
    }

    fn place_below(&self, id: u32, path: &str, base: u32, deepest: u32) -> Option<Place> {
        let deepest = deepest.checked_sub(1)?;
        let record = self.resolve(id)?;
        let (first, rest) = match path.split_once('.') {
            Some((first, rest)) => (first, Some(rest)),
            None => (path, None),
        };
        for member in members(record)? {
            let bits = base.checked_add(member.bits)?;
            let name = self.string(member.name)?;
            let inside = if name.is_empty() {
                self.place_below(member.type_id, path, bits, deepest)
            } else if name != first.as_bytes() {
                None
            } else if let Some(rest) = rest {
                return self.place_below(member.type_id, rest, bits, deepest);
            } else {
                return Some(Place { bits, bit_field: member.bit_field });
            };
            if inside.is_some() {
                return inside;
            }
        }
        None
    }

    /// Through names and qualifiers to the type itself.
    fn resolve(&self, mut id: u32) -> Option<&'a [u8]> {
        for _ in 0..DEEPEST {
            let record = *self.types.get(id.checked_sub(1)? as usize)?;
            match kind(record) {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = u32_at(record, 8)?;
                }
                _ => return Some(record),
            }
        }
        None
    }

    fn name(&self, record: &[u8]) -> Option<&'a [u8]> {
        self.string(u32_at(record, 0)?)
    }

    fn string(&self, offset: u32) -> Option<&'a [u8]> {
        let text = self.strings.get(offset as usize..)?;
        CStr::from_bytes_until_nul(text).ok().map(CStr::to_bytes)
    }
}

struct Member {
    name: u32,
    type_id: u32,
    bits: u32,
    bit_field: bool,
}

/// The members of a structure or union.
fn members(record: &[u8]) -> Option<impl Iterator<Item = Member>> {
    if !matches!(kind(record), kind::STRUCT | kind::UNION) {
        return None;
    }
    // With this flag the upper 8 bits of an offset are the size of a bit-field.
    let sized = u32_at(record, 4)? >> 31 == 1;
    let members = record.get(RECORD..)?.chunks_exact(MEMBER).filter_map(move |member| {
        let offset = u32_at(member, 8)?;
        let (bits, size) = if sized { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
        Some(Member {
            name: u32_at(member, 0)?,
            type_id: u32_at(member, 4)?,
            bits,
            bit_field: size != 0,
        })
    });
    Some(members)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn kind(record: &[u8]) -> u32 {
    u32_at(record, 4).unwrap_or(0) >> 24 & 0x1f
}

/// How long the record of a type is, with what follows its first three words.
fn length(record: &[u8]) -> Result<usize, BtfError> {
    let count = (u32_at(record, 4).ok_or(BtfError::CutShort)? & 0xffff) as usize;
    let more = match kind(record) {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
        kind::ENUM | kind::FUNC_PROTO => 8 * count,
        1..=kind::ENUM64 => 0,
        other => return Err(BtfError::UnknownKind(other)),
    };
    Ok(RECORD + more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rubbish_is_an_error_not_a_panic() {
        let kernel = std::fs::read("/sys/kernel/btf/vmlinux").unwrap();
        for cut in [0, 1, 2, 10, 23, 24, 30, 1000, kernel.len() / 2, kernel.len() - 1] {
            assert!(Btf::new(&kernel[..cut]).is_err(), "cut at {cut}");
        }
        assert_eq!(Btf::new(b"not BTF at all").unwrap_err(), BtfError::NotBtf);
        // Every byte of the header and of the first types turned round.
        let head = &kernel[..4096];
        for at in 0..head.len() {
            let mut bytes = kernel.clone();
            bytes.truncate(bytes.len().min(200_000));
            bytes[at] ^= 0xff;
            if let Ok(btf) = Btf::new(&bytes) {
                let ids = btf.structs(&["sock", "list_head"]);
                for id in ids.into_iter().flatten() {
                    let _ = btf.place(id, "__sk_common.skc_family");
                }
                let _ = btf.enumerators(&["LINUX_MIB_LISTENDROPS"]);
            }
        }
    }

    #[test]
    fn types_that_go_round_in_circles_end() {
        // A structure with an unnamed member of its own type.
        let words: [u32; 6] = [0, kind::STRUCT << 24 | 1, 4, 0, 1, 0];
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_ne_bytes());
        bytes.extend([1, 0]);
        for word in [24, 0, 24, 24, 1_u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.push(0);
        let btf = Btf::new(&bytes).unwrap();
        assert_eq!(btf.place(1, "x"), None);
    }
}
