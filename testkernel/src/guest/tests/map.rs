//! The machine's real memory map: all that is usable is used, and nothing else.

use alloc::vec;
use alloc::vec::Vec;

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use kernel::heap::HEAP;
use kernel::{cpus, memory};
use kslab::Frame;

use super::support::{PAGE, frames, free, give_back, order, take_all};
use crate::guest::boot_info;
use crate::guest::runner::test;

fn regions() -> &'static [MemoryRegion] {
    &boot_info().memory_regions
}

fn end_of_memory() -> u64 {
    let usable = regions().iter().filter(|region| region.kind == MemoryRegionKind::Usable);
    usable.map(|region| region.end).max().expect("usable memory")
}

/// For each frame whether it may be handed out, found the plain way.
fn model() -> Vec<bool> {
    let mut usable = vec![false; end_of_memory() as usize / PAGE];
    for region in regions().iter().filter(|region| region.kind == MemoryRegionKind::Usable) {
        let (first, end) = ((region.start as usize).div_ceil(PAGE), region.end as usize / PAGE);
        usable[first.min(end)..end].fill(true);
    }
    for region in regions().iter().filter(|region| region.kind != MemoryRegionKind::Usable) {
        let (first, end) = (region.start as usize / PAGE, (region.end as usize).div_ceil(PAGE));
        let length = usable.len();
        usable[first.min(length)..end.min(length)].fill(false);
    }
    usable[0] = false;
    usable
}

test!(every_usable_frame_is_managed);
fn every_usable_frame_is_managed() {
    let usable = model().into_iter().filter(|&usable| usable).count();
    assert_eq!(frames().stats().total, usable);
}

test!(only_usable_frames_are_handed_out);
fn only_usable_frames_are_handed_out() {
    let model = model();
    let blocks = take_all();
    for &(frame, order) in &blocks {
        let first = frame.number() as usize;
        assert!(
            model[first..first + order.frames() as usize].iter().all(|&usable| usable),
            "{frame:?} of order {order}"
        );
    }
    give_back(blocks);
}

test!(frame_0_is_never_handed_out);
fn frame_0_is_never_handed_out() {
    let blocks = take_all();
    assert!(blocks.iter().all(|(frame, _)| frame.number() != 0));
    give_back(blocks);
}

test!(the_last_megabytes_of_memory_are_used);
fn the_last_megabytes_of_memory_are_used() {
    let end = model().len() as u64 * PAGE as u64;
    let blocks = take_all();
    let last = blocks.iter().map(|(frame, order)| frame.address() + order.bytes() as u64).max();
    let records = (frames().stats().metadata * PAGE) as u64;
    give_back(blocks);
    let gap = end - last.expect("free memory");
    assert!(gap <= records + (4 << 20), "{gap:#x} bytes at the end are not used, the records have {records:#x}");
}

/// Page tables that the kernel may have made for stacks and devices.
const TABLES: usize = 8;
/// The table of guarded objects, and their page tables.
const GUARDED: usize = 48 + 9;

test!(at_least_99_percent_of_usable_memory_can_be_allocated);
fn at_least_99_percent_of_usable_memory_can_be_allocated() {
    let usable = model().into_iter().filter(|&usable| usable).count();
    let blocks = take_all();
    let allocated: usize = blocks.iter().map(|(_, order)| order.frames() as usize).sum();
    // What tests before this one have left in use: a few objects, each in a slab.
    let mut slabs = 0;
    HEAP.for_each_cache(|cache| slabs += (cache.slabs - cache.empty_slabs) * cache.slab_size / PAGE);
    give_back(blocks);
    // Each cache has a cache line for every CPU that there can be, which is much of 32 MiB; and tables stay.
    let places = HEAP.cache_stats().count() * cpus::MAX * 64 / PAGE + TABLES + GUARDED;
    assert!((allocated + slabs + places) * 100 >= usable * 99, "{allocated} of {usable} frames, {slabs} in slabs");
}

test!(frames_are_mapped_where_the_boot_information_says);
fn frames_are_mapped_where_the_boot_information_says() {
    let offset = boot_info().physical_memory_offset.into_option().expect("a mapping of physical memory");
    let frame = frames().allocate(order(0)).expect("a frame");
    let pointer = frames().pointer(frame);
    assert_eq!(pointer.addr() as u64, offset + frame.address());
    assert_eq!(pointer, memory::physical(frame.address()));
    free(frame, order(0));
}

test!(the_kernel_survives_when_all_memory_is_written);
fn the_kernel_survives_when_all_memory_is_written() {
    /// More would only make the host's memory full.
    const FRAMES: usize = (512 << 20) / PAGE;

    let blocks = take_all();
    let all = || blocks.iter().flat_map(|(frame, order)| frame.number()..frame.number() + order.frames()).take(FRAMES);
    let word = |number: u32| -> *mut u64 {
        let frame = Frame::containing(u64::from(number) * PAGE as u64).expect("a frame");
        frames().pointer(frame).wrapping_add(PAGE - 8).cast()
    };
    for number in all() {
        // SAFETY: the frame is allocated to this test, and the word lies in it.
        unsafe { word(number).write(!u64::from(number)) };
    }
    for number in all() {
        // SAFETY: as above, and written.
        assert_eq!(unsafe { word(number).read() }, !u64::from(number), "two frames share memory");
    }
    give_back(blocks);
}
