//! Stacks with a guard page.

use core::cell::UnsafeCell;

use x86_64::VirtAddr;

/// Bytes in the guard page below a stack.
pub(crate) const GUARD: usize = 4096;

/// A stack of `SIZE` bytes in a static.
///
/// The page below it is unmapped by [`memory::init`](crate::memory::init), so that an overflow is a page fault, which
/// [`traps`](crate::traps) names after the stack.
#[repr(C, align(4096))]
pub(crate) struct Stack<const SIZE: usize> {
    guard: UnsafeCell<[u8; GUARD]>,
    memory: UnsafeCell<[u8; SIZE]>,
}

// SAFETY: only the CPU that runs on the stack uses the memory; no reference to it is ever made.
unsafe impl<const SIZE: usize> Sync for Stack<SIZE> {}

impl<const SIZE: usize> Stack<SIZE> {
    /// An unused stack.
    pub(crate) const fn new() -> Self {
        const { assert!(SIZE > 0 && SIZE.is_multiple_of(GUARD), "a stack is made of whole pages") };
        Self { guard: UnsafeCell::new([0; GUARD]), memory: UnsafeCell::new([0; SIZE]) }
    }

    /// The start of the guard page.
    pub(crate) fn guard(&self) -> VirtAddr {
        VirtAddr::from_ptr(self.guard.get())
    }

    /// The address just above the stack, where it starts to grow from.
    pub(crate) fn top(&self) -> VirtAddr {
        VirtAddr::from_ptr(self.memory.get()) + SIZE as u64
    }
}

impl<const SIZE: usize> core::fmt::Debug for Stack<SIZE> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Stack").field("guard", &self.guard()).field("top", &self.top()).finish()
    }
}
