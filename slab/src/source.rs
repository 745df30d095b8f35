//! Memory that somebody else owns and lends, page frame by page frame.
//!
//! A kernel whose own allocator keeps the memory map lends the heap what it needs, by a [`FrameSource`]. A heap's page
//! frames are such a source too: that is how several heaps stand side by side, each with a name and a limit, and each
//! given back as a whole; see [`Heap::create_heap`](crate::Heap::create_heap).

use crate::sync::{AtomicUsize, Ordering};
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;

use crate::cache::{AllocError, Caches};
use crate::heap::Heap;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

/// Lends page frames. It is called with no lock held.
///
/// # Safety
///
/// What [`lend`](Self::lend) returns is memory that nobody else uses until it is taken back.
pub unsafe trait FrameSource: Sync {
    /// The start of `frames` page frames in a row, mapped and writable, aligned to a page; `None` where it has none.
    ///
    /// A source that has only single frames says `None` to more than one; then the heap has no objects above 2 KiB or so.
    fn lend(&self, frames: usize) -> Option<NonNull<u8>>;

    /// Takes a frame back. Frames that were lent together come back one by one, in any order, and not necessarily all.
    fn take_back(&self, frame: NonNull<u8>);
}

/// A part of a heap's page frames, lent to a heap within it.
#[derive(Debug)]
struct Part<'p, P> {
    caches: &'p Caches<P>,
    lent: AtomicUsize,
    /// The most that may be lent.
    limit: usize,
}

// SAFETY: the frames are allocated from an allocator that hands them to nobody else until they are freed.
unsafe impl<P: Platform> FrameSource for Part<'_, P> {
    fn lend(&self, frames: usize) -> Option<NonNull<u8>> {
        let grow = |lent: usize| lent.checked_add(frames).filter(|&lent| lent <= self.limit);
        self.lent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).ok()?;
        let first = u32::try_from(frames).ok().and_then(|count| self.caches.allocate_lent(count));
        if first.is_none() {
            self.lent.fetch_sub(frames, Ordering::Relaxed);
        }
        NonNull::new(self.caches.frames().pointer(first?))
    }

    fn take_back(&self, frame: NonNull<u8>) {
        let frames = self.caches.frames();
        let Some(frame) = frames.frame_of(frame.as_ptr()) else { return };
        frames.free_metadata(frame, 1);
        self.lent.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A heap within another, with a limit; dropping it gives everything back that was allocated from it.
///
/// ```
/// # use kslab::platform::NoInterrupts;
/// # use core::alloc::Layout;
/// use kslab::Heap;
///
/// # static HEAP: Heap<NoInterrupts> = Heap::new();
/// # let mut memory = vec![0_u64; 512 * 512];
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
/// let process = HEAP.create_heap("process 7", 512 << 10)?;
/// let block = process.allocate(Layout::new::<[u64; 100]>()).expect("memory");
/// assert!(process.allocate(Layout::new::<[u8; 1 << 20]>()).is_none(), "above its limit");
/// drop(process); // and the block with it
/// # Ok::<(), kslab::AllocError>(())
/// ```
pub struct ChildHeap<'p, P: Platform> {
    parent: &'p Heap<P>,
    heap: NonNull<Heap<P>>,
    part: NonNull<Part<'p, P>>,
}

impl<'p, P: Platform> ChildHeap<'p, P> {
    pub(crate) fn new(parent: &'p Heap<P>, name: &'static str, limit: usize) -> Result<Self, AllocError> {
        let caches = parent.caches();
        let part =
            caches.allocate_metadata(size_of::<Part<'p, P>>()).ok_or(AllocError::NoMemory)?.cast::<Part<'p, P>>();
        let Some(heap) = caches.allocate_metadata(size_of::<Heap<P>>()) else {
            // SAFETY: allocated above with this size.
            unsafe { caches.free_metadata(part.as_ptr().cast(), size_of::<Part<'p, P>>()) };
            return Err(AllocError::NoMemory);
        };
        let heap = heap.cast::<Heap<P>>();
        let frames = Part { caches, lent: AtomicUsize::new(0), limit: limit / FRAME_SIZE };
        // SAFETY: both blocks are ours, large enough and aligned as metadata is.
        unsafe {
            part.write(frames);
            Heap::write_new(heap.as_ptr(), name);
        }
        let child = Self { parent, heap, part };
        // SAFETY: `part` stays where it is until `drop`, which first takes it from the heap, and its frames for `'p`. That is
        // as long as the heap can use it, though the type of the place for it is longer.
        let source = unsafe {
            core::mem::transmute::<&(dyn FrameSource + '_), &'static (dyn FrameSource + 'static)>(part.as_ref())
        };
        child.caches().set_source(source);
        Ok(child)
    }
}

impl<P: Platform> Deref for ChildHeap<'_, P> {
    type Target = Heap<P>;

    fn deref(&self) -> &Heap<P> {
        // SAFETY: written in `new`, and there until `drop`.
        unsafe { self.heap.as_ref() }
    }
}

impl<P: Platform> Drop for ChildHeap<'_, P> {
    fn drop(&mut self) {
        // SAFETY: written in `new`, and there until the end of this function.
        let part = unsafe { self.part.as_ref() };
        let give = &mut |frame: *mut u8| _ = NonNull::new(frame).map(|frame| part.take_back(frame));
        // SAFETY: nobody borrows the heap any more, and so nobody has anything of it.
        unsafe { self.frames().dissolve(give) };
        let caches = self.parent.caches();
        // SAFETY: allocated in `new` with these sizes; nobody has them after this.
        unsafe {
            caches.free_metadata(self.heap.as_ptr().cast(), size_of::<Heap<P>>());
            caches.free_metadata(self.part.as_ptr().cast(), size_of::<Part<'_, P>>());
        }
    }
}

// SAFETY: a heap is used by any CPU, and so is what it stands on.
unsafe impl<P: Platform> Send for ChildHeap<'_, P> {}
// SAFETY: as above.
unsafe impl<P: Platform> Sync for ChildHeap<'_, P> {}

impl<P: Platform> fmt::Debug for ChildHeap<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildHeap").field("name", &self.name()).finish_non_exhaustive()
    }
}
