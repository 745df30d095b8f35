//! Allocators that are given a range of memory, and one lock.

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::slice;

use talc::TalcLock;
use talc::source::Manual;

use super::locked::{Locked, Unlocked};
use super::peer;

static LINKED_LIST: Locked<linked_list_allocator::Heap> = Locked::new(linked_list_allocator::Heap::empty());

peer!(LinkedList, LINKED_LIST, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    unsafe { LINKED_LIST.0.lock().init(arena.start, arena.bytes) }
});

// SAFETY: it is an allocator.
unsafe impl Unlocked for linked_list_allocator::Heap {
    #[inline]
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8 {
        self.allocate_first_fit(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn free(&mut self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller; a block is not null.
        unsafe { self.deallocate(NonNull::new_unchecked(block), layout) }
    }
}

static TALC: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

peer!(Talc, TALC, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    unsafe { TALC.lock().claim(arena.start, arena.bytes) }.expect("enough memory");
});

/// Of blocks of up to 32 * 2^28 bytes.
type Tlsf = rlsf::Tlsf<'static, u32, u32, 28, 32>;

static RLSF: Locked<Tlsf> = Locked::new(Tlsf::new());

peer!(Rlsf, RLSF, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    let pool = unsafe { slice::from_raw_parts_mut(arena.start.cast(), arena.bytes) };
    RLSF.0.lock().insert_free_block(pool);
});

// SAFETY: it is an allocator.
unsafe impl Unlocked for Tlsf {
    #[inline]
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8 {
        Tlsf::allocate(self, layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn free(&mut self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller; a block is not null.
        unsafe { self.deallocate(NonNull::new_unchecked(block), layout.align()) }
    }
}

type Buddies = buddy_system_allocator::Heap<33>;

static BUDDY_SYSTEM: Locked<Buddies> = Locked::new(Buddies::new());

peer!(BuddySystem, BUDDY_SYSTEM, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    unsafe { BUDDY_SYSTEM.0.lock().init(arena.start.expose_provenance(), arena.bytes) }
});

// SAFETY: it is an allocator.
unsafe impl Unlocked for Buddies {
    #[inline]
    unsafe fn allocate(&mut self, layout: Layout) -> *mut u8 {
        self.alloc(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn free(&mut self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller; a block is not null.
        unsafe { self.dealloc(NonNull::new_unchecked(block), layout) }
    }
}

/// It comes with the same lock around it, and eight equal parts of memory, one a size.
static SLAB_ALLOCATOR: slab_allocator_rs::LockedHeap = slab_allocator_rs::LockedHeap::empty();

peer!(SlabAllocator, SLAB_ALLOCATOR, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    unsafe { SLAB_ALLOCATOR.init(arena.start.expose_provenance(), arena.bytes) }
});
