//! The traits of the `x86_64` crate, so that its mappers take page tables and pages from here.

use ::x86_64::PhysAddr;
use ::x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PageSize, PhysFrame};

use super::{Frame, Frames, Order};
use crate::platform::Platform;

/// The order of a page: 0, 9 or 18.
fn order_of<S: PageSize>() -> Option<Order> {
    Order::containing(u32::try_from(S::SIZE / 4096).ok()?)
}

// SAFETY: a block of that order is as large as the page and aligned to its size; it is unused, and nobody else gets it.
unsafe impl<S: PageSize, P: Platform> FrameAllocator<S> for &Frames<P> {
    fn allocate_frame(&mut self) -> Option<PhysFrame<S>> {
        let frame = self.allocate(order_of::<S>()?)?;
        PhysFrame::from_start_address(PhysAddr::new(frame.address())).ok()
    }
}

impl<S: PageSize, P: Platform> FrameDeallocator<S> for &Frames<P> {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<S>) {
        // What no frame number reaches was not allocated here; frame 0 is refused as such.
        let first = Frame::containing(frame.start_address().as_u64()).unwrap_or_default();
        // SAFETY: it is unused, says the caller.
        unsafe { self.free(first, order_of::<S>().unwrap_or(Order::ZERO)) }
    }
}
