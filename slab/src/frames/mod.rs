//! Page frames: the buddy allocator that everything else takes its memory from.
//!
//! [`Frames`] hands out blocks of 2^k frames, and runs of any number of frames. A [`record`] for each frame says who
//! owns it, and [`records`] finds it. Memory is in three [`zones`], each a buddy system of its own ([`zone`]), and in
//! front of them each CPU has a [`stock`] of single frames.
//!
//! | what is asked for | what is tried, one after the other |
//! |---|---|
//! | a single frame | the CPU's stock; the zones, for half a stock at once |
//! | a block of order 1 to 9 | the zone's stock of freed blocks that have not merged; the zones |
//! | anything else | the zones |
//! | of a zone | a free block is cut; what waits unmerged merges; records of more memory are set up; free blocks that follow each other |
//!
//! Locks: one a zone, the innermost of all. Who owns a frame may be asked without one. Memory is added and taken away
//! by one caller at a time, without a lock: a second one is refused (`changing`). In an NMI locks are only tried, and
//! what is freed waits in a list ([`deferred`]).

mod allocate;
mod block;
mod deferred;
mod init;
mod lend;
mod record;
mod records;
mod regions;
mod stock;
#[cfg(test)]
mod tests;
mod types;
mod verify;
#[cfg(feature = "x86_64")]
mod x86_64;
mod zone;
mod zones;

use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicBool, AtomicPtr, AtomicUsize};
use core::fmt;

pub use block::FrameBlock;
pub use init::InitError;
pub use regions::{AddError, RemoveError};
pub use types::{Frame, Order};

pub(crate) use deferred::{Deferred, NOT_LISTED, unlink};
pub(crate) use record::{Owner, SlabOwner, SlabPlace};

use crate::fault::{Caller, Fault, Faults, Report};
use crate::inject::Injection;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::stats::FrameStats;
use records::Records;
use stock::Stocks;
use zones::{DEFAULT_BOUNDARIES, Zones};

pub(crate) use zones::{HIGHEST, ZONES};

/// The page-frame allocator.
///
/// Empty until [`Heap::init`](crate::Heap::init) gives it the memory map; until then every request fails.
pub struct Frames<P> {
    /// The virtual address of the physical address 0. Set before the first memory is managed.
    base: AtomicPtr<u8>,
    injection: Injection,
    /// Those of the allocator above, too.
    pub(crate) faults: Faults,
    records: Records,
    zones: Zones<P>,
    stocks: Stocks<P>,
    /// Runs that were freed in an NMI.
    deferred: Deferred,
    /// Of each zone but the highest: a request below its end has come since somebody last looked.
    asked: [AtomicBool; ZONES - 1],
    /// Frames of all zones, to be asked without a lock.
    managed: AtomicUsize,
    /// Frames that records and tables take.
    metadata: AtomicUsize,
    /// Memory is being added or taken away.
    changing: AtomicBool,
}

impl<P> Frames<P> {
    pub(crate) const fn new() -> Self {
        Self::with_zones(DEFAULT_BOUNDARIES)
    }

    /// The same, with zones that meet at these physical addresses.
    pub(crate) const fn with_zones(boundaries: [u64; ZONES - 1]) -> Self {
        Self {
            base: AtomicPtr::new(core::ptr::null_mut()),
            injection: Injection::new(),
            faults: Faults::new(),
            records: Records::new(),
            zones: Zones::new(boundaries),
            stocks: Stocks::new(),
            deferred: Deferred::new(),
            asked: [const { AtomicBool::new(false) }; _],
            managed: AtomicUsize::new(0),
            metadata: AtomicUsize::new(0),
            changing: AtomicBool::new(false),
        }
    }

    /// What makes requests for page frames fail, for the heap above and for whoever asks directly.
    #[cfg(feature = "fault-injection")]
    pub const fn injector(&self) -> &crate::Injector {
        self.injection.injector()
    }

    /// How many requests were refused on purpose.
    pub(crate) fn refusals(&self) -> u64 {
        self.injection.refusals()
    }

    /// Whether this request is to fail on purpose.
    fn refuse(&self) -> bool {
        self.injection.refuse()
    }

    /// The virtual address at which `frame` is mapped; dangling before `init`.
    ///
    /// The bytes of the frame belong to whoever has allocated it.
    #[inline]
    pub fn pointer(&self, frame: Frame) -> *mut u8 {
        self.base.load(Relaxed).wrapping_add(frame.address() as usize)
    }

    /// The frame that `pointer` points into; `None` where there can be none.
    #[inline]
    pub(crate) fn frame_of(&self, pointer: *const u8) -> Option<Frame> {
        Frame::containing(pointer.addr().wrapping_sub(self.base.load(Relaxed).addr()) as u64)
    }

    /// Who owns `frame`, now; it can change at any time unless the caller owns it.
    #[inline]
    pub(crate) fn owner(&self, frame: Frame) -> Owner {
        self.records.owner(frame)
    }

    /// Where the slab is that `frame` is part of, if it is one of `owner`.
    #[inline]
    pub(crate) fn slab_of(&self, frame: Frame, owner: SlabOwner) -> Option<SlabPlace> {
        self.records.get(frame)?.slab_of(owner)
    }

    /// Where the slab is that `pointer` points into, if it is one of `owner`: in the fewest steps. What is not in the largest
    /// range of memory is not found.
    #[inline]
    pub(crate) fn slab_around(&self, pointer: *const u8, owner: SlabOwner) -> Option<SlabPlace> {
        self.records.direct(pointer, |record| record.slab_of(owner))
    }

    /// Why a free of `pointer` is wrong, where no allocation starts there.
    #[cold]
    pub(crate) fn fault_of(&self, pointer: *const u8) -> Fault {
        self.frame_of(pointer).map_or(Fault::BadAddress, |frame| self.fault_at(frame))
    }

    /// Why a free of something that starts in `frame` is wrong, where no allocation starts there: the block around the
    /// frame is free, or allocated, or there is none.
    #[cold]
    pub(crate) fn fault_at(&self, frame: Frame) -> Fault {
        match self.owner(frame) {
            Owner::Unmanaged if self.records.later().iter().any(|later| later.contains(&frame)) => Fault::DoubleFree,
            Owner::Unmanaged | Owner::Records | Owner::Metadata(_) => Fault::BadAddress,
            Owner::Free(_) | Owner::Stock(_) | Owner::Deferred(_) | Owner::Loose => Fault::DoubleFree,
            Owner::Pages(_) | Owner::Slab { .. } => Fault::BadBase,
            Owner::Inner => {
                let in_free_block = |order| {
                    let owner = self.owner(frame.block_start(order));
                    matches!(owner, Owner::Free(size) | Owner::Stock(size) if size >= order)
                };
                if Order::ZERO.and_up().any(in_free_block) { Fault::DoubleFree } else { Fault::BadBase }
            }
        }
    }
}

impl<P: Platform> Frames<P> {
    /// Reports a fault of page frames. It returns where the embedder wants to go on.
    #[cold]
    pub(crate) fn report(&self, fault: Fault, frame: Frame, caller: Caller) {
        let now = self.faults.event::<P>(caller);
        self.faults.report::<P>(&Report::new(fault, self.pointer(frame), now));
    }

    /// Counts, as of one moment for the zones; those of the stocks can have changed meanwhile. Where a zone cannot be
    /// looked at, since this is an NMI or the kernel stops, the counts of all zones are 0.
    pub fn stats(&self) -> FrameStats {
        let zones = self.zones.stats(&self.records);
        let stocked = self.stocks.frames();
        FrameStats {
            total: zones.iter().map(|zone| zone.total).sum(),
            metadata: self.metadata.load(Relaxed),
            free: zones.iter().map(|zone| zone.free).sum::<usize>() + stocked,
            stocked,
            free_blocks: core::array::from_fn(|order| zones.iter().map(|zone| zone.free_blocks[order]).sum()),
            zones,
        }
    }

    /// Bytes that are managed: free, allocated, or the allocator's own. One load.
    pub fn total_bytes(&self) -> usize {
        self.managed.load(Relaxed) * FRAME_SIZE
    }

    /// Bytes that are free now.
    pub fn free_bytes(&self) -> usize {
        self.free_frames() * FRAME_SIZE
    }

    /// To be called when frames have come or gone.
    fn update_managed(&self) {
        let managed = self.zones.update();
        self.managed.store(managed, Relaxed);
        self.stocks.set_capacity(managed);
    }

    fn free_frames(&self) -> usize {
        self.zones.free_and_watermarks(HIGHEST).0 + self.stocks.frames()
    }

    /// Whether fewer frames are free than the low watermarks of all zones say together: there is pressure.
    pub fn below_low(&self) -> bool {
        self.zone_below_low(HIGHEST)
    }

    /// Whether fewer frames are free than the high watermarks of all zones say together: pressure that has begun goes on.
    pub fn below_high(&self) -> bool {
        self.zone_below_high(HIGHEST)
    }

    /// The same for a zone, by its number, and those below it: what a request below its end can be served from. A zone
    /// alone says nothing, since requests that can live with the highest use that one up first.
    pub(crate) fn zone_below_low(&self, zone: usize) -> bool {
        let (free, low, _) = self.zones.free_and_watermarks(zone);
        free < low && free + self.stocked(zone) < low
    }

    pub(crate) fn zone_below_high(&self, zone: usize) -> bool {
        let (free, _, high) = self.zones.free_and_watermarks(zone);
        free < high && free + self.stocked(zone) < high
    }

    /// The lowest zone is not stocked.
    fn stocked(&self, zone: usize) -> usize {
        if zone == 0 { 0 } else { self.stocks.frames() }
    }

    /// Whether a request below the end of this zone has come since the last call. For the highest it always has.
    pub(crate) fn take_asked(&self, zone: usize) -> bool {
        self.asked.get(zone).is_none_or(|asked| asked.swap(false, Relaxed))
    }
}

impl<P> fmt::Debug for Frames<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").finish_non_exhaustive()
    }
}
