//! A stock of single frames for each CPU, so that most requests for one frame take no lock.
//!
//! A stock is touched only by its CPU and with interrupts off. It is filled from the zones and drained to them half at
//! a time. Its frames say [`Owner::Stock`], so a second free of one is refused. Frames of the lowest zone are not
//! stocked: they would go to requests that do not need them.
//!
//! A frame is there with its record, which so need not be looked up. What was taken out stays behind the last one: a free of
//! that frame, if it is the next, takes it back as it is. As any other, it says first that nobody else has freed the frame.
//!
//! Invariants:
//! 1. The table has `count` stocks in frames of the allocator's own, which stay until `take_table`.
//! 2. Only the CPU with the stock's number changes it, with interrupts off. (The fields are atomic all the same: who breaks
//!    this has wrong frames, and does no worse.)
//! 3. With a frame in a stock is its record, be it still there or taken out, and where there never was one, null. Records
//!    stay longer than the table.

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize};
use core::marker::PhantomData;

use super::record::{Owner, Record};
use super::records::Records;
use super::{Frame, Frames, Order};
use crate::lock::Interrupts;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::verify::Broken;

/// Frames that a stock can have.
const CAPACITY: usize = 40;
/// Frames that go in or out at a time, at most.
const BATCH: usize = CAPACITY / 2;
/// With fewer frames in all there are no stocks: 1 MiB.
const LEAST_MEMORY: usize = 256;
/// All stocks together have at most one of so many frames.
const SHARE: usize = 8;
/// What the records of its frames say.
const SINGLE: Owner = Owner::Stock(Order::ZERO);

/// The frames of one CPU, each with its record. All bytes zero is an empty one.
#[derive(Debug)]
#[repr(C, align(512))]
struct Stock {
    count: AtomicU32,
    frames: [AtomicU32; CAPACITY],
    records: [AtomicPtr<Record>; CAPACITY],
}

const _: () = assert!(size_of::<Stock>() == 512);

impl Stock {
    #[inline]
    fn count(&self) -> usize {
        self.count.load(Relaxed) as usize
    }

    /// The record of the frame in this place, if there ever was one.
    #[inline]
    fn record(&self, place: usize) -> Option<&Record> {
        // SAFETY: null or a record that stays (invariant 3), never accessed but by shared references.
        unsafe { self.records.get(place)?.load(Relaxed).as_ref() }
    }

    /// Puts a frame in whose record says [`SINGLE`]; `false`, and nothing done, where there is no room.
    fn push(&self, frame: Frame, record: &Record) -> bool {
        let count = self.count();
        let (Some(number), Some(place)) = (self.frames.get(count), self.records.get(count)) else { return false };
        number.store(frame.number(), Relaxed);
        place.store(core::ptr::from_ref(record).cast_mut(), Relaxed);
        self.count.store(count as u32 + 1, Relaxed);
        true
    }

    /// Puts the frame back that was taken out last, if it is that one, and allocated.
    #[inline]
    fn push_again(&self, frame: Frame) -> bool {
        let count = self.count();
        let is_last = self.frames.get(count).is_some_and(|last| last.load(Relaxed) == frame.number());
        let pushed = is_last && self.record(count).is_some_and(|record| record.claim(1, SINGLE));
        if pushed {
            self.count.store(count as u32 + 1, Relaxed);
        }
        pushed
    }

    /// Takes the last frame out, for `owner`.
    #[inline]
    fn pop(&self, owner: Owner) -> Option<Frame> {
        let count = self.count().wrapping_sub(1);
        let frame = self.frames.get(count)?.load(Relaxed);
        self.record(count)?.set_owner(owner);
        self.count.store(count as u32, Relaxed);
        Some(Frame::new(frame))
    }
}

/// The stocks of all CPUs.
#[derive(Debug)]
pub(crate) struct Stocks<P> {
    table: AtomicPtr<Stock>,
    /// How many there are in it.
    count: AtomicUsize,
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
        Self {
            table: AtomicPtr::new(core::ptr::null_mut()),
            count: AtomicUsize::new(0),
            capacity: AtomicU32::new(0),
            platform: PhantomData,
        }
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
        self.table.store(table.cast(), Relaxed);
        self.count.store(P::CPUS, Release);
    }

    /// The table, which is then no more; null where there is none.
    ///
    /// # Safety
    ///
    /// Nobody uses a stock, now or while this runs.
    pub(crate) unsafe fn take_table(&self) -> *mut u8 {
        self.capacity.store(0, Relaxed);
        self.count.store(0, Relaxed);
        self.table.swap(core::ptr::null_mut(), Relaxed).cast()
    }

    /// Sets how many frames a stock may have, where so many are managed.
    pub(crate) fn set_capacity(&self, managed: usize) {
        let share = managed.checked_div(SHARE * P::CPUS).unwrap_or(0);
        self.capacity.store(share.min(CAPACITY) as u32 & !1, Relaxed);
    }

    fn capacity(&self) -> usize {
        self.capacity.load(Relaxed) as usize
    }

    /// The stock of the CPU with this number.
    #[inline]
    fn of(&self, cpu: usize) -> Option<&Stock> {
        if cpu >= self.count.load(Acquire) {
            return None;
        }
        // SAFETY: there are more than `cpu`, which stay (invariant 1), never accessed but by shared references.
        Some(unsafe { &*self.table.load(Relaxed).add(cpu) })
    }

    fn all(&self) -> impl Iterator<Item = &Stock> {
        (0..P::CPUS).map_while(|cpu| self.of(cpu))
    }

    #[inline]
    fn local(&self) -> Option<Local<'_, P>> {
        if P::CPUS == 0 {
            return None;
        }
        let interrupts = Interrupts::disable();
        let stock = self.of(P::current_cpu())?;
        Some(Local { stock, _interrupts: interrupts })
    }

    /// Frames in all stocks.
    pub(crate) fn frames(&self) -> usize {
        self.all().map(Stock::count).sum()
    }

    /// Checks every stock; says how many frames they have.
    pub(crate) fn verify(&self, records: &Records) -> Result<usize, Broken> {
        for (cpu, stock) in self.all().enumerate() {
            let count = stock.count();
            let frames = stock.frames.get(..count).ok_or(Broken::StockCount { cpu, count })?;
            for (frame, own) in frames.iter().zip(&stock.records) {
                let frame = Frame::new(frame.load(Relaxed));
                let is_right = |record: &Record| record.is(SINGLE) && core::ptr::eq(record, own.load(Relaxed));
                if !records.get(frame).is_some_and(is_right) {
                    return Err(Broken::StockOwner { cpu, frame });
                }
            }
        }
        Ok(self.frames())
    }
}

impl<P: Platform> Frames<P> {
    /// A single frame from this CPU's stock, if there is one.
    #[inline]
    pub(super) fn take_stocked(&self) -> Option<Frame> {
        self.stocks.local()?.stock.pop(Owner::Pages(1))
    }

    /// The same, and the stock is filled first if it is empty.
    pub(super) fn refill(&self) -> Option<Frame> {
        let Local { stock, .. } = &self.stocks.local()?;
        if stock.count() == 0 {
            self.take_in_deferred();
            let mut batch = [Frame::default(); BATCH];
            let filled = self.zones.allocate_bulk(&self.records, &mut batch[..self.stocks.capacity() / 2], 1, SINGLE);
            let records = batch[..filled].iter().filter_map(|frame| Some((*frame, self.records.get(*frame)?)));
            records.for_each(|(frame, record)| _ = stock.push(frame, record));
        }
        stock.pop(Owner::Pages(1))
    }

    /// Frees the single frame to this CPU's stock that was taken out of it last; `false`, and nothing done, where that is
    /// another one, or it is not allocated as such.
    #[inline]
    pub(super) fn free_last(&self, frame: Frame) -> bool {
        self.stocks.local().is_some_and(|local| local.stock.push_again(frame))
    }

    /// Frees a single frame to this CPU's stock, which is drained by half if it is full; `false`, and nothing done, where it
    /// is not allocated as such, and where stocks cannot have it.
    #[cold]
    pub(super) fn free_to_stock(&self, frame: Frame) -> bool {
        let (record, local, capacity) = (self.records.get(frame), self.stocks.local(), self.stocks.capacity());
        let (Some(record), Some(Local { stock, .. })) = (record, &local) else { return false };
        // A free that is to be refused leaves the stock as it is.
        if capacity == 0 || frame < self.zones.first_boundary() || !record.is(Owner::Pages(1)) {
            return false;
        }
        if stock.count() >= capacity {
            self.drain(stock, capacity / 2);
        }
        stock.count() < CAPACITY && record.claim(1, SINGLE) && stock.push(frame, record)
    }

    /// Moves up to `frames` frames from `stock` to their zones, and says how many.
    #[inline(never)]
    fn drain(&self, stock: &Stock, frames: usize) -> usize {
        let mut batch = [Frame::default(); BATCH];
        let mut popped = 0;
        while popped < frames.min(BATCH)
            && let Some(frame) = stock.pop(Owner::Loose)
        {
            batch[popped] = frame;
            popped += 1;
        }
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
        self.stocks.of(cpu).map_or(0, |stock| self.drain_whole(stock))
    }
}
