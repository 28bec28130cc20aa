//! Array maps as memory that the kernel side writes and the user side reads, without a system call.

use std::{marker::PhantomData, ptr::NonNull};

use aya::maps::{Map, MapData};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::AsFd as _;

use crate::error::{Error, Result};

/// The elements of a memory-mappable BPF array.
#[derive(Debug)]
pub(super) struct Shared<T> {
    base: NonNull<u8>,
    /// Where the first element is in the mapping.
    skip: usize,
    bytes: usize,
    stride: usize,
    len: u32,
    /// Keeps the map alive, and its file descriptor where programs that are loaded later find it.
    _map: Option<MapData>,
    _type: PhantomData<T>,
}

/// A memory-mappable BPF array of which single elements are mapped when they are wanted.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    name: &'static str,
    map: MapData,
    len: u32,
    _type: PhantomData<T>,
}

impl<T: Copy> Shelf<T> {
    pub(super) fn new(name: &'static str, map: Map, len: u32) -> Result<Self> {
        Ok(Self { name, map: array(name, map)?, len, _type: PhantomData })
    }

    /// One element, at index 0 of what is returned.
    pub(super) fn at(&self, index: u32) -> Result<Shared<T>> {
        assert!(index < self.len, "element {index} of {}", self.len);
        let page = rustix::param::page_size();
        let stride = stride::<T>();
        let start = stride * index as usize;
        let skip = start % page;
        let bytes = (skip + stride).next_multiple_of(page);
        let base = mapping(self.name, &self.map, (start - skip) as u64, bytes)?;
        Ok(Shared { base, skip, bytes, stride, len: 1, _map: None, _type: PhantomData })
    }
}

fn array(name: &str, map: Map) -> Result<MapData> {
    match map {
        Map::Array(map) => Ok(map),
        _ => Err(Error::Run {
            what: format!("the eBPF object is damaged: {name} is not an array"),
            source: "rebuild socktrace".into(),
        }),
    }
}

/// The kernel rounds the size of an element up to 8 (kernel/bpf/arraymap.c).
fn stride<T>() -> usize {
    size_of::<T>().next_multiple_of(8)
}

fn mapping(name: &str, map: &MapData, offset: u64, bytes: usize) -> Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address the kernel chooses; BPF arrays with BPF_F_MMAPABLE
    // cover whole pages.
    let base = unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            map.fd().as_fd(),
            offset,
        )
    }
    .map_err(Error::run(format!("cannot map the BPF array {name}")))?;
    NonNull::new(base.cast()).ok_or_else(|| Error::Run {
        what: format!("cannot map the BPF array {name}"),
        source: "the kernel returned a null address".into(),
    })
}

// SAFETY: the mapping is reached through `&self` with volatile accesses only, from any thread.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T: Copy> Shared<T> {
    pub(super) fn new(name: &str, map: Map, len: u32) -> Result<Self> {
        let map = array(name, map)?;
        let stride = stride::<T>();
        let bytes = (stride * len as usize).next_multiple_of(rustix::param::page_size());
        let base = mapping(name, &map, 0, bytes)?;
        Ok(Self { base, skip: 0, bytes, stride, len, _map: Some(map), _type: PhantomData })
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    fn at(&self, index: u32) -> *mut T {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: within the mapping, checked above.
        unsafe { self.base.as_ptr().add(self.skip + index as usize * self.stride).cast() }
    }

    pub(super) fn read(&self, index: u32) -> T {
        // SAFETY: within the mapping; `T` is made of integers, so every bit pattern is a value.
        unsafe { self.at(index).read_volatile() }
    }

    pub(super) fn write(&self, index: u32, value: T) {
        // SAFETY: as for `read`.
        unsafe { self.at(index).write_volatile(value) }
    }

    /// Reads one field at its byte offset.
    pub(super) fn read_u32(&self, index: u32, offset: usize) -> u32 {
        // SAFETY: within the element.
        unsafe { self.field(index, offset).read_volatile() }
    }

    fn field(&self, index: u32, offset: usize) -> *mut u32 {
        assert!(
            offset + size_of::<u32>() <= size_of::<T>() && offset.is_multiple_of(align_of::<u32>())
        );
        // SAFETY: within the element, checked above.
        unsafe { self.at(index).cast::<u8>().add(offset).cast() }
    }

    /// Writes one field at its byte offset and leaves the others to the kernel side.
    pub(super) fn write_u32(&self, index: u32, offset: usize, value: u32) {
        // SAFETY: within the element.
        unsafe { self.field(index, offset).write_volatile(value) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody holds a reference into it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
