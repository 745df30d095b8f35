//! Objects with checks: those of a cache's *twin*, whose slots have room for red zones and a tag. See [`check`](crate::check).
//!
//! The twin is a cache of slots, without magazines and constructors. It is made at the first allocation with checks, is in
//! the registry like any other, and stays as long as its original.
//!
//! A slot goes from `RAW` or `FREE` to `CACHED`, with the lock of the slabs; then it is this module's alone, until it is
//! `USED`. Back it is claimed as ever, and goes to its slab at once, or from `QUARANTINED` later. Whoever checks an object that
//! is used, or waits, makes it `AUDITED` meanwhile, with interrupts off: a free waits for that.

use core::alloc::Layout;
use core::ptr::NonNull;

use super::core::{Core, Request, count};
use super::geometry::Geometry;
use super::shared::Caches;
use super::slab::{AUDITED, CACHED, FREE, KEPT, QUARANTINED, RAW, USED, claim};
use super::slabs::Lifecycle;
use super::{AllocError, layout};
use crate::check::{Allocation, Checks, Room, Slot, Tag, Wait, Waiting};
use crate::fault::{Caller, Damage, Event, Fault, Place};
use crate::frames::Frames;
use crate::lock::Interrupts;
use crate::platform::{Platform, in_nmi};
use crate::sync::Ordering::{Acquire, Relaxed};
use crate::sync::{AtomicU8, spin_loop};

impl<P> Core<P> {
    /// What is checked of objects that are allocated from now on.
    #[inline]
    pub(crate) fn checks(&self) -> Checks {
        Checks::from_bits(self.checks.load(Relaxed))
    }

    /// The cache of the objects with checks, once there is one.
    #[inline]
    pub(crate) fn twin(&self) -> Option<&Self> {
        // SAFETY: null, or what `make_twin` has made, which stays as long as its original.
        unsafe { self.twin.load(Acquire).as_ref() }
    }
}

impl<P: Platform> Core<P> {
    pub(super) fn set_checks(&self, checks: Checks) {
        self.checks.store(checks.bits(), Relaxed);
        self.magazines.bypass(!checks.is_empty());
    }

    /// An object with this cache's checks.
    #[cold]
    pub(crate) fn allocate_with_checks(
        &self,
        shared: &Caches<P>,
        grow: bool,
        request: Request,
    ) -> Result<NonNull<u8>, AllocError> {
        if self.injection.refuse() {
            return Err(AllocError::NoMemory);
        }
        let checks = self.checks();
        let twin = match self.twin().map_or_else(|| self.make_twin(shared), Ok) {
            // With room for checks it is larger than an object may be.
            Err(AllocError::BadLayout) => return self.allocate(shared, grow, USED),
            twin => twin?,
        };
        if twin.checks() != checks && !in_nmi::<P>() {
            twin.set_checks(checks);
            twin.slabs.set_random(if checks.contains(Checks::RANDOM) { shared.random_seed() } else { 0 });
        }
        if checks.guard(twin.allocations.load(Relaxed))
            && grow
            && let Some(result) = twin.allocate_guarded(shared, checks, request, self)
        {
            return result;
        }
        twin.allocate_room(shared, checks, grow, request, self)
    }

    /// Whether more objects are out of their slabs than the limit allows, with checks and without: so whoever asks has taken
    /// one too many. Of CPUs that ask at the same time, each of which has taken one, none is told less than there are.
    pub(super) fn is_beyond_limit(&self, shared: &Caches<P>) -> bool {
        let limit = self.slabs.limit;
        let Some(twin) = self.twin().filter(|_| limit < usize::MAX) else { return false };
        // The table of guarded objects last: these locks order it behind what other CPUs have put there.
        let taken = [twin, self].map(|cache| cache.slabs.taken());
        let [Some(with_checks), Some(without)] = taken else { return true };
        with_checks + without + shared.guard.taken(twin.slabs.id) > limit
    }

    /// Lets none of the objects with checks wait any longer.
    pub(super) fn end_waits_of_twin(&self, shared: &Caches<P>) {
        if let Some(twin) = self.twin() {
            shared.end_quarantine(Some(twin));
            shared.end_guard_waits(usize::MAX);
        }
    }

    #[cold]
    fn make_twin(&self, shared: &Caches<P>) -> Result<&Self, AllocError> {
        if in_nmi::<P>() {
            return Err(AllocError::WouldGrow);
        }
        let geometry = &self.slabs.geometry;
        let (room, slot) = Room::of(layout(geometry.stride, geometry.align)).ok_or(AllocError::BadLayout)?;
        let geometry = Geometry::new(slot).ok_or(AllocError::BadLayout)?;
        let memory = shared.allocate_metadata(size_of::<Self>()).ok_or(AllocError::NoMemory)?.cast::<Self>();
        let mut twin = Self::new(self.name.get(), 0, geometry, None, false);
        twin.room = Some((room, self.slabs.lifecycle));
        twin.namesake = self.namesake;
        // SAFETY: the memory is for this, and the twin stays there until `end_twin`.
        unsafe { shared.install(memory, twin, &self.twin) }?;
        self.twin().ok_or(AllocError::TooManyCaches)
    }

    /// Ends the twin, if there is one.
    ///
    /// # Safety
    ///
    /// None of its objects is allocated, and nobody else uses it or its original.
    pub(super) unsafe fn end_twin(&self, shared: &Caches<P>) {
        let Some(twin) = self.twin() else { return };
        shared.end_quarantine(Some(twin));
        // SAFETY: nobody uses it, says the caller.
        unsafe { shared.uninstall(&self.twin) };
    }

    /// Of a twin: its slot at `slot`.
    fn slot_at(&self, slot: *mut u8) -> Option<Slot> {
        let (room, _) = self.room?;
        // SAFETY: the callers have a slot of this cache, which has this room.
        Some(unsafe { room.slot(slot) })
    }

    pub(super) fn lifecycle(&self) -> Option<Lifecycle> {
        self.room.and_then(|(_, lifecycle)| lifecycle)
    }

    /// Of the twin of `original`: a slot, made ready for an object.
    fn allocate_room(
        &self,
        shared: &Caches<P>,
        checks: Checks,
        grow: bool,
        request: Request,
        original: &Self,
    ) -> Result<NonNull<u8>, AllocError> {
        loop {
            let (start, used_before) =
                if in_nmi::<P>() { self.take_room_at_once(shared)? } else { self.slabs.take(shared, grow)? };
            let Some(slot) = self.slot_at(start) else { return Err(AllocError::NoMemory) };
            if !used_before {
                slot.initialise();
            } else if let Some(damage) = damage_of_free(&slot) {
                self.set_state(shared, start, KEPT);
                shared.report_damage(slot.object(), damage, request.caller);
                continue;
            }
            if original.is_beyond_limit(shared) {
                self.put_unused(shared, &slot, used_before);
                return Err(AllocError::AtLimit);
            }
            self.prepare(shared, &slot, checks, request);
            if let Some(lifecycle) = self.lifecycle() {
                self.construct(shared, &lifecycle, slot.object(), start)?;
            }
            count(&self.allocations);
            self.set_state(shared, start, USED);
            return NonNull::new(slot.object()).ok_or(AllocError::NoMemory);
        }
    }

    /// Puts a slot back that nobody has had.
    fn put_unused(&self, shared: &Caches<P>, slot: &Slot, used_before: bool) {
        if !used_before {
            slot.write_tag(&Tag::default());
        }
        if in_nmi::<P>() {
            self.slabs.defer(shared, slot.start());
        } else {
            self.release(self.slabs.put(shared, [slot.start()], true));
        }
    }

    /// Fills an object for its user and the red zones beside it, and writes down who that is.
    pub(super) fn prepare(&self, shared: &Caches<P>, slot: &Slot, checks: Checks, request: Request) {
        let Request { layout, caller } = request;
        if checks.contains(Checks::RED_ZONE) {
            slot.paint_red_zones(layout.size());
        }
        slot.fill_new(layout.size(), checks);
        let allocated = self.event(shared, checks, caller, slot.object(), false);
        let requested = (layout.size(), layout.align());
        slot.write_tag(&Tag { requested, checks, is_free: false, allocated, freed: None });
    }

    /// In an NMI nothing is constructed.
    fn take_room_at_once(&self, shared: &Caches<P>) -> Result<(*mut u8, bool), AllocError> {
        if self.lifecycle().is_some() {
            return Err(AllocError::WouldGrow);
        }
        self.slabs.take_at_once(shared).map(|(round, constructed)| (round.object, constructed))
    }

    fn event(&self, shared: &Caches<P>, checks: Checks, caller: Caller, object: *mut u8, freed: bool) -> Option<Event> {
        checks.contains(Checks::AUDIT).then(|| {
            let event = shared.frames().faults.numbered_event::<P>(caller);
            shared.log.record(&event, object, self.slabs.id, freed);
            event
        })
    }

    fn set_state(&self, shared: &Caches<P>, start: *mut u8, to: u8) {
        if let Some(state) = self.slabs.state(shared.frames(), start) {
            state.store(to, Relaxed);
        }
    }

    /// Takes an object from its user and keeps it out of circulation for good.
    pub(super) fn withdraw(&self, shared: &Caches<P>, object: *mut u8) -> Result<(), Fault> {
        let state = match self.room {
            Some(_) => self.locate(shared, object)?.1,
            None => self.slabs.state(shared.frames(), object).ok_or_else(|| self.fault_of(shared, object))?,
        };
        claim(state, USED, KEPT).map_err(|_| Fault::DoubleFree)?;
        count(&self.frees);
        Ok(())
    }

    /// Of a twin: whether a free of an object for this layout is right, as far as can be said without a claim.
    pub(crate) fn allows_free(&self, shared: &Caches<P>, object: *mut u8, layout: Layout) -> Result<(), Fault> {
        let (slot, state) = self.locate(shared, object)?;
        if !matches!(state.load(Relaxed), USED | AUDITED) {
            return Err(Fault::DoubleFree);
        }
        slot.tag().map_or(Ok(()), |tag| check_layout(&tag, layout))
    }

    /// Of a twin: for how many bytes an object was allocated that is in use.
    pub(crate) fn requested(&self, shared: &Caches<P>, object: *mut u8) -> Result<usize, Fault> {
        let (slot, state) = self.locate(shared, object)?;
        match state.load(Relaxed) {
            USED | AUDITED => slot.tag().map(|tag| tag.requested.0).ok_or(Fault::BadTag),
            _ => Err(Fault::DoubleFree),
        }
    }

    /// The first object that is in use in the slab at `from`, and does not start before that.
    pub(crate) fn used_from(&self, frames: &Frames<P>, from: *mut u8) -> Option<*mut u8> {
        let slot = self.slabs.used_from(frames, from)?;
        Some(slot.wrapping_add(self.room.map_or(0, |(room, _)| room.left)))
    }

    /// Of a twin: the slot of an object, and its state.
    fn locate<'a>(&'a self, shared: &'a Caches<P>, object: *mut u8) -> Result<(Slot, &'a AtomicU8), Fault> {
        if let Some(guarded) = shared.guard.around(object) {
            let is_object = guarded.slot.object() == object && guarded.cache == self.slabs.id;
            return if is_object { Ok((guarded.slot, guarded.state)) } else { Err(Fault::BadBase) };
        }
        let (room, _) = self.room.ok_or(Fault::BadBase)?;
        let start = room.slot_of(object);
        let state = self.slabs.state(shared.frames(), start).ok_or_else(|| self.fault_of(shared, object))?;
        // SAFETY: a slot of this cache, which has this room.
        Ok((unsafe { room.slot(start) }, state))
    }

    /// Of a twin: frees an object that was allocated for `layout`, where the caller says for which. What is wrong with the
    /// free is returned, and nothing has changed then; what is wrong with the object is reported.
    ///
    /// # Safety
    ///
    /// Nobody uses the object any more.
    #[cold]
    pub(crate) unsafe fn free_checked(
        &self,
        shared: &Caches<P>,
        object: *mut u8,
        layout: Option<Layout>,
        caller: Caller,
    ) -> Result<(), Fault> {
        let (slot, state) = self.locate(shared, object)?;
        match claim_when_checked::<P>(state) {
            Ok(()) => {}
            // An NMI handler frees what it has interrupted the check of. It cannot wait, and the object is lost.
            Err(AUDITED) => return Ok(()),
            Err(_) => return Err(Fault::DoubleFree),
        }
        if !slot.is_current() {
            state.store(USED, Relaxed);
            return Err(Fault::DoubleFree);
        }
        let tag = match check_used(&slot, layout) {
            Used::Right(tag) => tag,
            Used::Otherwise(fault) => {
                state.store(USED, Relaxed);
                return Err(fault);
            }
            Used::Damaged(damage) => {
                count(&self.frees);
                state.store(KEPT, Relaxed);
                shared.report_damage(object, damage, caller);
                return Ok(());
            }
        };
        if let Some(lifecycle) = self.lifecycle().filter(|_| !in_nmi::<P>()) {
            // SAFETY: constructed when it was allocated, and given up by its user.
            unsafe { (lifecycle.fini)(object) };
        }
        let checks = self.checks();
        slot.fill_freed(checks);
        if checks.contains(Checks::RED_ZONE) {
            slot.paint_red_zones(slot.size());
        }
        let freed = self.event(shared, checks, caller, object, true);
        slot.write_tag(&Tag { checks, is_free: true, freed, ..tag });
        count(&self.frees);
        let start = slot.start();
        if let Some(index) = shared.guard.place_of(start) {
            shared.release_guarded(index, &slot);
        } else if in_nmi::<P>() {
            self.slabs.defer(shared, start);
        } else if checks.contains(Checks::QUARANTINE) {
            self.let_wait(shared, start, state);
        } else {
            self.release(self.slabs.put(shared, [start], true));
        }
        Ok(())
    }

    /// Why a pointer into this cache that is no object of it is no such.
    fn fault_of(&self, shared: &Caches<P>, object: *mut u8) -> Fault {
        self.slabs.find(shared.frames(), object).err().unwrap_or(Fault::BadBase)
    }

    fn let_wait(&self, shared: &Caches<P>, start: *mut u8, state: &AtomicU8) {
        state.store(QUARANTINED, Relaxed);
        let waiting = Waiting { slot: start, cache: NonNull::from(self), bytes: self.object_size() };
        match shared.quarantine.put(shared, waiting) {
            Wait::Waits => {}
            Wait::Instead(waiting) => shared.end_wait(waiting),
            Wait::No => self.end_wait(shared, start),
        }
        while let Some(waiting) = shared.quarantine.take_surplus() {
            shared.end_wait(waiting);
        }
    }

    /// Of a twin: gives an object that has waited to its slab, if it is still as it was left.
    pub(super) fn end_wait(&self, shared: &Caches<P>, start: *mut u8) {
        let (Some(slot), Some(state)) = (self.slot_at(start), self.slabs.state(shared.frames(), start)) else { return };
        // Somebody may look at it just now.
        while claim(state, QUARANTINED, CACHED).is_err() {
            if state.load(Relaxed) != AUDITED {
                return;
            }
            spin_loop();
        }
        match damage_of_free(&slot) {
            None => _ = self.release(self.slabs.put(shared, [start], true)),
            Some(damage) => {
                state.store(KEPT, Relaxed);
                shared.report_damage(slot.object(), damage, None);
            }
        }
    }

    /// Of a twin: checks every object, and says how many were reported.
    pub(super) fn check_objects(&self, shared: &Caches<P>) -> usize {
        let mut found = 0;
        self.for_each_checked(shared, |slot, state| {
            if let Some(damage) = self.check_slot(shared.frames(), slot, state) {
                found += 1;
                shared.report_damage(slot.object(), damage, None);
            }
        });
        found
    }

    /// What is wrong with an object in whatever state.
    fn check_slot(&self, frames: &Frames<P>, slot: &Slot, state: &AtomicU8) -> Option<Damaged> {
        let start = slot.start();
        match state.load(Relaxed) {
            FREE => {
                let damage = self.slabs.with_free(frames, start, || damage_of_free(slot))??;
                if self.slabs.take_this(frames, start) {
                    state.store(KEPT, Relaxed);
                }
                Some(damage)
            }
            before @ (USED | QUARANTINED) => {
                let _interrupts = Interrupts::<P>::disable();
                claim(state, before, AUDITED).ok()?;
                let damage = match before {
                    _ if !slot.is_current() => None,
                    USED => match check_used(slot, None) {
                        Used::Damaged(damage) => Some(damage),
                        _ => None,
                    },
                    _ => damage_of_free(slot),
                };
                state.store(before, Relaxed);
                damage
            }
            _ => None,
        }
    }

    /// The object of this cache that `pointer` is in, and what its tag says.
    pub(super) fn place_of(&self, shared: &Caches<P>, pointer: *const u8) -> Option<(Place, Option<Tag>)> {
        if let Some(guarded) = shared.guard.around(pointer) {
            return Some((guarded.place(), Some(guarded.tag)));
        }
        let (start, slot) = self.slabs.around(shared.frames(), pointer)?;
        let place = Place { object: start, slot, size: self.object_size(), requested: None };
        let Some((room, _)) = self.room else { return Some((place, None)) };
        let state = self.slabs.state(shared.frames(), start)?.load(Relaxed);
        let tag = if matches!(state, RAW | CACHED) { None } else { self.slot_at(start).and_then(|slot| slot.tag()) };
        let object = start.wrapping_add(room.left);
        Some((Place { object, size: room.size, requested: tag.map(|tag| tag.requested), ..place }, tag))
    }

    /// Calls `visit` with each object with checks that is allocated; there is none where this is no twin.
    pub(crate) fn for_each_allocation(&self, shared: &Caches<P>, mut visit: impl FnMut(&Allocation)) {
        [USED, AUDITED].into_iter().for_each(|state| self.for_each_allocation_in(shared, state, &mut visit));
    }

    /// The same with those in one state.
    pub(crate) fn for_each_allocation_in(&self, shared: &Caches<P>, wanted: u8, mut visit: impl FnMut(&Allocation)) {
        self.for_each_checked(shared, |slot, state| {
            if state.load(Relaxed) != wanted {
                return;
            }
            let tag = slot.tag().unwrap_or_default();
            if let Some(object) = NonNull::new(slot.object()) {
                visit(&Allocation { object, size: tag.requested.0, allocated: tag.allocated });
            }
        });
    }

    /// Calls `visit` with each object of a twin, in whatever state, and its state.
    pub(crate) fn for_each_checked(&self, shared: &Caches<P>, mut visit: impl FnMut(&Slot, &AtomicU8)) {
        let Some((room, _)) = self.room else { return };
        self.slabs.for_each_slot(shared.frames(), |start, state| {
            // SAFETY: a slot of this cache, which has this room.
            let slot = unsafe { room.slot(start) };
            visit(&slot, state);
        });
        shared.guard.of_cache(self.slabs.id).for_each(|guarded| visit(&guarded.slot, guarded.state));
    }

    /// Bytes that the objects of a twin have at most; `None` where this is none.
    pub(crate) fn room_size(&self) -> Option<usize> {
        self.room.map(|(room, _)| room.size)
    }

    /// Of a twin: the object around an address, its bytes and its state.
    pub(super) fn checked_around<'a>(
        &'a self,
        shared: &'a Caches<P>,
        address: *const u8,
    ) -> Option<(*mut u8, usize, &'a AtomicU8)> {
        if let Some(guarded) = shared.guard.around(address) {
            return Some((guarded.slot.object(), guarded.slot.size(), guarded.state));
        }
        let (start, _) = self.slabs.around(shared.frames(), address)?;
        let slot = self.slot_at(start)?;
        Some((slot.object(), slot.size(), self.slabs.state(shared.frames(), start)?))
    }
}

pub(super) type Damaged = (Fault, Option<Damage>);

/// What an object that is used turned out to be.
enum Used {
    /// As its user may leave it.
    Right(Tag),
    /// Allocated otherwise than it is freed.
    Otherwise(Fault),
    Damaged(Damaged),
}

/// Claims an object from its user. One that is just being checked is waited for.
fn claim_when_checked<P: Platform>(state: &AtomicU8) -> Result<(), u8> {
    loop {
        match claim(state, USED, CACHED) {
            Err(AUDITED) if !in_nmi::<P>() => spin_loop(),
            result => return result,
        }
    }
}

/// Looks at an object that is used, and was allocated for `layout`.
fn check_used(slot: &Slot, layout: Option<Layout>) -> Used {
    let Some(tag) = slot.tag().filter(|tag| !tag.is_free) else { return Used::Damaged((Fault::BadTag, None)) };
    if let Some(Err(fault)) = layout.map(|layout| check_layout(&tag, layout)) {
        return Used::Otherwise(fault);
    }
    let red = tag.checks.contains(Checks::RED_ZONE);
    match if red { slot.damage_beside(tag.requested.0) } else { None } {
        Some(damage) => Used::Damaged((Fault::RedZone, Some(damage))),
        None => Used::Right(tag),
    }
}

fn check_layout(tag: &Tag, layout: Layout) -> Result<(), Fault> {
    let (size, align) = tag.requested;
    if layout.size() != size {
        return Err(Fault::BadSize { freed: layout.size(), allocated: size });
    }
    if layout.align() != align {
        return Err(Fault::BadAlignment { freed: layout.align(), allocated: align });
    }
    Ok(())
}

/// What is wrong with a free object.
pub(super) fn damage_of_free(slot: &Slot) -> Option<Damaged> {
    let Some(tag) = slot.tag() else { return Some((Fault::BadTag, None)) };
    // One that is not was freed in an NMI.
    let modified = || slot.damage_while_free(tag.checks).map(|damage| (Fault::Modified, Some(damage)));
    let red = || {
        let red = tag.checks.contains(Checks::RED_ZONE);
        if red { slot.damage_beside_free().map(|damage| (Fault::RedZone, Some(damage))) } else { None }
    };
    if tag.is_free { modified().or_else(red) } else { None }
}
