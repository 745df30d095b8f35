//! The slab layer of a cache: its slabs, sorted by how full they are.
//!
//! Slabs are kept in lists by *band*: empty, eight bands of partial slabs, full. An object comes from the fullest partial
//! slab there is, so that slabs that are emptying become empty. One empty slab stays as hysteresis, and as many more as
//! the cache's *working set* had: by how much its number of used slabs went up and down during the last interval.
//!
//! States of neighbouring slots share a cache line. So that CPUs do not write to one line all the time, a CPU with
//! magazines has a *home* slab in the cache, which the others leave to it as long as there is other memory: that from
//! which it took last, until it is full or empty, or an interval ends. That is one partial slab a CPU at most.
//!
//! Lock: one a cache, around [`State`]; inside it only the locks of the page frames may be taken, and here none are.
//! Slabs are created and released, and objects constructed and destroyed, with no lock held.
//!
//! In an NMI the lock is only tried, and objects that are freed wait in their slabs; see [`nmi`].
//!
//! Invariants, whenever the lock is free:
//! 1. A slab is in the list of its band, which is that of its used slots, and in the list of all slabs; nothing else is.
//! 2. Every frame of a slab has a record that names this cache, and from the first frame's one finds the header.

mod nmi;

use core::fmt;

use super::geometry::Geometry;
use super::magazine::Round;
use super::shared::Caches;
use super::slab::{AUDITED, BY_FULLNESS, CACHED, FREE, OF_ALL, RAW, Slab, change};
use super::{AllocError, InitFailed};
use crate::fault::Fault;
use crate::frames::{Deferred, Frame, Frames, Owner, SlabOwner};
use crate::lock::{IrqLock, Level, OwnLines};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicU8, AtomicU32};
use crate::verify::Broken;

/// Partial slabs are told apart by this many degrees of fullness.
const BANDS: usize = 8;
const EMPTY: usize = 0;
const FULL: usize = BANDS + 1;
/// The list of all slabs, behind those of the bands.
const ALL: usize = BANDS + 2;
/// From here on, homes: lists of at most one slab. CPUs whose numbers differ by [`HOMES`] share one.
const HOME: usize = BANDS + 3;
const HOMES: usize = 8;
const LISTS: usize = HOME + HOMES;

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
    /// What the records of its frames say.
    owner: SlabOwner,
    /// The same where a slab is one frame with its header in it; else what no record says.
    near: SlabOwner,
    pub(crate) lifecycle: Option<Lifecycle>,
    state: OwnLines<IrqLock<P, State>>,
    /// Slabs with objects that were freed in an NMI.
    deferred: Deferred,
    /// Who goes over the list of all slabs now: no slab leaves it meanwhile. It goes up with the lock held.
    walks: AtomicU32,
    /// A slab whose header was found overwritten, which nobody has reported yet.
    damaged: AtomicU32,
    /// The state of a random number generator; 0 where slots are used in their order. The lock guards it.
    random: AtomicU32,
}

#[derive(Debug)]
struct State {
    /// First slabs: of each band, of all, and the homes.
    lists: [Option<Frame>; LISTS],
    /// Which of the lists have a slab, a bit each.
    filled: u32,
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
            filled: 0,
            numbers,
            colour: 0,
            limit: usize::MAX,
            keep: HYSTERESIS,
            busiest: 0,
            idlest: 0,
        };
        let state = OwnLines(IrqLock::ordered(Level::Slabs, state));
        Self {
            geometry,
            id,
            owner: geometry.owner(id),
            near: geometry.near_owner(id),
            lifecycle,
            state,
            deferred: Deferred::new(),
            walks: AtomicU32::new(0),
            damaged: AtomicU32::new(Frame::NONE),
            random: AtomicU32::new(0),
        }
    }
}

impl<P: Platform> Slabs<P> {
    /// Changes the number of the cache, which has no slab yet.
    pub(super) const fn set_id(&mut self, id: u32) {
        self.id = id;
        self.owner = self.geometry.owner(id);
        self.near = self.geometry.near_owner(id);
    }

    /// An object out of its slab, and whether it is constructed. Its slot is [`CACHED`] then. `at_home` says whether the
    /// CPU is to have a home in this cache.
    pub(crate) fn take(&self, shared: &Caches<P>, grow: bool, at_home: bool) -> Result<(*mut u8, bool), AllocError> {
        let frames = shared.frames();
        self.take_in_deferred(shared);
        // Where the thread goes to another CPU meanwhile, it takes from the home of that which it left.
        let home = if at_home { home_of_this_cpu::<P>() } else { None };
        let leave_homes = grow && home.is_some();
        let taken = self.take_from_list(&mut self.state.lock(), frames, home, leave_homes);
        self.report_damage(shared);
        if let Some(object) = taken? {
            return Ok(object);
        }
        if !grow {
            return Err(AllocError::WouldGrow);
        }
        let new = self.create(shared);
        let mut state = self.state.lock();
        if let Some(first) = new {
            state.numbers.created = state.numbers.created.wrapping_add(1);
            self.attach(&mut state, frames, first);
        }
        // The new slab, or a fuller one that another CPU has freed an object of, or at last a home of others.
        self.take_from_list(&mut state, frames, home, false)?.ok_or(AllocError::NoMemory)
    }

    /// Uses slots in an order that follows from `seed`; in their own order where it is 0.
    pub(crate) fn set_random(&self, seed: u32) {
        let _state = self.state.lock();
        self.random.store(seed, Relaxed);
    }

    /// Xorshift (Marsaglia 2003), which stays at 0.
    fn next_random(&self) -> u32 {
        let mut random = self.random.load(Relaxed);
        if random != 0 {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            self.random.store(random, Relaxed);
        }
        random
    }

    /// Fills the front of `objects` from the slabs that are there, with one hold of the lock, and says how many.
    pub(crate) fn take_bulk(&self, shared: &Caches<P>, objects: &mut [*mut u8]) -> usize {
        self.take_in_deferred(shared);
        let mut state = self.state.lock();
        let mut taken = 0;
        while taken < objects.len()
            && let Ok(Some((object, _))) = self.take_from_list(&mut state, shared.frames(), None, false)
        {
            objects[taken] = object;
            taken += 1;
        }
        drop(state);
        self.report_damage(shared);
        taken
    }

    fn take_from_list(
        &self,
        state: &mut State,
        frames: &Frames<P>,
        home: Option<usize>,
        leave_homes: bool,
    ) -> Result<Option<(*mut u8, bool)>, AllocError> {
        if state.numbers.taken >= state.limit {
            return Err(AllocError::AtLimit);
        }
        while let Some(list) = state.choose(home, leave_homes) {
            let Some(first) = state.lists[list] else { break };
            let slab = self.slab_if(frames, first).filter(|slab| slab.is_sound() && slab.list() == list);
            if let Some(slab) = slab
                && let Some(object) = slab.take(self.next_random())
            {
                state.numbers.taken += 1;
                self.place_at(state, frames, first, slab, home);
                return Ok(Some(object));
            }
            // Where the rest of the list is, nobody can know any more.
            state.cut(list);
            self.note_damage(first);
        }
        Ok(None)
    }

    /// The header of the slab was overwritten: to be reported when no lock is held.
    #[cold]
    fn note_damage(&self, first: Frame) {
        self.damaged.store(first.number(), Relaxed);
    }

    #[inline]
    fn report_damage(&self, shared: &Caches<P>) {
        if self.damaged.load(Relaxed) != Frame::NONE
            && let Some(first) = Frame::some(self.damaged.swap(Frame::NONE, Relaxed))
        {
            let frames = shared.frames();
            shared.report(Fault::BadControl, self.header(frames, first, frames.pointer(first)), None);
        }
    }

    /// The slab that starts at `first`, where one of this cache does.
    fn slab_if(&self, frames: &Frames<P>, first: Frame) -> Option<Slab<'_>> {
        // SAFETY: the record says so, and the lock of the lists, in which it is, keeps it.
        (self.first_of(frames, frames.pointer(first))? == first).then(|| unsafe { self.slab(frames, first) })
    }

    /// Takes up to 64 objects back whose slots are [`CACHED`], all with one hold of the lock. Those that are no such objects
    /// are reported when the others are back. Returns the slabs that leave the cache.
    pub(crate) fn put<'a, I>(&'a self, shared: &'a Caches<P>, objects: I, constructed: bool) -> Leaving<'a, P>
    where
        I: IntoIterator<Item = *mut u8> + Clone,
    {
        let frames = shared.frames();
        let mut bad = 0_u64;
        let mut state = self.state.lock();
        for (index, object) in objects.clone().into_iter().enumerate() {
            let Some((first, slab, slot)) = self.locate_cached(frames, object) else {
                bad |= 1 << index;
                continue;
            };
            if !slab.is_sound() || slab.used() == 0 || state.numbers.taken == 0 {
                self.note_damage(first);
                continue;
            }
            slab.put(slot, constructed);
            state.numbers.taken -= 1;
            self.place(&mut state, frames, first, slab);
        }
        let keep = state.keep;
        let leaving = self.detach_empty(shared, &mut state, keep);
        drop(state);
        self.report_damage(shared);
        if bad != 0 {
            let objects = objects.into_iter().enumerate().filter(|(index, _)| bad & 1 << index != 0);
            objects.for_each(|(_, object)| shared.report(Fault::BadRound, object, None));
        }
        leaving
    }

    fn locate_cached(&self, frames: &Frames<P>, object: *mut u8) -> Option<(Frame, Slab<'_>, usize)> {
        let first = self.first_of(frames, object)?;
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let slot = slab.slot_of(object)?;
        (slab.states()[slot].load(Relaxed) == CACHED).then_some((first, slab, slot))
    }

    /// Looks at a free object with nobody else having it: calls `look` with the lock held. `None` where it is not free.
    pub(crate) fn with_free<T>(&self, frames: &Frames<P>, object: *mut u8, look: impl FnOnce() -> T) -> Option<T> {
        let _state = self.state.lock();
        (self.state(frames, object)?.load(Relaxed) == FREE).then(look)
    }

    /// Takes this object, if it is free. Its slot is [`CACHED`] then.
    pub(crate) fn take_this(&self, frames: &Frames<P>, object: *mut u8) -> bool {
        let mut state = self.state.lock();
        let Some(first) = self.first_of(frames, object) else { return false };
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let taken = slab.slot_of(object).is_some_and(|slot| slab.take_this(slot));
        state.numbers.taken += usize::from(taken);
        self.place(&mut state, frames, first, slab);
        taken
    }

    /// Takes empty slabs out of the cache, down to the working set, or all of them.
    pub(crate) fn reap<'a>(&'a self, shared: &'a Caches<P>, all: bool) -> Leaving<'a, P> {
        self.take_in_deferred(shared);
        let mut state = self.state.lock();
        let keep = if all { 0 } else { state.keep };
        let leaving = self.detach_empty(shared, &mut state, keep);
        drop(state);
        self.report_damage(shared);
        leaving
    }

    /// An interval is over: what it needed of slabs is the working set of the next one.
    pub(crate) fn end_interval(&self, frames: &Frames<P>) {
        let mut state = self.state.lock();
        state.keep = HYSTERESIS.max(state.busiest - state.idlest);
        let busy = state.numbers.slabs - state.numbers.empty;
        (state.busiest, state.idlest) = (busy, busy);
        for home in HOME..LISTS {
            if let Some(first) = state.lists[home] {
                // SAFETY: what is in a list is a slab of this cache.
                let slab = unsafe { self.slab(frames, first) };
                self.move_to(&mut state, frames, first, slab, self.band_of(slab));
            }
        }
    }

    pub(crate) fn set_limit(&self, objects: usize) {
        self.state.lock().limit = objects;
    }

    /// All 0 where they cannot be looked at; see [`IrqLock::lock_to_report`].
    pub(crate) fn numbers(&self) -> Numbers {
        self.state.lock_to_report().map_or_else(Numbers::default, |state| state.numbers)
    }

    /// The object that `pointer` is in or would be, and its slot, where that is in a slab of this cache.
    pub(crate) fn around(&self, frames: &Frames<P>, pointer: *const u8) -> Option<(*mut u8, usize)> {
        let first = self.first_of(frames, pointer)?;
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let slot = pointer.addr().checked_sub(slab.object(0).addr())? / self.geometry.stride;
        (slot < self.geometry.slots).then(|| (slab.object(slot), slot))
    }

    /// The slab and slot of an object of this cache.
    ///
    /// Needs no lock where the object is not free: its slab then stays. Of any other pointer it says at once that it is
    /// no object of this cache, or it reads a state that is no [`USED`].
    #[inline]
    pub(crate) fn find(&self, frames: &Frames<P>, object: *const u8) -> Result<(Slab<'_>, usize), Fault> {
        let first = self.first_of(frames, object).ok_or_else(|| frames.fault_of(object))?;
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let slot = slab.slot_of(object).ok_or(Fault::BadBase)?;
        Ok((slab, slot))
    }

    /// The state of the slot of an object; `None` where [`find`](Self::find) says that there is none.
    pub(crate) fn state(&self, frames: &Frames<P>, object: *const u8) -> Option<&AtomicU8> {
        let first = self.first_of(frames, object)?;
        // SAFETY: the record says that it is a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        slab.states().get(slab.slot_of(object)?)
    }

    /// The round for an object that is not free, and the state of its slot; `None` as above, or where only
    /// [`round_of`](Self::round_of) can say.
    #[inline]
    pub(crate) fn round_near(&self, frames: &Frames<P>, object: *mut u8) -> Option<(Round, &AtomicU8)> {
        let (offset, memory) = frames.offset_in_slab(object, self.near)?;
        let start = offset & !(FRAME_SIZE - 1);
        let header = memory.wrapping_add(start + self.geometry.header_offset);
        // SAFETY: the record says that it is a slab of this cache, one frame with its header in it.
        let state = unsafe { Slab::state_at(header, &self.geometry, offset - start) }?;
        Some((Round { object, state }, state))
    }

    /// The same for any object.
    pub(crate) fn round_of(&self, frames: &Frames<P>, object: *mut u8) -> Option<(Round, &AtomicU8)> {
        let state = self.state(frames, object)?;
        Some((Round { object, state }, state))
    }

    /// Changes the state of the slot of a round, which is in a magazine or was taken out of it, if it is `from`. Interrupts
    /// are off, or this has the object for itself.
    #[inline]
    pub(crate) fn change(&self, frames: &Frames<P>, round: Round, from: u8, to: u8) -> bool {
        // SAFETY: the slab has not left the cache, so the state is there: the object is not free, or the magazine would have
        // forgotten it.
        self.is_sound(frames, round) && change(unsafe { &*round.state }, from, to)
    }

    /// Whether nothing has written over a round. Debug builds look; others believe it, which spares them half of the work.
    #[inline]
    pub(crate) fn is_sound(&self, frames: &Frames<P>, round: Round) -> bool {
        !cfg!(debug_assertions)
            || self.state(frames, round.object).is_some_and(|state| core::ptr::eq(state, round.state))
    }

    fn first_of(&self, frames: &Frames<P>, object: *const u8) -> Option<Frame> {
        let frame = frames.frame_of(object)?;
        frames.is_in_slab(frame, self.owner).then(|| self.geometry.first_of(frame))
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
            return start.wrapping_add(self.geometry.header_offset);
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
        let header_frame = frames.frame_of(header)?;
        let offset = header.addr() - frames.pointer(header_frame).addr();
        let colour = self.next_colour();
        // SAFETY: the frames are new and as many as that, and so is the header: at the end of the slab, which keeps room
        // for it, or metadata of that size.
        unsafe { Slab::create(start, header, &self.geometry, colour) };
        frames.make_slab(first, self.geometry.frames, self.id, (header_frame, offset as u32));
        Some(first)
    }

    fn next_colour(&self) -> u32 {
        let mut state = self.state.lock();
        let colour = state.colour;
        state.colour = (colour + 1) % self.geometry.colours;
        colour * self.geometry.align as u32
    }

    /// Takes empty slabs out of their lists until `keep` are left.
    fn detach_empty<'a>(&'a self, shared: &'a Caches<P>, state: &mut State, keep: usize) -> Leaving<'a, P> {
        let frames = shared.frames();
        let mut detached = None;
        while state.numbers.empty > keep && self.walks.load(Acquire) == 0 {
            let Some(first) = state.lists[EMPTY] else { break };
            // SAFETY: what is in a list is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            self.unlink(state, frames, EMPTY, first, slab);
            self.unlink(state, frames, ALL, first, slab);
            slab.set_next(OF_ALL, detached.replace(first));
            state.numbers.empty -= 1;
            state.numbers.slabs -= 1;
        }
        Leaving { slabs: self, shared, first: detached }
    }

    /// Gives the memory of a detached slab back, in which no object is constructed.
    fn release(&self, shared: &Caches<P>, first: Frame) {
        let frames = shared.frames();
        let header = self.header(frames, first, frames.pointer(first));
        frames.free_slab(first, self.geometry.frames);
        if self.geometry.off_slab {
            // SAFETY: allocated with this size in `create`; the slab is gone.
            unsafe { shared.free_metadata(header, self.geometry.header_bytes()) };
        }
    }

    fn destroy_objects(&self, slab: Slab<'_>) {
        let Some(lifecycle) = self.lifecycle else { return };
        for (slot, state) in slab.states().iter().enumerate() {
            // First the state, so that a destructor that panics is not called again.
            if state.swap(RAW, Relaxed) == FREE {
                // SAFETY: the object is constructed, free, and in a slab that only we know.
                unsafe { (lifecycle.fini)(slab.object(slot)) };
            }
        }
    }

    /// Puts an empty slab that is in no list into its two lists.
    fn attach(&self, state: &mut State, frames: &Frames<P>, first: Frame) {
        state.numbers.slabs += 1;
        state.numbers.empty += 1;
        // SAFETY: the caller has a slab of this cache.
        unsafe { self.slab(frames, first) }.set_list(EMPTY);
        self.push(state, frames, EMPTY, first);
        self.push(state, frames, ALL, first);
    }

    /// Moves a slab to the list that is right for it.
    fn place(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>) {
        self.place_at(state, frames, first, slab, None);
    }

    /// The same; a slab that is no home yet becomes `home`, if it is partial.
    fn place_at(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>, home: Option<usize>) {
        let new = match (self.band_of(slab), slab.list()) {
            (band @ (EMPTY | FULL), _) => band,
            (_, old @ HOME..) => old,
            (band, _) => home.unwrap_or(band),
        };
        self.move_to(state, frames, first, slab, new);
    }

    fn move_to(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>, new: usize) {
        let old = slab.list();
        if old == new {
            return;
        }
        self.unlink(state, frames, old, first, slab);
        slab.set_list(new);
        self.push(state, frames, new, first);
        state.numbers.empty += usize::from(new == EMPTY);
        state.numbers.empty -= usize::from(old == EMPTY);
        let busy = state.numbers.slabs - state.numbers.empty;
        state.busiest = state.busiest.max(busy);
        state.idlest = state.idlest.min(busy);
    }

    fn push(&self, state: &mut State, frames: &Frames<P>, list: usize, first: Frame) {
        // SAFETY: the caller has a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        let links = links_of(list);
        let next = state.lists[list].replace(first);
        state.filled |= 1 << list;
        slab.set_previous(links, None);
        slab.set_next(links, next);
        if let Some(next) = next.and_then(|next| self.slab_if(frames, next)) {
            next.set_previous(links, Some(first));
        }
    }

    fn unlink(&self, state: &mut State, frames: &Frames<P>, list: usize, first: Frame, slab: Slab<'_>) {
        let links = links_of(list);
        let (next, previous) = (slab.next(links), slab.previous(links));
        // A neighbour that does not know this slab is none: something wrote over a link. Then the list ends here.
        let before = previous.and_then(|other| self.slab_if(frames, other)).filter(|s| s.next(links) == Some(first));
        let after = next.and_then(|other| self.slab_if(frames, other)).filter(|s| s.previous(links) == Some(first));
        let is_first = state.lists.get(list).is_some_and(|&slab| slab == Some(first));
        let known = (after.is_some(), before.is_some()) == (next.is_some(), previous.is_some());
        if !known || before.is_some() == is_first {
            self.note_damage(first);
        }
        let kept = next.filter(|_| after.is_some());
        match before {
            Some(before) => before.set_next(links, kept),
            None if is_first => state.lists[list] = kept,
            None => {}
        }
        if let Some(after) = after {
            after.set_previous(links, previous.filter(|_| before.is_some()));
        }
        if state.lists.get(list).is_some_and(Option::is_none) {
            state.filled &= !(1 << list);
        }
    }

    fn band_of(&self, slab: Slab<'_>) -> usize {
        match slab.used() {
            0 => EMPTY,
            used if used == self.geometry.slots => FULL,
            used => 1 + used * BANDS / self.geometry.slots,
        }
    }

    /// Calls `visit` with each object that is allocated. No lock is held then; what is allocated or freed meanwhile may
    /// be left out or visited. Empty slabs stay meanwhile.
    pub(crate) fn for_each_used(&self, frames: &Frames<P>, mut visit: impl FnMut(*mut u8)) {
        self.for_each_slot(frames, |object, state| {
            if state.load(Relaxed) >= AUDITED {
                visit(object);
            }
        });
    }

    /// The same with every slot and its state.
    pub(crate) fn for_each_slot(&self, frames: &Frames<P>, mut visit: impl FnMut(*mut u8, &AtomicU8)) {
        let Some((walk, mut position)) = Walk::begin(self) else { return };
        // It is in the list of all slabs, and as long as there is a walk it stays there.
        while let Some(slab) = position.and_then(|first| walk.0.slab_if(frames, first)) {
            position = slab.next(OF_ALL);
            slab.states().iter().enumerate().for_each(|(slot, state)| visit(slab.object(slot), state));
        }
    }

    /// Runs `work` with the lock held.
    #[cfg(test)]
    pub(crate) fn with_locked<T>(&self, work: impl FnOnce() -> T) -> T {
        let _state = self.state.lock();
        work()
    }

    /// Lets a test change the bits of the lists and the number of empty slabs.
    #[cfg(test)]
    pub(super) fn corrupt(&self, change: impl FnOnce(&mut u32, &mut usize)) {
        let state = &mut *self.state.lock();
        change(&mut state.filled, &mut state.numbers.empty);
    }

    /// Checks the invariants of all slabs.
    pub(crate) fn verify(&self, frames: &Frames<P>) -> Result<(), Broken> {
        let state = self.state.lock();
        let broken = |what: &'static str| Broken::Cache { id: self.id, what };
        let (mut slabs, mut taken) = (0, 0);
        for list in (0..LISTS).filter(|&list| list != ALL) {
            self.verify_list(&state, frames, list, |slab| {
                slabs += 1;
                taken += slab.used();
                if !slab.is_consistent() {
                    return Err("the used count or the summary of a slab is not that of its slots");
                }
                let band = self.band_of(slab);
                let right = slab.list() == list
                    && (band == list
                        || list >= HOME && (EMPTY + 1..FULL).contains(&band) && slab.next(BY_FULLNESS).is_none());
                if right { Ok(()) } else { Err("a slab is in the list of another fullness") }
            })
            .map_err(broken)?;
            if list == EMPTY && slabs != state.numbers.empty {
                return Err(broken("the number of empty slabs is wrong"));
            }
        }
        let mut all = 0;
        self.verify_list(&state, frames, ALL, |_| {
            all += 1;
            Ok(())
        })
        .map_err(broken)?;
        if (slabs, all, taken) != (state.numbers.slabs, state.numbers.slabs, state.numbers.taken) {
            return Err(broken("the number of slabs or of objects is not that of the lists"));
        }
        Ok(())
    }

    /// Checks the links of a list and the records of its slabs, and calls `check` with each slab.
    fn verify_list(
        &self,
        state: &State,
        frames: &Frames<P>,
        list: usize,
        mut check: impl FnMut(Slab<'_>) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        if state.lists[list].is_some() != (state.filled & 1 << list != 0) {
            return Err("the bit of a list does not say whether it has a slab");
        }
        let (mut position, mut previous) = (state.lists[list], None);
        while let Some(first) = position {
            for offset in 0..self.geometry.frames {
                if !matches!(frames.owner(first.offset(offset)), Owner::Slab { cache, .. } if cache == self.id) {
                    return Err("a frame of a slab does not name its cache");
                }
            }
            // SAFETY: its records say that it is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            if slab.previous(links_of(list)) != previous {
                return Err("a slab does not link back to the one before it");
            }
            check(slab)?;
            (previous, position) = (position, slab.next(links_of(list)));
        }
        Ok(())
    }
}

/// The list of the home that the CPU has which this runs on.
fn home_of_this_cpu<P: Platform>() -> Option<usize> {
    let cpu = P::current_cpu();
    (P::CPUS > 1 && cpu < P::CPUS).then_some(HOME + cpu % HOMES)
}

/// Which links of its header a slab uses in a list.
const fn links_of(list: usize) -> usize {
    if list == ALL { OF_ALL } else { BY_FULLNESS }
}

/// Empty slabs on their way back to the page frames, out of their lists, linked by their headers. Those that are left when
/// this is dropped, because a destructor or a report has panicked, go back into the lists.
#[must_use = "they are to be released"]
pub(crate) struct Leaving<'a, P: Platform> {
    slabs: &'a Slabs<P>,
    shared: &'a Caches<P>,
    first: Option<Frame>,
}

impl<P: Platform> Leaving<'_, P> {
    pub(crate) fn are_none(&self) -> bool {
        self.first.is_none()
    }

    /// Destroys what is constructed in the slabs, and gives them back. Returns how many page frames they had.
    pub(crate) fn release(mut self) -> usize {
        let (slabs, frames) = (self.slabs, self.shared.frames());
        let mut released = 0;
        while let Some(first) = self.first {
            // SAFETY: out of its lists but not freed yet, so it is ours alone.
            let slab = unsafe { slabs.slab(frames, first) };
            slabs.destroy_objects(slab);
            self.first = slab.next(OF_ALL);
            slabs.release(self.shared, first);
            released += 1;
        }
        if released > 0 {
            let mut state = slabs.state.lock();
            state.numbers.released = state.numbers.released.wrapping_add(released as u64);
        }
        released * slabs.geometry.frames as usize
    }
}

impl<P: Platform> Drop for Leaving<'_, P> {
    fn drop(&mut self) {
        let (slabs, frames) = (self.slabs, self.shared.frames());
        while let Some(first) = self.first {
            // SAFETY: a slab of this cache, out of its lists.
            self.first = unsafe { slabs.slab(frames, first) }.next(OF_ALL);
            slabs.attach(&mut slabs.state.lock(), frames, first);
        }
    }
}

/// Somebody goes over the list of all slabs: until this is dropped, none leaves it. New ones come before the first.
struct Walk<'a, P: Platform>(&'a Slabs<P>);

impl<'a, P: Platform> Walk<'a, P> {
    /// `None` in an NMI that cannot have the lock.
    fn begin(slabs: &'a Slabs<P>) -> Option<(Self, Option<Frame>)> {
        let state = slabs.state.lock_unless_nmi()?;
        slabs.walks.fetch_add(1, Relaxed);
        Some((Self(slabs), state.lists[ALL]))
    }
}

impl<P: Platform> Drop for Walk<'_, P> {
    fn drop(&mut self) {
        self.0.walks.fetch_sub(1, Release);
    }
}

impl State {
    /// The list whose first slab is to serve: the CPU's home, or else the fullest there is, or else somebody's home.
    fn choose(&self, home: Option<usize>, leave_homes: bool) -> Option<usize> {
        let home = home.filter(|&home| self.lists[home].is_some());
        let fullest = || Some((self.filled & ((1 << FULL) - 1)).checked_ilog2()? as usize);
        let any_home = || if leave_homes { None } else { (HOME..LISTS).find(|&home| self.lists[home].is_some()) };
        home.or_else(fullest).or_else(any_home)
    }

    /// Forgets the slabs of a list.
    #[cold]
    fn cut(&mut self, list: usize) {
        self.lists[list] = None;
        self.filled &= !(1 << list);
    }
}

impl<P> fmt::Debug for Slabs<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slabs").field("id", &self.id).field("geometry", &self.geometry).finish_non_exhaustive()
    }
}
