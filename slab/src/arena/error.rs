//! What an arena refuses, and why.

#![deny(unsafe_code)]

use core::fmt;

/// Why a request to an [`Arena`](super::Arena) failed. The arena is then as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArenaError {
    /// The arena's quantum is not a power of two: it never holds anything.
    BadQuantum,
    /// The size is 0, or passes 2^64 when it is rounded up to the quantum.
    BadSize,
    /// The span is empty, does not start and end at a multiple of the quantum, wraps around, or the arena would have
    /// 2^64 integers with it.
    BadSpan,
    /// The span overlaps one that the arena has: the one that starts at `start`.
    Overlap {
        /// Where the span of the arena starts.
        start: u64,
    },
    /// The constraints contradict each other, the size or the quantum: no integers could ever meet them.
    BadConstraints,
    /// No free segment is large enough, or none meets the constraints, and the source, if there is one, lends no more.
    NoSpace,
    /// There is no page frame for the boundary tags, or the arena has as many as it can have, 2.5 million.
    NoMemory,
    /// No allocated segment starts at `start`: it is free, was never allocated, is the inside of a segment, or not the
    /// arena's at all.
    NotAllocated {
        /// What was to be freed.
        start: u64,
    },
    /// The segment was allocated with another size. Sizes are the rounded ones.
    WrongSize {
        /// What was to be freed.
        start: u64,
        /// With this size.
        freed: u64,
        /// The segment's size.
        allocated: u64,
    },
    /// The source lent what cannot be a span of the arena; it has been given back.
    BadImport {
        /// Where the span starts.
        start: u64,
        /// The size that it was asked for.
        size: u64,
    },
    /// Segments are allocated still.
    Busy {
        /// How many.
        segments: usize,
    },
}

impl fmt::Display for ArenaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BadQuantum => f.write_str("the arena's quantum is not a power of two"),
            Self::BadSize => f.write_str("the size is 0, or too large to be rounded up"),
            Self::BadSpan => f.write_str("the span is empty, not of whole quanta, or too large"),
            Self::Overlap { start } => write!(f, "the span overlaps the one at {start:#x}"),
            Self::BadConstraints => f.write_str("no integers can meet the constraints"),
            Self::NoSpace => f.write_str("no free segment fits"),
            Self::NoMemory => f.write_str("no memory for boundary tags"),
            Self::NotAllocated { start } => write!(f, "bad free of {start:#x}: no allocated segment starts there"),
            Self::WrongSize { start, freed, allocated } => {
                write!(f, "bad free of {start:#x}: freed with the size {freed:#x}, allocated with {allocated:#x}")
            }
            Self::BadImport { start, size } => write!(f, "the source lent a bad span: {start:#x}, size {size:#x}"),
            Self::Busy { segments } => write!(f, "{segments} segments are allocated"),
        }
    }
}

impl core::error::Error for ArenaError {}
