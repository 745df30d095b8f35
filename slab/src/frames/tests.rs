mod allocate;
mod lend;
mod model;
mod records;
mod regions;
mod stock;
mod verify;
mod waiting;
#[cfg(feature = "x86_64")]
mod x86_64;
mod zones;

use std::vec::Vec;

use super::*;
use crate::memory::Region;
use crate::platform::NoInterrupts;
use crate::testing::{Heap, Machine, report_of};

const START: u64 = 64 << 20;

fn order(order: u32) -> Order {
    Order::new(order).unwrap()
}

fn init(heap: &Heap, machine: &Machine, regions: &[Region]) -> Result<(), InitError> {
    // SAFETY: the regions are the machine's, which outlives the heap.
    unsafe { heap.init(regions.iter().copied(), machine.base()) }
}

/// Frames over these regions of a machine, with zones that meet at the machine's frames `boundaries`.
fn frames_of<P: Platform>(machine: &Machine, regions: &[Region], boundaries: [u64; 2]) -> Frames<P> {
    let frames = Frames::with_zones(boundaries.map(|frame| START + frame * 4096));
    // SAFETY: the regions are the machine's, which outlives the frames.
    unsafe { frames.init(regions.iter().copied(), machine.base()) }.unwrap();
    frames
}

/// Frames over all of a machine, in one zone.
fn all_of<P: Platform>(machine: &Machine) -> Frames<P> {
    frames_of(machine, &[machine.region()], [0, 0])
}

/// The `index`th frame of a machine.
fn nth(index: u64) -> Frame {
    Frame::containing(START + index * 4096).unwrap()
}

/// Adds regions of the same machine.
fn add<P: Platform>(frames: &Frames<P>, regions: &[Region]) -> Result<usize, AddError> {
    // SAFETY: the machine outlives the frames.
    unsafe { frames.add(regions.iter().copied()) }
}

/// Allocates as long as there is a block of `order`.
fn take_all<P: Platform>(frames: &Frames<P>, order: Order) -> Vec<Frame> {
    std::iter::from_fn(|| frames.allocate(order)).collect()
}

fn free<P: Platform>(frames: &Frames<P>, frame: Frame, order: Order) {
    // SAFETY: these tests never access what they allocate.
    unsafe { frames.free(frame, order) }
}

fn free_run<P: Platform>(frames: &Frames<P>, frame: Frame, count: u32) {
    // SAFETY: as above.
    unsafe { frames.free_run(frame, count) }
}

#[test]
fn a_block_is_split_and_merges_again() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    let frames = heap.frames();
    let before = frames.stats();
    let one = frames.allocate(Order::ZERO).unwrap();
    assert_eq!(frames.stats().free, before.free - 1);
    free(frames, one, Order::ZERO);
    assert_eq!(frames.stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn blocks_are_disjoint_aligned_and_from_the_map() {
    let machine = Machine::new(START, 1024);
    for size in 0..=9 {
        let heap = machine.heap();
        let mut blocks = take_all(heap.frames(), order(size));
        assert!(!blocks.is_empty());
        blocks.sort();
        let first = (START / 4096) as u32;
        for block in &blocks {
            assert_eq!(block.number() % order(size).frames(), 0);
            assert!(block.number() >= first && block.number() + order(size).frames() <= first + 1024);
        }
        assert!(blocks.windows(2).all(|pair| pair[1].number() - pair[0].number() >= order(size).frames()));
    }
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn all_memory_but_the_records_can_be_allocated_and_given_back() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    let frames = heap.frames();
    let before = frames.stats();
    assert_eq!(before.total, 1024);
    assert_eq!(before.free, before.total - before.metadata);
    assert!(before.metadata <= 4, "16 bytes a frame: {before:?}");
    let all = take_all(frames, Order::ZERO);
    assert_eq!((all.len(), frames.stats().free), (before.free, 0));
    for frame in all.iter().step_by(2).chain(all.iter().skip(1).step_by(2)) {
        free(frames, *frame, Order::ZERO);
    }
    assert_eq!(frames.stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_run_takes_only_as_many_frames_as_asked_for() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    let frames = heap.frames();
    let before = frames.stats();
    for count in [1, 2, 3, 5, 63, 64, 65, 300] {
        let run = frames.allocate_run(count, Order::ZERO).unwrap();
        assert_eq!(frames.stats().free, before.free - count as usize);
        free_run(frames, run, count);
        assert_eq!(frames.stats(), before);
    }
}

#[test]
fn a_run_is_aligned_as_asked_for() {
    let machine = Machine::new(START, 2048);
    let heap = machine.heap();
    for alignment in 0..=9 {
        let run = heap.frames().allocate_run(3, order(alignment)).unwrap();
        assert_eq!(run.number() % order(alignment).frames(), 0);
    }
}

#[test]
fn a_run_of_nothing_or_of_more_than_there_is_is_refused() {
    let machine = Machine::new(START, 1024);
    let heap = machine.heap();
    assert_eq!(heap.frames().allocate_run(0, Order::ZERO), None);
    assert_eq!(heap.frames().allocate_run(2048, Order::ZERO), None);
    assert_eq!(heap.frames().allocate_run(u32::MAX, Order::ZERO), None);
}

#[test]
fn row_116_without_init_nothing_is_allocated() {
    let heap = Heap::new();
    assert_eq!(heap.frames().allocate(Order::ZERO), None);
    assert_eq!(heap.frames().stats().total, 0);
}

#[test]
fn row_53_and_62_nothing_merges_across_a_hole() {
    let machine = Machine::new(START, 64);
    let heap = Heap::new();
    let hole = Region::reserved(START + 31 * 4096, 4096);
    init(&heap, &machine, &[machine.region(), hole]).unwrap();
    let frames = heap.frames();
    assert_eq!(frames.stats().total, 63);
    assert_eq!(frames.allocate(order(5)), None, "each side of the hole has at most 31 frames and the records");
    let all = take_all(frames, Order::ZERO);
    assert!(all.iter().all(|frame| frame.address() != START + 31 * 4096));
    all.iter().for_each(|frame| free(frames, *frame, Order::ZERO));
    assert_eq!(frames.allocate(order(5)), None);
}

#[test]
fn row_52_a_reserved_terabyte_costs_nothing() {
    let machine = Machine::new(START, 64);
    let heap = Heap::new();
    let far = Region::reserved(1 << 40, 1 << 30);
    init(&heap, &machine, &[machine.region(), far]).unwrap();
    assert_eq!(heap.frames().stats().metadata, 1);
}

#[test]
fn row_55_and_56_a_map_with_too_little_memory_is_an_error() {
    let machine = Machine::new(START, 64);
    let heap = Heap::new();
    assert_eq!(init(&heap, &machine, &[]), Err(InitError::NoUsableMemory));
    assert_eq!(init(&heap, &machine, &[Region::usable(START, 4095)]), Err(InitError::NoUsableMemory));
    let error = init(&heap, &machine, &[machine.usable(0, 1), machine.usable(2, 1)]);
    assert_eq!(error, Err(InitError::MetadataDoesNotFit { needed: 3 * 4096, largest: 4096 }));
    init(&heap, &machine, &[machine.usable(0, 1)]).expect("an error leaves the heap as it was");
    assert_eq!(heap.frames().stats().free, 1, "one frame needs no memory for its record");
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn row_57_many_tiny_regions_are_managed_with_records_for_their_megabytes_only() {
    let machine = Machine::new(START, 4096);
    let heap = Heap::new();
    let tiny = (0..1500).map(|i| machine.usable(2 * i, 1));
    let regions: Vec<_> = tiny.chain([machine.usable(3500, 500)]).collect();
    init(&heap, &machine, &regions).unwrap();
    let stats = heap.frames().stats();
    assert_eq!(stats.total, 2000);
    assert_eq!(stats.metadata, 2 + 12 + 2, "the direct table of 500 frames, and 3000 others in a tree");
    heap.frames().verify().unwrap();
    assert_eq!(take_all(heap.frames(), Order::ZERO).len(), stats.free);
}

#[test]
fn row_58_a_second_init_is_an_error() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = heap.frames().stats();
    assert_eq!(init(&heap, &machine, &[machine.region()]), Err(InitError::AlreadyInitialised));
    assert_eq!(heap.frames().stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn row_59_metadata_that_does_not_fit_is_an_error_with_the_size_needed() {
    let machine = Machine::new(START, 4096);
    let heap = Heap::new();
    let regions: Vec<_> = (0..2000).map(|i| machine.usable(2 * i, 1)).collect();
    let error = init(&heap, &machine, &regions).unwrap_err();
    let InitError::MetadataDoesNotFit { needed, largest } = error else { panic!("{error:?}") };
    assert!(needed == (16 + 2) * 4096 && largest == 4096);
    assert!(error.to_string().contains(&needed.to_string()));
}

#[test]
fn row_60_frames_freed_with_the_wrong_order_are_refused() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let block = heap.frames().allocate(order(2)).unwrap();
    let report = report_of(|| free(heap.frames(), block, order(1)));
    assert!(report.ends_with("wrong size: freed as 2 page frames, allocated as 4"), "{report}");
    free(heap.frames(), block, order(2));
}

#[test]
fn row_61_frames_freed_inside_a_block_or_outside_memory_are_refused() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let frames = heap.frames();
    let block = frames.allocate(order(2)).unwrap();
    let before = frames.stats();
    let inside = report_of(|| free(frames, block.offset(1), Order::ZERO));
    assert!(inside.ends_with("not the start of an allocation"), "{inside}");
    for address in [0, START - 4096, START + 64 * 4096, 1 << 43] {
        let frame = Frame::containing(address).unwrap();
        let outside = report_of(|| free(frames, frame, Order::ZERO));
        assert!(outside.ends_with("not memory of this allocator"), "{outside}");
    }
    assert_eq!(frames.stats(), before);
}

#[test]
fn row_1_frames_freed_twice_are_refused_wherever_they_have_merged() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let frames = heap.frames();
    let all = take_all(frames, Order::ZERO);
    all.iter().for_each(|frame| free(frames, *frame, Order::ZERO));
    let before = frames.stats();
    for frame in all {
        let report = report_of(|| free(frames, frame, Order::ZERO));
        assert!(report.contains("double free"), "{report}");
    }
    assert_eq!(frames.stats(), before);
}

#[test]
fn row_67_exhausted_frames_serve_again_after_a_free() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let all = take_all(heap.frames(), Order::ZERO);
    assert_eq!(heap.frames().allocate(Order::ZERO), None);
    free(heap.frames(), all[7], Order::ZERO);
    assert_eq!(heap.frames().allocate(Order::ZERO), Some(all[7]));
}
