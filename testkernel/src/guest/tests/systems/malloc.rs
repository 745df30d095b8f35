//! C's `malloc`: malloc(3), posix_memalign(3), malloc_usable_size(3), mallinfo(3), malloc_trim(3).

use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use kernel::heap::HEAP;
use kernel::threads;
use kslab::systems::malloc::{EINVAL, ENOMEM};

use super::super::support::{PAGE, frames, give_back, shrink_everywhere, take_all, unchanged};
use super::{c, errno, fill, holds, on_four_threads, seen};
use crate::guest::runner::test;

fn malloc(size: usize) -> *mut c_void {
    seen(c::malloc(size))
}

fn free(block: *mut c_void) {
    // SAFETY: no test uses what it has freed.
    unsafe { c::free(block) };
}

fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: no test uses a block that was reallocated.
    seen(unsafe { c::realloc(block, size) })
}

test!(malloc_of_0_is_unique_and_blocks_are_aligned_to_16_and_without_memory_it_is_null_and_enomem);
/// *`malloc(0)`: a unique freeable pointer; failure NULL + ENOMEM; 16-byte aligned. `free(NULL)` does nothing.*
fn malloc_of_0_is_unique_and_blocks_are_aligned_to_16_and_without_memory_it_is_null_and_enomem() {
    let all_sizes = || {
        let mut blocks: Vec<_> = (0..300).chain([4095, 8192, 8193, 100_000]).map(|size| (malloc(size), size)).collect();
        blocks.extend((0..20).map(|_| (malloc(0), 0)));
        assert!(blocks.iter().all(|(block, _)| !block.is_null() && block.addr().is_multiple_of(16)));
        blocks.iter().for_each(|&(block, size)| fill(block, size, size as u8));
        assert!(blocks.iter().all(|&(block, size)| holds(block, size, size as u8)));
        blocks.sort_unstable();
        assert!(blocks.is_sorted_by(|(one, size), (next, _)| one.addr() + (*size).max(1) <= next.addr()));
        blocks.into_iter().for_each(|(block, _)| free(block));
        free(ptr::null_mut());
        assert_eq!(errno(), 0);
    };
    unchanged(all_sizes);
    unchanged(|| {
        let all = take_all();
        let mut last = ptr::null_mut();
        // Each block holds the address of the one before it.
        let end = loop {
            let block = malloc(4000);
            if block.is_null() {
                break errno();
            }
            // SAFETY: the block is large enough for a pointer, and aligned.
            unsafe { block.cast::<*mut c_void>().write(last) };
            last = block;
        };
        let large = (malloc(1 << 20), errno());
        while !last.is_null() {
            // SAFETY: written above.
            let before = unsafe { last.cast::<*mut c_void>().read() };
            free(last);
            last = before;
        }
        give_back(all);
        assert_eq!((end, large), (ENOMEM, (ptr::null_mut(), ENOMEM)));
    });
}

test!(calloc_of_an_overflow_is_null_and_realloc_of_null_is_malloc_and_of_0_is_free);
/// *`calloc` overflow: NULL. `realloc(NULL, n)` is malloc; `realloc(p, 0)` frees and returns NULL; failure keeps p.*
fn calloc_of_an_overflow_is_null_and_realloc_of_null_is_malloc_and_of_0_is_free() {
    unchanged(|| {
        for (count, size) in [(usize::MAX, 2), (1 << 32, 1 << 32), (3, usize::MAX / 2)] {
            assert_eq!((seen(c::calloc(count, size)), errno()), (ptr::null_mut(), ENOMEM));
        }
        for size in [40, 3000, 40_000] {
            let dirty = malloc(size);
            fill(dirty, size, 0xff);
            free(dirty);
            let block = seen(c::calloc(size / 8, 8));
            assert!(holds(block, size, 0), "{size}");
            free(block);
        }
        let mut block = realloc(ptr::null_mut(), 24);
        fill(block, 24, 7);
        for size in [25, 9000, 300_000, 5000] {
            block = realloc(block, size);
            assert!(holds(block, 24, 7), "{size}");
        }
        for size in [usize::MAX, isize::MAX as usize, 2 << 30] {
            assert_eq!((realloc(block, size), errno()), (ptr::null_mut(), ENOMEM));
            // SAFETY: it fails.
            assert_eq!(unsafe { c::reallocarray(block, size, size) }, ptr::null_mut());
            assert_eq!(errno(), ENOMEM);
            assert!(holds(block, 24, 7), "{size}");
        }
        // What is left of memory is not enough to grow, and the block is as it was.
        let all = take_all();
        let grown = realloc(block, 1 << 20);
        give_back(all);
        assert_eq!((grown, errno()), (ptr::null_mut(), ENOMEM));
        assert!(holds(block, 24, 7));
        assert_eq!((realloc(block, 0), errno()), (ptr::null_mut(), 0));
        assert_eq!(HEAP.block_size(block.cast()), None, "it is free");
    });
}

test!(memalign_and_its_kin_align_or_say_einval_or_enomem_and_the_usable_size_is_usable);
/// *`memalign`, `aligned_alloc`, `posix_memalign` (returns EINVAL / ENOMEM). `malloc_usable_size(p)` >= the request; 0 for
/// NULL.*
fn memalign_and_its_kin_align_or_say_einval_or_enomem_and_the_usable_size_is_usable() {
    let posix_memalign = |alignment, size| {
        let mut place = ptr::dangling_mut();
        // SAFETY: a place of our own.
        let error = unsafe { c::posix_memalign(&raw mut place, alignment, size) };
        (error, place)
    };
    unchanged(|| {
        for alignment in (3..=20).map(|log| 1_usize << log) {
            for size in [0, 1, 100, 5000] {
                let posix = posix_memalign(alignment, size);
                assert_eq!(posix.0, 0);
                for block in [seen(c::memalign(alignment, size)), seen(c::aligned_alloc(alignment, size)), posix.1] {
                    assert!(!block.is_null() && block.addr().is_multiple_of(alignment), "{alignment} {size}");
                    let usable = c::malloc_usable_size(block);
                    assert!(usable >= size, "{alignment} {size}");
                    fill(block, usable, 1);
                    free(block);
                }
            }
        }
        for block in [c::valloc(1), c::pvalloc(1)].map(seen) {
            assert!(block.addr().is_multiple_of(PAGE) && !block.is_null());
            free(block);
        }
        for alignment in [0, 3, 24, usize::MAX] {
            assert_eq!((seen(c::memalign(alignment, 8)), errno()), (ptr::null_mut(), EINVAL));
            assert_eq!((seen(c::aligned_alloc(alignment, 8)), errno()), (ptr::null_mut(), EINVAL));
            assert_eq!((posix_memalign(alignment, 8), errno()), ((EINVAL, ptr::dangling_mut()), 0));
        }
        let all = take_all();
        let refused = posix_memalign(1 << 20, 1 << 20);
        give_back(all);
        assert_eq!((refused, errno()), ((ENOMEM, ptr::dangling_mut()), 0));
        assert_eq!(c::malloc_usable_size(ptr::null_mut()), 0);
    });
}

test!(mallinfo2_adds_up_and_counts_what_is_allocated);
/// *`mallinfo2`: arena, ordblks, smblks, hblks, hblkhd, usmblks (0), fsmblks, uordblks, fordblks, keepcost, with uordblks +
/// fordblks = arena.*
fn mallinfo2_adds_up_and_counts_what_is_allocated() {
    let info = || {
        let info = c::mallinfo2();
        assert_eq!(info.uordblks + info.fordblks, info.arena, "{info:?}");
        assert_eq!(info.arena + info.hblkhd, frames().total_bytes(), "{info:?}");
        assert_eq!(info.usmblks, 0);
        assert!(info.smblks <= info.ordblks && info.fsmblks <= info.fordblks && info.keepcost <= info.fordblks);
        info
    };
    unchanged(|| {
        let before = info();
        let large = [malloc(100_000), malloc(40_000)];
        let small: Vec<_> = (0..100).map(|_| malloc(2000)).collect();
        let full = info();
        assert_eq!((full.hblks, full.hblkhd), (before.hblks + 2, before.hblkhd + 35 * PAGE));
        assert!(full.uordblks >= before.uordblks + 100 * 2000 && full.fordblks < before.fordblks);
        large.into_iter().chain(small).for_each(free);
        let after = info();
        assert_eq!((after.hblks, after.hblkhd), (before.hblks, before.hblkhd));
        assert!(after.smblks > 0 && after.fsmblks >= after.smblks * 8 && after.ordblks > 0);
    });
}

test!(malloc_trim_says_whether_memory_went_back);
/// *`malloc_trim(pad)`: 1 if memory went back to the system, else 0.*
fn malloc_trim_says_whether_memory_went_back() {
    unchanged(|| {
        shrink_everywhere();
        assert_eq!(c::malloc_trim(0), 0, "there is nothing");
        let blocks: Vec<_> = (0..200).map(|_| malloc(1000)).collect();
        let free_before = frames().free_bytes();
        assert_eq!(c::malloc_trim(usize::MAX), 0, "so much is to stay");
        blocks.into_iter().for_each(free);
        assert_eq!(c::malloc_trim(0), 1);
        assert!(frames().free_bytes() >= free_before + 150 * 1000, "the page frames are free");
        assert_eq!(c::malloc_trim(0), 0);
    });
}

test!(malloc_serves_four_threads_that_free_each_others_blocks);
/// All of the bullets of *C `malloc`* where four CPUs call it: each has its own `errno`, and each block one owner.
fn malloc_serves_four_threads_that_free_each_others_blocks() {
    const BLOCKS: usize = 64;
    const ROUNDS: usize = 40;
    /// What a thread has left for the one after it.
    static LEFT: [[AtomicPtr<c_void>; BLOCKS]; 4] = [const { [const { AtomicPtr::new(ptr::null_mut()) }; BLOCKS] }; 4];
    static ARRIVED: AtomicUsize = AtomicUsize::new(0);

    fn size_of_block(thread: usize, round: usize, index: usize) -> usize {
        [1, 24, 100, 700, 3000, 9000][(thread + round + index) % 6] + index
    }

    fn work(thread: usize) -> bool {
        for round in 0..ROUNDS {
            for (index, place) in LEFT[thread].iter().enumerate() {
                let size = size_of_block(thread, round, index);
                let block = if index % 3 == 0 { seen(c::calloc(1, size)) } else { malloc(size) };
                fill(block, size, (thread * 64 + round) as u8);
                place.store(block, Ordering::Release);
            }
            wait_for_all(round * 2 + 1);
            let other = (thread + 1) % 4;
            for (index, place) in LEFT[other].iter().enumerate() {
                let (block, size) = (place.load(Ordering::Acquire), size_of_block(other, round, index));
                assert!(c::malloc_usable_size(block) >= size);
                assert!(holds(block, size, (other * 64 + round) as u8), "a block of thread {other} was written to");
                free(if index % 4 == 0 { realloc(block, size * 2) } else { block });
            }
            wait_for_all(round * 2 + 2);
        }
        // One after the other fails, and only its own `errno` says so.
        assert_eq!(errno(), 0);
        thread == 2 && malloc(usize::MAX).is_null() && errno() == ENOMEM
    }

    fn wait_for_all(times: usize) {
        ARRIVED.fetch_add(1, Ordering::AcqRel);
        while ARRIVED.load(Ordering::Acquire) < times * 4 {
            threads::yield_now();
        }
    }

    let storm = || {
        ARRIVED.store(0, Ordering::Relaxed);
        assert_eq!(on_four_threads(work), [false, false, true, false]);
    };
    storm();
    unchanged(storm);
}
