use core::alloc::Layout;
use core::ptr::NonNull;
use std::boxed::Box;
use std::sync::Mutex;
use std::vec::Vec;

use crate::memory::{FRAME_SIZE, Region};
use crate::platform::NoInterrupts;
use crate::testing::{Heap, Machine, Threads};
use crate::{AddError, AllocError, FrameSource, InitError, Order};

const START: u64 = 64 << 20;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

/// Frees a block that a test has allocated for `layout(size)` and no longer uses.
fn free<P: crate::platform::Platform>(heap: &crate::Heap<P>, block: NonNull<u8>, size: usize) {
    // SAFETY: as the name says.
    unsafe { heap.free(block, layout(size)) }
}

/// A heap over the `bytes` bytes at byte `offset` of the machine's memory.
fn range_heap(machine: &Machine, offset: usize, bytes: usize) -> Heap {
    let heap = Heap::new();
    // SAFETY: the memory is the machine's, which the test keeps longer than the heap.
    unsafe { heap.init_range(machine.at(offset), bytes) }.unwrap();
    heap
}

#[test]
fn a_plain_range_aligned_to_a_page_and_no_more_is_a_heap() {
    let machine = Machine::new(START, 64);
    let heap = range_heap(&machine, 3 * FRAME_SIZE, 25 * FRAME_SIZE);
    assert_eq!(heap.frames().stats().total, 25);
    let block = heap.allocate(Layout::from_size_align(3 * FRAME_SIZE, FRAME_SIZE).unwrap()).unwrap();
    let range = machine.at(3 * FRAME_SIZE).addr()..machine.at(28 * FRAME_SIZE).addr();
    assert!(range.contains(&block.addr().get()) && range.contains(&(block.addr().get() + 3 * FRAME_SIZE - 1)));
    // SAFETY: allocated above with this layout.
    unsafe { heap.free(block, Layout::from_size_align(3 * FRAME_SIZE, FRAME_SIZE).unwrap()) };
    heap.shrink();
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn alignment_is_that_of_addresses_wherever_a_range_starts() {
    let machine = Machine::new(START, 1024);
    for first in [1, 2, 3, 5, 255, 257] {
        let heap = range_heap(&machine, first * FRAME_SIZE, 600 * FRAME_SIZE);
        for log in 12..=20 {
            let wanted = Layout::from_size_align(100, 1 << log).unwrap();
            let block = heap.allocate(wanted).unwrap();
            assert!(block.addr().get().is_multiple_of(1 << log));
            // SAFETY: allocated above with this layout.
            unsafe { heap.free(block, wanted) };
        }
    }
}

#[test]
fn unaligned_ends_of_a_range_are_left_out() {
    let machine = Machine::new(START, 8);
    let heap = range_heap(&machine, 100, 3 * FRAME_SIZE);
    assert_eq!(heap.frames().stats().total, 2);
    // SAFETY: nothing of it can be used.
    let result = unsafe { Heap::new().init_range(machine.at(100), FRAME_SIZE) };
    assert_eq!(result, Err(InitError::NoUsableMemory));
}

#[test]
#[cfg_attr(miri, ignore = "100,000 boxes; the paths are those of other tests")]
fn in_100_kib_102_400_boxes_come_and_go_with_one_alive() {
    let machine = Machine::new(START, 32);
    let heap = range_heap(&machine, FRAME_SIZE, 100 << 10);
    let alive = heap.allocate(layout(8)).unwrap();
    for number in 0..102_400_u64 {
        let block = heap.allocate(layout(8)).unwrap();
        let word = block.cast::<u64>().as_ptr();
        // SAFETY: eight bytes, aligned, and ours.
        unsafe { word.write_volatile(number) };
        // SAFETY: as above.
        assert_eq!(unsafe { word.read_volatile() }, number);
        free(&heap, block, 8);
    }
    free(&heap, alive, 8);
}

#[test]
fn of_100_kib_at_least_85_percent_hold_objects_of_64_bytes() {
    let machine = Machine::new(START, 64);
    for first in if cfg!(miri) { 0..1 } else { 0..32 } {
        let heap = range_heap(&machine, first * FRAME_SIZE, 100 << 10);
        let objects: Vec<_> = core::iter::from_fn(|| heap.allocate(layout(64))).collect();
        assert!(objects.len() * 64 * 100 >= 85 * (100 << 10), "{} objects", objects.len());
        objects.into_iter().for_each(|object| free(&heap, object, 64));
        heap.shrink();
        assert_eq!(heap.verify(), Ok(()));
    }
}

#[test]
fn a_first_region_of_one_page_serves_and_larger_ones_follow() {
    let machine = Machine::new(START, 1024);
    let heap = range_heap(&machine, 700 * FRAME_SIZE, FRAME_SIZE);
    let first = heap.allocate(layout(100)).unwrap();
    let second = heap.allocate(layout(60)).expect("a slot of the only slab, though of a larger class");
    assert_eq!(heap.allocate(layout(200)), None);
    // SAFETY: the memory is the machine's, and nobody else's.
    let add = |first: usize, frames| unsafe { heap.add_range(machine.at(first * FRAME_SIZE), frames * FRAME_SIZE) };
    assert_eq!(add(100, 64), Ok(64), "below the first");
    assert_eq!(add(800, 200), Ok(200), "above it");
    assert!(matches!(add(700, 1), Err(AddError::AlreadyManaged { .. })));
    assert!(matches!(add(90, 20), Err(AddError::AlreadyManaged { .. })));
    let large = heap.allocate(layout(100 * FRAME_SIZE)).unwrap();
    free(&heap, large, 100 * FRAME_SIZE);
    free(&heap, second, 60);
    free(&heap, first, 100);
    heap.shrink();
    assert_eq!(heap.verify(), Ok(()));
    let stats = heap.frames().stats();
    assert_eq!((stats.total, stats.free + stats.metadata), (265, 265));
}

#[test]
fn a_map_with_a_carve_out_leaves_the_carve_out_alone() {
    let machine = Machine::new(START, 256);
    let kept = START + 64 * FRAME_SIZE as u64..START + 128 * FRAME_SIZE as u64;
    let heap = Heap::new();
    let map = [machine.region(), Region::reserved(kept.start, kept.end - kept.start)];
    // SAFETY: the memory is the machine's, which outlives the heap.
    unsafe { heap.init(map, machine.base()) }.unwrap();
    let frames: Vec<_> = core::iter::from_fn(|| heap.frames().allocate(Order::ZERO)).collect();
    assert!(frames.len() > 180);
    assert!(frames.iter().all(|frame| !kept.contains(&frame.address())));
}

/// A kernel's own allocator: a map of the frames of a machine, true where one is free.
struct Bitmap {
    machine: Machine,
    free: Mutex<Vec<bool>>,
    longest: usize,
}

impl Bitmap {
    /// Every `step`th frame is free, or all with 1; no loans above `longest` frames.
    fn leak(frames: usize, step: usize, longest: usize) -> &'static Self {
        let free = Mutex::new((0..frames).map(|frame| frame % step == 0).collect());
        Box::leak(Box::new(Self { machine: Machine::new(START, frames), free, longest }))
    }

    fn free_frames(&self) -> usize {
        self.free.lock().unwrap().iter().filter(|free| **free).count()
    }
}

// SAFETY: a frame is lent only while it is free in the map, and until it is taken back.
unsafe impl FrameSource for Bitmap {
    fn lend(&self, frames: usize) -> Option<NonNull<u8>> {
        let mut free = self.free.lock().unwrap();
        if frames > self.longest || frames > free.len() {
            return None;
        }
        let first = (0..=free.len() - frames).find(|&first| free[first..first + frames].iter().all(|free| *free))?;
        free[first..first + frames].fill(false);
        NonNull::new(self.machine.at(first * FRAME_SIZE))
    }

    fn take_back(&self, frame: NonNull<u8>) {
        let index = (frame.addr().get() - self.machine.at(0).addr()) / FRAME_SIZE;
        let was_free = core::mem::replace(&mut self.free.lock().unwrap()[index], true);
        assert!(!was_free, "a frame came back twice");
    }
}

fn borrowing(source: &'static Bitmap) -> Heap {
    let heap = Heap::new();
    // SAFETY: the source's memory is leaked, and all in one piece.
    assert!(unsafe { heap.set_source(source) });
    heap
}

#[test]
fn a_heap_borrows_from_the_kernels_allocator_and_pays_back() {
    let source = Bitmap::leak(512, 1, usize::MAX);
    let heap = borrowing(source);
    assert_eq!(source.free_frames(), 512, "nothing before it is needed");
    let blocks: Vec<_> = [8, 100, 2000, 5000, 40_000, 200_000]
        .into_iter()
        .map(|size| (heap.allocate(layout(size)).unwrap(), size))
        .collect();
    assert!(source.free_frames() < 512 - 60);
    assert_eq!(heap.allocate(layout(2 << 20)), None, "more than there is");
    let most = source.free_frames();
    blocks.into_iter().for_each(|(block, size)| free(&heap, block, size));
    heap.shrink();
    let kept = 512 - source.free_frames();
    assert!(source.free_frames() > most && kept <= 8, "{kept} frames stay for records");
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_source_of_scattered_single_frames_is_enough_for_small_objects() {
    let source = Bitmap::leak(if cfg!(miri) { 64 } else { 4096 }, 3, 1);
    let heap = borrowing(source);
    let objects: Vec<_> = core::iter::from_fn(|| heap.allocate(layout(64))).collect();
    assert!(objects.len() > 62 * (source.free.lock().unwrap().len() / 3 - 30), "{}", objects.len());
    assert_eq!(heap.allocate(layout(3 * FRAME_SIZE)), None);
    objects.into_iter().for_each(|object| free(&heap, object, 64));
    heap.shrink();
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_heap_has_one_source() {
    let heap = borrowing(Bitmap::leak(64, 1, 64));
    // SAFETY: as in `borrowing`.
    assert!(!unsafe { heap.set_source(Bitmap::leak(64, 1, 64)) });
}

#[test]
fn heaps_within_a_heap_have_names_and_limits_and_go_as_a_whole() {
    let machine = Machine::new(START, 1024);
    let heap: crate::Heap<Threads> = machine.heap_on();
    heap.shrink();
    let before = heap.frames().stats();
    {
        let first = heap.create_heap("first", 256 << 10).unwrap();
        let second = heap.create_heap("second", 1 << 20).unwrap();
        assert_eq!((first.name(), second.name()), ("first", "second"));
        let small: Vec<_> = core::iter::from_fn(|| first.allocate(layout(1000))).collect();
        assert!(small.len() > 150 && small.len() <= 256, "{} KiB of 256", small.len());
        let mine = second.allocate(layout(1000)).unwrap();
        assert_eq!(second.allocate(layout(1 << 20)), None, "with its records more than the limit");
        // SAFETY: never used again.
        let report = crate::testing::report_of(|| unsafe { first.free(mine, layout(1000)) });
        assert!(report.ends_with("not memory of this allocator"), "{report}");
        assert_eq!(first.verify().and(second.verify()).and(heap.verify()), Ok(()));
    }
    heap.shrink();
    assert_eq!(heap.frames().stats(), before);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_heap_within_needs_memory_for_itself() {
    let machine = Machine::new(START, 6);
    let heap = machine.heap();
    let before = heap.frames().stats();
    assert_eq!(heap.create_heap("none", 1 << 20).err(), Some(AllocError::NoMemory));
    heap.shrink();
    assert_eq!(heap.frames().stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "16 MiB of blocks; the paths are those of other tests")]
fn beside_a_long_lived_scatter_half_the_free_memory_can_be_had_in_one_block_again_and_again() {
    let machine = Machine::new(START, 4096);
    let heap = machine.heap();
    let mut random = 1_u64;
    let mut blocks: Vec<_> = core::iter::from_fn(|| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let size = 8 << ((random >> 40) % 9);
        Some((heap.allocate(layout(size))?, size))
    })
    .take(4000)
    .collect();
    // Every tenth stays.
    let mut kept = Vec::new();
    for (index, (block, size)) in blocks.drain(..).enumerate() {
        if index % 10 == 0 { kept.push((block, size)) } else { free(&heap, block, size) }
    }
    for _ in 0..100 {
        heap.shrink();
        let half = heap.frames().free_bytes() / 2;
        let block = heap.allocate(layout(half)).unwrap_or_else(|| panic!("{half} bytes: {}", heap.frames().stats()));
        free(&heap, block, half);
        let small: Vec<_> = (0..50).map(|_| heap.allocate(layout(300)).unwrap()).collect();
        small.into_iter().for_each(|block| free(&heap, block, 300));
    }
    kept.into_iter().for_each(|(block, size)| free(&heap, block, size));
}

#[test]
fn a_heap_made_at_run_time_may_move_before_it_has_borrowers() {
    let machine = Machine::new(START, 64);
    let heap = range_heap(&machine, 0, 20 * FRAME_SIZE);
    let block = heap.allocate(layout(64)).unwrap();
    let moved = [heap];
    free(&moved[0], block, 64);
    assert_eq!(moved[0].verify(), Ok(()));
}

#[test]
fn zones_meet_where_a_kernel_wants_them() {
    let machine = Machine::new(START, 256);
    let heap = crate::Heap::<NoInterrupts>::with_zones([START + (64 << 12), START + (128 << 12)]);
    // SAFETY: the memory is the machine's, which outlives the heap.
    unsafe { heap.init([machine.region()], machine.base()) }.unwrap();
    let zones = heap.frames().stats().zones.map(|zone| zone.total);
    assert_eq!(zones, [64, 64, 128]);
}
