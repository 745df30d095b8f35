//! The first memory: setting up the frame records in the memory that they describe.
//!
//! The largest range gets the direct table, and the tables of all other ranges too, in its end.

use crate::sync::Ordering::Relaxed;
use core::error::Error;
use core::fmt;
use core::ops::Range;

use super::record::Owner;
use super::records::{Records, SECTION};
use super::stock::Stocks;
use super::types::{each, length};
use super::{Frame, Frames};
use crate::memory::{FRAME_SIZE, Region, UsableFrames};
use crate::platform::Platform;

/// Why memory could not be taken over. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitError {
    /// It has been done before.
    AlreadyInitialised,
    /// The map has no usable page frame.
    NoUsableMemory,
    /// No usable range can hold the frame records, or they would leave no frame to allocate.
    MetadataDoesNotFit {
        /// Bytes that the records need, in one range.
        needed: usize,
        /// Bytes in the largest range.
        largest: usize,
    },
    /// A range of virtual addresses is longer than frame numbers reach: 8 TiB, less 1 GiB.
    BeyondReach,
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlreadyInitialised => {
                f.write_str("the heap has been initialised before; add nothing by a second init")
            }
            Self::NoUsableMemory => f.write_str("the memory map has no usable page frame; check how it was converted"),
            Self::MetadataDoesNotFit { needed, largest } => write!(
                f,
                "the frame records need {needed} bytes in a row and memory to spare, but the largest usable range has \
                 {largest} bytes"
            ),
            Self::BeyondReach => f.write_str("the range is too long for frame numbers"),
        }
    }
}

impl Error for InitError {}

/// Where the base of a virtual range lies below it, and how large steps that keeps frame numbers congruent to addresses.
const REACH: usize = 8 << 40;
const CONGRUENT: usize = 1 << 30;

/// A range of up to so many frames has all its records made by `init`: 32 MiB. So in small memory each request is served from
/// the smallest block that there is, and large ones stay.
const SMALL: u32 = 16 * SECTION;

/// How many frames the tables for some new ranges take, in the order in which they lie.
#[derive(Debug)]
pub(super) struct Tables {
    /// Nodes of the records' tree.
    pub(super) nodes: u32,
    pub(super) stocks: u32,
    /// The direct table of records.
    pub(super) direct: u32,
}

impl Tables {
    pub(super) fn frames(&self) -> u32 {
        self.nodes + self.stocks + self.direct
    }
}

/// The longest of `ranges`, and how many frames they have together.
pub(super) fn measure(ranges: impl Iterator<Item = Range<Frame>>) -> Option<(Range<Frame>, usize)> {
    ranges.map(|range| (range.clone(), length(&range) as usize)).reduce(|(longest, sum), (range, frames)| {
        (if length(&range) > length(&longest) { range } else { longest }, sum + frames)
    })
}

/// The last frames of `range`, as many as the tables take and fewer than all `frames` that there are. Otherwise, the
/// bytes needed and the bytes there.
pub(super) fn place_in(range: &Range<Frame>, tables: &Tables, frames: usize) -> Result<Range<Frame>, (usize, usize)> {
    let (needed, available) = (tables.frames(), length(range));
    if needed > available || needed as usize >= frames {
        return Err((needed as usize * FRAME_SIZE, available as usize * FRAME_SIZE));
    }
    Ok(range.start.offset(available - needed)..range.end)
}

impl<P: Platform> Frames<P> {
    /// Takes over the usable frames of `regions`.
    ///
    /// # Safety
    ///
    /// As [`Heap::init`](crate::Heap::init) says.
    pub(crate) unsafe fn init<I>(&self, regions: I, base: *mut u8) -> Result<(), InitError>
    where
        I: IntoIterator<Item = Region>,
        I::IntoIter: Clone,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.take_over(UsableFrames::new(regions.into_iter()), base) }
    }

    /// Takes over the pages that lie wholly in the `bytes` bytes from `start` on: a range of virtual addresses,
    /// whatever the physical memory behind it.
    ///
    /// Frame numbers then count pages from 8 TiB below `start` rounded down to 1 GiB, so that a block of frames is
    /// aligned as its addresses are, and ranges up to 8 TiB below or above can be added.
    ///
    /// # Safety
    ///
    /// The range is ordinary memory, mapped and writable for as long as the heap or anything allocated from it is used,
    /// and nobody else uses it from now on. `start` may be used to access all of it.
    pub(crate) unsafe fn init_range(&self, start: *mut u8, bytes: usize) -> Result<(), InitError> {
        let base = start.wrapping_sub(start.addr() % CONGRUENT).wrapping_sub(REACH);
        let range = pages(base, start, bytes).ok_or(InitError::BeyondReach)?;
        // SAFETY: passed on to the caller; frame numbers count from `base`.
        unsafe { self.take_over(core::iter::once(range).filter(|range| !range.is_empty()), base) }
    }

    /// # Safety
    ///
    /// The frames of `ranges`, which ascend without touching and stay the same, are memory that nobody else uses from
    /// now on, mapped at `base` plus their addresses; `base` may be used to access them.
    unsafe fn take_over(
        &self,
        ranges: impl Iterator<Item = Range<Frame>> + Clone,
        base: *mut u8,
    ) -> Result<(), InitError> {
        let _change = self.begin_change().ok_or(InitError::AlreadyInitialised)?;
        if !self.records.are_empty() {
            return Err(InitError::AlreadyInitialised);
        }
        let (largest, frames) = measure(ranges.clone()).ok_or(InitError::NoUsableMemory)?;
        let others = ranges.clone().filter(|range| *range != largest);
        let tables = Tables {
            nodes: self.records.missing(others.clone()),
            stocks: if self.stocks.are_wanted(frames) { Stocks::<P>::TABLE_FRAMES } else { 0 },
            direct: Records::direct_size(length(&largest)),
        };
        let place = place_in(&largest, &tables, frames)
            .map_err(|(needed, largest)| InitError::MetadataDoesNotFit { needed, largest })?;
        self.base.store(base, Relaxed);
        let table = self.pointer(place.start.offset(tables.nodes + tables.stocks));
        let high = largest.start.max(self.zones.start_of_zone(place.start));
        // SAFETY: `place` is memory that is ours from now on, and it has room for the direct table behind nodes and stocks.
        unsafe { self.records.set_direct(largest.clone(), high, place.start, self.pointer(high), table) };
        let is_small = length(&largest) <= SMALL;
        if largest.start < high {
            // What is made later of the low part is all in one zone: those below it are made whole.
            let below = self.zones.start_of_zone(Frame::new(high.number() - 1));
            self.records.set_up(if is_small { high } else { below });
        }
        if is_small {
            self.records.set_up(largest.end);
        }
        // SAFETY: as above.
        unsafe { self.build(others, &place, &tables) };
        self.manage(ranges, &place);
        Ok(())
    }

    /// Makes the nodes for `ranges`, and the stocks, in `place`. The frames there are recorded as the allocator's own.
    ///
    /// # Safety
    ///
    /// `place` is memory that is the allocator's own from now on. Its first frames are `tables.nodes`, just as many as
    /// `ranges` need, and behind them `tables.stocks`.
    pub(super) unsafe fn build(
        &self,
        ranges: impl Iterator<Item = Range<Frame>> + Clone,
        place: &Range<Frame>,
        tables: &Tables,
    ) {
        let mut nodes = each(place.start..place.start.offset(tables.nodes)).map(|frame| self.pointer(frame));
        for range in ranges.clone() {
            // SAFETY: each node has a frame of `place` of its own, and only one change is made at a time.
            unsafe { self.records.cover(range.clone(), &mut || nodes.next()) };
            self.records.set_all(range, Owner::Inner);
        }
        self.records.set_all(place.clone(), Owner::Records);
        self.metadata.fetch_add(length(place) as usize, Relaxed);
        if tables.stocks > 0 {
            // SAFETY: these frames of `place` are nobody else's, and there are as many as the table takes.
            unsafe { self.stocks.install(self.pointer(place.start.offset(tables.nodes))) };
        }
    }

    /// Hands `ranges` to the zones, but for the tables in `place`.
    pub(super) fn manage(&self, ranges: impl Iterator<Item = Range<Frame>>, place: &Range<Frame>) {
        for range in ranges {
            self.zones.lock().add(&self.records, range, place);
        }
        self.update_managed();
    }
}

/// The frames that lie wholly in `bytes` bytes from `start` on, where frame 0 is at `base`; frame 0 is not one of them.
/// `None` where frame numbers do not reach so far.
pub(super) fn pages(base: *mut u8, start: *mut u8, bytes: usize) -> Option<Range<Frame>> {
    let frame_at = |address: usize| Frame::containing(address.wrapping_sub(base.addr()) as u64);
    let first = start.addr().checked_next_multiple_of(FRAME_SIZE)?;
    let end = start.addr().saturating_add(bytes) / FRAME_SIZE * FRAME_SIZE;
    if first >= end {
        return Some(Frame::default()..Frame::default());
    }
    let (first, last) = (frame_at(first)?, frame_at(end - 1)?);
    (first <= last).then(|| first.max(Frame::new(1))..last.offset(1))
}
