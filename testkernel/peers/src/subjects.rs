//! The allocators: each over memory of its own, as its documentation says to set it up.

use std::{
    alloc::{GlobalAlloc, Layout},
    cell::RefCell,
    ptr::{self, NonNull},
    slice,
};

use kslab::{Cache, Heap, platform::NoInterrupts};
use talc::{TalcCell, source::Manual};

use crate::run::{Block, Memory};

/// An allocator that is misused.
pub(crate) trait Subject {
    const NAME: &'static str;
    /// The crate whose version matters: every one but kslab, which is the one at hand.
    const CRATE: Option<&'static str> = Some(Self::NAME);
    /// Bytes of a block without slack: what comes behind it is a neighbour's or the allocator's.
    const SIZE: usize;

    fn new(memory: &Memory) -> Self;

    /// A block; null where there is none.
    #[track_caller]
    fn allocate(&self, layout: Layout) -> *mut u8;

    /// # Safety
    ///
    /// The bad ones excepted, `block` is from here, for `layout`, and nobody uses it any more.
    #[track_caller]
    unsafe fn free(&self, block: *mut u8, layout: Layout);

    /// A block of the nearest relative: by default of another instance, which has `memory`.
    fn relatives(&self, memory: &Memory, layout: Layout) -> *mut u8
    where
        Self: Sized,
    {
        Self::new(memory).allocate(layout)
    }

    /// Where it keeps data of its own, as near to these neighbouring blocks as there is any.
    fn own_data(&self, blocks: &[Block]) -> *mut u8;

    /// Memory that is not used leaves where it was, if it does not by itself.
    fn give_back(&self) {}

    /// Looks for damage, if it can.
    fn check(&self) {}
}

/// kslab, as it is or with all checks.
pub(crate) struct Kslab<const CHECKED: bool> {
    heap: &'static Heap<NoInterrupts>,
}

impl<const CHECKED: bool> Subject for Kslab<CHECKED> {
    const NAME: &'static str = if CHECKED { "kslab with checks" } else { "kslab" };
    const CRATE: Option<&'static str> = None;
    const SIZE: usize = 64;

    fn new(memory: &Memory) -> Self {
        let heap: &Heap<_> = Box::leak(Box::new(Heap::new()));
        // SAFETY: the memory is nobody else's.
        unsafe { heap.init_range(memory.start, memory.bytes) }.expect("enough memory");
        if CHECKED {
            heap.set_checks("*:all").expect("a check");
        }
        Self { heap }
    }

    fn allocate(&self, layout: Layout) -> *mut u8 {
        self.heap.allocate(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn free(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.heap.free(NonNull::new(block).expect("a block"), layout) }
    }

    /// An object of a cache.
    fn relatives(&self, _: &Memory, layout: Layout) -> *mut u8 {
        let cache = Box::leak(Box::new(Cache::new(self.heap.caches(), "sockets", layout)));
        cache.allocate().expect("memory").as_ptr()
    }

    /// The header of their slab, which the first slab of a cache starts with.
    fn own_data(&self, blocks: &[Block]) -> *mut u8 {
        blocks[0].start.map_addr(|address| address & !4095)
    }

    fn give_back(&self) {
        self.heap.shrink();
    }

    fn check(&self) {
        self.heap.check_objects();
    }
}

pub(crate) struct LinkedList(linked_list_allocator::LockedHeap);

impl Subject for LinkedList {
    const NAME: &'static str = "linked_list_allocator";
    const SIZE: usize = 64;

    fn new(memory: &Memory) -> Self {
        // SAFETY: the memory is nobody else's.
        Self(unsafe { linked_list_allocator::LockedHeap::new(memory.start, memory.bytes) })
    }

    fn allocate(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the layout is not empty.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn free(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.0.dealloc(block, layout) }
    }

    /// A hole starts with its size.
    fn own_data(&self, blocks: &[Block]) -> *mut u8 {
        blocks[blocks.len() - 1].end()
    }
}

pub(crate) struct Buddy(buddy_system_allocator::LockedHeap<32>);

impl Subject for Buddy {
    const NAME: &'static str = "buddy_system_allocator";
    const SIZE: usize = 64;

    fn new(memory: &Memory) -> Self {
        let heap = buddy_system_allocator::LockedHeap::new();
        // SAFETY: the memory is nobody else's.
        unsafe { heap.lock().init(memory.start.expose_provenance(), memory.bytes) };
        Self(heap)
    }

    fn allocate(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the layout is not empty.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn free(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.0.dealloc(block, layout) }
    }

    /// A free block starts with a link.
    fn own_data(&self, blocks: &[Block]) -> *mut u8 {
        blocks[blocks.len() - 1].end()
    }
}

pub(crate) struct Talc {
    talc: TalcCell<Manual>,
    start: *mut u8,
}

impl Subject for Talc {
    const NAME: &'static str = "talc";
    const SIZE: usize = 56;

    fn new(memory: &Memory) -> Self {
        let talc = TalcCell::new(Manual);
        // SAFETY: the memory is nobody else's.
        unsafe { talc.claim(memory.start, memory.bytes) }.expect("enough memory");
        Self { talc, start: memory.start }
    }

    fn allocate(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the layout is not empty.
        unsafe { self.talc.alloc(layout) }
    }

    unsafe fn free(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.talc.dealloc(block, layout) }
    }

    /// The lists of gaps, with which its memory starts.
    fn own_data(&self, _: &[Block]) -> *mut u8 {
        self.start.wrapping_add(64)
    }
}

pub(crate) struct Rlsf(RefCell<rlsf::Tlsf<'static, u32, u32, 20, 32>>);

impl Subject for Rlsf {
    const NAME: &'static str = "rlsf";
    const SIZE: usize = 48;

    fn new(memory: &Memory) -> Self {
        // SAFETY: the memory is nobody else's, and never freed.
        let pool = unsafe { slice::from_raw_parts_mut(memory.start.cast(), memory.bytes) };
        let mut tlsf = rlsf::Tlsf::new();
        tlsf.insert_free_block(pool);
        Self(RefCell::new(tlsf))
    }

    fn allocate(&self, layout: Layout) -> *mut u8 {
        self.0.borrow_mut().allocate(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn free(&self, block: *mut u8, layout: Layout) {
        let block = NonNull::new(block).expect("a block");
        // SAFETY: passed on to the caller.
        unsafe { self.0.borrow_mut().deallocate(block, layout.align()) }
    }

    /// The header before each block.
    fn own_data(&self, blocks: &[Block]) -> *mut u8 {
        blocks[1].start.wrapping_sub(16)
    }
}
