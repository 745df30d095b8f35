//! Numbers: what is where, as plain values and as tables that print without allocating.

#![forbid(unsafe_code)]

use core::fmt;

use crate::frames::Order;
use crate::memory::FRAME_SIZE;

/// Counts of the page-frame allocator. Prints as a table, a column an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameStats {
    /// Usable frames of the memory map.
    pub total: usize,
    /// Of them, what the allocator's own records take.
    pub metadata: usize,
    /// Of them, what is free.
    pub free: usize,
    /// Free blocks of each order.
    pub free_blocks: [usize; Order::COUNT],
}

impl fmt::Display for FrameStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |frames: usize| frames * (FRAME_SIZE / 1024);
        writeln!(
            f,
            "page frames: {} KiB in all, {} KiB free, {} KiB for records",
            kib(self.total),
            kib(self.free),
            kib(self.metadata)
        )?;
        write!(f, "{:<12}", "order")?;
        (0..Order::COUNT).try_for_each(|order| write!(f, "{order:>6}"))?;
        write!(f, "\n{:<12}", "free blocks")?;
        self.free_blocks.iter().try_for_each(|blocks| write!(f, "{blocks:>6}"))?;
        writeln!(f)
    }
}

/// Counts of one cache. Prints as a row of the table that [`CacheStats::HEADER`] heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Bytes in an object.
    pub object_size: usize,
    /// Bytes in a slab.
    pub slab_size: usize,
    /// Objects that a slab holds.
    pub objects_per_slab: usize,
    /// Slabs that the cache has now.
    pub slabs: usize,
    /// Objects that are allocated now.
    pub in_use: usize,
    /// Allocations so far.
    pub allocations: u64,
    /// Requests so far that failed for want of memory.
    pub failures: u64,
}

impl CacheStats {
    /// The line above the rows.
    pub const HEADER: &'static str = "cache       object   slab  per slab     slabs    in use  allocations  failures";
}

impl fmt::Display for CacheStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "size-{:<5}{:>8}{:>7}{:>10}{:>10}{:>10}{:>13}{:>10}",
            self.object_size,
            self.object_size,
            self.slab_size,
            self.objects_per_slab,
            self.slabs,
            self.in_use,
            self.allocations,
            self.failures
        )
    }
}
