//! The bullets of *C `malloc`*, one after the other.

use std::cell::Cell;
use std::vec::Vec;

use super::*;
use crate::platform::NoInterrupts;
use crate::testing::{Machine, Threads, full_report_of};

const START: u64 = 64 << 20;
const FRAMES: usize = if cfg!(miri) { 264 } else { 512 };

std::thread_local! {
    static ERRNO: Cell<c_int> = const { Cell::new(0) };
}

fn set_errno(error: c_int) {
    ERRNO.set(error);
}

/// `errno`, and 0 from now on.
fn errno() -> c_int {
    ERRNO.replace(0)
}

fn c<P: Platform>(heap: &Heap<P>) -> Malloc<'_, P> {
    Malloc::new(heap, set_errno)
}

fn free<P: Platform>(c: &Malloc<'_, P>, block: *mut c_void) {
    // SAFETY: no test uses what it has freed.
    unsafe { c.free(block) };
}

fn realloc<P: Platform>(c: &Malloc<'_, P>, block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: no test uses a block that was reallocated.
    unsafe { c.realloc(block, size) }
}

fn fill(block: *mut c_void, bytes: usize, value: u8) {
    // SAFETY: the callers have a block with so many bytes.
    unsafe { block.cast::<u8>().write_bytes(value, bytes) };
}

fn holds(block: *mut c_void, bytes: usize, value: u8) -> bool {
    // SAFETY: as above.
    unsafe { core::slice::from_raw_parts(block.cast::<u8>(), bytes) }.iter().all(|byte| *byte == value)
}

#[test]
fn malloc_of_zero_bytes_is_a_unique_pointer_that_can_be_freed() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let c = c(&heap);
    let [one, other] = [c.malloc(0), c.malloc(0)];
    assert!(!one.is_null() && !other.is_null() && one != other);
    [one, other].into_iter().for_each(|block| free(&c, block));
    assert_eq!(heap.block_after(None), None);
    assert_eq!(errno(), 0);
}

#[test]
fn malloc_that_fails_returns_null_and_sets_enomem() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    for size in [1 << 20, 2 << 30, isize::MAX as usize, usize::MAX] {
        assert_eq!((c.malloc(size), errno()), (ptr::null_mut(), ENOMEM), "{size}");
    }
    let before_init = Heap::<NoInterrupts>::new();
    assert_eq!((self::c(&before_init).malloc(1), errno()), (ptr::null_mut(), ENOMEM));
}

#[test]
fn every_block_is_aligned_to_16_bytes() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let c = c(&heap);
    let sizes = (0..200).chain([1000, 1001, 4095, 8192, 8193, 20_000]);
    let blocks: Vec<_> = sizes.map(|size| (c.malloc(size), size)).collect();
    for &(block, size) in &blocks {
        assert!(!block.is_null() && block.addr().is_multiple_of(16), "{size}");
        assert!(c.malloc_usable_size(block) >= size, "{size}");
    }
    blocks.into_iter().for_each(|(block, _)| free(&c, block));
    let (zeroed, grown) = (c.calloc(3, 8), realloc(&c, c.malloc(8), 40));
    assert!(zeroed.addr().is_multiple_of(16) && grown.addr().is_multiple_of(16));
    [zeroed, grown].into_iter().for_each(|block| free(&c, block));
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn free_of_null_does_nothing() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let used = heap.used();
    free(&c(&heap), ptr::null_mut());
    assert_eq!((heap.used(), heap.faults(), errno()), (used, 0, 0));
}

#[test]
fn free_leaves_errno_as_it_is() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let block = c.malloc(10);
    set_errno(5);
    free(&c, block);
    assert_eq!(errno(), 5);
}

#[test]
fn a_pointer_that_is_no_block_is_reported() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let block = c.malloc(10);
    free(&c, block);
    assert!(full_report_of(|| free(&c, block)).contains("DUPFREE"));
    assert!(full_report_of(|| _ = realloc(&c, block, 20)).contains("DUPFREE"));
    let on_stack = 0_u64;
    assert!(full_report_of(|| free(&c, (&raw const on_stack).cast_mut().cast())).contains("BADADDR"));
}

#[test]
fn calloc_is_zero_and_an_overflow_of_its_product_is_null() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let c = c(&heap);
    for (count, size) in [(usize::MAX, 2), (1 << 33, 1 << 33), (2, isize::MAX as usize)] {
        assert_eq!((c.calloc(count, size), errno()), (ptr::null_mut(), ENOMEM));
    }
    for size in [24, 9000] {
        let dirty = c.malloc(size);
        fill(dirty, size, 0xff);
        free(&c, dirty);
        let block = c.calloc(size / 8, 8);
        assert!(holds(block, size, 0));
        free(&c, block);
    }
    let empty = [c.calloc(0, 8), c.calloc(8, 0)];
    assert!(!empty[0].is_null() && !empty[1].is_null() && empty[0] != empty[1]);
    empty.into_iter().for_each(|block| free(&c, block));
}

#[test]
fn realloc_of_null_is_malloc() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let block = realloc(&c, ptr::null_mut(), 100);
    assert!(c.malloc_usable_size(block) >= 100);
    free(&c, block);
    let empty = realloc(&c, ptr::null_mut(), 0);
    assert!(!empty.is_null());
    free(&c, empty);
    assert_eq!(heap.block_after(None), None);
}

#[test]
fn realloc_to_zero_bytes_frees_and_returns_null() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let block = c.malloc(100);
    assert_eq!((realloc(&c, block, 0), errno()), (ptr::null_mut(), 0));
    assert_eq!(heap.block_after(None), None);
}

#[test]
fn realloc_keeps_what_fits() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let c = c(&heap);
    let mut block = c.malloc(16);
    fill(block, 16, 3);
    let mut held = 16;
    for size in [17, 500, 9000, 60_000, 10_000, 200, 16, 1] {
        block = realloc(&c, block, size);
        assert!(holds(block, held.min(size), 3), "{size}");
        fill(block, size, 3);
        held = size;
    }
    free(&c, block);
    assert_eq!(heap.block_after(None), None);
}

#[test]
fn realloc_that_fails_keeps_the_block() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let block = c.malloc(100);
    fill(block, 100, 9);
    for size in [1 << 20, usize::MAX, isize::MAX as usize] {
        assert_eq!((realloc(&c, block, size), errno()), (ptr::null_mut(), ENOMEM));
    }
    // SAFETY: it fails.
    assert_eq!((unsafe { c.reallocarray(block, 1 << 40, 1 << 40) }, errno()), (ptr::null_mut(), ENOMEM));
    assert!(holds(block, 100, 9));
    // SAFETY: the block is given up for the new one.
    let block = unsafe { c.reallocarray(block, 50, 10) };
    assert!(holds(block, 100, 9) && c.malloc_usable_size(block) >= 500);
    free(&c, block);
}

#[test]
fn memalign_and_its_kin_are_aligned_or_einval() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    let c = c(&heap);
    for alignment in (0..=20).map(|log| 1 << log) {
        for size in [0, 1, 100, 5000] {
            let mut place = ptr::null_mut();
            if alignment >= 8 {
                // SAFETY: a place of our own.
                assert_eq!(unsafe { c.posix_memalign(&raw mut place, alignment, size) }, 0);
            }
            for block in [c.memalign(alignment, size), c.aligned_alloc(alignment, size), place] {
                assert!(block.addr().is_multiple_of(alignment), "{alignment} {size}");
                assert!(block == place || !block.is_null());
                free(&c, block);
            }
        }
    }
    for alignment in [0, 3, 24, usize::MAX] {
        assert_eq!((c.memalign(alignment, 8), errno()), (ptr::null_mut(), EINVAL));
        assert_eq!((c.aligned_alloc(alignment, 8), errno()), (ptr::null_mut(), EINVAL));
    }
    for alignment in [1 << 40, 1 << 63] {
        assert_eq!((c.memalign(alignment, 8), errno()), (ptr::null_mut(), ENOMEM));
    }
    assert_eq!(heap.block_after(None), None);
}

#[test]
fn posix_memalign_returns_einval_or_enomem_and_changes_nothing_then() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let mut place: *mut c_void = ptr::without_provenance_mut(0x1234);
    let mut ask = |alignment, size| {
        // SAFETY: a place of our own.
        let result = unsafe { c.posix_memalign(&raw mut place, alignment, size) };
        (result, place.addr(), errno())
    };
    for alignment in [0, 1, 2, 4, 12, 24] {
        assert_eq!(ask(alignment, 8), (EINVAL, 0x1234, 0), "{alignment}");
    }
    for (alignment, size) in [(16, 1 << 30), (1 << 62, 8), (8, usize::MAX)] {
        assert_eq!(ask(alignment, size), (ENOMEM, 0x1234, 0), "{alignment}");
    }
}

#[test]
fn valloc_and_pvalloc_start_at_pages() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let c = c(&heap);
    let [one, whole] = [c.valloc(100), c.pvalloc(4097)];
    assert!(one.addr().is_multiple_of(4096) && whole.addr().is_multiple_of(4096));
    assert_eq!(c.malloc_usable_size(whole), 8192);
    assert_eq!((c.pvalloc(usize::MAX), errno()), (ptr::null_mut(), ENOMEM));
    [one, whole].into_iter().for_each(|block| free(&c, block));
}

#[test]
fn malloc_usable_size_is_at_least_what_was_asked_for_and_0_for_null() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let c = c(&heap);
    assert_eq!(c.malloc_usable_size(ptr::null()), 0);
    for size in [0, 1, 15, 16, 17, 100, 1000, 8192, 8193, 50_000] {
        let block = c.malloc(size);
        let usable = c.malloc_usable_size(block);
        assert!(usable >= size);
        fill(block, usable, 1);
        free(&c, block);
    }
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn the_counts_of_mallinfo2_add_up_to_the_arena() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let c = c(&heap);
    let check = |info: Mallinfo2| {
        assert_eq!(info.uordblks + info.fordblks, info.arena, "{info:?}");
        assert_eq!(info.arena + info.hblkhd, heap.size(), "{info:?}");
        assert_eq!(info.usmblks, 0);
        assert!(info.keepcost <= info.fordblks && info.fsmblks <= info.fordblks && info.smblks <= info.ordblks);
        info
    };
    let first = check(c.mallinfo2());
    let blocks: Vec<_> = (0..100).map(|_| c.malloc(1000)).collect();
    let large = c.malloc(100_000);
    let full = check(c.mallinfo2());
    assert!(full.uordblks >= first.uordblks + 100_000, "{full:?}");
    assert_eq!((full.hblks, full.hblkhd), (first.hblks + 1, first.hblkhd + 25 * 4096));
    blocks.into_iter().for_each(|block| free(&c, block));
    free(&c, large);
    let last = check(c.mallinfo2());
    assert!(last.uordblks < first.uordblks + 10_000, "{last:?}");
    assert_eq!(last.hblks, first.hblks);
    assert!(last.smblks > 0 && last.fsmblks >= last.smblks * 1000, "{last:?}");
}

#[test]
fn malloc_trim_says_1_where_memory_went_back_and_else_0() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let c = c(&heap);
    c.malloc_trim(0);
    assert_eq!(c.malloc_trim(0), 0);
    let blocks: Vec<_> = (0..100).map(|_| c.malloc(1000)).collect();
    blocks.into_iter().for_each(|block| free(&c, block));
    assert_eq!(c.malloc_trim(heap.size()), 0, "so much is to stay");
    assert_eq!(c.malloc_trim(0), 1);
    assert_eq!(c.malloc_trim(0), 0);
    // A heap that has borrowed gives it back to where it came from.
    let child = heap.create_heap("child", 512 << 10).unwrap();
    let c = self::c(&child);
    free(&c, c.malloc(100_000));
    let lent = child.size();
    assert_eq!(c.malloc_trim(0), 1);
    assert!(child.size() < lent);
}
