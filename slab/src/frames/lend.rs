//! Page frames that are only lent: given away one by one, and given back to where they came from.

use core::sync::atomic::Ordering::Relaxed;

use super::stock::Stocks;
use super::types::each;
use super::{Frame, Frames, Order, Owner};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

impl<P: Platform> Frames<P> {
    /// `count` frames in a row, each of which is a block of order 0 by itself, to be freed alone.
    #[allow(dead_code, reason = "for heaps over lent memory")]
    pub(crate) fn allocate_lent(&self, count: u32) -> Option<Frame> {
        let first = self.allocate_run(count, Order::ZERO)?;
        self.records.set_all(first..first.offset(count), Owner::Pages(1));
        Some(first)
    }

    /// Takes free frames out of the allocator, largest blocks first, until no more than `keep` are free, and calls `give` with
    /// the address of each. No lock is held then. Returns how many frames there were.
    #[allow(dead_code, reason = "for heaps over lent memory")]
    pub(crate) fn return_free_to(&self, give: &mut dyn FnMut(*mut u8), keep: usize) -> usize {
        self.drain_stock();
        let mut returned = 0;
        // Frames in the stocks of other CPUs are kept as well.
        while let Some(block) = self.withdraw_block(keep.saturating_sub(self.stocks.frames())) {
            self.records.set_all(block.clone(), Owner::Unmanaged);
            for frame in each(block) {
                give(self.pointer(frame));
                returned += 1;
            }
        }
        self.stocks.set_capacity(self.zones.lock().total_frames());
        returned
    }

    fn withdraw_block(&self, keep: usize) -> Option<core::ops::Range<Frame>> {
        self.zones.lock().withdraw_block(&self.records, keep)
    }

    /// Calls `give` with the address of every managed frame, be it free, allocated or the allocator's own; no lock is held then.
    /// Afterwards the allocator is as new.
    ///
    /// # Safety
    ///
    /// Nobody uses the allocator or anything allocated from it, now or later, but for a new `init`.
    #[allow(dead_code, reason = "for heaps over lent memory")]
    pub(crate) unsafe fn dissolve(&self, give: &mut dyn FnMut(*mut u8)) {
        for (frame, owner) in self.records.managed(Frame::default()..Frame::new(Frame::LIMIT)) {
            if owner != Owner::Records {
                give(self.pointer(frame));
            }
        }
        self.zones.lock().clear();
        // SAFETY: nobody uses the stocks, says the caller.
        let stocks = unsafe { self.stocks.take_table() };
        if !stocks.is_null() {
            (0..Stocks::<P>::TABLE_FRAMES as usize).for_each(|frame| give(stocks.wrapping_add(frame * FRAME_SIZE)));
        }
        // SAFETY: nor the records; the last look at them was above.
        unsafe { self.records.dismantle(give) };
        self.base.store(core::ptr::null_mut(), Relaxed);
        self.metadata.store(0, Relaxed);
    }
}
