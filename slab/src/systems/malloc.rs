//! C's `malloc`, after the manual pages malloc(3), posix_memalign(3), malloc_usable_size(3), malloc_trim(3) and mallinfo(3).
//!
//! | call | promise |
//! |---|---|
//! | `malloc(n)` | a block of `n` bytes, aligned to 16; of none, a block of its own too; null and `ENOMEM` where there is no memory |
//! | `free(p)` | null is nothing; `errno` stays |
//! | `calloc(n, m)` | all zero; null and `ENOMEM` where the product overflows |
//! | `realloc(p, n)` | null is `malloc`; no bytes is `free`, and null; the block stays as it is where it fails |
//! | `reallocarray(p, n, m)` | the same, for a product that may overflow |
//! | `memalign`, `aligned_alloc`, `valloc`, `pvalloc` | null and `EINVAL` for an alignment that is no power of two |
//! | `posix_memalign(&p, a, n)` | returns 0, `EINVAL` or `ENOMEM`; neither `errno` nor, where it fails, `p` changes |
//! | `malloc_usable_size(p)` | at least what was asked for; 0 for null |
//! | `mallinfo2()` | counts: see [`Mallinfo2`] |
//! | `malloc_trim(pad)` | 1 where memory went back to the page frames, or from them to where they were borrowed, else 0 |
//!
//! A block comes from a size class or, above 8 KiB, from whole page frames; there is none above 1 GiB. A pointer that is no
//! block is refused and reported as the heap does it, where C says nothing of what happens.

use core::alloc::Layout;
use core::ffi::{c_int, c_void};
use core::fmt;
use core::ptr::{self, NonNull};

use crate::Heap;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

/// `errno` where there is no memory.
pub const ENOMEM: c_int = 12;
/// `errno` where an argument is none.
pub const EINVAL: c_int = 22;

/// What every block is aligned to: the largest type that C has needs no more.
pub const ALIGNMENT: usize = 16;

/// What `mallinfo2` returns, in the order of malloc.h. `uordblks` and `fordblks` are `arena`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mallinfo2 {
    /// Bytes of the heap, less those of `hblkhd`.
    pub arena: usize,
    /// Free blocks: objects, and page frames that lie together.
    pub ordblks: usize,
    /// Of them, objects in magazines.
    pub smblks: usize,
    /// Runs of page frames, each a large block.
    pub hblks: usize,
    /// Their bytes.
    pub hblkhd: usize,
    /// 0, as ever since the original no longer counts it.
    pub usmblks: usize,
    /// Bytes of the objects in magazines.
    pub fsmblks: usize,
    /// Bytes of objects that are allocated, and of what the allocator needs for itself.
    pub uordblks: usize,
    /// Bytes that are free.
    pub fordblks: usize,
    /// Of them, those in page frames that are free or hold none but free objects: what `malloc_trim` can give back.
    pub keepcost: usize,
}

/// C's `malloc` over a heap.
///
/// ```
/// # use kslab::{Heap, platform::NoInterrupts};
/// use kslab::systems::malloc::Malloc;
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// static C: Malloc<'static, NoInterrupts> = Malloc::new(&HEAP, |error| eprintln!("errno is {error}"));
/// # let mut memory = vec![0_u64; 512 * 64];
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
///
/// let block = C.malloc(100);
/// assert!(!block.is_null() && block.addr() % 16 == 0);
/// assert!(C.malloc_usable_size(block) >= 100);
/// // SAFETY: nobody uses it any more.
/// unsafe { C.free(block) };
/// ```
pub struct Malloc<'a, P: Platform> {
    heap: &'a Heap<P>,
    set_errno: fn(c_int),
}

impl<'a, P: Platform> Malloc<'a, P> {
    /// Over `heap`. `set_errno` sets what C code sees as `errno`.
    pub const fn new(heap: &'a Heap<P>, set_errno: fn(c_int)) -> Self {
        Self { heap, set_errno }
    }

    /// The heap.
    pub const fn heap(&self) -> &'a Heap<P> {
        self.heap
    }

    /// A block of `size` bytes, not initialised.
    #[inline]
    pub fn malloc(&self, size: usize) -> *mut c_void {
        self.memalign(ALIGNMENT, size)
    }

    /// Frees a block.
    ///
    /// # Safety
    ///
    /// Nobody uses it any more.
    #[inline]
    pub unsafe fn free(&self, block: *mut c_void) {
        if let Some(block) = NonNull::new(block.cast()) {
            // SAFETY: passed on to the caller.
            unsafe { self.heap.free_block(block) };
        }
    }

    /// A block of `count` times `size` bytes, all zero.
    pub fn calloc(&self, count: usize, size: usize) -> *mut c_void {
        let layout = count.checked_mul(size).and_then(|bytes| Layout::from_size_align(bytes, ALIGNMENT).ok());
        self.or_no_memory(layout.and_then(|layout| self.heap.allocate_zeroed(layout)))
    }

    /// Changes the size of a block, which may move.
    ///
    /// # Safety
    ///
    /// The block is no longer valid where this returns another, or was asked for no bytes.
    pub unsafe fn realloc(&self, block: *mut c_void, size: usize) -> *mut c_void {
        let Some(old) = NonNull::new(block.cast()) else { return self.malloc(size) };
        if size == 0 {
            // SAFETY: passed on to the caller.
            unsafe { self.free(block) };
            return ptr::null_mut();
        }
        let layout = Layout::from_size_align(size, ALIGNMENT).ok();
        // SAFETY: passed on to the caller.
        self.or_no_memory(layout.and_then(|layout| unsafe { self.heap.reallocate_block(old, layout) }))
    }

    /// The same for `count` times `size` bytes.
    ///
    /// # Safety
    ///
    /// As [`realloc`](Self::realloc).
    pub unsafe fn reallocarray(&self, block: *mut c_void, count: usize, size: usize) -> *mut c_void {
        match count.checked_mul(size) {
            // SAFETY: passed on to the caller.
            Some(bytes) => unsafe { self.realloc(block, bytes) },
            None => self.or_no_memory(None),
        }
    }

    /// A block of `size` bytes, aligned to `alignment` and at least to 16.
    #[inline]
    pub fn memalign(&self, alignment: usize, size: usize) -> *mut c_void {
        if !alignment.is_power_of_two() {
            (self.set_errno)(EINVAL);
            return ptr::null_mut();
        }
        let layout = Layout::from_size_align(size, alignment.max(ALIGNMENT)).ok();
        self.or_no_memory(layout.and_then(|layout| self.heap.allocate(layout)))
    }

    /// The same, as C11 has it; since C17 the size need not be a multiple of the alignment.
    pub fn aligned_alloc(&self, alignment: usize, size: usize) -> *mut c_void {
        self.memalign(alignment, size)
    }

    /// The same into `place`, as POSIX has it: the alignment is also to be a multiple of a pointer's size.
    ///
    /// # Safety
    ///
    /// `place` may be written.
    pub unsafe fn posix_memalign(&self, place: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
        if !alignment.is_power_of_two() || !alignment.is_multiple_of(size_of::<*mut c_void>()) {
            return EINVAL;
        }
        let layout = Layout::from_size_align(size, alignment.max(ALIGNMENT)).ok();
        let Some(block) = layout.and_then(|layout| self.heap.allocate(layout)) else { return ENOMEM };
        // SAFETY: says the caller.
        unsafe { place.write(block.as_ptr().cast()) };
        0
    }

    /// A block of `size` bytes that starts at a page.
    pub fn valloc(&self, size: usize) -> *mut c_void {
        self.memalign(FRAME_SIZE, size)
    }

    /// The same, of whole pages.
    pub fn pvalloc(&self, size: usize) -> *mut c_void {
        match size.max(1).checked_next_multiple_of(FRAME_SIZE) {
            Some(size) => self.memalign(FRAME_SIZE, size),
            None => self.or_no_memory(None),
        }
    }

    /// Bytes that may be used of a block.
    pub fn malloc_usable_size(&self, block: *const c_void) -> usize {
        self.heap.block_size(block.cast()).unwrap_or(0)
    }

    /// What is where. It goes over the records of all page frames.
    pub fn mallinfo2(&self) -> Mallinfo2 {
        let mut info = Mallinfo2::default();
        self.heap.frames().for_each_pages(|_, frames| {
            info.hblks += 1;
            info.hblkhd += frames as usize * FRAME_SIZE;
        });
        let frames = self.heap.frames().stats();
        info.arena = (frames.total * FRAME_SIZE).saturating_sub(info.hblkhd);
        info.ordblks = frames.free_blocks.iter().sum::<usize>() + frames.stocked;
        info.keepcost = frames.free * FRAME_SIZE;
        info.fordblks = info.keepcost;
        self.heap.for_each_cache(|cache| {
            let free = (cache.slabs * cache.objects_per_slab).saturating_sub(cache.in_use);
            info.ordblks += free;
            info.fordblks += free * cache.object_size;
            info.smblks += cache.in_magazines;
            info.fsmblks += cache.in_magazines * cache.object_size;
            info.keepcost += cache.empty_slabs * cache.objects_per_slab * cache.object_size;
        });
        // Other CPUs may have allocated and freed while this was counted.
        info.fordblks = info.fordblks.min(info.arena);
        info.uordblks = info.arena - info.fordblks;
        info
    }

    /// Gives back what is not used, if more than `pad` bytes of page frames or objects are free.
    pub fn malloc_trim(&self, pad: usize) -> c_int {
        if pad > 0 && self.mallinfo2().fordblks <= pad {
            return 0;
        }
        let size = self.heap.size();
        let frames = self.heap.shrink();
        c_int::from(frames > 0 || self.heap.size() < size)
    }

    #[inline]
    fn or_no_memory(&self, block: Option<NonNull<u8>>) -> *mut c_void {
        match block {
            Some(block) => block.as_ptr().cast(),
            None => {
                (self.set_errno)(ENOMEM);
                ptr::null_mut()
            }
        }
    }
}

impl<P: Platform> fmt::Debug for Malloc<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Malloc").finish_non_exhaustive()
    }
}

/// Makes the functions that C calls, `malloc`, `free` and the others of [`Malloc`], for a [`Malloc`] that is a `static`.
///
/// To be called once in a program that has no other `malloc`.
///
/// ```ignore
/// static C: Malloc<'static, MyCpus> = Malloc::new(&HEAP, set_errno);
/// kslab::export_malloc!(C);
/// ```
#[macro_export]
macro_rules! export_malloc {
    ($malloc:path) => {
        const _: () = {
            use ::core::ffi::{c_int, c_void};

            #[unsafe(no_mangle)]
            extern "C" fn malloc(size: usize) -> *mut c_void {
                $malloc.malloc(size)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn free(block: *mut c_void) {
                // SAFETY: passed on to the caller, here and below.
                unsafe { $malloc.free(block) }
            }
            #[unsafe(no_mangle)]
            extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
                $malloc.calloc(count, size)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
                // SAFETY: as above.
                unsafe { $malloc.realloc(block, size) }
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn reallocarray(block: *mut c_void, count: usize, size: usize) -> *mut c_void {
                // SAFETY: as above.
                unsafe { $malloc.reallocarray(block, count, size) }
            }
            #[unsafe(no_mangle)]
            extern "C" fn memalign(alignment: usize, size: usize) -> *mut c_void {
                $malloc.memalign(alignment, size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
                $malloc.aligned_alloc(alignment, size)
            }
            #[unsafe(no_mangle)]
            unsafe extern "C" fn posix_memalign(place: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
                // SAFETY: as above.
                unsafe { $malloc.posix_memalign(place, alignment, size) }
            }
            #[unsafe(no_mangle)]
            extern "C" fn valloc(size: usize) -> *mut c_void {
                $malloc.valloc(size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn pvalloc(size: usize) -> *mut c_void {
                $malloc.pvalloc(size)
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
                $malloc.malloc_usable_size(block)
            }
            #[unsafe(no_mangle)]
            extern "C" fn mallinfo2() -> $crate::systems::malloc::Mallinfo2 {
                $malloc.mallinfo2()
            }
            #[unsafe(no_mangle)]
            extern "C" fn malloc_trim(pad: usize) -> c_int {
                $malloc.malloc_trim(pad)
            }
        };
    };
}

#[cfg(test)]
mod tests;
