//! A stock of single frames for each CPU, so that most requests for one frame take no lock.
//!
//! A stock is touched only by its CPU and with interrupts off. It is filled from the zones and drained to them half at
//! a time. Its frames say [`Owner::Stock`], so a second free of one is refused. Frames of the lowest zone are not
//! stocked: they would go to requests that do not need them.
//!
//! Invariants:
//! 1. The table is null or has `P::CPUS` stocks in frames of the allocator's own, which stay until `take_table`.
//! 2. Only the CPU with the stock's number changes it, with interrupts off. (The fields are atomic all the same: who breaks
//!    this loses frames, and does no worse.)

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicU32};
use core::marker::PhantomData;

use super::record::Owner;
use super::records::Records;
use super::{Frame, Frames, Order};
use crate::lock::Interrupts;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::verify::Broken;

/// Frames that a stock can have.
const CAPACITY: usize = 60;
/// Frames that go in or out at a time, at most.
const BATCH: usize = CAPACITY / 2;
/// With fewer frames in all there are no stocks: 1 MiB.
const LEAST_MEMORY: usize = 256;
/// All stocks together have at most one of so many frames.
const SHARE: usize = 8;
/// What the records of its frames say.
const SINGLE: Owner = Owner::Stock(Order::ZERO);

/// The frames of one CPU. All bytes zero is an empty one.
#[derive(Debug)]
#[repr(C, align(256))]
struct Stock {
    count: AtomicU32,
    frames: [AtomicU32; CAPACITY],
}

const _: () = assert!(size_of::<Stock>() == 256);

impl Stock {
    #[inline]
    fn count(&self) -> usize {
        self.count.load(Relaxed) as usize
    }

    /// `false`, and nothing done, where there is no room.
    #[inline]
    fn push(&self, frame: Frame) -> bool {
        let count = self.count();
        let Some(slot) = self.frames.get(count) else { return false };
        slot.store(frame.number(), Relaxed);
        self.count.store(count as u32 + 1, Relaxed);
        true
    }

    #[inline]
    fn pop(&self) -> Option<Frame> {
        let count = self.count().checked_sub(1)?;
        let frame = self.frames.get(count)?.load(Relaxed);
        self.count.store(count as u32, Relaxed);
        Some(Frame::new(frame))
    }

    /// Empties it into `frames` as far as that goes, and says how many there are now.
    fn pop_into(&self, frames: &mut [Frame]) -> usize {
        let mut popped = 0;
        while popped < frames.len()
            && let Some(frame) = self.pop()
        {
            frames[popped] = frame;
            popped += 1;
        }
        popped
    }
}

/// The stocks of all CPUs.
#[derive(Debug)]
pub(crate) struct Stocks<P> {
    table: AtomicPtr<Stock>,
    /// How many frames each may have, given how many there are.
    capacity: AtomicU32,
    platform: PhantomData<fn() -> P>,
}

/// The stock of the CPU that this runs on, and stays on: interrupts are off.
struct Local<'a, P: Platform> {
    stock: &'a Stock,
    _interrupts: Interrupts<P>,
}

impl<P> Stocks<P> {
    pub(crate) const fn new() -> Self {
        Self { table: AtomicPtr::new(core::ptr::null_mut()), capacity: AtomicU32::new(0), platform: PhantomData }
    }
}

impl<P: Platform> Stocks<P> {
    /// Frames that the table takes.
    pub(crate) const TABLE_FRAMES: u32 = (P::CPUS * size_of::<Stock>()).div_ceil(FRAME_SIZE) as u32;

    /// Whether there should be a table with so many managed frames, and is none yet.
    pub(crate) fn are_wanted(&self, managed: usize) -> bool {
        P::CPUS > 0 && managed >= LEAST_MEMORY && self.table.load(Relaxed).is_null()
    }

    /// # Safety
    ///
    /// There is none yet. At `table`, aligned to a frame, are [`TABLE_FRAMES`](Self::TABLE_FRAMES) frames that are the
    /// allocator's own until [`take_table`](Self::take_table) returns them.
    pub(crate) unsafe fn install(&self, table: *mut u8) {
        // SAFETY: as the caller says, the frames are ours; all bytes zero is a table of empty stocks.
        unsafe { table.write_bytes(0, Self::TABLE_FRAMES as usize * FRAME_SIZE) };
        self.table.store(table.cast(), Release);
    }

    /// The table, which is then no more; null where there is none.
    ///
    /// # Safety
    ///
    /// Nobody uses a stock, now or while this runs.
    pub(crate) unsafe fn take_table(&self) -> *mut u8 {
        self.capacity.store(0, Relaxed);
        self.table.swap(core::ptr::null_mut(), Acquire).cast()
    }

    /// Sets how many frames a stock may have, where so many are managed.
    pub(crate) fn set_capacity(&self, managed: usize) {
        let share = managed.checked_div(SHARE * P::CPUS).unwrap_or(0);
        self.capacity.store(share.min(CAPACITY) as u32 & !1, Relaxed);
    }

    fn capacity(&self) -> usize {
        self.capacity.load(Relaxed) as usize
    }

    #[inline]
    fn all(&self) -> &[Stock] {
        let table = self.table.load(Acquire);
        if table.is_null() {
            return &[];
        }
        // SAFETY: `P::CPUS` stocks that stay (invariant 1), accessed by atomic fields only.
        unsafe { core::slice::from_raw_parts(table, P::CPUS) }
    }

    #[inline]
    fn local(&self) -> Option<Local<'_, P>> {
        if P::CPUS == 0 {
            return None;
        }
        let interrupts = Interrupts::disable();
        let stock = self.all().get(P::current_cpu())?;
        Some(Local { stock, _interrupts: interrupts })
    }

    /// Frames in all stocks.
    pub(crate) fn frames(&self) -> usize {
        self.all().iter().map(Stock::count).sum()
    }

    /// Checks every stock; says how many frames they have.
    pub(crate) fn verify(&self, records: &Records) -> Result<usize, Broken> {
        for (cpu, stock) in self.all().iter().enumerate() {
            let count = stock.count();
            let frames = stock.frames.get(..count).ok_or(Broken::StockCount { cpu, count })?;
            let mut frames = frames.iter().map(|frame| Frame::new(frame.load(Relaxed)));
            if let Some(frame) = frames.find(|frame| !records.is(*frame, SINGLE)) {
                return Err(Broken::StockOwner { cpu, frame });
            }
        }
        Ok(self.frames())
    }
}

impl<P: Platform> Frames<P> {
    /// A single frame from this CPU's stock, which is filled first if it is empty.
    #[inline]
    pub(super) fn take_stocked(&self) -> Option<Frame> {
        let local = self.stocks.local()?;
        let frame = local.stock.pop().or_else(|| self.refill(&local))?;
        self.records.set_owner(frame, Owner::Pages(1));
        Some(frame)
    }

    /// Fills the stock, which is empty, and takes a frame from it.
    #[cold]
    fn refill(&self, local: &Local<'_, P>) -> Option<Frame> {
        self.take_in_deferred();
        let mut batch = [Frame::default(); BATCH];
        let filled = self.zones.allocate_bulk(&self.records, &mut batch[..self.stocks.capacity() / 2], 1, SINGLE);
        batch[..filled].iter().for_each(|frame| _ = local.stock.push(*frame));
        local.stock.pop()
    }

    /// Frees a single frame to this CPU's stock; `false`, and nothing done, where it is not allocated as such, and where
    /// the stock cannot have it.
    #[inline]
    pub(super) fn free_to_stock(&self, frame: Frame) -> bool {
        let (record, local) = (self.records.get(frame), self.stocks.local());
        let (Some(record), Some(Local { stock, .. })) = (record, &local) else { return false };
        let has_room = stock.count() < self.stocks.capacity() && frame >= self.zones.first_boundary();
        has_room && record.claim(1, SINGLE) && stock.push(frame)
    }

    /// Makes room in this CPU's stock, if it is full; `false` where it is not.
    pub(super) fn make_room(&self) -> bool {
        let capacity = self.stocks.capacity();
        let full = self.stocks.local().filter(|local| capacity > 0 && local.stock.count() >= capacity);
        full.is_some_and(|local| self.drain(local.stock, capacity / 2) > 0)
    }

    /// Moves up to `frames` frames from `stock` to their zones, and says how many.
    fn drain(&self, stock: &Stock, frames: usize) -> usize {
        let mut batch = [Frame::default(); BATCH];
        let popped = stock.pop_into(&mut batch[..frames.min(BATCH)]);
        batch[..popped].iter().for_each(|frame| self.records.set_owner(*frame, Owner::Loose));
        self.zones.release_loose(&self.records, &batch[..popped]);
        popped
    }

    fn drain_whole(&self, stock: &Stock) -> usize {
        core::iter::from_fn(|| Some(self.drain(stock, BATCH)).filter(|drained| *drained > 0)).sum()
    }

    /// Moves the frames that this CPU keeps in stock back to where every CPU has them, and merges the free blocks that
    /// wait there unmerged. Returns how many frames were moved.
    ///
    /// An allocation that would fail otherwise does so by itself. What was freed in NMIs goes there too.
    pub fn drain_stock(&self) -> usize {
        let moved = self.take_in_deferred() + self.stocks.local().map_or(0, |local| self.drain_whole(local.stock));
        self.zones.merge_stocks(&self.records);
        moved
    }

    /// As [`drain_stock`](Self::drain_stock), and makes the records that were put off: from then on each free frame's
    /// record says so, but for those in the stocks of other CPUs.
    pub(crate) fn settle(&self) {
        self.drain_stock();
        self.zones.set_up(&self.records, Frame::new(Frame::LIMIT));
    }

    /// Moves the frames that the CPU with this number keeps in stock back to where every CPU has them. Returns how many.
    ///
    /// # Safety
    ///
    /// That CPU neither allocates nor frees frames meanwhile.
    pub(crate) unsafe fn drain_stock_of(&self, cpu: usize) -> usize {
        self.stocks.all().get(cpu).map_or(0, |stock| self.drain_whole(stock))
    }
}
