//! What `verify` says when an invariant does not hold.

#![forbid(unsafe_code)]

use core::fmt;

/// An invariant of the allocator that does not hold.
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
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cache { id, what } => write!(f, "cache {id}: {what}"),
        }
    }
}

impl core::error::Error for Broken {}
