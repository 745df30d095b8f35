//! The heap on real memory: sizes, alignment, zeroing, resizing, exhaustion, and bad frees.

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::alloc::GlobalAlloc;
use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU64;

use kernel::heap::HEAP;

use super::support::{Block, PAGE, cache, frames, give_back, layout, take_all, unchanged};
use crate::guest::runner::{report, test};

test!(every_size_from_1_to_8192_is_disjoint_and_intact);
fn every_size_from_1_to_8192_is_disjoint_and_intact() {
    unchanged(|| {
        let mut previous = Block::new(layout(1, 1), 0).expect("memory");
        for size in 1..=8192 {
            let block = Block::new(layout(size, 1), size as u8).expect("memory");
            // The block before is filled with another value, and must not have been touched.
            assert!(previous.is_intact(), "the block before that of {size} bytes");
            previous = block;
        }
        assert!(previous.is_intact());
    });
}

test!(many_blocks_of_mixed_sizes_are_disjoint);
fn many_blocks_of_mixed_sizes_are_disjoint() {
    unchanged(|| {
        let blocks: Vec<_> = (0..1500_usize)
            .map(|turn| Block::new(layout(1 + turn * 7 % 3000, 8), turn as u8).expect("memory"))
            .collect();
        let mut ranges: Vec<_> = blocks.iter().map(|block| block.bytes().as_ptr_range()).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(blocks.iter().all(Block::is_intact));
    });
}

test!(blocks_are_aligned_up_to_2_mib);
fn blocks_are_aligned_up_to_2_mib() {
    unchanged(|| {
        for align in (0..=21).map(|log| 1 << log) {
            for size in [0, 1, align / 2, align - 1, align, align + 1] {
                // `new` checks the alignment.
                Block::new(layout(size.min(1 << 21), align), 1).expect("memory");
            }
        }
    });
}

test!(zeroed_memory_is_zero_where_it_was_used_before);
fn zeroed_memory_is_zero_where_it_was_used_before() {
    unchanged(|| {
        for size in [1, 8, 100, 500, 2048, 2049, PAGE, 5 * PAGE, 1 << 20] {
            let wanted = layout(size, 8);
            let used = Block::new(wanted, 0xa5).expect("memory").start;
            // SAFETY: the layout is not empty.
            let zeroed = unsafe { alloc_zeroed(wanted) };
            assert_eq!(zeroed, used.as_ptr(), "the block that was just freed");
            // SAFETY: the block has that size.
            let bytes = unsafe { core::slice::from_raw_parts(zeroed, size) };
            assert!(bytes.iter().all(|&byte| byte == 0), "{size} bytes");
            // SAFETY: allocated above.
            unsafe { dealloc(zeroed, wanted) };
        }
    });
}

test!(an_empty_layout_is_served_and_freed);
fn an_empty_layout_is_served_and_freed() {
    unchanged(|| {
        let blocks: Vec<_> = (0..100).map(|_| Block::new(layout(0, 16), 0).expect("memory")).collect();
        assert!(blocks.windows(2).all(|pair| pair[0].start != pair[1].start));
    });
}

test!(slabs_go_back_when_their_last_objects_are_freed);
fn slabs_go_back_when_their_last_objects_are_freed() {
    unchanged(|| {
        let before = cache(768);
        let per_slab = before.objects_per_slab;
        let mut blocks: Vec<_> = (0..4 * per_slab).map(|_| Block::new(layout(768, 8), 1).expect("memory")).collect();
        assert!(cache(768).slabs >= before.slabs + 3);
        blocks.truncate(1);
        HEAP.shrink();
        assert!(cache(768).slabs <= before.slabs + 1);
        drop(blocks);
        HEAP.shrink();
        assert_eq!(cache(768).slabs, before.slabs);
    });
}

test!(freed_slots_are_used_before_new_slabs);
fn freed_slots_are_used_before_new_slabs() {
    unchanged(|| {
        let mut blocks: Vec<_> = (0..500).map(|_| Block::new(layout(96, 8), 1).expect("memory")).collect();
        let slabs = cache(96).slabs;
        for turn in 0..500 {
            let at = turn * 7 % blocks.len();
            drop(blocks.swap_remove(at));
            blocks.push(Block::new(layout(90, 8), 2).expect("memory"));
        }
        assert_eq!(cache(96).slabs, slabs);
    });
}

test!(realloc_keeps_the_block_where_its_class_still_fits);
fn realloc_keeps_the_block_where_its_class_still_fits() {
    unchanged(|| {
        let mut block = Block::new(layout(130, 8), 3).expect("memory");
        let start = block.start;
        for size in [144, 129, 135, 144] {
            assert!(block.resize(size));
            assert_eq!(block.start, start, "144 bytes is the class of {size}");
        }
        assert!(block.resize(145));
        assert_ne!(block.start, start);
    });
}

test!(realloc_keeps_contents_across_every_class);
fn realloc_keeps_contents_across_every_class() {
    unchanged(|| {
        // `resize` checks the contents.
        let mut block = Block::new(layout(1, 1), 0x5a).expect("memory");
        (1..6000).step_by(13).for_each(|size| assert!(block.resize(size)));
        (1..6000).rev().step_by(17).for_each(|size| assert!(block.resize(size)));
    });
}

test!(realloc_that_shrinks_a_large_block_gives_frames_back_in_place);
fn realloc_that_shrinks_a_large_block_gives_frames_back_in_place() {
    unchanged(|| {
        let mut block = Block::new(layout(100 * PAGE, 8), 7).expect("memory");
        let (start, free) = (block.start, frames().stats().free);
        assert!(block.resize(30 * PAGE));
        assert_eq!((block.start, frames().stats().free), (start, free + 70));
    });
}

test!(realloc_that_fails_leaves_the_block_alone);
fn realloc_that_fails_leaves_the_block_alone() {
    unchanged(|| {
        let mut block = Block::new(layout(3 * PAGE, 8), 8).expect("memory");
        let all = take_all();
        assert!(!block.resize(4 * PAGE));
        give_back(all);
        assert!(block.is_intact());
    });
}

test!(what_cannot_be_is_refused);
fn what_cannot_be_is_refused() {
    unchanged(|| {
        for size in [isize::MAX as usize, 1 << 45, (frames().stats().total + 1) * PAGE, (1 << 30) + 1] {
            assert_eq!(HEAP.allocate(layout(size, 1)), None, "{size} bytes");
        }
        assert_eq!(HEAP.allocate(layout(8, 1 << 31)), None);
        assert!(Vec::<u64>::new().try_reserve_exact(usize::MAX / 16).is_err());
    });
}

test!(objects_are_refused_without_frames_and_served_again_after_a_free);
fn objects_are_refused_without_frames_and_served_again_after_a_free() {
    unchanged(|| {
        let mut objects: Vec<Box<[u8; 1000]>> = Vec::with_capacity(100);
        let all = take_all();
        let before = cache(1024);
        while let Some(block) = HEAP.allocate(layout(1000, 1)) {
            // SAFETY: a block for just this type.
            objects.push(unsafe { Box::from_raw(block.as_ptr().cast()) });
        }
        assert!(objects.len() < 50, "only free slots were left, of its own slab and of larger ones: {}", objects.len());
        assert!(cache(1024).failures > before.failures);
        give_back(all);
        assert!(
            HEAP.allocate(layout(1000, 1))
                .map(|block| objects.push(
                    // SAFETY: a block for just this type.
                    unsafe { Box::from_raw(block.as_ptr().cast()) }
                ))
                .is_some()
        );
    });
}

test!(a_sweep_of_failures_leaks_nothing);
fn a_sweep_of_failures_leaks_nothing() {
    unchanged(|| {
        let mut all = take_all();
        // One more block is free each time: the script fails at every frame that it asks for, in turn.
        for _ in 0..8 {
            if let Some((frame, order)) = all.pop() {
                super::support::free(frame, order);
            }
            unchanged(|| {
                let script = [8, 100, 2000, 2048, PAGE, 3 * PAGE, 64];
                script.map(|size| Block::new(layout(size, 8), 1))
            });
        }
        give_back(all);
    });
}

test!(random_work_leaves_everything_as_it_was);
fn random_work_leaves_everything_as_it_was() {
    unchanged(|| {
        let mut random = fastrand::Rng::with_seed(3);
        let mut live: Vec<Block> = Vec::with_capacity(400);
        for turn in 0..20_000_u32 {
            let size = 1_usize << random.u32(0..13);
            let size = size + random.usize(0..size);
            match random.u32(0..3) {
                0 if live.len() < 400 => live.push(Block::new(layout(size, 8), turn as u8).expect("memory")),
                1 if !live.is_empty() => {
                    let at = random.usize(0..live.len());
                    assert!(live[at].resize(size));
                }
                _ if !live.is_empty() => {
                    let block = live.swap_remove(random.usize(0..live.len()));
                    assert!(block.is_intact());
                }
                _ => {}
            }
        }
        assert!(live.iter().all(Block::is_intact));
    });
}

test!(every_block_size_with_every_alignment, ignored);
fn every_block_size_with_every_alignment() {
    unchanged(|| {
        for align in (0..=12).map(|log| 1 << log) {
            for size in 1..=2 * PAGE {
                let first = Block::new(layout(size, align), 1).expect("memory");
                let second = Block::new(layout(size, align), 2).expect("memory");
                assert!(first.is_intact() && second.is_intact(), "{size} aligned to {align}");
            }
        }
    });
}

fn free(block: *mut u8, size: usize) {
    let block = NonNull::new(block).expect("a block");
    // SAFETY: it breaks the contract, which the heap must notice; nothing is used afterwards.
    unsafe { HEAP.free(block, layout(size, 8)) }
}

fn object() -> *mut u8 {
    HEAP.allocate(layout(64, 8)).expect("memory").as_ptr()
}

test!(
    a_double_free_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: size-64",
        "object: 0x*, slot 0, 64 bytes"
    )
);
fn a_double_free_is_refused() {
    // Its neighbour keeps the slab.
    let (object, _neighbour) = (object(), object());
    free(object, 64);
    free(object, 64);
}

test!(
    a_free_inside_an_object_is_refused,
    stops_with = report!(
        "bad free of 0x*: not the start of an allocation",
        "kind: BADBASE",
        "cache: size-64",
        "object: 0x*, slot 0, 64 bytes"
    )
);
fn a_free_inside_an_object_is_refused() {
    free(object().wrapping_add(8), 64);
}

test!(
    row_11_a_free_of_an_unmapped_address_is_refused,
    stops_with = report!("bad free of 0xdead000: not memory of this allocator", "kind: BADADDR")
);
fn row_11_a_free_of_an_unmapped_address_is_refused() {
    free(ptr::without_provenance_mut(0xdead000), 64);
}

test!(
    row_11_a_free_of_a_variable_on_the_stack_is_refused,
    stops_with = report!("bad free of 0x*: not memory of this allocator", "kind: BADADDR")
);
fn row_11_a_free_of_a_variable_on_the_stack_is_refused() {
    let mut variable = 0_u64;
    free((&raw mut variable).cast(), 8);
}

test!(
    row_11_a_free_of_a_static_is_refused,
    stops_with = report!("bad free of 0x*: not memory of this allocator", "kind: BADADDR")
);
fn row_11_a_free_of_a_static_is_refused() {
    static VARIABLE: AtomicU64 = AtomicU64::new(0);
    free(VARIABLE.as_ptr().cast(), 8);
}

test!(
    row_12_a_free_of_what_is_not_canonical_is_refused,
    stops_with = report!("bad free of 0x1000000000000000: not memory of this allocator", "kind: BADADDR")
);
fn row_12_a_free_of_what_is_not_canonical_is_refused() {
    free(ptr::without_provenance_mut(1 << 60), 64);
}

test!(
    row_12_a_free_of_null_is_refused,
    stops_with = report!("bad free of 0x0: not memory of this allocator", "kind: BADADDR")
);
fn row_12_a_free_of_null_is_refused() {
    // SAFETY: it breaks the contract, which the heap must notice.
    unsafe { GlobalAlloc::dealloc(&HEAP, ptr::null_mut(), layout(64, 8)) };
}

test!(
    a_free_with_another_size_is_refused,
    stops_with = report!(
        "bad free of 0x*: wrong layout: freed as a block of 128 bytes, allocated as one of 64",
        "kind: BADSIZE",
        "cache: size-64",
        "object: 0x*, slot 0, 64 bytes"
    )
);
fn a_free_with_another_size_is_refused() {
    free(object(), 128);
}

test!(an_allocation_that_cannot_be_is_named, stops_with = "panic: memory allocation of 1099511627776 bytes failed");
fn an_allocation_that_cannot_be_is_named() {
    core::hint::black_box(alloc::vec![0_u8; 1 << 40]);
}
