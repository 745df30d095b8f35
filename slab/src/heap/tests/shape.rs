//! How well memory is used: small heaps, long lives, large requests beside small ones.

use std::vec::Vec;

use super::*;

/// Pages of the 100 KiB that tutorials give their heaps.
const TUTORIAL: usize = 25;

#[test]
fn in_100_kib_102_400_boxes_come_and_go_with_one_alive_throughout() {
    on_both(TUTORIAL, |heap| {
        let wanted = layout(8, 8);
        let long_lived = heap.allocate(wanted).unwrap();
        fill(long_lived, 8, 1);
        for _ in 0..if cfg!(miri) { 200 } else { TUTORIAL * 4096 } {
            let block = heap.allocate(wanted).unwrap();
            fill(block, 8, 2);
            heap.free(block, wanted);
        }
        assert!(holds(long_lived, 8, 1));
        heap.free(long_lived, wanted);
    });
}

#[test]
fn of_100_kib_85_per_cent_hold_objects_of_64_bytes() {
    on_both(TUTORIAL, |heap| {
        let wanted = layout(64, 8);
        let blocks: Vec<_> = core::iter::from_fn(|| heap.allocate(wanted)).collect();
        assert!(blocks.len() * 64 >= TUTORIAL * 4096 * 85 / 100, "{}", blocks.len());
        blocks.into_iter().for_each(|block| heap.free(block, wanted));
    });
}

#[test]
fn beside_a_scatter_of_small_objects_half_the_free_memory_is_one_block_again_and_again() {
    on_both(4096, |heap| {
        let mut scatter = Vec::new();
        for round in 0..20_000_usize {
            let wanted = layout(16 + round * 31 % 500, 8);
            let block = heap.allocate(wanted).unwrap();
            if round.is_multiple_of(10) { scatter.push((block, wanted)) } else { heap.free(block, wanted) }
        }
        for _ in 0..10 {
            let half = layout(heap.settled() / 2, 8);
            let block = heap.allocate(half).expect("half of what is free, in one piece");
            let small = heap.allocate(layout(24, 8)).unwrap();
            heap.free(block, half);
            scatter.push((small, layout(24, 8)));
        }
        scatter.into_iter().for_each(|(block, wanted)| heap.free(block, wanted));
    });
}

#[test]
fn large_requests_are_not_rounded_to_powers_of_two() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let (wanted, before) = (layout(17 * 4096 - 100, 8), heap.used());
    let block = heap.allocate(wanted).unwrap();
    assert_eq!(heap.used(), before + 17 * 4096);
    AnyHeap::free(&heap, block, wanted);
}

#[test]
fn above_128_bytes_a_block_wastes_at_most_an_eighth_of_itself_and_pages_only_above_8_kib() {
    for size in (129..=20_000).step_by(if cfg!(miri) { 97 } else { 1 }) {
        let usable = Heap::usable_size(layout(size, 1)).unwrap();
        let wasted = usable - size;
        if size <= 8192 {
            assert!(wasted * 8 <= usable, "{size}: {usable}");
            assert!(SIZES.contains(&usable), "{size}: {usable}");
        } else {
            assert!(wasted < 4096 && usable.is_multiple_of(4096), "{size}: {usable}");
        }
    }
}

#[test]
fn up_to_128_bytes_a_block_wastes_at_most_7_bytes() {
    for size in 1..=128 {
        let usable = Heap::usable_size(layout(size, 1)).unwrap();
        assert!(usable - size < 8, "{size}: {usable}");
    }
}

/// The whole of memory is as few blocks again as it was, whatever has come and gone in between: magazines, slabs, headers
/// and all the frames' stocks are back.
#[test]
fn when_all_is_freed_memory_is_the_blocks_that_it_was() {
    fn blocks<P: Platform>(heap: &crate::Heap<P>) -> Vec<[usize; Order::COUNT]> {
        heap.shrink();
        heap.frames().stats().zones.iter().map(|zone| zone.free_blocks).collect()
    }
    fn run<P: Platform>(heap: &crate::Heap<P>) {
        let replace = |live: usize| {
            let mut objects: Vec<(NonNull<u8>, Layout)> = Vec::new();
            let mut seed = 1_u32;
            for _ in 0..if cfg!(miri) { 300 } else { 30_000 } {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // 16 to 16384 bytes, as many of each binary order.
                let wanted = layout((16 << ((seed >> 28) % 10)) + (seed >> 12) as usize % 16, 8);
                let object = (heap.allocate(wanted).unwrap(), wanted);
                if objects.len() < live {
                    objects.push(object);
                } else {
                    let (old, its) = core::mem::replace(&mut objects[(seed >> 8) as usize % live], object);
                    AnyHeap::free(heap, old, its);
                }
            }
            objects.into_iter().for_each(|(block, its)| AnyHeap::free(heap, block, its));
        };
        // What is made once stays.
        replace(100);
        let before = blocks(heap);
        replace(1000);
        assert_eq!(blocks(heap), before);
        assert_eq!(heap.verify(), Ok(()));
    }
    let machine = Machine::new(START, 8192);
    run(&machine.heap());
    let machine = Machine::new(START, 8192);
    run(&machine.heap_on::<Threads>());
}
