//! The index: allocated segments by where they start.
//!
//! A hash table that grows one bucket at a time (W. Litwin, *Linear Hashing*, VLDB 1980). It needs no memory of its
//! own: the heads of its buckets are fields of the arena's tags, one each, so there can always be as many buckets as
//! segments. A segment that enters splits at most [`SPLITS`] buckets: no operation has a whole table to move.
//!
//! Lock: the arena's.
//!
//! Invariants, whenever the lock is free:
//! 1. A segment is in the chain of bucket [`Index::bucket`] if and only if it is allocated.
//! 2. There are no more buckets than tags.

#![deny(unsafe_code)]

use super::chain;
use super::tags::{Link, TagId, Tags};

/// Buckets that may be split for each segment that enters: so they are never fewer than half the segments.
const SPLITS: u32 = 2;

#[derive(Debug)]
pub(super) struct Index {
    buckets: u32,
}

impl Index {
    pub(super) const fn new() -> Self {
        Self { buckets: 0 }
    }

    pub(super) fn buckets(&self) -> u32 {
        self.buckets
    }

    /// The tag of the allocated segment that starts at `start`.
    pub(super) fn find(&self, tags: &Tags, start: u64) -> Option<TagId> {
        self.segments(tags, self.bucket(start)).find(|tag| tags[*tag].start.get() == start)
    }

    /// The segments in a bucket.
    pub(super) fn segments(&self, tags: &Tags, bucket: u32) -> impl Iterator<Item = TagId> {
        chain::iterate(tags, self.head(tags, bucket).and_then(Link::get))
    }

    pub(super) fn insert(&mut self, tags: &Tags, tag: TagId) {
        for _ in 0..SPLITS {
            self.split(tags);
        }
        if let Some(head) = self.head(tags, self.bucket(tags[tag].start.get())) {
            head.set(chain::push(tags, head.get(), tag));
        }
    }

    pub(super) fn remove(&self, tags: &Tags, tag: TagId) {
        if let Some(head) = self.head(tags, self.bucket(tags[tag].start.get())) {
            head.set(chain::remove(tags, head.get(), tag));
        }
    }

    /// Adds a bucket, where there is a tag for its head, and moves to it what belongs there, all from one other bucket.
    fn split(&mut self, tags: &Tags) {
        let new = self.buckets;
        if new >= tags.count() {
            return;
        }
        self.buckets += 1;
        let Some(target) = self.head(tags, new) else { return };
        target.set(None);
        let Some(source) = new.checked_ilog2().and_then(|log| self.head(tags, new ^ (1 << log))) else { return };
        let mut segment = source.get();
        while let Some(tag) = segment {
            segment = tags[tag].after.get();
            if self.bucket(tags[tag].start.get()) == new {
                source.set(chain::remove(tags, source.get(), tag));
                target.set(chain::push(tags, target.get(), tag));
            }
        }
    }

    /// The bucket for `start`: its hash modulo a power of two, the larger one for the buckets that have been split.
    pub(super) fn bucket(&self, start: u64) -> u32 {
        let mask = self.buckets.next_power_of_two() - 1;
        let bucket = hash(start) & mask;
        if bucket < self.buckets { bucket } else { bucket & (mask >> 1) }
    }

    fn head<'a>(&self, tags: &'a Tags, bucket: u32) -> Option<&'a Link> {
        (bucket < self.buckets).then(|| TagId::at(bucket)).flatten().map(|tag| &tags[tag].bucket)
    }
}

/// Multiplicative hashing (Knuth, *The Art of Computer Programming*, vol. 3, 6.4): the high bits depend on all of
/// `start`.
fn hash(start: u64) -> u32 {
    (start.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}
