//! Checks of objects: what is done beyond refusing bad frees, for caches of choice, at run time.
//!
//! A cache with checks serves every request from slabs of their own kind, in which each object has a *red zone* on both
//! sides and a *tag* behind it that says who allocated and who freed it. Which checks a cache has can change at any time;
//! an object keeps the room that it was allocated with, and its free finds out from the frame record. So a cache without
//! checks pays one test an allocation, and nothing a free.
//!
//! | check | word | finds | costs | instructions |
//! |---|---|---|---|---|
//! | [`RED_ZONE`](Checks::RED_ZONE) | `redzone` | writes beside the object, one byte is enough, also in the size class's slack | a pass over the bytes beside the object at both ends of its life | 4,005 |
//! | [`POISON`](Checks::POISON) | `poison` | writes after the free, and reads before the first write or after the free, which see `0xbaddcafe` and `0xdeadbeef` | two passes over the object at its allocation, one at its free | 3,049 |
//! | [`AUDIT`](Checks::AUDIT) | `audit` | who allocated and freed it, and what came before: the [log](crate::Heap::set_event_log) | a backtrace at both ends of its life | 2,617 |
//! | [`QUARANTINE`](Checks::QUARANTINE) | `quarantine` | the same as poison, for longer: a freed object waits until others have been freed, up to a number of bytes | those bytes | 2,777 |
//! | [`RANDOM`](Checks::RANDOM) | `random` | code that relies on the order of objects | a few instructions | 2,544 |
//! | [`GUARD`](Checks::GUARD) | `guard`, `guard/16` | accesses behind the object, before its pages and after its free: a page fault at that very instruction | one or two page frames, a pass over them, and mapping and unmapping them, for every object or every 16th | 7,443 |
//! | [`ZERO`](Checks::ZERO) | `zero` | nothing: objects are zero when they are allocated | a pass over the object | 2,691 |
//! | [`ZERO_FREED`](Checks::ZERO_FREED) | `zerofree` | nothing: what was in an object is gone when it is free | a pass over the object | 2,885 |
//!
//! Instructions are those of an allocation of 64 bytes and its free, which are 80 without checks, and some 2,600 with any,
//! since each object goes to its slab; of `audit` without what the embedder's backtrace takes, of `guard` without the
//! mapping. `all` takes 5,500. An object of 64 bytes takes 69 bytes without checks, 348 with any, and 4,500 where it is
//! guarded. `cargo bench --manifest-path slab/bench/Cargo.toml --bench instructions` counts them (a release build, a host
//! with one CPU).
//!
//! A cache with any of them also checks size and alignment of each free, and takes no part in the magazines: each object goes
//! to its slab at once. The room around an object of n bytes, aligned to a, is [`ROOM`] bytes and n + a rounded up to a multiple of 8 and a.
//!
//! There is no link in a free object, with checks or without, and so none to be obfuscated: which slots of a slab are free is
//! written outside the objects, where a write after the free does not come to. The links among slabs and free page frames
//! are there too, and each is found wrong before it is followed.
//!
//! In a cache that constructs, an object with checks is constructed at each allocation and destroyed at each free, since
//! nothing of it can stay while it is free. An object that would be too large for a slab with its room, above some 4 MiB
//! less twice its alignment, has no checks. Freed in an NMI handler, it is not destroyed.
//!
//! Objects with pages of their own, *guarded* objects, need an embedder that maps pages: see [`GuardPages`].
//!
//! Caches are chosen by rules, as `slub_debug` and `kmem_flags` do it elsewhere: see
//! [`Heap::set_checks`](crate::Heap::set_checks).

mod guard;
mod leaks;
mod log;
mod quarantine;
mod room;

use core::error::Error;
use core::fmt;
use core::ops::BitOr;

pub(crate) use guard::{Guard, Guarded};
pub use guard::{GuardPages, LARGEST_GUARDED};
pub(crate) use leaks::group_by_site;
pub use leaks::{Allocation, Site};
pub(crate) use log::Log;
pub use log::Logged;
pub(crate) use quarantine::{Quarantine, Wait, Waiting};
pub use room::ROOM;
pub(crate) use room::{Room, Slot, Tag};

/// What is checked of the objects of a cache.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Checks(u16);

impl Checks {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Bytes beside the object are not written to.
    pub const RED_ZONE: Self = Self(1);
    /// A free object is not written to; what is read of it is a pattern.
    pub const POISON: Self = Self(1 << 1);
    /// Who allocated and who freed it.
    pub const AUDIT: Self = Self(1 << 2);
    /// It is not allocated again soon.
    pub const QUARANTINE: Self = Self(1 << 3);
    /// The slots of a slab are used in random order.
    pub const RANDOM: Self = Self(1 << 4);
    /// It is zero when it is allocated.
    pub const ZERO: Self = Self(1 << 5);
    /// It is zero while it is free.
    pub const ZERO_FREED: Self = Self(1 << 6);
    /// It has pages of its own, which are unmapped at its free; see [`GuardPages`].
    pub const GUARD: Self = Self(1 << 7);
    /// Red zones, poison, audit and quarantine.
    pub const ALL: Self = Self(0b1111);

    /// The words of [`Heap::set_checks`](crate::Heap::set_checks).
    const WORDS: [(&str, Self); 9] = [
        ("redzone", Self::RED_ZONE),
        ("poison", Self::POISON),
        ("audit", Self::AUDIT),
        ("quarantine", Self::QUARANTINE),
        ("random", Self::RANDOM),
        ("zero", Self::ZERO),
        ("zerofree", Self::ZERO_FREED),
        ("guard", Self::GUARD),
        ("all", Self::ALL),
    ];

    /// Whether all of `other` are among them.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn bits(self) -> u16 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// These and those. Where both say which objects are guarded, as many are as either says.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        let rarity = match (self.contains(Self::GUARD), other.contains(Self::GUARD)) {
            (true, true) if self.rarity() > other.rarity() => other.rarity(),
            (true, _) => self.rarity(),
            _ => other.rarity(),
        };
        Self((self.0 | other.0) & !RARITY | (rarity << RARITY_SHIFT) as u16)
    }

    /// [`GUARD`](Self::GUARD) for one of so many objects of a cache, rounded up to a power of two, up to 32768.
    #[must_use]
    pub const fn guard_one_in(objects: u16) -> Self {
        let rarity = match objects.checked_next_power_of_two() {
            Some(every) => every.trailing_zeros(),
            None => 15,
        };
        Self(Self::GUARD.0 | (rarity << RARITY_SHIFT) as u16)
    }

    /// Which of a cache's objects is guarded: one of two to the power of this.
    const fn rarity(self) -> u32 {
        (self.0 >> RARITY_SHIFT) as u32
    }

    /// Whether the object is to be guarded before which so many were allocated.
    pub(crate) const fn guard(self, allocations: u64) -> bool {
        self.contains(Self::GUARD) && allocations.trailing_zeros() >= self.rarity()
    }
}

/// Where the bits lie that say how rarely objects are guarded.
const RARITY_SHIFT: u32 = 12;
const RARITY: u16 = 0xf << RARITY_SHIFT;

impl BitOr for Checks {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Self::WORDS.iter().filter(|(word, check)| *word != "all" && self.contains(*check));
        f.write_str(words.next().map_or("none", |(word, _)| word))?;
        words.try_for_each(|(word, _)| write!(f, ",{word}"))?;
        if self.rarity() > 0 { write!(f, "/{}", 1 << self.rarity()) } else { Ok(()) }
    }
}

/// Why rules are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadChecks<'a> {
    /// What is not understood.
    pub word: &'a str,
}

impl fmt::Display for BadChecks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no check; rules look like `dentry:redzone,poison;size-*:audit`, and the checks are",
            self.word
        )?;
        let mut words = Checks::WORDS.iter().map(|(word, _)| word);
        words.try_for_each(|word| write!(f, " {word}"))
    }
}

impl Error for BadChecks<'_> {}

/// Rules that say what is checked in which cache: `dentry:redzone,poison;*:audit`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules<'a>(&'a str);

impl<'a> Rules<'a> {
    pub(crate) const NONE: Self = Self("");

    pub(crate) fn new(rules: &'a str) -> Result<Self, BadChecks<'a>> {
        rules.split(';').filter(|rule| !rule.trim().is_empty()).try_for_each(|rule| {
            let (_, checks) = rule.split_once(':').ok_or(BadChecks { word: rule })?;
            checks.split(',').try_for_each(|word| check_named(word).map(|_| ()).ok_or(BadChecks { word }))
        })?;
        Ok(Self(rules))
    }

    /// What the first rule says that names the cache; `None` where none does.
    pub(crate) fn checks_of(self, cache: &str) -> Option<Checks> {
        let rules = self.0.split(';').filter_map(|rule| rule.split_once(':'));
        let mut matching = rules.filter(|(pattern, _)| matches(pattern.trim(), cache));
        let (_, checks) = matching.next()?;
        Some(checks.split(',').filter_map(check_named).fold(Checks::NONE, Checks::with))
    }
}

/// `none` is a word too: it makes an exception of a cache that a later rule names.
fn check_named(word: &str) -> Option<Checks> {
    let word = word.trim();
    if let Some(objects) = word.strip_prefix("guard/") {
        return objects.parse().ok().map(Checks::guard_one_in);
    }
    let named = || Checks::WORDS.iter().find(|(name, _)| *name == word).map(|(_, checks)| *checks);
    if word == "none" { Some(Checks::NONE) } else { named() }
}

/// Whether the name is the pattern, or starts with it where it ends in `*`.
fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(name == pattern, |start| name.starts_with(start))
}

#[cfg(test)]
mod tests;
