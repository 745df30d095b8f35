//! The memory map: from what firmware says to the page frames that may be handed out.
//!
//! Firmware's regions come in any order, overlap, wrap, are empty or not page-aligned. [`UsableFrames`] puts them right
//! without any memory of its own: it yields the usable frames as ascending, disjoint, maximal ranges. Reserved wins over
//! usable; a frame is usable only if all of its bytes are. Frame 0 is never usable, so that no object has the
//! physical address 0.

#![forbid(unsafe_code)]

use core::ops::Range;

use crate::frames::Frame;

/// Bytes in a page frame: 4096.
pub const FRAME_SIZE: usize = 4096;

/// One entry of a memory map, as firmware gave it: any order, any alignment, any length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    start: u64,
    /// Exclusive.
    end: u64,
    usable: bool,
}

impl Region {
    /// `length` bytes of memory from the physical address `start` that the allocator may have.
    ///
    /// A region that would pass the end of the address space ends there.
    pub const fn usable(start: u64, length: u64) -> Self {
        Self { start, end: start.saturating_add(length), usable: true }
    }

    /// `length` bytes from the physical address `start` that the allocator must leave alone, whatever other regions say.
    pub const fn reserved(start: u64, length: u64) -> Self {
        Self { start, end: start.saturating_add(length), usable: false }
    }
}

#[cfg(feature = "bootloader_api")]
impl From<bootloader_api::info::MemoryRegion> for Region {
    /// Only [`Usable`](bootloader_api::info::MemoryRegionKind::Usable) is usable.
    fn from(region: bootloader_api::info::MemoryRegion) -> Self {
        let length = region.end.saturating_sub(region.start);
        match region.kind {
            bootloader_api::info::MemoryRegionKind::Usable => Self::usable(region.start, length),
            _ => Self::reserved(region.start, length),
        }
    }
}

/// Iterates over the usable frames of a memory map: ascending, disjoint ranges with a gap after each.
///
/// It goes over the map several times for each range that it yields, instead of sorting a copy; the time for all of them
/// grows with the square of the number of regions (10,000 regions: some tenths of a second).
#[derive(Debug, Clone)]
pub struct UsableFrames<I> {
    regions: I,
    /// All below is done.
    position: u64,
}

impl<I: Iterator<Item = Region> + Clone> UsableFrames<I> {
    /// The usable frames of `regions`. What lies above [`Frame::LIMIT`] is left out.
    pub fn new(regions: I) -> Self {
        Self { regions, position: FRAME_SIZE as u64 }
    }

    fn ranges(&self, usable: bool) -> impl Iterator<Item = Range<u64>> + use<I> {
        self.regions.clone().filter(move |region| region.usable == usable).map(|region| region.start..region.end)
    }

    /// The first usable byte from `position` on, and the end of the usable bytes that follow it without a gap.
    fn next_bytes(&mut self) -> Option<Range<u64>> {
        let start = loop {
            let ahead = self.ranges(true).filter(|range| range.start < range.end && range.end > self.position);
            let start = ahead.map(|range| range.start.max(self.position)).min()?;
            match self.ranges(false).filter(|range| range.contains(&start)).map(|range| range.end).max() {
                Some(reserved_until) => self.position = reserved_until,
                None => break start,
            }
        };
        let reserved = self.ranges(false).filter(|range| range.start > start && range.start < range.end);
        let limit = reserved.map(|range| range.start).min().unwrap_or(u64::MAX);
        let mut end = start;
        while end < limit {
            let touching = self.ranges(true).filter(|range| range.start <= end && range.end > end);
            match touching.map(|range| range.end).max() {
                Some(further) => end = further,
                None => break,
            }
        }
        self.position = end.min(limit);
        Some(start..self.position)
    }
}

impl<I: Iterator<Item = Region> + Clone> Iterator for UsableFrames<I> {
    type Item = Range<Frame>;

    fn next(&mut self) -> Option<Range<Frame>> {
        loop {
            let bytes = self.next_bytes()?;
            let page = FRAME_SIZE as u64;
            let first = bytes.start.div_ceil(page);
            let end = (bytes.end / page).min(Frame::LIMIT as u64);
            if first < end {
                return Some(Frame::new(first as u32)..Frame::new(end as u32));
            }
        }
    }
}

#[cfg(test)]
mod tests;
