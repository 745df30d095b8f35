//! What a caller may ask for, and where in a free segment it would lie.

#![deny(unsafe_code)]

use super::ArenaError;

/// Which of the free segments that are large enough an allocation takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// One of a size class in which every segment is large enough: constant time.
    #[default]
    Instant,
    /// The smallest that fits. The time grows with the number of free segments of about the size.
    Best,
    /// The first behind the last allocation of this kind, round and round: what was freed is used again as late as
    /// possible, as process ids want it. The time grows with the number of segments that are passed over.
    Next,
}

/// Where integers must lie: for [`Arena::alloc_with`](super::Arena::alloc_with).
///
/// ```
/// use kslab::arena::{Constraints, Fit};
///
/// let below_16_mib = Constraints { max: (16 << 20) - 1, align: 64 << 10, ..Constraints::NONE };
/// let process_id = Constraints { fit: Fit::Next, ..Constraints::NONE };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Constraints {
    /// The start is a multiple of this power of two, plus [`phase`](Self::phase). Less than the quantum is as good as
    /// the quantum.
    pub align: u64,
    /// Less than the alignment, and a multiple of the quantum.
    pub phase: u64,
    /// No multiple of this power of two lies inside, other than at the start. 0: no such boundary.
    pub nocross: u64,
    /// The least integer allowed.
    pub min: u64,
    /// The largest integer allowed, inclusive.
    pub max: u64,
    /// Which of the segments that fit.
    pub fit: Fit,
}

impl Constraints {
    /// Anywhere, with instant fit.
    pub const NONE: Self = Self { align: 1, phase: 0, nocross: 0, min: 0, max: u64::MAX, fit: Fit::Instant };
}

impl Default for Constraints {
    fn default() -> Self {
        Self::NONE
    }
}

/// A request that makes sense: [`Request::new`] has checked it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// A multiple of the quantum, not 0.
    pub(super) size: u64,
    /// A power of two, at least the quantum.
    align: u64,
    phase: u64,
    /// 0, or a power of two that `size` integers fit between.
    nocross: u64,
    min: u64,
    max: u64,
    pub(super) fit: Fit,
    /// What a segment must have for it to fit for sure, if only the alignment restricts it.
    pub(super) padded: u64,
}

impl Request {
    /// For `size` integers, rounded up already.
    pub(super) fn new(size: u64, quantum: u64, constraints: &Constraints) -> Result<Self, ArenaError> {
        let Constraints { phase, nocross, min, max, fit, .. } = *constraints;
        let align = constraints.align.max(quantum);
        if !constraints.align.is_power_of_two() || phase >= align || phase % quantum != 0 || min > max {
            return Err(ArenaError::BadConstraints);
        }
        // The earliest place between two boundaries is at the phase.
        let fits_between = |nocross: u64| size <= nocross.saturating_sub(phase % align.min(nocross));
        if nocross != 0 && !(nocross.is_power_of_two() && fits_between(nocross)) {
            return Err(ArenaError::BadConstraints);
        }
        Ok(Self { size, align, phase, nocross, min, max, fit, padded: size.saturating_add(align - quantum) })
    }

    /// Whether more than the alignment restricts where the integers lie.
    pub(super) fn is_bounded(&self) -> bool {
        (self.nocross, self.min, self.max) != (0, 0, u64::MAX)
    }

    /// The first place for it at or after `floor` in the free integers from `first` to `last`, both inclusive.
    pub(super) fn place(&self, first: u64, last: u64, floor: u64) -> Option<u64> {
        let last = last.min(self.max);
        let mut start = self.align_up(first.max(self.min).max(floor))?;
        let mut end = start.checked_add(self.size - 1)?;
        if self.nocross != 0 && start / self.nocross != end / self.nocross {
            // It is no larger than the distance of two boundaries: the one that it crosses is the last one before its
            // end.
            start = self.align_up(end & !(self.nocross - 1))?;
            end = start.checked_add(self.size - 1)?;
        }
        (end <= last).then_some(start)
    }

    /// The first integer from `at` on that has the alignment and phase.
    fn align_up(&self, at: u64) -> Option<u64> {
        at.checked_add(self.phase.wrapping_sub(at) & (self.align - 1))
    }
}
