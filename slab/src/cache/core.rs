//! One cache: magazines over slabs, and the life of an object.
//!
//! An object is constructed when it first leaves its slab, and stays constructed, in use or free, until its slab goes
//! back to the page frames. Neither happens with a lock held.

use crate::sync::{AtomicPtr, AtomicU16, AtomicU32, AtomicUsize, Counter, Ordering::Relaxed, Ordering::Release};
use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use super::AllocError;
use super::geometry::Geometry;
use super::magazine::{Next, Round};
use super::magazines::{self, Magazines};
use super::public::BATCH;
use super::shared::Caches;
use super::slab::{CACHED, USED, change};
use super::slabs::{Leaving, Lifecycle, Slabs};
use crate::check::Room;
use crate::fault::{CacheName, Caller, Fault};
use crate::inject::Injection;
use crate::lock::Interrupts;
use crate::platform::{Platform, in_nmi};
use crate::stats::CacheStats;
use crate::verify::Broken;

/// A cache of equal objects.
pub(crate) struct Core<P> {
    pub(super) name: Name,
    /// Caches of one name are numbered, from 0 on.
    pub(crate) namesake: u32,
    pub(crate) slabs: Slabs<P>,
    pub(crate) magazines: Magazines<P>,
    /// What went past the magazines.
    pub(super) allocations: Counter,
    pub(super) frees: Counter,
    failures: Counter,
    pub(super) injection: Injection,
    /// What is checked of objects that are allocated from now on; see [`check`](crate::check).
    pub(super) checks: AtomicU16,
    /// The cache that these come from; null before the first.
    pub(super) twin: AtomicPtr<Core<P>>,
    /// This is such a cache: how its slots are divided, and what happens to the objects in them.
    pub(super) room: Option<(Room, Option<Lifecycle>)>,
    /// Neighbours in the registry, whose lock guards these, and how many look at it: as long as there are any, it stays.
    pub(super) next: AtomicPtr<Core<P>>,
    pub(super) previous: AtomicPtr<Core<P>>,
    pub(super) visitors: AtomicU32,
}

/// A name in memory that something may have written over, and that a report must be able to say: kept twice.
#[derive(Debug)]
pub(super) struct Name([NameParts; 2]);

#[derive(Debug)]
struct NameParts {
    start: AtomicPtr<u8>,
    length: AtomicUsize,
}

impl NameParts {
    const fn new(name: &'static str) -> Self {
        Self { start: AtomicPtr::new(name.as_ptr().cast_mut()), length: AtomicUsize::new(name.len()) }
    }

    fn get(&self) -> (*mut u8, usize) {
        (self.start.load(Relaxed), self.length.load(Relaxed))
    }
}

impl Name {
    const fn new(name: &'static str) -> Self {
        Self([NameParts::new(name), NameParts::new(name)])
    }

    /// The name, or what stands for it where it was overwritten.
    pub(super) fn get(&self) -> &'static str {
        let [(start, length), again] = self.0.each_ref().map(NameParts::get);
        if (start, length) != again {
            return "a cache whose name was overwritten";
        }
        // SAFETY: twice the same, so it is what `new` has written: the parts of a `&'static str`.
        unsafe { core::str::from_utf8_unchecked(core::slice::from_raw_parts(start, length)) }
    }

    /// Lets a test write over it.
    #[cfg(test)]
    pub(crate) fn overwrite(&self) {
        self.0[0].start.store(core::ptr::without_provenance_mut(0x4141_4141), Relaxed);
    }
}

/// Objects that are taken from a slab at a time, where the CPU has a magazine for them.
const REFILL: usize = 16;

/// For what an object is allocated, and by whom, for those who check it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) layout: Layout,
    pub(crate) caller: Caller,
}

impl<P> Core<P> {
    pub(crate) const fn new(
        name: &'static str,
        id: u32,
        geometry: Geometry,
        lifecycle: Option<Lifecycle>,
        magazines: bool,
    ) -> Self {
        Self {
            name: Name::new(name),
            namesake: 0,
            slabs: Slabs::new(id, geometry, lifecycle),
            magazines: Magazines::new(geometry.stride, magazines),
            allocations: Counter::new(0),
            frees: Counter::new(0),
            failures: Counter::new(0),
            injection: Injection::new(),
            checks: AtomicU16::new(0),
            twin: AtomicPtr::new(core::ptr::null_mut()),
            room: None,
            next: AtomicPtr::new(core::ptr::null_mut()),
            previous: AtomicPtr::new(core::ptr::null_mut()),
            visitors: AtomicU32::new(0),
        }
    }

    /// Bytes that an object may use.
    #[inline]
    pub(crate) fn object_size(&self) -> usize {
        self.slabs.geometry.stride
    }

    /// It stays until [`end_visit`](Self::end_visit).
    pub(crate) fn begin_visit(&self) {
        self.visitors.fetch_add(1, Relaxed);
    }

    pub(crate) fn end_visit(&self) {
        self.visitors.fetch_sub(1, Release);
    }

    /// What makes allocations from this cache fail.
    #[cfg(feature = "fault-injection")]
    pub(crate) const fn injector(&self) -> &crate::Injector {
        self.injection.injector()
    }

    /// How many requests of this cache or of the page frames were refused on purpose.
    #[inline]
    pub(crate) fn refusals(&self, shared: &Caches<P>) -> u64 {
        self.injection.refusals().wrapping_add(shared.frames().refusals())
    }
}

impl<P: Platform> Core<P> {
    /// An object that this CPU has at hand, where there is nothing to do but to hand it out.
    #[inline]
    pub(crate) fn allocate_at_hand(&self, shared: &Caches<P>) -> Option<NonNull<u8>> {
        if self.injection.is_armed() {
            return None;
        }
        let mark = |round| self.slabs.change(shared.frames(), round, CACHED, USED);
        let round = {
            // So that on this CPU nothing comes between.
            let _interrupts = Interrupts::<P>::disable();
            self.magazines.pop_here(mark)?
        };
        self.injection.count();
        // SAFETY: an object is somewhere.
        Some(unsafe { NonNull::new_unchecked(round.object) })
    }

    /// Frees an object in use, where there is nothing to do but to keep it. `false`, and nothing done, where it is none, and
    /// where more is to be done.
    ///
    /// # Safety
    ///
    /// Nobody uses the object any more.
    #[inline]
    pub(crate) unsafe fn free_at_hand(&self, shared: &Caches<P>, object: *mut u8) -> bool {
        // So that on this CPU nothing comes between.
        let interrupts = Interrupts::<P>::disable();
        let Some(next) = self.magazines.next_here() else { return false };
        if next.put_back(object, |round| self.slabs.change(shared.frames(), round, USED, CACHED)) {
            return true;
        }
        self.free_to(shared, next, object, interrupts)
    }

    /// Finds the slot of an object, and frees the object to where there is room. Not inlined, since it calls nobody and saves
    /// no register; and nothing is left to its caller, so that that need not save any either before it calls this.
    #[inline(never)]
    fn free_to(&self, shared: &Caches<P>, next: Next<'_>, object: *mut u8, _interrupts: Interrupts<P>) -> bool {
        let state = self.slabs.state_at_hand(shared.frames(), object).filter(|state| change(state, USED, CACHED));
        state.map(|state| next.put(Round { object, state })).is_some()
    }

    /// An object, constructed if the cache constructs. Its slot has the state `state` then.
    #[inline]
    pub(crate) fn allocate(&self, shared: &Caches<P>, grow: bool, state: u8) -> Result<NonNull<u8>, AllocError> {
        if self.injection.refuse() {
            count(&self.failures);
            return Err(AllocError::NoMemory);
        }
        while let Some(round) = self.magazines.take() {
            if let Some(object) = self.hand_out(shared, round, state) {
                return Ok(object);
            }
        }
        self.allocate_from_slab(shared, grow, state)
    }

    #[cold]
    fn allocate_from_slab(&self, shared: &Caches<P>, grow: bool, state: u8) -> Result<NonNull<u8>, AllocError> {
        if in_nmi::<P>() {
            let (round, _) = self.slabs.take_at_once(shared)?;
            count(&self.allocations);
            return self.hand_out(shared, round, state).ok_or(AllocError::NoMemory);
        }
        self.magazines.report_damage(shared);
        let at_home = self.magazines.are_worthwhile(shared);
        // What need not be constructed half fills the magazine, too, so that frees have room.
        let wanted =
            if at_home && self.slabs.lifecycle.is_none() { 1 + self.magazines.make_room(shared) / 2 } else { 1 };
        let mut rounds = [Round::NONE; REFILL];
        let rounds = &mut rounds[..wanted.min(REFILL)];
        let (taken, constructed) = self.slabs.take_some(shared, grow, at_home, rounds)?;
        let (round, more) = (rounds[0], &rounds[1..taken]);
        self.put_rounds(shared, self.magazines.stock(more));
        if let Some(lifecycle) = self.slabs.lifecycle.filter(|_| !constructed) {
            self.construct(shared, &lifecycle, round.object, round.object)?;
        }
        count(&self.allocations);
        self.hand_out(shared, round, state).ok_or(AllocError::NoMemory)
    }

    /// An object for whom `request` says, with the checks that the cache has now.
    #[inline]
    pub(crate) fn allocate_for(
        &self,
        shared: &Caches<P>,
        grow: bool,
        request: Request,
    ) -> Result<NonNull<u8>, AllocError> {
        if self.checks().is_empty() {
            self.allocate(shared, grow, USED)
        } else {
            self.allocate_with_checks(shared, grow, request)
        }
    }

    /// The same after it has failed with `error`: now with what can be had elsewhere.
    #[cold]
    pub(crate) fn allocate_again(
        &self,
        shared: &Caches<P>,
        error: AllocError,
        request: Request,
    ) -> Result<NonNull<u8>, AllocError> {
        let result = match error {
            AllocError::NoMemory => self.allocate_with_relief(shared, request),
            AllocError::AtLimit if !in_nmi::<P>() => {
                self.drain(shared);
                self.end_waits_of_twin(shared);
                self.allocate_for(shared, true, request)
            }
            error => Err(error),
        };
        if result.is_err() {
            self.count_failure();
        }
        result
    }

    fn allocate_with_relief(&self, shared: &Caches<P>, request: Request) -> Result<NonNull<u8>, AllocError> {
        let attempt = || match self.allocate_for(shared, true, request) {
            Err(AllocError::NoMemory) => None,
            result => Some(result),
        };
        shared.with_relief(self.slabs.geometry.bytes(), attempt).unwrap_or(Err(AllocError::NoMemory))
    }

    /// A request that its maker has been told has failed.
    #[cold]
    pub(crate) fn count_failure(&self) {
        count(&self.failures);
    }

    /// Fills the front of `objects` from slabs that are there, past the magazines, with one hold of the lock and at most
    /// [`BATCH`] at a time. Objects that are to be constructed do not come this way.
    pub(super) fn allocate_bulk(&self, shared: &Caches<P>, objects: &mut [*mut u8]) -> usize {
        if self.slabs.lifecycle.is_some() || !self.checks().is_empty() || in_nmi::<P>() {
            return 0;
        }
        let mut rounds = [Round::NONE; BATCH];
        let wanted = objects.len().min(BATCH);
        let taken = self.slabs.take_bulk(shared, &mut rounds[..wanted]);
        self.allocations.fetch_add(taken as u64, Relaxed);
        let handed_out = rounds[..taken].iter().filter_map(|&round| self.hand_out(shared, round, USED));
        objects.iter_mut().zip(handed_out).map(|(place, object)| *place = object.as_ptr()).count()
    }

    /// Constructs an object in a slot that is ours, which starts at `slot`. Where it fails, the slot goes back.
    pub(super) fn construct(
        &self,
        shared: &Caches<P>,
        lifecycle: &Lifecycle,
        object: *mut u8,
        slot: *mut u8,
    ) -> Result<(), AllocError> {
        /// Takes the slot back unless the constructor has returned, which it may also not do by a panic.
        struct Undo<F: FnMut()>(F);
        impl<F: FnMut()> Drop for Undo<F> {
            fn drop(&mut self) {
                self.0();
            }
        }
        let undo = Undo(|| _ = self.release(self.slabs.put(shared, [slot], false)));
        // SAFETY: the object is as large and aligned as its constructor was told, and nobody else's.
        let constructed = unsafe { (lifecycle.init)(object) };
        if constructed.is_ok() {
            core::mem::forget(undo);
        }
        constructed.map_err(|_| AllocError::ConstructorFailed)
    }

    /// Marks an object that this CPU has for itself as allocated. What is no such object is reported, and left alone.
    #[inline]
    pub(crate) fn hand_out(&self, shared: &Caches<P>, round: Round, state: u8) -> Option<NonNull<u8>> {
        if self.slabs.change(shared.frames(), round, CACHED, state) {
            return NonNull::new(round.object);
        }
        shared.report(Fault::BadRound, round.object, None);
        None
    }

    /// The round of an object that is not free. What is no object of this cache is reported.
    pub(super) fn round_of(&self, shared: &Caches<P>, object: *mut u8) -> Option<Round> {
        let state = self.slabs.state(shared.frames(), object);
        if state.is_none() {
            shared.report(Fault::BadRound, object, None);
        }
        state.map(|state| Round { object, state })
    }

    /// Frees an object that was allocated in the state `state`. What is no such object is a fault, and nothing has
    /// changed.
    ///
    /// # Safety
    ///
    /// Nobody uses the object any more.
    pub(crate) unsafe fn free(&self, shared: &Caches<P>, object: *mut u8, state: u8) -> Result<(), Fault> {
        let round = self.take_back(shared, object, state)?;
        self.keep(shared, round);
        Ok(())
    }

    /// The object is the caller's to give to a magazine or a slab then.
    pub(crate) fn take_back(&self, shared: &Caches<P>, object: *mut u8, state: u8) -> Result<Round, Fault> {
        let Some(slot) = self.slabs.state(shared.frames(), object) else {
            return Err(self.refusal(shared, object, None));
        };
        let taken = {
            let _interrupts = Interrupts::<P>::disable();
            change(slot, state, CACHED)
        };
        if taken {
            Ok(Round { object, state: slot })
        } else {
            Err(self.refusal(shared, object, Some(slot.load(Relaxed))))
        }
    }

    /// Why an object is not taken back whose slot has the state `found`, or that has none.
    #[cold]
    fn refusal(&self, shared: &Caches<P>, object: *const u8, found: Option<u8>) -> Fault {
        match found {
            // Lent for a smaller size.
            Some(USED..) => Fault::BadSize { freed: self.object_size(), allocated: self.object_size() },
            Some(_) => Fault::DoubleFree,
            None => self.slabs.find(shared.frames(), object).err().unwrap_or(Fault::DoubleFree),
        }
    }

    /// Puts an object that is out of its slab and nobody's into a magazine, or else into its slab.
    pub(super) fn keep(&self, shared: &Caches<P>, round: Round) {
        if let Err(round) = self.magazines.put(shared, round, |rounds| self.put_rounds(shared, rounds)) {
            count(&self.frees);
            if in_nmi::<P>() {
                self.slabs.defer(shared, round.object);
            } else {
                self.put_rounds(shared, &[round]);
            }
        }
    }

    /// Gives objects that were taken back to their slabs, with one hold of the lock.
    pub(super) fn put_batch(&self, shared: &Caches<P>, rounds: &[Round]) {
        if in_nmi::<P>() {
            return rounds.iter().for_each(|&round| self.keep(shared, round));
        }
        self.frees.fetch_add(rounds.len() as u64, Relaxed);
        self.put_rounds(shared, rounds);
    }

    fn put_rounds(&self, shared: &Caches<P>, rounds: &[Round]) {
        for rounds in rounds.chunks(BATCH) {
            self.release(self.slabs.put(shared, rounds.iter().map(|round| round.object), true));
        }
    }

    /// Gives slabs back to the page frames. Returns how many they had.
    pub(super) fn release(&self, leaving: Leaving<'_, P>) -> usize {
        if !leaving.are_none() {
            self.magazines.recall();
        }
        leaving.release()
    }

    /// Gives everything back. The slabs are gone then, as there are no objects in use.
    ///
    /// # Safety
    ///
    /// No CPU uses this cache meanwhile.
    pub(super) unsafe fn tear_down(&self, shared: &Caches<P>) {
        // SAFETY: passed on to the caller.
        unsafe { self.magazines.tear_down(shared, |rounds| self.put_rounds(shared, rounds)) };
        self.release(self.slabs.reap(shared, true));
    }

    /// The state of the slot of an object; a fault where there is none.
    pub(crate) fn state_of(&self, shared: &Caches<P>, object: *const u8) -> Result<u8, Fault> {
        let (slab, slot) = self.slabs.find(shared.frames(), object)?;
        Ok(slab.states()[slot].load(Relaxed))
    }

    /// Gives back what the magazines and the slabs have and do not use. Returns the page frames that went back.
    pub(crate) fn reap(&self, shared: &Caches<P>) -> usize {
        if in_nmi::<P>() {
            return 0;
        }
        let released = || self.slabs.numbers().released;
        let before = released();
        self.drain(shared);
        self.release(self.slabs.reap(shared, true));
        released().saturating_sub(before) as usize * self.slabs.geometry.frames as usize
    }

    /// Gives the slabs back what the magazines of this CPU and of the depot hold.
    fn drain(&self, shared: &Caches<P>) {
        self.magazines.drain(shared, |rounds| self.put_rounds(shared, rounds));
    }

    /// What a CPU is to do from time to time.
    pub(super) fn follow_reap(&self, shared: &Caches<P>) {
        self.slabs.take_in_deferred(shared);
        if self.magazines.is_behind(shared) {
            self.drain(shared);
        }
    }

    /// A CPU leaves.
    ///
    /// # Safety
    ///
    /// It does not use this cache meanwhile.
    pub(super) unsafe fn retire_cpu(&self, shared: &Caches<P>, cpu: usize) {
        // SAFETY: passed on to the caller.
        unsafe { self.magazines.drain_cpu(shared, cpu, |rounds| self.put_rounds(shared, rounds)) };
    }

    /// An interval is over: what was not needed in it goes back.
    pub(crate) fn end_interval(&self, shared: &Caches<P>) {
        self.magazines.end_interval(shared, |rounds| self.put_rounds(shared, rounds));
        self.slabs.end_interval(shared.frames());
        self.release(self.slabs.reap(shared, false));
    }

    /// Objects that are allocated.
    pub(crate) fn in_use(&self) -> usize {
        let (allocations, frees) = self.traffic(&self.magazines.numbers());
        difference(allocations, frees)
    }

    /// Allocations and frees, those that went past the magazines too.
    fn traffic(&self, magazines: &magazines::Numbers) -> (u64, u64) {
        let frees = self.frees.load(Relaxed).wrapping_add(magazines.frees);
        (self.allocations.load(Relaxed).wrapping_add(magazines.allocations), frees)
    }

    /// What tables call it.
    pub(crate) fn full_name(&self) -> CacheName {
        CacheName { name: self.name.get(), number: self.namesake }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let (slabs, magazines) = (self.slabs.numbers(), self.magazines.numbers());
        let (allocations, frees) = self.traffic(&magazines);
        let in_use = difference(allocations, frees);
        let geometry = &self.slabs.geometry;
        CacheStats {
            name: self.name.get(),
            namesake: self.namesake,
            object_size: geometry.stride,
            slab_size: geometry.bytes(),
            objects_per_slab: geometry.slots,
            off_slab: geometry.off_slab,
            colours: geometry.colours,
            slabs: slabs.slabs,
            empty_slabs: slabs.empty,
            in_use,
            in_magazines: slabs.taken.saturating_sub(in_use),
            allocations,
            frees,
            failures: self.failures.load(Relaxed),
            magazine_rounds: magazines.rounds,
            full_magazines: magazines.full,
            empty_magazines: magazines.empty,
            depot_contention: magazines.contention,
            magazines_reaped: magazines.reaped,
            slabs_created: slabs.created,
            slabs_released: slabs.released,
        }
    }

    /// Checks the invariants of the slabs and of the magazines.
    pub(crate) fn verify(&self, shared: &Caches<P>) -> Result<(), Broken> {
        self.slabs.verify(shared.frames())?;
        let magazines = self.magazines.verify(|round, is_free| match self.slabs.state(shared.frames(), round.object) {
            Some(state) => core::ptr::eq(state, round.state) && (!is_free || state.load(Relaxed) == CACHED),
            None => false,
        });
        magazines.map_err(|what| Broken::Cache { id: self.slabs.id, what })
    }
}

/// How many more were allocated than freed; while other CPUs do either, the counts may not be of one moment.
fn difference(allocations: u64, frees: u64) -> usize {
    allocations.wrapping_sub(frees).cast_signed().max(0) as usize
}

/// Adds one to a counter that several CPUs write. It wraps.
pub(super) fn count(counter: &Counter) {
    counter.fetch_add(1, Relaxed);
}

impl<P> fmt::Debug for Core<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("name", &self.name.get()).field("slabs", &self.slabs).finish_non_exhaustive()
    }
}
