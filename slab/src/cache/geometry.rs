//! How objects lie in a slab. Bonwick 1994, section 3.2, with a byte of state a slot instead of a free list.
//!
//! Objects share their slab with what describes it, unless they are larger than [`IN_SLAB`] bytes and that would take the
//! room of one of them: then it lies elsewhere (*off-slab*).
//!
//! ```text
//! | ... | slot n-1 | header | state 0 | state 1 | ... | unused | slot 0 | slot 1 | ...
//! ```
//!
//! A slab is as few page frames as lose less than an eighth of themselves, and have at least [`FEW`] objects if [`FEW`] frames
//! are enough for that: making a slab costs as much as allocating ten objects. Where that is not one frame, which is
//! to be had as long as any is, one of larger objects is as few as lose less than a twentieth, if up to [`MANY_FRAMES`] do.
//!
//! So that slabs do not compete for the same cache lines, they have *colours*: the header of one lies a few objects later
//! than that of the slab before, and slots go round, from behind the header to before it. Where a slab is not a power of two of
//! frames, or its header is elsewhere, what is lost is used: its objects start a little later than those of the slab before, and
//! the header, if it is there, is the last thing in it.
//!
//! The slabs of the heap's size classes; lost is what no object has, header and states included, also where they are
//! elsewhere:
//!
//! | bytes | KiB a slab | objects | bytes lost | % | colours |
//! |---|---|---|---|---|---|
//! | 8 | 4 | 451 | 488 | 11.9 | 57 |
//! | 16 | 4 | 239 | 272 | 6.6 | 60 |
//! | 24 | 4 | 162 | 208 | 5.1 | 21 |
//! | 32 | 4 | 123 | 160 | 3.9 | 62 |
//! | 40 | 4 | 99 | 136 | 3.3 | 13 |
//! | 48 | 4 | 82 | 160 | 3.9 | 21 |
//! | 56 | 4 | 71 | 120 | 2.9 | 9 |
//! | 64 | 4 | 62 | 128 | 3.1 | 63 |
//! | 72 | 4 | 55 | 136 | 3.3 | 7 |
//! | 80 | 4 | 50 | 96 | 2.3 | 13 |
//! | 88 | 4 | 45 | 136 | 3.3 | 6 |
//! | 96 | 4 | 41 | 160 | 3.9 | 21 |
//! | 104 | 4 | 38 | 144 | 3.5 | 5 |
//! | 112 | 4 | 35 | 176 | 4.3 | 9 |
//! | 120 | 4 | 33 | 136 | 3.3 | 5 |
//! | 128 | 4 | 31 | 128 | 3.1 | 32 |
//! | 144 | 4 | 28 | 64 | 1.6 | 8 |
//! | 160 | 4 | 25 | 96 | 2.3 | 13 |
//! | 176 | 4 | 22 | 224 | 5.5 | 6 |
//! | 192 | 4 | 21 | 64 | 1.6 | 22 |
//! | 208 | 4 | 19 | 144 | 3.5 | 5 |
//! | 224 | 4 | 18 | 64 | 1.6 | 10 |
//! | 240 | 4 | 16 | 256 | 6.2 | 5 |
//! | 256 | 4 | 15 | 256 | 6.2 | 16 |
//! | 288 | 4 | 14 | 64 | 1.6 | 8 |
//! | 320 | 4 | 12 | 256 | 6.2 | 13 |
//! | 352 | 4 | 11 | 224 | 5.5 | 6 |
//! | 384 | 4 | 10 | 256 | 6.2 | 11 |
//! | 416 | 4 | 9 | 352 | 8.6 | 5 |
//! | 448 | 4 | 9 | 64 | 1.6 | 10 |
//! | 480 | 4 | 8 | 256 | 6.2 | 5 |
//! | 512 | 8 | 15 | 512 | 6.2 | 16 |
//! | 576 | 4 | 7 | 64 | 1.6 | 8 |
//! | 640 | 4 | 6 | 256 | 6.2 | 7 |
//! | 704 | 12 | 17 | 320 | 2.6 | 5 |
//! | 768 | 4 | 5 | 256 | 6.2 | 6 |
//! | 832 | 16 | 19 | 576 | 3.5 | 20 |
//! | 896 | 8 | 9 | 128 | 1.6 | 10 |
//! | 960 | 4 | 4 | 256 | 6.2 | 5 |
//! | 1024 | 4 | 4 | 64 | 1.6 | 1 |
//! | 1152 | 8 | 7 | 128 | 1.6 | 8 |
//! | 1280 | 20 | 16 | 64 | 0.3 | 1 |
//! | 1408 | 20 | 14 | 768 | 3.8 | 6 |
//! | 1536 | 12 | 8 | 64 | 0.5 | 1 |
//! | 1664 | 20 | 12 | 512 | 2.5 | 4 |
//! | 1792 | 16 | 9 | 256 | 1.6 | 10 |
//! | 1920 | 32 | 17 | 128 | 0.4 | 18 |
//! | 2048 | 8 | 4 | 64 | 0.8 | 1 |
//! | 2304 | 16 | 7 | 256 | 1.6 | 8 |
//! | 2560 | 20 | 8 | 64 | 0.3 | 1 |
//! | 2816 | 20 | 7 | 768 | 3.8 | 3 |
//! | 3072 | 12 | 4 | 64 | 0.5 | 1 |
//! | 3328 | 20 | 6 | 512 | 2.5 | 2 |
//! | 3584 | 28 | 8 | 64 | 0.2 | 1 |
//! | 3840 | 16 | 4 | 1024 | 6.2 | 5 |
//! | 4096 | 16 | 4 | 64 | 0.4 | 1 |
//! | 4608 | 28 | 6 | 1024 | 3.6 | 2 |
//! | 5120 | 20 | 4 | 64 | 0.3 | 1 |
//! | 5632 | 28 | 5 | 512 | 1.8 | 1 |
//! | 6144 | 12 | 2 | 64 | 0.5 | 1 |
//! | 6656 | 20 | 3 | 512 | 2.5 | 1 |
//! | 7168 | 28 | 4 | 64 | 0.2 | 1 |
//! | 7680 | 8 | 1 | 512 | 6.2 | 2 |
//! | 8192 | 8 | 1 | 64 | 0.8 | 1 |

#![forbid(unsafe_code)]

use core::alloc::Layout;

use super::shared::metadata_block;
use super::slab::Header;
use super::slabs::BANDS;
use crate::frames::{Frame, Order, SlabOwner};
use crate::memory::FRAME_SIZE;

/// The largest object that shares its slab with the slab's header in any case: an eighth of a page, as in the paper.
pub(crate) const IN_SLAB: usize = FRAME_SIZE / 8;

/// So many objects a slab has, if so many page frames can hold them.
const FEW: usize = 4;

/// A slab does not take more frames than this because it would lose less.
const MANY_FRAMES: usize = 8;

/// The most slots in a slab: the header's summary has a bit for eight of them.
const MOST_SLOTS: usize = 512;

/// The same where the header is off-slab.
const MOST_SLOTS_OFF_SLAB: usize = 64;

/// The most frames in a slab: 4 MiB.
const MOST_FRAMES: usize = 1024;

/// The largest alignment of an object: 2 MiB.
const LARGEST_ALIGNMENT: usize = 2 << 20;

/// A cache line.
const LINE: usize = 64;

/// The smallest distance between two slots.
const SMALLEST: usize = 8;

/// The layout of the slabs of one cache, which follows from the layout of its objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// From one slot to the next: the size of an object, rounded up to its alignment.
    pub(crate) stride: usize,
    pub(crate) align: usize,
    /// Page frames in a slab.
    pub(crate) frames: u32,
    /// The smallest block that holds a slab.
    size: Order,
    /// The slab is aligned to this order.
    pub(crate) order: Order,
    pub(crate) slots: usize,
    /// 2^32 times the [`BANDS`] by the slots, rounded down: so much fuller a slab is by one object.
    pub(crate) bands_a_slot: usize,
    /// How many different places there are for the first slot.
    pub(crate) colours: u32,
    pub(crate) off_slab: bool,
    pub(crate) finder: SlotFinder,
    /// From one colour to the next.
    step: usize,
}

/// Where things are in a slab of one colour, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Places {
    /// The header, if it is in the slab.
    pub(crate) header: usize,
    pub(crate) first_slot: usize,
}

/// What finds a slot: in one cache line, for the sake of frees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(align(32))]
pub(crate) struct SlotFinder {
    /// 2^64 / stride, rounded up. An offset times this has the quotient in its upper half, and a lower half below this
    /// where nothing is left over (Lemire, Kaser & Kurz 2019, "Faster remainder by direct computation").
    reciprocal: u64,
    count: u32,
    /// What the records of the slabs' frames say.
    pub(crate) owner: SlabOwner,
    /// Slots go round the block.
    block_mask: u32,
}

const _: () = assert!(size_of::<SlotFinder>() == 32);

impl SlotFinder {
    /// The slot that starts `distance` bytes after the first, round the block; `None` where none does.
    #[inline]
    pub(crate) fn at(&self, distance: usize) -> Option<usize> {
        let product = u128::from(self.round(distance) as u32) * u128::from(self.reciprocal);
        let slot = (product >> 64) as u32;
        ((product as u64) < self.reciprocal && slot < self.count).then_some(slot as usize)
    }

    /// A distance in a slab that starts where a block does, which may have gone round that.
    #[inline]
    pub(crate) const fn round(&self, distance: usize) -> usize {
        distance & self.block_mask as usize
    }
}

impl Geometry {
    /// One page, which is one object.
    pub(crate) const PAGE: Self = match Self::with(FRAME_SIZE, FRAME_SIZE, 1, 1, true) {
        Some(geometry) => geometry,
        None => panic!("an order for a page"),
    };

    /// For objects of this layout; `None` where it is empty, or no slab is large enough.
    pub(crate) const fn new(object: Layout) -> Option<Self> {
        let align = if object.align() < SMALLEST { SMALLEST } else { object.align() };
        if object.size() == 0 || object.size() > MOST_FRAMES * FRAME_SIZE || align > LARGEST_ALIGNMENT {
            return None;
        }
        let stride = object.size().next_multiple_of(align);
        let least = if stride <= FRAME_SIZE { FEW } else { 1 };
        let mut frames = stride.div_ceil(FRAME_SIZE);
        let mut fewest = None;
        while frames <= MOST_FRAMES {
            let bytes = frames * FRAME_SIZE;
            let off_slab = stride > IN_SLAB && slots_in(bytes, stride, false) < slots_in(bytes, stride, true);
            let slots = slots_in(bytes, stride, off_slab);
            let lost = bytes - slots * stride + if off_slab { metadata_block(header_bytes(slots)) } else { 0 };
            if slots >= least && lost * 8 < bytes {
                let found = Self::with(stride, align, frames as u32, slots, off_slab);
                if frames == 1 || stride <= IN_SLAB || lost * 20 < bytes {
                    return found;
                }
                if fewest.is_none() {
                    fewest = found;
                }
            }
            if frames >= MANY_FRAMES && fewest.is_some() {
                break;
            }
            frames += 1;
        }
        fewest
    }

    const fn with(stride: usize, align: usize, frames: u32, slots: usize, off_slab: bool) -> Option<Self> {
        let (Some(size), Some(alignment)) =
            (Order::containing(frames), Order::containing(align.div_ceil(FRAME_SIZE) as u32))
        else {
            return None;
        };
        let order = if size.get() < alignment.get() { alignment } else { size };
        let block_mask = (size.bytes() - 1) as u32;
        let finder = SlotFinder {
            reciprocal: u64::MAX / stride as u64 + 1,
            count: slots as u32,
            owner: SlabOwner::NONE,
            block_mask,
        };
        let (step, room) = if goes_round(frames, off_slab) {
            (objects_of_a_colour(stride, slots) * stride, slots * stride)
        } else {
            let header = if off_slab { 0 } else { header_bytes(slots) };
            (align, frames as usize * FRAME_SIZE - header - slots * stride)
        };
        let colours = (room / step) as u32 + 1;
        let bands_a_slot = (BANDS << 32) / slots;
        Some(Self { stride, align, frames, size, order, slots, bands_a_slot, colours, off_slab, finder, step })
    }

    /// Where things are in a slab of a colour, of which there are [`colours`](Self::colours).
    pub(crate) const fn places(&self, colour: u32) -> Places {
        let shift = colour as usize * self.step;
        if goes_round(self.frames, self.off_slab) {
            let gap = self.bytes() - self.slots * self.stride;
            Places { header: shift, first_slot: self.finder.round(shift + gap) }
        } else {
            Places { header: self.bytes() - self.header_bytes(), first_slot: shift }
        }
    }

    /// Bytes in a slab.
    #[inline]
    pub(crate) const fn bytes(&self) -> usize {
        self.frames as usize * FRAME_SIZE
    }

    /// Bytes of header and states.
    #[inline]
    pub(crate) const fn header_bytes(&self) -> usize {
        header_bytes(self.slots)
    }

    /// The same for the cache with this number.
    pub(crate) const fn for_cache(mut self, cache: u32) -> Self {
        self.finder.owner = SlabOwner::new(cache, self.size);
        self
    }

    /// The first frame of the slab that this cache has around `frame`.
    pub(crate) const fn first_of(&self, frame: Frame) -> Frame {
        frame.block_start(self.size)
    }
}

/// Whether the header's place is the colour, and slots go round; or else the first slot's place is the colour.
const fn goes_round(frames: u32, off_slab: bool) -> bool {
    !off_slab && frames.is_power_of_two()
}

/// How many objects further on a header lies from colour to colour: at the start of a cache line again, if that leaves a few
/// colours.
const fn objects_of_a_colour(stride: usize, slots: usize) -> usize {
    let mut objects = LINE >> if stride.is_multiple_of(LINE) { LINE.trailing_zeros() } else { stride.trailing_zeros() };
    while objects > 1 && slots / objects < FEW {
        objects /= 2;
    }
    objects
}

/// Bytes that header and states of so many slots take.
const fn header_bytes(slots: usize) -> usize {
    size_of::<Header>() + slots.next_multiple_of(align_of::<Header>())
}

const fn slots_in(bytes: usize, stride: usize, off_slab: bool) -> usize {
    let most = if off_slab { MOST_SLOTS_OFF_SLAB } else { MOST_SLOTS };
    let mut slots = bytes / stride;
    if slots > most {
        slots = most;
    }
    while !off_slab && slots > 0 && slots * stride + header_bytes(slots) > bytes {
        slots -= 1;
    }
    slots
}
