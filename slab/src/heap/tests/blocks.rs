//! Every layout: sizes, alignments, zeroing and reallocation.

use std::collections::VecDeque;
use std::thread;
use std::vec::Vec;

use super::*;
use crate::testing::be_cpu;

#[test]
#[cfg_attr(miri, ignore = "too many; the next test takes a few of them")]
fn row_45_every_size_to_two_pages_and_alignment_to_a_page_is_disjoint_and_aligned() {
    on_both(2 * FRAMES, |heap| {
        for align in (0..=12).map(|log| 1 << log) {
            allocate_in_turn(heap, 1..=8192, align);
        }
    });
}

#[test]
fn row_45_some_sizes_and_alignments() {
    on_both(FRAMES, |heap| {
        for align in [1, 64, 4096] {
            allocate_in_turn(heap, (1..=8192).step_by(1021), align);
        }
    });
}

/// The last sixteen blocks are always live, each with a byte of its own in all of it.
fn allocate_in_turn(heap: &dyn AnyHeap, sizes: impl Iterator<Item = usize>, align: usize) {
    let mut live = VecDeque::new();
    let free = |(block, wanted, byte): (NonNull<u8>, Layout, u8)| {
        assert!(holds(block, wanted.size(), byte), "{wanted:?}");
        heap.free(block, wanted);
    };
    for size in sizes {
        let (wanted, byte) = (layout(size, align), size as u8);
        let block = heap.allocate(wanted).unwrap();
        assert!(is_aligned(block, align), "{wanted:?}");
        fill(block, size, byte);
        live.push_back((block, wanted, byte));
        if live.len() > 16 {
            live.pop_front().into_iter().for_each(free);
        }
        if size.is_multiple_of(64) {
            heap.verify();
        }
    }
    live.into_iter().for_each(free);
}

#[test]
fn row_37_an_alignment_above_the_size_is_kept() {
    on_both(FRAMES, |heap| {
        for (size, align) in [(1, 16), (8, 64), (100, 128), (65, 1024), (3, 4096), (5000, 4096)] {
            let wanted = layout(size, align);
            let blocks: Vec<_> = (0..20).map(|_| heap.allocate(wanted).unwrap()).collect();
            assert!(blocks.iter().all(|&block| is_aligned(block, align)), "{wanted:?}");
            blocks.into_iter().for_each(|block| heap.free(block, wanted));
        }
    });
}

#[test]
fn row_38_alignment_up_to_2_mib() {
    on_both(4 * FRAMES, |heap| {
        for align in (12..=21).map(|log| 1 << log) {
            let wanted = layout(100, align);
            let block = heap.allocate(wanted).unwrap();
            assert!(is_aligned(block, align));
            heap.free(block, wanted);
        }
    });
}

#[test]
fn row_32_an_empty_layout_gets_a_block_and_leaks_nothing() {
    on_both(FRAMES, |heap| {
        for align in [1, 64, 4096, 8192] {
            let blocks = [(); 3].map(|()| heap.allocate(layout(0, align)).unwrap());
            assert!(blocks.iter().all(|&block| is_aligned(block, align)));
            assert!(blocks[0] != blocks[1] && blocks[1] != blocks[2] && blocks[0] != blocks[2]);
            blocks.into_iter().for_each(|block| heap.free(block, layout(0, align)));
        }
    });
}

#[test]
fn row_34_to_36_what_cannot_be_is_refused() {
    on_both(64, |heap| {
        for wanted in [layout(isize::MAX as usize, 1), layout(1 << 40, 8), layout(65 * 4096, 8), layout(1, 1 << 40)] {
            assert_eq!(heap.allocate(wanted), None, "{wanted:?}");
            assert_eq!(heap.zeroed(wanted), None, "{wanted:?}");
        }
        let block = heap.allocate(layout(8, 8)).unwrap();
        for size in [usize::MAX, usize::MAX - 3, isize::MAX as usize - 7, 1 << 40] {
            assert_eq!(heap.reallocate(block, layout(8, 8), size), None, "{size}");
        }
        heap.free(block, layout(8, 8));
    });
}

#[test]
fn row_36_a_request_above_all_memory_fails_without_reclaiming() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    AnyHeap::free(&heap, heap.allocate(layout(64, 8)).unwrap(), layout(64, 8));
    assert_eq!(heap.allocate(layout(heap.size() + 1, 8)), None);
    let kept = heap.cache_stats().map(|stats| stats.empty_slabs).sum::<usize>();
    assert_eq!(kept, 1, "the empty slab is still there");
}

#[test]
fn row_40_zeroed_memory_is_zero_even_where_it_was_used_before() {
    on_both(FRAMES, |heap| {
        for size in [1, 24, 100, 2048, 3000, 8192, 20_000] {
            let wanted = layout(size, 8);
            let dirty = heap.allocate(wanted).unwrap();
            fill(dirty, size, 0xa5);
            heap.free(dirty, wanted);
            let zeroed = heap.zeroed(wanted).unwrap();
            assert!(zeroed == dirty || size > 8192, "the object that was written to");
            assert!(holds(zeroed, size, 0));
            heap.free(zeroed, wanted);
        }
    });
}

#[test]
fn row_41_realloc_stays_in_its_class_and_moves_out_of_it() {
    on_both(FRAMES, |heap| {
        let block = heap.allocate(layout(100, 8)).unwrap();
        fill(block, 97, 7);
        assert_eq!(heap.reallocate(block, layout(100, 8), 104), Some(block));
        assert_eq!(heap.reallocate(block, layout(104, 8), 97), Some(block));
        let moved = heap.reallocate(block, layout(97, 8), 105).unwrap();
        assert_ne!(moved, block);
        assert!(holds(moved, 97, 7));
        let small = heap.reallocate(moved, layout(105, 8), 8).unwrap();
        assert!(holds(small, 8, 7));
        heap.free(small, layout(8, 8));
    });
}

#[test]
fn row_41_realloc_through_every_class_and_back_keeps_the_contents() {
    on_both(FRAMES, |heap| {
        let (mut size, mut block) = (1, heap.allocate(layout(1, 8)).unwrap());
        fill(block, 1, 3);
        for next in SIZES.iter().copied().chain([9000, 20_000]).chain(SIZES.iter().rev().copied()) {
            block = heap.reallocate(block, layout(size, 8), next).unwrap();
            assert!(holds(block, size.min(next), 3), "{size} to {next}");
            fill(block, next, 3);
            size = next;
        }
        heap.free(block, layout(size, 8));
    });
}

#[test]
fn row_41_a_large_block_shrinks_in_place_and_gives_its_tail_back() {
    on_both(FRAMES, |heap| {
        let block = heap.allocate(layout(10 * 4096, 8)).unwrap();
        let before = heap.settled();
        fill(block, 3 * 4096, 9);
        assert_eq!(heap.reallocate(block, layout(10 * 4096, 8), 2 * 4096 + 1), Some(block));
        assert_eq!(heap.settled(), before + 7 * 4096);
        assert!(holds(block, 3 * 4096, 9));
        let object = heap.reallocate(block, layout(2 * 4096 + 1, 8), 64).unwrap();
        assert!(holds(object, 64, 9));
        heap.free(object, layout(64, 8));
    });
}

#[test]
fn row_41_a_large_block_grows_in_place_where_the_frames_behind_it_are_free() {
    on_both(FRAMES, |heap| {
        let block = heap.allocate(layout(60 * 4096, 8)).unwrap();
        fill(block, 60 * 4096, 9);
        assert_eq!(heap.reallocate(block, layout(60 * 4096, 8), 4 * 4096), Some(block));
        assert_eq!(heap.reallocate(block, layout(4 * 4096, 8), 30 * 4096), Some(block));
        assert!(holds(block, 4 * 4096, 9));
        let behind = layout(9000, 8);
        let blocks: Vec<_> = core::iter::from_fn(|| heap.allocate(behind)).collect();
        assert_eq!(heap.reallocate(block, layout(30 * 4096, 8), 60 * 4096), None, "neither here nor elsewhere");
        assert!(holds(block, 4 * 4096, 9));
        blocks.into_iter().for_each(|block| heap.free(block, behind));
        heap.free(block, layout(30 * 4096, 8));
    });
}

#[test]
fn row_42_a_realloc_that_fails_leaves_the_block_alone() {
    on_both(16, |heap| {
        for size in [200, 8192, 9000] {
            // With another one beside it there are not enough frames, be it in place or elsewhere.
            let other = heap.allocate(layout(9000, 8)).unwrap();
            let block = heap.allocate(layout(size, 8)).unwrap();
            fill(block, size, 3);
            assert_eq!(heap.reallocate(block, layout(size, 8), 15 * 4096), None);
            heap.free(other, layout(9000, 8));
            assert!(holds(block, size, 3));
            heap.free(block, layout(size, 8));
        }
    });
}

#[test]
fn row_44_realloc_keeps_an_alignment_above_a_page() {
    on_both(4 * FRAMES, |heap| {
        let block = heap.allocate(layout(100, 1 << 16)).unwrap();
        fill(block, 100, 5);
        let grown = heap.reallocate(block, layout(100, 1 << 16), 5 * 4096).unwrap();
        assert!(is_aligned(grown, 1 << 16));
        assert!(holds(grown, 100, 5));
        let shrunk = heap.reallocate(grown, layout(5 * 4096, 1 << 16), 9).unwrap();
        assert!(is_aligned(shrunk, 1 << 16));
        assert!(holds(shrunk, 9, 5));
        heap.free(shrunk, layout(9, 1 << 16));
    });
}

#[test]
fn row_116_without_init_every_request_is_refused() {
    let heap = Heap::new();
    for size in [0, 8, 8192, 8193] {
        assert_eq!(heap.allocate(layout(size, 8)), None);
        assert_eq!(heap.zeroed(layout(size, 8)), None);
    }
    assert_eq!((heap.size(), heap.used(), heap.available(), heap.shrink()), (0, 0, 0, 0));
    heap.maintain(1 << 20);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn threads_share_a_heap() {
    let machine = Machine::new(START, 2 * FRAMES);
    share(&machine.heap());
    let machine = Machine::new(START, 2 * FRAMES);
    share(&machine.heap_on::<Threads>());
}

fn share<P: Platform>(heap: &super::super::Heap<P>) {
    let before = heap.settled();
    let rounds = if cfg!(miri) { 20 } else { 3000 };
    thread::scope(|scope| {
        for cpu in 1..=3_u8 {
            scope.spawn(move || {
                be_cpu(cpu.into());
                let mut live = Vec::new();
                for round in 0..rounds {
                    let wanted = layout(1 + round * 37 % 9000, 8);
                    let block = heap.allocate(wanted).unwrap();
                    fill(block, wanted.size(), cpu);
                    live.push((block, wanted));
                    if live.len() > 20 {
                        let (block, wanted) = live.swap_remove(round % 20);
                        assert!(holds(block, wanted.size(), cpu));
                        AnyHeap::free(heap, block, wanted);
                    }
                }
                live.into_iter().for_each(|(block, wanted)| AnyHeap::free(heap, block, wanted));
                heap.shrink();
            });
        }
    });
    assert_eq!(heap.verify(), Ok(()));
    assert_eq!(heap.settled(), before);
}

#[test]
fn what_one_cpu_allocates_another_frees() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let before = heap.settled();
    let wanted = layout(48, 8);
    for _ in 0..if cfg!(miri) { 2 } else { 50 } {
        let blocks: Vec<_> = (0..100).map(|_| heap.allocate(wanted).unwrap()).collect();
        be_cpu(1);
        blocks.into_iter().for_each(|block| AnyHeap::free(&heap, block, wanted));
        be_cpu(0);
    }
    assert!(heap.used() < 32 * 4096, "the blocks are used again");
    be_cpu(1);
    heap.shrink();
    be_cpu(0);
    assert_eq!(heap.settled(), before);
}
