//! W2: many allocated, then all freed, in this order or that.

use std::hint::black_box;
use std::ptr;

use super::blocks::{allocate, free};
use super::pair::LAYOUT;
use crate::peers::Peer;
use crate::run::Batch;

const BLOCKS: usize = 1000;

#[derive(Debug)]
pub struct Orders<A> {
    allocator: A,
    blocks: Box<[*mut u8; BLOCKS]>,
    order: Box<[usize]>,
}

impl<A: Peer> Orders<A> {
    /// `order` says in which order so many blocks are freed.
    pub fn new(allocator: A, order: impl FnOnce(usize) -> Vec<usize>) -> Self {
        let order = order(BLOCKS).into_boxed_slice();
        Self { allocator, blocks: Box::new([ptr::null_mut(); BLOCKS]), order }
    }
}

impl<A: Peer> Batch for Orders<A> {
    const OPERATIONS: usize = BLOCKS;

    #[inline(never)]
    fn run(&mut self) {
        for block in self.blocks.iter_mut() {
            *block = black_box(allocate(&self.allocator, LAYOUT));
        }
        for &number in &self.order {
            free(&self.allocator, self.blocks[number], LAYOUT);
        }
    }
}
