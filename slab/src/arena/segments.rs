//! Spans and their segments: what an arena has, and what of it is free.
//!
//! One list goes through all tags in the order of addresses: each span's tag, then those of its segments. Span tags
//! stand like walls between the segments of two spans, so that segments of different spans never merge. Spans are a
//! chain of their own besides.
//!
//! Nothing here calls anything outside the arena. Lock: the arena's, around all of it.
//!
//! Invariants, whenever the lock is free:
//! 1. Spans are disjoint and ascending; the segments of a span are ascending and cover it without a gap.
//! 2. No two free segments of a span are neighbours.
//! 3. A free segment is in the free list of its size, an allocated one in the index.
//! 4. No imported span is wholly free: it has gone back.
//! 5. The rotor is a tag in the list, or none, and starts at or before the place where next fit goes on.

#![deny(unsafe_code)]

use super::ArenaError;
use super::chain;
use super::fit::{Fit, Request};
use super::index::Index;
use super::lists::FreeLists;
use super::search::{Effort, Search};
use super::tags::{Kind, TagId, Tags};

/// Tags that an allocation needs at most: for what is left before and behind it.
pub(super) const TAGS_TO_ALLOCATE: u32 = 2;

/// Tags that a span needs: its own, and that of its segment.
pub(super) const TAGS_TO_ADD: u32 = 2;

/// What has happened so far, and what there is now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) total: u64,
    pub(super) in_use: u64,
    pub(super) spans: usize,
    pub(super) allocated: usize,
    pub(super) allocations: u64,
    pub(super) frees: u64,
    pub(super) failures: u64,
    pub(super) refused: u64,
    pub(super) imports: u64,
    pub(super) returns: u64,
    pub(super) searched: u64,
}

impl Counts {
    const NONE: Self = Self {
        total: 0,
        in_use: 0,
        spans: 0,
        allocated: 0,
        allocations: 0,
        frees: 0,
        failures: 0,
        refused: 0,
        imports: 0,
        returns: 0,
        searched: 0,
    };
}

/// All that an arena's lock is around.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tags: Tags,
    pub(super) index: Index,
    pub(super) free: FreeLists,
    pub(super) counts: Counts,
    /// The span with the lowest addresses: the first tag of the list.
    pub(super) first: Option<TagId>,
    /// The span with the highest addresses.
    pub(super) last_span: Option<TagId>,
    /// The last tag of the list.
    pub(super) tail: Option<TagId>,
    /// Where next fit starts to look, and the least integer that it takes there.
    pub(super) rotor: Option<TagId>,
    pub(super) floor: u64,
}

impl State {
    pub(super) const fn new() -> Self {
        Self {
            tags: Tags::new(),
            index: Index::new(),
            free: FreeLists::new(),
            counts: Counts::NONE,
            first: None,
            last_span: None,
            tail: None,
            rotor: None,
            floor: 0,
        }
    }

    /// The tags from `tag` on, in the order of addresses.
    pub(super) fn list(&self, tag: Option<TagId>) -> impl Iterator<Item = TagId> {
        core::iter::successors(tag, |tag| self.tags[*tag].next.get())
    }

    /// The tags of the spans.
    pub(super) fn spans(&self) -> impl Iterator<Item = TagId> {
        chain::iterate(&self.tags, self.first)
    }

    /// Adds a span, all of it free, and says which its segment is. `start` and `size` are whole quanta.
    pub(super) fn add(&mut self, start: u64, size: u64, kind: Kind) -> Result<TagId, ArenaError> {
        let last = size.checked_sub(1).and_then(|more| start.checked_add(more)).ok_or(ArenaError::BadSpan)?;
        let total = self.counts.total.checked_add(size).ok_or(ArenaError::BadSpan)?;
        let before = self.span_before(start);
        let after = before.map_or(self.first, |span| self.tags[span].after.get());
        if let Some(span) = before.filter(|span| self.tags[*span].last() >= start) {
            return Err(ArenaError::Overlap { start: self.tags[span].start.get() });
        }
        if let Some(span) = after.filter(|span| self.tags[*span].start.get() <= last) {
            return Err(ArenaError::Overlap { start: self.tags[span].start.get() });
        }
        self.want_tags(TAGS_TO_ADD)?;
        let span = self.new_tag(start, size, kind)?;
        let segment = self.new_tag(start, size, Kind::Free)?;
        self.link_span(before, span, after);
        self.join(Some(span), Some(segment));
        self.join(Some(segment), after);
        self.free.insert(&self.tags, segment);
        self.counts.total = total;
        self.counts.spans += 1;
        Ok(segment)
    }

    /// The last span that starts at or before `start`, looked for from the end: what is added tends to be added there.
    fn span_before(&self, start: u64) -> Option<TagId> {
        let mut span = self.last_span;
        while let Some(tag) = span.filter(|tag| self.tags[*tag].start.get() > start) {
            span = self.tags[tag].before.get();
        }
        span
    }

    /// Puts a span between two neighbours into the chain of the spans, and behind the segments of the first into the
    /// list.
    fn link_span(&mut self, before: Option<TagId>, span: TagId, after: Option<TagId>) {
        let left = after.map_or(self.tail, |after| self.tags[after].previous.get());
        self.join(left, Some(span));
        match before {
            Some(before) => chain::insert_behind(&self.tags, before, span),
            None => self.first = chain::push(&self.tags, after, span),
        }
        if after.is_none() {
            self.last_span = Some(span);
        }
    }

    /// Takes out a span whose only segment is `segment`, which is free and in no free list.
    fn remove_span(&mut self, span: TagId, segment: TagId) {
        self.counts.total -= self.tags[span].size.get();
        self.counts.spans -= 1;
        if self.last_span == Some(span) {
            self.last_span = self.tags[span].before.get();
        }
        self.first = chain::remove(&self.tags, self.first, span);
        self.unlink(segment);
        self.unlink(span);
    }

    /// Allocates what is asked for.
    pub(super) fn allocate(&mut self, request: &Request, effort: Effort) -> Result<u64, ArenaError> {
        let mut search = Search::new(self, request, effort);
        let found = search.run();
        self.counts.searched = self.counts.searched.wrapping_add(search.looked());
        let (segment, start) = found.ok_or(ArenaError::NoSpace)?;
        self.allocate_at(segment, start, request)
    }

    /// Allocates what is asked for from the free segment `segment`, at `start`, where it fits.
    pub(super) fn allocate_at(&mut self, segment: TagId, start: u64, request: &Request) -> Result<u64, ArenaError> {
        let allocated = self.carve(segment, start, request.size)?;
        if request.fit == Fit::Next {
            self.rotor = Some(allocated);
            self.floor = start.wrapping_add(request.size);
        }
        self.counts.in_use += request.size;
        self.counts.allocated += 1;
        self.counts.allocations = self.counts.allocations.wrapping_add(1);
        Ok(start)
    }

    /// Adds a span that the source lends, and allocates what is asked for from it.
    pub(super) fn import(&mut self, start: u64, size: u64, request: &Request) -> Result<u64, ArenaError> {
        let place =
            start.checked_add(size - 1).and_then(|last| request.place(start, last, 0)).ok_or(ArenaError::BadSpan)?;
        // Both or neither: without the allocation the span would stay wholly free.
        self.want_tags(TAGS_TO_ADD + TAGS_TO_ALLOCATE)?;
        let segment = self.add(start, size, Kind::Imported)?;
        self.counts.imports = self.counts.imports.wrapping_add(1);
        self.allocate_at(segment, place, request)
    }

    /// Whether `x` is in a span.
    pub(super) fn contains(&self, x: u64) -> bool {
        self.spans().any(|span| (self.tags[span].start.get()..=self.tags[span].last()).contains(&x))
    }

    /// Makes `size` integers from `start` on a segment of their own, which lies in the free segment `segment`, and
    /// allocated. What is left before and behind stays free.
    fn carve(&mut self, segment: TagId, start: u64, size: u64) -> Result<TagId, ArenaError> {
        let before = start - self.tags[segment].start.get();
        let behind = self.tags[segment].size.get() - before - size;
        self.want_tags(u32::from(before > 0) + u32::from(behind > 0))?;
        self.free.remove(&self.tags, segment);
        let mut taken = segment;
        if before > 0 {
            taken = self.split(segment, before)?;
            self.free.insert(&self.tags, segment);
        }
        if behind > 0 {
            let rest = self.split(taken, size)?;
            self.free.insert(&self.tags, rest);
        }
        self.tags[taken].set_kind(Kind::Allocated);
        self.index.insert(&self.tags, taken);
        Ok(taken)
    }

    /// Cuts a free segment, which is in no free list, behind its first `size` integers. The rest is a new one.
    fn split(&mut self, segment: TagId, size: u64) -> Result<TagId, ArenaError> {
        let (start, whole) = (self.tags[segment].start.get(), self.tags[segment].size.get());
        let rest = self.new_tag(start + size, whole - size, Kind::Free)?;
        let next = self.tags[segment].next.get();
        self.tags[segment].size.set(size);
        self.join(Some(segment), Some(rest));
        self.join(Some(rest), next);
        Ok(rest)
    }

    /// Frees an allocated segment. Returns the imported span, start and size, that is wholly free by that, and has been
    /// taken out: it must go back to the source.
    pub(super) fn release(&mut self, start: u64, size: u64) -> Result<Option<(u64, u64)>, ArenaError> {
        let segment = self.allocated_segment(start, size).inspect_err(|_| {
            self.counts.refused = self.counts.refused.wrapping_add(1);
        })?;
        self.index.remove(&self.tags, segment);
        self.tags[segment].set_kind(Kind::Free);
        self.counts.in_use -= size;
        self.counts.allocated -= 1;
        self.counts.frees = self.counts.frees.wrapping_add(1);
        let segment = self.merge(segment);
        Ok(self.settle(segment))
    }

    /// The allocated segment that starts at `start` and has `size` integers.
    fn allocated_segment(&self, start: u64, size: u64) -> Result<TagId, ArenaError> {
        let segment = self.index.find(&self.tags, start).ok_or(ArenaError::NotAllocated { start })?;
        match self.tags[segment].size.get() {
            allocated if allocated == size => Ok(segment),
            allocated => Err(ArenaError::WrongSize { start, freed: size, allocated }),
        }
    }

    /// Merges a free segment with its free neighbours. Neither it nor the result is in a free list.
    fn merge(&mut self, segment: TagId) -> TagId {
        if let Some(next) = self.free_tag(self.tags[segment].next.get()) {
            self.free.remove(&self.tags, next);
            self.absorb(segment, next);
        }
        let Some(previous) = self.free_tag(self.tags[segment].previous.get()) else { return segment };
        self.free.remove(&self.tags, previous);
        self.absorb(previous, segment);
        previous
    }

    fn free_tag(&self, tag: Option<TagId>) -> Option<TagId> {
        tag.filter(|tag| self.tags[*tag].kind() == Kind::Free)
    }

    /// Makes the segment `right` part of its neighbour `left`.
    fn absorb(&mut self, left: TagId, right: TagId) {
        let size = self.tags[left].size.get() + self.tags[right].size.get();
        self.tags[left].size.set(size);
        self.unlink(right);
    }

    /// Puts a merged segment into its free list, or takes its span out if that is imported and wholly free.
    fn settle(&mut self, segment: TagId) -> Option<(u64, u64)> {
        let (start, size) = (self.tags[segment].start.get(), self.tags[segment].size.get());
        let span = self.tags[segment].previous.get().filter(|tag| {
            let tag = &self.tags[*tag];
            tag.kind() == Kind::Imported && tag.size.get() == size
        });
        let Some(span) = span else {
            self.free.insert(&self.tags, segment);
            return None;
        };
        self.remove_span(span, segment);
        self.counts.returns = self.counts.returns.wrapping_add(1);
        Some((start, size))
    }

    fn want_tags(&self, count: u32) -> Result<(), ArenaError> {
        if self.tags.spare() < count { Err(ArenaError::NoMemory) } else { Ok(()) }
    }

    fn new_tag(&mut self, start: u64, size: u64, kind: Kind) -> Result<TagId, ArenaError> {
        let tag = self.tags.take().ok_or(ArenaError::NoMemory)?;
        self.tags[tag].start.set(start);
        self.tags[tag].size.set(size);
        self.tags[tag].set_kind(kind);
        Ok(tag)
    }

    /// Makes two tags neighbours in the list, or one of them its end.
    fn join(&mut self, left: Option<TagId>, right: Option<TagId>) {
        match left {
            Some(left) => self.tags[left].next.set(right),
            None => self.first = right,
        }
        match right {
            Some(right) => self.tags[right].previous.set(left),
            None => self.tail = left,
        }
    }

    /// Takes a tag out of the list for good. Next fit goes on where it would have.
    fn unlink(&mut self, tag: TagId) {
        let (next, previous) = (self.tags[tag].next.get(), self.tags[tag].previous.get());
        self.join(previous, next);
        if self.rotor == Some(tag) {
            self.rotor = previous;
        }
        self.tags.put(tag);
    }
}
