//! dlmalloc, as ported to Rust, over the arena.

use std::alloc::Layout;
use std::ptr;

use super::locked::{Locked, Unlocked};
use super::peer;
use crate::arena::Arena;

/// The part of the arena that it has not asked for yet.
#[derive(Debug)]
struct Rest(spin::Mutex<Option<Arena>>);

// SAFETY: the arena is the process's.
unsafe impl Send for Rest {}

// SAFETY: memory is given away once, in a row, and never taken back.
unsafe impl ::dlmalloc::Allocator for Rest {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let mut rest = self.0.lock();
        match &mut *rest {
            Some(arena) if arena.bytes >= size => {
                let start = arena.start;
                *arena = Arena { start: start.wrapping_add(size), bytes: arena.bytes - size };
                (start, size, 0)
            }
            _ => (ptr::null_mut(), 0, 0),
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

type Heap = ::dlmalloc::Dlmalloc<Rest>;

static HEAP: Locked<Heap> = Locked::new(Heap::new_with_allocator(Rest(spin::Mutex::new(None))));

peer!(Dlmalloc, HEAP, |arena| *HEAP.0.lock().allocator().0.lock() = Some(arena));

// SAFETY: it is an allocator.
unsafe impl Unlocked for Heap {
    #[inline]
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on to the caller.
        unsafe { self.malloc(layout.size(), layout.align()) }
    }

    #[inline]
    unsafe fn free(&mut self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { Heap::free(self, block, layout.size(), layout.align()) }
    }
}
