//! What a heap says of itself: sizes, a walk over its blocks, counts and tables.
//!
//! All of it may be asked at any time. Nothing here allocates, and no lock is held while a caller's function or a
//! formatter runs.

#![forbid(unsafe_code)]

use core::fmt;
use core::ptr::NonNull;

use super::{Core, Heap};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::stats::CacheStats;

impl<P: Platform> Heap<P> {
    /// Bytes of memory that the heap manages, in use or not.
    pub fn size(&self) -> usize {
        self.frames().total_bytes()
    }

    /// Bytes in page frames that are in use: by blocks, by slabs however few of their objects are allocated, and by the
    /// allocator itself. So free objects in slabs and magazines count as used; [`shrink`](Self::shrink) turns as many
    /// of them as can be into free page frames.
    pub fn used(&self) -> usize {
        self.size().saturating_sub(self.available())
    }

    /// Bytes in page frames that are free: whatever is allocated next, at least so much is there for it, though perhaps
    /// not in one piece. A CPU's stock of page frames counts as free.
    pub fn available(&self) -> usize {
        self.frames().free_bytes()
    }

    /// Calls `visit` with each block that is allocated, and the bytes that it really has, in no order and with no lock
    /// held:
    ///
    /// - objects of the size classes;
    /// - runs of page frames, those that were taken from [`frames`](Self::frames) and what the allocator needs for itself
    ///   above 1 KiB among them, since nothing tells them from large blocks.
    ///
    /// Objects of a [`Cache`](crate::Cache) are visited by [`Cache::for_each_object`](crate::Cache::for_each_object).
    /// What is allocated or freed meanwhile may be left out or visited.
    pub fn for_each_block(&self, mut visit: impl FnMut(NonNull<u8>, usize)) {
        for cache in self.caches().classes() {
            let size = cache.object_size();
            cache.slabs.for_each_used(self.frames(), |object| {
                if let Some(object) = NonNull::new(object) {
                    visit(object, size);
                }
            });
        }
        self.frames().for_each_pages(|first, count| {
            if let Some(block) = NonNull::new(self.frames().pointer(first)) {
                visit(block, count as usize * FRAME_SIZE);
            }
        });
    }

    /// Counts of the caches of the size classes, by size, and of the pages that are lent to classes.
    pub fn cache_stats(&self) -> impl Iterator<Item = CacheStats> {
        self.caches().classes().map(Core::stats)
    }

    /// Calls `visit` with the counts of each cache, with no lock held: first the size classes, by size, and the pages lent to them, then all others,
    /// in the order of their first use.
    pub fn for_each_cache(&self, mut visit: impl FnMut(&CacheStats)) {
        self.caches().for_each_to_report(|cache| visit(&cache.stats()));
    }

    /// The allocator's own tables: page frames by order, and a row for each cache that has been used, as the `kmastat` of
    /// the papers' system has it. Printing them allocates nothing, and no lock is held while the text is written.
    pub fn tables(&self) -> impl fmt::Display {
        Tables(self)
    }
}

struct Tables<'a, P>(&'a Heap<P>);

impl<P: Platform> fmt::Display for Tables<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.0.frames().stats())?;
        writeln!(f, "{}", CacheStats::HEADER)?;
        let mut result = Ok(());
        self.0.for_each_cache(|stats| {
            if result.is_ok() && stats.allocations + stats.failures > 0 {
                result = writeln!(f, "{stats}");
            }
        });
        result
    }
}
