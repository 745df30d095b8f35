//! Size classes: which cache serves a request.
//!
//! Up to 128 bytes the classes are 8 bytes apart, above that an eighth of the power of two below them. So a request above
//! 64 bytes wastes less than an eighth of its block. What is larger than [`LARGEST`] gets whole page frames.

#![forbid(unsafe_code)]

use core::alloc::Layout;

use crate::frames::Order;
use crate::memory::FRAME_SIZE;

/// The largest class, in bytes.
pub(crate) const LARGEST: usize = 2048;

/// How many classes there are.
pub(crate) const COUNT: usize = 48;

/// Classes up to here are [`STEP`] apart.
const LINEAR: usize = 128;
const STEP: usize = 8;
/// Classes in each doubling above [`LINEAR`], as a power of two.
const STEPS_LOG: u32 = 3;

/// Bytes in the objects of each class.
pub(crate) const SIZES: [usize; COUNT] = {
    let mut sizes = [0; COUNT];
    let (mut index, mut size, mut step) = (0, STEP, STEP);
    while index < COUNT {
        sizes[index] = size;
        if size >= LINEAR && size.is_power_of_two() {
            step = size >> STEPS_LOG;
        }
        size += step;
        index += 1;
    }
    assert!(sizes[COUNT - 1] == LARGEST);
    sizes
};

/// The smallest class of at least `size` bytes, which is 1 to [`LARGEST`].
pub(crate) const fn class_of(size: usize) -> usize {
    if size <= LINEAR {
        return size.div_ceil(STEP) - 1;
    }
    let below = (size - 1).ilog2();
    let step = below - STEPS_LOG;
    let linear_classes = LINEAR / STEP;
    let doublings = (below - LINEAR.ilog2()) as usize;
    linear_classes + (doublings << STEPS_LOG) + (((size - 1) >> step) & ((1 << STEPS_LOG) - 1))
}

/// What serves a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Block {
    /// An object of the cache of this class.
    Class(usize),
    /// So many page frames, the first aligned to this order.
    Frames { count: u32, alignment: Order },
}

impl Block {
    /// What serves `layout`; `None` where nothing can. An empty layout gets a byte.
    pub(crate) fn of(layout: Layout) -> Option<Self> {
        // A class that is a multiple of the alignment is aligned, since slots follow each other from the start of a page.
        let size = layout.size().max(1).checked_next_multiple_of(layout.align())?;
        if size <= LARGEST {
            return Some(Self::Class(class_of(size)));
        }
        let count = u32::try_from(layout.size().max(1).div_ceil(FRAME_SIZE)).ok()?;
        let alignment = Order::containing(u32::try_from(layout.align().div_ceil(FRAME_SIZE)).ok()?)?;
        Some(Self::Frames { count, alignment })
    }

    /// Bytes that the block really has.
    pub(crate) fn size(self) -> usize {
        match self {
            Self::Class(class) => SIZES[class],
            Self::Frames { count, .. } => count as usize * FRAME_SIZE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_gets_the_smallest_class_that_holds_it() {
        for size in 1..=LARGEST {
            let class = class_of(size);
            assert!(SIZES[class] >= size, "{size}");
            assert!(class == 0 || SIZES[class - 1] < size, "{size}");
        }
    }

    #[test]
    fn above_128_bytes_less_than_an_eighth_is_lost() {
        for size in 129..=LARGEST {
            let lost = SIZES[class_of(size)] - size;
            assert!(lost * 8 < size, "{size} loses {lost}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
    fn a_class_is_a_multiple_of_the_alignment_it_serves() {
        for size in 0..=LARGEST {
            for align in (0..=11).map(|log| 1 << log) {
                let layout = Layout::from_size_align(size, align).unwrap();
                match Block::of(layout).unwrap() {
                    Block::Class(class) => assert_eq!(SIZES[class] % align, 0, "{layout:?}"),
                    Block::Frames { count, .. } => assert_eq!(count, 1, "{layout:?}"),
                }
            }
        }
    }

    #[test]
    fn large_blocks_are_counted_in_frames_and_aligned_by_order() {
        let block = |size, align| Block::of(Layout::from_size_align(size, align).unwrap());
        let frames = |count, order| Some(Block::Frames { count, alignment: Order::new(order).unwrap() });
        assert_eq!(block(2049, 8), frames(1, 0));
        assert_eq!(block(4097, 8), frames(2, 0));
        assert_eq!(block(8, 4096), frames(1, 0));
        assert_eq!(block(8, 2 << 20), frames(1, 9));
        assert_eq!(block(3 << 20, 1 << 30), frames(768, 18));
    }

    #[test]
    fn what_no_block_can_hold_is_refused() {
        let block = |size, align| Block::of(Layout::from_size_align(size, align).unwrap());
        assert_eq!(block(8, 2 << 30), None, "aligned to more than the largest order");
        assert_eq!(block(isize::MAX as usize, 1), None, "near isize::MAX");
        assert_eq!(block(1 << 45, 1), None, "more frames than there can be");
    }
}
