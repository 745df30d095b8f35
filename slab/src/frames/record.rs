//! The frame record: sixteen bytes for each page frame that say who owns it.
//!
//! The fields are atomic, so that anybody may ask who owns a frame, with no lock held. The kind of owner, and the order,
//! the cache's number or the count of frames, are one word, so that a reader never sees a mix of two owners.
//!
//! Invariants:
//! 1. A record is written only by who owns the frame: for a free or loose frame the holder of its zone's lock, for one in
//!    a CPU's stock that CPU, for an allocated one whoever gives it back, for a slab's frame the holder of its cache's lock.
//! 2. The first frame of a free block and of an allocation says so, and their other frames say [`Owner::Inner`]. Every
//!    frame of a slab says [`Owner::Slab`].
//! 3. Only one of two that give the same frames back at once can: [`Record::claim`] is an atomic exchange.

#![forbid(unsafe_code)]

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicU32};

use super::{Frame, Order};

/// Who owns a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// No memory of this allocator.
    Unmanaged,
    /// Managed, and not the first frame of anything.
    Inner,
    /// The allocator's own records and tables.
    Records,
    /// The buddy system: the first frame of a free block.
    Free(Order),
    /// A stock, a CPU's of single frames or a zone's of larger blocks: the first frame of a block.
    Stock(Order),
    /// Nobody: the first of so many frames that were freed in an NMI.
    Deferred(u32),
    /// Nobody: a single frame that is freed together with others, and on its way to its zone.
    Loose,
    /// Whoever allocated it: the first of so many frames.
    Pages(u32),
    /// The same, allocated by the caches above for themselves.
    Metadata(u32),
    /// A cache: part of a slab, which starts at the frame's [`block_start`](Frame::block_start) of `order`.
    Slab { order: Order, cache: u32 },
}

/// The record of one frame. All bytes zero is [`Owner::Inner`].
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Record {
    /// See [`Owner::word`].
    owner: AtomicU32,
    /// Freed in an NMI: the link in the list of such runs. Slab: the lower half of the address of its first slot.
    link: AtomicU32,
    /// Free: in place of an address the next free block of the order, and in the upper half the previous one. Slab: its header.
    place: AtomicPtr<u8>,
}

/// Where a slab is, as the records of its frames say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlabPlace {
    pub(crate) header: *mut u8,
    /// The lower half of the address of the first slot.
    pub(crate) first_slot: u32,
}

const _: () = assert!(size_of::<Record>() == 16);

const INNER: u32 = 0;
const UNMANAGED: u32 = 1;
const RECORDS: u32 = 2;
const FREE: u32 = 3;
const STOCK: u32 = 4;
const PAGES: u32 = 5;
const SLAB: u32 = 6;
const DEFERRED: u32 = 7;

/// In place of an order, with [`PAGES`].
const IS_METADATA: u32 = 1;
/// In place of an order, with [`DEFERRED`].
const IS_LOOSE: u32 = 1;

/// What the record of each frame of a cache's slabs says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlabOwner(u32);

impl SlabOwner {
    /// No frame's record says so.
    pub(crate) const NONE: Self = Self(u32::MAX);

    /// For slabs of so many frames.
    pub(crate) const fn new(cache: u32, order: Order) -> Self {
        Self(Owner::Slab { order, cache }.word())
    }
}

const KIND_BITS: u32 = 3;
const ORDER_BITS: u32 = 5;
const NUMBER_SHIFT: u32 = KIND_BITS + ORDER_BITS;

impl Owner {
    /// No allocation has more frames: 64 GiB less one.
    pub(crate) const MOST: u32 = u32::MAX >> NUMBER_SHIFT;

    /// From the least significant bit up: kind, order, and cache or count.
    #[inline]
    const fn word(self) -> u32 {
        let (kind, order, number) = match self {
            Self::Inner => (INNER, 0, 0),
            Self::Unmanaged => (UNMANAGED, 0, 0),
            Self::Records => (RECORDS, 0, 0),
            Self::Free(order) => (FREE, order.get(), 0),
            Self::Stock(order) => (STOCK, order.get(), 0),
            Self::Pages(count) => (PAGES, 0, count),
            Self::Metadata(count) => (PAGES, IS_METADATA, count),
            Self::Slab { order, cache } => (SLAB, order.get(), cache),
            Self::Deferred(count) => (DEFERRED, 0, count),
            Self::Loose => (DEFERRED, IS_LOOSE, 0),
        };
        kind | order << KIND_BITS | number << NUMBER_SHIFT
    }

    #[inline]
    const fn of_word(word: u32) -> Self {
        let (order, number) = (word >> KIND_BITS & ((1 << ORDER_BITS) - 1), word >> NUMBER_SHIFT);
        match (word & ((1 << KIND_BITS) - 1), Order::new(order)) {
            (INNER, _) => Self::Inner,
            (RECORDS, _) => Self::Records,
            (STOCK, Some(order)) => Self::Stock(order),
            (PAGES, _) if order == IS_METADATA => Self::Metadata(number),
            (PAGES, _) => Self::Pages(number),
            (DEFERRED, _) if order == IS_LOOSE => Self::Loose,
            (DEFERRED, _) => Self::Deferred(number),
            (FREE, Some(order)) => Self::Free(order),
            (SLAB, Some(order)) => Self::Slab { order, cache: number },
            _ => Self::Unmanaged,
        }
    }
}

impl Record {
    /// Of a frame inside something.
    pub(crate) const fn inner() -> Self {
        Self::new(Owner::Inner)
    }

    /// Of a frame that is no memory of this allocator.
    pub(crate) const fn unmanaged() -> Self {
        Self::new(Owner::Unmanaged)
    }

    const fn new(owner: Owner) -> Self {
        let place = AtomicPtr::new(core::ptr::null_mut());
        Self { owner: AtomicU32::new(owner.word()), link: AtomicU32::new(0), place }
    }

    #[inline]
    pub(crate) fn owner(&self) -> Owner {
        Owner::of_word(self.owner.load(Relaxed))
    }

    /// Whether it is just this owner.
    #[inline]
    pub(crate) fn is(&self, owner: Owner) -> bool {
        self.owner.load(Relaxed) == owner.word()
    }

    #[inline]
    pub(crate) fn set_owner(&self, owner: Owner) {
        self.owner.store(owner.word(), Relaxed);
    }

    /// From the first of just `count` allocated frames to `to`; `false`, and nothing done, where it is not that. Of
    /// several that try at once, one succeeds.
    #[inline]
    pub(crate) fn claim(&self, count: u32, to: Owner) -> bool {
        let from = Owner::Pages(count).word();
        count <= Owner::MOST && self.owner.compare_exchange(from, to.word(), Relaxed, Relaxed).is_ok()
    }

    /// Makes it that of a frame of a slab that is there.
    pub(crate) fn set_slab(&self, owner: Owner, place: SlabPlace) {
        self.link.store(place.first_slot, Relaxed);
        self.place.store(place.header, Relaxed);
        self.owner.store(owner.word(), Release);
    }

    /// Where the slab is, if the frame is part of one of `owner`.
    #[inline]
    pub(crate) fn slab_of(&self, owner: SlabOwner) -> Option<SlabPlace> {
        let place = self.slab_place();
        // Only now: then a bad free that comes while the slab leaves does not take for a place what its record says next.
        (self.owner.load(Relaxed) == owner.0).then_some(place)
    }

    /// Where the slab is, if the frame is part of one.
    #[inline]
    pub(crate) fn slab_place(&self) -> SlabPlace {
        SlabPlace { header: self.place.load(Acquire), first_slot: self.link.load(Acquire) }
    }

    /// The link in a list of what was freed in an NMI.
    pub(crate) fn link(&self) -> &AtomicU32 {
        &self.link
    }

    /// The neighbours of a free block in its list.
    pub(crate) fn next(&self) -> Option<Frame> {
        Frame::some(self.neighbours() as u32)
    }

    pub(crate) fn previous(&self) -> Option<Frame> {
        Frame::some((self.neighbours() >> u32::BITS) as u32)
    }

    pub(crate) fn set_next(&self, frame: Option<Frame>) {
        self.set_neighbours(frame, self.previous());
    }

    pub(crate) fn set_previous(&self, frame: Option<Frame>) {
        self.set_neighbours(self.next(), frame);
    }

    fn neighbours(&self) -> usize {
        self.place.load(Relaxed).addr()
    }

    /// Both; the holder of the zone's lock alone writes them.
    fn set_neighbours(&self, next: Option<Frame>, previous: Option<Frame>) {
        let number = |frame: Option<Frame>| frame.map_or(Frame::NONE, Frame::number) as usize;
        let neighbours = number(previous) << u32::BITS | number(next);
        self.place.store(core::ptr::without_provenance_mut(neighbours), Relaxed);
    }
}
