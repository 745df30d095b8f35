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
use super::{Frame, Frames};
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

/// The frames of one CPU. All bytes zero is an empty one.
#[derive(Debug)]
#[repr(C, align(256))]
struct Stock {
    count: AtomicU32,
    frames: [AtomicU32; CAPACITY],
}

const _: () = assert!(size_of::<Stock>() == 256);

impl Stock {
    fn count(&self) -> usize {
        self.count.load(Relaxed) as usize
    }

    fn push(&self, frame: Frame) {
        let count = self.count();
        if let Some(slot) = self.frames.get(count) {
            slot.store(frame.number(), Relaxed);
            self.count.store(count as u32 + 1, Relaxed);
        }
    }

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
    capacity: usize,
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
        let capacity = self.capacity.load(Relaxed) as usize;
        let stocks = self.all();
        let interrupts = Interrupts::disable();
        let stock = stocks.get(P::current_cpu())?;
        (capacity > 0).then_some(Local { stock, capacity, _interrupts: interrupts })
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
            if let Some(frame) = frames.find(|frame| records.owner(*frame) != Owner::Stock) {
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
        let frame = local.stock.pop().or_else(|| {
            self.refill(&local);
            local.stock.pop()
        })?;
        self.records.set_owner(frame, Owner::Pages(1));
        Some(frame)
    }

    #[cold]
    fn refill(&self, local: &Local<'_, P>) {
        self.take_in_deferred();
        let mut batch = [Frame::default(); BATCH];
        let filled = self.zones.allocate_bulk(&self.records, &mut batch[..local.capacity / 2], 1);
        for frame in &batch[..filled] {
            self.records.set_owner(*frame, Owner::Stock);
            local.stock.push(*frame);
        }
    }

    /// Frees a single frame, whose record says [`Owner::Inner`], to this CPU's stock or else to its zone.
    #[inline]
    pub(super) fn release_single(&self, frame: Frame) {
        let local = if frame < self.zones.first_boundary() { None } else { self.stocks.local() };
        let Some(local) = local else {
            return self.zones.release(&self.records, frame..frame.offset(1));
        };
        if local.stock.count() >= local.capacity {
            self.drain(local.stock, local.capacity / 2);
        }
        self.records.set_owner(frame, Owner::Stock);
        local.stock.push(frame);
    }

    /// Moves up to `frames` frames from `stock` to their zones, and says how many.
    fn drain(&self, stock: &Stock, frames: usize) -> usize {
        let mut batch = [Frame::default(); BATCH];
        let popped = stock.pop_into(&mut batch[..frames.min(BATCH)]);
        let claim = |frame| {
            self.records.set_owner(frame, Owner::Inner);
            true
        };
        _ = self.zones.release_bulk(&self.records, &batch[..popped], claim);
        popped
    }

    fn drain_whole(&self, stock: &Stock) -> usize {
        core::iter::from_fn(|| Some(self.drain(stock, BATCH)).filter(|drained| *drained > 0)).sum()
    }

    /// Moves the frames that this CPU keeps in stock back to where every CPU has them, so that they merge. Returns how
    /// many.
    ///
    /// An allocation that would fail otherwise does so by itself. What was freed in NMIs goes there too.
    pub fn drain_stock(&self) -> usize {
        self.take_in_deferred() + self.stocks.local().map_or(0, |local| self.drain_whole(local.stock))
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
