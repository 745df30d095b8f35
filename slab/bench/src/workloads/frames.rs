//! W7: page frames.

use std::hint::black_box;
use std::marker::PhantomData;
use std::time::Instant;

use fastrand::Rng;

use super::blocks::{below, rng};
use crate::arena::Arena;
use crate::peers::frames::FramePeer;
use crate::run::Batch;

/// Microseconds until page frames can be allocated.
pub fn set_up<F: FramePeer>(arena: Arena) -> f64 {
    let start = Instant::now();
    F::set_up(arena);
    let taken = start.elapsed();
    let frame = F::allocate(0).expect("a frame");
    F::free(frame, 0);
    taken.as_secs_f64() * 1e6
}

/// One page frame, again and again.
#[derive(Debug)]
pub struct Pair<F>(PhantomData<F>);

impl<F: FramePeer> Pair<F> {
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

impl<F: FramePeer> Batch for Pair<F> {
    const OPERATIONS: usize = 1000;

    #[inline(never)]
    fn run(&mut self) {
        for _ in 0..Self::OPERATIONS {
            F::free(black_box(F::allocate(0)).expect("a frame"), 0);
        }
    }
}

/// Blocks of orders 0 to 9, each as often, of which any is replaced.
#[derive(Debug)]
pub struct Mixed<F: FramePeer> {
    /// There may be no large block left, in the least memory.
    blocks: [Option<(F::Frame, u32)>; 64],
    rng: Rng,
}

impl<F: FramePeer> Mixed<F> {
    pub fn new() -> Self {
        Self { blocks: [None; _], rng: rng() }
    }
}

impl<F: FramePeer> Batch for Mixed<F> {
    const OPERATIONS: usize = 1000;

    fn warm_up(&self) -> usize {
        10
    }

    #[inline(never)]
    fn run(&mut self) {
        for _ in 0..Self::OPERATIONS {
            let number = below(&mut self.rng, self.blocks.len());
            if let Some((frame, order)) = self.blocks[number] {
                F::free(frame, order);
            }
            let order = below(&mut self.rng, 10) as u32;
            self.blocks[number] = F::allocate(order).map(|frame| (frame, order));
        }
    }

    fn finish(&mut self) {
        for (frame, order) in self.blocks.iter_mut().filter_map(Option::take) {
            F::free(frame, order);
        }
    }
}
