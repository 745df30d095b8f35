//! A machine for tests on the host: a buffer that stands for physical memory.

use std::alloc::{Layout, alloc, dealloc};

use crate::memory::{FRAME_SIZE, Region};
use crate::platform::NoInterrupts;

pub(crate) type Heap = crate::Heap<NoInterrupts>;

/// As much as any alignment that a test asks for.
const ALIGN: usize = 4 << 20;

/// Memory at a physical address of choice. It must outlive every heap over it.
#[derive(Debug)]
pub(crate) struct Machine {
    start: u64,
    buffer: *mut u8,
    layout: Layout,
}

impl Machine {
    /// `frames` page frames from the physical address `start`, a multiple of 4 MiB.
    pub(crate) fn new(start: u64, frames: usize) -> Self {
        assert!(start.is_multiple_of(ALIGN as u64));
        let layout = Layout::from_size_align(frames * FRAME_SIZE, ALIGN).unwrap();
        // SAFETY: the layout is not empty.
        let buffer = unsafe { alloc(layout) };
        assert!(!buffer.is_null());
        Self { start, buffer, layout }
    }

    /// Where physical address 0 would be.
    pub(crate) fn base(&self) -> *mut u8 {
        self.buffer.wrapping_sub(self.start as usize)
    }

    /// All of it, usable.
    pub(crate) fn region(&self) -> Region {
        Region::usable(self.start, self.layout.size() as u64)
    }

    /// The region of `frames` frames from the `first`th on.
    pub(crate) fn usable(&self, first: usize, frames: usize) -> Region {
        assert!((first + frames) * FRAME_SIZE <= self.layout.size());
        Region::usable(self.start + (first * FRAME_SIZE) as u64, (frames * FRAME_SIZE) as u64)
    }

    /// A heap over all of it.
    pub(crate) fn heap(&self) -> Heap {
        let heap = Heap::new();
        // SAFETY: the memory is this machine's, which the test keeps longer than the heap.
        unsafe { heap.init([self.region()], self.base()) }.unwrap();
        heap
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.buffer, self.layout) };
    }
}

/// The message of the report that `misuse` must stop with.
pub(crate) fn report_of(misuse: impl FnOnce()) -> String {
    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(misuse));
    let report = stopped.expect_err("must be refused");
    report.downcast_ref::<String>().expect("a formatted report").clone()
}
