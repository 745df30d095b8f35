//! An arena's numbers.

#![deny(unsafe_code)]

use core::fmt;

use super::segments::State;

/// Counts of one arena. Prints as a row of the table that [`ArenaStats::HEADER`] heads, without allocating.
///
/// The counts of what has happened wrap around at 2^64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaStats {
    /// The arena's name.
    pub name: &'static str,
    /// The quantum.
    pub quantum: u64,
    /// Integers of all spans.
    pub total: u64,
    /// Of them, those that are allocated.
    pub in_use: u64,
    /// Integers of the largest free segment.
    pub largest_free: u64,
    /// Spans, imported ones too.
    pub spans: usize,
    /// Allocated segments.
    pub segments: usize,
    /// Free segments.
    pub free_segments: usize,
    /// Boundary tags that there is memory for.
    pub tags: usize,
    /// Allocations so far.
    pub allocations: u64,
    /// Frees so far.
    pub frees: u64,
    /// Requests so far that failed for want of space or memory.
    pub failures: u64,
    /// Frees so far that were refused.
    pub refused: u64,
    /// Spans that the source has lent so far.
    pub imports: u64,
    /// Of them, those that have gone back.
    pub returns: u64,
    /// Segments that searches have looked at so far.
    pub searched: u64,
}

impl ArenaStats {
    /// The line above the rows.
    pub const HEADER: &'static str = concat!(
        "arena             quantum                total               in use         largest free  ",
        "segments  allocations  failures  imports"
    );

    /// Integers that are free.
    pub const fn free(&self) -> u64 {
        self.total - self.in_use
    }

    pub(super) fn of(name: &'static str, quantum: u64, state: &State) -> Self {
        let counts = state.counts;
        let largest = state.free.largest().map(|list| state.free.segments(&state.tags, list));
        let largest_free = largest.and_then(|segments| segments.map(|tag| state.tags[tag].size.get()).max());
        Self {
            name,
            quantum,
            total: counts.total,
            in_use: counts.in_use,
            largest_free: largest_free.unwrap_or(0),
            spans: counts.spans,
            segments: counts.allocated,
            free_segments: state.tags.in_use() as usize - counts.spans - counts.allocated,
            tags: state.tags.count() as usize,
            allocations: counts.allocations,
            frees: counts.frees,
            failures: counts.failures,
            refused: counts.refused,
            imports: counts.imports,
            returns: counts.returns,
            searched: counts.searched,
        }
    }
}

impl fmt::Display for ArenaStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<16}{:>9}{:>21}{:>21}{:>21}{:>10}{:>13}{:>10}{:>9}",
            self.name,
            self.quantum,
            self.total,
            self.in_use,
            self.largest_free,
            self.segments,
            self.allocations,
            self.failures,
            self.imports
        )
    }
}
