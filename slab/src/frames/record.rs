//! The frame records: twelve bytes for each page frame that say who owns it.
//!
//! Records live in tables of their own, one a *section* of 128 MiB of the physical address space, as long as the section's
//! usable frames reach. A hole in the memory map costs 16 bytes a section. The tables are built once and never move;
//! the records' fields are atomic, so that anybody may ask who owns a frame, with no lock held.
//!
//! Invariants:
//! 1. A record is written only by who owns the frame: for a free frame the holder of the zone's lock, for a slab's frame
//!    the holder of its cache's lock.
//! 2. The first frame of a free block and of an allocation says so. Their other frames say [`Owner::Nobody`], and so do
//!    the allocator's own metadata and all that is not usable; so nothing ever merges with them. Every frame of a slab
//!    names the slab's first frame.

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU32, Ordering};

use super::{Frame, Order};

/// Frames in a section: 128 MiB.
pub(crate) const SECTION_FRAMES: u32 = 1 << 15;

/// Who owns a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Not the start of anything: the inside of a block, reserved, metadata, or not memory at all.
    Nobody,
    /// The buddy allocator: the first frame of a free block.
    Free(Order),
    /// Whoever allocated it: the first of so many frames.
    Pages(u32),
    /// A cache: part of the slab that starts at `first`.
    Slab { order: Order, cache: u32 },
}

/// The record of one frame. All bytes zero is [`Owner::Nobody`].
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Record {
    kind: AtomicU32,
    /// Free: the next free block of the order. Pages: their number. Slab: its first frame.
    a: AtomicU32,
    /// Free: the previous free block of the order. Slab: the index of its cache.
    b: AtomicU32,
    pub(crate) c: AtomicU32,
    pub(crate) d: AtomicU32,
}

const NOBODY: u32 = 0;
const PAGES: u32 = 1;
const SLAB: u32 = 2;
/// Plus the order.
const FREE: u32 = 0x100;

impl Record {
    pub(crate) fn owner(&self) -> Owner {
        let (a, b) = (self.a.load(Ordering::Relaxed), self.b.load(Ordering::Relaxed));
        match self.kind.load(Ordering::Relaxed) {
            NOBODY => Owner::Nobody,
            PAGES => Owner::Pages(a),
            SLAB => Owner::Slab { order: Order::new(a).unwrap_or(Order::ZERO), cache: b },
            free => match Order::new(free.wrapping_sub(FREE)) {
                Some(order) => Owner::Free(order),
                None => Owner::Nobody,
            },
        }
    }

    pub(crate) fn set_owner(&self, owner: Owner) {
        let (kind, a, b) = match owner {
            Owner::Nobody => (NOBODY, 0, 0),
            Owner::Free(order) => (FREE + order.get(), Frame::NONE, Frame::NONE),
            Owner::Pages(count) => (PAGES, count, 0),
            Owner::Slab { order, cache } => (SLAB, order.get(), cache),
        };
        self.a.store(a, Ordering::Relaxed);
        self.b.store(b, Ordering::Relaxed);
        self.kind.store(kind, Ordering::Relaxed);
    }

    /// The neighbours of a free block in its list, next and previous.
    pub(crate) fn links(&self) -> (Option<Frame>, Option<Frame>) {
        (Frame::some(self.a.load(Ordering::Relaxed)), Frame::some(self.b.load(Ordering::Relaxed)))
    }

    pub(crate) fn set_next(&self, frame: Option<Frame>) {
        self.a.store(frame.map_or(Frame::NONE, Frame::number), Ordering::Relaxed);
    }

    pub(crate) fn set_previous(&self, frame: Option<Frame>) {
        self.b.store(frame.map_or(Frame::NONE, Frame::number), Ordering::Relaxed);
    }
}

/// The records of one section: of its frames from `first` on.
#[derive(Debug)]
pub(crate) struct Section {
    pub(crate) first: u32,
    pub(crate) records: &'static [Record],
}

/// All frame records.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) sections: &'static [Section],
    /// Frames that this metadata takes.
    pub(crate) overhead: u32,
}

impl Records {
    /// The record of `frame`; `None` where it is not memory.
    pub(crate) fn get(&self, frame: Frame) -> Option<&'static Record> {
        let section = self.sections.get((frame.number() / SECTION_FRAMES) as usize)?;
        section.records.get(frame.number().checked_sub(section.first)? as usize)
    }

    /// Who owns `frame`.
    pub(crate) fn owner(&self, frame: Frame) -> Owner {
        self.get(frame).map_or(Owner::Nobody, Record::owner)
    }

    /// Changes who owns `frame`, which has a record.
    pub(crate) fn set_owner(&self, frame: Frame, owner: Owner) {
        if let Some(record) = self.get(frame) {
            record.set_owner(owner);
        }
    }
}
