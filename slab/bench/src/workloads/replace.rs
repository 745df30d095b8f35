//! W3 and W8: blocks of many sizes, of which one at a time, any, is replaced.

use std::alloc::Layout;
use std::marker::PhantomData;

use fastrand::Rng;

use super::blocks::{allocate, below, fill, free, rng};
use super::memory::Live;
use crate::peers::Peer;
use crate::run::Batch;

const SIZES: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Block {
    start: *mut u8,
    size: u16,
}

#[derive(Debug)]
pub struct Replace<A> {
    sizes: Box<[u16; SIZES]>,
    blocks: Vec<Block>,
    rng: Rng,
    /// All of a block is written to.
    written: bool,
    allocator: PhantomData<A>,
}

/// Sizes from 16 to 2048 of which as many are in each doubling, in a random order.
fn log_uniform(rng: &mut Rng) -> Box<[u16; SIZES]> {
    let size = |number: usize| 16.0 * 128_f64.powf((number as f64 + 0.5) / SIZES as f64);
    let mut sizes = Box::new(std::array::from_fn(|number| size(number).round() as u16));
    rng.shuffle(&mut sizes[..]);
    sizes
}

fn layout(size: u16) -> Layout {
    Layout::from_size_align(size as usize, 8).expect("a layout")
}

impl<A: Peer> Replace<A> {
    /// With `live` blocks at any time, of which none is there yet.
    pub fn new(live: usize, written: bool) -> Self {
        let mut rng = rng();
        let mut blocks = Vec::with_capacity(live);
        // The harness' own memory is there before anybody looks.
        blocks.resize(live, Block { start: std::ptr::null_mut(), size: 1 });
        blocks.clear();
        Self { sizes: log_uniform(&mut rng), blocks, rng, written, allocator: PhantomData }
    }

    #[inline]
    fn block(&mut self) -> Block {
        let size = self.sizes[below(&mut self.rng, SIZES)];
        let start = allocate(&A::default(), layout(size));
        if self.written {
            fill(start, layout(size));
        }
        Block { start, size }
    }
}

impl<A: Peer> Batch for Replace<A> {
    const OPERATIONS: usize = 1000;

    fn start(&mut self) {
        while self.blocks.len() < self.blocks.capacity() {
            let block = self.block();
            self.blocks.push(block);
        }
    }

    fn warm_up(&self) -> usize {
        2 * self.blocks.len() / Self::OPERATIONS
    }

    #[inline(never)]
    fn run(&mut self) {
        for _ in 0..Self::OPERATIONS {
            let number = below(&mut self.rng, self.blocks.len());
            let Block { start, size } = self.blocks[number];
            free(&A::default(), start, layout(size));
            self.blocks[number] = self.block();
        }
    }

    fn finish(&mut self) {
        for Block { start, size } in self.blocks.drain(..) {
            free(&A::default(), start, layout(size));
        }
    }
}

impl<A: Peer> Live for Replace<A> {
    fn live_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.size as usize).sum()
    }
}
