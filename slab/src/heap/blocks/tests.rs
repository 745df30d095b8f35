use core::ptr;
use std::vec::Vec;

use super::*;
use crate::testing::{Heap, Machine, Threads, full_report_of};
use crate::{Cache, Order};

const START: u64 = 64 << 20;
const FRAMES: usize = if cfg!(miri) { 264 } else { 512 };

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// Frees a block that a test has allocated and no longer uses.
fn free<P: Platform>(heap: &crate::Heap<P>, block: NonNull<u8>) {
    // SAFETY: as the name says.
    unsafe { heap.free_block(block) };
}

/// Reallocates a block that a test no longer uses where it was.
fn reallocate<P: Platform>(heap: &crate::Heap<P>, block: NonNull<u8>, new: Layout) -> Option<NonNull<u8>> {
    // SAFETY: as it says.
    unsafe { heap.reallocate_block(block, new) }
}

#[test]
fn a_block_is_known_and_freed_by_its_pointer_alone() {
    let machine = Machine::new(START, FRAMES);
    known_and_freed(&machine.heap());
    let machine = Machine::new(START, FRAMES);
    known_and_freed(&machine.heap_on::<Threads>());
}

fn known_and_freed<P: Platform>(heap: &crate::Heap<P>) {
    heap.shrink();
    let before = heap.available();
    let layouts = [(0, 1), (1, 1), (100, 8), (100, 64), (5000, 4096), (8193, 8), (9000, 8192), (100_000, 16)];
    for (size, align) in layouts {
        let block = heap.allocate(layout(size, align)).unwrap();
        let usable = crate::Heap::<P>::usable_size(layout(size, align)).unwrap();
        assert_eq!(heap.block_size(block.as_ptr()), Some(usable), "{size}");
        // SAFETY: its own bytes.
        unsafe { block.add(usable - 1).write(1) };
        free(heap, block);
        assert_eq!(heap.block_size(block.as_ptr()), None, "{size}");
    }
    heap.shrink();
    assert_eq!(heap.available(), before);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_pointer_that_is_no_block_has_no_size_and_is_refused() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let block = heap.allocate(layout(100, 8)).unwrap();
    let run = heap.allocate(layout(20_000, 8)).unwrap();
    let freed = heap.allocate(layout(300, 8)).unwrap();
    free(&heap, freed);
    let freed_run = heap.allocate(layout(30_000, 8)).unwrap();
    free(&heap, freed_run);
    let cache = Cache::new(heap.caches(), "other", layout(100, 8));
    let object = cache.allocate().unwrap();
    let on_stack = 0_u64;
    let refused = [
        (ptr::null_mut(), "BADADDR"),
        (ptr::without_provenance_mut(8), "BADADDR"),
        (ptr::without_provenance_mut(usize::MAX), "BADADDR"),
        (ptr::without_provenance_mut(0xdead_beef_dead_beef), "BADADDR"),
        ((&raw const on_stack).cast_mut().cast(), "BADADDR"),
        (block.as_ptr().wrapping_add(8), "BADBASE"),
        (run.as_ptr().wrapping_add(4096), "BADBASE"),
        (run.as_ptr().wrapping_add(1), "BADBASE"),
        (freed.as_ptr(), "DUPFREE"),
        (freed_run.as_ptr(), "DUPFREE"),
        (object.as_ptr(), "BADCACHE"),
    ];
    let before = heap.available();
    for (pointer, kind) in refused {
        assert_eq!(heap.block_size(pointer), None, "{pointer:p}");
        let Some(pointer) = NonNull::new(pointer) else { continue };
        let report = full_report_of(|| free(&heap, pointer));
        assert!(report.contains(kind), "{kind}: {report}");
        let report = full_report_of(|| _ = reallocate(&heap, pointer, layout(8, 8)));
        assert!(report.contains(kind), "{kind}: {report}");
        // SAFETY: it is no block, so nobody uses it as one.
        assert_eq!(unsafe { heap.try_free_block(pointer) }.unwrap_err().kind(), kind);
        // SAFETY: as above.
        assert_eq!(unsafe { heap.resize_block(pointer, layout(8, 8)) }.unwrap_err().kind(), kind);
    }
    assert_eq!(heap.available(), before);
    free(&heap, block);
    free(&heap, run);
    // SAFETY: nobody uses it any more.
    unsafe { cache.free(object) };
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn what_a_heap_within_has_is_not_its_parents_to_free() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let child = heap.create_heap("child", 512 << 10).unwrap();
    let page = child.allocate(layout(4096, 4096)).unwrap();
    let run = child.allocate(layout(16384, 4096)).unwrap();
    for block in [page, run] {
        assert_eq!((heap.block_size(block.as_ptr()), child.block_size(block.as_ptr()).is_some()), (None, true));
        assert!(full_report_of(|| free(&heap, block)).contains("BADADDR"));
    }
    let frame = heap.frames().frame_of(run.as_ptr()).unwrap();
    // SAFETY: it is refused.
    assert!(full_report_of(|| unsafe { heap.frames().free(frame, Order::ZERO) }).contains("BADADDR"));
    drop(child);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_block_is_resized_by_its_pointer_in_place_or_elsewhere() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let before = heap.used();
    let block = heap.allocate(layout(97, 8)).unwrap();
    // SAFETY: its own bytes.
    unsafe { block.write_bytes(7, 97) };
    assert_eq!(reallocate(&heap, block, layout(104, 8)), Some(block), "the same class");
    let larger = reallocate(&heap, block, layout(9000, 16)).unwrap();
    assert_ne!(larger, block);
    // SAFETY: as many as were there before.
    assert!(unsafe { core::slice::from_raw_parts(larger.as_ptr(), 97) }.iter().all(|byte| *byte == 7));
    let larger = reallocate(&heap, larger, layout(40_000, 16)).unwrap();
    assert_eq!(heap.block_size(larger.as_ptr()), Some(40_960));
    assert_eq!(reallocate(&heap, larger, layout(8193, 16)), Some(larger), "frames at its end are given back");
    assert_eq!(heap.block_size(larger.as_ptr()), Some(12_288));
    assert_eq!(reallocate(&heap, larger, layout(40_000, 16)), Some(larger), "the frames behind are free");
    assert_eq!(reallocate(&heap, larger, layout(4 << 20, 16)), None, "more than there is");
    // SAFETY: what is cut off is not used.
    assert_eq!(unsafe { heap.resize_block(larger, layout(10, 1)) }, Ok(false), "a class, and so elsewhere");
    let smaller = reallocate(&heap, larger, layout(10, 1)).unwrap();
    // SAFETY: as many as it has.
    assert!(unsafe { core::slice::from_raw_parts(smaller.as_ptr(), 10) }.iter().all(|byte| *byte == 7));
    free(&heap, smaller);
    heap.shrink();
    assert_eq!(heap.used(), before);
}

#[test]
fn a_block_with_checks_has_just_what_was_asked_for() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    heap.set_checks("*:all").unwrap();
    let block = heap.allocate(layout(97, 8)).unwrap();
    assert_eq!(heap.block_size(block.as_ptr()), Some(97));
    assert_eq!(heap.block_after(None), Some(block));
    assert_eq!(heap.block_after(Some(block)), None);
    // SAFETY: its own bytes.
    unsafe { block.write_bytes(7, 97) };
    let moved = reallocate(&heap, block, layout(98, 8)).unwrap();
    assert_ne!(moved, block);
    // SAFETY: as many as were there before.
    assert!(unsafe { core::slice::from_raw_parts(moved.as_ptr(), 97) }.iter().all(|byte| *byte == 7));
    assert!(full_report_of(|| free(&heap, block)).contains("DUPFREE"));
    assert_eq!(heap.block_size(block.as_ptr()), None);
    // SAFETY: the byte is in the slot, which nobody else uses.
    unsafe { moved.as_ptr().wrapping_add(98).write(0) };
    assert!(full_report_of(|| free(&heap, moved)).contains("REDZONE"));
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_block_that_was_lent_by_a_larger_class_is_freed_by_its_pointer() {
    let machine = Machine::new(START, 64);
    let heap: Heap = machine.heap();
    let large = heap.allocate(layout(1000, 8)).unwrap();
    let spare = heap.allocate(layout(1000, 8)).unwrap();
    free(&heap, spare);
    let mut frames = Vec::new();
    while let Some(frame) = heap.frames().allocate(Order::ZERO) {
        frames.push(frame);
    }
    let lent = heap.allocate(layout(16, 8)).unwrap();
    assert_eq!(heap.block_size(lent.as_ptr()), Some(16));
    free(&heap, lent);
    free(&heap, large);
    // SAFETY: allocated above, and used by nobody.
    frames.into_iter().for_each(|frame| unsafe { heap.frames().free(frame, Order::ZERO) });
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn blocks_are_walked_by_address_each_once() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    assert_eq!(heap.block_after(None), None);
    let sizes = [8, 8, 24, 100, 100, 100, 700, 4000, 4096, 6000, 8192, 9000, 40_000];
    let mut blocks: Vec<_> = sizes.iter().map(|size| heap.allocate(layout(*size, 8)).unwrap()).collect();
    for index in [11, 4, 0] {
        free(&heap, blocks.swap_remove(index));
    }
    blocks.sort();
    let walked: Vec<_> =
        core::iter::successors(heap.block_after(None), |block| heap.block_after(Some(*block))).collect();
    assert_eq!(walked, blocks);
    let mut visited = Vec::new();
    heap.for_each_block(|block, _| visited.push(block));
    visited.sort();
    assert_eq!(visited, blocks);
    let inside = NonNull::new(blocks[0].as_ptr().wrapping_add(1)).unwrap();
    assert_eq!(heap.block_after(Some(inside)), Some(blocks[1]));
    assert_eq!(heap.block_after(NonNull::new(ptr::without_provenance_mut(usize::MAX))), None);
    blocks.into_iter().for_each(|block| free(&heap, block));
    assert_eq!(heap.block_after(None), None);
}
