//! What several tests need.

use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;

use kernel::heap::HEAP;
use kslab::stats::{CacheStats, FrameStats};
use kslab::{Frame, Order};

/// Bytes in a page frame.
pub(super) const PAGE: usize = kslab::memory::FRAME_SIZE;

/// The kernel's page frames.
pub(super) fn frames() -> &'static kslab::Frames<kslab::platform::X86_64> {
    HEAP.frames()
}

/// Runs `body` and checks that all memory that it took is back, once nothing is kept in magazines and empty slabs, and that
/// every invariant of the allocator holds.
pub(super) fn unchanged<T>(body: impl FnOnce() -> T) {
    let in_use = || HEAP.cache_stats().map(|cache| cache.in_use).sum::<usize>();
    let before = (merged_stats(), in_use());
    drop(body());
    assert_eq!((merged_stats(), in_use()), before, "memory is missing, or free blocks have not merged");
    assert_eq!(HEAP.verify(), Ok(()));
}

/// The counts of the page frames, with all free that nobody uses.
pub(super) fn merged_stats() -> FrameStats {
    HEAP.shrink();
    frames().stats()
}

/// The counts of the cache of `size`-byte objects.
pub(super) fn cache(size: usize) -> CacheStats {
    HEAP.cache_stats().find(|cache| cache.object_size == size).expect("a size class")
}

/// The order of that number.
pub(super) fn order(order: u32) -> Order {
    Order::new(order).expect("an order")
}

/// Frees a block of frames that a test has allocated and no longer uses.
pub(super) fn free(frame: Frame, order: Order) {
    // SAFETY: as the name says.
    unsafe { frames().free(frame, order) }
}

/// Everything that can be had, in blocks as large as there are.
pub(super) fn take_all() -> Vec<(Frame, Order)> {
    // Grown now, while there is memory to grow into.
    let stats = merged_stats();
    let mut blocks = Vec::with_capacity(count_blocks(&stats) + 256);
    for order in (0..=Order::MAX.get()).rev().map(order) {
        // Only who names a limit gets at the reserves of the lower zones.
        for zone in stats.zones.iter().rev() {
            while let Some(frame) = frames().allocate_below(order.frames(), order, zone.end.address()) {
                blocks.push((frame, order));
            }
        }
    }
    blocks
}

fn count_blocks(stats: &FrameStats) -> usize {
    stats.free_blocks.iter().sum()
}

/// Frees what [`take_all`] returned.
pub(super) fn give_back(blocks: Vec<(Frame, Order)>) {
    for &(frame, order) in &blocks {
        free(frame, order);
    }
}

pub(super) fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).expect("a layout")
}

/// A block of the heap that is filled, checked and freed as a whole.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) start: NonNull<u8>,
    layout: Layout,
    fill: u8,
}

impl Block {
    /// Allocates a block and fills it with `fill`.
    pub(super) fn new(layout: Layout, fill: u8) -> Option<Self> {
        let start = HEAP.allocate(layout)?;
        assert!(start.addr().get().is_multiple_of(layout.align()), "{start:p} is not aligned as {layout:?}");
        // SAFETY: the block is that large, and just allocated.
        unsafe { start.as_ptr().write_bytes(fill, layout.size()) };
        Some(Self { start, layout, fill })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: ours, and `new` or the heap's copy of it has written it.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(super) fn is_intact(&self) -> bool {
        self.bytes().iter().all(|&byte| byte == self.fill)
    }

    /// Changes the size; the old contents must be there afterwards, as far as they fit. `false` where there is no memory.
    pub(super) fn resize(&mut self, size: usize) -> bool {
        // SAFETY: the block is ours, with this layout.
        let Some(start) = (unsafe { HEAP.reallocate(self.start, self.layout, size) }) else {
            return false;
        };
        let kept = size.min(self.layout.size());
        self.start = start;
        self.layout = layout(size, self.layout.align());
        // SAFETY: ours, and as long as `kept` written before it was moved.
        let old = unsafe { core::slice::from_raw_parts(start.as_ptr(), kept) };
        assert!(old.iter().all(|&byte| byte == self.fill), "contents changed when resized to {size}");
        // SAFETY: the block is that large.
        unsafe { start.as_ptr().write_bytes(self.fill, size) };
        true
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and gone after this.
        unsafe { HEAP.free(self.start, self.layout) };
    }
}
