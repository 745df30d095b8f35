//! How slabs leave their cache.
//!
//! They are taken out of their lists with the lock held, and go back to the page frames without it: what is constructed in
//! them is destroyed before. In between whoever knows objects of them by heart forgets these.

use super::{ALL, EMPTY, Slabs, State};
use crate::cache::shared::Caches;
use crate::cache::slab::{FREE, OF_ALL, RAW, Slab};
use crate::frames::{Frame, NOT_LISTED};
use crate::platform::Platform;
use crate::sync::Ordering::{Acquire, Relaxed};

impl<P: Platform> Slabs<P> {
    /// Takes empty slabs out of their lists until `keep` are left.
    pub(super) fn detach_empty<'a>(&'a self, shared: &'a Caches<P>, state: &mut State, keep: usize) -> Leaving<'a, P> {
        let frames = shared.frames();
        let mut detached = None;
        while state.numbers.empty > keep && self.walks.load(Acquire) == 0 {
            let Some(first) = state.lists[EMPTY] else { break };
            // SAFETY: what is in a list is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            if slab.deferred_link().load(Relaxed) != NOT_LISTED {
                break;
            }
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
        let header = frames.slab_place(first).header;
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
