//! What [`Frames::verify`](crate::Frames::verify) can find broken.

#![forbid(unsafe_code)]

use core::error::Error;
use core::fmt;

use crate::frames::{Frame, Order};

/// An invariant of the allocator that does not hold, and where.
///
/// It means that memory of the allocator was overwritten, or that the allocator has a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Broken {
    /// One of a cache.
    Cache {
        /// The cache's number; that of a size class is its index, from the smallest.
        id: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// A block in a list of free blocks is not aligned to its order, or not wholly in the list's zone.
    FreeBlockPlace {
        /// Where the block starts.
        frame: Frame,
        /// The list's order.
        order: Order,
    },
    /// The record of a block in a list of free blocks says otherwise.
    FreeBlockOwner {
        /// Where the block starts.
        frame: Frame,
        /// The list's order.
        order: Order,
    },
    /// A free block does not point back to the one before it in its list.
    FreeListLink {
        /// Where the block starts.
        frame: Frame,
    },
    /// A list of free blocks has another length than it should have.
    FreeListLength {
        /// The list's order.
        order: Order,
        /// Blocks that the zone counts.
        expected: usize,
        /// Blocks that are in the list; one more than expected can mean a ring.
        found: usize,
    },
    /// Two free buddies stand apart.
    NotMerged {
        /// Where one of them starts.
        frame: Frame,
        /// The order of both.
        order: Order,
    },
    /// A frame in a CPU's stock has a record that says otherwise.
    StockOwner {
        /// The CPU.
        cpu: usize,
        /// The frame.
        frame: Frame,
    },
    /// A CPU's stock says that it has more frames than it can.
    StockCount {
        /// The CPU.
        cpu: usize,
        /// What it says.
        count: usize,
    },
    /// A managed frame belongs to nothing.
    Lost {
        /// The frame.
        frame: Frame,
    },
    /// Something starts inside a free block or an allocation.
    Overlap {
        /// Where the outer one starts.
        frame: Frame,
        /// The frame inside it.
        inner: Frame,
    },
    /// There are more or fewer managed frames, or free ones, or ones in stocks or for records, than are counted; or
    /// something reaches beyond managed memory.
    FrameCount {
        /// What is counted.
        expected: usize,
        /// What the records say.
        found: usize,
    },
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Cache { id, what } => write!(f, "cache {id}: {what}"),
            Self::FreeBlockPlace { frame, order } => {
                write!(f, "free block of order {order} at {:#x}: not aligned, or not in its zone", frame.address())
            }
            Self::FreeBlockOwner { frame, order } => {
                write!(f, "free block of order {order} at {:#x}: its record says otherwise", frame.address())
            }
            Self::FreeListLink { frame } => {
                write!(f, "free block at {:#x}: does not point back to the one before it", frame.address())
            }
            Self::FreeListLength { order, expected, found } => {
                write!(f, "free blocks of order {order}: {expected} counted, {found} in the list")
            }
            Self::NotMerged { frame, order } => {
                write!(f, "free block of order {order} at {:#x}: its buddy is free, and not merged", frame.address())
            }
            Self::StockOwner { cpu, frame } => {
                write!(f, "stock of CPU {cpu}: the record of the frame at {:#x} says otherwise", frame.address())
            }
            Self::StockCount { cpu, count } => {
                write!(f, "stock of CPU {cpu}: {count} frames are more than it can have")
            }
            Self::Lost { frame } => write!(f, "managed frame at {:#x}: belongs to nothing", frame.address()),
            Self::Overlap { frame, inner } => write!(
                f,
                "what starts at {:#x} has the frame at {:#x}, which is not its own",
                frame.address(),
                inner.address()
            ),
            Self::FrameCount { expected, found } => write!(f, "frames: {expected} counted, the records say {found}"),
        }
    }
}

impl Error for Broken {}
