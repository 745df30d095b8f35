//! Numbers: what is where, as plain values and as tables that print without allocating.

#![forbid(unsafe_code)]

use core::fmt;

use crate::frames::{Frame, Order};
use crate::memory::FRAME_SIZE;

/// Counts of one zone of the page frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneStats {
    /// Its first frame.
    pub start: Frame,
    /// Its end, exclusive.
    pub end: Frame,
    /// Managed frames, with those of records.
    pub total: usize,
    /// Of them, what is free in this zone's blocks.
    pub free: usize,
    /// Free blocks of each order.
    pub free_blocks: [usize; Order::COUNT],
    /// Frames that are kept from requests which a higher zone could have served.
    pub reserve: usize,
    /// The low watermark, in frames: with fewer free, in this zone and those below it added up, there is pressure; see
    /// [`reclaim`](crate::reclaim).
    pub low: usize,
    /// The high watermark, in frames: pressure ends there.
    pub high: usize,
}

/// Counts of the page-frame allocator. Prints as a table: a row a zone with memory, a column an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameStats {
    /// Managed frames: the usable ones of the memory map, and what was added.
    pub total: usize,
    /// Of them, what the allocator's own records and tables take.
    pub metadata: usize,
    /// Of them, what is free, in blocks and in stocks.
    pub free: usize,
    /// Of the free ones, what is in the CPUs' stocks of single frames.
    pub stocked: usize,
    /// Free blocks of each order, in all zones.
    pub free_blocks: [usize; Order::COUNT],
    /// Each zone, the lowest first.
    pub zones: [ZoneStats; 3],
}

impl FrameStats {
    /// The order of the largest block that can be allocated now; `None` where there is no free block.
    pub fn largest_block(&self) -> Option<Order> {
        let largest = self.free_blocks.iter().rposition(|blocks| *blocks > 0)?;
        Order::new(largest as u32)
    }

    /// How far free memory is from being one block, from 0 (it is one) to 1000 (it is in small pieces): 1 less the
    /// share of the largest free block in the free frames, in thousandths. 0 where nothing is free.
    pub fn fragmentation(&self) -> u32 {
        let largest = self.largest_block().map_or(0, |order| order.frames() as usize);
        share(self.free.saturating_sub(largest), self.free)
    }

    /// The unusable free space index for `order`: the share of the free frames that no request for a block of that
    /// order can use, as they are in smaller blocks or in stocks; from 0 (none) to 1000 (all). 0 where nothing is free.
    ///
    /// After M. Gorman and A. Whitcroft, *The What, The Why and the Where To of Anti-Fragmentation* (Ottawa Linux
    /// Symposium 2006).
    pub fn unusable(&self, order: Order) -> u32 {
        let usable: usize = order.and_up().map(|order| self.free_blocks[order.index()] << order.get()).sum();
        share(self.free.saturating_sub(usable), self.free)
    }
}

/// `part` of `whole` in thousandths.
fn share(part: usize, whole: usize) -> u32 {
    (part * 1000).checked_div(whole).unwrap_or(0) as u32
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
        if self.stocked > 0 {
            writeln!(f, "of the free ones {} KiB are in stocks", kib(self.stocked))?;
        }
        write!(f, "{:<20}{:>10}{:>10}{:>8}{:>8}{:>8}", "free blocks", "frames", "free", "reserve", "low", "high")?;
        (0..Order::COUNT).try_for_each(|order| write!(f, "{order:>6}"))?;
        writeln!(f)?;
        let populated = self.zones.iter().filter(|zone| zone.total > 0);
        for zone in populated {
            writeln!(f, "{zone}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ZoneStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |frame: Frame| frame.address() >> 20;
        write!(f, "from {:>10} MiB ", mib(self.start))?;
        write!(f, "{:>10}{:>10}{:>8}{:>8}{:>8}", self.total, self.free, self.reserve, self.low, self.high)?;
        self.free_blocks.iter().try_for_each(|blocks| write!(f, "{blocks:>6}"))
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
