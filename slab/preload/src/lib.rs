//! kslab as the `malloc` of Linux programs: `LD_PRELOAD=libkslab_preload.so program`. For trying the allocator under real
//! programs; `run` in this folder does.
//!
//! The heap is a [`Malloc`] over addresses that are reserved at the first call and made memory in chunks. What is larger than
//! the largest block, 1 GiB, is mapped by itself ([`large`]).
//!
//! - A thread is a CPU ([`threads`]): it takes a number at its first call, and gives it back, with what its magazines hold,
//!   when it exits. Threads that find no number left share what all share.
//! - A fork waits until no other thread is in a call ([`threads`]), so nothing is locked in the child; there the numbers of the
//!   threads that are no more are given back. A child of `_Fork` or of a bare `clone` has no such care.
//! - A signal handler that interrupts a call is what an NMI is to a kernel: its allocations may fail, and never hang.
//! - A bad free is reported on standard error and ends the program.

mod large;
mod memory;
mod report;
mod threads;

use core::alloc::Layout;
use core::ffi::{c_int, c_void};
use core::ptr;

use kslab::Heap;
use kslab::systems::malloc::{ALIGNMENT, EINVAL, ENOMEM, Mallinfo2, Malloc};

use threads::Threads;

static HEAP: Heap<Threads> = Heap::new();

/// Attempts fail without an `errno`: there may be another.
static C: Malloc<'static, Threads> = Malloc::new(&HEAP, |_| ());

static PRELOAD: Preload = Preload;

kslab::export_malloc!(PRELOAD);

/// The calls of [`Malloc`], each within [`threads::enter`] and with memory added where there is none.
struct Preload;

fn set_errno(error: c_int) {
    // SAFETY: it is there for each thread.
    unsafe { *libc::__errno_location() = error };
}

fn no_memory() -> *mut c_void {
    set_errno(ENOMEM);
    ptr::null_mut()
}

/// What `attempt` gets, with as much more memory as a block of `layout` needs.
#[inline]
fn with_memory(layout: Layout, mut attempt: impl FnMut() -> *mut c_void) -> *mut c_void {
    let _call = threads::enter();
    loop {
        let additions = memory::additions();
        let block = attempt();
        if !block.is_null() {
            return block;
        }
        if !memory::add(layout, additions) {
            return no_memory();
        }
    }
}

#[inline]
fn allocate(size: usize, alignment: usize) -> *mut c_void {
    match Layout::from_size_align(size, alignment.max(ALIGNMENT)) {
        Ok(layout) if Heap::<Threads>::usable_size(layout).is_some() => {
            with_memory(layout, || C.memalign(alignment, size))
        }
        Ok(layout) => large::map(layout).unwrap_or_else(no_memory),
        Err(_) => no_memory(),
    }
}

impl Preload {
    #[inline]
    fn malloc(&self, size: usize) -> *mut c_void {
        allocate(size, ALIGNMENT)
    }

    #[inline]
    unsafe fn free(&self, block: *mut c_void) {
        if block.is_null() || large::unmap(block) {
            return;
        }
        let _call = threads::enter();
        // SAFETY: passed on to the caller.
        unsafe { C.free(block) };
    }

    fn calloc(&self, count: usize, size: usize) -> *mut c_void {
        let Some(bytes) = count.checked_mul(size) else { return no_memory() };
        match Layout::from_size_align(bytes, ALIGNMENT) {
            Ok(layout) if Heap::<Threads>::usable_size(layout).is_some() => {
                with_memory(layout, || C.calloc(count, size))
            }
            // What is mapped is zero.
            _ => allocate(bytes, ALIGNMENT),
        }
    }

    unsafe fn realloc(&self, block: *mut c_void, size: usize) -> *mut c_void {
        if block.is_null() {
            return self.malloc(size);
        }
        if size == 0 {
            // SAFETY: passed on to the caller.
            unsafe { self.free(block) };
            return ptr::null_mut();
        }
        let Ok(layout) = Layout::from_size_align(size, ALIGNMENT) else { return no_memory() };
        let old = large::size(block);
        if old.is_none() && Heap::<Threads>::usable_size(layout).is_some() {
            // SAFETY: passed on to the caller.
            return with_memory(layout, || unsafe { C.realloc(block, size) });
        }
        let new = self.malloc(size);
        if !new.is_null() {
            let kept = self.malloc_usable_size(block).min(size);
            // SAFETY: two blocks, both with so many bytes.
            unsafe { ptr::copy_nonoverlapping(block.cast::<u8>(), new.cast::<u8>(), kept) };
            // SAFETY: the caller gives it up for the new one.
            unsafe { self.free(block) };
        }
        new
    }

    unsafe fn reallocarray(&self, block: *mut c_void, count: usize, size: usize) -> *mut c_void {
        match count.checked_mul(size) {
            // SAFETY: passed on to the caller.
            Some(bytes) => unsafe { self.realloc(block, bytes) },
            None => no_memory(),
        }
    }

    fn memalign(&self, alignment: usize, size: usize) -> *mut c_void {
        if alignment.is_power_of_two() {
            return allocate(size, alignment);
        }
        set_errno(EINVAL);
        ptr::null_mut()
    }

    fn aligned_alloc(&self, alignment: usize, size: usize) -> *mut c_void {
        self.memalign(alignment, size)
    }

    unsafe fn posix_memalign(&self, place: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
        if !alignment.is_power_of_two() || !alignment.is_multiple_of(size_of::<*mut c_void>()) {
            return EINVAL;
        }
        // SAFETY: it is there for each thread.
        let errno = unsafe { *libc::__errno_location() };
        let block = allocate(size, alignment);
        set_errno(errno);
        if block.is_null() {
            return ENOMEM;
        }
        // SAFETY: says the caller.
        unsafe { place.write(block) };
        0
    }

    fn valloc(&self, size: usize) -> *mut c_void {
        allocate(size, memory::PAGE)
    }

    fn pvalloc(&self, size: usize) -> *mut c_void {
        size.max(1).checked_next_multiple_of(memory::PAGE).map_or_else(no_memory, |size| allocate(size, memory::PAGE))
    }

    fn malloc_usable_size(&self, block: *const c_void) -> usize {
        large::size(block).unwrap_or_else(|| {
            let _call = threads::enter();
            C.malloc_usable_size(block)
        })
    }

    fn mallinfo2(&self) -> Mallinfo2 {
        let _call = threads::enter();
        C.mallinfo2()
    }

    fn malloc_trim(&self, pad: usize) -> c_int {
        let _call = threads::enter();
        if pad > 0 && C.mallinfo2().fordblks <= pad {
            return 0;
        }
        // What goes back to the page frames alone is not the system's.
        C.malloc_trim(0);
        c_int::from(memory::give_back())
    }
}
