//! Which addresses of a process are mapped, and how: mappings sorted by address, none over another.
//!
//! Neighbours that are alike are one. Every change is done or not at all: where there is no memory for it, nothing has changed.

#![forbid(unsafe_code)]

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// What may be done with the memory of a mapping: as `prot` of `mmap2` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protection(u8);

impl Protection {
    /// Nothing: PROT_NONE.
    pub const NONE: Self = Self(0);
    /// PROT_READ.
    pub const READ: Self = Self(1);
    /// PROT_WRITE.
    pub const WRITE: Self = Self(2);
    /// PROT_EXEC.
    pub const EXECUTE: Self = Self(4);
    /// PROT_READ and PROT_WRITE.
    pub const DATA: Self = Self(3);

    /// From the lowest three bits of `prot`; the others mean nothing.
    pub const fn from_bits(prot: u32) -> Self {
        Self(prot as u8 & 7)
    }

    /// Both.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is allowed.
    pub const fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the memory may be read: the CPU can neither write nor execute what it may not read.
    pub const fn is_readable(self) -> bool {
        self.0 != 0
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |right: Self, letter| if self.allows(right) { letter } else { '-' };
        write!(f, "{}{}{}", bit(Self::READ, 'r'), bit(Self::WRITE, 'w'), bit(Self::EXECUTE, 'x'))
    }
}

/// What a mapping is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A segment of the program.
    Segment,
    /// Memory below the break.
    Break,
    /// The stack.
    Stack,
    /// From `mmap2`.
    Anonymous,
}

/// Addresses of a process that are mapped alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub start: u64,
    /// The first one behind it. Both are page-aligned.
    pub end: u64,
    /// What may be done there.
    pub protection: Protection,
    /// What it is.
    pub kind: Kind,
}

impl Mapping {
    /// Its addresses.
    pub fn addresses(&self) -> Range<u64> {
        self.start..self.end
    }

    fn is_like(&self, other: &Self) -> bool {
        (self.protection, self.kind) == (other.protection, other.kind)
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            Kind::Segment => "segment",
            Kind::Break => "break",
            Kind::Stack => "stack",
            Kind::Anonymous => "mapping",
        };
        write!(f, "{name} {:#010x}-{:#010x} {}", self.start, self.end, self.protection)
    }
}

/// There is no memory for the list, or it would be longer than [`Mappings::MOST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMany;

/// The mappings of a process.
#[derive(Debug)]
pub(super) struct Mappings {
    all: Vec<Mapping>,
}

impl Mappings {
    /// More there cannot be; the same as Linux' default of vm.max_map_count.
    const MOST: usize = 65_530;

    /// None, and room for some.
    pub(super) fn new() -> Result<Self, TooMany> {
        let mut all = Vec::new();
        all.try_reserve(16).map_err(|_| TooMany)?;
        Ok(Self { all })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Bytes in all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.all.iter().map(|mapping| mapping.end - mapping.start).sum()
    }

    /// The one that `address` is in.
    pub(super) fn at(&self, address: u64) -> Option<&Mapping> {
        self.all.get(self.first_behind(address)).filter(|mapping| mapping.start <= address)
    }

    /// Those that have addresses in common with `addresses`.
    pub(super) fn in_range(&self, addresses: &Range<u64>) -> &[Mapping] {
        let first = self.first_behind(addresses.start);
        let count = self.all[first..].iter().take_while(|mapping| mapping.start < addresses.end).count();
        if addresses.is_empty() { &[] } else { &self.all[first..first + count] }
    }

    /// Bytes of `addresses` that are mapped.
    pub(super) fn bytes_in(&self, addresses: &Range<u64>) -> u64 {
        let shared = |mapping: &Mapping| mapping.end.min(addresses.end) - mapping.start.max(addresses.start);
        self.in_range(addresses).iter().map(shared).sum()
    }

    /// The index of the first that ends behind `address`.
    fn first_behind(&self, address: u64) -> usize {
        self.all.partition_point(|mapping| mapping.end <= address)
    }

    /// Room for the changes that two operations make.
    pub(super) fn make_room(&mut self) -> Result<(), TooMany> {
        if self.all.len() + 2 > Self::MOST {
            return Err(TooMany);
        }
        self.all.try_reserve(2).map_err(|_| TooMany)
    }

    /// Adds a mapping, whose addresses are free.
    pub(super) fn insert(&mut self, new: Mapping) -> Result<(), TooMany> {
        self.make_room()?;
        debug_assert!(new.start < new.end && self.in_range(&new.addresses()).is_empty(), "addresses that are free");
        let at = self.first_behind(new.start);
        let joins_next = self.all.get(at).is_some_and(|next| next.start == new.end && next.is_like(&new));
        let before = at.checked_sub(1).map(|before| &mut self.all[before]);
        match before.filter(|before| before.end == new.start && before.is_like(&new)) {
            Some(before) if !joins_next => before.end = new.end,
            Some(_) => {
                let next = self.all.remove(at);
                self.all[at - 1].end = next.end;
            }
            None if joins_next => self.all[at].start = new.start,
            None => self.all.insert(at, new),
        }
        Ok(())
    }

    /// Has nothing be mapped at `addresses`: what is there in part is cut, or split.
    pub(super) fn remove(&mut self, addresses: &Range<u64>) -> Result<(), TooMany> {
        if self.in_range(addresses).is_empty() {
            return Ok(());
        }
        self.make_room()?;
        let first = self.first_behind(addresses.start);
        let last = first + self.in_range(addresses).len() - 1;
        let below = Mapping { end: addresses.start, ..self.all[first] };
        let above = Mapping { start: addresses.end, ..self.all[last] };
        let rest = [below, above].into_iter().filter(|mapping| mapping.start < mapping.end);
        // One takes the place of one, or two of one, for which there is room.
        self.all.splice(first..=last, rest);
        Ok(())
    }

    /// The highest addresses `within` which `length` bytes are free.
    pub(super) fn highest_gap(&self, length: u64, within: Range<u64>) -> Option<u64> {
        let mut end = within.end;
        for mapping in self.in_range(&within).iter().rev() {
            if end.saturating_sub(mapping.end) >= length {
                break;
            }
            end = mapping.start;
        }
        end.checked_sub(length).filter(|&start| start >= within.start)
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "they are lists of ranges, some of one")]
mod tests {
    use super::*;

    fn mapping(pages: Range<u64>, protection: Protection) -> Mapping {
        Mapping { start: pages.start << 12, end: pages.end << 12, protection, kind: Kind::Anonymous }
    }

    fn addresses(pages: Range<u64>) -> Range<u64> {
        pages.start << 12..pages.end << 12
    }

    fn pages(mappings: &Mappings) -> Vec<Range<u64>> {
        mappings.all.iter().map(|mapping| mapping.start >> 12..mapping.end >> 12).collect()
    }

    fn of(all: &[Range<u64>]) -> Mappings {
        let mut mappings = Mappings::new().unwrap();
        for range in all {
            mappings.insert(mapping(range.clone(), Protection::DATA)).unwrap();
        }
        mappings
    }

    #[test]
    fn neighbours_that_are_alike_are_one() {
        assert_eq!(pages(&of(&[4..6, 1..2, 8..9])), [1..2, 4..6, 8..9]);
        assert_eq!(pages(&of(&[4..6, 6..8])), [4..8]);
        assert_eq!(pages(&of(&[4..6, 2..4])), [2..6]);
        assert_eq!(pages(&of(&[4..6, 8..9, 6..8])), [4..9]);
        let mut mappings = of(&[4..6]);
        mappings.insert(mapping(6..7, Protection::READ)).unwrap();
        let heap = Mapping { kind: Kind::Break, ..mapping(3..4, Protection::DATA) };
        mappings.insert(heap).unwrap();
        assert_eq!(pages(&mappings), [3..4, 4..6, 6..7]);
        assert_eq!((mappings.count(), mappings.bytes()), (3, 4 << 12));
    }

    #[test]
    fn what_is_removed_in_part_is_cut_or_split() {
        for (removed, left) in [
            (0..1, vec![2..8, 10..12]),
            (2..8, vec![10..12]),
            (2..4, vec![4..8, 10..12]),
            (6..9, vec![2..6, 10..12]),
            (4..5, vec![2..4, 5..8, 10..12]),
            (4..11, vec![2..4, 11..12]),
            (0..20, vec![]),
            (8..10, vec![2..8, 10..12]),
        ] {
            let mut mappings = of(&[2..8, 10..12]);
            let bytes = mappings.bytes_in(&addresses(removed.clone()));
            mappings.remove(&addresses(removed.clone())).unwrap();
            assert_eq!(pages(&mappings), left, "{removed:?}");
            assert_eq!(mappings.bytes() + bytes, 8 << 12);
        }
    }

    #[test]
    fn an_address_is_in_the_mapping_around_it() {
        let mappings = of(&[2..4, 5..6]);
        for (address, start) in
            [(0x1fff, None), (0x2000, Some(2)), (0x3fff, Some(2)), (0x4000, None), (0x5fff, Some(5)), (0x6000, None)]
        {
            assert_eq!(mappings.at(address).map(|mapping| mapping.start >> 12), start, "{address:#x}");
        }
        assert_eq!(mappings.in_range(&(0x4000..0x4000)), []);
        assert_eq!(mappings.in_range(&(0x3fff..0x5001)).len(), 2);
    }

    #[test]
    fn the_highest_gap_is_found() {
        let mappings = of(&[2..4, 6..10, 14..15]);
        let gap = |length: u64, within| mappings.highest_gap(length << 12, addresses(within)).map(|start| start >> 12);
        assert_eq!(gap(1, 0..20), Some(19));
        assert_eq!(gap(5, 0..20), Some(15));
        assert_eq!(gap(1, 0..15), Some(13));
        assert_eq!(gap(4, 0..15), Some(10));
        assert_eq!(gap(2, 0..10), Some(4));
        assert_eq!(gap(3, 0..10), None);
        assert_eq!(gap(2, 1..4), None);
        assert_eq!(gap(2, 0..4), Some(0));
        assert_eq!(gap(u64::MAX >> 12, 0..20), None);
    }

    #[test]
    fn there_is_an_end_to_splitting() {
        let mut mappings = of(&[0..1 << 20]);
        let removed = (1..).step_by(2).take_while(|&page| mappings.remove(&addresses(page..page + 1)).is_ok()).count();
        assert!((Mappings::MOST - 3..Mappings::MOST).contains(&removed), "{removed}");
        assert_eq!(mappings.insert(mapping((1 << 20) + 1..(1 << 20) + 2, Protection::READ)), Err(TooMany));
        assert_eq!(mappings.count(), removed + 1);
    }

    #[test]
    fn mappings_are_written_with_their_rights() {
        let written = mapping(0x8048..0x804a, Protection::READ.with(Protection::EXECUTE)).to_string();
        assert_eq!(written, "mapping 0x08048000-0x0804a000 r-x");
        assert_eq!(Protection::NONE.to_string(), "---");
    }
}
