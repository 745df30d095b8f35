//! What is allocated: every block with what is written in it.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;

use kslab::Frame;

/// How a block was allocated, and so is to be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Heap,
    /// The cache with this number.
    Cache(usize),
    /// So many page frames.
    Frames(Frame, u32),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) start: NonNull<u8>,
    /// Its own bytes, which can be more than `layout` says.
    pub(crate) size: usize,
    pub(crate) layout: Layout,
    pub(crate) origin: Origin,
    /// Bytes at its start that are not the block's user's to change.
    kept: usize,
    /// What all others hold.
    byte: u8,
}

impl Block {
    pub(crate) fn end(&self) -> usize {
        self.start.addr().get() + self.size
    }

    /// Whether the first `size` bytes are as they were written.
    pub(crate) fn holds(start: NonNull<u8>, size: usize, byte: u8) -> bool {
        // SAFETY: the callers pass allocated blocks of that size, all of it written.
        let bytes = unsafe { std::slice::from_raw_parts(start.as_ptr(), size) };
        // Each as the one before it: as a whole, since byte by byte is slow with every branch counted.
        bytes.first().is_none_or(|first| *first == byte && bytes[1..] == bytes[..size - 1])
    }

    fn check(&self) {
        assert!(self.has_moved_well(self.start, self.size), "{self:?} was overwritten");
    }

    /// Whether the first `size` of its bytes are now at `start`.
    pub(crate) fn has_moved_well(&self, start: NonNull<u8>, size: usize) -> bool {
        let kept = self.kept.min(size);
        // SAFETY: there are so many bytes.
        Self::holds(unsafe { start.add(kept) }, size - kept, self.byte)
    }
}

/// The blocks that are allocated.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    pub(crate) live: Vec<Block>,
    /// Of each, by its start, the end.
    extents: BTreeMap<usize, usize>,
    next: u8,
}

impl Blocks {
    /// A new block: it is aligned and apart from all others, and from now on filled.
    pub(crate) fn insert(&mut self, start: NonNull<u8>, size: usize, layout: Layout, origin: Origin) {
        self.insert_kept(start, size, layout, origin, 0);
    }

    /// The same, but for the first `kept` bytes.
    pub(crate) fn insert_kept(&mut self, start: NonNull<u8>, size: usize, layout: Layout, origin: Origin, kept: usize) {
        assert!(start.addr().get().is_multiple_of(layout.align()), "{start:p} is not aligned to {}", layout.align());
        assert!(size >= layout.size());
        self.next = self.next.wrapping_add(1);
        let block = Block { start, size, layout, origin, kept, byte: self.next };
        let before = self.extents.range(..block.end()).next_back();
        assert!(
            before.is_none_or(|(_, end)| *end <= start.addr().get()),
            "{block:?} overlaps what ends at {before:x?}"
        );
        self.extents.insert(start.addr().get(), block.end());
        // SAFETY: the block is the run's, and has so many bytes.
        unsafe { start.add(kept).write_bytes(self.next, size - kept) };
        self.live.push(block);
    }

    /// Takes one out, which holds what was written.
    pub(crate) fn remove(&mut self, which: u8) -> Option<Block> {
        let index = usize::from(which).checked_rem(self.live.len())?;
        Some(self.remove_at(index))
    }

    fn remove_at(&mut self, index: usize) -> Block {
        let block = self.live.swap_remove(index);
        block.check();
        self.extents.remove(&block.start.addr().get());
        block
    }

    /// Takes the last one out.
    pub(crate) fn remove_last(&mut self) {
        self.remove_at(self.live.len() - 1);
    }

    /// Takes out up to `count` of this origin.
    pub(crate) fn remove_of(&mut self, origin: Origin, count: usize) -> Vec<Block> {
        let mut removed = Vec::new();
        while removed.len() < count
            && let Some(index) = self.live.iter().position(|block| block.origin == origin)
        {
            removed.push(self.remove_at(index));
        }
        removed
    }

    /// Puts back what was taken out, as it is.
    pub(crate) fn put_back(&mut self, block: Block) {
        self.extents.insert(block.start.addr().get(), block.end());
        self.live.push(block);
    }

    /// The block that has the byte at `address`.
    pub(crate) fn around(&self, address: usize) -> Option<&Block> {
        let (start, end) = self.extents.range(..=address).next_back()?;
        let block = (address < *end).then(|| self.live.iter().find(|block| block.start.addr().get() == *start))?;
        Some(block.expect("each extent is a block's"))
    }

    pub(crate) fn starts_at(&self, address: NonNull<u8>) -> bool {
        self.extents.contains_key(&address.addr().get())
    }

    pub(crate) fn count_of(&self, origin: Origin) -> usize {
        self.live.iter().filter(|block| block.origin == origin).count()
    }

    pub(crate) fn check(&self) {
        self.live.iter().for_each(Block::check);
    }
}
