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
//! # The fast path
//!
//! It reads the CPU's number, goes to the CPU's own cache line, and pushes or pops a round of the loaded magazine, and changes
//! the state of the object's slot, a byte beside those of its neighbours in the slab, which as a rule are this CPU's too: see
//! *home* in [`slabs`](super::slabs). All of it is done with interrupts off, for the reasons that
//! [`platform`](crate::platform) gives. What it writes is this CPU's alone, and it reads only what hardly ever changes: the
//! table of the CPUs, and whether objects are checked. So it takes no lock, and waits for no line of another CPU.
//!
//! A round that was popped stays behind the last one: a free of its object, if that is the next, takes it back as it is, and
//! spares itself to find the slot. It is forgotten when another magazine becomes the loaded one, and when a slab is about to
//! leave the cache, which may be that of the object: then the line of every CPU is told.
//!
//! What can come in between has another number or waits: a handler of an interrupt is not started, and an NMI's has the
//! number [`IN_NMI`](crate::platform::IN_NMI), with which it gets nothing here: its allocation goes to the slabs, and its
//! free too. A CPU that leaves is drained by another one, when it uses the cache no more: `retire_cpu`.
//!
//! Invariant: a round in a magazine belongs to this layer alone, and a magazine to the place or list that it is in.

mod upkeep;

use core::fmt;
use core::ptr::NonNull;

use super::magazine::{List, Loaded, Magazine, Next, Place, Round};
use super::shared::Caches;
use super::sizing::{self, Kind};
use crate::fault::Fault;
use crate::lock::{Interrupts, IrqGuard, IrqLock, Level, OwnLines};
use crate::platform::{Platform, in_nmi};
use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Counter, Ordering};

/// How often a free goes around before it leaves the round to the layer below.
const ATTEMPTS: usize = 3;

/// The magazines of one cache.
pub(crate) struct Magazines<P> {
    /// `P::CPUS` of them; null until the first free that finds memory for them.
    cpus: AtomicPtr<Cpu>,
    /// CPUs with lower numbers may free to their magazines, and allocate from them. Each is 0 or `P::CPUS`, and 0 as long as
    /// `cpus` is null; both are written with the depot's lock held.
    freeing: AtomicUsize,
    allocating: AtomicUsize,
    shared: OwnLines<Shared<P>>,
    /// The kind that is made now.
    kind: AtomicU8,
    /// `None`: the layer is off.
    largest: Option<Kind>,
    object_size: usize,
    /// Meetings at the depot's lock before this interval.
    earlier_contention: Counter,
    reaped: Counter,
    /// A magazine that was found overwritten, which nobody has reported yet.
    damaged: AtomicPtr<u8>,
}

/// Where CPUs meet.
struct Shared<P> {
    depot: IrqLock<P, Depot>,
    /// How often they did, in this interval.
    contention: AtomicU32,
}

/// What a CPU has for one cache, on a cache line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Cpu {
    loaded: Loaded,
    previous: Place,
    /// Of the last call for memory that this CPU has followed: then it gave up its magazines.
    epoch: AtomicU32,
}

#[derive(Debug)]
struct Depot {
    full: List,
    empty: List,
    /// Full magazines that it was given in this interval, or since magazines have grown.
    given: u32,
    /// What is allocated needs more than a round.
    bypassed: bool,
}

/// What became of a round on its way into a magazine.
enum Put {
    Done,
    /// There is no empty magazine to put it in; or this one, but magazines have grown since.
    NeedsEmpty(Option<Magazine>),
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
        let depot = Depot { full: List::new(), empty: List::new(), given: 0, bypassed: false };
        Self {
            cpus: AtomicPtr::new(core::ptr::null_mut()),
            freeing: AtomicUsize::new(0),
            allocating: AtomicUsize::new(0),
            shared: OwnLines(Shared { depot: IrqLock::ordered(Level::Depot, depot), contention: AtomicU32::new(0) }),
            kind: AtomicU8::new(first),
            largest,
            object_size,
            earlier_contention: Counter::new(0),
            reaped: Counter::new(0),
            damaged: AtomicPtr::new(core::ptr::null_mut()),
        }
    }
}

impl<P: Platform> Magazines<P> {
    /// A round, if this CPU or the depot has one.
    pub(crate) fn take(&self) -> Option<Round> {
        if P::CPUS == 0 {
            return None;
        }
        let _interrupts = Interrupts::<P>::disable();
        let cpu = self.here()?;
        let round = cpu.pop().or_else(|| self.exchange_for_full(cpu));
        if round.is_some() {
            cpu.loaded.count_allocation();
        }
        round
    }

    fn exchange_for_full(&self, cpu: &Cpu) -> Option<Round> {
        if cpu.loaded.swap_if(&cpu.previous, |previous| !previous.is_empty()) {
            return cpu.pop();
        }
        self.drop_unsound(cpu);
        cpu.loaded.reopen();
        if cpu.previous.with(Magazine::is_empty) == Some(false) {
            cpu.swap();
            return cpu.pop();
        }
        let mut depot = self.lock_depot();
        let full = self.sound(depot.full.pop()?)?;
        if let Some(empty) = cpu.previous.take() {
            depot.empty.push(empty);
        }
        drop(depot);
        cpu.previous.put(cpu.loaded.take());
        cpu.loaded.put(Some(full));
        cpu.pop()
    }

    /// Rounds that this CPU's loaded magazine has room for. One that is empty, and of which larger ones are made by now, makes
    /// place for such a one before: where the depot has nothing left, it would come back to it full, and stay.
    pub(crate) fn make_room(&self, shared: &Caches<P>) -> usize {
        let is_outgrown =
            |magazine: &Magazine| magazine.is_empty() && magazine.is_smaller_than(self.kind()) && magazine.is_sound();
        let (room, is_small) = self.on_loaded(|loaded| (loaded.room(), loaded.with(is_outgrown) == Some(true)));
        let Some(mut other) = is_small.then(|| self.new_magazine(shared)).flatten() else { return room };
        let room = self.on_loaded(|loaded| {
            // It can be another CPU's by now.
            if loaded.with(is_outgrown) == Some(true)
                && let Some(small) = loaded.take()
            {
                loaded.put(Some(core::mem::replace(&mut other, small)));
            }
            loaded.room()
        });
        other.destroy(shared);
        room
    }

    /// Calls `work` with the place of this CPU's loaded magazine, if it has one.
    fn on_loaded<T: Default>(&self, work: impl FnOnce(&Loaded) -> T) -> T {
        let _interrupts = Interrupts::<P>::disable();
        self.here().map_or_else(T::default, |cpu| work(&cpu.loaded))
    }

    /// Puts rounds that nobody has freed into this CPU's loaded magazine, the first to be taken first. Returns those for
    /// which there is no room: what there was of it may be another CPU's, or used up, where interrupts were on since.
    pub(crate) fn stock<'a>(&self, rounds: &'a [Round]) -> &'a [Round] {
        let _interrupts = Interrupts::<P>::disable();
        let kept = self.here().map_or(0, |cpu| cpu.loaded.room().min(rounds.len()));
        let (kept, left) = rounds.split_at(kept);
        if let Some(cpu) = self.here() {
            kept.iter().rev().for_each(|&round| cpu.loaded.stock(round));
        }
        left
    }

    /// Keeps a round. Where it cannot, the caller has it back and gives it to the layer below.
    ///
    /// `flush` gives rounds to the layer below; it is called with no lock held.
    pub(crate) fn put(&self, shared: &Caches<P>, round: Round, flush: impl Fn(&[Round])) -> Result<(), Round> {
        let pushed = {
            let _interrupts = Interrupts::<P>::disable();
            self.here().is_some_and(|cpu| cpu.loaded.free(round) || Self::push_by_swap(shared, cpu, round))
        };
        if pushed { Ok(()) } else { self.put_slow(shared, round, &flush) }
    }

    /// Keeps a round where it is enough to swap the two magazines, and memory has not been called for.
    fn push_by_swap(shared: &Caches<P>, cpu: &Cpu, round: Round) -> bool {
        let swapped = cpu.loaded.is_full()
            && cpu.epoch.load(Relaxed) == shared.reap_epoch()
            && cpu.loaded.swap_if(&cpu.previous, Magazine::is_empty);
        swapped && cpu.loaded.free(round)
    }

    #[cold]
    fn put_slow(&self, shared: &Caches<P>, round: Round, flush: &dyn Fn(&[Round])) -> Result<(), Round> {
        if P::CPUS == 0 || self.largest.is_none() || in_nmi::<P>() {
            return Err(round);
        }
        let result = self.put_by_exchange(shared, round, flush);
        self.report_damage(shared);
        result
    }

    fn put_by_exchange(&self, shared: &Caches<P>, round: Round, flush: &dyn Fn(&[Round])) -> Result<(), Round> {
        self.set_up(shared);
        if self.is_behind(shared) {
            self.drain(shared, flush);
        }
        // An empty magazine that is not in the depot, where another CPU could take it first.
        let mut spare = None;
        let mut result = Err(round);
        for _ in 0..ATTEMPTS {
            let outcome = {
                let _interrupts = Interrupts::<P>::disable();
                let Some(cpu) = self.here() else { break };
                self.try_put(shared, cpu, round, &mut spare)
            };
            let empty = match outcome {
                Put::Done => {
                    result = Ok(());
                    break;
                }
                Put::Surplus(magazine) => {
                    flush(magazine.rounds());
                    magazine.clear();
                    Some(magazine)
                }
                Put::NeedsEmpty(None) => self.new_magazine(shared),
                Put::NeedsEmpty(Some(small)) => match self.new_magazine(shared) {
                    None => Some(small),
                    larger => {
                        small.destroy(shared);
                        larger
                    }
                },
            };
            let Some(empty) = empty else { break };
            self.leave(spare.replace(empty));
        }
        self.leave(spare);
        result
    }

    /// Leaves an empty magazine to all CPUs.
    fn leave(&self, empty: Option<Magazine>) {
        if let Some(empty) = empty {
            self.lock_depot().empty.push(empty);
        }
    }

    fn try_put(&self, shared: &Caches<P>, cpu: &Cpu, round: Round, spare: &mut Option<Magazine>) -> Put {
        self.drop_unsound(cpu);
        cpu.loaded.reopen();
        let push = || cpu.loaded.with(|magazine| magazine.push(round)) == Some(true);
        // Interrupts were on since the loaded magazine was found full, or this may be another CPU: it can have room now, and
        // must not become the previous one then.
        let mut pushed = push();
        if !pushed && cpu.previous.with(Magazine::is_empty) == Some(true) {
            cpu.swap();
            pushed = push();
        }
        if pushed {
            cpu.loaded.count_free();
            return Put::Done;
        }
        // Each of the two magazines is full, or there is none.
        let mut depot = self.lock_depot();
        if !sizing::has_room(depot.full.len(), shared.frames().total_bytes(), self.object_size, self.kind())
            && let Some(previous) = cpu.previous.take()
        {
            return Put::Surplus(previous);
        }
        let empty = match spare.take() {
            Some(empty) => empty,
            None => match depot.empty.pop().and_then(|empty| self.sound(empty)) {
                Some(empty) if !empty.is_smaller_than(self.kind()) => empty,
                other => return Put::NeedsEmpty(other),
            },
        };
        if let Some(full) = cpu.previous.take() {
            depot.full.push(full);
            depot.given += 1;
            if depot.given == sizing::MANY {
                self.resize(shared, 0, core::mem::take(&mut depot.given));
            }
        }
        drop(depot);
        cpu.previous.put(cpu.loaded.take());
        let pushed = empty.push(round);
        debug_assert!(pushed, "an empty magazine has room");
        cpu.loaded.put(Some(empty));
        cpu.loaded.count_free();
        Put::Done
    }

    /// The magazine, unless it was overwritten: then it is nobody's any more, and noted.
    fn sound(&self, magazine: Magazine) -> Option<Magazine> {
        if magazine.is_sound() {
            return Some(magazine);
        }
        self.damaged.store(magazine.address(), Relaxed);
        None
    }

    fn drop_unsound(&self, cpu: &Cpu) {
        let is_unsound = |magazine: &Magazine| !magazine.is_sound();
        let loaded = if cpu.loaded.with(is_unsound) == Some(true) { cpu.loaded.take() } else { None };
        let previous = if cpu.previous.with(is_unsound) == Some(true) { cpu.previous.take() } else { None };
        loaded.into_iter().chain(previous).for_each(|magazine| _ = self.sound(magazine));
    }

    /// Reports a magazine that was found overwritten, now that no lock is held.
    pub(crate) fn report_damage(&self, shared: &Caches<P>) {
        if self.damaged.load(Relaxed).is_null() {
            return;
        }
        let magazine = self.damaged.swap(core::ptr::null_mut(), Relaxed);
        if !magazine.is_null() {
            shared.report(Fault::BadControl, magazine, None);
        }
    }

    fn new_magazine(&self, shared: &Caches<P>) -> Option<Magazine> {
        if shared.memory_is_short() { None } else { Magazine::create(shared, self.kind()) }
    }

    /// Whether there is memory to have something for each CPU.
    pub(super) fn are_worthwhile(&self, shared: &Caches<P>) -> bool {
        P::CPUS > 0
            && self.largest.is_some()
            && shared.frames().total_bytes() >= sizing::least_memory(P::CPUS)
            && !shared.memory_is_short()
    }

    /// Gives every CPU its places, if there is memory for them.
    #[cold]
    pub(super) fn set_up(&self, shared: &Caches<P>) {
        if !self.cpus.load(Ordering::Acquire).is_null() || !self.are_worthwhile(shared) {
            return;
        }
        let Some(memory) = shared.allocate_metadata(P::CPUS * size_of::<Cpu>()) else { return };
        let cpus = memory.cast::<Cpu>().as_ptr();
        for index in 0..P::CPUS {
            let cpu =
                Cpu { loaded: Loaded::empty(), previous: Place::empty(), epoch: AtomicU32::new(shared.reap_epoch()) };
            // SAFETY: the memory is ours, for so many; metadata blocks are aligned to their size.
            unsafe { cpus.add(index).write(cpu) };
        }
        let null = core::ptr::null_mut();
        if self.cpus.compare_exchange(null, cpus, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: allocated above with this size; another CPU's came first.
            unsafe { shared.free_metadata(cpus.cast(), P::CPUS * size_of::<Cpu>()) };
        }
        self.open(|_| ());
    }

    /// Lets CPUs use their places, if there are any, after `change`.
    fn open(&self, change: impl FnOnce(&mut Depot)) {
        let mut depot = self.shared.depot.lock();
        change(&mut depot);
        let count = if self.cpus.load(Relaxed).is_null() { 0 } else { P::CPUS };
        self.freeing.store(count, Ordering::Release);
        self.allocating.store(if depot.bypassed { 0 } else { count }, Ordering::Release);
    }

    /// What the CPU has on which this runs, as long as interrupts are off.
    #[inline]
    pub(super) fn here(&self) -> Option<&Cpu> {
        self.cpu_below(&self.freeing, P::current_cpu())
    }

    /// Whether [`pop_here`](Self::pop_here) is to find nothing.
    pub(super) fn bypass(&self, bypass: bool) {
        self.open(|depot| depot.bypassed = bypass);
    }

    /// The last round of this CPU's loaded magazine, if there is one and `may` says so. Interrupts are off.
    #[inline]
    pub(super) fn pop_here(&self, may: impl FnOnce(Round) -> bool) -> Option<Round> {
        self.cpu_below(&self.allocating, P::current_cpu())?.loaded.pop_if(may)
    }

    /// Where this CPU's next round goes, if there is room; as long as interrupts are off.
    ///
    /// What is allocated last is often freed first. Then its round is there still, and spares the free to find out about the
    /// object.
    #[inline]
    pub(super) fn next_here(&self) -> Option<Next<'_>> {
        self.here()?.loaded.next()
    }

    fn cpu(&self, number: usize) -> Option<&Cpu> {
        self.cpu_below(&self.freeing, number)
    }

    /// The CPU with this number, if that is below `end`, [`freeing`](Self::freeing) or [`allocating`](Self::allocating).
    #[inline]
    fn cpu_below(&self, end: &AtomicUsize, number: usize) -> Option<&Cpu> {
        if number >= end.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: `set_up` has written `P::CPUS` of them before either was more than 0, and they stay until `tear_down`, which
        // has the layer alone.
        Some(unsafe { NonNull::new_unchecked(self.cpus.load(Relaxed)).add(number).as_ref() })
    }

    /// Whether this CPU has magazines to give up.
    pub(super) fn is_behind(&self, shared: &Caches<P>) -> bool {
        let _interrupts = Interrupts::<P>::disable();
        self.here().is_some_and(|cpu| cpu.epoch.load(Relaxed) != shared.reap_epoch())
    }

    /// Sizes new magazines by what the depot had to do.
    fn resize(&self, shared: &Caches<P>, contention: u32, given: u32) {
        let Some(largest) = self.largest else { return };
        let kind = sizing::next_kind(self.kind(), largest, contention, given, shared.memory_is_short());
        self.kind.store(kind.index(), Relaxed);
    }

    fn kind(&self) -> Kind {
        Kind::from_index(self.kind.load(Relaxed))
    }

    fn lock_depot(&self) -> IrqGuard<'_, P, Depot> {
        self.shared.depot.try_lock().unwrap_or_else(|| {
            self.shared.contention.fetch_add(1, Relaxed);
            self.shared.depot.lock()
        })
    }

    /// Lets a test look at this CPU's loaded magazine.
    #[cfg(test)]
    pub(super) fn with_loaded(&self, look: impl Fn(&Magazine)) {
        self.here().and_then(|cpu| cpu.loaded.with(look)).expect("a magazine");
    }

    /// Runs `work` with the depot's lock held; it can ask how often others have met it.
    #[cfg(test)]
    pub(crate) fn with_depot_locked(&self, work: impl FnOnce(&dyn Fn() -> u32)) {
        let _depot = self.shared.depot.lock();
        work(&|| self.shared.contention.load(Relaxed));
    }
}

impl Cpu {
    fn pop(&self) -> Option<Round> {
        self.loaded.with(Magazine::pop).flatten()
    }

    fn swap(&self) {
        let loaded = self.loaded.take();
        self.loaded.put(self.previous.take());
        self.previous.put(loaded);
    }

    fn take_both(&self) -> [Option<Magazine>; 2] {
        [self.loaded.take(), self.previous.take()]
    }
}

impl<P> fmt::Debug for Magazines<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Magazines").field("kind", &self.kind).field("largest", &self.largest).finish_non_exhaustive()
    }
}
