//! What several tests need.

use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use kernel::cpus::{self, Cpus};
use kernel::heap::HEAP;
use kslab::reclaim::INTERVAL;
use kslab::stats::{CacheStats, FrameStats};
use kslab::{Frame, Order};

pub(super) type Heap = kslab::Heap<Cpus>;

/// A cache in the kernel's heap.
pub(super) type Cache = kslab::Cache<'static, Cpus>;

/// Bytes in a page frame.
pub(super) const PAGE: usize = kslab::memory::FRAME_SIZE;

/// Runs `function(argument)` on every CPU, this one included, one after the other.
pub(super) fn on_each(function: fn(usize), argument: usize) {
    for cpu in cpus::online() {
        cpus::call_on(cpu, function, argument).expect("it is online");
    }
}

/// The number of another CPU, if there is one.
pub(super) fn another() -> Option<usize> {
    cpus::online().find(|&cpu| cpu != cpus::current())
}

/// Has every CPU give back what it keeps, and does not use.
pub(super) fn shrink_everywhere() {
    on_each(|_| _ = HEAP.shrink(), 0);
}

/// The kernel's page frames.
pub(super) fn frames() -> &'static kslab::Frames<Cpus> {
    HEAP.frames()
}

/// Runs `body` and checks that all memory that it took is back, once nothing is kept in magazines and empty slabs, and
/// that every invariant of the allocator holds.
pub(super) fn unchanged<T>(body: impl FnOnce() -> T) {
    let in_use = || HEAP.cache_stats().map(|cache| cache.in_use).sum::<usize>();
    let before = (merged_stats(), in_use());
    drop(body());
    assert_eq!((merged_stats(), in_use()), before, "memory is missing, or free blocks have not merged");
    verify();
}

/// Checks every invariant of the kernel's heap. The time for it grows with memory: on large machines most calls leave
/// it out.
pub(super) fn verify() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let gib = frames().total_bytes() >> 30;
    if CALLS.fetch_add(1, Ordering::Relaxed).is_multiple_of(1 + 4 * gib) {
        assert_eq!(HEAP.verify(), Ok(()));
    }
}

/// The counts of the page frames, with all free that nobody uses.
pub(super) fn merged_stats() -> FrameStats {
    shrink_everywhere();
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

/// Everything that can be had, in blocks as large as there are, zone by zone; the last are the smallest of the highest
/// zone.
pub(super) fn take_all() -> Vec<(Frame, Order)> {
    shrink_everywhere();
    take_free()
}

/// As [`take_all`], without what magazines and empty slabs keep.
pub(super) fn take_free() -> Vec<(Frame, Order)> {
    // Grown now, while there is memory to grow into.
    let stats = frames().stats();
    let mut blocks = Vec::with_capacity(count_blocks(&stats) + 256);
    // From the lowest zone up: a zone keeps nothing back from requests that no higher one can serve.
    for zone in &stats.zones {
        for order in (0..=Order::MAX.get()).rev().map(order) {
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

/// Frees what [`take_all`] or [`take_free`] returned.
pub(super) fn give_back(blocks: Vec<(Frame, Order)>) {
    for &(frame, order) in &blocks {
        free(frame, order);
    }
}

/// A cache of objects of this layout.
pub(super) fn new_cache(name: &'static str, size: usize, align: usize) -> Cache {
    Cache::new(HEAP.caches(), name, layout(size, align))
}

/// The counts of a cache that has been used.
pub(super) fn counts(cache: &Cache) -> CacheStats {
    cache.stats().expect("a cache that has been used")
}

/// So many objects of a cache.
pub(super) fn objects(cache: &Cache, count: usize) -> Vec<NonNull<u8>> {
    (0..count).map(|_| cache.allocate().expect("memory")).collect()
}

/// Frees an object that a test has allocated and no longer uses.
pub(super) fn free_object(cache: &Cache, object: NonNull<u8>) {
    // SAFETY: as the name says.
    unsafe { cache.free(object) }
}

/// Frees objects that a test has allocated and no longer uses.
pub(super) fn free_objects(cache: &Cache, objects: Vec<NonNull<u8>>) {
    objects.into_iter().for_each(|object| free_object(cache, object));
}

/// Fills an object that a test has allocated.
pub(super) fn fill(object: NonNull<u8>, size: usize, byte: u8) {
    // SAFETY: the tests pass objects of that size, and theirs.
    unsafe { object.as_ptr().write_bytes(byte, size) }
}

/// Whether an object is still as [`fill`] has left it.
pub(super) fn is_filled(object: NonNull<u8>, size: usize, byte: u8) -> bool {
    // SAFETY: as above, and written.
    let bytes = unsafe { core::slice::from_raw_parts(object.as_ptr(), size) };
    bytes.iter().all(|&found| found == byte)
}

/// Tells the heap that an interval is over, by a clock of the tests' own.
pub(super) fn end_interval() {
    static NOW: AtomicU64 = AtomicU64::new(0);
    HEAP.maintain(NOW.fetch_add(INTERVAL, Ordering::Relaxed) + INTERVAL);
}

pub(super) const fn layout(size: usize, align: usize) -> Layout {
    match Layout::from_size_align(size, align) {
        Ok(layout) => layout,
        Err(_) => panic!("no layout"),
    }
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
