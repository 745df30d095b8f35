//! Setting up the frame records in the memory that they describe.

use core::error::Error;
use core::fmt;
use core::mem::{align_of, size_of};
use core::ops::Range;

use super::record::{Record, Records, SECTION_FRAMES, Section};
use super::{Frame, Frames, Memory};
use crate::memory::{FRAME_SIZE, Region, UsableFrames};
use crate::platform::Platform;

/// Why memory could not be taken over. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitError {
    /// It has been done before.
    AlreadyInitialised,
    /// The map has no usable page frame.
    NoUsableMemory,
    /// No usable range can hold the frame records and leave a frame to allocate.
    MetadataDoesNotFit {
        /// Bytes that the records need, in one range.
        needed: usize,
        /// Bytes in the largest range.
        largest: usize,
    },
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
        }
    }
}

impl Error for InitError {}

/// How much there is to record.
#[derive(Debug, Default)]
struct Extent {
    sections: usize,
    records: usize,
    frames: u32,
    largest: Option<Range<Frame>>,
}

impl Extent {
    fn of(ranges: impl Iterator<Item = Range<Frame>>) -> Self {
        let mut extent = Self::default();
        let mut last: Option<Range<u32>> = None;
        for range in ranges {
            let length = frames_in(&range);
            extent.frames += length;
            for part in by_section(&range) {
                last = match last {
                    Some(open) if section_of(open.start) == section_of(part.start) => Some(open.start..part.end),
                    closed => {
                        extent.records += closed.map_or(0, |closed| closed.len());
                        Some(part)
                    }
                };
            }
            if extent.largest.as_ref().is_none_or(|largest| length > frames_in(largest)) {
                extent.largest = Some(range);
            }
        }
        if let Some(open) = last {
            extent.sections = section_of(open.start) + 1;
            extent.records += open.len();
        }
        extent
    }

    fn metadata_bytes(&self) -> usize {
        self.sections * size_of::<Section>() + self.records * size_of::<Record>()
    }
}

fn frames_in(range: &Range<Frame>) -> u32 {
    range.end.number() - range.start.number()
}

fn section_of(frame: u32) -> usize {
    (frame / SECTION_FRAMES) as usize
}

/// Cuts a range where sections meet.
fn by_section(range: &Range<Frame>) -> impl Iterator<Item = Range<u32>> + use<> {
    let (mut start, end) = (range.start.number(), range.end.number());
    core::iter::from_fn(move || {
        let section_end = (start / SECTION_FRAMES + 1).saturating_mul(SECTION_FRAMES);
        let part = start..end.min(section_end);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}

impl<P: Platform> Frames<P> {
    /// Takes over the usable frames of `regions`. The records go to the end of the largest range.
    ///
    /// # Safety
    ///
    /// As [`Heap::init`](crate::Heap::init) says.
    pub(crate) unsafe fn init<I>(&self, regions: I, base: *mut u8) -> Result<(), InitError>
    where
        I: IntoIterator<Item = Region>,
        I::IntoIter: Clone,
    {
        let ranges = UsableFrames::new(regions.into_iter());
        let mut metadata = None;
        let memory = self.memory.try_call_once(|| {
            let extent = Extent::of(ranges.clone());
            let place = metadata.insert(place_metadata(&extent)?).clone();
            let start = base.wrapping_add(place.start.address() as usize);
            // SAFETY: `place` is in a usable range, which the caller lends us for good, mapped at `base` plus its address,
            // and it is as long as `extent` of the same ranges asks for; a frame's start is aligned for both types.
            let sections = unsafe { build_sections(start, &extent, ranges.clone()) };
            Ok(Memory { base, records: Records { sections, overhead: frames_in(&place) } })
        })?;
        let Some(metadata) = metadata else {
            return Err(InitError::AlreadyInitialised);
        };
        for range in ranges {
            let mut zone = self.zone.lock();
            if range.contains(&metadata.start) {
                zone.add(&memory.records, range.start..metadata.start);
            } else {
                zone.add(&memory.records, range);
            }
        }
        Ok(())
    }
}

fn place_metadata(extent: &Extent) -> Result<Range<Frame>, InitError> {
    let largest = extent.largest.clone().ok_or(InitError::NoUsableMemory)?;
    let needed = extent.metadata_bytes();
    let frames = needed.div_ceil(FRAME_SIZE);
    let available = frames_in(&largest);
    if frames > available as usize || frames >= extent.frames as usize {
        return Err(InitError::MetadataDoesNotFit { needed, largest: available as usize * FRAME_SIZE });
    }
    Ok(largest.start.offset(available - frames as u32)..largest.end)
}

/// Lays the section table at `start` and behind it the records, all of them [`Nobody`](super::Owner::Nobody)'s.
///
/// # Safety
///
/// From `start`, which is aligned to a frame, there are `extent.metadata_bytes()` bytes that nobody else uses, now or later.
/// `extent` is that of `ranges`.
unsafe fn build_sections(
    start: *mut u8,
    extent: &Extent,
    ranges: impl Iterator<Item = Range<Frame>>,
) -> &'static [Section] {
    const { assert!(align_of::<Section>() >= align_of::<Record>()) };
    let sections = start.cast::<Section>();
    // SAFETY: the records follow the sections inside the bytes that the caller promises.
    let records = unsafe { sections.add(extent.sections) }.cast::<Record>();
    // SAFETY: as above; all bytes zero is a valid record.
    unsafe { records.write_bytes(0, extent.records) };
    for index in 0..extent.sections {
        // SAFETY: the table has `extent.sections` entries.
        unsafe { sections.add(index).write(Section { first: 0, records: &[] }) };
    }
    // SAFETY: just written, and exclusive until this function returns.
    let table = unsafe { core::slice::from_raw_parts_mut(sections, extent.sections) };
    let mut used = 0;
    for part in ranges.flat_map(|range| by_section(&range)) {
        let section = &mut table[section_of(part.start)];
        if section.records.is_empty() {
            section.first = part.start;
        }
        // Ranges ascend, so the section that grows is the last one begun: its records are the last of those used.
        used -= section.records.len();
        let length = (part.end - section.first) as usize;
        // SAFETY: the parts of one section reach from its first frame to its last; their lengths add up to
        // `extent.records`, which are written.
        section.records = unsafe { core::slice::from_raw_parts(records.add(used), length) };
        used += length;
    }
    table
}
