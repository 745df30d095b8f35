//! Page frames: the buddy allocator that everything else takes its memory from.
//!
//! [`Frames`] hands out blocks of 2^k frames, and runs of any number of frames whose tail it takes back at once. One
//! record a frame ([`record`]) says who owns it; the buddy system itself is in [`zone`].
//!
//! Lock: one around the zone, the innermost of all. Who owns a frame may be asked without it.

mod init;
mod record;
#[cfg(test)]
mod tests;
mod types;
mod zone;

use core::ops::Range;

pub use init::InitError;
pub use types::{Frame, Order};

pub(crate) use record::Owner;

use crate::fault::Fault;
use crate::inject::Injection;
use crate::lock::IrqLock;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::stats::FrameStats;
use record::Records;
use zone::Zone;

/// The page-frame allocator.
///
/// Empty until [`Heap::init`](crate::Heap::init) gives it the memory map; until then every request fails.
#[derive(Debug)]
pub struct Frames<P> {
    memory: spin::Once<Memory>,
    zone: IrqLock<P, Zone>,
    injection: Injection,
}

/// What does not change after `init`.
#[derive(Debug)]
struct Memory {
    /// The virtual address of the physical address 0.
    base: *mut u8,
    records: Records,
}

// SAFETY: `base` is only a number to add to; what it points to is shared under the rules of the records.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl<P> Frames<P> {
    pub(crate) const fn new() -> Self {
        Self { memory: spin::Once::new(), zone: IrqLock::new(Zone::new()), injection: Injection::new() }
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
        let base = self.memory.get().map_or(core::ptr::null_mut(), |memory| memory.base);
        base.wrapping_add(frame.address() as usize)
    }

    /// The frame that `pointer` points into; `None` where there can be none.
    #[inline]
    pub(crate) fn frame_of(&self, pointer: *const u8) -> Option<Frame> {
        let memory = self.memory.get()?;
        Frame::containing(pointer.addr().wrapping_sub(memory.base.addr()) as u64)
    }

    /// Who owns `frame`, now; it can change at any time unless the caller owns it.
    #[inline]
    pub(crate) fn owner(&self, frame: Frame) -> Owner {
        self.records().map_or(Owner::Nobody, |records| records.owner(frame))
    }

    /// Why a free of something that starts in `frame` is wrong, where no allocation starts there: the block around the frame
    /// is free, or allocated, or there is none.
    #[cold]
    pub(crate) fn fault_at(&self, frame: Frame) -> Fault {
        for order in Order::ZERO.and_up() {
            let start = frame.block_start(order);
            match self.owner(start) {
                Owner::Free(size) if size >= order => return Fault::DoubleFree,
                Owner::Pages(count) if frame < start.offset(count) => return Fault::BadBase,
                Owner::Slab { .. } if start == frame => return Fault::BadBase,
                _ => {}
            }
        }
        Fault::BadAddress
    }

    fn records(&self) -> Option<&Records> {
        self.memory.get().map(|memory| &memory.records)
    }
}

impl<P: Platform> Frames<P> {
    /// A block of 2^`order` frames, aligned to its size; `None` where there is none.
    pub fn allocate(&self, order: Order) -> Option<Frame> {
        let records = self.records().filter(|_| !self.refuse())?;
        self.zone.lock().allocate(records, order)
    }

    /// Frees a block that [`allocate`](Self::allocate) returned.
    ///
    /// A block that is not allocated, or has another order, is refused with a report: see *Bad frees* in the crate's documentation.
    ///
    /// # Safety
    ///
    /// Nobody uses the block any more.
    pub unsafe fn free(&self, frame: Frame, order: Order) {
        // SAFETY: passed on to the caller.
        unsafe { self.free_run(frame, order.frames()) }
    }

    /// `count` frames in a row, the first aligned to `alignment`. `None` where there are none, or `count` is 0.
    ///
    /// No more than `count` frames are taken, whatever the order of the block that they were cut from.
    pub fn allocate_run(&self, count: u32, alignment: Order) -> Option<Frame> {
        let records = self.records().filter(|_| !self.refuse())?;
        let order = Order::containing(count)?.max(alignment);
        let mut zone = self.zone.lock();
        let frame = zone.allocate(records, order)?;
        records.set_owner(frame, Owner::Pages(count));
        zone.free_range(records, frame.offset(count)..frame.offset(order.frames()));
        Some(frame)
    }

    /// Frees `count` frames that [`allocate_run`](Self::allocate_run) returned.
    ///
    /// Frames that are not allocated, or not so many, are refused with a report: see *Bad frees* in the crate's documentation.
    ///
    /// # Safety
    ///
    /// Nobody uses the frames any more.
    pub unsafe fn free_run(&self, frame: Frame, count: u32) {
        self.try_shrink_run(frame, count, 0).unwrap_or_else(|fault| fault.report(self.pointer(frame)));
    }

    /// Gives all but the first `keep` of the `count` frames at `frame` back. A `frame` that is not allocated, or not with
    /// just `count` frames, is a fault, and nothing has changed.
    pub(crate) fn try_shrink_run(&self, frame: Frame, count: u32, keep: u32) -> Result<(), Fault> {
        let records = self.records().ok_or(Fault::BadAddress)?;
        let mut zone = self.zone.lock();
        match records.owner(frame) {
            Owner::Pages(found) if found == count => {}
            Owner::Pages(found) => {
                return Err(Fault::BadFrameCount { freed: count, allocated: found });
            }
            _ => return Err(self.fault_at(frame)),
        }
        records.set_owner(frame, if keep == 0 { Owner::Nobody } else { Owner::Pages(keep) });
        zone.free_range(records, frame.offset(keep)..frame.offset(count));
        Ok(())
    }

    pub(crate) fn make_slab(&self, first: Frame, count: u32, cache: u32, header: (Frame, u32)) {
        let order = Order::containing(count).unwrap();
        self.set_owner(first..first.offset(count), Owner::Slab { order, cache });
        let record = self.records().unwrap().get(first).unwrap();
        record.c.store(header.0.number(), core::sync::atomic::Ordering::Relaxed);
        record.d.store(header.1, core::sync::atomic::Ordering::Relaxed);
    }
    pub(crate) fn slab_header(&self, first: Frame) -> (Frame, u32) {
        let record = self.records().unwrap().get(first).unwrap();
        (
            Frame::new(record.c.load(core::sync::atomic::Ordering::Relaxed)),
            record.d.load(core::sync::atomic::Ordering::Relaxed),
        )
    }
    pub(crate) fn free_slab(&self, first: Frame, count: u32) {
        let Some(records) = self.records() else { return };
        let frames = first..first.offset(count);
        self.set_owner(frames.clone(), Owner::Nobody);
        self.zone.lock().free_range(records, frames);
    }
    pub(crate) fn below_low(&self) -> bool {
        false
    }
    pub(crate) fn below_high(&self) -> bool {
        false
    }
    pub(crate) fn drain_stock(&self) {}
    pub(crate) fn verify(&self) -> Result<(), crate::verify::Broken> {
        Ok(())
    }
    /// Calls `visit` with each run of frames that is allocated as such, and its length, with no lock held.
    pub(crate) fn for_each_pages(&self, mut visit: impl FnMut(Frame, u32)) {
        for section in self.records().map_or(&[][..], |records| records.sections) {
            for (record, number) in section.records.iter().zip(section.first..) {
                if let Owner::Pages(count) = record.owner() {
                    visit(Frame::new(number), count);
                }
            }
        }
    }
    /// Bytes.
    pub fn total_bytes(&self) -> usize {
        self.zone.lock().total_frames() * FRAME_SIZE
    }

    fn set_owner(&self, mut frames: Range<Frame>, owner: Owner) {
        let Some(records) = self.records() else { return };
        while frames.start < frames.end {
            records.set_owner(frames.start, owner);
            frames.start = frames.start.offset(1);
        }
    }

    /// Counts, as of one moment.
    pub fn stats(&self) -> FrameStats {
        let overhead = self.records().map_or(0, |records| records.overhead as usize);
        let zone = self.zone.lock();
        FrameStats {
            total: zone.total_frames() + overhead,
            metadata: overhead,
            free: zone.free_frames(),
            free_blocks: zone.free_blocks(),
        }
    }

    /// Bytes that are free now.
    pub fn free_bytes(&self) -> usize {
        self.zone.lock().free_frames() * FRAME_SIZE
    }
}
