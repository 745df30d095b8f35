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
    /// What the cache is called.
    pub name: &'static str,
    /// How many caches of this name there were before it.
    pub namesake: u32,
    /// Bytes from one object to the next.
    pub object_size: usize,
    /// Bytes in a slab.
    pub slab_size: usize,
    /// Objects that a slab holds.
    pub objects_per_slab: usize,
    /// Whether the slabs' headers are elsewhere.
    pub off_slab: bool,
    /// Different places at which the first object of a slab may start.
    pub colours: u32,
    /// Slabs that the cache has now.
    pub slabs: usize,
    /// Of them, those without any object in use or in a magazine.
    pub empty_slabs: usize,
    /// Objects that are allocated now.
    pub in_use: usize,
    /// Objects that are free and in magazines now.
    pub in_magazines: usize,
    /// Allocations so far; wraps, as all counts that only go up.
    pub allocations: u64,
    /// Frees so far.
    pub frees: u64,
    /// Requests so far that failed.
    pub failures: u64,
    /// Objects that a new magazine holds; 0 where the cache has none.
    pub magazine_rounds: usize,
    /// Full magazines in the depot.
    pub full_magazines: usize,
    /// Empty magazines in the depot.
    pub empty_magazines: usize,
    /// How often a CPU found the depot's lock taken.
    pub depot_contention: u64,
    /// Full magazines that were emptied into their slabs, because they were not needed or memory was short.
    pub magazines_reaped: u64,
    /// Slabs made so far.
    pub slabs_created: u64,
    /// Slabs that have gone back to the page frames so far.
    pub slabs_released: u64,
}

impl CacheStats {
    /// The line above the rows.
    pub const HEADER: &'static str = "cache             object    slab per slab colours  slabs   in use  cached  allocations failures \
                                      rounds contention reaped";
}

impl fmt::Display for CacheStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namesake == 0 {
            write!(f, "{:<16}", self.name)?;
        } else {
            let digits = self.namesake.ilog10() as usize + 2;
            write!(
                f,
                "{}#{:<width$}",
                self.name,
                self.namesake,
                width = 15_usize.saturating_sub(self.name.len()).max(digits)
            )?;
        }
        write!(
            f,
            "{:>8}{:>8}{:>9}{:>8}{:>7}{:>9}{:>8}{:>13}{:>9}{:>7}{:>11}{:>7}",
            self.object_size,
            self.slab_size,
            self.objects_per_slab,
            self.colours,
            self.slabs,
            self.in_use,
            self.in_magazines,
            self.allocations,
            self.failures,
            self.magazine_rounds,
            self.depot_contention,
            self.magazines_reaped
        )
    }
}
