//! W7: many page frames at once.

use super::blocks::shuffled;
use crate::peers::frames::FramePeer;
use crate::run::Batch;

const FRAMES: usize = 10_000;

/// Page frames, and the order in which they are freed.
#[derive(Debug)]
struct Many<F: FramePeer> {
    frames: Vec<F::Frame>,
    shuffled: Vec<F::Frame>,
    order: Vec<usize>,
}

impl<F: FramePeer> Many<F> {
    fn new() -> Self {
        let frames = vec![F::Frame::default(); FRAMES];
        Self { shuffled: frames.clone(), frames, order: shuffled(FRAMES) }
    }

    #[inline(never)]
    fn allocate(&mut self) {
        F::allocate_many(&mut self.frames);
    }

    fn shuffle(&mut self) {
        for (frame, &number) in self.shuffled.iter_mut().zip(&self.order) {
            *frame = self.frames[number];
        }
    }

    #[inline(never)]
    fn free(&mut self) {
        F::free_many(&self.shuffled);
    }
}

/// What it takes to allocate them.
#[derive(Debug)]
pub struct AllocateMany<F: FramePeer>(Many<F>);

impl<F: FramePeer> AllocateMany<F> {
    pub fn new() -> Self {
        Self(Many::new())
    }
}

impl<F: FramePeer> Batch for AllocateMany<F> {
    const OPERATIONS: usize = FRAMES;

    fn run(&mut self) {
        self.0.allocate();
    }

    fn undo(&mut self) {
        self.0.shuffle();
        self.0.free();
    }
}

/// What it takes to free them.
#[derive(Debug)]
pub struct FreeMany<F: FramePeer>(Many<F>);

impl<F: FramePeer> FreeMany<F> {
    pub fn new() -> Self {
        Self(Many::new())
    }
}

impl<F: FramePeer> Batch for FreeMany<F> {
    const OPERATIONS: usize = FRAMES;

    fn prepare(&mut self) {
        self.0.allocate();
        self.0.shuffle();
    }

    fn run(&mut self) {
        self.0.free();
    }
}
