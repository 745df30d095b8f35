//! Blocks that wait unmerged, frames that are freed together, and records that are made later.

use super::stock::{Two, on_cpu};
use super::*;

use crate::testing::report_of;

/// Blocks of an order that wait.
const WAITING: usize = 8;

#[test]
fn a_freed_block_waits_unmerged_and_is_handed_out_again() {
    let machine = Machine::new(START, 256);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    let blocks: Vec<_> = (0..WAITING + 2).map(|_| frames.allocate(order(1)).unwrap()).collect();
    blocks.iter().for_each(|block| free(&frames, *block, order(1)));
    let waiting = || blocks.iter().filter(|block| frames.owner(**block) == Owner::Stock(order(1))).count();
    assert_eq!(waiting(), WAITING);
    frames.verify().unwrap();
    assert_eq!(frames.allocate(order(1)), Some(blocks[WAITING - 1]), "the last one is warm");
    assert_eq!(waiting(), WAITING - 1);
    free(&frames, blocks[WAITING - 1], order(1));
    assert_eq!(frames.stats(), before, "who counts free blocks sees them merged");
    assert_eq!(waiting(), 0);
    frames.verify().unwrap();
}

#[test]
fn blocks_that_wait_merge_before_a_request_fails() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let largest = frames.allocate(order(5)).unwrap();
    free(&frames, largest, order(5));
    let all = take_all(&frames, order(2));
    all.iter().for_each(|block| free(&frames, *block, order(2)));
    assert_eq!(frames.allocate(order(5)), Some(largest));
    free(&frames, largest, order(5));
    // What is asked for by its place merges, too.
    assert!(frames.allocate_at(largest.offset(1), 9));
    frames.verify().unwrap();
    free_run(&frames, largest.offset(1), 9);
    assert_eq!(frames.remove(largest.address()..largest.address() + 8 * 4096), Ok(8));
    frames.verify().unwrap();
}

#[test]
fn a_block_that_is_in_two_zones_does_not_wait() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], [19, 64]);
    let before = frames.stats();
    assert!(frames.allocate_at(nth(16), 8));
    free_run(&frames, nth(16), 8);
    frames.verify().unwrap();
    assert_eq!(frames.stats(), before);
}

#[test]
fn row_1_a_block_that_waits_is_not_freed_again() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let block = frames.allocate(order(2)).unwrap();
    free(&frames, block, order(2));
    assert_eq!(frames.owner(block), Owner::Stock(order(2)));
    for (frame, order) in [(block, order(2)), (block, Order::ZERO), (block.offset(1), Order::ZERO)] {
        let report = report_of(|| free(&frames, frame, order));
        assert!(report.contains("double free"), "{report}");
    }
    frames.verify().unwrap();
}

#[test]
fn row_30_a_block_that_waits_and_whose_record_was_overwritten_is_reported_and_not_handed_out() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let block = frames.allocate(order(2)).unwrap();
    free(&frames, block, order(2));
    frames.records.set_owner(block, Owner::Pages(4));
    let report = report_of(|| assert_ne!(frames.allocate(order(2)), Some(block)));
    assert!(report.starts_with("kslab: damage at 0x"), "{report}");
}

#[test]
fn frames_freed_together_merge_in_whatever_order_they_come() {
    let machine = Machine::new(START, 512);
    let frames: Frames<NoInterrupts> =
        frames_of(&machine, &[machine.region()], [START + (256 << 12), START + (300 << 12)]);
    let before = frames.stats();
    let mut bulk = vec![Frame::default(); before.free];
    assert_eq!(frames.allocate_bulk(&mut bulk), bulk.len());
    // 101 and the length have no common divisor.
    let shuffled: Vec<_> = (0..bulk.len()).map(|index| bulk[index * 101 % bulk.len()]).collect();
    for part in [1, 7, shuffled.len()] {
        // SAFETY: nobody uses them.
        shuffled.chunks(part).for_each(|part| unsafe { frames.free_bulk(part) });
        assert_eq!(frames.stats(), before);
        frames.verify().unwrap();
        assert_eq!(frames.allocate_bulk(&mut bulk), bulk.len());
    }
}

#[test]
fn two_threads_free_frames_together_that_lie_among_each_other() {
    let machine = Machine::new(START, 1024);
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    let mut bulk = vec![Frame::default(); if cfg!(miri) { 100 } else { 900 }];
    for _ in 0..if cfg!(miri) { 2 } else { 100 } {
        assert_eq!(frames.allocate_bulk(&mut bulk), bulk.len());
        std::thread::scope(|scope| {
            for half in [0, 1] {
                let mine: Vec<_> = bulk.iter().copied().skip(half).step_by(2).collect();
                let frames = &frames;
                // SAFETY: nobody uses them, and the other thread has others.
                scope.spawn(move || on_cpu(half, || unsafe { frames.free_bulk(&mine) }));
            }
        });
        frames.verify().unwrap();
        assert_eq!(frames.stats(), before);
    }
}

/// More than what has its records at once: 128 MiB.
const LARGE: usize = 32768;

#[test]
fn init_makes_the_records_of_small_memory_only() {
    let later = |frames: usize| {
        let machine = Machine::new(START, frames);
        let frames = all_of::<NoInterrupts>(&machine);
        frames.verify().unwrap();
        frames.records.later()[1].clone()
    };
    assert!(later(8192).is_empty());
    assert_eq!(later(8193).start, nth(0));
    if !cfg!(miri) {
        assert_eq!(later(8 * LARGE).start, nth(0));
    }
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn memory_whose_records_are_made_later_is_as_any_other() {
    let machine = Machine::new(START, LARGE);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    assert_eq!(before.total, LARGE);
    let pages = take_all(&frames, Order::LARGE_PAGE);
    assert_eq!(pages.len(), before.free / 512);
    let rest = take_all(&frames, Order::ZERO);
    frames.verify().unwrap();
    assert!(frames.records.later()[1].is_empty());
    assert_eq!(frames.owner(nth(LARGE as u64 - 1)), Owner::Records);
    pages.iter().for_each(|page| free(&frames, *page, Order::LARGE_PAGE));
    rest.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    assert_eq!(frames.stats(), before, "all has merged, and there is no more than there was");
    frames.verify().unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn what_has_no_record_yet_is_free_and_may_be_asked_for() {
    let machine = Machine::new(START, LARGE);
    let new = || all_of::<NoInterrupts>(&machine);
    let far = nth(20_000);
    let frames = new();
    let before = frames.stats();
    let report = report_of(|| free(&frames, far, Order::ZERO));
    assert!(report.contains("double free"), "{report}");
    let report = report_of(|| free(&frames, nth(LARGE as u64 - 1), Order::ZERO));
    assert!(report.contains("0x"), "{report}");
    assert!(frames.allocate_at(far, 100));
    assert!(frames.records.later()[1].start > far);
    frames.verify().unwrap();
    free_run(&frames, far, 100);
    assert_eq!(frames.stats(), before);

    let frames = new();
    assert_eq!(add(&frames, &[machine.usable(20_000, 1)]), Err(AddError::AlreadyManaged { frame: far }));
    let frames = new();
    assert_eq!(frames.remove(far.address()..far.address() + (3 << 12)), Ok(3));
    assert_eq!(frames.owner(far), Owner::Unmanaged);
    frames.verify().unwrap();
    // Just before: it cannot grow into what is gone.
    let frames = new();
    let run = nth(16_000);
    assert!(frames.allocate_at(run, 384));
    assert_eq!(frames.try_grow_run(run, 384, 2000), Ok(true));
    frames.verify().unwrap();
    free_run(&frames, run, 2000);
    assert_eq!(frames.stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn records_are_made_later_in_the_lower_zones_too() {
    let machine = Machine::new(START, 3 * LARGE);
    let boundaries = [1, 2 * LARGE as u64];
    let new = || -> Frames<NoInterrupts> { frames_of(&machine, &[machine.region()], boundaries) };
    let high = nth(2 * LARGE as u64);
    let frames = new();
    let before = frames.stats();
    let tables = nth(3 * LARGE as u64 - before.metadata as u64);
    let later = [nth(1)..high, high..tables];
    assert_eq!(frames.records.later(), later);
    // What is asked for by its place, and what has to be low: the other part is left alone.
    let run = nth(20_000);
    assert!(frames.allocate_at(run, 100));
    assert!(frames.records.later()[0].start > run);
    free_run(&frames, run, 100);
    assert_eq!(frames.records.later()[1], later[1]);
    let mut low = Vec::new();
    while let Some(page) = frames.allocate_below(512, Order::LARGE_PAGE, high.address()) {
        low.push(page);
    }
    assert!(frames.records.later()[0].is_empty());
    assert_eq!(frames.records.later()[1], later[1]);
    assert!(low.len() >= 2 * LARGE / 512 - 1);
    frames.verify().unwrap();
    low.into_iter().for_each(|page| free_run(&frames, page, 512));
    assert_eq!(frames.stats(), before);

    // The higher zone first, then the lower one.
    let frames = new();
    let pages = take_all(&frames, Order::LARGE_PAGE);
    assert!(pages.len() >= before.free / 512 - 4);
    let rest = take_all(&frames, Order::ZERO);
    assert!(frames.records.later().iter().all(|later| later.is_empty()));
    frames.verify().unwrap();
    pages.iter().for_each(|page| free(&frames, *page, Order::LARGE_PAGE));
    rest.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    assert_eq!(frames.stats(), before);
    let frames = new();
    assert_eq!(
        frames.remove(run.address()..high.address() + (50_000 << 12)),
        Err(RemoveError::Records { frame: tables })
    );
    assert_eq!(frames.remove(run.address()..tables.address()), Ok(tables.number() as usize - run.number() as usize));
    frames.verify().unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn each_of_three_large_zones_has_all_its_memory() {
    let machine = Machine::new(START, 3 * LARGE);
    let boundaries = [40_000, 60_000];
    for zone in 0..3 {
        let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], boundaries);
        let before = frames.stats();
        let limit = boundaries.get(zone).map_or(u64::MAX, |boundary| nth(*boundary).address());
        let mut pages = Vec::new();
        while let Some(page) = frames.allocate_below(512, Order::LARGE_PAGE, limit) {
            pages.push(page);
            if pages.len() % 16 == 0 {
                frames.verify().unwrap();
            }
        }
        let below = boundaries.get(zone).map_or(before.free as u64, |boundary| *boundary);
        assert!(pages.len() as u64 >= below / 512 - 4, "{} of {below}", pages.len());
        frames.verify().unwrap();
        pages.into_iter().for_each(|page| free_run(&frames, page, 512));
        assert_eq!(frames.stats(), before);
        frames.verify().unwrap();
    }
}

#[test]
fn the_lowest_of_three_zones_has_its_records_at_once() {
    let machine = Machine::new(START, LARGE);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], [1000, 2000]);
    let [low, high] = frames.records.later();
    assert!(low == (nth(1000)..nth(2000)) && high.start == nth(2000), "{low:?}, {high:?}");
    let low = [1000, 2000].map(|limit| frames.allocate_below(1000, Order::ZERO, nth(limit).address()).unwrap());
    assert_eq!(low, [0, 1000].map(nth));
    frames.verify().unwrap();
    low.into_iter().for_each(|run| free_run(&frames, run, 1000));
}
