//! The life of a guarded object; see [`check::GuardPages`](crate::check::GuardPages).
//!
//! It belongs to the twin of its cache like an object with checks in a slab, is counted there, and freed the same way; only its
//! place, its state and its tag are in the table of guarded objects instead of a slab.

use core::ptr::NonNull;

use super::AllocError;
use super::checked::{Damaged, damage_of_free};
use super::core::{Core, Request, count};
use super::shared::Caches;
use super::slab::KEPT;
use crate::check::{Checks, Guarded, Slot};
use crate::fault::{Caller, Event, Place, Report};
use crate::platform::{Platform, in_nmi};
use crate::sync::Ordering::Relaxed;

/// Objects that waited are unmapped with one that did not.
const WAITS_AT_A_FREE: usize = 2;

impl<P: Platform> Core<P> {
    /// Of the twin of `original`: an object in pages of its own; `None` where there can be none just now.
    pub(super) fn allocate_guarded(
        &self,
        shared: &Caches<P>,
        checks: Checks,
        request: Request,
        original: &Self,
    ) -> Option<Result<NonNull<u8>, AllocError>> {
        if in_nmi::<P>() {
            return None;
        }
        let taken = shared.guard.take(shared, self.slabs.id, request.layout)?;
        self.prepare(shared, &taken.slot, checks | Checks::RED_ZONE, request);
        if original.is_beyond_limit(shared) {
            return Some(Err(AllocError::AtLimit));
        }
        // SAFETY: the object is as large and aligned as its constructor was told, and nobody else's.
        let constructed = self.lifecycle().map_or(Ok(()), |lifecycle| unsafe { (lifecycle.init)(taken.slot.object()) });
        if constructed.is_err() {
            return Some(Err(AllocError::ConstructorFailed));
        }
        count(&self.allocations);
        taken.hand_out().map(Ok)
    }
}

impl Guarded<'_> {
    /// What reports say of it.
    pub(super) fn place(&self) -> Place {
        let Self { index, slot, tag, .. } = self;
        Place { object: slot.object(), slot: *index, size: slot.size(), requested: Some(tag.requested) }
    }
}

impl<P: Platform> Caches<P> {
    /// Unmaps an object that was freed, or has it wait for that.
    pub(super) fn release_guarded(&self, index: usize, slot: &Slot) {
        // Where this one can be unmapped, so can those that wait: some, so that they do not pile up, nor a free take long.
        if self.guard.release(self, index, slot) {
            self.end_guard_waits(WAITS_AT_A_FREE);
        }
    }

    /// Unmaps what waits for it, as far as that can be, up to `most` objects.
    pub(super) fn end_guard_waits(&self, most: usize) {
        if in_nmi::<P>() {
            return;
        }
        // Others may come faster than these go.
        for _ in 0..most.min(self.guard.waiting()) {
            let Some(guarded) = self.guard.take_waiting() else { return };
            if let Some(damage) = damage_of_free(&guarded.slot) {
                guarded.state.store(KEPT, Relaxed);
                self.report_damage(guarded.slot.object(), damage, None);
            } else if !self.guard.release(self, guarded.index, &guarded.slot) {
                return;
            }
        }
    }

    /// Reports what is wrong with an object.
    pub(super) fn report_damage(&self, object: *mut u8, (fault, damage): Damaged, caller: Caller) {
        let pointer = object.wrapping_offset(damage.map_or(0, |damage| damage.offset));
        self.report_with(pointer, damage, fault, caller);
    }

    /// What a page fault at this address was.
    pub(crate) fn explain(&self, address: usize) -> Option<Report> {
        let (guarded, fault) = self.guard.explain(address)?;
        let now = Event { cpu: P::current_cpu(), ..Event::default() };
        Some(Report {
            cache: self.find_name(guarded.cache),
            place: Some(guarded.place()),
            allocated: guarded.tag.allocated,
            freed: guarded.tag.freed,
            ..Report::new(fault, core::ptr::without_provenance(address), now)
        })
    }
}
