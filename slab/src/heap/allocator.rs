//! `&Heap` as an allocator of the `allocator-api2` crate (feature `allocator-api2`).
//!
//! A block is handed out as all the bytes that it really has, and may then be given back with any size in between: each
//! of them leads to the same class or number of frames. An empty layout gets no block: that crate's `Box` allocates
//! none for a value without size, but frees it.

use core::alloc::Layout;
use core::ptr::NonNull;

use allocator_api2::alloc::{AllocError, Allocator};

use super::Heap;
use crate::platform::Platform;

/// Collections in a heap of choice, on stable Rust:
///
/// ```
/// # use kslab::memory::Region;
/// use allocator_api2::vec::Vec;
/// use kslab::{Heap, platform::NoInterrupts};
///
/// # let mut memory = vec![0_u64; 64 * 512];
/// # let start = memory.as_mut_ptr().cast::<u8>();
/// # let start = start.wrapping_add(start.align_offset(4096));
/// # let base = start.wrapping_sub(1 << 20);
/// # let region = Region::usable(1 << 20, 60 * 4096);
/// let heap: Heap<NoInterrupts> = Heap::new();
/// # // SAFETY: the buffer is nobody else's, and outlives the heap.
/// # unsafe { heap.init([region], base) }.unwrap();
/// let mut squares = Vec::new_in(&heap);
/// squares.extend((0..1000_u64).map(|n| n * n));
/// assert_eq!(squares[999], 998_001);
/// assert!(heap.used() >= squares.len() * 8);
/// ```
// SAFETY: blocks are disjoint, aligned and as large as said, and stay valid as long as the heap, which the reference keeps
// in its place; copies of the reference are the same heap.
unsafe impl<P: Platform> Allocator for &Heap<P> {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            return Ok(no_block(layout));
        }
        whole::<P>(Heap::allocate(self, layout), layout)
    }

    fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let block = Allocator::allocate(self, layout)?;
        // SAFETY: just allocated, with so many bytes.
        unsafe { block.cast::<u8>().write_bytes(0, block.len()) };
        Ok(block)
    }

    unsafe fn deallocate(&self, block: NonNull<u8>, layout: Layout) {
        if layout.size() > 0 {
            // SAFETY: passed on to the caller; see the module for the size.
            unsafe { self.free(block, layout) }
        }
    }

    unsafe fn grow(&self, block: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if old.size() == 0 {
            return Allocator::allocate(self, new);
        }
        // SAFETY: passed on to the caller.
        whole::<P>(unsafe { self.resize(block, old, new, None) }, new)
    }

    unsafe fn grow_zeroed(&self, block: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: passed on to the caller.
        let grown = unsafe { self.grow(block, old, new) }?;
        // SAFETY: the block has `grown.len()` bytes, which are not fewer than the old layout's.
        unsafe { grown.cast::<u8>().add(old.size()).write_bytes(0, grown.len() - old.size()) };
        Ok(grown)
    }

    unsafe fn shrink(&self, block: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if new.size() == 0 {
            // SAFETY: passed on to the caller.
            unsafe { self.deallocate(block, old) };
            return Ok(no_block(new));
        }
        // SAFETY: passed on to the caller.
        whole::<P>(unsafe { self.resize(block, old, new, None) }, new)
    }
}

/// What stands for the block of an empty layout.
fn no_block(layout: Layout) -> NonNull<[u8]> {
    NonNull::slice_from_raw_parts(layout.dangling_ptr(), 0)
}

/// All the bytes of a block for `layout`.
fn whole<P: Platform>(block: Option<NonNull<u8>>, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
    let (block, size) = block.zip(Heap::<P>::usable_size(layout)).ok_or(AllocError)?;
    Ok(NonNull::slice_from_raw_parts(block, size))
}
