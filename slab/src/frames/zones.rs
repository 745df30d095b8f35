//! Which zone a request is served from.
//!
//! Low memory is scarce: some devices reach no higher. So a request is served from the highest zone that it can live
//! with, and falls down from there; and where a higher zone could have served it, a lower one keeps a reserve back.
//!
//! Lock: one a zone, the innermost of all. Where several are held, they were taken from the lowest zone up.

#![deny(unsafe_code)]

use core::array;
use core::ops::Range;

use super::record::Owner;
use super::records::Records;
use super::types::{length, overlap};
use super::zone::{Request, Zone};
use super::{Frame, Order};
use crate::lock::{Interrupts, IrqGuard, IrqLock, Level, OwnLines};
use crate::memory::FRAME_SIZE;
use crate::platform::{Platform, in_nmi};
use crate::stats::ZoneStats;
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
        Self { zones: OwnLines(zones), boundaries: [first, second] }
    }

    /// Where the second zone starts: memory below is too precious to be stocked.
    pub(crate) fn first_boundary(&self) -> Frame {
        self.boundaries[0]
    }

    /// The number of the highest zone that a request below `limit` can be served from; `None` where there is none.
    pub(crate) fn highest_below(&self, limit: Frame) -> Option<usize> {
        Some(self.index_of(Frame::new(limit.number().checked_sub(1)?)))
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
    /// Calls `serve` with the zones from the one below `limit` down to the one with the number `lowest`, each locked
    /// and with the number of frames that it may hand out, until `serve` returns something. In an NMI zones that are
    /// locked already are left out.
    fn find_map<T>(
        &self,
        limit: Frame,
        lowest: usize,
        mut serve: impl FnMut(&mut Zone, usize) -> Option<T>,
    ) -> Option<T> {
        let highest = self.highest_below(limit)?;
        let mut reserved = false;
        for zone in self.zones.get(lowest..=highest)?.iter().rev() {
            let Some(mut zone) = zone.lock_unless_nmi() else { continue };
            let kept = if reserved { zone.total_frames() / RESERVE } else { 0 };
            let available = zone.free_frames().saturating_sub(kept);
            if let Some(served) = serve(&mut zone, available) {
                return Some(served);
            }
            reserved |= zone.is_populated_below(limit);
        }
        None
    }

    /// Allocates what `request` asks for.
    pub(crate) fn allocate(&self, records: &Records, request: &Request) -> Option<Frame> {
        self.find_map(request.limit(), 0, |zone, available| {
            (available >= request.count()).then(|| zone.allocate(records, request))?
        })
    }

    /// Fills `frames` from its start with single frames of the zones from `lowest` up, and says with how many.
    pub(crate) fn allocate_bulk(&self, records: &Records, frames: &mut [Frame], lowest: usize) -> usize {
        let Some(single) = Request::new(1, Order::ZERO, Frame::new(Frame::LIMIT)) else { return 0 };
        let mut filled = 0;
        for batch in frames.chunks_mut(BATCH) {
            let mut rest = batch.iter_mut();
            self.find_map(single.limit(), lowest, |zone, available| {
                for _ in 0..available.min(rest.len()) {
                    let frame = zone.allocate(records, &single)?;
                    *rest.next()? = frame;
                    filled += 1;
                }
                (rest.len() == 0).then_some(())
            });
        }
        filled
    }

    /// Frees all of `range`, whose records say [`Owner::Inner`].
    pub(crate) fn release(&self, records: &Records, range: Range<Frame>) {
        for zone in &self.zones[self.index_of(range.start)..] {
            let mut zone = zone.lock();
            let part = overlap(&range, &zone.range());
            let is_last = part.end == range.end;
            zone.release(records, part);
            if is_last {
                return;
            }
        }
    }

    /// Frees those of `frames`, which are single ones, that `claim` says yes to, up to the first that it does not, whose
    /// index is returned.
    pub(crate) fn release_bulk(
        &self,
        records: &Records,
        frames: &[Frame],
        claim: impl Fn(Frame) -> bool,
    ) -> Result<(), usize> {
        for (number, batch) in frames.chunks(BATCH).enumerate() {
            let mut zones = self.lock();
            for (index, frame) in batch.iter().enumerate() {
                if !claim(*frame) {
                    return Err(number * BATCH + index);
                }
                zones.guards[self.index_of(*frame)].release(records, *frame..frame.offset(1));
            }
        }
        Ok(())
    }

    /// All zones, held together.
    pub(crate) fn lock(&self) -> AllZones<'_, P> {
        let interrupts = Interrupts::disable();
        AllZones { guards: self.zones.each_ref().map(IrqLock::lock), _interrupts: interrupts }
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
        let [low, middle, high] = &*self.zones;
        Some(AllZones { guards: [take(low)?, take(middle)?, take(high)?], _interrupts: interrupts })
    }

    /// Counts of each zone.
    pub(crate) fn stats(&self) -> [ZoneStats; ZONES] {
        let zones = self.lock_to_report();
        array::from_fn(|index| match &zones {
            Some(zones) => stats_of(&zones.guards[index]),
            None => stats_of(&Zone::new(self.range(index))),
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
    guards: [IrqGuard<'a, P, Zone>; ZONES],
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

    /// Takes over `range`, whose records say [`Owner::Inner`]. What of it is not in `place` is free from now on.
    pub(crate) fn add(&mut self, records: &Records, range: Range<Frame>, place: &Range<Frame>) {
        for (zone, part) in self.parts(range) {
            zone.manage(&part);
            let place = overlap(&part, place);
            if place.is_empty() {
                zone.release(records, part);
            } else {
                zone.release(records, part.start..place.start);
                zone.release(records, place.end..part.end);
            }
        }
    }

    /// Takes all of `range`, or nothing of it and returns the first frame that is not free.
    pub(crate) fn take(&mut self, records: &Records, range: Range<Frame>) -> Result<(), Frame> {
        if let Some(taken) = self.parts(range.clone()).find_map(|(zone, part)| zone.first_taken(records, part)) {
            return Err(taken);
        }
        self.parts(range).for_each(|(zone, part)| zone.take(records, part));
        Ok(())
    }

    /// Takes the managed frames of `range`, or nothing and returns the first that is not free. They are managed no more;
    /// their records are still to say so.
    pub(crate) fn withdraw(&mut self, records: &Records, range: Range<Frame>) -> Result<usize, (Frame, Owner)> {
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

    /// Free frames, and the low and the high watermarks, of the zones up to the number `highest`, added up.
    pub(crate) fn free_and_watermarks(&self, highest: usize) -> (usize, usize, usize) {
        let sum = |of: &dyn Fn(&Zone) -> usize| self.guards.iter().take(highest + 1).map(|zone| of(zone)).sum();
        (sum(&Zone::free_frames), sum(&|zone| zone.total_frames() / LOW), sum(&|zone| zone.total_frames() / HIGH))
    }

    pub(crate) fn verify(&self, records: &Records) -> Result<(), Broken> {
        self.guards.iter().try_for_each(|zone| zone.verify(records))
    }
}

fn stats_of(zone: &Zone) -> ZoneStats {
    ZoneStats {
        start: zone.range().start,
        end: zone.range().end,
        total: zone.total_frames(),
        free: zone.free_frames(),
        free_blocks: zone.free_blocks(),
        reserve: zone.total_frames() / RESERVE,
        low: zone.total_frames() / LOW,
        high: zone.total_frames() / HIGH,
    }
}
