//! What is done with magazines from time to time: giving them up, sizing them, counting and checking.

use super::{Cpu, Depot, Magazines, Numbers};
use crate::cache::magazine::{List, Magazine, Round};
use crate::cache::shared::Caches;
use crate::lock::Interrupts;
use crate::platform::Platform;
use crate::sync::Ordering::{self, Relaxed};

impl<P: Platform> Magazines<P> {
    /// Gives the layer below what this CPU and the depot have, and frees the magazines.
    pub(crate) fn drain(&self, shared: &Caches<P>, flush: impl Fn(&[Round])) {
        let mine = {
            let _interrupts = Interrupts::<P>::disable();
            self.here().map(|cpu| {
                cpu.epoch.store(shared.reap_epoch(), Relaxed);
                cpu.take_both()
            })
        };
        mine.into_iter().flatten().flatten().for_each(|magazine| self.empty_out(shared, magazine, &flush));
        self.drain_depot(shared, usize::MAX, usize::MAX, &flush);
    }

    /// Gives the layer below what the CPU with this number has.
    ///
    /// # Safety
    ///
    /// That CPU does not use this cache meanwhile.
    pub(crate) unsafe fn drain_cpu(&self, shared: &Caches<P>, number: usize, flush: impl Fn(&[Round])) {
        let magazines = self.cpu(number).map(Cpu::take_both);
        magazines.into_iter().flatten().flatten().for_each(|magazine| self.empty_out(shared, magazine, &flush));
    }

    /// Drains every CPU and the depot, and frees what the CPUs had.
    pub(crate) fn dismantle(&mut self, shared: &Caches<P>, flush: impl Fn(&[Round])) {
        // SAFETY: `self` is borrowed by nobody else.
        unsafe { self.tear_down(shared, flush) };
    }

    /// The same.
    ///
    /// # Safety
    ///
    /// No CPU uses this cache meanwhile.
    pub(crate) unsafe fn tear_down(&self, shared: &Caches<P>, flush: impl Fn(&[Round])) {
        for number in 0..P::CPUS {
            // SAFETY: passed on to the caller.
            unsafe { self.drain_cpu(shared, number, &flush) };
        }
        self.drain_depot(shared, usize::MAX, usize::MAX, &flush);
        let cpus = self.cpus.swap(core::ptr::null_mut(), Ordering::AcqRel);
        self.open(|_| ());
        if !cpus.is_null() {
            // SAFETY: allocated in `set_up` with this size; nobody uses them, says the caller.
            unsafe { shared.free_metadata(cpus.cast(), P::CPUS * size_of::<Cpu>()) };
        }
    }

    /// Slabs leave the cache: before they do, every CPU forgets the rounds that it has taken out.
    pub(crate) fn recall(&self) {
        (0..P::CPUS).filter_map(|number| self.cpu(number)).for_each(|cpu| cpu.loaded.recall());
    }

    fn drain_depot(&self, shared: &Caches<P>, full: usize, empty: usize, flush: impl Fn(&[Round])) {
        for _ in 0..full {
            let Some(magazine) = self.pop_from_depot(|depot| &mut depot.full) else { break };
            self.reaped.fetch_add(1, Relaxed);
            self.empty_out(shared, magazine, &flush);
        }
        for _ in 0..empty {
            let Some(magazine) = self.pop_from_depot(|depot| &mut depot.empty) else { break };
            self.empty_out(shared, magazine, &flush);
        }
    }

    fn pop_from_depot(&self, list: impl Fn(&mut Depot) -> &mut List) -> Option<Magazine> {
        list(&mut self.shared.depot.lock()).pop()
    }

    fn empty_out(&self, shared: &Caches<P>, magazine: Magazine, flush: &impl Fn(&[Round])) {
        let Some(magazine) = self.sound(magazine) else { return self.report_damage(shared) };
        if !magazine.is_empty() {
            flush(magazine.rounds());
            magazine.clear();
        }
        magazine.destroy(shared);
    }

    /// An interval is over: frees the magazines that the depot did without, and sizes new ones by the contention there
    /// was.
    pub(crate) fn end_interval(&self, shared: &Caches<P>, flush: impl Fn(&[Round])) {
        if self.largest.is_none() {
            return;
        }
        let (full, empty) = {
            let mut depot = self.shared.depot.lock();
            depot.given = 0;
            (depot.full.end_interval(), depot.empty.end_interval())
        };
        self.drain_depot(shared, full, empty, &flush);
        let contention = self.shared.contention.swap(0, Relaxed);
        self.earlier_contention.fetch_add(contention.into(), Relaxed);
        self.resize(shared, contention, 0);
    }

    pub(crate) fn numbers(&self) -> Numbers {
        let mut numbers = Numbers {
            rounds: if self.largest.is_some() && P::CPUS > 0 { self.kind().rounds() } else { 0 },
            contention: self.earlier_contention.load(Relaxed).wrapping_add(self.shared.contention.load(Relaxed).into()),
            reaped: self.reaped.load(Relaxed),
            ..Numbers::default()
        };
        for cpu in (0..P::CPUS).filter_map(|number| self.cpu(number)) {
            numbers.allocations = numbers.allocations.wrapping_add(cpu.loaded.allocations.load(Relaxed));
            numbers.frees = numbers.frees.wrapping_add(cpu.loaded.frees.load(Relaxed));
        }
        if let Some(depot) = self.shared.depot.lock_to_report() {
            (numbers.full, numbers.empty) = (depot.full.len(), depot.empty.len());
        }
        numbers
    }

    /// Checks what this CPU and the depot have. `Err` says what is wrong; `is_right` says whether a round is, that is in a
    /// magazine, or not any more.
    pub(crate) fn verify(&self, is_right: impl Fn(Round, bool) -> bool) -> Result<(), &'static str> {
        let (mut rounds, mut fill, mut taken) = (true, true, true);
        let is_round = |&round: &Round| is_right(round, true);
        let mut look = |magazine: &Magazine| rounds &= magazine.rounds().iter().all(is_round);
        let _interrupts = Interrupts::<P>::disable();
        if let Some(cpu) = self.here() {
            cpu.loaded.with(&mut look);
            cpu.previous.with(&mut look);
            cpu.loaded.for_each_taken(|round| taken &= is_right(round, false));
            fill &= cpu.previous.with(|previous| previous.is_full() || previous.is_empty()).unwrap_or(true);
        }
        let depot = self.shared.depot.lock();
        depot.full.for_each(&mut look);
        depot.full.for_each(|magazine| fill &= magazine.is_full());
        depot.empty.for_each(|magazine| fill &= magazine.is_empty());
        match (rounds, taken, fill) {
            (false, ..) => Err("a round of a magazine is not a free object of the cache"),
            (_, false, _) => Err("a round that was taken out of a magazine is of a slab that has left the cache"),
            (.., false) => Err("a previous magazine, or one of the depot, is not as full or empty as it must be"),
            _ => Ok(()),
        }
    }
}
