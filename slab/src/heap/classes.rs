//! Size classes: which cache serves a request.
//!
//! Up to 128 bytes the classes are 8 bytes apart, above that an eighth of the power of two below them; see [`SIZES`].
//! What is larger than [`LARGEST`] gets whole page frames, by number and not by order.

#![forbid(unsafe_code)]

use core::alloc::Layout;

use crate::cache::CLASSES;
use crate::frames::Order;
use crate::memory::FRAME_SIZE;

/// The largest class, in bytes.
pub(crate) const LARGEST: usize = 8192;

/// How many classes there are.
pub(crate) const COUNT: usize = CLASSES;

/// Classes up to here are [`STEP`] apart.
const LINEAR: usize = 128;
const STEP: usize = 8;
/// Classes in each doubling above [`LINEAR`], as a power of two.
const STEPS_LOG: u32 = 3;

/// Frames in the largest block.
const MOST_FRAMES: u32 = Order::MAX.frames();

macro_rules! classes {
    ($($size:literal,)*) => {
        /// Bytes in the objects of each size class of a heap, in steps of an eighth of the power of two below:
        ///
        /// | requests of | classes | wasted at most |
        /// |---|---|---|
        /// | 1 to 128 bytes | 8, 16, 24, ... 128 | 7 bytes |
        /// | to 256 bytes | 144, 160, ... 256 | 15 bytes: 10.5 % of the block |
        /// | to 512 bytes | 288, 320, ... 512 | 31 bytes: 10.8 % |
        /// | to 1 KiB | 576, 640, ... 1024 | 63 bytes: 11.0 % |
        /// | to 2 KiB | 1152, 1280, ... 2048 | 127 bytes: 11.1 % |
        /// | to 4 KiB | 2304, 2560, ... 4096 | 255 bytes: 11.1 % |
        /// | to 8 KiB | 4608, 5120, ... 8192 | 511 bytes: 11.1 % |
        /// | above | whole page frames | 4095 bytes |
        ///
        /// An alignment of up to a page rounds the size up to a multiple of it first.
        pub const SIZES: [usize; CLASSES] = [$($size),*];

        /// What the caches of the classes are called, and their sizes.
        pub(crate) const CACHES: [(&str, usize); CLASSES] = [$((concat!("size-", $size), $size)),*];
    };
}

#[rustfmt::skip]
classes! {
    8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128,
    144, 160, 176, 192, 208, 224, 240, 256,
    288, 320, 352, 384, 416, 448, 480, 512,
    576, 640, 704, 768, 832, 896, 960, 1024,
    1152, 1280, 1408, 1536, 1664, 1792, 1920, 2048,
    2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096,
    4608, 5120, 5632, 6144, 6656, 7168, 7680, 8192,
}

/// The smallest class of at least `size` bytes, which is 1 to [`LARGEST`].
#[inline]
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

/// Sizes up to here are looked up in a table. Rounded up to an alignment that no class has, none is so small.
const TABLED: usize = SIZES[COUNT - 2];
const _: () = assert!(TABLED < 2 * FRAME_SIZE);

/// The class of the sizes up to 8, up to 16, ...
const CLASS_OF: [u8; TABLED / STEP] = {
    let mut table = [0; TABLED / STEP];
    let mut index = 0;
    while index < table.len() {
        table[index] = class_of((index + 1) * STEP) as u8;
        index += 1;
    }
    table
};

/// The class that serves `layout`; `None` where that is not to be said so soon.
#[inline]
pub(crate) fn at_once(layout: Layout) -> Option<usize> {
    // The last byte of the size, rounded up to the alignment, which is a power of two. An empty layout has none.
    let last = layout.size().wrapping_sub(1) | (layout.align() - 1);
    Some(usize::from(*CLASS_OF.get(last / STEP)?))
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
    #[inline]
    pub(crate) fn of(layout: Layout) -> Option<Self> {
        // A class that is a multiple of the alignment is aligned, up to a page: slabs start at pages.
        // The alignment is a power of two, and the sum is below 2^64: a layout's size and alignment are.
        let size = (layout.size().max(1) + (layout.align() - 1)) & !(layout.align() - 1);
        if size <= LARGEST && layout.align() <= FRAME_SIZE {
            return Some(Self::Class(class_of(size)));
        }
        let count =
            u32::try_from(layout.size().max(1).div_ceil(FRAME_SIZE)).ok().filter(|&count| count <= MOST_FRAMES)?;
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
    fn the_table_of_the_documentation_is_true() {
        // Of each row: its largest class, what is wasted at most, and of how large a block, in 1/1000.
        let rows = [(128, 7, 875), (256, 15, 105), (512, 31, 108), (1024, 63, 110)];
        let mut least = 1;
        for (largest, most, share) in rows.into_iter().chain([(2048, 127, 111), (4096, 255, 111), (8192, 511, 111)]) {
            let blocks = (least..=largest).map(|size| (size, SIZES[class_of(size)]));
            let wasted = |(size, block): (usize, usize)| (block - size, (block - size) * 1000 / block);
            assert_eq!(blocks.clone().map(|both| wasted(both).0).max(), Some(most), "up to {largest}");
            assert!(blocks.clone().all(|both| wasted(both).1 <= share), "up to {largest}");
            assert_eq!(SIZES[class_of(largest)], largest);
            least = largest + 1;
        }
        let pages = Block::of(Layout::from_size_align(LARGEST + 1, 1).unwrap()).unwrap();
        assert_eq!(pages.size() - (LARGEST + 1), 4095);
    }

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
    fn a_class_is_a_multiple_of_the_alignment_it_serves() {
        for size in 0..=LARGEST {
            for align in (0..=12).map(|log| 1 << log) {
                let layout = Layout::from_size_align(size, align).unwrap();
                match Block::of(layout).unwrap() {
                    Block::Class(class) => assert_eq!(SIZES[class] % align, 0, "{layout:?}"),
                    Block::Frames { .. } => assert!(size.next_multiple_of(align) > LARGEST, "{layout:?}"),
                }
            }
        }
    }

    #[test]
    fn large_blocks_are_counted_in_frames_and_aligned_by_order() {
        let block = |size, align| Block::of(Layout::from_size_align(size, align).unwrap());
        let frames = |count, order| Some(Block::Frames { count, alignment: Order::new(order).unwrap() });
        assert_eq!(block(8193, 8), frames(3, 0));
        assert_eq!(block(12289, 8), frames(4, 0));
        assert_eq!(block(8, 8192), frames(1, 1));
        assert_eq!(block(8, 2 << 20), frames(1, 9));
        assert_eq!(block(3 << 20, 1 << 30), frames(768, 18));
    }

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
    fn the_table_says_what_is_computed_or_nothing() {
        for size in 0..=LARGEST + 1 {
            for align in (0..=14).map(|log| 1 << log) {
                let layout = Layout::from_size_align(size, align).unwrap();
                let computed = match Block::of(layout) {
                    Some(Block::Class(class)) => Some(class),
                    _ => None,
                };
                let tabled = at_once(layout);
                assert!(tabled.is_none() || tabled == computed, "{layout:?}");
                let common = (1..=TABLED).contains(&size) && align <= STEP;
                assert!(!common || tabled.is_some(), "{layout:?}");
            }
        }
        assert_eq!(at_once(Layout::from_size_align(isize::MAX as usize, 1).unwrap()), None);
    }

    #[test]
    fn what_no_block_can_hold_is_refused() {
        let block = |size, align| Block::of(Layout::from_size_align(size, align).unwrap());
        assert_eq!(block(8, 2 << 30), None, "aligned to more than the largest order");
        assert_eq!(block(isize::MAX as usize, 1), None, "near isize::MAX");
        assert_eq!(block((1 << 30) + 1, 1), None, "more than the largest block");
        assert_eq!(block(1 << 45, 1), None, "more frames than there can be");
    }
}
