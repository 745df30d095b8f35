//! Page frames beyond the buddy system: zones, stocks, chosen frames, bulk, owned blocks, memory that comes and goes.

use alloc::vec::Vec;

use kernel::heap::HEAP;
use kslab::memory::Region;
use kslab::{AddError, Frame, FrameBlock, Order, RemoveError};

use super::support::{PAGE, frames, free, give_back, order, take_all, unchanged};
use crate::guest::runner::test;

const MIB: u64 = 1 << 20;

fn free_run(frame: Frame, count: u32) {
    // SAFETY: the tests pass runs that they have allocated and no longer use.
    unsafe { frames().free_run(frame, count) }
}

test!(a_limit_is_the_end_of_what_a_request_gets);
fn a_limit_is_the_end_of_what_a_request_gets() {
    unchanged(|| {
        for limit in [2 * MIB, 16 * MIB, 20 * MIB, 1 << 32, 1 << 40] {
            for count in [1, 3, 64] {
                let run = frames().allocate_below(count, Order::ZERO, limit).expect("memory below the limit");
                assert!(run.address() + u64::from(count) * PAGE as u64 <= limit, "{run:?} of {count} below {limit:#x}");
                free_run(run, count);
            }
        }
        assert_eq!(frames().allocate_below(1, Order::ZERO, 0), None);
        assert_eq!(frames().allocate_below(1, Order::ZERO, PAGE as u64), None, "frame 0 is never handed out");
    });
}

test!(requests_without_a_limit_come_from_the_highest_zone);
fn requests_without_a_limit_come_from_the_highest_zone() {
    unchanged(|| {
        let highest = frames().stats().zones.into_iter().rfind(|zone| zone.total > 0).expect("a zone with memory");
        for size in 0..=4 {
            let block = frames().allocate(order(size)).expect("a block");
            assert!(block >= highest.start, "{block:?}");
            free(block, order(size));
        }
    });
}

test!(a_lower_zone_keeps_a_reserve_for_those_who_can_use_no_other);
fn a_lower_zone_keeps_a_reserve_for_those_who_can_use_no_other() {
    unchanged(|| {
        let mut blocks = Vec::with_capacity(4000);
        for order in (0..=Order::MAX.get()).rev().map(order) {
            while let Some(frame) = frames().allocate(order) {
                assert!(blocks.len() < blocks.capacity());
                blocks.push((frame, order));
            }
        }
        let lowest = frames().stats().zones[0];
        assert_eq!(lowest.free, lowest.reserve);
        assert!(lowest.reserve > 0);
        let reserved = frames().allocate_below(1, Order::ZERO, 16 * MIB).expect("the reserve");
        free(reserved, Order::ZERO);
        give_back(blocks);
    });
}

test!(chosen_frames_are_allocated_where_they_are_free);
fn chosen_frames_are_allocated_where_they_are_free() {
    unchanged(|| {
        let block = frames().allocate(order(6)).expect("memory");
        assert!(!frames().allocate_at(block, 1), "it is not free");
        free(block, order(6));
        let middle = Frame::containing(block.address() + 10 * PAGE as u64).expect("a frame");
        assert!(frames().allocate_at(middle, 33));
        assert!(!frames().allocate_at(block, 11), "its last frame is taken");
        assert!(frames().allocate_at(block, 10));
        free_run(middle, 33);
        free_run(block, 10);
        assert!(!frames().allocate_at(Frame::containing(0).expect("a frame"), 1), "frame 0");
        assert!(!frames().allocate_at(Frame::containing(0xb_8000).expect("a frame"), 1), "a device");
        assert!(!frames().allocate_at(block, 0));
    });
}

test!(single_frames_come_from_a_stock_that_drains);
fn single_frames_come_from_a_stock_that_drains() {
    unchanged(|| {
        frames().drain_stock();
        let frame = frames().allocate(Order::ZERO).expect("memory");
        let stats = frames().stats();
        assert!(stats.stocked > 0, "a batch was taken with it");
        free(frame, Order::ZERO);
        assert_eq!(frames().stats().stocked, stats.stocked + 1);
        assert_eq!(frames().allocate(Order::ZERO), Some(frame), "what was freed last");
        free(frame, Order::ZERO);
        assert_eq!(frames().drain_stock(), stats.stocked + 1);
        assert_eq!(frames().stats().stocked, 0);
        assert_eq!(frames().drain_stock(), 0);
    });
}

test!(what_is_in_stock_serves_a_larger_request_that_would_fail);
fn what_is_in_stock_serves_a_larger_request_that_would_fail() {
    unchanged(|| {
        let block = frames().allocate(order(5)).expect("memory");
        let all = take_all();
        free(block, order(5));
        let singles = [(); 32].map(|()| frames().allocate(Order::ZERO).expect("a frame of the block"));
        singles.into_iter().for_each(|frame| free(frame, Order::ZERO));
        assert_eq!(frames().allocate(order(5)), Some(block));
        free(block, order(5));
        give_back(all);
    });
}

test!(frames_come_and_go_in_bulk);
fn frames_come_and_go_in_bulk() {
    unchanged(|| {
        let mut bulk = alloc::vec![Frame::default(); 500];
        let free = frames().stats().free;
        assert_eq!(frames().allocate_bulk(&mut bulk), 500);
        assert_eq!(frames().stats().free, free - 500);
        fastrand::Rng::with_seed(7).shuffle(&mut bulk);
        // SAFETY: they are this test's, and no longer used.
        unsafe { frames().free_bulk(&bulk) };
        bulk.sort_unstable();
        assert!(bulk.windows(2).all(|pair| pair[0] < pair[1]), "one was handed out twice");
        assert_eq!(frames().stats().free, free);
    });
}

test!(bulk_ends_where_memory_does);
fn bulk_ends_where_memory_does() {
    unchanged(|| {
        let mut bulk = alloc::vec![Frame::default(); 100];
        let kept = frames().allocate(order(5)).expect("memory");
        let all = take_all();
        assert_eq!(frames().allocate_bulk(&mut bulk), 0);
        free(kept, order(5));
        assert_eq!(frames().allocate_bulk(&mut bulk), 32);
        // SAFETY: they are this test's, and no longer used.
        unsafe { frames().free_bulk(&bulk[..32]) };
        give_back(all);
    });
}

test!(an_owned_block_is_freed_when_it_is_dropped);
fn an_owned_block_is_freed_when_it_is_dropped() {
    unchanged(|| {
        let free = frames().stats().free;
        let block = frames().block_run(7, order(4)).expect("memory");
        assert_eq!((block.count(), frames().stats().free), (7, free - 7));
        assert!(block.pointer().addr().is_multiple_of(16 * PAGE));
        // SAFETY: the block is seven pages long.
        unsafe { block.pointer().write_bytes(9, 7 * PAGE) };
        let (frame, count) = block.into_raw();
        assert_eq!(frames().stats().free, free - 7);
        // SAFETY: let go above.
        drop(unsafe { FrameBlock::from_raw(frames(), frame, count) });
        assert_eq!(frames().stats().free, free);
        drop(frames().block(order(3)).expect("memory"));
    });
}

/// A free range of 4 MiB.
fn free_range() -> core::ops::Range<u64> {
    let block = frames().allocate(order(10)).expect("4 MiB in a row");
    free(block, order(10));
    block.address()..block.address() + 4 * MIB
}

/// Puts a range back that was taken away.
fn put_back(range: core::ops::Range<u64>) -> Result<usize, AddError> {
    // SAFETY: it was the heap's, and nobody else has used it since.
    unsafe { HEAP.add([Region::usable(range.start, range.end - range.start)]) }
}

test!(memory_is_taken_away_and_put_back);
fn memory_is_taken_away_and_put_back() {
    unchanged(|| {
        let range = free_range();
        let before = frames().stats();
        assert_eq!(frames().remove(range.clone()), Ok(1024));
        assert_eq!(frames().stats().total, before.total - 1024);
        assert_eq!(frames().remove(range.clone()), Ok(0), "there is nothing left of it");
        let all = take_all();
        assert!(all.iter().all(|(frame, _)| !range.contains(&frame.address())), "it was handed out");
        give_back(all);
        assert_eq!(put_back(range.clone()), Ok(1024));
        assert_eq!(frames().stats().total, before.total);
        let already = put_back(range.clone());
        assert_eq!(already, Err(AddError::AlreadyManaged { frame: Frame::containing(range.start).expect("a frame") }));
    });
}

test!(memory_in_use_is_not_taken_away);
fn memory_in_use_is_not_taken_away() {
    unchanged(|| {
        let range = free_range();
        let used = Frame::containing(range.start + 2 * MIB).expect("a frame");
        assert!(frames().allocate_at(used, 3));
        assert_eq!(frames().remove(range.clone()), Err(RemoveError::Busy { frame: used }));
        assert_eq!(frames().reserve(range.clone()), Err(RemoveError::Busy { frame: used }));
        free_run(used, 3);
        assert!(frames().remove(0..u64::MAX).is_err(), "the records are in there");
    });
}

test!(a_reserved_range_is_never_handed_out);
fn a_reserved_range_is_never_handed_out() {
    unchanged(|| {
        let range = free_range();
        let (first, last) = (range.start + 100 * PAGE as u64, range.start + 103 * PAGE as u64);
        frames().reserve(first + 1..last - 1).expect("free memory");
        let all = take_all();
        assert!(all.iter().all(|&(frame, order)| {
            let block = frame.address()..frame.address() + order.bytes() as u64;
            block.end <= first || block.start >= last
        }));
        give_back(all);
        assert_eq!(put_back(first..last), Ok(3));
    });
}

test!(watermarks_tell_when_memory_is_short);
fn watermarks_tell_when_memory_is_short() {
    unchanged(|| {
        assert!(!frames().below_low() && !frames().below_high());
        let all = take_all();
        assert!(frames().below_low() && frames().below_high());
        give_back(all);
        assert!(!frames().below_low() && !frames().below_high());
    });
}

test!(every_second_frame_in_use_is_fragmentation_and_ends);
fn every_second_frame_in_use_is_fragmentation_and_ends() {
    unchanged(|| {
        let block = frames().allocate(order(8)).expect("1 MiB");
        let all = take_all();
        free(block, order(8));
        assert_eq!((frames().stats().fragmentation(), frames().stats().unusable(order(8))), (0, 0));
        let mut singles = [Frame::default(); 256];
        assert_eq!(frames().allocate_bulk(&mut singles), 256);
        singles.sort_unstable();
        // SAFETY: they are this test's, and no longer used.
        let free_some = |some: &[Frame]| unsafe { frames().free_bulk(some) };
        let (mut even, mut odd) = (Vec::with_capacity(128), Vec::with_capacity(128));
        for pair in singles.chunks(2) {
            even.push(pair[0]);
            odd.push(pair[1]);
        }
        free_some(&even);
        let stats = frames().stats();
        assert_eq!((stats.free, stats.unusable(Order::ZERO), stats.unusable(order(1))), (128, 0, 1000));
        assert!(stats.fragmentation() > 990);
        assert_eq!(frames().allocate(order(1)), None);
        free_some(&odd);
        assert_eq!(frames().stats().unusable(order(8)), 0);
        give_back(all);
    });
}
