//! Allocating and freeing page frames.

use core::panic::Location;

use super::zone::Request;
use super::zones::AllZones;
use super::{Frame, Frames, Order, Owner, SlabPlace, unlink};
use crate::fault::Fault;
use crate::platform::{Platform, in_nmi};
use crate::sync::Ordering::Relaxed;

const NO_LIMIT: Frame = Frame::new(Frame::LIMIT);

impl<P: Platform> Frames<P> {
    /// A block of 2^`order` frames, aligned to its size; `None` where there is none.
    #[inline]
    pub fn allocate(&self, order: Order) -> Option<Frame> {
        self.allocate_run(order.frames(), order)
    }

    /// Frees a block that [`allocate`](Self::allocate) returned.
    ///
    /// A block that is not allocated, or has another order, is refused with a report: see *Bad frees* in the crate's
    /// documentation. At worst half a stock, 20 single frames, goes to the zone, and each merges 18 times.
    ///
    /// # Safety
    ///
    /// Nobody uses the block any more.
    #[inline]
    #[track_caller]
    pub unsafe fn free(&self, frame: Frame, order: Order) {
        // SAFETY: passed on to the caller.
        unsafe { self.free_run(frame, order.frames()) }
    }

    /// `count` frames in a row, the first aligned to `alignment`. `None` where there are none, where `count` is 0, or more than
    /// the largest order has.
    ///
    /// No more than `count` frames are taken.
    ///
    /// At worst, each zone that is asked merges the up to 72 blocks that wait unmerged, cuts a block 18 times, sets up
    /// records, in steps of 2 MiB, until there is a large enough block, and looks at 1024 free blocks.
    #[inline]
    pub fn allocate_run(&self, count: u32, alignment: Order) -> Option<Frame> {
        if self.refuse() {
            return None;
        }
        self.serve(count, alignment)
    }

    #[inline]
    pub(super) fn serve(&self, count: u32, alignment: Order) -> Option<Frame> {
        if count == 1 && alignment == Order::ZERO {
            return self.take_stocked().or_else(|| self.serve_single());
        }
        self.serve_block(count, alignment)
    }

    #[cold]
    fn serve_single(&self) -> Option<Frame> {
        self.refill().or_else(|| self.serve_block(1, Order::ZERO))
    }

    #[inline(never)]
    fn serve_block(&self, count: u32, alignment: Order) -> Option<Frame> {
        let waiting = block_order(count)
            .filter(|order| *order >= alignment)
            .and_then(|order| self.zones.take_stocked(&self.records, order));
        waiting.or_else(|| self.serve_without_limit(count, alignment))
    }

    #[inline(never)]
    fn serve_without_limit(&self, count: u32, alignment: Order) -> Option<Frame> {
        self.serve_from_zones(&Request::new(count, alignment, NO_LIMIT)?)
    }

    fn serve_from_zones(&self, request: &Request) -> Option<Frame> {
        self.take_in_deferred();
        let serve = || self.zones.allocate(&self.records, request);
        let served = serve().or_else(|| if self.drain_stock() > 0 { serve() } else { None });
        self.report_damage();
        served
    }

    /// Reports a record that was found overwritten, now that no lock is held.
    fn report_damage(&self) {
        if let Some(frame) = self.records.take_damage() {
            self.report(Fault::BadControl, frame, None);
        }
    }

    /// As [`allocate_run`](Self::allocate_run), and all of it below the physical address `limit`, for devices that
    /// reach no further.
    ///
    /// A limit at a boundary of zones (16 MiB, 4 GiB) takes no longer than none; for another one the free blocks of the
    /// zone that it lies in may have to be searched.
    ///
    /// It fails where there is none now; [`Heap::allocate_frames`](crate::Heap::allocate_frames) has memory given back
    /// first.
    pub fn allocate_below(&self, count: u32, alignment: Order, limit: u64) -> Option<Frame> {
        if self.refuse() {
            return None;
        }
        let limit = Frame::containing(limit).unwrap_or(NO_LIMIT);
        if let Some(asked) = self.zones.highest_below(limit).and_then(|zone| self.asked.get(zone)) {
            asked.store(true, Relaxed);
        }
        self.serve_from_zones(&Request::new(count, alignment, limit)?)
    }

    /// Allocates just the `count` frames from `frame` on; `false`, and nothing done, where not all of them are free, or
    /// `count` is 0, or 2^24 (64 GiB) or more. They are a run like any other, for [`free_run`](Self::free_run).
    #[must_use = "the frames are not allocated where it says so"]
    pub fn allocate_at(&self, frame: Frame, count: u32) -> bool {
        if self.refuse() || !(1..=Owner::MOST).contains(&count) || frame.number().checked_add(count).is_none() {
            return false;
        }
        self.zones.set_up(&self.records, frame.offset(count));
        let take = |mut zones: AllZones<'_, P>| zones.take(&self.records, frame..frame.offset(count)).is_ok();
        let attempt = || self.zones.lock_unless_nmi().is_some_and(take);
        let taken = attempt() || (self.drain_stock() > 0 && attempt());
        if taken {
            self.records.set_owner(frame, Owner::Pages(count));
        }
        taken
    }

    /// Frees `count` frames that [`allocate_run`](Self::allocate_run), [`allocate_below`](Self::allocate_below) or
    /// [`allocate_at`](Self::allocate_at) returned.
    ///
    /// Frames that are not allocated, or not so many, are refused with a report: see *Bad frees* in the crate's
    /// documentation.
    ///
    /// # Safety
    ///
    /// Nobody uses the frames any more.
    #[inline]
    #[track_caller]
    pub unsafe fn free_run(&self, frame: Frame, count: u32) {
        let caller = Location::caller();
        self.try_free_run(frame, count).unwrap_or_else(|fault| self.report(fault, frame, Some(caller)));
    }

    #[inline]
    fn try_free_run(&self, frame: Frame, count: u32) -> Result<(), Fault> {
        let stocked = count == 1 && (self.free_last(frame) || self.free_to_stock(frame));
        if stocked { Ok(()) } else { self.try_free_to_zones(frame, count) }
    }

    #[inline(never)]
    fn try_free_to_zones(&self, frame: Frame, count: u32) -> Result<(), Fault> {
        if !self.claim(frame, count) {
            return Err(self.run_fault(frame, count));
        }
        let block = block_order(count).filter(|order| frame.block_start(*order) == frame && !in_nmi::<P>());
        if !block.is_some_and(|order| self.zones.stock(&self.records, frame, order)) {
            self.release(frame, count);
        }
        Ok(())
    }

    /// Makes a run that the caches above have allocated for themselves one that nobody else can free.
    pub(crate) fn make_metadata(&self, frame: Frame, count: u32) {
        self.records.set_owner(frame, Owner::Metadata(count));
    }

    /// Frees such a run.
    pub(crate) fn free_metadata(&self, frame: Frame, count: u32) {
        if self.owner(frame) == Owner::Metadata(count) {
            self.records.set_owner(frame, Owner::Inner);
            self.release(frame, count);
        }
    }

    /// From allocated to nobody's, by one caller only; `false` where just so many frames are not allocated there.
    #[inline]
    fn claim(&self, frame: Frame, count: u32) -> bool {
        self.records.get(frame).is_some_and(|record| record.claim(count, Owner::Inner))
    }

    /// Frees frames whose records say [`Owner::Inner`].
    #[inline(never)]
    fn release(&self, frame: Frame, count: u32) {
        if in_nmi::<P>() {
            self.defer(frame, count);
        } else {
            self.zones.release(&self.records, frame..frame.offset(count));
        }
        self.report_damage();
    }

    /// Puts frames whose records say [`Owner::Inner`] on the list of those that are to be freed by somebody else.
    #[cold]
    fn defer(&self, frame: Frame, count: u32) {
        if let Some(record) = self.records.get(frame) {
            record.set_owner(Owner::Deferred(count));
            self.deferred.push(frame, record.link());
        }
    }

    /// Frees what was freed in NMIs, and says how many frames that were.
    #[inline]
    pub(super) fn take_in_deferred(&self) -> usize {
        if self.deferred.is_empty() || in_nmi::<P>() { 0 } else { self.take_in() }
    }

    #[cold]
    fn take_in(&self) -> usize {
        let mut next = self.deferred.take_all();
        let mut frames = 0;
        while let Some((frame, record)) = next.and_then(|frame| Some((frame, self.records.get(frame)?)))
            && let Owner::Deferred(count) = record.owner()
        {
            next = unlink(record.link());
            record.set_owner(Owner::Inner);
            self.zones.release(&self.records, frame..frame.offset(count));
            frames += count as usize;
        }
        frames
    }

    /// What is wrong with a free of a run of `count` frames at `frame`.
    #[cold]
    fn run_fault(&self, frame: Frame, count: u32) -> Fault {
        match self.owner(frame) {
            Owner::Pages(found) if found != count => Fault::BadFrameCount { freed: count, allocated: found },
            Owner::Pages(_) => Fault::DoubleFree,
            _ => self.fault_at(frame),
        }
    }

    /// Gives all but the first `keep` of the `count` frames at `frame` back. A `frame` that is not allocated, or not with
    /// just `count` frames, is a fault, and nothing has changed.
    pub(crate) fn try_shrink_run(&self, frame: Frame, count: u32, keep: u32) -> Result<(), Fault> {
        if keep == 0 {
            return self.try_free_run(frame, count);
        }
        if keep >= count {
            return self.check_run(frame, count);
        }
        if !self.claim(frame, count) {
            return Err(self.run_fault(frame, count));
        }
        self.records.set_owner(frame, Owner::Pages(keep));
        self.release(frame.offset(keep), count - keep);
        Ok(())
    }

    /// Makes the run of `count` frames at `frame` one of `new_count`, where it is and where the frames behind it are
    /// free;
    /// `false`, and nothing done, where they are not. Faults as [`try_shrink_run`](Self::try_shrink_run) has them.
    pub(crate) fn try_grow_run(&self, frame: Frame, count: u32, new_count: u32) -> Result<bool, Fault> {
        self.check_run(frame, count)?;
        if new_count <= count {
            return Ok(new_count == count);
        }
        if self.refuse() || new_count > Owner::MOST || frame.number().checked_add(new_count).is_none() {
            return Ok(false);
        }
        // Nobody else can free it meanwhile.
        if !self.claim(frame, count) {
            return Err(self.run_fault(frame, count));
        }
        let behind = frame.offset(count)..frame.offset(new_count);
        self.zones.set_up(&self.records, behind.end);
        let zones = self.zones.lock_unless_nmi();
        let taken = zones.is_some_and(|mut zones| zones.take(&self.records, behind).is_ok());
        self.records.set_owner(frame, Owner::Pages(if taken { new_count } else { count }));
        Ok(taken)
    }

    fn check_run(&self, frame: Frame, count: u32) -> Result<(), Fault> {
        if self.owner(frame) == Owner::Pages(count) { Ok(()) } else { Err(self.run_fault(frame, count)) }
    }

    /// Fills `frames` from its start with single frames, and says with how many: fewer than asked for where there are
    /// no more. Each is a block of order 0, to be freed by [`free`](Self::free) or [`free_bulk`](Self::free_bulk).
    pub fn allocate_bulk(&self, frames: &mut [Frame]) -> usize {
        if self.refuse() {
            return 0;
        }
        self.take_in_deferred();
        let mut filled = self.zones.allocate_bulk(&self.records, frames, 0, Owner::Pages(1));
        if filled < frames.len() && self.drain_stock() > 0 {
            filled += self.zones.allocate_bulk(&self.records, &mut frames[filled..], 0, Owner::Pages(1));
        }
        self.report_damage();
        filled
    }

    /// Frees single frames. One that is not an allocated block of order 0 is refused with a report; those before it in
    /// `frames` have then been freed, and those behind it are where the report does not stop the kernel.
    ///
    /// # Safety
    ///
    /// Nobody uses the frames any more.
    #[track_caller]
    pub unsafe fn free_bulk(&self, mut frames: &[Frame]) {
        if in_nmi::<P>() {
            // SAFETY: passed on to the caller.
            return frames.iter().for_each(|frame| unsafe { self.free(*frame, Order::ZERO) });
        }
        let caller = Location::caller();
        let loosen = |frame: &Frame| self.records.get(*frame).is_some_and(|record| record.claim(1, Owner::Loose));
        loop {
            let bad = frames.iter().position(|frame| !loosen(frame));
            let (good, rest) = frames.split_at(bad.unwrap_or(frames.len()));
            self.zones.release_loose(&self.records, good);
            let Some((bad, rest)) = rest.split_first() else { break };
            self.report(self.run_fault(*bad, 1), *bad, Some(caller));
            frames = rest;
        }
        self.report_damage();
    }

    /// Makes `count` frames from `first` on, a run that the caller has allocated, a slab of `cache`, a number below
    /// 2^24, which is there.
    pub(crate) fn make_slab(&self, first: Frame, count: u32, cache: u32, place: SlabPlace) {
        let owner = Owner::Slab { order: Order::containing(count).unwrap_or(Order::MAX), cache };
        let rows = self.records.rows(first..first.offset(count));
        rows.for_each(|(_, row)| row.iter().for_each(|record| record.set_slab(owner, place)));
    }

    /// Where the slab is that starts at `first`.
    #[inline]
    pub(crate) fn slab_place(&self, first: Frame) -> SlabPlace {
        let nowhere = SlabPlace { header: core::ptr::null_mut(), first_slot: 0 };
        self.records.get(first).map_or(nowhere, |record| record.slab_place())
    }

    /// Frees the run of a slab, which nobody uses any more.
    pub(crate) fn free_slab(&self, first: Frame, count: u32) {
        self.records.set_all(first..first.offset(count), Owner::Inner);
        self.release(first, count);
    }

    /// Each managed frame from `first` on, and who owns it.
    pub(crate) fn owners_from(&self, first: Frame) -> impl Iterator<Item = (Frame, Owner)> {
        self.records.managed(first..NO_LIMIT)
    }

    /// Calls `visit` with each run of frames that is allocated as such, and its length, with no lock held.
    pub(crate) fn for_each_pages(&self, mut visit: impl FnMut(Frame, u32)) {
        for (frame, owner) in self.records.managed(Frame::default()..NO_LIMIT) {
            if let Owner::Pages(count) = owner {
                visit(frame, count);
            }
        }
    }
}

/// The order of a block of `count` frames; `None` where that is no power of two.
#[inline]
fn block_order(count: u32) -> Option<Order> {
    if count.is_power_of_two() { Order::new(count.trailing_zeros()) } else { None }
}
