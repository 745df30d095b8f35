//! Quantum caches: magazines of the smallest segments (section 4.4.4 of the paper).
//!
//! A segment of one to [`MOST`] quanta that is freed goes into a magazine of its size, and comes from there: with no
//! lock, and no search, split or merge. For the arena it stays allocated meanwhile. A round is the segment's first
//! integer in the shape of a pointer, which is never followed.

#![deny(unsafe_code)]

use core::ptr::without_provenance_mut;

use crate::cache::{Caches, Magazines, Round};
use crate::platform::Platform;

/// The largest segment with a quantum cache, in quanta.
pub const MOST: usize = 8;

/// An integer takes no memory; magazines are as large as for objects of this size.
const AS_OBJECTS_OF: usize = 64;

/// One for each number of quanta, from 1 on.
#[derive(Debug)]
pub(super) struct QuantumCaches<P> {
    caches: [Magazines<P>; MOST],
    /// How many of them are used.
    enabled: usize,
}

impl<P> QuantumCaches<P> {
    pub(super) const fn new(enabled: usize) -> Self {
        Self { caches: [const { Magazines::new(AS_OBJECTS_OF, true) }; MOST], enabled }
    }

    pub(super) const fn enabled(&self) -> usize {
        self.enabled
    }

    pub(super) const fn enable(&mut self, sizes: usize) {
        self.enabled = if sizes < MOST { sizes } else { MOST };
    }
}

impl<P: Platform> QuantumCaches<P> {
    /// The cache for segments of `size` integers, a multiple of `quantum`.
    fn of(&self, size: u64, quantum: u64) -> Option<&Magazines<P>> {
        let index = usize::try_from(size / quantum).ok()?.checked_sub(1)?;
        self.caches[..self.enabled].get(index)
    }

    pub(super) fn take(&self, size: u64, quantum: u64) -> Option<u64> {
        Some(self.of(size, quantum)?.take()?.object.addr() as u64)
    }

    /// Whether the segment from `start` on is kept. `flush` really frees segments of that size.
    pub(super) fn put(
        &self,
        shared: &Caches<P>,
        (start, size): (u64, u64),
        quantum: u64,
        flush: impl Fn(u64, u64),
    ) -> bool {
        let Some(cache) = self.of(size, quantum) else { return false };
        let round = Round { object: without_provenance_mut(start as usize), ..Round::NONE };
        cache.put(shared, round, |rounds| flush_all(rounds, size, &flush)).is_ok()
    }

    /// Really frees what this CPU and the depots have.
    pub(super) fn drain(&self, shared: &Caches<P>, quantum: u64, flush: impl Fn(u64, u64)) {
        for (cache, quanta) in self.caches[..self.enabled].iter().zip(1..) {
            let size = quanta * quantum;
            cache.drain(shared, |rounds| flush_all(rounds, size, &flush));
        }
    }

    /// Really frees what there is, and gives all memory of the magazines back.
    pub(super) fn tear_down(&mut self, shared: &Caches<P>, quantum: u64, flush: impl Fn(u64, u64)) {
        for (cache, quanta) in self.caches[..self.enabled].iter_mut().zip(1..) {
            let size = quanta * quantum;
            cache.dismantle(shared, |rounds| flush_all(rounds, size, &flush));
        }
    }
}

fn flush_all(rounds: &[Round], size: u64, flush: &impl Fn(u64, u64)) {
    rounds.iter().for_each(|round| flush(round.object.addr() as u64, size));
}
