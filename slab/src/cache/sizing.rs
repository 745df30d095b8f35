//! How large magazines are, and when they grow.
//!
//! A magazine fills a block of 128, 256, ... 2048 bytes. Its first two words are a link and a count; the rest are rounds,
//! of two words each:
//!
//! | objects of up to | rounds at first | rounds at most | kept by a CPU at most |
//! |---|---|---|---|
//! | 512 bytes | 15 | 127 | 128 KiB |
//! | 2 KiB | 7 | 31 | 128 KiB |
//! | 8 KiB | 7 | 15 | 256 KiB |
//! | 32 KiB | 7 | 7 | 512 KiB |
//!
//! Larger objects go to their slabs at once. Magazines start small, since many caches are hardly used, and take the next
//! size when CPUs meet at the depot's lock (section 3.4 of the 2001 paper), or when they give it many magazines. They do not
//! grow while memory is short. A smaller one makes place for a larger one where it would be exchanged or filled from slabs, one
//! at a time.

#![forbid(unsafe_code)]

use super::magazine::Round;

/// A size of magazine: kind k takes 128 * 2^k bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind(u8);

/// The largest kind, and the rounds that it holds.
const MOST: u8 = 4;
pub(crate) const MOST_ROUNDS: usize = Kind(MOST).rounds();

/// The layer is off in heaps with less memory than this, and this for each CPU: what magazines hold back would be missed.
const LEAST_MEMORY: usize = 1 << 20;
const LEAST_MEMORY_A_CPU: usize = 64 << 10;

/// So many meetings at the depot's lock in an interval, and magazines grow.
const CONTENTION: u32 = 3;

/// So many magazines that the depot was given in an interval, and magazines grow.
pub(super) const MANY: u32 = 128;

/// A depot may hold full magazines of this fraction of all memory.
const SHARE_OF_MEMORY: usize = 32;

/// So many full magazines it may hold in any case.
const FEW: usize = 4;

impl Kind {
    /// Bytes of a magazine's memory.
    #[inline]
    pub(crate) const fn bytes(self) -> usize {
        128 << self.0
    }

    /// Rounds that it holds.
    #[inline]
    pub(crate) const fn rounds(self) -> usize {
        self.bytes() / size_of::<Round>() - 1
    }

    /// The kind that holds so many rounds.
    pub(crate) fn holding(rounds: usize) -> Option<Self> {
        (0..=MOST).map(Self).find(|kind| kind.rounds() == rounds)
    }

    pub(crate) const fn index(self) -> u8 {
        self.0
    }

    #[inline]
    pub(crate) const fn from_index(index: u8) -> Self {
        Self(index)
    }
}

/// Bytes of memory that a heap must have for magazines of so many CPUs.
pub(crate) fn least_memory(cpus: usize) -> usize {
    (LEAST_MEMORY_A_CPU * cpus).max(LEAST_MEMORY)
}

/// The kinds that a cache may use, from first to largest; `None` where its objects are too large for magazines.
pub(crate) const fn kinds_for(object_size: usize) -> Option<(Kind, Kind)> {
    let (first, largest) = match object_size {
        0..=512 => (1, MOST),
        513..=2048 => (0, 2),
        2049..=8192 => (0, 1),
        8193..=32768 => (0, 0),
        _ => return None,
    };
    Some((Kind(first), Kind(largest)))
}

/// The kind to use after so much contention at the depot, and so many magazines that it was given.
pub(crate) fn next_kind(current: Kind, largest: Kind, contention: u32, given: u32, memory_is_short: bool) -> Kind {
    let is_busy = contention > CONTENTION || given >= MANY;
    if is_busy && current < largest && !memory_is_short { Kind(current.0 + 1) } else { current }
}

/// Whether a depot with so many full magazines may have one more: a few always, and no more than it may have of memory, so that
/// what is freed does not stay for ever where nobody calls `maintain`.
pub(crate) fn has_room(full: usize, memory: usize, object_size: usize, kind: Kind) -> bool {
    full < FEW || (full + 1) * object_size * kind.rounds() <= memory / SHARE_OF_MEMORY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_documentation_is_true() {
        let table = [(512, 15, 127, 128), (2048, 7, 31, 128), (8192, 7, 15, 256), (32768, 7, 7, 512)];
        let mut below = 1;
        for (size, first, largest, kept) in table {
            for size in [below, size] {
                let kinds = kinds_for(size).unwrap();
                assert_eq!((kinds.0.rounds(), kinds.1.rounds()), (first, largest), "{size}");
                // The loaded magazine and the previous one.
                assert!(2 * kinds.1.rounds() * size <= kept * 1024);
            }
            below = size + 1;
        }
        assert_eq!(kinds_for(32769), None);
    }

    #[test]
    fn magazines_grow_with_use_up_to_the_largest_and_never_when_memory_is_short() {
        let (first, largest) = kinds_for(64).unwrap();
        assert_eq!(next_kind(first, largest, CONTENTION, MANY - 1, false), first);
        for (contention, given) in [(CONTENTION + 1, 0), (0, MANY)] {
            assert_eq!(next_kind(first, largest, contention, given, true), first);
            let next = next_kind(first, largest, contention, given, false);
            assert_eq!(next.bytes(), 2 * first.bytes());
            assert_eq!(next_kind(largest, largest, contention, given, false), largest);
        }
    }

    #[test]
    fn a_depot_holds_a_small_share_of_memory() {
        let kind = kinds_for(64).unwrap().0;
        let most = |memory, size| (0..).find(|&full| !has_room(full, memory, size, kind)).unwrap();
        assert_eq!(most(256 << 20, 64), (8 << 20) / (64 * 15));
        assert_eq!(most(1 << 20, 4096), FEW);
    }
}
