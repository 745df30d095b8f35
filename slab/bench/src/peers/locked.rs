//! A lock around an allocator that has none.

use std::alloc::{GlobalAlloc, Layout};

use spin::Mutex;

/// An allocator for one at a time.
///
/// # Safety
///
/// As [`GlobalAlloc`].
pub unsafe trait Unlocked {
    /// # Safety
    ///
    /// As [`GlobalAlloc::alloc`].
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8;

    /// # Safety
    ///
    /// As [`GlobalAlloc::dealloc`].
    unsafe fn free(&mut self, block: *mut u8, layout: Layout);
}

#[derive(Debug)]
pub struct Locked<T>(pub Mutex<T>);

impl<T> Locked<T> {
    pub const fn new(allocator: T) -> Self {
        Self(Mutex::new(allocator))
    }
}

// SAFETY: what is locked is an allocator.
unsafe impl<T: Unlocked> GlobalAlloc for Locked<T> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on to the caller.
        unsafe { self.0.lock().allocate(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.0.lock().free(block, layout) }
    }
}
