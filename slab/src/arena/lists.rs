//! The free segments, in a list for each power of two.
//!
//! List k has the free segments of 2^k to 2^(k+1) - 1 integers; a bitmap says which lists are not empty. Any segment of
//! a list above the request's own is large enough, so a segment that surely fits is found in constant time: *instant
//! fit*.
//!
//! Lock: the arena's.
//!
//! Invariants, whenever the lock is free:
//! 1. A segment is in the list of its size if and only if it is free.
//! 2. Bit k of the bitmap is set if and only if list k is not empty.

#![deny(unsafe_code)]

use super::chain;
use super::tags::{TagId, Tags};

const LISTS: usize = u64::BITS as usize;

#[derive(Debug)]
pub(super) struct FreeLists {
    heads: [Option<TagId>; LISTS],
    filled: u64,
}

impl FreeLists {
    pub(super) const fn new() -> Self {
        Self { heads: [None; LISTS], filled: 0 }
    }

    pub(super) fn insert(&mut self, tags: &Tags, tag: TagId) {
        let list = tags[tag].size.get().max(1).ilog2() as usize;
        self.heads[list] = chain::push(tags, self.heads[list], tag);
        self.filled |= 1 << list;
    }

    pub(super) fn remove(&mut self, tags: &Tags, tag: TagId) {
        let list = tags[tag].size.get().max(1).ilog2() as usize;
        self.heads[list] = chain::remove(tags, self.heads[list], tag);
        if self.heads[list].is_none() {
            self.filled &= !(1 << list);
        }
    }

    /// A segment of at least `size` integers, from the first list of which every segment is large enough.
    pub(super) fn surely_fits(&self, size: u64) -> Option<TagId> {
        let least = size.max(1).checked_next_power_of_two()?.ilog2();
        self.filled_from(least).next().and_then(|list| self.heads[list])
    }

    /// The lists that may have a segment of at least `size` integers: from its own on, but for empty ones.
    pub(super) fn lists_for(&self, size: u64) -> impl Iterator<Item = usize> + use<> {
        self.filled_from(size.max(1).ilog2())
    }

    /// The list of the largest segments.
    pub(super) fn largest(&self) -> Option<usize> {
        self.filled.checked_ilog2().map(|list| list as usize)
    }

    /// The segments of a list.
    pub(super) fn segments<'a>(&self, tags: &'a Tags, list: usize) -> impl Iterator<Item = TagId> + use<'a> {
        chain::iterate(tags, self.heads.get(list).copied().flatten())
    }

    /// Every list with its bit, for the self-check.
    pub(super) fn bits(&self) -> impl Iterator<Item = (usize, bool)> {
        (0..LISTS).map(|list| (list, self.filled & (1 << list) != 0))
    }

    fn filled_from(&self, least: u32) -> impl Iterator<Item = usize> + use<> {
        let mut lists = self.filled & (u64::MAX << least);
        core::iter::from_fn(move || {
            let list = (lists != 0).then(|| lists.trailing_zeros() as usize)?;
            lists &= lists - 1;
            Some(list)
        })
    }
}
