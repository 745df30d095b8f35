//! Going through an arena's spans and segments, by value and without its lock.

#![deny(unsafe_code)]

use core::fmt;

use super::segments::State;
use super::tags::{Kind, Tag, TagId};

/// What a [`Segment`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// A span that was added. Its segments follow.
    Span,
    /// A span that the source lends. Its segments follow.
    Imported,
    /// A free segment of the span.
    Free,
    /// An allocated segment of the span.
    Allocated,
}

/// A span or a segment of an arena, as it was when it was visited. Prints as one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first integer.
    pub start: u64,
    /// How many, at least 1.
    pub size: u64,
    /// What it is.
    pub kind: SegmentKind,
}

impl Segment {
    /// The last integer.
    pub const fn last(&self) -> u64 {
        self.start.wrapping_add(self.size).wrapping_sub(1)
    }

    fn of(tag: &Tag) -> Option<Self> {
        let kind = match tag.kind() {
            Kind::Unused => return None,
            Kind::Span => SegmentKind::Span,
            Kind::Imported => SegmentKind::Imported,
            Kind::Free => SegmentKind::Free,
            Kind::Allocated => SegmentKind::Allocated,
        };
        Some(Self { start: tag.start.get(), size: tag.size.get(), kind })
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (indent, kind) = match self.kind {
            SegmentKind::Span => ("", "span"),
            SegmentKind::Imported => ("", "imported span"),
            SegmentKind::Free => ("  ", "free"),
            SegmentKind::Allocated => ("  ", "allocated"),
        };
        write!(f, "{indent}{:#018x}..={:#018x} {kind}", self.start, self.last())
    }
}

/// How many are copied each time that the lock is held.
const BATCH: usize = 16;

/// Where a walk goes on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    /// What starts before this has been visited, and so has a span that starts at it if `inside`.
    at: u64,
    inside: bool,
    /// The tag to go on with, true as long as no tag has been released since: then it was so many times.
    next: Option<(TagId, u64)>,
    done: bool,
}

/// Copies from one hold of the lock.
pub(super) type Batch = [Option<Segment>; BATCH];

impl Cursor {
    pub(super) const START: Self = Self { at: 0, inside: false, next: None, done: false };

    /// The next ones; none at the end.
    pub(super) fn batch(&mut self, state: &State) -> Batch {
        let mut batch = [None; BATCH];
        let mut tag = if self.done { None } else { self.resume(state) };
        for slot in &mut batch {
            let Some(segment) = tag.and_then(|tag| Segment::of(&state.tags[tag])) else { break };
            *slot = Some(segment);
            self.pass(segment);
            tag = tag.and_then(|tag| state.tags[tag].next.get());
        }
        self.done |= tag.is_none();
        self.next = tag.map(|tag| (tag, state.tags.released()));
        batch
    }

    fn resume(&self, state: &State) -> Option<TagId> {
        match self.next {
            Some((tag, released)) if released == state.tags.released() => Some(tag),
            _ => state.list(state.first).find(|tag| self.is_ahead(&state.tags[*tag])),
        }
    }

    fn is_ahead(&self, tag: &Tag) -> bool {
        let start = tag.start.get();
        start > self.at || (start == self.at && !(self.inside && tag.is_span()))
    }

    fn pass(&mut self, segment: Segment) {
        self.inside = matches!(segment.kind, SegmentKind::Span | SegmentKind::Imported);
        if self.inside {
            self.at = segment.start;
            return;
        }
        match segment.last().checked_add(1) {
            Some(at) => self.at = at,
            None => self.done = true,
        }
    }
}
