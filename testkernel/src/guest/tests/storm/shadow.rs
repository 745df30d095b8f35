//! Who owns what, kept apart from the allocator.
//!
//! A [`Map`] has a bit for each 8 bytes of memory: whoever gets a block sets its bits, and none may be set already.
//! An [`Entry`] describes one block, which is filled with a pattern of its owner's; the pattern is checked whole.

use alloc::vec::Vec;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};

use kernel::memory;

use super::super::support::frames;
use super::block::{Block, What};

/// Bytes for each bit of a map.
const GRANULE: usize = 8;
const GRANULES: usize = u64::BITS as usize;

/// As much memory as a map covers, from physical address 0; above it only patterns tell.
const MOST_COVERED: usize = 256 << 20;

/// Which memory is somebody's.
pub(super) struct Map(Vec<AtomicU64>);

impl Map {
    /// Nothing is anybody's.
    pub(super) fn new() -> Self {
        let end = frames().stats().zones.iter().map(|zone| zone.end.address() as usize).max().unwrap_or(0);
        let words = end.min(MOST_COVERED) / GRANULE / GRANULES;
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Makes the block somebody's; `false` where a part of it is already.
    pub(super) fn claim(&self, start: NonNull<u8>, size: usize) -> bool {
        // Relaxed: that the last owner's release comes first is the allocator's business, and so what is tested.
        self.words(start, size).all(|(word, mask)| word.fetch_or(mask, Relaxed) & mask == 0)
    }

    /// Makes it nobody's; `false` where a part of it is already.
    pub(super) fn release(&self, start: NonNull<u8>, size: usize) -> bool {
        self.words(start, size).all(|(word, mask)| word.fetch_and(!mask, Relaxed) & mask == mask)
    }

    /// Whether all is nobody's.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| word.load(Relaxed) == 0)
    }

    /// The words that cover a block, each with the bits that do.
    fn words(&self, start: NonNull<u8>, size: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = (start.addr().get() - memory::physical(0).addr()) / GRANULE;
        let end = first + size.div_ceil(GRANULE);
        (first / GRANULES..end.div_ceil(GRANULES)).filter_map(move |index| {
            let from = first.saturating_sub(index * GRANULES);
            let bits = (end - index * GRANULES).min(GRANULES) - from;
            Some((self.0.get(index)?, u64::MAX >> (GRANULES - bits) << from))
        })
    }
}

/// What is kept of a block.
#[derive(Debug)]
pub(super) struct Entry {
    /// Who may use the entry.
    owner: AtomicUsize,
    /// Null where there is no block.
    start: AtomicPtr<u8>,
    what: AtomicU64,
    tag: AtomicU64,
}

impl Entry {
    pub(super) const fn new(owner: usize) -> Self {
        Self {
            owner: AtomicUsize::new(owner),
            start: AtomicPtr::new(ptr::null_mut()),
            what: AtomicU64::new(0),
            tag: AtomicU64::new(0),
        }
    }

    /// Whether it was `from`'s, and is `to`'s now.
    pub(super) fn passes(&self, from: usize, to: usize) -> bool {
        self.owner.swap(to, Relaxed) == from
    }

    pub(super) fn is_of(&self, owner: usize) -> bool {
        self.owner.load(Relaxed) == owner
    }

    pub(super) fn put(&self, block: Block) {
        self.what.store(block.what.to_word(), Relaxed);
        self.tag.store(block.tag, Relaxed);
        self.start.store(block.start.as_ptr(), Relaxed);
    }

    pub(super) fn get(&self) -> Option<Block> {
        let start = NonNull::new(self.start.load(Relaxed))?;
        Some(Block { start, what: What::from_word(self.what.load(Relaxed)), tag: self.tag.load(Relaxed) })
    }

    pub(super) fn take(&self) -> Option<Block> {
        let block = self.get()?;
        self.start.store(ptr::null_mut(), Relaxed);
        Some(block)
    }
}
