//! The bullets of *macOS malloc zones*, one after the other.

use core::cell::RefCell;
use std::string::String;
use std::vec::Vec;

use super::*;
use crate::testing::{Machine, Threads, be_cpu, full_report_of};

const START: u64 = 64 << 20;
const FRAMES: usize = if cfg!(miri) { 1024 } else { 2048 };

std::thread_local! {
    static PRINTED: RefCell<String> = const { RefCell::new(String::new()) };
}

fn zones<P: Platform>(parent: &Heap<P>) -> Zones<'_, P> {
    Zones::new(parent, |text| PRINTED.with_borrow_mut(|printed| printed.push_str(&std::format!("{text}"))))
}

fn destroy<P: Platform>(zones: &Zones<'_, P>, zone: Handle) {
    // SAFETY: no test uses what it has destroyed.
    unsafe { zones.destroy_zone(zone) };
}

fn free<P: Platform>(zones: &Zones<'_, P>, zone: Handle, block: *mut c_void) {
    // SAFETY: no test uses what it has freed.
    unsafe { zones.free(zone, block) };
}

fn realloc<P: Platform>(zones: &Zones<'_, P>, zone: Handle, block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: no test uses a block that has moved.
    unsafe { zones.realloc(zone, block, size) }
}

fn fill(block: *mut c_void, bytes: usize, value: u8) {
    // SAFETY: the callers have a block with so many bytes.
    unsafe { block.cast::<u8>().write_bytes(value, bytes) };
}

fn holds(block: *mut c_void, bytes: usize, value: u8) -> bool {
    // SAFETY: as above.
    unsafe { core::slice::from_raw_parts(block.cast::<u8>(), bytes) }.iter().all(|byte| *byte == value)
}

#[test]
fn destroy_zone_frees_everything_that_was_allocated_from_it() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap_on::<Threads>();
    let zones = zones(&parent);
    parent.shrink();
    let before = parent.available();
    let [one, other] = [zones.create_zone(0), zones.create_zone(100_000)];
    zones.set_zone_name(one, Some(c"one"));
    let kept = zones.malloc(other, 10);
    for size in [0, 1, 100, 5000, 100_000] {
        assert!(!zones.malloc(one, size).is_null());
    }
    destroy(&zones, one);
    destroy(&zones, one);
    assert!(zones.malloc(one, 1).is_null() && zones.zone_name(one).is_none());
    assert!(zones.size(other, kept) >= 10);
    destroy(&zones, other);
    parent.shrink();
    assert_eq!((parent.available(), parent.verify()), (before, Ok(())));
    assert!(zones.create_zone(64 << 20).is_null(), "more than there is");
    let default = zones.default_zone();
    destroy(&zones, default);
    assert_eq!(zones.default_zone(), default);
    assert!(!zones.malloc(default, 1).is_null());
}

#[test]
fn a_zone_that_is_not_registered_is_not_asked_for_pointers_nor_counted() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let block = zones.malloc(zone, 100);
    assert_eq!((zones.zone_from_ptr(block), zones.zone_statistics(ptr::null_mut()).blocks_in_use), (zone, 1));
    zones.zone_unregister(zone);
    assert!(zones.zone_from_ptr(block).is_null());
    assert_eq!(zones.zone_statistics(ptr::null_mut()), Statistics::default());
    assert!(zones.size(zone, block) >= 100 && zones.zone_statistics(zone).blocks_in_use == 1);
    zones.zone_register(zone);
    assert_eq!(zones.zone_from_ptr(block), zone);
}

#[test]
fn a_zone_has_a_copy_of_its_name() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    assert_eq!(zones.zone_name(zone), None);
    {
        let name = std::ffi::CString::new("for a while").unwrap();
        zones.set_zone_name(zone, Some(&name));
    }
    assert_eq!(zones.zone_name(zone), Some(c"for a while"));
    zones.set_zone_name(zone, Some(c"another"));
    assert_eq!(zones.zone_name(zone), Some(c"another"));
    zones.set_zone_name(zone, None);
    assert_eq!(zones.zone_name(zone), None);
    assert_eq!(zones.zone_name(ptr::null_mut()), None);
    zones.set_zone_name(zone, Some(c"to the end"));
    drop(zones);
    assert_eq!(parent.block_after(None), None);
}

#[test]
fn malloc_and_calloc_are_as_c_has_them() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let [one, other] = [zones.malloc(zone, 0), zones.malloc(zone, 0)];
    assert!(!one.is_null() && one != other && one.addr().is_multiple_of(16));
    let dirty = zones.malloc(zone, 500);
    fill(dirty, 500, 0xff);
    free(&zones, zone, dirty);
    assert!(holds(zones.calloc(zone, 5, 100), 500, 0));
    assert!(zones.calloc(zone, 1 << 33, 1 << 33).is_null() && zones.malloc(zone, usize::MAX).is_null());
    assert!(zones.malloc(ptr::null_mut(), 8).is_null() && zones.malloc(ptr::dangling_mut(), 8).is_null());
}

#[test]
fn valloc_starts_at_a_page_and_is_zero() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let dirty = zones.malloc(zone, 4096);
    fill(dirty, 4096, 0xff);
    free(&zones, zone, dirty);
    for size in [1, 4096, 5000] {
        let block = zones.valloc(zone, size);
        assert!(block.addr().is_multiple_of(4096) && holds(block, size, 0));
    }
}

#[test]
fn free_takes_blocks_of_its_zone_and_null() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let [zone, other] = [zones.create_zone(0), zones.create_zone(0)];
    let block = zones.malloc(zone, 100);
    free(&zones, zone, ptr::null_mut());
    assert!(full_report_of(|| free(&zones, other, block)).contains("BADADDR"));
    free(&zones, zone, block);
    assert!(full_report_of(|| free(&zones, zone, block)).contains("DUPFREE"));
    assert_eq!(zones.zone_statistics(zone).blocks_in_use, 0);
}

#[test]
fn realloc_keeps_what_fits_and_where_it_fails_the_block() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let mut block = realloc(&zones, zone, ptr::null_mut(), 10);
    fill(block, 10, 4);
    for size in [20, 5000, 50_000, 100] {
        block = realloc(&zones, zone, block, size);
        assert!(holds(block, 10, 4) && zones.size(zone, block) >= size);
    }
    assert!(realloc(&zones, zone, block, 64 << 20).is_null() && realloc(&zones, zone, block, usize::MAX).is_null());
    assert!(holds(block, 10, 4));
    let smallest = realloc(&zones, zone, block, 0);
    assert!(!smallest.is_null());
    assert_eq!(zones.zone_statistics(zone).blocks_in_use, 1);
}

#[test]
fn memalign_is_aligned_or_null() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    for alignment in (3..=16).map(|log| 1 << log) {
        let block = zones.memalign(zone, alignment, 100);
        assert!(!block.is_null() && block.addr().is_multiple_of(alignment), "{alignment}");
    }
    assert!([0, 1, 4, 24, 1 << 40].into_iter().all(|alignment| zones.memalign(zone, alignment, 100).is_null()));
}

#[test]
fn zone_from_ptr_is_the_owning_zone_or_null() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let all: Vec<_> = (0..3).map(|_| zones.create_zone(0)).collect();
    for &zone in &all {
        for size in [1, 4096, 100_000] {
            let block = zones.malloc(zone, size);
            assert_eq!(zones.zone_from_ptr(block), zone);
            assert!(zones.zone_from_ptr(block.wrapping_byte_add(16)).is_null());
        }
    }
    let of_parent = parent.allocate(Layout::new::<[u8; 4096]>()).unwrap();
    for none in [ptr::null(), ptr::dangling(), of_parent.as_ptr().cast_const().cast(), (&raw const all).cast()] {
        assert!(zones.zone_from_ptr(none).is_null());
    }
}

#[test]
fn size_is_0_for_what_is_not_in_the_zone() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let [zone, other] = [zones.create_zone(0), zones.create_zone(0)];
    let block = zones.malloc(zone, 100);
    assert_eq!((zones.size(zone, block), zones.size(other, block)), (112, 0));
    assert_eq!(zones.size(zone, block.wrapping_byte_add(8)), 0);
    assert_eq!((zones.size(zone, ptr::null()), zones.size(ptr::null_mut(), block)), (0, 0));
    free(&zones, zone, block);
    assert_eq!(zones.size(zone, block), 0);
}

#[test]
fn good_size_is_what_a_block_has() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    for size in (0..300).chain([1000, 8192, 8193, 100_000]) {
        let good = Zones::<Threads>::good_size(size);
        assert!(good >= size && Zones::<Threads>::good_size(good) == good, "{size}");
        let block = zones.malloc(zone, size);
        assert_eq!(zones.size(zone, block), good);
        free(&zones, zone, block);
    }
    assert_eq!(Zones::<Threads>::good_size(usize::MAX), usize::MAX);
}

#[test]
fn batch_malloc_says_how_many_which_may_be_fewer() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let mut blocks = [ptr::null_mut(); 40];
    assert_eq!(zones.batch_malloc(zone, 200, &mut blocks[..39]), 39);
    assert!(blocks[..39].iter().all(|block| zones.size(zone, *block) >= 200) && blocks[39].is_null());
    // SAFETY: nobody uses them any more.
    unsafe { zones.batch_free(zone, &blocks) };
    assert_eq!(zones.zone_statistics(zone).blocks_in_use, 0);
    let made = zones.batch_malloc(zone, 1 << 20, &mut blocks);
    assert!((1..8).contains(&made), "{made}");
    // SAFETY: as above.
    unsafe { zones.batch_free(zone, &blocks[..made]) };
    assert_eq!(zones.batch_malloc(ptr::null_mut(), 8, &mut blocks), 0);
    assert_eq!(zones.zone_statistics(zone).blocks_in_use, 0);
}

#[test]
fn zone_check_of_null_checks_all() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    assert!(zones.zone_check(ptr::null_mut()));
    let [one, other] = [zones.create_zone(0), zones.create_zone(0)];
    assert!(!zones.malloc(one, 100).is_null() && !zones.malloc(other, 100).is_null());
    assert!([ptr::null_mut(), one, other].into_iter().all(|zone| zones.zone_check(zone)));
    assert!(!zones.zone_check(ptr::dangling_mut()));
    // What describes the pages of one of them is wrong.
    let heap = &zones.zones.find(other).unwrap().heap;
    let frame = heap.frames().frame_of(heap.allocate(Layout::new::<[u8; 9000]>()).unwrap().as_ptr()).unwrap();
    heap.frames().make_metadata(frame, 2);
    assert!(zones.zone_check(one) && !zones.zone_check(other) && !zones.zone_check(ptr::null_mut()));
}

#[test]
fn statistics_count_blocks_and_bytes_and_the_most_and_null_sums() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let [one, other] = [zones.create_zone(0), zones.create_zone(0)];
    let [small, large] = [zones.malloc(one, 112), zones.malloc(one, 8192)];
    let [first, second] = [zones.zone_statistics(one), zones.zone_statistics(other)];
    assert_eq!((first.blocks_in_use, first.size_in_use, first.max_size_in_use), (2, 8304, 8304));
    assert!(first.size_allocated >= 8304);
    assert_eq!((second.blocks_in_use, second.size_in_use), (0, 0));
    free(&zones, one, large);
    let block = zones.malloc(other, 16);
    let [first, second] = [zones.zone_statistics(one), zones.zone_statistics(other)];
    assert_eq!((first.blocks_in_use, first.size_in_use, first.max_size_in_use), (1, 112, 8304));
    let sum = zones.zone_statistics(ptr::null_mut());
    assert_eq!((sum.blocks_in_use, sum.size_in_use, sum.max_size_in_use), (2, 128, 8320));
    assert_eq!(sum.size_allocated, first.size_allocated + second.size_allocated);
    let grown = realloc(&zones, one, small, 1024);
    assert_eq!((zones.zone_statistics(one).blocks_in_use, zones.zone_statistics(one).size_in_use), (1, 1024));
    free(&zones, one, grown);
    free(&zones, other, block);
    assert_eq!(zones.zone_statistics(ptr::null_mut()).size_in_use, 0);
}

#[test]
fn pressure_relief_returns_the_bytes_released() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap_on::<Threads>();
    let zones = zones(&parent);
    let all: Vec<_> = (0..3).map(|_| zones.create_zone(0)).collect();
    let use_and_free = || {
        for &zone in &all {
            let blocks: Vec<_> = (0..30).map(|_| zones.malloc(zone, 5000)).collect();
            blocks.into_iter().for_each(|block| free(&zones, zone, block));
        }
    };
    use_and_free();
    let allocated = |zone| zones.zone_statistics(zone).size_allocated;
    let before = allocated(all[0]);
    let released = zones.zone_pressure_relief(all[0], 0);
    assert!(released >= 30 * 5000 && before - allocated(all[0]) == released);
    assert_eq!(zones.zone_pressure_relief(all[0], 0), 0);
    use_and_free();
    let before = allocated(ptr::null_mut());
    assert!(zones.zone_pressure_relief(ptr::null_mut(), 1) >= 1);
    let after_one = allocated(ptr::null_mut());
    assert!(after_one < before && after_one > 2 * 30 * 5000, "the goal was reached by the first");
    let released = zones.zone_pressure_relief(ptr::null_mut(), 0);
    assert_eq!(after_one - allocated(ptr::null_mut()), released);
    assert!(released >= 2 * 30 * 5000);
    assert_eq!(zones.zone_pressure_relief(ptr::dangling_mut(), 0), 0);
}

#[test]
fn the_enumerator_calls_the_recorder_with_the_kinds_of_the_mask() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let zone = zones.create_zone(0);
    let sizes = (0..70).chain([5000, 100_000]);
    let mut blocks: Vec<_> = sizes.map(|size| zones.malloc(zone, size)).collect();
    free(&zones, zone, blocks.swap_remove(7));
    blocks.sort();
    let enumerate = |mask| {
        let mut found: [Vec<Range>; 5] = Default::default();
        let recorder = |kind: u32, ranges: &[Range]| {
            assert!(!ranges.is_empty() && kind & mask == kind);
            found[kind as usize].extend(ranges);
        };
        assert!(zones.enumerate(zone, mask, recorder));
        found
    };
    let all = enumerate(7);
    let [_, in_use, regions, _, admin] = &all;
    let found: Vec<_> = in_use.iter().map(|range| (range.address, range.size)).collect();
    let expected: Vec<_> = blocks.iter().map(|block| (block.addr(), zones.size(zone, *block))).collect();
    assert_eq!(found, expected);
    let inside = |range: &Range, region: &Range| {
        region.address <= range.address && range.address + range.size <= region.address + region.size
    };
    assert!(in_use.iter().all(|range| regions.iter().any(|region| inside(range, region))));
    assert!(in_use.iter().all(|range| !admin.iter().any(|region| inside(range, region))));
    let bytes: usize = regions.iter().chain(admin).map(|range| range.size).sum();
    assert_eq!(bytes, zones.zone_statistics(zone).size_allocated);
    for mask in [1, 2, 4] {
        let mut expected: [Vec<Range>; 5] = Default::default();
        expected[mask].clone_from(&all[mask]);
        assert_eq!(enumerate(mask as u32), expected);
    }
    assert!(!zones.enumerate(ptr::null_mut(), 7, |_, _| unreachable!()));
}

#[test]
fn print_says_what_a_zone_has() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let zones = zones(&parent);
    let [zone, other] = [zones.create_zone(0), zones.create_zone(0)];
    zones.set_zone_name(zone, Some(c"pictures"));
    let block = zones.malloc(zone, 1000);
    let printed = || PRINTED.take();
    zones.print(zone, false);
    let short = printed();
    assert!(short.starts_with("zone pictures at 0x") && short.contains("1 blocks, 1024 bytes in use"), "{short}");
    zones.print(zone, true);
    let long = printed();
    assert!(long.contains(&std::format!("{:#x}: 1024 bytes\n", block.addr())) && long.contains("size-1024"), "{long}");
    zones.print(ptr::null_mut(), false);
    let all = printed();
    assert!(all.contains("pictures") && all.contains(&std::format!("zone without a name at {other:p}")), "{all}");
}

#[test]
fn a_zone_that_was_locked_by_force_serves_nobody_until_it_is_unlocked() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap_on::<Threads>();
    let zones = zones(&parent);
    let [zone, other] = [zones.create_zone(0), zones.create_zone(0)];
    let first = zones.malloc(zone, 10);
    zones.force_lock(zone);
    assert!(zones.zone_locked(zone) && !zones.zone_locked(other));
    let done = AtomicBool::new(false);
    let handles = [zone, other].map(Handle::expose_provenance);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            be_cpu(1);
            let [zone, other] = handles.map(ptr::without_provenance_mut);
            assert!(!zones.malloc(other, 10).is_null());
            assert!(!zones.malloc(zone, 10).is_null());
            done.store(true, SeqCst);
        });
        (0..50).for_each(|_| std::thread::yield_now());
        assert!(!done.load(SeqCst));
        assert_eq!(zones.zone_statistics(zone).blocks_in_use, 1, "it can be looked at");
        assert!(zones.size(zone, first) > 0);
        zones.force_unlock(zone);
    });
    assert!(done.load(SeqCst) && !zones.zone_locked(zone));
    assert_eq!(zones.zone_statistics(zone).blocks_in_use, 2);
}
