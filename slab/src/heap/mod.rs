//! The heap: size classes over caches, page frames for what is larger, and `GlobalAlloc` over both.
//!
//! A free finds out from the frame record, not from the layout, what the pointer is, and refuses a layout that does not
//! fit. Locks: none of its own.

mod classes;
#[cfg(test)]
mod tests;

use core::alloc::{GlobalAlloc, Layout};
use core::fmt;
use core::ptr::{self, NonNull};

use crate::cache::Cache;
use crate::fault::Fault;
use crate::frames::{Frames, InitError, Owner};
use crate::memory::Region;
use crate::platform::Platform;
use crate::stats::CacheStats;
use classes::{Block, SIZES};

/// A heap over all the memory of a machine.
///
/// A kernel has one, a `static` with `#[global_allocator]` on it, and calls [`init`](Self::init) early. Before that every
/// allocation fails.
///
/// Any CPU may use it at any time, interrupt handlers too (but no NMI handler: it may have interrupted the holder of a
/// lock). No call ever waits for anything but a short lock.
pub struct Heap<P> {
    caches: [Cache<P>; classes::COUNT],
    frames: Frames<P>,
}

impl<P> Heap<P> {
    /// A heap without memory.
    #[allow(clippy::new_without_default, reason = "a heap is a static, and `Default` is not const")]
    pub const fn new() -> Self {
        let mut caches = [const { Cache::new(0, SIZES[0]) }; classes::COUNT];
        let mut index = 1;
        while index < classes::COUNT {
            caches[index] = Cache::new(index as u32, SIZES[index]);
            index += 1;
        }
        Self { caches, frames: Frames::new() }
    }

    /// The page frames beneath, for whoever needs whole ones: page tables, stacks, buffers.
    pub const fn frames(&self) -> &Frames<P> {
        &self.frames
    }
}

impl<P: Platform> Heap<P> {
    /// Takes over all the usable memory of the map `regions`, which may be in any order and overlap (see
    /// [`memory`](crate::memory)). `physical_memory` is where physical address 0 is mapped.
    ///
    /// The frame records go to the end of the largest usable range: 16 bytes for each 4096.
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
        unsafe { self.frames.init(regions, physical_memory) }
    }

    /// A block for `layout`, not initialised; `None` where there is no memory for it.
    ///
    /// An empty layout gets a block too, of the smallest size; it must be freed like any other.
    pub fn allocate(&self, layout: Layout) -> Option<NonNull<u8>> {
        NonNull::new(match Block::of(layout)? {
            Block::Class(class) => self.caches[class].allocate(&self.frames)?,
            Block::Frames { count, alignment } => {
                let frame = self.frames.allocate_run(count, alignment)?;
                self.frames.pointer(frame)
            }
        })
    }

    /// Frees a block that [`allocate`](Self::allocate) or [`reallocate`](Self::reallocate) returned.
    ///
    /// A pointer or layout that cannot be right is refused before anything has changed, and reported: see *Bad frees*
    /// in the crate's documentation.
    ///
    /// # Safety
    ///
    /// `block` came from this heap for `layout`, and nobody uses it any more.
    pub unsafe fn free(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.try_free(block.as_ptr(), layout) }.unwrap_or_else(|fault| fault.report(block.as_ptr()));
    }

    unsafe fn try_free(&self, block: *mut u8, layout: Layout) -> Result<(), Fault> {
        match self.find(block, layout)? {
            // SAFETY: nobody uses it any more, says the caller.
            Found::Object(cache) => unsafe { cache.free(&self.frames, block) },
            Found::Frames { frame, count } => self.frames.try_shrink_run(frame, count, 0),
        }
    }

    /// Changes the size of a block to `new_size` bytes and keeps its contents, as far as they fit. The block stays where it
    /// is as long as its class or its number of frames stays the same, and when it gives up frames; else it moves.
    ///
    /// `None` where there is no memory, or no layout of that size: the block is then as it was.
    ///
    /// # Safety
    ///
    /// `block` came from this heap for `layout`. It is no longer valid once this returns another.
    pub unsafe fn reallocate(&self, block: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
        let new_layout = Layout::from_size_align(new_size, layout.align()).ok()?;
        let new = Block::of(new_layout)?;
        let stays =
            self.resize_in_place(block.as_ptr(), layout, new).unwrap_or_else(|fault| fault.report(block.as_ptr()));
        if stays {
            return Some(block);
        }
        let moved = self.allocate(new_layout)?;
        // SAFETY: the blocks are distinct, and both have the smaller of the two sizes.
        unsafe { ptr::copy_nonoverlapping(block.as_ptr(), moved.as_ptr(), layout.size().min(new_size)) };
        // SAFETY: the caller gives the block up for the new one.
        unsafe { self.free(block, layout) };
        Some(moved)
    }

    /// Whether the block now is what `new` asks for, without having moved.
    fn resize_in_place(&self, block: *mut u8, layout: Layout, new: Block) -> Result<bool, Fault> {
        match (self.find(block, layout)?, new) {
            (Found::Object(cache), new) => {
                cache.check(&self.frames, block)?;
                Ok(matches!(new, Block::Class(class) if cache.object_size() == SIZES[class]))
            }
            (Found::Frames { frame, count: old }, Block::Frames { count, .. }) if count <= old => {
                self.frames.try_shrink_run(frame, old, count)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// What is at `block`, which was allocated for `layout`, by its frame's record; nothing is dereferenced.
    fn find(&self, block: *mut u8, layout: Layout) -> Result<Found<'_, P>, Fault> {
        let wanted = Block::of(layout).ok_or(Fault::BadAddress)?;
        let frame = self.frames.frame_of(block).ok_or(Fault::BadAddress)?;
        let found = match self.frames.owner(frame) {
            Owner::Slab { cache, .. } => {
                let cache = self.caches.get(cache as usize).ok_or(Fault::BadAddress)?;
                (Found::Object(cache), cache.object_size())
            }
            Owner::Pages(_) if self.frames.pointer(frame) != block => return Err(Fault::BadBase),
            Owner::Pages(count) => {
                let block = Block::Frames { count, alignment: crate::Order::ZERO };
                (Found::Frames { frame, count }, block.size())
            }
            _ => return Err(self.frames.fault_at(frame)),
        };
        if found.1 != wanted.size() {
            return Err(Fault::BadSize { freed: wanted.size(), allocated: found.1 });
        }
        Ok(found.0)
    }

    /// Counts of the caches, one after the other, by size.
    pub fn cache_stats(&self) -> impl Iterator<Item = CacheStats> {
        self.caches.iter().map(Cache::stats)
    }

    /// The allocator's own tables: page frames by order, and a row for each cache that has been used. Printing them
    /// allocates nothing, and no lock is held while the text is written.
    pub fn tables(&self) -> impl fmt::Display {
        Tables(self)
    }
}

/// What a pointer turned out to be.
enum Found<'a, P> {
    Object(&'a Cache<P>),
    Frames { frame: crate::Frame, count: u32 },
}

struct Tables<'a, P>(&'a Heap<P>);

impl<P: Platform> fmt::Display for Tables<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.0.frames.stats())?;
        writeln!(f, "{}", CacheStats::HEADER)?;
        let used = self.0.cache_stats().filter(|stats| stats.allocations + stats.failures > 0);
        for stats in used {
            writeln!(f, "{stats}")?;
        }
        Ok(())
    }
}

impl<P> fmt::Debug for Heap<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").finish_non_exhaustive()
    }
}

// SAFETY: blocks are disjoint, aligned and as large as their layout, and stay where they are; no method unwinds unless the
// caller has broken the contract, and then a kernel stops there.
unsafe impl<P: Platform> GlobalAlloc for Heap<P> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.allocate(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.try_free(block, layout) }.unwrap_or_else(|fault| fault.report(block));
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Some(block) = NonNull::new(block) else { Fault::BadAddress.report(block) };
        // SAFETY: passed on to the caller.
        unsafe { self.reallocate(block, layout, new_size) }.map_or(ptr::null_mut(), NonNull::as_ptr)
    }
}
