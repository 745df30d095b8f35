//! Object caches: slabs (Bonwick 1994) with magazines in front (Bonwick & Adams 2001).
//!
//! | module | what is there |
//! |---|---|
//! | `public`, `typed`, `reserve` | the caches that an embedder makes |
//! | `checked`, `guarded` | objects with checks |
//! | `core` | one cache: the way of an object from slab to user and back |
//! | `magazines`, `magazine`, `sizing` | the layer of each CPU, and the depot |
//! | `slabs`, `slab`, `geometry` | the slab layer |
//! | `shared` | what all caches of one allocator have in common |
//!
//! Locks, in this order: the registry of caches, a depot, a slab list, the page frames. What a CPU has in its own
//! magazines is guarded by its interrupts being off. In an NMI locks are only tried.

mod checked;
mod core;
mod geometry;
mod guarded;
mod magazine;
mod magazines;
mod public;
mod reserve;
mod shared;
mod sizing;
mod slab;
mod slabs;
#[cfg(test)]
mod tests;
mod typed;

use ::core::alloc::Layout;
use ::core::error::Error;
use ::core::fmt;

pub use public::{Cache, InUse};
pub use reserve::Reserve;
pub use shared::Caches;
pub use typed::{Object, ObjectBox, ObjectCache};

pub(crate) use self::core::{Core, Request};
pub(crate) use magazine::Round;
pub(crate) use magazines::Magazines;
pub(crate) use shared::CLASSES;
pub(crate) use slab::{AUDITED, CACHED, FREE, LENT, QUARANTINED, USED};

/// Why there is no object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocError {
    /// There is no memory, and nothing more that could be given back.
    NoMemory,
    /// The cache has as many objects as its limit allows.
    AtLimit,
    /// No object is free at hand, and the caller did not want to take memory, or is in an NMI and cannot.
    WouldGrow,
    /// The object's constructor failed; its slot is free again.
    ConstructorFailed,
    /// Objects of this layout cannot be cached: of no size, larger than 4 MiB, or aligned to more than 2 MiB.
    BadLayout,
    /// There have been 2^24 caches.
    TooManyCaches,
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMemory => "out of memory",
            Self::AtLimit => "the cache is at its limit of objects",
            Self::WouldGrow => "no object is free without taking more memory",
            Self::ConstructorFailed => "the object's constructor failed",
            Self::BadLayout => "objects of this layout cannot be cached: of no size, too large, or aligned to too much",
            Self::TooManyCaches => "there have been too many caches",
        })
    }
}

impl Error for AllocError {}

/// What a constructor returns that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitFailed;

impl fmt::Display for InitFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object was not constructed")
    }
}

impl Error for InitFailed {}

/// A layout of sizes that are known to make one.
const fn layout(size: usize, align: usize) -> Layout {
    match Layout::from_size_align(size, align) {
        Ok(layout) => layout,
        Err(_) => panic!("no layout"),
    }
}
