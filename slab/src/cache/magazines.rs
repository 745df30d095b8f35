//! The per-CPU layer: magazines in front of a cache (Bonwick & Adams 2001, section 3).
//!
//! Each CPU has a *loaded* magazine, from which it allocates and into which it frees, and the *previous* one, which is
//! full or empty, so that a CPU that goes back and forth at the end of a magazine only swaps the two. When both are
//! empty, or both full, it exchanges one with the *depot*, which all CPUs share. When the depot has none either, the
//! caller goes to the layer below.
//!
//! What a CPU has is guarded by its interrupts being off, and needs no lock; the depot has one. Magazines are
//! allocated, and their rounds given to the layer below, with interrupts as they were and no lock held.
//!
//! Invariant: a round in a magazine belongs to this layer alone, and a magazine to the place or list that it is in.

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::magazine::{List, Magazine, Place};
use super::shared::Caches;
use super::sizing::{self, Kind};
use crate::lock::{Interrupts, IrqGuard, IrqLock};
use crate::platform::Platform;

/// How often a free goes around before it leaves the round to the layer below.
const ATTEMPTS: usize = 3;

/// The magazines of one cache.
pub(crate) struct Magazines<P> {
    /// `P::CPUS` of them; null until the first free that finds memory for them.
    cpus: AtomicPtr<Cpu>,
    depot: IrqLock<P, Depot>,
    /// The kind that is made now.
    kind: AtomicU8,
    /// `None`: the layer is off.
    largest: Option<Kind>,
    object_size: usize,
    /// Meetings at the depot's lock: in this interval, and before it.
    contention: AtomicU32,
    earlier_contention: AtomicU64,
    reaped: AtomicU64,
}

/// What a CPU has for one cache, on a cache line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
struct Cpu {
    loaded: Place,
    previous: Place,
    allocations: AtomicU64,
    frees: AtomicU64,
    /// As of when this CPU has given up its magazines; see [`Magazines::epoch`].
    epoch: AtomicU32,
}

#[derive(Debug)]
struct Depot {
    full: List,
    empty: List,
}

/// What became of a round on its way into a magazine.
enum Put {
    Done,
    /// There is no empty magazine to put it in.
    NeedsEmpty,
    /// This magazine has to be emptied first.
    Surplus(Magazine),
}

/// Counts of the layer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Numbers {
    pub(crate) allocations: u64,
    pub(crate) frees: u64,
    /// Rounds that a new magazine holds; 0 where the layer is off.
    pub(crate) rounds: usize,
    pub(crate) contention: u64,
    pub(crate) reaped: u64,
    pub(crate) full: usize,
    pub(crate) empty: usize,
}

impl<P> Magazines<P> {
    /// The layer for rounds that stand for `object_size` bytes each.
    pub(crate) const fn new(object_size: usize, enabled: bool) -> Self {
        let kinds = if enabled { sizing::kinds_for(object_size) } else { None };
        let (first, largest) = match kinds {
            Some((first, largest)) => (first.index(), Some(largest)),
            None => (0, None),
        };
        Self {
            cpus: AtomicPtr::new(core::ptr::null_mut()),
            depot: IrqLock::new(Depot { full: List::new(), empty: List::new() }),
            kind: AtomicU8::new(first),
            largest,
            object_size,
            contention: AtomicU32::new(0),
            earlier_contention: AtomicU64::new(0),
            reaped: AtomicU64::new(0),
        }
    }
}

impl<P: Platform> Magazines<P> {
    /// A round, if this CPU or the depot has one.
    #[inline]
    pub(crate) fn take(&self) -> Option<*mut u8> {
        if P::CPUS == 0 {
            return None;
        }
        let _interrupts = Interrupts::<P>::disable();
        let cpu = self.this_cpu()?;
        let round = match cpu.loaded.with(Magazine::pop).flatten() {
            Some(round) => round,
            None => self.exchange_for_full(cpu)?,
        };
        count(&cpu.allocations);
        Some(round)
    }

    #[cold]
    fn exchange_for_full(&self, cpu: &Cpu) -> Option<*mut u8> {
        if let Some(round) = cpu.previous.with(Magazine::pop).flatten() {
            cpu.swap();
            return Some(round);
        }
        let mut depot = self.lock_depot();
        let full = depot.full.pop()?;
        if let Some(empty) = cpu.previous.take() {
            depot.empty.push(empty);
        }
        drop(depot);
        cpu.previous.put(cpu.loaded.take());
        let round = full.pop();
        cpu.loaded.put(Some(full));
        round
    }

    /// Keeps a round. Where it cannot, the caller has it back and gives it to the layer below.
    ///
    /// `flush` gives rounds to the layer below; it is called with no lock held.
    #[inline]
    pub(crate) fn put(&self, shared: &Caches<P>, round: *mut u8, flush: impl Fn(&[*mut u8])) -> Result<(), *mut u8> {
        if P::CPUS == 0 || self.largest.is_none() {
            return Err(round);
        }
        {
            let _interrupts = Interrupts::<P>::disable();
            if let Some(cpu) = self.this_cpu()
                && cpu.loaded.with(|loaded| loaded.push(round).is_ok()) == Some(true)
            {
                count(&cpu.frees);
                return Ok(());
            }
        }
        self.put_slow(shared, round, &flush)
    }

    #[cold]
    fn put_slow(&self, shared: &Caches<P>, round: *mut u8, flush: &dyn Fn(&[*mut u8])) -> Result<(), *mut u8> {
        self.set_up(shared);
        if self.is_behind(shared) {
            self.drain(shared, flush);
        }
        for _ in 0..ATTEMPTS {
            let outcome = {
                let _interrupts = Interrupts::<P>::disable();
                let Some(cpu) = self.this_cpu() else { return Err(round) };
                self.try_put(shared, cpu, round)
            };
            let empty = match outcome {
                Put::Done => return Ok(()),
                Put::Surplus(magazine) => {
                    flush(magazine.rounds());
                    magazine.clear();
                    magazine
                }
                Put::NeedsEmpty => self.new_magazine(shared).ok_or(round)?,
            };
            self.lock_depot().empty.push(empty);
        }
        Err(round)
    }

    fn try_put(&self, shared: &Caches<P>, cpu: &Cpu, round: *mut u8) -> Put {
        if cpu.previous.with(Magazine::is_empty) == Some(true) {
            cpu.swap();
        }
        if cpu.loaded.with(|loaded| loaded.push(round).is_ok()) == Some(true) {
            count(&cpu.frees);
            return Put::Done;
        }
        let most = sizing::most_full_magazines(shared.frames().total_bytes(), self.object_size, self.kind());
        // Each of the two magazines is full, or there is none.
        let mut depot = self.lock_depot();
        if depot.full.len() >= most
            && let Some(previous) = cpu.previous.take()
        {
            return Put::Surplus(previous);
        }
        let Some(empty) = depot.empty.pop() else { return Put::NeedsEmpty };
        if let Some(full) = cpu.previous.take() {
            depot.full.push(full);
        }
        drop(depot);
        cpu.previous.put(cpu.loaded.take());
        let pushed = empty.push(round).is_ok();
        debug_assert!(pushed, "an empty magazine has room");
        cpu.loaded.put(Some(empty));
        count(&cpu.frees);
        Put::Done
    }

    fn new_magazine(&self, shared: &Caches<P>) -> Option<Magazine> {
        if shared.memory_is_short() { None } else { Magazine::create(shared, self.kind()) }
    }

    /// Gives every CPU its places, if there is memory for them.
    #[cold]
    pub(super) fn set_up(&self, shared: &Caches<P>) {
        if P::CPUS == 0 || self.largest.is_none() || !self.cpus.load(Ordering::Acquire).is_null() {
            return;
        }
        if shared.frames().total_bytes() < sizing::least_memory(P::CPUS) || shared.memory_is_short() {
            return;
        }
        let Some(memory) = shared.allocate_metadata(P::CPUS * size_of::<Cpu>()) else { return };
        let cpus = memory.cast::<Cpu>().as_ptr();
        for index in 0..P::CPUS {
            let cpu = Cpu {
                loaded: Place::empty(),
                previous: Place::empty(),
                allocations: AtomicU64::new(0),
                frees: AtomicU64::new(0),
                epoch: AtomicU32::new(self.epoch(shared)),
            };
            // SAFETY: the memory is ours, for so many; metadata blocks are aligned to their size.
            unsafe { cpus.add(index).write(cpu) };
        }
        let null = core::ptr::null_mut();
        if self.cpus.compare_exchange(null, cpus, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: allocated above with this size; another CPU's came first.
            unsafe { shared.free_metadata(cpus.cast(), P::CPUS * size_of::<Cpu>()) };
        }
    }

    #[inline]
    fn this_cpu(&self) -> Option<&Cpu> {
        self.cpu(P::current_cpu())
    }

    #[inline]
    fn cpu(&self, number: usize) -> Option<&Cpu> {
        let cpus = self.cpus.load(Ordering::Acquire);
        if number >= P::CPUS || cpus.is_null() {
            return None;
        }
        // SAFETY: `set_up` has written `P::CPUS` of them, and they stay until `tear_down`, which has the layer alone.
        Some(unsafe { &*cpus.add(number) })
    }

    /// Goes up with each reason to give up the magazines there are: when memory is called for, and when larger ones are
    /// made.
    fn epoch(&self, shared: &Caches<P>) -> u32 {
        shared.reap_epoch().wrapping_add(self.kind().index().into())
    }

    /// Whether this CPU has magazines to give up.
    pub(super) fn is_behind(&self, shared: &Caches<P>) -> bool {
        let _interrupts = Interrupts::<P>::disable();
        self.this_cpu().is_some_and(|cpu| cpu.epoch.load(Relaxed) != self.epoch(shared))
    }

    fn kind(&self) -> Kind {
        Kind::from_index(self.kind.load(Relaxed))
    }

    fn lock_depot(&self) -> IrqGuard<'_, P, Depot> {
        self.depot.try_lock().unwrap_or_else(|| {
            self.contention.fetch_add(1, Relaxed);
            self.depot.lock()
        })
    }

    /// Runs `work` with the depot's lock held; it can ask how often others have met it.
    #[cfg(test)]
    pub(super) fn with_depot_locked(&self, work: impl FnOnce(&dyn Fn() -> u32)) {
        let _depot = self.depot.lock();
        work(&|| self.contention.load(Relaxed));
    }

    /// Gives the layer below what this CPU and the depot have, and frees the magazines.
    pub(crate) fn drain(&self, shared: &Caches<P>, flush: impl Fn(&[*mut u8])) {
        let mine = {
            let _interrupts = Interrupts::<P>::disable();
            self.this_cpu().map(|cpu| {
                cpu.epoch.store(self.epoch(shared), Relaxed);
                cpu.take_both()
            })
        };
        mine.into_iter().flatten().flatten().for_each(|magazine| empty_out(shared, magazine, &flush));
        self.drain_depot(shared, usize::MAX, usize::MAX, &flush);
    }

    /// Gives the layer below what the CPU with this number has.
    ///
    /// # Safety
    ///
    /// That CPU does not use this cache meanwhile.
    pub(crate) unsafe fn drain_cpu(&self, shared: &Caches<P>, number: usize, flush: impl Fn(&[*mut u8])) {
        let magazines = self.cpu(number).map(Cpu::take_both);
        magazines.into_iter().flatten().flatten().for_each(|magazine| empty_out(shared, magazine, &flush));
    }

    /// Drains every CPU and the depot, and frees what the CPUs had.
    pub(crate) fn dismantle(&mut self, shared: &Caches<P>, flush: impl Fn(&[*mut u8])) {
        // SAFETY: `self` is borrowed by nobody else.
        unsafe { self.tear_down(shared, flush) };
    }

    /// The same.
    ///
    /// # Safety
    ///
    /// No CPU uses this cache meanwhile.
    pub(crate) unsafe fn tear_down(&self, shared: &Caches<P>, flush: impl Fn(&[*mut u8])) {
        for number in 0..P::CPUS {
            // SAFETY: passed on to the caller.
            unsafe { self.drain_cpu(shared, number, &flush) };
        }
        self.drain_depot(shared, usize::MAX, usize::MAX, &flush);
        let cpus = self.cpus.swap(core::ptr::null_mut(), Ordering::AcqRel);
        if !cpus.is_null() {
            // SAFETY: allocated in `set_up` with this size; nobody uses them, says the caller.
            unsafe { shared.free_metadata(cpus.cast(), P::CPUS * size_of::<Cpu>()) };
        }
    }

    fn drain_depot(&self, shared: &Caches<P>, full: usize, empty: usize, flush: impl Fn(&[*mut u8])) {
        for _ in 0..full {
            let Some(magazine) = self.pop_from_depot(|depot| &mut depot.full) else { break };
            self.reaped.fetch_add(1, Relaxed);
            empty_out(shared, magazine, &flush);
        }
        for _ in 0..empty {
            let Some(magazine) = self.pop_from_depot(|depot| &mut depot.empty) else { break };
            empty_out(shared, magazine, &flush);
        }
    }

    fn pop_from_depot(&self, list: impl Fn(&mut Depot) -> &mut List) -> Option<Magazine> {
        list(&mut self.depot.lock()).pop()
    }

    /// An interval is over: frees the magazines that the depot did without, and sizes new ones by the contention there
    /// was.
    pub(crate) fn end_interval(&self, shared: &Caches<P>, flush: impl Fn(&[*mut u8])) {
        let Some(largest) = self.largest else { return };
        let (full, empty) = {
            let mut depot = self.depot.lock();
            (depot.full.end_interval(), depot.empty.end_interval())
        };
        self.drain_depot(shared, full, empty, &flush);
        let contention = self.contention.swap(0, Relaxed);
        self.earlier_contention.fetch_add(contention.into(), Relaxed);
        let kind = sizing::next_kind(self.kind(), largest, contention, shared.memory_is_short());
        self.kind.store(kind.index(), Relaxed);
    }

    pub(crate) fn numbers(&self) -> Numbers {
        let mut numbers = Numbers {
            rounds: if self.largest.is_some() && P::CPUS > 0 { self.kind().rounds() } else { 0 },
            contention: self.earlier_contention.load(Relaxed).wrapping_add(self.contention.load(Relaxed).into()),
            reaped: self.reaped.load(Relaxed),
            ..Numbers::default()
        };
        for cpu in (0..P::CPUS).filter_map(|number| self.cpu(number)) {
            numbers.allocations = numbers.allocations.wrapping_add(cpu.allocations.load(Relaxed));
            numbers.frees = numbers.frees.wrapping_add(cpu.frees.load(Relaxed));
        }
        let depot = self.depot.lock();
        (numbers.full, numbers.empty) = (depot.full.len(), depot.empty.len());
        numbers
    }

    /// Checks what this CPU and the depot have. `Err` says what is wrong; `is_right` says whether a round is.
    pub(crate) fn verify(&self, is_right: impl Fn(*mut u8) -> bool) -> Result<(), &'static str> {
        let (mut rounds, mut fill) = (true, true);
        let mut look = |magazine: &Magazine| rounds &= magazine.rounds().iter().all(|&round| is_right(round));
        let _interrupts = Interrupts::<P>::disable();
        if let Some(cpu) = self.this_cpu() {
            cpu.loaded.with(&mut look);
            cpu.previous.with(&mut look);
            fill &= cpu.previous.with(|previous| previous.is_full() || previous.is_empty()).unwrap_or(true);
        }
        let depot = self.depot.lock();
        depot.full.for_each(&mut look);
        depot.full.for_each(|magazine| fill &= magazine.is_full());
        depot.empty.for_each(|magazine| fill &= magazine.is_empty());
        match (rounds, fill) {
            (false, _) => Err("a round of a magazine is not a free object of the cache"),
            (_, false) => Err("a previous magazine, or one of the depot, is not as full or empty as it must be"),
            _ => Ok(()),
        }
    }
}

impl Cpu {
    fn swap(&self) {
        let loaded = self.loaded.take();
        self.loaded.put(self.previous.take());
        self.previous.put(loaded);
    }

    fn take_both(&self) -> [Option<Magazine>; 2] {
        [self.loaded.take(), self.previous.take()]
    }
}

/// Adds one to a counter that only this CPU writes.
#[inline]
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

fn empty_out<P: Platform>(shared: &Caches<P>, magazine: Magazine, flush: &impl Fn(&[*mut u8])) {
    if !magazine.is_empty() {
        flush(magazine.rounds());
        magazine.clear();
    }
    magazine.destroy(shared);
}

impl<P> fmt::Debug for Magazines<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Magazines").field("kind", &self.kind).field("largest", &self.largest).finish_non_exhaustive()
    }
}
