//! The frame record: sixteen bytes for each page frame that say who owns it.
//!
//! The fields are atomic, so that anybody may ask who owns a frame, with no lock held. The kind of owner, the order and
//! the cache's number are one word, so that a reader never sees a mix of two owners.
//!
//! Invariants:
//! 1. A record is written only by who owns the frame: for a free frame the holder of its zone's lock, for one in a stock
//!    the stock's CPU, for an allocated one whoever gives it back, for a slab's frame the holder of its cache's lock.
//! 2. The first frame of a free block and of an allocation says so, and their other frames say [`Owner::Inner`]. Every
//!    frame of a slab says [`Owner::Slab`].
//! 3. Only one of two that give the same frames back at once can: [`Record::claim`] is an atomic exchange.

#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, Ordering::Relaxed};

use super::deferred::NOT_LISTED;
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
    /// A CPU's stock of single frames.
    Stock,
    /// Nobody: the first of so many frames that were freed in an NMI.
    Deferred(u32),
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
    /// Kind, order and cache: see [`pack`].
    owner: AtomicU32,
    /// Of the first frame of an allocation: how many frames it has. Slab's first frame: its link in a list of slabs with
    /// objects that were freed in an NMI.
    count: AtomicU32,
    /// Free: the next free block of the order. Freed in an NMI: the link in the list of those. Slab's first frame: the
    /// frame of its header.
    a: AtomicU32,
    /// Free: the previous free block of the order. Slab's first frame: where in that frame the header is, in bytes.
    b: AtomicU32,
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

/// What the record of each frame of a cache's slabs says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlabOwner(u32);

impl SlabOwner {
    /// No frame's record says so.
    pub(crate) const NONE: Self = Self(u32::MAX);

    /// For slabs of so many frames.
    pub(crate) const fn new(cache: u32, order: Order) -> Self {
        Self(pack(SLAB, order.get(), cache))
    }
}

const KIND_BITS: u32 = 3;
const ORDER_BITS: u32 = 5;

/// From the least significant bit up: kind, order, cache.
const fn pack(kind: u32, order: u32, cache: u32) -> u32 {
    kind | order << KIND_BITS | cache << (KIND_BITS + ORDER_BITS)
}

impl Record {
    /// Of a frame inside something.
    pub(crate) const fn inner() -> Self {
        Self::with_kind(INNER)
    }

    /// Of a frame that is no memory of this allocator.
    pub(crate) const fn unmanaged() -> Self {
        Self::with_kind(UNMANAGED)
    }

    const fn with_kind(kind: u32) -> Self {
        Self {
            owner: AtomicU32::new(pack(kind, 0, 0)),
            count: AtomicU32::new(0),
            a: AtomicU32::new(0),
            b: AtomicU32::new(0),
        }
    }

    #[inline]
    pub(crate) fn owner(&self) -> Owner {
        let word = self.owner.load(Relaxed);
        let order = Order::new(word >> KIND_BITS & ((1 << ORDER_BITS) - 1));
        match (word & ((1 << KIND_BITS) - 1), order) {
            (INNER, _) => Owner::Inner,
            (RECORDS, _) => Owner::Records,
            (STOCK, _) => Owner::Stock,
            (PAGES, order) if order == Order::new(IS_METADATA) => Owner::Metadata(self.count()),
            (PAGES, _) => Owner::Pages(self.count()),
            (DEFERRED, _) => Owner::Deferred(self.count()),
            (FREE, Some(order)) => Owner::Free(order),
            (SLAB, Some(order)) => Owner::Slab { order, cache: word >> (KIND_BITS + ORDER_BITS) },
            _ => Owner::Unmanaged,
        }
    }

    /// Whether the frame is part of a slab of such an owner.
    #[inline]
    pub(crate) fn is_of(&self, owner: SlabOwner) -> bool {
        self.owner.load(Relaxed) == owner.0
    }

    #[inline]
    pub(crate) fn set_owner(&self, owner: Owner) {
        if let Owner::Pages(count) | Owner::Metadata(count) | Owner::Deferred(count) = owner {
            self.count.store(count, Relaxed);
        }
        self.owner.store(
            match owner {
                Owner::Unmanaged => UNMANAGED,
                Owner::Inner => INNER,
                Owner::Records => RECORDS,
                Owner::Free(order) => pack(FREE, order.get(), 0),
                Owner::Stock => STOCK,
                Owner::Pages(_) => PAGES,
                Owner::Metadata(_) => pack(PAGES, IS_METADATA, 0),
                Owner::Deferred(_) => DEFERRED,
                Owner::Slab { order, cache } => pack(SLAB, order.get(), cache),
            },
            Relaxed,
        );
    }

    /// From the first of just `count` allocated frames to [`Owner::Inner`]; `false`, and nothing done, where it is not
    /// that. Of several that try at once, one succeeds.
    #[inline]
    pub(crate) fn claim(&self, count: u32) -> bool {
        if self.count() != count || self.owner.compare_exchange(PAGES, INNER, Relaxed, Relaxed).is_err() {
            return false;
        }
        // Another one can have freed the run, and a third allocated a shorter one, since the count was read.
        let same = self.count() == count;
        if !same {
            self.owner.store(PAGES, Relaxed);
        }
        same
    }

    /// Frames of the allocation that starts here.
    #[inline]
    pub(crate) fn count(&self) -> u32 {
        self.count.load(Relaxed)
    }

    /// Makes it that of a slab's first frame; the owner is still to be set.
    pub(crate) fn set_header(&self, (frame, offset): (Frame, u32)) {
        self.count.store(NOT_LISTED, Relaxed);
        self.a.store(frame.number(), Relaxed);
        self.b.store(offset, Relaxed);
    }

    /// Of a slab's first frame: where its header is.
    #[inline]
    pub(crate) fn header(&self) -> (Frame, u32) {
        (Frame::new(self.a.load(Relaxed)), self.b.load(Relaxed))
    }

    /// The link of a slab with objects that were freed in an NMI.
    pub(crate) fn slab_link(&self) -> &AtomicU32 {
        &self.count
    }

    /// The link of a run that was freed in an NMI.
    pub(crate) fn run_link(&self) -> &AtomicU32 {
        &self.a
    }

    /// The neighbours of a free block in its list.
    pub(crate) fn next(&self) -> Option<Frame> {
        Frame::some(self.a.load(Relaxed))
    }

    pub(crate) fn previous(&self) -> Option<Frame> {
        Frame::some(self.b.load(Relaxed))
    }

    pub(crate) fn set_next(&self, frame: Option<Frame>) {
        self.a.store(frame.map_or(Frame::NONE, Frame::number), Relaxed);
    }

    pub(crate) fn set_previous(&self, frame: Option<Frame>) {
        self.b.store(frame.map_or(Frame::NONE, Frame::number), Relaxed);
    }
}
