//! A magazine: a block of metadata that holds rounds, last in, first out.
//!
//! A round is a constructed, free object, and where the state of its slot is; an arena's is an integer in the shape of one.

use crate::sync::{AtomicPtr, AtomicU8, AtomicU16, AtomicU32, Counter, Ordering::Relaxed};
use core::cell::Cell;
use core::ptr::NonNull;

use super::shared::Caches;
use super::sizing::{Kind, MOST_ROUNDS};
use crate::platform::Platform;

/// The front of a magazine's memory; the rounds follow.
#[derive(Debug)]
#[repr(C)]
struct Body {
    /// The magazine behind it in a list.
    next: AtomicPtr<Body>,
    rounds: AtomicU16,
    /// Rounds that it holds.
    capacity: AtomicU16,
    /// What follows from the other two and from where it is, for those who ask whether something has written over it.
    seal: AtomicU32,
}

const _: () = assert!(size_of::<Body>() == size_of::<Round>());

/// An object, and the state of its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Round {
    pub(crate) object: *mut u8,
    pub(crate) state: *const AtomicU8,
}

impl Round {
    /// No round.
    pub(crate) const NONE: Self = Self { object: core::ptr::null_mut(), state: core::ptr::null() };
}

/// A magazine that the holder of this owns.
///
/// Invariant: it points to a block of metadata that has room for `capacity` rounds, of which `rounds` are written. Something
/// may write over it all the same: a pop never reads beyond what the largest magazine has, and those who exchange magazines
/// ask [`is_sound`](Self::is_sound) first.
#[derive(Debug)]
pub(super) struct Magazine(NonNull<Body>);

impl Magazine {
    /// An empty magazine; `None` where there is no memory.
    pub(super) fn create<P: Platform>(shared: &Caches<P>, kind: Kind) -> Option<Self> {
        let body = shared.allocate_metadata(kind.bytes())?.cast::<Body>();
        let empty = Body {
            next: AtomicPtr::new(core::ptr::null_mut()),
            rounds: AtomicU16::new(0),
            capacity: AtomicU16::new(kind.rounds() as u16),
            seal: AtomicU32::new(seal_of(body.as_ptr(), kind.rounds()) ^ mixed(0)),
        };
        // SAFETY: the block is ours, at least as large as a body, and aligned as metadata is.
        unsafe { body.write(empty) };
        Some(Self(body))
    }

    /// Frees the memory of an empty magazine.
    pub(super) fn destroy<P: Platform>(self, shared: &Caches<P>) {
        debug_assert!(self.is_empty());
        if let Some(kind) = self.kind() {
            // SAFETY: allocated in `create` with this size, and `self` is the only way to it.
            unsafe { shared.free_metadata(self.0.as_ptr().cast(), kind.bytes()) };
        }
    }

    pub(super) fn push(&self, round: Round) -> bool {
        let rounds = self.len();
        let has_room = rounds < self.capacity();
        if has_room {
            // SAFETY: `rounds` is less than the magazine has room for.
            unsafe { self.slot(rounds).write(round) };
            self.body().rounds.store(rounds as u16 + 1, Relaxed);
        }
        has_room
    }

    /// Forgets the rounds that were taken out.
    fn forget(&self) {
        for index in self.len()..self.capacity() {
            // SAFETY: less than the magazine has room for.
            unsafe { self.slot(index).write(Round::NONE) };
        }
    }

    pub(super) fn pop(&self) -> Option<Round> {
        let rounds = self.len().wrapping_sub(1);
        if rounds >= MOST_ROUNDS {
            return None;
        }
        self.body().rounds.store(rounds as u16, Relaxed);
        // SAFETY: written by `push`.
        Some(unsafe { self.slot(rounds).read() })
    }

    /// The rounds in it.
    pub(super) fn rounds(&self) -> &[Round] {
        // SAFETY: so many are written, and they change only through `self`'s owner, who does not push or pop meanwhile.
        unsafe { core::slice::from_raw_parts(self.slot(0), self.len()) }
    }

    /// Forgets its rounds.
    pub(super) fn clear(&self) {
        self.body().rounds.store(0, Relaxed);
    }

    pub(super) fn len(&self) -> usize {
        self.body().rounds.load(Relaxed) as usize
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() == self.capacity()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it holds less than magazines of this kind.
    pub(super) fn is_smaller_than(&self, kind: Kind) -> bool {
        self.capacity() < kind.rounds()
    }

    /// Whether nothing has written over its front.
    pub(super) fn is_sound(&self) -> bool {
        let seal = seal_of(self.0.as_ptr(), self.capacity()) ^ mixed(self.body().next.load(Relaxed).addr());
        seal == self.body().seal.load(Relaxed) && self.len() <= self.capacity()
    }

    /// Puts `next` behind it in a list. What was not sound is not sound then either.
    fn set_next(&self, next: *mut Body) {
        let old = self.body().next.load(Relaxed);
        let seal = self.body().seal.load(Relaxed) ^ mixed(old.addr()) ^ mixed(next.addr());
        self.body().seal.store(seal, Relaxed);
        self.body().next.store(next, Relaxed);
    }

    /// Where it is, for reports.
    pub(super) fn address(&self) -> *mut u8 {
        self.0.as_ptr().cast()
    }

    fn kind(&self) -> Option<Kind> {
        Kind::holding(self.capacity())
    }

    fn capacity(&self) -> usize {
        self.body().capacity.load(Relaxed) as usize
    }

    /// Lets a test write over it.
    #[cfg(test)]
    pub(super) fn overwrite(&self, rounds: u16, capacity: u16) {
        self.body().rounds.store(rounds, Relaxed);
        self.body().capacity.store(capacity, Relaxed);
    }

    fn body(&self) -> &Body {
        // SAFETY: the invariant of the type.
        unsafe { self.0.as_ref() }
    }

    #[inline]
    fn slot(&self, index: usize) -> *mut Round {
        self.0.as_ptr().wrapping_add(1).cast::<Round>().wrapping_add(index)
    }
}

/// The part of a magazine's seal that stays: where it is, and how many rounds it holds.
fn seal_of(body: *const Body, capacity: usize) -> u32 {
    mixed(body.addr() ^ capacity.rotate_right(8))
}

/// Bits of all bytes of a number in each of its own, by the golden ratio (Knuth, vol. 3, 6.4).
fn mixed(number: usize) -> u32 {
    ((number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

/// Stands for a magazine where there is none: it has no round, and no room for one.
static NONE: Body = Body {
    next: AtomicPtr::new(core::ptr::null_mut()),
    rounds: AtomicU16::new(0),
    capacity: AtomicU16::new(0),
    seal: AtomicU32::new(0),
};

/// A place for a magazine.
///
/// Invariant: it points to a magazine that is in no other place, or to [`NONE`].
/// Only the CPU looks at it whose place this is.
#[derive(Debug)]
pub(super) struct Place(Cell<NonNull<Body>>);

impl Place {
    pub(super) const fn empty() -> Self {
        Self(Cell::new(NonNull::from_ref(&NONE)))
    }

    /// Takes the magazine out, if there is one.
    pub(super) fn take(&self) -> Option<Magazine> {
        let magazine = self.get();
        self.put(None);
        magazine
    }

    /// Puts a magazine in; there is none in it.
    pub(super) fn put(&self, magazine: Option<Magazine>) {
        self.0.set(magazine.map_or(NonNull::from_ref(&NONE), |magazine| magazine.0));
    }

    /// Calls `look` with the magazine in it.
    pub(super) fn with<T>(&self, look: impl FnOnce(&Magazine) -> T) -> Option<T> {
        self.get().map(|magazine| look(&magazine))
    }

    fn get(&self) -> Option<Magazine> {
        let magazine = self.magazine();
        if core::ptr::eq(magazine.0.as_ptr(), &raw const NONE) { None } else { Some(magazine) }
    }

    /// The magazine, or what stands for it.
    #[inline]
    fn magazine(&self) -> Magazine {
        Magazine(self.0.get())
    }
}

/// The place of the magazine that a CPU uses. What each use needs is here, on the CPU's own cache line, and counted in
/// bytes, which spares the multiplication.
///
/// Invariants:
/// 1. `limit` is 0, or as many bytes of rounds as the magazine has room for, all of which are initialised.
/// 2. Where it is not 0, a round from `fill` on is that of an object whose slab has not left its cache since, or none.
/// 3. `fill` is a multiple of the size of a round. Only the CPU looks at it whose place this is.
#[derive(Debug)]
pub(super) struct Loaded {
    place: Place,
    /// Bytes of the rounds in the magazine; what it says itself is of no account here.
    fill: Cell<u32>,
    limit: AtomicU32,
    /// Rounds that were taken out for somebody, and that somebody has freed.
    pub(super) allocations: Counter,
    pub(super) frees: Counter,
}

const ROUND: u32 = size_of::<Round>() as u32;

impl Loaded {
    pub(super) const fn empty() -> Self {
        Self {
            place: Place::empty(),
            fill: Cell::new(0),
            limit: AtomicU32::new(0),
            allocations: Counter::new(0),
            frees: Counter::new(0),
        }
    }

    /// Takes the last round out, if there is one and `may` says so.
    #[inline]
    pub(super) fn pop_if(&self, may: impl FnOnce(Round) -> bool) -> Option<Round> {
        // Below 0 it is more than any limit.
        let fill = (self.fill.get() as usize).wrapping_sub(ROUND as usize);
        if fill >= self.limit.load(Relaxed) as usize {
            return None;
        }
        // SAFETY: initialised (invariant 1).
        let last = unsafe { self.round(fill).read() };
        may(last).then(|| {
            self.fill.set(fill as u32);
            self.count_allocation();
            last
        })
    }

    #[inline]
    pub(super) fn count_allocation(&self) {
        count(&self.allocations);
    }

    #[inline]
    pub(super) fn count_free(&self) {
        count(&self.frees);
    }

    /// Puts a round in that was freed, if there is room.
    #[inline]
    pub(super) fn free(&self, round: Round) -> bool {
        self.next().map(|next| next.put(round)).is_some()
    }

    /// Puts a round in that nobody has freed, if there is room.
    pub(super) fn stock(&self, round: Round) {
        if let Some(next) = self.next() {
            next.fill(round);
        }
    }

    /// Where the next round goes; `None` where there is no room.
    #[inline]
    pub(super) fn next(&self) -> Option<Next<'_>> {
        let fill = self.fill.get();
        (fill < self.limit.load(Relaxed)).then_some(Next { loaded: self })
    }

    /// Rounds for which there is room.
    pub(super) fn room(&self) -> usize {
        (self.limit.load(Relaxed).saturating_sub(self.fill.get()) / ROUND) as usize
    }

    /// Whether it certainly has no room for a round.
    pub(super) fn is_full(&self) -> bool {
        let limit = self.limit.load(Relaxed);
        limit != 0 && self.fill.get() >= limit
    }

    /// Swaps the magazine, which is full or empty, for that in `previous`, if there is one, it is as wanted and nothing has written
    /// over either.
    pub(super) fn swap_if(&self, previous: &Place, is_wanted: impl Fn(&Magazine) -> bool) -> bool {
        let (Some(old), Some(new)) = (self.place.get(), previous.get()) else { return false };
        old.body().rounds.store((self.fill.get() / ROUND) as u16, Relaxed);
        let swaps = is_wanted(&new) && new.is_sound() && old.is_sound();
        if swaps {
            self.fill.set(new.len() as u32 * ROUND);
            self.open(&new);
            self.place.put(Some(new));
            previous.put(Some(old));
        }
        swaps
    }

    #[inline]
    fn round(&self, at: usize) -> *mut Round {
        // A CPU that goes on when it has been retired, against the contract: models of that are to fail, and not to crash.
        assert!(!cfg!(models) || self.place.get().is_some(), "two CPUs use what is one's");
        self.place.magazine().slot(0).wrapping_byte_add(at)
    }

    /// Calls `look` with each round that was taken out and may be put back.
    pub(super) fn for_each_taken(&self, mut look: impl FnMut(Round)) {
        for at in (self.fill.get()..self.limit.load(Relaxed)).step_by(ROUND as usize) {
            // SAFETY: initialised (invariant 1).
            let round = unsafe { self.round(at as usize).read() };
            if round != Round::NONE {
                look(round);
            }
        }
    }

    /// Slabs are about to leave: what was taken out is not to be known any more. It may be called on any CPU.
    pub(super) fn recall(&self) {
        self.limit.store(0, Relaxed);
    }

    /// Makes good for [`recall`](Self::recall). What is recalled meanwhile is forgotten here, or recalled still.
    pub(super) fn reopen(&self) {
        if self.limit.load(Relaxed) == 0 {
            self.with(|magazine| self.open(magazine));
        }
    }

    fn open(&self, magazine: &Magazine) {
        self.limit.store(magazine.capacity() as u32 * ROUND, Relaxed);
        magazine.forget();
    }

    /// Takes the magazine out, if there is one.
    pub(super) fn take(&self) -> Option<Magazine> {
        self.with(|_| ());
        self.limit.store(0, Relaxed);
        self.place.take()
    }

    /// Puts a magazine in; there is none in it.
    pub(super) fn put(&self, magazine: Option<Magazine>) {
        self.fill.set(magazine.as_ref().map_or(0, Magazine::len) as u32 * ROUND);
        self.place.put(magazine);
        self.reopen();
    }

    /// Calls `look` with the magazine in it, which it may change, too.
    pub(super) fn with<T>(&self, look: impl FnOnce(&Magazine) -> T) -> Option<T> {
        self.place.with(|magazine| {
            magazine.body().rounds.store((self.fill.get() / ROUND) as u16, Relaxed);
            let result = look(magazine);
            self.fill.set(magazine.len() as u32 * ROUND);
            result
        })
    }
}

/// Where the next round of a loaded magazine goes.
///
/// Invariant: the magazine has more room than `fill` bytes of rounds. Nothing is put in or taken out but by `self`.
#[derive(Debug)]
pub(super) struct Next<'a> {
    loaded: &'a Loaded,
}

impl Next<'_> {
    /// Puts the round back that was taken out last, if it is that of `object` and `may` says so.
    #[inline]
    pub(super) fn put_back(&self, object: *mut u8, may: impl FnOnce(Round) -> bool) -> bool {
        // SAFETY: initialised (invariant 1 of `Loaded`).
        let last = unsafe { self.round().read() };
        let kept = core::ptr::eq(last.object, object) && may(last);
        if kept {
            self.advance();
            self.loaded.count_free();
        }
        kept
    }

    /// Puts a round in that was freed.
    #[inline]
    pub(super) fn put(self, round: Round) {
        self.loaded.count_free();
        self.fill(round);
    }

    #[inline]
    fn fill(self, round: Round) {
        // SAFETY: the magazine has room for it there (the invariant).
        unsafe { self.round().write(round) };
        self.advance();
    }

    #[inline]
    fn round(&self) -> *mut Round {
        self.loaded.round(self.loaded.fill.get() as usize)
    }

    #[inline]
    fn advance(&self) {
        self.loaded.fill.set(self.loaded.fill.get() + ROUND);
    }
}

/// Adds one to a counter that only this CPU writes.
#[inline]
fn count(counter: &Counter) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

/// Magazines one behind the other.
#[derive(Debug)]
pub(super) struct List {
    first: AtomicPtr<Body>,
    length: u32,
    /// The shortest that it was since the interval began: so many it did without.
    shortest: u32,
}

impl List {
    pub(super) const fn new() -> Self {
        Self { first: AtomicPtr::new(core::ptr::null_mut()), length: 0, shortest: 0 }
    }

    pub(super) fn push(&mut self, magazine: Magazine) {
        magazine.set_next(self.first.load(Relaxed));
        self.first.store(magazine.0.as_ptr(), Relaxed);
        self.length += 1;
    }

    /// The first magazine. One that is not sound is the last, since nobody knows what follows it.
    pub(super) fn pop(&mut self) -> Option<Magazine> {
        let magazine = self.first()?;
        let next = if magazine.is_sound() { magazine.body().next.load(Relaxed) } else { core::ptr::null_mut() };
        self.length = if next.is_null() { 0 } else { self.length - 1 };
        self.first.store(next, Relaxed);
        self.shortest = self.shortest.min(self.length);
        Some(magazine)
    }

    fn first(&self) -> Option<Magazine> {
        NonNull::new(self.first.load(Relaxed)).map(Magazine)
    }

    pub(super) fn len(&self) -> usize {
        self.length as usize
    }

    /// Begins an interval, and says how many magazines the last one did not need.
    pub(super) fn end_interval(&mut self) -> usize {
        core::mem::replace(&mut self.shortest, self.length) as usize
    }

    /// Calls `look` with each.
    pub(super) fn for_each(&self, mut look: impl FnMut(&Magazine)) {
        let mut next = self.first();
        while let Some(magazine) = next {
            look(&magazine);
            next = NonNull::new(magazine.body().next.load(Relaxed)).map(Magazine);
        }
    }
}
