//! Where an arena gets further spans from.

#![deny(unsafe_code)]

use core::fmt;

use super::{Arena, ArenaError, Constraints};
use crate::platform::Platform;

/// Lends an arena spans when it has nothing left that fits, and takes them back when they are wholly free.
///
/// Another [`Arena`] is a source, and so is whatever can hand out ranges of integers; but not, over however many
/// others, the arena itself. Both functions are called with no lock of the borrowing arena held, on whatever CPU wants
/// the integers, in an interrupt handler too if that allocates from the arena.
pub trait Source: Sync {
    /// Lends `size` integers in a row, of which the first is a multiple of `align`, a power of two. They are the
    /// borrower's until it gives them back, and nothing that it has already.
    ///
    /// # Errors
    ///
    /// [`ArenaError::NoSpace`], or whatever else is in the way: the borrower then does without.
    fn lend(&self, size: u64, align: u64) -> Result<u64, ArenaError>;

    /// Takes back just what [`lend`](Self::lend) has lent.
    fn take_back(&self, start: u64, size: u64);
}

impl<P: Platform> Source for Arena<'_, P> {
    fn lend(&self, size: u64, align: u64) -> Result<u64, ArenaError> {
        self.alloc_with(size, &Constraints { align, ..Constraints::NONE })
    }

    /// What was not lent is refused, and counted in [`ArenaStats::refused`](super::ArenaStats::refused).
    fn take_back(&self, start: u64, size: u64) {
        let _counted = self.free(start, size);
    }
}

/// A source, and how much to ask of it at a time.
#[derive(Clone, Copy)]
pub(super) struct Import<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) unit: u64,
}

impl fmt::Debug for Import<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Import").field("unit", &self.unit).finish_non_exhaustive()
    }
}
