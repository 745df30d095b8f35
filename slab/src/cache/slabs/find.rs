//! From a pointer to the slot that it is in, and from a slab to its header.

use super::Slabs;
use crate::cache::magazine::Round;
use crate::cache::slab::{Slab, change};
use crate::fault::Fault;
use crate::frames::{Frame, Frames};
use crate::platform::Platform;
use crate::sync::AtomicU8;

impl<P: Platform> Slabs<P> {
    /// The object that `pointer` is in or would be, and its slot, where that is in a slab of this cache.
    pub(crate) fn around(&self, frames: &Frames<P>, pointer: *const u8) -> Option<(*mut u8, usize)> {
        let (_, slab) = self.slab_of(frames, pointer)?;
        let slot = slab.distance(pointer) / self.geometry.stride;
        (slot < self.geometry.slots).then(|| (slab.object(slot), slot))
    }

    /// The slab and slot of an object of this cache.
    ///
    /// Needs no lock where the object is not free: its slab then stays. Of any other pointer it says at once that it is
    /// no object of this cache, or it reads a state that is no [`USED`].
    #[inline]
    pub(crate) fn find(&self, frames: &Frames<P>, object: *const u8) -> Result<(Slab<'_>, usize), Fault> {
        let (_, slab) = self.slab_of(frames, object).ok_or_else(|| frames.fault_of(object))?;
        let slot = slab.slot_of(object).ok_or(Fault::BadBase)?;
        Ok((slab, slot))
    }

    /// The state of the slot of an object; `None` where [`find`](Self::find) says that there is none.
    #[inline]
    pub(crate) fn state(&self, frames: &Frames<P>, object: *const u8) -> Option<&AtomicU8> {
        let frame = frames.frame_of(object)?;
        let place = frames.slab_of(frame, self.geometry.finder.owner)?;
        // SAFETY: the record says that it is a slab of this cache.
        unsafe { Slab::state_of(object, place, &self.geometry.finder) }
    }

    /// The same in the fewest steps; `None` also where only [`state`](Self::state) can say.
    #[inline]
    pub(crate) fn state_at_hand(&self, frames: &Frames<P>, object: *const u8) -> Option<&AtomicU8> {
        let finder = &self.geometry.finder;
        let place = frames.slab_around(object, finder.owner)?;
        // SAFETY: the record says that it is a slab of this cache.
        unsafe { Slab::state_of(object, place, finder) }
    }

    /// Changes the state of the slot of a round, which is in a magazine or was taken out of it, if it is `from`. Interrupts
    /// are off, or this has the object for itself.
    #[inline]
    pub(crate) fn change(&self, frames: &Frames<P>, round: Round, from: u8, to: u8) -> bool {
        // As in `Loaded::round`: models of CPUs that break the contract are to fail, and not to crash.
        assert!(!cfg!(models) || !round.state.is_null(), "two CPUs use what is one's");
        // SAFETY: the slab has not left the cache, so the state is there: the object is not free, or the magazine would have
        // forgotten it.
        self.is_sound(frames, round) && change(unsafe { &*round.state }, from, to)
    }

    /// Whether nothing has written over a round. Debug builds look; others believe it, which spares them half of the work.
    #[inline]
    fn is_sound(&self, frames: &Frames<P>, round: Round) -> bool {
        !cfg!(debug_assertions)
            || self.state(frames, round.object).is_some_and(|state| core::ptr::eq(state, round.state))
    }

    /// The slab of this cache that `object` is in, and its first frame.
    #[inline]
    pub(super) fn slab_of(&self, frames: &Frames<P>, object: *const u8) -> Option<(Frame, Slab<'_>)> {
        self.slab_with(frames, frames.frame_of(object)?)
    }

    /// The slab of this cache that `frame` is part of.
    #[inline]
    fn slab_with(&self, frames: &Frames<P>, frame: Frame) -> Option<(Frame, Slab<'_>)> {
        let place = frames.slab_of(frame, self.geometry.finder.owner)?;
        let first = self.geometry.first_of(frame);
        // SAFETY: the record says that it is a slab of this cache, every one of which has its geometry.
        Some((first, unsafe { Slab::at(frames.pointer(first), place, &self.geometry) }))
    }

    /// The slab that starts at `first`, where one of this cache does.
    #[inline]
    pub(super) fn slab_if(&self, frames: &Frames<P>, first: Frame) -> Option<Slab<'_>> {
        self.slab_with(frames, first).filter(|(start, _)| *start == first).map(|(_, slab)| slab)
    }

    /// The slab at `first`.
    ///
    /// # Safety
    ///
    /// It is a slab of this cache, and stays one while this is used.
    #[inline]
    pub(super) unsafe fn slab(&self, frames: &Frames<P>, first: Frame) -> Slab<'_> {
        // SAFETY: passed on to the caller; every slab of a cache has its geometry.
        unsafe { Slab::at(frames.pointer(first), frames.slab_place(first), &self.geometry) }
    }
}
