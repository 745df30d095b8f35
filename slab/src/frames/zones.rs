//! Which zone a request is served from.
//!
//! Low memory is scarce: some devices reach no higher. So a request is served from the highest zone that it can live
//! with, and falls down from there; and where a higher zone could have served it, a lower one keeps a reserve back.
//!
//! Lock: one a zone, the innermost of all. Where several are held, they were taken from the lowest zone up.

#![deny(unsafe_code)]

use core::array;
use core::ops::{Deref, DerefMut, Range};

use super::record::Owner;
use super::records::Records;
use super::types::{length, overlap};
use super::zone::{Request, Zone};
use super::{Frame, Order};
use crate::lock::{Interrupts, IrqGuard, IrqLock, Level, OwnLines};
use crate::memory::FRAME_SIZE;
use crate::platform::{Platform, in_nmi};
use crate::stats::ZoneStats;
use crate::sync::Counter;
use crate::sync::Ordering::Relaxed;
use crate::verify::Broken;

/// How many zones there are.
pub(crate) const ZONES: usize = 3;

/// The number of the highest.
pub(crate) const HIGHEST: usize = ZONES - 1;

/// Where the second and the third zone start, in bytes: 16 MiB and 4 GiB.
pub(crate) const DEFAULT_BOUNDARIES: [u64; ZONES - 1] = [16 << 20, 4 << 30];

/// Of a zone's frames, one in so many is kept from requests that a higher zone could have served.
const RESERVE: usize = 128;
/// The low and the high watermark, likewise.
const LOW: usize = 64;
const HIGH: usize = 32;

/// Frames that are taken or given under one lock.
const BATCH: usize = 64;

/// All zones. They are disjoint, ascend, and together have every frame.
#[derive(Debug)]
pub(crate) struct Zones<P> {
    zones: OwnLines<[IrqLock<P, Zone>; ZONES]>,
    /// Where the second and the third zone start.
    boundaries: [Frame; ZONES - 1],
    /// The number of the highest zone that has memory.
    highest: Counter,
    /// What each zone had when its lock was last released: to be asked without it.
    counts: OwnLines<[Counts; ZONES]>,
}

#[derive(Debug)]
struct Counts {
    free: Counter,
    total: Counter,
}

/// Holds a zone's lock.
struct Held<'a, P: Platform> {
    zone: IrqGuard<'a, P, Zone>,
    counts: &'a Counts,
}

impl<P: Platform> Drop for Held<'_, P> {
    #[inline]
    fn drop(&mut self) {
        self.counts.free.store(self.zone.free_frames() as u64, Relaxed);
        self.counts.total.store(self.zone.total_frames() as u64, Relaxed);
    }
}

impl<P: Platform> Deref for Held<'_, P> {
    type Target = Zone;

    #[inline]
    fn deref(&self) -> &Zone {
        &self.zone
    }
}

impl<P: Platform> DerefMut for Held<'_, P> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Zone {
        &mut self.zone
    }
}

impl<P> Zones<P> {
    /// Zones that meet at these physical addresses, rounded down to frames.
    pub(crate) const fn new(boundaries: [u64; ZONES - 1]) -> Self {
        let first = frame_below(boundaries[0]);
        let second = frame_below(if boundaries[1] < boundaries[0] { boundaries[0] } else { boundaries[1] });
        let zones = [
            IrqLock::ordered(Level::Zone0, Zone::new(Frame::new(0)..first)),
            IrqLock::ordered(Level::Zone1, Zone::new(first..second)),
            IrqLock::ordered(Level::Zone2, Zone::new(second..Frame::new(Frame::LIMIT))),
        ];
        let counts = [const { Counts { free: Counter::new(0), total: Counter::new(0) } }; ZONES];
        let highest = Counter::new(HIGHEST as u64);
        Self { zones: OwnLines(zones), boundaries: [first, second], highest, counts: OwnLines(counts) }
    }

    /// Where the second zone starts: memory below is too precious to be stocked.
    pub(crate) fn first_boundary(&self) -> Frame {
        self.boundaries[0]
    }

    /// The number of the highest zone that a request below `limit` can be served from; `None` where there is none.
    pub(crate) fn highest_below(&self, limit: Frame) -> Option<usize> {
        Some(self.index_of(Frame::new(limit.number().checked_sub(1)?)))
    }

    /// Where the zone of `frame` starts.
    pub(crate) fn start_of_zone(&self, frame: Frame) -> Frame {
        self.index_of(frame).checked_sub(1).map_or(Frame::new(0), |below| self.boundaries[below])
    }

    fn index_of(&self, frame: Frame) -> usize {
        self.boundaries.iter().filter(|boundary| frame >= **boundary).count()
    }
}

const fn frame_below(address: u64) -> Frame {
    let number = address / FRAME_SIZE as u64;
    Frame::new(if number < Frame::LIMIT as u64 { number as u32 } else { Frame::LIMIT })
}

impl<P: Platform> Zones<P> {
    /// Merges all free blocks that wait in the zones.
    pub(crate) fn merge_stocks(&self, records: &Records) {
        if let Some(mut zones) = self.lock_unless_nmi() {
            zones.merge_stocks(records);
        }
    }

    /// Calls `serve` with the zones from the one below `limit` down to the one with the number `lowest`, each locked
    /// and with the number of frames that it may hand out, until `serve` returns something. In an NMI zones that are
    /// locked already are left out.
    fn find_map<T>(
        &self,
        limit: Frame,
        lowest: usize,
        mut serve: impl FnMut(&mut Zone, usize) -> Option<T>,
    ) -> Option<T> {
        let highest = self.highest_below(limit)?.min(self.highest.load(Relaxed) as usize);
        let mut reserved = false;
        for number in (lowest..=highest).rev() {
            let Some(mut zone) = self.hold(number, IrqLock::lock_unless_nmi) else { continue };
            let kept = if reserved { zone.total_frames() / RESERVE } else { 0 };
            let available = zone.free_frames().saturating_sub(kept);
            if let Some(served) = serve(&mut zone, available) {
                return Some(served);
            }
            reserved |= zone.is_populated_below(limit);
        }
        None
    }

    /// A block of `order` that waits in the highest zone, if that is not locked: for most requests nothing else is looked
    /// at.
    #[inline]
    pub(crate) fn take_stocked(&self, records: &Records, order: Order) -> Option<Frame> {
        self.hold(self.highest.load(Relaxed) as usize, IrqLock::try_lock)?.take_stocked(records, order)
    }

    /// Allocates what `request` asks for. The lock is released each time that records were set up for it.
    pub(crate) fn allocate(&self, records: &Records, request: &Request) -> Option<Frame> {
        loop {
            let served = self.find_map(request.limit(), 0, |zone, available| {
                if available < request.count() {
                    return None;
                }
                let frame = zone.allocate(records, request);
                let again = frame.is_none() && zone.set_up(records, request.limit());
                if again { Some(None) } else { frame.or_else(|| zone.allocate_anywhere(records, request)).map(Some) }
            })?;
            if served.is_some() {
                return served;
            }
        }
    }

    /// Sets up the records of all frames up to `end`, a section under each lock; not in an NMI.
    pub(crate) fn set_up(&self, records: &Records, end: Frame) {
        let is_wanted = |later: &Range<Frame>| !later.is_empty() && later.start < end;
        if records.later().iter().any(is_wanted) && !in_nmi::<P>() {
            (0..ZONES)
                .for_each(|number| while self.hold_one(number).is_some_and(|mut zone| zone.set_up(records, end)) {});
        }
    }

    /// Fills `frames` from its start with single frames of the zones from `lowest` up, and says with how many. They are
    /// `owner`'s.
    pub(crate) fn allocate_bulk(&self, records: &Records, frames: &mut [Frame], lowest: usize, owner: Owner) -> usize {
        let mut filled = 0;
        for batch in frames.chunks_mut(BATCH) {
            let mut rest = batch;
            self.find_map(Frame::new(Frame::LIMIT), lowest, |zone, available| {
                let taken = zone.allocate_bulk(records, rest, available, owner);
                rest = &mut core::mem::take(&mut rest)[taken..];
                filled += taken;
                rest.is_empty().then_some(())
            });
        }
        filled
    }

    /// Keeps the block of `order` at `frame`, whose record says [`Owner::Inner`], unmerged in its zone; `false`, and nothing
    /// done, where there is no room, or the zone is locked.
    #[inline]
    pub(crate) fn stock(&self, records: &Records, frame: Frame, order: Order) -> bool {
        self.hold(self.index_of(frame), IrqLock::try_lock).is_some_and(|mut zone| zone.stock(records, frame, order))
    }

    /// Frees all of `range`, whose records say [`Owner::Inner`].
    #[inline(never)]
    pub(crate) fn release(&self, records: &Records, range: Range<Frame>) {
        for number in self.index_of(range.start)..ZONES {
            let Some(mut zone) = self.hold_one(number) else { return };
            let part = overlap(&range, &zone.range());
            let is_last = part.end == range.end;
            zone.merge_all(records, part);
            if is_last {
                return;
            }
        }
    }

    /// Frees `frames`, whose records said [`Owner::Loose`]: it may have been done with others since, here or on another CPU.
    pub(crate) fn release_loose(&self, records: &Records, frames: &[Frame]) {
        let mut rest = frames.iter().copied().peekable();
        while let Some(first) = rest.peek() {
            let number = self.index_of(*first);
            let Some(mut zone) = self.hold_one(number) else { return };
            let mut released = 0;
            while released < BATCH as u32
                && let Some(frame) = rest.next_if(|frame| self.index_of(*frame) == number)
            {
                released += zone.release_loose(records, frame).max(1);
            }
        }
    }

    /// To be called when memory has come or gone. Returns how many frames there are.
    pub(crate) fn update(&self) -> usize {
        let zones = self.lock();
        let highest = zones.guards.iter().rposition(|zone| zone.total_frames() > 0);
        self.highest.store(highest.unwrap_or(HIGHEST) as u64, Relaxed);
        zones.guards.iter().map(|zone| zone.total_frames()).sum()
    }

    /// All zones, held together.
    pub(crate) fn lock(&self) -> AllZones<'_, P> {
        let interrupts = Interrupts::disable();
        let guards = array::from_fn(|number| Held { zone: self.zones[number].lock(), counts: &self.counts[number] });
        AllZones { guards, _interrupts: interrupts }
    }

    /// The zone with this number, locked by `take`.
    #[inline]
    fn hold<'a>(
        &'a self,
        number: usize,
        take: impl Fn(&'a IrqLock<P, Zone>) -> Option<IrqGuard<'a, P, Zone>>,
    ) -> Option<Held<'a, P>> {
        Some(Held { zone: take(self.zones.get(number)?)?, counts: self.counts.get(number)? })
    }

    #[inline]
    fn hold_one(&self, number: usize) -> Option<Held<'_, P>> {
        self.hold(number, |zone| Some(zone.lock()))
    }

    /// The same; in an NMI only if all of them are free.
    pub(crate) fn lock_unless_nmi(&self) -> Option<AllZones<'_, P>> {
        if in_nmi::<P>() { self.lock_by(IrqLock::try_lock) } else { Some(self.lock()) }
    }

    /// The same for counts; see [`IrqLock::lock_to_report`].
    pub(crate) fn lock_to_report(&self) -> Option<AllZones<'_, P>> {
        self.lock_by(IrqLock::lock_to_report)
    }

    fn lock_by<'a>(
        &'a self,
        take: impl Fn(&'a IrqLock<P, Zone>) -> Option<IrqGuard<'a, P, Zone>>,
    ) -> Option<AllZones<'a, P>> {
        let interrupts = Interrupts::disable();
        let guards = [self.hold(0, &take)?, self.hold(1, &take)?, self.hold(2, &take)?];
        Some(AllZones { guards, _interrupts: interrupts })
    }

    /// Frames of the zones up to the number `highest` that are free, stocks of CPUs aside, and the low and the high
    /// watermarks, added up. Without a lock: each zone's as of when it was last released.
    pub(crate) fn free_and_watermarks(&self, highest: usize) -> (usize, usize, usize) {
        self.counts.iter().take(highest + 1).fold((0, 0, 0), |(free, low, high), counts| {
            let total = counts.total.load(Relaxed) as usize;
            (free + counts.free.load(Relaxed) as usize, low + total / LOW, high + total / HIGH)
        })
    }

    /// Counts of each zone, after all free blocks have merged.
    pub(crate) fn stats(&self, records: &Records) -> [ZoneStats; ZONES] {
        let mut zones = self.lock_to_report();
        let free_blocks = zones.as_mut().map_or([[0; _]; _], |zones| zones.free_blocks(records));
        array::from_fn(|index| match &zones {
            Some(zones) => stats_of(&zones.guards[index], free_blocks[index]),
            None => stats_of(&Zone::new(self.range(index)), free_blocks[index]),
        })
    }

    fn range(&self, zone: usize) -> Range<Frame> {
        let start = zone.checked_sub(1).map_or(Frame::new(0), |below| self.boundaries[below]);
        start..self.boundaries.get(zone).copied().unwrap_or(Frame::new(Frame::LIMIT))
    }
}

/// All zones at once, taken from the lowest up.
pub(crate) struct AllZones<'a, P: Platform> {
    // Fields drop in this order: all locks must be free before a handler can run.
    guards: [Held<'a, P>; ZONES],
    _interrupts: Interrupts<P>,
}

impl<P: Platform> AllZones<'_, P> {
    fn parts(&mut self, range: Range<Frame>) -> impl Iterator<Item = (&mut Zone, Range<Frame>)> {
        let zones = self.guards.iter_mut().map(|zone| &mut **zone);
        zones
            .map(move |zone| (overlap(&range, &zone.range()), zone))
            .filter(|(part, _)| !part.is_empty())
            .map(|(p, z)| (z, p))
    }

    pub(crate) fn total_frames(&self) -> usize {
        self.guards.iter().map(|zone| zone.total_frames()).sum()
    }

    pub(crate) fn free_frames(&self) -> usize {
        self.guards.iter().map(|zone| zone.free_frames()).sum()
    }

    /// Merges all free blocks that wait in the zones.
    pub(crate) fn merge_stocks(&mut self, records: &Records) {
        self.guards.iter_mut().for_each(|zone| _ = zone.merge_stocks(records));
    }

    /// Takes over `range`, whose records say [`Owner::Inner`] or are to be set up later. What of it is not in `place` is
    /// free from now on.
    pub(crate) fn add(&mut self, records: &Records, range: Range<Frame>, place: &Range<Frame>) {
        for (zone, part) in self.parts(range) {
            let later = records.later_in(&part);
            zone.manage(&part, &later);
            let place = if later.is_empty() { overlap(&part, place) } else { later.start..part.end };
            if place.is_empty() {
                zone.merge_all(records, part);
            } else {
                zone.merge_all(records, part.start..place.start);
                zone.merge_all(records, place.end..part.end);
            }
        }
    }

    /// Takes all of `range`, or nothing of it and returns the first frame that is not free.
    pub(crate) fn take(&mut self, records: &Records, range: Range<Frame>) -> Result<(), Frame> {
        let first_taken =
            |zones: &mut Self| zones.parts(range.clone()).find_map(|(zone, part)| zone.first_taken(records, part));
        // Some of what is not may only wait in a stock.
        if first_taken(self).is_some()
            && let Some(taken) = {
                self.merge_stocks(records);
                first_taken(self)
            }
        {
            return Err(taken);
        }
        self.parts(range).for_each(|(zone, part)| zone.take(records, part));
        Ok(())
    }

    /// Takes the managed frames of `range`, or nothing and returns the first that is not free. They are managed no more;
    /// their records are still to say so.
    pub(crate) fn withdraw(&mut self, records: &Records, range: Range<Frame>) -> Result<usize, (Frame, Owner)> {
        self.merge_stocks(records);
        self.each_free_piece(records, range.clone(), |_, _| {})?;
        let mut taken = 0;
        self.each_free_piece(records, range, |zone, piece| {
            let frames = length(&piece) as usize;
            zone.take(records, piece);
            zone.unmanage(frames);
            taken += frames;
        })?;
        Ok(taken)
    }

    /// Calls `visit` with what each free block has in `range`; ends with the first managed frame that is not free.
    fn each_free_piece(
        &mut self,
        records: &Records,
        range: Range<Frame>,
        mut visit: impl FnMut(&mut Zone, Range<Frame>),
    ) -> Result<(), (Frame, Owner)> {
        for (zone, mut rest) in self.parts(range) {
            while let Some((frame, owner)) = records.managed(rest.clone()).next() {
                let block = zone.block_around(records, frame).ok_or((frame, owner))?;
                let piece = frame..block.end.min(rest.end);
                rest.start = piece.end;
                visit(zone, piece);
            }
        }
        Ok(())
    }

    /// Takes one of the largest free blocks, or so much of it that `keep` frames stay free; it is managed no more.
    /// `None` where no more are free.
    pub(crate) fn withdraw_block(&mut self, records: &Records, keep: usize) -> Option<Range<Frame>> {
        self.merge_stocks(records);
        let excess = self.free_frames().checked_sub(keep).filter(|excess| *excess > 0)?;
        let most = u32::try_from(excess).unwrap_or(u32::MAX);
        self.guards.iter_mut().rev().find_map(|zone| {
            let block = zone.take_largest(records, most)?;
            zone.unmanage(length(&block) as usize);
            Some(block)
        })
    }

    /// Forgets all memory.
    pub(crate) fn clear(&mut self) {
        self.guards.iter_mut().for_each(|zone| **zone = Zone::new(zone.range()));
    }

    /// Merges all free blocks that wait, and counts those of each zone by their order.
    pub(crate) fn free_blocks(&mut self, records: &Records) -> [[usize; Order::COUNT]; ZONES] {
        self.merge_stocks(records);
        array::from_fn(|zone| self.guards[zone].free_blocks(records))
    }

    pub(crate) fn verify(&self, records: &Records) -> Result<(), Broken> {
        self.guards.iter().try_for_each(|zone| zone.verify(records))
    }
}

fn stats_of(zone: &Zone, free_blocks: [usize; Order::COUNT]) -> ZoneStats {
    ZoneStats {
        start: zone.range().start,
        end: zone.range().end,
        total: zone.total_frames(),
        free: zone.free_frames(),
        free_blocks,
        reserve: zone.total_frames() / RESERVE,
        low: zone.total_frames() / LOW,
        high: zone.total_frames() / HIGH,
    }
}
