//! The ways in, and several heaps side by side, all in page frames that the kernel's heap has lent.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ops::{Deref, Range};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::memory;
use kslab::memory::Region;
use kslab::{AddError, AllocError, FrameBlock, FrameSource, Frames, InitError, Order};
use x86_64::VirtAddr;

use super::support::{Heap, PAGE, frames, free, layout, unchanged};
use crate::guest::runner::test;

/// A heap over page frames of the kernel's heap, which has them back when this is dropped.
struct Guest {
    // Dropped first: it stands on the frames.
    heap: Box<Heap>,
    memory: FrameBlock<'static, Cpus>,
}

impl Guest {
    /// Over `pages` page frames, of which none is the heap's yet.
    #[inline(never)]
    fn new(pages: u32) -> Self {
        Self { heap: Box::new(const { Heap::new() }), memory: frames().block_run(pages, Order::ZERO).expect("memory") }
    }

    /// The same with all of them, as a range of addresses.
    fn over(pages: u32) -> Self {
        let guest = Self::new(pages);
        assert_eq!(guest.init(0..pages as usize), Ok(()));
        guest
    }

    fn init(&self, pages: Range<usize>) -> Result<(), InitError> {
        // SAFETY: the memory is this heap's alone, for as long as there is the heap.
        unsafe { self.heap.init_range(self.page(pages.start), pages.len() * PAGE) }
    }

    fn add(&self, pages: Range<usize>) -> Result<usize, AddError> {
        // SAFETY: as above; all physical memory is mapped as one.
        unsafe { self.heap.add_range(self.page(pages.start), pages.len() * PAGE) }
    }

    fn page(&self, number: usize) -> *mut u8 {
        self.memory.pointer().wrapping_add(number * PAGE)
    }

    fn contains(&self, block: NonNull<u8>) -> bool {
        let start = self.memory.pointer().addr();
        (start..start + self.memory.count() as usize * PAGE).contains(&block.addr().get())
    }
}

impl Deref for Guest {
    type Target = Heap;

    fn deref(&self) -> &Heap {
        &self.heap
    }
}

fn give_up(heap: &Heap, block: NonNull<u8>, layout: Layout) {
    // SAFETY: the tests pass blocks of this heap and layout that they no longer use.
    unsafe { heap.free(block, layout) }
}

/// As many blocks as there are.
fn exhaust(heap: &Heap, layout: Layout) -> Vec<NonNull<u8>> {
    core::iter::from_fn(|| heap.allocate(layout)).collect()
}

fn give_all_up(heap: &Heap, blocks: Vec<NonNull<u8>>, layout: Layout) {
    blocks.into_iter().for_each(|block| give_up(heap, block, layout));
    heap.shrink();
    assert_eq!(heap.verify(), Ok(()));
}

test!(row_116_before_init_there_is_nothing_and_nothing_crashes);
fn row_116_before_init_there_is_nothing_and_nothing_crashes() {
    static EARLY: Heap = Heap::new();
    unchanged(|| {
        for size in [0, 8, 5000, 1 << 20] {
            assert_eq!(EARLY.allocate(layout(size, 8)), None);
            assert_eq!(EARLY.allocate_zeroed(layout(size, 8)), None);
        }
        assert_eq!(EARLY.frames().allocate(Order::ZERO), None);
        assert_eq!(kslab::Cache::new(EARLY.caches(), "early", layout(8, 8)).allocate(), Err(AllocError::NoMemory));
        assert_eq!((EARLY.shrink(), EARLY.verify(), EARLY.frames().stats().total), (0, Ok(()), 0));
        EARLY.maintain(0);
        // SAFETY: nothing is taken over.
        assert_eq!(unsafe { EARLY.add([Region::usable(0, 1 << 20)]) }, Err(AddError::NotInitialised));
        assert!(alloc::format!("{}", EARLY.tables()).contains("0 KiB"));
    });
}

test!(a_heap_knows_its_size_and_what_of_it_is_used);
fn a_heap_knows_its_size_and_what_of_it_is_used() {
    unchanged(|| {
        let heap = Guest::over(600);
        assert_eq!((heap.used() + heap.available(), heap.size()), (heap.size(), heap.frames().total_bytes()));
        let (used, wanted) = (heap.used(), layout(100 * PAGE, 8));
        let block = heap.allocate(wanted).expect("memory");
        assert_eq!(heap.used(), used + 100 * PAGE);
        let small = heap.allocate(layout(100, 8)).expect("memory");
        let mut visited = Vec::with_capacity(20);
        heap.for_each_block(|block, size| visited.push((block, size)));
        assert!(visited.contains(&(block, 100 * PAGE)) && visited.contains(&(small, 104)), "{visited:?}");
        give_up(&heap, block, wanted);
        give_up(&heap, small, layout(100, 8));
        heap.shrink();
        assert_eq!(heap.used(), used);
    });
}

test!(a_range_of_virtual_addresses_is_enough_whatever_is_behind_it);
fn a_range_of_virtual_addresses_is_enough_whatever_is_behind_it() {
    const START: VirtAddr = VirtAddr::new(0x4444_4444_0000);
    const PAGES: usize = 25;
    static TUTORIAL: Heap = Heap::new();

    // Its page tables stay.
    assert!(memory::map_new(START, PAGES));
    memory::unmap(START, PAGES);
    unchanged(|| {
        // Every second one of these is free, so that no two pages of the range are neighbours.
        let scatter: Vec<_> = (0..200).map(|_| frames().block(Order::ZERO).expect("a frame")).collect();
        let (kept, given): (Vec<_>, Vec<_>) = scatter.into_iter().partition(|block| block.frame().number() % 2 == 0);
        drop(given);
        assert!(memory::map_new(START, PAGES));
        assert!(!memory::map_new(START + 24 * 4096, 2), "a page of it is mapped already");
        // SAFETY: just mapped, and nobody else's; nothing of it is used when it is unmapped.
        assert_eq!(unsafe { TUTORIAL.init_range(START.as_mut_ptr(), PAGES * PAGE) }, Ok(()));
        for size in [8, 100, 1000, 5000, 9 * PAGE] {
            let block = TUTORIAL.allocate(layout(size, 8)).expect("memory");
            // SAFETY: the block is ours, and that large.
            unsafe { block.as_ptr().write_bytes(0xa5, size) };
            assert!((START.as_u64() as usize..).contains(&block.addr().get()));
            give_up(&TUTORIAL, block, layout(size, 8));
        }
        let objects = exhaust(&TUTORIAL, layout(64, 8));
        assert!(objects.len() * 64 * 100 >= 85 * PAGES * PAGE, "{} objects", objects.len());
        give_all_up(&TUTORIAL, objects, layout(64, 8));
        memory::unmap(START, PAGES);
        drop(kept);
    });
}

test!(in_100_kib_102_400_boxes_come_and_go_with_one_alive);
fn in_100_kib_102_400_boxes_come_and_go_with_one_alive() {
    unchanged(|| {
        let heap = Guest::over(25);
        let alive = heap.allocate(layout(8, 8)).expect("memory");
        for _ in 0..102_400 {
            let block = heap.allocate(layout(8, 8)).expect("memory");
            give_up(&heap, block, layout(8, 8));
        }
        give_all_up(&heap, alloc::vec![alive], layout(8, 8));
    });
}

test!(of_100_kib_at_least_85_percent_hold_objects_of_64_bytes);
fn of_100_kib_at_least_85_percent_hold_objects_of_64_bytes() {
    unchanged(|| {
        let heap = Guest::over(25);
        let objects = exhaust(&heap, layout(64, 8));
        assert!(objects.len() * 64 * 100 >= 85 * 25 * PAGE, "{} objects", objects.len());
        assert!(objects.iter().all(|object| heap.contains(*object)));
        give_all_up(&heap, objects, layout(64, 8));
    });
}

test!(a_heap_starts_with_one_page_and_gets_more_that_is_not_adjacent);
fn a_heap_starts_with_one_page_and_gets_more_that_is_not_adjacent() {
    unchanged(|| {
        let heap = Guest::new(400);
        assert_eq!(heap.init(200..201), Ok(()));
        assert_eq!(heap.init(0..10), Err(InitError::AlreadyInitialised));
        let first = heap.allocate(layout(100, 8)).expect("a slot of the only page");
        assert_eq!(heap.allocate(layout(PAGE, 8)), None);
        assert_eq!((heap.add(300..400), heap.add(0..50)), (Ok(100), Ok(50)));
        assert!(matches!(heap.add(49..60), Err(AddError::AlreadyManaged { .. })));
        assert_eq!(heap.frames().stats().total, 151);
        let large = layout(60 * PAGE, PAGE);
        let block = heap.allocate(large).expect("a row of the second range");
        assert!(block.as_ptr() >= heap.page(300));
        give_up(&heap, block, large);
        let pages = exhaust(&heap, layout(PAGE, PAGE));
        assert!(pages.len() >= 140, "{} pages", pages.len());
        assert!(!pages.iter().any(|page| (heap.page(50)..heap.page(200)).contains(&page.as_ptr())), "nobody gave them");
        give_all_up(&heap, pages, layout(PAGE, PAGE));
        give_up(&heap, first, layout(100, 8));
    });
}

test!(a_part_of_the_map_that_the_kernel_keeps_is_never_touched);
fn a_part_of_the_map_that_the_kernel_keeps_is_never_touched() {
    unchanged(|| {
        let heap = Guest::new(300);
        // The kernel's own part, in the middle.
        // SAFETY: the memory is this test's.
        unsafe { heap.page(100).write_bytes(0x5a, 50 * PAGE) };
        let start = heap.memory.frame().address();
        let pages = |pages: Range<u64>| (start + pages.start * PAGE as u64, (pages.end - pages.start) * PAGE as u64);
        let (all, kept) = (pages(0..300), pages(100..150));
        let map = [Region::reserved(kept.0, kept.1), Region::usable(all.0, all.1)];
        // SAFETY: the memory is this heap's alone but for the reserved part, and mapped at this offset.
        unsafe { heap.heap.init(map, memory::physical(0)) }.expect("memory for a heap");
        assert_eq!(heap.frames().stats().total, 250);
        let blocks = exhaust(&heap, layout(PAGE, PAGE));
        // SAFETY: each is a page, just allocated.
        blocks.iter().for_each(|block| unsafe { block.as_ptr().write_bytes(0xa5, PAGE) });
        assert!(blocks.len() >= 240);
        // SAFETY: written above.
        let kept = unsafe { core::slice::from_raw_parts(heap.page(100), 50 * PAGE) };
        assert!(kept.iter().all(|&byte| byte == 0x5a));
        give_all_up(&heap, blocks, layout(PAGE, PAGE));
    });
}

test!(a_heap_within_the_heap_has_its_limit_and_leaves_nothing_behind);
fn a_heap_within_the_heap_has_its_limit_and_leaves_nothing_behind() {
    unchanged(|| {
        let child = HEAP.create_heap("process 7", 2 << 20).expect("memory");
        assert_eq!(child.name(), "process 7");
        let free = frames().stats().free;
        let blocks = exhaust(&child, layout(5000, 8));
        let taken = (free - frames().stats().free) * PAGE;
        assert!(taken <= (2 << 20) + 64 * PAGE, "{taken} bytes");
        assert!(blocks.len() * 5120 >= (2 << 20) * 85 / 100, "{} blocks", blocks.len());
        assert_eq!(child.allocate(layout(1 << 20, 8)), None);
        assert!(HEAP.allocate(layout(1 << 20, 8)).map(|block| give_up(&HEAP, block, layout(1 << 20, 8))).is_some());
        // What is allocated still goes with it.
        drop(child);
        drop(blocks);
    });
}

test!(heaps_stand_side_by_side_and_go_in_any_order);
fn heaps_stand_side_by_side_and_go_in_any_order() {
    unchanged(|| {
        let mut heaps: Vec<_> = (0..8).map(|_| HEAP.create_heap("one of eight", 512 << 10).expect("memory")).collect();
        let wanted = layout(1000, 8);
        let mut all: Vec<NonNull<u8>> = Vec::with_capacity(8 * 50);
        for (number, heap) in heaps.iter().enumerate() {
            for _ in 0..50 {
                let block = heap.allocate(wanted).expect("memory");
                super::support::fill(block, 1000, number as u8);
                all.push(block);
            }
        }
        let right = |(index, block): (usize, &NonNull<u8>)| super::support::is_filled(*block, 1000, (index / 50) as u8);
        assert!(all.iter().enumerate().all(right));
        for gone in [3, 0, 5, 2] {
            heaps.swap_remove(gone);
        }
        assert!(heaps.iter().all(|heap| heap.verify() == Ok(())));
        assert!(heaps.iter().all(|heap| heap.allocate(wanted).is_some()));
    });
}

test!(a_heap_within_a_heap_within_the_heap_goes_with_it);
fn a_heap_within_a_heap_within_the_heap_goes_with_it() {
    unchanged(|| {
        let child = HEAP.create_heap("child", 4 << 20).expect("memory");
        let grandchild = child.create_heap("grandchild", 1 << 20).expect("memory");
        let blocks = exhaust(&grandchild, layout(3000, 8));
        assert!(blocks.len() >= 250, "{} blocks", blocks.len());
        assert_eq!(grandchild.allocate(layout(3000, 8)), None);
        assert!(child.allocate(layout(1 << 20, 8)).is_some(), "the child has more than the grandchild may");
        drop(grandchild);
        assert_eq!(child.verify(), Ok(()));
    });
}

test!(an_allocator_of_the_kernels_own_lends_and_has_everything_back);
fn an_allocator_of_the_kernels_own_lends_and_has_everything_back() {
    /// Stands for a kernel's own frame allocator.
    struct Own {
        frames: &'static Frames<Cpus>,
        lent: AtomicUsize,
    }

    // SAFETY: the frames are allocated, and so nobody else's until they are freed.
    unsafe impl FrameSource for Own {
        fn lend(&self, count: usize) -> Option<NonNull<u8>> {
            let run = self.frames.allocate_run(count as u32, Order::ZERO)?;
            // Cut into single frames, as they come back one by one.
            // SAFETY: the run was just allocated.
            unsafe { self.frames.free_run(run, count as u32) };
            let single = |index: u32| kslab::Frame::containing(run.address() + u64::from(index) * PAGE as u64);
            for frame in (0..count as u32).filter_map(single) {
                assert!(self.frames.allocate_at(frame, 1), "just freed");
            }
            self.lent.fetch_add(count, Relaxed);
            NonNull::new(self.frames.pointer(run))
        }

        fn take_back(&self, frame: NonNull<u8>) {
            let offset = frame.addr().get() - memory::physical(0).addr();
            free(kslab::Frame::containing(offset as u64).expect("a frame"), Order::ZERO);
            self.lent.fetch_sub(1, Relaxed);
        }
    }

    static OWN: Own = Own { frames: HEAP.frames(), lent: AtomicUsize::new(0) };
    static BORROWER: Heap = Heap::new();

    // SAFETY: all physical memory is mapped for good.
    let first = unsafe { BORROWER.set_source(&OWN) };
    assert!(first || OWN.lent.load(Relaxed) > 0, "nobody else sets it");
    let use_it = || {
        let blocks = exhaust_some(&BORROWER);
        assert!(OWN.lent.load(Relaxed) * PAGE >= 300 * 1000);
        blocks.into_iter().for_each(|block| give_up(&BORROWER, block, layout(1000, 8)));
        let large = layout(50 * PAGE, PAGE);
        give_up(&BORROWER, BORROWER.allocate(large).expect("memory"), large);
        BORROWER.shrink();
        assert_eq!(BORROWER.verify(), Ok(()));
    };
    let free_or_lent = || {
        HEAP.shrink();
        frames().stats().free + OWN.lent.load(Relaxed)
    };
    let before = free_or_lent();
    for _ in 0..3 {
        use_it();
        assert_eq!(free_or_lent(), before);
        assert!(OWN.lent.load(Relaxed) <= 8, "the records of what was lent stay, {} frames", OWN.lent.load(Relaxed));
    }
}

fn exhaust_some(heap: &Heap) -> Vec<NonNull<u8>> {
    (0..300).map(|_| heap.allocate(layout(1000, 8)).expect("memory")).collect()
}
