//! slabmalloc over pages of the arena, put together as in its example of a global allocator.

use std::alloc::Layout;
use std::ptr::{self, NonNull};

use slabmalloc::{AllocationError, Allocator, LargeObjectPage, ObjectPage, ZoneAllocator};

use super::locked::{Locked, Unlocked};
use super::peer;
use crate::arena::Arena;

const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

/// Where pages come from: small ones from the start of the arena, large ones from its end.
struct Pager {
    arena: Arena,
    /// The small pages that were freed, each with a pointer to the next.
    free: *mut u8,
}

impl Pager {
    fn page(&mut self) -> *mut u8 {
        if !self.free.is_null() {
            let page = self.free;
            // SAFETY: a page in the list starts with a pointer.
            self.free = unsafe { page.cast::<*mut u8>().read() };
            return page;
        }
        if self.arena.bytes < PAGE {
            return ptr::null_mut();
        }
        let page = self.arena.start;
        self.arena = Arena { start: page.wrapping_add(PAGE), bytes: self.arena.bytes - PAGE };
        page
    }

    fn free_page(&mut self, page: *mut u8) {
        // SAFETY: the page is nobody's any more.
        unsafe { page.cast::<*mut u8>().write(self.free) };
        self.free = page;
    }

    fn large_page(&mut self) -> *mut u8 {
        if self.arena.bytes < LARGE_PAGE {
            return ptr::null_mut();
        }
        self.arena.bytes -= LARGE_PAGE;
        self.arena.end()
    }
}

struct Zones {
    zones: ZoneAllocator<'static>,
    pager: Pager,
}

// SAFETY: the pages are the process's, and whoever has the zones has them all.
unsafe impl Send for Zones {}

impl Zones {
    /// Gives the zone of `layout` another page.
    #[cold]
    fn refill(&mut self, layout: Layout) -> Option<()> {
        if layout.size() <= ZoneAllocator::MAX_BASE_ALLOC_SIZE {
            // SAFETY: an untouched page is as the zone wants it.
            unsafe { self.zones.refill(layout, self.pager.page().cast::<ObjectPage>().as_mut()?) }.ok()
        } else {
            // SAFETY: as above.
            unsafe { self.zones.refill_large(layout, self.pager.large_page().cast::<LargeObjectPage>().as_mut()?) }.ok()
        }
    }
}

static HEAP: Locked<Option<Zones>> = Locked::new(None);

peer!(Slabmalloc, HEAP, |arena| {
    let pager = Pager { arena, free: ptr::null_mut() };
    *HEAP.0.lock() = Some(Zones { zones: ZoneAllocator::new(), pager });
});

// SAFETY: it is an allocator.
unsafe impl Unlocked for Option<Zones> {
    #[inline]
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8 {
        let Some(heap) = self else { return ptr::null_mut() };
        if layout.size() == PAGE {
            return heap.pager.page();
        }
        let block = match heap.zones.allocate(layout) {
            Err(AllocationError::OutOfMemory) => heap.refill(layout).and_then(|()| heap.zones.allocate(layout).ok()),
            allocated => allocated.ok(),
        };
        block.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn free(&mut self, block: *mut u8, layout: Layout) {
        let Some(heap) = self else { return };
        if layout.size() == PAGE {
            return heap.pager.free_page(block);
        }
        // SAFETY: a block is not null.
        let block = unsafe { NonNull::new_unchecked(block) };
        heap.zones.deallocate(block, layout).expect("a block of its own");
    }
}
