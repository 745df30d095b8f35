//! Frees that are refused.

use std::format;
use std::vec::Vec;

use super::*;
use crate::testing::report_of;

const DOUBLE_FREE: &str = "double free: it is free already, or was never allocated";
const BAD_BASE: &str = "not the start of an allocation";
const BAD_ADDRESS: &str = "not memory of this allocator";

static STATIC: u64 = 0;

#[test]
fn bad_frees_are_named_and_change_nothing() {
    let machine = Machine::new(START, FRAMES);
    are_named_and_change_nothing(&machine.heap());
    let machine = Machine::new(START, FRAMES);
    are_named_and_change_nothing(&machine.heap_on::<Threads>());
}

fn are_named_and_change_nothing<P: Platform>(heap: &super::super::Heap<P>) {
    let free = |block, layout| AnyHeap::free(heap, block, layout);
    let (small, large, runs) = (layout(64, 8), layout(5000, 8), layout(3 * 4096, 8));
    let [object, freed] = [small; 2].map(|layout| heap.allocate(layout).unwrap());
    free(freed, small);
    let big = heap.allocate(large).unwrap();
    let [run, gone] = [runs; 2].map(|layout| heap.allocate(layout).unwrap());
    free(gone, runs);
    let counts = || (heap.used(), heap.cache_stats().collect::<Vec<_>>());
    let before = counts();

    let at = |pointer: NonNull<u8>, offset: usize| pointer.map_addr(|address| address.checked_add(offset).unwrap());
    // The first slab of a cache starts with its header.
    let header = object.map_addr(|address| (address.get() & !4095).try_into().unwrap());
    let mut on_stack = 0_u8;
    let wrong = |freed: usize, allocated: usize| {
        format!("wrong layout: freed as a block of {freed} bytes, allocated as one of {allocated}")
    };
    let cases = [
        ("row 1", freed, small, DOUBLE_FREE.into()),
        ("row 1, frames", gone, runs, DOUBLE_FREE.into()),
        ("row 1, merged", at(gone, 4096), runs, DOUBLE_FREE.into()),
        ("row 7", at(object, 8), small, BAD_BASE.into()),
        ("row 7, off-slab", at(big, 4096), large, BAD_BASE.into()),
        ("row 7, frames", at(run, 4096), runs, BAD_BASE.into()),
        ("row 8", at(object, 3), small, BAD_BASE.into()),
        ("row 8, frames", at(run, 1), runs, BAD_BASE.into()),
        ("row 10", at(object, 640), small, DOUBLE_FREE.into()),
        ("row 11", NonNull::from(&mut on_stack), small, BAD_ADDRESS.into()),
        ("row 11, a static", NonNull::from(&STATIC).cast(), small, BAD_ADDRESS.into()),
        ("row 11, not mapped", NonNull::without_provenance(4096.try_into().unwrap()), small, BAD_ADDRESS.into()),
        (
            "row 12, not canonical",
            NonNull::without_provenance((1 << 60).try_into().unwrap()),
            small,
            BAD_ADDRESS.into(),
        ),
        ("row 12", NonNull::without_provenance(8.try_into().unwrap()), small, BAD_ADDRESS.into()),
        ("row 13", header, small, BAD_BASE.into()),
        ("row 15", object, layout(72, 8), wrong(72, 64)),
        ("row 15, the next class", object, layout(65, 8), wrong(72, 64)),
        ("row 15, a run", object, runs, wrong(3 * 4096, 64)),
        ("row 15, frames", run, layout(4 * 4096, 8), wrong(4 * 4096, 3 * 4096)),
        ("row 15, a class", run, large, wrong(5120, 3 * 4096)),
        ("row 16", object, layout(64, 128), wrong(128, 64)),
    ];
    for (row, pointer, layout, expected) in cases {
        let expected = format!("kslab: bad free of {pointer:p}: {expected}");
        assert_eq!(report_of(|| free(pointer, layout)), expected, "{row}");
        let reallocate = || _ = AnyHeap::reallocate(heap, pointer, layout, layout.size());
        assert_eq!(report_of(reallocate), expected, "{row}, realloc, and row 43");
        assert_eq!(heap.verify(), Ok(()), "{row}");
    }
    assert_eq!(counts(), before);
    free(object, small);
    free(big, large);
    free(run, runs);
}

#[test]
fn row_12_realloc_of_null_is_refused() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    // SAFETY: the report comes before any access.
    let report = report_of(|| _ = unsafe { GlobalAlloc::realloc(&heap, ptr::null_mut(), layout(8, 8), 16) });
    assert_eq!(report, "kslab: bad free of 0x0: not memory of this allocator");
}

#[test]
fn row_13_large_memory_of_the_allocators_own_is_refused() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let before = heap.frames().stats();
    let bytes = 3 * 4096;
    let own = heap.caches().allocate_metadata(bytes).unwrap();
    // SAFETY: refused.
    let report = report_of(|| unsafe { heap.free(own, layout(bytes, 8)) });
    assert_eq!(report, format!("kslab: bad free of {own:p}: not memory of this allocator"));
    let mut runs = 0;
    heap.for_each_block(|_, _| runs += 1);
    assert_eq!(runs, 0, "it is no block of anybody");
    heap.verify().unwrap();
    // SAFETY: allocated above.
    unsafe { heap.caches().free_metadata(own.as_ptr(), bytes) };
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn row_13_the_allocators_own_memory_is_refused() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let metadata = heap.caches().allocate_metadata(64).unwrap();
    let report = report_of(|| AnyHeap::free(&heap, metadata, layout(64, 8)));
    assert!(report.ends_with("wrong cache: freed to the heap, allocated from the allocator itself"), "{report}");
    // SAFETY: allocated above, with this size.
    unsafe { heap.caches().free_metadata(metadata.as_ptr(), 64) };
}

#[test]
fn row_9_an_object_of_a_cache_is_refused_and_both_are_named() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let cache = crate::Cache::new(heap.caches(), "inode", layout(64, 8));
    let object = cache.allocate().unwrap();
    let report = report_of(|| AnyHeap::free(&heap, object, layout(64, 8)));
    assert!(report.ends_with("wrong cache: freed to the heap, allocated from inode"), "{report}");
    // SAFETY: allocated above.
    unsafe { cache.free(object) };
}

#[test]
fn row_14_an_object_whose_slab_went_back_is_refused() {
    on_both(FRAMES, |heap| {
        let object = heap.allocate(layout(64, 8)).unwrap();
        heap.free(object, layout(64, 8));
        heap.settled();
        let report = report_of(|| heap.free(object, layout(64, 8)));
        assert!(report.ends_with(DOUBLE_FREE), "{report}");
    });
}
