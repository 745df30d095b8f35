//! W4: what a kernel has, and what it does with it changes.
//!
//! In each phase a tenth of the objects goes at once, as many come, and then objects are replaced one by one. What comes
//! depends on the phase: paths are looked up, files are read and written, programs are started. About a quarter of the
//! objects are pages, the page cache's for the most part.

use std::alloc::Layout;
use std::marker::PhantomData;

use fastrand::Rng;

use super::blocks::{allocate, below, fill, free, rng};
use super::memory::Live;
use crate::peers::Peer;
use crate::run::Batch;

const LIVE: usize = 20_000;
/// Objects that go and come at once.
const BURST: usize = LIVE / 10;
/// Objects that are replaced one by one.
const REPLACED: usize = LIVE / 2 - BURST;

const fn kind(size: usize, align: usize) -> Layout {
    match Layout::from_size_align(size, align) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    }
}

const DENTRY: Layout = kind(192, 8);
const INODE: Layout = kind(600, 8);
const FILE: Layout = kind(256, 8);
const BUFFER: Layout = kind(1024, 8);
const PAGE: Layout = kind(4096, 4096);
const SMALL: [Layout; 5] = [kind(32, 8), kind(48, 8), kind(64, 8), kind(80, 8), kind(96, 8)];

const KINDS: [Layout; 10] = [DENTRY, INODE, FILE, BUFFER, PAGE, SMALL[0], SMALL[1], SMALL[2], SMALL[3], SMALL[4]];

/// How many of 64 objects are of which kind, in each phase.
const PHASES: [[usize; KINDS.len()]; 3] =
    [[20, 10, 6, 6, 6, 2, 4, 4, 4, 2], [6, 4, 8, 16, 20, 2, 2, 2, 2, 2], [8, 4, 8, 6, 20, 4, 4, 4, 4, 2]];

#[derive(Debug, Clone, Copy)]
struct Block {
    start: *mut u8,
    kind: u8,
}

#[derive(Debug)]
pub struct Kernel<A> {
    phases: [[u8; 64]; PHASES.len()],
    blocks: Vec<Block>,
    rng: Rng,
    written: bool,
    allocator: PhantomData<A>,
}

impl<A: Peer> Kernel<A> {
    pub fn new(written: bool) -> Self {
        let phases = PHASES.map(|counts| {
            let mut kinds = (0..).zip(counts).flat_map(|(kind, count)| std::iter::repeat_n(kind, count));
            std::array::from_fn(|_| kinds.next().expect("64 objects"))
        });
        let mut blocks = vec![Block { start: std::ptr::null_mut(), kind: 1 }; LIVE];
        blocks.clear();
        Self { phases, blocks, rng: rng(), written, allocator: PhantomData }
    }

    #[inline]
    fn block(&mut self, phase: usize) -> Block {
        let kind = self.phases[phase][below(&mut self.rng, 64)];
        let layout = KINDS[kind as usize];
        let start = allocate(&A::default(), layout);
        if self.written {
            fill(start, layout);
        }
        Block { start, kind }
    }

    #[inline]
    fn free(block: Block) {
        free(&A::default(), block.start, KINDS[block.kind as usize]);
    }

    fn phase(&mut self, phase: usize) {
        for _ in 0..BURST {
            let number = below(&mut self.rng, self.blocks.len());
            Self::free(self.blocks.swap_remove(number));
        }
        for _ in 0..BURST {
            let block = self.block(phase);
            self.blocks.push(block);
        }
        for _ in 0..REPLACED {
            let number = below(&mut self.rng, LIVE);
            Self::free(self.blocks[number]);
            self.blocks[number] = self.block(phase);
        }
    }
}

impl<A: Peer> Batch for Kernel<A> {
    const OPERATIONS: usize = (BURST + REPLACED) * PHASES.len();

    fn start(&mut self) {
        for number in 0..LIVE {
            let block = self.block(number % PHASES.len());
            self.blocks.push(block);
        }
    }

    fn warm_up(&self) -> usize {
        3
    }

    #[inline(never)]
    fn run(&mut self) {
        (0..PHASES.len()).for_each(|phase| self.phase(phase));
    }

    fn finish(&mut self) {
        self.blocks.drain(..).for_each(Self::free);
    }
}

impl<A: Peer> Live for Kernel<A> {
    fn live_bytes(&self) -> usize {
        self.blocks.iter().map(|block| KINDS[block.kind as usize].size()).sum()
    }
}

const _: () = {
    let mut phase = 0;
    while phase < PHASES.len() {
        let (mut sum, mut kind) = (0, 0);
        while kind < KINDS.len() {
            sum += PHASES[phase][kind];
            kind += 1;
        }
        assert!(sum == 64);
        phase += 1;
    }
};
