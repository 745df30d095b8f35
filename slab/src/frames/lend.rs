//! Page frames that are only lent: given away one by one, and given back to where they came from.

use crate::sync::Ordering::Relaxed;

use super::init::pages;
use super::stock::Stocks;
use super::types::each;
use super::{AddError, Frame, Frames, InitError, Owner};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

impl<P: Platform> Frames<P> {
    /// Makes a run that the caller has allocated so many single frames, to be freed one by one by
    /// [`free_metadata`](Self::free_metadata), and by nobody else.
    pub(crate) fn make_single(&self, first: Frame, count: u32) {
        self.records.set_all(first..first.offset(count), Owner::Metadata(1));
    }

    /// Takes over pages that a source lends; `false`, and nothing done, where that cannot be. Where neither they nor
    /// the free memory can hold the nodes for their records, `page` is asked for a page for each. Those are not
    /// managed, and go back when the allocator is dissolved.
    ///
    /// # Safety
    ///
    /// As [`add_range`](Self::add_range), or where there is no memory yet, as [`init_range`](Self::init_range); and
    /// that also holds for each page that `page` returns.
    pub(crate) unsafe fn add_lent(
        &self,
        start: *mut u8,
        bytes: usize,
        mut page: impl FnMut() -> Option<*mut u8>,
    ) -> bool {
        // SAFETY: passed on to the caller.
        match unsafe { self.init_range(start, bytes) } {
            Err(InitError::AlreadyInitialised) => {}
            first => return first.is_ok(),
        }
        // SAFETY: as above.
        match unsafe { self.add_range(start, bytes) } {
            Err(AddError::MetadataDoesNotFit { .. }) => {}
            added => return added.is_ok(),
        }
        let covered = match (pages(self.base.load(Relaxed), start, bytes), self.begin_change()) {
            // SAFETY: each page is ours from now on, and this is the only change.
            (Some(range), Some(_change)) => unsafe { self.records.cover(range, &mut page) }.is_some(),
            _ => false,
        };
        // SAFETY: as above.
        covered && unsafe { self.add_range(start, bytes) }.is_ok()
    }

    /// Takes free frames out of the allocator, largest blocks first, until no more than `keep` are free, and calls
    /// `give` with the address of each. No lock is held then. Returns how many frames there were.
    pub(crate) fn return_free_to(&self, give: &mut dyn FnMut(*mut u8), keep: usize) -> usize {
        self.settle();
        let mut returned = 0;
        // Frames in the stocks of other CPUs are kept as well.
        while let Some(block) = self.withdraw_block(keep.saturating_sub(self.stocks.frames())) {
            self.records.set_all(block.clone(), Owner::Unmanaged);
            for frame in each(block) {
                give(self.pointer(frame));
                returned += 1;
            }
        }
        self.update_managed();
        returned
    }

    fn withdraw_block(&self, keep: usize) -> Option<core::ops::Range<Frame>> {
        self.zones.lock().withdraw_block(&self.records, keep)
    }

    /// Calls `give` with the address of every managed frame, be it free, allocated or the allocator's own; no lock is
    /// held then. Afterwards the allocator is as new.
    ///
    /// # Safety
    ///
    /// Nobody uses the allocator or anything allocated from it, now or later, but for a new `init`.
    pub(crate) unsafe fn dissolve(&self, give: &mut dyn FnMut(*mut u8)) {
        self.zones.set_up(&self.records, Frame::new(Frame::LIMIT));
        for (frame, owner) in self.records.managed(Frame::default()..Frame::new(Frame::LIMIT)) {
            if owner != Owner::Records {
                give(self.pointer(frame));
            }
        }
        self.zones.lock().clear();
        self.deferred.take_all();
        // SAFETY: nobody uses the stocks, says the caller.
        let stocks = unsafe { self.stocks.take_table() };
        if !stocks.is_null() {
            (0..Stocks::<P>::TABLE_FRAMES as usize).for_each(|frame| give(stocks.wrapping_add(frame * FRAME_SIZE)));
        }
        // SAFETY: nor the records; the last look at them was above.
        unsafe { self.records.dismantle(give) };
        self.base.store(core::ptr::null_mut(), Relaxed);
        self.metadata.store(0, Relaxed);
        self.managed.store(0, Relaxed);
    }
}
