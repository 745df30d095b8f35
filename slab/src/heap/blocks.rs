//! Blocks by their pointer alone, for systems whose `free` is told no layout.
//!
//! What a pointer is, the frame record says and then the state of the slot, so any pointer may be asked about: one that is
//! none of this heap's is never dereferenced. Locks: none.

use core::alloc::Layout;
use core::panic::Location;
use core::ptr::{self, NonNull};

use super::classes::Block;
use super::{Found, Heap, SIZES};
use crate::fault::{Caller, Fault};
use crate::frames::{Frame, Owner};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

impl<P: Platform> Heap<P> {
    /// Bytes that the block at `block` has, all of which its owner may use; with checks, just those that were asked for.
    /// `None` where no block of this heap is allocated that starts there, whatever the pointer.
    ///
    /// Page frames that were taken from [`frames`](Self::frames) look like a large block. Objects of a
    /// [`Cache`](crate::Cache) are no blocks, and neither is what a heap [within](Self::create_heap) this one has.
    ///
    /// ```
    /// # use core::alloc::Layout;
    /// # use kslab::{Heap, platform::NoInterrupts};
    /// # static HEAP: Heap<NoInterrupts> = Heap::new();
    /// # let mut memory = vec![0_u64; 512 * 64];
    /// # // SAFETY: the buffer is nobody else's, and lives until the end.
    /// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
    /// let block = HEAP.allocate(Layout::new::<[u8; 100]>()).expect("memory");
    /// assert_eq!(HEAP.block_size(block.as_ptr()), Some(104));
    /// assert_eq!(HEAP.block_size(&raw const HEAP as *const u8), None);
    /// // SAFETY: nobody uses it any more.
    /// unsafe { HEAP.free_block(block) };
    /// assert_eq!(HEAP.block_size(block.as_ptr()), None);
    /// ```
    pub fn block_size(&self, block: *const u8) -> Option<usize> {
        self.block_at(block.cast_mut()).ok().map(|(_, size)| size)
    }

    /// Frees a block, whatever layout it was allocated for. A pointer that is none is refused before anything has changed,
    /// and reported: see *Bad frees* in the crate's documentation.
    ///
    /// # Safety
    ///
    /// `block` came from this heap, and nobody uses it any more.
    #[track_caller]
    pub unsafe fn free_block(&self, block: NonNull<u8>) {
        let caller = Some(Location::caller());
        // SAFETY: passed on to the caller.
        let freed = unsafe { self.free_block_for(block.as_ptr(), caller) };
        freed.unwrap_or_else(|fault| self.caches.report(fault, block.as_ptr(), caller));
    }

    /// The same without a report.
    ///
    /// # Errors
    ///
    /// What is wrong with the pointer; nothing has changed then.
    ///
    /// # Safety
    ///
    /// Nobody uses the block any more, if it is one.
    #[track_caller]
    pub unsafe fn try_free_block(&self, block: NonNull<u8>) -> Result<(), Fault> {
        // SAFETY: passed on to the caller.
        unsafe { self.free_block_for(block.as_ptr(), Some(Location::caller())) }
    }

    /// Makes the block one for `layout`, where it is and with its contents, as far as they fit: `false`, and nothing done,
    /// where it would have to move.
    ///
    /// # Errors
    ///
    /// What is wrong with the pointer; nothing has changed then.
    ///
    /// # Safety
    ///
    /// Nobody uses what is cut off from the block, if it is one.
    pub unsafe fn resize_block(&self, block: NonNull<u8>, layout: Layout) -> Result<bool, Fault> {
        let (found, _) = self.block_at(block.as_ptr())?;
        match Block::of(layout) {
            Some(new) => self.resize_in_place(&found, block.as_ptr(), new, layout.align()),
            None => Ok(false),
        }
    }

    /// Makes the block one for `layout`, with its contents, as far as they fit, elsewhere where it must be. `None` where
    /// there is no memory, or no such block, and where the pointer is refused, with a report: the block is then as it was.
    ///
    /// # Safety
    ///
    /// `block` came from this heap. It is no longer valid once this returns another.
    #[track_caller]
    pub unsafe fn reallocate_block(&self, block: NonNull<u8>, layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: passed on to the caller.
        let resized = unsafe { self.resize_block(block, layout) };
        let size = match resized.and_then(|in_place| Ok((in_place, self.block_at(block.as_ptr())?.1))) {
            Ok((true, _)) => return Some(block),
            Ok((false, size)) => size,
            Err(fault) => {
                self.caches.report(fault, block.as_ptr(), Some(Location::caller()));
                return None;
            }
        };
        let moved = self.allocate(layout)?;
        // SAFETY: the blocks are distinct, and both have the smaller of the two sizes.
        unsafe { ptr::copy_nonoverlapping(block.as_ptr(), moved.as_ptr(), size.min(layout.size())) };
        // SAFETY: the caller gives the block up for the new one.
        unsafe { self.free_block(block) };
        Some(moved)
    }

    /// The block behind `block` by address, or the first of all: one after the other, these are what
    /// [`for_each_block`](Self::for_each_block) visits and the blocks with checks that have no pages of their own. `block` need
    /// not be one.
    ///
    /// What is allocated or freed meanwhile may be left out or found. No memory may be given back meanwhile.
    pub fn block_after(&self, block: Option<NonNull<u8>>) -> Option<NonNull<u8>> {
        let frames = self.frames();
        let from = block.map_or(Some(0), |block| block.addr().get().checked_add(1))?;
        let first = block.map_or(Some(Frame::default()), |block| frames.frame_of(block.as_ptr()))?;
        let found = frames.owners_from(first).find_map(|(frame, owner)| {
            let start = frames.pointer(frame);
            let from = start.wrapping_add(from.saturating_sub(start.addr()));
            match owner {
                Owner::Pages(_) => (from == start).then_some(start),
                Owner::Slab { cache: id, .. } => {
                    let cache = self.caches.class_by_id(id).or_else(|| self.caches.class_twin(id))?;
                    cache.used_from(frames, from)
                }
                _ => None,
            }
        });
        NonNull::new(found?)
    }

    #[inline]
    unsafe fn free_block_for(&self, block: *mut u8, caller: Caller) -> Result<(), Fault> {
        let frames = self.frames();
        if let Some(Owner::Slab { cache: id, .. }) = frames.frame_of(block).map(|frame| frames.owner(frame))
            && let Some(cache) = self.caches.class_by_id(id)
            // SAFETY: nobody uses it any more, says the caller.
            && unsafe { cache.free_at_hand(&self.caches, block) }
        {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { self.free_found(block, caller) }
    }

    #[cold]
    unsafe fn free_found(&self, block: *mut u8, caller: Caller) -> Result<(), Fault> {
        match self.block_at(block) {
            // SAFETY: nobody uses it any more, says the caller.
            Ok((Found::Object { cache, state, .. }, _)) => unsafe { cache.free(&self.caches, block, state) },
            // SAFETY: as above.
            Ok((Found::Checked { twin }, _)) => unsafe { twin.free_checked(&self.caches, block, None, caller) },
            Ok((Found::Frames { frame, count }, _)) => self.frames().try_shrink_run(frame, count, 0),
            Err(fault) => Err(fault),
        }
    }

    /// The block at `block`, and its bytes.
    fn block_at(&self, block: *mut u8) -> Result<(Found<'_, P>, usize), Fault> {
        let found = self.find_any(block)?;
        let size = match &found {
            Found::Object { class, .. } => SIZES[*class],
            Found::Checked { twin } => twin.requested(&self.caches, block)?,
            Found::Frames { count, .. } => *count as usize * FRAME_SIZE,
        };
        Ok((found, size))
    }
}

#[cfg(test)]
mod tests;
