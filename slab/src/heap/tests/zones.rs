use std::vec::Vec;

use super::*;

/// Frames of each zone, without those of records.
const ZONE: usize = 256;

const fn boundary(zone: usize) -> u64 {
    START + (zone * ZONE * FRAME_SIZE) as u64
}

const LOWEST: u64 = boundary(1);

/// A heap over three equal zones of [`ZONE`] frames.
fn three_zones(machine: &Machine) -> Heap {
    let heap = Heap::with_zones([LOWEST, boundary(2)]);
    // SAFETY: the memory is this machine's, which the tests keep longer than the heap.
    unsafe { heap.init([machine.region()], machine.base()) }.unwrap();
    heap
}

/// Takes the frames that a zone has, but `keep` of them.
fn take(heap: &Heap, zone: usize, keep: usize) -> Vec<Frame> {
    let free = heap.frames().stats().zones[zone].free;
    (keep..free).map(|_| heap.frames().allocate_below(1, Order::ZERO, boundary(zone + 1)).unwrap()).collect()
}

fn give_back(heap: &Heap, frames: Vec<Frame>) {
    frames.into_iter().for_each(|frame| AnyHeap::free_frame(heap, frame));
}

/// Leaves an empty slab in the lowest zone for each of so many size classes: the only memory there that is not taken.
fn idle_slabs_in_the_lowest_zone(heap: &Heap, classes: usize) -> Vec<Frame> {
    // What keeps the reserve back is the higher zones, even when they have nothing.
    let reserve = heap.frames().stats().zones[0].reserve;
    let low = take(heap, 0, classes + reserve);
    let higher = [take(heap, 2, 0), take(heap, 1, 0)].concat();
    let sizes = SIZES.iter().filter(|size| size.is_power_of_two() && **size <= 512).take(classes);
    let blocks: Vec<_> = sizes.map(|&size| (heap.allocate(layout(size, 1)).unwrap(), layout(size, 1))).collect();
    blocks.into_iter().for_each(|(block, layout)| AnyHeap::free(heap, block, layout));
    give_back(heap, higher);
    low
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_request_with_a_limit_has_memory_given_back_before_it_fails() {
    let machine = Machine::new(START, 3 * ZONE);
    let heap = three_zones(&machine);
    let before = heap.settled();
    let low = idle_slabs_in_the_lowest_zone(&heap, 6);
    let reserve = take(&heap, 0, 0);
    assert_eq!(heap.frames().allocate_below(1, Order::ZERO, LOWEST), None);
    let found: Vec<_> = core::iter::from_fn(|| heap.allocate_frames(1, Order::ZERO, LOWEST)).collect();
    assert_eq!(found.len(), 6, "a slab each");
    assert!(found.iter().all(|frame| frame.address() < LOWEST));
    assert_eq!(heap.allocate_frames(1 << 18, Order::ZERO, u64::MAX), None, "more than there is");
    [low, reserve, found].into_iter().for_each(|frames| give_back(&heap, frames));
    assert_eq!(heap.settled(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn maintain_gives_back_where_only_a_low_zone_is_short() {
    let machine = Machine::new(START, 3 * ZONE);
    let heap = three_zones(&machine);
    let before = heap.settled();
    let low = idle_slabs_in_the_lowest_zone(&heap, 6);
    let rest = take(&heap, 0, 1);
    let free = || heap.frames().stats().zones.map(|zone| (zone.free, zone.low, zone.high));
    assert_eq!((free()[0], heap.frames().below_low()), ((1, 4, 8), false));
    heap.maintain(0);
    assert_eq!(free()[0].0, 7, "of the six slabs each was the only one in its cache");
    [low, rest].into_iter().for_each(|frames| give_back(&heap, frames));
    assert_eq!(heap.settled(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_zone_that_is_used_up_is_no_pressure_where_nobody_needs_that_one() {
    let machine = Machine::new(START, 3 * ZONE);
    let heap = three_zones(&machine);
    let cache = || heap.cache_stats().find(|cache| cache.object_size == 64).unwrap();
    let block = heap.allocate(layout(64, 1)).unwrap();
    let higher = [take(&heap, 2, 0), take(&heap, 1, 0)].concat();
    AnyHeap::free(&heap, block, layout(64, 1));
    heap.maintain(0);
    assert_eq!((cache().slabs, cache().in_use), (1, 0), "kept for the next allocation");
    let low = take(&heap, 0, 0);
    give_back(&heap, higher);
    heap.maintain(0);
    assert_eq!(cache().slabs, 0, "somebody has just asked for low memory");
    let block = heap.allocate(layout(64, 1)).unwrap();
    AnyHeap::free(&heap, block, layout(64, 1));
    heap.maintain(0);
    assert_eq!(cache().slabs, 1, "and nobody since");
    give_back(&heap, low);
}
