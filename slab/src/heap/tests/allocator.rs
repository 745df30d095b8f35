//! Collections of the `allocator-api2` crate.

use allocator_api2::alloc::Allocator;
use allocator_api2::boxed::Box;
use allocator_api2::vec::Vec;

use super::*;

type Other = crate::Heap<Threads>;

#[test]
fn vectors_and_boxes_live_in_the_heap_and_give_everything_back() {
    let machine = Machine::new(START, FRAMES);
    collect(&machine.heap());
    let machine = Machine::new(START, FRAMES);
    collect(&machine.heap_on::<Threads>());
}

fn collect<P: Platform>(heap: &super::super::Heap<P>) {
    let before = heap.settled();
    let count = if cfg!(miri) { 300 } else { 20_000 };
    let mut numbers = Vec::new_in(heap);
    let mut boxes = Vec::new_in(heap);
    for number in 0..count {
        numbers.push(number);
        if number % 100 == 0 {
            boxes.push(Box::new_in([number; 5], heap));
        }
    }
    assert!(numbers.iter().copied().eq(0..count));
    assert!(boxes.iter().map(|boxed| boxed[4]).eq((0..count).step_by(100)));
    numbers.truncate(10);
    numbers.shrink_to_fit();
    assert_eq!(numbers[..], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let slice: Box<[usize], _> = numbers.into_boxed_slice();
    assert_eq!(slice.len(), 10);
    let empty = Box::new_in((), heap);
    drop((slice, boxes, empty));
    assert_eq!(heap.settled(), before);
}

#[test]
fn two_heaps_stand_side_by_side() {
    let machines = [Machine::new(START, 64), Machine::new(4 * START, 64)];
    let heaps = machines.each_ref().map(Machine::heap);
    let before = heaps[1].used();
    let [mut first, mut second] = heaps.each_ref().map(Vec::new_in);
    first.extend(0..2000_u64);
    assert!(heaps[0].used() >= 16_000 && heaps[1].used() == before);
    second.extend(first.iter().copied());
    assert!(heaps[1].used() >= 16_000);
    assert_eq!(first, second);
}

#[test]
fn a_block_has_all_its_bytes_and_may_be_freed_with_any_size_between() {
    let machine = Machine::new(START, FRAMES);
    let heap = &machine.heap();
    let before = heap.settled();
    for (size, align) in [(1, 1), (100, 8), (100, 64), (5000, 4096), (8193, 8), (9000, 8192)] {
        let wanted = layout(size, align);
        let block = Allocator::allocate(&heap, wanted).unwrap();
        assert_eq!(Some(block.len()), Heap::usable_size(wanted));
        fill(block.cast(), block.len(), 1);
        let between = size.midpoint(block.len());
        for size in [size, between, block.len()] {
            // SAFETY: a size between that asked for and that given; the block is freed once, at the end.
            let same = unsafe { heap.grow(block.cast(), wanted, layout(size, align)) }.unwrap();
            assert_eq!(same, block, "{size}");
        }
        // SAFETY: nobody uses the block any more.
        unsafe { heap.deallocate(block.cast(), layout(block.len(), align)) };
    }
    assert_eq!(heap.settled(), before);
}

#[test]
fn zeroed_blocks_are_zero_to_their_end() {
    let machine = Machine::new(START, FRAMES);
    let heap = &machine.heap();
    for size in [1, 100, 5000, 9000] {
        let wanted = layout(size, 8);
        let dirty = Allocator::allocate(&heap, wanted).unwrap();
        fill(dirty.cast(), dirty.len(), 0xa5);
        // SAFETY: nobody uses the block any more.
        unsafe { heap.deallocate(dirty.cast(), wanted) };
        let zeroed = Allocator::allocate_zeroed(&heap, wanted).unwrap();
        assert!(holds(zeroed.cast(), zeroed.len(), 0));
        fill(zeroed.cast(), size, 7);
        // SAFETY: allocated for this layout; given up for the new one.
        let grown = unsafe { heap.grow_zeroed(zeroed.cast(), wanted, layout(3 * size, 8)) }.unwrap();
        assert!(holds(grown.cast(), size, 7));
        // SAFETY: the block is larger than that.
        let tail = unsafe { grown.cast::<u8>().add(size) };
        assert!(holds(tail, grown.len() - size, 0));
        // SAFETY: nobody uses the block any more.
        unsafe { heap.deallocate(grown.cast(), layout(3 * size, 8)) };
    }
}

#[test]
fn row_32_an_empty_layout_gets_no_block() {
    let machine = Machine::new(START, 64);
    let heap = &machine.heap();
    let (empty, wanted, before) = (layout(0, 64), layout(10, 64), heap.used());
    let none = Allocator::allocate(&heap, empty).unwrap();
    assert_eq!((none.len(), none.addr().get() % 64, heap.used()), (0, 0, before));
    assert_eq!(Allocator::allocate_zeroed(&heap, empty).unwrap().len(), 0);
    // SAFETY: an empty layout may become another, and back; nothing is freed twice.
    unsafe {
        let block = heap.grow_zeroed(none.cast(), empty, wanted).unwrap();
        assert!(holds(block.cast(), 64, 0));
        let none = Allocator::shrink(&heap, block.cast(), wanted, empty).unwrap();
        assert_eq!(none.len(), 0);
        heap.deallocate(none.cast(), empty);
    }
    heap.settled();
    assert_eq!(heap.used(), before);
}

#[test]
fn growing_and_shrinking_may_change_the_alignment() {
    let machine = Machine::new(START, FRAMES);
    let heap: &Other = &machine.heap_on();
    let (small, large) = (layout(40, 8), layout(40, 4096));
    // Two, so that one of them is not aligned to a page by chance.
    for block in [(); 2].map(|()| Allocator::allocate(&heap, small).unwrap()) {
        fill(block.cast(), 40, 9);
        // SAFETY: allocated for this layout; given up for the new one.
        let grown = unsafe { heap.grow(block.cast(), small, large) }.unwrap().cast();
        assert!(is_aligned(grown, 4096));
        assert!(holds(grown, 40, 9));
        // SAFETY: as above.
        let shrunk = unsafe { Allocator::shrink(&heap, grown, large, layout(20, 4)) }.unwrap().cast();
        assert!(holds(shrunk, 20, 9));
        // SAFETY: nobody uses the block any more.
        unsafe { heap.deallocate(shrunk, layout(20, 4)) };
    }
}

#[test]
fn what_cannot_be_is_an_error_and_the_block_stays() {
    let machine = Machine::new(START, 16);
    let heap = &machine.heap();
    let wanted = layout(100, 8);
    let block = Allocator::allocate(&heap, wanted).unwrap();
    fill(block.cast(), 100, 4);
    // SAFETY: allocated for this layout.
    assert!(unsafe { heap.grow(block.cast(), wanted, layout(1 << 20, 8)) }.is_err());
    assert!(Allocator::allocate(&heap, layout(1 << 20, 8)).is_err());
    assert!(holds(block.cast(), 100, 4));
    // SAFETY: nobody uses the block any more.
    unsafe { heap.deallocate(block.cast(), wanted) };
    let mut numbers = Vec::<u64, _>::new_in(heap);
    assert!(numbers.try_reserve(1 << 20).is_err());
    assert!(numbers.try_reserve(100).is_ok());
}
