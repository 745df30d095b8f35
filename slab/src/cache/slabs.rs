//! The slab layer of a cache: its slabs, sorted by how full they are.
//!
//! Slabs are kept in lists by *band*: empty, eight bands of partial slabs, full. An object comes from the fullest partial
//! slab there is, so that slabs that are emptying become empty. One empty slab stays as hysteresis, and as many more as
//! the cache's *working set* had: by how much its number of used slabs went up and down during the last interval.
//!
//! Lock: one a cache, around [`State`]; inside it only the locks of the page frames may be taken, and here none are.
//! Slabs are created and released, and objects constructed and destroyed, with no lock held.
//!
//! Invariants, whenever the lock is free:
//! 1. A slab is in the list of its band, and its band is that of its used slots.
//! 2. Every frame of a slab has a record that names this cache, and from the first frame's one finds the header.

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;

use super::geometry::Geometry;
use super::shared::Caches;
use super::slab::{FREE, Slab, USED};
use super::{AllocError, InitFailed};
use crate::fault::Fault;
use crate::frames::{Frame, Frames, Owner};
use crate::lock::IrqLock;
use crate::platform::Platform;
use crate::verify::Broken;

/// Partial slabs are told apart by this many degrees of fullness.
const BANDS: usize = 8;
const EMPTY: usize = 0;
const FULL: usize = BANDS + 1;
const LISTS: usize = BANDS + 2;

/// Empty slabs that stay without a working set.
const HYSTERESIS: usize = 1;

/// What happens to an object when its memory enters and leaves the cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lifecycle {
    pub(crate) init: unsafe fn(*mut u8) -> Result<(), InitFailed>,
    pub(crate) fini: unsafe fn(*mut u8),
}

/// The slabs of a cache.
pub(crate) struct Slabs<P> {
    pub(crate) geometry: Geometry,
    pub(crate) id: u32,
    pub(crate) lifecycle: Option<Lifecycle>,
    state: IrqLock<P, State>,
}

#[derive(Debug)]
struct State {
    lists: [Option<Frame>; LISTS],
    /// Which of the lists have a slab, a bit each.
    bands: u16,
    numbers: Numbers,
    colour: u32,
    limit: usize,
    /// Empty slabs that may stay.
    keep: usize,
    /// The most and the fewest slabs with used slots since the interval began.
    busiest: usize,
    idlest: usize,
}

/// Counts of the slab layer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Numbers {
    pub(crate) slabs: usize,
    pub(crate) empty: usize,
    /// Objects that are not free in their slab.
    pub(crate) taken: usize,
    pub(crate) created: u64,
    pub(crate) released: u64,
}

impl<P> Slabs<P> {
    pub(crate) const fn new(id: u32, geometry: Geometry, lifecycle: Option<Lifecycle>) -> Self {
        let numbers = Numbers { slabs: 0, empty: 0, taken: 0, created: 0, released: 0 };
        let state = State {
            lists: [None; LISTS],
            bands: 0,
            numbers,
            colour: 0,
            limit: usize::MAX,
            keep: HYSTERESIS,
            busiest: 0,
            idlest: 0,
        };
        Self { geometry, id, lifecycle, state: IrqLock::new(state) }
    }
}

impl<P: Platform> Slabs<P> {
    /// An object out of its slab, and whether it is constructed. Its slot is [`CACHED`](super::slab::CACHED) then.
    pub(crate) fn take(&self, shared: &Caches<P>, grow: bool) -> Result<(*mut u8, bool), AllocError> {
        if let Some(object) = self.take_from_list(shared.frames())? {
            return Ok(object);
        }
        if !grow {
            return Err(AllocError::WouldGrow);
        }
        let first = self.create(shared).ok_or(AllocError::NoMemory)?;
        // SAFETY: just created.
        let slab = unsafe { self.slab(shared.frames(), first) };
        let mut state = self.state.lock();
        state.numbers.slabs += 1;
        state.numbers.created = state.numbers.created.wrapping_add(1);
        state.numbers.empty += 1;
        let object = if state.numbers.taken < state.limit { slab.take() } else { None };
        self.link(&mut state, shared.frames(), first, slab);
        if object.is_some() {
            state.taken_one();
        }
        object.ok_or(AllocError::AtLimit)
    }

    fn take_from_list(&self, frames: &Frames<P>) -> Result<Option<(*mut u8, bool)>, AllocError> {
        let mut state = self.state.lock();
        if state.numbers.taken >= state.limit {
            return Err(AllocError::AtLimit);
        }
        let Some(first) = state.fullest() else { return Ok(None) };
        // SAFETY: what is in a list is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let object = slab.take();
        state.taken_one();
        self.place(&mut state, frames, first, slab);
        Ok(object)
    }

    /// Takes objects back whose slots are [`CACHED`](super::slab::CACHED), all with one hold of the lock.
    pub(crate) fn put(&self, shared: &Caches<P>, objects: &[*mut u8], constructed: bool) {
        let frames = shared.frames();
        let mut state = self.state.lock();
        for &object in objects {
            let Ok((slab, slot)) = self.find(frames, object) else { continue };
            slab.put(slot, constructed);
            state.numbers.taken -= 1;
            let Some(first) = self.first_of(frames, object) else { continue };
            self.place(&mut state, frames, first, slab);
        }
        let keep = state.keep;
        let surplus = self.detach_empty(&mut state, frames, keep);
        drop(state);
        self.release_all(shared, surplus);
    }

    /// Releases empty slabs down to the working set, or all of them. Returns the page frames that went back.
    pub(crate) fn reap(&self, shared: &Caches<P>, all: bool) -> usize {
        let mut state = self.state.lock();
        let keep = if all { 0 } else { state.keep };
        let surplus = self.detach_empty(&mut state, shared.frames(), keep);
        drop(state);
        self.release_all(shared, surplus) * self.geometry.frames as usize
    }

    /// An interval is over: what it needed of slabs is the working set of the next one.
    pub(crate) fn end_interval(&self) {
        let mut state = self.state.lock();
        state.keep = HYSTERESIS.max(state.busiest - state.idlest);
        let busy = state.numbers.slabs - state.numbers.empty;
        (state.busiest, state.idlest) = (busy, busy);
    }

    pub(crate) fn set_limit(&self, objects: usize) {
        self.state.lock().limit = objects;
    }

    pub(crate) fn numbers(&self) -> Numbers {
        self.state.lock().numbers
    }

    /// The slab and slot of an object of this cache.
    ///
    /// Needs no lock where the object is not free: its slab then stays. Of any other pointer it says at once that it is no
    /// object of this cache, or it reads a state that is no [`USED`].
    #[inline]
    pub(crate) fn find(&self, frames: &Frames<P>, object: *const u8) -> Result<(Slab<'_>, usize), Fault> {
        let first = self.first_of(frames, object).ok_or_else(|| self.fault(frames, object))?;
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let slot = slab.slot_of(object).ok_or(Fault::BadBase)?;
        Ok((slab, slot))
    }

    #[inline]
    fn first_of(&self, frames: &Frames<P>, object: *const u8) -> Option<Frame> {
        let frame = frames.frame_of(object)?;
        match frames.owner(frame) {
            Owner::Slab { order, cache } if cache == self.id => Some(frame.block_start(order)),
            _ => None,
        }
    }

    #[cold]
    fn fault(&self, frames: &Frames<P>, object: *const u8) -> Fault {
        frames.frame_of(object).map_or(Fault::BadAddress, |frame| frames.fault_at(frame))
    }

    /// The slab at `first`.
    ///
    /// # Safety
    ///
    /// It is a slab of this cache, and stays one while this is used.
    #[inline]
    unsafe fn slab(&self, frames: &Frames<P>, first: Frame) -> Slab<'_> {
        let start = frames.pointer(first);
        // SAFETY: passed on to the caller; every slab of a cache has its geometry.
        unsafe { Slab::at(start, self.header(frames, first, start), &self.geometry) }
    }

    #[inline]
    fn header(&self, frames: &Frames<P>, first: Frame, start: *mut u8) -> *mut u8 {
        if !self.geometry.off_slab {
            return start.wrapping_add(self.geometry.bytes() - self.geometry.header_bytes());
        }
        let (frame, offset) = frames.slab_header(first);
        frames.pointer(frame).wrapping_add(offset as usize)
    }

    /// A slab in no list, from new page frames.
    fn create(&self, shared: &Caches<P>) -> Option<Frame> {
        let frames = shared.frames();
        let first = shared.allocate_frames(self.geometry.frames, self.geometry.order)?;
        let start = frames.pointer(first);
        let header = if self.geometry.off_slab {
            let Some(header) = shared.allocate_metadata(self.geometry.header_bytes()) else {
                // SAFETY: allocated above, and used by nobody.
                unsafe { frames.free_run(first, self.geometry.frames) };
                return None;
            };
            header.as_ptr()
        } else {
            self.header(frames, first, start)
        };
        let frame = frames.frame_of(header)?;
        let offset = header.addr() - frames.pointer(frame).addr();
        let colour = self.next_colour();
        // SAFETY: the frames are new and as many as that, and so is the header: at the end of the slab, which keeps room
        // for it, or metadata of that size.
        unsafe { Slab::create(start, header, &self.geometry, colour) };
        frames.make_slab(first, self.geometry.frames, self.id, (frame, offset as u32));
        Some(first)
    }

    fn next_colour(&self) -> u32 {
        let mut state = self.state.lock();
        let colour = state.colour;
        state.colour = (colour + 1) % self.geometry.colours;
        colour * self.geometry.align as u32
    }

    /// Takes empty slabs out of their list until `keep` are left, and returns them linked by their headers.
    fn detach_empty(&self, state: &mut State, frames: &Frames<P>, keep: usize) -> Option<Frame> {
        let mut detached = None;
        while state.numbers.empty > keep {
            let Some(first) = state.lists[EMPTY] else { break };
            // SAFETY: what is in a list is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            self.unlink(state, frames, slab);
            slab.set_next(detached.replace(first));
            state.numbers.empty -= 1;
            state.numbers.slabs -= 1;
            state.numbers.released = state.numbers.released.wrapping_add(1);
        }
        detached
    }

    /// Gives detached slabs back to the page frames, and says how many there were.
    fn release_all(&self, shared: &Caches<P>, mut detached: Option<Frame>) -> usize {
        let frames = shared.frames();
        let mut released = 0;
        while let Some(first) = detached {
            let start = frames.pointer(first);
            // SAFETY: out of its list but not freed yet, so it is ours alone.
            let slab = unsafe { self.slab(frames, first) };
            detached = slab.links().0;
            self.destroy_objects(slab);
            let header = self.header(frames, first, start);
            frames.free_slab(first, self.geometry.frames);
            if self.geometry.off_slab {
                // SAFETY: allocated with this size in `create`; the slab is gone.
                unsafe { shared.free_metadata(header, self.geometry.header_bytes()) };
            }
            released += 1;
        }
        released
    }

    fn destroy_objects(&self, slab: Slab<'_>) {
        let Some(lifecycle) = self.lifecycle else { return };
        for (slot, state) in slab.states().iter().enumerate() {
            if state.load(Relaxed) == FREE {
                // SAFETY: the object is constructed, free, and in a slab that only we know.
                unsafe { (lifecycle.fini)(slab.object(slot)) };
            }
        }
    }

    /// Moves a slab to the list of its band.
    fn place(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>) {
        let (old, new) = (slab.band(), self.band_of(slab));
        if old == new {
            return;
        }
        self.unlink(state, frames, slab);
        if old == EMPTY {
            state.numbers.empty -= 1;
        }
        if new == EMPTY {
            state.numbers.empty += 1;
        }
        self.push(state, frames, first, slab, new);
    }

    /// Puts a slab that is in no list and counts as empty into the list of its band.
    fn link(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>) {
        let band = self.band_of(slab);
        if band != EMPTY {
            state.numbers.empty -= 1;
        }
        self.push(state, frames, first, slab, band);
    }

    fn push(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>, band: usize) {
        let next = state.lists[band].replace(first);
        state.bands |= 1 << band;
        slab.set_band(band);
        slab.set_previous(None);
        slab.set_next(next);
        if let Some(next) = next {
            // SAFETY: what is in a list is a slab of this cache.
            unsafe { self.slab(frames, next) }.set_previous(Some(first));
        }
        let busy = state.numbers.slabs - state.numbers.empty;
        state.busiest = state.busiest.max(busy);
        state.idlest = state.idlest.min(busy);
    }

    fn unlink(&self, state: &mut State, frames: &Frames<P>, slab: Slab<'_>) {
        let band = slab.band();
        let (next, previous) = slab.links();
        match previous {
            // SAFETY: what is in a list is a slab of this cache.
            Some(previous) => unsafe { self.slab(frames, previous) }.set_next(next),
            None => state.lists[band] = next,
        }
        if let Some(next) = next {
            // SAFETY: as above.
            unsafe { self.slab(frames, next) }.set_previous(previous);
        }
        if state.lists[band].is_none() {
            state.bands &= !(1 << band);
        }
    }

    fn band_of(&self, slab: Slab<'_>) -> usize {
        match slab.used() {
            0 => EMPTY,
            used if used == self.geometry.slots => FULL,
            used => 1 + used * BANDS / self.geometry.slots,
        }
    }

    /// Calls `visit` with each object that is allocated. No lock is held then; what is allocated or freed meanwhile may be
    /// left out or visited.
    pub(crate) fn for_each_used(&self, frames: &Frames<P>, mut visit: impl FnMut(*mut u8)) {
        for list in 1..LISTS {
            let mut position = None;
            while let Some(page) = self.used_after(frames, list, position) {
                position = Some(page.slab);
                let slots = (0..self.geometry.slots).filter(|slot| page.used[slot / 64] & 1 << (slot % 64) != 0);
                slots.for_each(|slot| visit(page.first.wrapping_add(slot * self.geometry.stride)));
            }
        }
    }

    /// The used slots of the slab after `position` in a list, or of its first.
    fn used_after(&self, frames: &Frames<P>, list: usize, position: Option<Frame>) -> Option<UsedSlots> {
        let state = self.state.lock();
        let first = match position {
            None => state.lists[list]?,
            Some(position) => {
                let still_there = matches!(frames.owner(position), Owner::Slab { cache, .. } if cache == self.id);
                // SAFETY: the record says that it is a slab of this cache, and the lock keeps it one.
                let slab = still_there.then(|| unsafe { self.slab(frames, position) })?;
                if slab.band() == list { slab.links().0? } else { return None }
            }
        };
        // SAFETY: what is in a list is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let mut used = [0; 8];
        for (slot, _) in slab.states().iter().enumerate().filter(|(_, state)| state.load(Relaxed) >= USED) {
            used[slot / 64] |= 1 << (slot % 64);
        }
        Some(UsedSlots { slab: first, first: slab.object(0), used })
    }

    /// Checks the invariants of all slabs.
    pub(crate) fn verify(&self, frames: &Frames<P>) -> Result<(), Broken> {
        let state = self.state.lock();
        let broken = |what: &'static str| Broken::Cache { id: self.id, what };
        let (mut slabs, mut taken) = (0, 0);
        for (band, list) in state.lists.iter().enumerate() {
            if list.is_some() != (state.bands & 1 << band != 0) {
                return Err(broken("the bit of a list does not say whether it has a slab"));
            }
            let (mut position, mut previous, mut length) = (*list, None, 0);
            while let Some(first) = position {
                for offset in 0..self.geometry.frames {
                    if !matches!(frames.owner(first.offset(offset)), Owner::Slab { cache, .. } if cache == self.id) {
                        return Err(broken("a frame of a slab does not name its cache"));
                    }
                }
                // SAFETY: its records say that it is a slab of this cache.
                let slab = unsafe { self.slab(frames, first) };
                if slab.links().1 != previous {
                    return Err(broken("a slab does not link back to the one before it"));
                }
                if !slab.is_consistent() {
                    return Err(broken("the used count or the summary of a slab is not that of its slots"));
                }
                if slab.band() != band || self.band_of(slab) != band {
                    return Err(broken("a slab is in the list of another fullness"));
                }
                (previous, position) = (position, slab.links().0);
                slabs += 1;
                length += 1;
                taken += slab.used();
            }
            if band == EMPTY && length != state.numbers.empty {
                return Err(broken("the number of empty slabs is wrong"));
            }
        }
        if (slabs, taken) != (state.numbers.slabs, state.numbers.taken) {
            return Err(broken("the number of slabs or of objects is not that of the lists"));
        }
        Ok(())
    }
}

/// Which slots of a slab are allocated.
struct UsedSlots {
    slab: Frame,
    /// The object in the first slot.
    first: *mut u8,
    used: [u64; 8],
}

impl State {
    /// A slab with a free slot, the fullest there is.
    fn fullest(&self) -> Option<Frame> {
        let with_room = self.bands & !(1 << FULL);
        self.lists[with_room.checked_ilog2()? as usize]
    }

    fn taken_one(&mut self) {
        self.numbers.taken += 1;
    }
}

impl<P> fmt::Debug for Slabs<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slabs").field("id", &self.id).field("geometry", &self.geometry).finish_non_exhaustive()
    }
}
