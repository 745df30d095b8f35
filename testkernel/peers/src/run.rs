//! A run: an allocator in use, which is misused and then used on, until something is seen.
//!
//! Nothing is written through a pointer before it is known to be in the allocator's memory and in no block that is live.

use std::{
    alloc::{Layout, alloc},
    process,
};

use crate::subjects::Subject;

/// Bytes that an allocator has, and their alignment.
const BYTES: usize = 256 << 10;

/// Memory for one allocator.
pub(crate) struct Memory {
    pub(crate) start: *mut u8,
    pub(crate) bytes: usize,
}

/// A block that is allocated.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) start: *mut u8,
    pub(crate) layout: Layout,
    /// What each of its bytes is.
    fill: u8,
}

impl Block {
    pub(crate) fn end(&self) -> *mut u8 {
        self.start.wrapping_add(self.layout.size())
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    fn is_intact(&self) -> bool {
        // SAFETY: it is live, so the bytes are there and nobody writes to them now.
        (0..self.layout.size()).all(|offset| unsafe { self.start.add(offset).read_volatile() } == self.fill)
    }
}

pub(crate) struct Run<S> {
    pub(crate) subject: S,
    memory: Memory,
    /// For the allocator's relative.
    pub(crate) other_memory: Memory,
    live: Vec<Block>,
    allocated: u8,
}

impl<S: Subject> Run<S> {
    /// A fresh allocator.
    pub(crate) fn new() -> Self {
        let layout = Layout::from_size_align(4 * BYTES, BYTES).expect("a layout");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc(layout) };
        assert!(!start.is_null(), "no memory");
        let memory = |first: usize| Memory { start: start.wrapping_add(first * BYTES), bytes: BYTES };
        let (memory, other_memory) = (memory(0), memory(2));
        Self { subject: S::new(&memory), memory, other_memory, live: Vec::new(), allocated: 0 }
    }

    /// Of a block without slack.
    pub(crate) fn layout(&self) -> Layout {
        layout(S::SIZE, 8)
    }

    /// Blocks without slack beside each other, in the order of their addresses.
    #[track_caller]
    pub(crate) fn blocks(&mut self) -> Vec<Block> {
        let mut blocks = Vec::new();
        while blocks.len() < 8 {
            blocks.push(self.allocate(self.layout()));
        }
        blocks.sort_by_key(|block| block.start);
        blocks
    }

    /// A block that is as it should be, or the end.
    #[track_caller]
    pub(crate) fn allocate(&mut self, layout: Layout) -> Block {
        match self.try_allocate(layout) {
            Some(block) => block,
            None => end("silent: no memory left"),
        }
    }

    /// The same; `None` where there is no memory.
    #[track_caller]
    fn try_allocate(&mut self, layout: Layout) -> Option<Block> {
        let start = self.subject.allocate(layout);
        if start.is_null() {
            return None;
        }
        self.allocated = self.allocated.wrapping_add(1);
        let block = Block { start, layout, fill: self.allocated };
        if start < self.memory.start || block.end() > self.memory.start.wrapping_add(self.memory.bytes) {
            end("silent: foreign pointer handed out");
        }
        if self.live.iter().any(|live| live.start == start) {
            end("silent: handed out twice");
        }
        if self.live.iter().any(|live| live.overlaps(&block)) {
            end("silent: overlap");
        }
        if !start.addr().is_multiple_of(layout.align()) {
            end("silent: misaligned");
        }
        // SAFETY: in the allocator's memory, and in no other block.
        unsafe { start.write_bytes(block.fill, layout.size()) };
        self.live.push(block);
        Some(block)
    }

    /// Frees a block, which must be as it was left.
    #[track_caller]
    pub(crate) fn free(&mut self, block: Block) {
        self.free_as(block, block.layout);
    }

    /// The same with any layout.
    #[track_caller]
    pub(crate) fn free_as(&mut self, block: Block, layout: Layout) {
        self.look_at(&block);
        self.live.retain(|live| live.start != block.start);
        self.bad_free(block.start, layout);
    }

    /// Frees whatever it is.
    #[track_caller]
    pub(crate) fn bad_free(&mut self, pointer: *mut u8, layout: Layout) {
        // SAFETY: perhaps not, and what happens then is what this program is for.
        unsafe { self.subject.free(pointer, layout) }
    }

    fn look_at(&self, block: &Block) {
        if !block.is_intact() {
            end("silent: a neighbour overwritten");
        }
    }

    /// Uses the allocator on, the same way each time, and ends.
    pub(crate) fn go_on(mut self) -> ! {
        let sizes = [S::SIZE, S::SIZE, S::SIZE, 24, S::SIZE, 200, 2 * S::SIZE, 1000];
        for turn in 0..4 {
            for number in 0..64 {
                self.allocate(layout(sizes[number % sizes.len()], 8));
            }
            self.live.iter().for_each(|block| self.look_at(block));
            let freed: Vec<_> = self.live.iter().skip(turn % 2).step_by(2).copied().collect();
            freed.into_iter().for_each(|block| self.free(block));
        }
        self.subject.check();
        while self.try_allocate(self.layout()).is_some() {}
        while let Some(block) = self.live.last().copied() {
            self.free(block);
        }
        end("not noticed")
    }
}

pub(crate) fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).expect("a layout")
}

/// Says what was seen.
fn end(observed: &str) -> ! {
    println!("{observed}");
    process::exit(0);
}
