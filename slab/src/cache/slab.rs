//! One slab: a block of page frames cut into slots for equal objects.
//!
//! The bitmap has a bit a slot, set while the slot is free. It is the free list and, because it lies outside the objects,
//! also what refuses a double free; an object's bytes are nobody's but its user's.
//!
//! Lock: all of it belongs to the cache's lock, but for the bytes of allocated objects.

use crate::frames::Frame;

use super::geometry::{Geometry, SLOTS_PER_WORD};

/// What a slab knows of itself.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Header {
    /// Neighbours in the cache's list of partial slabs, by their first frames.
    pub(crate) next: Option<Frame>,
    pub(crate) previous: Option<Frame>,
    /// Slots that are allocated.
    pub(crate) used: u32,
}

/// A slab in memory, for as long as its cache's lock is held.
#[derive(Debug)]
pub(crate) struct Slab<'a> {
    start: *mut u8,
    geometry: &'a Geometry,
}

impl<'a> Slab<'a> {
    /// Makes a block of frames a slab with every slot free.
    ///
    /// # Safety
    ///
    /// The block at `start` has the order of `geometry`, and it is the caller's alone.
    pub(crate) unsafe fn create(start: *mut u8, geometry: &'a Geometry) -> Self {
        let slab = Self { start, geometry };
        let header = Header { next: None, previous: None, used: 0 };
        // SAFETY: the header lies inside the block, aligned: its offset is a multiple of its alignment, 4.
        unsafe { slab.header_pointer().write(header) };
        for word in 0..geometry.words() {
            let slots = (geometry.slots - word * SLOTS_PER_WORD).min(SLOTS_PER_WORD);
            // SAFETY: the bitmap ends where the block ends.
            unsafe { slab.word_pointer(word).write(u64::MAX >> (SLOTS_PER_WORD - slots)) };
        }
        slab
    }

    /// The slab at `start`.
    ///
    /// # Safety
    ///
    /// [`create`](Self::create) made it with the same geometry, it has not been freed since, and the caller holds the lock
    /// of its cache for as long as it uses this and has no other `Slab` for it meanwhile.
    pub(crate) unsafe fn at(start: *mut u8, geometry: &'a Geometry) -> Self {
        Self { start, geometry }
    }

    pub(crate) fn header(&mut self) -> &mut Header {
        // SAFETY: `create` has written it, and `self` is the only way to it.
        unsafe { &mut *self.header_pointer() }
    }

    /// Allocates a free slot.
    pub(crate) fn take(&mut self) -> Option<*mut u8> {
        for index in 0..self.geometry.words() {
            let word = self.word(index);
            if *word == 0 {
                continue;
            }
            let slot = index * SLOTS_PER_WORD + word.trailing_zeros() as usize;
            *word &= *word - 1;
            self.header().used += 1;
            return Some(self.start.wrapping_add(slot * self.geometry.object_size));
        }
        None
    }

    /// Frees a slot; `false`, and nothing done, where it is free already.
    pub(crate) fn put(&mut self, slot: usize) -> bool {
        let (word, bit) = (self.word(slot / SLOTS_PER_WORD), 1 << (slot % SLOTS_PER_WORD));
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.header().used -= 1;
        true
    }

    /// Whether a slot is allocated.
    pub(crate) fn is_used(&mut self, slot: usize) -> bool {
        *self.word(slot / SLOTS_PER_WORD) & (1 << (slot % SLOTS_PER_WORD)) == 0
    }

    fn word(&mut self, index: usize) -> &mut u64 {
        assert!(index < self.geometry.words());
        // SAFETY: inside the bitmap, which `create` has written, and `self` is the only way to it.
        unsafe { &mut *self.word_pointer(index) }
    }

    fn header_pointer(&self) -> *mut Header {
        self.start.wrapping_add(self.geometry.header_offset()).cast()
    }

    fn word_pointer(&self, index: usize) -> *mut u64 {
        let bitmap = self.geometry.order.bytes() - self.geometry.words() * size_of::<u64>();
        self.start.wrapping_add(bitmap).cast::<u64>().wrapping_add(index)
    }
}

const _: () = assert!(size_of::<Header>().is_multiple_of(4) && align_of::<Header>() == 4);
