//! One slab: page frames cut into slots for equal objects, and what is known of each slot.
//!
//! The state of a slot is a byte outside the object, so an object's bytes are nobody's but its user's, and a double free
//! is seen before it has done anything:
//!
//! | state | the slot is |
//! |---|---|
//! | [`RAW`] | free, in its slab, not constructed |
//! | [`FREE`] | free, in its slab, constructed |
//! | [`CACHED`] | out of its slab, in a magazine or on its way |
//! | [`DEFERRED`] | freed in an NMI, and not back in its slab yet |
//! | [`QUARANTINED`] | freed with checks, and waits before it goes back |
//! | [`KEPT`] | kept out of circulation: something wrote over it |
//! | [`AUDITED`] | allocated, and being checked just now |
//! | [`USED`] | allocated |
//! | [`LENT`] + n | allocated for the n-th size class, a smaller one, which had no memory |
//!
//! Lock: `RAW` and `FREE` are left and entered with the cache's slab list locked, which guards the header too. From
//! `CACHED` to `USED` or `LENT` whoever has the object changes the state, with no lock, and back again with interrupts off:
//! by a load and a store, since an atomic exchange costs more than all the rest of a free. So of two CPUs that free an
//! object in the same few instructions, both may succeed. Then it is in two rounds, and the second of them that is
//! handed out, or given to the slabs, is reported. The states of objects with checks change by an exchange,
//! [`claim`]. All of it is atomic, so that a bad free at any time reads a value and no more.

use crate::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::geometry::{Geometry, SlotFinder};
use super::magazine::Round;
use crate::frames::{Frame, NOT_LISTED, SlabPlace};

/// What a slot is; see the module's table.
pub(crate) const RAW: u8 = 0;
pub(crate) const FREE: u8 = 1;
pub(crate) const CACHED: u8 = 2;
pub(crate) const DEFERRED: u8 = 3;
pub(crate) const QUARANTINED: u8 = 4;
pub(crate) const KEPT: u8 = 5;
pub(crate) const AUDITED: u8 = 6;
pub(crate) const USED: u8 = 7;
pub(crate) const LENT: u8 = 8;

/// A bit of the summary stands for a group of so many slots, to the base 2: one where there are bits for all, eight at most.
const fn group_shift(slots: usize) -> u32 {
    usize::BITS - (slots.saturating_sub(1) / u64::BITS as usize).leading_zeros()
}

/// Groups of so many slots.
const fn groups(slots: usize) -> usize {
    slots.div_ceil(1 << group_shift(slots))
}

/// The two lists that a slab is in: that of slabs about as full, or a home, and that of all.
pub(super) const BY_FULLNESS: usize = 0;
pub(super) const OF_ALL: usize = 1;

/// Neighbours in a list, by their first frames.
#[derive(Debug)]
#[repr(C)]
struct Links {
    next: AtomicU32,
    previous: AtomicU32,
}

/// What a slab knows of itself. The states follow it in memory.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Header {
    /// A bit is set where a slot of its group is free.
    summary: AtomicU64,
    links: [Links; 2],
    /// Slots that are not free.
    used: AtomicU16,
    /// Which of the lists other than that of all it is in.
    list: AtomicU16,
    /// The link in the list of slabs with objects that were freed in an NMI.
    deferred: AtomicU32,
}

const _: () = assert!(size_of::<Header>() == 32);

/// Changes the state of a slot, if it is `from`. Interrupts are off, or this has the object for itself.
#[inline]
pub(super) fn change(slot: &AtomicU8, from: u8, to: u8) -> bool {
    let is_right = slot.load(Relaxed) == from;
    if is_right {
        slot.store(to, Relaxed);
    }
    is_right
}

/// Takes a slot from its user: from `state` to `to`. Of several that try at once, one succeeds. `Err` says what the state is.
#[inline]
pub(super) fn claim(slot: &AtomicU8, state: u8, to: u8) -> Result<(), u8> {
    slot.compare_exchange(state, to, Relaxed, Relaxed).map(|_| ())
}

/// A slab in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slab<'a> {
    header: &'a Header,
    states: &'a [AtomicU8],
    start: *mut u8,
    /// Bytes from the start to the first slot.
    first_slot: usize,
    geometry: &'a Geometry,
}

impl<'a> Slab<'a> {
    /// Makes page frames a slab with every slot free and raw.
    ///
    /// # Safety
    ///
    /// There are `geometry.header_bytes()` bytes at `header`, aligned to 8, which are the caller's alone.
    pub(crate) unsafe fn create(header: *mut u8, geometry: &Geometry) {
        let groups = groups(geometry.slots);
        let value = Header {
            links: [const { Links { next: AtomicU32::new(Frame::NONE), previous: AtomicU32::new(Frame::NONE) } }; 2],
            deferred: AtomicU32::new(NOT_LISTED),
            used: AtomicU16::new(0),
            list: AtomicU16::new(0),
            summary: AtomicU64::new(u64::MAX >> (u64::BITS as usize - groups)),
        };
        // SAFETY: the header and the states behind it are the caller's to give, and aligned.
        unsafe {
            header.cast::<Header>().write(value);
            header.add(size_of::<Header>()).write_bytes(RAW, geometry.slots);
        }
    }

    /// The slab of the frames at `start`.
    ///
    /// # Safety
    ///
    /// [`create`](Self::create) made the header there for the same geometry, and it is not freed while this is used.
    #[inline]
    pub(crate) unsafe fn at(start: *mut u8, place: SlabPlace, geometry: &'a Geometry) -> Self {
        let first_slot = geometry.finder.round((place.first_slot as usize).wrapping_sub(start.addr()));
        // SAFETY: `create` has written header and states, and nobody makes an exclusive reference to them.
        unsafe {
            let states = core::slice::from_raw_parts(place.header.add(size_of::<Header>()).cast(), geometry.slots);
            Self { header: &*place.header.cast(), states, start, first_slot, geometry }
        }
    }

    /// The state of the slot whose object starts at `object`, which points into the slab.
    ///
    /// # Safety
    ///
    /// As [`at`](Self::at), of the slab that is there.
    #[inline]
    pub(crate) unsafe fn state_of(object: *const u8, place: SlabPlace, finder: &SlotFinder) -> Option<&'a AtomicU8> {
        let slot = finder.at(object.addr().wrapping_sub(place.first_slot as usize))?;
        // SAFETY: `create` has written a state for each slot, and nobody makes an exclusive reference to one.
        Some(unsafe { &*place.header.add(size_of::<Header>() + slot).cast() })
    }

    /// Takes free slots until `rounds` are filled, and says how many, and whether the object of the last is constructed. Which
    /// slot each time, `random` says; 0 for the first.
    pub(super) fn take(self, rounds: &mut [Round], random: impl Fn() -> u32) -> (usize, bool) {
        let (mut taken, mut constructed) = (0, false);
        let (mut summary, shift) = (self.header.summary.load(Relaxed), self.group_shift());
        let groups = groups(self.states.len());
        for round in rounds {
            if summary == 0 {
                break;
            }
            let random = random();
            // The first group from one on that is as likely as any other.
            let first = (u64::from(random) * groups as u64) >> u32::BITS;
            let behind = summary & (u64::MAX << first);
            let group = if behind == 0 { summary } else { behind }.trailing_zeros() as usize;
            let states = self.group(group);
            let Some(slot) = choose(states, random >> 16) else { break };
            constructed = mark_taken(&states[slot]);
            *round = Round { object: self.object((group << shift) + slot), state: &raw const states[slot] };
            if !states.iter().any(is_free) {
                summary &= !(1 << group);
            }
            taken += 1;
        }
        self.header.summary.store(summary, Relaxed);
        self.header.used.store((self.used() + taken) as u16, Relaxed);
        (taken, constructed)
    }

    /// Takes a free slot whose object is constructed.
    pub(super) fn take_constructed(self) -> Option<Round> {
        let slot = self.states.iter().position(|state| state.load(Relaxed) == FREE)?;
        self.take_slot(slot);
        Some(self.round(slot))
    }

    fn round(self, slot: usize) -> Round {
        Round { object: self.object(slot), state: &raw const self.states[slot] }
    }

    /// Takes this slot, if it is free and constructed.
    pub(super) fn take_this(self, slot: usize) -> bool {
        let free = self.states[slot].load(Relaxed) == FREE;
        if free {
            self.take_slot(slot);
        }
        free
    }

    /// Takes this slot, which is free.
    fn take_slot(self, slot: usize) {
        mark_taken(&self.states[slot]);
        let group = slot >> self.group_shift();
        if !self.group(group).iter().any(is_free) {
            let summary = self.header.summary.load(Relaxed);
            self.header.summary.store(summary & !(1 << group), Relaxed);
        }
        self.header.used.store(self.used() as u16 + 1, Relaxed);
    }

    /// Takes back a slot that is [`CACHED`] or [`DEFERRED`].
    pub(super) fn put(self, slot: usize, constructed: bool) {
        self.states[slot].store(if constructed { FREE } else { RAW }, Relaxed);
        let summary = self.header.summary.load(Relaxed);
        self.header.summary.store(summary | 1 << (slot >> self.group_shift()), Relaxed);
        self.header.used.store(self.used() as u16 - 1, Relaxed);
    }

    /// Whether nothing has written over the header, as far as can be said at a glance.
    pub(super) fn is_sound(self) -> bool {
        self.used() <= self.geometry.slots
    }

    /// Slots that are not free.
    pub(super) fn used(self) -> usize {
        self.header.used.load(Relaxed) as usize
    }

    /// The state of each slot.
    #[inline]
    pub(super) fn states(self) -> &'a [AtomicU8] {
        self.states
    }

    /// The slot whose object starts at `object`.
    #[inline]
    pub(super) fn slot_of(self, object: *const u8) -> Option<usize> {
        self.geometry.finder.at(self.distance(object))
    }

    /// How far behind the first slot `pointer` is, round the block.
    pub(super) fn distance(self, pointer: *const u8) -> usize {
        self.geometry.finder.round(pointer.addr().wrapping_sub(self.start.addr() + self.first_slot))
    }

    /// The object in a slot.
    #[inline]
    pub(super) fn object(self, slot: usize) -> *mut u8 {
        self.start.wrapping_add(self.geometry.finder.round(self.first_slot + slot * self.geometry.stride))
    }

    /// The slab behind it in one of its two lists.
    pub(super) fn next(self, list: usize) -> Option<Frame> {
        Frame::some(self.header.links[list].next.load(Relaxed))
    }

    /// The slab before it.
    pub(super) fn previous(self, list: usize) -> Option<Frame> {
        Frame::some(self.header.links[list].previous.load(Relaxed))
    }

    pub(super) fn set_next(self, list: usize, next: Option<Frame>) {
        self.header.links[list].next.store(next.map_or(Frame::NONE, Frame::number), Relaxed);
    }

    pub(super) fn set_previous(self, list: usize, previous: Option<Frame>) {
        self.header.links[list].previous.store(previous.map_or(Frame::NONE, Frame::number), Relaxed);
    }

    /// Which of the lists other than that of all it is in.
    pub(super) fn list(self) -> usize {
        self.header.list.load(Relaxed) as usize
    }

    pub(super) fn set_list(self, list: usize) {
        self.header.list.store(list as u16, Relaxed);
    }

    /// The link in the list of slabs with objects that were freed in an NMI.
    pub(crate) fn deferred_link(self) -> &'a AtomicU32 {
        &self.header.deferred
    }

    /// Lets a test write over the count.
    #[cfg(test)]
    pub(super) fn set_used(self, used: u16) {
        self.header.used.store(used, Relaxed);
    }

    /// Lets a test write over all of the header.
    #[cfg(test)]
    pub(super) fn overwrite(self, byte: u8) {
        let word = u32::from_ne_bytes([byte; 4]);
        for links in &self.header.links {
            links.next.store(word, Relaxed);
            links.previous.store(word, Relaxed);
        }
        self.header.deferred.store(word, Relaxed);
        self.header.used.store(word as u16, Relaxed);
        self.header.list.store(word as u16, Relaxed);
        self.header.summary.store(u64::from(word) << 32 | u64::from(word), Relaxed);
    }

    /// Whether used count and summary are those of the states.
    pub(super) fn is_consistent(self) -> bool {
        let free = self.states.iter().filter(|state| is_free(state)).count();
        let groups = 0..groups(self.states.len());
        let summary =
            groups.filter(|&group| self.group(group).iter().any(is_free)).fold(0, |bits, group| bits | 1 << group);
        self.used() == self.states.len() - free && self.header.summary.load(Relaxed) == summary
    }

    /// The states of a group; of none, where there is none with this number.
    fn group(self, group: usize) -> &'a [AtomicU8] {
        let shift = self.group_shift();
        let rest = self.states.get(group << shift..).unwrap_or_default();
        &rest[..rest.len().min(1 << shift)]
    }

    fn group_shift(self) -> u32 {
        group_shift(self.states.len())
    }
}

/// A free slot of a group, the first from where `random` says on, of 16 bits; 0 for the start.
fn choose(states: &[AtomicU8], random: u32) -> Option<usize> {
    let (before, from) = states.split_at((random as usize * states.len()) >> 16);
    let found = from.iter().position(is_free).map(|slot| before.len() + slot);
    found.or_else(|| before.iter().position(is_free))
}

/// Makes a free slot [`CACHED`], which only the holder of the lock may, and says whether it was constructed.
fn mark_taken(state: &AtomicU8) -> bool {
    let constructed = state.load(Relaxed) == FREE;
    state.store(CACHED, Relaxed);
    constructed
}

fn is_free(state: &AtomicU8) -> bool {
    state.load(Relaxed) <= FREE
}
