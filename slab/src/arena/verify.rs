//! The self-check: every invariant of an arena, and which one is broken.
//!
//! Lock: the arena's, for as long as it takes to go over everything. A damaged list cannot keep it for ever: nothing is
//! followed further than there are tags.

#![deny(unsafe_code)]

use core::fmt;

use super::segments::State;
use super::tags::{Kind, TagId};

/// The invariant of an [`Arena`](super::Arena) that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArenaBroken {
    /// The tags at `start` and behind it are not each other's neighbours, or the list does not end.
    List {
        /// Where the segment or span starts.
        start: u64,
    },
    /// The span at `start` overlaps the one before, or is not in its place among the spans.
    Spans {
        /// Where the span starts.
        start: u64,
    },
    /// The segments of the span at `start` do not cover it without a gap.
    Cover {
        /// Where the span starts.
        start: u64,
    },
    /// The segment or span at `start` is not of whole quanta.
    Quantum {
        /// Where it starts.
        start: u64,
    },
    /// The free segment at `start` should have merged with the one before it.
    Unmerged {
        /// Where the segment starts.
        start: u64,
    },
    /// The imported span at `start` is wholly free, and has not gone back.
    NotReturned {
        /// Where the span starts.
        start: u64,
    },
    /// The list of free segments of 2^`list` integers and more has wrong links, a segment that does not belong there,
    /// or a wrong bit in the bitmap.
    FreeList {
        /// Which list.
        list: usize,
    },
    /// The free lists have not as many segments as are free.
    FreeSegments {
        /// Segments in the lists.
        listed: usize,
        /// Free segments.
        free: usize,
    },
    /// The bucket has wrong links, or a segment that does not belong there.
    Bucket {
        /// Which bucket.
        bucket: u32,
    },
    /// The index has not as many segments as are allocated.
    Index {
        /// Segments in the index.
        indexed: usize,
        /// Allocated segments.
        allocated: usize,
    },
    /// Some of the tags are neither in use nor spare, or both.
    Tags {
        /// Tags in the list of addresses.
        listed: usize,
        /// Tags that should be.
        in_use: usize,
    },
    /// The totals are not the sums of what there is.
    Totals {
        /// The sum of all spans.
        total: u64,
        /// The sum of all allocated segments.
        in_use: u64,
    },
    /// Next fit would go on at a tag that is not in the list, or lies behind the place.
    Rotor,
}

impl fmt::Display for ArenaBroken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::List { start } => write!(f, "the list of addresses is broken at {start:#x}"),
            Self::Spans { start } => write!(f, "the span at {start:#x} is not in its place"),
            Self::Cover { start } => write!(f, "the segments of the span at {start:#x} do not cover it"),
            Self::Quantum { start } => write!(f, "what starts at {start:#x} is not of whole quanta"),
            Self::Unmerged { start } => write!(f, "the free segment at {start:#x} has a free neighbour before it"),
            Self::NotReturned { start } => write!(f, "the imported span at {start:#x} is free and has not gone back"),
            Self::FreeList { list } => write!(f, "the free list {list} is broken"),
            Self::FreeSegments { listed, free } => {
                write!(f, "{listed} segments in the free lists, but {free} are free")
            }
            Self::Bucket { bucket } => write!(f, "the bucket {bucket} of the index is broken"),
            Self::Index { indexed, allocated } => {
                write!(f, "{indexed} segments in the index, but {allocated} are allocated")
            }
            Self::Tags { listed, in_use } => write!(f, "{listed} tags in the list, but {in_use} in use"),
            Self::Totals { total, in_use } => {
                write!(f, "the totals are not {total} and {in_use} in use, as they should be")
            }
            Self::Rotor => f.write_str("next fit would go on in no segment"),
        }
    }
}

impl core::error::Error for ArenaBroken {}

/// What the list of addresses adds up to.
#[derive(Default)]
struct Sums {
    tags: usize,
    free: usize,
    allocated: usize,
    total: u64,
    in_use: u64,
    rotor_seen: bool,
}

pub(super) fn verify(state: &State, quantum: u64) -> Result<(), ArenaBroken> {
    let sums = check_list(state, quantum)?;
    check_sums(state, &sums)?;
    check_free_lists(state, sums.free)?;
    check_index(state, sums.allocated)?;
    check_spare(state)
}

/// Invariants 1, 2 and 4 of `segments`, and the sums.
fn check_list(state: &State, quantum: u64) -> Result<Sums, ArenaBroken> {
    let mut sums = Sums::default();
    let (mut previous, mut span) = (None, None);
    for tag in state.list(state.first) {
        sums.tags += 1;
        let here = &state.tags[tag];
        let start = here.start.get();
        if here.previous.get() != previous || sums.tags > state.tags.in_use() as usize {
            return Err(ArenaBroken::List { start });
        }
        if here.size.get() == 0 || !start.is_multiple_of(quantum) || !here.size.get().is_multiple_of(quantum) {
            return Err(ArenaBroken::Quantum { start });
        }
        if here.is_span() {
            check_covered(state, span, previous)?;
            check_span(state, span, tag)?;
            span = Some(tag);
            sums.total = sums.total.wrapping_add(here.size.get());
        } else {
            check_segment(state, span, previous, tag)?;
            sums.count(here.kind(), here.size.get());
        }
        sums.rotor_seen |= state.rotor == Some(tag) && (state.floor == 0 || start < state.floor);
        previous = Some(tag);
    }
    check_covered(state, span, previous)?;
    if previous != state.tail || span != state.last_span {
        return Err(ArenaBroken::List { start: previous.map_or(0, |tag| state.tags[tag].start.get()) });
    }
    Ok(sums)
}

impl Sums {
    fn count(&mut self, kind: Kind, size: u64) {
        if kind == Kind::Allocated {
            self.allocated += 1;
            self.in_use = self.in_use.wrapping_add(size);
        } else {
            self.free += 1;
        }
    }
}

/// That `span` follows `before` among the spans, and lies behind it.
fn check_span(state: &State, before: Option<TagId>, span: TagId) -> Result<(), ArenaBroken> {
    let here = &state.tags[span];
    let start = here.start.get();
    let linked = before.map_or(state.first, |before| state.tags[before].after.get()) == Some(span);
    let apart = before.is_none_or(|before| state.tags[before].last() < start);
    if linked && apart && here.before.get() == before && here.last() >= start {
        Ok(())
    } else {
        Err(ArenaBroken::Spans { start })
    }
}

/// That `segment` begins where `previous`, the span or a segment of it, leads to.
fn check_segment(
    state: &State,
    span: Option<TagId>,
    previous: Option<TagId>,
    segment: TagId,
) -> Result<(), ArenaBroken> {
    let here = &state.tags[segment];
    let start = here.start.get();
    let (Some(span), Some(previous)) = (span, previous) else { return Err(ArenaBroken::List { start }) };
    let (span, before) = (&state.tags[span], &state.tags[previous]);
    let expected = if before.is_span() { before.start.get() } else { before.last().wrapping_add(1) };
    if here.kind() == Kind::Unused {
        return Err(ArenaBroken::List { start });
    }
    if start != expected || here.last() < start || here.last() > span.last() {
        return Err(ArenaBroken::Cover { start: span.start.get() });
    }
    if here.kind() == Kind::Free && before.kind() == Kind::Free {
        return Err(ArenaBroken::Unmerged { start });
    }
    if span.kind() == Kind::Imported && here.kind() == Kind::Free && here.size.get() == span.size.get() {
        return Err(ArenaBroken::NotReturned { start });
    }
    Ok(())
}

/// That `span` ends where its last segment does.
fn check_covered(state: &State, span: Option<TagId>, last: Option<TagId>) -> Result<(), ArenaBroken> {
    let (Some(span), Some(last)) = (span, last) else { return Ok(()) };
    let (span, last) = (&state.tags[span], &state.tags[last]);
    if last.is_span() || last.last() != span.last() {
        return Err(ArenaBroken::Cover { start: span.start.get() });
    }
    Ok(())
}

fn check_sums(state: &State, sums: &Sums) -> Result<(), ArenaBroken> {
    let counts = &state.counts;
    let in_use = state.tags.in_use() as usize;
    if sums.tags != in_use || in_use != counts.spans + sums.free + sums.allocated || counts.allocated != sums.allocated
    {
        return Err(ArenaBroken::Tags { listed: sums.tags, in_use });
    }
    if (counts.total, counts.in_use) != (sums.total, sums.in_use) {
        return Err(ArenaBroken::Totals { total: sums.total, in_use: sums.in_use });
    }
    if state.rotor.is_some() && !sums.rotor_seen {
        return Err(ArenaBroken::Rotor);
    }
    Ok(())
}

/// Invariants of `lists`, and 3 of `segments`.
fn check_free_lists(state: &State, free: usize) -> Result<(), ArenaBroken> {
    let mut listed = 0;
    for (list, filled) in state.free.bits() {
        let broken = Err(ArenaBroken::FreeList { list });
        let (mut before, mut length) = (None, 0_usize);
        for tag in state.free.segments(&state.tags, list) {
            let here = &state.tags[tag];
            let belongs = here.kind() == Kind::Free && here.size.get().checked_ilog2() == Some(list as u32);
            if !belongs || here.before.get() != before {
                return broken;
            }
            length += 1;
            if listed + length > free {
                return Err(ArenaBroken::FreeSegments { listed: listed + length, free });
            }
            before = Some(tag);
        }
        if filled != (length > 0) {
            return broken;
        }
        listed += length;
    }
    if listed == free { Ok(()) } else { Err(ArenaBroken::FreeSegments { listed, free }) }
}

/// Invariants of `index`, and 3 of `segments`.
fn check_index(state: &State, allocated: usize) -> Result<(), ArenaBroken> {
    let (buckets, tags) = (state.index.buckets(), state.tags.count());
    if buckets > tags {
        return Err(ArenaBroken::Bucket { bucket: buckets });
    }
    let mut indexed = 0;
    for bucket in 0..buckets {
        let mut before = None;
        for tag in state.index.segments(&state.tags, bucket) {
            let here = &state.tags[tag];
            let belongs = here.kind() == Kind::Allocated && state.index.bucket(here.start.get()) == bucket;
            if !belongs || here.before.get() != before {
                return Err(ArenaBroken::Bucket { bucket });
            }
            indexed += 1;
            if indexed > allocated {
                return Err(ArenaBroken::Index { indexed, allocated });
            }
            before = Some(tag);
        }
    }
    if indexed == allocated { Ok(()) } else { Err(ArenaBroken::Index { indexed, allocated }) }
}

/// That spare tags are spare, and as many as should be.
fn check_spare(state: &State) -> Result<(), ArenaBroken> {
    let tags = &state.tags;
    let broken = |spare: u32| ArenaBroken::Tags {
        listed: tags.count().saturating_sub(spare) as usize,
        in_use: tags.in_use() as usize,
    };
    let mut spare = tags.untouched();
    let mut tag = tags.next_spare(None);
    while let Some(here) = tag {
        spare += 1;
        if spare > tags.spare() || tags[here].kind() != Kind::Unused {
            return Err(broken(spare));
        }
        tag = tags.next_spare(tag);
    }
    if spare == tags.spare() { Ok(()) } else { Err(broken(spare)) }
}
