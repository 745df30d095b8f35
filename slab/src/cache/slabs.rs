//! The slab layer of a cache: its slabs, sorted by how full they are.
//!
//! Slabs are kept in lists by *band*: empty, and eight bands of partial slabs. An object comes from the fullest partial
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
//! 1. A slab is in the list of all slabs, and unless it is full in that of its band, which is that of its used slots, or a home;
//!    nothing else is.
//! 2. Every frame of a slab has a record that names this cache, and says where header and first slot are.

mod find;
mod leave;
mod nmi;
mod verify;

use core::fmt;

use super::geometry::Geometry;
use super::magazine::Round;
use super::shared::Caches;
use super::slab::{AUDITED, BY_FULLNESS, CACHED, FREE, OF_ALL, Slab};
use super::{AllocError, InitFailed};
use crate::fault::Fault;
use crate::frames::{Deferred, Frame, Frames, SlabPlace};
use crate::lock::{IrqLock, Level, OwnLines};
use crate::platform::Platform;
use crate::sync::Ordering::{Relaxed, Release};
use crate::sync::{AtomicU8, AtomicU32};
pub(crate) use leave::Leaving;

/// Partial slabs are told apart by this many degrees of fullness.
pub(super) const BANDS: usize = 8;
const EMPTY: usize = 0;
/// No list: from full slabs nothing is taken.
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
    pub(crate) lifecycle: Option<Lifecycle>,
    state: OwnLines<IrqLock<P, State>>,
    /// Slabs with objects that were freed in an NMI.
    deferred: Deferred,
    /// Who goes over the list of all slabs now, or puts one on that of `deferred`: no slab leaves the cache meanwhile. It goes up
    /// with the lock held, or by who has an object.
    walks: AtomicU32,
    /// A slab whose header was found overwritten, which nobody has reported yet.
    damaged: AtomicU32,
    /// The state of a random number generator; 0 where slots are used in their order. The lock guards it.
    random: AtomicU32,
    /// So many objects may be out of their slabs.
    pub(crate) limit: usize,
}

#[derive(Debug)]
struct State {
    /// First slabs: of each band, of all, and the homes.
    lists: [Option<Frame>; LISTS],
    /// Which of the lists have a slab, a bit each.
    filled: u32,
    numbers: Numbers,
    colour: u32,
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
        let state =
            State { lists: [None; LISTS], filled: 0, numbers, colour: 0, keep: HYSTERESIS, busiest: 0, idlest: 0 };
        let state = OwnLines(IrqLock::ordered(Level::Slabs, state));
        Self {
            geometry: geometry.for_cache(id),
            id,
            lifecycle,
            state,
            deferred: Deferred::new(),
            walks: AtomicU32::new(0),
            damaged: AtomicU32::new(Frame::NONE),
            random: AtomicU32::new(0),
            limit: usize::MAX,
        }
    }
}

impl<P: Platform> Slabs<P> {
    /// Changes the number of the cache, which has no slab yet.
    pub(super) const fn set_id(&mut self, id: u32) {
        self.id = id;
        self.geometry = self.geometry.for_cache(id);
    }

    /// An object out of its slab, and whether it is constructed. Its slot is [`CACHED`] then.
    pub(crate) fn take(&self, shared: &Caches<P>, grow: bool) -> Result<(*mut u8, bool), AllocError> {
        let mut round = [Round::NONE];
        let (_, constructed) = self.take_some(shared, grow, false, &mut round)?;
        Ok((round[0].object, constructed))
    }

    /// Fills the front of `rounds` with objects of slabs that are there, or of a new one, and says with how many, at least one,
    /// and whether the last is constructed. Their slots are [`CACHED`] then. `at_home` says whether the CPU is to have a home in this cache.
    pub(crate) fn take_some(
        &self,
        shared: &Caches<P>,
        grow: bool,
        at_home: bool,
        rounds: &mut [Round],
    ) -> Result<(usize, bool), AllocError> {
        let frames = shared.frames();
        self.take_in_deferred(shared);
        // Where the thread goes to another CPU meanwhile, it takes from the home of that which it left.
        let home = if at_home { home_of_this_cpu::<P>() } else { None };
        let leave_homes = grow && home.is_some();
        let taken = self.take_from_lists(&mut self.state.lock(), frames, home, leave_homes, rounds);
        self.report_damage(shared);
        if let Some(taken) = taken? {
            return Ok(taken);
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
        self.take_from_lists(&mut state, frames, home, false, rounds)?.ok_or(AllocError::NoMemory)
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

    /// Fills the front of `rounds` from the slabs that are there, with one hold of the lock, and says with how many.
    pub(crate) fn take_bulk(&self, shared: &Caches<P>, rounds: &mut [Round]) -> usize {
        self.take_in_deferred(shared);
        let taken = self.take_from_lists(&mut self.state.lock(), shared.frames(), None, false, rounds);
        self.report_damage(shared);
        taken.ok().flatten().map_or(0, |(taken, _)| taken)
    }

    fn take_from_lists(
        &self,
        state: &mut State,
        frames: &Frames<P>,
        home: Option<usize>,
        leave_homes: bool,
        rounds: &mut [Round],
    ) -> Result<Option<(usize, bool)>, AllocError> {
        let most = rounds.len().min(self.limit.saturating_sub(state.numbers.taken));
        if most == 0 {
            return Err(AllocError::AtLimit);
        }
        let (mut taken, mut last) = (0, false);
        while taken < most
            && let Some(list) = state.choose(home, leave_homes)
            && let Some(first) = state.lists[list]
        {
            if let Some(slab) = self.slab_if(frames, first).filter(|slab| slab.is_sound() && slab.list() == list)
                && let (count @ 1.., constructed) = slab.take(&mut rounds[taken..most], || self.next_random())
            {
                (taken, last) = (taken + count, constructed);
                state.numbers.taken += count;
                self.place_at(state, frames, first, slab, home);
            } else {
                // Where the rest of the list is, nobody can know any more.
                state.cut(list);
                self.note_damage(first);
            }
        }
        Ok((taken > 0).then_some((taken, last)))
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
            shared.report(Fault::BadControl, frames.slab_place(first).header, None);
        }
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
        // The slab of the last object: what comes one after the other is often of one slab, which is looked at and placed once.
        let mut last: Option<(Frame, Slab<'_>)> = None;
        for (index, object) in objects.clone().into_iter().enumerate() {
            let same = last.filter(|(first, _)| self.is_around(frames, *first, object));
            let Some(((first, slab), slot)) = same
                .or_else(|| self.slab_of(frames, object))
                .and_then(|found| Some((found, Self::cached_slot(found.1, object)?)))
            else {
                bad |= 1 << index;
                continue;
            };
            if same.is_none() {
                if let Some((first, slab)) = last.take() {
                    self.place(&mut state, frames, first, slab);
                }
                last = slab.is_sound().then_some((first, slab));
            }
            if last.is_none() || slab.used() == 0 || state.numbers.taken == 0 {
                self.note_damage(first);
                continue;
            }
            slab.put(slot, constructed);
            state.numbers.taken -= 1;
        }
        if let Some((first, slab)) = last {
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

    /// Whether `object` is in the slab of this cache that starts at `first`.
    fn is_around(&self, frames: &Frames<P>, first: Frame, object: *mut u8) -> bool {
        let frame = frames.frame_of(object);
        frame.is_some_and(|frame| frame.number().wrapping_sub(first.number()) < self.geometry.frames)
    }

    /// The slot of an object of `slab`, if that is [`CACHED`].
    fn cached_slot(slab: Slab<'_>, object: *mut u8) -> Option<usize> {
        slab.slot_of(object).filter(|&slot| slab.states()[slot].load(Relaxed) == CACHED)
    }

    /// Looks at a free object with nobody else having it: calls `look` with the lock held. `None` where it is not free.
    pub(crate) fn with_free<T>(&self, frames: &Frames<P>, object: *mut u8, look: impl FnOnce() -> T) -> Option<T> {
        let _state = self.state.lock();
        (self.state(frames, object)?.load(Relaxed) == FREE).then(look)
    }

    /// Takes this object, if it is free. Its slot is [`CACHED`] then.
    pub(crate) fn take_this(&self, frames: &Frames<P>, object: *mut u8) -> bool {
        let mut state = self.state.lock();
        let Some((first, slab)) = self.slab_of(frames, object) else { return false };
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

    /// Objects that are not free in their slab; in an NMI `None` where that cannot be known.
    pub(crate) fn taken(&self) -> Option<usize> {
        self.state.lock_unless_nmi().map(|state| state.numbers.taken)
    }

    /// All 0 where they cannot be looked at; see [`IrqLock::lock_to_report`].
    pub(crate) fn numbers(&self) -> Numbers {
        self.state.lock_to_report().map_or_else(Numbers::default, |state| state.numbers)
    }

    /// A slab in no list, from new page frames.
    fn create(&self, shared: &Caches<P>) -> Option<Frame> {
        let frames = shared.frames();
        let first = shared.allocate_frames(self.geometry.frames, self.geometry.order)?;
        let places = self.geometry.places(self.next_colour());
        let start = frames.pointer(first);
        let header = if self.geometry.off_slab {
            let Some(header) = shared.allocate_metadata(self.geometry.header_bytes()) else {
                // SAFETY: allocated above, and used by nobody.
                unsafe { frames.free_run(first, self.geometry.frames) };
                return None;
            };
            header.as_ptr()
        } else {
            start.wrapping_add(places.header)
        };
        // SAFETY: the header is in the new slab, where there is no slot, or metadata of that size.
        unsafe { Slab::create(header, &self.geometry) };
        let first_slot = start.wrapping_add(places.first_slot).addr() as u32;
        frames.make_slab(first, self.geometry.frames, self.id, SlabPlace { header, first_slot });
        Some(first)
    }

    fn next_colour(&self) -> u32 {
        let mut state = self.state.lock();
        let colour = state.colour;
        state.colour = (colour + 1) % self.geometry.colours;
        colour
    }

    /// Puts an empty slab that is in no list into its two lists.
    fn attach(&self, state: &mut State, frames: &Frames<P>, first: Frame) {
        state.numbers.slabs += 1;
        state.numbers.empty += 1;
        // SAFETY: the caller has a slab of this cache.
        let slab = unsafe { self.slab(frames, first) };
        slab.set_list(EMPTY);
        self.push(state, frames, EMPTY, first, slab);
        self.push(state, frames, ALL, first, slab);
    }

    /// Moves a slab to the list that is right for it.
    fn place(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>) {
        self.place_at(state, frames, first, slab, None);
    }

    /// The same; a slab that is no home yet becomes `home`, if it is partial.
    #[inline(always)]
    fn place_at(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>, home: Option<usize>) {
        let new = match (self.band_of(slab), slab.list()) {
            (band @ (EMPTY | FULL), _) => band,
            (_, old @ HOME..) => old,
            (band, _) => home.unwrap_or(band),
        };
        if slab.list() != new {
            self.move_to(state, frames, first, slab, new);
        }
    }

    #[inline(never)]
    fn move_to(&self, state: &mut State, frames: &Frames<P>, first: Frame, slab: Slab<'_>, new: usize) {
        let old = slab.list();
        if old != FULL {
            self.unlink(state, frames, old, first, slab);
        }
        slab.set_list(new);
        if new != FULL {
            self.push(state, frames, new, first, slab);
        }
        if old == EMPTY || new == EMPTY {
            state.numbers.empty += usize::from(new == EMPTY);
            state.numbers.empty -= usize::from(old == EMPTY);
            let busy = state.numbers.slabs - state.numbers.empty;
            state.busiest = state.busiest.max(busy);
            state.idlest = state.idlest.min(busy);
        }
    }

    #[inline(always)]
    fn push(&self, state: &mut State, frames: &Frames<P>, list: usize, first: Frame, slab: Slab<'_>) {
        let links = links_of(list);
        let next = state.lists[list].replace(first);
        state.filled |= 1 << list;
        slab.set_previous(links, None);
        slab.set_next(links, next);
        if let Some(next) = next.and_then(|next| self.slab_if(frames, next)) {
            next.set_previous(links, Some(first));
        }
    }

    #[inline(always)]
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

    #[inline(always)]
    fn band_of(&self, slab: Slab<'_>) -> usize {
        match slab.used() {
            0 => EMPTY,
            used if used == self.geometry.slots => FULL,
            used => 1 + ((used * self.geometry.bands_a_slot) >> 32),
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

    /// The first slot that is allocated in the slab at `from`, and does not start before that.
    pub(crate) fn used_from(&self, frames: &Frames<P>, from: *const u8) -> Option<*mut u8> {
        let _walk = Walk::begin(self)?;
        let (_, slab) = self.slab_of(frames, from)?;
        let slots = slab.states().iter().enumerate().filter(|(_, state)| state.load(Relaxed) >= AUDITED);
        slots.map(|(slot, _)| slab.object(slot)).filter(|object| object.addr() >= from.addr()).min()
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
