//! The slab layer in an NMI, which may have interrupted the holder of the slab list's lock.
//!
//! An object that is freed there stays in its slab with the state [`DEFERRED`], and the slab goes on a list
//! ([`Deferred`](crate::frames::Deferred)) from which whoever next comes to the slabs takes it.
//!
//! Invariant: a slab on the list, or taken off it and not looked at yet, stays: as a rule it has a slot with that state, and
//! where another CPU has just taken that in, its link says that it is on the list.

use super::{EMPTY, FULL, HOME, LISTS, Slabs};
use crate::cache::AllocError;
use crate::cache::magazine::Round;
use crate::cache::shared::Caches;
use crate::cache::slab::DEFERRED;
use crate::fault::Fault;
use crate::frames::{Frame, Frames, NOT_LISTED, unlink};
use crate::platform::Platform;
use crate::sync::AtomicU8;
use crate::sync::Ordering::{Acquire, Relaxed, Release};

impl<P: Platform> Slabs<P> {
    /// An object that is constructed, if the cache constructs, and whether it has been in use, without waiting for anything:
    /// for an NMI.
    pub(crate) fn take_at_once(&self, shared: &Caches<P>) -> Result<(Round, bool), AllocError> {
        let mut state = self.state.try_lock().ok_or(AllocError::WouldGrow)?;
        let frames = shared.frames();
        if self.lifecycle.is_none() {
            let mut round = [Round::NONE];
            let taken = self.take_from_lists(&mut state, frames, None, false, &mut round)?;
            return taken.map(|(_, constructed)| (round[0], constructed)).ok_or(AllocError::WouldGrow);
        }
        if state.numbers.taken >= self.limit {
            return Err(AllocError::AtLimit);
        }
        let with_room = (EMPTY..FULL).rev().chain(HOME..LISTS);
        let taken = with_room.filter_map(|list| state.lists[list]).find_map(|first| {
            // SAFETY: what is in a list is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            Some((slab.take_constructed()?, first, slab))
        });
        let (round, first, slab) = taken.ok_or(AllocError::WouldGrow)?;
        state.numbers.taken += 1;
        self.place(&mut state, frames, first, slab);
        Ok((round, true))
    }

    /// Takes an object back whose slot is [`CACHED`], without waiting for anything: for an NMI. Its slot stays out of the
    /// lists until somebody else comes to the slabs.
    pub(crate) fn defer(&self, shared: &Caches<P>, object: *mut u8) {
        let frames = shared.frames();
        let found = self.slab_of(frames, object);
        match found.and_then(|(first, slab)| Some((first, slab, Self::cached_slot(slab, object)?))) {
            Some((first, slab, slot)) => {
                // From when somebody can take the object in until the slab is on the list, none leaves the cache.
                self.walks.fetch_add(1, Relaxed);
                slab.states()[slot].store(DEFERRED, Release);
                if !self.leads_on(frames, Frame::some(slab.deferred_link().load(Relaxed))) {
                    self.note_damage(first);
                }
                self.deferred.push_once(first, slab.deferred_link());
                self.walks.fetch_sub(1, Release);
            }
            None => shared.report(Fault::BadRound, object, None),
        }
    }

    /// Whether nothing has written over the link of a slab, as it seems.
    fn leads_on(&self, frames: &Frames<P>, next: Option<Frame>) -> bool {
        next.is_none_or(|next| next.number() == NOT_LISTED || self.slab_if(frames, next).is_some())
    }

    /// Lets a test see whether a slab is on the list.
    #[cfg(all(test, models))]
    pub(crate) fn has_none_deferred(&self) -> bool {
        self.deferred.is_empty()
    }

    /// Takes in what was freed in NMIs.
    #[inline]
    pub(crate) fn take_in_deferred(&self, shared: &Caches<P>) {
        if !self.deferred.is_empty() {
            self.take_in(shared);
        }
    }

    #[cold]
    fn take_in(&self, shared: &Caches<P>) {
        let frames = shared.frames();
        let is_deferred = |state: &AtomicU8| state.load(Acquire) == DEFERRED;
        let mut next = self.deferred.take_all();
        // Those slots of a slab that are to be taken in keep it.
        while let Some((first, slab)) = next.and_then(|first| Some((first, self.slab_if(frames, first)?))) {
            let mut state = self.state.lock();
            for slot in (0..self.geometry.slots).filter(|&slot| is_deferred(&slab.states()[slot])) {
                slab.put(slot, true);
                state.numbers.taken -= 1;
            }
            self.place(&mut state, frames, first, slab);
            next = unlink(slab.deferred_link());
            if !self.leads_on(frames, next) {
                self.note_damage(first);
            }
            // Freed since, by a CPU that saw it listed. From here on it is listed, or has no such slot.
            if slab.states().iter().any(is_deferred) {
                self.deferred.push_once(first, slab.deferred_link());
            }
        }
        // What was deferred meanwhile is left to the next one: NMIs may come faster than this. And empty slabs to the next
        // who gives something back.
    }
}
