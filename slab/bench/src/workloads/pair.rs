//! W1: the hot pair.

use std::alloc::Layout;
use std::hint::black_box;

use super::blocks::{allocate, free};
use crate::peers::Peer;
use crate::run::Batch;

pub const LAYOUT: Layout = Layout::new::<[u64; 8]>();

#[derive(Debug)]
pub struct Pair<A>(pub A);

impl<A: Peer> Pair<A> {
    /// So many pairs.
    #[inline]
    pub fn pairs(&self, count: usize) {
        for _ in 0..count {
            free(&self.0, black_box(allocate(&self.0, LAYOUT)), LAYOUT);
        }
    }
}

impl<A: Peer> Batch for Pair<A> {
    const OPERATIONS: usize = 10_000;

    #[inline(never)]
    fn run(&mut self) {
        self.pairs(Self::OPERATIONS);
    }
}
