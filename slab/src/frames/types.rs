//! Numbers with a meaning: frames and orders.

#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;

use crate::memory::FRAME_SIZE;

/// A page frame: 4096 bytes of physical memory, by its number (physical address / 4096).
///
/// The default is frame 0, which is never handed out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(u32);

impl Frame {
    /// Frame numbers end before this, and so managed memory at 16 TiB (less a page).
    pub const LIMIT: u32 = u32::MAX;

    /// Stands for no frame in a record.
    pub(crate) const NONE: u32 = u32::MAX;

    #[inline]
    pub(crate) const fn new(number: u32) -> Self {
        Self(number)
    }

    pub(crate) fn some(number: u32) -> Option<Self> {
        (number != Self::NONE).then_some(Self(number))
    }

    /// The frame that contains the physical address; `None` from 16 TiB (less a page) on.
    #[inline]
    pub fn containing(address: u64) -> Option<Self> {
        u32::try_from(address / FRAME_SIZE as u64).ok().and_then(Self::some)
    }

    /// The physical address of its first byte.
    #[inline]
    pub const fn address(self) -> u64 {
        self.0 as u64 * FRAME_SIZE as u64
    }

    /// Physical address / 4096.
    #[inline]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The frame `frames` further on.
    pub(crate) const fn offset(self, frames: u32) -> Self {
        Self(self.0.saturating_add(frames))
    }

    /// The block that would merge with the block of `order` at this frame.
    pub(crate) const fn buddy(self, order: Order) -> Self {
        Self(self.0 ^ order.frames())
    }

    /// Where the block of `order` around this frame starts.
    #[inline]
    pub(crate) const fn block_start(self, order: Order) -> Self {
        Self(self.0 & !(order.frames() - 1))
    }

    /// The largest order that this frame is aligned to.
    pub(crate) fn alignment(self) -> Order {
        Order(self.0.trailing_zeros()).min(Order::MAX)
    }
}

/// How many frames there are in `range`.
pub(crate) fn length(range: &Range<Frame>) -> u32 {
    range.end.number().saturating_sub(range.start.number())
}

/// What `range` and `other` share; empty where they share nothing.
pub(crate) fn overlap(range: &Range<Frame>, other: &Range<Frame>) -> Range<Frame> {
    range.start.max(other.start)..range.end.min(other.end)
}

/// The frames of `range`, one after the other.
pub(crate) fn each(range: Range<Frame>) -> impl Iterator<Item = Frame> {
    (range.start.number()..range.end.number()).map(Frame)
}

/// The size of a block: order k is 2^k frames in a row, aligned to their size. From 0 (4 KiB) to 18 (1 GiB).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u32);

impl Order {
    /// One frame: 4 KiB.
    pub const ZERO: Self = Self(0);

    /// 2 MiB, as a large page needs it.
    pub const LARGE_PAGE: Self = Self(9);

    /// The largest order: 1 GiB.
    pub const MAX: Self = Self(18);

    /// How many orders there are.
    pub const COUNT: usize = Self::MAX.0 as usize + 1;

    /// Order `order`; `None` above [`MAX`](Self::MAX).
    #[inline]
    pub const fn new(order: u32) -> Option<Self> {
        if order <= Self::MAX.0 { Some(Self(order)) } else { None }
    }

    /// The smallest order of at least `count` frames; `None` where `count` is 0 or more than a block can have.
    pub const fn containing(count: u32) -> Option<Self> {
        match count.checked_next_power_of_two() {
            Some(frames) if count > 0 => Self::new(frames.trailing_zeros()),
            _ => None,
        }
    }

    /// The largest order of at most `count` frames, which is not 0.
    pub(crate) fn within(count: u32) -> Self {
        Self(count.ilog2()).min(Self::MAX)
    }

    /// Its number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Frames in a block: 2^order.
    #[inline]
    pub const fn frames(self) -> u32 {
        1 << self.0
    }

    /// Bytes in a block.
    pub const fn bytes(self) -> usize {
        FRAME_SIZE << self.0
    }

    pub(crate) fn larger(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    /// Every order from this one up.
    pub(crate) fn and_up(self) -> impl Iterator<Item = Self> {
        (self.0..=Self::MAX.0).map(Self)
    }

    /// The order below this one, or order 0.
    pub(crate) fn smaller(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
