//! Stacks with a guard page.

use core::cell::UnsafeCell;
use core::ops::Range;

use kslab::arena::Arena;
use kslab::memory::FRAME_SIZE;
use x86_64::VirtAddr;

use crate::cpus::Cpus;
use crate::heap::HEAP;
use crate::{image, memory};

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

/// Where [`MappedStack`]s are, and how many addresses there are for them.
const START: u64 = 0xffff_a000_0000_0000;
const ADDRESSES: u64 = 64 << 30;

static STACKS: Arena<Cpus> = Arena::new(HEAP.caches(), "stacks", FRAME_SIZE as u64);

/// A stack of any size, in page frames of its own, which are free again when it is dropped. The page below it is never
/// mapped, so that an overflow is a page fault, which [`traps`](crate::traps) names after whose stack it is.
#[derive(Debug)]
pub(crate) struct MappedStack {
    guard: VirtAddr,
    /// Bytes above the guard page.
    size: usize,
}

/// Whether stacks are in the memory that `address` is of, among other things.
pub(crate) fn may_be_at(address: VirtAddr) -> bool {
    (START..START + ADDRESSES).contains(&address.as_u64()) || image::is_data(address)
}

/// Gets the addresses for [`MappedStack`]s ready; whether there is memory for that.
pub(crate) fn init() -> bool {
    STACKS.add(START, ADDRESSES).is_ok()
}

impl MappedStack {
    /// A stack of `size` bytes, rounded up to whole pages; `None` where there is no memory, or there are no addresses.
    pub(crate) fn new(size: usize) -> Option<Self> {
        let size = size.checked_next_multiple_of(FRAME_SIZE)?;
        let guard = STACKS.alloc(GUARD.checked_add(size)? as u64).ok()?;
        let stack = Self { guard: VirtAddr::new(guard), size };
        // Where it could not be mapped, dropping it frees its addresses.
        memory::map_new(stack.bottom(), stack.pages()).then_some(stack)
    }

    /// The address just above the stack, where it starts to grow from.
    pub(crate) fn top(&self) -> VirtAddr {
        self.bottom() + self.size as u64
    }

    /// The addresses that it has above its guard page.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.bottom().as_u64() as usize..self.top().as_u64() as usize
    }

    /// Whether `address` is in its guard page.
    pub(crate) fn is_guarded_at(&self, address: VirtAddr) -> bool {
        (self.guard..self.bottom()).contains(&address)
    }

    fn bottom(&self) -> VirtAddr {
        self.guard + GUARD as u64
    }

    fn pages(&self) -> usize {
        self.size / FRAME_SIZE
    }
}

impl Drop for MappedStack {
    fn drop(&mut self) {
        memory::unmap(self.bottom(), self.pages());
        let freed = STACKS.free(self.guard.as_u64(), (GUARD + self.size) as u64);
        debug_assert!(freed.is_ok(), "they were allocated as one");
    }
}
