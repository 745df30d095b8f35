//! Which locks each CPU holds, for debug builds.
//!
//! It is kept by the CPU's number, for all locks of a kernel together. A program on an operating system may have several
//! allocators whose threads use the same numbers, so there it is not kept; nor is what goes beyond a few locks a CPU, or a
//! few hundred CPUs. This crate's own tests keep it for each thread.
//!
//! Invariant: only the CPU with the number changes its part, with interrupts off, and no NMI handler does.

#![forbid(unsafe_code)]

pub(super) use imp::{add, highest, remove};

#[cfg(test)]
mod imp {
    use core::cell::RefCell;
    use std::vec::Vec;

    use crate::lock::Level;

    std::thread_local! {
        static HELD: RefCell<Vec<(usize, usize, Option<Level>)>> = const { RefCell::new(Vec::new()) };
    }

    pub(crate) fn add(cpu: usize, lock: usize, level: Option<Level>) {
        HELD.with_borrow_mut(|held| held.push((cpu, lock, level)));
    }

    pub(crate) fn remove(cpu: usize, lock: usize) {
        HELD.with_borrow_mut(|held| held.retain(|entry| (entry.0, entry.1) != (cpu, lock)));
    }

    pub(crate) fn highest(cpu: usize) -> Option<Level> {
        HELD.with_borrow(|held| held.iter().filter(|entry| entry.0 == cpu).filter_map(|entry| entry.2).max())
    }
}

#[cfg(all(not(test), target_os = "none"))]
mod imp {
    use crate::lock::Level;
    use crate::sync::{AtomicU8, AtomicUsize, Ordering::Relaxed};

    const CPUS: usize = 256;
    const LOCKS: usize = 12;

    /// What one CPU holds, in no order.
    struct Cpu {
        /// Addresses; 0 where there is none.
        locks: [AtomicUsize; LOCKS],
        /// 0 for a lock without one.
        levels: [AtomicU8; LOCKS],
    }

    static HELD: [Cpu; CPUS] =
        [const { Cpu { locks: [const { AtomicUsize::new(0) }; LOCKS], levels: [const { AtomicU8::new(0) }; LOCKS] } };
            CPUS];

    pub(crate) fn add(cpu: usize, lock: usize, level: Option<Level>) {
        if let Some((place, kept)) = places(cpu).find(|(place, _)| place.load(Relaxed) == 0) {
            kept.store(level.map_or(0, |level| level as u8), Relaxed);
            place.store(lock, Relaxed);
        }
    }

    pub(crate) fn remove(cpu: usize, lock: usize) {
        if let Some((place, _)) = places(cpu).find(|(place, _)| place.load(Relaxed) == lock) {
            place.store(0, Relaxed);
        }
    }

    pub(crate) fn highest(cpu: usize) -> Option<Level> {
        let held = places(cpu).filter(|(place, _)| place.load(Relaxed) != 0);
        let highest = held.map(|(_, level)| level.load(Relaxed)).max()?;
        Level::ALL.into_iter().find(|level| *level as u8 == highest)
    }

    fn places(cpu: usize) -> impl Iterator<Item = (&'static AtomicUsize, &'static AtomicU8)> {
        HELD.get(cpu).into_iter().flat_map(|cpu| cpu.locks.iter().zip(&cpu.levels))
    }
}

#[cfg(all(not(test), not(target_os = "none")))]
mod imp {
    use crate::lock::Level;

    pub(crate) fn add(_: usize, _: usize, _: Option<Level>) {}

    pub(crate) fn remove(_: usize, _: usize) {}

    pub(crate) fn highest(_: usize) -> Option<Level> {
        None
    }
}
