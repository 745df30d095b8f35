mod blocks;
mod cpus;
mod frees;
mod lent;
mod model;
mod nmi;
mod numbers;
mod shape;
mod zones;

#[cfg(feature = "allocator-api2")]
mod allocator;
#[cfg(feature = "fault-injection")]
mod sweep;

use std::vec;

use super::*;
use crate::testing::{Heap, Machine, Threads};

const START: u64 = 64 << 20;

/// Enough frames for magazines, which a heap of less than 1 MiB does without.
const FRAMES: usize = if cfg!(miri) { 264 } else { 512 };

/// A heap on any platform. Its tests never access what they have freed.
trait AnyHeap {
    fn allocate(&self, layout: Layout) -> Option<NonNull<u8>>;
    fn zeroed(&self, layout: Layout) -> Option<NonNull<u8>>;
    fn free(&self, block: NonNull<u8>, layout: Layout);
    fn reallocate(&self, block: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>>;
    /// Bytes that are free once nothing is held back.
    fn settled(&self) -> usize;
    fn verify(&self);
    fn take_frame(&self) -> Option<Frame>;
    fn free_frame(&self, frame: Frame);
}

impl<P: Platform> AnyHeap for super::Heap<P> {
    fn allocate(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.allocate(layout)
    }

    fn zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: an empty layout is one of this heap's too.
        NonNull::new(unsafe { self.alloc_zeroed(layout) })
    }

    fn free(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: says the trait.
        unsafe { self.free(block, layout) }
    }

    fn reallocate(&self, block: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
        // SAFETY: says the trait.
        unsafe { self.reallocate(block, layout, new_size) }
    }

    fn settled(&self) -> usize {
        self.shrink();
        self.available()
    }

    fn verify(&self) {
        assert_eq!(self.verify(), Ok(()));
    }

    fn take_frame(&self) -> Option<Frame> {
        self.frames().allocate(Order::ZERO)
    }

    fn free_frame(&self, frame: Frame) {
        // SAFETY: says the trait.
        unsafe { self.frames().free(frame, Order::ZERO) }
    }
}

/// Runs a test on a heap of so many frames: without anything per CPU, then with magazines. It must give everything back.
fn on_both(frames: usize, test: impl Fn(&dyn AnyHeap)) {
    let machine = Machine::new(START, frames);
    gives_everything_back(&machine.heap(), &test);
    let machine = Machine::new(START, frames);
    gives_everything_back(&machine.heap_on::<Threads>(), &test);
}

fn gives_everything_back(heap: &dyn AnyHeap, test: impl Fn(&dyn AnyHeap)) {
    let before = heap.settled();
    test(heap);
    heap.verify();
    assert_eq!(heap.settled(), before, "memory is missing");
    heap.verify();
}

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

fn fill(block: NonNull<u8>, size: usize, byte: u8) {
    // SAFETY: the tests pass blocks of at least `size` bytes that are theirs.
    unsafe { block.as_ptr().write_bytes(byte, size) }
}

fn holds(block: NonNull<u8>, size: usize, byte: u8) -> bool {
    // SAFETY: as above, and written.
    let bytes = unsafe { core::slice::from_raw_parts(block.as_ptr(), size) };
    // As a whole: byte by byte takes Miri very long.
    bytes == vec![byte; size]
}

fn is_aligned(block: NonNull<u8>, align: usize) -> bool {
    block.addr().get().is_multiple_of(align)
}
