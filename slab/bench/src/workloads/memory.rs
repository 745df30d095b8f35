//! W6: how much memory is touched for what is live.
//!
//! All of each block is written to. Touched is whatever memory the process has after that and had not before the allocator was
//! set up; live are the bytes that were asked for, when they were most.

use crate::arena::{self, Arena};
use crate::peers::Peer;
use crate::run::{Batch, Mode};

/// A workload that knows what it has.
pub trait Live: Batch {
    fn live_bytes(&self) -> usize;
}

/// Touched by live bytes.
pub fn run<A: Peer>(arena: Arena, mode: Mode, mut workload: impl Live) -> f64 {
    // What the harness itself needs is there before, and what it takes to ask.
    arena::touched();
    let before = arena::touched();
    A::set_up(arena);
    workload.start();
    let mut most_live = workload.live_bytes();
    for _ in 0..2 * workload.warm_up() {
        workload.run();
        most_live = most_live.max(workload.live_bytes());
    }
    let touched = arena::touched() - before;
    if mode == Mode::Check {
        workload.finish();
    }
    touched as f64 / most_live as f64
}
