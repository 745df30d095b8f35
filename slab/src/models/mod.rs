//! What CPUs share, with every order of their steps: run by
//! `RUSTFLAGS="--cfg models" cargo test -p kslab --lib --profile models -- models::`.
//!
//! A model is a *scenario*: memory is set up, a few CPUs do a few calls each, and then all must be as it should. loom runs
//! it once for each order of the CPUs' steps that can make a difference, with at most three pre-emptions, and for each
//! value that a load may have. Whoever is given an object checks that nobody else has it, and writes to it, so that loom
//! sees whether the last user's writes came before. Each scenario is also run with a [bug](Bug), and must then fail.
//!
//! Interrupts are not left to chance either: one comes before each step in turn.
//!
//! What is longer than loom could exhaust is in `random`: there [shuttle](Mode::Shuttle) picks the orders.

mod bench;
mod deferred;
mod exchange;
mod frees;
mod interrupts;
mod offline;
mod random;
mod registry;

use bench::How::{EveryOrder, EveryOrderAndStep, EveryOrderOfLocks, EveryStep, Random};
use bench::{Bench, Work, fails_with, holds, must_fail};

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::vec::Vec;

use core::alloc::Layout;

use crate::cache::USED;
use crate::sync::explorer::{self, Bug, Cpus};

type Heap = crate::Heap<Cpus>;

/// Objects of which a magazine has seven, the fewest there are.
const LAYOUT: Layout = Layout::new::<[u64; 128]>();
const ROUNDS: usize = 7;

/// So many objects, one after the other.
fn take(heap: &Heap, count: usize) -> Vec<NonNull<u8>> {
    (0..count).map(|_| heap.allocate(LAYOUT).expect("memory")).collect()
}

fn give(heap: &Heap, objects: impl IntoIterator<Item = NonNull<u8>>) {
    // SAFETY: allocated by `take`, and nobody uses them.
    objects.into_iter().for_each(|object| unsafe { heap.free(object, LAYOUT) });
}

/// The number of the size class of `LAYOUT`.
fn class() -> usize {
    crate::SIZES.iter().position(|size| *size == LAYOUT.size()).expect("a class")
}
