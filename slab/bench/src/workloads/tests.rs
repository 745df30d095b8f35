//! What the workloads say of themselves, on the operating system's allocator, which counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::memory::Live;
use super::*;
use crate::run::Batch;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
    static FREED: Cell<usize> = const { Cell::new(0) };
    static LIVE_BYTES: Cell<usize> = const { Cell::new(0) };
}

#[derive(Debug, Clone, Copy, Default)]
struct Counting;

// SAFETY: the operating system's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + 1);
        LIVE_BYTES.set(LIVE_BYTES.get() + layout.size());
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        FREED.set(FREED.get() + 1);
        LIVE_BYTES.set(LIVE_BYTES.get() - layout.size());
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(block, layout) }
    }
}

impl Peer for Counting {
    fn set_up(_: Arena) {}
}

/// `live` blocks at any time; and a batch is as many allocations as frees, and as many as it says.
fn look_at<B: Batch>(mut batch: B, live: usize) {
    batch.start();
    assert_eq!((ALLOCATED.get(), FREED.get()), (live, 0));
    for batches in 1..=3 {
        batch.prepare();
        batch.run();
        batch.undo();
        let pairs = batches * B::OPERATIONS;
        assert_eq!((ALLOCATED.get(), FREED.get()), (live + pairs, pairs));
    }
    batch.finish();
    assert_eq!(ALLOCATED.get(), FREED.get());
    assert_eq!(LIVE_BYTES.get(), 0);
}

#[test]
fn a_batch_of_w1_and_of_w2_leaves_nothing() {
    look_at(pair::Pair(Counting), 0);
    ALLOCATED.set(0);
    FREED.set(0);
    look_at(orders::Orders::new(Counting, blocks::shuffled), 0);
}

#[test]
fn a_batch_of_w3_keeps_as_many_blocks() {
    look_at(replace::Replace::<Counting>::new(500, true), 500);
}

#[test]
fn a_batch_of_w4_keeps_as_many_objects() {
    look_at(kernel::Kernel::<Counting>::new(false), 20_000);
}

#[test]
fn live_bytes_are_those_that_were_asked_for() {
    let mut replace = replace::Replace::<Counting>::new(100, false);
    replace.start();
    replace.run();
    assert_eq!(replace.live_bytes(), LIVE_BYTES.get());
    replace.finish();
    let mut kernel = kernel::Kernel::<Counting>::new(false);
    kernel.start();
    kernel.run();
    assert_eq!(kernel.live_bytes(), LIVE_BYTES.get());
    kernel.finish();
}

#[test]
fn names_are_those_of_one_workload_each() {
    for workload in &WORKLOADS {
        assert_eq!(WORKLOADS.iter().filter(|other| other.name == workload.name).count(), 1, "{workload}");
    }
}

#[test]
fn a_random_order_has_each_number_once() {
    let mut numbers = blocks::shuffled(1000);
    assert!(!numbers.is_sorted());
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..1000));
}
