//! Owned page frames.

use core::fmt;
use core::mem::ManuallyDrop;

use super::{Frame, Frames, Order};
use crate::platform::Platform;

/// Page frames that are freed when this is dropped.
pub struct FrameBlock<'a, P: Platform> {
    frames: &'a Frames<P>,
    frame: Frame,
    count: u32,
}

impl<P: Platform> Frames<P> {
    /// As [`allocate`](Self::allocate), owned.
    pub fn block(&self, order: Order) -> Option<FrameBlock<'_, P>> {
        self.block_run(order.frames(), Order::ZERO)
    }

    /// As [`allocate_run`](Self::allocate_run), owned.
    pub fn block_run(&self, count: u32, alignment: Order) -> Option<FrameBlock<'_, P>> {
        let frame = self.allocate_run(count, alignment)?;
        Some(FrameBlock { frames: self, frame, count })
    }
}

impl<'a, P: Platform> FrameBlock<'a, P> {
    /// The first frame.
    pub fn frame(&self) -> Frame {
        self.frame
    }

    /// How many frames there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The virtual address of the first byte. The bytes are the block's owner's; they are not initialised.
    pub fn pointer(&self) -> *mut u8 {
        self.frames.pointer(self.frame)
    }

    /// First frame and count, which from now on are the caller's to free: by [`Frames::free_run`], or by way of
    /// [`from_raw`](Self::from_raw).
    #[must_use = "the frames are lost where nobody frees them"]
    pub fn into_raw(self) -> (Frame, u32) {
        let block = ManuallyDrop::new(self);
        (block.frame, block.count)
    }

    /// Owns the `count` frames from `frame` on.
    ///
    /// # Safety
    ///
    /// They are a run that `frames` has allocated, and the caller's to free; nobody frees them by another way.
    pub unsafe fn from_raw(frames: &'a Frames<P>, frame: Frame, count: u32) -> Self {
        Self { frames, frame, count }
    }
}

impl<P: Platform> Drop for FrameBlock<'_, P> {
    fn drop(&mut self) {
        // SAFETY: the block is allocated and its owner's, who gives it up.
        unsafe { self.frames.free_run(self.frame, self.count) }
    }
}

impl<P: Platform> fmt::Debug for FrameBlock<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameBlock").field("frame", &self.frame).field("count", &self.count).finish()
    }
}
