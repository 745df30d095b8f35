//! *The stack's size is set when a thread is created; the heap's is set at start-up and grows as space is needed.*

use alloc::vec::Vec;
use core::ptr::{self, NonNull};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::threads;
use kslab::ChildHeap;

use super::support::{PAGE, another, frames, layout, merged_stats, shrink_everywhere, unchanged};
use crate::guest::runner::test;

/// Bytes of the kernel's page frames that are free.
fn free() -> usize {
    merged_stats().free * PAGE
}

/// Blocks of a heap.
#[derive(Default)]
struct Blocks(Vec<(NonNull<u8>, usize)>);

impl Blocks {
    /// One more, which is written from end to end.
    fn add(&mut self, heap: &ChildHeap<'_, Cpus>, size: usize) -> bool {
        let Some(block) = heap.allocate(layout(size, 8)) else { return false };
        // SAFETY: just allocated, with so many bytes.
        unsafe { block.as_ptr().write_bytes(size as u8, size) };
        self.0.push((block, size));
        true
    }

    /// Frees all but the first `kept`.
    fn free(&mut self, heap: &ChildHeap<'_, Cpus>, kept: usize) {
        // SAFETY: they were allocated like this, and nobody uses them any more.
        self.0.drain(kept..).for_each(|(block, size)| unsafe { heap.free(block, layout(size, 8)) });
    }
}

test!(a_heap_starts_small_grows_by_demand_and_shrinks_again);
/// *The heap's is set at start-up and grows as space is needed.*
fn a_heap_starts_small_grows_by_demand_and_shrinks_again() {
    /// Bytes that a heap borrows at a time, at least, and all that it borrows for frame records at once.
    const LOAN: usize = 256 << 10;
    const RECORDS: usize = 16 * PAGE;
    unchanged(|| {
        let heap = HEAP.create_heap("growing", 12 << 20).expect("memory");
        // The list is not in it.
        let mut blocks = Blocks(Vec::with_capacity(4096));
        assert_eq!((heap.size(), heap.used()), (0, 0), "it starts with nothing");
        let at_start = free();
        assert!(blocks.add(&heap, 100));
        assert_eq!(heap.size(), LOAN);
        let mut shrunk = [(0, 0); 3];
        for (round, shrunk) in shrunk.iter_mut().enumerate() {
            let mut asked = 0;
            for step in 0..10 {
                let before = (heap.size(), free());
                assert!((0..100).all(|index| blocks.add(&heap, 500 + index * 10)));
                assert!((0..3).all(|_| blocks.add(&heap, 100_000)));
                asked += (0..100).map(|index| 500 + index * 10).sum::<usize>() + 300_000;
                let now = (heap.size(), free());
                assert!(now.0 > before.0 && now.1 < before.1, "round {round}, step {step}: it has grown");
                assert!(
                    (asked..asked + 4 * LOAN).contains(&now.0),
                    "round {round}, step {step}: {} for {asked}",
                    now.0
                );
                // What it has grown by, the page frames have less.
                let lent = at_start - now.1;
                assert!((now.0..=now.0 + RECORDS).contains(&lent), "round {round}, step {step}: {} of {lent}", now.0);
            }
            blocks.free(&heap, 1);
            heap.shrink();
            assert!(heap.size() <= LOAN && at_start - free() <= heap.size() + RECORDS, "round {round}: it has shrunk");
            *shrunk = (heap.size(), free());
        }
        // A page that the heap keeps from one round to the next, such as for a larger magazine, is one that is not free.
        let [_, second, third] = shrunk.map(|(size, free)| size + free);
        assert_eq!(second, third, "pages are missing: {shrunk:?}");
        blocks.free(&heap, 0);
        // Its end gives back the rest.
    });
}

test!(a_heap_grows_to_its_limit_and_no_further);
fn a_heap_grows_to_its_limit_and_no_further() {
    unchanged(|| {
        let heap = HEAP.create_heap("limited", 2 << 20).expect("memory");
        let mut blocks = Blocks(Vec::with_capacity(4096));
        while blocks.add(&heap, 1000) {}
        assert!(heap.size() <= 2 << 20 && blocks.0.len() * 1000 > 3 << 19, "{} blocks", blocks.0.len());
        assert!(frames().free_bytes() > 2 << 20, "its parent has more");
        blocks.free(&heap, 0);
        assert!(blocks.add(&heap, 1000));
        blocks.free(&heap, 0);
    });
}

test!(the_kernels_heap_takes_page_frames_when_it_needs_them_and_gives_them_back);
/// *The heap grows from the page-frame allocator on demand.*
fn the_kernels_heap_takes_page_frames_when_it_needs_them_and_gives_them_back() {
    unchanged(|| {
        let mut lists: Vec<Vec<u8>> = Vec::with_capacity(1000);
        let before = free();
        for count in 1..=1000 {
            lists.push(alloc::vec![7; 1000]);
            if count % 250 == 0 {
                let taken = before - free();
                assert!(
                    (count * 1000..count * 1000 + (128 << 10)).contains(&taken),
                    "{taken} bytes for {count} blocks"
                );
            }
        }
        assert!(lists.iter().flatten().all(|&byte| byte == 7));
        lists.clear();
        shrink_everywhere();
        assert_eq!(free(), before);
    });
}

test!(a_thread_can_use_the_last_byte_of_a_stack_of_the_size_given);
/// *The stack's size is set when a thread is created.*
fn a_thread_can_use_the_last_byte_of_a_stack_of_the_size_given() {
    for size in [16_usize << 10, (16 << 10) + 1, 20 << 10, 64 << 10, 1 << 20] {
        let body = move || {
            let stack = threads::stack().expect("a thread of its own");
            assert_eq!(stack.len(), size.next_multiple_of(PAGE));
            assert!(stack.contains(&(&raw const stack).addr()), "it runs on it");
            let last = ptr::with_exposed_provenance_mut::<u8>(stack.start);
            // SAFETY: the stack is this thread's, and does not reach so far down.
            unsafe {
                last.write_volatile(0x5a);
                last.read_volatile()
            }
        };
        assert_eq!(threads::spawn("sized", size, body).expect("memory").join(), 0x5a);
    }
    assert_eq!(threads::stack(), None, "the main thread has none of its own");
}

/// Writes to the byte below the stack of the current thread.
fn touch_below() {
    let below = threads::stack().expect("a thread of its own").start - 1;
    // SAFETY: not mapped: the CPU refuses.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(below).write_volatile(1) };
}

test!(a_touch_one_byte_beyond_the_stack_is_an_overflow_of_that_thread, stops_with = "stack overflow: thread beyond");
/// *Kernel threads get guarded stacks of a size given at creation.*
fn a_touch_one_byte_beyond_the_stack_is_an_overflow_of_that_thread() {
    let beside = threads::spawn("beside", 20 << 10, threads::yield_now).expect("memory");
    threads::spawn("beyond", 20 << 10, touch_below).expect("memory").join();
    beside.join();
}

test!(so_it_is_on_another_cpu, stops_with = "stack overflow: thread beyond, elsewhere");
fn so_it_is_on_another_cpu() {
    let cpu = another().unwrap_or(kernel::cpus::BOOT);
    threads::spawn_on(cpu, "beyond, elsewhere", 100_000, touch_below).expect("memory").join();
}
