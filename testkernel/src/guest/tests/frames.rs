//! The buddy system on real page frames.

use alloc::vec::Vec;

use kslab::{Frame, Order};

use super::support::{PAGE, frames, free, give_back, merged_stats, order, take_all, unchanged};
use crate::guest::runner::{report, test};

test!(a_block_is_split_and_merges_again);
fn a_block_is_split_and_merges_again() {
    unchanged(|| {
        for size in 0..=9 {
            let before = merged_stats();
            let block = frames().allocate(order(size)).expect("a block");
            assert_eq!(frames().stats().free, before.free - (1 << size));
            free(block, order(size));
            assert_eq!(merged_stats(), before);
        }
    });
}

test!(single_frames_freed_in_any_order_merge_to_what_they_were);
fn single_frames_freed_in_any_order_merge_to_what_they_were() {
    unchanged(|| {
        let mut random = fastrand::Rng::with_seed(1);
        let mut singles: Vec<Frame> = Vec::with_capacity(2000);
        unchanged(|| {
            singles.extend((0..2000).map_while(|_| frames().allocate(Order::ZERO)));
            assert_eq!(singles.len(), 2000);
            random.shuffle(&mut singles);
            singles.iter().for_each(|&frame| free(frame, Order::ZERO));
        });
    });
}

test!(blocks_of_every_order_are_aligned_to_their_size);
fn blocks_of_every_order_are_aligned_to_their_size() {
    let largest = (0..=18).rev().find(|&size| frames().stats().free_blocks[size as usize] > 0).expect("free memory");
    assert!(largest >= 9, "a machine of 32 MiB has a block of 2 MiB");
    for size in 0..=largest {
        let block = frames().allocate(order(size)).expect("a block of every order up to the largest");
        assert_eq!(block.address() % order(size).bytes() as u64, 0, "order {size}");
        free(block, order(size));
    }
}

test!(blocks_are_disjoint);
fn blocks_are_disjoint() {
    let mut blocks = take_all();
    blocks.sort_unstable();
    for pair in blocks.windows(2) {
        let ((first, order), (second, _)) = (pair[0], pair[1]);
        assert!(first.number() + order.frames() <= second.number(), "{pair:?}");
    }
    give_back(blocks);
}

test!(exhausted_frames_are_refused_and_serve_again_after_a_free);
fn exhausted_frames_are_refused_and_serve_again_after_a_free() {
    unchanged(|| {
        let mut blocks = take_all();
        assert_eq!(frames().stats().free, 0);
        assert_eq!(frames().allocate(Order::ZERO), None);
        assert_eq!(frames().allocate_run(3, Order::ZERO), None);
        // The last one is of the highest zone, which keeps no reserve.
        let (frame, order) = blocks.pop().expect("a block");
        free(frame, order);
        assert_eq!(frames().allocate(order), Some(frame));
        blocks.push((frame, order));
        give_back(blocks);
    });
}

test!(a_run_takes_no_more_frames_than_it_has);
fn a_run_takes_no_more_frames_than_it_has() {
    unchanged(|| {
        for count in [1, 3, 5, 100, 513, 1000] {
            let before = frames().stats().free;
            let run = frames().allocate_run(count, Order::ZERO).expect("a run");
            assert_eq!(frames().stats().free, before - count as usize);
            // SAFETY: the run is this test's.
            unsafe { frames().free_run(run, count) };
        }
    });
}

test!(a_run_is_aligned_up_to_2_mib);
fn a_run_is_aligned_up_to_2_mib() {
    unchanged(|| {
        for alignment in 0..=9 {
            let run = frames().allocate_run(3, order(alignment)).expect("a run");
            assert_eq!(run.address() % order(alignment).bytes() as u64, 0);
            // SAFETY: the run is this test's.
            unsafe { frames().free_run(run, 3) };
        }
    });
}

test!(frames_keep_what_is_written_to_them);
fn frames_keep_what_is_written_to_them() {
    unchanged(|| {
        let mut blocks = Vec::with_capacity(40);
        for turn in 0..40_u32 {
            let size = order(turn % 6);
            let frame = frames().allocate(size).expect("a block");
            // SAFETY: the block is this test's.
            unsafe { frames().pointer(frame).write_bytes(turn as u8, size.bytes()) };
            blocks.push((frame, size, turn as u8));
        }
        for &(frame, size, turn) in &blocks {
            // SAFETY: the block is this test's, and written.
            let bytes = unsafe { core::slice::from_raw_parts(frames().pointer(frame), size.bytes()) };
            assert!(bytes.iter().all(|&byte| byte == turn));
        }
        blocks.iter().for_each(|&(frame, size, _)| free(frame, size));
    });
}

test!(free_blocks_do_not_cover_a_hole_of_the_map);
fn free_blocks_do_not_cover_a_hole_of_the_map() {
    let all = take_all();
    // In pieces, so that everything has to merge again.
    let mut pieces = 0;
    for &(block, size) in all.iter().filter(|(_, size)| size.get() <= 9) {
        free(block, size);
        pieces += 1;
    }
    for &(block, size) in all.iter().filter(|(_, size)| size.get() > 9) {
        free(block, size);
    }
    assert!(pieces > 0);
    let again = take_all();
    let legacy_hole = 0xa_0000 / PAGE as u32..0x10_0000 / PAGE as u32;
    for &(block, size) in &again {
        let end = block.number() + size.frames();
        assert!(end <= legacy_hole.start || block.number() >= legacy_hole.end, "{block:?} of order {size}");
    }
    give_back(again);
}

test!(random_requests_leave_everything_as_it_was);
fn random_requests_leave_everything_as_it_was() {
    unchanged(|| {
        let mut random = fastrand::Rng::with_seed(2);
        let mut live: Vec<(Frame, Order)> = Vec::with_capacity(64);
        for _ in 0..5000 {
            if live.len() < 64 && random.bool() {
                let size = order(random.u32(0..6));
                live.extend(frames().allocate(size).map(|frame| (frame, size)));
            } else if !live.is_empty() {
                let (frame, size) = live.swap_remove(random.usize(0..live.len()));
                free(frame, size);
            }
        }
        give_back(live);
    });
}

test!(
    a_block_freed_twice_is_refused,
    stops_with = report!("bad free of 0x*: double free: it is free already, or was never allocated", "kind: DUPFREE")
);
fn a_block_freed_twice_is_refused() {
    let block = frames().allocate(order(2)).expect("a block");
    free(block, order(2));
    free(block, order(2));
}

test!(
    a_block_freed_with_the_wrong_order_is_refused,
    stops_with = report!("bad free of 0x*: wrong size: freed as 8 page frames, allocated as 4", "kind: BADSIZE")
);
fn a_block_freed_with_the_wrong_order_is_refused() {
    let block = frames().allocate(order(2)).expect("a block");
    free(block, order(3));
}
