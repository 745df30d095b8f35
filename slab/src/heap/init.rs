//! The ways in: how a heap gets its memory.

use super::{Heap, classes};
use crate::cache::AllocError;
use crate::frames::{AddError, InitError};
use crate::memory::Region;
use crate::platform::Platform;
use crate::source::{ChildHeap, FrameSource};

impl<P: Platform> Heap<P> {
    /// Takes over all the usable memory of the map `regions`, which may be in any order and overlap (see
    /// [`memory`](crate::memory)). `physical_memory` is where physical address 0 is mapped.
    ///
    /// The frame records go to the end of the largest usable range: 16 bytes for each 4096. Of that range's, those of 64 MiB are
    /// written now and the others as the memory is needed, so that 16 GiB take no longer than 1 GiB
    /// (`cargo bench --manifest-path slab/bench/Cargo.toml --bench compare -- -w W7-init`).
    ///
    /// # Errors
    ///
    /// See [`InitError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// 1. All memory that the map calls usable, and no reserved region touches, is ordinary memory that nobody else uses
    ///    from now on, and the iterator yields the same regions each time that it is cloned.
    /// 2. All of it is mapped, writable, at `physical_memory` plus its physical address, for as long as the heap or anything
    ///    allocated from it is used, and `physical_memory` may be used to access all of it.
    /// 3. What [`Platform`] asks for holds where the heap is used: for [`X86_64`](crate::platform::X86_64), ring 0.
    pub unsafe fn init<I>(&self, regions: I, physical_memory: *mut u8) -> Result<(), InitError>
    where
        I: IntoIterator<Item = Region>,
        I::IntoIter: Clone,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.frames().init(regions, physical_memory) }?;
        self.caches.set_up_cpus();
        Ok(())
    }

    /// Takes over the pages that lie wholly in the `bytes` bytes from `start` on: a range of virtual addresses,
    /// whatever the physical memory behind it, as `linked_list_allocator` has it. One page is enough. Addresses take
    /// the place of physical ones then: [`Frame::address`](crate::Frame::address) and the zones mean nothing.
    ///
    /// More can be added with [`add_range`](Self::add_range).
    ///
    /// # Errors
    ///
    /// See [`InitError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// The range is ordinary memory, mapped and writable for as long as the heap or anything allocated from it is used,
    /// and nobody else uses it from now on; `start` may be used to access all of it. What [`Platform`] asks for holds
    /// where the heap is used.
    pub unsafe fn init_range(&self, start: *mut u8, bytes: usize) -> Result<(), InitError> {
        // SAFETY: passed on to the caller.
        unsafe { self.frames().init_range(start, bytes) }?;
        self.caches.set_up_cpus();
        Ok(())
    }

    /// Lets `source` lend the heap all of its memory: nothing at first, then as it is needed. What is not used goes
    /// back when the heap [`shrink`](Self::shrink)s or [`maintain`](Self::maintain)s.
    ///
    /// A heap that has memory of its own borrows only when that is used up. `false`, and nothing done, where it has a
    /// source already.
    ///
    /// # Safety
    ///
    /// What the source lends is mapped for as long as it is lent, and all of it lies within 8 TiB of where the first of
    /// it lies.
    pub unsafe fn set_source(&self, source: &'static dyn FrameSource) -> bool {
        self.caches.set_source(source)
    }

    /// Takes over the usable memory of `regions` as well, mapped as the first was: see
    /// [`Frames::add`](crate::Frames::add).
    ///
    /// # Errors
    ///
    /// See [`AddError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// As [`init`](Self::init), for the new regions.
    pub unsafe fn add<I>(&self, regions: I) -> Result<usize, AddError>
    where
        I: IntoIterator<Item = Region>,
        I::IntoIter: Clone,
    {
        // SAFETY: passed on to the caller.
        let frames = unsafe { self.frames().add(regions) }?;
        self.caches.set_up_cpus();
        Ok(frames)
    }

    /// Takes over another range of virtual addresses, adjacent or not: see
    /// [`Frames::add_range`](crate::Frames::add_range).
    ///
    /// # Errors
    ///
    /// See [`AddError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// As [`init_range`](Self::init_range), for the new range; and what the heap was first given may be used to access
    /// it.
    pub unsafe fn add_range(&self, start: *mut u8, bytes: usize) -> Result<usize, AddError> {
        // SAFETY: passed on to the caller.
        let frames = unsafe { self.frames().add_range(start, bytes) }?;
        self.caches.set_up_cpus();
        Ok(frames)
    }

    /// A heap within this one, which has at most `limit` bytes of its page frames at a time and gives all of them back
    /// when it is dropped, whatever is still allocated from it. It takes up to 40 KiB for itself, beside the limit;
    /// in a debug build 48 KiB.
    ///
    /// # Errors
    ///
    /// [`AllocError::NoMemory`].
    pub fn create_heap(&self, name: &'static str, limit: usize) -> Result<ChildHeap<'_, P>, AllocError> {
        ChildHeap::new(self, name, limit)
    }

    /// What the heap is called; only those that [`create_heap`](Self::create_heap) makes have a name.
    pub fn name(&self) -> &'static str {
        self.caches.name()
    }

    /// Makes a heap without memory where `heap` points, piece by piece: it is too large for a kernel's stack.
    ///
    /// # Safety
    ///
    /// There is room for one, aligned, which nobody else uses.
    pub(crate) unsafe fn write_new(heap: *mut Self, name: &'static str) {
        // SAFETY: passed on to the caller.
        unsafe { crate::cache::Caches::write_new(&raw mut (*heap).caches, name, &classes::CACHES) };
    }
}

#[cfg(test)]
mod tests;
