//! Caches: equal objects, cut from slabs (Bonwick 1994).
//!
//! A [`Cache`] keeps its slabs with both free and allocated slots in a list, the *partial* slabs. It allocates from the
//! first of them, and takes a new slab from the page frames only where there is none. Full slabs are in no list: a free
//! finds its slab by the frame record. A slab whose last object is freed goes back to the page frames at once.
//!
//! Lock: one a cache; the lock of the page frames may be taken inside it.
//!
//! Invariants, whenever the lock is free:
//! 1. A slab is in the list if and only if some of its slots are free and some are not.
//! 2. Every frame of a slab has a record that names the slab's first frame and this cache; only the holder of the lock
//!    changes that.

mod geometry;
mod slab;
#[cfg(test)]
mod tests;

use core::fmt;

use crate::fault::Fault;
use crate::frames::{Frame, Frames, Owner};
use crate::lock::IrqLock;
use crate::platform::Platform;
use crate::stats::CacheStats;
pub(crate) use geometry::Geometry;
use slab::Slab;

/// A cache of objects of one size.
pub(crate) struct Cache<P> {
    geometry: Geometry,
    /// Which one of its heap's caches it is; its slabs' records say so.
    index: u32,
    state: IrqLock<P, State>,
}

struct State {
    partial: Option<Frame>,
    slabs: usize,
    in_use: usize,
    allocations: u64,
    failures: u64,
}

impl<P> Cache<P> {
    /// The `index`th cache of a heap, with objects of `object_size` bytes and no slab yet.
    ///
    /// Objects are aligned to the largest power of two that divides their size, up to a page.
    pub(crate) const fn new(index: u32, object_size: usize) -> Self {
        let state = State { partial: None, slabs: 0, in_use: 0, allocations: 0, failures: 0 };
        Self { geometry: Geometry::new(object_size), index, state: IrqLock::new(state) }
    }

    pub(crate) fn object_size(&self) -> usize {
        self.geometry.object_size
    }
}

impl<P: Platform> Cache<P> {
    /// An object, not initialised.
    pub(crate) fn allocate(&self, frames: &Frames<P>) -> Option<*mut u8> {
        let mut state = self.state.lock();
        let object = self.allocate_locked(&mut state, frames);
        match object {
            Some(_) => {
                state.in_use += 1;
                state.allocations = state.allocations.wrapping_add(1);
            }
            None => state.failures = state.failures.wrapping_add(1),
        }
        object
    }

    fn allocate_locked(&self, state: &mut State, frames: &Frames<P>) -> Option<*mut u8> {
        let first = match state.partial {
            Some(first) => first,
            None => self.grow(state, frames)?,
        };
        // SAFETY: what is in the list is a slab of this cache.
        let mut slab = unsafe { self.slab(frames, first) };
        let object = slab.take();
        if slab.header().used as usize == self.geometry.slots {
            self.unlink(state, frames, first);
        }
        object
    }

    /// A new slab, the only one in the list.
    fn grow(&self, state: &mut State, frames: &Frames<P>) -> Option<Frame> {
        let frame = frames.allocate(self.geometry.order)?;
        // SAFETY: the block is just allocated and has the right order.
        unsafe { Slab::create(frames.pointer(frame), &self.geometry) };
        frames.make_slab(frame, self.geometry.order.frames(), self.index, (frame, 0));
        state.slabs += 1;
        state.partial = Some(frame);
        Some(frame)
    }

    /// Frees an object. What is not an allocated object of this cache is a fault, and nothing has changed.
    ///
    /// # Safety
    ///
    /// Nobody uses the object any more.
    pub(crate) unsafe fn free(&self, frames: &Frames<P>, object: *mut u8) -> Result<(), Fault> {
        let mut state = self.state.lock();
        let (first, slot) = self.find(frames, object)?;
        // SAFETY: `find` says that it is a slab of this cache.
        let mut slab = unsafe { self.slab(frames, first) };
        if !slab.put(slot) {
            return Err(Fault::DoubleFree);
        }
        let used = slab.header().used as usize;
        state.in_use -= 1;
        if used + 1 == self.geometry.slots {
            self.link(&mut state, frames, first);
        }
        if used == 0 {
            self.unlink(&mut state, frames, first);
            state.slabs -= 1;
            frames.free_slab(first, self.geometry.order.frames());
        }
        Ok(())
    }

    /// Whether `object` is an allocated object of this cache, and if not, what is wrong with it.
    pub(crate) fn check(&self, frames: &Frames<P>, object: *const u8) -> Result<(), Fault> {
        let _state = self.state.lock();
        let (first, slot) = self.find(frames, object)?;
        // SAFETY: `find` says that it is a slab of this cache.
        let mut slab = unsafe { self.slab(frames, first) };
        if slab.is_used(slot) { Ok(()) } else { Err(Fault::DoubleFree) }
    }

    /// The slab and slot of an object. The lock is held, so the record that says that the slab is this cache's stays true.
    fn find(&self, frames: &Frames<P>, object: *const u8) -> Result<(Frame, usize), Fault> {
        let frame = frames.frame_of(object).ok_or(Fault::BadAddress)?;
        let first = match frames.owner(frame) {
            Owner::Slab { order, cache } if cache == self.index => frame.block_start(order),
            _ => return Err(frames.fault_at(frame)),
        };
        let offset = object.addr().wrapping_sub(frames.pointer(first).addr());
        let slot = self.geometry.slot_at(offset).ok_or(Fault::BadBase)?;
        Ok((first, slot))
    }

    /// The slab at `first`.
    ///
    /// # Safety
    ///
    /// It is a slab of this cache, the lock is held, and there is no other `Slab` for it meanwhile.
    unsafe fn slab(&self, frames: &Frames<P>, first: Frame) -> Slab<'_> {
        // SAFETY: passed on to the caller; every slab of a cache has its geometry.
        unsafe { Slab::at(frames.pointer(first), &self.geometry) }
    }

    /// Puts a slab first in the list.
    fn link(&self, state: &mut State, frames: &Frames<P>, first: Frame) {
        let next = state.partial.replace(first);
        // SAFETY: a slab of this cache, whose state is locked.
        unsafe { self.slab(frames, first) }.header().next = next;
        if let Some(next) = next {
            // SAFETY: as above.
            unsafe { self.slab(frames, next) }.header().previous = Some(first);
        }
    }

    /// Takes a slab out of the list.
    fn unlink(&self, state: &mut State, frames: &Frames<P>, first: Frame) {
        // SAFETY: a slab of this cache, whose state is locked.
        let mut slab = unsafe { self.slab(frames, first) };
        let (next, previous) = (slab.header().next.take(), slab.header().previous.take());
        match previous {
            // SAFETY: as above; a list names each slab once, so this is another one.
            Some(previous) => unsafe { self.slab(frames, previous) }.header().next = next,
            None => state.partial = next,
        }
        if let Some(next) = next {
            // SAFETY: as above.
            unsafe { self.slab(frames, next) }.header().previous = previous;
        }
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let state = self.state.lock();
        CacheStats {
            object_size: self.geometry.object_size,
            slab_size: self.geometry.order.bytes(),
            objects_per_slab: self.geometry.slots,
            slabs: state.slabs,
            in_use: state.in_use,
            allocations: state.allocations,
            failures: state.failures,
        }
    }
}

impl<P> fmt::Debug for Cache<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("object_size", &self.geometry.object_size).finish_non_exhaustive()
    }
}
