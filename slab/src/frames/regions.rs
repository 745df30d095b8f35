//! Memory that comes later, and memory that goes.

use crate::sync::AtomicBool;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use core::error::Error;
use core::fmt;
use core::ops::Range;

use super::init::{Tables, measure, pages, place_in};
use super::stock::Stocks;
use super::{Frame, Frames, Order, Owner};
use crate::memory::{FRAME_SIZE, Region, UsableFrames};
use crate::platform::{Platform, in_nmi};

/// Why memory could not be added. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddError {
    /// `init` comes first.
    NotInitialised,
    /// Another CPU, or what this interrupts, is adding or removing memory just now, or this is an NMI. It may be tried
    /// again.
    InProgress,
    /// There is no whole page frame in what should be added.
    NoUsableMemory,
    /// Some of it is managed already.
    AlreadyManaged {
        /// The first such frame.
        frame: Frame,
    },
    /// Neither the free memory nor the new one can hold the new frame records, or they would take all of the new one.
    MetadataDoesNotFit {
        /// Bytes that the records need, in a row.
        needed: usize,
        /// Bytes in the largest new range.
        largest: usize,
    },
    /// The range is not in reach of frame numbers: see [`Frame::LIMIT`], and for heaps over virtual ranges 8 TiB below
    /// and above.
    BeyondReach,
}

impl fmt::Display for AddError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInitialised => f.write_str("there is no memory to add to yet; init comes first"),
            Self::InProgress => f.write_str("memory is being added or removed just now; try again"),
            Self::NoUsableMemory => f.write_str("there is no whole page frame to add"),
            Self::AlreadyManaged { frame } => write!(f, "the frame at {:#x} is managed already", frame.address()),
            Self::MetadataDoesNotFit { needed, largest } => write!(
                f,
                "the frame records need {needed} bytes in a row and memory to spare, but the largest new range has \
                 {largest} bytes"
            ),
            Self::BeyondReach => f.write_str("the range is too far away for frame numbers"),
        }
    }
}

impl Error for AddError {}

/// Why memory could not be taken away. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RemoveError {
    /// Another CPU, or what this interrupts, is adding or removing memory just now, or this is an NMI. It may be tried
    /// again.
    InProgress,
    /// Some of it is in use.
    Busy {
        /// The first managed frame that is not free.
        frame: Frame,
    },
    /// Some of it holds the allocator's own records. They stay for as long as there is an allocator.
    Records {
        /// The first such frame.
        frame: Frame,
    },
}

impl fmt::Display for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InProgress => f.write_str("memory is being added or removed just now; try again"),
            Self::Busy { frame } => write!(f, "the frame at {:#x} is in use", frame.address()),
            Self::Records { frame } => write!(f, "the frame at {:#x} holds the allocator's records", frame.address()),
        }
    }
}

impl Error for RemoveError {}

/// Memory is being added or taken away, by the holder of this alone.
pub(super) struct Change<'a>(&'a AtomicBool);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

impl<P: Platform> Frames<P> {
    /// `None` where a change is under way, and in an NMI. It never waits: the other one may be what this interrupts.
    pub(super) fn begin_change(&self) -> Option<Change<'_>> {
        let begun = !in_nmi::<P>() && self.changing.compare_exchange(false, true, Acquire, Relaxed).is_ok();
        begun.then(|| Change(&self.changing))
    }
}

impl<P: Platform> Frames<P> {
    /// Takes over the usable frames of `regions` as well, and says how many they are. They are put right as
    /// [`memory`](crate::memory) says, and mapped at the same offset as the first memory.
    ///
    /// The records for them go into memory that was there before, where that has room for them in a row, so that the
    /// new memory can be removed again as a whole; else into the end of the largest new range.
    ///
    /// # Errors
    ///
    /// See [`AddError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// For the new regions, all that [`Heap::init`](crate::Heap::init) asks for.
    pub unsafe fn add<I>(&self, regions: I) -> Result<usize, AddError>
    where
        I: IntoIterator<Item = Region>,
        I::IntoIter: Clone,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.add_frames(UsableFrames::new(regions.into_iter())) }
    }

    /// Takes over the pages that lie wholly in the `bytes` bytes from `start` on, and says how many they are: for heaps
    /// over ranges of virtual addresses, and for memory known by its virtual address. Otherwise as [`add`](Self::add).
    ///
    /// # Errors
    ///
    /// See [`AddError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// The range is ordinary memory, mapped and writable for as long as it is managed or anything allocated from it is
    /// used, and nobody else uses it from now on. What `init` was given as the base, or as the first range, may be used
    /// to access it.
    pub unsafe fn add_range(&self, start: *mut u8, bytes: usize) -> Result<usize, AddError> {
        let range = pages(self.base.load(Relaxed), start, bytes).ok_or(AddError::BeyondReach)?;
        // SAFETY: passed on to the caller.
        unsafe { self.add_frames(core::iter::once(range).filter(|range| !range.is_empty())) }
    }

    /// # Safety
    ///
    /// The frames of `ranges`, which ascend without touching and stay the same, are memory that nobody else uses from
    /// now on, mapped at the base plus their addresses; the base may be used to access them.
    unsafe fn add_frames(&self, ranges: impl Iterator<Item = Range<Frame>> + Clone) -> Result<usize, AddError> {
        let _change = self.begin_change().ok_or(AddError::InProgress)?;
        if self.records.are_empty() {
            return Err(AddError::NotInitialised);
        }
        let (largest, frames) = measure(ranges.clone()).ok_or(AddError::NoUsableMemory)?;
        ranges.clone().for_each(|range| self.zones.set_up(&self.records, range.end));
        if let Some((frame, _)) = ranges.clone().find_map(|range| self.records.managed(range).next()) {
            return Err(AddError::AlreadyManaged { frame });
        }
        let managed = self.managed.load(Relaxed) + frames;
        let tables = Tables {
            nodes: self.records.missing(ranges.clone()),
            stocks: if self.stocks.are_wanted(managed) { Stocks::<P>::TABLE_FRAMES } else { 0 },
            direct: 0,
        };
        let place = match self.serve(tables.frames(), Order::ZERO) {
            Some(first) => first..first.offset(tables.frames()),
            None => place_in(&largest, &tables, frames)
                .map_err(|(needed, largest)| AddError::MetadataDoesNotFit { needed, largest })?,
        };
        // SAFETY: `place` is just allocated, or of the new memory and held back from the zones below.
        unsafe { self.build(ranges.clone(), &place, &tables) };
        self.manage(ranges, &place);
        Ok(frames)
    }

    /// Takes the page frames that lie wholly in the physical addresses `range` back from the allocator, for good or
    /// until they are added again, and says how many they are. Those that are not managed are left out.
    ///
    /// Frames in the stocks of other CPUs count as in use.
    ///
    /// # Errors
    ///
    /// See [`RemoveError`]: one of the managed frames is not free. Nothing has changed then.
    pub fn remove(&self, range: Range<u64>) -> Result<usize, RemoveError> {
        self.withdraw(frame_from(range.start.div_ceil(FRAME_SIZE as u64))..frame_from(range.end / FRAME_SIZE as u64))
    }

    /// Takes every page frame that has a byte of the physical addresses `range` back from the allocator, for good, so
    /// that it is never handed out: for what must be at a certain address. Those that are not managed are left out.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub fn reserve(&self, range: Range<u64>) -> Result<(), RemoveError> {
        let end =
            if range.is_empty() { range.start / FRAME_SIZE as u64 } else { range.end.div_ceil(FRAME_SIZE as u64) };
        self.withdraw(frame_from(range.start / FRAME_SIZE as u64)..frame_from(end)).map(|_| ())
    }

    fn withdraw(&self, range: Range<Frame>) -> Result<usize, RemoveError> {
        let _change = self.begin_change().ok_or(RemoveError::InProgress)?;
        self.drain_stock();
        self.zones.set_up(&self.records, range.end);
        let withdrawn = self.zones.lock().withdraw(&self.records, range.clone());
        let frames = withdrawn.map_err(|(frame, owner)| match owner {
            Owner::Records => RemoveError::Records { frame },
            _ => RemoveError::Busy { frame },
        })?;
        self.records.set_all(range, Owner::Unmanaged);
        self.update_managed();
        Ok(frames)
    }
}

fn frame_from(number: u64) -> Frame {
    Frame::new(u32::try_from(number).unwrap_or(Frame::LIMIT))
}
