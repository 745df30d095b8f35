//! How objects lie in a slab. Bonwick 1994, section 3.2, with the slab's data at its end and a bitmap for a free list.

#![forbid(unsafe_code)]

use super::slab::Header;
use crate::frames::Order;

/// The largest slab: 32 KiB.
const LARGEST_SLAB: u32 = 3;

/// Slots that a word of the bitmap covers.
pub(crate) const SLOTS_PER_WORD: usize = u64::BITS as usize;

/// The layout of the slabs of one cache, which follows from the size of its objects:
///
/// ```text
/// | slot 0 | slot 1 | ... | slot n-1 | unused | header | bitmap, one bit a slot |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) object_size: usize,
    pub(crate) order: Order,
    pub(crate) slots: usize,
    /// 2^32 / `object_size`, rounded up: an offset times this, shifted down, is the offset divided by the size.
    reciprocal: u64,
}

impl Geometry {
    /// The smallest slab that loses at most an eighth of itself, or else the largest.
    pub(crate) const fn new(object_size: usize) -> Self {
        let mut order = 0;
        loop {
            let Some(candidate) = Order::new(order) else { panic!("no such order") };
            let slots = slots_in(candidate.bytes(), object_size);
            let lost = candidate.bytes() - slots * object_size;
            if lost * 8 <= candidate.bytes() || order == LARGEST_SLAB {
                assert!(slots > 0, "the object is larger than a slab");
                let reciprocal = (1_u64 << 32).div_ceil(object_size as u64);
                return Self { object_size, order: candidate, slots, reciprocal };
            }
            order += 1;
        }
    }

    /// Words in the bitmap.
    pub(crate) const fn words(&self) -> usize {
        self.slots.div_ceil(SLOTS_PER_WORD)
    }

    /// Where the header is.
    pub(crate) const fn header_offset(&self) -> usize {
        self.order.bytes() - trailer(self.slots)
    }

    /// The slot that starts `offset` bytes into the slab; `None` where none does.
    pub(crate) fn slot_at(&self, offset: usize) -> Option<usize> {
        if offset >= self.order.bytes() {
            return None;
        }
        // Exact here: the product exceeds the true quotient by less than offset / 2^32.
        let slot = ((offset as u64 * self.reciprocal) >> 32) as usize;
        (slot < self.slots && slot * self.object_size == offset).then_some(slot)
    }
}

/// Bytes that header and bitmap of so many slots take.
const fn trailer(slots: usize) -> usize {
    size_of::<Header>() + slots.div_ceil(SLOTS_PER_WORD) * size_of::<u64>()
}

const fn slots_in(slab: usize, object_size: usize) -> usize {
    let mut slots = slab / object_size;
    while slots > 0 && slots * object_size + trailer(slots) > slab {
        slots -= 1;
    }
    slots
}
