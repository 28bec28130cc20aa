//! Events out of the ring buffer.

use aya::maps::{Map, MapData, RingBuf};
use socktrace_common::event::{Event, UnixEvent, UnixName};

use crate::error::{Error, Result};

pub(super) struct Ring(RingBuf<MapData>);

/// An event, and the name that goes with it where it is about an AF_UNIX socket.
#[derive(Clone, Debug)]
pub struct Happened {
    pub event: Event,
    /// In a box: most have none.
    pub name: Option<Box<UnixName>>,
}

impl Ring {
    pub(super) fn new(map: Map) -> Result<Self> {
        let ring = map.try_into().map_err(Error::run("cannot map the ring buffer"))?;
        Ok(Self(ring))
    }

    /// The oldest event that was not read yet.
    pub(super) fn next(&mut self) -> Option<Result<Happened>> {
        let item = self.0.next()?;
        Some(decode(&item))
    }
}

/// Makes an event of a record.
fn decode(bytes: &[u8]) -> Result<Happened> {
    let damaged = || Error::Run {
        what: "an event cannot be read".into(),
        source: format!("its record is {} bytes long", bytes.len()).into(),
    };
    match bytes.len() {
        length if length == size_of::<Event>() => {
            let event = take::<Event>(bytes).ok_or_else(damaged)?;
            Ok(Happened { event, name: None })
        }
        length if length == size_of::<UnixEvent>() => {
            let UnixEvent { event, name } = take(bytes).ok_or_else(damaged)?;
            Ok(Happened { event, name: Some(Box::new(name)) })
        }
        _ => Err(damaged()),
    }
}

/// Types of the kernel boundary: made of integers, without padding.
trait Record: Copy {}
impl Record for Event {}
impl Record for UnixEvent {}

fn take<T: Record>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: the bytes are there, checked above, and every bit pattern is a value.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_length_is_an_error() {
        for length in 0..=size_of::<UnixEvent>() + 8 {
            let good = length == size_of::<Event>() || length == size_of::<UnixEvent>();
            assert_eq!(decode(&vec![0xff; length]).is_ok(), good, "{length}");
        }
    }
}
