mod geometry;
mod magazines;
mod model;
mod public;
mod reclaim;
mod slabs;
mod threads;
mod typed;

use core::alloc::Layout;
use core::ptr::NonNull;
use std::vec::Vec;

use super::{AllocError, Cache, InitFailed, Object, ObjectCache};
use crate::platform::Platform;
use crate::testing::{Machine, Threads, be_cpu, report_of};
use crate::{Heap, Order};

const START: u64 = 64 << 20;

/// Frames enough for magazines.
const LARGE: usize = 512;

/// Frames that are given back after a [`Drought`] are such blocks, as far as there are any.
const BLOCK: Order = Order::new(2).unwrap();

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

fn free<P: Platform>(cache: &Cache<'_, P>, object: NonNull<u8>) {
    // SAFETY: the tests do not use what they have freed; where they free it wrongly, it is refused.
    unsafe { cache.free(object) }
}

/// A cache with so many objects allocated, in the order of their allocation.
fn allocate<P: Platform>(cache: &Cache<'_, P>, count: usize) -> Vec<NonNull<u8>> {
    (0..count).map(|_| cache.allocate().unwrap()).collect()
}

/// Free memory when all has gone back that nobody uses.
fn settled<P: Platform>(heap: &Heap<P>) -> usize {
    heap.shrink();
    heap.verify().unwrap();
    heap.frames().free_bytes()
}

/// Takes every free page frame, and gives them back at the end.
struct Drought<'a, P: Platform> {
    heap: &'a Heap<P>,
    taken: Vec<crate::Frame>,
}

impl<'a, P: Platform> Drought<'a, P> {
    fn of(heap: &'a Heap<P>) -> Self {
        let mut taken: Vec<_> = core::iter::from_fn(|| heap.frames().allocate(Order::ZERO)).collect();
        taken.sort();
        // First those of whole blocks, which a slab of several frames needs.
        let is_whole = |frame: crate::Frame| {
            let start = frame.block_start(BLOCK);
            (0..BLOCK.frames()).all(|index| taken.binary_search(&start.offset(index)).is_ok())
        };
        let (whole, parts): (Vec<_>, Vec<_>) = taken.iter().partition(|frame| is_whole(**frame));
        Self { heap, taken: [whole, parts].concat() }
    }

    fn give(&mut self, frames: usize) {
        for frame in self.taken.drain(..frames.min(self.taken.len())) {
            // SAFETY: allocated in `of`, and used by nobody.
            unsafe { self.heap.frames().free(frame, Order::ZERO) };
        }
    }
}

impl<P: Platform> Drop for Drought<'_, P> {
    fn drop(&mut self) {
        self.give(usize::MAX);
    }
}

/// Runs as that CPU, then as CPU 0 again.
fn on_cpu<T>(number: usize, work: impl FnOnce() -> T) -> T {
    be_cpu(number);
    let result = work();
    be_cpu(0);
    result
}
