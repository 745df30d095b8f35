//! BareMetal-OS's pages of 2 MiB, after its `os/syscalls/memory.asm`, over the page frames of a heap.
//!
//! | call | promise |
//! |---|---|
//! | `os_mem_allocate(n)` | `n` pages in a row, searched from the top down; null where there are none, and for `n` = 0 |
//! | `os_mem_release(address, n)` | gives pages back, and says how many |
//! | `os_mem_get_free()` | how many pages are free |
//! | the byte map | a byte for each page: [`FREE`], [`USED`], or [`NONE`] for what is no memory for programs |
//!
//! The original looks at its byte map alone, which has all memory, and believes every release. Here the memory is that of the
//! page frames, where a page is a block of order 9, and the rest of the kernel takes some of it: such pages are [`NONE`] in the map as
//! long as that has them. A release is refused, and 0, unless each of its pages is [`USED`]. As in the original, it may be of
//! other pages than were allocated at once.
//!
//! Locks: none of its own. A byte becomes [`USED`] when its page has been allocated, by whoever did so, and one CPU alone can change
//! it back, just before it frees the page.

use core::fmt;
use core::ptr;

use crate::Heap;
use crate::frames::{Frame, Frames, Order, Owner};
use crate::platform::Platform;
use crate::sync::AtomicU8;
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// In the byte map: no memory, or not for programs.
pub const NONE: u8 = 0;
/// In the byte map: free.
pub const FREE: u8 = 1;
/// In the byte map: allocated by [`os_mem_allocate`](Pages::os_mem_allocate).
pub const USED: u8 = 2;

/// Page frames in a page.
const FRAMES: u32 = Order::LARGE_PAGE.frames();

/// Pages of 2 MiB.
///
/// ```
/// # use kslab::memory::Region;
/// # use kslab::{Heap, platform::NoInterrupts};
/// use std::sync::atomic::AtomicU8;
/// use kslab::systems::pages::Pages;
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// /// For memory up to 16 MiB.
/// static MAP: [AtomicU8; 8] = [const { AtomicU8::new(0) }; 8];
/// static PAGES: Pages<'static, NoInterrupts> = Pages::new(&HEAP, 0, &MAP);
/// # let mut memory = vec![0_u64; 16 << 17];
/// # let start = memory.as_mut_ptr().cast::<u8>();
/// # let start = start.wrapping_add(start.align_offset(2 << 20));
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init([Region::usable(0, 14 << 20)], start) }.unwrap();
///
/// let free = PAGES.os_mem_get_free();
/// let pages = PAGES.os_mem_allocate(2);
/// assert!(!pages.is_null());
/// assert_eq!(PAGES.os_mem_get_free(), free - 2);
/// // SAFETY: nobody uses them any more.
/// assert_eq!(unsafe { PAGES.os_mem_release(pages, 2) }, 2);
/// // SAFETY: it is refused.
/// assert_eq!(unsafe { PAGES.os_mem_release(pages, 2) }, 0);
/// ```
pub struct Pages<'a, P> {
    frames: &'a Frames<P>,
    first: Frame,
    map: &'a [AtomicU8],
}

impl<'a, P: Platform> Pages<'a, P> {
    /// Those of the memory of `heap` that lie from the physical address `start` on, rounded down to 2 MiB, as many as `map` has
    /// bytes, all of which are 0. All the memory that the map is for should be added to the heap, be it sooner or later.
    pub const fn new(heap: &'a Heap<P>, start: u64, map: &'a [AtomicU8]) -> Self {
        let number = start / Order::LARGE_PAGE.bytes() as u64 * FRAMES as u64;
        let first = Frame::new(if number < Frame::LIMIT as u64 { number as u32 } else { Frame::LIMIT });
        Self { frames: heap.frames(), first, map }
    }

    /// `pages` pages in a row, the highest there are, not initialised; null where there are none.
    pub fn os_mem_allocate(&self, pages: usize) -> *mut u8 {
        if pages == 0 || pages > self.map.len() {
            return ptr::null_mut();
        }
        self.frames.settle();
        self.search(pages).map_or(ptr::null_mut(), |page| self.frames.pointer(page))
    }

    fn search(&self, pages: usize) -> Option<Frame> {
        let mut in_a_row = 0;
        for index in (0..self.map.len()).rev() {
            in_a_row = if self.is_free(index) { in_a_row + 1 } else { 0 };
            // Somebody may be quicker.
            if in_a_row >= pages && self.take_all(index, pages) {
                return self.frame(index);
            }
        }
        None
    }

    /// Takes all of the pages, or none.
    fn take_all(&self, first: usize, pages: usize) -> bool {
        let taken = (first..first + pages).take_while(|&index| self.take(index)).count();
        if taken < pages {
            (first..first + taken).for_each(|index| _ = self.release(index));
        }
        taken == pages
    }

    fn take(&self, index: usize) -> bool {
        let taken = self.frame(index).is_some_and(|frame| self.frames.allocate_at(frame, FRAMES));
        if taken {
            self.map[index].store(USED, Release);
        }
        taken
    }

    /// Gives one page back, if it is used.
    fn release(&self, index: usize) -> bool {
        let claimed = self.map[index].compare_exchange(USED, FREE, AcqRel, Relaxed).is_ok();
        if let Some(frame) = self.frame(index).filter(|_| claimed) {
            // SAFETY: it is used, says the map, and so allocated by `take`; nobody else frees it.
            unsafe { self.frames.free_run(frame, FRAMES) };
        }
        claimed
    }

    /// Gives `pages` pages back from `address` on, and says how many: 0, and nothing has changed, unless all of them are used.
    ///
    /// # Safety
    ///
    /// Nobody uses the pages any more.
    pub unsafe fn os_mem_release(&self, address: *mut u8, pages: usize) -> usize {
        let Some(first) = self.index_of(address) else { return 0 };
        let are_used = |used: &[AtomicU8]| used.iter().all(|byte| byte.load(Acquire) == USED);
        let end = first.checked_add(pages);
        if !end.and_then(|end| self.map.get(first..end)).is_some_and(are_used) {
            return 0;
        }
        (first..first + pages).filter(|&index| self.release(index)).count()
    }

    /// How many pages are free. The map says which, from now on.
    pub fn os_mem_get_free(&self) -> usize {
        self.frames.settle();
        let free = self.map.iter().enumerate().filter(|&(index, byte)| {
            let before = byte.load(Acquire);
            let now = if self.is_free(index) { FREE } else { NONE };
            before != USED && byte.compare_exchange(before, now, AcqRel, Relaxed).is_ok() && now == FREE
        });
        free.count()
    }

    /// The byte map, as it was when [`os_mem_get_free`](Self::os_mem_get_free) was last called; what is [`USED`] is so now.
    pub const fn map(&self) -> &'a [AtomicU8] {
        self.map
    }

    /// Whether all of a page is in a free block.
    fn is_free(&self, index: usize) -> bool {
        let Some(frame) = self.frame(index) else { return false };
        let in_block =
            |order| matches!(self.frames.owner(frame.block_start(order)), Owner::Free(size) if size >= order);
        Order::LARGE_PAGE.and_up().any(in_block)
    }

    fn frame(&self, index: usize) -> Option<Frame> {
        let number = u32::try_from(index).ok()?.checked_mul(FRAMES)?.checked_add(self.first.number())?;
        Frame::some(number)
    }

    /// The number of the page that starts at `address`.
    fn index_of(&self, address: *const u8) -> Option<usize> {
        let frame =
            self.frames.frame_of(address).filter(|frame| self.frames.pointer(*frame).cast_const() == address)?;
        let frames = frame.number().checked_sub(self.first.number())?;
        frames.is_multiple_of(FRAMES).then_some((frames / FRAMES) as usize)
    }
}

impl<P> fmt::Debug for Pages<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("first", &self.first).field("pages", &self.map.len()).finish_non_exhaustive()
    }
}

/// Makes the functions that C calls, `os_mem_allocate` and the others, for [`Pages`] that are a `static`.
///
/// ```ignore
/// static PAGES: Pages<'static, MyCpus> = Pages::new(&HEAP, 0, &MAP);
/// kslab::export_pages!(PAGES);
/// ```
#[macro_export]
macro_rules! export_pages {
    ($pages:path) => {
        const _: () = {
            use ::core::ffi::c_void;

            #[unsafe(no_mangle)]
            extern "C" fn os_mem_allocate(pages: usize) -> *mut c_void {
                $pages.os_mem_allocate(pages).cast()
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn os_mem_release(address: *mut c_void, pages: usize) -> usize {
                // SAFETY: passed on to the caller.
                unsafe { $pages.os_mem_release(address.cast(), pages) }
            }
            #[unsafe(no_mangle)]
            extern "C" fn os_mem_get_free() -> usize {
                $pages.os_mem_get_free()
            }
        };
    };
}

#[cfg(test)]
mod tests;
