//! The choice of a free segment: instant, best and next fit.
//!
//! Lock: the arena's. Only reads.

#![deny(unsafe_code)]

use super::fit::{Fit, Request};
use super::segments::State;
use super::tags::{Kind, TagId};

/// As many segments a short search looks at that may be too small.
pub(super) const SHORT_LOOK: usize = 8;

/// How far instant fit goes when there is no segment that surely fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effort {
    /// Constant time: so before a span is imported, if there is no more to the request than size and alignment.
    Short,
    /// Until something fits or nothing is left.
    Full,
}

/// One search, and how many segments it has looked at.
#[derive(Debug)]
pub(super) struct Search<'a> {
    state: &'a State,
    request: &'a Request,
    effort: Effort,
    looked: u64,
}

/// A free segment and where in it the request fits.
type Found = (TagId, u64);

impl<'a> Search<'a> {
    pub(super) fn new(state: &'a State, request: &'a Request, effort: Effort) -> Self {
        Self { state, request, effort, looked: 0 }
    }

    pub(super) fn looked(&self) -> u64 {
        self.looked
    }

    pub(super) fn run(&mut self) -> Option<Found> {
        match self.request.fit {
            Fit::Instant => self.sure().or_else(|| self.first()),
            Fit::Best => self.best(),
            Fit::Next => self.next(),
        }
    }

    /// A segment that is large enough wherever the aligned place in it is.
    fn sure(&mut self) -> Option<Found> {
        if self.request.is_bounded() {
            return None;
        }
        let segment = self.state.free.surely_fits(self.request.padded)?;
        self.place(segment, 0)
    }

    /// The first that fits in the free lists, smaller segments first.
    fn first(&mut self) -> Option<Found> {
        let short = self.effort == Effort::Short && !self.request.is_bounded();
        let most = if short { SHORT_LOOK } else { usize::MAX };
        let state = self.state;
        let lists = state.free.lists_for(self.request.size);
        let segments = lists.flat_map(|list| state.free.segments(&state.tags, list));
        segments.take(most).find_map(|segment| self.place(segment, 0))
    }

    /// The smallest that fits: it is in the first list in which any does.
    fn best(&mut self) -> Option<Found> {
        let state = self.state;
        state.free.lists_for(self.request.size).find_map(|list| {
            let fitting = state.free.segments(&state.tags, list).filter_map(|segment| self.place(segment, 0));
            fitting.min_by_key(|(segment, _)| state.tags[*segment].size.get())
        })
    }

    /// The first that fits behind the place where the last one ended, then from the lowest address on.
    fn next(&mut self) -> Option<Found> {
        let state = self.state;
        self.in_order(state.rotor.or(state.first), state.floor).or_else(|| self.in_order(state.first, 0))
    }

    fn in_order(&mut self, from: Option<TagId>, floor: u64) -> Option<Found> {
        self.state.list(from).find_map(|tag| self.place(tag, floor))
    }

    fn place(&mut self, tag: TagId, floor: u64) -> Option<Found> {
        self.looked += 1;
        let segment = &self.state.tags[tag];
        if segment.kind() != Kind::Free {
            return None;
        }
        self.request.place(segment.start.get(), segment.last(), floor).map(|start| (tag, start))
    }
}
