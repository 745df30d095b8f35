use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::testing::{Heap, Machine, report_of};

const START: u64 = 64 << 20;

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

fn free(heap: &Heap, block: NonNull<u8>, layout: Layout) {
    // SAFETY: these tests never access what they have freed.
    unsafe { heap.free(block, layout) }
}

fn reallocate(heap: &Heap, block: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
    // SAFETY: as above.
    unsafe { heap.reallocate(block, layout, new_size) }
}

#[test]
fn row_45_every_size_and_alignment_is_disjoint_and_aligned() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    let before = heap.frames().stats();
    let (step, aligns) = if cfg!(miri) { (509, &[1, 64, 4096][..]) } else { (1, &[1, 8, 16, 64, 256, 1024, 4096][..]) };
    for align in aligns {
        for size in (1..=8192).step_by(step) {
            let wanted = layout(size, *align);
            let (first, second) = (heap.allocate(wanted).unwrap(), heap.allocate(wanted).unwrap());
            assert!(first.addr().get().is_multiple_of(*align) && second.addr().get().is_multiple_of(*align));
            fill(first, size, 1);
            fill(second, size, 2);
            assert!(holds(first, size, 1) && holds(second, size, 2), "{wanted:?}");
            free(&heap, first, wanted);
            free(&heap, second, wanted);
        }
    }
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn row_38_alignment_up_to_2_mib() {
    let machine = Machine::new(START, 2048);
    let heap = machine.heap();
    for log in 12..=21 {
        let wanted = layout(100, 1 << log);
        let block = heap.allocate(wanted).unwrap();
        assert!(block.addr().get().is_multiple_of(1 << log));
        free(&heap, block, wanted);
    }
}

#[test]
fn row_32_an_empty_layout_gets_a_block_and_leaks_nothing() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = heap.frames().stats();
    for align in [1, 64, 4096] {
        let block = heap.allocate(layout(0, align)).unwrap();
        assert!(block.addr().get().is_multiple_of(align));
        free(&heap, block, layout(0, align));
    }
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn row_34_to_36_what_cannot_be_is_refused() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = heap.frames().stats();
    for wanted in [layout(isize::MAX as usize, 1), layout(1 << 40, 8), layout(65 * 4096, 8), layout(1, 1 << 40)] {
        assert_eq!(heap.allocate(wanted), None, "{wanted:?}");
    }
    let block = heap.allocate(layout(8, 8)).unwrap();
    assert_eq!(reallocate(&heap, block, layout(8, 8), usize::MAX - 3), None);
    free(&heap, block, layout(8, 8));
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn row_40_zeroed_memory_is_zero_even_where_it_was_used_before() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    for size in [1, 24, 100, 2048, 3000, 20_000] {
        let wanted = layout(size, 8);
        let dirty = heap.allocate(wanted).unwrap();
        fill(dirty, size, 0xa5);
        free(&heap, dirty, wanted);
        // SAFETY: the layout is not empty.
        let zeroed = NonNull::new(unsafe { heap.alloc_zeroed(wanted) }).unwrap();
        assert_eq!(zeroed, dirty, "the block that was written to");
        assert!(holds(zeroed, size, 0));
        free(&heap, zeroed, wanted);
    }
}

#[test]
fn row_41_realloc_stays_in_its_class_and_moves_out_of_it() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let block = heap.allocate(layout(100, 8)).unwrap();
    fill(block, 97, 7);
    assert_eq!(reallocate(&heap, block, layout(100, 8), 104), Some(block));
    assert_eq!(reallocate(&heap, block, layout(104, 8), 97), Some(block));
    let moved = reallocate(&heap, block, layout(97, 8), 105).unwrap();
    assert_ne!(moved, block);
    assert!(holds(moved, 97, 7));
    let small = reallocate(&heap, moved, layout(105, 8), 8).unwrap();
    assert!(holds(small, 8, 7));
    free(&heap, small, layout(8, 8));
}

#[test]
fn row_41_a_large_block_shrinks_in_place_and_gives_its_tail_back() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = heap.frames().stats();
    let block = heap.allocate(layout(10 * 4096, 8)).unwrap();
    fill(block, 3 * 4096, 9);
    assert_eq!(reallocate(&heap, block, layout(10 * 4096, 8), 2 * 4096 + 1), Some(block));
    assert_eq!(heap.frames().stats().free, before.free - 3);
    assert!(holds(block, 3 * 4096, 9));
    let object = reallocate(&heap, block, layout(2 * 4096 + 1, 8), 64).unwrap();
    assert!(holds(object, 64, 9));
    free(&heap, object, layout(64, 8));
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn row_42_a_realloc_that_fails_leaves_the_block_alone() {
    let machine = Machine::new(START, 16);
    let heap = machine.heap();
    let block = heap.allocate(layout(8192, 8)).unwrap();
    fill(block, 8192, 3);
    assert_eq!(reallocate(&heap, block, layout(8192, 8), 15 * 4096), None);
    assert!(holds(block, 8192, 3));
    free(&heap, block, layout(8192, 8));
}

#[test]
fn row_44_realloc_keeps_an_alignment_above_a_page() {
    let machine = Machine::new(START, 2048);
    let heap = machine.heap();
    let block = heap.allocate(layout(100, 1 << 16)).unwrap();
    let grown = reallocate(&heap, block, layout(100, 1 << 16), 5 * 4096).unwrap();
    assert!(grown.addr().get().is_multiple_of(1 << 16));
    free(&heap, grown, layout(5 * 4096, 1 << 16));
}

#[test]
fn row_116_without_init_every_request_is_refused() {
    let heap = Heap::new();
    assert_eq!(heap.allocate(layout(8, 8)), None);
    assert_eq!(heap.allocate(layout(8192, 8)), None);
    // SAFETY: the layout is not empty.
    assert!(unsafe { heap.alloc_zeroed(layout(8, 8)) }.is_null());
}

#[test]
fn bad_frees_are_named_and_change_nothing() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let small = layout(64, 8);
    let object = heap.allocate(small).unwrap();
    let freed = heap.allocate(small).unwrap();
    free(&heap, freed, small);
    let large = heap.allocate(layout(8192, 8)).unwrap();
    let gone = heap.allocate(layout(3 * 4096, 8)).unwrap();
    free(&heap, gone, layout(3 * 4096, 8));
    let before = (heap.frames().stats(), heap.cache_stats().collect::<Vec<_>>());

    let at = |pointer: NonNull<u8>, offset: usize| pointer.map_addr(|address| address.checked_add(offset).unwrap());
    let mut on_stack = 0_u8;
    let cases = [
        ("row 1", freed, small, "double free: it is free already, or was never allocated"),
        ("row 1, frames", gone, layout(3 * 4096, 8), "double free: it is free already, or was never allocated"),
        ("row 1, merged", at(gone, 4096), layout(4096, 8), "double free: it is free already, or was never allocated"),
        ("row 7", at(object, 8), small, "not the start of an allocation"),
        ("row 7, frames", at(large, 4096), layout(8192, 8), "not the start of an allocation"),
        ("row 8", at(object, 3), small, "not the start of an allocation"),
        ("row 8, frames", at(large, 1), layout(8192, 8), "not the start of an allocation"),
        ("row 10", at(object, 640), small, "double free: it is free already, or was never allocated"),
        ("row 11", NonNull::from(&mut on_stack), small, "not memory of this allocator"),
        ("row 13", at(object, 4090), small, "not the start of an allocation"),
        ("row 15", object, layout(72, 8), "wrong layout: freed as a block of 72 bytes, allocated as one of 64"),
        (
            "row 15, frames",
            large,
            layout(4096, 8),
            "wrong layout: freed as a block of 4096 bytes, allocated as one of 8192",
        ),
    ];
    for (row, pointer, layout, expected) in cases {
        let report = report_of(|| free(&heap, pointer, layout));
        assert_eq!(report, format!("kslab: bad free of {pointer:p}: {expected}"), "{row}");
        let report = report_of(|| _ = reallocate(&heap, pointer, layout, layout.size()));
        assert_eq!(report, format!("kslab: bad free of {pointer:p}: {expected}"), "{row}, realloc");
    }
    assert_eq!((heap.frames().stats(), heap.cache_stats().collect::<Vec<_>>()), before);
    free(&heap, object, small);
    free(&heap, large, layout(8192, 8));
}

#[test]
fn row_14_an_object_whose_slab_went_back_is_refused() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let object = heap.allocate(layout(64, 8)).unwrap();
    free(&heap, object, layout(64, 8));
    let report = report_of(|| free(&heap, object, layout(64, 8)));
    assert!(report.contains("double free"), "{report}");
}

#[test]
fn threads_share_a_heap() {
    let machine = Machine::new(START, 512);
    let heap = machine.heap();
    let before = heap.frames().stats();
    let rounds = if cfg!(miri) { 20 } else { 2000 };
    std::thread::scope(|scope| {
        for thread in 1..=2_u8 {
            let heap = &heap;
            scope.spawn(move || {
                let mut live = Vec::new();
                for round in 0..rounds {
                    let wanted = layout(1 + round * 37 % 5000, 8);
                    let block = heap.allocate(wanted).unwrap();
                    fill(block, wanted.size(), thread);
                    live.push((block, wanted));
                    if live.len() > 20 {
                        let (block, wanted) = live.swap_remove(round % 20);
                        assert!(holds(block, wanted.size(), thread));
                        free(heap, block, wanted);
                    }
                }
                live.into_iter().for_each(|(block, wanted)| free(heap, block, wanted));
            });
        }
    });
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn tables_name_what_is_used() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let block = heap.allocate(layout(60, 8)).unwrap();
    let tables = heap.tables().to_string();
    free(&heap, block, layout(60, 8));
    assert!(tables.contains("page frames: 256 KiB in all, 248 KiB free, 4 KiB for records"), "{tables}");
    let row = tables.lines().find(|line| line.starts_with("size-")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["size-64", "64", "4096", "63", "1", "1", "1", "0"]);
    assert_eq!(tables.lines().filter(|line| line.starts_with("size-")).count(), 1, "{tables}");
}

#[derive(Debug, Clone)]
enum Step {
    Allocate { size: usize, align: usize },
    Free { which: usize },
    Reallocate { which: usize, size: usize },
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..300_usize, 2 => 300..2100_usize, 1 => 2100..30_000_usize]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let align = (0..14_u32).prop_map(|log| 1 << log);
    let step = prop_oneof![
        4 => (size(), align).prop_map(|(size, align)| Step::Allocate { size, align }),
        3 => any::<usize>().prop_map(|which| Step::Free { which }),
        2 => (any::<usize>(), size()).prop_map(|(which, size)| Step::Reallocate { which, size }),
    ];
    prop::collection::vec(step, 1..if cfg!(miri) { 25 } else { 250 })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 128 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_keeps_every_block_as_it_was_written(steps in steps()) {
        let machine = Machine::new(START, 128);
        let heap = machine.heap();
        let before = heap.frames().stats();
        let mut live: Vec<(NonNull<u8>, Layout, u8)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            let byte = number as u8;
            match step {
                Step::Allocate { size, align } => {
                    let wanted = layout(size, align);
                    let Some(block) = heap.allocate(wanted) else { continue };
                    prop_assert!(block.addr().get().is_multiple_of(align));
                    fill(block, size, byte);
                    live.push((block, wanted, byte));
                }
                Step::Free { which } if !live.is_empty() => {
                    let (block, wanted, byte) = live.swap_remove(which % live.len());
                    prop_assert!(holds(block, wanted.size(), byte));
                    free(&heap, block, wanted);
                }
                Step::Reallocate { which, size } if !live.is_empty() => {
                    let index = which % live.len();
                    let (block, old, written) = live[index];
                    let Some(block) = reallocate(&heap, block, old, size) else { continue };
                    prop_assert!(holds(block, size.min(old.size()), written));
                    prop_assert!(block.addr().get().is_multiple_of(old.align()));
                    fill(block, size, byte);
                    live[index] = (block, layout(size, old.align()), byte);
                }
                _ => {}
            }
        }
        for (block, wanted, byte) in live {
            prop_assert!(holds(block, wanted.size(), byte));
            free(&heap, block, wanted);
        }
        prop_assert_eq!(heap.frames().stats(), before);
    }
}
